"""pending= and busy=: a bounded queue before the handlers, and a thread that refuses who finds no place."""

from _thread import allocate_lock, start_new_thread

cimport cython
from cpython.pythread cimport (
    PyThread_acquire_lock,
    PyThread_allocate_lock,
    PyThread_free_lock,
    PyThread_release_lock,
    WAIT_LOCK,
)
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free

from fastlisten._core.accept cimport client_t, drop, poll_failed, refuse
from fastlisten._core.acceptor cimport ENDED, FAILED, LOOK, NOBODY, TAKEN, Acceptor, outcome_t
from fastlisten._core.port cimport *
from fastlisten._core.state cimport (
    REFUSED_BUSY,
    client_handed,
    client_waited,
    waker_close,
    waker_drain,
    waker_open,
    waker_renew,
    waker_wake,
)

# How many clients may be with handlers when their number is hardly a limit.
HANDLERS_AT_MOST = 4096


@cython.final
cdef class Overload:
    """Between an acceptor and the handlers: clients wait here, and the one over the bound is told at once.

    acceptor: has no limit of its own.  pending: how many clients may wait for a handler.  handlers: how many
    may be with one at a time.  most: connections that may be open at a time; 0: any number.  busy: what a
    refused client is told; b"" for a reset.

    A thread accepts without the GIL from its first to its last instruction, puts clients into the queue while
    there is a place and refuses the others, so that the answer comes at once also while a handler computes.
    """

    def __cinit__(self, Acceptor acceptor not None, int64_t pending, int64_t handlers, int64_t most,
                  bytes busy not None):
        self.acceptor = acceptor
        self.pending = pending
        self.handlers = min(handlers, <int64_t>HANDLERS_AT_MOST)
        self.most = most
        self.busy = busy
        self.text, self.length = busy, len(busy)
        self.room = pending + (min(self.handlers, most) if most else self.handlers)
        self.queue = <client_t *>calloc(self.room, sizeof(client_t))
        self.since = <int64_t *>calloc(self.room, sizeof(int64_t))
        self.lock = PyThread_allocate_lock()
        if self.queue is NULL or self.since is NULL or self.lock is NULL:
            raise MemoryError

    def __dealloc__(self):
        waker_close(&self.waker)
        if self.lock is not NULL:
            PyThread_free_lock(self.lock)
        free(self.queue)
        free(self.since)

    cdef int open(self) except -1:
        """Begin to accept and to refuse; the acceptor is open."""
        waker_open(&self.waker)
        self.acceptor.always = self.most != 0  # a place that comes free is for who waits here
        ended = allocate_lock()
        ended.acquire()
        self.refuser_ended = ended
        try:
            start_new_thread(self.refuse_over_pending, ())
        except BaseException:
            self.refuser_ended = None  # nobody to wait for
            raise
        return 0

    cdef int close(self) except -1:
        """Accept nobody any more, and close who still waits; returns how many they were.

        What a signal's handler raises comes out after that: the thread must not go on with a closed listener.
        """
        cdef client_t client
        cdef int dropped = 0
        interrupt = None
        self.acceptor.end()
        self.acceptor.bring_back()
        while self.refuser_ended is not None:
            try:
                self.refuser_ended.acquire()
                self.refuser_ended = None
            except BaseException as error:
                interrupt = error
        while self.pop_front(&client):
            drop(&client)
            dropped += 1
        waker_close(&self.waker)
        if interrupt is not None:
            raise interrupt
        return dropped

    cdef void stand_still(self, bint still) noexcept:
        """A thread is about to fork: have nobody be accepted, or be taken from the queue; or it has."""
        self.acceptor.stand_still(still)
        if still:
            with nogil:  # whoever is taking one from the queue is through, and nobody begins
                PyThread_acquire_lock(self.lock, WAIT_LOCK)
                PyThread_release_lock(self.lock)
        else:  # whoever found nobody meanwhile is to look again
            waker_wake(&self.waker)
            self.acceptor.wake()

    cdef int after_fork(self) except -1:
        """In a child without the threads of its parent: who waits here is the parent's client."""
        cdef int i
        self.acceptor.after_fork()
        self.refuser_ended = None
        self.lock = PyThread_allocate_lock()
        for i in range(self.waiting):
            drop(&self.queue[(self.first + i) % self.room])
        self.waiting = 0
        return waker_renew(&self.waker)

    # --- for who takes the clients --------------------------------------------------------------------

    cdef outcome_t take(self, client_t *client) noexcept nogil:
        """Wait for the next client that may be handled, and take it; for one thread at a time."""
        cdef port_pollfd poll
        cdef int ready, code
        if self.acceptor.overdue():
            return ENDED  # close() drops who waits
        if self.pop(client):
            return TAKEN
        if port_get(&self.refuser_gone):  # nobody else hears connections close
            return self.acceptor.wait(-1) if self.waiting else self.refuser_outcome
        poll.fd = self.waker.reader
        poll.events = POLLIN
        ready = port_poll_ns(&poll, 1, -1)
        if ready > 0:
            waker_drain(&self.waker)
        elif ready < 0:
            code = poll_failed(port_error())
            if code != 0:
                port_swap(&self.acceptor.code, code)
                return FAILED
        return LOOK

    cdef bint pop(self, client_t *client) noexcept nogil:
        """Take who has waited longest, if it may be handled now; if not, have the other thread wake us."""
        cdef bint some
        cdef int64_t since
        PyThread_acquire_lock(self.lock, WAIT_LOCK)
        some = self.waiting > 0 and not self.acceptor.stands_still() and (
            self.most == 0 or self.acceptor.open_connections() < self.most)
        if some:
            since = self.since[self.first]
            self.take_front(client)
            self.handling += 1
            client_handed(client.state, client.fd)
            if since:
                client_waited(client.state, port_now() - since)
        self.awaited = not some
        PyThread_release_lock(self.lock)
        return some

    cdef void handled(self) noexcept nogil:
        """A client that was taken is through with its handler, and another may have its place.

        The thread that refuses would tell so, too, if it did not sleep in accept(): see bring_back().
        """
        cdef bint awaited
        PyThread_acquire_lock(self.lock, WAIT_LOCK)
        self.handling -= 1
        awaited = self.awaited and self.most != 0 and self.waiting > 0
        if awaited:
            self.awaited = False
        PyThread_release_lock(self.lock)
        if awaited:
            waker_wake(&self.waker)

    cdef bint somebody_waits(self) noexcept nogil:
        """Whether a client waits for its handler."""
        cdef bint some
        PyThread_acquire_lock(self.lock, WAIT_LOCK)
        some = self.waiting > 0
        PyThread_release_lock(self.lock)
        return some

    # --- the queue ------------------------------------------------------------------------------------

    cdef void take_front(self, client_t *client) noexcept nogil:
        client[0] = self.queue[self.first]
        self.first = (self.first + 1) % self.room
        self.waiting -= 1

    cdef bint pop_front(self, client_t *client) noexcept nogil:
        cdef bint some
        PyThread_acquire_lock(self.lock, WAIT_LOCK)
        some = self.waiting > 0
        if some:
            self.take_front(client)
        PyThread_release_lock(self.lock)
        return some

    cdef int64_t places(self) noexcept nogil:
        """How many clients there is a place for: with a handler that is free, or among the pending."""
        cdef int64_t idle = self.handlers - self.handling
        if self.most:
            idle = min(idle, self.most - self.acceptor.open_connections())
        return min(self.pending + max(idle, 0), <int64_t>self.room)

    cdef void put(self, client_t *client) noexcept nogil:
        """Have a client wait for its handler, or refuse it when that is one too many."""
        cdef bint awaited = False
        cdef bint fits
        cdef int place
        PyThread_acquire_lock(self.lock, WAIT_LOCK)
        fits = self.waiting < self.places()
        if fits:
            place = (self.first + self.waiting) % self.room
            self.queue[place] = client[0]
            awaited = self.awaited
            self.since[place] = 0 if awaited else port_now()
            self.waiting += 1
            self.awaited = False
        PyThread_release_lock(self.lock)
        if not fits:
            refuse(client, self.text, self.length, REFUSED_BUSY)
        elif awaited:
            waker_wake(&self.waker)

    # --- the thread that refuses ----------------------------------------------------------------------

    def refuse_over_pending(self):
        """Accept, and refuse who is too many, without the GIL: nothing Python does delays an answer."""
        cdef outcome_t outcome = NOBODY
        cdef client_t client
        with nogil:
            while outcome != ENDED and outcome != FAILED:
                self.acceptor.enter()
                outcome = self.acceptor.wait_and_accept(&client)
                if outcome == TAKEN:
                    self.put(&client)
                self.acceptor.leave()  # not before: a fork finds the client in the queue, or closed
                if outcome == LOOK or port_get(&self.acceptor.shortage.to_tell):
                    waker_wake(&self.waker)  # for the log, or a place that came free
                if port_get(&self.acceptor.deaf):
                    outcome = self.mend_acceptor()
            self.refuser_outcome = outcome
            port_swap(&self.refuser_gone, 1)
            waker_wake(&self.waker)
        self.refuser_ended.release()

    cdef outcome_t mend_acceptor(self) noexcept nogil:
        """A waker that it waits for is broken; for once the GIL is needed."""
        with gil:
            try:
                self.acceptor.mend_wakers()
            except OSError as error:
                port_swap(&self.acceptor.code, getattr(error, "winerror", None) or error.errno)
                return FAILED
        return LOOK
