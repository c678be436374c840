"""``python -m benchmarks instructions``: user-mode instructions a connection, and a check on them.

A count under callgrind is the same today and tomorrow where a time is not, so CI can hold on to it.
Clients come in batches, while the server is stopped, so that no count depends on who had a core when.
Counted is the difference between a run with N and one with 3N connections, so the start and the end
of the interpreter fall out. The counts belong to one build of interpreter and compiler; on another
the check compares each count's ratio to the `socket.accept` loop's of the same run instead.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ._build import cc, compiler_version
from .runner import Running, SampleError, running
from .servers import SERVERS

RECORD = Path(__file__).parent / "instructions.json"

STDLIB = "socket.accept"
COUNTED = ("fastlisten-serve", "fastlisten-accept_many", "fastlisten-accept", "fastlisten-socket")
WORKS = ("close", "echo")

CONNECTIONS = 960
CLIENTS = 16
"""Clients that come at once, while the server is stopped: each batch that it accepts is of so many."""

QUESTIONS = {"close": b"", "echo": b"hello, fastlisten\n"}
"""What a client of each work says."""

PATIENCE = 20.0
"""Seconds for a server under valgrind to be where it has to be."""

GROWTH = 0.02
"""A count may grow by so much before the check fails."""

OTHER_BUILD_GROWTH = 0.15
"""The same for a ratio on a build that the record does not come from: compilers differ a little."""

Counts = dict[str, dict[str, int]]
"""Instructions by work and server."""


def is_asleep(pid: int) -> bool:
    """Return whether all threads of a process wait for something (proc_pid_stat(5))."""
    stats = (stat.read_text() for stat in Path(f"/proc/{pid}/task").glob("*/stat"))
    return all(stat.rpartition(")")[2].split()[0] == "S" for stat in stats)


def come_at_once(process: Running, question: bytes) -> None:
    """Have CLIENTS served that came while the server could not run.

    It was asleep, so it has nothing left to do for those before them, and these are one batch:
    what it does for them does not depend on who gets a core when.
    """
    pid = process.process.pid
    deadline = time.monotonic() + PATIENCE
    while not is_asleep(pid):
        if time.monotonic() > deadline:
            raise SampleError(f"not asleep within {PATIENCE:.0f} s")
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    with contextlib.ExitStack() as clients:
        sockets = [
            clients.enter_context(socket.create_connection(("127.0.0.1", process.port), PATIENCE))
            for _ in range(CLIENTS)
        ]
        for client in sockets:
            client.sendall(question)
        os.kill(pid, signal.SIGCONT)
        for client in sockets:
            with client.makefile("rb") as answer:
                if answer.read() != question:
                    raise SampleError("a wrong answer")


def count_run(server: str, work: str, connections: int) -> int:
    """Return the instructions of a server process from its start through so many connections."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        valgrind = ("valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}")
        with running(SERVERS[server], work, None, *valgrind) as process:
            for _ in range(connections // CLIENTS):
                come_at_once(process, QUESTIONS[work])
        # SIGTERM has ended the server, and callgrind has written what it counted.
        found = re.search(r"^totals: (\d+)$", out.read_text(), re.MULTILINE)
        if found is None:
            raise SampleError(f"callgrind counted nothing for {server} {work}")
        return int(found[1])


def count(server: str, work: str) -> int:
    """Return the user-mode instructions for one more connection."""
    # One after the other: side by side they would take the core that the clients need.
    less = count_run(server, work, CONNECTIONS)
    more = count_run(server, work, 3 * CONNECTIONS)
    return round((more - less) / (2 * CONNECTIONS))


def count_all() -> Counts:
    """Return the count for each work and server, saying each on standard error as it comes."""
    counts: Counts = {}
    for work in WORKS:
        counts[work] = {}
        for server in (STDLIB, *COUNTED):
            counts[work][server] = count(server, work)
            print(f"{work:6} {server:24} {counts[work][server]:8,}", file=sys.stderr, flush=True)
    return counts


def cython_version() -> str:
    """Return what fastlisten was built with: the name of the module of its functions' type."""
    importlib.import_module("fastlisten._core.loop")
    return " ".join(sorted(name for name in sys.modules if name.startswith("_cython_")))


def build_facts() -> dict[str, str]:
    """Return what the counts depend on."""
    return {
        "python": platform.python_version(),
        "python_build": " ".join(platform.python_build()),
        "python_compiler": platform.python_compiler(),
        "cc": compiler_version(cc()),
        "cython": cython_version(),
        "libc": " ".join(platform.libc_ver()),
        "architecture": platform.machine(),
        "valgrind": compiler_version("valgrind"),
    }


def minor() -> str:
    """Return the running interpreter's minor version: the key in the record."""
    return ".".join(platform.python_version_tuple()[:2])


def complaints(recorded: Counts, counts: Counts, same: bool) -> list[str]:
    """Return a line for each work and server whose count grew too much.

    `same`: the record is of this very build.
    """
    lines = []
    for work, servers in recorded.items():
        for server, was in servers.items():
            now = counts[work][server]
            if server == STDLIB:
                continue
            if same:
                then, today, unit, allowed = float(was), float(now), "instructions", GROWTH
            else:
                then, today = was / servers[STDLIB], now / counts[work][STDLIB]
                unit, allowed = f"of {STDLIB}'s", OTHER_BUILD_GROWTH
            if today > then * (1 + allowed):
                lines.append(
                    f"{work} {server}: {today:,.5g} {unit}, was {then:,.5g}: "
                    f"{today / then - 1:+.1%}, allowed {allowed:+.0%}"
                )
    return lines


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    try:
        return run(arguments)
    except (SampleError, RuntimeError) as error:  # no compiler
        raise SystemExit(str(error)) from None


def run(arguments: Sequence[str]) -> int:
    """Do what the command line says; SampleError when a server cannot be counted."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks instructions",
        description="User-mode instructions for one connection, counted by callgrind.",
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="fail when a count has grown too much")
    what.add_argument("--record", action="store_true", help=f"write the counts to {RECORD.name}")
    options = p.parse_args(arguments)
    if not compiler_version("valgrind"):
        raise SystemExit("valgrind is not there")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if options.check and minor() not in record:
        raise SystemExit(f"nothing is recorded for Python {minor()}; --record does it")
    counts = count_all()
    if options.record:
        record[minor()] = {**build_facts(), "counts": counts}
        RECORD.write_text(json.dumps(dict(sorted(record.items())), indent=1) + "\n")
        print(f"recorded for Python {minor()}")
        return 0
    if not options.check:
        return 0
    recorded = record[minor()]
    facts = build_facts()
    differ = [name for name, value in facts.items() if recorded[name] != value]
    if differ:
        print(f"the record is of another build ({', '.join(differ)}): ratios are compared")
    bad = complaints(recorded["counts"], counts, not differ)
    allowed = OTHER_BUILD_GROWTH if differ else GROWTH
    print("\n".join(bad) or f"no count grew by more than {allowed:.0%}")
    return 1 if bad else 0
