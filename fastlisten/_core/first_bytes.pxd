from libc.stdint cimport int64_t

from fastlisten._core.accept cimport Shortage, client_t
from fastlisten._core.admitting cimport Admitting
from fastlisten._core.port cimport port_socket
from fastlisten._core.proxy cimport proxy_header


cdef enum:          # the lists
    HEADER          # a proxy whose PROXY header is not whole yet
    SILENT          # has sent nothing yet
    READY           # may be handed out
    LISTS


cdef struct waiting_t:          # a client that waits
    client_t client
    waiting_t *before           # in its list
    waiting_t *after
    int64_t deadline            # port_now()
    int list                    # HEADER, SILENT or READY
    bint watched                # the poller has it
    int length                  # of what has come of its PROXY header, and was received
    char *header


cdef struct network_t:
    int family                  # AF_INET, AF_INET6 or AF_UNIX
    int bits                    # how many of the address count
    unsigned char address[16]


cdef class FirstBytes:
    cdef int64_t patience[LISTS]        # ns; how long one may be in a list; 0: nobody is to be in it
    cdef network_t *trusted             # proxies that have to send a header
    cdef int networks                   # so many
    cdef bint required                  # nobody else may come
    cdef Admitting admitting            # who may come in at all; None: anybody
    cdef Shortage shortage              # is told of clients who could not be kept
    cdef waiting_t *first[LISTS]        # each list, in the order of coming and so of deadlines
    cdef waiting_t *last[LISTS]
    cdef port_socket poller             # without one all are polled every now and then
    cdef port_socket failed_poller      # one that does not tell any more; open, as somebody may watch it
    cdef waiting_t **by_fd              # who is watched, by the descriptor
    cdef int64_t room                   # in by_fd
    cdef int64_t poll_at                # ... when next (port_now())

    cdef int tells_with(self, Shortage shortage) except -1
    cdef int open(self) except -1
    cdef void close(self) noexcept nogil
    cdef void after_fork(self, bint polls) noexcept
    cdef bint passes(self, client_t *client) noexcept nogil
    cdef bint take(self, client_t *client) noexcept nogil
    cdef bint give_way(self) noexcept nogil
    cdef void look(self) noexcept nogil
    cdef int64_t left(self) noexcept nogil
    cdef waiting_t *next_ready(self) noexcept nogil
    cdef bint lets_in(self, bint later) noexcept nogil
    cdef void open_poller(self) noexcept nogil
    cdef void close_poller(self) noexcept nogil
    cdef bint trusts(self, const client_t *client) noexcept nogil
    cdef void wait(self, client_t *client, int list) noexcept nogil
    cdef void move(self, waiting_t *waiting, int list) noexcept nogil
    cdef bint read_header(self, waiting_t *waiting) noexcept nogil
    cdef bint keep(self, waiting_t *waiting, int more) noexcept nogil
    cdef void end_header(
        self, waiting_t *waiting, char *data, int length, proxy_header *header) noexcept nogil
    cdef void append(self, waiting_t *waiting, int list) noexcept nogil
    cdef void unlink(self, waiting_t *waiting) noexcept nogil
    cdef void remove(self, waiting_t *waiting, client_t *client) noexcept nogil
    cdef void lose(self, waiting_t *waiting, int code) noexcept nogil
    cdef void refuse(self, waiting_t *waiting, int reason) noexcept nogil
    cdef int watch(self, waiting_t *waiting) noexcept nogil
    cdef void watch_no_more(self, waiting_t *waiting) noexcept nogil
    cdef void ask_poller(self) noexcept nogil
    cdef void give_poller_up(self, int code) noexcept nogil
    cdef void poll_list(self, int list) noexcept nogil
    cdef bint still_waits(self, waiting_t *waiting) noexcept nogil
