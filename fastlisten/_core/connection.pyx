"""Connection: one accepted client."""

import _socket
import warnings
from os import fsdecode

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from fastlisten._core.standard import StandardSocket

from fastlisten._core.admission cimport admission_leave
from fastlisten._core.port cimport *
from fastlisten._core.state cimport client_closing, client_out, state_hold, state_t, tls_completed, tls_failed


# A recv() of at most this many bytes goes through the stack, so that its result is allocated once, at its
# real size, and never shrunk.
cdef enum:
    STACK_BUFFER = 4096

cdef extern from "Python.h":
    int PyArg_Parse(object argument, const char *format, ...) except 0

cdef object _zero = 0
cdef object _StandardSocket = StandardSocket
cdef object _new_socket = _socket.socket.__new__
cdef object _init_socket = _socket.socket.__init__
cdef object _CSocket = _socket.socket  # what socket.socket adds to is not needed for one call

# By a name of C's: at the end of the interpreter a module's own names go before its objects.
cdef object _warn = warnings.warn

cdef object _duplicate = _socket.dup


cdef int whole(object number) except? -1:
    """The argument as the standard library's socket methods read an int.  Cython's own conversion takes
    floats and has other words for what it does not take."""
    cdef int value = 0
    if number is not _zero:
        PyArg_Parse(number, b"i", &value)
    return value


cdef int writable(object buffer, Py_buffer *view) except -1:
    """Get a buffer to receive into; what has none is a TypeError, as for the standard library."""
    try:
        return PyObject_GetBuffer(buffer, view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    except (TypeError, BufferError):
        name = "None" if buffer is None else type(buffer).__name__
    raise TypeError(f"recv_into() argument 1 must be read-write bytes-like object, not {name}")


cdef int wait_ready(port_socket fd, short events, int64_t deadline) except -1:
    """Wait until the socket is ready; whether it is.  `deadline`: port_now(); 0 for none.

    It comes back with 0 at the deadline, and after a signal's handlers have run (PEP 475): they may have
    closed the socket.  The caller tries its call again and comes back; TimeoutError after the deadline.
    """
    cdef port_pollfd poll
    cdef int64_t left = -1
    cdef int ready, code
    if deadline:
        left = deadline - port_now()
        if left <= 0:
            raise TimeoutError("timed out")
    poll.fd = fd
    poll.events = events
    with nogil:
        ready = port_poll_ns(&poll, 1, left)
        code = port_error() if ready < 0 else 0
    if code == PORT_EINTR:
        PyErr_CheckSignals()
    elif code != 0:
        port_raise(code)
    return ready > 0


cdef object address_object(const port_address *address, int length):
    """The address as socket.accept() gives it; None where it does (the system told none)."""
    cdef char text[64]
    cdef int size
    cdef const char *path
    if length == 0:
        return None
    if address.any.sa_family == AF_INET:
        inet_ntop(AF_INET, &address.in4.sin_addr, text, sizeof(text))
        return text.decode("ascii"), ntohs(address.in4.sin_port)
    if address.any.sa_family == AF_INET6:
        inet_ntop(AF_INET6, &address.in6.sin6_addr, text, sizeof(text))
        return (text.decode("ascii"), ntohs(address.in6.sin6_port),
                ntohl(address.in6.sin6_flowinfo), address.in6.sin6_scope_id)
    path = port_unix_path(address, length, &size)
    if path is NULL:
        raise OSError(f"no text for an address of family {address.any.sa_family}")
    if size == 0:
        return ""
    if path[0] == 0:  # Linux's abstract names are bytes of a given length: unix(7)
        return PyBytes_FromStringAndSize(path, size)
    return fsdecode(PyBytes_FromStringAndSize(path, size).split(b"\0", 1)[0])


cdef object standard_socket(port_socket fd, int family, int type, int protocol):
    """A socket.socket that owns `fd`, made as socket.socket.__init__ does.

    It is not called, because it is Python code: a signal handler that raised in the middle of it would leave
    a descriptor that both or neither of us would close.
    """
    sock = None
    try:
        sock = _new_socket(_StandardSocket)
        _init_socket(sock, family, type, protocol, fd)
    except BaseException:
        if sock is None or sock.fileno() == -1:
            port_close(fd)
        raise
    sock._io_refs = 0
    sock._closed = False
    return sock


cdef void *long_address(const port_address *address, int length) noexcept nogil:
    """What a Connection has on the heap for an address that is not short; NULL without memory."""
    cdef void *place
    if length == ORIGIN:
        return origin_of(address)
    place = malloc(length)
    if place is not NULL:
        memcpy(place, address, length)
    return place


cdef origin_t *origin_of(const port_address *address) noexcept nogil:
    """What is in place of an address whose length is ORIGIN."""
    cdef origin_t *origin
    memcpy(&origin, address, sizeof(origin))
    return origin


cdef object header_of(const origin_t *origin):
    """The ProxyHeader that has come with a client; None: none has."""
    if origin.size == 0:
        return None
    from fastlisten._core.proxy import parse  # for who has a proxy
    return parse(PyBytes_FromStringAndSize(<const char *>(origin + 1), origin.size))


cdef object peer_of(const origin_t *origin, header):
    """Who the client is: whom the header names, or else the peer."""
    if header is not None and header.source is not None:
        return header.source
    return address_object(&origin.address, origin.length)


cdef void leave_table(origin_t *origin) noexcept nogil:
    """The client counts for admission no more."""
    cdef int64_t ticket = origin.ticket
    if ticket:
        origin.ticket = 0
        if admission_leave(origin.table, ticket):
            free(origin.table)


cdef void free_origin(origin_t *origin) noexcept nogil:
    """Its client has ended."""
    leave_table(origin)
    free(origin)


cdef void forget_origin(port_address *address, int length) noexcept nogil:
    """Free what is in place of an address, if there is such; no Connection gets it."""
    if length == ORIGIN:
        free_origin(origin_of(address))


cdef Connection new_connection(
        port_socket fd, const port_address *address, int length, state_t *state, double timeout):
    """A Connection that owns `fd`; on failure the descriptor stays the caller's.  It takes a hold on the
    state, which says where the client came from, and has what came with a PROXY header."""
    cdef Connection connection = Connection.__new__(Connection)
    if length > SHORT_ADDRESS:
        connection.address.heap = long_address(address, length)
        if connection.address.heap is NULL:
            raise MemoryError
    else:
        memcpy(connection.address.bytes, address, length)
    connection.address_length = length
    state_hold(state)
    connection.state = state
    connection.timeout = timeout
    connection.fd = fd
    return connection


@cython.final
@cython.no_gc
cdef class Connection:
    """One accepted client, with the socket methods a handler uses, their meanings and their errors.

    Connections come from Listener.serve(), accept_many() and iteration; they are not made by hand.  One
    that a handler got is closed when the handler returns, unless detach() or socket() took the descriptor
    over; any other is closed by whoever got it.  A method of a closed Connection raises OSError (EBADF).

    >>> import socket, fastlisten
    >>> with fastlisten.bind("127.0.0.1:0") as listener:
    ...     client = socket.create_connection(listener.getsockname())
    ...     with client, listener.accept_many()[0] as connection:
    ...         connection.peer == client.getsockname()
    ...         connection.sendall(b"hello")
    ...         client.recv(100)
    True
    b'hello'
    """

    ssl = None  # as opposed to that of a TLSConnection

    def __cinit__(self):
        self.fd = PORT_NO_SOCKET
        self.state = NULL
        self.timeout = -1

    def __init__(self, *args):
        raise TypeError("a Connection comes from a listener")

    def __del__(self):
        if self.fd != PORT_NO_SOCKET:
            _warn(f"unclosed {self!r}", ResourceWarning, stacklevel=1, source=self)
            self.finish()

    def __dealloc__(self):
        if self.address_length > SHORT_ADDRESS:
            free(self.address.heap)

    # --- ownership ---------------------------------------------------------------------------------

    cdef void count_out(self) noexcept:
        """The descriptor is no longer ours."""
        cdef state_t *state = self.state
        self.state = NULL
        if self.address_length == ORIGIN:
            leave_table(<origin_t *>self.address.heap)
        client_out(state)

    cdef int finish(self) noexcept:
        """Close the descriptor if it is still ours; returns the code of a close that failed, or 0."""
        cdef port_socket fd
        cdef int code = 0
        with cython.critical_section(self):  # against cut(), which must not touch a reused descriptor
            fd = self.fd
            self.fd = PORT_NO_SOCKET
        if fd == PORT_NO_SOCKET:
            return 0
        client_closing(self.state, 1)
        with nogil:
            if port_close(fd) != 0:
                code = port_error()
        client_closing(self.state, -1)
        self.count_out()
        return code

    cdef void end(self) noexcept:
        """The handler has returned: close, unless a file of makefile() is still open.

        What a failed close could tell, nobody is left to do anything about; the descriptor is gone anyway.
        """
        cdef bint last
        with cython.critical_section(self):  # another thread may close the last file just now
            self.closing = True
            last = self._io_refs <= 0
        if last:
            self.finish()

    cdef bint cut(self) noexcept:
        """End both directions, so that a thread blocked on this client comes back; False if it is gone."""
        with cython.critical_section(self):
            if self.fd == PORT_NO_SOCKET or port_swap(&self.was_cut, 1):
                return False
            port_cut(self.fd)
        return True

    def close(self):
        """Close the connection; it is not an error to do it again.

        As with socket.close(), files from makefile() that are still open keep the descriptor until the
        last of them is closed.
        """
        cdef int code
        cdef bint kept
        with cython.critical_section(self):
            self.closing = True
            kept = self._io_refs > 0
        if kept:
            return
        code = self.finish()
        if code != 0 and code != PORT_PEER_RESET:  # close() of a reset connection has done its work
            port_raise(code)

    def _decref_socketios(self):
        cdef bint closing
        with cython.critical_section(self):
            if self._io_refs > 0:
                self._io_refs -= 1
            closing = self.closing
        if closing:
            self.close()

    def _tls_completed(self):
        """Count with the listener that this client's TLS handshake is through; before the close."""
        if self.state is not NULL:
            tls_completed(self.state)

    def _tls_failed(self, str reason not None):
        """Count with the listener why this client's TLS handshake failed; before the close."""
        if self.state is not NULL:
            tls_failed(self.state, reason)

    def detach(self):
        """Give the descriptor away: returns it as an int (-1 if closed); the caller closes it."""
        cdef port_socket fd
        with cython.critical_section(self):
            fd = self.fd
            self.fd = PORT_NO_SOCKET
            self.closing = True
        if fd == PORT_NO_SOCKET:
            return -1
        self.count_out()
        return fd

    def socket(self):
        """Turn the connection into a socket.socket, which owns the descriptor from now on.

        It has the family, type, protocol and timeout the connection had.  The caller closes it.
        """
        cdef state_t *state = self.state
        cdef int family, type, protocol
        if self.fd == PORT_NO_SOCKET:
            port_raise(PORT_CLOSED)
        family, type, protocol = state.family, state.type, state.protocol
        # given up first: if a signal handler raises in between, nobody closes the descriptor twice
        sock = standard_socket(self.detach(), family, type, protocol)
        timeout = self.gettimeout()
        if sock.gettimeout() != timeout:  # it began with socket.getdefaulttimeout(), as the connection did
            sock.settimeout(timeout)
        return sock

    @property
    def closed(self):
        """Whether close(), detach() or socket() was called."""
        with cython.critical_section(self):
            return self.closing or self.fd == PORT_NO_SOCKET

    def fileno(self):
        """The descriptor as an int, -1 when closed."""
        with cython.critical_section(self):
            return -1 if self.fd == PORT_NO_SOCKET else self.fd

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        if self.closed:
            return "<fastlisten.Connection [closed]>"
        return f"<fastlisten.Connection fd={self.fileno()} peer={self.peer!r}>"

    # --- addresses and options ---------------------------------------------------------------------

    @property
    def peer(self):
        """The client's address as socket.accept() gives it, also after close.

        (host, port) for IPv4, (host, port, flowinfo, scope_id) for IPv6, the path or '' for unix sockets.
        Of one that came by a proxy it is what the proxy's header says, see `proxy`; getpeername() gives the
        proxy's.
        """
        cdef const void *place = self.address.bytes
        cdef int length = self.address_length
        if length > SHORT_ADDRESS:
            place = self.address.heap
        if length == ORIGIN:
            return peer_of(<const origin_t *>place, header_of(<const origin_t *>place))
        return address_object(<const port_address *>place, length)

    @property
    def proxy(self):
        """The ProxyHeader by which a trusted proxy has said whose connection this is; None without one.

        With serve(proxy=...).  Each time it is made anew.
        """
        if self.address_length != ORIGIN:
            return None
        return header_of(<const origin_t *>self.address.heap)

    cdef object ask(self, str method, tuple arguments):
        """Call a method of the standard library's socket on our descriptor: what is not worth a second
        implementation.  No Python code runs while two objects have the descriptor."""
        if self.fd == PORT_NO_SOCKET:
            port_raise(PORT_CLOSED)
        sock = _CSocket(self.state.family, self.state.type, self.state.protocol, self.fd)
        try:
            sock.settimeout(self.gettimeout())
            result = getattr(sock, method)(*arguments)
            timeout = sock.gettimeout()
            self.timeout = -1 if timeout is None else timeout
            return result
        finally:
            sock.detach()

    def getpeername(self):
        """The other end's address, asked of the kernel; OSError (ENOTCONN) when it is gone."""
        return self.ask("getpeername", ())

    def getsockname(self):
        """Our own address, asked of the kernel."""
        return self.ask("getsockname", ())

    def getsockopt(self, level, optname, *buflen):
        """As socket.getsockopt()."""
        return self.ask("getsockopt", (level, optname, *buflen))

    def setsockopt(self, level, optname, *value):
        """As socket.setsockopt()."""
        self.ask("setsockopt", (level, optname, *value))

    def settimeout(self, value):
        """Set the time in seconds a call may take: None waits without end, 0 never waits."""
        self.ask("settimeout", (value,))

    def gettimeout(self):
        """The timeout in seconds; None when calls wait without end."""
        return None if self.timeout < 0 else self.timeout

    def setblocking(self, flag):
        """settimeout(None) for a true flag, settimeout(0.0) for a false one."""
        self.ask("setblocking", (flag,))  # what counts as a flag differs between versions of Python

    # --- the exchange ------------------------------------------------------------------------------

    cdef int wait(self, short events, int64_t *deadline) except -1:
        """Wait until the call is worth another try, or the timeout is over: TimeoutError('timed out')."""
        if deadline[0] == 0:
            deadline[0] = port_now() + <int64_t>(self.timeout * 1e9)
        return wait_ready(self.fd, events, deadline[0])

    cdef Py_ssize_t receive(self, char *buffer, Py_ssize_t length, int flags) except -1:
        cdef Py_ssize_t got
        cdef int code
        cdef int64_t deadline = 0
        while True:
            with nogil:
                got = port_recv(self.fd, buffer, length, flags)
                code = port_error() if got < 0 else 0
            if got >= 0:
                return got
            if code == PORT_EINTR:
                PyErr_CheckSignals()
            elif self.timeout > 0 and port_would_block(code):
                self.wait(POLLIN, &deadline)
            elif port_says_cut(code) and port_get(&self.was_cut):
                return 0  # as everywhere else: no more comes
            else:
                port_raise(code)

    cdef Py_ssize_t transmit(
            self, const char *buffer, Py_ssize_t length, int flags, int64_t *deadline) except -1:
        cdef Py_ssize_t sent
        cdef int code
        while True:
            with nogil:
                sent = port_send(self.fd, buffer, length, flags)
                code = port_error() if sent < 0 else 0
            if sent >= 0:
                return sent
            if code == PORT_EINTR:
                PyErr_CheckSignals()
            elif self.timeout > 0 and port_would_block(code):
                self.wait(POLLOUT, deadline)
            else:
                port_raise(code)

    def recv(self, Py_ssize_t bufsize, flags=0, /):
        """Receive up to `bufsize` bytes; returns them, b'' when the client has sent all it will.

        flags: an int of socket.MSG_*; recv(2).  Waits as the timeout says.  Raises TimeoutError when nothing
        came in time, BlockingIOError when it may not wait, OSError otherwise (ConnectionResetError).
        """
        cdef char stack[STACK_BUFFER]
        cdef Py_ssize_t got
        cdef int options = whole(flags)
        if bufsize < 0:
            raise ValueError("negative buffersize in recv")
        if bufsize <= STACK_BUFFER:
            got = self.receive(stack, bufsize, options)
            return PyBytes_FromStringAndSize(stack, got)
        data = PyBytes_FromStringAndSize(NULL, bufsize)
        got = self.receive(PyBytes_AS_STRING(data), bufsize, options)
        return data if got == bufsize else data[:got]

    def recv_into(self, buffer, Py_ssize_t nbytes=0, flags=0):
        """Receive into a writable buffer, at most `nbytes` (0: its size); returns how many bytes came.

        flags, waits and raises as recv().
        """
        cdef Py_buffer view
        cdef int options
        writable(buffer, &view)
        try:
            options = whole(flags)
            if nbytes < 0:
                raise ValueError("negative buffersize in recv_into")
            if nbytes > view.len:
                raise ValueError("buffer too small for requested bytes")
            return self.receive(<char *>view.buf, nbytes or view.len, options)
        finally:
            PyBuffer_Release(&view)

    def send(self, data, flags=0, /):
        """Send what the kernel takes of `data`, a bytes-like object; returns how many bytes that was.

        flags: an int of socket.MSG_*; send(2).  Raises TimeoutError when the kernel took nothing in time,
        BlockingIOError when it may not wait, OSError otherwise (BrokenPipeError, ConnectionResetError).
        """
        cdef Py_buffer view
        cdef int64_t deadline = 0
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            return self.transmit(<const char *>view.buf, view.len, whole(flags), &deadline)
        finally:
            PyBuffer_Release(&view)

    def sendall(self, data, flags=0, /):
        """Send all of `data`, a bytes-like object; the timeout is for the whole.

        flags and raises as send().  After an error nobody knows how much went.
        """
        cdef Py_buffer view
        cdef Py_ssize_t sent = 0
        cdef int64_t deadline = 0
        cdef int options
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            options = whole(flags)
            while True:
                sent += self.transmit(<const char *>view.buf + sent, view.len - sent, options, &deadline)
                if sent >= view.len:
                    return
                PyErr_CheckSignals()
        finally:
            PyBuffer_Release(&view)

    def sendmsg(self, buffers, *args):
        """As socket.sendmsg(): gathered buffers, ancillary data, flags; returns how many bytes went."""
        return self.ask("sendmsg", (buffers, *args))

    def sendfile(self, file, offset=0, count=None):
        """As socket.sendfile(): send a file opened in binary mode; returns how many bytes went."""
        if self.fd == PORT_NO_SOCKET:
            port_raise(PORT_CLOSED)
        # that method is Python code, which a signal handler may leave at any point: give it a copy to close
        with _StandardSocket(self.state.family, self.state.type, self.state.protocol,
                             fileno=_duplicate(self.fd)) as sock:
            sock.settimeout(self.gettimeout())
            return sock.sendfile(file, offset, count)

    def shutdown(self, how, /):
        """End one direction or both: socket.SHUT_RD, SHUT_WR, SHUT_RDWR; shutdown(2).

        Raises OSError (ENOTCONN) when the client is gone.
        """
        cdef int failed, way
        cdef int code = 0
        way = whole(how)
        with nogil:
            failed = port_shutdown(self.fd, way)
            if failed:
                code = port_error()
        if failed:
            port_raise(code)

    def makefile(self, mode="r", buffering=None, *, encoding=None, errors=None, newline=None):
        """A file on the connection, as socket.makefile(); the caller closes it."""
        return _StandardSocket.makefile(
            self, mode, buffering, encoding=encoding, errors=errors, newline=newline)
