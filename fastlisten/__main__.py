"""The command line: `fastlisten serve` runs a listener, `fastlisten hosts` asks the resolver."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import glob
import importlib
import ipaddress
import json
import logging
import operator
import os
import queue
import re
import shutil
import signal
import socket
import stat
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import fastlisten
from fastlisten import Connection, Endpoint, Listener, ListenerStats, ServeResult
from fastlisten._endpoint import resolve
from fastlisten._listener import serve_options

DEFAULT_ENDPOINT = "127.0.0.1:11000"
# A client that is slow, or a person who types, must not hold up the next one.
DEFAULT_THREADS = (1, 64)
DEFAULT_DRAIN = 5.0

LIVE_INTERVAL = 0.5  # seconds between two states of the live line: readable, and seen to move
LINE_INTERVAL = 2.0  # seconds between two lines of a log, at least

FAILED, MISUSED, INTERRUPTED = 1, 2, 130  # exit statuses; 130 is the shells' 128 + SIGINT

BIND_OPTIONS = (
    "backlog",
    "reuse_port",
    "dualstack_ipv6",
    "exclusive",
    "defer_accept",
    "fast_open",
    "no_delay",
    "keep_alive",
    "mode",
)
SERVE_OPTIONS = ("threads", "max_connections", "pending", "busy", "exhausted")


class CommandError(Exception):
    """What ends the command: one line for stderr and the exit status."""

    def __init__(self, line: str, status: int) -> None:
        super().__init__(line)
        self.status = status


# --- The built-in handlers ---------------------------------------------------------------------

ECHO_SIZE = 65536
HTTP_SIZE = 65536  # the longest request head that is read, in bytes
HTTP_HEAD_END = re.compile(rb"\r?\n\r?\n")  # a person's telnet may leave out \r
HTTP_TIMEOUT = 10.0  # seconds a client may stay silent
HTTP_BODY = 1 << 26  # the longest request body that is read and dropped, in bytes
HTTP_CONTENT = b"fastlisten\n"


def echo(connection: Connection) -> None:
    """Send everything back until the client ends its side."""
    with contextlib.suppress(ConnectionError):  # the client left: nothing to tell anyone
        while data := connection.recv(ECHO_SIZE):
            connection.sendall(data)


def http(connection: Connection) -> None:
    """Read one HTTP/1 request and answer it with a small 200, then close."""
    connection.settimeout(HTTP_TIMEOUT)
    with contextlib.suppress(ConnectionError, TimeoutError):  # the client left or fell silent
        head = b""
        while not (end := HTTP_HEAD_END.search(head)):
            data = connection.recv(HTTP_SIZE)
            if not data:
                return
            head += data
            if len(head) > HTTP_SIZE:
                connection.sendall(_answer(b"431 Request Header Fields Too Large", b""))
                _discard(connection)
                return
        head, rest = head[: end.start()], head[end.end() :]
        content = b"" if head.startswith(b"HEAD ") else HTTP_CONTENT
        fields = head.lower()
        if b"\nexpect:" in fields and not rest:
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        connection.sendall(_answer(b"200 OK", content))
        if rest or b"\ncontent-length:" in fields or b"\ntransfer-encoding:" in fields:
            _discard(connection)


@functools.cache
def _answer(status: bytes, content: bytes) -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (
        status,
        len(HTTP_CONTENT) if status.startswith(b"200") else 0,
        content,
    )


def _discard(connection: Connection) -> None:
    """Read what the client still sends: closing with unread input makes the kernel send a reset,
    which can overtake the answer (RFC 9112, section 9.6)."""
    connection.shutdown(socket.SHUT_WR)
    left = HTTP_BODY
    while left > 0 and (data := connection.recv(ECHO_SIZE)):
        left -= len(data)


BUILT_IN: dict[str, Callable[[Connection], object]] = {"echo": echo, "http": http}


def load_handler(name: str) -> Callable[[Connection], object]:
    """Return a built-in handler, or import "module:function", also from the working directory."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, colon, path = name.partition(":")
    if not (colon and module_name and path):
        known = ", ".join(BUILT_IN)
        raise CommandError(f"handler {name!r} is neither {known} nor module:function", MISUSED)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does; an installed script does not
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code runs, and can raise anything
        text = f"handler {name!r}: {_import_failure(error)}"
        if isinstance(error, ImportError) and module_name.endswith(".py"):
            module_name = module_name.removesuffix(".py").replace("/", ".")
            text += f"; a module is named without its .py: {module_name}:{path}"
        raise CommandError(text, MISUSED) from error
    try:
        handler = operator.attrgetter(path)(module)
    except AttributeError as error:
        raise CommandError(f"handler {name!r}: {error}", MISUSED) from error
    if not callable(handler):
        raise CommandError(f"handler {name!r} is not callable but {type(handler).__name__}", MISUSED)
    return handler  # type: ignore[no-any-return]


def _import_failure(error: Exception) -> str:
    """Say in one line what went wrong, and where when it was in the imported code."""
    text = f"{type(error).__name__}: {error}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and frame.filename != __file__
    ]
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text


# --- Options -----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser that tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)", MISUSED)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Parse, and tell of what is unknown here: the parser of all commands would name its own help."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown


def _number(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or len(text) > 9 or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} on")
        return int(text)

    return read


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds")
    return seconds


def _threads(text: str) -> int | tuple[int, int]:
    try:
        numbers = [_number(0)(part) for part in text.split(",", 1)]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor MIN,MAX") from None
    if len(numbers) == 1:
        return numbers[0]
    least, most = numbers
    if least < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a minimum below 1; 0 for no threads stands alone")
    if least > most:
        raise argparse.ArgumentTypeError(f"{text!r} has its minimum above its maximum")
    return least, most


def _mode(text: str) -> int:
    if not text or not set(text) <= set("01234567") or int(text, 8) > 0o777:
        raise argparse.ArgumentTypeError(f"{text!r} is not an octal mode such as 600")
    return int(text, 8)


def _busy(text: str) -> str | bytes:
    if text == "reset":
        return text
    try:
        # What Latin-1 lacks becomes an escape too, so that one decoding reads everything.
        return text.encode("latin-1", "backslashreplace").decode("unicode_escape").encode()
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"{text!r} has a broken escape") from None


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = Parser(prog="fastlisten", description="Serve connections, or ask the resolver.")
    top.add_argument("--version", action="version", version=f"%(prog)s {fastlisten.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    serve = commands.add_parser(
        "serve",
        help="listen at an endpoint and hand each client to a handler",
        description="Listen at an endpoint and hand each client to a handler. SIGTERM drains: it "
        "lets the clients that are here finish. Ctrl-C ends at once.",
    )
    serve.set_defaults(run=serve_command)
    serve.add_argument(
        "endpoint",
        metavar="ENDPOINT",
        nargs="?",
        default=DEFAULT_ENDPOINT,
        help="host:port, [IPv6 address]:port, :port, unix:/path, unix:@name or fd:number; port 0 "
        "lets the system choose (default %(default)s)",
    )
    serve.add_argument(
        "handler",
        metavar="HANDLER",
        nargs="?",
        default="echo",
        help="module:function, called with each connection, or a built-in one: echo, or http, "
        "which answers any request with a small 200 (default %(default)s)",
    )
    serve.add_argument("--json", action="store_true", help="print one JSON object a line")
    serve.add_argument(
        "--drain",
        metavar="SECONDS",
        type=_seconds,
        default=DEFAULT_DRAIN,
        help="how long SIGTERM lets handlers finish (default %(default)g)",
    )

    binding = serve.add_argument_group("the listening socket")
    value = binding.add_argument
    flag = functools.partial(value, action="store_true", default=None)
    value("--backlog", metavar="N", type=_number(0), help="how many clients the kernel queues")
    flag("--reuse-port", help="share the port with other processes (SO_REUSEPORT)")
    flag("--dualstack-ipv6", help="take IPv4 clients at an IPv6 endpoint too")
    flag("--exclusive", help="let no other process take the port (SO_EXCLUSIVEADDRUSE)")
    value(
        "--defer-accept",
        metavar="SECONDS",
        type=_number(0),
        help="take a client when its first bytes are here (TCP_DEFER_ACCEPT)",
    )
    value(
        "--fast-open",
        metavar="N",
        type=_number(0),
        help="let N clients send with their first packet (TCP_FASTOPEN)",
    )
    flag("--no-delay", help="send small pieces at once (TCP_NODELAY)")
    flag("--keep-alive", help="ask silent clients whether they are there (SO_KEEPALIVE)")
    value("--mode", metavar="OCTAL", type=_mode, help="the unix socket's file mode, such as 600")

    serving = serve.add_argument_group("serving")
    serving.add_argument(
        "--threads",
        metavar="N|MIN,MAX",
        type=_threads,
        default=DEFAULT_THREADS,
        help="threads for the handler; 0 calls it in the main thread, one client at a time, which "
        "is the fastest for handlers that never wait (default {},{})".format(*DEFAULT_THREADS),
    )
    serving.add_argument("--max-connections", metavar="N", type=_number(1), help="clients served at one time")
    serving.add_argument(
        "--pending", metavar="N", type=_number(0), help="clients that wait before others are busy"
    )
    serving.add_argument(
        "--busy",
        metavar="reset|TEXT",
        type=_busy,
        help=r"what clients beyond --pending get: a reset, or TEXT, in which \r and \n are escapes",
    )
    serving.add_argument(
        "--exhausted",
        choices=("pause", "shed"),
        help="without descriptors or memory: wait, or refuse who waits",
    )

    hosts = commands.add_parser(
        "hosts",
        help="print a host's names and addresses",
        description="Print what the system's resolver knows about a host.",
    )
    hosts.set_defaults(run=hosts_command)
    hosts.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="a host name or an address (default: this machine)",
    )
    hosts.add_argument("--json", action="store_true", help="print one JSON object")
    return top


def _given(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the options that were given; for the others the library's defaults hold."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


# --- Output ------------------------------------------------------------------------------------


def _say(text: str) -> None:
    """Write to stdout at once, and carry on without it when its reader has gone.

    Raises OSError when it cannot be written for another reason, such as a full disk.
    """
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # "| head -1" has read enough
        _give_up_output()


def _give_up_output() -> None:
    """Let stdout lead nowhere, so that what its buffer still has does not fail once more at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _open_closed_streams() -> None:
    """Give a process that was started without stdout or stderr (">&-", pythonw) ones that lead nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)  # until the end, when nobody is left to close it
            setattr(sys, name, os.fdopen(nowhere, "w", encoding="utf-8", closefd=False))


class Report:
    """Tells what a listener does: a live line on a terminal, lines or JSON objects elsewhere.

    Used with `with`: the counters are told by a thread until the block ends.
    """

    def __init__(self, listener: Listener, as_json: bool) -> None:
        self._listener = listener
        self._json = as_json
        self._live = sys.stdout.isatty() and not as_json
        # What the thread is to tell now, None to end. A SimpleQueue and no Event, as a signal
        # handler puts here too: its put() is reentrant.
        self._news: queue.SimpleQueue[tuple[str, float] | None] = queue.SimpleQueue()
        self._output = threading.Lock()
        self._drawn = 0  # columns of the live line that are on the screen
        self._failed = False  # to write to stdout
        # A daemon, because Ctrl-C can come between its start and the block that would end it.
        self._thread = threading.Thread(target=self._tell, name="report", daemon=True)

    def __enter__(self) -> Report:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._news.put(None)
        self._thread.join()
        with self._output:
            if self._drawn:
                self._write("\n")
                self._drawn = 0

    def _write(self, text: str) -> None:
        """Say it; a service does not end because its log is full. The first failure is told on stderr."""
        try:
            _say(text)
        except OSError as error:
            if not self._failed:
                self._failed = True
                with contextlib.suppress(OSError):  # then nothing is left to tell it by
                    print(f"fastlisten: stdout: {error.strerror}; serving goes on", file=sys.stderr)

    def started(self, handler: str) -> None:
        """Tell the endpoint that was really bound."""
        endpoint = str(self._listener.endpoint)
        self._event(
            f"listening on {endpoint}",
            "started",
            endpoint=endpoint,
            handler=handler,
            process=os.getpid(),
        )

    def draining(self, why: str, seconds: float) -> None:
        """Tell that the drain has begun; for signal handlers: the thread does the telling."""
        self._news.put((why, seconds))

    def stopped(self, why: str | None, result: ServeResult | None) -> None:
        """Tell how it ended: why is the signal's name, result is None when it was interrupted."""
        stats = self._listener.stats()
        how = "stopped" if why is None else f"stopped by {why}"
        drain: dict[str, int] = {}
        if result is not None:
            how += f": {_connections(result.finished)} finished, {result.cut} cut"
            drain = {"finished": result.finished, "cut": result.cut}
        text = f"{how}; {stats.accepted} accepted, {stats.handled} handled"
        self._event(text, "stopped", signal=why, **drain, **_plain(stats))

    @contextlib.contextmanager
    def cleared(self) -> Iterator[None]:
        """Take the live line off the screen while something else writes there."""
        with self._output:
            if self._drawn:
                self._write(f"\r{' ' * self._drawn}\r")
                self._drawn = 0
            yield

    def _event(self, text: str, event: str, **values: object) -> None:
        if self._json:
            text = json.dumps({"event": event, **values}, default=str)
        with self.cleared():
            self._write(f"{text}\n")

    def _tell(self) -> None:
        interval = LIVE_INTERVAL if self._live else LINE_INTERVAL
        before, then = self._listener.stats(), time.monotonic()
        told = before
        while True:
            try:
                news = self._news.get(timeout=max(then + interval - time.monotonic(), 0))
            except queue.Empty:
                stats, now = self._listener.stats(), time.monotonic()
                rate = (stats.accepted - before.accepted) / (now - then)
                before, then = stats, now
                if self._live:
                    self._draw(_counters(stats, rate))
                elif stats != told:
                    self._counted(stats, rate)
                    told = stats
                continue
            if news is None:
                return
            why, seconds = news
            text = f"{why}: draining for at most {seconds:g} s"
            self._event(text, "draining", signal=why, seconds=seconds)

    def _counted(self, stats: ListenerStats, rate: float) -> None:
        text = f"{time.strftime('%H:%M:%S')} {_counters(stats, rate)}"
        self._event(text, "stats", per_second=round(rate, 1), **_plain(stats))

    def _draw(self, line: str) -> None:
        # One column less than there are: some terminals wrap when the last one is written.
        line = line[: max(shutil.get_terminal_size().columns - 1, 1)]
        with self._output:
            self._write(f"\r{line.ljust(self._drawn)}")
            self._drawn = len(line)


class LogLines(logging.StreamHandler[Any]):
    """Writes log records to stderr, beside the live line and not into it."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        with self._report.cleared():
            super().emit(record)


def _counters(stats: ListenerStats, rate: float) -> str:
    parts = [f"accepted {stats.accepted}", f"{rate:.0f}/s", f"active {stats.active}"]
    if stats.queue_depth is not None:
        parts.append(f"queue {stats.queue_depth}/{stats.queue_limit}")
    if stats.refused:
        parts.append(f"refused {stats.refused}")
    if stats.handler_errors:
        parts.append(f"handler errors {stats.handler_errors}")
    parts += [f"{name} {count}" for name, count in sorted(stats.accept_errors.items())]
    if stats.paused:
        parts.append("paused")
    return "  ".join(parts)


def _plain(stats: ListenerStats) -> dict[str, object]:
    """Return the stats as JSON can hold them."""
    values = stats._asdict()
    return {**values, "accept_errors": dict(stats.accept_errors)}


def _connections(count: int) -> str:
    return f"{count} connection" if count == 1 else f"{count} connections"


# --- Who holds a port --------------------------------------------------------------------------

PROC_LISTENING = "0A"  # TCP_LISTEN in include/net/tcp_states.h, as /proc/net/tcp writes it


def holder_of(endpoint: Endpoint) -> str | None:
    """Return the process that listens where endpoint cannot, as "name (process 123)".

    None where the system does not tell: this reads Linux's proc(5), and another user's processes
    do not show their sockets there.
    """
    try:
        inodes = _unix_inodes(endpoint) if not endpoint.port else _tcp_inodes(endpoint)
    except OSError:
        return None
    if not inodes:
        return None
    links = {f"socket:[{inode}]" for inode in inodes}
    for path in glob.iglob("/proc/[0-9]*/fd/*"):
        try:
            if os.readlink(path) in links:
                process = path.split("/")[2]
                with open(f"/proc/{process}/comm", encoding="utf-8", errors="replace") as comm:
                    return f"{comm.read().strip()} (process {process})"
        except OSError:
            continue  # it has ended, or is not ours to look into
    return None


def _tcp_inodes(endpoint: Endpoint) -> set[str]:
    ours = {ipaddress.ip_address(known.host.partition("%")[0] or "0.0.0.0") for known in resolve(endpoint)}
    everything = any(address.is_unspecified for address in ours)
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError), open(table, encoding="ascii") as lines:
            for columns in map(str.split, lines):
                if columns[3] != PROC_LISTENING:
                    continue
                address, _, port = columns[1].partition(":")
                theirs = _proc_address(address)
                clash = everything or theirs.is_unspecified or theirs in ours
                if clash and int(port, 16) == endpoint.port:
                    inodes.add(columns[9])
    return inodes


def _proc_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Read an address of /proc/net/tcp: words of 32 bits, each one in the machine's order."""
    words = (text[start : start + 8] for start in range(0, len(text), 8))
    return ipaddress.ip_address(b"".join(struct.pack("=I", int(word, 16)) for word in words))


def _unix_inodes(endpoint: Endpoint) -> set[str]:
    path = endpoint.host.removeprefix("unix:")
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as lines:
        found = (line.rstrip("\n").split(maxsplit=7) for line in lines)
        return {columns[6] for columns in found if columns[7:] == [path]}


# --- The commands ------------------------------------------------------------------------------


def serve_command(options: argparse.Namespace) -> int:
    """Bind, tell where, serve until a signal, tell how it ended; returns the exit status."""
    if options.endpoint in BUILT_IN:
        text = f"{options.endpoint} is a handler and needs an endpoint before it"
        raise CommandError(f"{text}: {DEFAULT_ENDPOINT} {options.endpoint}", MISUSED)
    try:
        endpoint = Endpoint.parse(options.endpoint)
    except ValueError as error:
        raise CommandError(f"{error}{_endpoint_hint(options.endpoint)}", MISUSED) from error
    handler = load_handler(options.handler)
    serving = _given(options, SERVE_OPTIONS)
    if "pending" in serving and "busy" not in serving:
        text = "--pending needs --busy, which says what clients beyond it get"
        raise CommandError(f"cannot serve {endpoint}: {text}", MISUSED)
    try:
        serve_options(handler, **serving)  # what is wrong with them is told before a socket opens
    except (TypeError, ValueError) as error:
        raise CommandError(f"cannot serve {endpoint}: {_as_option(error)}", MISUSED) from error
    try:
        listener = fastlisten.bind(endpoint, **_given(options, BIND_OPTIONS))
    except OSError as error:
        raise CommandError(_bind_failure(endpoint, error), FAILED) from error
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        # An option that does not fit the endpoint, or that this system does not have.
        raise CommandError(f"cannot listen on {endpoint}: {_as_option(error)}", MISUSED) from error
    with listener:
        return _serve(listener, handler, serving, options)


def _endpoint_hint(text: str) -> str:
    """Return what a text that is no endpoint was probably meant to be, as a question, or ""."""
    port = DEFAULT_ENDPOINT.rpartition(":")[2]
    meant = f":{text}" if text.isdecimal() else f"{text}:{port}"
    try:
        Endpoint.parse(meant)
    except ValueError:
        return ""
    return f"; is {meant} meant?"


def _as_option(error: Exception) -> str:
    """Return the words of an error that begin with a parameter's name with the option's in its place."""
    names = "|".join((*BIND_OPTIONS, *SERVE_OPTIONS))
    return re.sub(rf"^({names})\b", lambda name: "--" + name[0].replace("_", "-"), str(error))


def _serve(
    listener: Listener,
    handler: Callable[[Connection], object],
    serving: dict[str, Any],
    options: argparse.Namespace,
) -> int:
    report = Report(listener, options.json)
    signals = _drain_on_signals(listener, options.drain, report)
    # Without effect when the handler's module has set logging up for itself.
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", handlers=[LogLines(report)])
    result, status, why = None, 0, None
    try:
        report.started(options.handler)
        with report:
            result = listener.serve(handler, **serving)
    except KeyboardInterrupt:
        status, why = INTERRUPTED, "SIGINT"
    except OSError as error:
        raise CommandError(f"serving {listener.endpoint} failed: {error}", FAILED) from error
    report.stopped(why or (signals[-1] if signals else None), result)
    return status


def _drain_on_signals(listener: Listener, seconds: float, report: Report) -> list[str]:
    """Let SIGTERM, and Ctrl-Break on Windows, drain; the names that came are in the result."""
    names: list[str] = []

    def stop(number: int, _: object) -> None:
        name, drain = signal.Signals(number).name, 0 if names else seconds
        listener.stop(drain=drain)  # the second time means now
        report.draining(name, drain)
        names.append(name)

    for name in ("SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)
    return names


def _bind_failure(endpoint: Endpoint, error: OSError) -> str:
    text = f"{error.strerror or error}"
    if error.errno == errno.EADDRINUSE:
        if holder := holder_of(endpoint):
            text += f" by {holder}"
        elif endpoint.host.startswith("unix:/"):
            text = _path_in_use(endpoint.host.removeprefix("unix:")) or text
    elif error.errno == errno.EACCES and 0 < endpoint.port < 1024:
        text += ": ports below 1024 need privileges"
    return f"cannot listen on {endpoint}: {text}"


def _path_in_use(path: str) -> str | None:
    """Say what stands where a unix socket cannot be made; None where that is a socket in use, or unknown."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return "a directory is there"
        if not stat.S_ISSOCK(mode):
            return "a file that is no socket is there"
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            client.connect(path)
    except ConnectionRefusedError:
        return "a socket is there on which nobody listens any more: remove it"
    except OSError:  # it is not ours to look at, it listens and its queue is full, or it has gone
        return None
    return None


NO_NAME = (1, 4, 11001, 11004)  # HOST_NOT_FOUND and NO_DATA of <netdb.h>, and Winsock's for them


def hosts_command(options: argparse.Namespace) -> int:
    """Print a host entry; returns the exit status."""
    name = fastlisten.get_host_name() if options.name is None else options.name
    try:
        entry = fastlisten.get_host_entry(name)
    except (OSError, TypeError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else error
        if isinstance(error, socket.herror) and error.errno in NO_NAME:
            text = "no name is known for this address"
        raise CommandError(f"cannot look up {name!r}: {text}", FAILED) from error
    if options.json:
        values = {
            "name": entry.name,
            "aliases": entry.aliases,
            "addresses": [str(address) for address in entry.addresses],
        }
        text = json.dumps(values) + "\n"
    else:
        rows = [("name", entry.name)]
        rows += [("alias", alias) for alias in entry.aliases]
        rows += [("address", str(address)) for address in entry.addresses]
        text = "".join(f"{label:8}{value}\n" for label, value in rows)
    try:
        _say(text)
    except OSError as error:
        raise CommandError(f"cannot write to stdout: {error.strerror}", FAILED) from error
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 failed, 2 misused, 130 Ctrl-C."""
    _open_closed_streams()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # odd paths
    try:
        options = parser().parse_args(arguments)
        status: int = options.run(options)
        return status
    except CommandError as error:
        line = " ".join(str(error).split())
        print(f"fastlisten: {line}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # told already
            _give_up_output()


if __name__ == "__main__":
    sys.exit(main())
