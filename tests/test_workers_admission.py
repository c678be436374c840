"""Admission with worker processes: one for all of them, and a worker's end is the end of its connections."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from helpers import CLOSED, needs, refusal, wait_until
from helpers.workers import FORKS, HANDLER, Running, gone, main, parent

linux = needs("Linux")

COUNT = 4 if FORKS else 2
OPTIONS = "admission=fastlisten.Admission(concurrent=3, rate=1000, burst=1000)"
PROGRAM = f"fastlisten.serve(handler, '127.0.0.1:0', workers={COUNT}, threads=4, {OPTIONS})"

# Where the parent has a thread its workers are fresh interpreters, which get the memory by a descriptor.
FRESH = f"""
import threading
import fastlisten, service
over = threading.Event()
threading.Thread(target=over.wait).start()
try:
    fastlisten.serve(service.handler, '127.0.0.1:0', workers=2, threads=4, {OPTIONS})
finally:
    over.set()
"""


def stay(server: Running, clients: contextlib.ExitStack, word: bytes = b"say") -> int:
    """Have a client stay with a worker, as soon as there is a place; returns which process."""

    def answer() -> bytes:
        with contextlib.ExitStack() as coming, contextlib.suppress(OSError):
            client = coming.enter_context(server.connect())
            client.sendall(word)
            if received := client.recv(100):
                clients.push(coming.pop_all())
                return received
        return b""

    return int(wait_until(answer).split()[1])


def let_in(server: Running) -> bool:
    try:
        server.ask()
    except (OSError, ValueError):
        return False
    return True


def check(server: Running) -> None:
    """Three clients may be in at a time, whichever workers have them, and no more when some have gone."""
    for _ in range(2):
        with contextlib.ExitStack() as clients:
            for _ in range(3):
                stay(server, clients)
            for _ in range(8):
                assert refusal(server.address) == CLOSED
        wait_until(lambda: let_in(server))


def test_it_is_one_for_all_workers() -> None:
    with parent(main(PROGRAM)) as server:
        server.workers(COUNT)
        check(server)
        server.end()


@linux
def test_it_is_one_for_fresh_interpreters(tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text(HANDLER)
    with parent(FRESH, folder=tmp_path) as server:
        for pid in server.workers(2).values():
            assert b"fresh(" in Path(f"/proc/{pid}/cmdline").read_bytes()
        check(server)
        server.send(signal.SIGHUP)
        for _ in range(2):
            server.line_with("serves after")
        check(server)
        server.end()


@linux
@pytest.mark.parametrize("way", ["killed", "exits"])
def test_a_worker_that_dies_leaves_no_place_taken(way: str) -> None:
    with parent(PROGRAM) as server, contextlib.ExitStack() as clients:
        server.workers(COUNT)
        held = [stay(server, clients) for _ in range(3)]
        assert refusal(server.address) == CLOSED
        if way == "killed":
            os.kill(held[0], signal.SIGKILL)
        else:
            clients.close()
            held[0] = stay(server, clients, b"exit 3")
        wait_until(lambda: gone(held[0]))
        wait_until(lambda: let_in(server))
        left = sum(pid != held[0] for pid in held) if way == "killed" else 0
        with contextlib.ExitStack() as more:
            for _ in range(3 - left):
                stay(server, more)
            assert refusal(server.address) == CLOSED
        server.end()


@linux
def test_a_rolling_restart_keeps_what_is_counted() -> None:
    """Who stays with a worker that drains counts until he goes."""
    program = """
admission = fastlisten.Admission(concurrent=2)
fastlisten.serve(handler, '127.0.0.1:0', workers=2, threads=4, drain=30.0, admission=admission)
"""
    with parent(program) as server, contextlib.ExitStack() as clients:
        stay(server, clients)
        server.send(signal.SIGHUP)
        for _ in range(2):
            server.line_with("serves after")
        stay(server, clients)
        assert refusal(server.address) == CLOSED
        clients.close()
        wait_until(lambda: let_in(server))
        server.end()
