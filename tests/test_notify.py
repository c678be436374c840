"""Notifier: the datagrams of sd_notify(3), and a watchdog that is fed by the progress of what it watches."""

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fastlisten
from fastlisten import Listener, Notifier
from helpers import LIMIT, Serving, connect, exchange, needs, posix_only, serving, wait_until
from helpers.descriptors import out_of_descriptors
from helpers.managers import Manager, manager
from helpers.programs import python

pytestmark = [needs("unix sockets"), posix_only("there are no datagrams between unix sockets")]


@pytest.fixture(params=["path", pytest.param("abstract", marks=needs("Linux"))])
def told(request: pytest.FixtureRequest, unix_path: str) -> Iterator[Manager]:
    """Give a manager at an address of either kind."""
    with manager(unix_path if request.param == "path" else f"@{unix_path}") as told:
        yield told


@pytest.fixture
def at_path(unix_path: str) -> Iterator[Manager]:
    with manager(unix_path) as at_path:
        yield at_path


def of(manager: Manager, **variables: str) -> Notifier:
    return Notifier({"NOTIFY_SOCKET": manager.address, **variables})


# --- what is told ---------------------------------------------------------------------------------


def test_each_message_is_one_datagram(told: Manager) -> None:
    with of(told) as notifier:
        assert notifier
        sent = [
            notifier.ready(),
            notifier.ready("listening", main_pid=17),
            notifier.stopping("soon over"),
            notifier.status("half\tdone: ½"),
            notifier.main_pid(18),
            notifier.remove("a b"),
            notifier.send("EXTEND_TIMEOUT_USEC=1", "X_OWN=2"),
        ]
        assert sent == [True] * 7
        assert [told.message() for _ in sent] == [
            ["READY=1"],
            ["READY=1", "MAINPID=17", "STATUS=listening"],
            ["STOPPING=1", "STATUS=soon over"],
            ["STATUS=half\tdone: ½"],
            ["MAINPID=18"],
            ["FDSTOREREMOVE=1", "FDNAME=a b"],
            ["EXTEND_TIMEOUT_USEC=1", "X_OWN=2"],
        ]


def test_a_reload_says_when(at_path: Manager) -> None:
    with of(at_path) as notifier:
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        notifier.reloading("new certificates")
        reloading, clock, status = at_path.message()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        assert (reloading, status) == ("RELOADING=1", "STATUS=new certificates")
        assert before <= int(clock.removeprefix("MONOTONIC_USEC=")) <= after


def test_listeners_are_stored_and_stay_the_caller_s(at_path: Manager, listener: Listener) -> None:
    with of(at_path) as notifier, socket.socket() as other:
        assert notifier.store(listener, other.fileno(), name="web", poll=False)
        lines, numbers = at_path.with_descriptors()
        assert lines == ["FDSTORE=1", "FDNAME=web", "FDPOLL=0"]
        assert len(numbers) == 2
        os.close(numbers[1])
        with socket.socket(fileno=numbers[0]) as stored:
            assert stored.getsockname() == listener.getsockname()
        assert exchange_with(listener) == b"ping"
        notifier.store(other)
        assert at_path.message() == ["FDSTORE=1"]


def exchange_with(listener: Listener) -> bytes:
    with serving(listener, lambda connection: connection.sendall(connection.recv(100))):
        return exchange(listener)


def test_without_a_manager_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    for notifier in (Notifier(), Notifier({}), Notifier({"NOTIFY_SOCKET": "", "WATCHDOG_USEC": "1000"})):
        with notifier:
            assert not notifier
            assert notifier.interval is None
            told = [notifier.ready("x"), notifier.reloading(), notifier.stopping(), notifier.status("x")]
            told += [notifier.main_pid(1), notifier.store(0), notifier.remove("x"), notifier.send("A=1")]
            assert told == [False] * 8
            notifier.feed()


def test_the_environment_is_read_and_left(at_path: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", at_path.address)
    with Notifier() as notifier:
        notifier.ready()
    assert at_path.message() == ["READY=1"]
    assert os.environ["NOTIFY_SOCKET"] == at_path.address
    assert not notifier.ready()  # it is closed
    notifier.close()


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["vsock:2:1234", "run/notify", "@", "tcp"])
def test_another_kind_of_address(address: str) -> None:
    with pytest.raises(ValueError, match="NOTIFY_SOCKET must be a path or an abstract name"):
        Notifier({"NOTIFY_SOCKET": address})


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"WATCHDOG_USEC": "soon"}, "WATCHDOG_USEC must be a number, not 'soon'"),
        ({"WATCHDOG_USEC": "0"}, "WATCHDOG_USEC must be at least 1, not 0"),
        ({"WATCHDOG_USEC": "1", "WATCHDOG_PID": "-1"}, "WATCHDOG_PID must be a number, not '-1'"),
    ],
)
def test_a_watchdog_that_cannot_be_read(variables: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Notifier({"NOTIFY_SOCKET": "/nowhere", **variables})


def test_what_cannot_be_sent(at_path: Manager) -> None:
    with of(at_path) as notifier:
        wrongs: list[Callable[[], object]] = [
            lambda: notifier.status("two\nREADY=1"),
            lambda: notifier.store(),
            lambda: notifier.store(*[0] * 254),
            lambda: notifier.store(0, name="a:b"),
            lambda: notifier.store(0, name=""),
            lambda: notifier.remove("é"),
            lambda: notifier.remove("a" * 256),
        ]
        for wrong in wrongs:
            with pytest.raises(ValueError, match=r"more than one line|1 to 253 files|names no desc|empty"):
                wrong()
        assert at_path.tells_nothing()


def test_a_manager_that_has_gone(unix_path: str, caplog: pytest.LogCaptureFixture) -> None:
    with manager(unix_path) as gone:
        notifier = of(gone, WATCHDOG_USEC="1000")
    with notifier:
        with pytest.raises(ConnectionRefusedError):
            notifier.ready()
        os.unlink(unix_path)
        with pytest.raises(FileNotFoundError):
            notifier.ready()
        for _ in range(3):
            notifier.feed()
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "watchdog is not fed" in caplog.text


def test_feeding_waits_for_no_manager(at_path: Manager) -> None:
    with of(at_path, WATCHDOG_USEC="1000") as notifier:
        begun = time.monotonic()
        for _ in range(1000):  # far more than its queue takes: unix(7), max_dgram_qlen
            notifier.feed()
        assert time.monotonic() - begun < LIMIT
        assert at_path.message() == ["WATCHDOG=1"]


@needs("signals between processes")
def test_feeding_needs_no_free_descriptor(at_path: Manager) -> None:
    with of(at_path, WATCHDOG_USEC="1000") as notifier:
        with out_of_descriptors():
            notifier.feed()
        assert at_path.message() == ["WATCHDOG=1"]


# --- whom the watchdog watches --------------------------------------------------------------------


def test_half_of_the_time_is_the_interval(at_path: Manager) -> None:
    own, other = str(os.getpid()), str(os.getppid())
    for variables, interval in [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": own}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": other}, None),
    ]:
        with of(at_path, **variables) as notifier:
            assert notifier.interval == interval


class Fed:
    """A watchdog that counts."""

    interval: float | None = 0.02

    def __init__(self) -> None:
        self.count = 0
        self.thread = 0

    def feed(self) -> None:
        self.count += 1
        self.thread = threading.get_ident()

    def more(self, than: int) -> bool:
        return self.count > than + 2  # one may have been on its way


MODES = [{}, {"threads": 2}, {"threads": (1, 2)}, {"threads": 2, "pending": 1, "busy": b"busy"}]


@pytest.mark.parametrize("options", MODES)
def test_an_idle_loop_feeds(listener: Listener, options: dict[str, Any]) -> None:
    fed = Fed()
    with serving(listener, print, watchdog=fed, **options):
        wait_until(lambda: fed.more(0))
        listener.pause()
        paused = fed.count
        wait_until(lambda: fed.more(paused))
        listener.resume()
    after = fed.count
    with serving(listener, print, **options), connect(listener):  # another serve() feeds nobody
        wait_until(lambda: listener.stats().handled == 1)
    assert fed.count == after


def test_a_loop_at_its_limit_feeds(listener: Listener) -> None:
    fed, stuck = Fed(), Stuck()
    options: dict[str, Any] = {"threads": 2, "max_connections": 1}
    with serving(listener, stuck, watchdog=fed, **options), connect(listener), connect(listener):
        try:
            wait_until(lambda: stuck.count == 1)
            busy = fed.count
            wait_until(lambda: fed.more(busy))
        finally:
            stuck.let_go.set()


class Stuck:
    """A handler that is stuck, in as many threads as it is called in, until it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.count = 0

    def __call__(self, connection: Any) -> None:
        self.count += 1
        assert self.let_go.wait(LIMIT)


def no_food_for(fed: Fed, seconds: float) -> bool:
    """Tell whether nothing is fed any more for so long, ten intervals; what was on its way came before."""
    begun, count = time.monotonic(), fed.count
    while time.monotonic() - begun < seconds:
        if fed.count != count:
            return False
        threading.Event().wait(0.005)
    return True


@pytest.mark.parametrize("options", MODES)
def test_a_loop_that_is_stuck_does_not_feed(listener: Listener, options: dict[str, Any]) -> None:
    fed, stuck = Fed(), Stuck()
    workers = 2 if options else 1
    with contextlib.ExitStack() as stack:
        stack.enter_context(serving(listener, stuck, watchdog=fed, **options))
        stack.callback(stuck.let_go.set)
        for _ in range(workers):
            before = stuck.count
            stack.enter_context(connect(listener))
            wait_until(lambda: stuck.count > before)  # noqa: B023  # it is over within this round
        if workers > 1:  # all are busy, and nobody waits: that is no fault
            busy = fed.count
            wait_until(lambda: fed.more(busy))
        stack.enter_context(connect(listener))  # waits in vain
        wait_until(lambda: no_food_for(fed, 0.2))
        assert stuck.count == workers
        stuck.let_go.set()
        again = fed.count
        wait_until(lambda: fed.more(again))


def test_who_refuses_all_clients_is_stuck(listener: Listener) -> None:
    fed, stuck = Fed(), Stuck()
    with contextlib.ExitStack() as stack:
        stack.enter_context(serving(listener, stuck, watchdog=fed, threads=1, pending=0, busy=b"busy"))
        stack.callback(stuck.let_go.set)
        stack.enter_context(connect(listener))
        wait_until(lambda: stuck.count == 1)
        end = threading.Event()

        def clients() -> None:
            while not end.is_set():
                assert exchange(listener, b"") == b"busy"

        coming = Serving(clients)
        try:
            wait_until(lambda: no_food_for(fed, 0.2))
        finally:
            end.set()
            coming.wait()
        again = fed.count
        wait_until(lambda: fed.more(again))  # nobody comes any more


def test_only_who_is_watched_looks_up(listener: Listener) -> None:
    fed = Fed()
    fed.interval = None
    with serving(listener, print, watchdog=fed), connect(listener):
        wait_until(lambda: listener.stats().handled == 1)
    assert fed.count == 0


@pytest.mark.parametrize("watchdog", [1, object(), "yes"])
def test_what_is_no_watchdog_is_refused(listener: Listener, watchdog: Any) -> None:
    with pytest.raises(
        TypeError, match=f"watchdog must be a Notifier or None, not {type(watchdog).__name__}"
    ):
        listener.serve(print, watchdog=watchdog)


def test_serve_feeds_the_manager(at_path: Manager, listener: Listener) -> None:
    with of(at_path, WATCHDOG_USEC="40000") as notifier, serving(listener, print, watchdog=notifier):
        assert [at_path.message() for _ in range(5)] == [["WATCHDOG=1"]] * 5


def test_an_event_loop_feeds_while_it_comes_round(at_path: Manager) -> None:
    async def main(notifier: Notifier) -> None:
        feeding = asyncio.create_task(notifier.feeding())
        for _ in range(3):
            assert await asyncio.to_thread(at_path.message) == ["WATCHDOG=1"]
        feeding.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await feeding

    with of(at_path, WATCHDOG_USEC="40000") as notifier:
        asyncio.run(main(notifier))
    with Notifier({}) as nobody:
        asyncio.run(nobody.feeding())


# --- imports --------------------------------------------------------------------------------------


def test_nothing_of_it_is_imported_by_who_is_not_managed() -> None:
    program = "import sys, fastlisten.cli; print(int('fastlisten._notify' in sys.modules))"
    assert python(program) == 0
    assert fastlisten.Notifier is Notifier
