"""``python -m benchmarks.workers``: what several processes cost, and whom they lose.

Ours, a program of others under `fastlisten workers`, and the process managers of others, one after the
other and each asked the same: restart while clients come, block one worker, crash at start.  And for ours
alone: a worker that is killed with clients queued, how even it is, what many workers cost, and what the
parent costs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ._build import build

APP = "benchmarks.servers.workers_app"
ROOT = Path(__file__).parent.parent
REQUEST = "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
BLOCK = b"GET /block HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
WORKERS = 4
CLIENTS = 16
WINDOW = 4.0  # seconds in which a blocked worker is looked at: it is blocked for 5
CRASHING = 2  # workers: with one some have no parent
RESTART_EACH = 0.8  # seconds: longer than ours and shorter than others take
READY = 30.0  # seconds a server has until it answers

OURS = (
    "import fastlisten, {app} as app; "
    "fastlisten.Workers(app.target, '127.0.0.1:{port}', workers={n}, backlog=2048).run()"
)

# The command of each, and what restarts its workers.
SERVERS: dict[str, tuple[str, int | None]] = {
    "fastlisten": ("", signal.SIGHUP),
    "fastlisten workers -- uvicorn": (
        "-m fastlisten workers --bind 127.0.0.1:{port} --workers {n} -- "
        "{python} -m uvicorn {app}:asgi --fd {{fd}} --no-access-log --log-level critical",
        signal.SIGHUP,
    ),
    "gunicorn": ("-m gunicorn {app}:wsgi -b 127.0.0.1:{port} -w {n} --log-level critical", signal.SIGHUP),
    "gunicorn --reuse-port": (
        "-m gunicorn {app}:wsgi -b 127.0.0.1:{port} -w {n} --reuse-port --log-level critical",
        signal.SIGHUP,
    ),
    "uvicorn --workers": (
        "-m uvicorn {app}:asgi --port {port} --workers {n} --no-access-log --log-level critical",
        signal.SIGHUP,
    ),
    "granian": (
        "-m granian --interface asgi {app}:asgi --port {port} --workers {n} --no-log "
        "--respawn-failed-workers",
        signal.SIGHUP,
    ),
    "hypercorn": ("-m hypercorn {app}:asgi -b 127.0.0.1:{port} -w {n} --log-level critical", None),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(child) for child in found]


def descendants(pid: int) -> list[int]:
    return [one for child in children(pid) for one in (child, *descendants(child))]


def cpu(pid: int) -> float:
    """Return the seconds that a process has been running; clock_getcpuclockid(3)."""
    return time.clock_gettime((~pid << 3) | 2)


@contextlib.contextmanager
def server(name: str, n: int = WORKERS, wait: bool = True, **environment: str) -> Iterator[tuple[int, int]]:
    """Run a server until the block ends; gives the parent's process ID and the port."""
    port = free_port()
    command = SERVERS[name][0].format(app=APP, port=port, n=n, python=sys.executable)
    words = command.split() if command else ["-c", OURS.format(app=APP, port=port, n=n)]
    own = {"FASTLISTEN": "1"} if name == "fastlisten" else {}
    process = subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **own, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        if wait:
            answer(port, REQUEST.encode())
            time.sleep(0.5)  # the other workers
        yield process.pid, port
    finally:
        os.kill(process.pid, signal.SIGTERM)
        for _ in range(1000):  # not waited for yet: its number, and that of its group, are its own
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
                break
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)  # some leave workers when they end
        process.wait()


def answer(port: int, request: bytes) -> bytes:
    """Ask until there is an answer."""
    end = time.monotonic() + READY
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=READY) as client:
                client.sendall(request)
                if found := client.recv(4096):
                    return found
        except OSError:
            pass
        if time.monotonic() > end:
            raise SystemExit("a server does not answer")
        time.sleep(0.01)


def clients(port: int, count: int, seconds: float, many: int = CLIENTS) -> subprocess.Popen[str]:
    command = [str(build("losses.c")), str(port), str(count), str(many), str(seconds), REQUEST]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    output = process.communicate()[0]
    found: dict[str, Any] = json.loads(output)
    return found


def losses(port: int, count: int, goes_on: Callable[[], bool]) -> str:
    """Have so many clients come, and on while `goes_on`, which is asked all the time; return how many were
    lost, and how."""
    lost: Counter[str] = Counter()
    came, more = 0, count
    load = clients(port, more, 300.0)
    while True:
        on = goes_on()
        try:
            load.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        found = told(load)
        came += more
        lost.update({key: found[key] for key in ("refused", "reset", "timed_out", "wrong") if found[key]})
        if not on:
            return f"{lost.total()} of {came:,} {dict(lost) or ''}".rstrip()
        more = max(count // 10, 1)
        load = clients(port, more, 300.0)


def restarts(name: str, count: int, times: int) -> str:
    """Restart while clients come: return how many were lost."""
    number = SERVERS[name][1]
    if number is None:
        return "has no restart"
    with server(name) as (pid, port):
        begun = time.monotonic()
        done = 0

        def restart() -> bool:
            nonlocal done
            due = begun + done * RESTART_EACH
            if done < times and time.monotonic() >= due:
                os.kill(pid, number)
                done += 1
            return done < times or time.monotonic() < due

        return f"{losses(port, count, restart)}, {times} restarts"


def blocked(name: str) -> str:
    """Block one worker: return the 50th and 99th percentile and the longest, without it and with it."""
    with server(name) as (_, port):
        told(clients(port, 10**6, 1.0, 8))
        without = told(clients(port, 10**6, WINDOW, 8))
        with socket.create_connection(("127.0.0.1", port)) as stuck:
            stuck.sendall(BLOCK)
            time.sleep(0.05)
            within = told(clients(port, 10**6, WINDOW, 8))

    def figures(found: dict[str, Any]) -> str:
        return " / ".join(f"{found[key] / 1e6:.1f}" for key in ("p50", "p99", "p999", "max"))

    answers = f"{within['answered']:,} answers and before {without['answered']:,}"
    return f"{figures(without)}; blocked: {figures(within)} ms, {answers}"


def crashes(name: str, seconds: float) -> str:
    """Crash at start: return how often a worker was started, and what that cost the parent."""
    with tempfile.NamedTemporaryFile() as starts:
        with server(name, CRASHING, wait=False, STARTS=starts.name, CRASH="1") as (pid, _):
            time.sleep(1.0)  # the parent's own start is not what is asked for
            before = 0.0
            with contextlib.suppress(OSError):
                before = cpu(pid)
            time.sleep(seconds - 1.0)
            gone = not Path(f"/proc/{pid}/fd").is_dir() or not os.listdir(f"/proc/{pid}/fd")
            spent = (
                "the parent has ended" if gone else f"{(cpu(pid) - before) / (seconds - 1.0):.1%} of a core"
            )
        each = os.path.getsize(starts.name) / CRASHING
        return f"{each:g} starts of each of {CRASHING} in {seconds:g} s, {spent}"


def killed() -> str:
    """Kill a worker with clients queued: return how many of those were answered."""
    with server("fastlisten", 1) as (pid, port):
        worker = children(pid)[0]
        os.kill(worker, signal.SIGSTOP)
        load = clients(port, 500, 30.0, 500)
        time.sleep(1.0)
        os.kill(worker, signal.SIGKILL)
        found = told(load)
    return f"{found['answered']} of 500 answered, the last after {found['max'] / 1e6:.0f} ms"


def handed_over(count: int) -> str:
    """Hand over to another parent while clients come: return how many were lost."""
    with server("fastlisten") as (pid, port):
        workers = set(children(pid))
        end = time.monotonic() + READY
        successor = 0

        def is_there() -> bool:
            nonlocal successor
            successor = successor or next((child for child in children(pid) if child not in workers), 0)
            return bool(children(pid)) and time.monotonic() < end

        os.kill(pid, signal.SIGUSR2)  # the other one needs longer to begin than the clients
        lost = losses(port, count, is_there)
        ended = not children(pid)
        os.kill(successor, signal.SIGTERM)
        while Path(f"/proc/{successor}").exists() and children(successor):
            time.sleep(0.01)
    return f"{lost}, the old parent {'has ended' if ended else 'is there'}"


def ours(text: str, **streams: int) -> subprocess.Popen[str]:
    """Start a program that serves with the application of these benchmarks; the caller ends it."""
    environment = {**os.environ, "FASTLISTEN": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", text],
        stdout=streams.get("stdout"),
        stderr=streams.get("stderr"),
        text=True,
        cwd=ROOT,
        env=environment,
    )


def even(count: int) -> str:
    """Return how many clients the busiest and the idlest of the workers had."""
    text = (
        f"import fastlisten, {APP} as app, signal\n"
        f"workers = fastlisten.Workers(app.target, '127.0.0.1:0', workers={WORKERS}, backlog=2048)\n"
        "def tell(*_): print(*(row.accepted for row in workers.stats().workers), flush=True)\n"
        "signal.signal(signal.SIGUSR1, tell)\n"
        "signal.signal(signal.SIGALRM, lambda *_: print(workers.endpoints[0].port, flush=True))\n"
        "signal.setitimer(signal.ITIMER_REAL, 1)\n"
        "workers.run()\n"
    )
    process = ours(text, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        told(clients(port, count, 300.0))
        process.send_signal(signal.SIGUSR1)
        accepted = [int(number) for number in process.stdout.readline().split()]
    finally:
        process.terminate()
        process.wait()
    return f"{max(accepted) / min(accepted):.3f} ({min(accepted):,} to {max(accepted):,})"


def cost(many: int, count: int) -> str:
    """Return the CPU of all of ours for one connection, with 1 and with 16 workers, in µs."""
    spent = []
    for n in (1, 16):
        with server("fastlisten", n) as (pid, port):
            told(clients(port, count // 10, 60.0, many))
            all_of_them = [pid, *descendants(pid)]
            before, parent = sum(map(cpu, all_of_them)), cpu(pid)
            told(clients(port, count, 60.0, many))
            spent.append((sum(map(cpu, all_of_them)) - before) / count * 1e6)
            parent = (cpu(pid) - parent) / count * 1e6
    return (
        f"{spent[1] / spent[0]:.2f} ({spent[0]:.1f} and {spent[1]:.1f} µs, of which the parent {parent:.2f})"
    )


def beginning() -> str:
    """Return how long ours takes from its start until all of 4 workers serve, and the parent's memory."""
    times = []
    for _ in range(5):
        text = OURS.format(app=APP, port=0, n=WORKERS)
        text = f"import logging; logging.basicConfig(level=20, format='%(message)s'); {text}"
        start = time.monotonic()
        process = ours(text, stderr=subprocess.PIPE)
        assert process.stderr is not None
        while "all workers serve" not in process.stderr.readline():
            pass
        times.append(time.monotonic() - start)
        status = Path(f"/proc/{process.pid}/status").read_text()
        memory = int(status.split("VmRSS:")[1].split()[0]) / 1024
        process.terminate()
        process.communicate()
    return f"{min(times):.2f} to {max(times):.2f} s; the parent has {memory:.1f} MB"


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.workers", description=__doc__)
    p.add_argument("--connections", type=int, default=200_000, metavar="N")
    p.add_argument("--restarts", type=int, default=20, metavar="N", help="0: only the crash at start")
    p.add_argument("--crash", type=float, default=60.0, metavar="SECONDS", help="0: no crash at start")
    p.add_argument(
        "--only", metavar="NAMES", help="servers, by commas; or own, for the figures of ours alone"
    )
    options = p.parse_args(arguments)
    chosen = options.only.split(",") if options.only else [*SERVERS, "own"]
    for name in chosen:
        if name == "own":
            continue
        package = SERVERS[name][0].rpartition(" -- ")[2].partition("-m ")[2].partition(" ")[0] or "fastlisten"
        if importlib.util.find_spec(package) is None:
            print(f"{name}: not installed", flush=True)
            continue
        if options.restarts:
            print(f"{name}: lost: {restarts(name, options.connections, options.restarts)}", flush=True)
            print(f"{name}: p50 / p99 / p999 / longest: {blocked(name)}", flush=True)
        if options.crash:
            print(f"{name}: crash at start: {crashes(name, options.crash)}", flush=True)
    if "own" in chosen:
        print("killed with clients queued:", killed(), flush=True)
        print("lost when another parent takes over:", handed_over(options.connections // 4), flush=True)
        print("busiest to idlest:", even(options.connections // 2), flush=True)
        for many in (1, 8, 64):
            print(f"16 workers to 1, {many} clients:", cost(many, options.connections // 10), flush=True)
        print("until 4 workers serve:", beginning(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
