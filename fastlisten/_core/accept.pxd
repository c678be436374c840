from libc.stdint cimport int64_t

from fastlisten._core.port cimport port_address, port_socket
from fastlisten._core.state cimport state_t


cdef enum verdict_t:
    ACCEPTED
    AGAIN           # nobody is queued: wait
    INTERRUPTED     # run Python's signal handlers, go on
    LOST            # this client was lost before it was ours: go on at once
    RESOURCES       # no descriptors or memory: a shortage
    CLOSED          # the listener is closed: the end, if that was meant
    UNKNOWN         # raise


cdef struct client_t:           # accepted, and not yet a Connection
    port_socket fd
    int length
    port_address address
    state_t *state


cdef struct source_t:           # a listener, as it is accepted from
    port_socket fd
    int64_t gone                # not to be touched any more: it is about to be closed
    state_t *state
    int nonblocking             # the mode of its clients
    int code                    # of the last accept that failed
    int lost                    # clients in a row that were lost before they were ours
    bint proven                 # it has accepted: EINVAL now means closed, not "never listened"


cdef verdict_t verdict(int code) noexcept nogil
cdef verdict_t accept_one(source_t *source, client_t *client) noexcept nogil
cdef verdict_t accept_batch(source_t *source, client_t *clients, int most, int *taken) noexcept nogil
cdef void refuse(client_t *client, const char *text, Py_ssize_t length, int reason) noexcept nogil
cdef void turn_away(client_t *client, int reason) noexcept nogil
cdef void close_origin(client_t *client) noexcept nogil
cdef void drop(client_t *client) noexcept nogil
cdef void drop_handed(client_t *client) noexcept nogil
cdef int poll_failed(int code) noexcept nogil
cdef bint readable(port_socket fd) noexcept nogil
cdef int set_nonblocking(port_socket fd, state_t *state) except -1
cdef double default_timeout() except? -2


cdef class Shortage:
    cdef object ask                 # called for how long to pause; None: the delays below
    cdef bint shed                  # refuse clients through a descriptor kept for that
    cdef object also                # has tell(): what the log is told with it; None: nothing
    cdef int64_t drop_code          # why a client was dropped that was in; 0: nothing is to be told of that
    cdef int64_t drops_told         # port_now(); 0: nothing was told of that yet
    cdef int64_t poller_code        # why a poller was given up; 0: nothing is to be told of that
    cdef bytes busy                 # what they are told; b"": a reset
    cdef const char *text
    cdef Py_ssize_t length
    cdef port_socket spare
    cdef int64_t delay              # nanoseconds
    cdef int64_t retry_at           # port_now(); 0: at once; -N: once `ask` has answered to failure N
    cdef readonly int64_t failures  # of this shortage; 0: there is none
    cdef int64_t eased              # accepts that worked since the last of them
    cdef int64_t began
    # From here on whoever accepts and whoever tells may be two threads.
    cdef int64_t until              # when its last pause is over
    cdef int64_t code
    cdef int64_t to_tell            # set with each failure, and with one of the two below
    cdef int64_t to_tell_beginning, to_tell_end
    cdef int64_t lasted, failed_tries  # of the one that has ended

    cdef int open(self) except -1
    cdef void close(self) noexcept nogil
    cdef void failed(self, int code) noexcept nogil
    cdef void dropped(self, int code) noexcept nogil
    cdef int tell_rest(self) except -1
    cdef void poller_failed(self, int code) noexcept nogil
    cdef void pause(self) noexcept nogil
    cdef bint worked(self, int accepted, bint caught_up) noexcept nogil
    cdef int64_t left(self) noexcept nogil
    cdef void cut_short(self) noexcept nogil
    cdef void retake_spare(self) noexcept nogil
    cdef bint shed_queued(self, source_t *sources, int count) noexcept nogil
    cdef int tell(self) except -1
