"""fastlisten's transport beside the event loop's own: the same random program, the same answers."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlisten import aio
from helpers import needs
from helpers.aio import LOOPS, WAYS
from helpers.differential import HUGE, Act, Encounter, Scenario, StreamEncounter, seen
from helpers.fuzzing import Fuzz
from helpers.internals import set_polling

pytestmark = needs("Linux")

EXAMPLES = 20  # in the suite, of each kind on each loop; for more: pytest --fuzz SECONDS

SMALL = st.sampled_from([0, 1, 10, 100])
QUESTIONS: st.SearchStrategy[Act] = st.one_of(
    st.tuples(
        st.just("ask"),
        st.sampled_from(["is_closing", "is_reading", "can_write_eof", "get_write_buffer_limits"]),
    ),
    st.tuples(st.just("size")),
    st.tuples(st.just("extra"), st.sampled_from(["peername", "sockname", "socket", "other"])),
    st.tuples(st.just("protocol")),
)
ORDERS = ["write_eof", "close", "abort", "pause_reading", "resume_reading"]
ACTS: st.SearchStrategy[Act] = st.one_of(
    st.tuples(st.just("write"), SMALL),
    st.tuples(st.just("write"), SMALL, st.sampled_from([bytearray, memoryview])),
    st.tuples(st.just("write"), st.just(HUGE)),
    st.tuples(st.just("writelines"), st.lists(SMALL, max_size=3)),
    st.tuples(st.just("ask"), st.sampled_from(ORDERS)),
    st.tuples(st.just("ask"), st.just("set_write_buffer_limits"), st.sampled_from([None, 0, 10])),
    st.just(("ask", "set_write_buffer_limits", 10, 20)),
    st.just(("mistake",)),
    st.tuples(st.just("switch"), st.booleans()),
    QUESTIONS,
)
RAISE = st.just(("raise",))
LATER = st.tuples(st.just("later"), st.lists(st.one_of(ACTS, RAISE), max_size=3))
SOME = st.lists(st.one_of(ACTS, LATER, RAISE), max_size=4)
CALLBACKS = {
    # asyncio reports what it raises and goes on
    "connection_made": st.lists(st.one_of(ACTS, LATER), max_size=4),
    "data": SOME,
    "eof_received": SOME,
    "pause_writing": SOME,
    "resume_writing": SOME,
    # What is done to the transport in it finds it closed; asyncio's is not, if it had to wait for the client.
    "connection_lost": st.lists(st.one_of(QUESTIONS, RAISE), max_size=4),
}
CLIENT: st.SearchStrategy[Act] = st.one_of(
    st.just(("settle",)),
    st.tuples(st.just("send"), st.sampled_from([1, 100, 5000])),
    st.tuples(st.just("read"), st.sampled_from([1000, 1 << 30])),
    st.sampled_from([("settle",), ("drain",), ("shut",), ("leave",), ("reset",)]),
)
SCENARIOS = st.builds(
    Scenario,
    buffered=st.booleans(),
    unix=st.booleans(),
    crowded=st.booleans(),
    holds=st.booleans(),
    keep_open=st.booleans(),
    acts=st.fixed_dictionaries({name: st.lists(some, max_size=3) for name, some in CALLBACKS.items()}),
    steps=st.lists(st.one_of(CLIENT, st.tuples(st.just("server"), SOME)), min_size=3, max_size=12),
)

STREAM_ACTS: st.SearchStrategy[Act] = st.one_of(
    st.tuples(st.just("get"), st.just("read"), st.sampled_from([0, 100, 2000, -1])),
    st.tuples(st.just("get"), st.just("readexactly"), st.sampled_from([1, 300])),
    st.just(("get", "readline")),
    st.tuples(st.just("get"), st.just("readuntil"), st.sampled_from([b"\x00", b"\x80"])),
    st.tuples(st.just("write"), st.one_of(SMALL, st.just(HUGE))),
    st.tuples(st.just("put"), st.sampled_from(["drain", "wait_closed", "write_eof", "close", "is_closing"])),
    st.just(("get", "at_eof")),
    QUESTIONS,
    RAISE,
)
STREAM_SCENARIOS = st.builds(
    Scenario,
    buffered=st.just(False),
    unix=st.booleans(),
    crowded=st.booleans(),
    holds=st.booleans(),
    keep_open=st.just(False),
    acts=st.fixed_dictionaries(
        {"task": st.lists(st.lists(STREAM_ACTS, max_size=12), min_size=1, max_size=1)}
    ),
    steps=st.lists(CLIENT, min_size=3, max_size=12),
)


def play(loop: str, scenario: Scenario, path: str, ours: bool) -> Encounter:
    running = LOOPS[loop]()
    streams = "task" in scenario.acts
    encounter = (StreamEncounter if streams else Encounter)(running, scenario)
    module = aio if ours else asyncio if streams else running
    kind = "start" if streams else "create"
    try:
        return encounter.play(getattr(module, f"{kind}_{'unix_' if scenario.unix else ''}server"), path)
    finally:
        running.close()


def compare(loop: str, scenario: Scenario, path: str) -> None:
    """Play a scenario on both, and again if they differ: a kernel that is busy may be late."""
    for _ in range(3):
        ours, theirs = (play(loop, scenario, path, side) for side in (True, False))
        ours.cut = ours.cut or theirs.cut
        if seen(ours) == seen(theirs):
            break
    else:
        print(scenario)  # the last that is printed is the smallest, also when there is no time to make it so
        assert seen(ours) == seen(theirs)
    ours.check()


ON = pytest.mark.parametrize(
    ("loop", "polled"), WAYS, ids=[f"{loop}-{'poller' if p else 'no poller'}" for loop, p in WAYS]
)


@ON
@pytest.mark.parametrize("scenarios", [SCENARIOS, STREAM_SCENARIOS], ids=["protocols", "streams"])
def test_ours_and_the_loops_own_do_the_same(
    loop: str, polled: bool, scenarios: Any, unix_path: str, fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_polling(monkeypatch, polled)

    def test(how: settings) -> None:
        @how
        @given(scenarios)
        def example(scenario: Scenario) -> None:
            fuzz.count += 1
            compare(loop, scenario, unix_path)

        example()

    fuzz.run(test, EXAMPLES)
