from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport int64_t


cdef class Lead:
    cdef long long tick                 # how long the heir waits, in microseconds
    cdef int64_t quick                  # what is quick, in nanoseconds
    cdef int64_t eager_most             # how often in a row the lead is handed on at once
    cdef int64_t held                   # FREE, LEADING, or the pocketed client's number
    cdef int64_t clients                # numbers them
    cdef int64_t misses                 # tries in a row that were not quick
    cdef int64_t eager                  # how many more are handed on at once
    cdef int64_t heir_waits
    cdef PyThread_type_lock heir        # held by the first in line
    cdef PyThread_type_lock alarm       # what the heir sleeps on; released to wake it

    cdef bint take(self, long long patience) noexcept nogil
    cdef bint wait(self, int64_t reason, long long patience) noexcept nogil
    cdef int64_t pocket(self) noexcept nogil
    cdef bint come_back(self, int64_t pocketed, int64_t since) noexcept nogil
    cdef void give_up(self) noexcept nogil
