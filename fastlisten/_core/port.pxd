"""What port.h offers, under the names the Cython code uses; port.h says what each does."""

from libc.stdint cimport int64_t, uint16_t, uint32_t


cdef extern from "fastlisten/_core/port.h" nogil:
    ctypedef long long port_socket  # an int on POSIX, 64 bits on Windows; -1: none
    port_socket PORT_NO_SOCKET

    ctypedef struct port_pollfd:
        port_socket fd
        short events
        short revents
    short POLLIN
    short POLLOUT

    int PORT_REUSE_ADDRESS
    bint PORT_SIGNALS_APART
    bint PORT_BALANCES
    int AF_UNIX
    int AF_INET
    int AF_INET6
    struct sockaddr:
        int sa_family
    struct sockaddr_in:
        int sin_addr
        uint16_t sin_port
    struct sockaddr_in6:
        int sin6_addr
        uint16_t sin6_port
        uint32_t sin6_flowinfo
        uint32_t sin6_scope_id
    ctypedef union port_address:
        sockaddr any
        sockaddr_in in4 "in"
        sockaddr_in6 in6
    const char *inet_ntop(int family, const void *source, char *text, int size)
    uint16_t ntohs(uint16_t number)
    uint32_t ntohl(uint32_t number)
    const char *port_unix_path(const port_address *address, int length, int *size)

    int port_error()
    bint port_would_block(int code)
    int PORT_CLOSED
    int PORT_PEER_RESET

    int PORT_EAGAIN, PORT_EWOULDBLOCK, PORT_EINTR
    int PORT_ECONNABORTED, PORT_ECONNRESET, PORT_ENETNAME_DELETED, PORT_EPROTO, PORT_ENOPROTOOPT
    int PORT_ENETDOWN, PORT_ENETUNREACH, PORT_EHOSTDOWN, PORT_EHOSTUNREACH, PORT_ENONET
    int PORT_EPERM, PORT_ETIMEDOUT, PORT_ENOSR, PORT_ESOCKTNOSUPPORT, PORT_EPROTONOSUPPORT, PORT_ENOTCONN
    int PORT_EMFILE, PORT_ENFILE, PORT_ENOBUFS, PORT_ENOMEM
    int PORT_EBADF, PORT_EINVAL, PORT_ENOTSOCK, PORT_ECANCELED

    int port_close(port_socket s)
    int port_set_nonblocking(port_socket s, int on)
    int port_pair(port_socket *ends)
    port_socket port_accept(
        port_socket listener, port_address *address, int *length, int nonblocking)
    int port_peer(port_socket s, port_address *address, int *length)
    uint32_t port_peer_user(port_socket s)
    int64_t port_thread()
    void port_interrupt(port_socket listener, int64_t thread)
    Py_ssize_t port_recv(port_socket s, void *buffer, Py_ssize_t length, int flags)
    Py_ssize_t port_peek(port_socket s, void *buffer, Py_ssize_t length)
    Py_ssize_t port_send(port_socket s, const void *buffer, Py_ssize_t length, int flags)
    int PORT_NO_SIGPIPE, PORT_MORE, PORT_SHUT_WRITE, PORT_SHUT_BOTH
    int port_shutdown(port_socket s, int how)
    void port_cut(port_socket s)
    bint port_says_cut(int code)
    int port_abort_on_close(port_socket s)
    int port_no_sigpipe(port_socket s)

    int port_poll_ns(port_pollfd *polls, int n, int64_t ns)
    port_socket port_poller()
    int port_poller_set(port_socket poller, port_socket s, short before, short events)
    int port_poller_ready(port_socket poller, port_pollfd *ready, int n)
    void port_sleep(int milliseconds)
    int64_t port_now()
    port_socket port_spare()
    void port_make_room(port_socket s, int64_t count)
    int port_queue(port_socket listener, int *depth, int *limit)

    int port_steer(port_socket member, const int *targets, int count, int probe, int probe_target)
    int port_end_with_parent(int64_t parent)
    int port_unshare(void *pages, size_t length)

    int64_t port_add(int64_t *number, int64_t by)
    int64_t port_get(int64_t *number)
    int64_t port_swap(int64_t *number, int64_t to)
    bint port_replace(int64_t *number, int64_t expected, int64_t to)


cdef extern from "fastlisten/_core/port.h":
    bint PORT_PARALLEL
    int port_raise(int code) except -1
