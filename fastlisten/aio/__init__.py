"""asyncio servers on fastlisten's accept loop and transports.

create_server(), create_unix_server(), start_server() and start_unix_server() have the arguments, the results
and the errors of asyncio's own; they serve on the event loop that runs, asyncio's selector loop or uvloop.
On Windows' proactor loop, which waits for operations and not for descriptors, they give asyncio's own server.
"""

from fastlisten.aio._create import create_server, create_unix_server
from fastlisten.aio._server import Server
from fastlisten.aio._streams import start_server, start_unix_server
from fastlisten.aio._transport import Transport

__all__ = [
    "Server",
    "Transport",
    "create_server",
    "create_unix_server",
    "start_server",
    "start_unix_server",
]
