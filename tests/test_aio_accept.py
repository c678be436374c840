"""Listener.accept_async() and async iteration."""

import asyncio
import socket
from typing import Any

import pytest

import fastlisten
from fastlisten import aio
from helpers import LIMIT, connect, exchange
from helpers.aio import Echo, Run, in_thread, run, run_awaits, turns

__all__ = ["run", "run_awaits"]  # fixtures


def test_accept_async(run_awaits: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with fastlisten.bind("127.0.0.1:0") as listener:
            waiting = asyncio.ensure_future(listener.accept_async())
            await turns()
            assert not waiting.done()
            with connect(listener) as client:
                sock, address = await waiting
                with sock:
                    assert type(sock) is socket.socket
                    assert sock.gettimeout() == 0
                    assert address == client.getsockname() == sock.getpeername()
                    client.sendall(b"hello")
                    assert await loop.sock_recv(sock, 10) == b"hello"
            assert listener.stats().accepted == 1

    run_awaits(main())


def test_cancelling_accepts_loses_no_client(run_awaits: Run) -> None:
    async def main() -> int:
        got = 0
        with fastlisten.bind("127.0.0.1:0", backlog=200) as listener:
            clients = [connect(listener) for _ in range(100)]
            for i in range(300):
                waiting = [asyncio.ensure_future(listener.accept_async()) for _ in range(3)]
                await turns(i % 4)
                for task in waiting:
                    task.cancel()
                for done in await asyncio.gather(*waiting, return_exceptions=True):
                    if isinstance(done, tuple):
                        done[0].close()
                        got += 1
                if got == 100:
                    break
            for client in clients:
                client.close()
            assert listener.stats().accepted == got
            return got

    assert run_awaits(main()) == 100


def test_several_tasks_accept(run_awaits: Run) -> None:
    async def main() -> None:
        with fastlisten.bind("127.0.0.1:0") as listener:
            waiting = [asyncio.ensure_future(listener.accept_async()) for _ in range(5)]
            await turns()
            clients = [connect(listener) for _ in range(5)]
            for sock, _ in await asyncio.gather(*waiting):
                sock.close()
            for client in clients:
                client.close()

    run_awaits(main())


def test_closing_a_listener_ends_who_waits(run_awaits: Run) -> None:
    async def main() -> None:
        listener = fastlisten.bind("127.0.0.1:0")

        async def iterate() -> list[Any]:
            return [connection async for connection in listener]

        iterating = asyncio.ensure_future(iterate())
        waiting = asyncio.ensure_future(listener.accept_async())
        await turns()
        listener.close()
        assert await iterating == []
        with pytest.raises(OSError, match=r"Bad file descriptor|\[WinError 10038\]"):
            await waiting

    run_awaits(main())


@pytest.mark.parametrize("how", ["close", "pause"])
def test_a_waiter_just_cancelled_keeps_nobody_from_being_told(run_awaits: Run, how: str) -> None:
    async def main() -> None:
        listener = fastlisten.bind("127.0.0.1:0")
        waiting = [asyncio.create_task(listener.accept_async()) for _ in range(3)]
        await turns()
        waiting[0].cancel()
        waiting[2].cancel()
        getattr(listener, how)()
        if how == "close":
            with pytest.raises(OSError, match=r"descriptor|10038"):
                await waiting[1]
        else:
            listener.resume()
            with connect(listener.getsockname()):
                (await waiting[1])[0].close()
            listener.close()
        assert [task.cancelled() for task in waiting] == [True, False, True]

    run_awaits(main())
    assert run_awaits.reports == []


def test_a_client_and_a_cancelling_in_one_turn(run: Run) -> None:
    async def main() -> None:
        listener = fastlisten.bind("127.0.0.1:0")
        first, second = (asyncio.create_task(listener.accept_async()) for _ in range(2))
        await turns()
        found = listener._async_acceptor
        assert found is not None
        first.cancel()
        with connect(listener.getsockname()):
            found._wake_one()  # the loop's call, in the turn in which the task was cancelled
            (await second)[0].close()
        assert first.cancelled()
        listener.close()

    run(main())


@pytest.mark.parametrize("limits", [{}, {"busy": "reset", "pending": 2}], ids=["", "busy"])
def test_a_listener_that_a_server_has_is_not_awaited(run: Run, limits: dict[str, Any]) -> None:
    async def main() -> None:
        listener = fastlisten.bind("127.0.0.1:0")
        waiting = asyncio.create_task(listener.accept_async())
        await turns()
        idle = await aio.create_server(Echo, sock=listener, start_serving=False, **limits)
        with pytest.raises(RuntimeError, match="somebody waits"):
            await idle.start_serving()
        waiting.cancel()
        await asyncio.wait([waiting])
        await idle.start_serving()
        with pytest.raises(RuntimeError, match="server accepts"):
            await listener.accept_async()
        with pytest.raises(RuntimeError, match="server accepts"):
            await anext(aiter(listener))
        with pytest.raises(RuntimeError, match="server accepts"):
            listener.serve(print)
        assert await in_thread(exchange, listener.getsockname()) == b"ping"
        idle.close()
        await idle.wait_closed()

    run(main())


def test_async_iteration_until_stop(run_awaits: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with fastlisten.bind("127.0.0.1:0") as listener:
            served: list[bytes] = []

            async def serve() -> None:
                async for connection in listener:
                    assert isinstance(connection, fastlisten.Connection)
                    with connection:
                        served.append(await loop.sock_recv(connection, 10))
                        await loop.sock_sendall(connection, served[-1])

            for _ in range(2):
                tasks = [asyncio.ensure_future(serve()) for _ in range(3)]
                await turns()
                answers = [await in_thread(exchange, listener, b"%d" % i) for i in range(9)]
                assert answers == [b"%d" % i for i in range(9)]
                await in_thread(listener.stop)
                await asyncio.gather(*tasks)
            assert len(served) == 18
            listener.stop()
            assert [c async for c in listener] == []

    run_awaits(main())


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("tasks", [1, 3])
def test_a_drain_takes_what_the_kernel_had_queued(run_awaits: Run, tasks: int, paused: bool) -> None:
    clients = 20

    async def main() -> None:
        with fastlisten.bind("127.0.0.1:0", backlog=clients) as listener:

            async def iterate() -> int:
                count = 0
                async for connection in listener:
                    connection.close()
                    count += 1
                    await asyncio.sleep(0)
                return count

            if paused:
                listener.pause()
            iterations = [asyncio.ensure_future(iterate()) for _ in range(tasks)]
            await turns()
            queued = [connect(listener) for _ in range(clients)]
            listener.stop(drain=LIMIT)
            assert sum(await asyncio.gather(*iterations)) == clients
            listener.resume()
            late = connect(listener)  # is for the next
            listener.stop(drain=0)
            assert await iterate() == 0
            iterating = asyncio.ensure_future(iterate())
            while listener.stats().accepted == clients:
                await asyncio.sleep(0)
            listener.stop()
            assert await iterating == 1
            for sock in (*queued, late):
                sock.close()

    run_awaits(main())


def test_async_iteration_pauses_and_resumes(run_awaits: Run) -> None:
    async def main() -> None:
        with fastlisten.bind("127.0.0.1:0") as listener:
            listener.pause()
            iterator = listener.__aiter__()
            waiting = asyncio.ensure_future(iterator.__anext__())
            with connect(listener):
                await turns()
                assert not waiting.done()
                listener.resume()
                (await waiting).close()

    run_awaits(main())
