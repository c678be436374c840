"""Other people's programs that ask a status port: HAProxy and curl."""

import contextlib
import csv
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastlisten import Connection, Listener, bind
from fastlisten._status.thread import StatusThread
from helpers import LOOPBACK, connect, needs, own_loopback, probes, read_all, serving, wait_until
from helpers.command import COMMAND, signals
from helpers.programs import run, running
from helpers.status import get

OPERATION = Path(__file__).parent.parent / "OPERATION.md"
GLOBAL = "global\n    stats socket unix@{folder}/admin level admin\n"


def settings(folder: Path, front: int, servers: str) -> str:
    """Return OPERATION.md's settings, those for weights included, with these servers and in less time."""
    first, weights = re.findall(r"```haproxy\n(.*?)```", OPERATION.read_text(encoding="utf-8"), re.DOTALL)
    text: str = re.sub(r"^    server [ab] .*\n", "", first, flags=re.MULTILINE) + weights + servers
    text = text.replace("bind :80\n", f"bind fd@{front}\n").replace("inter 1s", "inter 20ms")
    return GLOBAL.format(folder=folder) + text


class HAProxy:
    """HAProxy before servers that have a status port each."""

    def __init__(self, front: Any, folder: Path) -> None:
        self.front = front
        self._admin = str(folder / "admin")

    def command(self, text: str) -> str:
        """Say something to its socket; return the answer."""
        with connect(self._admin) as client:
            client.sendall(f"{text}\n".encode())
            return read_all(client).decode()

    def server(self, name: str) -> tuple[str, int]:
        """Return what it takes a server for, and its weight."""
        rows = csv.DictReader(self.command("show stat").removeprefix("# ").splitlines())
        row = next(row for row in rows if row["svname"] == name)
        return row["status"], int(row["weight"])

    def request(self) -> bytes:
        """Ask for something as a client does; return the answer."""
        with connect(self.front) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return read_all(client)


@contextlib.contextmanager
def haproxy(folder: Path, **servers: tuple[Any, Any]) -> Iterator[HAProxy]:
    """Run HAProxy until the block ends; servers: the address of each, and of its status port."""
    program = probes.haproxy()
    assert program is not None
    lines = [
        f"    server {name} {host}:{port} port {status[1]} agent-port {status[1]}"
        for name, ((host, port), status) in servers.items()
    ]
    with socket.create_server(("127.0.0.1", 0)) as front:
        text = settings(folder, front.fileno(), "\n".join([*lines, ""]))
        (folder / "haproxy.cfg").write_text(text)
        command = [program, "-db", "-f", str(folder / "haproxy.cfg")]
        with running(command, folder=folder, pass_fds=(front.fileno(),)):
            wait_until((folder / "admin").exists)
            yield HAProxy(front.getsockname(), folder)


def answer(connection: Connection) -> None:
    connection.recv(4096)
    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")


@needs("haproxy")
def test_haproxy_takes_the_weight_and_the_states(listener: Listener, tmp_path: Path) -> None:
    hold, go = threading.Semaphore(0), threading.Event()

    def handler(connection: Connection) -> None:
        if connection.recv(100) == b"hold":
            hold.release()
            go.wait(10)
        else:
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")

    with (
        StatusThread(bind(LOOPBACK), [listener]) as status,
        serving(listener, handler, threads=4),
        haproxy(tmp_path, a=(listener.getsockname(), status.endpoint.sockaddr)) as proxy,
    ):
        wait_until(lambda: proxy.server("a") == ("UP", 100))
        with connect(listener) as first, connect(listener) as second:
            for client in (first, second):
                client.sendall(b"hold")
                assert hold.acquire(timeout=10)
            wait_until(lambda: proxy.server("a") == ("UP", 50))
            go.set()
        wait_until(lambda: proxy.server("a") == ("UP", 100))
        assert b" 200 OK" in proxy.request()
        listener.pause()
        wait_until(lambda: proxy.server("a")[0].startswith("MAINT"))
        listener.resume()
        wait_until(lambda: proxy.server("a") == ("UP", 100))
        status.leave()
        wait_until(lambda: proxy.server("a")[0].startswith(("DRAIN", "DOWN")))


def free_address() -> tuple[str, int]:
    with socket.create_server((own_loopback(), 0)) as probe:
        address: tuple[str, int] = probe.getsockname()
    return address


@contextlib.contextmanager
def backend(address: tuple[str, int], status: tuple[str, int], *options: str) -> Iterator[Any]:
    arguments = ["serve", "{}:{}".format(*address), "http", "--status", "{}:{}".format(*status), *options]
    with running([*COMMAND, *arguments, "--lame-duck", "0.3"]) as process:
        yield process


def can_be_asked(status: tuple[str, int]) -> bool:
    with contextlib.suppress(OSError):
        return get(status, "/readyz").status == 200
    return False


@signals
@needs("haproxy", "Linux")
@pytest.mark.parametrize("workers", [(), ("--workers", "2")], ids=["threads", "workers"])
def test_restarts_behind_haproxy_fail_no_request(tmp_path: Path, workers: tuple[str, ...]) -> None:
    """Two servers, each of which is stopped and started again in its turn, under load."""
    places = {name: (free_address(), free_address()) for name in "ab"}
    failed: list[bytes | OSError] = []
    answered, over = [0], threading.Event()

    def come(proxy: HAProxy) -> None:
        while not over.is_set():
            try:
                found: bytes | OSError = proxy.request()
            except OSError as error:
                found = error
            if isinstance(found, OSError) or not found.startswith(b"HTTP/1.1 200 "):
                failed.append(found)
            answered[0] += 1

    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        stacks = {"a": first, "b": second}
        processes = {name: stacks[name].enter_context(backend(*places[name], *workers)) for name in places}
        wait_until(lambda: all(can_be_asked(status) for _, status in places.values()))
        with haproxy(tmp_path, **places) as proxy:
            wait_until(lambda: all(proxy.server(name)[0] == "UP" for name in places))
            thread = threading.Thread(target=come, args=[proxy])
            thread.start()
            try:
                for name in places:
                    processes[name].send_signal(signal.SIGTERM)
                    wait_until(lambda name=name: proxy.server(name)[0] != "UP")  # type: ignore[misc]
                    assert processes[name].wait(10) == 0
                    stacks[name].enter_context(backend(*places[name], *workers))
                    wait_until(lambda name=name: proxy.server(name)[0] == "UP")  # type: ignore[misc]
            finally:
                over.set()
                thread.join()
    assert failed == []
    assert answered[0] > 50


@needs("the curl command")
def test_curl(listener: Listener) -> None:
    with StatusThread(bind(LOOPBACK), [listener]) as status:
        url = f"http://{status.endpoint}"
        assert run(["curl", "-sS", "-f", f"{url}/readyz"], status=22).stdout == ""
        with serving(listener, answer, threads=1):
            wait_until(lambda: listener.stats().threads)
            assert run(["curl", "-sS", "-f", f"{url}/readyz"]).stdout == "serving\n"
            head = run(["curl", "-sS", "-I", f"{url}/metrics"]).stdout
            assert "HTTP/1.1 200 OK" in head
            done = run(["curl", "-sS", "-d", "x" * 100_000, f"{url}/metrics"])
            assert done.stdout == "only GET and HEAD\n"


@needs("the promtool command")
def test_prometheus_takes_the_settings(tmp_path: Path) -> None:
    found = re.search(r"```yaml\n(scrape_configs.*?)```", OPERATION.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    (tmp_path / "prometheus.yml").write_text(found[1])
    run(["promtool", "check", "config", str(tmp_path / "prometheus.yml")])
