cimport cython
from libc.stdint cimport int64_t

from fastlisten._accept cimport Ledger
from fastlisten._port cimport port_socket
from fastlisten.aio._hub cimport Watched
from fastlisten.aio._transport cimport Connections, Owner


@cython.final
cdef class ListenerWatch(Watched):
    cdef Accepting accepting
    cdef readonly object sock
    cdef readonly Ledger ledger
    cdef bint failed
    cdef int lost               # clients in a row that were lost before they were ours

    cdef int answer(self, int code, int taken) except -1


@cython.final
cdef class QueueWatch(Watched):
    cdef Accepting accepting
    cdef readonly object loop


@cython.final
cdef class Accepting(Owner):
    cdef Connections connections
    cdef int64_t most           # connections that may be open; 0 for any number
    cdef list listeners
    cdef QueueWatch queue
    cdef bint serving, paused, stopped
    cdef bint shed
    cdef port_socket spare      # given up to take and reset a client when there is no other descriptor
    cdef readonly int64_t failures  # accepts that ran out of resources, in a row
    cdef int64_t failing_since
    cdef double pause
    cdef object retry
    cdef object idle            # called when the last connection is gone

    cdef int arrange(self) except -1
    cdef int places(self, int most) noexcept
    cdef bint full(self) noexcept
    cdef int run_out(self, int code) except -1
    cdef bint shed_queued(self) except *
    cdef int recover(self) except -1
    cdef int rest(self) except -1
