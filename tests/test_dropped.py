"""What is dropped in the middle of a wait: it ends, and the listener is for whoever comes next.

What threads and descriptors are left, conftest counts after each test.
"""

import asyncio
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import fastlisten
from fastlisten import Listener, aio
from helpers import connect, exchange, serving, wait_until
from helpers.aio import AWAIT_LOOPS, Echo, Run, in_thread, run_awaits, turns
from helpers.programs import run as run_program
from helpers.serve import answer

__all__ = ["run_awaits"]  # a fixture


async def accepts(listener: Listener) -> None:
    (await listener.accept_async())[0].close()


async def iterates(listener: Listener) -> None:
    async for connection in listener:
        connection.close()


WAITS = [accepts, iterates]
waits = pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.__name__)


def loop_with_a_waiter(new_loop: Any, listener: Listener, wait: Any) -> asyncio.AbstractEventLoop:
    """Return a loop that has run until a task of it waits for the listener's clients."""
    loop: asyncio.AbstractEventLoop = new_loop()

    async def begin() -> asyncio.Task[None]:
        task = loop.create_task(wait(listener))
        await turns()
        return task

    assert not loop.run_until_complete(begin()).done()
    return loop


# --- who may take a listener's clients next


def serves(listener: Listener) -> None:
    with serving(listener, answer):
        assert exchange(listener) == b"ping"


def iterates_here(listener: Listener) -> None:
    with connect(listener):
        for connection in listener:
            connection.close()
            return


def awaits(listener: Listener) -> None:
    async def main() -> None:
        with connect(listener):
            await accepts(listener)

    asyncio.run(main())


def serves_on_asyncio(listener: Listener) -> None:
    async def main() -> None:
        async with await aio.create_server(Echo, sock=listener):
            assert await in_thread(exchange, listener.getsockname()) == b"ping"

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(main())


NEXT = [serves, iterates_here, awaits, serves_on_asyncio]


@pytest.mark.parametrize("after", NEXT, ids=lambda after: after.__name__)
@waits
def test_a_closed_loop_takes_no_clients(run_awaits: Run, wait: Any, after: Any, listener: Listener) -> None:
    """A task that waited there for ever was said to take them, and everybody else got RuntimeError."""
    loop_with_a_waiter(AWAIT_LOOPS[run_awaits.loop], listener, wait).close()
    after(listener)


@waits
def test_a_loop_that_is_open_has_its_waiter_s_clients(listener: Listener, wait: Any) -> None:
    """It may run again."""
    loop = loop_with_a_waiter(asyncio.SelectorEventLoop, listener, wait)
    with pytest.raises(RuntimeError, match="somebody waits on an event loop"):
        listener.serve(answer)
    loop.close()


# --- what is left


def dropped(what: Callable[[], Any]) -> bool:
    """Tell whether a weak reference's object is gone; it may be in a cycle."""
    gc.collect()
    return what() is None


def assert_unclosed(weak: Callable[[], Any], match: str) -> None:
    """What nobody has closed goes, and says so; the warning, as long as it is kept, keeps it since 3.15."""
    with pytest.warns(ResourceWarning, match=match) as told:
        wait_until(lambda: (gc.collect(), len(told))[1])
    told.clear()
    wait_until(lambda: dropped(weak))


@waits
def test_who_waited_on_a_closed_loop_goes_with_it(run_awaits: Run, wait: Any) -> None:
    """As who waited in asyncio's own loop.sock_accept(), and with it a listener that nobody has closed."""
    told: list[str] = []
    listener = fastlisten.bind("127.0.0.1:0")
    loop = loop_with_a_waiter(AWAIT_LOOPS[run_awaits.loop], listener, wait)
    loop.set_exception_handler(lambda _, context: told.append(context["message"]))
    loop.close()
    weak = weakref.ref(listener)
    del listener, loop
    assert_unclosed(weak, "unclosed .*Listener")
    assert told == ["Task was destroyed but it is pending!"]


@waits
def test_a_loop_that_is_dropped_goes_though_the_listener_stays(listener: Listener, wait: Any) -> None:
    """The listener held the loop, so that neither its descriptors nor its warning came."""
    loop = loop_with_a_waiter(asyncio.SelectorEventLoop, listener, wait)
    loop.set_exception_handler(lambda *_: None)
    weak = weakref.ref(loop)
    del loop
    assert_unclosed(weak, "unclosed event loop")
    iterates_here(listener)


@waits
def test_a_loop_that_nobody_waits_on_is_not_held(listener: Listener, wait: Any) -> None:
    loop = loop_with_a_waiter(asyncio.SelectorEventLoop, listener, wait)
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(turns())
    loop.close()
    weak = weakref.ref(loop)
    del loop, task
    wait_until(lambda: dropped(weak))


@waits
def test_a_stop_after_it_is_for_the_next(run_awaits: Run, wait: Any, listener: Listener) -> None:
    loop_with_a_waiter(AWAIT_LOOPS[run_awaits.loop], listener, wait).close()
    listener.stop()
    with connect(listener):
        assert list(listener) == []
        iterates_here(listener)


def test_a_second_loop_that_is_refused_changes_nothing(listener: Listener) -> None:
    """It was the listener's loop from then on, and the first was refused, too."""
    loop = loop_with_a_waiter(asyncio.SelectorEventLoop, listener, accepts)
    with pytest.raises(RuntimeError, match="somebody waits on an event loop"):
        asyncio.run(accepts(listener))
    with connect(listener), connect(listener):
        loop.run_until_complete(accepts(listener))
        while listener.stats().active or listener.stats().accepted < 2:
            loop.run_until_complete(turns())
    loop.close()


@pytest.mark.parametrize("cycle", [False, True])
def test_an_iteration_that_is_dropped_lets_others_take_the_clients(listener: Listener, cycle: bool) -> None:
    iteration = iter(listener)
    with connect(listener):
        next(iteration).close()
    with pytest.raises(RuntimeError, match="runs already"):
        listener.serve(answer)
    held: list[Any] = [iteration]
    if cycle:
        held.append(held)
    del iteration, held
    gc.collect()
    serves(listener)


EXITS = """if True:
    import asyncio, sys, fastlisten
    from helpers.aio import AWAIT_LOOPS
    from helpers.internals import pretend_a_proactor

    listener = fastlisten.bind("127.0.0.1:0")
    loop = AWAIT_LOOPS[sys.argv[1]]()
    loop.set_exception_handler(lambda *_: None)
    if sys.argv[1] == "as if on a proactor":
        pretend_a_proactor(None)

    async def main():
        task = loop.create_task(listener.accept_async())
        for _ in range(10):
            await asyncio.sleep(0)

    loop.run_until_complete(main())
    loop.close()
    """


@pytest.mark.parametrize("loop", AWAIT_LOOPS)
def test_the_interpreter_ends_after_a_loop_was_closed_under_who_waits(loop: str) -> None:
    """On a proactor a thread waits, which is joined at the end, and which nobody woke."""
    assert run_program(EXITS, loop, options=["-W", "ignore::ResourceWarning"]).stderr == ""
