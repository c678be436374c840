"""What processes that serve together ask of the system: steering, shared counters, an end with the parent."""

cimport cython
from cpython.buffer cimport PyBuffer_Release
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free, malloc

from fastlisten._core.port cimport *
from fastlisten._core.state cimport (
    counts_of,
    pending_times_of,
    refused_for,
    state_in,
    state_t,
    tls_failures_of,
)

# Whether listeners that share a port share its clients; where they do not, processes share one listener.
BALANCES = bool(PORT_BALANCES)


def steer(port_socket member, targets, int probe=0, int probe_target=0):
    """Have the clients of a port that listeners share go to some of them from now on, at random.

    member: the descriptor of any of them.  targets: the places of those, in the order in which all of them
    began to listen.  probe: clients from this port go to the place `probe_target`; 0: there are none.
    Raises OSError where the system does not do that.
    """
    cdef int count = len(targets)
    cdef int i, result
    cdef int *places = <int *>malloc(max(count, 1) * sizeof(int))
    if places is NULL:
        raise MemoryError
    try:
        for i in range(count):
            places[i] = targets[i]
        result = port_steer(member, places, count, probe, probe_target)
    finally:
        free(places)
    if result != 0:
        port_raise(port_error())


def end_with_parent(int64_t parent):
    """Have the system kill this process when its parent, process `parent`, ends.

    Returns whether it does so; raises ProcessLookupError when the parent has ended already.
    """
    cdef int result = port_end_with_parent(parent)
    if result == 1:
        raise ProcessLookupError(f"process {parent} has ended")
    return result == 0


@cython.final
cdef class Counters:
    """The counters of a State in another process, for whoever has the memory in which it lies."""

    cdef state_t *at
    cdef Py_buffer buffer

    def __cinit__(self, memory, Py_ssize_t offset):
        self.at = state_in(memory, offset, &self.buffer)

    def __dealloc__(self):
        if self.at is not NULL:
            PyBuffer_Release(&self.buffer)

    @property
    def accepted(self):
        """How many clients were taken from the kernel."""
        return port_get(&self.at.accepted)

    @property
    def handled(self):
        """How many connections were closed or taken over."""
        return port_get(&self.at.handled)

    @property
    def paused(self):
        """Whether nobody is to be accepted."""
        return bool(port_get(&self.at.paused))

    def counts(self):
        """As State.counts()."""
        return counts_of(self.at)

    def refused_for(self):
        """As State.refused_for()."""
        return refused_for(self.at)

    def tls_failures(self):
        """As State.tls_failures()."""
        return tls_failures_of(self.at)

    def pending_times(self):
        """As State.pending_times()."""
        return pending_times_of(self.at)


cdef struct member_t:
    port_socket fd
    state_t *at             # of the process that serves it; NULL: nobody does, or it has no counters
    int64_t accepted        # at the last look
    int depth               # of its queue, at the last look; 0 where accepted had moved
    int looks               # in a row at which somebody was queued and nobody came out


@cython.final
cdef class Queues:
    """Looks at the queues of some listeners, for one that does not move: a read each while all is well.

    descriptors: of the listeners; the caller keeps them open.
    """

    cdef member_t *members
    cdef port_pollfd *polls         # those whose counter has not moved, and which they are
    cdef int *numbers
    cdef list held                  # the counters, for what the members point to
    cdef int count
    cdef readonly int quiet         # looks in a row at which no queue moved

    def __cinit__(self, descriptors):
        cdef int i
        self.count = len(descriptors)
        self.held = [None] * self.count
        self.members = <member_t *>calloc(max(self.count, 1), sizeof(member_t))
        self.polls = <port_pollfd *>calloc(max(self.count, 1), sizeof(port_pollfd))
        self.numbers = <int *>calloc(max(self.count, 1), sizeof(int))
        if self.members is NULL or self.polls is NULL or self.numbers is NULL:
            raise MemoryError
        for i in range(self.count):
            self.members[i].fd = descriptors[i]

    def __dealloc__(self):
        free(self.members)
        free(self.polls)
        free(self.numbers)

    def serve(self, int i, Counters counters):
        """The process with these counters serves listener number i from now on; None: there are none."""
        cdef member_t *member = &self.members[self.checked(i)]
        self.held[i] = counters
        member.at = NULL if counters is None else counters.at
        member.accepted = 0 if counters is None else port_get(&counters.at.accepted)
        member.looks = 0

    def depth(self, int i):
        """How many were queued at the last look; 0 where the queue had moved since the one before."""
        return self.members[self.checked(i)].depth

    def looks(self, int i):
        """At how many looks in a row somebody was queued and nobody came out."""
        return self.members[self.checked(i)].looks

    def wake(self):
        """Somebody has come."""
        self.quiet = 0

    cdef int checked(self, int i) except -1:
        if not 0 <= i < self.count:
            raise IndexError(f"there are {self.count} listeners, and no {i}")
        return i

    def wait(self, port_socket wakeup, double seconds, double every, int most, int patience, int quiet):
        """Look every so many seconds, at most so often, until `wakeup` is readable or a signal comes.

        Returns after so many seconds, when a queue has not moved at `patience` looks in a row, or no queue
        has at `quiet` of them.
        """
        cdef port_pollfd poll
        cdef int64_t step = <int64_t>(every * 1e9)
        cdef int64_t until = port_now() + <int64_t>(min(seconds, 1e9) * 1e9)
        cdef int64_t left
        cdef bint seen = False
        poll.fd = wakeup
        poll.events = POLLIN
        with nogil:
            while most > 0 and not seen and self.quiet < quiet:
                left = max(until - port_now(), 0)
                if port_poll_ns(&poll, 1, min(step, left)) != 0 or left < step:
                    break
                seen = self.look(patience)
                most -= 1

    cdef bint look(self, int patience) noexcept nogil:
        """Look once; whether a queue has not moved for long enough."""
        cdef member_t *member
        cdef int i, before, limit
        cdef int still = 0
        cdef int64_t accepted
        cdef bint seen = False
        self.quiet += 1
        for i in range(self.count):
            member = &self.members[i]
            accepted = 0 if member.at is NULL else port_get(&member.at.accepted)
            if accepted != member.accepted:
                member.accepted = accepted
                member.depth = member.looks = self.quiet = 0
            else:
                self.polls[still].fd = member.fd
                self.polls[still].events = POLLIN
                self.numbers[still] = i
                still += 1
        if still and port_poll_ns(self.polls, still, 0) < 0:
            return False  # no memory: the next look tells
        for i in range(still):
            member = &self.members[self.numbers[i]]
            before = member.depth
            member.depth = 0
            if self.polls[i].revents and port_queue(member.fd, &member.depth, &limit) != 0:
                member.depth = 0
            if member.at is NULL and member.depth != before:
                self.quiet = 0
            if member.depth and (member.at is not NULL or member.depth >= before):
                member.looks += 1
                seen = seen or member.looks >= patience
            else:
                member.looks = 0
        return seen
