from libc.stdint cimport int64_t

from fastlisten._core.accept cimport Shortage, client_t, source_t
from fastlisten._core.first_bytes cimport FirstBytes
from fastlisten._core.port cimport port_pollfd, port_socket
from fastlisten._core.state cimport State, state_t


cdef enum outcome_t:
    NOBODY          # nobody is queued
    TAKEN           # here is a client
    SPOKEN          # here is one that had to speak first; within the acceptor only
    LOOK            # woken: what needs the GIL may be due (signals, the log)
    ENDED           # no more clients will come
    FAILED          # Acceptor.code says how


cdef struct drain_t:
    int left                    # clients that are still to be taken; < 0: not asked yet
    int64_t deadline            # until when (port_now()); 0: there is none


cdef class Acceptor:
    cdef tuple states
    cdef int count, turn
    cdef source_t *sources
    cdef port_pollfd *polls
    cdef source_t helped            # somebody else's listener, whose clients are taken after ours
    cdef int64_t helping            # ... as long as it has some
    cdef int64_t touching           # OUT, WAITING, or the port_thread() that accepts
    cdef int64_t forking            # a thread forks; until when (port_now()) that is believed
    cdef Shortage shortage
    cdef FirstBytes first_bytes     # where clients wait that have to speak first; None: none has to
    cdef bint inspects              # something is due with each client: it has to speak, or a drain counts it
    cdef int64_t most               # connections open at a time; 0: any number
    cdef bint wakes                 # the states' `wake_on_close` is set
    cdef bint always                # ... and stays so
    cdef int64_t deaf               # a waker is broken
    cdef int64_t code               # of the failure that ended it
    cdef int in_vain, polls_first   # how often poll() is asked before accept() is tried again; and yet to go
    cdef int64_t over               # nobody is accepted any more
    cdef bint stopping
    cdef int64_t emptied            # ... and nobody touches the listeners any more: those who wait are ours
    cdef bint to_tell_emptied       # ... just now, and take() is to come back for that
    cdef drain_t drain

    cdef int open(self, int64_t descriptors) except -1
    cdef int mend_wakers(self) except -1
    cdef void close(self) noexcept nogil
    cdef void end(self) noexcept nogil
    cdef void wake(self) noexcept nogil
    cdef void release(self, State state) noexcept nogil
    cdef void bring_back(self, int64_t patience=*) noexcept
    cdef void stand_still(self, bint still) noexcept
    cdef bint stands_still(self) noexcept nogil
    cdef void after_fork(self) noexcept
    cdef void enter(self) noexcept nogil
    cdef void wait_for_fork(self) noexcept nogil
    cdef void leave(self) noexcept nogil
    cdef outcome_t take(self, client_t *client) noexcept nogil
    cdef outcome_t wait_and_accept(self, client_t *client) noexcept nogil
    cdef bint likely(self) noexcept nogil
    cdef outcome_t accept_queued(self, client_t *client) noexcept nogil
    cdef bint makes_way(self, source_t *source) noexcept nogil
    cdef bint inspect(self, source_t *source, client_t *client) noexcept nogil
    cdef void help(self, State state, port_socket fd) noexcept nogil
    cdef outcome_t accept_helped(self, client_t *client) noexcept nogil
    cdef outcome_t wait(self, int64_t closed_for) noexcept nogil
    cdef int watch_first_bytes(self, int n) noexcept nogil
    cdef outcome_t wait_failed(self) noexcept nogil
    cdef int64_t closed_for(self) noexcept nogil
    cdef bint at_limit(self) noexcept nogil
    cdef int64_t open_connections(self) noexcept nogil
    cdef void wake_on_close(self, bint wake) noexcept nogil
    cdef state_t *asked_to_stop(self) noexcept nogil
    cdef bint overdue(self) noexcept nogil
    cdef bint ending(self) noexcept nogil
    cdef void see_stop(self) noexcept nogil
    cdef bint answers(self, state_t *state) noexcept nogil
    cdef bint shut(self) noexcept nogil
    cdef void set_modes(self) noexcept nogil
    cdef int64_t until_deadline(self, int64_t patience) noexcept nogil
    cdef int queued(self) noexcept nogil
    cdef bint somebody_waits(self) noexcept nogil
    cdef void look_every(self, int64_t interval) noexcept nogil
    cdef void ran_out(self, int code) noexcept nogil
