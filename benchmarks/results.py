"""A run's results: what the machine is, every sample, and what the samples say."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from ._build import cc, compiler_version
from .runner import Sample, Settings
from .servers import SERVERS
from .workloads import WORKLOADS

SCHEMA = 1

SPLIT_SECONDS = 1.5
"""CPU time, summed over the rounds, to split user from system by. The kernel splits by looking at who
runs, at least 100 times a second of CPU: of 150 looks, two standard errors of a part are 8 % of the
total at most (2 * sqrt(1/4 / 150)); of 375, as at 250 Hz, 5 %."""


def _first(path: str, pattern: str) -> str:
    found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    return found[1].strip() if found else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git here: the commit is unknown, as it is outside a clone
        return ""
    return answer.stdout.strip()


def machine() -> dict[str, Any]:
    """Return what bears on the figures, and nothing that names the machine.

    To be called before the run: the load average is to be the machine's without it.
    """
    packages = (
        *("fastlisten", "uvloop", "aiofastnet", "uvicorn", "httptools", "aiohttp"),
        *("gevent", "trio", "Cython"),
    )
    release = re.match(r"\d+\.\d+\.\d+", platform.release())
    return {
        "system": platform.system(),
        "kernel": release[0] if release else "",
        "architecture": platform.machine(),
        "processor": _first("/proc/cpuinfo", r"^model name\s*:\s*(.*)$"),
        "cores": os.cpu_count(),
        "memory_GiB": round(int(_first("/proc/meminfo", r"^MemTotal:\s+(\d+)")) / 2**20, 1),
        "virtual": "hypervisor" in _first("/proc/cpuinfo", r"^flags\s*:\s*(.*)$").split(),
        "python": platform.python_version(),
        "python_compiler": platform.python_compiler(),
        "cc": compiler_version(cc()),
        "go": compiler_version("go"),
        "packages": {name: version for name in packages if (version := _version(name))},
        "commit": _commit(),
        "load_average": round(os.getloadavg()[0], 2),
    }


Key = tuple[str, int, str]
"""Workload, clients at once, server."""


@dataclass(frozen=True)
class Summary:
    """What a server's samples under one workload and concurrency say."""

    workload: str
    concurrency: int
    server: str
    rounds: int
    middle: float
    """Median of the workload's figure."""
    low: float
    high: float
    """Least and greatest of the figure."""
    user: float
    system: float
    """The median shared out by all rounds' ticks; both 0 where there is no split, or not enough of it."""
    ratio: float | None
    """Median of the ratios to the workload's baseline in the same round; None without it."""
    ratio_low: float
    ratio_high: float
    ratios: tuple[float, ...]
    values: tuple[float, ...]
    """The figure of each round."""
    columns: dict[str, float]
    """The median of each metric that the workload's table has."""

    @property
    def key(self) -> Key:
        """What tells it from others of its run."""
        return self.workload, self.concurrency, self.server


@dataclass(frozen=True)
class Results:
    """All of a run."""

    date: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    samples: list[Sample]
    failures: list[str]

    @classmethod
    def of(
        cls, settings: Settings, facts: dict[str, Any], samples: list[Sample], failures: list[str]
    ) -> Results:
        """Return the results of a run that ends now; `facts`: what machine() said before it."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(date, vars(settings), facts, samples, failures)

    def write(self, path: Path) -> None:
        """Write them as JSON."""
        servers = {name: SERVERS[name].settings for name in dict.fromkeys(s.server for s in self.samples)}
        document = {
            "schema": SCHEMA,
            "date": self.date,
            "settings": self.settings,
            "machine": self.machine,
            "servers": servers,
            "failures": self.failures,
            "samples": [sample.as_json() for sample in self.samples],
        }
        path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `write` wrote. Raises ValueError when it is something else, OSError from open()."""
        try:
            document = json.loads(path.read_text())
            if document["schema"] != SCHEMA:
                raise ValueError(f"schema {document['schema']}, not {SCHEMA}")
            samples = [Sample(**sample) for sample in document["samples"]]
            date, settings, machine = document["date"], document["settings"], document["machine"]
            results = cls(date, settings, machine, samples, document["failures"])
            results.summaries()  # and so each sample has its figures
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a result of this benchmark: {error!r}") from error
        return results

    def keys(self) -> set[Key]:
        """Return what has a summary."""
        return {summary.key for summary in self.summaries()}

    def summaries(self) -> list[Summary]:
        """Return a summary for each workload, concurrency and server, in the order measured."""
        cells: dict[Key, dict[int, Sample]] = {}
        for sample in self.samples:
            if sample.workload in WORKLOADS:
                key = (sample.workload, sample.concurrency, sample.server)
                cells.setdefault(key, {})[sample.round] = sample
        order = {name: i for i, name in enumerate(WORKLOADS)}
        rows = list(SERVERS)
        keys = sorted(
            cells,
            key=lambda k: (order[k[0]], k[1], rows.index(k[2]) if k[2] in rows else len(rows)),
        )
        return [self._summary(key, cells) for key in keys]

    @staticmethod
    def _summary(key: Key, cells: dict[Key, dict[int, Sample]]) -> Summary:
        workload, concurrency, server = key
        figure = WORKLOADS[workload].figure
        samples = cells[key]
        values = [sample.figures[figure] for sample in samples.values()]
        base = cells.get((workload, concurrency, WORKLOADS[workload].baseline), {})
        # Memory has no ratio: a held connection costs the C loop none.
        ratios = tuple(
            sample.figures[figure] / base[turn].figures[figure]
            for turn, sample in sorted(samples.items())
            if turn in base and base[turn].figures[figure] > 0
        )
        if WORKLOADS[workload].method == "hold":
            ratios = ()
        user = sum(sample.figures.get("user_ticks", 0) for sample in samples.values())
        system = sum(sample.figures.get("system_ticks", 0) for sample in samples.values())
        middle = median(values)
        spent = sum(
            sample.figures["cpu_us"] * sample.figures["connections"] * 1e-6
            for sample in samples.values()
            if "user_ticks" in sample.figures
        )
        enough = figure == "cpu_us" and spent >= SPLIT_SECONDS and user + system > 0
        split = middle / (user + system) if enough else 0.0
        return Summary(
            workload,
            concurrency,
            server,
            len(values),
            middle,
            min(values),
            max(values),
            user * split,
            system * split,
            median(ratios) if ratios else None,
            min(ratios, default=0.0),
            max(ratios, default=0.0),
            ratios,
            tuple(values),
            {
                name: median(sample.figures[name] for sample in samples.values())
                for name in WORKLOADS[workload].columns or (figure,)
            },
        )


def rank_test(old: tuple[float, ...], new: tuple[float, ...]) -> float:
    """Return the two-sided p-value of Mann and Whitney's U test, exact, ties included.

    Of all ways to deal the pooled values into two heaps of these sizes, the share in which the
    rank sum lies at least as far from its mean as the one seen. Counted, not approximated: the
    samples are few.
    """
    pooled = sorted(old + new)
    # Twice the middle rank of equal values, so that it is a whole number.
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(pooled)) if a != b), len(pooled)]
    doubled = {pooled[a]: a + b + 1 for a, b in pairwise(starts)}
    ranks = [doubled[value] for value in pooled]
    seen = sum(doubled[value] for value in old)
    # ways[k][s]: how many choices of k of the values have the doubled rank sum s.
    ways: list[dict[int, int]] = [{0: 1}] + [{} for _ in old]
    for rank in ranks:
        for k in range(len(old), 0, -1):
            for total, count in ways[k - 1].items():
                ways[k][total + rank] = ways[k].get(total + rank, 0) + count
    mean = len(old) * (len(pooled) + 1)  # of the doubled sum
    far = sum(n for total, n in ways[len(old)].items() if abs(total - mean) >= abs(seen - mean))
    return far / sum(ways[len(old)].values())
