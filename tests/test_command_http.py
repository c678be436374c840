"""The built-in http handler."""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_support import Server, serve
from support import LIMIT, connect, exchange, read_all


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
        b"nonsense\r\n\r\n",
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


def test_http_refuses_an_endless_head(web: Server) -> None:
    answer = exchange(web.target, b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000)
    status, fields, content = parse_answer(answer)
    assert status == b"HTTP/1.1 431 Request Header Fields Too Large"
    assert int(fields[b"content-length"]) == len(content) == 0


def test_http_has_no_answer_to_half_a_request(web: Server) -> None:
    assert exchange(web.target, b"GET / HTTP/1.1\r\n") == b""


@installed("curl")
@pytest.mark.parametrize("arguments", [[], ["-d", "x=1"], ["-T", "big"], ["-I"]])
def test_curl_is_content(web: Server, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "big").write_bytes(b"x" * 3_000_000)
    tool = ["curl", "-q", "-sS", "--noproxy", "*", "-w", "%{http_code}", "-o", os.devnull]
    # Only as the first option does -q keep curl from reading a ~/.curlrc.
    # Under a sanitizer's runtime, which is for our modules, curl hangs before its first line.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [*tool, *arguments, web.url],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "200", "")


@installed("ab")
@pytest.mark.parametrize("threads", ["0", "8"])
def test_ab_has_all_its_requests_answered(threads: str) -> None:
    with serve("127.0.0.1:0", "http", "--threads", threads) as server:
        done = subprocess.run(
            ["ab", "-q", "-n", "20000", "-c", "64", server.url],
            capture_output=True,
            text=True,
            timeout=LIMIT * 4,
        )
    assert done.returncode == 0, done.stderr
    counts = dict(re.findall(r"^([A-Z][\w -]+):\s+(\d+)", done.stdout, re.M))
    assert counts["Complete requests"] == "20000"
    assert counts["Failed requests"] == "0"
    assert "Non-2xx responses" not in counts
