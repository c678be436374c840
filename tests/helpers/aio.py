"""What the asyncio tests share: loops to run on, a server for a test, and a protocol that takes notes."""

import asyncio
import contextlib
import importlib.util
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import pytest

from fastlisten import aio
from helpers import LIMIT, not_under_wine
from helpers.internals import pretend_a_proactor, set_polling

T = TypeVar("T")

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.SelectorEventLoop}
if importlib.util.find_spec("uvloop"):
    import uvloop

    LOOPS["uvloop"] = uvloop.new_event_loop

    async def _first() -> None:
        await asyncio.get_running_loop().getaddrinfo("127.0.0.1", 0)

    # The first loop of a process opens a pipe, and its first look-up starts threads, for good: not in the
    # middle of a test that counts them.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as _runner:
        _runner.run(_first())

# Each way in which a hub watches its descriptors, on each loop.
WAYS = [(loop, polled) for loop in LOOPS for polled in (True, False)]

# Loops on which a Listener can be awaited.
AWAIT_LOOPS = {**LOOPS}
if hasattr(asyncio, "ProactorEventLoop"):
    AWAIT_LOOPS["proactor"] = asyncio.ProactorEventLoop
else:
    AWAIT_LOOPS["as if on a proactor"] = asyncio.SelectorEventLoop


class Run:
    """Runs coroutines, each on a loop of its own; what the loop's exception handler is told is kept."""

    def __init__(self, loop: str) -> None:
        self.loop = loop
        self.reports: list[dict[str, Any]] = []

    def __call__(self, main: Coroutine[Any, Any, Any], limit: float = LIMIT) -> Any:
        async def limited() -> Any:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: self.reports.append(context))
            async with asyncio.timeout(limit):
                return await main

        with asyncio.Runner(loop_factory=AWAIT_LOOPS[self.loop]) as runner:
            return runner.run(limited())

    def messages(self) -> list[str]:
        return [report["message"] for report in self.reports]


@pytest.fixture(params=WAYS, ids=[f"{loop}-{'poller' if p else 'no poller'}" for loop, p in WAYS])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    loop, polled = request.param
    set_polling(monkeypatch, polled)
    return Run(loop)


@pytest.fixture(params=AWAIT_LOOPS)
def run_awaits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    if request.param == "as if on a proactor":
        pretend_a_proactor(monkeypatch)
    return Run(request.param)


class Notes(asyncio.Protocol):
    """Notes what happened, and lets a test wait for it."""

    transport: aio.Transport
    keep_open = False

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.data = b""
        self.lost: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        self._changed = asyncio.Event()

    def note(self, event: Any) -> None:
        self.events.append(event)
        self._changed.set()

    async def until(self, condition: Callable[["Notes"], Any]) -> None:
        """Wait until the condition is true of this protocol, asked after each event."""
        while not condition(self):
            self._changed.clear()
            await self._changed.wait()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.note("made")

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.note("data")

    def eof_received(self) -> bool:
        self.note("eof")
        return self.keep_open

    def pause_writing(self) -> None:
        self.note("pause")

    def resume_writing(self) -> None:
        self.note("resume")

    def connection_lost(self, error: BaseException | None) -> None:
        self.note("lost")
        self.lost.set_result(error)  # a second time is an InvalidStateError


class Echo(Notes):
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.write(data)


@contextlib.asynccontextmanager
async def server(
    factory: Callable[[], Any] = Notes, create: Any = aio.create_server, **options: Any
) -> AsyncIterator[Any]:
    """Serve on a free port; the protocols made are in its `made`, its address in `address`."""
    made: list[Any] = []

    def note() -> Any:
        made.append(factory())
        return made[-1]

    where = () if "sock" in options else ("127.0.0.1", 0)
    running = await create(note, *where, **options)
    try:
        yield Serving(running, made)
    finally:
        running.close()
        for protocol in made:
            transport = getattr(protocol, "transport", None)
            if transport is not None:
                transport.abort()
        await asyncio.sleep(0)
        await running.wait_closed()
        await asyncio.sleep(0)


class Serving:
    def __init__(self, running: Any, made: list[Any]) -> None:
        self.server = running
        self.made = made
        self.address = running.sockets[0].getsockname()

    async def first(self) -> Any:
        """Wait for the first protocol and its connection."""
        while not (self.made and self.made[0].events):
            await asyncio.sleep(0)
        return self.made[0]


def asyncios(*args: Any, **options: Any) -> Any:
    """loop.create_server() of the loop that runs: the same as ours, made by asyncio or uvloop."""
    return asyncio.get_running_loop().create_server(*args, **options)


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


# asyncio's executor reads the file that the kernel cannot send.
files_are_read = not_under_wine("an executor loses one of some thousand jobs, of asyncio's own, too")


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


SMALL_BUFFER = 4096


BIG = 8 << 20
