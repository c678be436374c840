"""The memory that the workers write and the parent reads: their counters, without a message."""

from __future__ import annotations

import mmap
import os

from fastlisten._core.processes import Counters
from fastlisten._core.state import STATE_BYTES
from fastlisten._shared_memory import shared_memory

# A state has pages of its own, so that a fork of a worker can have a copy of it.
_STATE = mmap.PAGESIZE * -(-STATE_BYTES // mmap.PAGESIZE)

# The numbers at the start of a slot: of the stop, how many clients finished and were cut; whether the worker
# is to be paused; and then, for each endpoint, whose queue it is to look into: that member's place and 1; 0
# is nobody's.
FINISHED, CUT, PAUSED, HELP = 0, 1, 2, 3
MOST_ENDPOINTS = mmap.PAGESIZE // 8 - HELP


class Memory:
    """Slots for processes: a page of numbers each, and a state for each endpoint.

    named: something stands for it, `name`, for a process that is no fork of this one: a descriptor that it
    inherits, or on Windows a name.  name: it was made by another process, which calls it so.
    """

    def __init__(
        self, endpoints: int, slots: int, named: bool = False, name: int | str | None = None
    ) -> None:
        self.endpoints = endpoints
        self.slots = slots
        self._size = mmap.PAGESIZE + endpoints * _STATE
        self.map, self.name = shared_memory(self._size * slots, named, name)
        self._free = list(range(slots - 1, -1, -1))

    def take(self) -> Slot:
        """A slot of zeros, to be given back; IndexError when there is none left."""
        slot = Slot(self, self._free.pop())
        start = slot.number * self._size
        self.map[start : start + self._size] = bytes(self._size)
        return slot

    def give_back(self, slot: Slot) -> None:
        """Let another process have it; the one that had it has ended."""
        self._free.append(slot.number)

    def close(self) -> None:
        """Close the descriptor; the memory stays while somebody uses it."""
        if isinstance(self.name, int):
            os.close(self.name)


class Slot:
    """What one worker process writes, and is asked."""

    def __init__(self, memory: Memory, number: int) -> None:
        self.number = number
        self.map = memory.map
        start = number * memory._size
        self.numbers = memoryview(memory.map)[start : start + mmap.PAGESIZE].cast("q")
        first = start + mmap.PAGESIZE
        self.offsets = [first + endpoint * _STATE for endpoint in range(memory.endpoints)]
        self.counters = [Counters(memory.map, offset) for offset in self.offsets]
