"""The status port's clients: each has a few seconds, and none can hold up another, or the caller."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import time
from collections.abc import Callable

from fastlisten._core.connection import Connection
from fastlisten._events import Events
from fastlisten._listener import Listener
from fastlisten._status.answers import answer
from fastlisten._status.control import Control
from fastlisten._status.service import Service
from fastlisten._status.weight import Weight

_log = logging.getLogger("fastlisten")

# From its connect on a client has so long for its request and for reading the answer, in seconds.
TIME = 5.0

# So many clients there are at a time; for another one the one that came first goes.
MOST_CLIENTS = 64

# A client that sends more than this is closed, in bytes.
MOST_BYTES = 65536

# Without descriptors nobody is accepted for so long, in seconds.
SHORTAGE = 0.1


class StatusServer:
    """Answers at a listener whoever asks, from an event loop: no thread of its own, and no call that waits.

    listener: is the server's to close.  The parent of workers may have no thread when it forks, so this is
    no serve(); and one that is no parent runs it in a thread.
    """

    def __init__(self, listener: Listener, service: Service) -> None:
        self.listener = listener
        self.service = service
        self.weight = Weight(service)
        self.control: Control | None = None  # does what a POST asks; None: nothing is to be changed
        self._events: Events | None = None
        self._clients: dict[int, _Client] = {}  # by their descriptors, in the order in which they came
        self._again = math.inf  # when the listener is to be heard again

    def open(self, events: Events) -> None:
        """Answer from now on: while the caller waits for these events, and calls look()."""
        self.listener.settimeout(0)
        self._events = events
        events.hear(self.listener, self._came)
        events.owns(self._close)

    def stop(self) -> None:
        """Accept nobody any more; who is here is still answered."""
        if self._events is not None and self._again == math.inf:
            self._events.forget(self.listener)
        self._again = math.inf
        self.listener.close()

    def _close(self) -> None:
        """Close the descriptors, also those that a fork has got: the events are the parent's there."""
        for client in self._clients.values():
            client.connection.close()
        self._clients.clear()
        self.listener.close()

    def due(self) -> float:
        """When look() is to be called; time.monotonic()."""
        first = next(iter(self._clients.values()), None)
        return min(self._again, self.weight.due(), math.inf if first is None else first.until)

    def look(self, now: float) -> None:
        """End those whose time is over, and see how the service does."""
        self.weight.look(now)
        for client in list(self._clients.values()):
            if now < client.until:
                break
            client.end()
        if now >= self._again and self._events is not None:
            self._again = math.inf
            self._events.hear(self.listener, self._came)

    def _came(self) -> None:
        if self._events is None or self.listener.fileno() == -1:  # it was stopped just now
            return
        try:
            connections = self.listener.accept_many()
        except BlockingIOError:
            return
        except OSError:  # for want of descriptors or memory; it would be ready for ever
            self._events.forget(self.listener)
            self._again = time.monotonic() + SHORTAGE
            return
        for connection in connections:
            if len(self._clients) >= MOST_CLIENTS:
                next(iter(self._clients.values())).end()
            try:
                connection.setblocking(False)
                client = _Client(connection, self._answer, self._events, self._gone)
            except OSError:  # no memory for one more to wait for
                connection.close()
            else:
                self._clients[connection.fileno()] = client
                client.read()  # most have sent their request by now

    def _answer(self, request: bytes) -> bytes | None:
        return answer(request, self.service, self.weight, self.control)

    def _gone(self, number: int) -> None:
        self._clients.pop(number, None)


class _Client:
    """One request and its answer."""

    def __init__(
        self,
        connection: Connection,
        answer: Callable[[bytes], bytes | None],
        events: Events,
        gone: Callable[[int], None],
    ) -> None:
        self.connection = connection
        self.until = time.monotonic() + TIME
        self._answer_to = answer
        self._events = events
        self._gone = gone
        self._request = b""
        self._received = 0
        self._answer: memoryview | None = None
        events.hear(connection, self.read)

    def end(self) -> None:
        """Close it."""
        self._events.forget(self.connection)
        self._gone(self.connection.fileno())
        self.connection.close()

    def read(self) -> None:
        """It has sent something."""
        if self.connection.closed:  # for another one, just now
            return
        try:
            data = self.connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._received += len(data)
        if not data or self._received > MOST_BYTES:
            self.end()
        elif self._answer is None:
            self._request += data
            try:
                found = self._answer_to(self._request)
            except Exception:  # whoever asks must not end what he asks about
                _log.exception("a request for the status failed", extra={"event": "status failed"})
                self.end()
                return
            if found is not None:
                self._answer = memoryview(found)
                self._write()
        # what it sends beyond its request is read and forgotten: closing with that unread would send a reset,
        # which can overtake the answer (RFC 9112, section 9.6)

    def _write(self) -> None:
        """There is room for more of the answer."""
        if self.connection.closed or self._answer is None:
            return
        try:
            while self._answer:
                self._answer = self._answer[self.connection.send(self._answer) :]
        except BlockingIOError:
            self._events.hear_again(self.connection, self._write, writable=True)
        except OSError:
            self.end()
        else:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
            self._events.hear_again(self.connection, self.read)
