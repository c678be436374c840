"""metrics: what listeners, servers, workers and admissions have counted, in formats that others read."""

import asyncio
import itertools
import json
import re
import signal
import threading
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest

import fastlisten
from fastlisten import Admission, Listener, aio, bind, metrics
from helpers import LOOPBACK, connect, echo, exchange, needs, posix_only, serving, wait_until
from helpers.programs import run
from helpers.workers import main, parent

SAMPLE = re.compile(r'(\w+)\{((?:\w+="(?:[^"\\\n]|\\[\\"n])*",?)*)\} (\S+)')


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Return the values by their names and labels' texts; a line that is none fails."""
    found: dict[tuple[str, ...], float] = {}
    for line in text.splitlines():
        if line.startswith("# "):
            continue
        match = SAMPLE.fullmatch(line)
        assert match is not None, line
        key = (match[1], *re.findall(r'"((?:[^"\\]|\\.)*)"', match[2]))
        assert key not in found, line
        found[key] = float(match[3])
    return found


@pytest.fixture
def busy(listener: Listener) -> Iterator[str]:
    """Have a listener with a client of each kind: handled, waited for a handler, refused; give its name."""
    go = threading.Event()

    def handler(connection: fastlisten.Connection) -> None:
        go.wait(10)
        echo(connection)

    with serving(listener, handler, threads=1, pending=1, busy=b"full"):
        clients = [connect(listener)]
        wait_until(lambda: listener.stats().pending_connections == 0 and listener.stats().active == 1)
        clients.append(connect(listener))
        wait_until(lambda: listener.stats().pending_connections == 1)
        clients.append(connect(listener))
        wait_until(lambda: listener.stats().refused == 1)
        go.set()
        for client in clients:
            client.close()
        wait_until(lambda: listener.stats().handled == 2 and listener.stats().idle_threads == 1)
        yield str(listener.endpoint)


def test_a_listener_s_counters_are_told(busy: str, listener: Listener) -> None:
    found = samples(metrics.exposition(listener))
    prefix = "fastlisten_"
    expected = {
        "accepted_connections_total": 3,
        "handled_connections_total": 2,
        "active_connections": 0,
        "pending_connections": 0,
        "connection_capacity": 2,
        "dropped_connections_total": 0,
        "handler_errors_total": 0,
        "paused": 0,
        "threads": 1,
        "start_time_seconds": listener.stats().since,
    }
    assert {name: found[prefix + name, busy] for name in expected} == expected
    assert found["fastlisten_build_info", fastlisten.__version__] == 1
    refused = {
        key[2]: value for key, value in found.items() if key[0] == f"{prefix}refused_connections_total"
    }
    assert refused == {**dict.fromkeys(refused, 0), "busy": 1}  # a reason's first client is an increase, too
    assert "rate" in refused


def test_waits_for_a_handler_are_a_histogram(busy: str, listener: Listener) -> None:
    text = metrics.exposition(listener)
    name = "fastlisten_pending_duration_seconds"
    buckets = re.findall(rf'^{name}_bucket{{.*le="(.*)"}} (\d+)$', text, re.MULTILINE)
    assert [bound for bound, _ in buckets][:2] == ["0.0005", "0.001"]
    assert buckets[-1][0] == "+Inf"
    times = listener.stats().pending_times
    counts = [int(count) for _, count in buckets]
    assert counts == list(itertools.accumulate(times.counts))
    assert counts[-1] in (1, 2)  # not who was refused; the first was waited for, or came before that
    found = samples(text)
    assert found[f"{name}_count", busy] == counts[-1]
    assert found[f"{name}_sum", busy] == times.seconds > 0
    bounds = [*metrics.WAIT_BOUNDS, float("inf")]
    assert times.seconds <= sum(
        bound * count for bound, count in zip(bounds, times.counts, strict=True) if count
    )


def test_nobody_waits_where_nobody_asked_for_a_queue(listener: Listener) -> None:
    with serving(listener, echo, threads=2):
        exchange(listener, b"x")
        found = metrics.exposition(listener)
    assert "pending_duration" not in found
    assert samples(found)["fastlisten_connection_capacity", str(listener.endpoint)] == 2


@pytest.mark.parametrize("openmetrics", [False, True])
def test_the_text_is_in_its_format(busy: str, listener: Listener, openmetrics: bool) -> None:
    text = metrics.exposition(listener, Admission(), openmetrics=openmetrics)
    heads = [line.split(" ")[1:3] for line in text.splitlines() if line.startswith("# ") and line != "# EOF"]
    assert len(heads) == len({tuple(head) for head in heads})  # HELP, TYPE and UNIT once each family
    assert text.endswith("\n# EOF\n" if openmetrics else "\n")
    for word, name in heads:
        assert word in ("HELP", "TYPE") or (openmetrics and name.endswith("_seconds"))
    counters = re.findall(r"^# TYPE (\w+) counter$", text, re.MULTILINE)
    assert counters
    assert {name.endswith("_total") for name in counters} == {not openmetrics}


@pytest.mark.parametrize("openmetrics", [False, True])
def test_another_parser_reads_the_same(busy: str, listener: Listener, openmetrics: bool) -> None:
    module = "prometheus_client.openmetrics.parser" if openmetrics else "prometheus_client.parser"
    parser = pytest.importorskip(module)
    text = metrics.exposition(listener, Admission(), openmetrics=openmetrics)
    theirs = {}
    for family in parser.text_string_to_metric_families(text):
        assert family.documentation
        assert family.unit == ("seconds" if openmetrics and family.name.endswith("_seconds") else "")
        for sample in family.samples:
            theirs[sample.name, *sample.labels.values()] = sample.value
    assert theirs == samples(text.removesuffix("# EOF\n"))


@needs("the promtool command")
def test_promtool_finds_nothing_to_say(busy: str, listener: Listener) -> None:
    import subprocess

    text = metrics.exposition(listener, Admission())
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Named:
    """A listener of this name."""

    def __init__(self, listener: Listener, endpoint: str) -> None:
        self.endpoint = endpoint
        self.stats = listener.stats


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "a\\nb", "ü", "a,b}"])
def test_a_label_says_what_it_is_of(listener: Listener, name: str) -> None:
    text = metrics.exposition(Named(listener, name))
    escaped = next(key[1] for key in samples(text) if key[0] == "fastlisten_paused")
    assert re.sub(r"\\(.)", lambda found: {"n": "\n"}.get(found[1], found[1]), escaped) == name


def test_a_path_that_is_no_text_is_told_all_the_same(listener: Listener) -> None:
    metrics.exposition(Named(listener, "unix:/tmp/\udcff")).encode()


def test_two_of_one_name_are_told_apart(listener: Listener) -> None:
    found = samples(metrics.exposition(listener, listener))
    assert {key[1] for key in found if key[0] == "fastlisten_paused"} == {
        str(listener.endpoint),
        f"{listener.endpoint}#2",
    }


def test_a_listener_that_is_closed_still_has_its_counters() -> None:
    with bind(LOOPBACK) as listener:
        connect(listener).close()
        listener.accept()[0].close()
    assert samples(metrics.exposition(listener))["fastlisten_accepted_connections_total", ""] == 1


def test_what_counts_nothing_is_refused() -> None:
    class Other:
        def stats(self) -> object:
            return {}

    with pytest.raises(TypeError, match="Other has no counters"):
        metrics.exposition(Other())


def test_an_admission_s_counters_are_told(listener: Listener) -> None:
    admission = Admission(deny=["127.0.0.0/8"])
    with serving(listener, echo, admission=admission), connect(listener) as client:
        assert client.recv(1) == b""
        wait_until(lambda: listener.stats().refused == 1)
    found = samples(metrics.exposition(listener, admission))
    assert found["fastlisten_admission_refused_total", "0", "denied"] == 1
    assert found["fastlisten_refused_connections_total", str(listener.endpoint), "denied"] == 1


def test_a_server_of_asyncio_is_told() -> None:
    async def main() -> tuple[str, str]:
        server = await aio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, max_connections=7)
        host, port = server.sockets[0].getsockname()
        reader, writer = await asyncio.open_connection(host, port)
        assert await reader.read() == b""
        writer.close()
        async with server:
            return f"{host}:{port}", metrics.exposition(server)

    name, text = aio.run(main())
    found = samples(text)
    assert found["fastlisten_accepted_connections_total", name] == 1
    assert found["fastlisten_connection_capacity", name] == 7


WORKERS = main("""
import threading
from fastlisten import metrics
workers = fastlisten.Workers(serve, '127.0.0.1:0', workers=2)
if hasattr(signal, "SIGUSR1"):
    signal.signal(TOLD, lambda *_: print("TEXT", repr(metrics.exposition(workers)), flush=True))
workers.run()
""")


@posix_only("a parent of workers that a signal asks")
def test_workers_are_told_apart_and_no_counter_falls() -> None:
    with parent(WORKERS) as running:

        def told() -> dict[tuple[str, ...], float]:
            running.send(signal.SIGUSR1)
            line = running.line_with("TEXT ")
            return samples(eval(line.removeprefix("TEXT ")))

        def accepted(found: dict[tuple[str, ...], float]) -> float:
            return sum(
                value for key, value in found.items() if key[0] == "fastlisten_accepted_connections_total"
            )

        workers = running.workers(2)
        before = told()
        assert {key[2] for key in before if key[0] == "fastlisten_worker_ready"} == {"0", "1"}
        assert {v for key, v in before.items() if key[0] == "fastlisten_worker_starts_total"} == {1}
        with running.connect() as client:  # keeps the one that has it in its drain
            client.sendall(b"say")
            client.recv(100)
            count = accepted(told())
            running.send(signal.SIGHUP)
            wait_until(lambda: set(running.workers(2).values()).isdisjoint(workers.values()))
            assert accepted(told()) >= count
        name = f"127.0.0.1:{running.address[1]}"
        assert told()["fastlisten_worker_starts_total", name, "0"] == 2
        running.end()


@needs("Linux")
def test_programs_as_workers_have_queues_alone() -> None:
    program = """
import fastlisten, threading
from fastlisten import metrics
from fastlisten._workers.workers import ProgramWorkers
workers = ProgramWorkers(["sleep", "60"], "127.0.0.1:0", workers=1)
workers._started = lambda: print(metrics.exposition(workers)) or exit()
workers.run()
"""
    found = samples(run(program).stdout.rstrip("\n"))
    names = {key[0] for key in found} - {"fastlisten_build_info"}
    assert names <= {"fastlisten_queued_connections", "fastlisten_queued_connections_limit"} | {
        "fastlisten_worker_ready",
        "fastlisten_worker_starts_total",
    }


def test_the_dashboard_asks_for_what_there_is(busy: str, listener: Listener) -> None:
    dashboard = json.loads(files("fastlisten").joinpath("grafana.json").read_text(encoding="utf-8"))
    text = [query["expr"] for panel in dashboard["panels"] for query in panel["targets"]]
    text += [str(variable["query"]) for variable in dashboard["templating"]["list"]]
    asked = set(re.findall(r"fastlisten_\w+", "\n".join(text)))
    there = set()
    for family in metrics.ALL:
        name = family.prometheus_name
        there.add({"counter": f"{name}_total", "histogram": f"{name}_bucket"}.get(family.kind, name))
    assert len(asked) > 10
    assert asked - there == set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_opentelemetry_observes_the_same(busy: str, listener: Listener) -> None:
    sdk: Any = pytest.importorskip("opentelemetry.sdk.metrics")
    reader = pytest.importorskip("opentelemetry.sdk.metrics.export").InMemoryMetricReader()
    provider = sdk.MeterProvider([reader])
    try:
        metrics.instrument(listener, meter=provider.get_meter("test"))
        data = reader.get_metrics_data()
    finally:
        provider.shutdown()
    found = {}
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        for point in metric.data.data_points:
            found[metric.name, *point.attributes.values()] = point.value
    assert found["fastlisten.accepted_connections", busy] == 3
    assert found["fastlisten.refused_connections", busy, "busy"] == 1
    theirs = {name.replace(".", "_") for name, *_ in found}
    ours = {key[0].removesuffix("_total") for key in samples(metrics.exposition(listener))}
    assert {name for name in ours if name.removesuffix("_seconds") not in theirs} == {
        f"fastlisten_pending_duration_seconds_{end}" for end in ("bucket", "sum", "count")
    }


def test_opentelemetry_reads_the_counters_once_a_collection(listener: Listener) -> None:
    """And anew in the next."""
    sdk: Any = pytest.importorskip("opentelemetry.sdk.metrics")
    reader = pytest.importorskip("opentelemetry.sdk.metrics.export").InMemoryMetricReader()
    provider = sdk.MeterProvider([reader])

    class Noted:
        reads = 0
        endpoint = listener.endpoint

        def stats(self) -> fastlisten.ListenerStats:
            self.reads += 1
            return listener.stats()

    def accepted() -> int:
        found = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
        (point,) = next(one for one in found if one.name.endswith(".accepted_connections")).data.data_points
        return int(point.value)

    noted = Noted()
    try:
        metrics.instrument(noted, meter=provider.get_meter("test"))
        assert (accepted(), noted.reads) == (0, 1)
        with connect(listener):
            listener.accept()[0].close()
        assert (accepted(), noted.reads) == (1, 2)
    finally:
        provider.shutdown()


def test_who_asks_for_no_metrics_imports_none() -> None:
    code = "import sys, fastlisten; print('fastlisten.metrics' in sys.modules, fastlisten.metrics.__name__)"
    assert run(code).stdout == "False fastlisten.metrics\n"
