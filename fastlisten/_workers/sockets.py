"""The listening sockets of an endpoint: one a worker, and which of them get new clients; or one for all."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence

from fastlisten._bind import PASSED, Address, bind_checked
from fastlisten._core import processes
from fastlisten._core.state import queue
from fastlisten._endpoint import Endpoint, endpoint_of
from fastlisten._listener import Listener
from fastlisten._options import Checked

_log = logging.getLogger("fastlisten")


class Members:
    """The listeners of one endpoint, in the order in which they began to listen.

    where: as bind() takes it; a Listener is served as it is, by all workers, and stays the caller's.
    options: of bind(), checked.  name: where, as it was asked for.  Raises as bind().

    The kernel numbers the listeners that share a port in this order, and would number them anew if one was
    closed, with the clients in its queue reset: so they stay open for as long as there is a parent, whoever
    serves them.
    """

    def __init__(self, where: Address | Listener, options: Checked) -> None:
        self._options = options
        self._own = not isinstance(where, Listener)
        self.name = name_of(where)
        if isinstance(where, Listener):
            first, ours = where, False
        else:
            endpoint = endpoint_of(where)
            first, ours = bind_checked(endpoint, options), not endpoint.host.startswith(("fd:", *PASSED))
        self.listeners = [first]
        tcp = first.family in (socket.AF_INET, socket.AF_INET6)
        self.shared = not (ours and tcp and processes.BALANCES)
        self._steered: tuple[object, ...] = ()
        self._steers = True
        self.settled = True  # no other parent steers

    @classmethod
    def adopted(cls, name: str, listeners: Sequence[Listener], options: Checked, shared: bool) -> Members:
        """Those of another parent, in its order, which had this endpoint by this name."""
        members = cls.__new__(cls)
        members.name = name
        members._options, members._own, members.listeners = options, True, list(listeners)
        members.shared, members._steered, members._steers = shared, (), True
        members.settled = False
        return members

    @property
    def endpoint(self) -> Endpoint:
        """Where they listen."""
        return self.listeners[0].endpoint

    @property
    def path(self) -> str | None:
        """The unix path that is to be unlinked at the end, if it is ours."""
        return self.endpoint.host.removeprefix("unix:") if self.listeners[0]._path is not None else None

    @property
    def defers(self) -> bool:
        """Whether clients are queued when they have said something."""
        return self._options.defer_accept is not None

    def of(self, place: int) -> Listener:
        """The listener at a place; all have the same one where it is shared."""
        return self.listeners[0 if self.shared else place]

    def grow(self, count: int) -> None:
        """Have at least so many.  Raises OSError."""
        if self.shared or len(self.listeners) >= count:
            return
        # The first was bound without it, so that a port which a stranger has is refused, and 0 gave one of
        # our own.
        self.listeners[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        options = Checked({**vars(self._options), "reuse_port": 1})
        while len(self.listeners) < count:
            self.listeners.append(bind_checked(self.endpoint, options))

    def depth(self, place: int) -> int:
        """How many clients are queued at a place."""
        return queue(self.of(place).fileno())[0] or 0

    def steer(self, places: Sequence[int], probe: int = 0, probe_place: int = 0) -> None:
        """Have new clients go to these places, evenly; without any it stays as it is.

        probe: a client from this port goes to `probe_place`; 0: there is none.  Where the kernel refuses,
        its hash goes on spreading them over all, which is said once.
        """
        wanted = (tuple(places), probe, probe_place)
        if (
            self.shared
            or len(self.listeners) < 2
            or not places
            or not self._steers
            or wanted == self._steered
        ):
            return
        try:
            processes.steer(self.listeners[0].fileno(), places, probe, probe_place)
        except OSError as error:
            self._steers = False
            _log.warning(
                "%s: clients cannot be steered, the kernel's hash spreads them: %s",
                *(self.endpoint, error),
                extra={"event": "not steered", "listener": str(self.endpoint), "reason": str(error)},
            )
        else:
            self._steered = wanted

    @property
    def steers(self) -> bool:
        """Whether new clients go where they are sent."""
        return self.settled and not self.shared and len(self.listeners) > 1 and self._steers

    def disown(self) -> None:
        """Somebody else has them, too, and a unix path is no longer ours to unlink."""
        for listener in self.listeners:
            listener._path = None

    def close_early(self) -> None:
        """Close what bind() made, while its clients' handlers go on; `endpoint` is still told."""
        if self._own:
            for listener in reversed(self.listeners):
                listener._close_early()

    def close(self) -> None:
        """Close what bind() made, newest first."""
        if self._own:
            for listener in reversed(self.listeners):
                listener.close()


def name_of(where: Address | Listener) -> str:
    """An endpoint as it was asked for."""
    return str(where.endpoint if isinstance(where, Listener) else endpoint_of(where))
