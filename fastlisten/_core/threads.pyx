"""Who accepts, and who handles: leader and followers.

Threads accept in turn.  One has the lead: it waits, takes a client, and handles it; so stop, pause, limits
and shortages live in one place, without a herd and without a dummy connection.
"""

import threading
from _contextvars import copy_context
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
from libc.stdint cimport int64_t

from fastlisten._core.accept cimport client_t, drop_handed, poll_failed
from fastlisten._core.acceptor cimport ENDED, FAILED, LOOK, NOBODY, TAKEN, outcome_t
from fastlisten._core.connection cimport Connection
from fastlisten._core.port cimport *
from fastlisten._core.state cimport Taker, log, waker_close, waker_drain, waker_mend, waker_open, waker_wake

cdef extern from "pythread.h" nogil:
    enum PyLockStatus:
        PY_LOCK_ACQUIRED
    PyLockStatus PyThread_acquire_lock_timed(
        PyThread_type_lock lock, long long microseconds, int interruptible)

# How long the lead may be lent to a handler before the successor takes it.  Shorter than anybody notices,
# and long beside the handlers that a high rate of connections needs; the successor's look costs 3 µs each
# time.
cdef long long TICK = 500  # microseconds

# A handler that took no longer than this was not worth waking another thread for.
cdef int64_t QUICK = 100_000  # nanoseconds

# After two handlers in a row that were not quick (one alone may have been preempted), the lead is handed off
# at once: for this many clients before the next try, and twice as many each time that finds a slow one again.
cdef enum:
    EAGER = 16
    EAGER_MOST = 1024

# How long a thread beyond the minimum waits for work before it ends.
cdef long long IDLE = 10_000_000  # microseconds

# How long serve() waits, after it cut the connections of its handlers, for the handlers to notice.
cdef int64_t GRACE = 250_000_000  # nanoseconds

# How often serve() looks, once a stop was asked for, whether its queues are empty.
cdef int64_t STOP_TICK = 20_000_000  # nanoseconds

# The values of Lead.held; higher ones are lent to a handler.
cdef enum:
    FREE = 0
    LEADING = 1

# The values of Lead.successor_waits.
cdef enum:
    FOR_ANYTHING = 1    # for the leader to take a client or to hand off
    FOR_A_TICK = 2


@cython.final
cdef class Worker:
    """A thread that handles clients, and the one it has now."""

    def __cinit__(self):
        self.client.fd = PORT_NO_SOCKET

    cdef void takes(self, Connection connection) noexcept:
        with cython.critical_section(self):
            self.connection = connection

    cdef Connection has(self):
        with cython.critical_section(self):
            return self.connection

    cdef void after_fork(self) noexcept:
        """In a child: the parent has the client, too, and its handler is there."""
        self.takes(None)  # a cut of ours would end the connection for the parent
        if self.client.fd != PORT_NO_SOCKET:
            drop_handed(&self.client)


cdef class Dispatcher(Taker):
    """What is done with each client, and what is asked in between; the loop says how."""

    cdef outcome_t take(self, client_t *client) noexcept nogil:
        """Wait for the next client and take it; for one thread at a time, the leader."""
        return ENDED

    cdef int handle(self, Worker worker) except -1:
        """Hand a worker's client to the handler."""
        raise NotImplementedError

    cdef int look_up(self) except -1:
        """Do what needs the GIL, between two clients."""
        raise NotImplementedError

    cdef int raise_failure(self) except -1:
        """Raise what FAILED said."""
        raise NotImplementedError

    cdef void fail(self, error) noexcept:
        """A thread ends it all; `error` comes out of the loop."""

    cdef void stop_now(self) noexcept:
        """End without an answer to anybody: accept no more, cut what there is."""

    cdef bint stop_asked(self) noexcept:
        """Whether a stop was asked for."""
        return False

    cdef bint emptied(self, bint leads) noexcept nogil:
        """Whether a stop was asked for and nobody more is taken from the kernel's queues; a leader looks."""
        return True

    cdef int tell_emptied(self) except -1:
        """Tell the owners of the listeners so, while handlers may still run."""
        return 0

    cdef bint somebody_waits(self) noexcept nogil:
        """Whether a client waits for a thread; for the leader."""
        return True


@cython.final
cdef class Lead:
    """The right to accept, which one thread has at a time.

    A leader that has accepted a client lends the lead to its handler, and most often reclaims it before
    anybody missed it: no other thread was woken.  The first of the idle threads, the successor, looks after a
    TICK and takes the lead from a handler that is still busy; so nobody waits for long behind a slow one.
    (Go's scheduler retakes a processor from a system call in the same way.)  Where handlers are not quick,
    leaders hand the lead off at once.

    tick: microseconds instead of TICK; handlers count as quick when they take no longer than that.
    """

    def __cinit__(self, long long tick=0):
        self.tick, self.quick, self.eager_most = TICK, QUICK, EAGER_MOST
        if tick:
            self.tick, self.quick, self.eager_most = tick, 1000 * tick, EAGER
        self.loans = LEADING
        self.successor = PyThread_allocate_lock()
        self.alarm = PyThread_allocate_lock()
        if self.successor is NULL or self.alarm is NULL:
            raise MemoryError
        PyThread_acquire_lock(self.alarm, WAIT_LOCK)

    def __dealloc__(self):
        if self.successor is not NULL:
            PyThread_free_lock(self.successor)
        if self.alarm is not NULL:
            PyThread_free_lock(self.alarm)

    cdef bint take(self, long long patience) noexcept nogil:
        """Wait in line and lead; False when `patience` microseconds (< 0: no limit) were too few."""
        cdef int64_t held
        cdef int64_t seen = FREE
        cdef bint taken = False
        if PyThread_acquire_lock_timed(self.successor, patience, 0) != PY_LOCK_ACQUIRED:
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
        PyThread_release_lock(self.successor)
        return taken

    cdef bint wait(self, int64_t reason, long long patience) noexcept nogil:
        """The successor's sleep; False when nobody woke it in that time."""
        cdef bint changed
        port_swap(&self.successor_waits, reason)
        changed = reason == FOR_ANYTHING and port_get(&self.held) != LEADING  # before we said that we wait
        if not changed and PyThread_acquire_lock_timed(self.alarm, patience, 0) == PY_LOCK_ACQUIRED:
            return True
        if port_swap(&self.successor_waits, 0) == 0:
            PyThread_acquire_lock(self.alarm, WAIT_LOCK)  # somebody woke us just now
            return True
        return changed

    cdef int64_t lend(self) noexcept nogil:
        """The leader goes to handle a client; returns what reclaim() wants to see."""
        cdef int64_t loan
        if PORT_PARALLEL:  # without the GIL even quick handlers gain from a second thread
            self.hand_off()
            return FREE
        if port_get(&self.eager) > 0:
            port_add(&self.eager, -1)
            self.hand_off()
            return FREE
        loan = self.loans + 1
        self.loans = loan
        port_swap(&self.held, loan)  # from here on another may lead, and lend
        if port_replace(&self.successor_waits, FOR_ANYTHING, 0):
            PyThread_release_lock(self.alarm)
        return loan

    cdef bint reclaim(self, int64_t loan, int64_t since) noexcept nogil:
        """The handler that began at `since` has returned: whether its thread still leads."""
        cdef int64_t misses
        if loan == FREE:
            return False
        if port_now() - since <= self.quick:
            if port_get(&self.misses):
                port_swap(&self.misses, 0)
        else:
            misses = port_add(&self.misses, 1)
            if misses > 1:
                port_swap(&self.eager, min(EAGER << min(misses - 2, 6), self.eager_most))
        return port_replace(&self.held, loan, LEADING)

    cdef void hand_off(self) noexcept nogil:
        """Lead no more."""
        port_swap(&self.held, FREE)
        if port_swap(&self.successor_waits, 0) != 0:
            PyThread_release_lock(self.alarm)


@cython.final
cdef class Threads:
    """The threads of one serve(): they start as needed, accept in turn, and end when idle for long.

    dispatcher: what they do.  least, most: how many threads; 0 for none, then the caller of run() does it.
    daemon: whether they are daemon threads.  leave: run() does not wait for handlers that are at work when
    it is over.  tick: the Lead's.

    The caller of run() waits for the threads and runs Python's signal handlers, so that Ctrl-C ends it
    whatever the threads do.
    """

    def __cinit__(self, Dispatcher dispatcher not None, int least, int most, bint daemon, bint leave, tick):
        self.dispatcher = dispatcher
        self.lead = Lead(tick)
        self.least, self.most = least, most
        self.daemon, self.leave = daemon, leave
        self.workers = set()
        self.threads = []
        self.growing = allocate_lock()

    def __dealloc__(self):
        waker_close(&self.waker)

    cdef int open(self) except -1:
        """Make what wakes the caller of run()."""
        if self.most:
            waker_open(&self.waker)
        return 0

    cdef void close(self) noexcept:
        """run() is over.  A handler that outlives it still wakes its caller; the last closes the waker."""
        port_swap(&self.ended, 1)
        if port_get(&self.alive) == 0:
            waker_close(&self.waker)

    cdef int run(self) except -1:
        """Serve until it is over."""
        if self.most:
            return self.run_threads()
        return self.run_inline()

    cdef int run_inline(self) except -1:
        cdef Worker worker = Worker()
        cdef outcome_t outcome = LOOK
        self.workers.add(worker)
        while outcome != ENDED:
            with nogil:
                outcome = self.dispatcher.take(&worker.client)
            if outcome == TAKEN:
                self.dispatcher.handle(worker)
            elif outcome == FAILED:
                self.dispatcher.raise_failure()
            else:
                PyErr_CheckSignals()
                if not self.told and self.dispatcher.stop_asked():
                    self.look_at_stop()
            self.dispatcher.look_up()
        return 0

    cdef int run_threads(self) except -1:
        """Start the threads and wait, open to signals, until the last has ended."""
        cdef int code
        try:
            port_swap(&self.starting, 1)
            try:
                start_new_thread(copy_context().run, (self.start_threads,))
            except BaseException:
                port_swap(&self.starting, 0)
                raise
            while self.to_wait_for():
                if not self.told and self.dispatcher.stop_asked():
                    self.look_at_stop()
                code = self.wait_for_end()
                if code != 0:
                    port_raise(code)
                PyErr_CheckSignals()
                if self.dispatcher.look_every and port_get(&self.idle) == 0:
                    self.look_for_others()
        except BaseException:
            self.dispatcher.stop_now()
            while self.to_wait_for():
                if self.wait_for_end() != 0:
                    break  # nobody can be waited for
            raise
        finally:
            if port_get(&self.alive) == 0:
                self.join()
            elif not self.leave:
                log().warning("%d handlers have not ended, and go on without their connections",
                              port_get(&self.alive),
                              extra={"event": "handlers left", "handlers": port_get(&self.alive)})
        return 0

    def start_threads(self):
        """Start the least of the threads.  Not in run()'s own: a signal's exception there may come half-way
        through threading.Thread.start(), and whether the thread runs is then not to be known."""
        try:
            while port_get(&self.alive) < self.least and not port_get(&self.dispatcher.over):
                self.grow()
        except BaseException as error:
            self.dispatcher.fail(error)
            self.dispatcher.stop_now()
        finally:
            port_swap(&self.starting, 0)
            self.wake()

    cdef int look_at_stop(self) except -1:
        """A stop was asked for: see whether the queues are empty, for a leader if all are with handlers."""
        cdef bint leads = False
        with nogil:
            if port_get(&self.idle) == 0:
                leads = self.lead.take(0)
            self.told = self.dispatcher.emptied(leads)
            if leads:
                self.lead.hand_off()
        if self.told:
            self.dispatcher.tell_emptied()
        return 0

    cdef bint to_wait_for(self) noexcept:
        """Whether a thread is still to be waited for; in a handler, no longer than GRACE after its cut."""
        cdef int64_t cut_at
        if port_get(&self.starting):
            return True
        if port_get(&self.alive) == 0 or self.may_leave():
            return False
        cut_at = port_get(&self.dispatcher.cut_at)
        return not cut_at or port_now() < cut_at + GRACE or port_get(&self.idle) > 0

    cdef bint may_leave(self) noexcept:
        """Whether run() may return while handlers are at work: the loop is over, and nobody leads."""
        if not self.leave or not (port_get(&self.dispatcher.over) or self.dispatcher.stop_asked()):
            return False
        with nogil:
            self.lead.take(-1)  # whoever leads was woken; a handler does not keep it for long
            port_swap(&self.dispatcher.over, 1)
            self.lead.hand_off()
        return True

    def join(self):
        """Wait for the threads, and with them for the handlers that run() has left at work."""
        with self.growing:  # a thread that is just being started cannot be joined yet
            threads = self.threads.copy()
        for thread in threads:
            thread.join()

    cdef void wake(self) noexcept:
        """Have the caller of run() look again."""
        waker_wake(&self.waker)

    cdef int wait_for_end(self) except -2:
        """Wait for the end of a thread or a signal; after a cut until GRACE is over, or for as long again.

        Returns the code of a poll() that failed for good, or 0.
        """
        cdef int64_t patience = -1
        cdef int64_t cut_at = port_get(&self.dispatcher.cut_at)
        cdef int ready
        cdef int code = 0
        cdef port_pollfd poll
        if cut_at:
            patience = cut_at + GRACE - port_now()
            if patience <= 0:
                patience = GRACE
        if self.dispatcher.look_every and (patience < 0 or self.dispatcher.look_every < patience):
            patience = self.dispatcher.look_every
        if self.dispatcher.stop_asked() and not self.told and (patience < 0 or STOP_TICK < patience):
            patience = STOP_TICK
        poll.fd = self.waker.reader
        poll.events = POLLIN
        with nogil:
            ready = port_poll_ns(&poll, 1, patience)
            if ready > 0:
                waker_drain(&self.waker)
            elif ready < 0:
                code = poll_failed(port_error())
        waker_mend(&self.waker)
        return code

    cdef int look_for_others(self) except -1:
        """All threads are with handlers, and none looks up.  If no client waits in vain meanwhile, nothing is
        amiss, and their look_up() is called for them."""
        cdef bint leads
        cdef bint waits = True
        with nogil:
            leads = self.lead.take(0)
            if leads:
                waits = self.dispatcher.somebody_waits()
                self.lead.hand_off()
        if not waits:
            self.dispatcher.look_up()
        return 0

    cdef int grow(self) except -1:
        """Start a thread, unless there are as many as may be."""
        with self.growing:
            if port_get(&self.dispatcher.over) or port_get(&self.alive) >= self.most:
                return 0
            thread = threading.Thread(target=self.work, name="fastlisten", daemon=self.daemon)
            port_add(&self.alive, 1)
            port_add(&self.idle, 1)
            self.threads.append(thread)
            try:
                thread.start()
            except (RuntimeError, MemoryError):  # not started
                self.threads.remove(thread)
                port_add(&self.idle, -1)
                port_add(&self.alive, -1)
                raise
        return 0

    cdef int grow_if_possible(self) except -1:
        """Start a thread; when the system has none to give, those that there are go on."""
        try:
            self.grow()
        except (RuntimeError, MemoryError) as error:
            log().warning("no thread can be started, and %d handle all clients: %s",
                          port_get(&self.alive), error,
                          extra={"event": "no more threads", "threads": port_get(&self.alive),
                                 "reason": str(error)})
        return 0

    def work(self):
        """One thread's life: lead, accept a client, handle it; until the end, or idle for long."""
        cdef Worker worker = Worker()
        cdef outcome_t outcome
        cdef long long patience = -1 if self.least == self.most else IDLE
        cdef int64_t loan, since
        cdef bint leads = False
        cdef bint retired = False
        self.workers.add(worker)
        try:
            while not retired:
                with nogil:
                    leads = leads or self.lead.take(patience)
                    outcome = self.dispatcher.take(&worker.client) if leads else NOBODY
                    if outcome == TAKEN:
                        loan = self.lead.lend()
                        since = port_now()
                if outcome == TAKEN:
                    leads = False
                    if port_add(&self.idle, -1) == 0:
                        self.grow_if_possible()
                    try:
                        self.dispatcher.handle(worker)
                    finally:
                        port_add(&self.idle, 1)
                        leads = self.lead.reclaim(loan, since)
                elif outcome == ENDED:
                    break
                elif outcome == FAILED:
                    self.dispatcher.raise_failure()
                elif not leads:
                    retired = self.retires()
                self.dispatcher.look_up()
        except BaseException as error:
            self.dispatcher.fail(error)
        finally:
            if leads:
                self.lead.hand_off()
            self.workers.discard(worker)
            if not port_get(&self.dispatcher.over):
                self.threads.remove(threading.current_thread())
            port_add(&self.idle, -1)
            if not retired:
                port_add(&self.alive, -1)
            self.wake()
            if port_get(&self.ended):
                self.close()

    cdef bint retires(self) noexcept:
        """Whether a thread that was idle for long is to end; it is counted out then."""
        if port_add(&self.alive, -1) >= self.least:
            return True
        port_add(&self.alive, 1)
        return False

    cdef void after_fork(self) except *:
        """In a child, which has none of its parent's threads."""
        port_swap(&self.alive, 0)
        port_swap(&self.idle, 0)
        port_swap(&self.starting, 0)
        self.threads.clear()
        self.workers.clear()
        self.growing = allocate_lock()
        self.lead = Lead()
