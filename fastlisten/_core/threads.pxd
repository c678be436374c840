from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport int64_t

from fastlisten._core.accept cimport client_t
from fastlisten._core.acceptor cimport outcome_t
from fastlisten._core.connection cimport Connection
from fastlisten._core.state cimport Taker, waker_t


cdef class Worker:
    cdef client_t client            # taken, and not yet a Connection; without a descriptor: there is none
    cdef Connection connection

    cdef void takes(self, Connection connection) noexcept
    cdef Connection has(self)
    cdef void after_fork(self) noexcept


cdef class Dispatcher(Taker):
    cdef int64_t over                   # nobody takes a client any more
    cdef int64_t look_every             # ns; look_up() is called at least so often; 0: when there is reason
    cdef int64_t cut_at                 # when the handlers' connections were cut; 0: they were not

    cdef outcome_t take(self, client_t *client) noexcept nogil
    cdef int handle(self, Worker worker) except -1
    cdef int look_up(self) except -1
    cdef int raise_failure(self) except -1
    cdef void fail(self, error) noexcept
    cdef void stop_now(self) noexcept
    cdef bint stop_asked(self) noexcept
    cdef bint emptied(self, bint leads) noexcept nogil
    cdef int tell_emptied(self) except -1
    cdef bint somebody_waits(self) noexcept nogil


cdef class Lead:
    cdef long long tick                 # how long the successor waits, in microseconds
    cdef int64_t quick                  # what is quick, in nanoseconds
    cdef int64_t eager_most             # how often in a row the lead is handed off at once
    cdef int64_t held                   # FREE, LEADING, or the number of the loan
    cdef int64_t loans                  # numbers them
    cdef int64_t misses                 # handlers in a row that were not quick
    cdef int64_t eager                  # how many more are handed off at once
    cdef int64_t successor_waits
    cdef PyThread_type_lock successor   # held by the first in line
    cdef PyThread_type_lock alarm       # what the successor sleeps on; released to wake it

    cdef bint take(self, long long patience) noexcept nogil
    cdef bint wait(self, int64_t reason, long long patience) noexcept nogil
    cdef int64_t lend(self) noexcept nogil
    cdef bint reclaim(self, int64_t loan, int64_t since) noexcept nogil
    cdef void hand_off(self) noexcept nogil


cdef class Threads:
    cdef Dispatcher dispatcher
    cdef Lead lead
    cdef int least, most       # 0: the caller of run() is the only worker
    cdef bint daemon                    # they are daemon threads
    cdef bint leave                     # run() does not wait for their handlers; join() does
    cdef int64_t alive, idle
    cdef int64_t starting               # the first of them are being started
    cdef int64_t ended                  # run() is over: the last to end closes the waker
    cdef bint told                      # that nobody more is taken from the kernel's queues
    cdef waker_t waker                  # wakes the caller of run() while others lead
    cdef set workers
    cdef list threads
    cdef object growing                 # a lock: held while one of them is started

    cdef int open(self) except -1
    cdef void close(self) noexcept
    cdef int run(self) except -1
    cdef int run_inline(self) except -1
    cdef int run_threads(self) except -1
    cdef int look_at_stop(self) except -1
    cdef bint to_wait_for(self) noexcept
    cdef bint may_leave(self) noexcept
    cdef int wait_for_end(self) except -2
    cdef int look_for_others(self) except -1
    cdef void wake(self) noexcept
    cdef int grow(self) except -1
    cdef int grow_if_possible(self) except -1
    cdef bint retires(self) noexcept
    cdef void after_fork(self) except *
