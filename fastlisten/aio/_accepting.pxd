cimport cython
from libc.stdint cimport int64_t

from fastlisten._core.accept cimport Shortage, client_t, source_t, verdict_t
from fastlisten._core.first_bytes cimport FirstBytes
from fastlisten._core.overload cimport Overload
from fastlisten._core.state cimport State
from fastlisten.aio._hub cimport Watched
from fastlisten.aio._transport cimport Connections, Owner


@cython.final
cdef class ListenerWatch(Watched):
    cdef Accepting accepting
    cdef object sock
    cdef State state            # held for what `source` points to
    cdef source_t source
    cdef bint failed
    cdef int to_drain           # how many of those who were queued a drain still takes
    cdef int taken              # from the kernel, the last time
    cdef bint looks             # a drain's next look is scheduled

    cdef list take(self, int most)
    cdef int answer(self, verdict_t answer, int taken) except -1
    cdef int drain(self, double seconds) except -1
    cdef int look_again(self) except -1


@cython.final
cdef class FirstBytesWatch(Watched):
    cdef Accepting accepting
    cdef FirstBytes first_bytes
    cdef object timer           # the handle of the next look, for whose time is over; None: nobody waits

    cdef int begin(self) except -1
    cdef int sift(self, client_t *clients, int count, int most) except -1
    cdef int look(self) except -1
    cdef int unwatch_failed(self) except -1
    cdef void tell(self) noexcept
    cdef int set_timer(self) except -1
    cdef int close(self) except -1


@cython.final
cdef class QueueWatch(Watched):
    cdef Accepting accepting
    cdef Overload overload
    cdef bint failed

    cdef bint empty(self) noexcept
    cdef int mend(self) except -1
    cdef int look_up(self) except -1


@cython.final
cdef class Accepting(Owner):
    cdef object __weakref__
    cdef Connections connections
    cdef int64_t most           # connections that may be open; 0 for any number
    cdef list listeners
    cdef FirstBytesWatch first  # where clients wait that have to speak first; None: nowhere, or in `queue`
    cdef QueueWatch queue
    cdef bint serving, paused, stopped
    cdef readonly Shortage shortage
    cdef object retry           # the handle of what ends a pause
    cdef object idle            # called when the last connection is gone
    cdef object drained         # called when a drain has taken its clients; None: there is no drain

    cdef int arrange(self) except -1
    cdef int watch_listeners(self) except -1
    cdef bint accepts(self) except -1
    cdef int look_again(self) except -1
    cdef int look_for_drained(self) except -1
    cdef int pause(self) except -1
    cdef int places(self, int most) noexcept
    cdef bint full(self) noexcept
    cdef int ran_out(self, int code) except -1
    cdef bint shed_queued(self) noexcept
    cdef int accept_failed(self, int code, sock) except -1
    cdef int end_queue(self) except -1
    cdef int rest(self) except -1
    cdef QueueWatch queue_now(self)
