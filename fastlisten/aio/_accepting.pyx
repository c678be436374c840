"""What accepts for an asyncio server: its listeners, or the queue of clients that the core has let in.

One wake takes a batch of clients, and begins with each.
"""

import logging
from asyncio import trsock

cimport cython
from libc.stdint cimport int64_t

from fastlisten._accept cimport (
    AGAIN,
    CONNECTION,
    INTERRUPTED,
    LOST_IN_A_ROW,
    RESOURCES,
    Ledger,
    client_t,
    count_error,
    shed_client,
    take_client,
    verdict,
    verdict_t,
)
from fastlisten._connection cimport SHORT_ADDRESS, Connection, raise_error
from fastlisten._port cimport *
from fastlisten.aio._hub cimport Watched
from fastlisten.aio._transport cimport Connections, Owner, Transport, new_transport

# How many clients one wake accepts: enough to make the cost of the wake small, little enough that other tasks
# of the loop run in between.
cdef enum:
    ACCEPTS = 32

# The pause after accept() ran out of descriptors or memory, in seconds; the core's loop has the same.
cdef double PAUSE_FIRST = 0.010
cdef double PAUSE_LAST = 0.100

cdef object _log = logging.getLogger("fastlisten")


@cython.final
cdef class ListenerWatch(Watched):
    """A listening socket of the server; the Server keeps it open.

    sock: the socket.socket.  ledger: its counters.
    """

    def __cinit__(self, Accepting accepting not None, sock, Ledger ledger not None):
        self.accepting = accepting
        self.hub = accepting.connections.hub
        self.sock = sock
        self.ledger = ledger
        self.fd = sock.fileno()

    cdef int ready(self, short events) except -1:
        """Take a batch of clients, and begin with each."""
        cdef client_t clients[ACCEPTS]
        cdef int most = self.accepting.places(ACCEPTS)
        cdef int taken = 0
        cdef int code = 0
        cdef int i = 0
        cdef list arrived = []
        cdef Transport transport
        if not self.watched_for:
            return 0  # this look was scheduled, and something has changed since
        while taken < most and code == 0:
            if take_client(self.fd, &clients[taken], 1):
                taken += 1
                self.lost = 0
                continue
            code = port_error()
            if verdict(code) == CONNECTION:
                count_error(self.ledger.at, code)
                self.lost += 1
                if self.lost < LOST_IN_A_ROW:
                    code = 0
            elif verdict(code) == AGAIN:
                self.lost = 0
        port_add(&self.ledger.at.accepted, taken)
        try:
            while i < taken:
                transport = new_transport(self.accepting.connections, self.ledger.at, clients[i].fd,
                                          &clients[i].address, clients[i].length)
                i += 1
                arrived.append(transport)
        finally:
            while i < taken:  # no memory
                port_close(clients[i].fd)
                i += 1
        if self.accepting.full():
            self.accepting.arrange()
        self.answer(code, taken)
        self.hub.give_turns(arrived)
        return 0

    cdef int answer(self, int code, int taken) except -1:
        """Do what the failed accept that ended a batch asks for."""
        cdef verdict_t answer = AGAIN if code == 0 else verdict(code)
        if answer == RESOURCES:
            count_error(self.ledger.at, code)
        if answer == RESOURCES or answer == CONNECTION:
            self.accepting.run_out(code)
        elif self.accepting.failures and (taken or answer == AGAIN):
            self.accepting.recover()
        elif answer not in (AGAIN, INTERRUPTED):
            self.failed = True  # an accept that goes on failing would spin
            self.accepting.arrange()
            try:
                raise_error(code)
            except OSError as error:
                self.hub.loop.call_exception_handler({
                    "message": "accept() failed, the server takes no more clients from this socket",
                    "exception": error,
                    "socket": trsock.TransportSocket(self.sock),
                })
        return 0


@cython.final
cdef class QueueWatch(Watched):
    """The queue of clients that a core Loop fills; its waker says that somebody is in it.

    loop: the Loop, started, with a thread that refuses who finds no place.
    """

    def __cinit__(self, Accepting accepting not None, loop):
        self.accepting = accepting
        self.hub = accepting.connections.hub
        self.loop = loop
        self.fd = loop.bell_fd()

    cdef int ready(self, short events) except -1:
        cdef list arrived = []
        cdef Connection connection
        if not self.accepting.serving:
            return 0  # the loop is over, and its waker closed
        port_unring(self.fd)
        while len(arrived) < ACCEPTS and not self.accepting.paused:
            connection = self.loop.next_waiting()
            if connection is None:
                break
            arrived.append(adopt(self.accepting.connections, connection))
        if len(arrived) == ACCEPTS:
            self.hub.loop.call_soon(self._readable)  # more may wait than one wake takes
        self.hub.give_turns(arrived)
        return 0


cdef Transport adopt(Connections connections, Connection connection):
    """A Transport that takes the descriptor and the hold on the ledger over from a Connection."""
    cdef const void *place = connection.address.bytes
    if connection.address_length > SHORT_ADDRESS:
        place = connection.address.heap
    cdef Transport transport = new_transport(
        connections, connection.ledger, connection.fd, <const port_address *>place, connection.address_length)
    connection.fd = PORT_NO_SOCKET
    connection.ledger = NULL
    connection.closing = True
    port_add(&transport.ledger.active, -1)
    port_add(&transport.ledger.holders, -1)
    return transport


@cython.final
cdef class Accepting(Owner):
    """Whether a server accepts now: its limits, pauses, and what is done without descriptors or memory.

    connections: those of the server.  most: how many may be open, 0 for any number.  shed: out of
    descriptors, reset clients through one kept for that.
    """

    def __cinit__(self, Connections connections not None, int64_t most=0, bint shed=False):
        self.spare = PORT_NO_SOCKET
        self.connections = connections
        self.most = most
        self.listeners = []
        self.shed = shed
        if shed:
            self.spare = port_spare()
            if self.spare == PORT_NO_SOCKET:
                raise_error(port_error())
        connections.owner = self

    def __dealloc__(self):
        if self.spare != PORT_NO_SOCKET:
            port_close(self.spare)

    def add_listener(self, sock, Ledger ledger):
        """A listening socket to accept from, once serving."""
        self.listeners.append(ListenerWatch(self, sock, ledger))
        if self.most:
            port_make_room(sock.fileno(), self.most)

    def add_queue(self, loop):
        """A core Loop, whose queue of clients is taken from."""
        self.queue = QueueWatch(self, loop)
        self.queue.watch(POLLIN)
        # The loop wakes only whoever has looked and found nobody.
        self.connections.hub.loop.call_soon(self.queue._readable)

    def serve(self):
        """Accept from now on."""
        self.connections.begin()
        self.serving = True
        self.arrange()

    def hold(self, bint paused):
        """Accept nobody, or again."""
        self.paused = paused
        self.arrange()
        if self.queue is not None and not paused:
            self.connections.hub.loop.call_soon(self.queue._readable)

    def stop(self):
        """Accept nobody any more; the listening sockets may be closed then."""
        self.serving = False
        if self.retry is not None:
            self.retry.cancel()
            self.retry = None
        self.arrange()
        self.listeners.clear()
        if self.queue is not None:
            self.queue.watch(0)
            self.queue = None
        if self.spare != PORT_NO_SOCKET:
            port_close(self.spare)
            self.spare = PORT_NO_SOCKET
        self.stopped = True
        self.rest()

    def when_idle(self, idle):
        """Call `idle` each time the last connection is gone."""
        self.idle = idle

    cdef int arrange(self) except -1:
        """Watch the listeners if clients are to be accepted now."""
        cdef ListenerWatch listener
        cdef bint open = (self.serving and not self.paused and self.retry is None and not self.full()
                          and not self.connections.hub.loop.is_closed())
        for listener in self.listeners:
            listener.watch(POLLIN if open and not listener.failed else 0)
        return 0

    cdef bint full(self) noexcept:
        """Whether there may be no more connections."""
        return self.most != 0 and self.connections.active >= self.most

    cdef int places(self, int most) noexcept:
        """How many more connections there may be, at most `most`."""
        if self.most == 0:
            return most
        return <int>min(<int64_t>most, max(self.most - self.connections.active, 0))

    cdef int connection_gone(self) except -1:
        cdef bint was_full = self.most != 0 and self.connections.active + 1 >= self.most
        if self.retry is not None:
            self._again()  # a descriptor came free
        elif was_full and self.serving:
            self.arrange()
        if self.connections.active == 0:
            idle = self.idle
            self.rest()
            if idle is not None:
                idle()
        return 0

    cdef int rest(self) except -1:
        """Let go of a server that is over when its last connection is gone."""
        if self.stopped and self.connections.active == 0:
            self.idle = None
            self.connections.owner = None
            self.connections.hub.close()
        return 0

    # --- out of descriptors or memory --------------------------------------------------------------

    cdef int run_out(self, int code) except -1:
        """No descriptors or no memory, or lost clients without end: shed the clients, or pause for longer
        each time."""
        if self.failures == 0:
            self.pause = PAUSE_FIRST
            self.failing_since = port_now()
            try:
                raise_error(code)
            except OSError as error:
                _log.warning("accepting pauses: %s", error)
        self.failures += 1
        if self.spare != PORT_NO_SOCKET and self.shed_queued():
            return 0
        if self.retry is None and self.serving:
            self.retry = self.connections.hub.loop.call_later(self.pause, self._again)
        self.pause = min(2 * self.pause, PAUSE_LAST)
        self.arrange()
        return 0

    cdef bint shed_queued(self) except *:
        """Reset who is queued, through the descriptor kept for that; False if that cannot be done now."""
        cdef ListenerWatch listener
        cdef int code
        for listener in self.listeners:
            for _ in range(ACCEPTS):
                code = shed_client(listener.fd, listener.ledger.at, &self.spare, NULL, 0)
                if (self.spare == PORT_NO_SOCKET or verdict(code) == RESOURCES
                        or listener.lost >= LOST_IN_A_ROW):
                    return False  # the whole system has run out: one descriptor of ours does not help
                if code != 0:
                    break
        return True

    def _again(self):
        cdef ListenerWatch listener
        if self.retry is not None:
            self.retry.cancel()
            self.retry = None
        if self.shed and self.spare == PORT_NO_SOCKET and self.serving:
            self.spare = port_spare()
        self.arrange()
        for listener in self.listeners:  # that nobody is queued any more tells of no event
            if listener.watched_for:
                self.connections.hub.loop.call_soon(listener._readable)

    cdef int recover(self) except -1:
        _log.info("accepting again after %.3f s and %d failed tries",
                  (port_now() - self.failing_since) / 1e9, self.failures)
        self.failures = 0
        return 0
