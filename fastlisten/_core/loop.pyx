"""The loop of one serve(): take a client, hand it to the handler; until it ends."""

import threading
from _signal import set_wakeup_fd  # signal.py makes enums of all signals, which takes long
from _thread import allocate_lock, start_new_thread

from fastlisten._core.first_bytes import first_bytes_of

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t

from fastlisten._core.accept cimport Shortage, client_t, default_timeout, drop_handed
from fastlisten._core.acceptor cimport ENDED, FAILED, LOOK, NOBODY, TAKEN, Acceptor, outcome_t
from fastlisten._core.connection cimport Connection, new_connection
from fastlisten._core.overload cimport Overload
from fastlisten._core.port cimport *
from fastlisten._core.state cimport (
    State,
    client_handed,
    give_back_all,
    handler_failed,
    log,
    state_t,
    take_all,
    waker_mend,
    waker_t,
)
from fastlisten._core.threads cimport Dispatcher, Threads, Worker

# How long a loop that Ctrl-C ends waits for the wake-up of that signal; it may have come before.
cdef int64_t LATE_WAKE_UP = 50_000_000  # nanoseconds


@cython.final
cdef class Loop(Dispatcher):
    """One serve(): its handler, and how it ends.

    listeners: (descriptor, State) of each; the caller keeps them open.  handler: called with each Connection;
    None when the caller takes them with next().  options: threads, max_connections, pending, busy, exhausted,
    on_error, leave, daemon, tick, watchdog, first_bytes, proxy and admission, checked.
    """

    activity = "serve() runs already on"

    cdef object handler, on_error
    cdef double timeout             # of the Connections, in seconds; < 0: none
    cdef Acceptor acceptor
    cdef Overload overload          # with busy=; the clients come through it then
    cdef Threads threads
    cdef Worker iterating           # has the client that next() takes
    cdef unsigned long caller       # the thread of run()
    cdef bint opened                # close() has something to undo
    cdef object failure             # what ends the loop and comes out of run()
    cdef int64_t finished, was_cut  # of the stop: handlers that ended, connections that were closed
    cdef object feed                # called when the loop comes round; None: nobody watches it
    cdef int64_t feed_at            # ... not before (port_now()): half of `look_every` after the last time
    cdef int64_t refused            # clients that were, when all threads were last with handlers
    cdef object done                # a lock: held until the loop is over
    cdef list reapers

    # --- set-up and end -------------------------------------------------------------------------------

    def __cinit__(self, listeners, handler, options):
        cdef int64_t most = options.max_connections or 0
        busy = options.busy or b""
        self.handler = handler
        self.on_error = options.on_error
        self.caller = threading.get_ident()
        if options.watchdog is not None and options.watchdog.interval is not None:
            self.feed = options.watchdog.feed
            self.look_every = max(<int64_t>(options.watchdog.interval * 1e9), 1)
        self.reapers = []
        self.done = allocate_lock()
        self.done.acquire()
        self.threads = Threads(self, *options.threads, options.daemon, options.leave, options.tick)
        self.iterating = Worker()
        self.threads.workers.add(self.iterating)
        self.timeout = default_timeout()
        self.acceptor = Acceptor(listeners, self.timeout >= 0, 0 if options.busy is not None else most,
                                 Shortage(options.exhausted, busy), first_bytes_of(options))
        if options.busy is not None:
            self.overload = Overload(
                self.acceptor, options.pending or 0, max(self.threads.most, 1), most, busy)

    def run(self):
        """Serve until stopped; returns how many clients a drain let finish and how many it cut.

        Whatever ends the loop otherwise comes out: KeyboardInterrupt, SystemExit, an error of the listener;
        RuntimeError when somebody else takes the clients of one.
        """
        signals = None
        try:
            self.open()
            signals = wake_on_signals(self.caller_waker().writer)
            PyErr_CheckSignals()  # one that came before woke nobody
            self.threads.run()
            self.raise_what_ended()
        except KeyboardInterrupt:
            if signals is not None and PORT_SIGNALS_APART:
                self.await_wake_up()
            raise
        finally:
            if signals is not None:
                set_wakeup_fd(-1)
            self.close()
        return port_get(&self.finished), port_get(&self.was_cut)

    def open(self):
        """Take the listeners' clients, and begin to accept; close() is to follow in any case.

        Raises RuntimeError when somebody else takes them.
        """
        take_all(self, self.acceptor.states)
        self.opened = True
        self.acceptor.states[0].capacity = self.capacity()
        self.acceptor.look_every(self.look_every)
        self.threads.open()
        self.acceptor.open(self.descriptors())
        if self.overload is not None:
            self.overload.open()

    def close(self):
        """Undo what open() did; clients still waiting are closed."""
        try:
            if self.opened:
                self.finish()
        finally:
            give_back_all(self, self.acceptor.states)

    cdef int finish(self) except -1:
        """End what open() and the run have begun."""
        self.opened = False
        port_swap(&self.over, 1)
        try:
            if self.overload is not None:
                port_add(&self.was_cut, self.overload.close())
        finally:
            self.acceptor.close()
            self.acceptor.look_every(0)
            self.done.release()
            try:
                while self.reapers:
                    self.reapers.pop().acquire()
            finally:
                self.threads.close()
        return self.acceptor.shortage.tell_rest()

    cdef int64_t descriptors(self):
        """For how many clients there is to be room in the table of descriptors."""
        cdef int64_t held = max(self.threads.most, 1)
        if self.overload is not None:
            held = max(held, self.overload.most) + self.overload.pending
        return max(held, self.acceptor.most)

    cdef int64_t capacity(self):
        """How many clients may be with handlers, or wait for one, at a time."""
        cdef int64_t handlers = max(self.threads.most, 1)
        if self.overload is not None:
            return self.overload.room
        return min(handlers, self.acceptor.most) if self.acceptor.most else handlers

    cdef waker_t *caller_waker(self):
        """What wakes the caller of run()."""
        if self.threads.most:
            return &self.threads.waker
        if self.overload is not None:
            return &self.overload.waker
        return &self.acceptor.sources[0].state.waker

    cdef void await_wake_up(self) noexcept:
        """The thread in which a signal comes notes it, then wakes us: not when the waker is closed then."""
        cdef port_pollfd poll
        poll.fd = self.caller_waker().reader
        poll.events = POLLIN
        with nogil:
            port_poll_ns(&poll, 1, LATE_WAKE_UP)

    # --- dispatch -------------------------------------------------------------------------------------

    cdef outcome_t take(self, client_t *client) noexcept nogil:
        """Wait for the next client and take it; for one thread at a time, the leader."""
        cdef outcome_t outcome
        if port_get(&self.over):
            return ENDED
        if self.overload is not None:
            outcome = self.overload.take(client)
        else:
            outcome = self.acceptor.take(client)
            if outcome == TAKEN:
                client_handed(client.state, client.fd)
        if outcome == ENDED or outcome == FAILED:
            port_swap(&self.over, 1)
        return outcome

    def next(self):
        """The next Connection, the caller's to close; None when the loop is over."""
        cdef client_t *client = &self.iterating.client
        cdef outcome_t outcome = LOOK
        while outcome == LOOK or outcome == NOBODY:
            with nogil:
                outcome = self.take(client)
            if outcome == LOOK:
                PyErr_CheckSignals()
            self.look_up()
        if outcome == FAILED:
            self.raise_failure()
        return self.connection(client) if outcome == TAKEN else None

    cdef int look_up(self) except -1:
        cdef int64_t *deaf = &self.acceptor.deaf
        if self.overload is not None:
            deaf = &self.overload.waker.broken
        if port_get(&self.acceptor.shortage.to_tell):
            self.acceptor.shortage.tell()
        if port_get(deaf):
            self.mend()
        if self.feed is not None and port_now() >= port_get(&self.feed_at):
            port_swap(&self.feed_at, port_now() + self.look_every // 2)
            self.feed()
        return 0

    cdef bint emptied(self, bint leads) noexcept nogil:
        """Whether a stop was asked for and nobody more is taken from the kernel's queues; a leader looks."""
        if leads and self.overload is None:
            self.acceptor.see_stop()
        return port_get(&self.acceptor.emptied)  # not `over`: somebody may still have to be brought back

    cdef int tell_emptied(self) except -1:
        """Tell the listeners' owners, who may close them: nobody here touches them any more."""
        cdef State state
        for state in self.acceptor.states:
            with nogil:
                self.acceptor.release(state)
            state.emptied()
        return 0

    cdef bint somebody_waits(self) noexcept nogil:
        """Whether a client waits for a thread, or was refused since this was asked last."""
        cdef int64_t refused = 0
        cdef int64_t before
        cdef int i
        if self.overload is None:
            return self.acceptor.somebody_waits()
        for i in range(self.acceptor.count):
            refused += port_get(&self.acceptor.sources[i].state.refused)
        before = port_swap(&self.refused, refused)
        return self.overload.somebody_waits() or refused != before

    cdef int mend(self) except -1:
        """Make anew what woke the leader: one thread does, and the leader waits for that."""
        with cython.critical_section(self):
            if self.overload is not None:
                waker_mend(&self.overload.waker)
            elif port_get(&self.acceptor.deaf):
                self.acceptor.mend_wakers()
        return 0

    cdef int raise_failure(self) except -1:
        return port_raise(<int>port_get(&self.acceptor.code))

    cdef Connection connection(self, client_t *client):
        cdef Connection connection = None
        try:
            connection = new_connection(
                client.fd, &client.address, client.length, client.state, self.timeout)
        finally:
            if connection is None:  # as connection_of()
                drop_handed(client)
        client.fd = PORT_NO_SOCKET  # a forked child closes whom it finds there
        return connection

    cdef int handle(self, Worker worker) except -1:
        """Hand a worker's client to the handler; it is closed after that, whatever happened."""
        cdef client_t *client = &worker.client
        cdef Connection connection = self.connection(client)
        worker.takes(connection)
        try:
            if self.acceptor.overdue():
                self.cut(connection)
            else:
                self.handler(connection)
        except Exception as error:
            self.report(client.state, error, connection)
        finally:
            connection.end()
            worker.takes(None)
            if self.overload is not None:
                self.overload.handled()
            if self.acceptor.asked_to_stop() is not NULL and not port_get(&connection.was_cut):
                port_add(&self.finished, 1)
        return 0

    cdef int report(self, state_t *state, error, Connection connection) except -1:
        """A handler raised: count it and tell `on_error`, or the log.  The client is told nothing."""
        handler_failed(state)
        try:
            if self.on_error is not None:
                self.on_error(error, connection)
                return 0
        except Exception:
            log().exception("on_error failed, and what it was called for follows",
                            extra={"event": "on_error failed"})
        log().error("the handler of %r failed", connection, exc_info=error,
                    extra={"event": "handler failed", "connection": connection})
        return 0

    # --- stopping: by any thread, by handlers and by signal handlers ----------------------------------

    cdef void fail(self, error) noexcept:
        """A thread ends the loop, and run() raises why."""
        with cython.critical_section(self):  # of several threads that fail the first
            if self.failure is None:
                self.failure = error
        self.end()

    cdef int raise_what_ended(self) except -1:
        """Raise why a thread has ended the loop, if one has."""
        with cython.critical_section(self):  # a handler that run() does not wait for may fail just now
            failure = self.failure
        if failure is not None:
            raise failure
        return 0

    cdef void end(self) noexcept:
        """Take nobody more."""
        port_swap(&self.over, 1)
        self.acceptor.end()
        self.acceptor.bring_back()

    cdef bint stop_asked(self) noexcept:
        return self.acceptor.asked_to_stop() is not NULL

    cdef void stop_now(self) noexcept:
        self.end()
        self.cut_all()

    def stop(self, drain):
        """After the state was told: cut the handlers' connections when their time is over."""
        self.threads.wake()  # all threads may be with handlers: run() itself looks up
        if self.threads.leave:
            return
        if drain == 0:
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

    cdef void cut_all(self) noexcept:
        """End the connections of all running handlers; their threads come back from recv and send."""
        cdef Worker worker
        cdef Connection connection
        for worker in list(self.threads.workers):
            connection = worker.has()
            if connection is not None:
                self.cut(connection)
        port_swap(&self.cut_at, port_now())
        self.acceptor.bring_back()  # the time of a drain is over
        self.threads.wake()

    cdef void cut(self, Connection connection) noexcept:
        if connection.cut():
            port_add(&self.was_cut, 1)

    def bring_back(self):
        """Have who sleeps in accept() come back."""
        self.acceptor.bring_back()

    def help(self, State state, sock):
        """Take the clients that are queued for another listener, too, until nobody is there."""
        self.acceptor.help(state, sock.fileno())

    def leave(self, State state):
        """Have no thread touch the listener of this state any more, and end."""
        state.stop(0)
        with nogil:
            self.acceptor.release(state)

    def stand_still(self, bint still):
        """A thread is about to fork: have no client in hand; or it has."""
        if self.overload is not None:
            self.overload.stand_still(still)
        else:
            self.acceptor.stand_still(still)

    def after_fork(self):
        """In a child that was just forked: whether the loop goes on there.  It does in the one thread that
        is left, if that is all it needs; else the child has a loop that is over."""
        cdef Worker worker
        for worker in self.threads.workers:
            worker.after_fork()
        self.acceptor.after_fork()
        if not self.threads.most and self.overload is None and self.caller == threading.get_ident():
            return True
        port_swap(&self.over, 1)
        self.reapers.clear()
        self.threads.after_fork()
        if self.overload is not None:
            self.overload.after_fork()
        return False

    def threads_now(self):
        """How many threads serve, and how many of them are idle."""
        return port_get(&self.threads.alive), port_get(&self.threads.idle)

    def join(self):
        """Wait for the handlers that run() has left at work."""
        self.threads.join()


def wake_on_signals(fd):
    """Have the interpreter write to `fd` when a signal comes, if this is the thread that runs their handlers.

    Without it a signal that comes just before poll() would wait for the next client, and Winsock's poll is
    not interrupted at all.  Returns None when nothing was set: not the main thread, or somebody (asyncio)
    has a wake-up there already.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    other = set_wakeup_fd(fd, warn_on_full_buffer=False)
    if other != -1:
        set_wakeup_fd(other, warn_on_full_buffer=False)
        return None
    return fd
