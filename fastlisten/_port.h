/* The port layer: raw POSIX and Winsock calls under one set of names.
 *
 * This header and setup.py are the only places that ask which system this is.  Every call returns a
 * value or fails with a code that port_error() tells; nothing here blocks but port_poll() and calls on
 * a blocking socket, and nothing needs the GIL but port_set_exception().
 */
#ifndef FASTLISTEN_PORT_H
#define FASTLISTEN_PORT_H

#include <Python.h>
#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef _WIN32
#  ifndef WIN32_LEAN_AND_MEAN
#    define WIN32_LEAN_AND_MEAN
#  endif
#  include <winsock2.h>
#  include <ws2tcpip.h>
#  include <windows.h>
/* A SOCKET has 64 bits and no sign.  With one, -1 is "none" as everywhere in Python's socket module, and a
 * closed socket's fileno() can be passed on and fail as what it is. */
typedef intptr_t port_socket;
typedef WSAPOLLFD port_pollfd;
typedef int port_length;                        /* how long a buffer may be in one call */
#  define PORT_LENGTH_MAX INT_MAX
#  define PORT_SHUT_WRITE SD_SEND
#  define PORT_REUSE_ADDRESS 0
#  define PORT_SIGNALS_APART 1                  /* Ctrl-C comes in a thread of its own */
#  define PORT_NO_SIGPIPE 0
#  define PORT_MORE 0
#else
#  include <arpa/inet.h>
#  include <errno.h>
#  include <fcntl.h>
#  include <netinet/in.h>
#  include <poll.h>
#  include <sys/ioctl.h>
#  include <sys/socket.h>
#  include <sys/un.h>
#  include <time.h>
#  include <unistd.h>
#  ifdef __linux__
#    include <netinet/tcp.h>
#    include <sys/epoll.h>
#    include <sys/resource.h>
#  endif
typedef int port_socket;
typedef struct pollfd port_pollfd;
typedef size_t port_length;
#  define PORT_LENGTH_MAX PY_SSIZE_T_MAX
#  define PORT_SHUT_WRITE SHUT_WR
#  define PORT_SIGNALS_APART 0
/* What nobody but us sends must not end a program that has SIGPIPE's default action: send(2). */
#  ifdef MSG_NOSIGNAL
#    define PORT_NO_SIGPIPE MSG_NOSIGNAL
#  else
#    define PORT_NO_SIGPIPE 0
#  endif
/* More follows at once, the end of the stream at least: one segment takes both, where that can be said. */
#  ifdef MSG_MORE
#    define PORT_MORE MSG_MORE
#  else
#    define PORT_MORE 0
#  endif
#  ifdef __CYGWIN__
#    define PORT_REUSE_ADDRESS 0
#  else
#    define PORT_REUSE_ADDRESS 1
#  endif
#endif

#define PORT_NO_SOCKET ((port_socket)-1)

/* --- Error codes ------------------------------------------------------------------------------------
 * PORT_X is what a failed call leaves for the condition POSIX calls X.  A condition that this system
 * lacks gets a value no call ever leaves, so that the error table needs no test for the system. */
#define PORT_NEVER(n) (-1000 - (n))

#ifdef _WIN32
#  define PORT_EAGAIN WSAEWOULDBLOCK
#  define PORT_EWOULDBLOCK WSAEWOULDBLOCK
#  define PORT_EINTR WSAEINTR
#  define PORT_ECONNABORTED WSAECONNABORTED
#  define PORT_ECONNRESET WSAECONNRESET
#  define PORT_EPROTO PORT_NEVER(1)
#  define PORT_ENOPROTOOPT WSAENOPROTOOPT
#  define PORT_ENETDOWN WSAENETDOWN
#  define PORT_ENETUNREACH WSAENETUNREACH
#  define PORT_EHOSTDOWN WSAEHOSTDOWN
#  define PORT_EHOSTUNREACH WSAEHOSTUNREACH
#  define PORT_ENONET PORT_NEVER(2)
#  define PORT_EPERM PORT_NEVER(3)
#  define PORT_ETIMEDOUT WSAETIMEDOUT
#  define PORT_ENOSR PORT_NEVER(4)
#  define PORT_ESOCKTNOSUPPORT WSAESOCKTNOSUPPORT
#  define PORT_EPROTONOSUPPORT WSAEPROTONOSUPPORT
#  define PORT_ENETNAME_DELETED ERROR_NETNAME_DELETED
#  define PORT_ENOTCONN WSAENOTCONN             /* Wine: the client had reset, and has no address any more */
#  define PORT_EMFILE WSAEMFILE
#  define PORT_ENFILE PORT_NEVER(5)
#  define PORT_ENOBUFS WSAENOBUFS
#  define PORT_ENOMEM WSA_NOT_ENOUGH_MEMORY
#  define PORT_EBADF WSAEBADF
#  define PORT_EINVAL WSAEINVAL
#  define PORT_ENOTSOCK WSAENOTSOCK
#  define PORT_CLOSED WSAENOTSOCK               /* what a call on the socket -1 leaves */
#  define PORT_PEER_RESET WSAECONNRESET
#else
#  define PORT_EAGAIN EAGAIN
#  define PORT_EWOULDBLOCK EWOULDBLOCK
#  define PORT_EINTR EINTR
#  define PORT_ECONNABORTED ECONNABORTED
#  define PORT_ECONNRESET PORT_NEVER(6)         /* POSIX accept() never leaves it */
#  define PORT_EPROTO EPROTO
#  define PORT_ENOPROTOOPT ENOPROTOOPT
#  define PORT_ENETDOWN ENETDOWN
#  define PORT_ENETUNREACH ENETUNREACH
#  define PORT_EHOSTDOWN EHOSTDOWN
#  define PORT_EHOSTUNREACH EHOSTUNREACH
#  ifdef ENONET
#    define PORT_ENONET ENONET
#  else
#    define PORT_ENONET PORT_NEVER(2)
#  endif
#  define PORT_EPERM EPERM
#  define PORT_ETIMEDOUT ETIMEDOUT
#  ifdef ENOSR
#    define PORT_ENOSR ENOSR
#  else
#    define PORT_ENOSR PORT_NEVER(4)
#  endif
#  define PORT_ESOCKTNOSUPPORT ESOCKTNOSUPPORT
#  define PORT_EPROTONOSUPPORT EPROTONOSUPPORT
#  define PORT_ENETNAME_DELETED PORT_NEVER(7)
#  define PORT_ENOTCONN PORT_NEVER(8)           /* nor this */
#  define PORT_EMFILE EMFILE
#  define PORT_ENFILE ENFILE
#  define PORT_ENOBUFS ENOBUFS
#  define PORT_ENOMEM ENOMEM
#  define PORT_EBADF EBADF
#  define PORT_EINVAL EINVAL
#  define PORT_ENOTSOCK ENOTSOCK
#  define PORT_CLOSED EBADF
#  define PORT_PEER_RESET ECONNRESET
#endif

static inline int port_error(void)
{
#ifdef _WIN32
    return WSAGetLastError();
#else
    return errno;
#endif
}

static inline int port_would_block(int code)
{
    return code == PORT_EAGAIN || code == PORT_EWOULDBLOCK;
}

/* Set the OSError (or the subclass) that CPython makes of the code.  Needs the GIL. */
static inline void port_set_exception(int code)
{
#ifdef _WIN32
    PyErr_SetExcFromWindowsErr(PyExc_OSError, code);
#else
    errno = code;
    PyErr_SetFromErrno(PyExc_OSError);
#endif
}

/* --- Descriptors ------------------------------------------------------------------------------------ */

static inline int port_close(port_socket s)
{
#ifdef _WIN32
    return closesocket(s);
#else
    return close(s);                            /* never retried: close(2), "Dealing with EINTR" */
#endif
}

static inline int port_set_nonblocking(port_socket s, int on)
{
#ifdef _WIN32
    u_long value = (u_long)on;
    return ioctlsocket(s, FIONBIO, &value);
#else
    return ioctl(s, FIONBIO, &on);
#endif
}

/* --- Accepting -------------------------------------------------------------------------------------- */

/* A client's address as the kernel wrote it.  `length` is 0 where the system tells none. */
typedef union {
    struct sockaddr any;
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
#ifndef _WIN32
    struct sockaddr_un un;
#endif
} port_address;

/* The path in a unix socket's address, `*size` bytes long (0: unnamed); NULL in any other family. */
static inline const char *port_unix_path(const port_address *address, int length, int *size)
{
#ifndef _WIN32
    if (address->any.sa_family == AF_UNIX) {
        int start = (int)offsetof(struct sockaddr_un, sun_path);
        *size = length > start ? length - start : 0;
        return address->un.sun_path;
    }
#endif
    (void)address; (void)length;
    *size = 0;
    return NULL;
}

/* Accept one client: never inherited by child processes, and blocking or not as asked, whatever the
 * listener is.  accept4(2) sets both in the call; elsewhere a fork in another thread can come between. */
static inline port_socket port_accept(port_socket listener, port_address *address, int *length, int nonblocking)
{
    socklen_t size = sizeof *address;
    port_socket s;
#if defined(__linux__) || defined(__FreeBSD__) || defined(__NetBSD__) || defined(__OpenBSD__) || \
    defined(__DragonFly__)
    s = accept4(listener, &address->any, &size, SOCK_CLOEXEC | (nonblocking ? SOCK_NONBLOCK : 0));
#else
    s = accept(listener, &address->any, &size);
    if (s != PORT_NO_SOCKET) {
#  ifdef _WIN32
        int failed = !SetHandleInformation((HANDLE)s, HANDLE_FLAG_INHERIT, 0);
#  else
        int failed = fcntl(s, F_SETFD, FD_CLOEXEC) < 0;
#  endif
        /* Winsock and the BSD kernels hand the listener's mode down: always set it. */
        if (failed || port_set_nonblocking(s, nonblocking) != 0) {
            int code = port_error();
            port_close(s);
#  ifdef _WIN32
            WSASetLastError(code);
#  else
            errno = code;
#  endif
            return PORT_NO_SOCKET;
        }
    }
#endif
    *length = size > (socklen_t)sizeof *address ? (int)sizeof *address : (int)size;
    return s;
}

/* --- One connection's calls ------------------------------------------------------------------------- */

static inline Py_ssize_t port_recv(port_socket s, void *buffer, Py_ssize_t length, int flags)
{
    return recv(s, (char *)buffer, (port_length)(length > PORT_LENGTH_MAX ? PORT_LENGTH_MAX : length), flags);
}

static inline Py_ssize_t port_send(port_socket s, const void *buffer, Py_ssize_t length, int flags)
{
    return send(s, (const char *)buffer, (port_length)(length > PORT_LENGTH_MAX ? PORT_LENGTH_MAX : length),
                flags);
}

static inline int port_shutdown(port_socket s, int how)
{
    return shutdown(s, how);
}

/* End both directions, so that a thread that is blocked in a call on the socket comes back.  Winsock does
 * not say whether shutdown() alone does that, and in Wine it does not: CancelIoEx() ends what has begun. */
static inline void port_cut(port_socket s)
{
    /* No result matters: the client may be gone already, and nothing may be under way. */
#ifdef _WIN32
    (void)port_shutdown(s, SD_BOTH);
    (void)CancelIoEx((HANDLE)s, NULL);
#else
    (void)port_shutdown(s, SHUT_RDWR);
#endif
}

/* Whether this is what a call says on a socket that port_cut() has cut.  POSIX says nothing: recv() returns
 * 0, as if the client had sent all. */
static inline int port_says_cut(int code)
{
#ifdef _WIN32
    return code == WSAESHUTDOWN || code == WSA_OPERATION_ABORTED;
#else
    (void)code;
    return 0;
#endif
}

/* Tell a client that there is no place for it, and close.  With no message it gets a
 * reset (SO_LINGER 0, socket(7)).  With one, what it has sent is read first: closing over unread bytes
 * would reset the connection and could take the message away (RFC 1122, 4.2.2.13). */
static inline void port_refuse(port_socket s, const char *message, Py_ssize_t length)
{
    if (length > 0) {
        char scrap[4096];
        int rounds = 16;                        /* a bound: a client that never stops talking is cut off */
        (void)port_set_nonblocking(s, 1);
#ifdef SO_NOSIGPIPE                             /* macOS, which has no MSG_NOSIGNAL */
        int on = 1;
        (void)setsockopt(s, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#endif
        /* what a fresh buffer does not take is not sent */
        (void)port_send(s, message, length, PORT_NO_SIGPIPE | PORT_MORE);
        (void)port_shutdown(s, PORT_SHUT_WRITE);
        while (rounds-- > 0 && port_recv(s, scrap, sizeof scrap, 0) > 0) {}
    } else {
        struct linger abort_on_close;
        abort_on_close.l_onoff = 1;
        abort_on_close.l_linger = 0;
        (void)setsockopt(s, SOL_SOCKET, SO_LINGER, (const char *)&abort_on_close, sizeof abort_on_close);
    }
    (void)port_close(s);                        /* nobody is left to tell of a failure */
}

/* --- Waiting ---------------------------------------------------------------------------------------- */

/* poll(2) or WSAPoll over n sockets; milliseconds < 0 waits without end. */
static inline int port_poll(port_pollfd *polls, int n, int milliseconds)
{
#ifdef _WIN32
    return WSAPoll(polls, (ULONG)n, milliseconds);
#else
    return poll(polls, (nfds_t)n, milliseconds);
#endif
}

/* poll() with a time in nanoseconds (< 0 without end), rounded up to poll's milliseconds. */
static inline int port_poll_ns(port_pollfd *polls, int n, int64_t ns)
{
    int64_t ms = ns < 0 ? -1 : (ns + 999999) / 1000000;
    return port_poll(polls, n, ms > INT_MAX ? INT_MAX : (int)ms);
}

/* A poller watches any number of sockets and is itself a descriptor that another loop can watch:
 * epoll(7).  PORT_NO_SOCKET where it cannot be had; port_error() tells why only where there is one. */
static inline port_socket port_poller(void)
{
#ifdef __linux__
    return epoll_create1(EPOLL_CLOEXEC);
#else
    return PORT_NO_SOCKET;
#endif
}

/* Watch s for other events (POLLIN, POLLOUT; 0: not at all) than before. */
static inline int port_poller_set(port_socket poller, port_socket s, short before, short events)
{
#ifdef __linux__
    struct epoll_event event;
    memset(&event, 0, sizeof event);
    event.events = (uint32_t)events;            /* epoll's EPOLLIN and EPOLLOUT are poll's numbers */
    event.data.fd = s;
    if (before) {
        if (epoll_ctl(poller, events ? EPOLL_CTL_MOD : EPOLL_CTL_DEL, s, &event) == 0)
            return 0;
        if (errno != ENOENT)
            return -1;
        /* a forked child that closed its copy has taken s out of the poller that both have */
    }
    return events ? epoll_ctl(poller, EPOLL_CTL_ADD, s, &event) : 0;
#else
    (void)poller; (void)s; (void)before; (void)events;
    return -1;
#endif
}

/* Which of the poller's sockets are ready now, at most n (and 64); returns how many, never waits. */
static inline int port_poller_ready(port_socket poller, port_pollfd *ready, int n)
{
#ifdef __linux__
    struct epoll_event events[64];
    int i, found = epoll_wait(poller, events, n < 64 ? n : 64, 0);
    for (i = 0; i < found; i++) {
        ready[i].fd = events[i].data.fd;
        ready[i].revents = (short)events[i].events;
    }
    return found;
#else
    (void)poller; (void)ready; (void)n;
    return 0;
#endif
}

/* A monotonic clock, in nanoseconds from an arbitrary start. */
static inline int64_t port_now(void)
{
#ifdef _WIN32
    LARGE_INTEGER ticks, rate;
    QueryPerformanceFrequency(&rate);
    QueryPerformanceCounter(&ticks);
    return ticks.QuadPart / rate.QuadPart * 1000000000 +
           ticks.QuadPart % rate.QuadPart * 1000000000 / rate.QuadPart;
#else
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
#endif
}

/* Wake whoever polls the other end of a non-blocking socket pair.  A full pipe is a wake-up too. */
static inline void port_ring(port_socket s)
{
    (void)port_send(s, "", 1, PORT_NO_SIGPIPE);
}

/* Take all rings out; one poll of the other end stands for them all. */
static inline void port_unring(port_socket s)
{
    char rings[64];
    while (port_recv(s, rings, sizeof rings, 0) == (Py_ssize_t)sizeof rings) {}
}

/* --- A spare descriptor, given up to take and refuse a client when the others have run out ---------- */

static inline port_socket port_spare(void)
{
#ifdef _WIN32
    return WSASocketW(AF_INET, SOCK_STREAM, 0, NULL, 0, WSA_FLAG_OVERLAPPED | WSA_FLAG_NO_HANDLE_INHERIT);
#else
    return open("/dev/null", O_RDONLY | O_CLOEXEC);
#endif
}

/* Have room for `count` more descriptors, at most 4,096 (32 KB), by copying one that far up for a moment.
 * Linux grows a process's table as it fills, and with several threads each growth waits for an RCU grace
 * period, ten or twenty milliseconds in which nobody is accepted (fs/file.c, expand_fdtable()).  The table
 * never shrinks, so it is made large once.  RLIMIT_NOFILE bounds it, as it does the clients. */
static inline void port_make_room(port_socket s, int64_t count)
{
#ifdef __linux__
    struct rlimit limit;
    int lowest_free = fcntl(s, F_DUPFD_CLOEXEC, 0);
    if (lowest_free >= 0 && getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        int far_up = lowest_free + (int)(count < 4096 ? count : 4096);
        if ((rlim_t)far_up >= limit.rlim_cur)
            far_up = (int)limit.rlim_cur - 1;
        far_up = fcntl(s, F_DUPFD_CLOEXEC, far_up);
        if (far_up >= 0)
            close(far_up);
    }
    if (lowest_free >= 0)
        close(lowest_free);
#else
    (void)s, (void)count;
#endif
}

/* How many clients the kernel has queued for a TCP listener, and how many it would; -1 where it does
 * not tell.  Linux: tcp_get_info() fills these two fields of a listener so (net/ipv4/tcp.c). */
static inline int port_queue(port_socket listener, int *depth, int *limit)
{
#ifdef __linux__
    struct tcp_info info;
    socklen_t size = sizeof info;
    /* qemu's user mode says that it went well, and writes four bytes. */
    if (getsockopt(listener, IPPROTO_TCP, TCP_INFO, &info, &size) == 0 &&
        size >= offsetof(struct tcp_info, tcpi_sacked) + sizeof info.tcpi_sacked &&
        info.tcpi_state == 10 /* TCP_LISTEN; glibc and the kernel each declare the name */) {
        *depth = (int)info.tcpi_unacked;
        *limit = (int)info.tcpi_sacked;
        return 0;
    }
#else
    (void)listener; (void)depth; (void)limit;
#endif
    return -1;
}

/* Whether Python code of several threads runs at the same time. */
#ifdef Py_GIL_DISABLED
#  define PORT_PARALLEL 1
#else
#  define PORT_PARALLEL 0
#endif

/* --- Numbers that several threads count ------------------------------------------------------------- */

#ifdef _MSC_VER
#  include <intrin.h>
static inline int64_t port_add(volatile int64_t *number, int64_t by)
{
    return _InterlockedExchangeAdd64(number, by) + by;
}
static inline int64_t port_get(volatile int64_t *number)
{
    return _InterlockedExchangeAdd64(number, 0);
}
static inline int64_t port_swap(volatile int64_t *number, int64_t to)
{
    return _InterlockedExchange64(number, to);
}
static inline int port_replace(volatile int64_t *number, int64_t from, int64_t to)
{
    return _InterlockedCompareExchange64(number, to, from) == from;
}
#else
static inline int64_t port_add(volatile int64_t *number, int64_t by)
{
    return __atomic_add_fetch(number, by, __ATOMIC_SEQ_CST);
}
static inline int64_t port_get(volatile int64_t *number)
{
    return __atomic_load_n(number, __ATOMIC_SEQ_CST);
}
static inline int64_t port_swap(volatile int64_t *number, int64_t to)
{
    return __atomic_exchange_n(number, to, __ATOMIC_SEQ_CST);
}
static inline int port_replace(int64_t *number, int64_t from, int64_t to)
{
    return __atomic_compare_exchange_n(number, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
#endif

#endif
