"""A million connections at full speed: descriptors, threads and resident memory stay as they are.

Left out of the quick run; `pytest -m soak` runs it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import exchange, needs, wait_until
from helpers.server_process import Server, server

COUNT = 1_000_000
WARM_UP = 50_000
CLIENTS = 64
# What the allocator may still take in pages after the warm-up; a byte leaked a connection is more.
GROWTH = 512 * 1024


@pytest.fixture(scope="module")
def load() -> str:
    """Give the benchmark's load generator, which checks every answer."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    try:
        from benchmarks._build import build
    finally:
        del sys.path[0]
    return str(build("load.c"))


def connections(load: str, process: Server, work: str, count: int) -> dict[str, Any]:
    """Make so many connections to the server, CLIENTS at a time, and return what was measured."""
    port = str(process.address[1])
    done = subprocess.run(
        [load, work, port, "0", "0", str(count), str(CLIENTS), "1", "1500"],
        capture_output=True,
        text=True,
        timeout=1600,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.soak
@pytest.mark.timeout(3600)
@needs("Linux", "a C compiler")
@pytest.mark.parametrize(
    "mode",
    [{}, {"threads": 4}, {"threads": (1, 8)}, {"threads": 4, "busy": "reset", "pending": 200}],
    ids=["inline", "threads", "growing threads", "busy"],
)
def test_a_million_connections_leave_nothing(load: str, mode: dict[str, Any]) -> None:
    with server(backlog=1000, handler="answer", **mode) as process:
        connections(load, process, "echo", WARM_UP)
        before = process.ask("usage")
        connections(load, process, "echo", COUNT)
        # Those that were cut off by the generator's end have to be gone too.
        wait_until(lambda: process.ask("stats")["active"] == 0)
        after = process.ask("usage")
        assert exchange(process.address) == b"ping"
        stats = process.ask("stats")
        assert stats["accepted"] >= WARM_UP + COUNT
        assert stats["refused"] == 0
        assert stats["accept_errors"] == {}
        assert process.ask("logs") == []
        assert after["descriptors"] == before["descriptors"]
        least, most = min(before["threads"], after["threads"]), max(before["threads"], after["threads"])
        assert most - least <= (7 if mode.get("threads") == (1, 8) else 0)
        assert after["resident"] - before["resident"] < GROWTH, (before, after)
