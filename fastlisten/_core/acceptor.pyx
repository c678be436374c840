"""Wait for clients and accept them: pause, drain, limit and end.  All of it runs without the GIL."""

cimport cython
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free

from fastlisten._core.accept cimport (
    ACCEPTED,
    AGAIN,
    CLOSED,
    INTERRUPTED,
    LOST,
    RESOURCES,
    Shortage,
    accept_batch,
    client_t,
    poll_failed,
    readable,
    set_nonblocking,
    source_t,
    verdict,
    verdict_t,
)
from fastlisten._core.first_bytes cimport FirstBytes
from fastlisten._core.port cimport *
from fastlisten._core.state cimport (
    State,
    connections_of,
    state_t,
    waker_drain,
    waker_mend,
    waker_open,
    waker_wake,
)

# How many times poll() is asked first, at most, after accept() was tried in vain: 1, 3, 7, 15.
cdef enum:
    IN_VAIN_MOST = 15

# How many clients are taken in a row who all have to wait, before others are looked for.
cdef enum:
    INSPECT_MOST = 64

# What is opened beside the clients: the waker's two ends, the spare descriptor, the client that is refused.
cdef enum:
    OWN = 4

# The values of Acceptor.touching: who is in open() or take(), one thread at a time.
cdef enum:
    OUT = 0         # nobody
    WAITING = 1     # somebody who is in no accept(), and has no client of whom nobody knows
    # any other: the port_thread() of somebody who accepts

# For how long whoever accepts is waited for: it takes microseconds, unless it cannot be brought back.
cdef int64_t ACCEPT_TIME = 1_000_000_000  # nanoseconds
cdef int64_t ACCEPT_TIME_OF_FORK = 100_000_000

# For how long a fork is believed to last when nobody says that it is over.
cdef int64_t FORK_TIME = 2_000_000_000  # nanoseconds


@cython.final
cdef class Acceptor:
    """Takes the clients of some listeners, one at a time, in turn.

    listeners: (descriptor, State) of each; the caller keeps them open.  nonblocking: the clients' mode.
    most: connections that may be open at a time; 0: any number.  shortage: what is done without descriptors
    or memory.  first_bytes: where clients wait that have to speak first; None: nobody has to.

    Only open() and take() touch the listening descriptors, in one thread at a time; release() waits for that,
    and a fork in another thread for a client that is being accepted.
    """

    def __cinit__(self, listeners, bint nonblocking, int64_t most, Shortage shortage not None,
                  FirstBytes first_bytes=None):
        cdef State state
        cdef source_t *source
        cdef int i
        self.states = tuple([state for _, state in listeners])
        self.count = len(listeners)
        self.most = most
        self.shortage = shortage
        self.first_bytes = first_bytes
        self.inspects = first_bytes is not None
        if first_bytes is not None:
            first_bytes.tells_with(shortage)
        self.drain.left = -1
        self.sources = <source_t *>calloc(self.count, sizeof(source_t))
        self.polls = <port_pollfd *>calloc(2 * self.count + 1, sizeof(port_pollfd))
        if self.sources is NULL or self.polls is NULL:
            raise MemoryError
        for i in range(self.count):
            source = &self.sources[i]
            source.fd, state = listeners[i]
            source.state = state.at
            source.nonblocking = nonblocking

    def __dealloc__(self):
        free(self.sources)
        free(self.polls)

    cdef int open(self, int64_t descriptors) except -1:
        """Make what accepting needs: the wakers, the spare descriptor, and room for so many descriptors."""
        cdef State state
        cdef int i
        self.shortage.open()
        if self.first_bytes is not None:
            self.first_bytes.open()
        for i in range(self.count):
            state = self.states[i]
            waker_open(&state.at.waker)
        if descriptors > 1:
            port_make_room(self.sources[0].state.waker.reader, descriptors + OWN)
        port_swap(&self.touching, WAITING)
        try:
            for i in range(self.count):
                if not port_get(&self.sources[i].gone):
                    set_nonblocking(self.sources[i].fd, self.sources[i].state)
        finally:
            self.leave()
        return 0

    cdef int mend_wakers(self) except -1:
        """Make anew the wakers that are broken; for whoever calls take()."""
        cdef int i
        for i in range(self.count):
            waker_mend(&self.sources[i].state.waker)
        port_swap(&self.deaf, 0)
        return 0

    cdef void close(self) noexcept nogil:
        """Nobody is accepted any more; what was opened is closed.  The wakers are their takers'."""
        port_swap(&self.over, 1)
        self.always = False
        self.wake_on_close(False)
        if self.first_bytes is not None:
            self.first_bytes.close()
        self.shortage.close()

    cdef void end(self) noexcept nogil:
        """Nobody is to be accepted any more; from any thread."""
        port_swap(&self.over, 1)
        self.wake()

    cdef void wake(self) noexcept nogil:
        """Wake whoever waits in take()."""
        cdef int i
        for i in range(self.count):
            waker_wake(&self.sources[i].state.waker)

    cdef void release(self, State state) noexcept nogil:
        """Touch this state's listener no more; it was told to stop and will be closed."""
        cdef int i
        for i in range(self.count):
            if self.sources[i].state == state.at:
                port_swap(&self.sources[i].gone, 1)
        # Whoever waits in there was woken, or waits for those only who have to speak.
        while port_get(&self.touching) != OUT and not port_get(&self.emptied):
            port_sleep(1)

    cdef void bring_back(self, int64_t patience=ACCEPT_TIME) noexcept:
        """Wait until nobody is in accept(), and bring back who sleeps there; for at most so many ns.

        The listeners are non-blocking, but that mode is of the description: another process that has it, too,
        may have made it blocking since, and accept() sleeps then until a client comes.  What whoever accepts
        is to see was set before, and keeps it from accepting again.
        """
        cdef int64_t until = port_now() + patience
        cdef int64_t thread
        cdef int i
        while port_get(&self.touching) > WAITING and port_now() < until:
            with nogil:
                port_sleep(1)  # most often that is all
            thread = port_get(&self.touching)
            if thread > WAITING:
                self.set_modes()
                for i in range(self.count):
                    if not port_get(&self.sources[i].gone):
                        port_interrupt(self.sources[i].fd, thread)  # it cannot end: we have the GIL

    # --- fork -----------------------------------------------------------------------------------------
    # A client that is being accepted while another thread forks is the child's as well, and nobody there
    # knows of it.  So a fork waits until whoever accepts has noted its client where after_fork() finds it,
    # and nobody is accepted until the fork is over.

    cdef void stand_still(self, bint still) noexcept:
        """A thread is about to fork: have nobody be accepted; or it has."""
        port_swap(&self.forking, port_now() + FORK_TIME if still else 0)
        if still:
            self.bring_back(ACCEPT_TIME_OF_FORK)

    cdef bint stands_still(self) noexcept nogil:
        cdef int64_t until = port_get(&self.forking)
        return until != 0 and port_now() < until

    cdef void after_fork(self) noexcept:
        """In a child without the threads of its parent, one of which may have been in take()."""
        self.touching = OUT
        self.forking = 0
        if self.first_bytes is not None:
            self.first_bytes.after_fork(True)

    cdef void enter(self) noexcept nogil:
        """Somebody accepts from now on; not while a thread forks."""
        port_swap(&self.touching, port_thread())
        if port_get(&self.forking):
            self.wait_for_fork()

    cdef void wait_for_fork(self) noexcept nogil:
        while self.stands_still():
            port_swap(&self.touching, WAITING)
            port_sleep(1)
            port_swap(&self.touching, port_thread())

    cdef void leave(self) noexcept nogil:
        """Nobody touches the listeners, and a client that was accepted is noted."""
        port_swap(&self.touching, OUT)

    # --- accepting ------------------------------------------------------------------------------------

    cdef outcome_t take(self, client_t *client) noexcept nogil:
        """Wait for the next client and take it, or until something else is due.

        client: lies where the caller's after_fork() finds it.
        """
        cdef outcome_t outcome
        self.enter()
        outcome = self.wait_and_accept(client)
        self.leave()
        return outcome

    cdef outcome_t wait_and_accept(self, client_t *client) noexcept nogil:
        """What take() does, between enter() and leave()."""
        cdef int64_t closed_for
        cdef outcome_t outcome
        while not self.ending():
            closed_for = self.closed_for()
            if closed_for == 0 and self.likely():
                outcome = self.accept_queued(client)
                if outcome != NOBODY:
                    self.in_vain = 0
                    return outcome
                self.in_vain = self.polls_first = min(2 * self.in_vain + 1, IN_VAIN_MOST)
                closed_for = self.closed_for()
                if self.stopping and self.ending():
                    return ENDED
            if self.to_tell_emptied:
                self.to_tell_emptied = False
                return LOOK
            port_swap(&self.touching, WAITING)
            outcome = self.wait(closed_for)
            self.enter()
            if outcome == TAKEN and closed_for != 0:  # not a listener: nobody waits for those
                self.first_bytes.look()
                outcome = NOBODY
            elif outcome == TAKEN:
                outcome = ENDED if self.ending() else self.accept_queued(client)
            elif outcome == SPOKEN:
                outcome = ENDED if self.ending() else TAKEN if self.first_bytes.take(client) else NOBODY
            if outcome != NOBODY:
                return outcome
        return ENDED

    cdef bint likely(self) noexcept nogil:
        """Whether to look for a client before poll() tells of one: less often after looks in vain."""
        if self.shortage.failures:
            return self.shortage.eased > 0 or self.stopping  # that nobody is there ends it, and a drain
        if self.polls_first and not self.stopping and not port_get(&self.helping):
            self.polls_first -= 1
            return False
        return True

    cdef outcome_t accept_queued(self, client_t *client) noexcept nogil:
        """Take the first client that is queued, of each listener in turn."""
        cdef source_t *source
        cdef verdict_t answer
        cdef int taken
        cdef bint recovered = False
        cdef bint somebody = False
        self.shortage.retake_spare()
        for _ in range(self.count if not self.shut() else 0):
            source = &self.sources[self.turn]
            self.turn = (self.turn + 1) % self.count
            if port_get(&source.gone) or (port_get(&source.state.paused) and not self.stopping):
                continue
            answer = accept_batch(source, client, 1, &taken)
            if self.shortage.failures and (answer == ACCEPTED or answer == AGAIN):
                recovered = self.shortage.worked(answer == ACCEPTED, answer == AGAIN)
            if answer == ACCEPTED:
                if not self.inspects or self.inspect(source, client):
                    return TAKEN
                somebody = True
                continue
            if answer == INTERRUPTED or answer == LOST:
                return LOOK
            if answer == RESOURCES:
                if self.makes_way(source):
                    return NOBODY  # a descriptor is free: try again
                self.ran_out(source.code)
                return LOOK
            if answer != AGAIN:
                port_swap(&self.code, source.code)
                if answer == CLOSED and (self.ending() or self.stopping or (
                        source.code == PORT_EINVAL and source.proven)):
                    return ENDED
                return FAILED
        if self.stopping and not somebody:
            self.drain.left = 0
        if self.first_bytes is not None:
            self.first_bytes.look()
            if self.first_bytes.take(client):
                return TAKEN
            if port_get(&self.shortage.to_tell):
                return LOOK
        if port_get(&self.helping) and not recovered:
            return self.accept_helped(client)
        return LOOK if recovered else NOBODY

    cdef bint inspect(self, source_t *source, client_t *client) noexcept nogil:
        """A client was accepted, and something is due with each; whether `client` is one to hand out then.

        Who has to wait is out of the way, and the next in the queue has its turn.
        """
        cdef int taken
        cdef int more = INSPECT_MOST
        while True:
            if self.drain.left > 0:
                self.drain.left -= 1
            if self.first_bytes is None:
                return True
            if self.first_bytes.passes(client):
                self.first_bytes.look()
                if self.first_bytes.next_ready() is not NULL:
                    self.polls_first = 1  # and then that client has its turn
                return True
            if self.first_bytes.take(client):
                return True
            more -= 1
            if more == 0 or self.shut() or not self.likely():
                return False
            if accept_batch(source, client, 1, &taken) != ACCEPTED:
                return False  # why, the next look says once more

    cdef bint makes_way(self, source_t *source) noexcept nogil:
        """For want of a descriptor for who is queued, whether somebody who had sent nothing was closed.

        It is asked who is queued: Linux takes the descriptor before it looks.
        """
        return self.first_bytes is not None and verdict(source.code) == RESOURCES and (
            readable(source.fd) and self.first_bytes.give_way())

    cdef void help(self, State state, port_socket fd) noexcept nogil:
        """Take the clients that are queued for another listener, too, until nobody is there.

        state: where they count, one of ours.  fd: stays open.  Nothing happens while another is helped.
        """
        cdef int i
        for i in range(self.count):
            if self.sources[i].state == state.at and not port_get(&self.helping):
                self.helped = self.sources[i]
                self.helped.fd = fd
                port_swap(&self.helping, 1)
                self.wake()

    cdef outcome_t accept_helped(self, client_t *client) noexcept nogil:
        """Take the first client of the listener that is helped."""
        cdef int taken = 0
        if not self.stopping and not port_get(&self.helped.state.paused):
            port_set_nonblocking(self.helped.fd, 1)  # its own process may have made it blocking
            if accept_batch(&self.helped, client, 1, &taken) == ACCEPTED:
                return TAKEN if not self.inspects or self.inspect(&self.helped, client) else NOBODY
        port_swap(&self.helping, 0)  # whatever else is wrong is for its own process to tell
        return NOBODY

    cdef void ran_out(self, int code) noexcept nogil:
        """An accept failed for want of resources: shed the clients, or pause for longer each time."""
        self.shortage.failed(code)
        self.wake_on_close(True)  # now, not when the pause begins: first the log is written
        if not self.shortage.shed_queued(self.sources, self.count):
            self.shortage.pause()

    # --- waiting --------------------------------------------------------------------------------------

    cdef outcome_t wait(self, int64_t closed_for) noexcept nogil:
        """Wait to be woken, and for clients unless we are closed to them.

        TAKEN: a listener is ready, or it is to be seen who has spoken.  SPOKEN: somebody has, and has been
        seen.  LOOK: woken or interrupted, or it is time to look up.  NOBODY: the time is over.
        """
        cdef int64_t every = port_get(&self.sources[0].state.look_every)
        cdef int n = self.count
        cdef int64_t patience = closed_for if closed_for > 0 else -1
        cdef int64_t due
        cdef int i, ready
        cdef source_t *source
        cdef bint hears = closed_for == 0 and not self.shut()
        cdef outcome_t outcome = NOBODY
        cdef outcome_t found = TAKEN
        for i in range(self.count):
            source = &self.sources[i]
            self.polls[i].fd = source.state.waker.reader
            self.polls[i].events = POLLIN
            if hears and not port_get(&source.gone) and (
                    self.stopping or not port_get(&source.state.paused)):
                self.polls[n].fd = source.fd
                self.polls[n].events = POLLIN
                n += 1
        if self.stopping and hears:
            patience = 0  # a drain takes who is there, and nobody who may yet come
        if self.drain.deadline:
            patience = self.until_deadline(patience)
        if every and (patience < 0 or every < patience):
            patience, outcome = every, LOOK
        if self.first_bytes is not None:
            n = self.watch_first_bytes(n)
            due = self.first_bytes.left()
            if closed_for == 0 and self.first_bytes.next_ready() is not NULL:
                due, found = 0, SPOKEN
            if due >= 0 and (patience < 0 or due < patience):
                patience, outcome = due, found
        ready = port_poll_ns(self.polls, n, patience)
        if ready < 0:
            return self.wait_failed()
        if ready == 0:
            return outcome
        outcome = NOBODY
        for i in range(n):
            if self.polls[i].revents:
                if i >= self.count:
                    return found if outcome == NOBODY else outcome
                waker_drain(&self.sources[i].state.waker)
                if port_get(&self.sources[i].state.waker.broken):
                    port_swap(&self.deaf, 1)
                self.shortage.cut_short()  # a connection of ours may have closed
                outcome = LOOK
        return outcome

    cdef int watch_first_bytes(self, int n) noexcept nogil:
        """Have who has to speak first be polled, too, at place n; returns the next place."""
        if self.first_bytes.poller == PORT_NO_SOCKET:
            return n
        self.polls[n].fd = self.first_bytes.poller
        self.polls[n].events = POLLIN
        return n + 1

    cdef void look_every(self, int64_t interval) noexcept nogil:
        """Have take() come back with LOOK at least so often, in ns; 0: no more."""
        cdef int i
        for i in range(self.count):
            port_swap(&self.sources[i].state.look_every, interval)

    cdef bint somebody_waits(self) noexcept nogil:
        """Whether a client is queued that would be accepted, or has spoken; for who may call take()."""
        cdef int i, ready
        cdef int n = 0
        self.enter()
        for i in range(self.count):
            if not port_get(&self.sources[i].gone) and not port_get(&self.sources[i].state.paused):
                self.polls[n].fd = self.sources[i].fd
                self.polls[n].events = POLLIN
                n += 1
        ready = port_poll_ns(self.polls, n, 0)
        if self.first_bytes is not None:
            self.first_bytes.look()
            ready += self.first_bytes.next_ready() is not NULL
        self.leave()
        return ready != 0

    cdef outcome_t wait_failed(self) noexcept nogil:
        """A poll() has failed: what is next.  Without memory, a pause in which nobody is heard."""
        cdef int code = port_error()
        if verdict(code) == RESOURCES:
            self.shortage.failed(code)
            self.shortage.pause()
        code = poll_failed(code)
        port_swap(&self.code, code)
        return LOOK if code == 0 else FAILED

    cdef int64_t closed_for(self) noexcept nogil:
        """For how many ns nobody is to be accepted; 0: go on; < 0: until somebody wakes us."""
        cdef int64_t left = self.shortage.left()
        if left > 0:
            self.wake_on_close(True)
            return left
        if self.at_limit():
            self.wake_on_close(True)
            if self.at_limit():  # it could have closed before it knew that we wait
                return -1
        # In a shortage they go on waking: one that closes while we try again must cut the next pause short.
        self.wake_on_close(self.shortage.failures > 0)
        return 0

    cdef bint at_limit(self) noexcept nogil:
        return self.most != 0 and self.open_connections() >= self.most

    cdef int64_t open_connections(self) noexcept nogil:
        """Connections of these listeners that were handed out and are not yet closed."""
        cdef int64_t total = 0
        cdef int i
        for i in range(self.count):
            total += connections_of(self.sources[i].state)
        return total

    cdef void wake_on_close(self, bint wake) noexcept nogil:
        """Have connections wake us when they close, or no longer."""
        cdef int i
        wake = wake or self.always
        if wake != self.wakes:
            self.wakes = wake
            for i in range(self.count):
                port_swap(&self.sources[i].state.wake_on_close, wake)

    # --- what was asked -------------------------------------------------------------------------------

    cdef state_t *asked_to_stop(self) noexcept nogil:
        """The state of the first listener that was asked to stop; NULL if none was."""
        cdef int i
        for i in range(self.count):
            if port_get(&self.sources[i].state.stopping):
                return self.sources[i].state
        return NULL

    cdef bint overdue(self) noexcept nogil:
        """Whether a stop has asked to cut connections from now on."""
        cdef state_t *state = self.asked_to_stop()
        cdef int64_t deadline = 0 if state is NULL else port_get(&state.deadline)
        return deadline != 0 and port_now() >= deadline

    cdef bint ending(self) noexcept nogil:
        """Whether a stop is to be answered now.

        A drain first takes what the kernel had queued, and lets those speak who have to; without one, those
        who have spoken have their turn.
        """
        cdef state_t *state
        cdef bint over
        if port_get(&self.over):
            return True
        state = self.asked_to_stop()
        if state is NULL:
            return False
        over = self.answers(state)
        if (over or self.shut()) and not port_swap(&self.emptied, 1):
            self.to_tell_emptied = True
        return over

    cdef void see_stop(self) noexcept nogil:
        """See whether a stop is to be answered; for whoever could take() now."""
        port_swap(&self.touching, WAITING)
        self.ending()
        self.leave()

    cdef bint answers(self, state_t *state) noexcept nogil:
        """What ending() does once a stop was asked for."""
        cdef bint draining
        self.stopping = True
        self.drain.deadline = port_get(&state.deadline)
        draining = port_get(&state.draining)
        if not draining and self.first_bytes is None:
            return True
        if self.drain.deadline and port_now() >= self.drain.deadline:
            return True
        if self.drain.left < 0:
            self.drain.left = self.queued() if draining else 0
            self.inspects = True
        if not self.shut():
            self.set_modes()  # nobody may come any more who would end a sleep in accept()
        return self.shut() and (self.first_bytes is None or not self.first_bytes.lets_in(draining))

    cdef bint shut(self) noexcept nogil:
        """Whether nobody more is taken from the kernel's queue."""
        return self.stopping and self.drain.left == 0

    cdef void set_modes(self) noexcept nogil:
        """Once more: another process may have made them blocking."""
        cdef int i
        for i in range(self.count):
            if not port_get(&self.sources[i].gone):
                port_set_nonblocking(self.sources[i].fd, 1)

    cdef int64_t until_deadline(self, int64_t patience) noexcept nogil:
        cdef int64_t left = max(self.drain.deadline - port_now(), 0)
        return left if patience < 0 else min(patience, left)

    cdef int queued(self) noexcept nogil:
        """How many clients the kernel has queued; where it does not tell, as many as are found."""
        cdef int depth, limit, i
        cdef int total = 0
        for i in range(self.count):
            if port_queue(self.sources[i].fd, &depth, &limit) == 0:
                total += depth
            elif readable(self.sources[i].fd):
                return INT_MAX
        return total
