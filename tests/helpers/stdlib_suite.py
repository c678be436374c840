"""Run one of the standard library's own test modules with drop-ins in the originals' place.

`python tests/helpers/stdlib_suite.py socketserver,http.server test.test_httpservers [unittest's arguments]`
`asyncio` puts the functions of fastlisten.aio into asyncio and its event loops.
The last line on standard output is how many servers fastlisten's functions of asyncio have made.
"""

import functools
import importlib
import sys
import unittest
from collections.abc import Callable
from typing import Any

NOT_OURS = {
    "test_create_server_multiple_hosts": "replaces the sockets and a private method of the loop by mocks",
    "test_unix_server_sock_cleanup": "asyncio unlinks the path of a socket that it was given",
}
"""Beginnings of the names of tests of the replaced code's insides, or of what we do otherwise, and why."""

made = 0


def put_in_place(name: str) -> None:
    """Have `import NAME` give fastlisten's module of that name, in every way to write it."""
    if name == "asyncio":
        put_asyncio_in_place()
        return
    dropin = importlib.import_module(f"fastlisten.{name}")
    sys.modules[name] = dropin
    package, _, last = name.rpartition(".")
    if package:
        setattr(importlib.import_module(package), last, dropin)


def put_asyncio_in_place() -> None:
    """Have asyncio's streams and its selector loops make fastlisten's servers."""
    import asyncio.base_events
    import asyncio.streams

    from fastlisten import aio

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        async def call(*args: Any, **options: Any) -> Any:
            global made
            server = await function(*args, **options)
            assert type(server) is aio.Server
            made += 1
            return server

        return call

    def method(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        async def call(self: Any, *args: Any, **options: Any) -> Any:
            return await function(*args, **options)

        return call

    for name in ("start_server", "start_unix_server"):
        for module in (asyncio, asyncio.streams):
            setattr(module, name, counted(getattr(aio, name)))
    selector: Any = asyncio.SelectorEventLoop
    base: Any = asyncio.base_events.BaseEventLoop
    base.create_server = method(counted(aio.create_server))
    selector.create_unix_server = method(counted(aio.create_unix_server))


class Loader(unittest.TestLoader):
    """Passes over the tests that are not ours."""

    def getTestCaseNames(self, test_case: Any) -> Any:  # noqa: N802
        names = super().getTestCaseNames(test_case)
        return [name for name in names if not any(map(name.startswith, NOT_OURS))]


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        put_in_place(name)
    program = unittest.main(
        module=sys.argv[2], argv=[sys.argv[0], *sys.argv[3:]], testLoader=Loader(), exit=False
    )
    print(made)
    sys.exit(not program.result.wasSuccessful())
