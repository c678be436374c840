"""A server in each way of serving, in a thread of its own, for tests in which its system calls fail."""

import asyncio
import contextlib
import os
import select
import socketserver as original
import threading
from collections.abc import Callable
from typing import Any

import fastlisten
from fastlisten import Admission, Proxy, aio, socketserver
from helpers.internals import set_polling
from helpers.proxy_headers import inet, v2
from helpers.waiting import LIMIT

BIG = b"x" * (8 << 20)  # more than the kernel takes at once
LOOPBACK = ("127.0.0.1", 0)


def answered(fd: int) -> bool:
    """Send back what a client says, by calls that are not fastlisten's; False if it has said nothing yet."""
    with contextlib.suppress(BlockingIOError):
        os.write(fd, os.read(fd, 100))
        return True
    return False


def answer(fd: int) -> None:
    """Send back what a client says first."""
    while not answered(fd):
        select.select([fd], [], [])


class Served:
    """A server that runs in a thread of its own until stop(), or until an error comes out of it.

    `at_beginning` is called just before it begins to serve.  `raised` is what came out of the calls that a
    user makes, `reported` what an event loop's exception handler was told.  After stop() and join(), close()
    closes what the server left open.  `listener` has the counters and can be paused.  `greeting` is what a
    client sends before all else.
    """

    listener: Any
    greeting = b""

    def __init__(self) -> None:
        self.raised: list[BaseException] = []
        self.reported: list[str] = []
        self.address: Any = None
        self.ready = threading.Event()
        self.over = False  # it was told to stop
        self._ended = False
        self.pause = threading.Event()  # never set
        self.at_beginning: Callable[[], None] = lambda: None
        self.thread = threading.Thread(target=self._run)

    def start(self) -> None:
        """Serve; return when clients may come, or when it is over."""
        self.thread.start()
        assert self.ready.wait(LIMIT), "it does not begin"

    def ended(self) -> bool:
        """Whether nobody is served any more."""
        return self._ended

    def join(self) -> bool:
        """Wait for the end; False if there is none."""
        self.thread.join(LIMIT)
        return not self.thread.is_alive()

    def _run(self) -> None:
        try:
            self.run()
        except Exception as error:
            self.raised.append(error)
        finally:
            self._ended = True
            self.ready.set()

    def run(self) -> None:
        raise NotImplementedError

    def stats(self) -> Any:
        return self.listener.stats()

    def pause_and_resume(self) -> None:
        self.listener.pause()
        self.listener.resume()

    def stop(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


class OnListener(Served):
    """A Listener that is served in this thread by `serve(listener)`."""

    def __init__(self, serve: Callable[[Any, Any], None], listeners: int = 1) -> None:
        super().__init__()
        self.serve = serve
        self.listeners = [fastlisten.bind(LOOPBACK) for _ in range(listeners)]
        self.listener = self.listeners[-1]
        self.address = self.listener.getsockname()

    def run(self) -> None:
        self.at_beginning()
        self.ready.set()
        self.serve(self, *self.listeners)

    def stop(self) -> None:
        self.over = True
        self.listener.stop()

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()


def by_serve(**options: Any) -> Callable[..., None]:
    def serve(served: Served, *listeners: Any) -> None:
        fastlisten.serve(lambda connection: answer(connection.fileno()), *listeners, **options)

    return serve


def by_accept(served: Served, listener: Any) -> None:
    listener.settimeout(0.02)
    while not served.over:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        except OSError as error:  # the next call may work
            served.raised.append(error)
            served.pause.wait(0.002)
            continue
        with connection:
            answer(connection.fileno())


def by_iteration(served: Served, listener: Any) -> None:
    for connection in listener:
        answer(connection.fileno())
        try:
            connection.close()
        except OSError as error:
            served.raised.append(error)


class OnLoop(Served):
    """What an event loop serves by `main()`, which is over when `stopping` is set."""

    loop: asyncio.AbstractEventLoop
    stopping: asyncio.Event

    def run(self) -> None:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            self.loop = runner.get_loop()
            self.loop.set_exception_handler(lambda _, context: self.reported.append(context["message"]))
            runner.run(self.main())

    async def main(self) -> None:
        raise NotImplementedError

    def call(self, act: Callable[[], Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(act)


class Awaited(OnLoop):
    """A Listener whose clients are awaited, by accept_async() or by `async for`."""

    def __init__(self, iterated: bool) -> None:
        super().__init__()
        self.iterated = iterated
        self.listener = fastlisten.bind(LOOPBACK)
        self.address = self.listener.getsockname()

    async def main(self) -> None:
        self.task = asyncio.current_task()
        self.at_beginning()
        self.ready.set()
        with contextlib.suppress(asyncio.CancelledError):
            await (self.iterate() if self.iterated else self.accept())

    async def iterate(self) -> None:
        async for connection in self.listener:
            await self.answer(connection.fileno())
            try:
                connection.close()
            except OSError as error:
                self.raised.append(error)

    async def accept(self) -> None:
        while not self.over:
            try:
                connection, _ = await self.listener.accept_async()
            except OSError as error:  # the next call may work
                self.raised.append(error)
                await asyncio.sleep(0.002)
                continue
            with connection:
                await self.answer(connection.fileno())

    async def answer(self, fd: int) -> None:
        while not answered(fd):
            await asyncio.sleep(0.001)

    def stop(self) -> None:
        self.over = True
        if self.iterated:
            self.listener.stop()
        elif self.task is not None:
            self.call(self.task.cancel)

    def close(self) -> None:
        self.listener.close()


class Answers(asyncio.Protocol):
    """Sends back what comes first, or much when that is "big", and then waits for the client's end."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(BIG if data == b"big" else data)
        if data != b"big":
            self.transport.close()


async def answer_stream(reader: Any, writer: Any) -> None:
    with contextlib.suppress(OSError):
        data = await reader.read(100)
        writer.write(BIG if data == b"big" else data)
        if data == b"big":
            await reader.read(100)
    writer.close()


class OnServer(OnLoop):
    """A server of fastlisten.aio."""

    def __init__(self, create: Callable[..., Any], handler: Any, polled: bool = True, **options: Any) -> None:
        super().__init__()
        self.polled = polled
        self.create: Callable[[], Any] = lambda: create(handler, *LOOPBACK, **options)
        self.server: Any = None

    async def main(self) -> None:
        self.stopping = asyncio.Event()
        set_polling(None, self.polled)
        self.at_beginning()
        self.server = await self.create()
        self.address = self.server.sockets[0].getsockname()
        self.ready.set()
        try:
            await self.stopping.wait()
        finally:
            self.server.close()
            await self.server.wait_closed()

    def stats(self) -> Any:
        return self.server.stats()

    def pause_and_resume(self) -> None:
        self.call(self.server.pause)
        self.call(self.server.resume)

    def stop(self) -> None:
        self.call(self.stopping.set)


class DropIn(Served):
    """The ThreadingTCPServer of fastlisten.socketserver."""

    class Handler(original.BaseRequestHandler):
        def handle(self) -> None:
            answer(self.request.fileno())

    def __init__(self) -> None:
        super().__init__()
        self.server = socketserver.ThreadingTCPServer(LOOPBACK, self.Handler)
        self.listener = self.server.socket
        self.address = self.server.server_address

    def run(self) -> None:
        self.at_beginning()
        self.ready.set()
        self.server.serve_forever()

    def stop(self) -> None:
        threading.Thread(target=self.server.shutdown).start()

    def close(self) -> None:
        self.server.server_close()


BUSY: dict[str, Any] = {"busy": b"full", "pending": 0, "max_connections": 1}
RESETS: dict[str, Any] = {"busy": "reset", "pending": 0, "max_connections": 1}

FOREVER = 60.0  # nobody's time is over


def speaking_first() -> dict[str, Any]:
    return {"first_bytes": FOREVER, "admission": Admission(concurrent=1000)}


def proxied() -> dict[str, Any]:
    return {**speaking_first(), "proxy": Proxy(["127.0.0.1"], timeout=FOREVER)}


def greeted(served: Served) -> Served:
    served.greeting = v2(inet())
    return served


MODES: dict[str, Callable[[], Served]] = {
    "accept()": lambda: OnListener(by_accept),
    "for": lambda: OnListener(by_iteration),
    "serve() inline": lambda: OnListener(by_serve()),
    "serve() threads": lambda: OnListener(by_serve(threads=2)),
    "serve() range": lambda: OnListener(by_serve(threads=(1, 4))),
    "serve() several": lambda: OnListener(by_serve(), listeners=2),
    "serve() busy": lambda: OnListener(by_serve(**BUSY)),
    "serve() busy threads": lambda: OnListener(by_serve(threads=2, **RESETS)),
    "ThreadingTCPServer": DropIn,
    "accept_async()": lambda: Awaited(iterated=False),
    "async for": lambda: Awaited(iterated=True),
    "create_server()": lambda: OnServer(aio.create_server, Answers),
    "create_server() no poller": lambda: OnServer(aio.create_server, Answers, polled=False),
    "start_server()": lambda: OnServer(aio.start_server, answer_stream),
    "create_server() busy": lambda: OnServer(aio.create_server, Answers, **BUSY),
    "start_server() busy": lambda: OnServer(aio.start_server, answer_stream, **RESETS),
    "serve() first bytes": lambda: OnListener(by_serve(**speaking_first())),
    "serve() proxy": lambda: greeted(OnListener(by_serve(threads=2, **proxied()))),
    "serve() busy proxy": lambda: greeted(OnListener(by_serve(**proxied(), **BUSY))),
    "create_server() first bytes": lambda: OnServer(aio.create_server, Answers, **speaking_first()),
    "create_server() proxy": lambda: greeted(OnServer(aio.create_server, Answers, **proxied())),
}
