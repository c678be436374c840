"""Worker processes of a parent that runs beside a test, and clients that ask which one has them."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from helpers.programs import Program, interpreter, running
from helpers.sockets import connect
from helpers.waiting import LIMIT, wait_until

# What is not ours to test: a program ends at once when it is asked to, but for the client that it has.
WAITS = """
import os, select, signal, socket, sys
ended, end = socket.socketpair()
end.setblocking(False)
signal.signal(signal.SIGTERM, lambda *_: None)
signal.set_wakeup_fd(end.fileno())
listener = socket.socket(fileno=3)

def serve(answer):
    while ended not in select.select([listener, ended], [], [])[0]:
        client, _ = listener.accept()
        with client:
            if client.recv(100):
                client.sendall(answer)
"""

# Where there are no signals between processes, the parent gets them by its standard input, a number a byte,
# and raises them in itself, as the console's keys do.
FORKS = hasattr(os, "fork")

BY_INPUT = """
import os, signal, threading


def press():
    while number := os.read(0, 1):
        signal.raise_signal(number[0])


if __name__ == "__main__":
    threading.Thread(target=press, daemon=True).start()

"""

# What a worker does for a client: it answers with its number and process, and with what it is told to do.
HANDLER = """
import logging, os, signal, sys, time
import fastlisten

logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
TOLD = getattr(signal, "SIGUSR1", signal.SIGABRT)  # for what a program likes


def handler(connection):
    word, _, argument = connection.recv(100).decode().partition(" ")
    connection.sendall(b"%d %d" % (fastlisten.worker().number, os.getpid()))
    if word == "sleep":
        time.sleep(float(argument))
    elif word == "exit":
        os._exit(int(argument))
    elif word == "fork" and os.fork() == 0:
        connection.close()
        os._exit(0)
    if word == "say":
        connection.recv(100)


def serve(listener):
    return listener.serve(handler)

"""


class Answer:
    """Who has answered a client."""

    def __init__(self, text: bytes) -> None:
        self.number, self.pid = map(int, text.split())


class Running:
    """A parent and its workers."""

    def __init__(self, process: "subprocess.Popen[str]", listening: str | None = "listening on ") -> None:
        self.process = process
        self.lines: list[str] = []
        if listening is None:  # it will
            return
        host, _, port = re.split('[,"]', self.line_with(listening).split(listening)[1])[0].rpartition(":")
        self.address: Any = (host, int(port))

    def line_with(self, text: str) -> str:
        """Read lines until one has text; pytest's time limit ends a wait that is in vain."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            self.lines.append(line.rstrip("\n"))
            if text in line:
                return self.lines[-1]
        raise AssertionError(f"{text!r} never came: {self.lines}")

    def connect(self) -> socket.socket:
        return connect(self.address)

    def ask(self, word: str = "who") -> Answer:
        """Connect, say a word, and return who has answered; the connection is closed then."""
        with self.connect() as client:
            client.sendall(word.encode())
            return Answer(client.recv(100))

    def workers(self, count: int) -> dict[int, int]:
        """Ask until so many workers have answered; returns their processes by their numbers."""
        found: dict[int, int] = {}

        def all_answered() -> bool:
            answer = self.ask()
            found[answer.number] = answer.pid
            return len(found) == count

        wait_until(all_answered)
        return found

    def send(self, number: int) -> None:
        if FORKS:
            self.process.send_signal(number)
        else:
            assert self.process.stdin is not None
            os.write(self.process.stdin.fileno(), bytes([number]))

    def end(self, number: int = signal.SIGTERM) -> list[str]:
        """Send the parent a signal; returns what it said until its end, which is a good one."""
        self.send(number)
        output, errors = self.process.communicate(timeout=LIMIT)
        assert self.process.returncode == 0, (output, errors)
        self.lines += output.splitlines()
        return output.splitlines()


def state_of(pid: int) -> str:
    """Return the letter of a process's state; proc(5).  Raises OSError where there is none to read."""
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


def gone(pid: int) -> bool:
    """Tell whether a process has ended; one that nobody has waited for yet has."""
    if os.name == "nt":
        return not alive(pid)
    try:
        return state_of(pid) in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return not alive(pid)


def suspend(pid: int) -> None:
    """Stop a process, and wait until it takes no client any more, which it does until the signal arrives."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T")


def alive(pid: int) -> bool:
    if sys.platform == "win32":  # where os.kill(pid, 0) presses a key
        import _winapi

        try:
            handle = _winapi.OpenProcess(0x100000, False, pid)  # SYNCHRONIZE
        except OSError:
            return False
        try:
            return _winapi.WaitForSingleObject(handle, 0) == 0x102  # WAIT_TIMEOUT
        finally:
            _winapi.CloseHandle(handle)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main(text: str) -> str:
    """Return a program that does this, and not where it is imported: a fresh interpreter's target."""
    return "if __name__ == '__main__':\n" + textwrap.indent(text.strip("\n"), "    ")


# How many a parent has unless a test says otherwise: an interpreter takes long to start under Wine.
COUNT = 4 if FORKS else 2
SOME = main(f"fastlisten.Workers(serve, '127.0.0.1:0', workers={COUNT}).run()")


@contextlib.contextmanager
def parent(
    program: Program = SOME,
    until: str | None = "all workers serve",
    listening: str | None = "listening on ",
    **options: Any,
) -> Iterator[Running]:
    """Run a parent beside the test, with what HANDLER defines, once it has said `until`; all its workers have
    ended when it has."""
    with _command(program) as command, running(command, **options) as process:
        found = Running(process, listening)
        if until is not None:
            found.line_with(until)
        try:
            yield found
        finally:
            children = children_of(process.pid)
            if process.poll() is None:
                process.kill()
                process.wait(LIMIT)
            wait_until(lambda: all(map(gone, children)), what=f"workers {children} are left")


@contextlib.contextmanager
def _command(program: Program) -> Iterator[Program]:
    """Give what runs a program; without fork its text is in a file, for its workers to import."""
    if not isinstance(program, str):
        yield program
    elif FORKS:
        yield HANDLER + program
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "program.py"
            file.write_text(BY_INPUT + HANDLER + program)
            yield [*interpreter(), str(file)]


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started, where the system lists them; proc_pid_task(5)."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(child) for child in text.split()]
    return []


def while_clients_come(running: Running, clients: int, act: Callable[[], None]) -> list[str]:
    """Have this many clients come one after the other in a thread while `act` runs, and on until both are
    done; returns what went wrong for any of them."""
    import threading

    wrong: list[str] = []
    acted = threading.Event()
    came = 0

    def come() -> None:
        nonlocal came
        while (came < clients or not acted.is_set()) and not wrong:
            came += 1
            try:
                running.ask()
            except (OSError, ValueError) as error:
                wrong.append(f"client {came}: {error!r}")

    thread = threading.Thread(target=come)
    thread.start()
    try:
        act()
    finally:
        acted.set()
        thread.join()
    return wrong
