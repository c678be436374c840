"""TLS on our transports: a TlsTransport is what the application's protocol has for its transport.

What a Transport has received comes by a call of C's (Receiver) and goes through an SSLObject of the ssl
module; what is written goes through it to the Transport.  Nothing here touches a socket.
"""

import logging
import os
import ssl
from asyncio import constants, sslproto
from collections import deque
from concurrent import futures  # its executors are imported when the first is made

cimport cython
from cpython.buffer cimport (
    PyBUF_FORMAT,
    PyBUF_ND,
    PyBUF_SIMPLE,
    PyBUF_STRIDES,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport PyObject, Py_XDECREF
from libc.string cimport memcpy

from fastlisten._core.port cimport PORT_NO_SOCKET
from fastlisten._core.state cimport tls_completed, tls_failed
from fastlisten._tls import failure_reason
from fastlisten.aio._transport cimport (
    CHUNK,
    IN_ITS_BUFFER,
    READ,
    SMALL,
    Receiver,
    Transport,
    how_it_takes,
    taken_back,
    write_limits,
)
from fastlisten.aio._transport import SocketTransport

cdef extern from "Python.h":  # a bytes object that is filled before anybody else sees it
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *, Py_ssize_t) except NULL
    int resize_bytes "_PyBytes_Resize"(PyObject **, Py_ssize_t) except -1

cdef enum:
    SLICE = 16 * 1024  # what a record holds
    RECORD = 5 + 16 * 1024 + 2048  # no record is longer: RFC 5246, section 6.2.3; RFC 8446 allows less

# By a name of C's: at the end of the interpreter a module's own names go before its objects.
cdef object _asyncio_log = logging.getLogger("asyncio")
cdef object _SSLObject = ssl.SSLObject
cdef object _SSLError = ssl.SSLError
cdef object _CertificateError = ssl.CertificateError
cdef tuple _again = (ssl.SSLWantReadError, ssl.SSLSyscallError)  # as asyncio has it
cdef object _FALLBACK = constants._SendfileMode.FALLBACK
cdef int _warn_from = constants.LOG_THRESHOLD_FOR_CONNLOST_WRITES
# Asyncio's own marks: of what is kept for the peer, and of what it has sent and nobody has read.
cdef tuple _write_limits = write_limits(None, None, 1024 * constants.FLOW_CONTROL_HIGH_WATER_SSL_WRITE)
cdef tuple _read_limits = write_limits(None, None, 1024 * constants.FLOW_CONTROL_HIGH_WATER_SSL_READ)


class SSLTransport(SocketTransport, sslproto._SSLProtocolTransport):
    """What isinstance() is told that a TlsTransport is, for whoever asks for asyncio's."""

    __slots__ = ()


cdef object _SSLTransport = SSLTransport


cdef object _timeout(str name, value, default):
    if value is None:
        return default
    if value <= 0:
        raise ValueError(f"{name} should be a positive number, got {value}")
    return value


@cython.final
cdef class HandshakeThreads:
    """So many threads in which the handshakes of a server run, for OpenSSL works without the GIL.

    A thread gets its next one when the event loop has taken what came of the last.  With a queue of its own
    it would go on, and where they share a core the loop would have it back by the scheduler's tick only,
    which is 4 ms with CONFIG_HZ=250.
    """

    def __cinit__(self, int count):
        self.count = self.free = count

    cdef bint run(self, TlsTransport transport) except -1:
        """Have a thread go on with a handshake; False when they have ended."""
        if self.closed:
            return False
        if self.process != os.getpid():
            self.executor = futures.ThreadPoolExecutor(self.count, "fastlisten-handshake")
            self.process = os.getpid()
            self.free, self.waiting = self.count, deque()
        if self.free:
            self.free -= 1
            self.executor.submit(transport._shake_in_a_thread)
        else:
            self.waiting.append(transport)
        return True

    cdef int taken(self) except -1:
        """The event loop has what a thread has done: that gets the next, unless it was ended meanwhile."""
        cdef TlsTransport transport
        while self.waiting:
            transport = self.waiting.popleft()
            if transport.state == HANDSHAKE:
                self.executor.submit(transport._shake_in_a_thread)
                return 0
        self.free += 1
        return 0

    def close(self):
        """End the threads; those that are in a handshake end after it."""
        self.closed = True
        if self.executor is not None and self.process == os.getpid():
            while self.waiting:
                self.executor.submit((<TlsTransport>self.waiting.popleft())._shake_in_a_thread)
            self.executor.shutdown(wait=False)
        self.executor = None


@cython.final
cdef class TlsSettings:
    """How TLS is spoken, for all connections of a server.

    loop: the event loop.  context: the ssl.SSLContext; None: the default one of a client.
    server_hostname: which name the server's certificate has to have, on a client's side.
    handshake_timeout, shutdown_timeout: in seconds; None for asyncio's own.
    threads: how many threads handshakes run in; 0: on the event loop.
    Raises ValueError for a timeout that is not positive, and for a server without a context.
    """

    def __init__(self, loop, context, *, bint server_side, server_hostname=None, handshake_timeout=None,
                 shutdown_timeout=None, int threads=0):
        self.loop = loop
        self.handshake_timeout = _timeout(
            "ssl_handshake_timeout", handshake_timeout, constants.SSL_HANDSHAKE_TIMEOUT)
        self.shutdown_timeout = _timeout(
            "ssl_shutdown_timeout", shutdown_timeout, constants.SSL_SHUTDOWN_TIMEOUT)
        self.context = context or sslproto._create_transport_context(server_side, server_hostname)
        self.server_side = server_side
        self.server_hostname = None if server_side else server_hostname or None
        if threads:
            self.threads = HandshakeThreads(threads)


@cython.final
cdef class Window:
    """Memory of C's, which the ssl module reads and fills in place while a call of it lasts."""

    def __getbuffer__(self, Py_buffer *view, int flags):
        view.buf = self.start
        view.obj = self
        view.len = self.length
        view.itemsize = 1
        view.readonly = 0
        view.ndim = 1
        view.format = NULL
        if flags & PyBUF_FORMAT:
            view.format = b"B"
        view.shape = &view.len if flags & PyBUF_ND else NULL
        view.strides = &view.itemsize if flags & PyBUF_STRIDES == PyBUF_STRIDES else NULL
        view.suboffsets = NULL
        view.internal = NULL


# --- The session --------------------------------------------------------------------------------------------

@cython.final
cdef class Session:
    """A TLS session in memory: bytes that were received go in, and what is to be sent comes out."""

    def __cinit__(self, TlsSettings settings not None):
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.ssl_object = settings.context.wrap_bio(
            self.incoming, self.outgoing, server_side=settings.server_side,
            server_hostname=settings.server_hostname)
        # SSLObject's own methods are Python around these; who has derived from it wants to be asked.
        inner = self.ssl_object
        if type(inner) is _SSLObject:
            inner = getattr(inner, "_sslobj", inner)
        self.decrypt, self.encrypt = inner.read, inner.write
        self.put, self.take = self.incoming.write, self.outgoing.read
        self.window = Window()
        self.inside = True
        self.sealed = []

    cdef int feed(self, char *data, Py_ssize_t length) except -1:
        """The peer has sent this: it has to stay there until fill() or keep()."""
        if self.busy:
            self.later.append(PyBytes_FromStringAndSize(data, length))
            self.later_size += length
            return 0
        self.received, self.received_size = data, length
        return 0

    cdef int keep(self, Py_ssize_t most) except -1:
        """Copy so much of what feed() has shown, if there is any."""
        cdef Py_ssize_t length = min(most, self.received_size)
        if length:
            self.window.start, self.window.length = self.received, length
            self.received += length
            self.received_size -= length
            self.put(self.window)
        return 0

    cdef bytes read(self, Py_ssize_t most):
        """Decrypt so much at most, b"" when there is nothing; raises as fill()."""
        cdef Py_ssize_t room = self.received_size + self.incoming.pending
        cdef PyObject *data
        cdef char *start
        cdef Py_ssize_t got
        if self.inside:
            room += RECORD
        if self.unread is not None:
            room += PyBytes_GET_SIZE(self.unread)
        room = min(room, most)
        data = new_bytes(NULL, room)
        try:
            start = PyBytes_AS_STRING(<object>data)
            got = self.fill(start, room)
            resize_bytes(&data, got)
            return <bytes>data
        finally:
            Py_XDECREF(data)

    cdef bint catch_up(self) except -1:
        """The thread is through: take what was received meanwhile; returns whether there was anything."""
        cdef bint any_later = self.later_size != 0
        self.busy = False
        if any_later:
            self.put(b"".join(self.later))
            self.later_size = 0
        self.later = None
        return any_later

    cdef Py_ssize_t fill(self, char *buffer, Py_ssize_t room) except -1:
        """Decrypt into the buffer as much as there is; returns how much.

        Raises what ends the session, when all that came before it is out.
        """
        cdef Py_ssize_t filled = 0
        cdef Py_ssize_t got
        self.inside, self.full = True, False
        if self.unread is not None:
            filled = min(room, PyBytes_GET_SIZE(self.unread))
            memcpy(buffer, PyBytes_AS_STRING(self.unread), filled)
            self.unread = self.unread[filled:] if filled < PyBytes_GET_SIZE(self.unread) else None
        if self.error is not None and filled == 0:
            raise self.error
        try:
            while filled < room and not self.ended and self.error is None:
                # A record at a time, so that the ssl module's copy of it stays in the processor's cache.
                if self.received_size and self.incoming.pending < RECORD:
                    self.keep(RECORD)
                self.window.start, self.window.length = buffer + filled, room - filled
                try:
                    got = self.decrypt(room - filled, self.window)
                except _again:
                    break
                except _SSLError as error:
                    if filled == 0:
                        raise
                    self.error = error
                    break
                filled += got
                if got == 0:
                    self.ended = True
                elif got < self.window.length and not (self.received_size or self.incoming.pending):
                    # To ask once more would tell so by an exception, which costs more than a short read.
                    self.inside = False
                    break
            self.full = filled == room and room != 0
        finally:
            self.keep(self.received_size)
        return filled

    cdef Py_ssize_t seal(self, bytes data) except -1:
        """Encrypt, a record at a time if it is much; returns how far it came until it has to read."""
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t done = 0
        try:
            if size <= SLICE:
                self.encrypt(data)
                return size
            while done < size:
                self.window.start = PyBytes_AS_STRING(data) + done
                self.window.length = min(size - done, SLICE)
                self.encrypt(self.window)
                done += self.window.length
                self.sealed.append(self.take())
        except _again:
            pass
        return done

    cdef bytes to_send(self):
        """What is encrypted and was not taken yet."""
        cdef bytes last = self.take()
        if not self.sealed:
            return last
        pieces, self.sealed = self.sealed, []
        pieces.append(last)
        return b"".join(pieces)


# --- The transport ------------------------------------------------------------------------------------------

@cython.final
cdef class TlsTransport(Receiver):
    """An asyncio.Transport that speaks TLS over a Transport, whose protocol it is.

    Made for the servers of fastlisten.aio and by start_tls() of their event loops.
    settings: a TlsSettings.  protocol: the application's.  waiter: a Future that is told when the handshake
    is over; None when nobody waits for it.  made: the protocol has had its connection_made() already.
    """

    max_size = CHUNK
    _sendfile_compatible = _FALLBACK

    def __init__(self, TlsSettings settings not None, protocol, waiter=None, bint made=False):
        self.settings = settings
        self.session = Session(settings)
        self.limits = _write_limits
        self.read_limits = _read_limits
        self.waiter = waiter
        if made:
            self.told = OF_CONNECTION
        self.set_protocol(protocol)

    @property
    def __class__(self):
        return _SSLTransport

    def __repr__(self):
        state = ("in its handshake", "open", "closing", "closed")[self.state]
        return f"<fastlisten.TlsTransport {state} on {self.below!r}>"

    # --- what the transport below calls --------------------------------------------------------------

    def connection_made(self, Transport transport not None):
        """The transport below is there: begin."""
        self.below = transport
        self.session.window.owner = transport.connections
        self.begin()

    cdef int received(self, char *data, Py_ssize_t length) except -1:
        self.session.feed(data, length)
        # No call of the application's may come before it is copied: what is below may use its memory then.
        if self.state != OPEN or self.paused or self.buffered:
            self.session.keep(length)
        return self.pump()

    def data_received(self, data):
        """As received(), for whoever calls it from Python."""
        self.session.put(data)
        self.pump()

    def eof_received(self):
        """Nothing more comes from below; returns whether that is to stay open nevertheless."""
        if self.settings.loop.get_debug():
            _asyncio_log.debug("%r received EOF", self)
        self.session.cut = True
        if self.session.busy:
            return True  # a thread has what came before it
        if self.state == HANDSHAKE:
            self.handshake_failed(ConnectionResetError())
        elif self.state == OPEN and self.paused:
            return True  # what is left is read, and the end told, after resume_reading()
        else:
            self.pump()
        return False

    def connection_lost(self, error):
        """The transport below is gone."""
        cdef bint made = self.told != OF_NOTHING
        protocol, self.protocol = self.protocol, None
        self.stop_timer()
        self.count_failure(error or ConnectionResetError())
        self.state = CLOSED
        self.held = None
        self.held_size = 0
        self.lost += 1
        self.tell_waiter(error or ConnectionAbortedError("the connection was closed in the TLS handshake"))
        if made:
            protocol.connection_lost(error)

    def pause_writing(self):
        """The transport below has enough to send: what is encrypted stays here."""
        self.full = True

    def resume_writing(self):
        """The transport below takes more."""
        self.full = False
        self.flush()

    # --- the handshake -------------------------------------------------------------------------------

    cdef int begin(self) except -1:
        loop = self.settings.loop
        if loop.get_debug():
            _asyncio_log.debug("%r starts SSL handshake", self)
        self.timer = loop.call_later(self.settings.handshake_timeout, self._handshake_is_late)
        if not self.settings.server_side:  # a server has nothing to say before the client
            self.pump()
        return 0

    def begin_on(self, Transport transport not None):
        """Take a transport over from its protocol, with what that has not read yet, and begin."""
        cdef bytes taken = taken_back(transport.protocol)
        if taken is not None:
            self.session.put(taken)
        if transport.unread is not None:
            self.session.put(transport.unread)
            transport.unread = None
        if transport.fd == PORT_NO_SOCKET:  # it is over, and its protocol has been told
            self.told = OF_NOTHING
            self.connection_lost(None)
            return
        transport.attach(self)
        self.connection_made(transport)
        if self.session.incoming.pending:
            self.pump()
        if transport.ended:
            self.eof_received()
        transport.paused = False
        transport.again(READ)

    cdef int pump(self) except -1:
        """Do what can be done with what was received."""
        self.holding = True
        try:
            if self.state == HANDSHAKE:
                self.shake_hands()
            elif self.state == OPEN:
                self.read()
            elif self.state == CLOSING:
                self.shake_goodbye()
        finally:
            self.holding = False
            self.flush()
        return 0

    cdef int shake_hands(self) except -1:
        """Go on with the handshake, in a thread if there are any for it."""
        cdef Session session = self.session
        if session.busy:
            if session.later_size > SMALL and not self.below_paused:
                self.below_paused = True
                self.below.pause_reading()
            return 0
        if self.settings.threads is not None:
            session.busy, session.later = True, []
            if self.settings.threads.run(self):
                return 0
            session.busy, session.later = False, None
        return self.handshake_tried(self.try_handshake())

    cdef object try_handshake(self):
        """Returns what it raises; None when the handshake is through."""
        try:
            self.session.ssl_object.do_handshake()
            self.session.peer_certificate = self.session.ssl_object.getpeercert()
        except Exception as error:
            return error
        return None

    cdef int handshake_tried(self, error) except -1:
        if error is None:
            return self.opened()
        if isinstance(error, _again):
            return 0
        return self.handshake_failed(error)

    def _shake_in_a_thread(self):
        error = self.try_handshake()
        try:
            self.settings.loop.call_soon_threadsafe(self._shaken, error)
        except RuntimeError:
            pass  # the loop is closed, and with it the connection

    def _shaken(self, error):
        """A thread has gone on with the handshake."""
        cdef bint more = self.session.catch_up()
        self.settings.threads.taken()
        if self.state != HANDSHAKE or self.below.fd == PORT_NO_SOCKET:
            return  # it was ended meanwhile
        context = self.below.context
        self.below.enter_call(context)
        self.holding = True
        try:
            self.handshake_tried(error)
            if more and self.state == HANDSHAKE:
                self.shake_hands()
            if not self.session.busy:
                if self.state == HANDSHAKE and self.session.cut:
                    self.handshake_failed(ConnectionResetError())
                self.pace_below()
        finally:
            self.holding = False
            self.flush()
            self.below.leave_call(context)

    cdef int opened(self) except -1:
        """The handshake is through.  Go on at once, unless something was scheduled that comes first.

        Who waits for the transport has it before the first data (cpython's bpo-40573), and a task may start
        TLS again.
        """
        cdef Py_ssize_t scheduled = self.below.hub.scheduled()
        self.state = OPEN
        if self.settings.server_side and self.below.state is not NULL:
            tls_completed(self.below.state)
        if self.settings.loop.get_debug() and self.timer is not None:
            left = self.timer.when() - self.settings.loop.time()
            took = self.settings.handshake_timeout - left
            _asyncio_log.debug("%r: SSL handshake took %.1f ms", self, took * 1e3)
        self.stop_timer()
        if self.told == OF_NOTHING:
            self.told = OF_CONNECTION
            self.protocol.connection_made(self)
        self.tell_waiter(None)
        if self.below.hub.scheduled() == scheduled:
            return self.read()
        self.settings.loop.call_soon(self._resume)
        return 0

    cdef int handshake_failed(self, error) except -1:
        self.count_failure(error)
        certificate = isinstance(error, _CertificateError)
        self.fatal(error, "SSL handshake failed on verifying the certificate" if certificate
                   else "SSL handshake failed")
        return self.tell_waiter(error)

    cdef int count_failure(self, error) except -1:
        """A handshake has failed; who closes or aborts one himself counts nothing."""
        if (self.settings.server_side and self.state == HANDSHAKE
                and self.below is not None and self.below.state is not NULL):
            tls_failed(self.below.state, failure_reason(error))
        return 0

    def _handshake_is_late(self):
        self.timer = None
        if self.state == HANDSHAKE:
            self.count_failure(TimeoutError())
            self.fatal(ConnectionAbortedError(
                f"SSL handshake is taking longer than {self.settings.handshake_timeout} seconds: "
                f"aborting the connection"), "Fatal error on transport")

    cdef int tell_waiter(self, error) except -1:
        waiter, self.waiter = self.waiter, None
        if waiter is None or waiter.done():
            return 0
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)
        return 0

    # --- reading -------------------------------------------------------------------------------------

    cdef int read(self) except -1:
        """Have the protocol get what there is."""
        cdef bint more = True
        try:
            while more and self.state == OPEN and not self.paused:
                more = self.read_into_buffer() if self.buffered else self.read_bytes()
        except (SystemExit, KeyboardInterrupt):
            raise
        except Exception as error:
            return self.fatal(error, "Fatal error on SSL protocol")
        if self.state == OPEN and not self.paused and (self.session.ended or self.session.cut):
            self.tell_eof()
            return self.shut()
        return self.pace_below()

    cdef bint read_bytes(self) except -1:
        """Returns whether there may be more."""
        cdef bytes data = self.session.read(CHUNK)
        cdef bint full = self.session.full
        if data:
            self.protocol.data_received(data)
        return full or self.session.error is not None

    cdef bint read_into_buffer(self) except -1:
        """Returns whether there may be more."""
        cdef Py_buffer view
        cdef Py_ssize_t got
        cdef bint full
        buffer = self.protocol.get_buffer(self.session.incoming.pending)
        if not len(buffer):
            raise RuntimeError("get_buffer() returned an empty buffer")
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            got = self.session.fill(<char *>view.buf, view.len)
        finally:
            PyBuffer_Release(&view)
        full = self.session.full
        if got:
            self.protocol.buffer_updated(got)
        return full or self.session.error is not None

    cdef int tell_eof(self) except -1:
        """eof_received(), once."""
        if self.told != OF_CONNECTION or self.protocol is None:
            return 0
        self.told = OF_EOF
        try:
            if self.protocol.eof_received():
                _asyncio_log.warning("returning true from eof_received() has no effect when using ssl")
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self.fatal(error, "Error calling eof_received()")
        return 0

    def is_reading(self):
        """Whether what the peer sends is being read."""
        return not self.paused

    def pause_reading(self):
        """Read nothing until resume_reading(); the peer is slowed down when enough is waiting."""
        self.paused = True

    def resume_reading(self):
        """Read again after pause_reading()."""
        if self.paused:
            self.paused = False
            self.settings.loop.call_soon(self._resume)

    def _resume(self):
        if self.below is None or self.below.fd == PORT_NO_SOCKET:
            return
        context = self.below.context
        self.below.enter_call(context)
        try:
            self.pump()
        finally:
            self.below.leave_call(context)

    cdef int pace_below(self) except -1:
        """Have the transport below read nothing while too much is waiting here."""
        if self.paused:
            if not self.below_paused and self.session.incoming.pending >= self.read_limits[1]:
                self.below_paused = True
                self.below.pause_reading()
        elif self.below_paused and self.session.incoming.pending <= self.read_limits[0]:
            self.below_paused = False
            self.below.resume_reading()
        return 0

    def get_read_buffer_limits(self):
        """The marks below and above which the peer may send and is slowed down: (low, high)."""
        return self.read_limits

    def set_read_buffer_limits(self, high=None, low=None):
        """Set the marks, in encrypted bytes, between which the peer may send or is slowed down."""
        self.read_limits = write_limits(high, low, 1024 * constants.FLOW_CONTROL_HIGH_WATER_SSL_READ)
        if self.below is not None:
            self.pace_below()

    def get_read_buffer_size(self):
        """How many encrypted bytes were received and not read."""
        return self.session.incoming.pending

    # --- writing -------------------------------------------------------------------------------------

    def write(self, data):
        """Send bytes, encrypted."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data: expecting a bytes-like instance, got {type(data).__name__}")
        if data:
            self.put(data)

    def writelines(self, list_of_data):
        """Send the pieces as one."""
        try:
            data = b"".join(list_of_data)
        except Exception as error:
            self.fatal(error, "Fatal error on SSL protocol")
            return
        self.put(data)

    cdef int put(self, data) except -1:
        cdef bytes kept
        if self.state == CLOSING or self.state == CLOSED:
            if self.lost >= _warn_from:
                _asyncio_log.warning("SSL connection is closed")
            self.lost += 1
            return 0
        kept = data if type(data) is bytes else bytes(data)  # what the caller may change is copied
        if self.held is None:
            self.held = []
        self.held.append(kept)
        self.held_size += PyBytes_GET_SIZE(kept)
        # What is written while we call the protocol is encrypted as one when it returns, and sent as one.
        if not self.holding or self.held_size > SMALL:
            self.flush()
        return 0

    cdef int flush(self) except -1:
        """Encrypt and send what was written."""
        if self.held is not None and self.state == OPEN:
            try:
                self.encrypt_held()
            except (SystemExit, KeyboardInterrupt):
                raise
            except Exception as error:
                return self.fatal(error, "Fatal error on SSL protocol")
        if self.state != CLOSED:
            self.send_outgoing()
            self.pace_writer()
        return 0

    cdef int encrypt_held(self) except -1:
        """Encrypt what was written, unless the transport below has enough: then it stays as it is."""
        cdef bytes data
        cdef Py_ssize_t done
        if self.held is None or self.full:
            return 0
        data = b"".join(self.held)  # one alone is not copied
        self.held = None
        self.held_size = 0
        done = self.session.seal(data)
        if done < PyBytes_GET_SIZE(data):  # the next pump() tries again
            self.held = [data[done:]]
            self.held_size = PyBytes_GET_SIZE(data) - done
        return 0

    cdef int send_outgoing(self) except -1:
        """Give the transport below what is encrypted, if it takes it."""
        cdef bytes data
        if self.full or self.below is None or self.session.busy:
            return 0
        data = self.session.to_send()
        return self.below.transmit(data, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))

    def can_write_eof(self):
        """False: TLS ends both sides."""
        return False

    def write_eof(self):
        """NotImplementedError."""
        raise NotImplementedError

    cdef int pace_writer(self) except -1:
        """Tell the protocol to pause while too much is unsent, and when it may go on."""
        if not self.full and self.held is None and not self.writer_paused:
            return 0
        unsent = self.session.outgoing.pending + self.held_size
        if not self.writer_paused and unsent and unsent >= self.limits[1]:
            self.writer_paused = True
            return self.tell_protocol("pause_writing")
        if self.writer_paused and unsent <= self.limits[0]:
            self.writer_paused = False
            return self.tell_protocol("resume_writing")
        return 0

    cdef int tell_protocol(self, str name) except -1:
        if self.protocol is None or self.below is None:
            return 0
        return self.below.tell(self.protocol, name)

    def get_write_buffer_size(self):
        """How many bytes are kept to be given to the transport below."""
        if self.state == OPEN:
            self.flush()
        return self.session.outgoing.pending + self.held_size

    def get_write_buffer_limits(self):
        """The marks below and above which the protocol is told to go on and to pause: (low, high)."""
        return self.limits

    def set_write_buffer_limits(self, high=None, low=None):
        """Set the marks, in bytes, between which the protocol may write or has to pause."""
        self.limits = write_limits(high, low, 1024 * constants.FLOW_CONTROL_HIGH_WATER_SSL_WRITE)
        self.pace_writer()

    @property
    def _protocol_paused(self):
        return bool(self.writer_paused)

    # --- the end -------------------------------------------------------------------------------------

    def is_closing(self):
        """Whether it is closed or will be."""
        return self.state >= CLOSING or (self.below is not None and bool(self.below.closing))

    def close(self):
        """Close when all that was written is sent and the peer agrees; connection_lost() follows."""
        if self.state == HANDSHAKE:
            self.kill(None)
        else:
            self.shut()

    def abort(self):
        """Close at once; what is not sent yet is lost."""
        self.kill(None)

    def _force_close(self, error):  # asyncio's TLS protocol calls it, when it is on this one
        self.kill(error)

    cdef int shut(self) except -1:
        """Send what was written, and our close_notify."""
        if self.state != OPEN:
            return 0
        self.full = False  # the transport below gets all of it
        self.flush()
        try:
            # OpenSSL takes data that nobody has read for an error of the peer's.
            while self.state == OPEN and self.session.fill(self.below.connections.scratch, CHUNK):
                pass
        except _SSLError as error:
            return self.fatal(error, "Fatal error on transport")
        if self.state != OPEN:
            return 0
        self.state = CLOSING
        self.shake_goodbye()
        if self.state == CLOSING:
            self.timer = self.settings.loop.call_later(self.settings.shutdown_timeout, self._end_is_late)
        return 0

    cdef int shake_goodbye(self) except -1:
        """Close the transport below if the peer's close_notify is there, or nothing more comes."""
        # Without an answer to its close_notify OpenSSL forgets a client's session: it cannot be resumed.
        if self.session.ended or not self.session.cut:
            try:
                self.session.ssl_object.unwrap()
            except _again:
                return self.send_outgoing()
            except _SSLError as error:
                return self.fatal(error, "Fatal error on transport")
        self.tell_eof()
        if self.state != CLOSING:
            return 0
        self.stop_timer()
        self.full = False  # the transport below sends all of it before it closes
        self.send_outgoing()
        self.state = CLOSED
        return self.below.shut()

    def _end_is_late(self):
        self.timer = None
        if self.state == CLOSING:
            self.state = CLOSED
            self.below.force_close(TimeoutError("SSL shutdown timed out"))

    cdef int stop_timer(self) except -1:
        timer, self.timer = self.timer, None
        if timer is not None:
            timer.cancel()
        return 0

    cdef int fatal(self, error, str message) except -1:
        """An error ends the connection, and the peer gets the alert that OpenSSL has for it.

        What a client can cause (OSError, which an SSLError is) is not reported, as in asyncio.
        """
        if self.state == CLOSED or self.below is None:
            return 0
        self.stop_timer()
        self.send_outgoing()
        self.state = CLOSED
        return self.below.fatal(error, message)

    cdef int kill(self, error) except -1:
        if self.state == CLOSED or self.below is None:
            return 0
        self.stop_timer()
        self.flush()
        self.state = CLOSED
        return self.below.force_close(error)

    # --- what asyncio's start_tls() asks ---------------------------------------------------------------

    @property
    def _start_tls_compatible(self):
        # Asked just before another protocol is set.
        cdef bytes taken = taken_back(self.protocol)
        if taken is not None:
            self.session.unread = taken + (self.session.unread or b"")
        return True

    # --- the protocol, and what lies below -------------------------------------------------------------

    def set_protocol(self, protocol):
        """Have another protocol called from now on."""
        self.protocol = protocol
        self.buffered = how_it_takes(self.settings.loop, protocol) == IN_ITS_BUFFER

    def get_protocol(self):
        """The protocol; None after connection_lost()."""
        return self.protocol

    def get_extra_info(self, name, default=None):
        """'ssl_object', 'sslcontext', 'peercert', 'cipher' and 'compression', and what the transport below
        has; `default` for anything else."""
        if name == "sslcontext":
            return self.settings.context
        if self.state != HANDSHAKE:
            if name == "ssl_object":
                return self.session.ssl_object
            if name == "peercert":
                return self.session.peer_certificate
            if name == "cipher":
                return self.session.ssl_object.cipher()
            if name == "compression":
                return self.session.ssl_object.compression()
        return default if self.below is None else self.below.get_extra_info(name, default)
