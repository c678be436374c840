"""``python -m benchmarks import``: what importing fastlisten costs over importing socket."""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence

ROUNDS = 25
BASE, MORE = "import socket", "import socket, fastlisten"


def cpu_ms(code: str) -> float:
    """Return the user and system CPU, in milliseconds, of an interpreter that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # an import that has to compile the source would be no import to measure
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main(arguments: Sequence[str]) -> int:
    """Print the median and the middle half of so many differences, taken in turn."""
    p = argparse.ArgumentParser(prog="python -m benchmarks import", description=__doc__)
    p.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="%(default)s by default")
    rounds = p.parse_args(arguments).rounds
    if rounds < 2:
        p.error("--rounds must be at least 2")
    cpu_ms(MORE)  # the first one finds nothing in the caches
    base, more = zip(*((cpu_ms(BASE), cpu_ms(MORE)) for _ in range(rounds)), strict=True)
    low, middle, high = statistics.quantiles((m - b for b, m in zip(base, more, strict=True)), n=4)
    print(f"{BASE}: {statistics.median(base):.1f} ms; {MORE}: {statistics.median(more):.1f} ms")
    print(f"difference: {middle:.1f} ms, the middle half of {rounds} rounds {low:.1f} to {high:.1f}")
    return 0
