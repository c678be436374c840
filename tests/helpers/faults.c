/*
 * Makes socket calls fail on demand, from outside the code under test: LD_PRELOAD this library.
 *
 * FAULTS is a plan, "call=code*count" joined by commas; call is accept (for accept and accept4),
 * recv (also for recvfrom), send (also for sendmsg), or, of a unix socket, as the two ends of a waker
 * are, heard and wake; poll, thread (for pthread_create), poller (for epoll_create1), watch,
 * change and unwatch (for epoll_ctl that adds, modifies and deletes), ready (for epoll_wait), malloc (also for
 * calloc and realloc, counted while a plan has it), and
 * fcntl, ioctl, setsockopt, getsockopt, close, shutdown, socketpair and clock_gettime for themselves.
 * A close that fails has closed all the same, as on Linux. Entries of one call are used in order, each
 * `count` times; a code of 0 lets that many calls through; a code of -N truncates the transfer to N
 * bytes. For the call "signal" the code is no error but the signal that comes during the next fstat().
 * For the call "open", of /dev/null, it is none either: a stranger takes a descriptor just before, for
 * good, and if that was the last one the open really fails.
 * While the environment names a FAULTS_WHILE file that does not exist, no fault is given and the
 * plan is not used up, so that a test can begin and end an episode from another process.
 *
 * faults_plan(text) replaces the plan of a running process. faults_calls(call) and
 * faults_given(call) tell how often a call was made and was made to fail. After faults_hold(1) an
 * accept that is to fail is held until faults_hold(0). After faults_of(1) only calls that fastlisten's own
 * modules make are counted and fail, after faults_of(2) only those of all others, after faults_of(0) all.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    ACCEPT, RECV, SEND, HEARD, WAKE, POLL, THREAD, SIGNAL, OPEN, POLLER, WATCH, CHANGE, UNWATCH, READY,
    FCNTL, IOCTL, SETSOCKOPT, GETSOCKOPT, CLOSE, SHUTDOWN, SOCKETPAIR, CLOCK, MALLOC, CALLS
};
static const char *const names[CALLS] = {
    "accept", "recv", "send", "heard", "wake", "poll", "thread", "signal", "open", "poller", "watch",
    "change", "unwatch", "ready", "fcntl", "ioctl", "setsockopt", "getsockopt", "close", "shutdown",
    "socketpair", "clock_gettime", "malloc"
};
enum { ANYBODYS, FASTLISTENS, OTHERS };

struct entry {
    int call, code;
    long left;
};
static struct entry plan[256];
static int entries;
static const char *while_file;
static atomic_long calls[CALLS], given[CALLS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t let_go = PTHREAD_COND_INITIALIZER;
static int held;
static atomic_int whose = ANYBODYS;
static atomic_int allocations_planned;

static int
number_of(const char *name, size_t length)
{
    for (int call = 0; call < CALLS; call++)
        if (strlen(names[call]) == length && memcmp(names[call], name, length) == 0)
            return call;
    return -1;
}

void
faults_plan(const char *at)
{
    int allocations = 0;
    pthread_mutex_lock(&lock);
    entries = 0;
    while (at != NULL && *at != '\0' && entries < 256) {
        const char *equals = strchr(at, '=');
        char *end;
        if (equals == NULL)
            abort();
        struct entry *entry = &plan[entries++];
        entry->call = number_of(at, (size_t)(equals - at));
        entry->code = (int)strtol(equals + 1, &end, 10);
        if (entry->call < 0 || *end != '*')
            abort();
        entry->left = strtol(end + 1, &end, 10);
        at = *end == ',' ? end + 1 : end;
        allocations = allocations || entry->call == MALLOC;
    }
    atomic_store(&allocations_planned, allocations);
    pthread_mutex_unlock(&lock);
}

__attribute__((constructor)) static void
begin(void)
{
    while_file = getenv("FAULTS_WHILE");
    faults_plan(getenv("FAULTS"));
}

/* Whether faults are for the module that has this instruction. */
static int
is_meant(const void *caller)
{
    Dl_info module;
    int wanted = atomic_load(&whose);
    if (wanted == ANYBODYS)
        return 1;
    int ours = dladdr(caller, &module) != 0 && strstr(module.dli_fname, "/fastlisten/") != NULL;
    return ours == (wanted == FASTLISTENS);
}

/* The code of the fault to give now, or 0 to let the call through; `*used` is its entry. */
static int
planned_for(const void *caller, int call, struct entry **used)
{
    int code = 0;
    *used = NULL;
    if (!is_meant(caller))
        return 0;
    atomic_fetch_add(&calls[call], 1);
    if (while_file != NULL && access(while_file, F_OK) != 0)
        return 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < entries; i++)
        if (plan[i].call == call && plan[i].left != 0) {
            *used = &plan[i];
            code = plan[i].code;
            if (code != 0) {
                plan[i].left--;
                atomic_fetch_add(&given[call], 1);
            }
            break;
        }
    pthread_mutex_unlock(&lock);
    return code;
}

static void
succeeded(struct entry *used)
{
    if (used == NULL || used->code != 0)
        return;
    pthread_mutex_lock(&lock);
    if (used->left > 0)
        used->left--;
    pthread_mutex_unlock(&lock);
}

static void
given_back(struct entry *used, int call)
{
    pthread_mutex_lock(&lock);
    used->left++;
    atomic_fetch_sub(&given[call], 1);
    pthread_mutex_unlock(&lock);
}

long
faults_calls(const char *name)
{
    int call = number_of(name, strlen(name));
    return call < 0 ? -1 : atomic_load(&calls[call]);
}

long
faults_given(const char *name)
{
    int call = number_of(name, strlen(name));
    return call < 0 ? -1 : atomic_load(&given[call]);
}

void
faults_hold(int hold)
{
    pthread_mutex_lock(&lock);
    held = hold;
    pthread_cond_broadcast(&let_go);
    pthread_mutex_unlock(&lock);
}

void
faults_of(int modules)
{
    atomic_store(&whose, modules);
}

/* In the functions that stand for the system's: each is called by whom its fault may be meant for. */
#define planned(call, used) planned_for(__builtin_return_address(0), call, used)

static int
failed_accept(int code)
{
    pthread_mutex_lock(&lock);
    while (held)
        pthread_cond_wait(&let_go, &lock);
    pthread_mutex_unlock(&lock);
    errno = code;
    return -1;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (real == NULL) \
        real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

int
accept4(int fd, __SOCKADDR_ARG address, socklen_t *restrict length, int flags)
{
    REAL(accept4);
    struct entry *used;
    int code = planned(ACCEPT, &used);
    if (code > 0)
        return failed_accept(code);
    int result = real(fd, address, length, flags);
    if (result >= 0)
        succeeded(used);
    return result;
}

int
accept(int fd, __SOCKADDR_ARG address, socklen_t *restrict length)
{
    REAL(accept);
    struct entry *used;
    int code = planned(ACCEPT, &used);
    if (code > 0)
        return failed_accept(code);
    int result = real(fd, address, length);
    if (result >= 0)
        succeeded(used);
    return result;
}

/* Whether the socket is an end of a waker, or of another pair: the clients of the tests come by TCP. */
static int
in_pair(int fd)
{
    struct sockaddr address;
    socklen_t length = sizeof address;
    int before = errno;
    int unix_socket = getsockname(fd, &address, &length) == 0 && address.sa_family == AF_UNIX;
    errno = before;
    return unix_socket;
}

#define TRANSFER(call, call_in_pair, invocation) \
    struct entry *used; \
    int code = planned(in_pair(fd) ? call_in_pair : call, &used); \
    if (code > 0) { \
        errno = code; \
        return -1; \
    } \
    if (code < 0 && size > (size_t)-code) \
        size = (size_t)-code; \
    ssize_t result = invocation; \
    if (result >= 0) \
        succeeded(used); \
    return result

ssize_t
recv(int fd, void *buffer, size_t size, int flags)
{
    REAL(recv);
    TRANSFER(RECV, HEARD, real(fd, buffer, size, flags));
}

ssize_t
recvfrom(int fd, void *restrict buffer, size_t size, int flags, __SOCKADDR_ARG address,
         socklen_t *restrict length)
{
    REAL(recvfrom);
    TRANSFER(RECV, HEARD, real(fd, buffer, size, flags, address, length));
}

ssize_t
send(int fd, const void *buffer, size_t size, int flags)
{
    REAL(send);
    TRANSFER(SEND, WAKE, real(fd, buffer, size, flags));
}

ssize_t
sendmsg(int fd, const struct msghdr *message, int flags)
{
    REAL(sendmsg);
    size_t size = 0;
    TRANSFER(SEND, WAKE, ((void)size, real(fd, message, flags)));
}

int
poll(struct pollfd *fds, nfds_t count, int timeout)
{
    REAL(poll);
    struct entry *used;
    int code = planned(POLL, &used);
    if (code > 0) {
        errno = code;
        return -1;
    }
    int result = real(fds, count, timeout);
    if (result >= 0)
        succeeded(used);
    return result;
}

/* The rest of a function that returns 0 or a descriptor, or -1 and an error. */
#define FAILS_OR(call, invocation) \
    struct entry *used; \
    int code = planned(call, &used); \
    if (code > 0) { \
        errno = code; \
        return -1; \
    } \
    int result = invocation; \
    if (result >= 0) \
        succeeded(used); \
    return result

int
epoll_create1(int flags)
{
    REAL(epoll_create1);
    FAILS_OR(POLLER, real(flags));
}

int
epoll_ctl(int poller, int operation, int fd, struct epoll_event *event)
{
    REAL(epoll_ctl);
    int call = operation == EPOLL_CTL_ADD ? WATCH : operation == EPOLL_CTL_MOD ? CHANGE : UNWATCH;
    FAILS_OR(call, real(poller, operation, fd, event));
}

int
epoll_wait(int poller, struct epoll_event *events, int most, int timeout)
{
    REAL(epoll_wait);
    FAILS_OR(READY, real(poller, events, most, timeout));
}

int
setsockopt(int fd, int level, int name, const void *value, socklen_t length)
{
    REAL(setsockopt);
    FAILS_OR(SETSOCKOPT, real(fd, level, name, value, length));
}

int
getsockopt(int fd, int level, int name, void *restrict value, socklen_t *restrict length)
{
    REAL(getsockopt);
    FAILS_OR(GETSOCKOPT, real(fd, level, name, value, length));
}

int
shutdown(int fd, int how)
{
    REAL(shutdown);
    FAILS_OR(SHUTDOWN, real(fd, how));
}

int
socketpair(int domain, int type, int protocol, int ends[2])
{
    REAL(socketpair);
    FAILS_OR(SOCKETPAIR, real(domain, type, protocol, ends));
}

int
clock_gettime(clockid_t clock, struct timespec *now)
{
    REAL(clock_gettime);
    FAILS_OR(CLOCK, real(clock, now));
}

int
close(int fd)
{
    REAL(close);
    struct entry *used;
    int code = planned(CLOSE, &used);
    int result = real(fd);
    if (code > 0) {
        errno = code;
        return -1;
    }
    if (result >= 0)
        succeeded(used);
    return result;
}

/* What follows the named arguments is an int, a pointer or nothing: all pass as a pointer does. */
#define WITH_ONE_MORE(name, call, request_type) \
    int \
    name(int fd, request_type request, ...) \
    { \
        REAL(name); \
        va_list arguments; \
        va_start(arguments, request); \
        void *argument = va_arg(arguments, void *); \
        va_end(arguments); \
        FAILS_OR(call, real(fd, request, argument)); \
    }

WITH_ONE_MORE(ioctl, IOCTL, unsigned long)
WITH_ONE_MORE(fcntl, FCNTL, int)
#ifndef fcntl64 /* glibc's second name, as open64 */
WITH_ONE_MORE(fcntl64, FCNTL, int)
#endif

int
pthread_create(pthread_t *restrict thread, const pthread_attr_t *restrict attributes,
               void *(*start)(void *), void *restrict argument)
{
    REAL(pthread_create);
    struct entry *used;
    int code = planned(THREAD, &used);
    if (code > 0)
        return code;
    int result = real(thread, attributes, start, argument);
    if (result == 0)
        succeeded(used);
    return result;
}

/* The allocator itself: glibc's names for it, because its dlsym() allocates; musl's does not. */
#define ALLOCATION(function, parameters, arguments) \
    extern void *__libc_##function parameters __attribute__((weak)); \
    void * \
    function parameters \
    { \
        static void *(*real) parameters; \
        struct entry *used = NULL; \
        if (real == NULL) \
            real = __libc_##function != NULL ? __libc_##function : (void *(*) parameters)dlsym(RTLD_NEXT, #function); \
        if (atomic_load(&allocations_planned) && planned(MALLOC, &used) > 0) { \
            errno = ENOMEM; \
            return NULL; \
        } \
        void *result = real arguments; \
        if (result != NULL) \
            succeeded(used); \
        return result; \
    }

ALLOCATION(malloc, (size_t size), (size))
ALLOCATION(calloc, (size_t count, size_t size), (count, size))
ALLOCATION(realloc, (void *place, size_t size), (place, size))

/* Both names of fstat(): which one a program calls depends on how it was compiled. */
static void
signal_planned(void)
{
    struct entry *used;
    int number = planned(SIGNAL, &used);
    if (number > 0)
        raise(number);
}

int
fstat(int fd, struct stat *status)
{
    REAL(fstat);
    signal_planned();
    return real(fd, status);
}

int
fstat64(int fd, struct stat64 *status)
{
    REAL(fstat64);
    signal_planned();
    return real(fd, status);
}

#define OPEN_OF_DEV_NULL(name) \
    int \
    name(const char *path, int flags, ...) \
    { \
        REAL(name); \
        mode_t mode = 0; \
        if ((flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE) { \
            va_list arguments; \
            va_start(arguments, flags); \
            mode = va_arg(arguments, mode_t); \
            va_end(arguments); \
        } \
        struct entry *used = NULL; \
        if (strcmp(path, "/dev/null") == 0 && planned(OPEN, &used) != 0 && dup(0) < 0) \
            given_back(used, OPEN); /* no descriptor for the stranger either */ \
        int result = real(path, flags, mode); \
        if (result >= 0) \
            succeeded(used); \
        return result; \
    }

OPEN_OF_DEV_NULL(open)
#ifndef open64 /* glibc's second name, which callers with 64-bit file offsets get; Python and its extensions do */
OPEN_OF_DEV_NULL(open64)
#endif
