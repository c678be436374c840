"""The options of bind() and serve(), each declared once: name, type, default, check, and systems."""

import os
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypedDict

if TYPE_CHECKING:
    from ssl import SSLContext
    from typing import Protocol

    from fastlisten._admission import Admission
    from fastlisten._proxy import Proxy

    class Watchdog(Protocol):
        """What is fed while a service makes progress; fastlisten.Notifier is one."""

        @property
        def interval(self) -> float | None:
            """How often, in seconds; None: never."""

        def feed(self) -> object:
            """Called that often."""
else:
    SSLContext = Watchdog = Proxy = Admission = Any


# A time that poll() still counts in milliseconds, in seconds; a longer one is as good as without end.
LONGEST = 1e6


class Option(NamedTuple):
    """What an option is beside its name and type.

    check(name, value) returns the value as it is kept; TypeError or ValueError names the option.  constant,
    level: of the `socket` module, for setsockopt(); None for an option that is set otherwise.  Where the
    constant is absent the option is refused.
    """

    default: Any
    check: Callable[[str, Any], Any]
    constant: str | None = None
    level: str | None = None


def whole(name: str, value: object, least: int) -> int:
    """An int of at least `least`; what is too large for C is as good as without end."""
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return min(value, 2**31 - 1)


def _any(name: str, value: Any) -> Any:
    return value


def _whole(least: int) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        return None if value is None else whole(name, value, least)

    return check


def _flag(name: str, value: Any) -> int | None:
    return 1 if value else None


def _thread_range(name: str, threads: Any) -> tuple[int, int]:
    if not isinstance(threads, tuple):
        number = whole(name, threads, 0)
        return number, number
    if len(threads) != 2:
        raise ValueError(f"{name} must be a number or (least, most), not {threads!r}")
    least, most = (whole(name, number, 1) for number in threads)
    if least > most:
        raise ValueError(f"{name}: the least, {least}, is above the most, {most}")
    return least, most


def _busy(name: str, value: Any) -> bytes | None:
    if value == "reset":
        return b""
    if isinstance(value, str):
        raise ValueError(f"{name} must be 'reset' or bytes, not {value!r}")
    if value is not None and not isinstance(value, bytes):
        raise TypeError(f"{name} must be 'reset' or bytes, not {type(value).__name__}")
    return value


def _exhausted(name: str, value: Any) -> Any:
    if not callable(value) and value not in ("pause", "shed"):
        raise ValueError(f"{name} must be 'pause', 'shed' or callable, not {value!r}")
    return value


def _callable(name: str, value: Any) -> Any:
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be callable, not {type(value).__name__}")
    return value


def _context(name: str, value: Any) -> Any:
    if value is None:
        return None
    import ssl  # only for who has one already: it is much to import

    if not isinstance(value, ssl.SSLContext):
        raise TypeError(f"{name} must be an ssl.SSLContext or None, not {type(value).__name__}")
    try:
        value.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)
    except (ValueError, ssl.SSLError) as error:  # a client's
        raise ValueError(f"{name}: {error}") from None
    return value


def _seconds(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    if not value > 0:
        raise ValueError(f"{name} must be above 0, not {value!r}")
    return min(value, LONGEST)


def _proxy(name: str, value: Any) -> Any:
    if value is None:
        return None
    from fastlisten._proxy import Proxy  # only for who has one already

    if not isinstance(value, Proxy):
        raise TypeError(f"{name} must be a Proxy or None, not {type(value).__name__}")
    return value


def _admission(name: str, value: Any) -> Any:
    if value is None:
        return None
    from fastlisten._admission import Admission  # only for who has one already

    if not isinstance(value, Admission):
        raise TypeError(f"{name} must be an Admission or None, not {type(value).__name__}")
    return value


def _watchdog(name: str, value: Any) -> Any:
    if value is not None and not (callable(getattr(value, "feed", None)) and hasattr(value, "interval")):
        raise TypeError(f"{name} must be a Notifier or None, not {type(value).__name__}")
    return value


def _workers(name: str, value: Any) -> int | None:
    if value == "auto":
        return usable_cores()
    if isinstance(value, str):
        raise ValueError(f"{name} must be a number or 'auto', not {value!r}")
    return None if value is None else whole(name, value, 1)


def usable_cores() -> int:
    """How many cores this process may use, by its affinity and its cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        # Of version 2, and of the container: "QUOTA PERIOD" in microseconds, or "max PERIOD".
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = map(int, file.read().split())
        return max(min(cores, -(-quota // period)), 1)
    except (OSError, ValueError):
        return cores


def _drain(name: str, value: Any) -> float | None:
    return 0.0 if value == 0 and isinstance(value, int | float) else _seconds(name, value)


class BindOptions(TypedDict, total=False):
    """What bind() takes beside the endpoint; its docstring says what each means."""

    backlog: Annotated[int | None, Option(None, _any)]
    reuse_port: Annotated[bool, Option(False, _flag, "SO_REUSEPORT", "SOL_SOCKET")]
    dualstack_ipv6: Annotated[bool, Option(False, _any)]
    exclusive: Annotated[bool, Option(False, _flag, "SO_EXCLUSIVEADDRUSE", "SOL_SOCKET")]
    defer_accept: Annotated[int | None, Option(None, _whole(0), "TCP_DEFER_ACCEPT", "IPPROTO_TCP")]
    fast_open: Annotated[int | None, Option(None, _whole(0), "TCP_FASTOPEN", "IPPROTO_TCP")]
    no_delay: Annotated[bool, Option(False, _flag, "TCP_NODELAY", "IPPROTO_TCP")]
    keep_alive: Annotated[bool, Option(False, _flag, "SO_KEEPALIVE", "SOL_SOCKET")]
    mode: Annotated[int | None, Option(None, _any)]
    replace_stale: Annotated[bool, Option(False, _flag)]


class ServeOptions(TypedDict, total=False):
    """What serve() takes beside the handler; the docstring of Listener.serve() says what each means."""

    threads: Annotated[int | tuple[int, int], Option(0, _thread_range)]
    max_connections: Annotated[int | None, Option(None, _whole(1))]
    pending: Annotated[int | None, Option(None, _whole(0))]
    busy: Annotated[str | bytes | None, Option(None, _busy)]
    exhausted: Annotated[str | Callable[[OSError, int], float], Option("pause", _exhausted)]
    on_error: Annotated[Callable[[Exception, Any], object] | None, Option(None, _callable)]


class TLSOptions(TypedDict, total=False):
    """And what it takes for TLS, which asyncio's servers have other names for."""

    ssl: Annotated[SSLContext | None, Option(None, _context)]
    handshake_timeout: Annotated[float | None, Option(None, _seconds)]


class FirstOptions(TypedDict, total=False):
    """And who may come in, and what a client has to do before a handler gets it."""

    first_bytes: Annotated[float | None, Option(None, _seconds)]
    proxy: Annotated[Proxy | None, Option(None, _proxy)]
    admission: Annotated[Admission | None, Option(None, _admission)]


class ServiceOptions(TypedDict, total=False):
    """And for a service manager; an event loop's is Notifier.feeding()."""

    watchdog: Annotated[Watchdog | None, Option(None, _watchdog)]


class StatusOptions(TypedDict, total=False):
    """Who asks about a service is answered there; the docstring of serve() says how."""

    status: Annotated[Any, Option(None, _any)]


class WorkerOptions(TypedDict, total=False):
    """How worker processes are run; the docstring of Workers says what each means."""

    workers: Annotated[int | str | None, Option(None, _workers)]
    drain: Annotated[float | None, Option(None, _drain)]
    ready_timeout: Annotated[float | None, Option(None, _seconds)]
    lame_duck: Annotated[float | None, Option(None, _drain)]


class AllOptions(
    BindOptions,
    ServeOptions,
    TLSOptions,
    FirstOptions,
    ServiceOptions,
    StatusOptions,
    WorkerOptions,
    total=False,
):
    """What fastlisten.serve() takes."""


class AsyncioOptions(ServeOptions, FirstOptions, total=False):
    """And what servers of fastlisten.aio have; the docstring of create_server() says what each means."""

    handshake_threads: Annotated[int, Option(0, _whole(0))]


class InnerOptions(ServeOptions, TLSOptions, FirstOptions, ServiceOptions, total=False):
    """And what the drop-in socketserver asks of the loop.

    leave: serve() returns without waiting for the handlers of its threads.  daemon: those are daemon threads.
    tick: for how many microseconds a handler keeps others from being accepted before another thread does
    that; 0 for the loop's own answer.
    """

    leave: Annotated[bool, Option(False, _any)]
    daemon: Annotated[bool, Option(True, _any)]
    tick: Annotated[int, Option(0, _any)]


class Checked:
    """Options that were checked, as attributes; they do not change any more."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        vars(self).update(values)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no option {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"option {name!r} does not change any more")


def declared(family: type) -> dict[str, Option]:
    """The options of BindOptions, ServeOptions or InnerOptions, by name."""
    found: dict[str, Option] = {}
    for base in (*getattr(family, "__orig_bases__", ()), family):
        hints = getattr(base, "__annotations__", {})
        found.update({name: hint.__metadata__[0] for name, hint in hints.items()})
    return found


def checked(family: type, caller: str, /, **given: Any) -> Checked:
    """The options of a family: those given, which are checked, and the defaults of the others.

    caller: whose options they are, for the error.  Raises TypeError for an unknown name, as a call does, and
    for a value of another type; ValueError for one that cannot be meant.
    """
    options = declared(family)
    for name in given:
        if name not in options:
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}")
    values = {}
    for name, option in options.items():
        values[name] = option.check(name, given.get(name, option.default))
    return Checked(values)


def socket_options(options: Checked, not_tcp: object = None) -> list[tuple[str, int, int, int]]:
    """The options of bind() that are set with setsockopt(): (name, level, option, value) of each.

    not_tcp: the endpoint, if it is none of TCP's.  Raises ValueError for an option that this kind of endpoint
    or this system lacks.
    """
    found = []
    for name, option in declared(BindOptions).items():
        value = getattr(options, name)
        if option.level is None or option.constant is None or value is None:
            continue
        if option.level == "IPPROTO_TCP" and not_tcp is not None:
            raise ValueError(f"{name} is for TCP, not for {not_tcp}")
        if not hasattr(socket, option.constant):
            raise ValueError(f"{name}: {option.constant} not supported on this platform")
        found.append((name, getattr(socket, option.level), getattr(socket, option.constant), value))
    return found
