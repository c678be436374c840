"""One state a listener: its counters, what it was asked, a waker, and who takes its clients."""

import errno
import os
from _thread import get_ident

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyObject_GetBuffer
from cpython.weakref cimport PyWeakref_NewRef
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from fastlisten._core.port cimport *
from fastlisten._core.probes cimport (
    probe_accept,
    probe_drain_begin,
    probe_drain_end,
    probe_drop,
    probe_hand_over,
    probe_refuse,
)

cdef object _dup2 = getattr(os, "dup2", None)


cdef object log():
    """The logger; imported late, since it costs as much to import as all the rest and most never log.

    A record says in `event`, of its `extra`, what it is about, and in others what its text says, too.
    """
    import logging
    return logging.getLogger("fastlisten")


# --- A waker ------------------------------------------------------------------------------------------------
# Two connected sockets: whoever waits polls one end, and anybody may write to the other, with the GIL or
# without, also from a signal handler.  A full pipe is a wake-up too.

cdef int pair_open(port_socket *ends) except -1:
    """port_pair(), raising OSError."""
    return 0 if port_pair(ends) == 0 else port_raise(port_error())


cdef int waker_open(waker_t *waker) except -1:
    """Make the two ends, non-blocking and not inheritable; nothing happens when it is open."""
    if port_get(&waker.open):
        return 0
    cdef port_socket ends[2]
    pair_open(ends)
    waker.reader, waker.writer = ends[0], ends[1]
    port_swap(&waker.broken, 0)
    port_swap(&waker.open, 1)
    return 0


cdef void waker_wake(waker_t *waker) noexcept nogil:
    """Wake whoever waits; nothing happens when it is closed.

    Without memory for one byte the stream is ended instead, which is heard, too; waker_drain() sees that.
    """
    port_add(&waker.waking, 1)
    if port_get(&waker.open):
        if port_send(waker.writer, "", 1, PORT_NO_SIGPIPE) < 0 and not port_would_block(port_error()):
            port_shutdown(waker.writer, PORT_SHUT_WRITE)
    port_add(&waker.waking, -1)


cdef void waker_drain(waker_t *waker) noexcept nogil:
    """Take out what was written; one poll stands for all of it."""
    cdef char scrap[64]
    cdef Py_ssize_t got = sizeof(scrap)
    while got == sizeof(scrap):
        got = port_recv(waker.reader, scrap, sizeof(scrap), 0)
        if got > 0:
            port_swap(&waker.told, 0)
    if got == 0 or got < 0 and not port_would_block(port_error()):
        port_swap(&waker.broken, 1)  # it would poll as ready for ever


cdef int waker_mend(waker_t *waker) except -1:
    """Make a broken one anew, for whoever waits for it; what was to be heard meanwhile, it looks for itself.

    Raises OSError when that cannot be done: then nobody can be woken any more.
    """
    if port_get(&waker.broken):
        waker_close(waker)
        waker_open(waker)
        if not port_swap(&waker.told, 1):
            log().warning("a wake-up failed, and the two sockets for it were made anew: nobody waits for it",
                          extra={"event": "wake-up failed"})
    return 0


cdef void waker_close(waker_t *waker) noexcept nogil:
    """Close both ends.  Nobody may poll it any more; whoever is waking it is let finish, for its number may
    be a stranger's the moment it is closed."""
    if port_swap(&waker.open, 0):
        while port_get(&waker.waking):
            pass
        port_close(waker.reader)
        port_close(waker.writer)


cdef int waker_renew(waker_t *waker) except -1:
    """In a forked child: have ends of its own under the same numbers, for its parent has these, too."""
    waker.waking = 0  # whoever was waking is not here
    if not port_get(&waker.open):
        return 0
    cdef port_socket ends[2]
    pair_open(ends)
    for new, old in ((ends[0], waker.reader), (ends[1], waker.writer)):
        _dup2(new, old, inheritable=False)
        port_close(new)
    return 0


# --- The counters, and who holds them -----------------------------------------------------------------------

cdef void state_hold(state_t *state) noexcept nogil:
    port_add(&state.holders, 1)


cdef void state_free(state_t *state) noexcept nogil:
    """Nobody holds it any more."""
    waker_close(&state.waker)
    if not state.shared:
        free(state)


cdef void client_in(state_t *state, port_socket listener, port_socket client) noexcept nogil:
    """A client was taken from the kernel; listener: -1 when another program has taken it."""
    probe_accept(listener, client)
    port_add(&state.accepted, 1)


cdef void client_handed(state_t *state, port_socket client) noexcept nogil:
    """It goes to a handler, or to whoever asked for it."""
    probe_hand_over(client)
    port_add(&state.handed, 1)


cdef void client_given(state_t *state, port_socket client) noexcept nogil:
    """It goes to the caller of accept(), who has it from now on."""
    client_handed(state, client)
    port_add(&state.handled, 1)


cdef void client_refused(
        state_t *state, port_socket client, const port_address *address, int reason) noexcept nogil:
    """It is closed for want of a place, REFUSED_BUSY, or for one of REFUSALS."""
    probe_refuse(client, reason, address)
    if reason != REFUSED_BUSY:
        port_add(&state.refusals[reason], 1)
    port_add(&state.refused, 1)


cdef void client_waits(state_t *state, int more) noexcept nogil:
    """So many more wait, or fewer, until they have sent what has to come first."""
    port_add(&state.waiting, more)


cdef void client_dropped(state_t *state, port_socket client) noexcept nogil:
    """It is closed before anybody got it."""
    probe_drop(client)
    port_add(&state.dropped, 1)


cdef void client_waited(state_t *state, int64_t nanoseconds) noexcept nogil:
    """It has waited so long for its handler."""
    cdef int i = 0
    while i < WAITS - 1 and nanoseconds > 1000 * WAIT_BOUNDS_US[i]:
        i += 1
    port_add(&state.waits[i], 1)
    port_add(&state.waited, nanoseconds)


cdef void handler_failed(state_t *state) noexcept nogil:
    """A handler, a factory or a protocol raised."""
    port_add(&state.handler_errors, 1)


cdef void accept_failed(state_t *state, int code) noexcept nogil:
    """Count a failed accept by its code; several threads may."""
    cdef int i = 0
    while i < CODES - 1 and port_get(&state.codes[i]) != code and not (
            port_replace(&state.codes[i], 0, code) or port_get(&state.codes[i]) == code):
        i += 1
    port_add(&state.counts[i], 1)


# The upper bounds by which waits for a handler are told apart: from what no client notices to what none waits
# for.
cdef extern from *:
    """
    static const int64_t WAIT_BOUNDS_US[] = {500, 1000, 2500, 5000, 10000, 25000, 50000, 100000, 250000,
        500000, 1000000, 2500000, 5000000, 10000000};
    """
    const int64_t[14] WAIT_BOUNDS_US

# The same in seconds.
WAIT_BOUNDS = tuple([WAIT_BOUNDS_US[i] / 1e6 for i in range(WAITS - 1)])


# Why a TLS handshake failed, in few enough words to watch each.
TLS_FAILURES = (
    "timeout",              # it was not through in time
    "closed",               # the client left, or a stop cut it
    "not TLS",              # what came was something else: plain HTTP, noise
    "version",              # there is no version of TLS in common
    "cipher",               # nor a cipher, a group or a signature algorithm
    "client certificate",   # one was asked for, and none came, or one that is not accepted
    "alert",                # the client refused, as one does that does not trust our certificate
    "other",
)


# Why a client was closed before a handler was asked, in few enough words to watch each.
REFUSALS = (
    "silent",       # it has sent nothing in time
    "left",         # it went before it had sent what had to come first
    "made way",     # it had sent nothing yet when there was no descriptor for another
    "no PROXY header",          # none came in time, or not all of it
    "invalid PROXY header",     # what came is none
    "untrusted",                # it is no proxy that is trusted, and only those may come
    "denied",                   # by admission=: a list has its address
    "not allowed",              # ... there is a list of others
    "penalised",                # ... a handler wants nothing from there for a while
    "concurrent",               # ... its source has too many connections
    "rate",                     # ... or too many in too short a time
)


cdef void tls_completed(state_t *state) noexcept nogil:
    """A TLS handshake is through."""
    port_add(&state.tls_handshakes, 1)


cdef int tls_failed(state_t *state, str reason) except -1:
    """A TLS handshake failed: count it by its reason."""
    port_add(&state.tls_failures[<int>TLS_FAILURES.index(reason)], 1)
    return 0


cdef int64_t connections_of(state_t *state) noexcept nogil:
    """Clients handed out whose connections are neither closed nor taken over."""
    cdef int64_t handled = port_get(&state.handled)
    return port_get(&state.handed) - handled


cdef dict counts_of(state_t *state):
    """What State.counts() says."""
    cdef int64_t handled = port_get(&state.handled)
    cdef int64_t refused = port_get(&state.refused)
    cdef int64_t dropped = port_get(&state.dropped)
    cdef int64_t waiting = port_get(&state.waiting)
    cdef int64_t handed = port_get(&state.handed)
    cdef int64_t accepted = port_get(&state.accepted)  # last: it grows first
    cdef int64_t code, count
    errors = {}
    for i in range(CODES):
        count = port_get(&state.counts[i])
        if count:
            code = port_get(&state.codes[i])
            name = errno.errorcode.get(code, str(code))
            errors[name] = errors.get(name, 0) + count
    return {
        "accepted": accepted,
        "handled": handled,
        "active": accepted - handled - refused - dropped,
        "handler_errors": port_get(&state.handler_errors),
        "accept_errors": errors,
        "refused": refused,
        "dropped": dropped,
        "waiting": waiting,
        "pending_connections": max(accepted - handed - refused - dropped - waiting, 0),
        "capacity": port_get(&state.capacity),
        "tls_handshakes": port_get(&state.tls_handshakes),
    }


cdef dict tls_failures_of(state_t *state):
    """What State.tls_failures() says."""
    return {TLS_FAILURES[i]: state.tls_failures[i] for i in range(TLS_REASONS) if state.tls_failures[i]}


cdef dict refused_for(state_t *state):
    """What State.refused_for() says."""
    cdef int64_t refused = port_get(&state.refused)
    found = {REFUSALS[i]: port_get(&state.refusals[i]) for i in range(REFUSED_REASONS)}
    found["busy"] = max(refused - sum(found.values()), 0)
    return {reason: count for reason, count in found.items() if count}


cdef tuple pending_times_of(state_t *state):
    """What State.pending_times() says."""
    return tuple([port_get(&state.waits[i]) for i in range(WAITS)]), port_get(&state.waited) / 1e9


# How many bytes a state takes in memory that processes share.
STATE_BYTES = sizeof(state_t)


cdef state_t *state_in(memory, Py_ssize_t offset, Py_buffer *buffer) except NULL:
    """The state that lies in memory which processes share.

    memory: an mmap; it is not unmapped before `buffer` is released.  offset: where pages begin that have
    nothing else in them, so that a forked child can have a copy.
    """
    if offset < 0 or offset + STATE_BYTES > len(memory):
        raise ValueError(f"no state can be at {offset} of {len(memory)} bytes")
    PyObject_GetBuffer(memory, buffer, PyBUF_WRITABLE)
    return <state_t *>(<char *>buffer.buf + offset)


# --- Who takes the clients ----------------------------------------------------------------------------------

cdef class Taker:
    """Who takes a listener's clients: a serve(), a server or a waiter of an event loop.

    One at a time does; State.take() says who.  `activity` begins the sentence that tells a second one why it
    may not.  The other methods are what the State tells its taker.
    """

    activity = "somebody takes the clients of"

    def stop(self, drain):
        """stop(drain) was called.  Any thread, and any signal handler, may be in here."""

    def bring_back(self):
        """Something was asked that no sleep in accept() may delay: a stop, or a pause."""

    def help(self, State state, sock):
        """Take the clients that are queued for `sock`, too, until nobody is there; they count in `state`."""

    def leave(self, State state):
        """The listener of this state is about to be closed or detached: touch its descriptor no more."""

    def stand_still(self, bint still):
        """A thread is about to fork: have no client of whom after_fork() does not know; or it has."""

    def after_fork(self):
        """In a child that was just forked: whether it goes on there."""
        return False

    def over(self):
        """Whether it takes nobody any more and could not say so: its event loop was closed or dropped."""
        return False

    def threads_now(self):
        """How many threads handle clients, and how many of them are idle."""
        return 0, 0


@cython.final
cdef class State:
    """What a listening socket shares with whoever takes its clients and with its Connections.

    sock: the socket.socket; its repr() is in what a second taker is told.  memory, offset: where it is to
    lie for another process to read, as state_in() says; without that it lies in memory of this process.
    """

    def __cinit__(self, sock, memory=None, Py_ssize_t offset=0):
        cdef Py_buffer buffer  # never released: a Connection may outlive everything else
        if memory is None:
            self.at = <state_t *>calloc(1, sizeof(state_t))
            if self.at is NULL:
                raise MemoryError
        else:
            self.at = state_in(memory, offset, &buffer)
            memset(self.at, 0, sizeof(state_t))
            self.at.shared = 1
        self.at.holders = 1
        self.at.family, self.at.type, self.at.protocol = int(sock.family), int(sock.type), sock.proto
        self.sock = PyWeakref_NewRef(sock, None)
        _states.add(PyWeakref_NewRef(self, _states.discard))

    def __dealloc__(self):
        if self.at is not NULL:
            state_release(self.at)

    # No Python code runs inside the critical sections of the next ones, and so no signal handler; nothing
    # comes between a look and what follows from it.  Without the GIL another thread may let a taker go
    # between a look at `current` and the hold on what it names; so that, too, is done inside one.

    cdef Taker taker_now(self):
        with cython.critical_section(self):
            return self.current

    @property
    def taker(self):
        """Who takes the clients; None: nobody."""
        return self.taker_now()

    def take(self, Taker taker not None):
        """Have `taker` take the clients from now on.

        Raises RuntimeError when somebody else does already, OSError (EBADF) after leave().
        """
        cdef Taker other = None
        cdef bint left
        self.taken_by()  # one that is over gives way
        with cython.critical_section(self):
            left = self.left
            if self.current is None and not left:
                self.current = taker
            other = self.current
        self.check(taker, other)
        if left:
            port_raise(PORT_CLOSED)
        if self.when_taken is not None:
            self.when_taken()

    def taken_by(self):
        """Who takes the clients now; None: nobody.  From one that is over they are taken away."""
        cdef Taker taker = self.taker_now()
        if taker is not None and taker.over():
            self.give_back(taker, True)  # a stop is still for the next
            taker = None
        return taker

    def check(self, Taker taker, Taker other):
        """RuntimeError when `other`, who takes the clients, is neither None nor this taker."""
        if other is not None and other is not taker:
            raise RuntimeError(f"{other.activity} {self.sock()!r}")

    def give_back(self, Taker taker not None, bint takes_again=False):
        """Undo take(), if it was this taker's.

        A stop is answered with it, so that another may follow.  takes_again: the taker will be back, and
        neither answers for now nor has the waker closed.
        """
        with cython.critical_section(self):
            if self.current is not taker:
                return
            if not takes_again:
                waker_close(&self.at.waker)
                port_swap(&self.at.capacity, 0)
            self.current = None
        if not takes_again and (port_get(&self.at.stopping) or port_get(&self.at.draining)):
            self.answered()
            self.emptied()

    def emptied(self):
        """After a stop nobody more is taken from the queue: tell, while handlers may still run and, once more
        perhaps, when the taker has ended."""
        if self.when_emptied is not None:
            self.when_emptied()

    def stop(self, drain):
        """Ask whoever takes the clients to end; `drain` as Listener.stop() says.  Takes no lock: signal
        handlers call it."""
        cdef int64_t deadline, before
        cdef Taker taker
        if drain is not None:
            deadline = port_now() + <int64_t>(min(<double>drain, 1e9) * 1e9)
            before = port_get(&self.at.deadline)
            if before == 0 or deadline < before:
                port_swap(&self.at.deadline, deadline)
            if not port_get(&self.at.stopping) and drain > 0:
                self.begin_drain(drain)
            elif drain == 0:
                self.end_drain()
        port_swap(&self.at.stopping, 1)
        waker_wake(&self.at.waker)
        taker = self.taker_now()
        if taker is not None:
            taker.bring_back()
            taker.stop(drain)

    def answered(self):
        """The stop was carried out: another taker may follow."""
        port_swap(&self.at.stopping, 0)
        self.end_drain()
        port_swap(&self.at.deadline, 0)

    cdef int begin_drain(self, double seconds) except -1:
        """Who is queued now is still taken, for at most so long."""
        if not port_swap(&self.at.draining, 1):
            probe_drain_begin(self.fd(), <int64_t>(min(seconds, 1e9) * 1e3))
        return 0

    cdef int end_drain(self) except -1:
        """Nobody more is taken; nothing happens when there is no drain."""
        if port_swap(&self.at.draining, 0):
            probe_drain_end(self.fd())
        return 0

    cdef port_socket fd(self):
        """The listener's descriptor; -1 when it is closed."""
        sock = self.sock()
        return PORT_NO_SOCKET if sock is None else sock.fileno()

    def leave(self):
        """The listener is about to be closed or detached: whoever takes its clients ends."""
        cdef Taker taker
        with cython.critical_section(self):
            self.left = True
            taker = self.current
        if taker is not None:
            taker.leave(self)
        if self.taker_now() is None:
            waker_close(&self.at.waker)

    def stand_still(self, bint still):
        """A thread is about to fork: have whoever takes the clients have none in hand; or it has."""
        cdef Taker taker = self.taker_now()
        if taker is not None:
            taker.stand_still(still)

    def after_fork(self):
        """In a child: have a waker of its own, and no taker that has no thread here."""
        cdef Taker taker = self.current
        if self.at.shared and port_unshare(self.at, sizeof(state_t)) != 0:
            port_raise(port_error())  # or what ends here would be counted there
        self.when_emptied = None  # the parent is told
        self.at.made_nonblocking = 0  # the parent did, and may need it
        waker_renew(&self.at.waker)
        while self.at.closing:  # by threads that are not here
            client_closing(self.at, -1)
            client_out(self.at)
        if taker is not None and not taker.after_fork():
            self.give_back(taker)

    def threads_now(self):
        """How many threads handle clients, and how many of them are idle."""
        cdef Taker taker = self.taker_now()
        return (0, 0) if taker is None else taker.threads_now()

    # The waker, for a taker that waits with an event loop.

    def open_waker(self):
        """Make the waker, if it is not there; returns the descriptor to poll."""
        waker_open(&self.at.waker)
        return self.at.waker.reader

    def drain_waker(self):
        """It was heard: have it poll as quiet again.  The descriptor to poll may be another then."""
        if port_get(&self.at.waker.open):
            waker_drain(&self.at.waker)
            waker_mend(&self.at.waker)

    def wake(self):
        """Wake whoever waits."""
        waker_wake(&self.at.waker)

    def wake_on_close(self, bint wake):
        """Have connections wake whoever waits when they close, or no longer."""
        port_swap(&self.at.wake_on_close, wake)

    @property
    def stopping(self):
        """Whether stop() was called and is not answered."""
        return bool(port_get(&self.at.stopping))

    @property
    def draining(self):
        """Whether stop() asked for a drain whose time is not over."""
        return bool(port_get(&self.at.draining)) and port_now() < port_get(&self.at.deadline)

    @property
    def paused(self):
        """Whether nobody is to be accepted."""
        return bool(port_get(&self.at.paused))

    @paused.setter
    def paused(self, bint value):
        cdef Taker taker = self.taker_now()
        port_swap(&self.at.paused, value)
        waker_wake(&self.at.waker)
        if taker is not None:
            taker.bring_back()

    @property
    def capacity(self):
        """How many clients may be with handlers, or wait for one, at a time: told by whoever takes them, for
        the first of its listeners; 0: that is not known."""
        return port_get(&self.at.capacity)

    @capacity.setter
    def capacity(self, int64_t value):
        port_swap(&self.at.capacity, value)

    @property
    def made_nonblocking(self):
        """Whether this process has made the listener's description non-blocking, which others may share."""
        return bool(port_get(&self.at.made_nonblocking))

    def counts(self):
        """The counters by name; what failed accepts is under `accept_errors`, as {errno name: count}."""
        return counts_of(self.at)

    def refused_for(self):
        """How many clients were refused, by reason: one of REFUSALS, or "busy"; those for which one was."""
        return refused_for(self.at)

    def pending_times(self):
        """How many clients have waited for a handler in a queue of ours, for each of WAIT_BOUNDS those that
        were let wait so long or less and longer than the bound before, then the rest; and how long all of
        them have, in seconds."""
        return pending_times_of(self.at)

    def tls_completed(self):
        """A TLS handshake is through: count it."""
        tls_completed(self.at)

    def tls_failed(self, str reason not None):
        """A TLS handshake failed for one of TLS_FAILURES: count it."""
        tls_failed(self.at, reason)

    def tls_failures(self):
        """How many TLS handshakes have failed, by reason; those for which one has."""
        return tls_failures_of(self.at)


cdef int take_all(Taker taker, tuple states) except -1:
    """Have the taker take all these; when one refuses, give_back_all() is still to come."""
    cdef State state
    for state in sorted(states, key=id):  # of two that want the same, one gets them all
        state.take(taker)
    return 0


cdef int give_back_all(Taker taker, tuple states) except -1:
    """Let others take those of them that the taker has taken."""
    cdef State state
    for state in states:
        state.give_back(taker)
    return 0


# --- Fork ---------------------------------------------------------------------------------------------------

_states = set()  # a weak reference to each
_forking = set()  # the threads that fork
_first_in_child = []


def first_in_child(function):
    """Have this called in a forked child, before anybody there closes a client of the parent's."""
    _first_in_child.append(function)
    return function


cdef list all_states():
    """Those that there are.  A loop over a WeakSet would end with RuntimeError when another thread makes a
    listener meanwhile."""
    cdef list found = [state() for state in list(_states)]
    return [state for state in found if state is not None]


def _before_fork():
    """This thread is about to fork: nobody accepts meanwhile."""
    _forking.add(get_ident())
    for state in all_states():
        state.stand_still(True)


def _after_fork_in_parent():
    """This thread has forked."""
    _forking.discard(get_ident())
    if not _forking:
        for state in all_states():
            state.stand_still(False)


def _after_fork_in_child():
    """The wakers are shared with the parent, whose takers must not hear ours; and only one thread is left."""
    for function in _first_in_child:
        function()
    _forking.clear()
    for state in all_states():
        state.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def queue(port_socket fd):
    """How many clients the kernel has queued for this TCP listener and how many it would: (None, None) if
    the system does not tell."""
    cdef int depth, limit
    if port_queue(fd, &depth, &limit) != 0:
        return None, None
    return depth, limit
