"""The arguments: the parser, and the readers that turn their texts into values."""

from __future__ import annotations

import argparse
import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import fastlisten
from fastlisten._options import (
    BindOptions,
    FirstOptions,
    ServeOptions,
    StatusOptions,
    TLSOptions,
    WorkerOptions,
    declared,
)
from fastlisten.cli import output
from fastlisten.cli.errors import MISUSED, CommandError
from fastlisten.cli.log import FORMATS

DEFAULT_ENDPOINT = "127.0.0.1:11000"
# A client that is slow, or a person who types, must not hold up the next one.
DEFAULT_THREADS = (1, 64)
DEFAULT_DRAIN = 5.0
DEFAULT_FIRST_BYTES = 10.0
MOST = 999_999_999  # of whatever is counted: fits in a C int

EXAMPLES = f"""\
examples:
  fastlisten serve                                    echo, at {DEFAULT_ENDPOINT}
  fastlisten serve :8080 http --workers auto          a small web server, a process a core
  fastlisten serve :8080 service:handle --drain 30    handle(connection) of service.py
  fastlisten serve unix:/run/service.sock service:handle --mode 660 --replace-stale
"""

# The options of bind(), of serve() and of workers by name. One that has no argument here is never given.
BIND_OPTIONS = tuple(declared(BindOptions))
SERVE_OPTIONS = (*declared(ServeOptions), *declared(TLSOptions), *declared(FirstOptions))
ADMISSION_OPTIONS = (
    "allow",
    "deny",
    "exempt",
    "concurrent",
    "rate",
    "burst",
    "prefix4",
    "prefix6",
    "sources",
    "dry_run",
)
WORKER_OPTIONS = tuple(declared(WorkerOptions))
STATUS_OPTIONS = (*declared(StatusOptions), "status_control")


class Formatter(argparse.HelpFormatter):
    """Leaves a text of several lines, such as examples, as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """An argument parser that tells a mistake in one line.  Options have to be written out: what is short for
    one today would be ambiguous, or mean another, when there are more."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)", MISUSED)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write help and version; argparse's own passes over what cannot be written."""
        output.write_or_fail(message)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Parse, and tell of what is unknown here: the parser of all commands would name its own help."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown


def _number(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        digits = text.isascii() and text.isdigit()
        if digits and len(text) > len(str(MOST)):
            raise argparse.ArgumentTypeError(f"{text!r} is too large: the most is {MOST}")
        if not digits or int(text) < least:
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


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _workers(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return _number(1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor auto") from None


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
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)

    _add_serve(commands)
    _add_hosts(commands)
    _add_run(commands)
    _add_workers(commands)
    _add_top(commands)
    return top


def _add_serve(commands: argparse._SubParsersAction[Parser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="listen at an endpoint and hand each client to a handler",
        description="Listen at an endpoint and hand each client to a handler. SIGTERM drains: it "
        "lets the clients that are here finish, and so does SIGHUP without --workers. Ctrl-C ends at once. A "
        "service manager that has started it (NOTIFY_SOCKET) is told when it listens and when it drains, and "
        "its watchdog is fed.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
    )
    serve.add_argument(
        "endpoint",
        metavar="ENDPOINT",
        nargs="?",
        default=DEFAULT_ENDPOINT,
        help="host:port, [IPv6 address]:port, :port, unix:/path, unix:@name or fd:number; systemd:, "
        "systemd:name or inetd: for what these have passed; port 0 lets the system choose (default "
        "%(default)s)",
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
    _add_log_format(serve)
    serve.add_argument(
        "--drain",
        metavar="SECONDS",
        type=_seconds,
        default=DEFAULT_DRAIN,
        help="how long SIGTERM lets handlers finish (default %(default)g)",
    )
    processes = serve.add_argument_group("processes")
    processes.add_argument(
        "--workers",
        metavar="N|auto",
        type=_workers,
        help="serve in N processes, or in one a usable core; SIGHUP replaces them without losing a client",
    )
    _add_ready_timeout(processes)
    _add_operation(serve)
    _add_binding(serve)
    _add_serving(serve)
    _add_first(serve)
    _add_admission(serve)
    _add_tls(serve)


def _add_operation(parser: Parser) -> None:
    value = parser.add_argument_group("operation").add_argument
    value(
        "--status",
        metavar="ENDPOINT",
        help="answer there GET /metrics, /healthz and /readyz, and HAProxy's agent-check",
    )
    value(
        "--status-control",
        action="store_true",
        default=None,
        help="there answer POST /pause, /resume, /drain and /restart, too: whoever can connect can do it",
    )
    value(
        "--lame-duck",
        metavar="SECONDS",
        type=_seconds,
        help="after SIGTERM serve for so long before the drain, while /readyz says no and the agent-check "
        "drain (default 0)",
    )


def _add_log_format(parser: Parser) -> None:
    parser.add_argument(
        "--log-format",
        choices=FORMATS,
        default="text",
        help="json: print, and log to stderr, one JSON object a line, each with time, level and event "
        "(default %(default)s)",
    )


def _add_ready_timeout(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--ready-timeout",
        metavar="SECONDS",
        type=_seconds,
        help="how long a worker may take until it serves (default 30)",
    )


def _add_workers(commands: argparse._SubParsersAction[Parser]) -> None:
    workers = commands.add_parser(
        "workers",
        usage="fastlisten workers [OPTIONS] --bind ENDPOINT [--bind ENDPOINT ...] -- COMMAND [ARGUMENTS ...]",
        help="run any program in several processes, and replace them without losing a client",
        description="Run a program in several processes. Each inherits its listening sockets as systemd "
        "passes them (LISTEN_FDS), and is told the number of the first where the arguments say {fd}, and its "
        "own where they say {n}. SIGHUP replaces the processes one by one, SIGTTIN and SIGTTOU add and take "
        "one, SIGTERM ends them.",
    )
    value = workers.add_argument
    value(
        "--bind",
        metavar="ENDPOINT",
        action="append",
        required=True,
        help="where to listen, as for serve; the first may be followed by others",
    )
    value(
        "--workers", metavar="N|auto", type=_workers, default="auto", help="how many (default: %(default)s)"
    )
    value(
        "--drain",
        metavar="SECONDS",
        type=_seconds,
        default=DEFAULT_DRAIN,
        help="how long one that is asked to end may take (default %(default)g)",
    )
    value("--json", action="store_true", help="print one JSON object a line")
    _add_log_format(workers)
    _add_ready_timeout(workers)
    _add_operation(workers)
    _add_binding(workers)


def _add_binding(serve: Parser) -> None:
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
    flag("--replace-stale", help="take over a unix path whose socket nobody listens on any more")


def _add_serving(serve: Parser) -> None:
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


def _add_first(serve: Parser) -> None:
    value = serve.add_argument_group("what a client has to send first").add_argument
    value(
        "--first-bytes",
        metavar="SECONDS",
        type=_seconds,
        default=DEFAULT_FIRST_BYTES,
        help="close who has sent nothing for so long; until then he costs no thread. 0, for a handler that "
        "speaks first, asks for nothing (default %(default)g)",
    )
    value(
        "--proxy",
        metavar="NETWORK",
        action="append",
        help="read a PROXY header (HAProxy's) of clients from this address or network, or unix:, and let "
        "nobody else in; may be given several times",
    )
    value(
        "--proxy-optional",
        action="store_true",
        default=None,
        help="let clients from elsewhere in, without a header",
    )
    value(
        "--proxy-timeout",
        metavar="SECONDS",
        type=_seconds,
        help="how long a header may take (default 5)",
    )


def _add_admission(serve: Parser) -> None:
    group = serve.add_argument_group(
        "who may come in", "NETWORK is an address or a network, unix:, or unix: and a user's ID."
    )
    value = group.add_argument
    several = functools.partial(value, metavar="NETWORK", action="append")
    several("--allow", help="nobody else; may be given several times")
    several("--deny", help="not these")
    several("--exempt", help="these, whatever --allow and the limits say")
    value("--concurrent", metavar="N", type=_number(1), help="connections of one source at a time")
    value("--rate", metavar="N", type=_positive, help="connections of one source a second, on average")
    value("--burst", metavar="N", type=_number(1), help="how many may come at once (default: --rate)")
    value(
        "--prefix4",
        metavar="BITS",
        type=_number(0),
        help="how much of an IPv4 address is a source (default 32)",
    )
    value(
        "--prefix6", metavar="BITS", type=_number(0), help="how much of an IPv6 address is one (default 64)"
    )
    value("--sources", metavar="N", type=_number(1), help="how many sources are remembered (default 65536)")
    value(
        "--dry-run", action="store_true", default=None, help="let everybody in, and tell who would be refused"
    )


def _add_tls(serve: Parser) -> None:
    value = serve.add_argument_group("TLS").add_argument
    value(
        "--tls-cert",
        metavar="FILE",
        help="serve over TLS with this certificate, and those up to its issuer after it; changed files are "
        "served from then on",
    )
    value("--tls-key", metavar="FILE", help="its key, if that is not in the same file")
    value("--tls-ca", metavar="FILE", help="require a certificate of clients that one of these has issued")
    value(
        "--handshake-timeout",
        metavar="SECONDS",
        type=_seconds,
        help="how long a client may take for its handshake (default 10)",
    )


def _add_hosts(commands: argparse._SubParsersAction[Parser]) -> None:
    hosts = commands.add_parser(
        "hosts",
        help="print a host's names and addresses",
        description="Print what the system's resolver knows about a host.",
    )
    hosts.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="a host name or an address (default: this machine)",
    )
    hosts.add_argument("--json", action="store_true", help="print one JSON object")


def _add_run(commands: argparse._SubParsersAction[Parser]) -> None:
    run = commands.add_parser(
        "run",
        usage="fastlisten run [-h] [-m MODULE | SCRIPT] [ARGUMENTS ...]",
        help="run a Python program as it is, with fastlisten's servers in it",
        description="Run a Python program as it is, after fastlisten.patch(): socket, socketserver, "
        "http.server, asyncio's selector loop and uvloop are fastlisten's in it, and in the Python programs "
        "that it starts.",
    )
    program = run.add_mutually_exclusive_group()
    program.add_argument("-m", dest="module", metavar="MODULE", help="a module, as for python -m")
    program.add_argument(
        "script",
        metavar="SCRIPT",
        nargs="?",
        help="a file, or the name of an installed command, such as flask",
    )


def _add_top(commands: argparse._SubParsersAction[Parser]) -> None:
    top = commands.add_parser(
        "top",
        help="watch a service by its status port",
        description="Watch the counters of a service that has a status port (serve --status). The key q ends "
        "it; others pause, resume and drain the service and restart a worker, where it has --status-control.",
    )
    top.add_argument("endpoint", metavar="ENDPOINT", help="the status port")
    top.add_argument(
        "--interval",
        metavar="SECONDS",
        type=_positive,
        default=1.0,
        help="how long it is from one look to the next (default %(default)g)",
    )
    top.add_argument("--once", action="store_true", help="look twice, tell once, and end")
    top.add_argument("--json", action="store_true", help="with --once: print one JSON object")


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return the options that were given; for the others the library's defaults hold."""
    return {name: value for name in names if (value := getattr(options, name, None)) is not None}
