/* The line to reach: accept4, answer, close, one client after the other. */
#include "server.h"

static void answer(int fd, enum work work)
{
    char question[QUESTION_LIMIT + 1];
    size_t have = 0;
    if (work == WORK_ECHO) {
        ssize_t n = recv(fd, question, QUESTION_LIMIT, 0);
        if (n > 0)
            say(fd, question, (size_t)n);
    } else if (work == WORK_HTTP) {
        for (;;) {
            ssize_t n = recv(fd, question + have, QUESTION_LIMIT - have, 0);
            if (n <= 0)
                return;
            have += (size_t)n;
            question[have] = '\0';
            if (strstr(question, "\r\n\r\n"))
                break;
        }
        say(fd, HTTP_ANSWER, sizeof HTTP_ANSWER - 1);
    } else if (work == WORK_SHED) {
        struct linger reset = {.l_onoff = 1};
        if (setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset) < 0)
            fail("setsockopt");
    }
}

/* For each line "N": takes N clients that are queued already, prints the CPU time of it, lets go. */
static void take_on_demand(int listener)
{
    static int clients[BACKLOG];
    char line[32];
    while (fgets(line, sizeof line, stdin)) {
        int count = atoi(line);
        struct timespec a, b;
        if (count < 1 || count > BACKLOG)
            fail("count");
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &a);
        for (int i = 0; i < count; i++)
            if ((clients[i] = take(listener, 0)) < 0)
                fail("accept4");
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &b);
        printf("%lld\n", (b.tv_sec - a.tv_sec) * 1000000000LL + (b.tv_nsec - a.tv_nsec));
        fflush(stdout);
        for (int i = 0; i < count; i++)
            close(clients[i]);
    }
}

int main(int argc, char **argv)
{
    enum work work = parse_work(argc, argv);
    int listener = listen_on_loopback(0);
    if (work == WORK_TAKE) {
        take_on_demand(listener);
        return 0;
    }
    for (;;) {
        int fd = take(listener, 0);
        if (fd < 0) {
            if (errno == EINTR || errno == ECONNABORTED)
                continue;
            fail("accept4");
        }
        if (work == WORK_HOLD)
            continue;
        answer(fd, work);
        close(fd);
    }
}
