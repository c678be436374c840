"""What is served, as the status port sees it, and the sums that all such services need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fastlisten._listener import ListenerStats

# What a service is, in the words of the answers.
STARTING, SERVING, PAUSED, DRAINING = "starting", "serving", "paused", "draining"


class Service(Protocol):
    """What is served, as the status port sees it."""

    def state(self) -> str:
        """STARTING, SERVING, PAUSED or DRAINING."""

    def counts(self) -> tuple[int, int, int]:
        """How many clients are with handlers; how many were, and were refused for want of a place, so far."""

    def present(self) -> float:
        """The share of its workers that serve, from 0 to 1."""

    def free(self) -> float:
        """The share of its capacity that is free, from 0 to 1."""

    def sources(self) -> Sequence[Any]:
        """What metrics.exposition() takes."""


def counts(stats: ListenerStats) -> tuple[int, int, int]:
    """As Service.counts()."""
    with_handlers = stats.active - stats.waiting - stats.pending_connections
    return with_handlers, stats.handled, stats.refused_for.get("busy", 0)


def load(stats: ListenerStats) -> int:
    """How many clients have a handler or are to get one, and who is in the kernel's queue."""
    return stats.active - stats.waiting + (stats.queue_depth or 0)


def share(free: int, whole: int) -> float:
    """What is free of a whole, from 0 to 1; where that is 0, nobody knows better than all."""
    return min(max(free / whole, 0.0), 1.0) if whole else 1.0
