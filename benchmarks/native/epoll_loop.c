/* epoll and accept4 until EAGAIN, every client non-blocking: what a C event loop costs. */
#include "server.h"

#include <sys/epoll.h>

enum { EVENTS = 256 };

struct client {
    int fd;
    bool watched;
    size_t have;
    char *question; /* made when a first recv had not all of it */
};

/* True when the client is done with and may be closed, false when it has to say more. */
static bool answer(struct client *c, enum work work)
{
    static char scratch[QUESTION_LIMIT + 1];
    if (work == WORK_CLOSE)
        return true;
    for (;;) {
        char *question = c->question ? c->question : scratch;
        ssize_t n = recv(c->fd, question + c->have, QUESTION_LIMIT - c->have, 0);
        if (n < 0 && errno == EAGAIN)
            return false;
        if (n <= 0)
            return true;
        c->have += (size_t)n;
        question[c->have] = '\0';
        if (work == WORK_ECHO) {
            say(c->fd, question, c->have);
            return true;
        }
        if (strstr(question, "\r\n\r\n")) {
            say(c->fd, HTTP_ANSWER, sizeof HTTP_ANSWER - 1);
            return true;
        }
        if (!c->question) {
            if (!(c->question = malloc(sizeof scratch)))
                fail("malloc");
            memcpy(c->question, scratch, c->have);
        }
    }
}

static void step(int epoll, struct client *c, enum work work)
{
    if (work == WORK_HOLD || !answer(c, work)) {
        if (!c->watched) {
            struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
            c->watched = true;
            if (epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event) < 0)
                fail("epoll_ctl");
        }
        return;
    }
    close(c->fd);
    free(c->question);
    free(c);
}

int main(int argc, char **argv)
{
    enum work work = parse_work(argc, argv);
    if (work == WORK_SHED || work == WORK_TAKE) {
        fprintf(stderr, "%s: not for this server\n", argv[1]);
        return 2;
    }
    int listener = listen_on_loopback(SOCK_NONBLOCK), epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, events[EVENTS];
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event) < 0)
        fail("epoll");
    for (;;) {
        int n = epoll_wait(epoll, events, EVENTS, -1);
        if (n < 0 && errno != EINTR)
            fail("epoll_wait");
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr) {
                step(epoll, events[i].data.ptr, work);
                continue;
            }
            for (;;) {
                int fd = take(listener, SOCK_NONBLOCK);
                if (fd < 0 && (errno == EINTR || errno == ECONNABORTED))
                    continue;
                if (fd < 0 && errno == EAGAIN)
                    break;
                if (fd < 0)
                    fail("accept4");
                struct client *c = calloc(1, sizeof *c);
                if (!c)
                    fail("calloc");
                c->fd = fd;
                step(epoll, c, work);
            }
        }
    }
}
