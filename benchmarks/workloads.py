"""What is measured: one row a workload. To add one is to add a row."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Literal

from .servers import BASELINE, HANDSHAKE_THREADS, LOOPS, SERVE_TLS, SERVERS, Server

Method = Literal["load", "burst", "hold", "take", "tls", "silent", "storm", "ab", "wrk"]


@dataclass(frozen=True)
class Workload:
    """A row: what clients do, how many at once, and the figure that stands for it."""

    name: str
    work: str
    """What server and client do: a name that `Server.works` lists."""
    method: Method
    concurrency: tuple[int, ...]
    """Clients at once; each is a cell of its own."""
    figure: str
    """The metric in a sample that stands for the workload: what is compared."""
    unit: str
    servers: tuple[str, ...] = ()
    """Servers to run, () for all that do the work."""
    about: str = ""
    columns: tuple[str, ...] = ()
    """The metrics that its table has, `figure` among them; () for `figure` alone."""
    baseline: str = BASELINE
    """The server that the figures are also given as ratios to, those of the same round."""
    requests: int = 1
    """Answers on one connection; 0 keeps it for the whole run. Figures are for one answer."""
    size: int = 0
    """Bytes of a message, there and back; 0 where it is no message."""

    def missing(self) -> str:
        """Return the command that the method lacks on this machine, "" when it can run."""
        return self.method if self.method in COMMANDS and shutil.which(self.method) is None else ""

    def choose(self, only: frozenset[str]) -> list[Server]:
        """Return the servers for this workload, `only` those named (and the baseline) if any are."""
        names = self.servers or tuple(
            name
            for name in SERVERS
            if name in only or not name.startswith("fastlisten-threads-") or name.endswith("-8")
        )
        return [
            SERVERS[name]
            for name in names
            if self.work in SERVERS[name].works and (not only or name in only or name == self.baseline)
        ]


COMMANDS = ("ab", "wrk")
"""The methods that are commands of others."""

CLIENTS = 64
"""Clients at once where nothing else is said: enough that one is always waiting."""

BURST = 4000
"""Clients of a burst: under the queue's limit of 4,096, so that none is refused by the kernel."""

HELD = 10_000
"""Idle clients that a server holds."""

_EVIDENCE = (BASELINE, "c-epoll", "socket.accept", "asyncio-protocol", "uvloop-protocol", "go")
_FAST = (
    "fastlisten-serve",
    "fastlisten-threads-8",
    "fastlisten-asyncio-protocol",
    "fastlisten-uvloop-protocol",
)
_HTTP = ("ThreadingHTTPServer", "fastlisten-ThreadingHTTPServer")

REQUESTS = {"": (1, "a new connection each"), "-10": (10, "10 on a connection"), "-kept": (0, "kept alive")}
"""What the name of a framework's workload ends with, the requests of a connection, and in words."""

SIZES = {"64": 64, "4k": 4 * 1024, "256k": 256 * 1024}
"""Bytes of the messages, by the name that they have in a workload's."""


def _requests(framework: str) -> list[Workload]:
    """A request of a framework's program, on connections of one, of ten and of all requests."""
    return [
        Workload(
            framework + end,
            "request",
            "load",
            (CLIENTS,),
            "cpu_us",
            "µs",
            tuple(f"{loop}-{framework}" for loop in LOOPS),
            about=f"a request, {words}",
            baseline=f"uvloop-{framework}",
            requests=requests,
        )
        for end, (requests, words) in REQUESTS.items()
    ]


def _messages(name: str, api: str) -> list[Workload]:
    """Messages there and back on connections that are kept, by protocols or by streams."""
    return [
        Workload(
            f"{name}-{length}",
            "message",
            "load",
            (1, CLIENTS) if length == "64" else (CLIENTS,),
            "cpu_us",
            "µs",
            tuple(f"{loop}-{api}" for loop in LOOPS),
            about=f"a message of {size:,} bytes there and back, connections kept, {api}",
            baseline=f"uvloop-{api}",
            requests=0,
            size=size,
        )
        for length, size in SIZES.items()
    ]


def _tls() -> list[Workload]:
    """Messages there and back over TLS, on connections that are kept and on new ones."""
    return [
        Workload(
            f"tls-{name}",
            "tls",
            "tls",
            (1, CLIENTS) if name == "64" else (CLIENTS,),
            "cpu_us",
            "µs",
            tuple(f"{loop}-protocol" for loop in LOOPS),
            about=f"a message of {size:,} bytes there and back over TLS, {words}",
            baseline="uvloop-protocol",
            requests=requests,
            size=size,
        )
        for name, size, requests, words in (
            ("64", 64, 0, "connections kept"),
            ("64k", 64 * 1024, 0, "connections kept"),
            ("new", 64, 1, "a handshake and a close each"),
        )
    ]


def _tls_beside() -> list[Workload]:
    """How long one client of TLS waits beside others."""
    servers = (*(f"{loop}-protocol" for loop in LOOPS), *HANDSHAKE_THREADS, SERVE_TLS)
    return [
        Workload(
            "tls-silent",
            "tls",
            "silent",
            (1_000,),
            "ratio",
            "times",
            servers,
            about="an echo's 99th percentile, a new connection's 90th and an echo's CPU, beside clients that "
            "connect and say nothing, to those without",
            columns=("ratio", "new_ratio", "cpu_ratio", "p99_ms"),
            baseline="uvloop-protocol",
        ),
        Workload(
            "tls-storm",
            "tls",
            "storm",
            (CLIENTS,),
            "p99_ms",
            "ms",
            servers,
            about="an echo while others shake hands, all at once",
            columns=("p50_ms", "p99_ms", "last_ms"),
            baseline="uvloop-protocol",
        ),
    ]


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("close", "close", "load", (CLIENTS,), "cpu_us", "µs", about="accept and close"),
        Workload("echo", "echo", "load", (CLIENTS,), "cpu_us", "µs", about="18 bytes in, 18 out, close"),
        Workload("http", "http", "load", (CLIENTS,), "cpu_us", "µs", about="a request, a 200, close"),
        Workload(
            "http-ab",
            "http",
            "ab",
            (CLIENTS,),
            "cpu_us",
            "µs",
            (*_EVIDENCE, *_FAST, *_HTTP),
            about="http, asked by ApacheBench",
        ),
        Workload(
            "http-wrk",
            "http",
            "wrk",
            (CLIENTS,),
            "cpu_us",
            "µs",
            (*_EVIDENCE, *_FAST, *_HTTP),
            about="http, asked by wrk",
        ),
        Workload(
            "burst",
            "echo",
            "burst",
            (BURST,),
            "p99_ms",
            "ms",
            about="4,000 echo clients at once: percentiles from connect to the answer's end",
            columns=("p50_ms", "p99_ms", "p999_ms", "last_ms"),
        ),
        Workload(
            "take",
            "take",
            "take",
            (BURST,),
            "cpu_us",
            "µs",
            about="taking 4,000 clients that are queued already, not closing them",
        ),
        Workload(
            "idle",
            "hold",
            "hold",
            (HELD,),
            "bytes",
            "B",
            about="resident memory for one of 10,000 connections that wait",
        ),
        Workload("shed", "shed", "load", (CLIENTS,), "cpu_us", "µs", about="a refusal"),
        Workload(
            "threads",
            "echo",
            "load",
            (CLIENTS,),
            "cpu_us",
            "µs",
            (
                BASELINE,
                "ThreadingTCPServer",
                "fastlisten-ThreadingTCPServer",
                *(name for name in SERVERS if name.startswith("fastlisten-threads-")),
            ),
            about="echo with 1 to 64 threads",
        ),
        Workload(
            "concurrency",
            "echo",
            "load",
            (1, 64, 1024, 10_000),
            "cpu_us",
            "µs",
            (*_EVIDENCE, *_FAST),
            about="echo with 1 to 10,000 clients at once",
        ),
        *_requests("uvicorn"),
        *_requests("aiohttp"),
        *_messages("message", "protocol"),
        *_messages("stream", "streams"),
        *_tls(),
        *_tls_beside(),
    )
}

QUICK = ("close", "echo")
"""The workloads of --quick."""

FAMILIES = (
    ("close", "echo", "http"),
    *(tuple(framework + end for end in REQUESTS) for framework in ("uvicorn", "aiohttp")),
    *(tuple(f"{name}-{length}" for length in SIZES) for name in ("message", "stream")),
    ("tls-64", "tls-64k", "tls-new"),
)
"""The workloads that are drawn and that FIGURES.md has tables of, as far as a run has them; each family has
its own servers and one baseline."""
