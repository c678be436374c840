"""One accept at a time: what a failed accept means, the Listener's ledger, accept() and accept_many()."""

import errno
import socket as _socket
from operator import index

try:
    from _socket import socketpair  # not Python code, in which a signal's exception would leave descriptors
except ImportError:  # Windows
    from socket import socketpair

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free, malloc, realloc

from fastlisten._connection cimport (
    CODES,
    address_object,
    ledger_disarm,
    ledger_release,
    ledger_ring,
    ledger_t,
    new_connection,
    raise_error,
    wait_ready,
    standard_socket,
)
from fastlisten._core.port cimport *

# For how many clients accept_many() has room before it asks for more memory.
cdef enum:
    FIRST_ROOM = 64

# Whether SO_REUSEADDR means what it does on POSIX (a port in TIME_WAIT may be bound again); on Windows it
# would let another process steal the port.
REUSE_ADDRESS = bool(PORT_REUSE_ADDRESS)

cdef object _accept = _socket.socket.accept
cdef object _fileno = _socket.socket.fileno
cdef object _gettimeout = _socket.socket.gettimeout
cdef object _getdefaulttimeout = _socket.getdefaulttimeout


# --- What a failed accept means -----------------------------------------------------------------------------
# One table for every system.  A code it does not know is raised: an error nobody understood must not become
# a loop that spins.  accept(2), "Error handling"; Go's internal/poll and HAProxy's sock.c answer alike.

cdef verdict_t verdict(int code) noexcept nogil:
    if code in (PORT_EAGAIN, PORT_EWOULDBLOCK):
        return AGAIN
    if code == PORT_EINTR:
        return INTERRUPTED
    if code in (PORT_ECONNABORTED, PORT_EPROTO, PORT_ENOPROTOOPT, PORT_ENETDOWN, PORT_ENETUNREACH,
                PORT_EHOSTDOWN, PORT_EHOSTUNREACH, PORT_ENONET, PORT_EPERM, PORT_ETIMEDOUT, PORT_ENOSR,
                PORT_ESOCKTNOSUPPORT, PORT_EPROTONOSUPPORT, PORT_ECONNRESET, PORT_ENETNAME_DELETED,
                PORT_ENOTCONN):
        return CONNECTION
    if code in (PORT_EMFILE, PORT_ENFILE, PORT_ENOBUFS, PORT_ENOMEM):
        return RESOURCES
    if code in (PORT_EBADF, PORT_EINVAL, PORT_ENOTSOCK):
        return CLOSED
    return UNKNOWN


# --- The Listener's ledger ----------------------------------------------------------------------------------

@cython.final
cdef class Ledger:
    """What a Listener shares with its loop and its Connections: counters, requests, and a wake-up.

    family, type, protocol: the listener's, as plain ints.
    """

    def __cinit__(self, int family, int type, int protocol):
        self.at = <ledger_t *>calloc(1, sizeof(ledger_t))
        if self.at is NULL:
            raise MemoryError
        self.at.holders = 1
        self.at.family = family
        self.at.type = type
        self.at.protocol = protocol

    def __dealloc__(self):
        if self.at is not NULL:
            ledger_release(self.at)

    def arm(self):
        """Make the wake-up; disarm() closes it."""
        if not port_get(&self.at.armed):
            self.at.wake[0], self.at.wake[1] = wake_pair()
            port_swap(&self.at.armed, 1)

    def disarm(self):
        """Close the wake-up; nobody may poll it any more."""
        ledger_disarm(self.at)

    def ring(self):
        """Wake up whoever waits for the wake-up."""
        ledger_ring(self.at)

    def after_fork(self):
        """In the child: whoever was ringing is not here."""
        self.at.ringing = 0

    def stop(self, drain):
        """Ask the loop to end; `drain` as Listener.stop() says.  Takes no lock: signal handlers call it."""
        cdef int64_t deadline = 0
        if drain is not None:
            deadline = port_now() + <int64_t>(min(<double>drain, 1e9) * 1e9)
            if self.at.deadline == 0 or deadline < self.at.deadline:
                port_swap(&self.at.deadline, deadline)
            if not port_get(&self.at.stopping) and drain > 0:
                port_swap(&self.at.draining, 1)
            elif drain == 0:
                port_swap(&self.at.draining, 0)
        port_swap(&self.at.stopping, 1)
        ledger_ring(self.at)

    def answered(self):
        """The stop was carried out: another serve() may follow."""
        self.at.stopping = self.at.draining = self.at.deadline = 0

    @property
    def wake(self):
        """Both ends of the wake-up, or None while there is none."""
        return (self.at.wake[0], self.at.wake[1]) if port_get(&self.at.armed) else None

    @property
    def stopping(self):
        return bool(port_get(&self.at.stopping))

    @property
    def draining(self):
        """Whether stop() asked for a drain whose time is not over."""
        return bool(port_get(&self.at.draining)) and port_now() < port_get(&self.at.deadline)

    @property
    def paused(self):
        return bool(port_get(&self.at.paused))

    @paused.setter
    def paused(self, bint value):
        port_swap(&self.at.paused, value)
        ledger_ring(self.at)

    def counts(self):
        """accepted, handled, active, handler errors, refused, and failed accepts as {errno name: count}."""
        errors = {}
        for i in range(CODES):
            if self.at.counts[i]:
                name = errno.errorcode.get(self.at.codes[i], str(self.at.codes[i]))
                errors[name] = errors.get(name, 0) + self.at.counts[i]
        return (self.at.accepted, self.at.handled, port_get(&self.at.active),
                self.at.handler_errors, self.at.refused, errors)


cdef void count_error(ledger_t *ledger, int code) noexcept nogil:
    """Count a failed accept; only who may accept calls this, so there is one writer."""
    cdef int i = 0
    while i < CODES - 1 and ledger.counts[i] and ledger.codes[i] != code:
        i += 1
    ledger.codes[i] = code
    ledger.counts[i] += 1


def wake_pair():
    """Two connected sockets, non-blocking and not inheritable, as descriptors: ring one, poll the other."""
    a, b = socketpair()
    a.setblocking(False)
    b.setblocking(False)
    return a.detach(), b.detach()


def queue(port_socket fd):
    """How many clients the kernel has queued for this TCP listener and how many it would: (None, None) if
    the system does not tell."""
    cdef int depth, limit
    if port_queue(fd, &depth, &limit) != 0:
        return None, None
    return depth, limit


# --- One accept at a time -----------------------------------------------------------------------------------

cdef bint readable(port_socket fd) noexcept nogil:
    """Whether somebody is queued, or something is wrong with the listener."""
    cdef port_pollfd poll
    poll.fd = fd
    poll.events = POLLIN
    return port_poll_ns(&poll, 1, 0) != 0


cdef port_socket accept_one(
        listener, port_address *address, int *length, int nonblocking) except -1:
    """One client's descriptor, waited for as the listener's timeout says."""
    cdef port_socket fd, client
    cdef int64_t deadline = 0
    cdef int code
    cdef bint ready = False
    while True:
        fd = _fileno(listener)
        with nogil:
            client = port_accept(fd, address, length, nonblocking)
            code = port_error() if client == PORT_NO_SOCKET else 0
        if code == 0:
            return client
        if code == PORT_EINTR:
            PyErr_CheckSignals()
            continue
        timeout = _gettimeout(listener)
        if timeout == 0:
            raise_error(code)
        # Under a timeout socket.accept() waits before it tries.  Our try came first, and what is wrong with
        # the listener or with us may be told only when somebody is there; unless this very client was lost.
        if not port_would_block(code) and (
                timeout is None or ready or verdict(code) == CONNECTION or readable(fd)):
            raise_error(code)
        # A blocking listener gets here when serve(), accept_many() or another process has made the
        # description non-blocking, which all its descriptors share: fcntl(2), F_SETFL.
        if timeout is not None and deadline == 0:
            deadline = port_now() + <int64_t>(<double>timeout * 1e9)
        ready = wait_ready(fd, POLLIN, deadline)


def accept(self):
    """accept() -> (socket.socket, address), as socket.socket.accept(): the same results and errors.

    Waits as the timeout says.  The socket is blocking unless socket.setdefaulttimeout() says otherwise, is
    not inheritable, and is the caller's to close.  accept(2).
    """
    cdef Ledger ledger = self._ledger
    cdef port_address address
    cdef int length
    cdef port_socket client
    if ledger.at.family not in (AF_INET, AF_INET6, AF_UNIX):
        return _accept(self)  # an address family this module has no text for
    # accept4() makes it blocking; with a default timeout socket.socket() makes it non-blocking itself
    client = accept_one(self, &address, &length, 0)
    port_add(&ledger.at.accepted, 1)
    sock = standard_socket(client, ledger.at.family, ledger.at.type, ledger.at.protocol)
    return sock, address_object(&address, length)


def accept_many(self, limit=64):
    """Accept up to `limit` clients that are queued; returns their Connections, at least one.

    Waits for the first as accept() does: without end, TimeoutError after the timeout, BlockingIOError when
    the listener is non-blocking and nobody is queued.  An error after the first client is left for the
    next call.  The caller closes the Connections.
    """
    cdef Ledger ledger = self._ledger
    cdef ledger_t *at = ledger.at
    cdef client_t *clients
    cdef client_t *more
    cdef double timeout = default_timeout()
    cdef port_socket fd
    cdef int most = index(limit)
    cdef int i, room, taken = 1
    if most < 1:
        raise ValueError(f"limit must be at least 1, not {most}")
    room = min(most, <int>FIRST_ROOM)
    clients = <client_t *>malloc(room * sizeof(client_t))
    if clients is NULL:
        raise MemoryError
    try:
        share_nonblocking(self)
        clients[0].fd = accept_one(self, &clients[0].address, &clients[0].length, timeout >= 0)
        fd = _fileno(self)
        with nogil:
            while taken < most:
                if taken == room:
                    more = <client_t *>realloc(clients, 2 * room * sizeof(client_t))
                    if more is NULL:
                        break  # the others stay queued
                    clients = more
                    room *= 2
                if not take_client(fd, &clients[taken], timeout >= 0):
                    break
                taken += 1
        port_add(&at.accepted, taken)
        port_add(&at.active, taken)
        connections = []
        try:
            for i in range(taken):
                connections.append(
                    new_connection(clients[i].fd, &clients[i].address, clients[i].length, at, timeout))
        except BaseException:
            for i in range(len(connections), taken):
                port_close(clients[i].fd)
                port_add(&at.active, -1)
            raise
        return connections
    finally:
        free(clients)


def take(self):
    """The client that is queued first, as a non-blocking Connection of the caller's; None if nobody is.

    Raises OSError as accept(); a client that was lost before it was ours is counted and passed over, unless
    they have no end.
    """
    cdef Ledger ledger = self._ledger
    cdef client_t client
    cdef verdict_t answer
    cdef int code
    cdef int lost = 0
    share_nonblocking(self)
    while not take_client(_fileno(self), &client, 1):
        code = port_error()
        answer = verdict(code)
        if answer in (AGAIN, INTERRUPTED):
            return None
        if answer in (CONNECTION, RESOURCES):
            count_error(ledger.at, code)
        lost += 1
        if answer != CONNECTION or lost == LOST_IN_A_ROW:
            raise_error(code)
    port_add(&ledger.at.accepted, 1)
    port_add(&ledger.at.active, 1)
    try:
        return new_connection(client.fd, &client.address, client.length, ledger.at, 0)
    except BaseException:
        port_close(client.fd)
        port_add(&ledger.at.active, -1)
        raise


def ran_out(error):
    """Whether this OSError of an accept says that there are no descriptors or no memory."""
    code = getattr(error, "winerror", None) or error.errno
    return code is not None and verdict(code) == RESOURCES


def unring(port_socket fd):
    """Take the rings out of a wake-up's first end."""
    port_unring(fd)


cdef bint take_client(port_socket fd, client_t *client, int nonblocking) noexcept nogil:
    client.fd = port_accept(fd, &client.address, &client.length, nonblocking)
    return client.fd != PORT_NO_SOCKET


cdef int shed_client(
        port_socket fd, ledger_t *ledger, port_socket *spare,
        const char *text, Py_ssize_t length) noexcept nogil:
    """Refuse who is queued first, through a spare descriptor, which is retaken at once; 0, or why it failed.

    `spare` is PORT_NO_SOCKET after that when a stranger was faster.
    """
    cdef client_t client
    cdef int code = 0
    port_close(spare[0])
    if take_client(fd, &client, 1):
        port_add(&ledger.accepted, 1)
        port_add(&ledger.refused, 1)
        port_refuse(client.fd, text, length)
    else:
        code = port_error()
    spare[0] = port_spare()
    return code


cdef double default_timeout() except? -2:
    """socket.getdefaulttimeout(), as Connection keeps it: < 0 for None."""
    timeout = _getdefaulttimeout()
    return -1 if timeout is None else timeout


cpdef int share_nonblocking(listener) except -1:
    """Make the listener's description non-blocking: between our look at the queue and our accept another
    process may take the client.  accept() copes, and a blocking listener goes on looking like one."""
    if port_set_nonblocking(_fileno(listener), 1) != 0:
        raise_error(port_error())
    return 0
