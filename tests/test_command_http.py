"""The built-in http handler."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection
from pathlib import Path

import pytest

import fastlisten
from fastlisten.cli import http
from helpers import LIMIT, connect, exchange, read_all, reset, serving, wait_until
from helpers.command import Server, serve
from helpers.programs import run


def installed(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")


def parse_answer(answer: bytes) -> tuple[bytes, dict[bytes, bytes], bytes]:
    head, _, content = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    return status, dict(line.lower().split(b": ", 1) for line in lines), content


@pytest.fixture(scope="module")
def web() -> Iterator[Server]:
    with serve("127.0.0.1:0", "http") as server:
        yield server


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.0\n\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * 60_000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000,
        b"GET / HTTP/1.1\r\n\r\nGET /pipelined HTTP/1.1\r\n\r\n",
        b"BREW /pot HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /\r\n\r\n",
    ],
)
def test_http_answers_any_request_with_a_small_200(web: Server, request_bytes: bytes) -> None:
    status, fields, content = parse_answer(exchange(web.target, request_bytes))
    assert status == b"HTTP/1.1 200 OK"
    assert fields[b"connection"] == b"close"
    assert int(fields[b"content-length"]) == len(content) > 0


def test_http_answers_while_the_client_keeps_its_side_open(web: Server) -> None:
    with connect(web.target) as client:
        for piece in (b"GET / HT", b"TP/1.1\r\n\r", b"\n"):
            client.sendall(piece)
        assert parse_answer(read_all(client))[0] == b"HTTP/1.1 200 OK"


def test_http_answers_head_without_content(web: Server) -> None:
    _, fields, content = parse_answer(exchange(web.target, b"HEAD / HTTP/1.1\r\n\r\n"))
    assert content == b""
    assert int(fields[b"content-length"]) > 0


def test_http_lets_a_client_that_expects_it_send(web: Server) -> None:
    with connect(web.target) as client:
        client.sendall(b"PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        expected = b"HTTP/1.1 100 Continue\r\n\r\n"
        interim = client.recv(len(expected), socket.MSG_WAITALL)
        client.sendall(b"12345")
        client.shutdown(socket.SHUT_WR)
        answer = read_all(client)
    assert interim == expected
    assert parse_answer(answer)[0] == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000, b"431 Line too long"),
        (b"GET / HTTP/1.1\r\n" + b"X: x\r\n" * 60_000, b"431 Too many headers"),
        (b"GET /" + b"x" * 200_000, b"414 "),
        (b"nonsense\r\n\r\n", b"400 "),
        (b"GET / HTTP/2.0\r\n\r\n", b"505 "),
    ],
    ids=["long field", "many fields", "long line", "nonsense", "HTTP/2"],
)
def test_http_tells_what_it_cannot_read(web: Server, request_bytes: bytes, status: bytes) -> None:
    told, fields, content = parse_answer(exchange(web.target, request_bytes))
    assert told.startswith(b"HTTP/1.1 " + status)
    assert fields[b"connection"] == b"close"
    assert int(fields[b"content-length"]) == len(content)


def test_http_says_who_answers_and_not_on_which_python(web: Server) -> None:
    _, fields, _ = parse_answer(exchange(web.target, b"GET / HTTP/1.1\r\n\r\n"))
    assert fields[b"server"] == f"fastlisten/{fastlisten.__version__}".encode()
    assert fields[b"content-type"] == b"text/plain"
    assert parsedate_to_datetime(fields[b"date"].decode())


@pytest.mark.parametrize("body", [None, b"x" * 3_000_000])
def test_the_standard_client_is_content(web: Server, body: bytes | None) -> None:
    address, port, *_ = web.target
    client = HTTPConnection(address, port, timeout=LIMIT)
    with contextlib.closing(client):
        client.request("GET" if body is None else "PUT", "/", body)
        answer = client.getresponse()
        assert (answer.status, answer.read()) == (200, http.CONTENT)


def in_this_process(client: Callable[[socket.socket], object]) -> fastlisten.ListenerStats:
    """Have the handler meet one client; serve() would tell of an error that the handler raises."""
    with fastlisten.create_server(("127.0.0.1", 0)) as listener:
        with serving(listener, http.http), connect(listener) as theirs:
            wait_until(lambda: listener.stats().accepted)  # Wine's accept() gives out none that has reset
            client(theirs)
            wait_until(lambda: listener.stats().handled)
        return listener.stats()


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HT", b"GET / HTTP/1.1\r\nX", b"PUT / HTTP/1.1\r\nContent-Length: 5\r\n\r\n1", b"oh\r\n"],
)
@pytest.mark.parametrize("leave", [None, socket.socket.close, reset])
def test_who_leaves_or_falls_silent_tells_nobody(
    sent: bytes,
    leave: Callable[[socket.socket], None] | None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(http.OneRequest, "timeout", LIMIT if leave else 0.05)

    def client(theirs: socket.socket) -> None:
        theirs.sendall(sent)
        if leave:
            leave(theirs)

    stats = in_this_process(client)
    assert (stats.handled, stats.handler_errors) == (1, 0)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_an_endless_body_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "UNREAD_LIMIT", 1 << 20)

    def client(theirs: socket.socket) -> None:
        theirs.sendall(b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                theirs.sendall(b"x" * 65536)

    assert in_this_process(client).handler_errors == 0


def test_requests_leave_no_line_in_the_log() -> None:
    with serve("127.0.0.1:0", "http") as server:
        for request in (b"GET / HTTP/1.1\r\n\r\n", b"nonsense\r\n\r\n"):
            assert exchange(server.target, request)
        server.process.kill()
        assert server.process.communicate(timeout=LIMIT)[1] == ""


def test_only_who_asks_for_http_imports_it() -> None:
    code = (
        "import sys\n"
        "from fastlisten.cli.handlers import load_handler\n"
        "import fastlisten.__main__\n"
        "for name in ('echo', 'http'):\n"
        "    load_handler(name)\n"
        "    print('http.server' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT * 3)
    assert (done.stdout, done.stderr) == ("False\nTrue\n", "")


@installed("curl")
@pytest.mark.parametrize("arguments", [[], ["-d", "x=1"], ["-T", "big"], ["-I"]])
def test_curl_is_content(web: Server, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "big").write_bytes(b"x" * 3_000_000)
    tool = ["curl", "-q", "-sS", "--noproxy", "*", "-w", "%{http_code}", "-o", os.devnull]
    # Only as the first option does -q keep curl from reading a ~/.curlrc.
    done = run([*tool, *arguments, web.url], folder=tmp_path, limit=LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "200", "")


@installed("ab")
@pytest.mark.parametrize("threads", ["0", "8"])
def test_ab_has_all_its_requests_answered(threads: str) -> None:
    with serve("127.0.0.1:0", "http", "--threads", threads) as server:
        done = subprocess.run(
            ["ab", "-q", "-n", "5000", "-c", "64", server.url],
            capture_output=True,
            text=True,
            timeout=LIMIT * 4,
        )
    assert done.returncode == 0, done.stderr
    counts = dict(re.findall(r"^([A-Z][\w -]+):\s+(\d+)", done.stdout, re.M))
    assert counts["Complete requests"] == "5000"
    assert counts["Failed requests"] == "0"
    assert "Non-2xx responses" not in counts


@installed("wrk")
def test_wrk_has_its_requests_answered(web: Server) -> None:
    done = subprocess.run(
        ["wrk", "-t1", "-c8", "-d1s", web.url], capture_output=True, text=True, timeout=LIMIT * 4
    )
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"(\d+) requests in", done.stdout)[1]) > 0  # type: ignore[index]
    assert "Non-2xx" not in done.stdout
    assert "Socket errors" not in done.stdout
