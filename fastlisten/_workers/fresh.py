"""How a worker process begins where a fork would not be whole, or there is none: as a fresh interpreter."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.spawn import get_preparation_data, prepare
from typing import Any

from fastlisten._admission import Admission
from fastlisten._listener import Listener
from fastlisten._notify import VARIABLES
from fastlisten._shared_memory import shared_memory
from fastlisten._workers.child import DRAIN, LOOK, NOW, Target, Worker
from fastlisten._workers.memory import Memory, Slot
from fastlisten._workers.pool import Channel, Close
from fastlisten._workers.process import Child, Handle
from fastlisten._workers.sockets import Members
from fastlisten._workers.start import spawn

# What a fresh interpreter is started with: what stands for the memory that describes its worker, and how long
# that is.  The parent has written it by then, so that it waits for no worker to read.
_MAIN = "from fastlisten._workers.fresh import fresh; fresh({})"

# Where sockets are not inherited, they are shared with a process that has begun: WSADuplicateSocket().
_SHARES = hasattr(socket.socket, "share")


class Fresh:
    """Workers in interpreters of their own, for a parent that has threads, of which a fork has none, nor what
    they held, and where there is no fork.  The target goes there by its name, as with multiprocessing's
    "spawn".

    Raises ValueError when the target cannot be sent, RuntimeError when it cannot be imported there.
    """

    counts = True
    spare = 0
    named = True

    def __init__(self, target: Target, drain: float) -> None:
        self._drain = drain
        self._shared: list[int] = []  # descriptors of memory
        try:
            sent = _pickled(target, self._shared)
        except Exception as error:
            raise ValueError(
                f"target {target!r} cannot be sent to a fresh interpreter, which workers need where the "
                f"parent has threads, and on Windows: {error}"
            ) from None
        preparation = get_preparation_data("worker")
        preparation.pop("authkey", None)  # of multiprocessing's own connections, and not to be sent
        self._sent = pickle.dumps((preparation, sent))
        self._endpoints: Sequence[Members] = ()
        self._memory: Memory | None = None
        check = subprocess.run(
            _command("check"), input=self._sent, capture_output=True, env=_environment(), check=False
        )
        if check.returncode != 0:
            why = check.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise RuntimeError(f"target {target!r} cannot be imported in a worker: {why}")

    def serves(self, endpoints: Sequence[Members], memory: Memory) -> None:
        """What the workers get."""
        self._endpoints, self._memory = endpoints, memory

    def start(self, number: int, place: int, slot: Slot, channel: Channel, close: Close) -> Handle:
        """Begin a worker process."""
        assert self._memory is not None
        ours, theirs = channel
        listeners = [listener for members in self._endpoints for listener in members.listeners]
        counts = [len(members.listeners) for members in self._endpoints]
        memory = (self._memory.slots, self._memory.name, slot.number)

        def description(end: int | bytes, sent: list[int] | list[bytes]) -> bytes:
            return pickle.dumps(
                (end, sent, counts, memory, place, number, os.getpid(), self._drain, self._sent)
            )

        if _SHARES:
            sharing = _Sharing(ours)
            try:
                end = sharing.share(theirs)
                sharing.describe(description(end, [sharing.share(listener) for listener in listeners]))
            except BaseException:
                sharing.kill()
                sharing.wait()
                raise
            return sharing
        sent = [listener.fileno() for listener in listeners]
        described = description(theirs.fileno(), sent)
        memory_map, name = shared_memory(len(described), named=True)
        assert isinstance(name, int)
        assert isinstance(self._memory.name, int)
        memory_map[:] = described
        try:
            inherited = [name, theirs.fileno(), self._memory.name, *self._shared, *sent]
            return Child(spawn(_command((name, len(described))), _environment(), inherited))
        finally:
            os.close(name)

    def ended(self, slot: Slot) -> None:
        """The process with this slot has ended."""

    def close(self) -> None:
        """Nothing was made."""


def _command(argument: object) -> list[str]:
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, "-c", _MAIN.format(repr(argument))]


def _environment() -> dict[str, str]:
    """Ours, and the path on which fastlisten is found; the service manager is the parent's alone."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.environ.get("PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return {**kept, "PYTHONPATH": root + (os.pathsep + path if path else "")}


class _Sharing:
    """An interpreter of Windows: it gets sockets when it has begun, and hears by its standard input where all
    is described; it is asked to end by the channel, of which `ours` is the parent's end."""

    def __init__(self, ours: socket.socket) -> None:
        command, environment = _command(None), _environment()
        base = getattr(sys, "_base_executable", sys.executable)
        if (
            base != sys.executable
        ):  # that of a virtual environment only starts the other, which has another ID
            command[0], environment["__PYVENV_LAUNCHER__"] = base, sys.executable
        # In a group of its own it ignores Ctrl-C from its first moment on: the keys are the parent's.
        group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
        self._ours = ours
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, creationflags=group)
        self._description: mmap.mmap | None = None  # is there while somebody has it

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def share(self, sock: socket.socket) -> bytes:
        """What a socket is there.  Raises OSError when it has ended."""
        shared: bytes = sock.share(self.pid)  # type: ignore[attr-defined,unused-ignore]
        return shared

    def describe(self, description: bytes) -> None:
        """Tell it what it is to be.  Raises OSError when it has ended."""
        self._description, name = shared_memory(len(description), named=True)
        self._description[:] = description
        with self._process.stdin as stdin:  # type: ignore[union-attr]
            stdin.write(pickle.dumps((name, len(description))))  # a pipe has room for that

    def stop(self, now: bool) -> None:
        """Ask it to end, with the drain or now."""
        with contextlib.suppress(OSError):  # it has ended
            self._ours.send(NOW if now else DRAIN)

    def look(self) -> None:
        """Have it see what was written for it."""
        with contextlib.suppress(OSError):
            self._ours.send(LOOK)

    def kill(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):
            self._process.kill()

    def poll(self) -> int | None:
        """How it has ended; None: it has not."""
        return self._process.poll()

    def wait(self) -> None:
        """Wait until it has ended."""
        self._process.wait()


# --- in the fresh interpreter ---------------------------------------------------------------------------


def fresh(argument: Any) -> None:
    """What a fresh interpreter does: import the target and be the worker that the parent describes."""
    if argument == "check":
        _target(sys.stdin.buffer.read(), shares=False)
        return
    where, length = argument or pickle.loads(sys.stdin.buffer.read())
    with shared_memory(length, name=where)[0] as described:
        end, sent, counts, memory_of, place, number, parent, drain, target = pickle.loads(described)
    if isinstance(where, int):
        os.close(where)
    slots, name, slot = memory_of
    status = socket.socket(fileno=end)
    listeners = iter([Listener(fileno=one) for one in sent])
    endpoints = [[next(listeners) for _ in range(count)] for count in counts]
    for sock in (status, *(listener for members in endpoints for listener in members)):
        sock.setblocking(True)
        sock.set_inheritable(False)
    if isinstance(name, int):
        os.set_inheritable(name, False)
    memory = Memory(len(endpoints), slots, name=name)
    worker = Worker(number, Slot(memory, slot), status, parent, drain)
    os._exit(worker.become(endpoints, place, _target(target)))


def _target(sent: bytes, shares: bool = True) -> Target:
    """The target that was sent, after what its pickle needs: the path, and the main module.

    shares: this process has inherited the memory that the parent shares.
    """
    preparation, pickled = pickle.loads(sent)
    prepare(preparation)
    target: Target = _Unpickler(pickled, shares).load()
    return target


# --- an Admission in what is sent, which is one for all processes ----------------------------------------


def _pickled(target: Target, descriptors: list[int]) -> bytes:
    """The target's pickle; what is to be inherited for it is added to `descriptors`."""
    buffer = io.BytesIO()
    _Pickler(buffer, descriptors).dump(target)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, descriptors: list[int]) -> None:
        super().__init__(file)
        self._descriptors = descriptors

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Admission):
            return None
        what, name = obj.share()
        if isinstance(name, int) and name not in self._descriptors:
            self._descriptors.append(name)
        return what, name


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, shares: bool) -> None:
        super().__init__(io.BytesIO(pickled))
        self._shares = shares
        self._made: dict[int | str, Admission] = {}

    def persistent_load(self, pid: Any) -> Any:
        what, name = pid
        if name not in self._made:
            if isinstance(name, int) and self._shares:
                os.set_inheritable(name, False)
            self._made[name] = Admission.shared(what, name if self._shares else None)
        return self._made[name]
