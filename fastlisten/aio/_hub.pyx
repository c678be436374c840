"""The hub: what an event loop's wakes are spent on.

One wake of the event loop does as much as it can for many descriptors, because a wake is what costs.  The hub
watches them with a poller of its own, which is one descriptor to the event loop.  Each is registered with the
event loop itself where the system has no poller (port.h), and what is watched all the time everywhere: that
is done once, and its wakes need no look at the poller.

The hub knows four methods of what it watches: ready(), turn(), end() and send_written().

Nothing here gives the GIL up: all calls are non-blocking and take about as long as giving it up does, and in
a process with busy threads it would take up to a switch interval (5 ms) to get it back.
"""

import gc
import logging
from collections import deque

cimport cython
from libc.stdint cimport int64_t

from fastlisten._selector import internal, watch as watch_with

from fastlisten._core.port cimport *
from fastlisten._core.state cimport log

# How many watched descriptors one wake serves: enough to make the cost of the wake small, little enough that
# other tasks of the loop run in between.
cdef enum:
    READY = 64


cdef object _asyncio_log = logging.getLogger("asyncio")


cdef class Watched:
    """Something with a descriptor that the hub can watch."""

    def __cinit__(self):
        self.fd = PORT_NO_SOCKET

    cdef int ready(self, short events) except -1:
        """The kernel has said so."""
        raise NotImplementedError

    cdef int turn(self) except -1:
        """Do what was left for this turn of the loop: give_turns() or turn_soon() was asked for it."""
        raise NotImplementedError

    cdef int end(self) except -1:
        """Come to the end that end_soon() was asked for."""
        raise NotImplementedError

    cdef int send_written(self) except -1:
        """Send what was written in this turn of the loop: send_soon() was asked for it."""
        raise NotImplementedError

    cdef int watch(self, short events) except -1:
        """Be watched for these events from now on; POLLIN, POLLOUT, both or 0."""
        if events != self.watched_for:
            self.hub.watch(self, events)
        return 0

    cdef int ready_soon(self) except -1:
        """Have ready() be called on the loop's next turn, whatever the kernel says of the descriptor."""
        self.hub.loop.call_soon(self._readable)
        return 0

    def _readable(self):
        self.hub.dispatch(self, POLLIN)

    def _writable(self):
        self.hub.dispatch(self, POLLOUT)


def _ready_queue(loop):
    """Where the loop keeps what it was given by call_soon(): a deque, asyncio's `_ready`, which uvloop hides;
    None when it cannot be found."""
    handle = loop.call_soon(id, None)
    handle.cancel()
    for found in (getattr(loop, "_ready", None), *gc.get_referents(loop)):
        if type(found) is deque and handle in found:
            return found
    return None


@cython.final
cdef class Hub:
    """The wakes of one event loop, for those that share a poller.

    loop: the event loop that runs.  polled: False to register each descriptor with the event loop, as it is
    where the system has no poller.
    """

    def __cinit__(self, loop, bint polled=True):
        self.poller = PORT_NO_SOCKET
        self.loop = loop
        self.timed = loop.get_debug()
        self.transports = getattr(loop, "_transports", None)
        self.add_reader = internal(loop, "add_reader")
        self.remove_reader = internal(loop, "remove_reader")
        self.add_writer = internal(loop, "add_writer")
        self.remove_writer = internal(loop, "remove_writer")
        self.watched = {}
        self.queue = _ready_queue(loop)
        self.due = []
        self.ending = []
        self.writers = []
        if polled:
            self.poller = port_poller()

    def __dealloc__(self):
        self.close_poller()

    cdef int close(self) except -1:
        """Close the poller, which nobody needs any more; somebody may hold on to a Watched for long."""
        if self.registered and not self.loop.is_closed():
            self.remove_reader(self.poller)
        self.registered = False
        self.close_poller()
        return 0

    cdef void close_poller(self) noexcept:
        if self.poller != PORT_NO_SOCKET:
            port_close(self.poller)
            self.poller = PORT_NO_SOCKET

    # --- watching ----------------------------------------------------------------------------------

    cdef int watch(self, Watched what, short events) except -1:
        """Watch what.fd for other events than before.  Raises OSError, and then all is as it was."""
        if what.polled:
            return self.poll_for(what, events)
        return self.have_loop_watch(what, events)

    cdef int poll_for(self, Watched what, short events) except -1:
        """Watch by the poller, which the event loop watches from the first time on: it is never ready while
        nothing is watched."""
        if not self.registered:
            watch_with(self.add_reader, self.loop, self.poller, self._ready)
            self.registered = True
        if port_poller_set(self.poller, what.fd, what.watched_for, events) != 0:
            port_raise(port_error())
        what.watched_for = events
        if events:
            self.watched[what.fd] = what
        else:
            self.watched.pop(what.fd, None)
        return 0

    cdef int have_loop_watch(self, Watched what, short events) except -1:
        """Watch by the event loop itself."""
        cdef short before = what.watched_for
        if events & ~before & POLLIN:
            watch_with(self.add_reader, self.loop, what.fd, what._readable)
            what.watched_for |= POLLIN
        if events & ~before & POLLOUT:
            watch_with(self.add_writer, self.loop, what.fd, what._writable)
            what.watched_for |= POLLOUT
        if before & ~events & POLLIN:
            self.remove_reader(what.fd)
        if before & ~events & POLLOUT:
            self.remove_writer(what.fd)
        what.watched_for = events
        return 0

    cdef int forget(self, Watched what) except -1:
        """What could not be unwatched is about to be closed: its number may be another's then."""
        what.watched_for = 0
        self.watched.pop(what.fd, None)
        return 0

    cdef int give_poller_up(self, int code) except -1:
        """The poller does not tell what is ready any more: have the event loop watch all of it."""
        cdef Watched what
        cdef short events
        watched, self.watched = list(self.watched.values()), {}
        self.close()
        try:
            port_raise(code)
        except OSError as error:
            log().warning("the poller failed, the event loop watches its %d connections: %s",
                          len(watched), error, extra={"event": "poller failed", "reason": str(error)})
        for what in watched:
            events, what.watched_for, what.polled = what.watched_for, 0, False
            self.have_loop_watch(what, events)
        return 0

    # --- wakes and turns ---------------------------------------------------------------------------
    # asyncio gives first turns and ends by call_soon().  Here they are given in the wake that brings them
    # about, when nothing was scheduled that would come before: nobody can tell.

    def _ready(self):
        """Serve what the poller says is ready.  It is level-triggered: the rest is told on the next wake."""
        cdef port_pollfd polls[READY]
        cdef int i
        cdef int found = port_poller_ready(self.poller, polls, READY)
        if found < 0 and port_error() != PORT_EINTR:
            self.give_poller_up(port_error())
            return
        self.awake = True
        try:
            for i in range(found):
                what = self.watched.get(polls[i].fd)
                if what is not None:  # one before it may have ended it
                    self.serve(<Watched>what, polls[i].revents)
            self.give_ends()
        finally:
            self.sleep()

    cdef int serve(self, Watched what, short events) except -1:
        """Have it do what the kernel says can be done; in debug mode, tell of one that takes long."""
        cdef int64_t begin
        if not self.timed:
            return what.ready(events)
        begin = port_now()
        try:
            return what.ready(events)
        finally:
            self.tell_of_long(what, (port_now() - begin) / 1e9)

    cdef int tell_of_long(self, Watched what, double seconds) except -1:
        """As the event loop tells of a callback; there all that one wake serves is one callback."""
        if seconds >= self.loop.slow_callback_duration:
            _asyncio_log.warning("Executing %r took %.3f seconds", what, seconds)
        return 0

    cdef int dispatch(self, Watched what, short events) except -1:
        """Serve one descriptor, which the event loop itself watches."""
        self.awake = True
        try:
            self.serve(what, events)
            self.give_ends()
        finally:
            self.sleep()
        return 0

    def _turn(self, list watched):
        """What was left for the loop's next turn."""
        self.awake = True
        try:
            self.give_turns(watched)
            self.give_ends()
        finally:
            self.sleep()

    def _end(self, list watched):
        """The ends, where asyncio would give them."""
        self.awake = True
        try:
            self.ending[:0] = watched
            self.give_ends()
        finally:
            self.sleep()

    cdef int give_turns(self, list watched) except -1:
        """Give each its turn; when one raises (SystemExit), the rest has it on the loop's next turn."""
        cdef Py_ssize_t i = 0
        try:
            while i < len(watched):
                what = watched[i]
                i += 1
                (<Watched>what).turn()
        except BaseException:
            self.due = watched[i:] + self.due
            raise
        return 0

    def _send(self):
        """What was written since the last wake."""
        self.send_all()

    cdef int send_all(self) except -1:
        """Have all send what they have; when one raises (SystemExit), the rest does so on the next turn."""
        cdef Py_ssize_t i = 0
        if not self.writers:
            return 0
        writers, self.writers = self.writers, []
        try:
            while i < len(writers):
                what = writers[i]
                i += 1
                (<Watched>what).send_written()
        finally:
            for what in writers[i:]:
                self.send_soon(<Watched>what)
        return 0

    cdef int give_ends(self) except -1:
        """End those that were closed in this wake."""
        while self.ending:
            what = self.ending.pop(0)
            (<Watched>what).end()
        return 0

    cdef int sleep(self) except -1:
        """The wake is over; have the loop come back for what is left."""
        self.awake = False
        if self.ending:
            ending, self.ending = self.ending, []
            self.loop.call_soon(self._end, ending)
        if self.due:
            due, self.due = self.due, []
            self.loop.call_soon(self._turn, due)
        return self.send_all()

    cdef int turn_soon(self, Watched what) except -1:
        """Have what.turn() called after all that is scheduled."""
        if self.awake:
            self.due.append(what)
        else:
            self.loop.call_soon(self._turn, [what])
        return 0

    cdef int end_soon(self, Watched what) except -1:
        """Have what.end() called after all that is scheduled, and before what is not yet."""
        if self.awake and self.scheduled() == 0:
            self.ending.append(what)
        else:
            self.loop.call_soon(self._end, [what])
        return 0

    cdef int send_soon(self, Watched what) except -1:
        """Have what.send_written() called at the end of this wake, or on the loop's next turn."""
        if not self.awake and not self.writers:
            self.loop.call_soon(self._send)
        self.writers.append(what)
        return 0
