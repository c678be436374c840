"""fastlisten serve --first-bytes, --proxy: what a client has to send first."""

import json
from pathlib import Path

from fastlisten.cli.arguments import DEFAULT_FIRST_BYTES, parser
from helpers import LIMIT, connect, exchange, needs, read_all
from helpers.command import COMMAND, serve, signals
from helpers.proxy_headers import inet, v1, v2
from helpers.workers import parent

ANYWHERE = "127.0.0.1:0"
SPEAKS_FIRST = "def hello(connection):\n    connection.sendall(b'220 hello')\n"
TELLS = "def peer(connection):\n    connection.sendall(repr(connection.peer).encode())\n"


def test_ten_seconds_are_the_default() -> None:
    assert parser().parse_args(["serve"]).first_bytes == DEFAULT_FIRST_BYTES == 10


@signals
def test_who_is_silent_is_closed_and_counted() -> None:
    with serve(ANYWHERE, "--threads", "0", "--first-bytes", "0.2", "--json") as server:
        with connect(server.target) as silent:
            assert exchange(server.target) == b"ping"
            assert read_all(silent) == b""
        status, lines, _ = server.end(15)
        assert status == 0
        stopped = json.loads(lines[-1])
        assert (stopped["refused"], stopped["refused_for"]) == (1, {"silent": 1})


def test_for_a_handler_that_speaks_first(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(SPEAKS_FIRST)
    options = ["own:hello", "--first-bytes", "0"]
    with serve(ANYWHERE, *options, cwd=tmp_path) as server, connect(server.target) as client:
        assert read_all(client) == b"220 hello"


def test_a_proxy_and_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(TELLS)
    options = ["--first-bytes", "0", "--proxy", "192.0.2.0/24", "--proxy", "127.0.0.1"]
    with serve(ANYWHERE, "own:peer", *options, "--proxy-timeout", str(LIMIT), cwd=tmp_path) as server:
        for header in (v1(), v2(inet())):
            with connect(server.target) as client:
                client.sendall(header)
                assert read_all(client) == b"('192.0.2.1', 1000)"
    with serve(ANYWHERE, "--proxy", "192.0.2.0/24") as server, connect(server.target) as client:
        assert read_all(client) == b""
    with serve(ANYWHERE, "--proxy", "192.0.2.0/24", "--proxy-optional") as server:
        assert exchange(server.target, v1()) == v1()


@needs("fork", "Linux")
def test_in_worker_processes() -> None:
    options = ["--workers", "2", "--proxy", "127.0.0.1", "--first-bytes", "0.2", "--json"]
    command = [*COMMAND, "serve", ANYWHERE, "echo", *options]
    with parent(command, until="serving", listening='"endpoint": "') as server:
        for _ in range(8):
            assert exchange(server.address, v1() + b"ping") == b"ping"
        with connect(server.address) as silent:
            silent.sendall(v1())
            assert read_all(silent) == b""
        stats = json.loads(server.line_with('"stats"'))
        while not stats["refused"]:
            stats = json.loads(server.line_with('"stats"'))
        assert (stats["handled"], stats["waiting"], stats["refused_for"]) == (8, 0, {"silent": 1})
        server.end()
