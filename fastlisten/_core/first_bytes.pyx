"""Where clients wait that have to speak first: without a thread, and until their time is over."""

cimport cython
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

from fastlisten._core.accept cimport Shortage, client_t, drop, turn_away
from fastlisten._core.admission cimport ADMISSION_ADMITTED
from fastlisten._core.admitting cimport Admitting
from fastlisten._core.connection cimport ORIGIN, origin_t
from fastlisten._core.port cimport *
from fastlisten._core.proxy cimport PROXY_DONE, PROXY_MORE, PROXY_MOST, proxy_header, proxy_parse
from fastlisten._core.state cimport (
    REFUSED_HEADER,
    REFUSED_LEFT,
    REFUSED_MADE_WAY,
    REFUSED_NO_HEADER,
    REFUSED_SILENT,
    REFUSED_UNTRUSTED,
    client_waits,
)

# How many clients one look serves: enough to make the cost of the look small, little enough that others are
# accepted in between.
cdef enum:
    LOOK_MOST = 64

# How often all are polled where the system has no poller.
cdef int64_t POLL_EVERY = 10_000_000  # nanoseconds


cdef bint within(const unsigned char *address, const network_t *network) noexcept nogil:
    """Whether an address of the network's family is one of the network."""
    cdef int whole = network.bits // 8
    cdef int rest = network.bits % 8
    if memcmp(address, network.address, whole) != 0:
        return False
    return rest == 0 or (address[whole] ^ network.address[whole]) >> (8 - rest) == 0


@cython.final
cdef class FirstBytes:
    """Clients that were accepted, and have to send something before a handler is taken up with them.

    seconds: after so long without a byte a client is closed; None: nobody has to send one.  networks:
    (family, address, bits) of each network whose clients are proxies, and have to send a PROXY header first;
    timeout: in so many seconds, all of it.  required: nobody else may come.  admitting: is asked first who
    may come in, and about who comes by a proxy after the header.

    For the Acceptor, which watches `poller` beside its listeners, and looks when that is ready or the time
    that left() tells is over.  Nothing in here waits.  One thread at a time is in here, the one that accepts,
    between enter() and leave(): so a fork finds all of it whole.  All in a list have the same time, so the
    first of a list is the first whose time is over.
    """

    def __cinit__(self, seconds, timeout=None, networks=(), bint required=False, Admitting admitting=None):
        cdef bytes address
        cdef int i
        self.poller = self.failed_poller = PORT_NO_SOCKET
        self.patience[SILENT] = <int64_t>(seconds * 1e9) if seconds is not None else 0
        self.patience[HEADER] = <int64_t>(timeout * 1e9) if timeout is not None else 0
        self.required = required
        self.admitting = admitting
        self.networks = len(networks)
        if self.networks:
            self.trusted = <network_t *>calloc(self.networks, sizeof(network_t))
            if self.trusted is NULL:
                raise MemoryError
        for i in range(self.networks):
            self.trusted[i].family, address, self.trusted[i].bits = networks[i]
            memcpy(self.trusted[i].address, <const char *>address, min(len(address), 16))

    def __dealloc__(self):
        self.close()
        free(self.by_fd)
        free(self.trusted)

    cdef int tells_with(self, Shortage shortage) except -1:
        """Have what the log is to know be told with this."""
        self.shortage = shortage
        return 0 if self.admitting is None else self.admitting.tells_with(shortage)

    cdef int open(self) except -1:
        """Be ready for clients."""
        self.open_poller()
        return 0

    cdef void close(self) noexcept nogil:
        """Drop who is here."""
        cdef int i
        cdef client_t client
        for i in range(LISTS):
            while self.first[i] is not NULL:
                self.remove(self.first[i], &client)
                drop(&client)
        self.close_poller()

    cdef void open_poller(self) noexcept nogil:
        """Make the poller, if anybody may have to wait; where there is none to be had, it goes without."""
        if self.patience[SILENT] or self.networks:
            self.poller = port_poller()

    cdef void close_poller(self) noexcept nogil:
        if self.failed_poller != PORT_NO_SOCKET:
            port_close(self.failed_poller)
            self.failed_poller = PORT_NO_SOCKET
        if self.poller != PORT_NO_SOCKET:
            port_close(self.poller)
            self.poller = PORT_NO_SOCKET

    cdef void after_fork(self, bint polls) noexcept:
        """In a child: who waits here is the parent's client, and so is what the poller watches.

        polls: have another poller; else go without.
        """
        self.close_poller()
        if self.room:
            memset(self.by_fd, 0, self.room * sizeof(waiting_t *))
        self.close()
        if polls:
            self.open_poller()

    # --- coming and going -----------------------------------------------------------------------------

    cdef bint passes(self, client_t *client) noexcept nogil:
        """Whether a client that was just accepted may be handed out now; if not it waits here, or is closed.

        One with a PROXY header may be taken at once.
        """
        cdef char first
        cdef Py_ssize_t got
        if self.networks and self.trusts(client):
            self.wait(client, HEADER)
        elif self.required:
            turn_away(client, REFUSED_UNTRUSTED)
        elif self.admitting is not None and not self.admitting.admits(client):
            pass  # and it is closed
        elif self.patience[SILENT] == 0:
            return True
        else:
            got = port_peek(client.fd, &first, 1)
            if got > 0:
                return True
            if got < 0 and port_would_block(port_error()):
                self.wait(client, SILENT)
            else:
                turn_away(client, REFUSED_LEFT)
        client.fd = PORT_NO_SOCKET
        return False

    cdef bint trusts(self, const client_t *client) noexcept nogil:
        """Whether a client is a proxy, by the address that it has come from."""
        cdef int family = client.state.family
        cdef const unsigned char *address = NULL
        cdef int i
        if family == AF_INET and client.length > 0:
            address = <const unsigned char *>&client.address.in4.sin_addr
        elif family == AF_INET6 and client.length > 0:
            address = <const unsigned char *>&client.address.in6.sin6_addr
            if memcmp(address, b"\0\0\0\0\0\0\0\0\0\0\xff\xff", 12) == 0:  # mapped: RFC 4291, 2.5.5.2
                family, address = AF_INET, address + 12
        elif family != AF_UNIX:
            return False
        for i in range(self.networks):
            if self.trusted[i].family == family and (address is NULL or within(address, &self.trusted[i])):
                return True
        return False

    cdef bint take(self, client_t *client) noexcept nogil:
        """Take who has waited longest of those that may be handed out; False if there is none."""
        cdef waiting_t *waiting = self.next_ready()
        if waiting is NULL:
            return False
        self.remove(waiting, client)
        return True

    cdef waiting_t *next_ready(self) noexcept nogil:
        """Who has waited longest of those that may be handed out; NULL if there is none."""
        cdef waiting_t *waiting = self.first[READY]
        while waiting is not NULL and port_get(&waiting.client.state.paused) and not port_get(
                &waiting.client.state.stopping):
            waiting = waiting.after
        return waiting

    cdef bint lets_in(self, bint later) noexcept nogil:
        """Whether a client may be handed out now, or, if `later`, when it has spoken."""
        if later and (self.first[HEADER] is not NULL or self.first[SILENT] is not NULL):
            return True
        if self.next_ready() is NULL:
            self.poll_at = 0  # now, where all are polled every now and then
            self.look()
        return self.next_ready() is not NULL

    cdef bint give_way(self) noexcept nogil:
        """Close who has waited longest without a byte, for want of descriptors; False if there is nobody."""
        if self.first[SILENT] is NULL:
            return False
        self.refuse(self.first[SILENT], REFUSED_MADE_WAY)
        return True

    cdef void wait(self, client_t *client, int list) noexcept nogil:
        """Have a client wait; it is dropped where that cannot be done."""
        cdef int code
        cdef waiting_t *waiting = <waiting_t *>malloc(sizeof(waiting_t))
        if waiting is NULL:
            drop(client)
            self.shortage.dropped(PORT_ENOMEM)
            return
        waiting.client = client[0]
        waiting.watched = False
        waiting.header = NULL
        waiting.length = 0
        client_waits(client.state, 1)
        self.append(waiting, list)
        if list == HEADER and not self.read_header(waiting):
            return  # most often it came with the connection
        code = self.watch(waiting)
        if code != 0:
            self.lose(waiting, code)

    cdef void append(self, waiting_t *waiting, int list) noexcept nogil:
        waiting.list = list
        waiting.deadline = port_now() + self.patience[list]
        waiting.after = NULL
        waiting.before = self.last[list]
        if waiting.before is NULL:
            self.first[list] = waiting
        else:
            waiting.before.after = waiting
        self.last[list] = waiting

    cdef void unlink(self, waiting_t *waiting) noexcept nogil:
        if waiting.before is NULL:
            self.first[waiting.list] = waiting.after
        else:
            waiting.before.after = waiting.after
        if waiting.after is NULL:
            self.last[waiting.list] = waiting.before
        else:
            waiting.after.before = waiting.before

    cdef void remove(self, waiting_t *waiting, client_t *client) noexcept nogil:
        """Have it wait no more: it is the caller's."""
        self.watch_no_more(waiting)
        self.unlink(waiting)
        if waiting.list != READY:
            client_waits(waiting.client.state, -1)
        client[0] = waiting.client
        free(waiting.header)
        free(waiting)

    cdef void lose(self, waiting_t *waiting, int code) noexcept nogil:
        """Drop it: there is no memory for it, or it cannot be watched."""
        cdef client_t client
        self.remove(waiting, &client)
        drop(&client)
        self.shortage.dropped(code)

    cdef void move(self, waiting_t *waiting, int list) noexcept nogil:
        """Have it wait in another list, in which its time begins anew."""
        cdef int code = 0
        self.unlink(waiting)
        self.append(waiting, list)
        if list == READY:
            client_waits(waiting.client.state, -1)
            self.watch_no_more(waiting)
        elif not waiting.watched:
            code = self.watch(waiting)
        if code != 0:
            self.lose(waiting, code)

    cdef void refuse(self, waiting_t *waiting, int reason) noexcept nogil:
        """Close it, and say why."""
        cdef client_t client
        self.remove(waiting, &client)
        turn_away(&client, reason)

    # --- watching -------------------------------------------------------------------------------------

    cdef int watch(self, waiting_t *waiting) noexcept nogil:
        """Have it be heard; returns 0, or a code where that cannot be done."""
        cdef int64_t fd = waiting.client.fd
        cdef int64_t room
        cdef waiting_t **more
        if self.poller == PORT_NO_SOCKET:
            return 0
        if fd >= self.room:
            room = max(2 * self.room, fd + 1)
            more = <waiting_t **>realloc(self.by_fd, room * sizeof(waiting_t *))
            if more is NULL:
                return PORT_ENOMEM
            memset(more + self.room, 0, (room - self.room) * sizeof(waiting_t *))
            self.by_fd, self.room = more, room
        if port_poller_set(self.poller, waiting.client.fd, 0, POLLIN) != 0:
            return port_error()
        self.by_fd[fd] = waiting
        waiting.watched = True
        return 0

    cdef void watch_no_more(self, waiting_t *waiting) noexcept nogil:
        """Not left to the close: a forked child may have the description, which the poller watches, too."""
        if waiting.watched and self.poller != PORT_NO_SOCKET:
            port_poller_set(self.poller, waiting.client.fd, POLLIN, 0)
            self.by_fd[waiting.client.fd] = NULL
        waiting.watched = False

    cdef int64_t left(self) noexcept nogil:
        """For how many ns nothing is to be done unless the poller is ready; < 0: without end."""
        cdef int64_t at = 0
        cdef int i
        for i in range(READY):
            if self.first[i] is not NULL and (at == 0 or self.first[i].deadline < at):
                at = self.first[i].deadline
        if at == 0:
            return -1  # nobody waits
        if self.poller == PORT_NO_SOCKET:
            at = min(at, self.poll_at)
        return max(at - port_now(), 0)

    cdef void look(self) noexcept nogil:
        """See who has spoken, and whose time is over; of many the first."""
        cdef int64_t now
        cdef int i
        if self.first[HEADER] is NULL and self.first[SILENT] is NULL:
            return
        now = port_now()
        if self.poller != PORT_NO_SOCKET:
            self.ask_poller()
        elif now >= self.poll_at:
            self.poll_list(HEADER)
            self.poll_list(SILENT)
            self.poll_at = port_now() + POLL_EVERY
        for i in range(READY):
            for _ in range(LOOK_MOST):
                if self.first[i] is NULL or self.first[i].deadline > now:
                    break
                if self.still_waits(self.first[i]):  # asked: more may have spoken than one look sees
                    self.refuse(self.first[i], REFUSED_NO_HEADER if i == HEADER else REFUSED_SILENT)

    cdef void ask_poller(self) noexcept nogil:
        cdef port_pollfd ready[LOOK_MOST]
        cdef int i
        cdef int found = port_poller_ready(self.poller, ready, LOOK_MOST)
        if found < 0 and port_error() != PORT_EINTR:
            self.give_poller_up(port_error())
        for i in range(found):
            if ready[i].fd < self.room and self.by_fd[ready[i].fd] is not NULL:
                self.still_waits(self.by_fd[ready[i].fd])

    cdef void give_poller_up(self, int code) noexcept nogil:
        """It does not tell who has spoken any more: go without."""
        cdef waiting_t *waiting
        cdef int i
        self.shortage.poller_failed(code)
        self.failed_poller, self.poller = self.poller, PORT_NO_SOCKET
        for i in range(READY):
            waiting = self.first[i]
            while waiting is not NULL:
                waiting.watched = False
                waiting = waiting.after

    cdef void poll_list(self, int list) noexcept nogil:
        """Ask the kernel of all in a list, some at a time."""
        cdef port_pollfd polls[LOOK_MOST]
        cdef waiting_t *asked[LOOK_MOST]
        cdef waiting_t *waiting = self.first[list]
        cdef int i
        cdef int n = 0
        while waiting is not NULL:
            asked[n] = waiting
            polls[n].fd = waiting.client.fd
            polls[n].events = POLLIN
            n += 1
            waiting = waiting.after
            if n == LOOK_MOST or waiting is NULL:
                if port_poll_ns(polls, n, 0) > 0:
                    for i in range(n):
                        if polls[i].revents:
                            self.still_waits(asked[i])
                n = 0

    cdef bint still_waits(self, waiting_t *waiting) noexcept nogil:
        """See what has come of it, and whether it has to wait on; else it may be handed out, or is closed."""
        cdef char first
        cdef Py_ssize_t got
        if waiting.list == HEADER:
            return self.read_header(waiting)
        got = port_peek(waiting.client.fd, &first, 1)
        if got > 0:
            self.move(waiting, READY)
        elif got < 0 and port_would_block(port_error()):
            return True
        else:
            self.refuse(waiting, REFUSED_LEFT)
        return False

    # --- a PROXY header -------------------------------------------------------------------------------
    # It is looked at while it lies in the kernel, and as many bytes are taken out as are its own, so that
    # whoever has the client next finds the client's.  Of one that is not whole all is taken out and kept, or
    # the poller would go on saying that there is something.

    cdef bint read_header(self, waiting_t *waiting) noexcept nogil:
        """See what has come of it, and whether to wait on; else the client is through, or closed."""
        cdef char data[PROXY_MOST]
        cdef proxy_header header
        cdef int answer
        cdef Py_ssize_t got
        if waiting.length:
            memcpy(data, waiting.header, waiting.length)
        got = port_peek(waiting.client.fd, data + waiting.length, PROXY_MOST - waiting.length)
        if got < 0 and port_would_block(port_error()):
            return True
        if got <= 0:
            self.refuse(waiting, REFUSED_LEFT)
            return False
        answer = proxy_parse(data, waiting.length + <int>got, &header)
        if answer == PROXY_MORE:
            return self.keep(waiting, <int>got)
        if answer == PROXY_DONE:
            self.end_header(waiting, data, waiting.length + <int>got, &header)
        else:
            self.refuse(waiting, REFUSED_HEADER)
        return False

    cdef bint keep(self, waiting_t *waiting, int more) noexcept nogil:
        """Take out what has come of a header that is not whole; False when the client is closed for it."""
        cdef char *kept = <char *>realloc(waiting.header, waiting.length + more)
        if kept is NULL:
            self.lose(waiting, PORT_ENOMEM)
            return False
        waiting.header = kept
        if port_recv(waiting.client.fd, kept + waiting.length, more, 0) != more:
            self.refuse(waiting, REFUSED_LEFT)
            return False
        waiting.length += more
        return True

    cdef void end_header(
            self, waiting_t *waiting, char *data, int length, proxy_header *header) noexcept nogil:
        """It is whole: take out its end, and have the client's own bytes be waited for, or nothing more.

        length: of what has come, of the client's own bytes too.
        """
        cdef client_t client
        cdef int answer = ADMISSION_ADMITTED
        cdef int last = header.length - waiting.length
        cdef origin_t *origin = <origin_t *>malloc(sizeof(origin_t) + header.length)
        if origin is NULL:
            self.lose(waiting, PORT_ENOMEM)
            return
        if port_recv(waiting.client.fd, data + waiting.length, last, 0) != last:
            free(origin)
            self.refuse(waiting, REFUSED_LEFT)
            return
        origin.address, origin.length = waiting.client.address, waiting.client.length
        origin.size = header.length
        memcpy(origin + 1, data, header.length)
        origin.ticket = 0
        memcpy(&waiting.client.address, &origin, sizeof(origin))
        waiting.client.length = ORIGIN
        if self.admitting is not None:
            answer = self.admitting.ask_for(header, &origin.ticket)
            origin.table = self.admitting.table.at
        if answer != ADMISSION_ADMITTED:
            self.remove(waiting, &client)
            self.admitting.shut_out(&client, answer)
            return
        if self.patience[SILENT] == 0 or length > header.length:
            self.move(waiting, READY)
        else:
            self.move(waiting, SILENT)


def first_bytes_of(options):
    """What serves the checked options first_bytes, proxy and admission; None when none is asked for."""
    cdef Admitting admitting = None
    if options.admission is not None:
        admitting = Admitting(options.admission.table, options.busy)
    if options.proxy is not None:
        return FirstBytes(options.first_bytes, options.proxy.timeout, options.proxy.networks,
                          options.proxy.required, admitting)
    if options.first_bytes is None and admitting is None:
        return None
    return FirstBytes(options.first_bytes, admitting=admitting)
