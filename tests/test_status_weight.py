"""The agent-check's weight: in proportion to how fast clients are handled, whatever the load is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlisten._status import weight
from fastlisten._status.weight import LONGEST, WINDOW, Speed, Weight

STEP = 0.1  # seconds


class Clients:
    """Clients that a Speed sees: so many are there at a time, each for so many seconds."""

    def __init__(self) -> None:
        self.speed = Speed()
        self.now = self.handled = self.refused = 0.0

    def go_on(self, seconds: float, active: int, each: float, refused: float = 0.0) -> float | None:
        """Let time pass, with so many refused a second; return the share then."""
        for _ in range(round(seconds / STEP)):
            self.now += STEP
            self.handled += active / each * STEP
            self.refused += refused * STEP
            self.speed.saw(self.now, active, int(self.handled), int(self.refused))
        return self.speed.share()


def test_half_the_speed_is_half_the_share_whatever_the_load_is() -> None:
    clients = Clients()
    assert clients.go_on(3, active=4, each=0.01) == pytest.approx(1, rel=0.05)
    assert clients.go_on(3, active=60, each=0.01) == pytest.approx(1, rel=0.05)
    assert clients.go_on(3, active=60, each=0.02) == pytest.approx(0.5, rel=0.05)
    assert clients.go_on(3, active=4, each=0.1) == pytest.approx(0.1, rel=0.05)
    assert clients.go_on(3, active=4, each=0.01) == pytest.approx(1, rel=0.05)


def test_a_speed_is_known_a_window_later() -> None:
    clients = Clients()
    clients.go_on(3, active=10, each=0.01)
    assert clients.go_on(WINDOW + STEP, active=10, each=0.1) == pytest.approx(0.1, rel=0.05)


def test_few_clients_are_no_news() -> None:
    clients = Clients()
    clients.go_on(3, active=10, each=0.01)
    assert clients.go_on(LONGEST + 1, active=1, each=5) is None
    assert clients.go_on(LONGEST + 1, active=0, each=1) is None


def test_a_time_in_which_nobody_looked_is_not_counted() -> None:
    clients = Clients()
    clients.go_on(3, active=10, each=0.01)
    clients.now += LONGEST
    assert clients.go_on(STEP, active=10, each=0.01) is None
    assert clients.go_on(3, active=10, each=0.01) == pytest.approx(1, rel=0.05)


def test_who_is_refused_for_want_of_a_place_is_not_to_be_sent() -> None:
    clients = Clients()
    clients.go_on(3, active=10, each=0.01)
    assert clients.go_on(3, active=10, each=0.01, refused=1000) == pytest.approx(0.5, rel=0.05)


def test_the_best_is_forgotten() -> None:
    clients = Clients()
    clients.go_on(3, active=10, each=0.01)
    clients.now += weight.HALF_LIFE
    assert clients.go_on(3, active=10, each=0.1) == pytest.approx(0.2, rel=0.1)


@given(st.lists(st.tuples(st.floats(0, 20), *[st.integers(0, 1000)] * 3), min_size=1))
def test_a_share_is_one_whatever_was_seen(steps: Sequence[tuple[float, int, int, int]]) -> None:
    speed, now, handled, refused = Speed(), 1e6, 0, 0
    for seconds, active, more, no in steps:
        now, handled, refused = now + seconds, handled + more, refused + no
        speed.saw(now, active, handled, refused)
        share = speed.share()
        assert share is None or 0 < share <= 1
    assert len(speed._samples) <= len(steps)


class Service:
    """One of two workers serves, and a quarter is free."""

    def __init__(self, counts: Iterator[tuple[int, int, int]]) -> None:
        self._counts = counts

    def state(self) -> str:
        return "serving"

    def counts(self) -> tuple[int, int, int]:
        return next(self._counts)

    def present(self) -> float:
        return 0.5

    def free(self) -> float:
        return 0.25

    def sources(self) -> Sequence[Any]:
        return []


def test_what_is_free_counts_until_a_speed_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is not there counts with it; it looks while an agent asks, and not for ever."""
    clock = [100.0]
    monkeypatch.setattr("fastlisten._status.weight.time.monotonic", lambda: clock[0])
    told = Weight(Service((10, 100 * number, 0) for number in range(1000)))
    assert told.due() == float("inf")
    assert told.share() == 0.25
    while told.due() < 102:
        clock[0] = told.due()
        told.look(clock[0])
    assert told.share() == 0.5
    while told.due() < float("inf"):
        clock[0] = told.due()
        told.look(clock[0])
    assert clock[0] == pytest.approx(102 + weight.ASKED, abs=1)
