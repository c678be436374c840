"""How a worker process begins: as a fork of its parent, or as a fresh interpreter."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from fastlisten._listener import Listener
from fastlisten._workers.child import Target, Worker
from fastlisten._workers.memory import Memory, Slot
from fastlisten._workers.sockets import Members

_ALL = signal.valid_signals() if hasattr(signal, "valid_signals") else set()


def single_threaded() -> bool:
    """Whether this process has no other thread, so that a fork of it is whole; fork(2)."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return threading.active_count() == 1


def fork(child: Callable[[], int]) -> int:
    """Fork; the child calls `child` and exits with what that returns.  Returns the child's process ID.

    No signal is handled in the child before `child` allows that: the handlers are the parent's.
    """
    sys.stdout.flush()  # or what is in the buffers would be written twice
    sys.stderr.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL)
    try:
        pid = os.fork()
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    if pid == 0:
        status = 1
        try:
            status = child()
        finally:
            os._exit(status)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def forget_signals() -> None:
    """In a child: have the signals' defaults in the place of the parent's handlers, and hear them."""
    signal.set_wakeup_fd(-1)
    for number in _ALL:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


class Forked:
    """Workers that are forks of the parent, and so have its modules and the target as they are."""

    counts = True
    spare = 0

    def __init__(self, target: Target, drain: float) -> None:
        self._target = target
        self._drain = drain
        self._endpoints: Sequence[Members] = ()

    def serves(self, endpoints: Sequence[Members], memory: Memory) -> None:
        """What the workers get."""
        self._endpoints = endpoints

    def start(self, number: int, place: int, slot: Slot, status: int, close: Callable[[], None]) -> int:
        """Begin a worker process; returns its process ID.  close() closes what is the parent's alone."""
        parent = os.getpid()

        def child() -> int:
            worker = Worker(number, slot, status, parent, self._drain)
            close()
            forget_signals()
            members = [members.listeners for members in self._endpoints]
            return worker.become(members, place, self._target)

        return fork(child)

    def ended(self, slot: Slot) -> None:
        """The process with this slot has ended."""

    def close(self) -> None:
        """Nothing was made."""


# What a fresh interpreter is started with: the number of the descriptor that has the rest.
_MAIN = "from fastlisten._workers.start import fresh; fresh({})"


class Fresh:
    """Workers in interpreters of their own, for a parent that has threads: a fork has none of them, and what
    they held.  The target goes there by its name, as with multiprocessing's "spawn".

    Raises ValueError when the target cannot be sent, RuntimeError when it cannot be imported
    there.
    """

    counts = True
    spare = 0

    def __init__(self, target: Target, drain: float) -> None:
        # Much to import, and only for who needs it; multiprocessing knows how to find the main module again.
        import pickle
        import subprocess
        from multiprocessing import spawn

        self._drain = drain
        try:
            sent = pickle.dumps(target)
        except Exception as error:
            raise ValueError(
                f"target {target!r} cannot be sent to a fresh interpreter, which workers need where the "
                f"parent has threads: {error}"
            ) from None
        preparation = spawn.get_preparation_data("worker")
        preparation.pop("authkey", None)  # of multiprocessing's own connections, and not to be sent
        self._sent = pickle.dumps((preparation, sent))
        self._endpoints: Sequence[Members] = ()
        self._memory: Memory | None = None
        check = subprocess.run(
            self._command("check"),
            input=self._sent,
            capture_output=True,
            env=self._environment(),
            check=False,
        )
        if check.returncode != 0:
            why = check.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise RuntimeError(f"target {target!r} cannot be imported in a worker: {why}")

    def serves(self, endpoints: Sequence[Members], memory: Memory) -> None:
        """What the workers get."""
        self._endpoints, self._memory = endpoints, memory

    def _command(self, argument: object) -> list[str]:
        import subprocess

        flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        return [sys.executable, *flags, "-c", _MAIN.format(repr(argument))]

    @staticmethod
    def _environment() -> dict[str, str]:
        """Ours, and the path on which fastlisten is found."""
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = os.environ.get("PYTHONPATH")
        return {**os.environ, "PYTHONPATH": root + (os.pathsep + path if path else "")}

    def start(self, number: int, place: int, slot: Slot, status: int, close: Callable[[], None]) -> int:
        """Begin a worker process; returns its process ID."""
        import pickle
        import tempfile

        assert self._memory is not None
        members = [[listener.fileno() for listener in members.listeners] for members in self._endpoints]
        slots = self._memory.slots
        what = (members, place, number, slot.number, slots, self._memory.fd, status, os.getpid(), self._drain)
        with tempfile.TemporaryFile() as file:
            file.write(pickle.dumps(what) + self._sent)
            file.flush()
            file.seek(0)
            kept = [file.fileno(), self._memory.fd, status, *(fd for fds in members for fd in fds)]
            return os.posix_spawn(
                sys.executable,
                self._command(file.fileno()),
                self._environment(),
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, fd, fd) for fd in kept
                ],  # inherited under the same numbers
                setsigmask=(),
                setsigdef=[number for number in _ALL if callable(signal.getsignal(number))],
            )

    def ended(self, slot: Slot) -> None:
        """The process with this slot has ended."""

    def close(self) -> None:
        """Nothing was made."""


def fresh(argument: Any) -> None:
    """What a fresh interpreter does: import the target and be the worker that the parent describes."""
    import pickle

    if argument == "check":
        _target(sys.stdin.buffer)
        return
    with open(argument, "rb") as file:
        members, place, number, slot_number, slots, memory_fd, status, parent, drain = pickle.load(file)
        target = _target(file)
    endpoints = [[Listener(fileno=fd) for fd in fds] for fds in members]
    for descriptor in (memory_fd, status, *(fd for fds in members for fd in fds)):
        os.set_inheritable(descriptor, False)
    memory = Memory(len(members), slots, fd=memory_fd)
    worker = Worker(number, Slot(memory, slot_number), status, parent, drain)
    status_code = worker.become(endpoints, place, target)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status_code)


def _target(file: Any) -> Target:
    """The target that comes from a file, after what its pickle needs: the path, and the main module."""
    import pickle
    from multiprocessing import spawn

    preparation, sent = pickle.load(file)
    spawn.prepare(preparation)
    target: Target = pickle.loads(sent)
    return target
