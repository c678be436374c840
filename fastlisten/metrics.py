"""The counters of listeners, servers and workers, for Prometheus and for OpenTelemetry."""

from __future__ import annotations

import functools
import operator
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fastlisten._core.state import REFUSALS, WAIT_BOUNDS
from fastlisten._endpoint import endpoint_of
from fastlisten._listener import ListenerStats, PendingTimes

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Meter, Observation

__all__ = ["CONTENT_TYPE", "OPENMETRICS_CONTENT_TYPE", "WAIT_BOUNDS", "exposition", "instrument"]

# What an HTTP answer with an exposition() says of it.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class Counted(Protocol):
    """What has counters: a Listener, a server of fastlisten.aio, a Workers, an Admission."""

    def stats(self) -> Any: ...


class Family(NamedTuple):
    """A metric: the same of each listener and worker.

    name, unit: as OpenTelemetry has them.  prometheus_name, sample_name: as it translates them; that of the
    samples has the _total of a counter.  kind: "counter", "gauge" or "histogram".  read: gives it from the
    stats: a number, a PendingTimes, or {reason: number}; None: there is none.
    """

    name: str
    prometheus_name: str
    sample_name: str
    kind: str
    unit: str
    text: str
    read: Callable[[Any], float | Mapping[str, int] | PendingTimes | None]


_CLIENTS = "{connection}"
_NEVER = dict.fromkeys(("busy", *REFUSALS), 0)


def _refused(stats: ListenerStats) -> Mapping[str, int]:
    """All reasons, so that the first of each is an increase, too."""
    return {**_NEVER, **stats.refused_for}


def _family(name: str, kind: str, unit: str, text: str, read: str | Callable[[Any], Any]) -> Family:
    prometheus_name = f"fastlisten_{name}" + ("_seconds" if unit == "s" else "")
    sample_name = prometheus_name + ("_total" if kind == "counter" else "")
    reads = operator.attrgetter(read) if isinstance(read, str) else read
    return Family(f"fastlisten.{name}", prometheus_name, sample_name, kind, unit, text, reads)


# Named after those of ASP.NET Core's Kestrel, which are OpenTelemetry's example of a server's connections.
LISTENERS = (
    _family(
        "accepted_connections", "counter", _CLIENTS, "Connections taken from the kernel's queue.", "accepted"
    ),
    _family(
        "handled_connections", "counter", _CLIENTS, "Connections that were closed or taken over.", "handled"
    ),
    _family(
        "active_connections",
        "gauge",
        _CLIENTS,
        "Connections that are open, or whose client waits for a handler.",
        "active",
    ),
    _family(
        "waiting_connections",
        "gauge",
        _CLIENTS,
        "Connections whose client has to send something before a handler gets it.",
        "waiting",
    ),
    _family(
        "pending_connections",
        "gauge",
        _CLIENTS,
        "Connections that wait for a handler, where pending= and busy= ask for that.",
        "pending_connections",
    ),
    _family(
        "pending_duration",
        "histogram",
        "s",
        "How long connections have waited for a handler, of those that had to, where busy= lets them.",
        lambda stats: stats.pending_times if any(stats.pending_times.counts) else None,
    ),
    _family(
        "connection_capacity",
        "gauge",
        _CLIENTS,
        "Connections that may be with handlers, or pending, at a time.",
        lambda stats: stats.capacity or None,
    ),
    _family("queued_connections", "gauge", _CLIENTS, "Connections in the kernel's queue.", "queue_depth"),
    _family(
        "queued_connections_limit", "gauge", _CLIENTS, "How many the kernel queues at most.", "queue_limit"
    ),
    _family(
        "refused_connections",
        "counter",
        _CLIENTS,
        "Connections that were refused, by reason; busy is for want of a place.",
        _refused,
    ),
    _family(
        "dropped_connections",
        "counter",
        _CLIENTS,
        "Connections that were closed before a handler got them, because serving ended.",
        "dropped",
    ),
    _family("handler_errors", "counter", "{error}", "Handlers that raised an exception.", "handler_errors"),
    _family("accept_errors", "counter", "{error}", "Accepts that failed, by errno.", "accept_errors"),
    _family(
        "tls_handshakes",
        "counter",
        "{handshake}",
        "TLS handshakes that were completed.",
        "tls_handshakes",
    ),
    _family(
        "tls_handshake_failures",
        "counter",
        "{handshake}",
        "TLS handshakes that failed, by reason.",
        "tls_failures",
    ),
    _family("paused", "gauge", "1", "Whether accepting is paused: 1, or 0.", lambda stats: int(stats.paused)),
    _family("threads", "gauge", "{thread}", "Threads that handle connections.", "threads"),
    _family("idle_threads", "gauge", "{thread}", "Those of them that wait for a connection.", "idle_threads"),
    _family("start_time", "gauge", "s", "Since when all this is counted, in Unix time.", "since"),
)
# What a parent does not know of its workers; and all that it knows where they are other programs, or of a
# listener that all of them share.
_NOT_OF_WORKERS = {"fastlisten.threads", "fastlisten.idle_threads"}
_QUEUES = {"fastlisten.queued_connections", "fastlisten.queued_connections_limit"}
_NOT_OF_PROGRAMS = {family.name for family in LISTENERS} - _QUEUES

WORKERS = (
    _family("worker_ready", "gauge", "1", "Whether it serves: 1, or 0.", lambda worker: int(worker.ready)),
    _family(
        "worker_starts",
        "counter",
        "{process}",
        "Processes that were started for the worker, its replacements among them.",
        "starts",
    ),
)

ADMISSIONS = (
    _family("admission_admitted", "counter", _CLIENTS, "Connections that admission= let in.", "admitted"),
    _family(
        "admission_refused",
        "counter",
        _CLIENTS,
        "Connections that it refused, or with dry_run would have, by reason.",
        "refused",
    ),
    _family(
        "admission_open_connections", "gauge", _CLIENTS, "Connections that count for concurrent=.", "open"
    ),
    _family("admission_sources", "gauge", "{source}", "Sources that are remembered.", "sources"),
    _family(
        "admission_replaced_sources",
        "counter",
        "{source}",
        "Sources that were forgotten to remember another.",
        "replaced",
    ),
)

_BUILD = (_family("build_info", "gauge", "1", "The version of fastlisten.", lambda _: 1),)

ALL = (*_BUILD, *LISTENERS, *WORKERS, *ADMISSIONS)


class Row:
    """What families are read from, and whose it is; without: families that it is not for."""

    __slots__ = ("labels", "source", "text", "without")

    def __init__(self, source: Any, without: Collection[str] = (), **labels: str) -> None:
        self.source = source
        self.without = without
        self.labels = labels
        self.text = ",".join([f'{name}="{_escaped(value)}"' for name, value in labels.items()])


Values = list[tuple[Row, Any]]
"""Whose it is, and what Family.read() gives."""


def exposition(*listeners: Counted, openmetrics: bool = False) -> str:
    """What listeners, servers, workers and admissions have counted, as text for a Prometheus server.

    listeners: a Listener, a server of fastlisten.aio, a Workers, an Admission.  openmetrics: in the format
    OpenMetrics 1.0, and not in Prometheus' text format 0.0.4.  CONTENT_TYPE and OPENMETRICS_CONTENT_TYPE say
    which it is.  Any thread may call it; nothing that is served is held up.

    The labels: `listener`, an endpoint, or several of them with commas between; `worker`, its number;
    `reason`.  A second listener of the same endpoint has "#2" behind that.  Raises TypeError for what has no
    such counters.

    >>> import fastlisten
    >>> from fastlisten import metrics
    >>> with fastlisten.bind("127.0.0.1:0") as listener:
    ...     text = metrics.exposition(listener)
    >>> print(*[line for line in text.splitlines() if "build" in line], sep="\\n")
    # HELP fastlisten_build_info The version of fastlisten.
    # TYPE fastlisten_build_info gauge
    fastlisten_build_info{version="..."} 1
    """
    lines: list[str] = []
    for family, values in _values(listeners):
        samples = _samples(family, values)
        if not samples:
            continue
        head = family.prometheus_name if openmetrics else family.sample_name
        lines += (f"# HELP {head} {family.text}", f"# TYPE {head} {family.kind}")
        if openmetrics and family.unit == "s":
            lines.append(f"# UNIT {head} seconds")
        lines += samples
    if openmetrics:
        lines.append("# EOF")
    lines.append("")
    return "\n".join(lines)


def _samples(family: Family, values: Values) -> list[str]:
    """The lines of a family; there are many, and a scrape is to take no time."""
    name = family.sample_name
    lines: list[str] = []
    for row, value in values:
        kind = type(value)
        if kind is int or kind is float:
            lines.append(f"{name}{{{row.text}}} {value}")
        elif isinstance(value, PendingTimes):
            lines += _histogram(name, row.text, value)
        else:
            start = f"{name}{{{row.text},"
            lines += [f"{start}{_reason(reason)}}} {number}" for reason, number in value.items()]
    return lines


def _histogram(name: str, labels: str, times: PendingTimes) -> Iterator[str]:
    count = 0
    for bound, more in zip((*WAIT_BOUNDS, "+Inf"), times.counts, strict=True):
        count += more
        yield f'{name}_bucket{{{labels},le="{bound}"}} {count}'
    yield f"{name}_sum{{{labels}}} {times.seconds}"
    yield f"{name}_count{{{labels}}} {count}"


@functools.lru_cache(1024)
def _reason(reason: str) -> str:
    return f'reason="{_escaped(reason)}"'


@functools.lru_cache(1024)
def _escaped(text: str) -> str:
    """As both formats have it in a label; what UTF-8 has not is as Python writes it."""
    if not text.isprintable():
        text = text.encode("utf-8", "backslashreplace").decode()
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


# --- what there is to tell


def _values(sources: Iterable[Counted]) -> Iterator[tuple[Family, Values]]:
    """What each family is of each row that has it."""
    for families, rows in _rows(sources):
        for family in families:
            name, read = family.name, family.read
            values = [(row, read(row.source)) for row in rows if name not in row.without]
            yield family, [one for one in values if one[1] is not None]


def _rows(sources: Iterable[Counted]) -> list[tuple[tuple[Family, ...], list[Row]]]:
    listeners: list[Row] = []
    workers: list[Row] = []
    admissions: list[Row] = []
    names: dict[str, int] = {}
    source: Any
    for source in sources:
        stats = source.stats()
        name = _name_of(source)
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            name += f"#{names[name]}"
        if isinstance(stats, ListenerStats):
            listeners.append(Row(stats, listener=name))
        elif hasattr(stats, "workers"):
            without = _NOT_OF_WORKERS if source.counts else _NOT_OF_PROGRAMS
            for number, one in enumerate(stats.workers):
                listeners.append(Row(one, without, listener=name, worker=str(number)))
            if all(one.queue_depth is None for one in stats.workers):
                listeners.append(Row(stats.total, _NOT_OF_PROGRAMS, listener=name))
            workers += [Row(one, listener=name, worker=str(one.number)) for one in source.processes()]
        elif hasattr(stats, "admitted"):
            admissions.append(Row(stats, admission=str(len(admissions))))
        else:
            raise TypeError(f"{type(source).__name__} has no counters of connections")
    build = [Row(None, version=_version())]
    return [(_BUILD, build), (LISTENERS, listeners), (WORKERS, workers), (ADMISSIONS, admissions)]


def _name_of(source: Any) -> str:
    """Where it listens."""
    try:
        if (endpoints := getattr(source, "endpoints", None)) is not None:
            return ",".join(map(str, endpoints))
        if hasattr(source, "endpoint"):
            return str(source.endpoint)
    except OSError:  # it is closed
        return ""
    names = [sock.getsockname() for sock in getattr(source, "sockets", ())]
    return ",".join(str(endpoint_of(name.encode() if isinstance(name, str) else name)) for name in names)


def _version() -> str:
    """The package's, which imports nothing that imports it."""
    version: str = vars(sys.modules["fastlisten"])["__version__"]
    return version


# --- OpenTelemetry


def instrument(*listeners: Counted, meter: Meter | None = None) -> None:
    """Have OpenTelemetry observe what listeners, servers, workers and admissions count.

    listeners: as exposition() takes them.  meter: the opentelemetry.metrics.Meter that makes the instruments;
    None is the one called "fastlisten" of the provider of this process.  What they count is read once,
    whenever a reader collects.  There is no histogram: OpenTelemetry has none that is only observed.

    Raises ModuleNotFoundError without the package opentelemetry-api.
    """
    from opentelemetry import metrics  # only for who asks for it

    found = metrics.get_meter("fastlisten", _version()) if meter is None else meter
    kinds = {"counter": found.create_observable_counter, "gauge": found.create_observable_gauge}
    collected = _Collected(listeners)
    for family in ALL:
        if family.kind in kinds:
            kinds[family.kind](
                family.name, [_observer(collected, family)], unit=family.unit, description=family.text
            )


class _Collected:
    """What listeners count, read once for all instruments: a collection asks each of them once.

    So who asks again begins another collection.
    """

    def __init__(self, listeners: Iterable[Counted]) -> None:
        self._listeners = listeners
        self._left: dict[str, Values] = {}  # who has not asked yet
        self._lock = threading.Lock()

    def take(self, family: Family) -> Values:
        with self._lock:
            if family.name not in self._left:
                self._left = {one.name: values for one, values in _values(self._listeners)}
            return self._left.pop(family.name)


def _observer(collected: _Collected, family: Family) -> Callable[[CallbackOptions], Iterable[Observation]]:
    from opentelemetry.metrics import Observation

    def observe(_: CallbackOptions) -> Iterable[Observation]:
        for row, value in collected.take(family):
            if isinstance(value, Mapping):
                for reason, number in value.items():
                    yield Observation(number, row.labels | {"reason": reason})
            else:
                yield Observation(value, row.labels)

    return observe
