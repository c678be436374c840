cimport cython
from libc.stdint cimport int64_t

from fastlisten._core.connection cimport SHORT_ADDRESS, origin_t
from fastlisten._core.port cimport port_address, port_socket
from fastlisten._core.state cimport state_t
from fastlisten.aio._hub cimport Hub, Watched


# How much one recv() takes at most, and how much one wake sends on one connection; asyncio's own size.
cdef enum:
    CHUNK = 256 * 1024

# What is kept to be sent is joined when the pieces are smaller than this.
cdef enum:
    SMALL = 64 * 1024


cdef class Owner:
    cdef int connection_gone(self) except -1


cdef enum takes_t:      # how a protocol takes what is received
    AS_BYTES            # data_received()
    IN_ITS_BUFFER       # get_buffer() and buffer_updated()
    IN_OURS             # received() of a Receiver


cdef class Receiver:
    cdef int received(self, char *data, Py_ssize_t length) except -1


cdef takes_t how_it_takes(loop, protocol) except *
cdef bytes taken_back(protocol)
cdef tuple write_limits(high, low, Py_ssize_t default)


@cython.final
cdef class Connections:
    cdef Hub hub
    cdef Owner owner            # who has accepted them; None once the server is over
    cdef object factory
    cdef object context         # what each connection's own is a copy of
    cdef object __weakref__
    cdef readonly int64_t active
    cdef dict transports        # weak references to the open ones, by descriptor
    cdef object kind            # the class of the last protocol, and how such a one takes what is received
    cdef takes_t takes
    cdef char *memory
    cdef char *scratch          # in it, from the middle of a page on

    cdef int begin(self) except -1
    cdef int leave(self) except -1
    cdef int release_held(self) except -1
    cdef int forget_held(self) except -1


cdef struct short_address_t:    # an address that fits; few do not
    int length                  # 0: there is none
    char bytes[SHORT_ADDRESS]


@cython.final
cdef class WriteBuffer:
    cdef object pieces          # deque of bytes
    cdef Py_ssize_t sent        # how much of the first is gone
    cdef Py_ssize_t size        # how much there is
    cdef Py_ssize_t low, high   # below and above which the protocol is told to go on and to pause
    cdef bint paused            # it was told to

    cdef int add(self, bytes data, Py_ssize_t sent) except -1
    cdef bytes front(self)
    cdef int send(self, port_socket fd) except -1
    cdef int clear(self) except -1


cdef enum due_t:
    NOTHING
    BEGIN       # make the protocol
    MEET        # tell the protocol
    READ        # try recv()
    GREET       # tell the protocol, and read what the client sends from then on


@cython.final
cdef class Transport(Watched):
    cdef object __weakref__
    cdef Connections connections
    cdef state_t *state             # the listener's, in which it is counted until it is closed
    cdef short_address_t address    # the peer's, until somebody asks and gets `peer`
    cdef object peer, sockname
    cdef origin_t *origin           # what was in place of an address; NULL: nothing
    cdef object sock                # the socket.socket that owns the descriptor, once somebody asked for one
    cdef object protocol
    cdef object context             # contextvars.Context in which the protocol is called
    cdef bytes unread               # what was read and given back, for the next protocol; or None
    cdef list held                  # bytes written in this call to the protocol or this turn; or None
    cdef Py_ssize_t held_size
    cdef WriteBuffer buffer         # None until something has to be kept
    cdef object emptied             # a Future while a file is sent: nothing is kept any more
    cdef object error               # what connection_lost() gets
    cdef int lost                   # connection_lost() is due or done; counts the writes after that
    cdef due_t due                  # at its next turn
    cdef takes_t takes              # how the protocol takes what is received
    cdef bint connected             # there is a protocol
    cdef bint holding               # the protocol is being called by us
    cdef bint single                # what was last sent at the end of a turn was one write
    cdef bint shared                # somebody has the descriptor and may use it between two writes
    cdef bint closing, paused, ended, eof_sent

    cdef int again(self, due_t due) except -1
    cdef int begin(self) except -1
    cdef int meet(self) except -1
    cdef bint tell_made(self) except -1
    cdef int read(self) except -1
    cdef Py_ssize_t receive(self, char *buffer, Py_ssize_t length, int *code) noexcept
    cdef int read_on(self) except -1
    cdef int hand_over(self, Py_ssize_t got, takes_t takes) except -1
    cdef int received_eof(self) except -1
    cdef int watch_or_end(self, short events) except -1
    cdef int unwatch(self) except -1
    cdef int report(self, error, str message) except -1
    cdef int fail(self, int code, str message) except -1
    cdef int fatal(self, error, str message) except -1
    cdef int force_close(self, error) except -1
    cdef int lose(self) except -1
    cdef int release(self) except -1
    cdef int shut(self) except -1
    cdef int check_writable(self, name) except -1
    cdef int transmit(self, data, const char *start, Py_ssize_t length) except -1
    cdef bint may_hold(self, Py_ssize_t length) except -1
    cdef Py_ssize_t room(self) noexcept
    cdef int send_held(self, int flags) except -1
    cdef int send_last(self) except -1
    cdef int enter_call(self, context) except -1
    cdef int leave_call(self, context) except -1
    cdef int release_held(self) except -1
    cdef int send(self, data, const char *start, Py_ssize_t length, int flags) except -1
    cdef int keep(self, data, const char *start, Py_ssize_t length, Py_ssize_t sent) except -1
    cdef int flush(self) except -1
    cdef Py_ssize_t unsent(self) noexcept
    cdef WriteBuffer write_buffer(self)
    cdef int maybe_pause(self) except -1
    cdef int maybe_resume(self) except -1
    cdef int tell(self, protocol, str name) except -1
    cdef int attach(self, protocol) except -1
    cdef object peer_address(self)
    cdef object own_address(self)
    cdef object own_socket(self)
    cdef int share(self) except -1
    cdef int show(self) except -1
    cdef int close_socket(self, port_socket fd) except -1


cdef Transport new_transport(
    Connections connections, state_t *state, port_socket fd, const port_address *address, int length)
