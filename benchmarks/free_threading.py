"""``python -m benchmarks.free_threading``: what a second core brings serve() where there is no GIL.

The one figure that is a rate, because it is the cores that are compared: handlers that compute, with one
thread and with two, and with two in the same build with its GIL on (PYTHON_GIL=1).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import sysconfig
from collections.abc import Sequence

from .runner import SampleError, figures, load, running
from .servers import SERVERS

ROWS = (
    ("threads=1", 1, "0"),
    ("threads=2", 2, "0"),
    ("threads=2, GIL on", 2, "1"),
)
"""What a row is called, its threads, and PYTHON_GIL."""

CLIENTS = 8
WARM_UP = 200
REQUESTS = 3_000
ROUNDS = 3


def sample(threads: int, gil: str) -> tuple[float, float]:
    """Return the requests a second, and how many cores the server was running on."""
    server = SERVERS[f"fastlisten-threads-{threads}"]
    with running(server, "compute", None, "env", f"PYTHON_GIL={gil}") as process:
        found = figures(load(process, "echo", WARM_UP, REQUESTS, CLIENTS))
    return 1e6 / found["wall_us"], found["busy"]


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.free_threading", description=__doc__)
    p.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"{ROUNDS} by default")
    rounds = p.parse_args(arguments).rounds
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise SystemExit(
            "this Python has a GIL: a free-threaded build is needed, .ci/get-python 3.13t makes one"
        )
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed")
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in ROWS}
    for _ in range(rounds):  # interleaved: what slows the machine for a while slows all
        for name, threads, gil in ROWS:
            try:
                samples[name].append(sample(threads, gil))
            except (SampleError, RuntimeError) as error:  # no compiler
                raise SystemExit(str(error)) from None
    print(f"CPython {sys.version.split()[0]}, free-threaded; {rounds} rounds of {REQUESTS:,} requests")
    print("| serve() | requests a second, median | least | greatest | cores |")
    print("|---|---|---|---|---|")
    for name, taken in samples.items():
        rates, cores = zip(*taken, strict=True)
        print(
            f"| {name} | {statistics.median(rates):,.0f} | {min(rates):,.0f} | {max(rates):,.0f} "
            f"| {statistics.median(cores):.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
