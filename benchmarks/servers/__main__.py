"""``python -m benchmarks.servers NAME WORK [CPU]``: run one server, on one core if CPU names it."""

from __future__ import annotations

import importlib
import os
import sys

from . import SERVERS


def main(arguments: list[str]) -> None:
    """Run the server until it is killed."""
    if len(arguments) not in (2, 3):
        raise SystemExit("usage: python -m benchmarks.servers NAME WORK [CPU]")
    name, work = arguments[:2]
    server = SERVERS.get(name)
    if server is None:
        raise SystemExit(f"unknown server {name!r}; there are: {', '.join(SERVERS)}")
    if work not in server.works:
        raise SystemExit(f"{name} has no {work!r}; it has: {', '.join(sorted(server.works))}")
    if len(arguments) == 3:
        os.sched_setaffinity(0, {int(arguments[2])})
    module = importlib.import_module(f"{__package__}.{server.module}")
    getattr(module, server.function)(work, *server.arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
