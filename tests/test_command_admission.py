"""fastlisten serve --allow, --deny, --concurrent, --rate ...: who may come in."""

import json
import re

import pytest

from helpers import CLOSED, connect, exchange, needs, refusal
from helpers.command import COMMAND, is_one_line, run, serve, signals
from helpers.workers import parent

ANYWHERE = "127.0.0.1:0"


@signals
def test_who_is_denied_is_refused_counted_and_told() -> None:
    with serve(ANYWHERE, "--deny", "192.0.2.0/24", "--deny", "127.0.0.1", "--json") as server:
        for _ in range(3):
            assert refusal(server.target) == CLOSED
        status, lines, errors = server.end(15)
    assert status == 0
    line = r"WARNING fastlisten: refused(?: in \d\.\d s)?: denied (\d); most from 127.0.0.1 \(\1\)"
    counts = [re.fullmatch(line, error) for error in errors.splitlines()]
    assert sum(int(count[1]) for count in counts if count) == 3
    assert None not in counts
    assert json.loads(lines[-1])["refused_for"] == {"denied": 3}


def test_a_source_s_connections_at_a_time() -> None:
    options = ["--concurrent", "1", "--prefix4", "8"]
    with serve(ANYWHERE, *options) as server, connect(server.target) as client:
        client.sendall(b"in")
        assert client.recv(2) == b"in"
        assert refusal(server.target) == CLOSED


def test_everything_at_once() -> None:
    options = ["--allow", "127.0.0.0/8", "--exempt", "127.0.0.1", "--rate", "0.5", "--burst", "1"]
    more = ["--sources", "100", "--prefix6", "56", "--busy", "reset", "--pending", "5"]
    with serve(ANYWHERE, *options, *more) as server:
        for _ in range(3):
            assert exchange(server.target) == b"ping"


@signals
def test_a_dry_run() -> None:
    with serve(ANYWHERE, "--rate", "0.001", "--dry-run", "--json") as server:
        for _ in range(3):
            assert exchange(server.target) == b"ping"
        _, lines, errors = server.end(15)
    assert "would have refused: rate " in errors
    assert json.loads(lines[-1])["refused"] == 0


@needs("fork", "Linux")
def test_in_worker_processes() -> None:
    command = [*COMMAND, "serve", ANYWHERE, "echo", "--workers", "2", "--concurrent", "1", "--json"]
    with parent(command, until="serving", listening='"endpoint": "') as server:
        with server.connect() as client:
            client.sendall(b"in")
            assert client.recv(2) == b"in"
            for _ in range(6):
                assert refusal(server.address) == CLOSED
        server.end()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--rate", "0"], "'0' is not a number above 0"),
        (["--burst", "5"], "--burst is only meaningful with rate"),
        (["--deny", "10.0.0.0/33"], "--deny: '10.0.0.0/33'"),
        (["--prefix4", "33"], "--prefix4 must be from 0 to 32, not 33"),
        (["--sources", "999999999"], "--sources must be from 1 to 4194304, not 999999999"),
        (["--concurrent", "0"], "'0' is not a number from 1 on"),
    ],
)
def test_what_cannot_be_meant(options: list[str], text: str) -> None:
    is_one_line(run("serve", ANYWHERE, *options), 2, text)
