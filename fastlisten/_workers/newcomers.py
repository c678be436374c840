"""When a worker that has begun serves, and when the one that it replaces can go."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

from fastlisten._workers.pool import Pool
from fastlisten._workers.process import Place, Process
from fastlisten._workers.programs import Probe, half_open
from fastlisten._workers.steering import Steering

# How often programs that are about to serve, or to go, are looked at; and after what time one that cannot be
# seen to accept is believed to.
LOOK_AT_PROGRAMS = 0.01  # seconds
BELIEVED_READY = 1.0


class Newcomers:
    """Workers that have begun, and those that are to go: as ours do it, who say when they are ready and leave
    their listener to the next one."""

    @property
    def busy(self) -> bool:
        """Whether somebody is to be looked at soon."""
        return False

    def member(self, place: Place) -> int:
        """Which listeners a new process gets."""
        return place.member

    def has_room(self, place: Place) -> bool:
        """Whether one that is to replace another can begin."""
        return True

    def began(self, process: Process) -> None:
        """A process has begun."""

    def look(self, now: float, ready: Callable[[Process], None]) -> None:
        """See who is ready, and who can go."""

    def leaves(self, process: Process) -> bool:
        """A process gets no new clients; returns whether it is asked to go later."""
        return False

    def ended(self, process: Process) -> bool:
        """A process has ended; returns whether clients are left in its queue that no other can take."""
        return False


class ProgramNewcomers(Newcomers):
    """Programs that need not tell when they serve, and that may close their listener when they are asked to
    go.

    A new one has listeners of its own, to which nobody is sent yet, beside those of the one that it is to
    replace.  It serves when it says so (NOTIFY_SOCKET) or takes the parent's own client; the one before is
    asked to go when nobody is on the way to it, or queued.  So no client is in a queue that nobody looks
    into.  Where clients cannot be steered both have the same listeners, and who says nothing serves after a
    second.
    """

    def __init__(self, pool: Pool, steering: Steering, notifications: dict[int, socket.socket]) -> None:
        self._pool = pool
        self._steering = steering
        self._endpoints = steering.endpoints
        self._notifications = notifications
        self._probes: dict[Process, Probe | None] = {}
        self._leaving: dict[Process, tuple[float, list[set[bytes]]]] = {}

    @property
    def _steers(self) -> bool:
        return all(members.steers for members in self._endpoints)

    @property
    def busy(self) -> bool:
        return bool(self._probes or self._leaving)

    def member(self, place: Place) -> int:
        """Which listeners a new process gets: its place's, unless somebody has those."""
        free = self._free(place)
        if place.member in free or not free:
            return place.member
        return min(free, key=lambda member: (-self._depth(member), member))  # who is queued is served first

    def has_room(self, place: Place) -> bool:
        """Whether one that is to replace another can begin: the one that went before has ended."""
        return not self._steers or bool(self._free(place))

    def _free(self, place: Place) -> set[int]:
        """The listeners that nobody has and that no other place is to have."""
        if not self._steers:
            return set()
        taken = {process.member for process in self._pool.processes.values()}
        taken |= {other.member for other in self._pool.places if other is not place}
        return set(range(len(self._endpoints[0].listeners))) - taken

    def began(self, process: Process) -> None:
        """A process has begun: look whether it accepts."""
        self._probes[process] = None
        if self._steers and not any(members.defers for members in self._endpoints):
            live = [other.member for other in self._pool.serving()]
            with contextlib.suppress(OSError):  # then it is waited for as where clients cannot be steered
                self._probes[process] = Probe(self._endpoints[0], process.member, live)
            self._steering.steer()

    def look(self, now: float, ready: Callable[[Process], None]) -> None:
        """See who is ready, and who can go."""
        for process, probe in list(self._probes.items()):
            accepts = probe.accepted() if probe is not None else now - process.began > BELIEVED_READY
            if self._says_ready(process) or accepts:
                del self._probes[process]
                if not process.asked:
                    ready(process)
        for process, (until, on_their_way) in list(self._leaving.items()):
            if now >= until or not self._awaited(process, on_their_way):
                del self._leaving[process]
                self._pool.ask(process)

    def leaves(self, process: Process) -> bool:
        """A process gets no new clients; returns whether it is asked to go later."""
        others = [other for other in self._pool.serving() if other.member != process.member]
        if not self._steers or not others or process.asked:
            return False
        on_their_way = [half_open(members.of(process.member)) for members in self._endpoints]
        self._leaving[process] = (time.monotonic() + self._pool.options.drain, on_their_way)
        return True

    def ended(self, process: Process) -> bool:
        """A process has ended; returns whether clients are left in its queue that no other can take."""
        self._probes.pop(process, None)
        self._leaving.pop(process, None)
        return process.member in self._free(process.place) and self._depth(process.member) > 0

    def _depth(self, member: int) -> int:
        return sum(members.depth(member) for members in self._endpoints)

    def _awaited(self, process: Process, on_their_way: list[set[bytes]]) -> bool:
        """Whether clients that were sent to a process have yet to come out of its queue."""
        for members, before in zip(self._endpoints, on_their_way, strict=True):
            if before:
                before &= half_open(members.of(process.member))
            if before or members.depth(process.member):
                return True
        return False

    def _says_ready(self, process: Process) -> bool:
        notification = self._notifications.get(process.slot.number)
        if notification is None:
            return False
        with contextlib.suppress(BlockingIOError):
            while text := notification.recv(4096):
                if b"READY=1" in text.split(b"\n"):
                    return True
        return False
