"""Transports of asyncio servers, and the hub that accepts, watches and wakes them.

One wake of the event loop does as much as it can for many connections, because a wake is what costs: the
hub takes a batch of clients, and a transport reads as soon as it is made.  Only when the kernel says that it
would block is a transport watched.  The hub watches transports with a poller of its own, which is one
descriptor to the event loop; where the system has none (port.h), each is registered with the event loop
itself, as the listeners are everywhere: that is done once, and their wakes need no look at the poller.

Nothing here gives the GIL up: all calls are non-blocking and take about as long as giving it up does, and in
a process with busy threads it would take up to a switch interval (5 ms) to get it back.
"""

import asyncio
import gc
import logging
import os
import socket as _socket
import sys
import warnings
import weakref
from asyncio import constants, trsock
from collections import deque

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.contextvars cimport (
    PyContext_Copy,
    PyContext_CopyCurrent,
    PyContext_Enter,
    PyContext_Exit,
)
from cpython.weakref cimport PyWeakref_NewRef
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

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
from fastlisten._connection cimport (
    SHORT_ADDRESS,
    Connection,
    address_object,
    ledger_release,
    ledger_ring,
    ledger_t,
    raise_error,
)
from fastlisten._core.port cimport *

# How many clients one wake accepts, and how many watched descriptors it serves: enough to make the cost of
# the wake small, little enough that other tasks of the loop run in between.
cdef enum:
    ACCEPTS = 32
    READY = 64

# How much one recv() takes at most, and how much one wake sends on one connection; asyncio's own size.
cdef enum:
    CHUNK = 256 * 1024

# What is kept to be sent is joined when the pieces are smaller than this.
cdef enum:
    SMALL = 64 * 1024

# The pause after accept() ran out of descriptors or memory, in seconds; the core's loop has the same.
cdef double PAUSE_FIRST = 0.010
cdef double PAUSE_LAST = 0.100

# Every Hub there is.
cdef object _hubs = weakref.WeakSet()

cdef object _log = logging.getLogger("fastlisten")
cdef object _asyncio_log = logging.getLogger("asyncio")
cdef object _StandardSocket = _socket.socket
cdef object _BufferedProtocol = asyncio.BufferedProtocol
cdef int _warn_from = constants.LOG_THRESHOLD_FOR_CONNLOST_WRITES
cdef object _SendfileMode = constants._SendfileMode
# Its words have changed between two bugfix releases of 3.13, so the running one has to say them.
cdef object _asyncio_write = asyncio.selector_events._SelectorSocketTransport.write
# Connections begin in the context of create_server() there, of start_serving() before.
cdef bint _context_of_creation = sys.version_info >= (3, 15)
cdef object _writelines_name = "writelines" if sys.version_info >= (3, 12) else "write"


class SocketTransport(asyncio.transports._FlowControlMixin):
    """What isinstance() is told that a Transport is: an asyncio.Transport with flow control.

    asyncio.BaseTransport has an instance slot, so that no extension type can inherit from it.
    """

    __slots__ = ()


def _before_fork():
    """What is held leaves now: after it two would send it, and the end that goes with it is for both."""
    cdef Hub hub
    loop = asyncio._get_running_loop()
    for hub in list(_hubs):
        if hub.loop is loop:
            hub.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)


# --- What is watched ----------------------------------------------------------------------------------------

cdef class Watched:
    """Something with a descriptor that the hub can watch."""

    cdef Hub hub
    cdef port_socket fd
    cdef short wanted       # the events it is watched for
    cdef bint polled        # by the hub's poller; else by the event loop, as all is where there is no poller

    def __cinit__(self):
        self.fd = PORT_NO_SOCKET

    cdef int ready(self, short events) except -1:
        """The kernel has said so."""
        raise NotImplementedError

    cdef int want(self, short events) except -1:
        """Be watched for these events from now on; POLLIN, POLLOUT, both or 0."""
        if events != self.wanted:
            self.hub.watch(self, events)
        return 0

    def _readable(self):
        self.hub.wake(self, POLLIN)

    def _writable(self):
        self.hub.wake(self, POLLOUT)


@cython.final
cdef class Entrance(Watched):
    """A listening socket of the server; the Server keeps it open.

    sock: the socket.socket.  ledger: its counters.
    """

    cdef readonly object sock
    cdef readonly Ledger ledger
    cdef bint failed
    cdef int lost           # clients in a row that were lost before they were ours

    def __cinit__(self, Hub hub, sock, Ledger ledger not None):
        self.hub = hub
        self.sock = sock
        self.ledger = ledger
        self.fd = sock.fileno()

    cdef int ready(self, short events) except -1:
        """Take a batch of clients, and begin with each."""
        cdef client_t clients[ACCEPTS]
        cdef int most = self.hub.places(ACCEPTS)
        cdef int taken = 0
        cdef int code = 0
        cdef int i = 0
        cdef list arrived = []
        cdef Transport transport
        if not self.wanted:
            return 0  # the hub has scheduled this look, and something has changed since
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
                transport = new_transport(self.hub, self.ledger.at, clients[i].fd, &clients[i].address,
                                          clients[i].length)
                i += 1
                arrived.append(transport)
        finally:
            while i < taken:  # no memory
                port_close(clients[i].fd)
                i += 1
        self.answer(code, taken)
        self.hub.give_turns(arrived)
        return 0

    cdef int answer(self, int code, int taken) except -1:
        """Do what the failed accept that ended a batch asks for."""
        cdef verdict_t answer = AGAIN if code == 0 else verdict(code)
        if answer == RESOURCES:
            count_error(self.ledger.at, code)
        if answer == RESOURCES or answer == CONNECTION:
            self.hub.run_out(code)
        elif self.hub.failures and (taken or answer == AGAIN):
            self.hub.recover()
        elif answer not in (AGAIN, INTERRUPTED):
            self.failed = True  # an accept that goes on failing would spin
            self.hub.arrange()
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
cdef class Bell(Watched):
    """What the core's Loop rings when its usher has let clients in.

    gate: the Loop, started, with an usher.
    """

    cdef readonly object gate

    def __cinit__(self, Hub hub, gate):
        self.hub = hub
        self.gate = gate
        self.fd = gate.bell_fd()

    cdef int ready(self, short events) except -1:
        cdef list arrived = []
        cdef Connection connection
        if not self.hub.serving:
            return 0  # the gate is closed, and so is its bell
        port_unring(self.fd)
        while len(arrived) < ACCEPTS and not self.hub.paused:
            connection = self.gate.next_waiting()
            if connection is None:
                break
            arrived.append(adopt(self.hub, connection))
        if len(arrived) == ACCEPTS:
            self.hub.loop.call_soon(self._readable)  # more may wait than one wake takes
        self.hub.give_turns(arrived)
        return 0


# --- The hub ------------------------------------------------------------------------------------------------

def _ready_queue(loop):
    """Where the loop keeps what it was given by call_soon(): a deque, asyncio's `_ready`, which uvloop hides;
    None when it cannot be found."""
    handle = loop.call_soon(id, None)
    handle.cancel()
    for found in (getattr(loop, "_ready", None), *gc.get_referents(loop)):
        if type(found) is deque and handle in found:
            return found
    return None


@cython.final
cdef class Hub:
    """What the connections of one server share: the event loop, the poller, limits and what is due.

    loop: the event loop that runs.  factory: makes a protocol for each connection.  most: how many
    connections may be open, 0 for any number.  shed: out of descriptors, reset clients through one kept for
    that.  polled: False to register each descriptor with the event loop, as it is where the system has no
    poller.
    """

    cdef readonly object loop
    cdef object factory
    cdef object context         # what each connection's own is a copy of
    cdef object __weakref__
    cdef int64_t most
    cdef readonly int64_t active
    cdef port_socket poller
    cdef bint shed
    cdef port_socket spare      # given up to take and reset a client when there is no other descriptor
    cdef dict watched           # the Transports by descriptor, while there is a poller
    cdef object queue           # what call_soon() was given; None when the loop does not show it
    cdef Py_ssize_t guess       # what scheduled() says then, never the same twice
    cdef list due               # Transports that have something to do on the loop's next turn
    cdef list ending            # ... and those whose connection_lost() is what comes next
    cdef bint awake             # a wake is under way, whose end sees to both
    cdef dict transports        # weak references to the open ones, by descriptor
    cdef object kind            # the class of the last protocol, and whether that is a BufferedProtocol
    cdef bint buffered
    cdef char *scratch
    cdef list entrances
    cdef Bell bell
    cdef bint serving, paused, stopped
    cdef readonly int64_t failures  # accepts that ran out of resources, in a row
    cdef int64_t failing_since
    cdef double pause
    cdef object retry
    cdef object idle            # called when the last connection of a closed server is gone

    def __cinit__(self, loop, factory, int64_t most=0, bint shed=False, bint polled=True):
        self.poller = self.spare = PORT_NO_SOCKET
        self.scratch = <char *>malloc(CHUNK)
        if self.scratch is NULL:
            raise MemoryError
        _hubs.add(self)
        self.loop = loop
        self.factory = factory
        self.most = most
        self.watched = {}
        self.queue = _ready_queue(loop)
        self.due = []
        self.ending = []
        self.transports = {}
        self.entrances = []
        if _context_of_creation:
            self.context = PyContext_CopyCurrent()
        if polled:
            self.poller = port_poller()
        self.shed = shed
        if shed:
            self.spare = port_spare()
            if self.spare == PORT_NO_SOCKET:
                raise_error(port_error())

    def __dealloc__(self):
        free(self.scratch)
        if self.poller != PORT_NO_SOCKET:
            port_close(self.poller)
        if self.spare != PORT_NO_SOCKET:
            port_close(self.spare)

    # --- watching ----------------------------------------------------------------------------------

    cdef int watch(self, Watched what, short events) except -1:
        """Watch what.fd for other events than before."""
        cdef short before = what.wanted
        if what.polled:
            if port_poller_set(self.poller, what.fd, before, events) != 0:
                raise_error(port_error())
            what.wanted = events
            if not before:
                if not self.watched:
                    self.loop.add_reader(self.poller, self._ready)
                self.watched[what.fd] = what
            elif not events:
                del self.watched[what.fd]
                if not self.watched:
                    self.loop.remove_reader(self.poller)
            return 0
        what.wanted = events
        if events & ~before & POLLIN:
            self.loop.add_reader(what.fd, what._readable)
        elif before & ~events & POLLIN:
            self.loop.remove_reader(what.fd)
        if events & ~before & POLLOUT:
            self.loop.add_writer(what.fd, what._writable)
        elif before & ~events & POLLOUT:
            self.loop.remove_writer(what.fd)
        return 0

    # --- wakes and turns ---------------------------------------------------------------------------
    # asyncio calls connection_made() and connection_lost() by call_soon().  Here they are called in the wake
    # that brings them about, when nothing was scheduled that would come before: nobody can tell.

    def _ready(self):
        """Serve what the poller says is ready.  It is level-triggered: the rest is told on the next wake."""
        cdef port_pollfd polls[READY]
        cdef int i
        cdef Watched what
        cdef int found = port_poller_ready(self.poller, polls, READY)
        self.awake = True
        try:
            for i in range(found):
                what = self.watched.get(polls[i].fd)
                if what is not None:  # one before it may have ended it
                    what.ready(polls[i].revents)
            self.give_ends()
        finally:
            self.sleep()

    cdef int wake(self, Watched what, short events) except -1:
        """Serve one descriptor, which the event loop itself watches."""
        self.awake = True
        try:
            what.ready(events)
            self.give_ends()
        finally:
            self.sleep()
        return 0

    def _turn(self, list transports):
        """What was left for the loop's next turn."""
        self.awake = True
        try:
            self.give_turns(transports)
            self.give_ends()
        finally:
            self.sleep()

    def _end(self, list transports):
        """connection_lost(), where asyncio would call it."""
        self.awake = True
        try:
            self.ending[:0] = transports
            self.give_ends()
        finally:
            self.sleep()

    cdef int give_turns(self, list transports) except -1:
        """Give each its turn; when one raises (SystemExit), the rest has it on the loop's next turn."""
        cdef Py_ssize_t i = 0
        cdef Transport transport
        try:
            while i < len(transports):
                transport = transports[i]
                i += 1
                transport.turn()
        except BaseException:
            self.due = transports[i:] + self.due
            raise
        return 0

    cdef int give_ends(self) except -1:
        """End those that were closed in this wake."""
        cdef Transport transport
        while self.ending:
            transport = self.ending.pop(0)
            transport.come_to_end()
        return 0

    cdef int sleep(self) except -1:
        """The wake is over; have the loop come back for what is left."""
        self.awake = False
        if self.ending:
            ending, self.ending = self.ending, []
            self.loop.call_soon(self._end, ending)
        if self.due:
            due, self.due = self.due, []
            self.loop.call_soon(self._turn, due)
        return 0

    cdef Py_ssize_t scheduled(self) except -1:
        """How many callbacks the loop has to call; a number never seen before when it does not tell."""
        if self.queue is None:
            self.guess += 1
            return self.guess
        return len(self.queue)

    cdef int turn_soon(self, Transport transport) except -1:
        """Have transport.turn() called after all that is scheduled."""
        if self.awake:
            self.due.append(transport)
        else:
            self.loop.call_soon(self._turn, [transport])
        return 0

    cdef int end_soon(self, Transport transport) except -1:
        """Have the transport come to its end after all that is scheduled, and before what is not yet."""
        if self.awake and self.scheduled() == 0:
            self.ending.append(transport)
        else:
            self.loop.call_soon(self._end, [transport])
        return 0

    # --- accepting ---------------------------------------------------------------------------------

    def add_entrance(self, sock, Ledger ledger):
        """A listening socket to accept from, once serving."""
        self.entrances.append(Entrance(self, sock, ledger))
        if self.most:
            port_make_room(sock.fileno(), self.most)

    def add_gate(self, gate):
        """A core Loop with an usher, whose listeners it accepts from."""
        self.bell = Bell(self, gate)
        self.bell.want(POLLIN)
        self.loop.call_soon(self.bell._readable)  # the gate rings only for who has looked and found nobody

    def serve(self):
        """Accept from now on."""
        if self.context is None:
            self.context = PyContext_CopyCurrent()
        self.serving = True
        self.arrange()

    def hold(self, bint paused):
        """Accept nobody, or again."""
        self.paused = paused
        self.arrange()
        if self.bell is not None and not paused:
            self.loop.call_soon(self.bell._readable)

    def stop(self):
        """Accept nobody any more; the listening sockets may be closed then."""
        self.serving = False
        if self.retry is not None:
            self.retry.cancel()
            self.retry = None
        self.arrange()
        self.entrances.clear()
        if self.bell is not None:
            self.bell.want(0)
            self.bell = None
        if self.spare != PORT_NO_SOCKET:
            port_close(self.spare)
            self.spare = PORT_NO_SOCKET
        self.stopped = True
        self.rest()

    cdef int arrange(self) except -1:
        """Watch the entrances if clients are to be accepted now."""
        cdef Entrance entrance
        cdef bint open = (self.serving and not self.paused and self.retry is None and self.places(1) > 0
                          and not self.loop.is_closed())
        for entrance in self.entrances:
            entrance.want(POLLIN if open and not entrance.failed else 0)
        return 0

    cdef int places(self, int most) noexcept:
        """How many more connections there may be, at most `most`."""
        if self.most == 0:
            return most
        return <int>min(<int64_t>most, max(self.most - self.active, 0))

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
            self.retry = self.loop.call_later(self.pause, self._again)
        self.pause = min(2 * self.pause, PAUSE_LAST)
        self.arrange()
        return 0

    cdef bint shed_queued(self) except *:
        """Reset who is queued, through the descriptor kept for that; False if that cannot be done now."""
        cdef Entrance entrance
        cdef int code
        for entrance in self.entrances:
            for _ in range(ACCEPTS):
                code = shed_client(entrance.fd, entrance.ledger.at, &self.spare, NULL, 0)
                if (self.spare == PORT_NO_SOCKET or verdict(code) == RESOURCES
                        or entrance.lost >= LOST_IN_A_ROW):
                    return False  # the whole system has run out: one descriptor of ours does not help
                if code != 0:
                    break
        return True

    def _again(self):
        cdef Entrance entrance
        if self.retry is not None:
            self.retry.cancel()
            self.retry = None
        if self.shed and self.spare == PORT_NO_SOCKET and self.serving:
            self.spare = port_spare()
        self.arrange()
        for entrance in self.entrances:  # that nobody is queued any more tells of no event
            if entrance.wanted:
                self.loop.call_soon(entrance._readable)

    cdef int recover(self) except -1:
        _log.info("accepting again after %.3f s and %d failed tries",
                  (port_now() - self.failing_since) / 1e9, self.failures)
        self.failures = 0
        return 0

    # --- the connections ---------------------------------------------------------------------------

    cdef int enter(self, Transport transport, port_socket fd) except -1:
        self.transports[fd] = PyWeakref_NewRef(transport, None)
        self.active += 1
        if self.most and self.active >= self.most:
            self.arrange()
        return 0

    cdef int leave(self) except -1:
        cdef bint was_full = self.most != 0 and self.active >= self.most
        self.active -= 1
        if self.retry is not None:
            self._again()  # a descriptor came free
        elif was_full and self.serving:
            self.arrange()
        if self.active == 0:
            idle = self.idle
            self.rest()
            if idle is not None:
                idle()
        return 0

    cdef int rest(self) except -1:
        """Close the poller of a server that is over, and let go of it; somebody may hold on to a Transport
        for long."""
        if self.stopped and self.active == 0:
            self.idle = None
            if self.poller != PORT_NO_SOCKET:
                port_close(self.poller)
                self.poller = PORT_NO_SOCKET
        return 0

    def when_idle(self, idle):
        """Call `idle` each time the last connection is gone."""
        self.idle = idle

    cdef int let_go(self) except -1:
        """No Transport holds back what is written any longer."""
        for transport in self.clients():
            (<Transport>transport).let_go()
        return 0

    def clients(self):
        """The open Transports."""
        return [transport for weak in list(self.transports.values())
                if (transport := weak()) is not None]


# --- A connection -------------------------------------------------------------------------------------------

cdef enum due_t:
    NOTHING
    BEGIN       # make the protocol
    MEET        # tell the protocol
    READ        # try recv()


cdef Transport new_transport(
        Hub hub, ledger_t *ledger, port_socket fd, const port_address *address, int length):
    """A Transport that owns `fd` and a hold on the ledger; on failure the descriptor stays the caller's."""
    cdef Transport transport = Transport.__new__(Transport)
    transport.hub = hub
    transport.polled = hub.poller != PORT_NO_SOCKET
    transport.due = BEGIN
    if length > SHORT_ADDRESS:
        transport.peer = address_object(address, length)
    else:
        memcpy(transport.address, address, length)
        transport.address_length = length
    hub.enter(transport, fd)
    port_add(&ledger.holders, 1)
    port_add(&ledger.active, 1)
    transport.ledger = ledger
    transport.fd = fd
    return transport


cdef Transport adopt(Hub hub, Connection connection):
    """A Transport that takes the descriptor and the hold on the ledger over from a Connection."""
    cdef const void *place = connection.address.bytes
    if connection.address_length > SHORT_ADDRESS:
        place = connection.address.heap
    cdef Transport transport = new_transport(
        hub, connection.ledger, connection.fd, <const port_address *>place, connection.address_length)
    connection.fd = PORT_NO_SOCKET
    connection.ledger = NULL
    connection.closing = True
    port_add(&transport.ledger.active, -1)
    port_add(&transport.ledger.holders, -1)
    return transport


@cython.final
cdef class Transport(Watched):
    """An asyncio.Transport of one accepted client.

    Made by the servers of fastlisten.aio.  It owns its descriptor and closes it after connection_lost().
    """

    cdef object __weakref__
    cdef object protocol
    cdef object context             # contextvars.Context in which the protocol is called
    cdef object sock                # the socket.socket that owns the descriptor, once somebody asked for one
    cdef object peer, sockname
    cdef list held                  # bytes written in our call to the protocol, to be sent after it; or None
    cdef Py_ssize_t held_size
    cdef object buffer              # deque of bytes to be sent; None until something has to be kept
    cdef Py_ssize_t sent            # how much of the first is gone
    cdef Py_ssize_t size            # how much there is
    cdef Py_ssize_t low, high
    cdef object emptied             # a Future while a file is sent: nothing is kept any more
    cdef ledger_t *ledger
    cdef object error               # what connection_lost() gets
    cdef int lost                   # connection_lost() is due or done; counts the writes after that
    cdef due_t due                  # at its next turn
    cdef int address_length
    cdef char address[SHORT_ADDRESS]
    cdef bint buffered              # the protocol is a BufferedProtocol
    cdef bint connected             # there is a protocol
    cdef bint holding               # the protocol is being called by us
    cdef bint closing, paused, ended, eof_sent, writing_paused

    _start_tls_compatible = True
    max_size = CHUNK

    def __cinit__(self):
        self.ledger = NULL
        self.low = 16 * 1024
        self.high = 64 * 1024

    def __init__(self, *args):
        if self.hub is None:
            raise TypeError("a Transport comes from a server")

    @property
    def __class__(self):
        return SocketTransport

    def __del__(self):
        if self.fd != PORT_NO_SOCKET:
            if self.protocol is not None:  # else it was never begun
                warnings.warn(f"unclosed transport {self!r}", ResourceWarning, stacklevel=1, source=self)
            # A forked child shares the poller with its parent, who goes on: fork(2), epoll(7).  Who is
            # watched is held by its watcher, so that one ends with the other.
            self.wanted = 0
            self.release()

    def __repr__(self):
        state = "closed" if self.fd == PORT_NO_SOCKET else "closing" if self.closing else "open"
        fd = "" if self.fd == PORT_NO_SOCKET else f" fd={self.fd}"
        reading = "reading" if self.is_reading() else "not reading"
        return f"<fastlisten.Transport {state}{fd} {reading} unsent={self.size}>"

    # --- its turns ---------------------------------------------------------------------------------

    cdef int turn(self) except -1:
        """What was due."""
        cdef due_t due = self.due
        cdef object context
        self.due = NOTHING
        if self.fd == PORT_NO_SOCKET:
            return 0
        if due == BEGIN:
            self.context = PyContext_Copy(self.hub.context)
        context = self.context
        self.enter_call(context)
        try:
            if due == BEGIN:
                self.begin()
            elif due == MEET:
                self.meet()
            else:
                self.read()
        finally:
            self.leave_call(context)
        return 0

    cdef int again(self, due_t due) except -1:
        """Have this done later: never inside the call that asks for it, which may be the protocol's."""
        if self.due == NOTHING:
            self.hub.turn_soon(self)
            self.due = due
        return 0

    cdef int come_to_end(self) except -1:
        cdef object context = self.context
        if self.fd == PORT_NO_SOCKET:
            return 0
        if context is None:  # closed before its first turn
            return self.release()
        PyContext_Enter(context)
        try:
            if self.due == MEET:  # somebody else has closed it before that turn
                self.due = NOTHING
                self.meet()
        finally:
            try:
                self.lose()
            finally:
                PyContext_Exit(context)
        return 0

    cdef int ready(self, short events) except -1:
        cdef object context = self.context
        self.enter_call(context)
        try:
            # A hang-up or an error is told to whoever waits, as asyncio's selectors do.
            if events & ~POLLOUT and self.wanted & POLLIN:
                self.read()
            if events & ~POLLIN and self.wanted & POLLOUT:
                self.flush()
        finally:
            self.leave_call(context)
        return 0

    cdef int begin(self) except -1:
        """Make the protocol; go on at once, unless something was scheduled that comes first."""
        cdef Py_ssize_t scheduled = self.hub.scheduled()
        if self.closing:
            return 0  # its end is due
        try:
            self.attach(self.hub.factory())
        except (SystemExit, KeyboardInterrupt):
            self.release()
            raise
        except BaseException as error:
            port_add(&self.ledger.handler_errors, 1)
            loop = self.hub.loop
            self.release()
            loop.call_exception_handler({
                "message": "Error on transport creation for incoming connection",
                "exception": error,
                "transport": self,
            })
            return 0
        if self.hub.scheduled() != scheduled:
            return self.again(MEET)
        return self.meet()

    cdef int meet(self) except -1:
        """Tell the protocol; and read what the client has sent already, unless something was scheduled that
        comes first: a stream's task may start TLS or set a protocol in its first step."""
        cdef Py_ssize_t scheduled = self.hub.scheduled()
        try:
            self.protocol.connection_made(self)
        except (SystemExit, KeyboardInterrupt):
            self.force_close(None)
            raise
        except BaseException as error:
            self.report(error, "Fatal error: protocol.connection_made() call failed.")
            self.force_close(error)
            return 0
        self.send_held(0)  # a greeting comes before the question
        if self.hub.scheduled() != scheduled:
            return self.again(READ)
        return self.read()

    cdef int read(self) except -1:
        """One recv(), and what it brings to the protocol; be watched if it would block."""
        cdef Py_ssize_t got
        cdef int code = 0
        cdef Py_buffer view
        cdef bint buffered = self.buffered  # get_buffer() may set another protocol
        if self.closing or self.paused or self.ended:
            return 0
        if not buffered:
            got = port_recv(self.fd, self.hub.scratch, CHUNK, 0)
            if got < 0:
                code = port_error()
        else:
            try:
                buffer = self.protocol.get_buffer(-1)
                if not len(buffer):
                    raise RuntimeError("get_buffer() returned an empty buffer")
            except (SystemExit, KeyboardInterrupt):
                self.read_on()
                raise
            except BaseException as error:
                return self.fatal(error, "Fatal error: protocol.get_buffer() call failed.")
            try:
                PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
            except Exception as error:
                return self.fatal(error, "Fatal read error on socket transport")
            got = port_recv(self.fd, view.buf, view.len, 0)
            if got < 0:
                code = port_error()
            PyBuffer_Release(&view)
            buffer = None
        if got > 0:
            try:
                self.hand_over(got, buffered)
            finally:
                self.read_on()
            return 0
        if got == 0:
            return self.end()
        if port_would_block(code):
            return self.watch(self.wanted | POLLIN)
        if code == PORT_EINTR:
            return self.again(READ)
        return self.fail(code, "Fatal read error on socket transport")

    cdef int read_on(self) except -1:
        """Read once more, after SystemExit, too: the loop may run again."""
        if not self.wanted & POLLIN and not self.closing:
            return self.again(READ)
        return 0

    cdef int hand_over(self, Py_ssize_t got, bint buffered) except -1:
        """Give the protocol what recv() brought, into its own buffer or the hub's scratch."""
        try:
            if buffered:
                self.protocol.buffer_updated(got)
            else:
                self.protocol.data_received(PyBytes_FromStringAndSize(self.hub.scratch, got))
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            name = "buffer_updated" if buffered else "data_received"
            self.fatal(error, f"Fatal error: protocol.{name}() call failed.")
        return 0

    cdef int end(self) except -1:
        """The client has sent all it will."""
        try:
            keep = self.protocol.eof_received()
        except (SystemExit, KeyboardInterrupt):
            self.read_on()  # and be told again, as with asyncio's own
            raise
        except BaseException as error:
            return self.fatal(error, "Fatal error: protocol.eof_received() call failed.")
        self.ended = True
        if keep:
            return self.watch(self.wanted & ~POLLIN)
        return self.shut()

    cdef int watch(self, short events) except -1:
        """want(), and a failure of it ends the connection."""
        try:
            self.want(events)
        except OSError as error:
            self.fatal(error, "Fatal error on transport")
        return 0

    # --- the end -----------------------------------------------------------------------------------

    cdef int report(self, error, str message) except -1:
        port_add(&self.ledger.handler_errors, 1)
        self.hub.loop.call_exception_handler({
            "message": message,
            "exception": error,
            "transport": self,
            "protocol": self.protocol,
        })
        return 0

    cdef int fail(self, int code, str message) except -1:
        try:
            raise_error(code)
        except OSError as error:
            self.fatal(error, message)
        return 0

    cdef int fatal(self, error, str message) except -1:
        """An error ends the connection; what a client can cause (OSError) is not reported, as in asyncio."""
        if self.fd == PORT_NO_SOCKET:
            return 0
        if not isinstance(error, OSError):
            self.report(error, message)
        elif self.hub.loop.get_debug():
            _asyncio_log.debug("%r: %s", self, message, exc_info=error)
        return self.force_close(error)

    cdef int force_close(self, error) except -1:
        self.send_held(0)
        if self.lost or self.fd == PORT_NO_SOCKET:
            return 0
        self.drop_buffer()
        self.closing = True
        self.want(0)
        self.lost = 1
        self.error = error
        return self.hub.end_soon(self)

    cdef void drop_buffer(self) noexcept:
        self.buffer = None
        self.size = self.sent = 0

    cdef int lose(self) except -1:
        """Tell the protocol that the connection is gone; then it is."""
        try:
            if self.connected:
                self.protocol.connection_lost(self.error)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self.report(error, "Fatal error: protocol.connection_lost() call failed.")
        finally:
            self.release()
        return 0

    cdef int release(self) except -1:
        """Close the descriptor and forget everything."""
        cdef ledger_t *ledger = self.ledger
        cdef port_socket fd = self.fd
        cdef Hub hub = self.hub
        if fd == PORT_NO_SOCKET:
            return 0
        try:
            self.want(0)
        finally:
            self.closing = True
            self.lost = max(self.lost, 1)
            self.drop_buffer()
            self.fd = PORT_NO_SOCKET
            if self.emptied is not None and not self.emptied.done():
                self.emptied.set_exception(self.error or ConnectionError("Connection is closed by peer"))
            self.protocol = self.context = self.error = None
            hub.transports.pop(fd, None)
            if self.sock is not None:
                self.sock.close()
            else:
                port_close(fd)  # what a failed close could tell, nobody is left to do anything about
            self.ledger = NULL
            port_add(&ledger.handled, 1)
            port_add(&ledger.active, -1)
            if port_get(&ledger.wanted):
                ledger_ring(ledger)
            ledger_release(ledger)
            hub.leave()
        return 0

    def close(self):
        """Close when all that was written is sent; connection_lost() follows.  Nothing more is read."""
        self.shut()

    cdef int shut(self) except -1:
        if self.closing:
            return 0
        if self.held is not None:
            # With the end of the stream in the same segment.  Closing alone does not send what is held back
            # when the client has said more than was read; shutdown() does.
            self.send_held(PORT_MORE)
            if self.lost:
                return 0
            if not self.size:
                port_shutdown(self.fd, PORT_SHUT_WRITE)  # fails when the client is gone; it is closed anyway
        self.closing = True
        self.want(self.wanted & ~POLLIN)
        if self.size:
            return 0
        self.lost = 1
        return self.hub.end_soon(self)

    def abort(self):
        """Close at once; what is not sent yet is lost."""
        self.force_close(None)

    def _force_close(self, error):  # asyncio's TLS protocol calls it
        self.force_close(error)

    def is_closing(self):
        """Whether it is closed or will be."""
        return self.closing

    # --- reading -----------------------------------------------------------------------------------

    def is_reading(self):
        """Whether what the client sends is being read."""
        return not self.closing and not self.paused

    def pause_reading(self):
        """Read nothing until resume_reading(); the client is slowed down by TCP."""
        if self.closing or self.paused:
            return
        self.paused = True
        self.want(self.wanted & ~POLLIN)

    def resume_reading(self):
        """Read again after pause_reading()."""
        if self.closing or not self.paused:
            return
        self.paused = False
        self.again(READ)

    # --- writing -----------------------------------------------------------------------------------

    def write(self, data):
        """Send bytes; what the kernel does not take now is kept and sent when it does."""
        cdef Py_buffer view
        if not isinstance(data, (bytes, bytearray, memoryview)):
            return _asyncio_write(self, data)  # raises TypeError
        self.check_writable("write")
        if type(data) is bytes:
            self.transmit(data, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
            return
        try:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        except BufferError as error:  # it is not contiguous
            self.fatal(error, "Fatal write error on socket transport")
            return
        try:
            self.transmit(None, <const char *>view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    def writelines(self, list_of_data):
        """Send the pieces as one."""
        self.check_writable(_writelines_name)
        if _writelines_name == "writelines":  # since 3.12 asyncio looks at each piece by itself
            if not list_of_data:
                return
            list_of_data = [memoryview(piece) for piece in list_of_data]
            for piece in list_of_data:
                if not piece.c_contiguous:
                    return self.write(piece)  # which ends it
        data = b"".join(list_of_data)
        self.transmit(data, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))

    cdef int check_writable(self, name) except -1:
        if self.eof_sent:
            raise RuntimeError(f"Cannot call {name}() after write_eof()")
        if self.emptied is not None:
            raise RuntimeError(f"unable to {name}; sendfile is in progress")
        return 0

    cdef int transmit(self, data, const char *start, Py_ssize_t length) except -1:
        """Send, and keep the rest.  data: the bytes object that `start` points into, or None."""
        if length == 0:
            return 0
        if self.held_size + length > SMALL:
            self.send_held(PORT_MORE)
        if self.holding and length <= SMALL and not self.size and not self.lost and self.sock is None:
            return self.hold(data, start, length)
        return self.send(data, start, length, 0)

    # What a protocol writes while we call it leaves when it returns: all of it in one send(), and with
    # the end of the stream in the same segment if it closes, too; that is one way through the stack less.
    # Who has asked for the socket may use it between two writes, so there nothing is held.

    cdef int hold(self, data, const char *start, Py_ssize_t length) except -1:
        """Have it sent at the end of our call."""
        if self.held is None:
            self.held = []
        self.held.append(PyBytes_FromStringAndSize(start, length) if data is None else data)
        self.held_size += length
        return 0

    cdef int send_held(self, int flags) except -1:
        """Send what is held, if anything.  flags: PORT_MORE when more, or the end, follows at once."""
        cdef bytes data
        if self.held is None:
            return 0
        data = b"".join(self.held)  # one alone is not copied
        self.held = None
        self.held_size = 0
        return self.send(data, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), flags)

    cdef int enter_call(self, context) except -1:
        PyContext_Enter(context)
        self.holding = True
        return 0

    cdef int leave_call(self, context) except -1:
        try:
            return self.let_go()
        finally:
            PyContext_Exit(context)

    cdef int let_go(self) except -1:
        """Hold nothing any longer."""
        self.holding = False
        return self.send_held(0)

    cdef int send(self, data, const char *start, Py_ssize_t length, int flags) except -1:
        """Send now, and keep the rest."""
        cdef Py_ssize_t sent = 0
        cdef int code
        if self.lost:
            if self.lost >= _warn_from:
                _asyncio_log.warning("socket.send() raised exception.")
            self.lost += 1
            return 0
        if self.size == 0:
            sent = port_send(self.fd, start, length, flags)
            if sent == length:
                return 0
            if sent < 0:
                code = port_error()
                if not port_would_block(code) and code != PORT_EINTR:
                    return self.fail(code, "Fatal write error on socket transport")
                sent = 0
        return self.keep(data, start, length, sent)

    cdef int keep(self, data, const char *start, Py_ssize_t length, Py_ssize_t sent) except -1:
        """Have the rest sent when the kernel takes it.  What the caller may change is copied."""
        if self.buffer is None:
            self.buffer = deque()
        if self.size == 0:
            self.watch(self.wanted | POLLOUT)
            if self.lost:
                return 0
        if data is None:
            data = PyBytes_FromStringAndSize(start + sent, length - sent)
            length -= sent
            sent = 0
        if self.size == 0:
            self.sent = sent
            self.size = length - sent
        else:
            self.size += length
        self.buffer.append(data)
        self.maybe_pause()
        return 0

    cdef bytes front(self):
        """The first piece that is kept, joined with what follows while that is small."""
        cdef Py_ssize_t joined
        cdef bytes first = self.buffer[0]
        cdef bytes piece
        if len(self.buffer) == 1 or PyBytes_GET_SIZE(first) - self.sent >= SMALL:
            return first
        pieces = [first[self.sent:]]
        joined = PyBytes_GET_SIZE(first) - self.sent
        self.buffer.popleft()
        while self.buffer and joined < SMALL:
            piece = self.buffer.popleft()
            joined += PyBytes_GET_SIZE(piece)
            pieces.append(piece)
        first = b"".join(pieces)
        self.buffer.appendleft(first)
        self.sent = 0
        return first

    cdef int flush(self) except -1:
        """The kernel takes more: send what is kept, as much as one wake may."""
        cdef bytes first
        cdef Py_ssize_t gone
        cdef Py_ssize_t room = CHUNK
        cdef int code
        while self.size and room > 0:
            first = self.front()
            gone = port_send(self.fd, PyBytes_AS_STRING(first) + self.sent,
                             PyBytes_GET_SIZE(first) - self.sent, 0)
            if gone < 0:
                code = port_error()
                if port_would_block(code) or code == PORT_EINTR:
                    break
                return self.fail(code, "Fatal write error on socket transport")
            self.sent += gone
            self.size -= gone
            room -= gone
            if self.sent == PyBytes_GET_SIZE(first):
                self.buffer.popleft()
                self.sent = 0
        self.maybe_resume()
        self.send_held(0)  # a last word, before the end that may follow now
        if self.size == 0 and self.fd != PORT_NO_SOCKET and not self.lost:
            self.want(self.wanted & ~POLLOUT)
            if self.emptied is not None and not self.emptied.done():
                self.emptied.set_result(None)
            if self.closing:
                self.lost = 1
                return self.lose()
            if self.eof_sent and port_shutdown(self.fd, PORT_SHUT_WRITE) != 0:
                return self.fail(port_error(), "Fatal write error on socket transport")
        return 0

    def can_write_eof(self):
        """True."""
        return True

    def write_eof(self):
        """End the sending side when all that was written is sent; reading goes on."""
        if self.closing or self.eof_sent:
            return
        self.send_held(PORT_MORE)
        if self.closing:
            return
        self.eof_sent = True
        if not self.size and port_shutdown(self.fd, PORT_SHUT_WRITE) != 0:
            raise_error(port_error())

    # --- flow control ------------------------------------------------------------------------------

    def get_write_buffer_size(self):
        """How many bytes are kept to be sent."""
        self.send_held(0)  # what the kernel takes is not kept
        return self.size

    def get_write_buffer_limits(self):
        """The marks below and above which the protocol is told to go on and to pause: (low, high)."""
        return self.low, self.high

    def set_write_buffer_limits(self, high=None, low=None):
        """Set the marks, in bytes, between which the protocol may write or has to pause."""
        if high is None:
            high = 64 * 1024 if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self.low, self.high = min(low, sys.maxsize), min(high, sys.maxsize)
        self.maybe_pause()

    cdef int maybe_pause(self) except -1:
        if self.size <= self.high or self.writing_paused:
            return 0
        self.writing_paused = True
        return self.tell_protocol("pause_writing")

    cdef int maybe_resume(self) except -1:
        if not self.writing_paused or self.size > self.low:
            return 0
        self.writing_paused = False
        return self.tell_protocol("resume_writing")

    cdef int tell_protocol(self, str name) except -1:
        try:
            getattr(self.protocol, name)()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self.report(error, f"protocol.{name}() failed")
        return 0

    # --- what asyncio's sendfile() asks ------------------------------------------------------------

    @property
    def _protocol_paused(self):
        return bool(self.writing_paused)

    @property
    def _sendfile_compatible(self):
        # A selector loop takes the transport out of its table while the kernel sends the file, and puts it
        # back.  There it stands under no descriptor, which the loop would refuse to watch for us then.
        transports = getattr(self.hub.loop, "_transports", None)
        if transports is None:
            return _SendfileMode.FALLBACK
        transports[self._sock_fd] = self
        return _SendfileMode.TRY_NATIVE

    @property
    def _sock_fd(self):
        return -id(self)

    @property
    def _sock(self):
        return self.own_socket()

    def _make_empty_waiter(self):
        if self.emptied is not None:
            raise RuntimeError("Empty waiter is already set")
        self.send_held(0)
        self.emptied = self.hub.loop.create_future()
        if not self.size:
            self.emptied.set_result(None)
        return self.emptied

    def _reset_empty_waiter(self):
        self.emptied = None

    # --- the protocol and the socket ---------------------------------------------------------------

    def set_protocol(self, protocol):
        """Have another protocol called from now on."""
        self.attach(protocol)

    cdef int attach(self, protocol) except -1:
        self.protocol = protocol
        kind = protocol.__class__  # type() would not see through a proxy
        if kind is not self.hub.kind:
            self.hub.buffered = isinstance(protocol, _BufferedProtocol)
            self.hub.kind = kind
        self.buffered = self.hub.buffered
        self.connected = True
        return 0

    def get_protocol(self):
        """The protocol; None after connection_lost()."""
        return self.protocol

    def get_extra_info(self, name, default=None):
        """'peername', 'sockname' and 'socket', as asyncio's own; `default` for anything else."""
        if name == "peername":
            if self.address_length:
                self.peer = address_object(<const port_address *>self.address, self.address_length)
                self.address_length = 0
            return self.peer
        if name == "socket":
            sock = self.own_socket()
            return default if sock is None else trsock.TransportSocket(sock)
        if name == "sockname":
            if self.sockname is None and self.fd != PORT_NO_SOCKET:
                try:
                    self.sockname = self.own_socket().getsockname()
                except OSError:
                    pass  # asyncio says None, too
            return self.sockname
        return default

    cdef object own_socket(self):
        """The socket.socket of the connection, made when somebody asks; from then on it owns the descriptor.
        None when nobody asked before the end."""
        self.send_held(0)  # may call the protocol, which may ask, too
        if self.sock is None:
            if self.fd == PORT_NO_SOCKET:
                return None
            self.sock = _StandardSocket(
                self.ledger.family, self.ledger.type, self.ledger.protocol, fileno=self.fd)
            self.sock.setblocking(False)
        return self.sock
