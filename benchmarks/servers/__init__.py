"""The servers under test: one row each. To add one is to add a row.

Each runs as ``python -m benchmarks.servers NAME WORK``: it binds 127.0.0.1 with port 0 and a
backlog of 4,096, prints its port on a line, and serves until it is killed. Every server does the
same work, with the same payloads, and asks for the peer's address (or its library does).
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass

ANSWERS = frozenset({"close", "echo", "http"})
"""What a server can do with a client: close it, echo its bytes, answer its HTTP request.
free_threading.py adds `compute`: echo after a millisecond of Python."""

ALL = ANSWERS | {"hold"}
"""The same, and `hold`: keep the client and do nothing."""

LASTING = frozenset({"echo", "message"})
"""What the servers of event loops do: `message` is to send back what comes until the client ends, `tls` the
same over TLS. A framework's program does `request`: it answers HTTP requests until a client asks it to
close."""


GROUPS = {
    **dict.fromkeys(
        ("program", "accept_loop", "serve", "accept_many_loop", "iterate", "refuse", "admit"), "loop"
    ),
    **dict.fromkeys(("tcp_server", "http_server"), "socketserver"),
    **dict.fromkeys(("streams", "stream_server", "serve_tcp", "iterate_async"), "task"),
}
"""Functions that serve alike: in a loop, as a socketserver, with a task or a greenlet a client. Any other
is a group of its own."""


@dataclass(frozen=True)
class Server:
    """A row: how to start it, what it can do, and with which settings it runs."""

    name: str
    module: str
    """Module of this package that has `function`; imported in the server's process only."""
    function: str
    arguments: tuple[str | int, ...]
    works: frozenset[str]
    settings: str
    needs: tuple[str, ...] = ()
    """Modules or commands that must be installed."""

    @property
    def group(self) -> str:
        """Servers of one group are compared with each other first."""
        return GROUPS.get(self.function, self.function)

    def missing(self) -> str:
        """Return what this server lacks on this machine, "" when it can run."""
        return ", ".join(need for need in self.needs if not _is_there(need))


def _is_there(need: str) -> bool:
    if shutil.which(need):
        return True
    try:
        return importlib.util.find_spec(need) is not None
    except ModuleNotFoundError:  # the package that a module would be in
        return False


BASELINE = "c-accept"
"""Every figure is also given as a ratio to this one, of the same round."""

_F = ("fastlisten",)
_AIO = "fastlisten.aio"

DEFER = 5
"""Seconds of TCP_DEFER_ACCEPT in the rows that have it."""

LOOPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "asyncio": ("asyncio.new_event_loop", ()),
    "uvloop": ("uvloop.new_event_loop", ("uvloop",)),
    "aiofastnet-asyncio": ("aiofastnet.loop_factory()", ("aiofastnet",)),
    "aiofastnet-uvloop": ("aiofastnet.loop_factory(uvloop.new_event_loop)", ("aiofastnet", "uvloop")),
    "fastlisten-EventLoop": ("fastlisten.aio.EventLoop", (_AIO,)),
    "fastlisten-UvloopEventLoop": ("fastlisten.aio.UvloopEventLoop", (_AIO, "uvloop")),
}
"""The event loops: how each is made, and what it needs."""

HANDSHAKE_THREADS = tuple(
    f"{loop}-handshake_threads" for loop in ("fastlisten-EventLoop", "fastlisten-UvloopEventLoop")
)
SERVE_TLS = "fastlisten-serve-tls"
"""The rows that only the workloads of TLS have."""

SERVERS: dict[str, Server] = {
    server.name: server
    for server in (
        Server(
            BASELINE,
            "native",
            "program",
            ("accept_loop.c",),
            ALL | {"shed", "take"},
            "C: blocking accept4, one client after the other, -O2",
        ),
        Server(
            "c-epoll",
            "native",
            "program",
            ("epoll_loop.c",),
            ALL,
            "C: epoll, accept4 until EAGAIN, non-blocking clients, -O2",
        ),
        Server("go", "native", "program", ("server.go",), ALL, "a goroutine a connection", ("go",)),
        Server(
            "socket.accept",
            "stdlib",
            "accept_loop",
            ("socket",),
            ALL | {"shed", "take"},
            "socket.accept() in a loop, one client after the other",
        ),
        Server(
            "TCPServer",
            "stdlib",
            "tcp_server",
            ("socketserver", "TCPServer"),
            ANSWERS,
            "socketserver.TCPServer, BaseRequestHandler",
        ),
        Server(
            "ThreadingTCPServer",
            "stdlib",
            "tcp_server",
            ("socketserver", "ThreadingTCPServer"),
            ALL,
            "socketserver.ThreadingTCPServer, daemon threads, BaseRequestHandler",
        ),
        Server(
            "ThreadingHTTPServer",
            "stdlib",
            "http_server",
            ("http.server",),
            frozenset({"http"}),
            "http.server.ThreadingHTTPServer, do_GET writes the answer",
        ),
        *(
            Server(
                f"{loop}-{api}",
                "aio",
                api,
                (loop,),
                LASTING
                | (ALL if loop in ("asyncio", "uvloop") else frozenset())
                | (frozenset({"tls"}) if api == "protocol" else frozenset()),
                f"{call}, on {factory}",
                needs,
            )
            for loop, (factory, needs) in LOOPS.items()
            for api, call in (("protocol", "create_server"), ("streams", "start_server"))
        ),
        *(
            Server(
                name,
                "aio",
                "protocol",
                (name.removesuffix("-handshake_threads"), "", 0, 1),
                frozenset({"tls"}),
                "the program of the row without, with handshake_threads=1",
                LOOPS[name.removesuffix("-handshake_threads")][1],
            )
            for name in HANDSHAKE_THREADS
        ),
        *(
            Server(
                f"{loop}-{framework}",
                "frameworks",
                framework,
                (loop,),
                frozenset({"request"}),
                f"{framework}, {settings}, on {factory}",
                (*packages, *needs),
            )
            for framework, settings, packages in (
                ("uvicorn", "httptools, no access log, no lifespan", ("uvicorn", "httptools")),
                ("aiohttp", "web.Application, no access log", ("aiohttp",)),
            )
            for loop, (factory, needs) in LOOPS.items()
        ),
        Server(
            "gevent",
            "greenlets",
            "stream_server",
            (),
            ALL,
            "gevent.server.StreamServer, a greenlet a connection",
            ("gevent",),
        ),
        Server(
            "trio",
            "nursery",
            "serve_tcp",
            (),
            ALL,
            "trio.serve_tcp, a task a connection",
            ("trio",),
        ),
        Server(
            "fastlisten-serve",
            "fast",
            "serve",
            (0,),
            ANSWERS,
            "Listener.serve(handler), inline",
            _F,
        ),
        Server(
            SERVE_TLS,
            "fast",
            "serve",
            (1, 1_200),
            frozenset({"tls"}),
            "Listener.serve(handler, ssl=context, threads=(1, 1200))",
            _F,
        ),
        Server(
            "fastlisten-accept",
            "stdlib",
            "accept_loop",
            ("fastlisten",),
            ALL | {"take"},
            "Listener.accept() in a loop, one client after the other",
            _F,
        ),
        Server(
            "fastlisten-accept_many",
            "fast",
            "accept_many_loop",
            (64,),
            ALL | {"take"},
            "Listener.accept_many(64) in a loop",
            _F,
        ),
        *(
            Server(
                f"fastlisten-threads-{threads}",
                "fast",
                "serve",
                (threads,),
                ANSWERS | {"compute"},
                f"Listener.serve(handler, threads={threads})",
                _F,
            )
            for threads in (1, 2, 4, 8, 16, 32, 64)
        ),
        Server(
            "fastlisten-threads-1-8",
            "fast",
            "serve",
            (1, 8),
            ANSWERS | {"compute"},
            "Listener.serve(handler, threads=(1, 8))",
            _F,
        ),
        Server(
            "fastlisten-for",
            "fast",
            "iterate",
            (),
            ALL,
            "for connection in listener, one client after the other",
            _F,
        ),
        Server(
            "fastlisten-async-for",
            "fast",
            "iterate_async",
            (),
            frozenset({"close", "echo"}),
            "async for connection in listener, on asyncio, one client after the other",
            _F,
        ),
        Server(
            "fastlisten-busy",
            "fast",
            "refuse",
            (),
            frozenset({"shed"}),
            "Listener.serve(handler, pending=0, busy='reset'), the handler busy all the time",
            _F,
        ),
        Server(
            "fastlisten-admission",
            "fast",
            "admit",
            (),
            frozenset({"shed"}),
            "Listener.serve(handler, admission=Admission(rate=1, burst=1)): one source, limited",
            _F,
        ),
        Server(
            "fastlisten-socket",
            "stdlib",
            "accept_loop",
            ("fastlisten.socket",),
            ALL | {"shed", "take"},
            "the program of socket.accept, from fastlisten import socket",
            ("fastlisten.socket",),
        ),
        Server(
            "fastlisten-TCPServer",
            "stdlib",
            "tcp_server",
            ("fastlisten.socketserver", "TCPServer"),
            ANSWERS,
            "the program of TCPServer, from fastlisten import socketserver",
            ("fastlisten.socketserver",),
        ),
        Server(
            "fastlisten-ThreadingTCPServer",
            "stdlib",
            "tcp_server",
            ("fastlisten.socketserver", "ThreadingTCPServer"),
            ALL,
            "the program of ThreadingTCPServer, from fastlisten import socketserver",
            ("fastlisten.socketserver",),
        ),
        Server(
            "fastlisten-ThreadingHTTPServer",
            "stdlib",
            "http_server",
            ("fastlisten.http.server",),
            frozenset({"http"}),
            "the program of ThreadingHTTPServer, from fastlisten.http import server",
            ("fastlisten.http.server",),
        ),
        *(
            Server(
                f"fastlisten-{loop}-{api}{'-defer' * bool(defer)}",
                "aio",
                api,
                (loop, _AIO, defer),
                # Who says nothing is not accepted before the time is over.
                frozenset({"echo", "http"}) if defer else ALL,
                f"the program of {loop}-{api}, with fastlisten.aio.{call}"
                + f", defer_accept={defer}" * bool(defer),
                (_AIO, loop),
            )
            for loop in ("asyncio", "uvloop")
            for api, call in (("protocol", "create_server"), ("streams", "start_server"))
            for defer in (0, DEFER)
        ),
    )
}
