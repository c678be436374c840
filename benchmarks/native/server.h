/* What the two C servers share: a listener on 127.0.0.1, and the answer to one client. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum work { WORK_CLOSE, WORK_ECHO, WORK_HTTP, WORK_HOLD, WORK_SHED, WORK_TAKE };
static const char *const WORK_NAMES[] = {"close", "echo", "http", "hold", "shed", "take"};

enum { BACKLOG = 4096, QUESTION_LIMIT = 4096 };

static const char HTTP_ANSWER[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 6\r\nConnection: close\r\n\r\n"
    "hello\n";

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static enum work parse_work(int argc, char **argv)
{
    if (argc == 2)
        for (int i = 0; i <= WORK_TAKE; i++)
            if (strcmp(argv[1], WORK_NAMES[i]) == 0)
                return (enum work)i;
    fprintf(stderr, "usage: %s close|echo|http|hold|shed|take\n", argv[0]);
    exit(2);
}

static int listen_on_loopback(int flags)
{
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);
    if (fd < 0)
        fail("socket");
    if (bind(fd, (struct sockaddr *)&address, length) < 0)
        fail("bind");
    if (listen(fd, BACKLOG) < 0)
        fail("listen");
    if (getsockname(fd, (struct sockaddr *)&address, &length) < 0)
        fail("getsockname");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

/* The peer's address is asked for, as every server here does. */
static int take(int listener, int flags)
{
    struct sockaddr_in peer;
    socklen_t length = sizeof peer;
    return accept4(listener, (struct sockaddr *)&peer, &length, SOCK_CLOEXEC | flags);
}

static void say(int fd, const char *bytes, size_t length)
{
    while (length > 0) {
        ssize_t n = send(fd, bytes, length, MSG_NOSIGNAL);
        if (n < 0)
            return; /* the client is gone; it notices and says so */
        bytes += n;
        length -= (size_t)n;
    }
}
