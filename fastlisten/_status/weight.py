"""How many clients HAProxy is to send here: in proportion to how fast they are handled now."""

from __future__ import annotations

import math
import time
from collections import deque

from fastlisten._status.service import Service

# A speed is that of so long, and of so many clients; where fewer were handled in LONGEST it is not known.
WINDOW = 1.0  # seconds
ENOUGH = 20  # clients
LONGEST = 10.0  # seconds

# The best speed is forgotten by half in so long: what a service has to do may have changed for good.
HALF_LIFE = 600.0  # seconds

# How often it is looked how many clients are with handlers, and for how long after an agent-check.
INTERVAL = 0.05  # seconds
ASKED = 10.0  # seconds


class Speed:
    """How fast clients are handled, beside the best that was seen.

    By Little's law: clients a second, of each that is with a handler at a time, are what is in the mean time
    that one is there.  So a load that is within the places changes nothing; one that slows handlers does.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float, int, int]] = deque()  # time, seconds of clients, the numbers
        self._best = 0.0
        self._best_at = 0.0

    def saw(self, now: float, active: int, handled: int, refused: int) -> None:
        """So it is now: who is with handlers; who was, and who was refused for want of a place, so far."""
        samples = self._samples
        if samples and now - samples[-1][0] > LONGEST / 2:  # nobody has looked since
            samples.clear()
        spent = samples[-1][1] + active * (now - samples[-1][0]) if samples else 0.0
        samples.append((now, spent, handled, refused))
        while samples[0][0] < now - LONGEST:
            samples.popleft()

    def share(self) -> float | None:
        """The speed now as a share of the best, from 0 to 1; None: it is not known.

        Of a service that refuses clients for want of a place it is less by their share.
        """
        now, spent, handled, refused = self._samples[-1]
        for then, spent_then, handled_then, refused_then in reversed(self._samples):
            clients = handled - handled_then
            if now - then >= WINDOW and clients >= ENOUGH and spent > spent_then:
                speed = clients / (spent - spent_then)
                self._best = max(self._best * 0.5 ** ((now - self._best_at) / HALF_LIFE), speed)
                self._best_at = now
                return speed / self._best * clients / (clients + refused - refused_then)
        return None


class Weight:
    """The agent-check's number for a service: looks at its counters while an agent asks."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._speed = Speed()
        self._due = math.inf
        self._until = 0.0

    def share(self) -> float:
        """What is to be sent here now, of what the service can do at its best, from 0 to 1."""
        now = time.monotonic()
        self._until = now + ASKED
        self._look(now)
        speed = self._speed.share()
        return self._service.free() if speed is None else speed * self._service.present()

    def due(self) -> float:
        """When look() is to be called; time.monotonic()."""
        return self._due

    def look(self, now: float) -> None:
        """Look at the counters, if it is time."""
        if now >= self._due:
            self._look(now)

    def _look(self, now: float) -> None:
        self._speed.saw(now, *self._service.counts())
        self._due = now + INTERVAL if now < self._until else math.inf
