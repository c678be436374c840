"""The one accept: what a failed one means, who is refused, and what a shortage of descriptors does."""

import _socket
from operator import index

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc, realloc

from fastlisten._core.standard import StandardSocket

from fastlisten._core.connection cimport (
    ORIGIN,
    Connection,
    address_object,
    forget_origin,
    new_connection,
    standard_socket,
    wait_ready,
)
from fastlisten._core.port cimport *
from fastlisten._core.state cimport (
    REFUSED_BUSY,
    State,
    accept_failed,
    client_dropped,
    client_given,
    client_handed,
    client_in,
    client_out,
    client_refused,
    log,
    port_socket,
    state_hold,
    state_t,
)

# For how many clients accept_many() has room before it asks for more memory.
cdef enum:
    FIRST_ROOM = 64

# How many clients are taken or lost in a row before the caller looks up, whether it is to stop for one.
cdef enum:
    ROUND = 64

# So many clients in a row that were lost before they were ours are no chance: accept() itself is refused, by
# a seccomp filter for one (EPERM), and trying on would spin.  A kernel's queue hardly ever holds as many.
cdef enum:
    LOST_IN_A_ROW = 4096

# The pause after accept() ran out of descriptors or memory: it grows from the first to the second.  A longer
# one would leave clients waiting after a descriptor came free; the retry itself costs nothing.
cdef int64_t FIRST_DELAY = 10_000_000  # nanoseconds
cdef int64_t LAST_DELAY = 100_000_000
cdef double LONGEST_DELAY = 1e9  # seconds; more do not fit

# How often the log is told at most that clients were dropped for want of memory, who were accepted.
cdef int64_t DROPS_EVERY = 60_000_000_000  # nanoseconds

# Whether SO_REUSEADDR means what it does on POSIX (a port in TIME_WAIT may be bound again); on Windows it
# would let another process steal the port.
REUSE_ADDRESS = bool(PORT_REUSE_ADDRESS)

cdef object _accept = StandardSocket.accept
cdef object _fileno = _socket.socket.fileno
cdef object _gettimeout = _socket.socket.gettimeout
cdef object _getdefaulttimeout = _socket.getdefaulttimeout


# --- What a failed accept means -----------------------------------------------------------------------------
# One table for every system.  A code it does not know is raised: an error nobody understood must not become
# a loop that spins.  accept(2), "Error handling"; Go's internal/poll and HAProxy's sock.c answer alike.

cdef verdict_t verdict(int code) noexcept nogil:
    if code in (PORT_EAGAIN, PORT_EWOULDBLOCK):
        return AGAIN
    if code in (PORT_EINTR, PORT_ECANCELED):
        return INTERRUPTED
    if code in (PORT_ECONNABORTED, PORT_EPROTO, PORT_ENOPROTOOPT, PORT_ENETDOWN, PORT_ENETUNREACH,
                PORT_EHOSTDOWN, PORT_EHOSTUNREACH, PORT_ENONET, PORT_EPERM, PORT_ETIMEDOUT, PORT_ENOSR,
                PORT_ESOCKTNOSUPPORT, PORT_EPROTONOSUPPORT, PORT_ECONNRESET, PORT_ENETNAME_DELETED,
                PORT_ENOTCONN):
        return LOST
    if code in (PORT_EMFILE, PORT_ENFILE, PORT_ENOBUFS, PORT_ENOMEM):
        return RESOURCES
    if code in (PORT_EBADF, PORT_EINVAL, PORT_ENOTSOCK):
        return CLOSED
    return UNKNOWN


# --- Accepting ----------------------------------------------------------------------------------------------
# Everything that takes clients comes through here: the accept itself is in accept_one(), and so is counting.

cdef verdict_t accept_one(source_t *source, client_t *client) noexcept nogil:
    """Take who is queued first; source.code says why that failed."""
    cdef verdict_t answer
    cdef port_socket fd = port_accept(source.fd, &client.address, &client.length, source.nonblocking)
    if fd != PORT_NO_SOCKET:
        source.proven = True
        source.lost = 0
        client.state = source.state
        client_in(source.state, source.fd, fd)
        client.fd = fd
        return ACCEPTED
    source.code = port_error()
    answer = verdict(source.code)
    if answer == LOST or answer == RESOURCES:
        accept_failed(source.state, source.code)
    if answer == LOST:
        source.lost += 1
    elif answer == AGAIN:
        source.lost = 0
    return answer


cdef verdict_t accept_batch(source_t *source, client_t *clients, int most, int *taken) noexcept nogil:
    """Take up to `most` clients that are queued; ACCEPTED when it was as many, else why it was not.

    Who was lost before it was ours is passed over: LOST only asks to look up and come back.  Lost clients
    without end are a shortage.
    """
    cdef verdict_t answer = ACCEPTED
    taken[0] = 0
    while taken[0] < most:
        answer = accept_one(source, &clients[taken[0]])
        if answer == ACCEPTED:
            taken[0] += 1
        elif answer == LOST:
            if source.lost >= LOST_IN_A_ROW:
                return RESOURCES
            if source.lost % ROUND == 0:
                return LOST
        else:
            return answer
    return ACCEPTED


cdef void count_refused(client_t *client, int reason) noexcept nogil:
    """Count a client that is refused, which is not closed yet; behind a proxy its address is not at hand."""
    cdef const port_address *address = &client.address if 0 < client.length < ORIGIN else NULL
    client_refused(client.state, client.fd, address, reason)


cdef void refuse(client_t *client, const char *text, Py_ssize_t length, int reason) noexcept nogil:
    """Tell a client that it is refused, and close; reason: REFUSED_BUSY, or of REFUSALS.

    With no text it gets a reset.  With one, what it has sent is read first: closing over unread bytes would
    reset the connection and could take the text away (RFC 1122, 4.2.2.13).  It gets a reset, too, when that
    could block.  No other result matters: nobody is left to tell of a failure.
    """
    cdef char scrap[4096]
    cdef int rounds = 16  # a bound: a client that never stops talking is cut off
    cdef port_socket fd = client.fd
    count_refused(client, reason)
    if length > 0 and port_set_nonblocking(fd, 1) == 0:
        port_no_sigpipe(fd)
        # what a fresh buffer does not take is not sent
        port_send(fd, text, length, PORT_NO_SIGPIPE | PORT_MORE)
        port_shutdown(fd, PORT_SHUT_WRITE)
        while rounds > 0 and port_recv(fd, scrap, sizeof(scrap), 0) > 0:
            rounds -= 1
    else:
        port_abort_on_close(fd)
    close_client(client)


cdef void close_origin(client_t *client) noexcept nogil:
    """Free what is in place of a client's address, if there is such: no Connection gets it."""
    forget_origin(&client.address, client.length)
    client.length = 0


cdef void close_client(client_t *client) noexcept nogil:
    """Close a client that gets no Connection."""
    port_close(client.fd)
    close_origin(client)


cdef void turn_away(client_t *client, int reason) noexcept nogil:
    """Close a client that has no business here, and count why."""
    count_refused(client, reason)
    close_client(client)


cdef void drop(client_t *client) noexcept nogil:
    """Close a client that nobody gets any more."""
    client_dropped(client.state, client.fd)
    close_client(client)


cdef void drop_handed(client_t *client) noexcept nogil:
    """Close a client that was handed out and gets no Connection."""
    close_client(client)
    client.fd = PORT_NO_SOCKET
    state_hold(client.state)
    client_out(client.state)


cdef int poll_failed(int code) noexcept nogil:
    """A poll() has failed with this code: 0 when it is to be tried again, else the code.

    Without memory it fails at once, and is tried again after a pause in which nobody is heard.
    """
    if code == PORT_EINTR:
        return 0
    if verdict(code) in (AGAIN, RESOURCES):
        port_sleep(<int>(FIRST_DELAY // 1_000_000))
        return 0
    return code


cdef int set_nonblocking(port_socket fd, state_t *state) except -1:
    """Make a listener's description non-blocking: between our look at the queue and our accept another
    process may take the client.  accept() copes, and a blocking listener goes on looking like one."""
    if not port_get(&state.made_nonblocking):
        port_swap(&state.made_nonblocking, 1)
    if port_set_nonblocking(fd, 1) != 0:
        port_raise(port_error())
    return 0


def share_nonblocking(port_socket fd, State state not None):
    """Make a listener's description non-blocking, as whoever accepts without waiting needs it."""
    set_nonblocking(fd, state.at)


cdef double default_timeout() except? -2:
    """socket.getdefaulttimeout(), as Connection keeps it: < 0 for None."""
    timeout = _getdefaulttimeout()
    return -1 if timeout is None else timeout


cdef object error_of(int code):
    """The OSError of a code, for the log."""
    try:
        port_raise(code)
    except OSError as error:
        return error


cdef int tell_of(str event, str text, int code) except -1:
    """Warn in the log, with the error of a code in the text."""
    error = error_of(code)
    log().warning(text, error, extra={"event": event, "reason": str(error)})
    return 0


# --- No descriptors or memory -------------------------------------------------------------------------------

@cython.final
cdef class Shortage:
    """Accept ran out of descriptors or memory, or lost clients without end: pause, or shed, and say so.

    exhausted: "pause"; "shed" to refuse clients through a descriptor kept for that; or a
    callable(exception, attempt) that returns the seconds to pause.  busy: what refused clients are told,
    b"" for a reset.

    Each pause is twice as long as the one before; a connection of ours that closes cuts it short, by waking
    who waits (State.wake_on_close).  The log gets a WARNING when it begins and an INFO when it ends.  What
    runs without the GIL only notes what is to be told; tell() tells it.
    """

    def __cinit__(self, exhausted="pause", bytes busy not None=b""):
        self.spare = PORT_NO_SOCKET
        self.shed = exhausted == "shed"
        self.ask = exhausted if callable(exhausted) else None
        self.busy = busy
        self.text, self.length = busy, len(busy)

    def __dealloc__(self):
        self.close()

    cdef int open(self) except -1:
        """Make what could not be made in a shortage: the spare descriptor, and the logger."""
        log()
        if self.shed and self.spare == PORT_NO_SOCKET:
            self.spare = port_spare()
            if self.spare == PORT_NO_SOCKET:
                port_raise(port_error())
        return 0

    cdef void close(self) noexcept nogil:
        if self.spare != PORT_NO_SOCKET:
            port_close(self.spare)
            self.spare = PORT_NO_SOCKET

    cdef void failed(self, int code) noexcept nogil:
        """An accept failed for want of resources; pause() or shed_queued() follows."""
        if self.failures == 0:
            self.began = port_now()
            port_swap(&self.until, self.began)
            port_swap(&self.code, code)
            port_swap(&self.to_tell_beginning, 1)
        if self.failures == 0 or self.eased:
            self.delay = FIRST_DELAY
        self.failures += 1
        self.eased = 0
        port_swap(&self.to_tell, 1)

    cdef void dropped(self, int code) noexcept nogil:
        """A client that was accepted could not be kept, and was dropped: that does not pause the others."""
        cdef int64_t now = port_now()
        if self.drops_told == 0 or now - self.drops_told >= DROPS_EVERY:
            self.drops_told = now
            port_swap(&self.drop_code, code)
            port_swap(&self.to_tell, 1)

    cdef void poller_failed(self, int code) noexcept nogil:
        """Those who were watched by a poller are polled from now on."""
        port_swap(&self.poller_code, code)
        port_swap(&self.to_tell, 1)

    cdef void pause(self) noexcept nogil:
        """Accept nobody for longer than the last time, or until tell() has asked for how long."""
        cdef int64_t until = port_now() + self.delay
        port_swap(&self.until, until)
        port_swap(&self.retry_at, until if self.ask is None else -self.failures)
        self.delay = min(2 * self.delay, LAST_DELAY)

    cdef bint worked(self, int accepted, bint caught_up) noexcept nogil:
        """So many accepts worked again, or the last found nobody more; whether the shortage is over.

        It is when all who were queued are in, or a whole round of them: with the last free descriptor in use
        again after each client it would begin and end without end.
        """
        self.eased += accepted
        if not caught_up and self.eased < ROUND:
            return False
        port_swap(&self.lasted, min(port_now(), port_get(&self.until)) - self.began)
        port_swap(&self.failed_tries, self.failures)
        self.failures = self.eased = 0
        port_swap(&self.to_tell_end, 1)
        port_swap(&self.to_tell, 1)
        return True

    cdef int64_t left(self) noexcept nogil:
        """For how many ns nobody is to be accepted; 0: go on."""
        cdef int64_t retry_at = port_get(&self.retry_at)
        if retry_at < 0:
            return FIRST_DELAY  # whoever has to ask may be long in getting the GIL
        return max(retry_at - port_now(), 0) if retry_at else 0

    cdef void cut_short(self) noexcept nogil:
        """A descriptor may have come free."""
        port_swap(&self.retry_at, 0)

    cdef void retake_spare(self) noexcept nogil:
        """A stranger had taken it: what comes free is the spare first."""
        if self.shed and self.spare == PORT_NO_SOCKET:
            self.spare = port_spare()

    cdef bint shed_queued(self, source_t *sources, int count) noexcept nogil:
        """Refuse who is queued, through the descriptor kept for that; False if that cannot be done now."""
        cdef client_t client
        cdef verdict_t answer
        cdef int i
        if self.spare == PORT_NO_SOCKET:
            return False
        for i in range(count):
            for _ in range(ROUND):
                if port_get(&sources[i].gone):
                    break
                port_close(self.spare)
                answer = accept_one(&sources[i], &client)
                if answer == ACCEPTED:
                    refuse(&client, self.text, self.length, REFUSED_BUSY)
                self.spare = port_spare()
                port_swap(&self.until, port_now())
                if (self.spare == PORT_NO_SOCKET or answer == RESOURCES
                        or sources[i].lost >= LOST_IN_A_ROW):
                    return False  # the whole system has run out: one descriptor of ours does not help
                if answer != ACCEPTED:
                    break
        return True

    cdef int tell(self) except -1:
        """Log the beginning and the end; ask `exhausted` how long to pause."""
        cdef int64_t asked, retry_at, code
        if not port_swap(&self.to_tell, 0):
            return 0
        if self.also is not None:
            self.also.tell()
        code = port_swap(&self.drop_code, 0)
        if code:
            tell_of("dropped", "a client was dropped before a handler had it: %s", <int>code)
        code = port_swap(&self.poller_code, 0)
        if code:
            tell_of("poller failed",
                    "the poller failed, clients that have to speak first are polled every 10 ms: %s",
                    <int>code)
        code = port_get(&self.code)
        if code == 0:
            return 0  # there was no shortage yet
        error = error_of(<int>code)
        if port_swap(&self.to_tell_beginning, 0):
            tell_of("accepting pauses", "accepting pauses: %s", <int>code)
        asked = port_get(&self.retry_at)
        if asked < 0:
            seconds = self.ask(error, -asked)
            if not seconds >= 0:
                raise ValueError(f"exhausted must return seconds, at least 0, not {seconds!r}")
            retry_at = port_now() + <int64_t>(min(<double>seconds, LONGEST_DELAY) * 1e9)
            if port_replace(&self.retry_at, asked, retry_at):  # else a descriptor has come free meanwhile
                port_swap(&self.until, retry_at)
        if port_swap(&self.to_tell_end, 0):
            seconds, tries = port_get(&self.lasted) / 1e9, port_get(&self.failed_tries)
            log().info("accepting again after %.3f s and %d failed tries", seconds, tries,
                       extra={"event": "accepting again", "seconds": seconds, "tries": tries})
        return 0

    cdef int tell_rest(self) except -1:
        """Nobody is accepted any more: log what waits for its time, too."""
        self.tell()
        if self.also is not None:
            self.also.tell(True)
        return 0

    # For a loop that accepts by the standard library's accept(), in Python.

    def pause_after(self, error):
        """Take note of an accept that failed so; returns the seconds to pause, None if it was no shortage."""
        code = getattr(error, "winerror", None) or error.errno
        if code is None or verdict(code) != RESOURCES:
            return None
        self.failed(code)
        self.pause()
        self.tell()
        return self.left() / 1e9

    def over(self):
        """An accept worked."""
        if self.failures:
            self.worked(1, True)
            self.tell()


# --- A listener's own methods -------------------------------------------------------------------------------

cdef bint readable(port_socket fd) noexcept nogil:
    """Whether somebody is queued, or something is wrong with the listener."""
    cdef port_pollfd poll
    poll.fd = fd
    poll.events = POLLIN
    return port_poll_ns(&poll, 1, 0) != 0


cdef int wait_and_accept(listener, source_t *source, client_t *client) except -1:
    """Take one client, waited for as the listener's timeout says."""
    cdef int64_t deadline = 0
    cdef verdict_t answer
    cdef bint ready = False
    while True:
        source.fd = _fileno(listener)
        with nogil:
            answer = accept_one(source, client)
        if answer == ACCEPTED:
            return 0
        if answer == INTERRUPTED:
            PyErr_CheckSignals()
            continue
        timeout = _gettimeout(listener)
        if timeout == 0 or source.fd == PORT_NO_SOCKET:
            port_raise(source.code)
        # Under a timeout socket.accept() waits before it tries.  Our try came first, and what is wrong with
        # the listener or with us may be told only when somebody is there; unless this very client was lost.
        if answer != AGAIN and (timeout is None or ready or answer == LOST or readable(source.fd)):
            port_raise(source.code)
        # A blocking listener gets here when serve(), accept_many() or another process has made the
        # description non-blocking, which all its descriptors share: fcntl(2), F_SETFL.
        if timeout is not None and deadline == 0:
            deadline = port_now() + <int64_t>(<double>timeout * 1e9)
        ready = wait_ready(source.fd, POLLIN, deadline)


cdef source_t source_of(State state, double timeout) noexcept:
    cdef source_t source
    source.fd = PORT_NO_SOCKET
    source.gone = 0
    source.state = state.at
    source.nonblocking = timeout >= 0
    source.code = source.lost = 0
    source.proven = False
    return source


def accept(self):
    """accept() -> (socket.socket, address), as socket.socket.accept(): the same results and errors.

    Waits as the timeout says.  The socket is blocking unless socket.setdefaulttimeout() says otherwise, is
    not inheritable, and is the caller's to close.  accept(2).
    """
    cdef State state = self._state
    cdef state_t *at = state.at
    cdef client_t client
    # accept4() makes it blocking; with a default timeout socket.socket() makes it non-blocking itself
    cdef source_t source = source_of(state, -1)
    if at.family not in (AF_INET, AF_INET6, AF_UNIX):
        return _accept(self)  # an address family this module has no text for
    wait_and_accept(self, &source, &client)
    client_given(at, client.fd)
    sock = standard_socket(client.fd, at.family, at.type, at.protocol)
    return sock, address_object(&client.address, client.length)


def accept_many(self, limit=64):
    """Accept up to `limit` clients that are queued; returns their Connections, at least one.

    Waits for the first as accept() does: without end, TimeoutError after the timeout, BlockingIOError when
    the listener is non-blocking and nobody is queued.  An error after the first client is left for the
    next call.  The caller closes the Connections.
    """
    cdef client_t *clients
    cdef client_t *more
    cdef double timeout = default_timeout()
    cdef source_t source = source_of(self._state, timeout)
    cdef int most = index(limit)
    cdef int i, room, got
    cdef int taken = 1
    cdef int made = 0
    if most < 1:
        raise ValueError(f"limit must be at least 1, not {most}")
    room = min(most, <int>FIRST_ROOM)
    clients = <client_t *>malloc(room * sizeof(client_t))
    if clients is NULL:
        raise MemoryError
    try:
        set_nonblocking(_fileno(self), source.state)
        wait_and_accept(self, &source, &clients[0])
        with nogil:
            while accept_batch(&source, &clients[taken], room - taken, &got) == ACCEPTED and room < most:
                taken += got
                got = 0
                more = <client_t *>realloc(clients, min(2 * room, most) * sizeof(client_t))
                if more is NULL:
                    break  # the others stay queued
                clients = more
                room = min(2 * room, most)
            taken += got
        connections = []
        try:
            while made < taken:
                connections.append(connection_of(&clients[made], timeout))
                made += 1
        except BaseException:
            for i in range(made + 1, taken):
                drop(&clients[i])
            raise
        return connections
    finally:
        free(clients)


def accept_now(self):
    """The client that is queued first, as a non-blocking Connection of the caller's; None if nobody is.

    Raises OSError as accept(); a client that was lost before it was ours is counted and passed over, unless
    they have no end.
    """
    cdef client_t client
    cdef int taken
    cdef source_t source = source_of(self._state, 0)
    cdef verdict_t answer = LOST
    source.fd = _fileno(self)
    set_nonblocking(source.fd, source.state)
    while answer == LOST:
        answer = accept_batch(&source, &client, 1, &taken)
    if answer == ACCEPTED:
        return connection_of(&client, 0)
    if answer not in (AGAIN, INTERRUPTED):
        port_raise(source.code)
    return None


def connection_on(sock):
    """A client's connection that another program has accepted, as a Connection of the caller's.

    sock: a connected socket.socket, whose descriptor and timeout the Connection has from now on; closed when
    that fails.  One that its client has reset meanwhile has no peer.
    """
    cdef client_t client
    cdef State state
    cdef double timeout = -1 if sock.gettimeout() is None else sock.gettimeout()
    try:
        state = State(sock)
        if port_peer(<port_socket>sock.fileno(), &client.address, &client.length) != 0:
            client.length = 0
    except BaseException:
        sock.close()
        raise
    client.state = state.at
    client.fd = sock.detach()
    client_in(client.state, PORT_NO_SOCKET, client.fd)
    return connection_of(&client, timeout)


cdef object connection_of(client_t *client, double timeout):
    """Its Connection, handed out; the client is dropped when that cannot be made."""
    cdef Connection connection = None
    try:
        connection = new_connection(client.fd, &client.address, client.length, client.state, timeout)
    finally:
        if connection is None:  # `except` would save the exception that the caller handles, for each client
            drop(client)
    client_handed(client.state, client.fd)
    return connection
