/* The load generator: one process, one thread, one epoll, as little work a connection as Linux allows.
 *
 * A connection costs this process four calls: connect(AF_UNSPEC), connect, send, recv. The first ends
 * the previous connection of the same socket with a reset (connect(2), "dissolve the association"),
 * after its end of stream was read. So neither side keeps a TIME_WAIT, no port runs out however long
 * the run, and no descriptor is made or registered anew. epoll reports the end of stream only
 * (EPOLLRDHUP): an answer with the end behind it is short and fits the socket's buffer, so one recv has
 * all of it.
 *
 * A client may ask several times on one connection, or keep it for the whole run: REQUESTS, 1 unless
 * said otherwise, 0 to keep it. Then epoll reports what comes (EPOLLIN), too, and room for what could
 * not be sent at once (EPOLLOUT). The last of several requests asks the server to close; a message is
 * of SIZE bytes and is sent back. COUNT is that of answers.
 *
 * Prints one line of JSON. Exits with 1 and a line on standard error on the first wrong answer.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS = 256, ANSWER_LIMIT = 4096, CHUNK = 256 * 1024 };

/* What a client says and what it must hear. `answer` is compared from the first byte on; a longer
 * answer is right only where `prefix` says so (the rest of an HTTP answer differs by server).
 * `last`: what it says the last time on a connection, where that differs. */
struct work {
    const char *name;
    const char *question;
    const char *answer;
    bool prefix;
    bool reset_is_right;
    const char *last;
};

#define BODY "hello\n"
#define REQUEST "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: load\r\nAccept: */*\r\n"

static const struct work WORKS[] = {
    {"close", "", "", false, false, NULL},
    {"echo", "hello, fastlisten\n", "hello, fastlisten\n", false, false, NULL},
    {"http", REQUEST "\r\n", "HTTP/1.", true, false, NULL},
    {"request", REQUEST "\r\n", "HTTP/1.", true, false, REQUEST "Connection: close\r\n\r\n"},
    {"message", "", "", false, false, NULL}, /* its question and answer are made: SIZE bytes */
    /* A refusal is a reset, an end of stream, or a few bytes of excuse. */
    {"shed", "", "", true, true, NULL},
};

struct slot {
    int fd;
    bool open; /* a dissolved socket still reports an error: nobody's business */
    bool connecting;
    bool asking; /* no whole answer yet */
    long asked;  /* how often on this connection */
    size_t sent, got;
    uint64_t start;
    char *answer; /* the parts that came, where the connection goes on; not those of a message */
};

static const struct work *work = &WORKS[0];
static long requests = 1; /* on one connection; 0: it is kept */
static char *message;
static size_t size;
static struct sockaddr_in server;
static struct slot *slots;
static int epoll_fd;
static uint64_t deadline;
static uint64_t *latencies;
static long long answered;

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void fail(const char *what)
{
    fprintf(stderr, "load: %s: %s (after %lld answers)\n", what, errno ? strerror(errno) : "wrong",
            answered);
    exit(1);
}

static void watch(int operation, long i, uint32_t events)
{
    struct epoll_event event = {.events = events | EPOLLET, .data.u64 = (uint64_t)i};
    if (epoll_ctl(epoll_fd, operation, slots[i].fd, &event) < 0)
        fail("epoll_ctl");
}

static void say(struct slot *s)
{
    const char *question = work->last && s->asked == requests ? work->last : work->question;
    size_t length = size ? size : strlen(question);
    if (size)
        question = message;
    if (s->sent == length)
        return;
    ssize_t n = send(s->fd, question + s->sent, length - s->sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0)
        s->sent += (size_t)n;
    if (s->sent != length && !work->reset_is_right && !(size && (n >= 0 || errno == EAGAIN)))
        fail("send");
}

static void ask(struct slot *s)
{
    s->asking = true;
    s->asked++;
    s->sent = s->got = 0;
    say(s);
}

static uint32_t interest(void)
{
    return EPOLLRDHUP | (requests == 1 ? 0 : EPOLLIN) | (size ? EPOLLOUT : 0);
}

static void begin(long i)
{
    struct slot *s = &slots[i];
    s->start = now();
    if (s->open) { /* it is kept */
        ask(s);
        return;
    }
    s->open = true;
    s->asked = 0;
    if (connect(s->fd, (struct sockaddr *)&server, sizeof server) == 0) {
        ask(s);
        return;
    }
    if (errno != EINPROGRESS)
        fail("connect");
    /* The server's queue is full: the kernel tries again, as for any client. */
    s->connecting = true;
    watch(EPOLL_CTL_MOD, i, interest() | EPOLLOUT);
}

static void dissolve(long i)
{
    const struct sockaddr nobody = {.sa_family = AF_UNSPEC};
    if (connect(slots[i].fd, &nobody, sizeof nobody) < 0)
        fail("connect(AF_UNSPEC)");
    slots[i].open = false;
}

/* True for a right HTTP answer, false while it has no whole body yet; a wrong one ends the run. */
static bool http_is_whole(const char *answer)
{
    const char *status = strchr(answer, ' ');
    const char *body = strstr(answer, "\r\n\r\n");
    if (!body || strlen(body + 4) < strlen(BODY))
        return false;
    errno = 0;
    if (!status || strncmp(status, " 200 ", 5) != 0 || strcmp(body + 4, BODY) != 0)
        fail("answer");
    return true;
}

/* True when slot s has its whole answer on a connection that goes on. */
static bool whole(struct slot *s, uint32_t events)
{
    static char chunk[CHUNK];
    if (events & EPOLLOUT)
        say(s);
    for (;;) {
        char *into = size ? chunk : s->answer + s->got;
        size_t room = size ? sizeof chunk : ANSWER_LIMIT - s->got;
        ssize_t n = recv(s->fd, into, room, MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN)
            return false;
        if (n < 0)
            fail("recv");
        errno = 0;
        if (n == 0)
            fail("the server has closed");
        if (size && ((size_t)n > s->sent - s->got || memcmp(chunk, message + s->got, (size_t)n) != 0))
            fail("answer");
        s->got += (size_t)n;
        if (size && s->got < size)
            continue;
        if (size)
            return true;
        s->answer[s->got] = '\0';
        if (http_is_whole(s->answer))
            return true;
        if (s->got == ANSWER_LIMIT)
            fail("answer");
    }
}

/* True when slot i has its whole answer and the end of the stream. */
static bool end(long i, uint32_t events)
{
    struct slot *s = &slots[i];
    if (s->connecting) {
        int error = 0;
        socklen_t size = sizeof error;
        if (!(events & (EPOLLOUT | EPOLLERR | EPOLLHUP)))
            return false;
        if (getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0)
            fail("getsockopt");
        if (error && !work->reset_is_right) {
            errno = error;
            fail("connect");
        }
        s->connecting = false;
        watch(EPOLL_CTL_MOD, i, interest());
        if (error) {
            s->asked = requests; /* that was its answer */
            return true;
        }
        ask(s);
        if (!(events & (EPOLLRDHUP | EPOLLERR)))
            return false;
    } else if (s->asked != requests) {
        return s->asking && whole(s, events);
    } else if (!(events & (EPOLLRDHUP | EPOLLERR))) {
        return false; /* EPOLLHUP alone is an echo of our own dissolve */
    }
    char answer[ANSWER_LIMIT + 1];
    ssize_t n = recv(s->fd, answer, ANSWER_LIMIT, MSG_DONTWAIT);
    if (n < 0) {
        if (errno == EAGAIN)
            return false;
        if (work->reset_is_right && (errno == ECONNRESET || errno == EPIPE))
            return true;
        fail("recv");
    }
    answer[n] = '\0';
    size_t length = strlen(work->answer);
    errno = 0;
    if (strncmp(answer, work->answer, length) != 0 || (!work->prefix && (size_t)n != length))
        fail("answer");
    if (strncmp(work->answer, "HTTP", 4) == 0 && !http_is_whole(answer))
        fail("answer");
    return true;
}

static int collect(int timeout_ms, long long *left_to_begin)
{
    static struct epoll_event events[EVENTS];
    int n = epoll_wait(epoll_fd, events, EVENTS, timeout_ms);
    if (n < 0 && errno != EINTR)
        fail("epoll_wait");
    if (now() > deadline) {
        errno = ETIMEDOUT;
        fail("time limit");
    }
    for (int k = 0; k < n; k++) {
        long i = (long)events[k].data.u64;
        if (!slots[i].open || !end(i, events[k].events))
            continue;
        latencies[answered++] = now() - slots[i].start;
        slots[i].asking = false;
        if (slots[i].asked < requests) {
            slots[i].start = now();
            ask(&slots[i]);
            continue;
        }
        if (requests)
            dissolve(i);
        if (*left_to_begin > 0) {
            (*left_to_begin)--;
            begin(i);
        }
    }
    return n;
}

/* `count` answers, a multiple of `requests`, by at most `concurrency` clients at once; none is left over at
 * the end, and none is connected unless it is kept. */
static void run(long long count, long concurrency)
{
    long long turns = requests ? count / requests : count;
    long first = concurrency < turns ? concurrency : (long)turns;
    long long left = turns - first;
    answered = 0;
    for (long i = 0; i < first; i++) {
        begin(i);
        if (i % 64 == 63) /* an answer that is there already is read at once, so its time is true */
            collect(0, &left);
    }
    while (answered < count)
        collect(1000, &left);
}

static uint64_t cpu_time(clockid_t clock)
{
    struct timespec t;
    if (clock_gettime(clock, &t) < 0)
        fail("clock_gettime");
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* The server's CPU time once it has stopped growing: what it does after the last answer (ending a
 * thread, collecting garbage) belongs to the connections that caused it. */
static uint64_t settled_cpu_time(clockid_t clock)
{
    uint64_t before = cpu_time(clock);
    for (int i = 0; i < 100; i++) {
        nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
        uint64_t after = cpu_time(clock);
        if (after == before)
            break;
        before = after;
    }
    return before;
}

/* Ticks the kernel charged to the server's user and system side: /proc/PID/stat, fields 14 and 15. */
static void ticks(long pid, unsigned long *user, unsigned long *system)
{
    char path[64], line[1024];
    snprintf(path, sizeof path, "/proc/%ld/stat", pid);
    FILE *file = fopen(path, "r");
    if (!file || !fgets(line, sizeof line, file))
        fail(path);
    fclose(file);
    char *name_end = strrchr(line, ')');
    if (!name_end || sscanf(name_end + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu",
                            user, system) != 2)
        fail("/proc/PID/stat");
}

static int by_size(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static uint64_t percentile(long long n, double p)
{
    long long i = (long long)(p * (double)n);
    return latencies[i < n ? i : n - 1];
}

/* Connects all, says so, keeps them until a line or the end of standard input. */
static void hold(long concurrency)
{
    bool all;
    do { /* all at once: on a busy machine each may wait for the kernel's network thread */
        all = true;
        for (long i = 0; i < concurrency; i++) {
            if (slots[i].open)
                continue;
            if (connect(slots[i].fd, (struct sockaddr *)&server, sizeof server) == 0)
                slots[i].open = true;
            else if (errno == EINPROGRESS || errno == EALREADY)
                all = false;
            else
                fail("connect");
        }
        if (now() > deadline) {
            errno = ETIMEDOUT;
            fail("time limit");
        }
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    } while (!all);
    printf("{\"held\": %ld}\n", concurrency);
    fflush(stdout);
    (void)getchar();
    for (long i = 0; i < concurrency; i++)
        dissolve(i);
}

static void make_message(void)
{
    if (!(message = malloc(size)))
        fail("malloc");
    for (size_t i = 0; i < size; i++) /* no two parts of 256 bytes are alike */
        message[i] = (char)(i * 7 + (i >> 8) * 13);
}

/* At least so many answers: each connection has all its requests. */
static long long whole_connections(long long count)
{
    return requests > 1 ? (count + requests - 1) / requests * requests : count;
}

static long long number(const char *text, long long least)
{
    char *end_of_number;
    errno = 0;
    long long n = strtoll(text, &end_of_number, 10);
    if (errno || *end_of_number || n < least) {
        fprintf(stderr, "load: not a number of at least %lld: %s\n", least, text);
        exit(2);
    }
    return n;
}

int main(int argc, char **argv)
{
    if (argc != 11) {
        fprintf(stderr, "usage: load WORK PORT PID WARMUP COUNT CONCURRENCY BURSTS LIMIT_SECONDS "
                        "REQUESTS SIZE\n");
        return 2;
    }
    bool holding = strcmp(argv[1], "hold") == 0;
    work = NULL;
    for (size_t i = 0; i < sizeof WORKS / sizeof *WORKS; i++)
        if (strcmp(argv[1], WORKS[i].name) == 0 || (holding && i == 0))
            work = &WORKS[i];
    if (!work) {
        fprintf(stderr, "load: unknown work: %s\n", argv[1]);
        return 2;
    }
    server = (struct sockaddr_in){.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)number(argv[2], 1)),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    long pid = (long)number(argv[3], 0); /* 0: do not read a clock (under valgrind, from outside) */
    long long warmup = number(argv[4], 0), count = number(argv[5], 1);
    long concurrency = (long)number(argv[6], 1);
    long long bursts = number(argv[7], 1); /* rounds of `count`, each begun when the last is over */
    deadline = now() + (uint64_t)number(argv[8], 1) * 1000000000u;
    requests = (long)number(argv[9], 0);
    size = (size_t)number(argv[10], 0);
    if (size)
        make_message();
    count = whole_connections(count);
    warmup = whole_connections(warmup);
    if (!requests && warmup < concurrency)
        warmup = concurrency; /* all are connected before the clock is read */

    if ((epoll_fd = epoll_create1(EPOLL_CLOEXEC)) < 0)
        fail("epoll_create1");
    slots = calloc((size_t)concurrency, sizeof *slots);
    long long room = count > warmup ? count : warmup;
    latencies = calloc((size_t)(room * bursts), sizeof *latencies);
    uint64_t *pooled = latencies;
    uint64_t *elapsed = calloc((size_t)bursts, sizeof *elapsed);
    if (!slots || !latencies || !elapsed)
        fail("calloc");
    for (long i = 0; i < concurrency; i++) {
        slots[i].fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (slots[i].fd < 0)
            fail("socket");
        if (requests != 1 && !size && !(slots[i].answer = malloc(ANSWER_LIMIT + 1)))
            fail("malloc");
        watch(EPOLL_CTL_ADD, i, interest());
    }
    if (holding) {
        hold(concurrency);
        return 0;
    }
    if (warmup)
        run(warmup, concurrency);

    clockid_t clock = 0;
    uint64_t cpu = 0;
    unsigned long user[2] = {0}, system[2] = {0};
    if (pid) {
        if (clock_getcpuclockid((pid_t)pid, &clock) != 0)
            fail("clock_getcpuclockid");
        cpu = settled_cpu_time(clock);
        ticks(pid, &user[0], &system[0]);
    }
    uint64_t own = cpu_time(CLOCK_PROCESS_CPUTIME_ID), wall = now();
    for (long long burst = 0; burst < bursts; burst++) {
        uint64_t start = now();
        latencies = pooled + burst * count;
        run(count, concurrency);
        elapsed[burst] = now() - start;
    }
    wall = now() - wall;
    own = cpu_time(CLOCK_PROCESS_CPUTIME_ID) - own;
    if (pid) {
        cpu = settled_cpu_time(clock) - cpu;
        ticks(pid, &user[1], &system[1]);
    }
    long long total = count * bursts;
    latencies = pooled;
    qsort(latencies, (size_t)total, sizeof *latencies, by_size);
    qsort(elapsed, (size_t)bursts, sizeof *elapsed, by_size);
    printf("{\"answers\": %lld, \"cpu_ns\": %" PRIu64 ", \"user_ticks\": %lu, "
           "\"system_ticks\": %lu, \"wall_ns\": %" PRIu64 ", \"load_cpu_ns\": %" PRIu64 ", "
           "\"last_ns\": %" PRIu64 ", \"p50_ns\": %" PRIu64 ", \"p99_ns\": %" PRIu64
           ", \"p999_ns\": %" PRIu64 "}\n",
           total, cpu, user[1] - user[0], system[1] - system[0], wall, own, elapsed[bursts / 2],
           percentile(total, 0.5), percentile(total, 0.99), percentile(total, 0.999));
    return 0;
}
