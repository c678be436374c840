"""The transport of fastlisten.aio under faults: failing calls, forks, lost clients."""

import contextlib
import json
import random
import socket
import sys
from typing import Any

import pytest

from helpers import LIMIT, connect, needs, posix_only, reset
from helpers.aio import LOOPS, WAYS, run
from helpers.faults import Faults
from helpers.programs import check, line_of, running
from helpers.programs import run as run_program

__all__ = ["run"]  # a fixture


FAULTY_SERVER = """
import asyncio, functools, json, sys
from helpers.aio import Run
from fastlisten import aio
from helpers.internals import set_polling

made = lost = 0

class Echo(asyncio.Protocol):
    gone = False
    def connection_made(self, transport):
        global made
        made += 1
        self.transport = transport
    def data_received(self, data):
        assert not self.gone
        self.transport.write(data)
    def eof_received(self):
        assert not self.gone
    def connection_lost(self, error):
        global lost
        assert not self.gone
        self.gone = True
        lost += 1

async def main():
    loop = asyncio.get_running_loop()
    server = await aio.create_server(Echo, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    while server.stats().active or server.stats().queue_depth:
        await asyncio.sleep(0.01)
    stats = server.stats()
    server.close()
    await server.wait_closed()
    return [stats.accepted, stats.handled, stats.active, made, lost]

name, polled = sys.argv[1:]
set_polling(None, polled == "True")
run = Run(name)
print(json.dumps([run(main(), 60), run.messages()]))
"""


def faulty_plans(chance: random.Random, again: bool) -> dict[str, Any]:
    """Say which calls fail, how, and how many succeed in between."""
    faults: dict[str, list[Any]] = {
        "recv": ["ECONNRESET", "ETIMEDOUT", -1, -3, *(["EAGAIN", "EAGAIN", "EINTR"] if again else [])],
        "send": ["EPIPE", "ECONNRESET", -1, -3, "EAGAIN", "EAGAIN", "EINTR"],
    }
    return {
        call: [
            entry
            for _ in range(60)
            for entry in ((chance.choice(codes), chance.randint(1, 3)), (0, chance.randint(1, 60)))
        ]
        for call, codes in faults.items()
    }


@needs("Linux", "a C compiler")
@pytest.mark.parametrize(("loop", "polled"), WAYS)
def test_3000_connections_with_faults_in_recv_and_send(faults: Faults, loop: str, polled: bool) -> None:
    chance = random.Random(f"{loop} {polled}")
    # libuv tells of POLLERR once and then watches the descriptor no more.  No kernel says EAGAIN after that,
    # but a fault does, and nobody would ask again.
    again = polled or loop != "uvloop"
    environment = faults.environment(**faulty_plans(chance, again))
    count, answered = 3_000, 0
    with running(FAULTY_SERVER, loop, str(polled), environment=environment) as process:
        address = ("127.0.0.1", int(line_of(process)))
        open_now: list[tuple[socket.socket, bytes]] = []
        for number in range(count):
            data = b"%d " % number * chance.choice((1, 1, 1, 3000))
            with contextlib.suppress(ConnectionError):  # a fault has ended it already
                client = connect(address)
                open_now.append((client, data))
                if chance.random() < 0.8:
                    client.sendall(data)
            while open_now and (len(open_now) == 50 or number == count - 1):
                client, data = open_now.pop(chance.randrange(len(open_now)))
                match chance.randrange(4):
                    case 0:
                        client.close()
                    case 1:
                        reset(client)
                    case _:
                        got = b""
                        with client, contextlib.suppress(ConnectionError):
                            with contextlib.suppress(OSError):  # ENOTCONN: reset already
                                client.shutdown(socket.SHUT_WR)
                            while part := client.recv(1 << 16):
                                got += part
                        assert data.startswith(got)
                        answered += got == data
        output, errors = process.communicate("", timeout=60)
    check(process.returncode, output, errors)
    (accepted, handled, active, made, lost), messages = json.loads(output)
    assert (active, messages) == (0, [])
    assert accepted == handled == made == lost == count
    assert answered > count // 4


FORKS = """if True:
    import asyncio, os, socket, sys
    from fastlisten import aio
    from helpers.internals import set_polling
    from helpers import LIMIT, connect

    class Heard(asyncio.Protocol):
        def connection_made(self, transport):
            made.append(self)
            self.transport = transport
            self.heard = asyncio.get_running_loop().create_future()

        def data_received(self, data):
            self.transport.write(b"once")
            if os.fork() == 0:  # what its parent wrote is sent; the stream is its parent's to end
                if sys.argv[2] == "close":
                    self.transport.close()
                    os._exit(0)
                sys.exit(0)
            assert os.wait()[1] == 0
            self.heard.set_result(data)

    made = []

    async def main():
        server = await aio.create_server(Heard, "127.0.0.1", 0)
        with connect(server.sockets[0].getsockname()) as client:
            while not made:
                await asyncio.sleep(0)
            for _ in range(5):
                await asyncio.sleep(0)  # now it is watched
            child = os.fork()
            if child == 0:
                sys.exit(0)  # it closes nothing itself: what it has goes with it
            assert os.waitpid(child, 0)[1] == 0
            client.sendall(b"still there")
            assert await asyncio.wait_for(made[0].heard, LIMIT) == b"still there"
            made[0].transport.close()
            # no thread: at its end a child takes the loop's own wake-up out of the poller that both have
            client.setblocking(False)
            loop, answer = asyncio.get_running_loop(), b""
            while data := await asyncio.wait_for(loop.sock_recv(client, 100), LIMIT):
                answer += data
            assert answer == b"once"
        server.close()
        await server.wait_closed()
        print("heard", flush=True)

    set_polling(None, sys.argv[1] == "True")
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(main())
    """


@needs("Linux")
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="the child of a loop never ends there")
@pytest.mark.parametrize("end", ["exit", "close"])
@pytest.mark.parametrize("polled", [True, False])
def test_a_forked_child_that_ends_leaves_the_parents_connections_alone(polled: bool, end: str) -> None:
    done = run_program(FORKS, str(polled), end, options=["-W", "default"], limit=2 * LIMIT, status=None)
    assert done.stdout == "heard\n", done.stderr


LOST_WITHOUT_END = """if True:
    import asyncio, json, logging, sys, time
    import fastlisten
    from helpers.aio import Echo, Run, server
    from helpers.internals import failures_of
    from helpers.faults import change_plan
    from helpers import connect

    lines = []
    logging.basicConfig(level=logging.INFO, handlers=[type("Keeps", (logging.Handler,), {
        "emit": lambda self, record: lines.append(record.getMessage())})()])

    async def awaits():
        listener = fastlisten.bind("127.0.0.1:0")
        try:
            with connect(listener.getsockname()):
                await listener.accept_async()
        except PermissionError:
            pass
        finally:
            listener.close()

    async def serves(exhausted):
        async with server(Echo, exhausted=exhausted) as serving:
            change_plan(accept=[("EPERM", 1 << 30)])
            with connect(serving.address) as client:
                turns = 0
                while failures_of(serving.server) < 4:
                    turns += 1
                    await asyncio.sleep(0.001)
                change_plan()
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(client, b"hello")
                assert await loop.sock_recv(client, 5) == b"hello"
                while failures_of(serving.server):
                    await asyncio.sleep(0.001)
            return turns

    run = Run(sys.argv[1])
    change_plan(accept=[("EPERM", 1 << 30)])
    run(awaits())
    change_plan()
    turns = run(serves(sys.argv[2]))
    print(json.dumps([turns > 4, lines, run.messages()]))
    """


@needs("Linux", "a C compiler")
@pytest.mark.parametrize("exhausted", ["pause", "shed"])
@pytest.mark.parametrize("loop", LOOPS)
def test_an_accept_that_loses_every_client_pauses(faults: Faults, loop: str, exhausted: str) -> None:
    quick, lines, reports = faults.python(LOST_WITHOUT_END, loop, exhausted)
    assert quick
    assert reports == []
    assert [line[:16] for line in lines if line.startswith("accepting")] == [
        "accepting pauses",
        "accepting again ",
    ]


WATCHES_FAIL = """if True:
    import asyncio, json, sys
    from fastlisten import aio
    from helpers import connect
    from helpers.faults import FASTLISTENS, change_plan, meant_for

    meant_for(FASTLISTENS)  # and not the event loop's own calls
    told, lost = [], []

    class Echo(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport
        def data_received(self, data):
            self.transport.write(data)
        def connection_lost(self, error):
            lost.append(type(error).__name__)

    async def ask(loop, address):
        with connect(address) as client:
            client.setblocking(False)
            await asyncio.sleep(0.02)  # the server is there first, and has to watch
            await loop.sock_sendall(client, b"hello")
            return (await loop.sock_recv(client, 5)).decode()

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context["message"]))
        server = await aio.create_server(Echo, "127.0.0.1", 0, max_connections=1)
        address = server.sockets[0].getsockname()
        answers = [await ask(loop, address)]
        for call, count in json.loads(sys.argv[1]):
            while server.stats().active:
                await asyncio.sleep(0)
            with connect(address) as client:
                change_plan(**{call: [("ENOSPC" if call == "watch" else "ENOMEM", count)]})
                client.sendall(b"x") if call == "ready" else None
                await asyncio.sleep(0.05)
                change_plan()
                client.setblocking(False)
                answers.append((await loop.sock_recv(client, 1)).decode())
            answers.append(await ask(loop, address))
        stats = server.stats()
        server.close()
        await server.wait_closed()
        assert stats.accepted == stats.handled + stats.active
        return answers

    print(json.dumps([asyncio.run(main()), told, lost]))
    """


def test_a_connection_that_cannot_be_watched_is_ended_and_reported(faults: Faults) -> None:
    """epoll_ctl() fails for want of watches: the client ends, the event loop is told, the place is free."""
    answers, told, lost = faults.python(WATCHES_FAIL, json.dumps([["watch", 1]]))
    assert answers == ["hello", "", "hello"]
    assert told == ["Fatal error: the connection cannot be watched"]
    assert "OSError" in lost


def test_a_poller_that_fails_is_given_up(faults: Faults) -> None:
    """epoll_wait() of the hub fails: the event loop watches each connection itself from then on."""
    answers, told, _ = faults.python(WATCHES_FAIL, json.dumps([["ready", 1]]))
    assert answers == ["hello", "x", "hello"]
    assert told == []


UNCLOSED = """if True:
    import asyncio, gc, json, os, sys, time, warnings
    from fastlisten import aio

    async def main(options):
        server = await aio.create_server(asyncio.Protocol, "127.0.0.1", 0, **options)
        return server.sockets[0].getsockname()

    def open_things():
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    for _ in range(2):
        asyncio.run(main({}))
        gc.collect()
    before = open_things()
    for options in ({}, {"busy": "reset", "pending": 5, "max_connections": 9}):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            address = asyncio.run(main(options))
            gc.collect()
        deadline = time.monotonic() + 10
        while open_things() != before and time.monotonic() < deadline:
            pass  # the kernel lets go of a thread only after it has ended
        assert open_things() == before, (options, open_things(), before)
        assert any("unclosed server" in str(warning.message) for warning in told), told
        try:
            with __import__("socket").create_connection(address, 5):
                raise AssertionError("the port is open")
        except ConnectionRefusedError:
            pass
    print(json.dumps("done"))
    """


@needs("Linux")
def test_a_server_that_is_dropped_unclosed_ends_its_thread_and_says_so() -> None:
    """With busy= a thread and its descriptors stayed, and clients were accepted and hung."""
    done = run_program(UNCLOSED, options=["-W", "ignore::ResourceWarning"])
    assert done.stdout == '"done"\n'


AT_EXIT = """if True:
    import asyncio, sys
    from fastlisten import aio

    kept = []

    class Keeps(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport
            kept.append(self)

    async def main():
        server = await aio.create_server(Keeps, "127.0.0.1", 0)
        streams = await asyncio.open_connection(*server.sockets[0].getsockname())
        while not kept:
            await asyncio.sleep(0)
        kept.extend([server, *streams])

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    if sys.argv[1] == "closed":
        loop.close()
    sys.modules["kept"] = kept  # lives as long as modules do
    """


@posix_only("asyncio's proactor, whose own server it is there, tells of its pending task")
@pytest.mark.parametrize("how", ["open", "closed"])
def test_a_connection_that_is_open_when_the_interpreter_ends_makes_no_noise(how: str) -> None:
    done = run_program(AT_EXIT, how, options=["-W", "ignore::ResourceWarning"])
    assert done.stderr == ""
