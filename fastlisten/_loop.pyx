"""The loop: lead, take a client, hand it to the handler; until it ends."""

import signal
import threading
from _contextvars import copy_context
from _thread import allocate_lock, start_new_thread

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t

from fastlisten._accept cimport client_t
from fastlisten._accept import wake_pair
from fastlisten._connection cimport Connection, ledger_t, new_connection, raise_error
from fastlisten._door cimport ENDED, FAILED, LOOK, NOBODY, TAKEN, Door, close_pair, log, outcome_t
from fastlisten._lead cimport Lead
from fastlisten._core.port cimport *

# How long a thread beyond the minimum waits for work before it ends.
cdef long long IDLE = 10_000_000  # microseconds

# How long serve() waits, after it cut the connections of its handlers, for the handlers to notice.
cdef int64_t GRACE = 250_000_000  # nanoseconds

# How long it waits for the ring of a signal that it knows of already; the ring may have been heard before.
cdef int64_t LATE_RING = 50_000_000  # nanoseconds


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
cdef class Loop:
    """One serve(): its handler, its threads, and how it ends.  Clients come in through its Door.

    listeners: the Listeners to serve, in turn; the caller keeps them open.  handler: called with each
    Connection; None when the caller takes them with next().  options: a ServeOptions.

    Without threads the caller of run() takes every client.  Threads have the Lead in turn: one waits at the
    door, takes a client and handles it.
    """

    cdef readonly tuple listeners
    cdef object handler, on_error
    cdef Door door
    cdef Lead lead

    cdef int least, most            # threads; 0 for none
    cdef bint daemon                # they are daemon threads
    cdef bint leave                 # run() does not wait for their handlers; join() does
    cdef int64_t alive, idle
    cdef int64_t starting           # the first of them are being started
    cdef unsigned long caller       # the thread of run()
    cdef port_socket bell[2]        # wakes it while others lead
    cdef set workers
    cdef list threads
    cdef object failure             # what ends the loop and comes out of run()

    cdef int64_t finished_run       # run() has come to its end
    cdef int64_t cut_at
    cdef int64_t finished, was_cut  # of the stop: handlers that ended, connections that were closed
    cdef object done
    cdef list reapers

    # --- set-up and end -------------------------------------------------------------------------------

    def __cinit__(self, listeners, handler, options):
        self.bell[0] = self.bell[1] = PORT_NO_SOCKET
        self.listeners = tuple(listeners)
        self.handler = handler
        self.on_error = options.on_error
        self.least, self.most = options.threads
        self.daemon, self.leave = options.daemon, options.leave
        self.caller = threading.get_ident()
        self.workers = set()
        self.threads = []
        self.reapers = []
        self.done = allocate_lock()
        self.done.acquire()
        self.lead = Lead(options.tick)
        self.door = Door(self.listeners, handler, options)

    def __dealloc__(self):
        close_pair(self.bell)

    def run(self):
        """Serve until stopped; returns how many clients a drain let finish and how many it cut.

        Whatever ends the loop otherwise comes out: KeyboardInterrupt, SystemExit, an error of the listener.
        """
        cdef Worker worker
        cdef client_t client
        signals = None
        try:
            self.start()
            signals = wake_on_signals(self.caller_wake()[1])
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
        except KeyboardInterrupt:
            if signals is not None and PORT_SIGNALS_APART:
                self.await_ring()
            raise
        finally:
            if signals is not None:
                signal.set_wakeup_fd(-1)
            self.finish()
        return self.finished, self.was_cut

    def start(self):
        """Open the door, and make what wakes the caller of run()."""
        if self.most:
            self.bell[0], self.bell[1] = wake_pair()
        self.door.open()

    cdef port_socket *caller_wake(self):
        """What wakes the caller of run()."""
        if self.most:
            return self.bell
        if self.door.ushered:
            return self.door.arrivals
        return self.door.sources[0].ledger.wake

    cdef void await_ring(self) noexcept:
        """The thread in which a signal comes notes it, then rings: not when the wake-up is closed by then."""
        cdef port_pollfd poll
        poll.fd = self.caller_wake()[0]
        poll.events = POLLIN
        with nogil:
            port_poll_ns(&poll, 1, LATE_RING)

    def finish(self):
        """End what start() and the run have started; clients still waiting are closed."""
        port_add(&self.was_cut, self.door.shut())
        self.done.release()
        while self.reapers:
            self.reapers.pop().acquire()
        port_swap(&self.finished_run, 1)
        self.close_wake_ups()
        self.door.tell_news()

    def claim(self, lock, check):
        """Under the lock, have `check` raise for a listener that is not free; then all are this loop's.

        Not in Python: from 3.14 on a signal's exception may come between __enter__() and the first line.
        """
        with lock:
            for listener in self.listeners:
                check(listener)
            for listener in self.listeners:
                listener._loop = self

    def let_go(self):
        """After finish(): the listeners that were claimed for this loop are free for the next one."""
        for listener in self.listeners:
            if listener._loop is self:
                listener._ledger.disarm()
                listener._loop = None
                if listener._ledger.stopping:
                    listener._ledger.answered()

    cdef void close_wake_ups(self) noexcept:
        """After run(): a handler that outlives it still rings, and the last one closes them."""
        if port_get(&self.finished_run) and port_get(&self.alive) == 0:
            with cython.critical_section(self):
                close_pair(self.bell)
                close_pair(self.door.arrivals)

    # --- dispatch -------------------------------------------------------------------------------------

    cdef bint next_client(self, client_t *client) except -1:
        """Wait for the next client, for a caller without other threads; False when the loop is over."""
        cdef outcome_t outcome = LOOK
        while outcome == LOOK or outcome == NOBODY:
            with nogil:
                outcome = self.door.take(client)
            if outcome == LOOK:
                PyErr_CheckSignals()
            if port_get(&self.door.news):
                self.door.tell_news()
        if outcome == FAILED:
            raise_error(self.door.code)
        return outcome == TAKEN

    def next(self):
        """The next Connection, the caller's to close; None when the loop is over."""
        cdef client_t client
        if not self.next_client(&client):
            return None
        port_add(&self.door.handling, -1)
        return self.connection(&client)

    # --- for an event loop, which waits by itself ----------------------------------------------------

    def bell_fd(self):
        """What the usher rings when somebody has come or may be taken again: poll it, and unring it."""
        return self.door.arrivals[0]

    def next_waiting(self):
        """The client the usher let in first, as a Connection of the caller's; None if there is none now."""
        cdef client_t client
        if port_get(&self.door.news):
            self.door.tell_news()
        if port_get(&self.door.usher_gone) and self.door.usher_outcome == FAILED and not self.door.waiting:
            raise_error(self.door.code)
        if not self.door.look_in_ring() or not self.door.pop(&client):
            return None
        port_add(&self.door.handling, -1)
        return self.connection(&client)

    cdef Connection connection(self, client_t *client):
        try:
            return new_connection(client.fd, &client.address, client.length, client.ledger, self.door.timeout)
        except BaseException:
            port_close(client.fd)
            port_add(&client.ledger.active, -1)
            raise

    cdef int handle(self, Worker worker, client_t *client) except -1:
        """Hand a client to the handler; it is closed after that, whatever happened."""
        cdef Connection connection = self.connection(client)
        worker.takes(connection)
        try:
            if self.door.overdue():
                self.cut(connection)
            else:
                self.handler(connection)
        except Exception as error:
            self.report(client.ledger, error, connection)
        finally:
            worker.takes(None)
            connection.end()
            port_add(&client.ledger.handled, 1)
            port_add(&self.door.handling, -1)
            if self.door.asked_to_stop() is not NULL and not connection.was_cut:
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
        cdef int code
        try:
            port_swap(&self.starting, 1)
            try:
                start_new_thread(copy_context().run, (self.start_threads,))
            except BaseException:
                port_swap(&self.starting, 0)
                raise
            while self.to_wait_for():
                code = self.wait_for_bell()
                if code != 0:
                    raise_error(code)
                PyErr_CheckSignals()
        except BaseException:
            self.stop_now()
            while self.to_wait_for():
                self.wait_for_bell()
            raise
        finally:
            if port_get(&self.alive) == 0:
                self.join()
            elif not self.leave:
                log().warning("%d handlers go on without their connections", port_get(&self.alive))
        return 0

    def start_threads(self):
        """Start the least of the threads.  Not in run()'s own: a signal's exception there may come half-way
        through threading.Thread.start(), and whether the thread runs is then not to be known."""
        try:
            while port_get(&self.alive) < self.least and not port_get(&self.door.over):
                self.grow()
        except BaseException as error:
            self.fail(error)
            self.cut_all()
        finally:
            port_swap(&self.starting, 0)
            self.ring_bell()

    cdef bint to_wait_for(self) noexcept:
        """Whether a thread is still to be waited for; in a handler, no longer than GRACE after its cut."""
        if port_get(&self.starting):
            return True
        if port_get(&self.alive) == 0 or self.may_leave():
            return False
        return (not self.cut_at or port_now() < self.cut_at + GRACE
                or port_get(&self.door.handling) < port_get(&self.alive))

    cdef bint may_leave(self) noexcept:
        """Whether run() may return while handlers are at work: the loop is over, and nobody leads."""
        if not self.leave or not (port_get(&self.door.over) or self.door.asked_to_stop() is not NULL):
            return False
        with nogil:
            self.lead.take(-1)  # whoever leads was rung; a handler does not keep it for long
            port_swap(&self.door.over, 1)
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

    cdef int wait_for_bell(self) noexcept:
        """Wait for the end of a thread or a signal; after a cut until GRACE is over, or for as long again.

        Returns the code of a poll() that failed, or 0.
        """
        cdef int64_t patience = -1
        cdef int ready
        cdef int code = 0
        cdef port_pollfd poll
        if self.cut_at:
            patience = self.cut_at + GRACE - port_now()
            if patience <= 0:
                patience = GRACE
        poll.fd = self.bell[0]
        poll.events = POLLIN
        with nogil:
            ready = port_poll_ns(&poll, 1, patience)
            if ready > 0:
                port_unring(poll.fd)
            elif ready < 0:
                code = port_error()
        return 0 if code == PORT_EINTR else code

    cdef int grow(self) except -1:
        """Start a thread, unless there are as many as may be."""
        if port_get(&self.door.over) or port_get(&self.alive) >= self.most:
            return 0
        thread = threading.Thread(target=self.work, name="fastlisten", daemon=self.daemon)
        if port_add(&self.alive, 1) > self.most:
            port_add(&self.alive, -1)
            return 0
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
                    outcome = self.door.take(&client) if leads else NOBODY
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
                    raise_error(self.door.code)
                elif not leads:
                    retired = port_add(&self.alive, -1) >= self.least
                    if not retired:
                        port_add(&self.alive, 1)
                if port_get(&self.door.news):
                    self.door.tell_news()
        except BaseException as error:
            self.fail(error)
        finally:
            if leads:
                self.lead.give_up()
            self.workers.discard(worker)
            if not port_get(&self.door.over):
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
        except (RuntimeError, MemoryError) as error:
            log().warning("no more than %d threads: %s", port_get(&self.alive), error)
        return 0

    cdef void fail(self, error) noexcept:
        """A thread ends the loop, and run() raises why."""
        if self.failure is None:
            self.failure = error
        self.door.end()

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
        self.door.end()
        self.cut_all()
        return 0

    def release(self, listener):
        """Have no thread of the loop touch this listener any more; it was told to stop and will be closed."""
        self.door.release(self.listeners.index(listener))

    def survives_fork(self):
        """In a child that was just forked: whether the loop goes on there.  It does in the one thread that
        is left, if that is all it needs; else the child has a loop that is over."""
        cdef Worker worker
        for worker in self.workers:
            worker.takes(None)  # the parent has the connection too, and a cut of ours would end it there
        if not self.most and not self.door.ushered and self.caller == threading.get_ident():
            return True
        port_swap(&self.door.over, 1)
        port_swap(&self.alive, 0)
        port_swap(&self.starting, 0)
        self.reapers.clear()
        self.threads.clear()
        self.lead = Lead()
        self.door.after_fork()
        return False

    def threads_now(self):
        """How many threads serve, and how many of them are idle."""
        return port_get(&self.alive), port_get(&self.idle)


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
