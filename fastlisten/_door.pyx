"""Where clients come in: wait, accept, pause, refuse.  All of it runs without the GIL."""

from _thread import allocate_lock, start_new_thread

cimport cython
from cpython.pythread cimport (
    PyThread_acquire_lock,
    PyThread_allocate_lock,
    PyThread_free_lock,
    PyThread_release_lock,
    WAIT_LOCK,
)
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free

from fastlisten._accept cimport (
    AGAIN,
    CLOSED,
    CONNECTION,
    INTERRUPTED,
    LOST_IN_A_ROW,
    RESOURCES,
    Ledger,
    client_t,
    count_error,
    default_timeout,
    share_nonblocking,
    shed_client,
    verdict,
    verdict_t,
)
from fastlisten._accept import wake_pair
from fastlisten._connection cimport ledger_ring, ledger_t, raise_error
from fastlisten._core.port cimport *

# How many clients an inline loop accepts at a time.  More would save little and hoard clients that another
# process on the same listener could serve; HAProxy settled on 4 after 64.
cdef enum:
    BATCH = 4

# How many times poll() is asked first, at most, after accept() was tried in vain: 1, 3, 7, 15.
cdef enum:
    IN_VAIN_MOST = 15

# What the door opens for itself: the wake-up's two ends, the spare descriptor, the client that is refused.
cdef enum:
    OWN = 4

# How many clients an usher accepts before it looks up to see whether it is to stop.
cdef enum:
    ROUND = 64

# The pause after accept() ran out of descriptors or memory: it grows from the first to the second.  A longer
# one would leave clients waiting after a descriptor came free; the retry itself costs nothing.
cdef int64_t PAUSE_FIRST = 10_000_000  # nanoseconds
cdef int64_t PAUSE_LAST = 100_000_000
cdef double LONGEST_PAUSE = 1e9  # seconds; more do not fit

# How many threads count as free places when the most that may run is hardly a limit.
cdef enum:
    FREE_AT_MOST = 4096


cdef object log():
    """The logger; imported late, since it costs as much to import as all the rest and most never log."""
    import logging
    return logging.getLogger("fastlisten")


@cython.final
cdef class Door:
    """The listeners of one serve(), and the clients that came in and wait for a handler.

    listeners: the Listeners, taken in turn; the caller keeps them open.  handler: None when the caller takes
    the clients one by one.  options: a ServeOptions.

    Whoever holds `lock` may touch the listening descriptors.  That is the leader, who accepts for itself, or,
    with `busy`, the usher: a thread that accepts without the GIL, refuses who finds no room, and puts the
    others into the ring, from which the leader takes.
    """

    def __cinit__(self, listeners, handler, options):
        cdef Ledger ledger
        cdef int i
        self.arrivals[0] = self.arrivals[1] = self.spare = PORT_NO_SOCKET
        self.listeners = listeners
        self.most = options.threads[1]
        self.most_active = options.max_connections or 0
        self.ushered = options.busy is not None
        self.evented = self.ushered and handler is None
        self.busy = options.busy or b""
        self.busy_text, self.busy_length = self.busy, len(self.busy)
        self.pending = options.pending or 0
        self.shed = options.exhausted == "shed"
        self.exhausted = options.exhausted if callable(options.exhausted) else None
        self.timeout = 0 if self.evented else default_timeout()
        self.to_drain = -1

        self.room = 1 if self.most or handler is None else BATCH
        if self.ushered:
            self.room = self.pending + self.free_places()
        self.count = len(listeners)
        self.ring = <client_t *>calloc(self.room, sizeof(client_t))
        self.sources = <source_t *>calloc(self.count, sizeof(source_t))
        self.polls = <port_pollfd *>calloc(2 * self.count, sizeof(port_pollfd))
        self.lock = PyThread_allocate_lock()
        self.ring_lock = PyThread_allocate_lock()
        if (self.ring is NULL or self.sources is NULL or self.polls is NULL
                or self.lock is NULL or self.ring_lock is NULL):
            raise MemoryError
        for i in range(self.count):
            ledger = listeners[i]._ledger
            share_nonblocking(listeners[i])
            self.sources[i].fd = listeners[i].fileno()
            self.sources[i].ledger = ledger.at

    def __dealloc__(self):
        close_pair(self.arrivals)
        if self.lock is not NULL:
            PyThread_free_lock(self.lock)
        if self.ring_lock is not NULL:
            PyThread_free_lock(self.ring_lock)
        free(self.ring)
        free(self.sources)
        free(self.polls)

    cdef int open(self) except -1:
        """Make the wake-ups, room for the clients' descriptors, the spare one and the usher."""
        cdef int64_t held = self.pending + max(self.most, self.most_active, 1)
        log()  # it is imported here, since without descriptors it could not be
        for listener in self.listeners:
            listener._ledger.arm()
        if held > 1:
            port_make_room(self.sources[0].fd, held + OWN)
        if self.shed:
            self.spare = port_spare()
            if self.spare == PORT_NO_SOCKET:
                raise_error(port_error())
        if self.ushered:
            self.arrivals[0], self.arrivals[1] = wake_pair()
            self.usher_ended = allocate_lock()
            self.usher_ended.acquire()
            try:
                start_new_thread(self.usher, ())
            except BaseException:
                self.usher_ended = None  # nobody to wait for
                raise
        return 0

    cdef int shut(self) except -1:
        """Let nobody in any more, and close who still waits; returns how many they were."""
        cdef client_t client
        cdef int turned_away = 0
        port_swap(&self.over, 1)
        for i in range(self.count):
            self.sources[i].ledger.wanted = 0
        if self.usher_ended is not None:
            ledger_ring(self.sources[0].ledger)
            self.usher_ended.acquire()
            self.usher_ended = None
        while self.pop(&client):
            port_close(client.fd)
            port_add(&client.ledger.active, -1)
            turned_away += 1
        if self.spare != PORT_NO_SOCKET:
            port_close(self.spare)
            self.spare = PORT_NO_SOCKET
        return turned_away

    cdef void end(self) noexcept:
        """Nobody is to be let in any more; from any thread."""
        port_swap(&self.over, 1)
        for i in range(self.count):
            ledger_ring(self.sources[i].ledger)

    cdef int release(self, int i) except -1:
        """Have no thread touch listener i any more; it was told to stop and will be closed."""
        with nogil:
            PyThread_acquire_lock(self.lock, WAIT_LOCK)
            self.sources[i].fd = PORT_NO_SOCKET
            PyThread_release_lock(self.lock)
        return 0

    cdef void after_fork(self) noexcept:
        """In a child without the threads of its parent, which may have held the locks."""
        self.usher_ended = None
        self.lock = PyThread_allocate_lock()
        self.ring_lock = PyThread_allocate_lock()

    # --- accepting, by whoever holds the door ---------------------------------------------------------

    cdef outcome_t take(self, client_t *client) noexcept nogil:
        """Wait for the next client and take it; for one thread at a time, the leader."""
        cdef outcome_t outcome
        if port_get(&self.over):
            return ENDED
        if self.ushered:
            outcome = self.wait_for_usher()
        elif self.waiting:
            outcome = TAKEN
        else:
            PyThread_acquire_lock(self.lock, WAIT_LOCK)
            outcome = self.admit()
            PyThread_release_lock(self.lock)
        if outcome == TAKEN:
            self.pop(client)
        elif outcome == ENDED or outcome == FAILED:
            port_swap(&self.over, 1)
        return outcome

    cdef outcome_t admit(self) noexcept nogil:
        """Wait and accept, until the ring holds a client or something else is due."""
        cdef int64_t shut
        cdef outcome_t outcome
        while not self.ending():
            shut = self.shut_for()
            if shut == 0 and self.likely():
                outcome = self.accept_queued(INT_MAX)
                if outcome != NOBODY:
                    self.in_vain = 0
                    return outcome
                self.in_vain = self.polls_first = min(2 * self.in_vain + 1, IN_VAIN_MOST)
                shut = self.shut_for()
                if self.stopping and shut == 0:
                    return ENDED
            outcome = self.sleep(shut)
            if outcome == TAKEN:  # somebody is there, most often alone: a look for others would be in vain
                outcome = self.accept_queued(1)
            if outcome != NOBODY:
                return outcome
            if self.stopping and shut == 0:
                return ENDED
        return ENDED

    cdef bint likely(self) noexcept nogil:
        """Whether to look for a client before poll() tells of one: less often after looks in vain."""
        if self.failures:
            return self.eased > 0  # that there is nobody ends the episode
        if self.polls_first and not self.stopping:
            self.polls_first -= 1
            return False
        return True

    cdef outcome_t accept_queued(self, int most) noexcept nogil:
        """Accept up to `most` that are queued, one client of each listener in turn, while there is room."""
        cdef source_t *source
        cdef client_t client
        cdef verdict_t answer
        cdef int misses = 0
        cdef int taken = 0
        cdef bint recovered = False
        if self.shed and self.spare == PORT_NO_SOCKET:
            self.spare = port_spare()  # a stranger had taken it; what comes free is the spare first
        while misses < self.count and taken < most and not self.full(taken):
            source = &self.sources[self.turn]
            self.turn = (self.turn + 1) % self.count
            if source.fd == PORT_NO_SOCKET or (port_get(&source.ledger.paused) and not self.stopping):
                misses += 1
                continue
            client.fd = port_accept(source.fd, &client.address, &client.length, self.timeout >= 0)
            if client.fd != PORT_NO_SOCKET:
                client.ledger = source.ledger
                source.proven = True
                misses = 0
                self.lost = 0
                taken += 1
                if self.failures:
                    recovered = self.recover(False)
                self.receive(&client)
                continue
            self.code = port_error()
            answer = verdict(self.code)
            if answer == AGAIN:
                misses += 1
                self.lost = 0
                if self.failures:
                    recovered = self.recover(True)
            elif answer == INTERRUPTED:
                return TAKEN if taken else LOOK
            elif answer == CONNECTION or answer == RESOURCES:
                count_error(source.ledger, self.code)
                self.lost += answer == CONNECTION
                if answer == RESOURCES or self.lost >= LOST_IN_A_ROW:
                    self.run_out()
                    return TAKEN if taken else LOOK
                if self.lost % ROUND == 0:
                    return TAKEN if taken else LOOK
            elif taken:
                return TAKEN  # it will fail again
            elif answer == CLOSED and (self.ending() or self.stopping or (
                    self.code == PORT_EINVAL and source.proven)):
                return ENDED
            else:
                return FAILED
        if taken:
            return TAKEN
        return LOOK if recovered else NOBODY

    cdef bint full(self, int taken) noexcept nogil:
        """Whether to accept no more now."""
        if self.stopping and self.to_drain == 0:
            return True
        if self.ushered:
            return taken == ROUND
        return self.waiting == self.room or self.at_limit()

    cdef void receive(self, client_t *client) noexcept nogil:
        """Put a client into the ring; an usher refuses it when there is no room."""
        cdef bint room = True
        cdef bint ring_for_leader = False
        port_add(&client.ledger.accepted, 1)
        if self.to_drain > 0:
            self.to_drain -= 1
        if self.ushered:
            PyThread_acquire_lock(self.ring_lock, WAIT_LOCK)
            room = self.waiting < min(self.pending + self.free_places(), <int64_t>self.room)
        if room:
            self.ring[(self.first + self.waiting) % self.room] = client[0]
            self.waiting += 1
        if self.ushered:
            ring_for_leader = room and self.leader_waits
            if ring_for_leader:
                self.leader_waits = False
            PyThread_release_lock(self.ring_lock)
        if ring_for_leader:
            self.ring_for_leader()
        if not room:
            self.refuse(client)

    cdef void refuse(self, client_t *client) noexcept nogil:
        port_add(&client.ledger.refused, 1)
        port_refuse(client.fd, self.busy_text, self.busy_length)

    cdef bint pop(self, client_t *client) noexcept nogil:
        """Take the client that has waited longest out of the ring."""
        cdef bint some
        if self.ushered:
            PyThread_acquire_lock(self.ring_lock, WAIT_LOCK)
        some = self.waiting > 0
        if some:
            client[0] = self.ring[self.first]
            self.first = (self.first + 1) % self.room
            self.waiting -= 1
            port_add(&self.handling, 1)
            port_add(&client.ledger.active, 1)  # now, not with its Connection: the next to lead asks
        if self.ushered:
            PyThread_release_lock(self.ring_lock)
        return some

    cdef int64_t free_places(self) noexcept nogil:
        """How many more clients could be with a handler right now."""
        cdef int64_t places = max(self.most, 1) - port_get(&self.handling)
        if self.evented and self.most_active:
            places = FREE_AT_MOST  # an event loop has as many handlers as there may be connections
        elif self.evented and self.pending:
            places = 0  # ... and who is not with it yet waits
        if self.most_active:
            places = min(places, self.most_active - self.active())
        return min(max(places, 0), FREE_AT_MOST)

    cdef int64_t active(self) noexcept nogil:
        """Connections handed out and not yet closed."""
        cdef int64_t active = 0
        cdef int i
        for i in range(self.count):
            active += port_get(&self.sources[i].ledger.active)
        return active

    cdef bint at_limit(self) noexcept nogil:
        return self.most_active != 0 and self.active() + self.waiting >= self.most_active

    cdef void want(self, bint wanted) noexcept nogil:
        """Have Connections ring when they close, or no longer."""
        cdef int i
        wanted = wanted or (self.ushered and self.most_active != 0)  # the leader has its own reason to wait
        if wanted != self.wanting:
            self.wanting = wanted
            for i in range(self.count):
                port_swap(&self.sources[i].ledger.wanted, wanted)

    cdef int64_t shut_for(self) noexcept nogil:
        """For how many ns nobody is to be accepted; 0: go on; < 0: until somebody rings."""
        cdef int64_t left = self.retry_at - port_now() if self.retry_at else 0
        if left > 0:
            self.want(True)
            return left
        self.retry_at = 0
        if not self.ushered and self.at_limit():
            self.want(True)
            if self.at_limit():  # it could have closed before it knew that we wait
                return -1
        # In a shortage they go on ringing: one that closes while we try again must cut the next pause short.
        self.want(self.failures > 0)
        return 0

    cdef outcome_t sleep(self, int64_t shut) noexcept nogil:
        """Wait for a ring, and for clients unless we are shut to them.

        TAKEN: a listener is ready.  LOOK: rung or interrupted.  NOBODY: the time is over.
        """
        cdef int n = self.count
        cdef int64_t patience = shut if shut > 0 else -1
        cdef int64_t left
        cdef int i, ready
        cdef source_t *source
        cdef outcome_t outcome = NOBODY
        for i in range(self.count):
            source = &self.sources[i]
            self.polls[i].fd = source.ledger.wake[0]
            self.polls[i].events = POLLIN
            if shut == 0 and source.fd != PORT_NO_SOCKET and (
                    self.stopping or not port_get(&source.ledger.paused)):
                self.polls[n].fd = source.fd
                self.polls[n].events = POLLIN
                n += 1
        if self.stopping and shut == 0:
            patience = 0  # a drain takes who is there, and nobody who may yet come
        if self.deadline:
            left = max(self.deadline - port_now(), 0)
            patience = left if patience < 0 else min(patience, left)
        ready = port_poll_ns(self.polls, n, patience)
        if ready < 0:
            self.code = port_error()
            return LOOK if self.code == PORT_EINTR else FAILED
        if ready == 0:
            return NOBODY
        for i in range(n):
            if self.polls[i].revents:
                if i >= self.count:
                    return TAKEN if outcome == NOBODY else outcome
                port_unring(self.polls[i].fd)
                self.retry_at = 0  # a connection of ours may have closed
                outcome = LOOK
        return outcome

    cdef ledger_t *asked_to_stop(self) noexcept nogil:
        """The ledger of the first listener that was asked to stop; NULL if none was."""
        cdef int i
        for i in range(self.count):
            if port_get(&self.sources[i].ledger.stopping):
                return self.sources[i].ledger
        return NULL

    cdef bint overdue(self) noexcept nogil:
        """Whether a stop has asked to cut connections from now on."""
        cdef ledger_t *ledger = self.asked_to_stop()
        cdef int64_t deadline = 0 if ledger is NULL else port_get(&ledger.deadline)
        return deadline != 0 and port_now() >= deadline

    cdef bint ending(self) noexcept nogil:
        """Whether a stop is to be answered now; a drain first takes what the kernel had queued."""
        cdef ledger_t *ledger
        if port_get(&self.over):
            return True
        ledger = self.asked_to_stop()
        if ledger is NULL:
            return False
        self.stopping = True
        self.deadline = port_get(&ledger.deadline)
        if not port_get(&ledger.draining) or port_now() >= self.deadline:
            return True
        if self.to_drain < 0:
            self.to_drain = self.queued()
        return self.to_drain == 0

    cdef int queued(self) noexcept nogil:
        """How many clients the kernel has queued; where it does not tell, as many as are found."""
        cdef int depth, limit, i
        cdef int total = 0
        for i in range(self.count):
            if port_queue(self.sources[i].fd, &depth, &limit) != 0:
                return INT_MAX
            total += depth
        return total

    # --- out of descriptors or memory -----------------------------------------------------------------

    cdef void run_out(self) noexcept nogil:
        """An accept failed for want of resources: shed the clients, or pause for longer each time."""
        if self.failures == 0:
            self.episode_began = port_now()
            self.episode_code = self.code
            port_swap(&self.news_began, 1)
        if self.failures == 0 or self.eased:
            self.pause = PAUSE_FIRST
        self.failures += 1
        self.eased = 0
        self.want(True)  # now, not when the pause begins: first the log is written and `exhausted` asked
        port_swap(&self.news_again, 1)
        port_swap(&self.news, 1)
        if self.shed and self.shed_queued():
            return
        self.retry_at = self.episode_until = port_now() + self.pause
        self.pause = min(2 * self.pause, PAUSE_LAST)

    cdef bint shed_queued(self) noexcept nogil:
        """Refuse who is queued, through the descriptor kept for that; False if that cannot be done now."""
        cdef int i, code
        if self.spare == PORT_NO_SOCKET:
            return False
        for i in range(self.count):
            for _ in range(ROUND):
                if self.sources[i].fd == PORT_NO_SOCKET:
                    break
                code = shed_client(self.sources[i].fd, self.sources[i].ledger, &self.spare,
                                   self.busy_text, self.busy_length)
                self.episode_until = port_now()
                if self.spare == PORT_NO_SOCKET or verdict(code) == RESOURCES or self.lost >= LOST_IN_A_ROW:
                    return False  # the whole system has run out: one descriptor of ours does not help
                if code != 0:
                    break
        return True

    cdef bint recover(self, bint caught_up) noexcept nogil:
        """An accept worked again.  The episode is over when all who were queued are in, or a whole round of
        them: with the last free descriptor in use again after each client the news would never end."""
        self.eased += 1
        if not caught_up and self.eased < ROUND:
            return False
        self.episode_length = min(port_now(), self.episode_until) - self.episode_began
        self.episode_failures = self.failures
        self.failures = self.eased = 0
        port_swap(&self.news_over, 1)
        port_swap(&self.news, 1)
        return True

    cdef int tell_news(self) except -1:
        """Log the beginning and the end of an episode; ask `exhausted` how long to pause."""
        if not port_swap(&self.news, 0):
            return 0
        try:
            raise_error(self.episode_code)
        except OSError as trouble:
            error = trouble
        if port_swap(&self.news_began, 0):
            log().warning("accepting pauses: %s", error)
        if port_swap(&self.news_again, 0) and self.exhausted is not None and self.failures:
            seconds = self.exhausted(error, self.failures)
            if not seconds >= 0:
                raise ValueError(f"exhausted must return seconds, at least 0, not {seconds!r}")
            self.retry_at = port_now() + <int64_t>(min(<double>seconds, LONGEST_PAUSE) * 1e9)
        if port_swap(&self.news_over, 0):
            log().info("accepting again after %.3f s and %d failed tries",
                       self.episode_length / 1e9, self.episode_failures)
        return 0

    # --- the usher ------------------------------------------------------------------------------------

    def usher(self):
        """Accept and refuse without the GIL, so that nothing Python does delays an answer."""
        cdef outcome_t outcome = NOBODY
        with nogil:
            PyThread_acquire_lock(self.lock, WAIT_LOCK)
            while outcome != ENDED and outcome != FAILED:
                outcome = self.admit()
                if outcome == LOOK or port_get(&self.news):
                    self.ring_for_leader()  # for the log, or a place that came free under max_connections
            self.usher_outcome = outcome
            port_swap(&self.usher_gone, 1)
            PyThread_release_lock(self.lock)
            self.ring_for_leader()
        self.usher_ended.release()

    cdef void ring_for_leader(self) noexcept nogil:
        port_ring(self.arrivals[1])

    cdef bint look_in_ring(self) noexcept nogil:
        """Whether somebody waits there and may be taken; if not, have the usher ring."""
        cdef bint some, allowed
        PyThread_acquire_lock(self.ring_lock, WAIT_LOCK)
        some = self.waiting > 0
        allowed = self.most_active == 0 or self.active() < self.most_active or self.overdue()
        self.leader_waits = not (some and allowed)
        PyThread_release_lock(self.ring_lock)
        return some and allowed

    cdef outcome_t wait_for_usher(self) noexcept nogil:
        """The leader's wait while an usher accepts."""
        cdef port_pollfd poll
        if self.look_in_ring():
            return TAKEN
        if port_get(&self.usher_gone):  # nobody else hears the Connections ring
            return self.sleep(-1) if self.waiting else self.usher_outcome
        poll.fd = self.arrivals[0]
        poll.events = POLLIN
        if port_poll_ns(&poll, 1, -1) > 0:
            port_unring(poll.fd)
        return LOOK


cdef void close_pair(port_socket *pair) noexcept nogil:
    if pair[0] != PORT_NO_SOCKET:
        port_close(pair[0])
        port_close(pair[1])
        pair[0] = pair[1] = PORT_NO_SOCKET
