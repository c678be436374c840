"""asyncio servers on fastlisten's accept loop and transports, and event loops that have them.

create_server(), create_unix_server(), start_server() and start_unix_server() have the arguments, the results
and the errors of asyncio's own; they serve on the event loop that runs, asyncio's selector loop or uvloop.
On Windows' proactor loop, which waits for operations and not for descriptors, they give asyncio's own server.

EventLoop and UvloopEventLoop are asyncio's selector loop and uvloop's loop with these servers: what calls
loop.create_server(), as most frameworks do, then serves with fastlisten.
"""

from typing import TYPE_CHECKING, Any

from fastlisten.aio._create import create_server, create_unix_server
from fastlisten.aio._factory import loop_factory, new_event_loop, run
from fastlisten.aio._loop import EventLoop
from fastlisten.aio._server import Server
from fastlisten.aio._streams import start_server, start_unix_server
from fastlisten.aio._transport import Transport

if TYPE_CHECKING:
    from fastlisten.aio._uvloop import UvloopEventLoop as UvloopEventLoop

__all__ = [  # UvloopEventLoop is not among them: `import *` would ask for uvloop
    "EventLoop",
    "Server",
    "Transport",
    "create_server",
    "create_unix_server",
    "loop_factory",
    "new_event_loop",
    "run",
    "start_server",
    "start_unix_server",
]


if not TYPE_CHECKING:  # or a type checker would believe that every name is there

    def __getattr__(name: str) -> Any:
        """UvloopEventLoop, once somebody asks: uvloop is no dependency.  Raises ImportError without it."""
        if name == "UvloopEventLoop":
            from fastlisten.aio._uvloop import UvloopEventLoop

            return UvloopEventLoop
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
