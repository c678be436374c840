"""status= of workers: their parent answers, also while they begin, are stuck, are replaced, or hand over."""

import contextlib
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import connect, needs, posix_only, wait_until
from helpers.command import COMMAND
from helpers.status import agent, get
from helpers.workers import WAITS, Running, children_of, gone, main, parent
from test_workers_handover import handed_over

pytestmark = [posix_only("signals between processes"), needs("Linux")]

PROGRAM = """
logging.getLogger().setLevel(logging.INFO)

def target(listener):
    while {flag!r} and not os.path.exists({flag!r}):
        time.sleep(0.01)
    return listener.serve(handler, threads=2)

fastlisten.Workers(target, "127.0.0.1:0", workers=2, status="127.0.0.1:0", drain=2.0).run()
"""


def program(flag: Path | None = None) -> str:
    return PROGRAM.format(flag=flag and str(flag))


def status_of(running: Running) -> Any:
    """Return where a parent answers, which it has said."""
    line = next((line for line in running.lines if "status on " in line), None) or running.line_with(
        "status on "
    )
    host, _, port = line.partition("status on ")[2].rpartition(":")
    return host, int(port)


def test_it_is_ready_when_the_first_worker_is(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    with parent(program(flag), until="status on ") as running:
        status = status_of(running)
        assert (get(status, "/readyz").text, agent(status)) == ("starting\n", "down\n")
        assert get(status, "/healthz").status == 200
        assert 'fastlisten_worker_ready{listener="' in get(status, "/metrics").text
        flag.touch()
        wait_until(lambda: get(status, "/readyz").status == 200)
        wait_until(lambda: agent(status) == "up 100% ready\n")
        running.send(signal.SIGTERM)
        running.process.wait(10)


def test_the_weight_counts_the_workers_that_are_missing() -> None:
    with parent(program()) as running, contextlib.ExitStack() as stack:
        status = status_of(running)
        wait_until(lambda: agent(status) == "up 100% ready\n")
        for free in (75, 50, 25):
            client = stack.enter_context(running.connect())
            client.sendall(b"say")
            client.recv(100)
            assert agent(status) == f"up {free}% ready\n"


def test_it_answers_while_all_workers_are_stuck() -> None:
    with parent(program()) as running:
        status = status_of(running)
        for pid in running.workers(2).values():
            os.kill(pid, signal.SIGSTOP)
        assert get(status, "/metrics").status == 200
        for pid in children_of(running.process.pid):
            os.kill(pid, signal.SIGCONT)


def sockets_of(pid: int) -> set[str]:
    folder = f"/proc/{pid}/fd"
    return {os.readlink(f"{folder}/{name}") for name in os.listdir(folder)}


def test_no_worker_has_the_status_port() -> None:
    with parent(program()) as running:
        status = status_of(running)
        workers = running.workers(2)
        with open("/proc/net/tcp") as table:
            inode = next(
                line.split()[9]
                for line in table
                if line.split()[1].endswith(f":{status[1]:04X}") and " 0A " in line
            )
        with connect(status):  # a client of it is no worker's, either
            running.send(signal.SIGHUP)
            running.line_with("2 of 2 workers are replaced")
        wait_until(lambda: all(map(gone, workers.values())))
        assert f"socket:[{inode}]" in sockets_of(running.process.pid)
        for pid in running.workers(2).values():
            assert f"socket:[{inode}]" not in sockets_of(pid)


def test_a_replacement_is_no_time_without_an_answer() -> None:
    with parent(program()) as running:
        status = status_of(running)
        wait_until(lambda: get(status, "/readyz").status == 200)
        before = accepted(status)
        old = running.workers(2)
        running.send(signal.SIGHUP)
        while any(not gone(pid) for pid in old.values()) and "fastlisten_worker_starts_total" in (
            text := get(status, "/metrics").text
        ):
            assert get(status, "/readyz").status == 200
            now = total(text)
            assert now >= before
            before = now


def accepted(status: Any) -> int:
    return total(get(status, "/metrics").text)


def total(text: str) -> int:
    return sum(map(int, re.findall(r"^fastlisten_accepted_connections_total{.*} (\d+)$", text, re.MULTILINE)))


def test_another_parent_takes_the_status_port_over_when_it_serves(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    with parent(program(flag)) as running:
        status = status_of(running)
        assert get(status, "/readyz").status == 200
        flag.unlink()  # the next one's workers do not serve yet
        with handed_over(running):
            for _ in range(20):
                assert get(status, "/readyz").text == "serving\n"
            flag.touch()
            while running.process.poll() is None:
                assert get(status, "/readyz").text == "serving\n"
            assert get(status, "/metrics").text.count("fastlisten_worker_ready{") == 2


@pytest.mark.parametrize("name", ["SIGINT", "SIGQUIT"])  # which Windows has not
def test_only_sigterm_waits_for_lame_duck(name: str) -> None:
    text = main(
        "fastlisten.Workers(serve, '127.0.0.1:0', workers=1, status='127.0.0.1:0', lame_duck=100).run()"
    )
    with parent(text) as running:
        running.end(getattr(signal, name))


def test_programs_are_answered_for_too(tmp_path: Path) -> None:
    """`fastlisten workers`: the parent knows which of them serve, and their queues."""
    program = WAITS + 'serve(b"0 %d" % os.getpid())\n'
    options = ["--bind", "127.0.0.1:0", "--workers", "2", "--status", "127.0.0.1:0", "--lame-duck", "100"]
    with parent([*COMMAND, "workers", *options, "--", sys.executable, "-c", program]) as running:
        status = status_of(running)
        assert (get(status, "/readyz").text, agent(status)) == ("serving\n", "up 100% ready\n")
        text = get(status, "/metrics").text
        assert len(re.findall(r"^fastlisten_worker_ready{.*} 1$", text, re.MULTILINE)) == 2
        assert "fastlisten_queued_connections{" in text
        assert "fastlisten_accepted_connections" not in text
        running.send(signal.SIGTERM)
        running.line_with("not ready any more, draining in 100 s")
        assert (get(status, "/readyz").text, agent(status)) == ("draining\n", "drain\n")
        running.end()
