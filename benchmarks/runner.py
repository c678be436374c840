"""Start a server, load it, read its CPU clock: one sample. And the plan of many samples.

What is measured is the process's CPU clock (clock_getcpuclockid(3): scheduler time in ns, all
threads, those that ended included), read by the load generator right before its first and after
its last connection. /proc/PID/stat has the same total in ticks of 10 ms, and the only split into
user and system; the split is sampled (CONFIG_HZ), so it takes seconds of CPU to be worth reading.
getrusage(RUSAGE_CHILDREN) would add the start and the end of the interpreter.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

from ._build import build
from .servers import Server
from .workloads import Workload

START_LIMIT = 120.0
"""Seconds a server has to print its port: under valgrind, on a busy machine, it takes half a minute."""

LOAD_LIMIT = 120
"""Seconds one run of the load generator may take."""

WARM_UP = 500
"""Answers before the measured ones, to warm caches."""

CONNECTIONS = (200, 400_000)
"""Least and most answers of a sample."""

BURSTS = 8
"""Bursts of a sample."""


@dataclass(frozen=True)
class Cell:
    """What one sample measures: a server under a workload with so many clients."""

    workload: Workload
    concurrency: int
    server: Server

    @property
    def group(self) -> tuple[str, int]:
        """Cells of one group and round are compared with each other."""
        return self.workload.name, self.concurrency


@dataclass(frozen=True)
class Sample:
    """One measurement. `figures` holds times a connection in µs unless the name says otherwise."""

    workload: str
    concurrency: int
    server: str
    round: int
    figures: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


@dataclass
class Settings:
    """How much to measure."""

    rounds: int
    cpu_seconds: float
    """CPU time of the server that a sample should be made of."""
    probe: int = 2_000
    """Connections after the warm-up and before the measured ones, to learn what one costs."""
    alive: bool = False
    """The servers of a group run all the time that it is measured, not each for its sample."""
    limit_s: float | None = None
    """No round begins that would probably end later than this; the first always does."""
    server_core: int = field(default_factory=lambda: sorted(os.sched_getaffinity(0))[0])
    load_core: int = field(default_factory=lambda: sorted(os.sched_getaffinity(0))[-1])
    seed: int = 1


class SampleError(Exception):
    """A sample could not be taken; the message says which and why."""


def raise_file_limit() -> None:
    """Allow this process and its children as many descriptors as the system lets them have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def read_line(stream: IO[str], seconds: float) -> str:
    """Return a line that comes within so many seconds, or raise TimeoutError.

    The stream must be read with this function only, a whole line at a time.
    """
    ready, _, _ = select.select([stream], [], [], seconds)
    if not ready:
        raise TimeoutError(f"no line within {seconds} s")
    return stream.readline()


@dataclass(frozen=True)
class Running:
    """A server that has printed its port."""

    process: subprocess.Popen[str]
    port: int

    def ask(self, line: str) -> str:
        """Write a line to the server and return the line it answers with."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return read_line(self.process.stdout, START_LIMIT).strip()

    def cpu_ns(self) -> int:
        """Return the CPU time that this process has used, as clock_getcpuclockid(3) tells it."""
        return time.clock_gettime_ns(~self.process.pid << 3 | 2)  # MAKE_PROCESS_CPUCLOCK in Linux

    def resident(self) -> int:
        """Return the bytes of memory that are this process's own."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"^RssAnon:\s+(\d+) kB$", text, re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024


@contextmanager
def running(server: Server, work: str, core: int | None, *prefix: str) -> Iterator[Running]:
    """Run a server, pinned to a core; kill and reap it at the end."""
    command = [*prefix, sys.executable, "-m", "benchmarks.servers", server.name, work]
    if core is not None:
        command.append(str(core))
    with tempfile.TemporaryFile("w+") as words:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        assert process.stdout is not None
        try:
            yield Running(process, int(read_line(process.stdout, START_LIMIT)))
        except (SampleError, OSError, ValueError) as error:  # TimeoutError is an OSError
            words.seek(0)
            said = words.read()[-2000:].strip()
            raise SampleError(f"{server.name} {work}: {error}" + (f"\n{said}" if said else "")) from error
        finally:
            process.terminate()
            process.communicate()


def load_command(
    work: str,
    port: int,
    pid: int,
    warm_up: int,
    count: int,
    concurrency: int,
    bursts: int = 1,
    requests: int = 1,
    size: int = 0,
) -> list[str]:
    """Return the command of the load generator; load.c says what the numbers mean."""
    numbers = (port, pid, warm_up, count, concurrency, bursts, LOAD_LIMIT, requests, size)
    return [str(build("load.c")), work, *map(str, numbers)]


def load(
    server: Running, work: str, warm_up: int, count: int, concurrency: int, *more: int
) -> dict[str, float]:
    """Run the load generator on a server and return what it measured, raw. more: as load_command()."""
    command = load_command(work, server.port, server.process.pid, warm_up, count, concurrency, *more)
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise SampleError(answer.stderr.strip())
    raw: dict[str, float] = json.loads(answer.stdout)
    return raw


def figures(raw: dict[str, float]) -> dict[str, float]:
    """Turn the generator's raw answer into figures an answer; a connection has one unless the workload
    says otherwise."""
    n = raw["answers"]
    cpu = raw["cpu_ns"] / n / 1e3
    ticks = raw["user_ticks"] + raw["system_ticks"]
    return {
        "connections": n,
        "cpu_us": cpu,
        # The total is exact and its split is sampled: share the total out by the ticks.
        "user_us": cpu * raw["user_ticks"] / ticks if ticks else 0.0,
        "system_us": cpu * raw["system_ticks"] / ticks if ticks else 0.0,
        "user_ticks": raw["user_ticks"],
        "system_ticks": raw["system_ticks"],
        "load_us": raw["load_cpu_ns"] / n / 1e3,
        "busy": raw["cpu_ns"] / raw["wall_ns"],
        "wall_us": raw["wall_ns"] / n / 1e3,
        "p50_ms": raw["p50_ns"] / 1e6,
        "p99_ms": raw["p99_ns"] / 1e6,
        "p999_ms": raw["p999_ns"] / 1e6,
        "last_ms": raw["last_ns"] / 1e6,
    }


def measure_load(server: Running, cell: Cell, settings: Settings, sizes: Sizes) -> dict[str, float]:
    """Answers in a closed loop: so many as take `cpu_seconds`."""
    work = cell.workload.work
    more = (1, cell.workload.requests, cell.workload.size)
    count = sizes.get(cell)
    if count is None:
        probe = load(server, work, WARM_UP, settings.probe, cell.concurrency, *more)
        least, most = CONNECTIONS
        count = round(settings.cpu_seconds / (probe["cpu_ns"] * 1e-9 / probe["answers"]))
        # A run should be long against its own beginning and end.
        count = max(min(count, most), least, 4 * cell.concurrency)
        sizes[cell] = count
        return figures(load(server, work, 0, count, cell.concurrency, *more))
    return figures(load(server, work, WARM_UP + settings.probe, count, cell.concurrency, *more))


def measure_burst(server: Running, cell: Cell, _: Settings, __: Sizes) -> dict[str, float]:
    """All at once, several times; the next begins when the last client has its answer."""
    return figures(load(server, cell.workload.work, WARM_UP, cell.concurrency, cell.concurrency, BURSTS))


@contextmanager
def held(server: Running, count: int) -> Iterator[None]:
    """Keep so many clients connected."""
    client = subprocess.Popen(
        load_command("hold", server.port, 0, 0, 1, count),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdout is not None
    try:
        if not read_line(client.stdout, LOAD_LIMIT):
            raise SampleError("the clients could not connect")
        yield
    finally:
        client.communicate("\n")


def measure_hold(server: Running, cell: Cell, _: Settings, __: Sizes) -> dict[str, float]:
    """Resident memory for a held connection, after a first hundred have warmed the server."""
    with held(server, 100):
        settle(server)
        before = server.resident()
        with held(server, cell.concurrency):
            settle(server)
            return {"bytes": (server.resident() - before) / cell.concurrency}


def settle(server: Running) -> None:
    """Wait until the server's CPU clock stands still (five looks, 20 ms apart, alike)."""
    last, alike = -1, 0
    for _ in range(1500):
        cpu = server.cpu_ns()
        alike = alike + 1 if cpu == last else 0
        if alike == 5:
            return
        last = cpu
        select.select([], [], [], 0.02)
    raise SampleError("the server does not come to rest")


TAKES = 10
"""Queues that a sample takes."""


def measure_take(server: Running, cell: Cell, _: Settings, __: Sizes) -> dict[str, float]:
    """CPU time, told by the server itself, to take clients that are queued already."""
    elapsed = []
    for _turn in range(TAKES):
        with held(server, cell.concurrency):
            elapsed.append(int(server.ask(str(cell.concurrency))) / cell.concurrency / 1e3)
    return {"cpu_us": sorted(elapsed)[TAKES // 2]}


def tls_program(name: str, *numbers: int) -> tuple[subprocess.Popen[str], IO[str], IO[str]]:
    """Start a program that plays clients of TLS; return it and both its streams, the caller's to end."""
    client = subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{name}", *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert client.stdin is not None
    assert client.stdout is not None
    return client, client.stdin, client.stdout


def load_tls(server: Running, cell: Cell, count: int) -> tuple[int, int]:
    """Run the clients of TLS; return the answers, about `count`, and the server's CPU time for them."""
    workload = cell.workload
    numbers = (server.port, cell.concurrency, count, workload.requests, workload.size)
    client, stdin, stdout = tls_program("tls_load", *numbers)
    try:
        if not read_line(stdout, START_LIMIT):
            raise SampleError("the clients could not connect")
        settle(server)
        before = server.cpu_ns()
        stdin.write("\n")
        stdin.flush()
        answers = int(read_line(stdout, LOAD_LIMIT) or 0)
        settle(server)
        if not answers:
            raise SampleError("a client had no answer")
        return answers, server.cpu_ns() - before
    finally:
        client.communicate("\n")


def measure_tls(server: Running, cell: Cell, settings: Settings, sizes: Sizes) -> dict[str, float]:
    """Answers over TLS in a closed loop: so many as take `cpu_seconds`."""
    answers, cpu = load_tls(server, cell, sizes.get(cell, 4 * cell.concurrency))
    if cell not in sizes:
        least, most = CONNECTIONS
        sizes[cell] = max(min(round(settings.cpu_seconds / (cpu * 1e-9 / answers)), most), least)
        answers, cpu = load_tls(server, cell, sizes[cell])
    return {"connections": answers, "cpu_us": cpu / answers / 1e3}


@contextmanager
def tls_client(server: Running) -> Iterator[Callable[[str], list[float]]]:
    """Run a client of TLS, and give what asks it for something, as tls_others.py says; the times in ms."""
    client, stdin, stdout = tls_program("tls_others", server.port)

    def ask(line: str) -> list[float]:
        stdin.write(line + "\n")
        stdin.flush()
        answer = read_line(stdout, LOAD_LIMIT)
        if not answer:
            raise SampleError("the client has ended")
        return [1e3 * seconds for seconds in json.loads(answer)]

    try:
        if not read_line(stdout, START_LIMIT):
            raise SampleError("the client could not connect")
        yield ask
    finally:
        client.communicate()


def percentile(times: list[float], share: float) -> float:
    """Return what so large a share of the times is not above."""
    return sorted(times)[min(len(times) - 1, int(len(times) * share))]


TURNS = 7
"""How often a sample looks at a server without and with those who say nothing."""

ECHOES, HANDSHAKES = 1_000, 50
"""Of a look."""


def measure_silent(server: Running, cell: Cell, _: Settings, __: Sizes) -> dict[str, float]:
    """How long others wait, by turns without and with clients that connect and say nothing."""
    looks: dict[str, list[float]] = {}

    def look(who: str) -> None:
        settle(server)
        before = server.cpu_ns()
        echoes = ask(f"echo {ECHOES}")
        figures = {
            "cpu_us": (server.cpu_ns() - before) / ECHOES / 1e3,
            "p99_ms": percentile(echoes, 0.99),
            "new_p90_ms": percentile(ask(f"new {HANDSHAKES}"), 0.9),  # too few for the 99th
        }
        for name, value in figures.items():
            looks.setdefault(who + name, []).append(value)

    with tls_client(server) as ask:
        ask(f"echo {WARM_UP}")
        for _turn in range(TURNS):
            look("alone ")
            with held(server, cell.concurrency):
                look("")
    medians = {name: median(values) for name, values in looks.items()}
    return {
        "ratio": medians["p99_ms"] / medians["alone p99_ms"],
        "new_ratio": medians["new_p90_ms"] / medians["alone new_p90_ms"],
        "cpu_ratio": medians["cpu_us"] / medians["alone cpu_us"],
        **medians,
    }


STORMS = 12
"""Of a sample."""


def measure_storm(server: Running, cell: Cell, _: Settings, __: Sizes) -> dict[str, float]:
    """How long an echo takes while others shake hands, so many at once, several times."""
    times: list[float] = []
    with tls_client(server) as ask:
        ask(f"echo {WARM_UP}")
        for _storm in range(STORMS):
            times += ask(f"storm {cell.concurrency}")
            settle(server)
    return {
        "p50_ms": percentile(times, 0.5),
        "p99_ms": percentile(times, 0.99),
        "last_ms": max(times),
        "echoes": len(times) / STORMS,
    }


def outside_client(command: list[str], server: Running, pattern: str) -> dict[str, float]:
    """Run a client that is not ours, and return the server's CPU time a request."""
    settle(server)
    before = server.cpu_ns()
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    settle(server)
    elapsed = server.cpu_ns() - before
    found = re.search(pattern, answer.stdout)
    if answer.returncode != 0 or found is None:
        raise SampleError(f"{command[0]}: {answer.stderr.strip() or answer.stdout.strip()}")
    count = int(found[1])
    return {"connections": count, "cpu_us": elapsed / count / 1e3}


def measure_ab(server: Running, cell: Cell, settings: Settings, _: Sizes) -> dict[str, float]:
    """ApacheBench: every request must be answered with 2xx, and all alike."""
    count = max(1_000, round(settings.cpu_seconds * 20_000))
    url = f"http://127.0.0.1:{server.port}/"
    command = ["ab", "-q", "-n", str(count), "-c", str(cell.concurrency), url]
    result = outside_client(command, server, r"Complete requests:\s+(\d+)\nFailed requests:\s+0\n")
    if result["connections"] != count:
        raise SampleError(f"ab: {result['connections']} of {count} answered")
    return result


def measure_wrk(server: Running, cell: Cell, settings: Settings, _: Sizes) -> dict[str, float]:
    """wrk, for a time instead of a count; it connects anew when the server closes."""
    seconds = max(1, round(settings.cpu_seconds))
    url = f"http://127.0.0.1:{server.port}/"
    command = ["wrk", "-t1", f"-c{cell.concurrency}", f"-d{seconds}s", url]
    # A line between the two would tell of socket errors or of answers other than 2xx and 3xx.
    return outside_client(command, server, r"(\d+) requests in .*\nRequests/sec")


Sizes = dict[Cell, int]
METHODS: dict[str, Callable[[Running, Cell, Settings, Sizes], dict[str, float]]] = {
    "load": measure_load,
    "burst": measure_burst,
    "hold": measure_hold,
    "take": measure_take,
    "tls": measure_tls,
    "silent": measure_silent,
    "storm": measure_storm,
    "ab": measure_ab,
    "wrk": measure_wrk,
}


def plan(cells: list[Cell], rounds: int, seed: int, by_group: bool = False) -> list[tuple[int, Cell]]:
    """Return the order of samples: rounds over groups, each group's servers in a new order.

    Servers of a group stand side by side, so that what disturbs the machine disturbs them alike.
    by_group: all rounds of a group come before the next group.
    """
    shuffle = random.Random(seed).shuffle
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    order = []
    for turn in range(rounds):
        for group in groups.values():
            servers = list(group)
            shuffle(servers)
            order += [(turn, cell) for cell in servers]
    if by_group:
        order.sort(key=lambda planned: list(groups).index(planned[1].group))
    return order


class Sampler:
    """Takes samples: of a server that is started for each, or with `settings.alive` for its group.

    Closed by whoever made it.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.sizes: Sizes = {}
        self.group: tuple[str, int] | None = None
        self.alive: dict[str, tuple[ExitStack, Running]] = {}

    def start(self, cell: Cell) -> tuple[ExitStack, Running]:
        """Start the cell's server; the ExitStack ends it."""
        stack = ExitStack()
        return stack, stack.enter_context(running(cell.server, cell.workload.work, self.settings.server_core))

    def take(self, turn: int, cell: Cell) -> Sample:
        """Measure once. Raises SampleError, and then the server is ended."""
        if cell.group != self.group:
            self.close()
            self.group = cell.group
        name = cell.server.name
        stack, server = self.alive.pop(name) if name in self.alive else self.start(cell)
        with stack:
            result = METHODS[cell.workload.method](server, cell, self.settings, self.sizes)
            if self.settings.alive:
                self.alive[name] = stack.pop_all(), server
        return Sample(cell.workload.name, cell.concurrency, name, turn, result)

    def close(self) -> None:
        """End the servers that are alive."""
        while self.alive:
            _, (stack, _) = self.alive.popitem()
            stack.close()
