"""What accepts for an asyncio server: its listeners, or the queue of clients behind a thread that refuses.

One wake takes a batch of clients, and begins with each.
"""

import asyncio
from asyncio import trsock

cimport cython
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t

from fastlisten._core.accept cimport (
    ACCEPTED,
    AGAIN,
    INTERRUPTED,
    LOST,
    RESOURCES,
    Shortage,
    accept_batch,
    client_t,
    drop_handed,
    verdict,
    verdict_t,
)
from fastlisten._core.acceptor cimport FAILED
from fastlisten._core.first_bytes cimport FirstBytes
from fastlisten._core.overload cimport Overload
from fastlisten._core.port cimport *
from fastlisten._core.state cimport State, client_handed, waker_drain, waker_mend
from fastlisten.aio._hub cimport Watched
from fastlisten.aio._transport cimport Connections, Owner, new_transport

# How many clients one wake accepts: enough to make the cost of the wake small, little enough that other tasks
# of the loop run in between.
cdef enum:
    ACCEPTS = 32


cdef list begin_with(Connections connections, client_t *clients, int count):
    """A Transport for each of these clients, which were handed out."""
    cdef list arrived = []
    cdef int i = 0
    try:
        while i < count:
            arrived.append(new_transport(connections, clients[i].state, clients[i].fd,
                                         &clients[i].address, clients[i].length))
            i += 1
    finally:
        while i < count:  # no memory
            drop_handed(&clients[i])
            i += 1
    return arrived


@cython.final
cdef class ListenerWatch(Watched):
    """A listening socket of the server; the Server keeps it open.

    sock: the socket.socket.  state: its counters.
    """

    def __cinit__(self, Accepting accepting not None, sock, State state not None):
        self.accepting = accepting
        self.hub = accepting.connections.hub
        self.sock = sock
        self.state = state
        self.fd = self.source.fd = sock.fileno()
        self.source.state = state.at
        self.source.nonblocking = 1

    cdef int ready(self, short events) except -1:
        """Take a batch of clients, and begin with each."""
        if self.watched_for:  # else this look was scheduled, and something has changed since
            self.hub.give_turns(self.take(self.accepting.places(ACCEPTS)))
        return 0

    cdef list take(self, int most):
        """Take so many clients at most; returns their Transports, whose turns are to be given."""
        cdef client_t clients[ACCEPTS]
        cdef int taken, i
        cdef list arrived
        cdef verdict_t answer
        # Another process that has this description may have made it blocking: the loop would sleep here.
        port_set_nonblocking(self.fd, 1)
        answer = accept_batch(&self.source, clients, most, &taken)
        self.taken = taken
        if self.accepting.first is not None:
            taken = self.accepting.first.sift(clients, taken, most)
        for i in range(taken):
            client_handed(clients[i].state, clients[i].fd)
        arrived = begin_with(self.accepting.connections, clients, taken)
        if self.accepting.full():
            self.accepting.arrange()
        self.answer(answer, self.taken)
        return arrived

    cdef int answer(self, verdict_t answer, int taken) except -1:
        """Do what the end of a batch asks for."""
        cdef Shortage shortage = self.accepting.shortage
        if shortage.failures and (taken or answer == AGAIN) and shortage.worked(taken, answer == AGAIN):
            shortage.tell()
        if answer == RESOURCES:
            self.accepting.ran_out(self.source.code)
        elif answer not in (ACCEPTED, AGAIN, INTERRUPTED, LOST):
            self.failed = True  # an accept that goes on failing would spin
            self.accepting.arrange()
            self.accepting.accept_failed(self.source.code, self.sock)
        return 0

    cdef int drain(self, double seconds) except -1:
        """A drain begins: note how many are queued; where the kernel does not tell, as many as are found."""
        cdef int depth, limit
        self.state.begin_drain(seconds)
        self.to_drain = depth if port_queue(self.fd, &depth, &limit) == 0 else INT_MAX
        return self.watch(0)  # nobody is waited for

    cdef int look_again(self) except -1:
        """Have turn() called, once."""
        if not self.looks:
            self.looks = True
            self.hub.turn_soon(self)
        return 0

    cdef int turn(self) except -1:
        """In a drain: take a batch of those who were queued when it began."""
        cdef int most
        cdef list arrived = []
        self.looks = False
        if self.failed:  # or closed by somebody else, and the number a stranger's
            self.to_drain = 0
        if self.to_drain and self.accepting.accepts():
            most = self.accepting.places(min(self.to_drain, <int>ACCEPTS))
            arrived = self.take(most)
            self.to_drain -= self.taken
            if self.failed or self.taken < most and verdict(self.source.code) == AGAIN:
                self.to_drain = 0
            if self.to_drain and self.accepting.accepts():
                self.look_again()
        if not self.to_drain:
            self.accepting.look_for_drained()
        self.hub.give_turns(arrived)
        return 0

    def help(self):
        """Take all who are queued for it: it is somebody else's, whom the server helps."""
        self.to_drain = INT_MAX
        self.look_again()


@cython.final
cdef class FirstBytesWatch(Watched):
    """Where clients of the server wait that have to speak first: its poller says that one has.

    For whose time is over, and where there is no poller, a timer asks.
    """

    def __cinit__(self, Accepting accepting not None, FirstBytes first_bytes not None):
        self.accepting = accepting
        self.hub = accepting.connections.hub
        self.first_bytes = first_bytes

    cdef int begin(self) except -1:
        """Be ready for clients.  Raises OSError when they cannot be watched."""
        self.first_bytes.tells_with(self.accepting.shortage)
        self.first_bytes.open()
        self.fd = self.first_bytes.poller
        return 0 if self.fd == PORT_NO_SOCKET else self.watch(POLLIN)

    cdef int sift(self, client_t *clients, int count, int most) except -1:
        """Of so many clients that were just accepted leave those who may begin; returns how many they are.

        Others may be among them who have spoken meanwhile: at most `most` in all.
        """
        cdef int i
        cdef int kept = 0
        for i in range(count):
            if self.first_bytes.passes(&clients[i]):
                if kept != i:
                    clients[kept] = clients[i]
                kept += 1
        while kept < most and self.first_bytes.take(&clients[kept]):
            kept += 1
        self.unwatch_failed()
        self.set_timer()
        self.tell()
        return kept

    cdef int ready(self, short events) except -1:
        return self.look() if self.accepting.serving else 0

    cdef int look(self) except -1:
        """Close whose time is over, and begin with who has spoken, as far as there are places."""
        cdef client_t clients[ACCEPTS]
        cdef int taken = 0
        cdef int most = self.accepting.places(ACCEPTS)
        cdef list arrived
        self.first_bytes.look()
        self.unwatch_failed()
        self.tell()
        while taken < most and self.first_bytes.take(&clients[taken]):
            client_handed(clients[taken].state, clients[taken].fd)
            taken += 1
        arrived = begin_with(self.accepting.connections, clients, taken)
        if self.accepting.full():
            self.accepting.arrange()
        elif taken == ACCEPTS:
            self.look_soon()
        self.set_timer()
        self.hub.give_turns(arrived)
        if self.accepting.drained is not None:
            self.accepting.look_for_drained()
        return 0

    cdef int unwatch_failed(self) except -1:
        """Watch the poller no more when it was given up."""
        if self.fd != PORT_NO_SOCKET and self.first_bytes.poller == PORT_NO_SOCKET:
            self.watch(0)
            self.fd = PORT_NO_SOCKET
        return 0

    def look_soon(self):
        """Have it look on the loop's next turn, if somebody may begin."""
        if self.first_bytes.next_ready() is not NULL:
            self.ready_soon()

    cdef void tell(self) noexcept:
        """Tell the log what is due; a client is in hand, and what a logger raises does not lose it."""
        if port_get(&self.accepting.shortage.to_tell):
            try:
                self.accepting.shortage.tell()
            except Exception as error:
                self.hub.loop.call_exception_handler({"message": "logging failed", "exception": error})

    cdef int set_timer(self) except -1:
        """Have the next look be in time."""
        cdef int64_t left = self.first_bytes.left()
        if left < 0:
            return 0
        when = self.hub.loop.time() + left / 1e9
        if self.timer is not None:
            if self.timer.when() <= when:
                return 0
            self.timer.cancel()
        self.timer = self.hub.loop.call_at(when, self._due)
        return 0

    def _due(self):
        self.timer = None
        self.hub.dispatch(self, POLLIN)

    cdef int close(self) except -1:
        """Drop who waits; needs no event loop."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.first_bytes.close()
        return 0


@cython.final
cdef class QueueWatch(Watched):
    """The queue of an Overload; its waker says that somebody is in it."""

    def __cinit__(self, Accepting accepting not None, Overload overload not None):
        self.accepting = accepting
        self.hub = accepting.connections.hub
        self.overload = overload
        self.fd = overload.waker.reader

    cdef int ready(self, short events) except -1:
        cdef client_t clients[ACCEPTS]
        cdef int taken = 0
        cdef list arrived
        if not self.accepting.serving:
            return 0  # it is over, and the waker closed
        waker_drain(&self.overload.waker)
        if port_get(&self.overload.waker.broken):
            self.mend()
        while taken < ACCEPTS and self.overload.pop(&clients[taken]):
            self.overload.handled()  # no handler of an event loop is waited for
            taken += 1
        if taken == ACCEPTS:
            self.ready_soon()  # more may wait than one wake takes
        arrived = begin_with(self.accepting.connections, clients, taken)
        self.look_up()
        if self.accepting.drained is not None:
            self.accepting.look_for_drained()
        self.hub.give_turns(arrived)
        return 0

    cdef bint empty(self) noexcept:
        """Whether nobody waits here, and nobody will: the thread that refuses has ended."""
        cdef Overload overload = self.overload
        return (port_get(&overload.refuser_gone) or overload.refuser_ended is None) and overload.waiting == 0

    cdef int mend(self) except -1:
        """The waker is broken: watch another."""
        self.watch(0)
        waker_mend(&self.overload.waker)
        self.fd = self.overload.waker.reader
        return self.watch(POLLIN)

    cdef int look_up(self) except -1:
        """Tell what the thread that refuses has noted."""
        cdef Overload overload = self.overload
        overload.acceptor.shortage.tell()
        if port_get(&overload.refuser_gone) and overload.refuser_outcome == FAILED and not self.failed:
            self.failed = True
            self.accepting.accept_failed(<int>port_get(&overload.acceptor.code), None)
        return 0


@cython.final
cdef class Accepting(Owner):
    """Whether a server accepts now: its limit, pauses, and what is done without descriptors or memory.

    connections: those of the server.  most: how many may be open, 0 for any number.  shortage: what is done
    without descriptors or memory, when there is no queue.
    """

    def __cinit__(self, Connections connections not None, int64_t most, Shortage shortage not None):
        self.connections = connections
        self.most = most
        self.listeners = []
        self.shortage = shortage
        connections.owner = self

    def add_listener(self, sock, State state not None):
        """A listening socket to accept from, once serving."""
        self.shortage.open()
        self.listeners.append(ListenerWatch(self, sock, state))
        if self.most:
            port_make_room(sock.fileno(), self.most)

    def add_first_bytes(self, FirstBytes first_bytes not None):
        """Where clients of the listeners wait that have to speak first."""
        self.first = FirstBytesWatch(self, first_bytes)
        self.first.begin()

    def add_queue(self, Overload overload not None):
        """A queue to take clients from: its thread begins to accept; stop() ends it.

        Raises OSError when it cannot be watched, and then its thread has ended: it touches the listeners and
        their wakers, which are the caller's again.
        """
        overload.acceptor.open(overload.pending + max(overload.most, 1))
        overload.open()
        self.queue = QueueWatch(self, overload)
        try:
            self.queue.watch(POLLIN)
        except BaseException:
            self.end_queue()
            raise
        # The waker only wakes whoever has looked and found nobody.
        self.queue.ready_soon()

    def serve(self):
        """Accept from now on.  Raises OSError when the listeners cannot be watched."""
        self.connections.begin()
        self.serving = True
        self.watch_listeners()

    def hold(self, bint paused):
        """Accept nobody, or again; a drain takes its clients all the same."""
        self.paused = paused and self.drained is None
        self.arrange()

    def drain(self, double seconds, drained):
        """Take those who are queued now, and nobody who comes later; call `drained` when that is done.

        seconds: for how long the thread that refuses may take; stop() is to follow then in any case.
        """
        cdef ListenerWatch listener
        cdef State state
        self.drained = drained
        self.paused = False
        for listener in self.listeners:
            listener.drain(seconds)
        if self.queue is not None:
            for state in self.queue.overload.acceptor.states:
                state.stop(seconds)
        self.arrange()

    def stop(self):
        """Accept nobody any more; the listening sockets may be closed then.  Who has spoken has his turn."""
        if self.first is not None and self.drained is None and self.serving and not (
                self.connections.hub.loop.is_closed()):
            if self.first.first_bytes.lets_in(False):
                self.first.look()
        self.serving = False
        if self.retry is not None:
            self.retry.cancel()
            self.retry = None
        self.arrange()
        self.listeners.clear()
        if self.queue is not None:
            self.queue.watch(0)
        if self.first is not None:
            self.first.watch(0)
        self.abandon()

    def abandon(self):
        """End what needs no event loop, which may be gone: the thread that refuses, and descriptors."""
        self.drained = None
        self.end_queue()
        if self.first is not None:
            self.first.close()
        self.shortage.close()
        self.shortage.tell_rest()
        self.stopped = True
        self.rest()

    cdef int end_queue(self) except -1:
        """End the thread that refuses, and drop who waits in the queue."""
        cdef QueueWatch queue = self.queue
        if queue is not None:
            queue.overload.close()
            queue.overload.acceptor.close()
            queue.overload.acceptor.shortage.tell_rest()
            with cython.critical_section(self):
                self.queue = None
        return 0

    def when_idle(self, idle):
        """Call `idle` each time the last connection is gone."""
        self.idle = idle

    cdef int arrange(self) except -1:
        """Watch the listeners if clients are to be accepted now; what fails is tried again after a pause."""
        try:
            return self.watch_listeners()
        except OSError as error:
            self.shortage.failed(getattr(error, "winerror", None) or error.errno)
            self.pause()
            return self.shortage.tell()

    cdef int watch_listeners(self) except -1:
        cdef ListenerWatch listener
        cdef bint accepts = self.accepts()
        if accepts and self.drained is not None:
            return self.look_again()
        for listener in self.listeners:
            listener.watch(POLLIN if accepts and not listener.failed else 0)
        if accepts and self.first is not None:
            self.first.look_soon()
        return 0

    cdef bint accepts(self) except -1:
        """Whether clients are to be accepted now."""
        return (self.serving and not self.paused and self.retry is None and not self.full()
                and not self.connections.hub.loop.is_closed())

    cdef int look_again(self) except -1:
        """In a drain: look who is still to be taken."""
        cdef ListenerWatch listener
        for listener in self.listeners:
            listener.look_again()
        if self.queue is not None:
            self.queue.ready_soon()
        return 0

    cdef int look_for_drained(self) except -1:
        """In a drain: tell that it is over when all who were queued are taken, and have spoken."""
        cdef ListenerWatch listener
        for listener in self.listeners:
            if listener.to_drain:
                return 0
        if self.first is not None and self.first.first_bytes.lets_in(True):
            return 0
        if self.drained is not None and (self.queue is None or self.queue.empty()):
            self.drained()
        return 0

    cdef bint full(self) noexcept:
        """Whether there may be no more connections."""
        return self.most != 0 and self.connections.active >= self.most

    cdef int places(self, int most) noexcept:
        """How many more connections there may be, at most `most`."""
        if self.most == 0:
            return most
        return <int>min(<int64_t>most, max(self.most - self.connections.active, 0))

    cdef int connection_gone(self) except -1:
        cdef bint was_full = self.most != 0 and self.connections.active + 1 >= self.most
        if self.retry is not None:
            self._again()  # a descriptor came free
        elif was_full and self.serving:
            self.arrange()
            if (self.queue is not None and self.queue.overload.waiting
                    and not self.connections.hub.loop.is_closed()):
                # The thread that refuses would tell, too, if it did not sleep in accept(): see bring_back().
                self.queue.ready_soon()
        if self.connections.active == 0:
            idle = self.idle
            self.rest()
            if idle is not None:
                idle()
        return 0

    cdef int rest(self) except -1:
        """Let go of a server that is over when its last connection is gone."""
        if self.stopped and self.connections.active == 0:
            self.idle = None
            self.connections.owner = None
            self.connections.hub.close()
        return 0

    # --- failed accepts ----------------------------------------------------------------------------

    cdef int ran_out(self, int code) except -1:
        """No descriptors or no memory, or lost clients without end: shed the clients, or pause."""
        self.shortage.failed(code)
        if not self.shed_queued():
            self.pause()
            self.arrange()
        return self.shortage.tell()

    cdef int pause(self) except -1:
        """Accept nobody for a while."""
        self.shortage.pause()
        if self.retry is None and self.serving:
            self.retry = self.connections.hub.loop.call_later(self.shortage.left() / 1e9, self._again)
        return 0

    cdef bint shed_queued(self) noexcept:
        """Reset who is queued, through the descriptor kept for that; False if that cannot be done now."""
        cdef ListenerWatch listener
        for listener in self.listeners:
            if not self.shortage.shed_queued(&listener.source, 1):
                return False
        return True

    def _again(self):
        """The pause is over, or a descriptor came free."""
        cdef ListenerWatch listener
        if self.retry is not None:
            self.retry.cancel()
            self.retry = None
        self.shortage.cut_short()
        if self.serving:
            self.shortage.retake_spare()
        self.arrange()
        for listener in self.listeners:  # that nobody is queued any more tells of no event
            if listener.watched_for:
                listener.ready_soon()

    cdef int accept_failed(self, int code, sock) except -1:
        """Tell, once, that a listener cannot be accepted from any more."""
        try:
            port_raise(code)
        except OSError as error:
            context = {
                "message": "accept() failed, the server takes no more clients from this socket",
                "exception": error,
            }
            if sock is not None:
                context["socket"] = trsock.TransportSocket(sock)
            self.connections.hub.loop.call_exception_handler(context)
        return 0

    # The next ones any thread may call, while the event loop's own ends.

    cdef QueueWatch queue_now(self):
        with cython.critical_section(self):  # without the GIL it could go between a look and a hold on it
            return self.queue

    def bring_back(self):
        """Have the thread that refuses come back, if it sleeps in accept()."""
        cdef QueueWatch queue = self.queue_now()
        if queue is not None:
            queue.overload.acceptor.bring_back()

    def help(self, State state not None, sock):
        """Take the clients that are queued for another listener, too, and count them in this state."""
        cdef QueueWatch queue = self.queue_now()
        if queue is not None:
            queue.overload.acceptor.help(state, sock.fileno())
        elif self.serving:
            self.connections.hub.loop.call_soon_threadsafe(ListenerWatch(self, sock, state).help)

    def leave(self, State state not None):
        """The listener of this state is about to be closed by somebody else: accept from it no more."""
        cdef ListenerWatch listener
        cdef QueueWatch queue = self.queue_now()
        if queue is not None:
            state.stop(0)
            with nogil:
                queue.overload.acceptor.release(state)
        elif asyncio._get_running_loop() is self.connections.hub.loop:
            for listener in self.listeners:
                if listener.state is state:
                    listener.failed = True
            self.arrange()

    def stand_still(self, bint still):
        """A thread is about to fork: have the thread that refuses have no client in hand; or it has."""
        cdef QueueWatch queue = self.queue_now()
        if queue is not None:
            queue.overload.stand_still(still)

    def after_fork(self):
        """In a forked child: who waits in the queue, or has to speak first, is the parent's."""
        if self.queue is not None:
            self.queue.overload.after_fork()
        if self.first is not None:
            self.first.first_bytes.after_fork(False)  # the event loop could not be told of another poller
