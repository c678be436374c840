"""``python -m benchmarks.flood``: how long a good client waits while one source floods a server.

The server's handler computes for 200 µs. The flood is 64 clients of 127.0.0.1, each of which connects again
as soon as it is through, or refused. The good client, of 127.0.0.2, connects once in 2 ms and waits for the
end. By turns: nobody else; the flood, without admission=; the flood, with at most 1,000 connections a
second of a source. The server has one core, both kinds of clients another.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from statistics import median

import fastlisten

from .runner import Running, Settings, load_command, percentile, raise_file_limit, settle
from .servers.handlers import BACKLOG

ROUNDS = 5
CLIENTS = 64
RATE = 1_000
"""More than the good client needs."""

WORK, EVERY = 200e-6, 2e-3  # seconds
EXCHANGES = 1_000
_GOOD = "127.0.0.2"


def handle(connection: fastlisten.Connection) -> None:
    """Compute, and close."""
    end = time.perf_counter() + WORK
    while time.perf_counter() < end:
        pass


def serve(rate: int, core: int) -> None:
    """Print the port; serve, and answer each line with how many were accepted."""
    os.sched_setaffinity(0, {core})
    admission = fastlisten.Admission(rate=rate, burst=rate // 10) if rate else None
    listener = fastlisten.bind("127.0.0.1:0", backlog=BACKLOG)
    print(listener.getsockname()[1], flush=True)
    threading.Thread(
        target=listener.serve, args=(handle,), kwargs={"threads": (1, 64), "admission": admission}
    ).start()
    for _ in sys.stdin:
        print(listener.stats().accepted, flush=True)
    os._exit(0)


def be_good(port: int) -> None:
    """Print how long the server took each time to accept, handle and close, in ms."""
    times, due = [], time.perf_counter()
    for _ in range(EXCHANGES):
        with socket.socket() as client:
            client.bind((_GOOD, 0))
            begun = time.perf_counter()
            client.connect(("127.0.0.1", port))
            client.recv(1)
            times.append(1e3 * (time.perf_counter() - begun))
        due = max(due + EVERY, time.perf_counter())
        time.sleep(max(due - time.perf_counter(), 0))
    print(json.dumps(times))


def look(rate: int, flood: bool, settings: Settings) -> tuple[float, float, float]:
    """Return the good client's median and 99th percentile in ms, and how many others came in a second."""
    program = [sys.executable, "-m", "benchmarks.flood"]
    with subprocess.Popen(
        [*program, "serve", str(rate), str(settings.server_core)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        server = Running(process, int(process.stdout.readline()))
        others = None
        try:
            settle(server)
            if flood:
                command = load_command("shed", server.port, process.pid, 0, 10**7, CLIENTS)
                others = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            before, begun = int(server.ask("")), time.perf_counter()
            answer = subprocess.run(
                [*program, "good", str(server.port)], stdout=subprocess.PIPE, text=True, check=True
            )
            came = int(server.ask("")) - before - EXCHANGES
            seconds = time.perf_counter() - begun
        finally:
            if others is not None:
                others.kill()
                others.wait()
            process.stdin.close()
        times = json.loads(answer.stdout)
        return median(times), percentile(times, 0.99), came / seconds


def main() -> None:
    """Print a table: medians of the rounds."""
    raise_file_limit()
    settings = Settings(ROUNDS, 1.0)
    os.sched_setaffinity(0, {settings.load_core})
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(ROUNDS):
        for name, rate, flood in (("alone", 0, False), ("flood", 0, True), ("admission", RATE, True)):
            found.setdefault(name, []).append(look(rate, flood, settings))
    for name, looks in found.items():
        p50, p99, others = (median(values) for values in zip(*looks, strict=True))
        print(f"{name:12} p50 {p50:8.3f} ms   p99 {p99:8.3f} ms   others {others:8,.0f}/s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(int(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["good"]:
        be_good(int(sys.argv[2]))
    else:
        main()
