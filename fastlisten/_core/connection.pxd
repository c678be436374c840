from libc.stdint cimport int64_t

from fastlisten._core.admission cimport admission
from fastlisten._core.port cimport port_address, port_socket
from fastlisten._core.state cimport state_t

cdef enum:
    SHORT_ADDRESS = 28  # room for IPv4 and IPv6; the few that are longer (bound unix peers) live on the heap
    ORIGIN = 1 << 20    # for a length: in place of the address is a pointer to an origin_t, of its holder


cdef struct origin_t:           # of who came by a proxy, or counts for admission; a PROXY header follows
    port_address address        # of the peer: the client or the proxy
    int length
    int size                    # of the header; 0: there is none
    admission *table
    int64_t ticket              # to leave that with; 0: none


cdef union held_address_t:
    char bytes[SHORT_ADDRESS]
    void *heap


cdef class Connection:
    cdef object __weakref__
    cdef state_t *state
    cdef double timeout                 # seconds; < 0: block
    cdef port_socket fd
    cdef public int _io_refs            # open files of makefile(); socket.SocketIO keeps it
    cdef int address_length
    cdef bint closing
    cdef held_address_t address
    cdef int64_t was_cut                # by another thread

    cdef void count_out(self) noexcept
    cdef int finish(self) noexcept
    cdef void end(self) noexcept
    cdef bint cut(self) noexcept
    cdef object ask(self, str method, tuple arguments)
    cdef int wait(self, short events, int64_t *deadline) except -1
    cdef Py_ssize_t receive(self, char *buffer, Py_ssize_t length, int flags) except -1
    cdef Py_ssize_t transmit(
        self, const char *buffer, Py_ssize_t length, int flags, int64_t *deadline) except -1


cdef Connection new_connection(
    port_socket fd, const port_address *address, int length, state_t *state, double timeout)
cdef object standard_socket(port_socket fd, int family, int type, int protocol)
cdef object address_object(const port_address *address, int length)
cdef origin_t *origin_of(const port_address *address) noexcept nogil
cdef object header_of(const origin_t *origin)
cdef object peer_of(const origin_t *origin, header)
cdef void leave_table(origin_t *origin) noexcept nogil
cdef void free_origin(origin_t *origin) noexcept nogil
cdef void forget_origin(port_address *address, int length) noexcept nogil
cdef int wait_ready(port_socket fd, short events, int64_t deadline) except -1
