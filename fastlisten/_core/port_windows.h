/* The port on Windows: Winsock.  What each function does, port.h says. */
#ifndef FASTLISTEN_PORT_WINDOWS_H
#define FASTLISTEN_PORT_WINDOWS_H

#ifndef WIN32_LEAN_AND_MEAN
#  define WIN32_LEAN_AND_MEAN
#endif
#include <winsock2.h>
#include <ws2tcpip.h>
#include <windows.h>
#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* A SOCKET has 64 bits and no sign.  With one, a closed socket's fileno() can be passed on and fail as
 * what it is. */
typedef intptr_t port_socket;
typedef WSAPOLLFD port_pollfd;
typedef union {
    struct sockaddr any;
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
} port_address;

#define PORT_REUSE_ADDRESS 0
#define PORT_SIGNALS_APART 1
#define PORT_BALANCES 0

#define PORT_NO_SIGPIPE 0
#define PORT_MORE 0
#define PORT_SHUT_WRITE SD_SEND
#define PORT_SHUT_BOTH SD_BOTH

#define PORT_EAGAIN WSAEWOULDBLOCK
#define PORT_EWOULDBLOCK WSAEWOULDBLOCK
#define PORT_EINTR WSAEINTR
#define PORT_ECONNABORTED WSAECONNABORTED
#define PORT_ECONNRESET WSAECONNRESET
#define PORT_EPROTO PORT_NEVER(1)
#define PORT_ENOPROTOOPT WSAENOPROTOOPT
#define PORT_ENETDOWN WSAENETDOWN
#define PORT_ENETUNREACH WSAENETUNREACH
#define PORT_EHOSTDOWN WSAEHOSTDOWN
#define PORT_EHOSTUNREACH WSAEHOSTUNREACH
#define PORT_ENONET PORT_NEVER(2)
#define PORT_EPERM PORT_NEVER(3)
#define PORT_ETIMEDOUT WSAETIMEDOUT
#define PORT_ENOSR PORT_NEVER(4)
#define PORT_ESOCKTNOSUPPORT WSAESOCKTNOSUPPORT
#define PORT_EPROTONOSUPPORT WSAEPROTONOSUPPORT
#define PORT_ENETNAME_DELETED ERROR_NETNAME_DELETED
#define PORT_ENOTCONN WSAENOTCONN               /* Wine: the client had reset, and has no address any more */
#define PORT_EMFILE WSAEMFILE
#define PORT_ENFILE PORT_NEVER(5)
#define PORT_ENOBUFS WSAENOBUFS
#define PORT_ENOMEM WSA_NOT_ENOUGH_MEMORY
#define PORT_EBADF WSAEBADF
#define PORT_EINVAL WSAEINVAL
#define PORT_ENOTSOCK WSAENOTSOCK
#define PORT_ECANCELED WSA_OPERATION_ABORTED
#define PORT_CLOSED WSAENOTSOCK
#define PORT_PEER_RESET WSAECONNRESET

/* --- Errors --------------------------------------------------------------------------------------------- */

static inline int port_error(void)
{
    return WSAGetLastError();
}

/* --- Descriptors ---------------------------------------------------------------------------------------- */

static inline int port_close(port_socket s)
{
    return closesocket(s);
}

static inline int port_set_nonblocking(port_socket s, int on)
{
    u_long value = (u_long)on;
    return ioctlsocket(s, FIONBIO, &value);
}

static inline port_socket port_spare(void)
{
    return WSASocketW(AF_INET, SOCK_STREAM, 0, NULL, 0, WSA_FLAG_OVERLAPPED | WSA_FLAG_NO_HANDLE_INHERIT);
}

/* Connect `s` to itself by way of a listener, and return the other end: PORT_NO_SOCKET if that fails. */
static inline port_socket port_windows_other_end(port_socket s)
{
    struct sockaddr_in at, mine, whose;
    int at_size = sizeof at, mine_size = sizeof mine, size;
    port_socket other = PORT_NO_SOCKET, listener = port_spare();
    int code;
    if (listener == PORT_NO_SOCKET)
        return listener;
    memset(&at, 0, sizeof at);
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(listener, (struct sockaddr *)&at, at_size) == 0 && listen(listener, 8) == 0 &&
        getsockname(listener, (struct sockaddr *)&at, &at_size) == 0 &&
        connect(s, (struct sockaddr *)&at, at_size) == 0 &&
        getsockname(s, (struct sockaddr *)&mine, &mine_size) == 0) {
        for (;;) {
            size = sizeof whose;
            other = (port_socket)WSAAccept(listener, (struct sockaddr *)&whose, &size, NULL, 0);
            if (other == PORT_NO_SOCKET || whose.sin_port == mine.sin_port)
                break;
            port_close(other);                  /* any program here may have connected, too */
        }
    }
    code = port_error();
    port_close(listener);
    WSASetLastError(code);
    return other;
}

static inline int port_pair(port_socket ends[2])
{
    BOOL on = 1;                                /* a byte is not to wait until the one before is acknowledged */
    int code;
    ends[0] = port_spare();
    ends[1] = ends[0] == PORT_NO_SOCKET ? PORT_NO_SOCKET : port_windows_other_end(ends[0]);
    if (ends[1] != PORT_NO_SOCKET && SetHandleInformation((HANDLE)ends[1], HANDLE_FLAG_INHERIT, 0) &&
        setsockopt(ends[1], IPPROTO_TCP, TCP_NODELAY, (const char *)&on, sizeof on) == 0 &&
        port_set_nonblocking(ends[0], 1) == 0 && port_set_nonblocking(ends[1], 1) == 0)
        return 0;
    code = port_error();
    if (ends[0] != PORT_NO_SOCKET)
        port_close(ends[0]);
    if (ends[1] != PORT_NO_SOCKET)
        port_close(ends[1]);
    WSASetLastError(code);
    return -1;
}

static inline void port_make_room(port_socket s, int64_t count)
{
    (void)s; (void)count;
}

/* --- Accepting ------------------------------------------------------------------------------------------ */

static inline port_socket port_accept(port_socket listener, port_address *address, int *length,
                                      int nonblocking)
{
    socklen_t size = sizeof *address;
    port_socket s = accept(listener, &address->any, &size);
    /* Winsock hands the listener's mode down: always set it. */
    if (s != PORT_NO_SOCKET && (!SetHandleInformation((HANDLE)s, HANDLE_FLAG_INHERIT, 0) ||
                                port_set_nonblocking(s, nonblocking) != 0)) {
        int code = port_error();
        port_close(s);
        WSASetLastError(code);
        s = PORT_NO_SOCKET;
    }
    *length = size > (socklen_t)sizeof *address ? (int)sizeof *address : (int)size;
    return s;
}

static inline int port_peer(port_socket s, port_address *address, int *length)
{
    socklen_t size = sizeof *address;
    int failed = getpeername(s, &address->any, &size);
    *length = size > (socklen_t)sizeof *address ? (int)sizeof *address : (int)size;
    return failed == 0 ? 0 : -1;
}

static inline uint32_t port_peer_user(port_socket s)
{
    (void)s;
    return UINT32_MAX;
}

static inline int64_t port_thread(void)
{
    return (int64_t)GetCurrentThreadId() + 1;
}

static inline void port_interrupt(port_socket listener, int64_t thread)
{
    (void)thread;
    (void)CancelIoEx((HANDLE)listener, NULL);
}

static inline const char *port_unix_path(const port_address *address, int length, int *size)
{
    (void)address; (void)length;
    *size = 0;
    return NULL;
}

static inline int port_queue(port_socket listener, int *depth, int *limit)
{
    (void)listener; (void)depth; (void)limit;
    return -1;
}

/* --- Processes ------------------------------------------------------------------------------------------ */

static inline int port_steer(port_socket member, const int *targets, int count, int probe, int probe_target)
{
    (void)member; (void)targets; (void)count; (void)probe; (void)probe_target;
    WSASetLastError(WSAENOPROTOOPT);
    return -1;
}

static inline int port_end_with_parent(int64_t parent)
{
    (void)parent;
    return -1;
}

static inline int port_unshare(void *pages, size_t length)
{
    (void)pages; (void)length;                  /* nobody forks here */
    return 0;
}

/* --- One connection's calls ----------------------------------------------------------------------------- */

static inline ptrdiff_t port_recv(port_socket s, void *buffer, ptrdiff_t length, int flags)
{
    return recv(s, (char *)buffer, length > INT_MAX ? INT_MAX : (int)length, flags);
}

/* No flag keeps recv() from waiting: it is asked first whether it would. */
static inline ptrdiff_t port_peek(port_socket s, void *buffer, ptrdiff_t length)
{
    WSAPOLLFD poll = {(SOCKET)s, POLLIN, 0};
    int ready = WSAPoll(&poll, 1, 0);
    if (ready == 0)
        WSASetLastError(WSAEWOULDBLOCK);
    return ready <= 0 ? -1 : recv(s, (char *)buffer, length > INT_MAX ? INT_MAX : (int)length, MSG_PEEK);
}

static inline ptrdiff_t port_send(port_socket s, const void *buffer, ptrdiff_t length, int flags)
{
    return send(s, (const char *)buffer, length > INT_MAX ? INT_MAX : (int)length, flags);
}

static inline int port_shutdown(port_socket s, int how)
{
    return shutdown(s, how);
}

/* Winsock does not say whether shutdown() alone brings a blocked thread back, and in Wine it does not:
 * CancelIoEx() ends what has begun. */
static inline void port_cut(port_socket s)
{
    (void)shutdown(s, SD_BOTH);
    (void)CancelIoEx((HANDLE)s, NULL);
}

static inline int port_says_cut(int code)
{
    return code == WSAESHUTDOWN || code == WSA_OPERATION_ABORTED;
}

static inline int port_abort_on_close(port_socket s)
{
    struct linger linger = {1, 0};
    return setsockopt(s, SOL_SOCKET, SO_LINGER, (const char *)&linger, sizeof linger);
}

static inline int port_no_sigpipe(port_socket s)
{
    (void)s;
    return 0;
}

/* --- Waiting -------------------------------------------------------------------------------------------- */

static inline int port_poll(port_pollfd *polls, int n, int milliseconds)
{
    return WSAPoll(polls, (ULONG)n, milliseconds);
}

static inline port_socket port_poller(void)
{
    return PORT_NO_SOCKET;
}

static inline int port_poller_set(port_socket poller, port_socket s, short before, short events)
{
    (void)poller; (void)s; (void)before; (void)events;
    return -1;
}

static inline int port_poller_ready(port_socket poller, port_pollfd *ready, int n)
{
    (void)poller; (void)ready; (void)n;
    return 0;
}

static inline void port_sleep(int milliseconds)
{
    Sleep((DWORD)milliseconds);
}

static inline int64_t port_now(void)
{
    LARGE_INTEGER ticks, rate;
    QueryPerformanceFrequency(&rate);
    QueryPerformanceCounter(&ticks);
    return ticks.QuadPart / rate.QuadPart * 1000000000 +
           ticks.QuadPart % rate.QuadPart * 1000000000 / rate.QuadPart;
}

#endif
