"""SIGUSR2: a parent hands its listeners to the next one, and goes on where that does not serve."""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import needs, posix_only, wait_until
from helpers.command import COMMAND
from helpers.workers import WAITS, Running, children_of, gone, parent, while_clients_come

pytestmark = [posix_only("signals between processes"), needs("Linux")]

PROGRAM = """
if os.path.exists({flag!r}):
    {instead}

def target(listener):
    if os.path.exists({flag!r}):
        signal.pause()
    return listener.serve(handler)

fastlisten.Workers(target, {endpoint!r}, workers=2, ready_timeout={timeout}).run()
"""


def program(
    flag: Path, instead: str = "sys.exit(1)", endpoint: str = "127.0.0.1:0", timeout: float = 20
) -> str:
    return PROGRAM.format(flag=str(flag), instead=instead, endpoint=endpoint, timeout=timeout)


@contextlib.contextmanager
def handed_over(server: Running) -> Iterator[int]:
    """Give the process ID of the next parent, which is ended at the end, with its workers."""
    server.send(signal.SIGUSR2)
    pid = int(server.line_with("takes over").split("process ")[1].split()[0])
    process = os.pidfd_open(pid)  # its number may be another's by the end
    try:
        yield pid
    finally:
        children = [] if ended(process) else children_of(pid)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        wait_until(lambda: ended(process) and all(map(gone, children)))
        os.close(process)


def ended(process: int) -> bool:
    """Tell whether a process has ended; pidfd_open(2)."""
    return bool(select.select([process], [], [], 0)[0])


def test_nobody_is_lost_when_another_parent_takes_over(tmp_path: Path) -> None:
    with parent(program(tmp_path / "flag")) as server:
        before = server.workers(2)
        over: list[int] = []
        with contextlib.ExitStack() as stack:

            def hand_over() -> None:
                over.append(stack.enter_context(handed_over(server)))
                assert server.process.wait(20) == 0

            assert while_clients_come(server, 300, hand_over) == []
            assert all(map(gone, before.values()))
            assert sorted(server.workers(2).values()) == sorted(children_of(over[0]))


@pytest.mark.parametrize(
    ("instead", "timeout", "said"),
    [("sys.exit(1)", 20.0, "has ended before its workers served"), ("pass", 1.0, "did not serve in 1 s")],
)
def test_the_old_one_goes_on_when_the_new_one_does_not_serve(
    tmp_path: Path, instead: str, timeout: float, said: str
) -> None:
    flag = tmp_path / "broken"
    with parent(program(flag, instead, timeout=timeout)) as server:
        before = server.workers(2)
        flag.touch()
        with handed_over(server) as pid:

            def wait() -> None:
                assert server.line_with(said).endswith("this one goes on")

            assert while_clients_come(server, 100, wait) == []
            wait_until(lambda: gone(pid))
            assert server.workers(2) == before
        flag.unlink()
        with handed_over(server):  # the next try is a good one
            assert server.process.wait(20) == 0
            assert set(server.workers(2).values()).isdisjoint(before.values())


def test_a_unix_path_is_the_next_one_s(tmp_path: Path) -> None:
    path = tmp_path / "s"
    two = program(tmp_path / "flag").replace("'127.0.0.1:0'", f"'127.0.0.1:0', 'unix:{path}'")
    two = two.replace("target(listener)", "target(listener, other)").replace(
        "listener.serve(handler)", "fastlisten.serve(handler, listener, other)"
    )
    with parent(two) as server, handed_over(server) as pid:
        assert server.process.wait(20) == 0
        assert path.exists()
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: gone(pid))
        assert not path.exists()


def test_the_command_hands_any_program_over(tmp_path: Path) -> None:
    text = WAITS + "serve(b'%s %d' % (sys.argv[1].encode(), os.getpid()))"
    command = [*COMMAND, "workers", "--bind", "127.0.0.1:0", "--workers", "2", "--"]
    with parent([*command, sys.executable, "-c", text, "{n}"]) as server:
        before = server.workers(2)
        with handed_over(server):
            assert server.process.wait(20) == 0
            assert set(server.workers(2).values()).isdisjoint(before.values())


def test_a_parent_that_is_told_to_end_ends_the_next_one_too(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    with parent(program(flag, "pass")) as server:
        server.workers(2)
        flag.touch()
        with handed_over(server) as pid:
            server.line_with("is process")
            server.end()
            wait_until(lambda: gone(pid))
