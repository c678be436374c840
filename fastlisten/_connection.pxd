from libc.stdint cimport int64_t

from fastlisten._core.port cimport port_address, port_socket

# How many failed accepts are told apart by their code; the error table knows fewer.
cdef enum:
    CODES = 32


# What a Listener's loop, its threads and its Connections share.  It is plain C, counted, and outlives the
# Listener while a Connection is open, so that a Connection needs no Python reference to anything.
cdef struct ledger_t:
    int64_t holders             # the Listener, and each Connection that is not yet closed
    int64_t active              # Connections handed out and not yet closed
    int family
    int type
    int protocol
    port_socket wake[2]         # whoever leads the loop polls the first end; ledger_ring() the second
    int64_t armed               # wake[] is open: from the begin of a serve() to its end
    int64_t ringing             # how many are in ledger_ring(): wake[] must not be closed under them
    int64_t wanted              # the loop waits for a Connection to close: ring when one does
    int64_t stopping            # stop() was called and no serve() has answered it yet
    int64_t draining            # ... with a drain: what the kernel has queued is still taken
    int64_t deadline            # ... and until when (port_now(); 0: handlers have all the time)
    int64_t paused
    int64_t accepted
    int64_t handled
    int64_t handler_errors
    int64_t refused
    int64_t codes[CODES]        # failed accepts: the code, and how often (0: an unused place)
    int64_t counts[CODES]


cdef void ledger_ring(ledger_t *ledger) noexcept nogil
cdef void ledger_disarm(ledger_t *ledger) noexcept nogil
cdef void ledger_release(ledger_t *ledger) noexcept nogil


# Room for an IPv4 or IPv6 address; the few that are longer (bound unix peers) live on the heap.
cdef enum:
    SHORT_ADDRESS = 28


cdef union held_address_t:
    char bytes[SHORT_ADDRESS]
    void *heap


cdef class Connection:
    cdef object __weakref__
    cdef ledger_t *ledger
    cdef double timeout                 # seconds; < 0: block
    cdef port_socket fd
    cdef public int _io_refs            # open files of makefile(); socket.SocketIO keeps it
    cdef int address_length
    cdef held_address_t address
    cdef bint closing
    cdef bint was_cut

    cdef void give_up(self) noexcept
    cdef int finish(self) noexcept
    cdef void end(self) noexcept
    cdef bint cut(self) noexcept
    cdef object ask(self, str method, tuple arguments)
    cdef int wait(self, short events, int64_t *deadline) except -1
    cdef Py_ssize_t receive(self, char *buffer, Py_ssize_t length, int flags) except -1
    cdef Py_ssize_t transmit(
        self, const char *buffer, Py_ssize_t length, int flags, int64_t *deadline) except -1


cdef Connection new_connection(
    port_socket fd, const port_address *address, int length, ledger_t *ledger, double timeout)
cdef object standard_socket(port_socket fd, int family, int type, int protocol)
cdef object address_object(const port_address *address, int length)
cdef int raise_error(int code) except -1
cdef int wait_ready(port_socket fd, short events, int64_t deadline) except -1
