from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport int64_t

from fastlisten._core.accept cimport client_t
from fastlisten._core.acceptor cimport Acceptor, outcome_t
from fastlisten._core.state cimport waker_t


cdef class Overload:
    cdef Acceptor acceptor
    cdef bytes busy                 # what a refused client is told; b"": a reset
    cdef const char *text
    cdef Py_ssize_t length
    cdef int64_t pending, handlers, most
    cdef PyThread_type_lock lock    # of the queue
    cdef client_t *queue            # accepted, and no handler is free yet; first come, first served
    cdef int64_t *since             # when each of them began to wait; 0: somebody waited for it
    cdef int room, first, waiting
    cdef int64_t handling           # handed out, and not yet at their handler's end
    cdef waker_t waker              # wakes who waits for a client
    cdef bint awaited               # somebody does
    cdef object refuser_ended       # a lock: held while the thread that refuses runs
    cdef int64_t refuser_gone
    cdef outcome_t refuser_outcome

    cdef int open(self) except -1
    cdef int close(self) except -1
    cdef void stand_still(self, bint still) noexcept
    cdef int after_fork(self) except -1
    cdef outcome_t take(self, client_t *client) noexcept nogil
    cdef bint pop(self, client_t *client) noexcept nogil
    cdef void handled(self) noexcept nogil
    cdef bint somebody_waits(self) noexcept nogil
    cdef void take_front(self, client_t *client) noexcept nogil
    cdef bint pop_front(self, client_t *client) noexcept nogil
    cdef int64_t places(self) noexcept nogil
    cdef void put(self, client_t *client) noexcept nogil
    cdef outcome_t mend_acceptor(self) noexcept nogil
