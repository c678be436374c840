"""The loop: wait, accept, dispatch, end."""

import signal
import threading
from _thread import allocate_lock, start_new_thread

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.pythread cimport (
    PyThread_acquire_lock,
    PyThread_allocate_lock,
    PyThread_free_lock,
    PyThread_release_lock,
    PyThread_type_lock,
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
    RESOURCES,
    Ledger,
    client_t,
    count_error,
    default_timeout,
    share_nonblocking,
    verdict,
    verdict_t,
)
from fastlisten._accept import wake_pair
from fastlisten._connection cimport (
    Connection,
    ledger_ring,
    ledger_t,
    new_connection,
    raise_error,
)
from fastlisten._port cimport *

cdef extern from "pythread.h" nogil:
    enum PyLockStatus:
        PY_LOCK_ACQUIRED
    PyLockStatus PyThread_acquire_lock_timed(
        PyThread_type_lock lock, long long microseconds, int interruptible)

# How many clients an inline loop accepts at a time.  More would save little and hoard clients that another
# process on the same listener could serve; HAProxy settled on 4 after 64.
cdef enum:
    BATCH = 4

# How many clients an usher accepts before it looks up to see whether it is to stop.
cdef enum:
    ROUND = 64

# The pause after accept() ran out of descriptors or memory: it grows from the first to the second.  A longer
# one would leave clients waiting after a descriptor came free; the retry itself costs nothing.
cdef int64_t PAUSE_FIRST = 10_000_000  # nanoseconds
cdef int64_t PAUSE_LAST = 100_000_000

# How long a thread beyond the minimum waits for work before it ends.
cdef long long IDLE = 10_000_000  # microseconds

# How long serve() waits, after it cut the connections of its handlers, for the handlers to notice.
cdef int64_t GRACE = 250_000_000  # nanoseconds

# How many threads count as free places when the most that may run is hardly a limit.
cdef enum:
    FREE_AT_MOST = 4096


cdef object log():
    """The logger; imported late, since it costs as much to import as all the rest and most never log."""
    import logging
    return logging.getLogger("fastlisten")


# How long a handler may keep the lead in its pocket before the heir takes it.  Shorter than anybody notices,
# and long beside the handlers that a high rate of connections needs; the heir's look costs 3 µs each time.
cdef long long TICK = 500  # microseconds

# A handler that took no longer than this was not worth waking another thread for.
cdef int64_t QUICK = 100_000  # nanoseconds

# After two handlers in a row that were not quick (one alone may have been preempted), clients are handed on
# at once: this many before the next try, and twice as many each time that finds a slow one again.
cdef enum:
    EAGER = 16
    EAGER_MOST = 1024

cdef enum:              # the values of Lead.held; higher ones are in the pocket of a handler
    FREE = 0
    LEADING = 1

cdef enum:              # the values of Lead.heir_waits
    FOR_ANYTHING = 1    # for the leader to take a client or to give up
    FOR_A_TICK = 2


cdef enum outcome_t:
    NOBODY          # nobody is queued
    TAKEN           # the ring holds a client
    LOOK            # woken: what needs the GIL may be due (signals, the log)
    ENDED           # no more clients will come
    FAILED          # self.code says how

cdef struct source_t:       # one listener of the loop
    port_socket fd          # PORT_NO_SOCKET once it is closed
    ledger_t *ledger
    bint proven             # it has accepted: EINVAL now means closed, not "never listened"


@cython.final
cdef class Worker:
    """A thread that handles clients, and the one it has now."""

    cdef Connection connection

    cdef void takes(self, Connection connection) noexcept:
        with cython.critical_section(self):
            self.connection = connection

    cdef Connection has(self):
        with cython.critical_section(self):
            return self.connection


@cython.final
cdef class Lead:
    """The right to accept, which one thread has at a time.

    A leader that has accepted a client keeps the lead in its pocket while it handles the client, and most
    often comes back before anybody missed it: no other thread was woken.  The first of the idle threads, the
    heir, looks after a TICK and takes the lead out of the pocket of a handler that is still busy; so nobody
    waits for long behind a slow one.  Where handlers are not quick, leaders hand the lead on at once.
    """

    cdef long long tick                 # TICK, or as ServeOptions says
    cdef int64_t quick                  # QUICK, likewise
    cdef int64_t eager_most             # EAGER_MOST, or no more than EAGER with a tick of ServeOptions
    cdef int64_t held                   # FREE, LEADING, or the pocketed client's number
    cdef int64_t clients                # numbers them
    cdef int64_t misses                 # tries in a row that were not quick
    cdef int64_t eager                  # how many more are handed on at once
    cdef int64_t heir_waits
    cdef PyThread_type_lock heir        # held by the first in line
    cdef PyThread_type_lock alarm       # what the heir sleeps on; released to wake it

    def __cinit__(self):
        self.tick, self.quick, self.eager_most = TICK, QUICK, EAGER_MOST
        self.clients = LEADING
        self.heir = PyThread_allocate_lock()
        self.alarm = PyThread_allocate_lock()
        if self.heir is NULL or self.alarm is NULL:
            raise MemoryError
        PyThread_acquire_lock(self.alarm, WAIT_LOCK)

    def __dealloc__(self):
        if self.heir is not NULL:
            PyThread_free_lock(self.heir)
        if self.alarm is not NULL:
            PyThread_free_lock(self.alarm)

    cdef bint take(self, long long patience) noexcept nogil:
        """Wait in line and lead; False when `patience` microseconds (< 0: no limit) were too few."""
        cdef int64_t held
        cdef int64_t seen = FREE
        cdef bint taken = False
        if PyThread_acquire_lock_timed(self.heir, patience, 0) != PY_LOCK_ACQUIRED:
            return False
        while not taken:
            held = port_get(&self.held)
            if held == seen or held == FREE:
                taken = port_replace(&self.held, held, LEADING)
            elif held == LEADING:
                seen = FREE
                if not self.wait(FOR_ANYTHING, patience):
                    break
            else:
                seen = held
                self.wait(FOR_A_TICK, self.tick)
        PyThread_release_lock(self.heir)
        return taken

    cdef bint wait(self, int64_t reason, long long patience) noexcept nogil:
        """The heir's sleep; False when nobody rang in that time."""
        cdef bint changed
        port_swap(&self.heir_waits, reason)
        changed = reason == FOR_ANYTHING and port_get(&self.held) != LEADING  # before we said that we wait
        if not changed and PyThread_acquire_lock_timed(self.alarm, patience, 0) == PY_LOCK_ACQUIRED:
            return True
        if port_swap(&self.heir_waits, 0) == 0:
            PyThread_acquire_lock(self.alarm, WAIT_LOCK)  # somebody rang just now
            return True
        return changed

    cdef int64_t pocket(self) noexcept nogil:
        """The leader goes to handle a client; returns what come_back() wants to see."""
        if PORT_PARALLEL:  # without the GIL even quick handlers gain from a second thread
            self.give_up()
            return FREE
        if self.eager > 0:
            self.eager -= 1
            self.give_up()
            return FREE
        self.clients += 1
        port_swap(&self.held, self.clients)
        if port_replace(&self.heir_waits, FOR_ANYTHING, 0):
            PyThread_release_lock(self.alarm)
        return self.clients

    cdef bint come_back(self, int64_t pocketed, int64_t since) noexcept nogil:
        """The handler that began at `since` has returned: whether its thread still leads."""
        cdef int64_t misses
        if pocketed == FREE:
            return False
        if port_now() - since <= self.quick:
            if self.misses:
                port_swap(&self.misses, 0)
        else:
            misses = port_add(&self.misses, 1)
            if misses > 1:
                port_swap(&self.eager, min(EAGER << min(misses - 2, 6), self.eager_most))
        return port_replace(&self.held, pocketed, LEADING)

    cdef void give_up(self) noexcept nogil:
        """Lead no more."""
        port_swap(&self.held, FREE)
        if port_swap(&self.heir_waits, 0) != 0:
            PyThread_release_lock(self.alarm)


@cython.final
cdef class Loop:
    """One serve(): its listeners, handler, limits and threads.

    listeners: the Listeners to serve, in turn; the caller keeps them open.  handler: called with each
    Connection; None when the caller takes them with next().  options: a ServeOptions.

    Whoever holds `door` may touch the listening descriptors.  Without threads that is the caller of run();
    threads have the lead in turn: one waits, accepts a client and handles it.  With `busy` it is an usher: it
    accepts without the GIL, refuses who finds no room, and puts the others into the ring, from which the
    leader takes.
    """

    cdef readonly tuple listeners
    cdef object handler, on_error, exhausted
    cdef int count, turn
    cdef source_t *sources
    cdef port_pollfd *polls
    cdef double timeout             # of the Connections, in seconds; < 0: none
    cdef int64_t most_active        # max_connections; 0: no limit
    cdef bint wanting               # the ledgers' `wanted` is set

    cdef client_t *ring             # accepted and not yet handled, first come first served
    cdef int room, first, waiting

    cdef Lead lead
    cdef PyThread_type_lock door, ring_lock
    cdef port_socket bell[2]        # wakes the caller of run() while others lead
    cdef port_socket arrivals[2]    # wakes the leader when the usher has put somebody in the ring
    cdef bint leader_waits

    cdef bytes busy                 # what a refused client is told; b"": a reset
    cdef const char *busy_text
    cdef Py_ssize_t busy_length
    cdef int64_t pending
    cdef bint ushered
    cdef bint evented               # an event loop takes the clients, with next_waiting()
    cdef int64_t usher_gone
    cdef outcome_t usher_outcome
    cdef object usher_ended

    cdef bint shed
    cdef port_socket spare
    cdef int code                   # of the last failed accept that was not over with itself
    cdef int64_t pause, retry_at    # nanoseconds, port_now()
    cdef int64_t failures           # of this episode; 0: none lasts
    cdef int64_t eased              # accepts that worked since the last of them
    cdef int64_t episode_until      # when the last pause is over
    cdef int episode_code
    cdef int64_t episode_began, episode_length, episode_failures
    cdef int64_t news               # set with one of the three below: there is something to say
    cdef int64_t news_began, news_again, news_over

    cdef int least, most            # threads; 0 for none
    cdef bint daemon                # they are daemon threads
    cdef bint leave                 # run() does not wait for their handlers; join() does
    cdef int64_t alive, idle, handling
    cdef unsigned long caller       # the thread of run()
    cdef set workers
    cdef list threads
    cdef object failure             # what ends the loop and comes out of run()

    cdef int64_t over               # nobody accepts any more
    cdef int64_t finished_run       # run() has come to its end
    cdef bint stopping
    cdef int to_drain               # clients the kernel has queued that a drain still takes; < 0: not asked
    cdef int64_t deadline           # of the drain; 0: none
    cdef int64_t cut_at
    cdef int64_t finished, was_cut  # of the stop: handlers that ended, connections that were closed
    cdef object done
    cdef list reapers

    # --- set-up and end ----------------------------------------------------------------------------

    def __cinit__(self, listeners, handler, options):
        cdef Ledger ledger
        cdef int i
        self.bell[0] = self.bell[1] = self.arrivals[0] = self.arrivals[1] = self.spare = PORT_NO_SOCKET
        self.listeners = tuple(listeners)
        self.handler = handler
        self.on_error = options.on_error
        self.least, self.most = options.threads
        self.daemon, self.leave = options.daemon, options.leave
        self.most_active = options.max_connections or 0
        self.ushered = options.busy is not None
        self.evented = self.ushered and handler is None
        self.busy = options.busy or b""
        self.busy_text, self.busy_length = self.busy, len(self.busy)
        self.pending = options.pending or 0
        self.shed = options.exhausted == "shed"
        self.exhausted = options.exhausted if callable(options.exhausted) else None
        self.timeout = 0 if self.evented else default_timeout()
        self.caller = threading.get_ident()
        self.to_drain = -1
        self.workers = set()
        self.threads = []
        self.reapers = []
        self.done = allocate_lock()
        self.done.acquire()

        self.room = 1 if self.most or handler is None else BATCH
        if self.ushered:
            self.room = self.pending + self.free_places()
        self.count = len(self.listeners)
        self.ring = <client_t *>calloc(self.room, sizeof(client_t))
        self.sources = <source_t *>calloc(self.count, sizeof(source_t))
        self.polls = <port_pollfd *>calloc(2 * self.count, sizeof(port_pollfd))
        self.lead = Lead()
        if options.tick:
            self.lead.tick = options.tick
            self.lead.quick = 1000 * options.tick
            self.lead.eager_most = EAGER
        self.door = PyThread_allocate_lock()
        self.ring_lock = PyThread_allocate_lock()
        if (self.ring is NULL or self.sources is NULL or self.polls is NULL
                or self.door is NULL or self.ring_lock is NULL):
            raise MemoryError
        for i in range(self.count):
            ledger = self.listeners[i]._ledger
            share_nonblocking(self.listeners[i])
            self.sources[i].fd = self.listeners[i].fileno()
            self.sources[i].ledger = ledger.at

    def __dealloc__(self):
        close_pair(self.bell)
        close_pair(self.arrivals)
        if self.door is not NULL:
            PyThread_free_lock(self.door)
        if self.ring_lock is not NULL:
            PyThread_free_lock(self.ring_lock)
        free(self.ring)
        free(self.sources)
        free(self.polls)

    def run(self):
        """Serve until stopped; returns how many clients a drain let finish and how many it cut.

        Whatever ends the loop otherwise comes out: KeyboardInterrupt, SystemExit, an error of the listener.
        """
        cdef Worker worker
        cdef client_t client
        signals = None
        try:
            self.start()
            signals = wake_on_signals(self.caller_wake())
            PyErr_CheckSignals()  # one that came before rang nobody
            if self.most:
                self.run_threads()
            else:
                worker = Worker()
                self.workers.add(worker)
                while self.next_client(&client):
                    self.handle(worker, &client)
            if self.failure is not None:
                raise self.failure
        finally:
            if signals is not None:
                signal.set_wakeup_fd(-1)
            self.finish()
        return self.finished, self.was_cut

    def start(self):
        """Make the wake-ups, the spare descriptor and the usher."""
        for listener in self.listeners:
            listener._ledger.arm()
        if self.most or self.ushered:
            self.bell[0], self.bell[1] = wake_pair()
        if self.ushered and self.most:
            self.arrivals[0], self.arrivals[1] = wake_pair()
        if self.shed:
            self.spare = port_spare()
            if self.spare == PORT_NO_SOCKET:
                raise_error(port_error())
        if self.ushered:
            self.usher_ended = allocate_lock()
            self.usher_ended.acquire()
            try:
                start_new_thread(self.usher, ())
            except BaseException:
                self.usher_ended = None  # nobody to wait for
                raise

    cdef port_socket caller_wake(self):
        """What wakes the caller of run(): the end to ring."""
        if self.most or self.ushered:
            return self.bell[1]
        return self.sources[0].ledger.wake[1]

    def finish(self):
        """End what start() and the run have started, newest first; clients still waiting are closed."""
        cdef client_t client
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
            port_add(&self.was_cut, 1)
        self.done.release()
        while self.reapers:
            self.reapers.pop().acquire()
        if self.spare != PORT_NO_SOCKET:
            port_close(self.spare)
            self.spare = PORT_NO_SOCKET
        port_swap(&self.finished_run, 1)
        self.close_wake_ups()
        self.tell_news()

    cdef void close_wake_ups(self) noexcept:
        """After run(): a handler that outlives it still rings, and the last one closes them."""
        if port_get(&self.finished_run) and port_get(&self.alive) == 0:
            with cython.critical_section(self):
                close_pair(self.bell)
                close_pair(self.arrivals)

    # --- accepting: without the GIL, by whoever holds the door ----------------------------------------

    cdef outcome_t admit(self) noexcept nogil:
        """Wait and accept, until the ring holds a client or something else is due."""
        cdef int64_t shut
        cdef outcome_t outcome
        while not self.ending():
            shut = self.shut_for()
            # after a failure ask poll() first whether anybody is there
            if shut == 0 and (self.failures == 0 or self.eased):
                outcome = self.accept_queued()
                if outcome != NOBODY:
                    return outcome
                shut = self.shut_for()
                if self.stopping and shut == 0:
                    return ENDED
            outcome = self.sleep(shut)
            if outcome == TAKEN:  # somebody is there
                outcome = self.accept_queued()
            if outcome != NOBODY:
                return outcome
        return ENDED

    cdef outcome_t accept_queued(self) noexcept nogil:
        """Accept what is queued, one client of each listener in turn, as long as there is room."""
        cdef source_t *source
        cdef client_t client
        cdef verdict_t answer
        cdef int misses = 0
        cdef int taken = 0
        cdef bint recovered = False
        if self.shed and self.spare == PORT_NO_SOCKET:
            self.spare = port_spare()  # a stranger had taken it; what comes free is the spare first
        while misses < self.count and not self.full(taken):
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
                taken += 1
                if self.failures:
                    recovered = self.recover(False)
                self.receive(&client)
                continue
            self.code = port_error()
            answer = verdict(self.code)
            if answer == AGAIN:
                misses += 1
                if self.failures:
                    recovered = self.recover(True)
            elif answer == CONNECTION:
                count_error(source.ledger, self.code)
            elif answer == INTERRUPTED:
                return TAKEN if taken else LOOK
            elif answer == RESOURCES:
                count_error(source.ledger, self.code)
                self.run_out()
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
            port_ring(self.arrivals[1] if self.most else self.bell[1])
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
        port_swap(&self.news_again, 1)
        port_swap(&self.news, 1)
        if self.shed and self.shed_queued():
            return
        self.retry_at = self.episode_until = port_now() + self.pause
        self.pause = min(2 * self.pause, PAUSE_LAST)

    cdef bint shed_queued(self) noexcept nogil:
        """Refuse who is queued, through the descriptor kept for that; False if that cannot be done now."""
        cdef client_t client
        cdef int i, code
        if self.spare == PORT_NO_SOCKET:
            return False
        for i in range(self.count):
            for _ in range(ROUND):
                if self.sources[i].fd == PORT_NO_SOCKET:
                    break
                port_close(self.spare)
                client.fd = port_accept(self.sources[i].fd, &client.address, &client.length, 0)
                code = port_error() if client.fd == PORT_NO_SOCKET else 0
                if code == 0:
                    client.ledger = self.sources[i].ledger
                    port_add(&client.ledger.accepted, 1)
                    self.refuse(&client)
                self.spare = port_spare()
                self.episode_until = port_now()
                if self.spare == PORT_NO_SOCKET or verdict(code) == RESOURCES:
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
            self.retry_at = port_now() + <int64_t>(<double>self.exhausted(error, self.failures) * 1e9)
        if port_swap(&self.news_over, 0):
            log().info("accepting again after %.3f s and %d failed tries",
                       self.episode_length / 1e9, self.episode_failures)
        return 0

    # --- the usher ------------------------------------------------------------------------------------

    def usher(self):
        """Accept and refuse without the GIL, so that nothing Python does delays an answer."""
        cdef outcome_t outcome = NOBODY
        with nogil:
            PyThread_acquire_lock(self.door, WAIT_LOCK)
            while outcome != ENDED and outcome != FAILED:
                outcome = self.admit()
                if outcome == LOOK or port_get(&self.news):
                    self.ring_for_leader()  # for the log, or a place that came free under max_connections
            self.usher_outcome = outcome
            port_swap(&self.usher_gone, 1)
            PyThread_release_lock(self.door)
            self.ring_for_leader()
        self.usher_ended.release()

    cdef void ring_for_leader(self) noexcept nogil:
        port_ring(self.arrivals[1] if self.most else self.bell[1])

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
        poll.fd = self.arrivals[0] if self.most else self.bell[0]
        poll.events = POLLIN
        if port_poll_ns(&poll, 1, -1) > 0:
            port_unring(poll.fd)
        return LOOK

    # --- dispatch -------------------------------------------------------------------------------------

    cdef outcome_t take(self, client_t *client) noexcept nogil:
        """Take the next client; for one thread at a time."""
        cdef outcome_t outcome
        if port_get(&self.over):
            return ENDED
        if self.ushered:
            outcome = self.wait_for_usher()
        elif self.waiting:
            outcome = TAKEN
        else:
            PyThread_acquire_lock(self.door, WAIT_LOCK)
            outcome = self.admit()
            PyThread_release_lock(self.door)
        if outcome == TAKEN:
            self.pop(client)
        elif outcome == ENDED or outcome == FAILED:
            port_swap(&self.over, 1)
        return outcome

    cdef bint next_client(self, client_t *client) except -1:
        """Wait for the next client, for a caller without other threads; False when the loop is over."""
        cdef outcome_t outcome = LOOK
        while outcome == LOOK or outcome == NOBODY:
            with nogil:
                outcome = self.take(client)
            if outcome == LOOK:
                PyErr_CheckSignals()
            if port_get(&self.news):
                self.tell_news()
        if outcome == FAILED:
            raise_error(self.code)
        return outcome == TAKEN

    def next(self):
        """The next Connection, the caller's to close; None when the loop is over."""
        cdef client_t client
        if not self.next_client(&client):
            return None
        port_add(&self.handling, -1)
        return self.connection(&client)

    # --- for an event loop, which waits by itself ----------------------------------------------------

    def bell_fd(self):
        """What the usher rings when somebody has come or may be taken again: poll it, and unring it."""
        return self.bell[0]

    def next_waiting(self):
        """The client the usher let in first, as a Connection of the caller's; None if there is none now."""
        cdef client_t client
        if port_get(&self.news):
            self.tell_news()
        if port_get(&self.usher_gone) and self.usher_outcome == FAILED and not self.waiting:
            raise_error(self.code)
        if not self.look_in_ring() or not self.pop(&client):
            return None
        port_add(&self.handling, -1)
        return self.connection(&client)

    cdef Connection connection(self, client_t *client):
        try:
            return new_connection(client.fd, &client.address, client.length, client.ledger, self.timeout)
        except BaseException:
            port_close(client.fd)
            port_add(&client.ledger.active, -1)
            raise

    cdef int handle(self, Worker worker, client_t *client) except -1:
        """Hand a client to the handler; it is closed after that, whatever happened."""
        cdef Connection connection = self.connection(client)
        worker.takes(connection)
        try:
            if self.overdue():
                self.cut(connection)
            else:
                self.handler(connection)
        except Exception as error:
            self.report(client.ledger, error, connection)
        finally:
            worker.takes(None)
            connection.end()
            port_add(&client.ledger.handled, 1)
            port_add(&self.handling, -1)
            if self.asked_to_stop() is not NULL and not connection.was_cut:
                port_add(&self.finished, 1)
        return 0

    cdef int report(self, ledger_t *ledger, error, Connection connection) except -1:
        """A handler raised: count it and tell `on_error`, or the log.  The client is told nothing."""
        port_add(&ledger.handler_errors, 1)
        try:
            if self.on_error is not None:
                self.on_error(error, connection)
                return 0
        except Exception:
            log().exception("on_error itself failed")
        log().error("the handler of %r failed", connection, exc_info=error)
        return 0

    # --- threads --------------------------------------------------------------------------------------

    cdef int run_threads(self) except -1:
        """Start the threads and wait, open to signals, until the last has ended."""
        cdef int64_t patience = 0
        try:
            while port_get(&self.alive) < self.least and not port_get(&self.over):
                self.grow()
            while port_get(&self.alive) and patience >= 0 and not self.may_leave():
                patience = self.cut_at + GRACE - port_now() if self.cut_at else -1
                self.wait_for_bell(patience)
                PyErr_CheckSignals()
                patience = self.cut_at + GRACE - port_now() if self.cut_at else 0
        except BaseException:
            self.stop_now()
            patience = GRACE
            while port_get(&self.alive) and patience > 0 and not self.may_leave():
                self.wait_for_bell(patience)
                patience = self.cut_at + GRACE - port_now()
            raise
        finally:
            if port_get(&self.alive) == 0:
                self.join()
            elif not self.leave:
                log().warning("%d handlers go on without their connections", port_get(&self.alive))
        return 0

    cdef bint may_leave(self) noexcept:
        """Whether run() may return while handlers are at work: the loop is over, and nobody leads."""
        if not self.leave or not (port_get(&self.over) or self.asked_to_stop() is not NULL):
            return False
        with nogil:
            self.lead.take(-1)  # whoever leads was rung; a handler does not keep it for long
            port_swap(&self.over, 1)
            self.lead.give_up()
        return True

    def join(self):
        """Wait for the threads, and with them for the handlers that run() has left at work."""
        for thread in self.threads.copy():
            thread.join()

    cdef void ring_bell(self) noexcept:
        with cython.critical_section(self):  # against finish(), which closes it
            if self.bell[1] != PORT_NO_SOCKET:
                port_ring(self.bell[1])

    cdef void wait_for_bell(self, int64_t patience) noexcept:
        cdef port_pollfd poll
        poll.fd = self.bell[0]
        poll.events = POLLIN
        with nogil:
            if port_poll_ns(&poll, 1, patience) > 0:
                port_unring(poll.fd)

    cdef int grow(self) except -1:
        """Start a thread, unless there are as many as may be."""
        if port_get(&self.over):
            return 0
        if port_add(&self.alive, 1) > self.most:
            port_add(&self.alive, -1)
            return 0
        port_add(&self.idle, 1)
        thread = threading.Thread(target=self.work, name="fastlisten", daemon=self.daemon)
        self.threads.append(thread)
        try:
            thread.start()
        except (RuntimeError, MemoryError):  # not started; a signal's exception comes after the start
            self.threads.remove(thread)
            port_add(&self.idle, -1)
            port_add(&self.alive, -1)
            raise
        return 0

    def work(self):
        """One thread's life: lead, accept a client, handle it; until the end, or idle for long."""
        cdef Worker worker = Worker()
        cdef client_t client
        cdef outcome_t outcome
        cdef long long patience = -1 if self.least == self.most else IDLE
        cdef int64_t pocketed, since
        cdef bint leads = False
        cdef bint retired = False
        self.workers.add(worker)
        try:
            while not retired:
                with nogil:
                    leads = leads or self.lead.take(patience)
                    outcome = self.take(&client) if leads else NOBODY
                    if outcome == TAKEN:
                        pocketed = self.lead.pocket()
                        since = port_now()
                if outcome == TAKEN:
                    leads = False
                    if port_add(&self.idle, -1) == 0:
                        self.grow_if_possible()
                    try:
                        self.handle(worker, &client)
                    finally:
                        port_add(&self.idle, 1)
                        leads = self.lead.come_back(pocketed, since)
                elif outcome == ENDED:
                    break
                elif outcome == FAILED:
                    raise_error(self.code)
                elif not leads:
                    retired = port_add(&self.alive, -1) >= self.least
                    if not retired:
                        port_add(&self.alive, 1)
                if port_get(&self.news):
                    self.tell_news()
        except BaseException as error:
            self.fail(error)
        finally:
            if leads:
                self.lead.give_up()
            self.workers.discard(worker)
            if not port_get(&self.over):
                self.threads.remove(threading.current_thread())
            port_add(&self.idle, -1)
            if not retired:
                port_add(&self.alive, -1)
            self.ring_bell()
            self.close_wake_ups()

    cdef int grow_if_possible(self) except -1:
        """Start a thread; when the system has none to give, those that there are go on."""
        try:
            self.grow()
        except RuntimeError as error:
            log().warning("no more than %d threads: %s", port_get(&self.alive), error)
        return 0

    cdef void fail(self, error) noexcept:
        """A thread ends the loop, and run() raises why."""
        if self.failure is None:
            self.failure = error
        port_swap(&self.over, 1)
        for i in range(self.count):
            ledger_ring(self.sources[i].ledger)

    # --- stopping: by any thread, by handlers and by signal handlers ----------------------------------

    def stop(self, drain):
        """After the ledger was told: cut the handlers' connections when their time is over."""
        if self.leave:
            self.ring_bell()  # all threads may be with handlers: run() itself looks up
        elif drain == 0:
            self.cut_all()
        elif drain is not None:
            reaped = allocate_lock()
            reaped.acquire()
            self.reapers.append(reaped)
            # not threading.Thread: its locks may be held by the code that a signal interrupted
            try:
                start_new_thread(self.reap, (drain, reaped))
            except BaseException:
                self.reapers.remove(reaped)
                raise

    def reap(self, drain, reaped):
        """Wait for the end of the loop or of the drain's time, and cut what is still there then."""
        try:
            if self.done.acquire(timeout=min(drain, threading.TIMEOUT_MAX)):
                self.done.release()
            else:
                self.cut_all()
        finally:
            reaped.release()

    def cut_all(self):
        """End the connections of all running handlers; their threads come back from recv and send."""
        cdef Worker worker
        cdef Connection connection
        for worker in list(self.workers):
            connection = worker.has()
            if connection is not None:
                self.cut(connection)
        self.cut_at = port_now()
        self.ring_bell()

    cdef void cut(self, Connection connection) noexcept:
        if connection.cut():
            port_add(&self.was_cut, 1)

    cdef int stop_now(self) except -1:
        """End without an answer to anybody: accept no more, cut what there is."""
        port_swap(&self.over, 1)
        for i in range(self.count):
            ledger_ring(self.sources[i].ledger)
        self.cut_all()
        return 0

    def release(self, listener):
        """Have no thread of the loop touch this listener any more; it was told to stop and will be closed."""
        cdef int i = self.listeners.index(listener)
        with nogil:
            PyThread_acquire_lock(self.door, WAIT_LOCK)
            self.sources[i].fd = PORT_NO_SOCKET
            PyThread_release_lock(self.door)

    def survives_fork(self):
        """In a child that was just forked: whether the loop goes on there.  It does in the one thread that
        is left, if that is all it needs; else the child has a loop that is over."""
        cdef Worker worker
        for worker in self.workers:
            worker.takes(None)  # the parent has the connection too, and a cut of ours would end it there
        if not self.most and not self.ushered and self.caller == threading.get_ident():
            return True
        port_swap(&self.over, 1)
        port_swap(&self.alive, 0)
        self.usher_ended = None
        self.reapers.clear()
        self.threads.clear()
        # a thread that is gone may have held these
        self.lead = Lead()
        self.door = PyThread_allocate_lock()
        self.ring_lock = PyThread_allocate_lock()
        return False

    def threads_now(self):
        """How many threads serve, and how many of them are idle."""
        return port_get(&self.alive), port_get(&self.idle)


cdef void close_pair(port_socket *pair) noexcept nogil:
    if pair[0] != PORT_NO_SOCKET:
        port_close(pair[0])
        port_close(pair[1])
        pair[0] = pair[1] = PORT_NO_SOCKET


def wake_on_signals(fd):
    """Have the interpreter ring `fd` when a signal comes, if this is the thread that runs signal handlers.

    Without it a signal that comes just before poll() would wait for the next client, and Winsock's poll is
    not interrupted at all.  Returns None when nothing was set: not the main thread, or somebody (asyncio)
    has a wake-up there already.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    other = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    if other != -1:
        signal.set_wakeup_fd(other, warn_on_full_buffer=False)
        return None
    return fd
