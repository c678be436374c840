"""Admission: lists, limits and the table, against a model in plain Python, without a socket."""

import ipaddress
import mmap
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlisten import Admission
from fastlisten._admission import _key
from fastlisten._core.admission import Table, bytes_for, now, process_ended
from helpers import needs, posix_only
from helpers.admission_model import SECOND, Address, Model, events
from helpers.faults import Faults
from helpers.fuzz_targets import try_examples
from helpers.fuzzing import Fuzz
from helpers.programs import python, run

LIMITS = {"concurrent": 3, "rate": 20.0, "burst": 5}
EVENTS = 20_000
MILLION = 1_000_000


def key(address: Any) -> bytes:
    found = _key(address)
    assert found is not None
    return found


def ask(admission: Admission, address: Any, at: int = SECOND) -> str | None:
    return admission.table.ask(key(address), at)[0]


def compare(seed: int, number: int, sources: int, remembered: int, exact: bool, **options: Any) -> int:
    """Have both answer the same events; returns how many clients were refused.

    exact: no source is forgotten, and both answer alike.  Else the table may let somebody in whom the model
    would not, or have another reason; it never refuses whom the model would let in.
    """
    chance = random.Random(seed)
    admission, model = Admission(sources=remembered, **options), Model(**options)
    inside: dict[Address, list[int]] = {}
    refused = 0
    for what, address, at in events(number, chance, sources):
        if what == "come":
            reason, ticket = admission.table.ask(key(address), at)
            expected = model.reason(address, at)
            same = reason == expected if exact else reason is None or expected is not None
            assert same, (address, at, reason, expected)
            if reason is None and model.admit(address, at):
                inside.setdefault(address, []).append(ticket)
            refused += reason is not None
        elif what == "leave" and inside.get(address):
            admission.table.leave(inside[address].pop())
            model.leave(address)
        elif what == "penalise":
            admission.table.penalise(key(address), at, at + SECOND // 4)
            model.penalise(address, at + SECOND // 4)
        elif what == "release":
            admission.table.release(key(address))
            model.release(address)
    stats = admission.stats()
    assert stats.open == (sum(map(len, inside.values())) if "concurrent" in options else 0)
    assert sum(stats.refused.values()) == refused
    assert (stats.replaced == 0) == exact
    return refused


OPTIONS: dict[str, dict[str, Any]] = {
    "concurrent": {"concurrent": 2},
    "rate": {"rate": 20.0, "burst": 5},
    "all": {
        **LIMITS,
        "deny": ["10.0.0.8/30", "2001:db8::/64"],
        "exempt": ["10.0.0.0/29", "2001:db8:0:1::1"],
        "allow": ["10.0.0.0/25", "2001:db8::/58"],
    },
    "prefixes": {**LIMITS, "prefix4": 29, "prefix6": 61},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_it_answers_as_the_model_does(options: dict[str, Any]) -> None:
    assert compare(1, EVENTS // len(OPTIONS), 200, 65536, exact=True, **options) > EVENTS // 1000


@pytest.mark.parametrize("remembered", [1, 64])
def test_with_more_sources_than_it_remembers_nobody_is_refused_who_is_within_the_limits(
    remembered: int,
) -> None:
    assert compare(2, EVENTS // 4, 400, remembered, exact=False, **LIMITS) > 0


@pytest.mark.soak
def test_a_million_events() -> None:
    assert compare(3, MILLION, 1000, 65536, exact=True, **LIMITS) > MILLION // 100
    assert compare(4, MILLION, 5000, 1024, exact=False, **LIMITS) > MILLION // 1000


def test_random_seeds_and_limits(fuzz: Fuzz) -> None:
    def test(how: settings) -> None:
        @how
        @given(
            st.integers(0, 2**32),
            st.integers(1, 5),
            st.floats(0.5, 500),
            st.integers(1, 20),
            st.booleans(),
        )
        def one(seed: int, concurrent: int, rate: float, burst: int, few: bool) -> None:
            fuzz.count += 1
            options: dict[str, Any] = {"concurrent": concurrent, "rate": rate, "burst": burst}
            if few:
                compare(seed, 200, 5, 65536, exact=True, **options)
            else:
                compare(seed, 300, 200, 8, exact=False, **options)

        one()

    fuzz.run(test, examples=20)


@needs("a C compiler")
def test_the_table_is_whole_after_each_operation(tmp_path: Path) -> None:
    """Also by processes of which some are killed; and whatever one has written leads nowhere outside it."""
    try_examples("admission_fuzz", "admission.h", 500, tmp_path)


# --- lists


@given(
    st.lists(
        st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)).map(
            lambda pair: str(ipaddress.ip_network(pair, strict=False))
        ),
        max_size=8,
    ),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8),
)
@settings(max_examples=200, derandomize=True)
def test_networks_that_overlap_are_what_they_are_together(networks: list[str], numbers: list[int]) -> None:
    admission = Admission(deny=networks)
    for text in networks:  # the edges
        network = ipaddress.ip_network(text)
        numbers += [int(network[0]), int(network[-1]), int(network[0]) - 1, int(network[-1]) + 1]
    for number in numbers:
        if 0 <= number < 2**32:
            address = ipaddress.IPv4Address(number)
            expected = any(address in ipaddress.ip_network(text) for text in networks)
            assert (ask(admission, address) == "denied") == expected


def test_deny_is_asked_before_exempt_and_exempt_before_allow() -> None:
    admission = Admission(
        deny=["192.0.2.1"], exempt=["192.0.2.0/31"], allow=["198.51.100.0/24"], rate=1, burst=1
    )
    assert ask(admission, "192.0.2.1") == "denied"
    assert [ask(admission, "192.0.2.0") for _ in range(3)] == [None] * 3
    assert [ask(admission, "198.51.100.9") for _ in range(2)] == [None, "rate"]
    assert ask(admission, "203.0.113.1") == "not allowed"
    assert ask(admission, "2001:db8::1") == "not allowed"


def test_a_mapped_address_is_one_of_ipv4() -> None:
    for network in ("192.0.2.0/24", "::ffff:192.0.2.0/120"):
        admission = Admission(deny=[network])
        assert ask(admission, "::ffff:192.0.2.9") == "denied"
        assert ask(admission, "192.0.2.9") == "denied"
        assert ask(admission, "::192.0.2.9") is None


@posix_only("Windows has no unix sockets")
def test_unix_users() -> None:
    assert ask(Admission(deny=["unix:"]), "unix:1000") == "denied"
    only = Admission(allow=["unix:1000"])
    assert ask(only, "unix:1000") is None
    assert ask(only, "unix:1001") == "not allowed"
    assert ask(only, "192.0.2.1") == "not allowed"
    each = Admission(concurrent=1)
    assert [ask(each, "unix:1"), ask(each, "unix:2"), ask(each, "unix:1")] == [None, None, "concurrent"]


def test_who_has_no_address_is_in_no_list_and_has_no_limit() -> None:
    nobody = bytes(17)
    assert Admission(allow=["0.0.0.0/0", "::/0"]).table.ask(nobody, SECOND)[0] == "not allowed"
    admission = Admission(deny=["0.0.0.0/0", "::/0"], rate=1, burst=1)
    assert [admission.table.ask(nobody, SECOND)[0] for _ in range(3)] == [None] * 3


# --- limits


def test_a_burst_and_then_the_rate() -> None:
    admission = Admission(rate=10, burst=3)
    answers = [ask(admission, "192.0.2.1", SECOND) for _ in range(4)]
    assert answers == [None, None, None, "rate"]
    step = SECOND // 10
    assert ask(admission, "192.0.2.1", SECOND + step - 1) == "rate"
    assert ask(admission, "192.0.2.1", SECOND + step) is None
    assert ask(admission, "192.0.2.1", SECOND + step) == "rate"
    assert [ask(admission, "192.0.2.1", 3 * SECOND) for _ in range(4)] == answers
    assert ask(admission, "192.0.2.2", 3 * SECOND) is None


def test_without_burst_as_many_as_in_a_second() -> None:
    admission = Admission(rate=7.5)
    assert [ask(admission, "192.0.2.1") for _ in range(8)].count(None) == 7
    admission = Admission(rate=0.5)
    assert [ask(admission, "192.0.2.1") for _ in range(8)].count(None) == 1


def test_a_network_is_one_source() -> None:
    admission = Admission(concurrent=1, prefix4=24, prefix6=48)
    assert ask(admission, "192.0.2.1") is None
    assert ask(admission, "192.0.2.255") == "concurrent"
    assert ask(admission, "192.0.3.1") is None
    assert ask(admission, "2001:db8:0:1::1") is None
    assert ask(admission, "2001:db8:0:2::1") == "concurrent"
    assert ask(admission, "2001:db8:1::1") is None
    everybody = Admission(concurrent=1, prefix4=0, prefix6=0)
    assert [ask(everybody, f"10.0.0.{n}") for n in range(3)] == [None, "concurrent", "concurrent"]


@pytest.mark.parametrize(
    ("address", "same"),
    [
        ("192.0.2.1", "192.0.2.1"),
        (("192.0.2.1", 5000), "192.0.2.1"),
        (("2001:db8::1", 5000, 0, 0), "2001:db8::1"),
        (("::ffff:192.0.2.1", 5000, 0, 0), "192.0.2.1"),
        (("fe80::1%lo", 5000, 0, 1), "fe80::1"),
        (ipaddress.ip_address("192.0.2.1"), "192.0.2.1"),
        pytest.param("unix:1000", "unix:1000", marks=posix_only("Windows has no unix sockets")),
    ],
)
def test_a_handler_s_penalty(address: Any, same: str) -> None:
    admission = Admission(dry_run=False)
    assert ask(admission, same, now()) is None
    admission.penalise(address, 60)
    admission.penalise(address, 1)  # the longer one stays
    assert ask(admission, same, now()) == "penalised"
    assert ask(admission, same, now() + 59 * SECOND) == "penalised"
    assert ask(admission, same, now() + 61 * SECOND) is None
    assert ask(admission, "198.51.100.1", now()) is None
    admission.release(address)
    assert ask(admission, same, now()) is None


@pytest.mark.parametrize("address", ["", "/run/client.sock", b"\0abstract", None])
def test_who_has_no_source_is_not_penalised(address: Any) -> None:
    admission = Admission()
    admission.penalise(address, 60)
    admission.release(address)
    assert admission.stats().sources == 0


def test_exempt_is_who_is_penalised_in_vain() -> None:
    admission = Admission(exempt=["192.0.2.1"], concurrent=1)
    admission.penalise("192.0.2.1", 60)
    assert [ask(admission, "192.0.2.1", now()) for _ in range(3)] == [None] * 3
    assert admission.stats().open == 0


def test_a_dry_run_counts_the_same() -> None:
    chance = random.Random(5)
    real, dry = (Admission(**LIMITS, dry_run=dry) for dry in (False, True))  # type: ignore[arg-type]
    for what, address, at in events(2000, chance, 50):
        if what == "come":
            assert real.table.ask(key(address), at) == dry.table.ask(key(address), at)
    assert real.stats() == dry.stats()
    assert sum(real.stats().refused.values()) > 100


# --- the table


def test_a_source_costs_64_bytes() -> None:
    assert bytes_for(65536 // 8, 0) - bytes_for(0, 0) == 4 * 1024 * 1024


def test_who_has_a_penalty_or_connections_is_forgotten_last() -> None:
    admission = Admission(sources=8, concurrent=1)
    admission.penalise("192.0.2.1", 60)
    at = now()
    assert ask(admission, "192.0.2.2", at) is None  # and stays
    for number in range(100):
        _, ticket = admission.table.ask(key(f"198.51.100.{number}"), at + number)
        admission.table.leave(ticket)
    assert admission.stats().sources == 8
    assert admission.stats().replaced == 94
    assert ask(admission, "192.0.2.1", at) == "penalised"
    assert ask(admission, "192.0.2.2", at) == "concurrent"


def test_a_forgotten_source_s_connections_leave_nobody_else() -> None:
    admission = Admission(sources=1, concurrent=1)
    tickets = [admission.table.ask(key(f"192.0.2.{number}"), SECOND + number)[1] for number in range(20)]
    assert admission.stats().open == 20
    for ticket in tickets[:12]:  # those of sources that are forgotten
        admission.table.leave(ticket)
    assert [ask(admission, f"192.0.2.{number}") for number in range(12, 20)] == ["concurrent"] * 8
    for ticket in tickets[12:]:
        admission.table.leave(ticket)
    assert admission.stats().open == 0


def test_more_connections_than_can_be_counted_come_in() -> None:
    table = Table(mmap.mmap(-1, bytes_for(1, 2)), 1, 2, b"", b"", b"", b"", 5, 0, 0, 32, 64, False)
    tickets = [table.ask(key("192.0.2.1"), SECOND) for _ in range(4)]
    assert tickets == [(None, 1), (None, 2), (None, 0), (None, 0)]
    table.leave(2)
    assert table.ask(key("192.0.2.1"), SECOND) == (None, 2)


@needs("Linux")
def test_no_memory_for_a_table_is_an_error_and_no_more() -> None:
    program = """
import errno, os, resource
from fastlisten import Admission
small = Admission(concurrent=1)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + 2**24,) * 2)
for _ in range(3):
    try:
        Admission(sources=2**22)
    except OSError as error:
        assert error.errno == errno.ENOMEM
    else:
        raise AssertionError("there was memory")
Admission(sources=8)
free = os.open("/dev/null", os.O_RDONLY)
os.close(free)
resource.setrlimit(resource.RLIMIT_NOFILE, (free, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
for _ in range(2):
    try:
        small.share()  # with workers
    except OSError as error:
        assert error.errno == errno.EMFILE
    else:
        raise AssertionError("there was a descriptor")
resource.setrlimit(resource.RLIMIT_NOFILE, (free + 9, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
what, name = small.share()
print(isinstance(name, int), small.stats())
"""
    assert run(program).stdout.startswith("True AdmissionStats(admitted=0")


@needs("Linux", "a C compiler", "calls that go to libc")
def test_no_memory_for_an_admission_is_an_error_and_no_more(faults: Faults) -> None:
    program = """
import json
from fastlisten import Admission
from helpers.faults import FASTLISTENS, change_plan, given, meant_for
meant_for(FASTLISTENS)
Admission()
change_plan(malloc=[("ENOMEM", 1)])
try:
    Admission()
except MemoryError:
    print(json.dumps([given("malloc"), Admission().stats().sources]))
"""
    assert faults.python(program) == [1, 0]


def test_threads_share_it() -> None:
    admission = Admission(concurrent=1000, sources=16)
    wrong = []

    def come_and_go(number: int) -> None:
        for step in range(2000):
            reason, ticket = admission.table.ask(key(f"192.0.2.{(number + step) % 40}"), now())
            if reason is not None or not ticket:
                wrong.append(reason)
            admission.table.leave(ticket)

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert (admission.stats().open, admission.stats().admitted) == (0, 8000)


def locked_table(process: int) -> tuple[Table, mmap.mmap]:
    """Return a table whose lock a process has, and its memory."""
    memory = mmap.mmap(-1, bytes_for(8, 64))
    table = Table(memory, 8, 64, os.urandom(16), b"", b"", b"", 2, 0, 0, 32, 64, False)
    assert [table.ask(key("192.0.2.1"), SECOND)[0] for _ in range(3)] == [None, None, "concurrent"]
    memory[:8] = (process << 32 | 7).to_bytes(8, "little")
    return table, memory


def test_a_lock_whose_holder_has_ended_is_taken_from_it() -> None:
    table, memory = locked_table(12345)
    memory[36:40] = bytes(4)  # and it has lost count of the free ones
    assert table.ask(key("192.0.2.1"), SECOND)[0] == "concurrent"
    assert table.counts()["open"] == 2


def test_a_process_s_end_frees_its_lock_at_once() -> None:
    table, _ = locked_table(12345)
    process_ended(12345)
    assert table.ask(key("192.0.2.1"), SECOND)[0] == "concurrent"


def test_a_process_s_end_is_the_end_of_its_connections() -> None:
    admission = Admission(concurrent=2)
    assert [ask(admission, "192.0.2.1") for _ in range(3)] == [None, None, "concurrent"]
    process_ended(os.getpid() + 1)
    assert ask(admission, "192.0.2.1") == "concurrent"
    process_ended(os.getpid())
    assert admission.stats().open == 0
    assert ask(admission, "192.0.2.1") is None


@needs("fork")
def test_a_forked_child_shares_it_and_its_parent_s_connections_are_not_its_own() -> None:
    program = """
import os
from fastlisten import Admission
from fastlisten._admission import _key

admission = Admission(concurrent=2)
here = admission.table.ask(_key("192.0.2.1"), 10**9)
if os.fork() == 0:
    admission.table.leave(here[1])
    assert admission.table.ask(_key("192.0.2.1"), 10**9)[0] is None
    assert admission.table.ask(_key("192.0.2.1"), 10**9)[0] == "concurrent"
    os._exit(0)
_, status = os.wait()
assert status == 0
assert admission.table.ask(_key("192.0.2.1"), 10**9)[0] == "concurrent"
print(admission.stats().open)
"""
    assert run(program).stdout == "2\n"


@needs("fork")
def test_processes_that_are_killed_at_any_moment_leave_nothing_behind() -> None:
    """Some have the lock then: nobody waits for that longer than until their end is heard of."""
    program = """
import json, os, random, signal, time
from fastlisten import Admission
from fastlisten._admission import _key
from fastlisten._core.admission import process_ended

admission = Admission(concurrent=1000000, sources=8)
keys = [_key(f"192.0.2.{number}") for number in range(20)]

def hammer():
    tickets = []
    while True:
        for key in keys:
            tickets.append(admission.table.ask(key, time.monotonic_ns())[1])
        while len(tickets) > 40:
            admission.table.leave(tickets.pop(0))

def begin():
    child = os.fork()
    if child == 0:
        try:
            hammer()
        finally:
            os._exit(1)
    return child

chance = random.Random(8)
children = [begin() for _ in range(3)]
for _ in range(40):
    before, end = admission.stats().admitted, time.monotonic() + 20
    while admission.stats().admitted < before + 100 + chance.randrange(100) and time.monotonic() < end:
        pass
    victim = children.pop(chance.randrange(3))
    os.kill(victim, signal.SIGKILL)
    assert os.waitpid(victim, 0)[1] == signal.SIGKILL
    process_ended(victim)
    children.append(begin())
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    process_ended(child)
assert admission.table.ask(keys[0], time.monotonic_ns())[1]
print(json.dumps([admission.stats().open, admission.stats().admitted > 4000]))
"""
    assert python(program) == [1, True]


def test_memory_that_lies_leads_nowhere_outside_it() -> None:
    memory = mmap.mmap(-1, bytes_for(1, 8))
    chance = random.Random(6)
    table = Table(memory, 1, 8, b"", b"", b"", b"", 2, 0, 0, 32, 64, False)
    tickets = [table.ask(key("192.0.2.1"), SECOND)[1] for _ in range(2)]
    for _ in range(200):
        noise = bytearray(chance.randbytes(len(memory)))
        noise[:8] = bytes(8)  # the lock is free
        memory[:] = bytes(noise)
        for number in range(4):
            table.ask(key(f"192.0.2.{number}"), SECOND)
        for ticket in tickets:
            table.leave(ticket)
        process_ended(os.getpid())


# --- bad input


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"rate": 0}, ValueError, "rate must be above 0"),
        ({"rate": -1.0}, ValueError, "rate must be above 0"),
        ({"rate": float("nan")}, ValueError, "rate must be above 0"),
        ({"rate": 1e10}, ValueError, "at most 1e9"),
        ({"rate": "10"}, TypeError, "rate must be a number of connections a second, not str"),
        ({"burst": 5}, ValueError, "burst is only meaningful with rate"),
        ({"rate": 1, "burst": 0}, ValueError, "burst must be from 1"),
        ({"rate": 0.001, "burst": 2**31 - 1}, ValueError, "too many to count"),
        ({"concurrent": 0}, ValueError, "concurrent must be from 1"),
        ({"concurrent": 2.5}, TypeError, "concurrent must be an int, not float"),
        ({"prefix4": 33}, ValueError, "prefix4 must be from 0 to 32, not 33"),
        ({"prefix6": 129}, ValueError, "prefix6 must be from 0 to 128, not 129"),
        ({"prefix6": -1}, ValueError, "prefix6 must be from 0"),
        ({"sources": 10**9}, ValueError, "sources must be from 1 to 4194304, not 1000000000"),
        ({"sources": 0}, ValueError, "sources must be from 1"),
        ({"allow": "10.0.0.0/8"}, TypeError, "allow must be several networks, not str"),
        ({"deny": 10}, TypeError, "deny must be several networks, not int"),
        ({"deny": ["10.0.0.0/33"]}, ValueError, "deny: '10.0.0.0/33'"),
        ({"deny": ["10.0.0.1/8"]}, ValueError, "deny: 10.0.0.1/8 has host bits set"),
        ({"exempt": ["somewhere"]}, ValueError, "exempt: 'somewhere'"),
        ({"exempt": ["fe80::%lo/64"]}, ValueError, "exempt: .* scope"),
        pytest.param(
            {"deny": ["unix:root"]},
            ValueError,
            "deny: 'unix:root' is no user",
            marks=posix_only("Windows has no unix sockets"),
        ),
    ],
)
def test_what_cannot_be_meant(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Admission(**options)


@pytest.mark.parametrize(
    ("address", "seconds", "error", "text"),
    [
        ("10.0.0.0/8", 1, ValueError, "none of one client"),
        ("nowhere", 1, ValueError, "address: 'nowhere'"),
        (7, 1, TypeError, "address must be text or an address, not int"),
        ("192.0.2.1", -1, ValueError, "seconds must not be negative"),
        ("192.0.2.1", float("nan"), ValueError, "seconds must not be negative"),
        ("192.0.2.1", "1", TypeError, "seconds must be a number, not str"),
    ],
)
def test_a_penalty_that_cannot_be_meant(
    address: Any, seconds: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Admission().penalise(address, seconds)
