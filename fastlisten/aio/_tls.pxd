cimport cython

from fastlisten.aio._transport cimport Receiver, Transport

cdef class TlsTransport(Receiver)


@cython.final
cdef class HandshakeThreads:
    cdef readonly int count
    cdef object executor
    cdef object process         # whose threads they are: a forked child has none of them
    cdef object waiting         # a deque of transports that are to have a thread
    cdef int free               # threads that have no handshake
    cdef bint closed

    cdef bint run(self, TlsTransport transport) except -1
    cdef int taken(self) except -1


@cython.final
cdef class TlsSettings:
    cdef readonly object loop
    cdef readonly object context
    cdef readonly bint server_side
    cdef readonly object server_hostname
    cdef readonly object handshake_timeout, shutdown_timeout  # in seconds
    cdef readonly HandshakeThreads threads                    # None: handshakes run on the event loop


@cython.final
cdef class Window:
    cdef object owner       # keeps the memory
    cdef char *start
    cdef Py_ssize_t length


@cython.final
cdef class Session:
    cdef object ssl_object
    cdef object decrypt, encrypt    # the SSLObject's read() and write()
    cdef object incoming            # the MemoryBIO of what was received
    cdef object outgoing            # ... and of what is to be sent
    cdef object put, take           # their write() and read()
    cdef Window window
    cdef list sealed                # records that were taken from it already, to be sent first
    cdef char *received             # what the peer has sent and is not copied yet, while fill() may come
    cdef Py_ssize_t received_size
    cdef bytes unread               # what was decrypted and given back, for the next protocol; or None
    cdef object error               # ends the session, once what came before it is delivered
    cdef object peer_certificate    # the client's, as getpeercert() has it
    cdef bint inside                # OpenSSL may have more, or a part of a record
    cdef bint full                  # the last fill() had no more room
    cdef bint ended                 # the peer has sent its close_notify
    cdef bint cut                   # ... or nothing more comes from it, without one
    cdef bint busy                  # a thread has the session, and nobody else may touch it
    cdef list later                 # what was received meanwhile
    cdef Py_ssize_t later_size

    cdef int feed(self, char *data, Py_ssize_t length) except -1
    cdef int keep(self, Py_ssize_t most) except -1
    cdef bint catch_up(self) except -1
    cdef bytes read(self, Py_ssize_t most)
    cdef Py_ssize_t seal(self, bytes data) except -1
    cdef bytes to_send(self)
    cdef Py_ssize_t fill(self, char *buffer, Py_ssize_t room) except -1


cdef enum told_t:   # what the protocol was told
    OF_NOTHING
    OF_CONNECTION
    OF_EOF


cdef enum tls_state_t:
    HANDSHAKE
    OPEN
    CLOSING     # our close_notify is on its way, the peer's is waited for
    CLOSED      # the transport below is, or is being closed


@cython.final
cdef class TlsTransport(Receiver):
    cdef object __weakref__
    cdef TlsSettings settings
    cdef Session session
    cdef Transport below            # what it sits on; None until that has told of itself
    cdef object protocol
    cdef object waiter              # a Future, told when the handshake is over; or None
    cdef object timer               # of the handshake, then of the end; or None
    cdef list held                  # what was written and is not encrypted yet; or None
    cdef Py_ssize_t held_size
    cdef tuple limits               # between these many unsent bytes the protocol may write or has to pause
    cdef tuple read_limits          # the same for what is received and not read
    cdef tls_state_t state
    cdef told_t told
    cdef int lost                   # writes after the end
    cdef bint buffered              # the protocol is a BufferedProtocol
    cdef bint holding               # the protocol is being called by us
    cdef bint paused                # it is to read nothing
    cdef bint below_paused          # and so is the transport below
    cdef bint full                  # the transport below has enough to send
    cdef bint writer_paused         # and the protocol was told so

    cdef int begin(self) except -1
    cdef int pump(self) except -1
    cdef int shake_hands(self) except -1
    cdef object try_handshake(self)
    cdef int handshake_tried(self, error) except -1
    cdef int opened(self) except -1
    cdef int handshake_failed(self, error) except -1
    cdef int count_failure(self, error) except -1
    cdef int tell_waiter(self, error) except -1
    cdef int read(self) except -1
    cdef bint read_bytes(self) except -1
    cdef bint read_into_buffer(self) except -1
    cdef int pace_below(self) except -1
    cdef int tell_eof(self) except -1
    cdef int put(self, data) except -1
    cdef int flush(self) except -1
    cdef int encrypt_held(self) except -1
    cdef int send_outgoing(self) except -1
    cdef int pace_writer(self) except -1
    cdef int tell_protocol(self, str name) except -1
    cdef int shut(self) except -1
    cdef int shake_goodbye(self) except -1
    cdef int stop_timer(self) except -1
    cdef int fatal(self, error, str message) except -1
    cdef int kill(self, error) except -1
