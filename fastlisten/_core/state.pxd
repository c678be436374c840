from libc.stdint cimport int64_t

from fastlisten._core.port cimport port_add, port_address, port_get, port_socket

# How many failed accepts are told apart by their code; the error table knows fewer.
cdef enum:
    CODES = 32
    TLS_REASONS = 8         # TLS_FAILURES has as many
    WAITS = 15              # one more than WAIT_BOUNDS has

cdef enum:                  # in the order of REFUSALS
    REFUSED_BUSY = -1       # there is no place; not one of them
    REFUSED_SILENT
    REFUSED_LEFT
    REFUSED_MADE_WAY
    REFUSED_NO_HEADER
    REFUSED_HEADER
    REFUSED_UNTRUSTED
    REFUSED_DENIED          # and those after it as in admission.h
    REFUSED_NOT_ALLOWED
    REFUSED_PENALISED
    REFUSED_CONCURRENT
    REFUSED_RATE
    REFUSED_REASONS

cdef struct waker_t:            # all zeros: not open
    port_socket reader          # whoever waits polls this end
    port_socket writer          # waker_wake() writes to this one
    int64_t open
    int64_t waking              # how many are in waker_wake(): the ends must not be closed under them
    int64_t broken              # a call on it failed: it is to be mended before it is waited for again
    int64_t told                # ... and the log has it already; nothing was heard since


cdef int waker_open(waker_t *waker) except -1
cdef void waker_wake(waker_t *waker) noexcept nogil
cdef void waker_drain(waker_t *waker) noexcept nogil
cdef void waker_close(waker_t *waker) noexcept nogil
cdef int waker_mend(waker_t *waker) except -1
cdef int waker_renew(waker_t *waker) except -1


# What a listening socket, whoever takes its clients and its Connections share.  It is plain C, counted, and
# outlives the socket while a Connection is open, so that a Connection needs no Python reference to anything.
cdef struct state_t:
    int64_t holders             # the State, and each connection that is not yet closed
    int64_t shared              # it lies in memory that another process reads, and that is never unmapped
    int family
    int type
    int protocol

    waker_t waker               # wakes who takes the clients; open while somebody does
    int64_t wake_on_close       # it waits for a connection to close: wake it when one does

    int64_t stopping            # stop() was called and whoever takes the clients has not ended yet
    int64_t draining            # ... with a drain: what the kernel has queued is still taken
    int64_t deadline            # ... and until when (port_now(); 0: handlers have all the time)
    int64_t paused
    int64_t look_every          # ns; whoever waits for clients looks up at least so often; 0: when woken
    int64_t made_nonblocking    # this process has made its description non-blocking

    # These only grow, so that each can be read by itself.  A client that was accepted and is in none of the
    # last three is active; one that was handed out and not handled is an open connection.
    int64_t accepted            # taken from the kernel
    int64_t handed              # handed out: to a handler, or to whoever asked for a client
    int64_t handled             # ... and closed since, or taken over
    int64_t refused             # told that there is no place, or closed for one of REFUSALS
    int64_t dropped             # closed before anybody got it
    int64_t handler_errors
    int64_t codes[CODES]        # failed accepts: the code, and how often (0: an unused place)
    int64_t counts[CODES]
    int64_t tls_handshakes      # completed
    int64_t tls_failures[TLS_REASONS]
    int64_t refusals[REFUSED_REASONS]

    int64_t waiting             # accepted, and have to send something before a handler gets them
    int64_t capacity            # how many may be with handlers or wait for one at a time; 0: it is not known

    int64_t waits[WAITS]        # clients that have waited for a handler in a queue of ours, by how long
    int64_t waited              # ... and how long all of them have, in ns

    int64_t closing             # handed out, and a thread is in close() for it


cdef void state_hold(state_t *state) noexcept nogil
cdef void state_free(state_t *state) noexcept nogil
cdef void client_in(state_t *state, port_socket listener, port_socket client) noexcept nogil
cdef void client_handed(state_t *state, port_socket client) noexcept nogil
cdef void client_given(state_t *state, port_socket client) noexcept nogil
cdef void client_refused(
    state_t *state, port_socket client, const port_address *address, int reason) noexcept nogil
cdef void client_waits(state_t *state, int more) noexcept nogil
cdef void client_dropped(state_t *state, port_socket client) noexcept nogil
cdef void client_waited(state_t *state, int64_t nanoseconds) noexcept nogil
cdef void handler_failed(state_t *state) noexcept nogil
cdef void accept_failed(state_t *state, int code) noexcept nogil
cdef void tls_completed(state_t *state) noexcept nogil
cdef int tls_failed(state_t *state, str reason) except -1
cdef int64_t connections_of(state_t *state) noexcept nogil
cdef dict counts_of(state_t *state)
cdef dict tls_failures_of(state_t *state)
cdef dict refused_for(state_t *state)
cdef tuple pending_times_of(state_t *state)
cdef state_t *state_in(memory, Py_ssize_t offset, Py_buffer *buffer) except NULL


cdef inline void state_release(state_t *state) noexcept nogil:
    """Give one hold on the state back; the last one frees it and its waker."""
    if port_add(&state.holders, -1) == 0:
        state_free(state)


cdef inline void client_closing(state_t *state, int more) noexcept nogil:
    """A thread goes into close() for a client that it counts out after it, or has come back."""
    port_add(&state.closing, more)


cdef inline void client_out(state_t *state) noexcept nogil:
    """Its connection was closed or taken over: tell who waits for that, and give its hold back."""
    port_add(&state.handled, 1)
    if port_get(&state.wake_on_close):  # asked after the count, so that whoever waits for it sees it
        waker_wake(&state.waker)
    state_release(state)


cdef class Taker:
    pass


cdef class State:
    cdef state_t *at
    cdef Taker current          # who takes the clients, for taker_now(); None: nobody
    cdef object sock            # a weak reference
    cdef public object when_taken  # called after take(); None: nothing is
    cdef public object when_emptied  # called by emptied(); None: nothing is
    cdef bint left              # it is closed or detached: nobody may take its clients any more
    cdef object __weakref__

    cdef Taker taker_now(self)
    cdef int begin_drain(self, double seconds) except -1
    cdef int end_drain(self) except -1
    cdef port_socket fd(self)


cdef object log()
cdef int take_all(Taker taker, tuple states) except -1
cdef int give_back_all(Taker taker, tuple states) except -1
