/* Clients that go on when one of them is lost: how many were answered, how the others ended, how long it took.
 *
 * losses PORT COUNT CLIENTS SECONDS REQUEST: so many clients at once, each in a thread, connect, send the request
 * and read the answer to its end, and again, until COUNT connections were made or SECONDS have passed. An answer is
 * right when it begins as one of HTTP's with the status 200. Each connection ends with a reset after that, so that
 * no port is left in TIME_WAIT. One line of JSON; latencies in nanoseconds from connect to the end of the answer.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { TIMEOUT = 15 }; /* seconds: longer than any worker is blocked */

enum outcome { ANSWERED, REFUSED, RESET, TIMED_OUT, WRONG, OUTCOMES };
static const char *const NAMES[OUTCOMES] = {"answered", "refused", "reset", "timed_out", "wrong"};

static struct sockaddr_in server;
static const char *request;
static long most;
static atomic_long begun, outcomes[OUTCOMES];
static uint64_t *latencies, deadline;

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static enum outcome failed(void)
{
    if (errno == EAGAIN || errno == ETIMEDOUT || errno == EINPROGRESS)
        return TIMED_OUT;
    return errno == ECONNREFUSED ? REFUSED : RESET;
}

static enum outcome ask(void)
{
    char answer[4096];
    size_t got = 0;
    ssize_t n;
    struct timeval limit = {TIMEOUT, 0};
    struct linger reset = {1, 0};
    enum outcome outcome;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    if (connect(fd, (struct sockaddr *)&server, sizeof server) != 0 ||
        send(fd, request, strlen(request), MSG_NOSIGNAL) < 0) {
        outcome = failed();
    } else {
        while ((n = recv(fd, answer + got, sizeof answer - got, 0)) > 0)
            got += (size_t)n;
        if (n < 0)
            outcome = failed();
        else
            outcome = got > 12 && memcmp(answer, "HTTP/1.", 7) == 0 && memcmp(answer + 8, " 200", 4) == 0
                          ? ANSWERED
                          : WRONG;
    }
    close(fd);
    return outcome;
}

static void *client(void *unused)
{
    long number;
    (void)unused;
    while ((number = atomic_fetch_add(&begun, 1)) < most && now() < deadline) {
        uint64_t start = now();
        enum outcome outcome = ask();
        latencies[number] = now() - start;
        atomic_fetch_add(&outcomes[outcome], 1);
    }
    return NULL;
}

static int by_size(const void *a, const void *b)
{
    uint64_t one = *(const uint64_t *)a, other = *(const uint64_t *)b;
    return one < other ? -1 : one > other;
}

int main(int count, char **arguments)
{
    pthread_t threads[1024];
    int clients, i;
    long made;
    uint64_t start = now();
    if (count != 6)
        return 2;
    server.sin_family = AF_INET;
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    server.sin_port = htons((uint16_t)atoi(arguments[1]));
    most = atol(arguments[2]);
    clients = atoi(arguments[3]);
    deadline = start + (uint64_t)(atof(arguments[4]) * 1e9);
    request = arguments[5];
    latencies = calloc((size_t)most, sizeof *latencies);
    if (latencies == NULL || clients < 1 || clients > 1024)
        return 2;
    for (i = 0; i < clients; i++)
        if (pthread_create(&threads[i], NULL, client, NULL) != 0)
            return 2;
    for (i = 0; i < clients; i++)
        pthread_join(threads[i], NULL);
    for (made = 0, i = 0; i < OUTCOMES; i++)
        made += outcomes[i];
    qsort(latencies, (size_t)made, sizeof *latencies, by_size);
    for (i = 0; i < OUTCOMES; i++)
        printf("%s\"%s\": %ld", i ? ", " : "{", NAMES[i], (long)outcomes[i]);
    printf(", \"seconds\": %.3f", (double)(now() - start) / 1e9);
    if (made > 0)
        printf(", \"p50\": %" PRIu64 ", \"p99\": %" PRIu64 ", \"p999\": %" PRIu64 ", \"max\": %" PRIu64,
               latencies[made / 2], latencies[made * 99 / 100], latencies[made * 999 / 1000], latencies[made - 1]);
    puts("}");
    return 0;
}
