"""Transports of asyncio servers, and what the connections of one server share.

A transport reads as soon as it is made.  It is watched (_hub.pyx) only when the kernel says it would block.
"""

import asyncio
import logging
import os
import socket
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
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from fastlisten._core.connection cimport (
    ORIGIN,
    SHORT_ADDRESS,
    address_object,
    free_origin,
    header_of,
    origin_of,
    peer_of,
)
from fastlisten._core.port cimport *
from fastlisten._core.standard import StandardSocket
from fastlisten._core.state cimport (
    State,
    client_handed,
    client_in,
    client_out,
    handler_failed,
    state_hold,
    state_t,
)
from fastlisten.aio._hub cimport Hub, Watched

# recv() copies slowly to shortly behind the place of a page that it copies from, and that is often the page's
# begin, as malloc()'s is for a large block: the processor's "rep movsb", glibc's bug 30994.
cdef enum:
    PAGE = 4096

# Between these many kept bytes the protocol may write or has to pause; asyncio's own marks.
cdef enum:
    LOW = 16 * 1024
    HIGH = 64 * 1024

# The Connections of every server there is.
cdef object _all_connections = weakref.WeakSet()

# By a name of C's: at the end of the interpreter a module's own names go before its objects.
cdef object _warn = warnings.warn
cdef object _asyncio_log = logging.getLogger("asyncio")
cdef object _StandardSocket = StandardSocket
# In a socket's type: that the descriptor is non-blocking already.  Else the object has to be told, by a call.
cdef int _nonblocking = getattr(socket, "SOCK_NONBLOCK", 0)
cdef object _BaseEventLoop = asyncio.BaseEventLoop
cdef object _running_loop = asyncio._get_running_loop
cdef object _BufferedProtocol = asyncio.BufferedProtocol
cdef object _Protocol = asyncio.Protocol
cdef object _StreamReader = asyncio.StreamReader
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
    cdef Connections connections
    loop = asyncio._get_running_loop()
    for connections in list(_all_connections):
        if connections.hub.loop is loop:
            connections.release_held()


def _after_fork_in_child():
    """What is held still, because another thread than the loop's has forked, is the parent's to send."""
    cdef Connections connections
    for connections in list(_all_connections):
        connections.forget_held()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)


# --- What a transport shows ---------------------------------------------------------------------------------

class TransportSocket(trsock.TransportSocket):
    """The socket of a transport, as get_extra_info() shows it.  Who gets the descriptor by it may write there
    himself, so what the transport holds is sent first, and from then on at once."""

    __slots__ = ("_transport",)

    def __init__(self, sock, transport):
        super().__init__(sock)
        self._transport = PyWeakref_NewRef(transport, None)

    def _share(self):
        cdef Transport transport = self._transport()
        if transport is not None:
            transport.share()

    def fileno(self):
        self._share()
        return super().fileno()

    def dup(self):
        self._share()
        return super().dup()

    def shutdown(self, how):
        self._share()
        super().shutdown(how)


# --- What the connections of one server share --------------------------------------------------------------

cdef class Owner:
    """Who has accepted the connections."""

    cdef int connection_gone(self) except -1:
        """One is closed: its descriptor is free, and there may be room for another."""
        raise NotImplementedError


@cython.final
cdef class Connections:
    """What the connections of one server share: the hub, the protocols' factory, the memory to receive into.

    hub: the Hub that watches them.  factory: makes a protocol for each; None: adopt() is given them.
    """

    def __cinit__(self, Hub hub not None, factory):
        self.memory = <char *>malloc(CHUNK + PAGE)
        if self.memory is NULL:
            raise MemoryError
        self.scratch = self.memory + ((PAGE // 2 - <size_t>self.memory) & (PAGE - 1))
        self.hub = hub
        self.factory = factory
        self.transports = {}
        if _context_of_creation:
            self.context = PyContext_CopyCurrent()
        _all_connections.add(self)

    def __dealloc__(self):
        free(self.memory)

    cdef int begin(self) except -1:
        """The server starts; the connections' context is the one it starts in."""
        if self.context is None:
            self.context = PyContext_CopyCurrent()
        return 0

    cdef int leave(self) except -1:
        """A connection is closed; tell who has accepted it."""
        cdef Owner owner = self.owner  # held: it may let go of us, and we of it
        self.active -= 1
        if owner is not None:
            owner.connection_gone()
        return 0

    cdef int release_held(self) except -1:
        """No Transport holds back what is written any longer."""
        for transport in self.clients():
            (<Transport>transport).release_held()
        return 0

    cdef int forget_held(self) except -1:
        """No Transport sends what was written before."""
        for transport in self.clients():
            (<Transport>transport).held = None
            (<Transport>transport).held_size = 0
        return 0

    def clients(self):
        """The open Transports."""
        return [transport for weak in list(self.transports.values())
                if (transport := weak()) is not None]


# --- Its protocol -------------------------------------------------------------------------------------------

cdef class Receiver:
    """A protocol that takes what is received by a call of C's: a layer between transport and application.

    For anything else it is called as every protocol is.
    """

    cdef int received(self, char *data, Py_ssize_t length) except -1:
        """The client has sent this.  The memory is the caller's, and the receiver may write to it."""
        raise NotImplementedError


cdef takes_t how_it_takes(loop, protocol) except *:
    """How a protocol takes what is received."""
    if isinstance(protocol, Receiver):
        return IN_OURS
    if isinstance(protocol, _BufferedProtocol) or (
            # what uvloop asks for
            not isinstance(loop, _BaseEventLoop) and hasattr(protocol, "get_buffer")
            and not isinstance(protocol, _Protocol)):
        return IN_ITS_BUFFER
    return AS_BYTES


cdef bytes taken_back(protocol):
    """What a stream has and nobody has read yet, taken from it; None when there is nothing.

    What the client sent right after its last line, a ClientHello with it, is TLS's.  Before 3.13.12 and
    3.14.3 asyncio's streams forgot it: cpython's gh-142352.
    """
    reader = getattr(protocol, "_stream_reader", None)
    if not isinstance(reader, _StreamReader) or not reader._buffer:
        return None
    taken = bytes(reader._buffer)
    reader._buffer.clear()
    reader._paused = False  # start_tls() reads again
    return taken


cdef tuple write_limits(high, low, Py_ssize_t default):
    """The marks of a write buffer, (low, high), from what set_write_buffer_limits() was given."""
    if high is None:
        high = default if low is None else 4 * low
    if low is None:
        low = high // 4
    if not high >= low >= 0:
        raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
    return min(low, sys.maxsize), min(high, sys.maxsize)


# --- A connection -------------------------------------------------------------------------------------------

@cython.final
cdef class Proxied:
    """Who a client is: the peer, or whom a proxy's header names; header: None without one."""

    cdef object peer, header

    def __cinit__(self, header, peer):
        self.header, self.peer = header, peer


cdef Transport new_transport(
        Connections connections, state_t *state, port_socket fd, const port_address *address, int length):
    """A Transport that owns `fd` and a hold on the state; on failure the descriptor stays the caller's."""
    cdef Transport transport = Transport.__new__(Transport)
    transport.connections = connections
    transport.hub = connections.hub
    transport.polled = connections.hub.poller != PORT_NO_SOCKET
    transport.due = BEGIN
    if length > SHORT_ADDRESS:
        if length == ORIGIN:
            header = header_of(origin_of(address))
            transport.peer = Proxied(header, peer_of(origin_of(address), header))
            transport.origin = origin_of(address)
        else:
            transport.peer = address_object(address, length)
    else:
        memcpy(transport.address.bytes, address, length)
        transport.address.length = length
    connections.transports[fd] = PyWeakref_NewRef(transport, None)
    connections.active += 1
    state_hold(state)
    transport.state = state
    transport.fd = fd
    return transport


def hubs_of(loop):
    """The hubs of the event loop's servers."""
    cdef Connections connections
    return [connections.hub for connections in list(_all_connections) if connections.hub.loop is loop]


def adopt(Connections connections not None, State state not None, sock, protocol):
    """A Transport of a client that somebody else has accepted; its first turn comes on the loop's next.

    sock: the non-blocking socket.socket, the Transport's from now on.  state: where it is counted.
    protocol: who is told of it.
    """
    cdef port_address nobody
    cdef Transport transport
    memset(&nobody, 0, sizeof(nobody))
    try:
        peer = sock.getpeername()
    except OSError:
        peer = None  # asyncio says None, too
    client_in(state.at, PORT_NO_SOCKET, sock.fileno())
    client_handed(state.at, sock.fileno())
    transport = new_transport(connections, state.at, sock.fileno(), &nobody, 0)
    transport.sock, transport.peer = sock, peer
    transport.context = PyContext_CopyCurrent()
    transport.attach(protocol)
    transport.show()
    transport.due = GREET
    connections.hub.loop.call_soon(connections.hub._turn, [transport])
    return transport


@cython.final
cdef class WriteBuffer:
    """What was written and the kernel has not taken yet."""

    def __cinit__(self):
        self.pieces = deque()
        self.low = LOW
        self.high = HIGH

    cdef int add(self, bytes data, Py_ssize_t sent) except -1:
        """Keep it.  sent: how much of it is gone; not 0 only when nothing else is kept."""
        self.pieces.append(data)
        if self.size == 0:
            self.sent = sent
        self.size += PyBytes_GET_SIZE(data) - sent
        return 0

    cdef bytes front(self):
        """The first piece, joined with what follows while that is small."""
        cdef Py_ssize_t joined
        cdef bytes first = self.pieces[0]
        cdef bytes piece
        if len(self.pieces) == 1 or PyBytes_GET_SIZE(first) - self.sent >= SMALL:
            return first
        parts = [first[self.sent:]]
        joined = PyBytes_GET_SIZE(first) - self.sent
        self.pieces.popleft()
        while self.pieces and joined < SMALL:
            piece = self.pieces.popleft()
            joined += PyBytes_GET_SIZE(piece)
            parts.append(piece)
        first = b"".join(parts)
        self.pieces.appendleft(first)
        self.sent = 0
        return first

    cdef int send(self, port_socket fd) except -1:
        """Send as much as one wake may; returns the code of the send() that failed, or 0."""
        cdef bytes first
        cdef Py_ssize_t gone
        cdef Py_ssize_t room = CHUNK
        while self.size and room > 0:
            first = self.front()
            gone = port_send(fd, PyBytes_AS_STRING(first) + self.sent, PyBytes_GET_SIZE(first) - self.sent, 0)
            if gone < 0:
                return port_error()
            self.sent += gone
            self.size -= gone
            room -= gone
            if self.sent == PyBytes_GET_SIZE(first):
                self.pieces.popleft()
                self.sent = 0
        return 0

    cdef int clear(self) except -1:
        """Keep nothing any more; the marks stay."""
        self.pieces.clear()
        self.size = self.sent = 0
        return 0


@cython.final
cdef class Transport(Watched):
    """An asyncio.Transport of one accepted client.

    Made by the servers of fastlisten.aio.  It owns its descriptor and closes it after connection_lost().
    """

    max_size = CHUNK

    def __init__(self, *args):
        if self.hub is None:
            raise TypeError("a Transport comes from a server")

    @property
    def __class__(self):
        return SocketTransport

    def __del__(self):
        if self.fd != PORT_NO_SOCKET:
            self.send_last()
            if self.protocol is not None:  # else it was never begun
                _warn(f"unclosed transport {self!r}", ResourceWarning, stacklevel=1, source=self)
            # A forked child shares the poller with its parent, who goes on: fork(2), epoll(7).  Who is
            # watched is held by its watcher, so that one ends with the other.
            self.watched_for = 0
            self.release()

    def __repr__(self):
        state = "closed" if self.fd == PORT_NO_SOCKET else "closing" if self.closing else "open"
        fd = "" if self.fd == PORT_NO_SOCKET else f" fd={self.fd}"
        reading = "reading" if self.is_reading() else "not reading"
        return f"<fastlisten.Transport {state}{fd} {reading} unsent={self.unsent()}>"

    # --- its turns ---------------------------------------------------------------------------------

    cdef int turn(self) except -1:
        """What was due."""
        cdef due_t due = self.due
        cdef object context
        self.due = NOTHING
        if self.fd == PORT_NO_SOCKET:
            return 0
        if due == BEGIN:
            self.context = PyContext_Copy(self.connections.context)
        context = self.context
        self.enter_call(context)
        try:
            if due == BEGIN:
                self.begin()
            elif due == MEET:
                self.meet()
            elif due == GREET:
                if self.tell_made() and self.is_reading():
                    self.watch_or_end(POLLIN)
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

    cdef int end(self) except -1:
        """connection_lost(), and the end."""
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
            if events & ~POLLOUT and self.watched_for & POLLIN:
                self.read()
            if events & ~POLLIN and self.watched_for & POLLOUT:
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
            self.attach(self.connections.factory())
        except (SystemExit, KeyboardInterrupt):
            self.release()
            raise
        except BaseException as error:
            handler_failed(self.state)
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
        if not self.tell_made():
            return 0
        if self.hub.scheduled() != scheduled:
            return self.again(READ)
        return self.read()

    cdef bint tell_made(self) except -1:
        """connection_made(); returns False when that has ended the connection."""
        try:
            self.protocol.connection_made(self)
        except (SystemExit, KeyboardInterrupt):
            self.force_close(None)
            raise
        except BaseException as error:
            self.report(error, "Fatal error: protocol.connection_made() call failed.")
            self.force_close(error)
            return False
        self.send_held(0)  # a greeting comes before the question
        return True

    cdef int read(self) except -1:
        """One recv(), and what it brings to the protocol; be watched if it would block."""
        cdef Py_ssize_t got
        cdef int code = 0
        cdef Py_buffer view
        cdef takes_t takes = self.takes  # get_buffer() may set another protocol
        if self.closing or self.paused or self.ended:
            return 0
        if takes != IN_ITS_BUFFER:
            got = self.receive(self.connections.scratch, CHUNK, &code)
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
            got = self.receive(<char *>view.buf, view.len, &code)
            PyBuffer_Release(&view)
            buffer = None
        if got > 0:
            try:
                self.hand_over(got, takes)
            finally:
                self.read_on()
            return 0
        if got == 0:
            return self.received_eof()
        if port_would_block(code):
            return self.watch_or_end(self.watched_for | POLLIN)
        if code == PORT_EINTR:
            return self.again(READ)
        return self.fail(code, "Fatal read error on socket transport")

    cdef Py_ssize_t receive(self, char *buffer, Py_ssize_t length, int *code) noexcept:
        """What was given back, else one recv(); < 0 when that failed, and why is in `code`."""
        cdef Py_ssize_t got
        if self.unread is not None:
            got = min(length, PyBytes_GET_SIZE(self.unread))
            memcpy(buffer, PyBytes_AS_STRING(self.unread), got)
            self.unread = self.unread[got:] if got < PyBytes_GET_SIZE(self.unread) else None
            return got
        got = port_recv(self.fd, buffer, length, 0)
        if got < 0:
            code[0] = port_error()
        return got

    cdef int read_on(self) except -1:
        """Read once more, after SystemExit, too: the loop may run again."""
        if (not self.watched_for & POLLIN or self.unread is not None) and not self.closing:
            return self.again(READ)
        return 0

    cdef int hand_over(self, Py_ssize_t got, takes_t takes) except -1:
        """Give the protocol what recv() brought, into its own buffer or the scratch that all share."""
        try:
            if takes == AS_BYTES:
                self.protocol.data_received(PyBytes_FromStringAndSize(self.connections.scratch, got))
            elif takes == IN_ITS_BUFFER:
                self.protocol.buffer_updated(got)
            else:
                (<Receiver>self.protocol).received(self.connections.scratch, got)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            name = "data_received" if takes == AS_BYTES else "buffer_updated"
            self.fatal(error, f"Fatal error: protocol.{name}() call failed.")
        return 0

    cdef int received_eof(self) except -1:
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
            return self.watch_or_end(self.watched_for & ~POLLIN)
        return self.shut()

    cdef int watch_or_end(self, short events) except -1:
        """watch(), and a failure of it ends the connection: it would be forgotten.  No client can cause that,
        so it is reported."""
        try:
            self.watch(events)
        except OSError as error:
            self.report(error, "Fatal error: the connection cannot be watched")
            self.force_close(error)
        return 0

    cdef int unwatch(self) except -1:
        """Be watched no more, since the descriptor is about to be closed, which undoes what fails here."""
        try:
            self.watch(0)
        except OSError:
            self.hub.forget(self)
        return 0

    # --- the end -----------------------------------------------------------------------------------

    cdef int report(self, error, str message) except -1:
        handler_failed(self.state)
        self.hub.loop.call_exception_handler({
            "message": message,
            "exception": error,
            "transport": self,
            "protocol": self.protocol,
        })
        return 0

    cdef int fail(self, int code, str message) except -1:
        try:
            port_raise(code)
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
        if self.buffer is not None:
            self.buffer.clear()
        self.closing = True
        self.unwatch()
        self.lost = 1
        self.error = error
        return self.hub.end_soon(self)

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
        cdef port_socket fd = self.fd
        cdef Connections connections = self.connections
        if fd == PORT_NO_SOCKET:
            return 0
        try:
            self.unwatch()
        finally:
            self.closing = True
            self.lost = max(self.lost, 1)
            if self.buffer is not None:
                self.buffer.clear()
            self.fd = PORT_NO_SOCKET
            if self.emptied is not None and not self.emptied.done():
                self.emptied.set_exception(self.error or ConnectionError("Connection is closed by peer"))
            self.protocol = self.context = self.error = None
            connections.transports.pop(fd, None)
            self.close_socket(fd)
            connections.leave()
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
            if not self.unsent():
                port_shutdown(self.fd, PORT_SHUT_WRITE)  # fails when the client is gone; it is closed anyway
        self.closing = True
        if self.unsent():
            return self.watch_or_end(self.watched_for & ~POLLIN)
        self.unwatch()
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
        self.watch_or_end(self.watched_for & ~POLLIN)

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
        if self.held_size + length > self.room():
            self.send_held(PORT_MORE)
        if not self.may_hold(length):
            return self.send(data, start, length, 0)
        if self.held is None:
            self.held = []
        self.held.append(PyBytes_FromStringAndSize(start, length) if data is None else data)
        self.held_size += length
        return 0

    # What a protocol writes while we call it leaves when it returns, and what a task writes on the loop's
    # next turn: all of it in one send(), and with the end of the stream in the same segment if it closes,
    # too; each is one way through the stack less.

    cdef bint may_hold(self, Py_ssize_t length) except -1:
        """Whether it may wait for what is written after it.  If so, and nobody has seen to it yet, it is sent
        on the loop's next turn."""
        if length > self.room() or self.shared or self.lost or self.unsent():
            return False
        if self.held is None and not self.holding:
            if self.single and self.hub.scheduled() == 0:
                return False  # it most likely is one again, and a turn for it alone costs more than it saves
            if _running_loop() is not self.hub.loop:
                return False  # it has no next turn soon, or this is not its thread, which may be asleep
            self.hub.send_soon(self)
        return True

    cdef Py_ssize_t room(self) noexcept:
        """How much may be held: not what the protocol would be told to pause for."""
        return SMALL if self.buffer is None else min(SMALL, self.buffer.high)

    cdef int send_written(self) except -1:
        """The turn of the loop in which it was written is over.  The protocol is not called: no more is held
        than it may write without a pause."""
        if self.held is not None:
            self.single = len(self.held) == 1
        return self.send_held(0)

    cdef int send_last(self) except -1:
        """Nobody has this transport any more: send what is held, if the kernel takes it."""
        cdef bytes data
        if self.held is not None:
            data = b"".join(self.held)
            self.held = None
            port_send(self.fd, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), 0)
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
            return self.release_held()
        finally:
            PyContext_Exit(context)

    cdef int release_held(self) except -1:
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
        if self.unsent() == 0:
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
        cdef WriteBuffer buffer = self.write_buffer()
        if buffer.size == 0:
            self.watch_or_end(self.watched_for | POLLOUT)
            if self.lost:
                return 0
        if data is None:
            data = PyBytes_FromStringAndSize(start + sent, length - sent)
            sent = 0
        buffer.add(data, sent)
        return self.maybe_pause()

    cdef int flush(self) except -1:
        """The kernel takes more: send what is kept, as much as one wake may."""
        cdef bint end_follows = self.eof_sent  # resume_writing() that ends the stream has done so itself
        cdef int code = self.buffer.send(self.fd)
        if code != 0 and not port_would_block(code) and code != PORT_EINTR:
            return self.fail(code, "Fatal write error on socket transport")
        self.maybe_resume()
        self.send_held(0)  # a last word, before the end that may follow now
        if self.buffer.size == 0 and self.fd != PORT_NO_SOCKET and not self.lost:
            self.watch_or_end(self.watched_for & ~POLLOUT)
            if self.lost:
                return 0
            if self.emptied is not None and not self.emptied.done():
                self.emptied.set_result(None)
            if self.closing:
                self.lost = 1
                return self.lose()
            if end_follows and port_shutdown(self.fd, PORT_SHUT_WRITE) != 0:
                return self.fail(port_error(), "Fatal write error on socket transport")
        return 0

    cdef Py_ssize_t unsent(self) noexcept:
        """How much is kept to be sent."""
        return 0 if self.buffer is None else self.buffer.size

    cdef WriteBuffer write_buffer(self):
        """The write buffer, made when the first needs it: most connections never do."""
        if self.buffer is None:
            self.buffer = WriteBuffer()
        return self.buffer

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
        if not self.unsent() and port_shutdown(self.fd, PORT_SHUT_WRITE) != 0:
            port_raise(port_error())

    # --- flow control ------------------------------------------------------------------------------

    def get_write_buffer_size(self):
        """How many bytes are kept to be sent."""
        self.send_held(0)  # what the kernel takes is not kept
        return self.unsent()

    def get_write_buffer_limits(self):
        """The marks below and above which the protocol is told to go on and to pause: (low, high)."""
        if self.buffer is None:
            return LOW, HIGH
        return self.buffer.low, self.buffer.high

    def set_write_buffer_limits(self, high=None, low=None):
        """Set the marks, in bytes, between which the protocol may write or has to pause."""
        cdef WriteBuffer buffer
        limits = write_limits(high, low, HIGH)
        self.send_held(0)
        buffer = self.write_buffer()
        buffer.low, buffer.high = limits
        self.maybe_pause()

    cdef int maybe_pause(self) except -1:
        if self.buffer.size <= self.buffer.high or self.buffer.paused:
            return 0
        self.buffer.paused = True
        return self.tell(self.protocol, "pause_writing")

    cdef int maybe_resume(self) except -1:
        if not self.buffer.paused or self.buffer.size > self.buffer.low:
            return 0
        self.buffer.paused = False
        return self.tell(self.protocol, "resume_writing")

    cdef int tell(self, protocol, str name) except -1:
        """Call a protocol, ours or that of a layer above us, and report what it raises."""
        try:
            getattr(protocol, name)()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self.report(error, f"protocol.{name}() failed")
        return 0

    # --- what asyncio's start_tls() asks ---------------------------------------------------------------

    @property
    def _start_tls_compatible(self):
        # Asked just before another protocol is set.
        cdef bytes taken = taken_back(self.protocol)
        if taken is not None:
            self.unread = taken + (self.unread or b"")
        return True

    # --- what asyncio's sendfile() asks ------------------------------------------------------------

    @property
    def _loop(self):
        return self.hub.loop

    @property
    def _protocol_paused(self):
        return self.buffer is not None and bool(self.buffer.paused)

    @property
    def _sendfile_compatible(self):
        # A selector loop takes the transport out of its table while the kernel sends the file, and puts it
        # back, by the descriptor of its socket.
        if not isinstance(self.hub.loop, _BaseEventLoop):
            return _SendfileMode.FALLBACK
        self.own_socket()
        return _SendfileMode.TRY_NATIVE

    @property
    def _sock_fd(self):
        self.share()
        return self.fd

    @property
    def _sock(self):
        self.share()
        return self.own_socket()

    def _make_empty_waiter(self):
        if self.emptied is not None:
            raise RuntimeError("Empty waiter is already set")
        self.send_held(0)
        self.emptied = self.hub.loop.create_future()
        if not self.unsent():
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
        if kind is not self.connections.kind:
            self.connections.takes = how_it_takes(self.hub.loop, protocol)
            # A Receiver is found by its type, and what another object says of its class is not that.
            self.connections.kind = None if self.connections.takes == IN_OURS else kind
        self.takes = self.connections.takes
        self.connected = True
        return 0

    def get_protocol(self):
        """The protocol; None after connection_lost()."""
        return self.protocol

    def get_extra_info(self, name, default=None):
        """'peername', 'sockname' and 'socket', as asyncio's own, and 'proxy', a ProxyHeader, with proxy=;
        `default` for anything else."""
        if name == "peername":
            return self.peer_address()
        if name == "socket":
            sock = self.own_socket()
            return default if sock is None else TransportSocket(sock, self)
        if name == "sockname":
            return self.own_address()
        if name == "proxy" and isinstance(self.peer, Proxied) and (<Proxied>self.peer).header is not None:
            return (<Proxied>self.peer).header
        return default

    cdef object peer_address(self):
        if self.address.length:
            self.peer = address_object(<const port_address *>self.address.bytes, self.address.length)
            self.address.length = 0
        return (<Proxied>self.peer).peer if isinstance(self.peer, Proxied) else self.peer

    cdef object own_address(self):
        """The address that the client has connected to; None when it cannot be told any more."""
        if self.sockname is None and self.fd != PORT_NO_SOCKET:
            try:
                self.sockname = self.own_socket().getsockname()
            except OSError:
                pass  # asyncio says None, too
        return self.sockname

    cdef object own_socket(self):
        """The socket.socket of the connection, made when somebody asks; from then on it owns the descriptor.
        None when nobody asked before the end."""
        if self.sock is None:
            if self.fd == PORT_NO_SOCKET:
                return None
            self.sock = _StandardSocket(
                self.state.family, self.state.type | _nonblocking, self.state.protocol, fileno=self.fd)
            if not _nonblocking:
                self.sock.setblocking(False)
            self.show()
        return self.sock

    cdef int share(self) except -1:
        """Somebody gets the descriptor: nothing is held any more."""
        self.shared = True
        return self.send_held(0)

    cdef int show(self) except -1:
        """Have the loop know whose the descriptor is, now that somebody is told of it.

        Its table is weak, and it passes over a transport that is closed.
        """
        if self.hub.transports is not None:
            self.hub.transports[self.fd] = self
        return 0

    cdef int close_socket(self, port_socket fd) except -1:
        """Close the descriptor, which was self.fd, and count the client out."""
        cdef state_t *state = self.state
        if self.sock is not None:
            self.sock.close()
        else:
            port_close(fd)  # what a failed close could tell, nobody is left to do anything about
        self.state = NULL
        if self.origin is not NULL:
            free_origin(self.origin)
            self.origin = NULL
        client_out(state)
        return 0
