"""Nobody waits behind a worker that does not come to its queue while another one has nothing to do.

The parent looks, so that the workers need not: every few milliseconds while clients come, and not at all
when none do.  A look reads a counter of each worker (Queues).  Only where that has not moved is the kernel
asked how many are queued; a member that has somebody queued at two looks and accepted nobody in between is
stuck.  New clients are steered to the others then, and as many idle workers as clients are queued are asked
to take those: not all of them, so there is no herd.  The queues of members that nobody serves, since their
worker has died or was taken away, are emptied so, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from fastlisten._core.processes import Queues
from fastlisten._workers.memory import HELP
from fastlisten._workers.process import Process
from fastlisten._workers.sockets import Members

# Two of these and the time that the helper takes are what a client waits behind a stuck worker.
LOOK = 0.004  # seconds
LOOKS = 2

# How often the parent looks before it turns to something else: as often as it likes.
MOST_LOOKS = 2**31 - 1

# After so many looks at which no queue has moved, the parent sleeps until a client comes.
QUIET_LOOKS = 50
# ... or looks as rarely as this, if clients are queued and nobody can take them; and at a stuck worker for
# which nobody is queued.
RARE_LOOK = 0.05  # seconds

# A program of somebody else's has no counter: its queue alone tells, and a busy one's may grow for a while.
LOOKS_WITHOUT_COUNTER = 3

# A worker may be late because the machine is busy.  The others help at once; but only one that has accepted
# and handled nobody from the first to this time that they had to, is left out by new clients.
TIMES_LATE = 3

# A stuck worker that has done nothing since is tried again after this time, then after twice as long each
# time: it gets new clients, which the others take if it is still stuck.
FIRST_TRIAL = 0.25  # seconds
LAST_TRIAL = 4.0


class Stuck:
    """A member that is to get no new clients."""

    def __init__(self, trial: float, try_at: float, done: tuple[int, int]) -> None:
        self.trial = trial
        self.try_at = try_at
        self.done = done  # what its process had accepted and handled then


class Relief:
    """Which members are stuck, and who helps.

    endpoints: their listeners.  serving: gives the processes that are ready.  steer: called when others than
    before are stuck.
    """

    def __init__(
        self,
        endpoints: Sequence[Members],
        serving: Callable[[], Iterable[Process]],
        steer: Callable[[], None],
    ) -> None:
        self._endpoints = endpoints
        self._serving = serving
        self._steer = steer
        self._stuck: dict[tuple[int, int], Stuck] = {}
        self._trials: dict[tuple[int, int], float] = {}
        self._late: dict[tuple[int, int], tuple[tuple[int, int], int]] = {}  # what it had done, and how often
        self._accepted = 0  # by those that served when comes_on() was last asked
        self._turn = 0  # whom to ask next of those who are as good as each other
        self._members: list[tuple[int, int]] = []  # as the queues are numbered: the endpoint, the place
        self.arrange()

    def arrange(self) -> None:
        """Others serve the members now, or there are more members."""
        members = [
            (number, place)
            for number, members in enumerate(self._endpoints)
            if not members.shared
            for place in range(len(members.listeners))
        ]
        if members != self._members or not hasattr(self, "_queues"):
            self._members = members
            self._queues = Queues([self._endpoints[number].of(place).fileno() for number, place in members])
        serving = {process.member: process for process in self._serving()}
        for i, (number, place) in enumerate(members):
            process = serving.get(place)
            counts = process is not None and process.counts
            self._queues.serve(i, process.slot.counters[number] if process is not None and counts else None)

    def replaced(self, place: int) -> None:
        """Another process serves these members: what was seen of the one before is not its own."""
        for number in range(len(self._endpoints)):
            self._stuck.pop((number, place), None)
            self._trials.pop((number, place), None)
            self._late.pop((number, place), None)
        self.arrange()

    @property
    def asleep(self) -> bool:
        """Whether no client has come for a while, and none is queued."""
        quiet = self._queues.quiet >= QUIET_LOOKS
        return not self._members or (quiet and not any(map(self._queues.depth, range(len(self._members)))))

    def wake(self) -> None:
        """A client has come."""
        self._queues.wake()

    def wait(self, wakeup: int, seconds: float) -> None:
        """Look until this descriptor is readable, for so many seconds at most, or until somebody is stuck."""
        rare = self._queues.quiet >= QUIET_LOOKS
        # What is to be seen then, look() sees: that costs more than a look of Queues.
        once = rare or any(
            self._queues.depth(i) for i, member in enumerate(self._members) if member in self._stuck
        )
        if self._stuck:
            seconds = min(seconds, RARE_LOOK)  # they may be served again
        every, most = RARE_LOOK if rare else LOOK, 1 if once else MOST_LOOKS
        self._queues.wait(wakeup, seconds, every, most, LOOKS, MOST_LOOKS if rare else QUIET_LOOKS)

    def stuck(self, number: int, place: int) -> bool:
        """Whether a member is stuck: it is to get no new clients."""
        return (number, place) in self._stuck

    def comes_on(self) -> bool:
        """Whether clients were accepted since this was last asked, or there is no endpoint where somebody is
        queued for each worker and none of them takes anybody.  Of programs, and where all share one queue,
        nobody knows."""
        before, serving = self._accepted, {process.member: process for process in self._serving()}
        self._accepted = sum(
            counters.accepted for process in serving.values() for counters in process.slot.counters
        )
        if self._accepted != before or not all(process.counts for process in serving.values()):
            return True
        still: dict[int, list[bool]] = {}
        for i, (number, place) in enumerate(self._members):
            if place in serving:
                still.setdefault(number, []).append(self._queues.looks(i) >= LOOKS)
        return not any(map(all, still.values()))

    def look(self, now: float) -> None:
        """See who is stuck, and have the others help."""
        before = set(self._stuck)
        serving = {process.member: process for process in self._serving()}
        for i, member in enumerate(self._members):
            process = serving.get(member[1])
            limit = LOOKS if process is None or process.counts else LOOKS_WITHOUT_COUNTER
            if member in self._stuck:
                self._look_for_recovery(i, member, process, now)
            if self._queues.looks(i) >= (1 if member in self._stuck else limit):
                self._relieve(i, member, serving, now)
        if before != set(self._stuck):
            self._steer()

    def _look_for_recovery(
        self, i: int, member: tuple[int, int], process: Process | None, now: float
    ) -> None:
        """A stuck member may be served again."""
        stuck = self._stuck[member]
        if process is None:
            moved = True  # it gets nobody anyway
        elif process.counts:
            moved = self._done(member[0], process) != stuck.done
        else:
            moved = self._queues.looks(i) == 0  # nobody has helped
        if moved:
            del self._stuck[member]
            self._trials.pop(member, None)
        elif now >= stuck.try_at and not self._queues.depth(i) and process is not None and process.counts:
            del self._stuck[member]
            self._trials[member] = min(2 * stuck.trial, LAST_TRIAL)

    def _relieve(self, i: int, member: tuple[int, int], serving: dict[int, Process], now: float) -> None:
        """Have nobody more sent to a member, and idle workers take who is queued there."""
        number, place = member
        others = [
            process for other, process in serving.items() if other != place and not self._busy(number, other)
        ]
        if not others:
            return
        if member not in self._stuck and place in serving and self._too_late(member, serving[place]):
            trial = self._trials.get(member, FIRST_TRIAL)
            self._stuck[member] = Stuck(trial, now + trial, self._done(number, serving[place]))
        able = [process for process in others if process.counts and process.known > place]
        able.sort(key=lambda process: self._open(number, process))
        idle = [process for process in able if self._open(number, process) == 0]
        helpers = idle or able[:1]
        self._turn += 1
        for k in range(min(self._queues.depth(i), len(helpers))):
            helper = helpers[(self._turn + k) % len(helpers)]
            helper.slot.numbers[HELP + number] = place + 1
            helper.handle.look()

    def _too_late(self, member: tuple[int, int], process: Process) -> bool:
        """Whether a worker is stuck, and not late because the machine is busy."""
        done, times = self._late.get(member, ((-1, -1), 0))
        now = self._done(member[0], process)
        times = times + 1 if now == done else 1
        self._late[member] = now, times
        return times >= (TIMES_LATE if process.counts else 1)

    def _busy(self, number: int, place: int) -> bool:
        """Whether a member has clients of its own to come to."""
        return (number, place) in self._stuck or self._endpoints[number].depth(place) > 0

    def _open(self, number: int, process: Process) -> int:
        """How many connections a worker has."""
        accepted, handled = self._done(number, process)
        return accepted - handled

    @staticmethod
    def _done(number: int, process: Process) -> tuple[int, int]:
        """How many a worker has accepted, and handled."""
        counters = process.slot.counters[number]
        handled = counters.handled
        return counters.accepted, handled
