from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport int64_t

from fastlisten._accept cimport client_t
from fastlisten._connection cimport ledger_t
from fastlisten._core.port cimport port_pollfd, port_socket


cdef enum outcome_t:
    NOBODY          # nobody is queued
    TAKEN           # the ring holds a client
    LOOK            # woken: what needs the GIL may be due (signals, the log)
    ENDED           # no more clients will come
    FAILED          # Door.code says how


cdef struct source_t:       # one listener
    port_socket fd          # PORT_NO_SOCKET once it is closed
    ledger_t *ledger
    bint proven             # it has accepted: EINVAL now means closed, not "never listened"


cdef class Door:
    cdef tuple listeners
    cdef int count, turn
    cdef source_t *sources
    cdef port_pollfd *polls
    cdef PyThread_type_lock lock
    cdef double timeout             # of the Connections, in seconds; < 0: none
    cdef int most                   # threads that handle; 0: the caller does
    cdef int64_t most_active        # max_connections; 0: no limit
    cdef bint wanting               # the ledgers' `wanted` is set
    cdef int code                   # of the last failed accept that was not over with itself

    cdef client_t *ring             # accepted and not yet handled, first come first served
    cdef int room, first, waiting
    cdef int64_t handling           # taken out of it, and not yet at its handler's end

    cdef int in_vain, polls_first   # how often poll() is asked before accept() is tried again; and yet to go

    cdef int64_t over               # nobody accepts any more
    cdef bint stopping
    cdef int to_drain               # clients the kernel has queued that a drain still takes; < 0: not asked
    cdef int64_t deadline           # of the drain; 0: none

    cdef bytes busy                 # what a refused client is told; b"": a reset
    cdef const char *busy_text
    cdef Py_ssize_t busy_length
    cdef int64_t pending
    cdef bint ushered
    cdef bint evented               # an event loop takes the clients, and does not wait for them
    cdef PyThread_type_lock ring_lock
    cdef port_socket arrivals[2]    # wakes the leader when the usher has put somebody in the ring
    cdef bint leader_waits
    cdef int64_t usher_gone
    cdef outcome_t usher_outcome
    cdef object usher_ended

    cdef object exhausted
    cdef bint shed
    cdef port_socket spare
    cdef int64_t pause, retry_at    # nanoseconds, port_now()
    cdef int64_t failures           # of this episode; 0: none lasts
    cdef int64_t lost               # clients in a row that were lost before they were ours
    cdef int64_t eased              # accepts that worked since the last of them
    cdef int64_t episode_until      # when the last pause is over
    cdef int episode_code
    cdef int64_t episode_began, episode_length, episode_failures
    cdef int64_t news               # set with one of the three below: there is something to say
    cdef int64_t news_began, news_again, news_over

    cdef int open(self) except -1
    cdef int shut(self) except -1
    cdef void end(self) noexcept
    cdef int release(self, int i) except -1
    cdef void after_fork(self) noexcept
    cdef outcome_t take(self, client_t *client) noexcept nogil
    cdef outcome_t admit(self) noexcept nogil
    cdef bint likely(self) noexcept nogil
    cdef outcome_t accept_queued(self, int most) noexcept nogil
    cdef bint full(self, int taken) noexcept nogil
    cdef void receive(self, client_t *client) noexcept nogil
    cdef void refuse(self, client_t *client) noexcept nogil
    cdef bint pop(self, client_t *client) noexcept nogil
    cdef int64_t free_places(self) noexcept nogil
    cdef int64_t active(self) noexcept nogil
    cdef bint at_limit(self) noexcept nogil
    cdef void want(self, bint wanted) noexcept nogil
    cdef int64_t shut_for(self) noexcept nogil
    cdef outcome_t sleep(self, int64_t shut) noexcept nogil
    cdef ledger_t *asked_to_stop(self) noexcept nogil
    cdef bint overdue(self) noexcept nogil
    cdef bint ending(self) noexcept nogil
    cdef int queued(self) noexcept nogil
    cdef void run_out(self) noexcept nogil
    cdef bint shed_queued(self) noexcept nogil
    cdef bint recover(self, bint caught_up) noexcept nogil
    cdef int tell_news(self) except -1
    cdef void ring_for_leader(self) noexcept nogil
    cdef bint look_in_ring(self) noexcept nogil
    cdef outcome_t wait_for_usher(self) noexcept nogil


cdef object log()
cdef void close_pair(port_socket *pair) noexcept nogil
