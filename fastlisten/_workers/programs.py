"""Any program as a worker: it inherits its listeners as systemd passes them, and need not know us."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Sequence

from fastlisten._core.processes import end_with_parent
from fastlisten._notify import VARIABLES
from fastlisten._workers.memory import Memory, Slot
from fastlisten._workers.pool import Channel, Close
from fastlisten._workers.process import Child
from fastlisten._workers.sockets import Members
from fastlisten._workers.start import forget_signals, fork

# Where the descriptors that are passed begin: sd_listen_fds(3).
FIRST = 3

# Programs that take no notice of LISTEN_FDS, and how they are told of the descriptor.
TOLD = {"uvicorn": "--fd {fd}", "hypercorn": "--bind fd://{fd}", "daphne": "--fd {fd}"}

# It is this machine itself that is connected to; only a queue that is full delays that.
CONNECT_TIME = 0.2  # seconds


class Programs:
    """Workers that are another program.

    command: its name and arguments, in which {fd} is the first descriptor's number and {n} the worker's.
    Raises ValueError where there is no fork, and when the program cannot be found, or would not be told of
    its listener.
    """

    counts = False
    spare = 1  # one that replaces another has listeners of its own meanwhile
    named = False

    def __init__(self, command: Sequence[str]) -> None:
        if not hasattr(os, "fork"):
            raise ValueError(
                "programs as workers are not supported on this platform: serve --workers runs a handler"
            )
        names = {os.path.basename(word) for word in command[:3]}  # also after python -m
        for name, argument in TOLD.items():
            if name in names and not any("{fd}" in word for word in command):
                raise ValueError(f"{name} does not look for its listener: {argument} tells it")
        beside = os.path.dirname(sys.executable)  # a virtual environment that is not activated
        found = None if os.path.dirname(command[0]) else shutil.which(command[0], path=beside)
        found = found or shutil.which(command[0])
        if found is None:
            raise ValueError(f"{command[0]} is no program that can be run")
        self._path = found
        self._command = command
        self._endpoints: Sequence[Members] = ()
        self._folder = tempfile.mkdtemp(prefix="fastlisten-")
        self.notifications: dict[int, socket.socket] = {}  # by the slot

    def serves(self, endpoints: Sequence[Members], memory: Memory) -> None:
        """What the workers get."""
        self._endpoints = endpoints

    def start(self, number: int, place: int, slot: Slot, channel: Channel, close: Close) -> Child:
        """Begin a worker process."""
        parent = os.getpid()
        path = os.path.join(self._folder, str(slot.number))
        notification = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            notification.bind(path)
            notification.setblocking(False)
        except BaseException:
            notification.close()
            raise
        self.notifications[slot.number] = notification

        def child() -> int:
            os.setpgid(0, 0)  # what it starts is killed with it, and the terminal's keys are the parent's
            with contextlib.suppress(ProcessLookupError):
                end_with_parent(parent)
            if os.getppid() != parent:
                return 1
            self._pass([members.of(place).fileno() for members in self._endpoints])
            environment = {
                **{name: value for name, value in os.environ.items() if name not in VARIABLES},
                "LISTEN_FDS": str(len(self._endpoints)),
                "LISTEN_PID": str(os.getpid()),
                "LISTEN_FDNAMES": ":".join(f"bind{i}" for i in range(len(self._endpoints))),
                "NOTIFY_SOCKET": path,
            }
            told = {"{fd}": str(FIRST), "{n}": str(number)}
            arguments = list(self._command)
            for word, value in told.items():
                arguments = [argument.replace(word, value) for argument in arguments]
            forget_signals()
            for ignored in ("SIGPIPE", "SIGXFSZ"):  # by Python, which other programs do not expect
                signal.signal(getattr(signal, ignored), signal.SIG_DFL)
            try:
                os.execve(self._path, arguments, environment)
            except OSError as error:
                os.write(2, f"fastlisten: {self._path}: {error.strerror}\n".encode())
            return 127

        return Child(fork(child), group=True)

    @staticmethod
    def _pass(descriptors: Sequence[int]) -> None:
        """Have these be 3, 4, ... in the program; what had those numbers is the parent's, and closed."""
        above = FIRST + len(descriptors)
        kept = []
        for descriptor in descriptors:
            copy = os.dup(descriptor)
            while copy < above:  # each is one of the numbers that are needed
                copy = os.dup(descriptor)
            kept.append(copy)
        for number, descriptor in enumerate(kept, FIRST):
            os.dup2(descriptor, number)

    def ended(self, slot: Slot) -> None:
        """The process with this slot has ended."""
        notification = self.notifications.pop(slot.number, None)
        if notification is not None:
            notification.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._folder, str(slot.number)))

    def close(self) -> None:
        """Remove what was made."""
        shutil.rmtree(self._folder, ignore_errors=True)


# --- Whether a program accepts, and whether all who were sent to it have come -------------------------------


class Probe:
    """A client of the parent's own, to see whether a new process accepts while no other client is sent to it.

    It comes and leaves without a word, as some health checks do, and stays in the queue until it is accepted.

    live: the places that other clients go to meanwhile.  Raises OSError.
    """

    def __init__(self, members: Members, place: int, live: Sequence[int]) -> None:
        self._members = members
        self._place = place
        listener = members.of(place)
        address = listener.getsockname()
        here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
        with socket.socket(listener.family, socket.SOCK_STREAM) as client:
            client.settimeout(CONNECT_TIME)
            client.bind((here, 0, *address[2:]))
            members.steer(live or [place], client.getsockname()[1], place)
            client.connect((here, address[1], *address[2:]))
        self._most = max(members.depth(place), 1)

    def accepted(self) -> bool:
        """Whether anybody has come out of the queue: no other process has it."""
        depth = self._members.depth(self._place)
        self._most = max(self._most, depth)
        return depth < self._most


# sock_diag(7): the request, and what is needed of an answer.
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301
_SYN_RECEIVED = 1 << 3
_NETLINK_SOCK_DIAG = 4


def half_open(listener: socket.socket) -> set[bytes]:
    """The clients of this port whose connection is not complete yet; empty where the system does not tell."""
    port = listener.getsockname()[1]
    wanted = struct.pack("=BBBxI", listener.family, socket.IPPROTO_TCP, 0, _SYN_RECEIVED)
    wanted += struct.pack("!HH", port, 0) + bytes(44)
    header = struct.pack("=IHHII", 16 + len(wanted), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0)
    found: set[bytes] = set()
    try:
        netlink = getattr(socket, "AF_NETLINK")  # noqa: B009  # Linux alone has it
        with socket.socket(netlink, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(1.0)
            kernel.sendto(header + wanted, (0, 0))
            while True:
                answer = kernel.recv(65536)
                while len(answer) >= 16:
                    length, kind = struct.unpack_from("=IH", answer)
                    if kind != _SOCK_DIAG_BY_FAMILY:
                        return found  # the end, or an error
                    found.add(answer[20 : 20 + 36])  # both ports, both addresses
                    answer = answer[(length + 3) & ~3 :]
    except (OSError, AttributeError):
        return found
