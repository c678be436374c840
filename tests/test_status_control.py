"""--status-control: what a POST at the status port does, to whom it is refused, and that it is off."""

from __future__ import annotations

import signal
import sys
from http import HTTPStatus
from typing import Any

import pytest

import fastlisten
from fastlisten._status.answers import answer
from fastlisten._status.control import RefusedError
from fastlisten._status.weight import Weight
from helpers import connect, needs, read_all, wait_until
from helpers.command import COMMAND, Server, is_one_line, serve, signals
from helpers.command import run as run_command
from helpers.status import Answer, agent, get, post
from helpers.workers import WAITS, parent
from test_status import Idle, status_of


class Noted:
    """A Control that notes what it is told to do; it has one worker, 0."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def _do(self, what: str) -> str:
        self.done.append(what)
        return what

    def pause(self) -> str:
        return self._do("paused")

    def resume(self) -> str:
        return self._do("resumed")

    def drain(self) -> str:
        return self._do("draining")

    def restart(self, worker: int | None) -> str:
        if worker:
            raise RefusedError(HTTPStatus.NOT_FOUND, f"there is no worker {worker}")
        return self._do(f"restarting {worker}")

    def told(self, path: str, text: str) -> None:
        self.done.append(path)


def asked(text: str, control: Noted | None) -> Answer:
    found = answer(text.encode(), Idle(), Weight(Idle()), control)
    assert found is not None
    return Answer(found)


def metric(address: Any, name: str) -> list[str]:
    """Return what a metric is, of each worker or of the listener."""
    lines = get(address, "/metrics").text.splitlines()
    return [line.split()[-1] for line in lines if line.startswith(f"fastlisten_{name}{{")]


FIELD = "X-Fastlisten-Control: 1\r\n"


@pytest.mark.parametrize(
    ("target", "status", "text"),
    [
        ("/pause", 200, "paused"),
        ("/resume", 200, "resumed"),
        ("/drain", 202, "draining"),
        ("/restart", 202, "restarting None"),
        ("/restart?worker=0", 202, "restarting 0"),
        ("http://a:1/restart?worker=0", 202, "restarting 0"),
        ("/restart?worker=7", 404, "there is no worker 7"),
        ("/restart?worker=99999999999999999999", 404, "there is no worker 999999999"),
        ("/restart?worker=-1", 400, "only /restart takes something: ?worker=NUMBER"),
        ("/restart?worker=", 400, "only /restart takes something: ?worker=NUMBER"),
        ("/restart?worker=0&worker=1", 400, "only /restart takes something: ?worker=NUMBER"),
        ("/restart?all=0", 400, "only /restart takes something: ?worker=NUMBER"),
        ("/pause?worker=0", 400, "only /restart takes something: ?worker=NUMBER"),
        ("/metrics", 405, "only GET and HEAD"),
        ("/nothing", 405, "only GET and HEAD"),
    ],
)
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_what_a_post_does(version: str, target: str, status: int, text: str) -> None:
    control = Noted()
    found = asked(f"POST {target} HTTP/{version}\r\nContent-Length: 1\r\n{FIELD}\r\nx", control)
    assert (found.status, found.text) == (status, f"{text}\n")
    path = "/" + target.split("://a:1/")[-1].lstrip("/").partition("?")[0]
    assert control.done == ([text, path] if status < 300 else [])  # what is done is told


@pytest.mark.parametrize("target", ["/pause", "/resume", "/drain", "/restart"])
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ("", "it needs the field X-Fastlisten-Control: 1"),
        ("Origin: http://127.0.0.1:9100\r\n", "it needs the field"),
        (FIELD + "Origin: http://a.example\r\n", "not for pages in a browser"),
        ("x-FASTLISTEN-control:\r\norigin: null\r\n", "not for pages in a browser"),
    ],
)
def test_a_page_in_a_browser_can_do_nothing(target: str, fields: str, text: str) -> None:
    """One of another site, nor one whose name has come to mean this address."""
    control = Noted()
    found = asked(f"POST {target} HTTP/1.1\r\nHost: a\r\n{fields}\r\n", control)
    assert (found.status, control.done) == (403, [])
    assert text in found.text
    preflight = (
        f"OPTIONS {target} HTTP/1.1\r\nOrigin: http://a\r\nAccess-Control-Request-Method: POST\r\n\r\n"
    )
    found = asked(preflight, control)
    assert (found.status, found.fields["Allow"], control.done) == (405, "POST", [])
    assert not any(name.startswith("Access-Control") for name in found.fields)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
def test_only_a_post_does_something(method: str) -> None:
    control = Noted()
    found = asked(f"{method} /drain HTTP/1.1\r\n{FIELD}\r\n", control)
    assert (found.status, found.fields["Allow"], control.done) == (405, "POST", [])
    assert found.text == ("" if method == "HEAD" else "only POST\n")


@pytest.mark.parametrize("target", ["/pause", "/resume", "/drain", "/restart", "/readyz"])
def test_without_the_option_nothing_is_done(target: str) -> None:
    found = asked(f"POST {target} HTTP/1.1\r\n{FIELD}\r\n", None)
    assert (found.status, found.fields["Allow"]) == (405, "GET, HEAD")
    assert asked("GET /pause HTTP/1.1\r\n\r\n", None).status == 404


def test_the_option_needs_a_status_port() -> None:
    is_one_line(run_command("serve", "--status-control"), 2, "--status-control needs --status")
    arguments = ["workers", "--bind", ":0", "--status-control", "--", "true"]
    is_one_line(run_command(*arguments), 2, "--status-control needs --status")


# --- the command


def controlled(server: Server) -> Any:
    address = status_of(server)
    wait_until(lambda: get(address, "/readyz").status == 200)
    return address


def echoes(server: Server) -> bool:
    with connect(server.target) as client:
        client.sendall(b"x")
        client.shutdown(1)
        return read_all(client) == b"x"


@pytest.mark.parametrize(
    "options",
    [
        ("--threads", "0"),
        ("--threads", "2"),
        ("--workers", "2"),
    ],
    ids=" ".join,
)
def test_a_service_is_paused_resumed_and_drained(options: tuple[str, str]) -> None:
    """A client that comes in the pause waits, and is served after it."""
    with serve("127.0.0.1:0", "--status", "127.0.0.1:0", "--status-control", *options) as server:
        address = controlled(server)
        assert post(address, "/pause") == (200, "paused")
        assert (get(address, "/readyz").text, agent(address)) == ("paused\n", "maint\n")
        wait_until(lambda: set(metric(address, "paused")) == {"1"})
        with connect(server.target, 0.1) as client:
            client.sendall(b"x")
            with pytest.raises(TimeoutError):
                client.recv(1)
            assert post(address, "/pause") == (200, "paused")
            assert post(address, "/resume") == (200, "serving")
            client.settimeout(10)
            assert client.recv(1) == b"x"
        assert get(address, "/readyz").text == "serving\n"
        assert echoes(server)
        if "--workers" not in options:
            for path in ("/restart", "/restart?worker=0"):
                assert post(address, path) == (409, "there are no workers")
        assert post(address, "/drain") == (202, "draining")
        output, errors = server.process.communicate(timeout=10)
    assert (server.process.returncode, errors) == (0, "")
    told = ["POST /pause: paused", "POST /resume: serving", "SIGTERM: draining", "POST /drain: draining"]
    assert all(text in output for text in told)
    assert "stopped by SIGTERM" in output


@signals
@pytest.mark.parametrize("options", [(), ("--workers", "2")], ids=["threads", "workers"])
def test_a_pause_and_a_drain_wait_for_lame_duck(options: tuple[str, ...]) -> None:
    """Who was sent here before others knew is served; and a second POST is no second signal."""
    arguments = ("--status", "127.0.0.1:0", "--status-control", "--lame-duck", "100", *options)
    with serve("127.0.0.1:0", *arguments) as server:
        address = controlled(server)
        assert post(address, "/pause") == (200, "not ready any more, paused in 100 s")
        assert get(address, "/readyz").text == "paused\n"
        assert echoes(server)
        assert post(address, "/resume") == (200, "serving")
        assert get(address, "/readyz").text == "serving\n"
        for _ in range(3):
            assert post(address, "/drain") == (202, "draining")
        wait_until(lambda: get(address, "/readyz").text == "draining\n")
        assert echoes(server)
        for path in ("/pause", "/resume"):
            assert post(address, path) == (409, "it is draining")
        assert server.end(signal.SIGTERM)[0] == 0


@signals
@needs("Linux")
def test_one_worker_is_restarted_and_a_pause_is_for_the_new_one_too() -> None:
    arguments = ("--workers", "2", "--status", "127.0.0.1:0", "--status-control")
    with serve("127.0.0.1:0", *arguments) as server:
        address = controlled(server)

        server.line_with("all workers serve")
        assert post(address, "/restart?worker=2") == (404, "there is no worker 2")
        assert post(address, "/pause") == (200, "paused")
        assert post(address, "/restart?worker=1") == (202, "replacing worker 1")
        server.line_with("POST /restart: 1 of 1 workers are replaced")
        assert metric(address, "worker_starts_total") == ["1", "2"]
        assert metric(address, "paused") == ["1", "1"]
        assert post(address, "/resume") == (200, "serving")
        assert all(echoes(server) for _ in range(8))
        assert post(address, "/restart") == (202, "replacing 2 workers")
        server.line_with("SIGHUP: 2 of 2 workers are replaced")
        assert metric(address, "worker_starts_total") == ["2", "3"]
        assert post(address, "/pause") == (200, "paused")  # whatever those were who have ended
        wait_until(lambda: metric(address, "paused") == ["1", "1"])
        assert server.end(signal.SIGTERM)[0] == 0


@signals
@needs("Linux")
def test_programs_are_restarted_and_not_paused() -> None:
    program = WAITS + 'serve(b"0 %d" % os.getpid())\n'
    options = ["--bind", "127.0.0.1:0", "--workers", "1", "--status", "127.0.0.1:0", "--status-control"]
    with parent([*COMMAND, "workers", *options, "--", sys.executable, "-c", program]) as running:
        line = next(line for line in running.lines if "status on " in line)
        address = fastlisten.Endpoint.parse(line.partition("status on ")[2]).sockaddr
        for path in ("/pause", "/resume"):
            assert post(address, path) == (409, "programs cannot be paused")
        assert post(address, "/restart?worker=0") == (202, "replacing worker 0")
        running.line_with("1 of 1 workers are replaced")
        running.end()
