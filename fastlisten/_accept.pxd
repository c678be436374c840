from fastlisten._connection cimport ledger_t
from fastlisten._core.port cimport port_address, port_socket


cdef enum verdict_t:
    AGAIN           # nobody is queued: wait
    INTERRUPTED     # run Python's signal handlers, go on
    CONNECTION      # this client was lost before it was ours: count it by its code, go on at once
    RESOURCES       # no descriptors or memory: pause, and try again
    CLOSED          # the listener is closed: the end, if that was meant
    UNKNOWN         # raise


# So many clients in a row that were lost before they were ours are no chance: accept() itself is refused, by
# a seccomp filter for one (EPERM), and trying on would spin.  A kernel's queue hardly ever holds as many.
cdef enum:
    LOST_IN_A_ROW = 4096


cdef struct client_t:  # accepted, and not yet a Connection
    port_socket fd
    int length
    port_address address
    ledger_t *ledger


cdef class Ledger:
    cdef ledger_t *at


cdef verdict_t verdict(int code) noexcept nogil
cdef void count_error(ledger_t *ledger, int code) noexcept nogil
cdef bint take_client(port_socket fd, client_t *client, int nonblocking) noexcept nogil
cdef int shed_client(
    port_socket fd, ledger_t *ledger, port_socket *spare, const char *text, Py_ssize_t length) noexcept nogil
cpdef int share_nonblocking(listener) except -1
cdef double default_timeout() except? -2
