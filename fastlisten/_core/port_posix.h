/* The port on POSIX: Linux with epoll, the BSDs, macOS, Cygwin.  What each function does, port.h says. */
#ifndef FASTLISTEN_PORT_POSIX_H
#define FASTLISTEN_PORT_POSIX_H

#if defined(__linux__) && !defined(_GNU_SOURCE)
#  define _GNU_SOURCE 1                         /* accept4(); Python.h defines it so, too */
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#  include <linux/filter.h>
#  include <netinet/tcp.h>
#  include <sys/epoll.h>
#  include <sys/prctl.h>
#  include <sys/resource.h>
#endif

typedef int port_socket;
typedef struct pollfd port_pollfd;
typedef union {
    struct sockaddr any;
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
    struct sockaddr_un un;
} port_address;

#ifdef __CYGWIN__                               /* Winsock's SO_REUSEADDR: others get in */
#  define PORT_REUSE_ADDRESS 0
#else
#  define PORT_REUSE_ADDRESS 1
#endif
#define PORT_SIGNALS_APART 0
#ifdef __linux__                                /* elsewhere the last one that listens gets them all */
#  define PORT_BALANCES 1
#else
#  define PORT_BALANCES 0
#endif

#ifdef MSG_NOSIGNAL
#  define PORT_NO_SIGPIPE MSG_NOSIGNAL
#else
#  define PORT_NO_SIGPIPE 0
#endif
#ifdef MSG_MORE
#  define PORT_MORE MSG_MORE
#else
#  define PORT_MORE 0
#endif
#define PORT_SHUT_WRITE SHUT_WR
#define PORT_SHUT_BOTH SHUT_RDWR

#define PORT_EAGAIN EAGAIN
#define PORT_EWOULDBLOCK EWOULDBLOCK
#define PORT_EINTR EINTR
#define PORT_ECONNABORTED ECONNABORTED
#define PORT_ECONNRESET PORT_NEVER(6)
#define PORT_EPROTO EPROTO
#define PORT_ENOPROTOOPT ENOPROTOOPT
#define PORT_ENETDOWN ENETDOWN
#define PORT_ENETUNREACH ENETUNREACH
#define PORT_EHOSTDOWN EHOSTDOWN
#define PORT_EHOSTUNREACH EHOSTUNREACH
#ifdef ENONET
#  define PORT_ENONET ENONET
#else
#  define PORT_ENONET PORT_NEVER(2)
#endif
#define PORT_EPERM EPERM
#define PORT_ETIMEDOUT ETIMEDOUT
#ifdef ENOSR
#  define PORT_ENOSR ENOSR
#else
#  define PORT_ENOSR PORT_NEVER(4)
#endif
#define PORT_ESOCKTNOSUPPORT ESOCKTNOSUPPORT
#define PORT_EPROTONOSUPPORT EPROTONOSUPPORT
#define PORT_ENETNAME_DELETED PORT_NEVER(7)
#define PORT_ENOTCONN PORT_NEVER(8)
#define PORT_EMFILE EMFILE
#define PORT_ENFILE ENFILE
#define PORT_ENOBUFS ENOBUFS
#define PORT_ENOMEM ENOMEM
#define PORT_EBADF EBADF
#define PORT_EINVAL EINVAL
#define PORT_ENOTSOCK ENOTSOCK
#define PORT_ECANCELED PORT_NEVER(9)
#define PORT_CLOSED EBADF
#define PORT_PEER_RESET ECONNRESET

/* --- Errors --------------------------------------------------------------------------------------------- */

static inline int port_error(void)
{
    return errno;
}

/* --- Descriptors ---------------------------------------------------------------------------------------- */

static inline int port_close(port_socket s)
{
    return close(s);                            /* never retried: close(2), "Dealing with EINTR" */
}

static inline int port_set_nonblocking(port_socket s, int on)
{
    return ioctl(s, FIONBIO, &on);
}

static inline port_socket port_spare(void)
{
    return open("/dev/null", O_RDONLY | O_CLOEXEC);
}

/* By calls of its own what SOCK_CLOEXEC and SOCK_NONBLOCK do: for a system without them. */
static inline int port_posix_flags(port_socket s, int nonblocking)
{
    return fcntl(s, F_SETFD, FD_CLOEXEC) < 0 ? -1 : port_set_nonblocking(s, nonblocking);
}

static inline int port_pair(port_socket ends[2])
{
#ifdef SOCK_NONBLOCK
    return socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends);
#else
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0)
        return -1;
    if (port_posix_flags(ends[0], 1) == 0 && port_posix_flags(ends[1], 1) == 0)
        return 0;
    {
        int code = errno;
        port_close(ends[0]);
        port_close(ends[1]);
        errno = code;
    }
    return -1;
#endif
}

/* Linux grows a process's table as it fills, and with several threads each growth waits for an RCU grace
 * period, ten or twenty milliseconds in which nobody is accepted (fs/file.c, expand_fdtable()).  The table
 * never shrinks, so it is made large once, for at most 4,096 (32 KB), by copying a descriptor that far up
 * for a moment.  RLIMIT_NOFILE bounds it, as it does the clients. */
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
    (void)s; (void)count;
#endif
}

/* --- Accepting ------------------------------------------------------------------------------------------ */

/* accept(2), and then by calls of their own what accept4() does in one: for a system without it. */
static inline port_socket port_posix_accept(port_socket listener, struct sockaddr *address, socklen_t *size,
                                            int nonblocking)
{
    int s = accept(listener, address, size);
    /* The BSD kernels hand the listener's mode down: always set it. */
    if (s >= 0 && port_posix_flags(s, nonblocking) != 0) {
        int code = errno;
        port_close(s);
        errno = code;
        return PORT_NO_SOCKET;
    }
    return s;
}

static inline port_socket port_accept(port_socket listener, port_address *address, int *length,
                                      int nonblocking)
{
    socklen_t size = sizeof *address;
    port_socket s;
#if defined(__linux__) || defined(__FreeBSD__) || defined(__NetBSD__) || defined(__OpenBSD__) || \
    defined(__DragonFly__)
    s = accept4(listener, &address->any, &size, SOCK_CLOEXEC | (nonblocking ? SOCK_NONBLOCK : 0));
    /* A seccomp filter or an emulator may be older than the call.  Each accept finds that out anew: what
     * remembered it would be state that threads and interpreters share. */
    if (s < 0 && errno == ENOSYS)
#endif
        s = port_posix_accept(listener, &address->any, &size, nonblocking);
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
#if defined(__linux__) || defined(__CYGWIN__)    /* unix(7) */
    struct ucred peer;
    socklen_t size = sizeof peer;
    return getsockopt(s, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 ? (uint32_t)peer.uid : UINT32_MAX;
#else                                           /* getpeereid(3) */
    uid_t user;
    gid_t group;
    return getpeereid(s, &user, &group) == 0 ? (uint32_t)user : UINT32_MAX;
#endif
}

static inline int64_t port_thread(void)
{
    return (int64_t)(uintptr_t)pthread_self();
}

static inline void port_posix_nothing(int number)
{
    (void)number;
}

/* Only a signal ends a sleep in accept(), and only one that somebody handles.  SIGURG means nothing unless a
 * program asks for it, and whoever handles it must expect it at any time; Go's runtime uses it so, too.  The
 * handler stays: to take it away would be to take away what another thread has set meanwhile. */
static inline void port_interrupt(port_socket listener, int64_t thread)
{
    struct sigaction action;
    (void)listener;
    if (sigaction(SIGURG, NULL, &action) == 0 && !(action.sa_flags & SA_SIGINFO) &&
        (action.sa_handler == SIG_DFL || action.sa_handler == SIG_IGN)) {
        memset(&action, 0, sizeof action);      /* no SA_RESTART: accept() would sleep again */
        action.sa_handler = port_posix_nothing;
        (void)sigaction(SIGURG, &action, NULL);
    }
    (void)pthread_kill((pthread_t)(uintptr_t)thread, SIGURG);
}

static inline const char *port_unix_path(const port_address *address, int length, int *size)
{
    int start = (int)offsetof(struct sockaddr_un, sun_path);
    *size = 0;
    if (address->any.sa_family != AF_UNIX)
        return NULL;
    if (length > start)
        *size = length - start;
    return address->un.sun_path;
}

/* Linux: tcp_get_info() fills these two fields of a listener so (net/ipv4/tcp.c). */
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

/* --- Processes ------------------------------------------------------------------------------------------ */

#ifdef SO_ATTACH_REUSEPORT_CBPF
/* One instruction of classic BPF; see linux/filter.h and the kernel's Documentation/networking/filter.rst. */
static inline void port_posix_bpf(struct sock_filter *program, unsigned short *length, int code, int if_true,
                                  int if_false, uint32_t operand)
{
    struct sock_filter *next = &program[(*length)++];
    next->code = (uint16_t)code;
    next->jt = (uint8_t)if_true;
    next->jf = (uint8_t)if_false;
    next->k = operand;
}

/* What sends one source port to one place.  The program is given the first packet of a connection, from behind its
 * TCP header on; its IP header is at SKF_NET_OFF, and the source port is what follows that. */
static inline void port_posix_bpf_probe(struct sock_filter *program, unsigned short *length, int probe, int target)
{
    const uint32_t header = (uint32_t)SKF_NET_OFF;
    port_posix_bpf(program, length, BPF_LD | BPF_B | BPF_ABS, 0, 0, header);
    port_posix_bpf(program, length, BPF_ALU | BPF_AND | BPF_K, 0, 0, 0xf0);
    port_posix_bpf(program, length, BPF_JMP | BPF_JEQ | BPF_K, 0, 2, 0x60);
    port_posix_bpf(program, length, BPF_LDX | BPF_IMM, 0, 0, 40);      /* IPv6's header has a fixed length */
    port_posix_bpf(program, length, BPF_JMP | BPF_JA, 0, 0, 1);
    port_posix_bpf(program, length, BPF_LDX | BPF_B | BPF_MSH, 0, 0, header);
    port_posix_bpf(program, length, BPF_LD | BPF_H | BPF_IND, 0, 0, header);
    port_posix_bpf(program, length, BPF_JMP | BPF_JEQ | BPF_K, 0, 1, (uint32_t)probe);
    port_posix_bpf(program, length, BPF_RET | BPF_K, 0, 0, (uint32_t)target);
}
#endif

static inline int port_steer(port_socket member, const int *targets, int count, int probe, int probe_target)
{
#ifdef SO_ATTACH_REUSEPORT_CBPF
    struct sock_fprog all = {0, NULL};
    int i, result, code;
    if (count < 1 || count > (BPF_MAXINSNS - 16) / 2) {
        errno = EINVAL;
        return -1;
    }
    all.filter = malloc(((size_t)count * 2 + 16) * sizeof *all.filter);
    if (all.filter == NULL)
        return -1;
    if (probe)
        port_posix_bpf_probe(all.filter, &all.len, probe, probe_target);
    port_posix_bpf(all.filter, &all.len, BPF_LD | BPF_W | BPF_ABS, 0, 0, (uint32_t)(SKF_AD_OFF + SKF_AD_RANDOM));
    port_posix_bpf(all.filter, &all.len, BPF_ALU | BPF_MOD | BPF_K, 0, 0, (uint32_t)count);
    for (i = 0; i < count - 1; i++) {
        port_posix_bpf(all.filter, &all.len, BPF_JMP | BPF_JEQ | BPF_K, 0, 1, (uint32_t)i);
        port_posix_bpf(all.filter, &all.len, BPF_RET | BPF_K, 0, 0, (uint32_t)targets[i]);
    }
    port_posix_bpf(all.filter, &all.len, BPF_RET | BPF_K, 0, 0, (uint32_t)targets[i]);
    result = setsockopt(member, SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, &all, sizeof all);
    code = errno;
    free(all.filter);
    errno = code;
    return result;
#else
    (void)member; (void)targets; (void)count; (void)probe; (void)probe_target;
    errno = ENOPROTOOPT;
    return -1;
#endif
}

static inline int port_end_with_parent(int64_t parent)
{
#ifdef __linux__
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0)
        return -1;
    return getppid() != (pid_t)parent;          /* it may have ended before */
#else
    (void)parent;
    return -1;
#endif
}

static inline int port_unshare(void *pages, size_t length)
{
    int code = 0;
    void *copy = malloc(length);
    if (copy == NULL)
        return -1;
    memcpy(copy, pages, length);
    if (mmap(pages, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_FIXED, -1, 0) == MAP_FAILED)
        code = errno;
    else
        memcpy(pages, copy, length);
    free(copy);
    errno = code;
    return code ? -1 : 0;
}

/* --- One connection's calls ----------------------------------------------------------------------------- */

static inline ptrdiff_t port_recv(port_socket s, void *buffer, ptrdiff_t length, int flags)
{
    return recv(s, buffer, (size_t)length, flags);
}

static inline ptrdiff_t port_peek(port_socket s, void *buffer, ptrdiff_t length)
{
    return recv(s, buffer, (size_t)length, MSG_PEEK | MSG_DONTWAIT);
}

static inline ptrdiff_t port_send(port_socket s, const void *buffer, ptrdiff_t length, int flags)
{
    return send(s, buffer, (size_t)length, flags);
}

static inline int port_shutdown(port_socket s, int how)
{
    return shutdown(s, how);
}

static inline void port_cut(port_socket s)
{
    (void)shutdown(s, SHUT_RDWR);
}

static inline int port_says_cut(int code)
{
    (void)code;
    return 0;
}

static inline int port_abort_on_close(port_socket s)
{
    struct linger linger = {1, 0};
    return setsockopt(s, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
}

static inline int port_no_sigpipe(port_socket s)
{
#ifdef SO_NOSIGPIPE                             /* macOS, which has no MSG_NOSIGNAL */
    int on = 1;
    return setsockopt(s, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#else
    (void)s;
    return 0;
#endif
}

/* --- Waiting -------------------------------------------------------------------------------------------- */

static inline int port_poll(port_pollfd *polls, int n, int milliseconds)
{
    return poll(polls, (nfds_t)n, milliseconds);
}

static inline port_socket port_poller(void)
{
#ifdef __linux__
    return epoll_create1(EPOLL_CLOEXEC);
#else
    return PORT_NO_SOCKET;
#endif
}

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

static inline void port_sleep(int milliseconds)
{
    struct timespec left;
    left.tv_sec = milliseconds / 1000;
    left.tv_nsec = milliseconds % 1000 * 1000000L;
    (void)nanosleep(&left, NULL);               /* cut short by a signal, which is as well */
}

static inline int64_t port_now(void)
{
    struct timespec now;
    /* A time that was left unset could be years away: it is asked once more, and then is 0. */
    if (clock_gettime(CLOCK_MONOTONIC, &now) != 0 && clock_gettime(CLOCK_MONOTONIC, &now) != 0)
        now.tv_sec = now.tv_nsec = 0;
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

#endif
