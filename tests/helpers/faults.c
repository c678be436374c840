/*
 * Makes socket calls fail on demand, from outside the code under test: LD_PRELOAD this library.
 *
 * FAULTS is a plan, "call=code*count" joined by commas; call is accept (for accept and accept4),
 * recv (also for recvfrom), send (also for sendmsg), poll, thread (for pthread_create), watch (for
 * epoll_ctl that adds), ready (for an epoll_wait of 64 events, which is the hub's and no event
 * loop's). Entries of one call are used in order, each `count` times; a code of 0 lets that many calls
 * through; a code of -N truncates the transfer to N bytes. For the call "signal" the code is no
 * error but the signal that comes during the next fstat(). For the call "open", of /dev/null, it is
 * none either: a stranger takes a descriptor just before, for good, and if that was the last one
 * the open really fails.
 * While the environment names a FAULTS_WHILE file that does not exist, no fault is given and the
 * plan is not used up, so that a test can begin and end an episode from another process.
 *
 * faults_plan(text) replaces the plan of a running process. faults_calls(call) and
 * faults_given(call) tell how often a call was made and was made to fail. After faults_hold(1) an
 * accept that is to fail is held until faults_hold(0).
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
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { ACCEPT, RECV, SEND, POLL, THREAD, SIGNAL, OPEN, WATCH, READY, CALLS };
static const char *const names[CALLS] = {"accept", "recv",   "send", "poll", "thread",
                                         "signal", "open", "watch", "ready"};

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
    }
    pthread_mutex_unlock(&lock);
}

__attribute__((constructor)) static void
begin(void)
{
    while_file = getenv("FAULTS_WHILE");
    faults_plan(getenv("FAULTS"));
}

/* The code of the fault to give now, or 0 to let the call through; `*used` is its entry. */
static int
planned(int call, struct entry **used)
{
    int code = 0;
    *used = NULL;
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

#define TRANSFER(call, invocation) \
    struct entry *used; \
    int code = planned(call, &used); \
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
    TRANSFER(RECV, real(fd, buffer, size, flags));
}

ssize_t
recvfrom(int fd, void *restrict buffer, size_t size, int flags, __SOCKADDR_ARG address,
         socklen_t *restrict length)
{
    REAL(recvfrom);
    TRANSFER(RECV, real(fd, buffer, size, flags, address, length));
}

ssize_t
send(int fd, const void *buffer, size_t size, int flags)
{
    REAL(send);
    TRANSFER(SEND, real(fd, buffer, size, flags));
}

ssize_t
sendmsg(int fd, const struct msghdr *message, int flags)
{
    REAL(sendmsg);
    size_t size = 0;
    TRANSFER(SEND, ((void)size, real(fd, message, flags)));
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

int
epoll_ctl(int poller, int operation, int fd, struct epoll_event *event)
{
    REAL(epoll_ctl);
    struct entry *used;
    int code = operation == EPOLL_CTL_ADD ? planned(WATCH, &used) : 0;
    if (code > 0) {
        errno = code;
        return -1;
    }
    return real(poller, operation, fd, event);
}

int
epoll_wait(int poller, struct epoll_event *events, int most, int timeout)
{
    REAL(epoll_wait);
    struct entry *used;
    int code = most == 64 ? planned(READY, &used) : 0;
    if (code > 0) {
        errno = code;
        return -1;
    }
    return real(poller, events, most, timeout);
}

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
