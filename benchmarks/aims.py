"""``python -m benchmarks aims RUN.json``: what the event loops should cost at most, and what a run says.

A ratio is that of two servers in the same round, as everywhere here; what a run has nothing of is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from .results import Results
from .workloads import CLIENTS


@dataclass(frozen=True)
class Aim:
    """Of `workload` with so many clients: the CPU of `server` to that of `against`, `most` at most."""

    workload: str
    server: str
    against: str
    most: float
    clients: int = CLIENTS

    def ratios(self, results: Results) -> list[float]:
        """Return the ratio of each round that has both."""
        costs: dict[str, dict[int, float]] = {self.server: {}, self.against: {}}
        for sample in results.samples:
            key = sample.workload, sample.concurrency
            if key == (self.workload, self.clients) and sample.server in costs:
                costs[sample.server][sample.round] = sample.figures["cpu_us"]
        ours, theirs = costs[self.server], costs[self.against]
        return [ours[turn] / theirs[turn] for turn in sorted(ours.keys() & theirs.keys())]

    def line(self, results: Results) -> str:
        """Return it as a line of a table in Markdown, "" when the run has nothing of it."""
        ratios = self.ratios(results)
        if not ratios:
            return ""
        middle = median(ratios)
        low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (middle,) * 3
        word = "reached" if round(middle, 2) <= self.most else "**missed**"
        name = self.workload + f", {self.clients} client" * (self.clients == 1)
        return (
            f"| {name} | {self.server} | {self.against} | {self.most:.2f} | {middle:.2f} ({low:.2f} to "
            f"{high:.2f}; {min(ratios):.2f} to {max(ratios):.2f}) | {word} |"
        )


def _frameworks() -> list[Aim]:
    uvloop, fastnet = "uvloop-uvicorn", "aiofastnet-uvloop-uvicorn"
    ours, plain = "fastlisten-UvloopEventLoop-uvicorn", "fastlisten-EventLoop-uvicorn"
    return [
        Aim("uvicorn", ours, uvloop, 0.62),
        Aim("uvicorn", plain, uvloop, 0.70),
        Aim("aiohttp", "fastlisten-UvloopEventLoop-aiohttp", "uvloop-aiohttp", 0.58),
        Aim("uvicorn-10", ours, uvloop, 0.85),
        Aim("uvicorn-kept", ours, uvloop, 0.88),
        Aim("uvicorn", ours, fastnet, 0.65),
        Aim("uvicorn", plain, "aiofastnet-asyncio-uvicorn", 0.65),
    ]


def _messages() -> list[Aim]:
    ours = "fastlisten-UvloopEventLoop-protocol"
    against = (("uvloop-protocol", 0.90), ("aiofastnet-uvloop-protocol", 0.97))
    return [
        *(
            Aim(f"message-{length}", ours, theirs, most)
            for length in ("64", "4k")
            for theirs, most in against
        ),
        *(
            Aim("stream-64", "fastlisten-EventLoop-streams", "uvloop-streams", 1.00, clients)
            for clients in (1, CLIENTS)
        ),
        Aim("echo", "fastlisten-uvloop-protocol", "uvloop-protocol", 0.80),
    ]


def _tls() -> list[Aim]:
    ours, plain, uvloop = (
        f"{loop}-protocol" for loop in ("fastlisten-UvloopEventLoop", "fastlisten-EventLoop", "uvloop")
    )
    return [
        *(Aim(name, plain, uvloop, 1.00) for name in ("tls-64", "tls-64k")),
        *(Aim(name, ours, uvloop, 0.90) for name in ("tls-64", "tls-64k")),
        *(Aim(name, ours, "aiofastnet-uvloop-protocol", 1.00) for name in ("tls-64", "tls-64k")),
        Aim("tls-new", ours, uvloop, 0.97),
    ]


AIMS = [*_frameworks(), *_messages(), *_tls()]


def table(results: Results) -> list[str]:
    """Return the table in Markdown."""
    return [
        "| workload | server | against | at most | median (middle half; least to greatest) | |",
        "|---|---|---|---|---|---|",
        *filter(None, (aim.line(results) for aim in AIMS)),
    ]


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    p = argparse.ArgumentParser(prog="python -m benchmarks aims", description=__doc__)
    p.add_argument("run", type=Path, metavar="RUN.json", help="what --out has written")
    path = p.parse_args(arguments).run
    try:
        print("\n".join(table(Results.read(path))))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    return 0
