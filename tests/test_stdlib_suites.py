"""The standard library's own tests of what the drop-ins replace, with the drop-ins in their place."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.programs import run

# By its path: what else the package of helpers imports would be there before the drop-ins.
RUNNER = Path(__file__).parent / "helpers" / "stdlib_suite.py"


def has_suite(name: Any) -> Any:
    """Whether this interpreter came with that test module; distributions often leave them out."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("replaced", "suite"),
    [
        ("socketserver", "test.test_socketserver"),
        ("socketserver,http.server", "test.test_httpservers"),
        ("socket,socketserver", "test.test_socketserver"),
        ("asyncio", "test.test_asyncio.test_server"),
        ("asyncio", "test.test_asyncio.test_streams"),
        ("asyncio", "test.test_asyncio.test_events"),
        ("asyncio", "test.test_asyncio.test_sendfile"),
        ("asyncio", "test.test_asyncio.test_buffered_proto"),
        ("asyncio", "test.test_asyncio.test_ssl"),
        ("asyncio", "test.test_asyncio.test_sslproto"),
    ],
)
def test_suite(replaced: Any, suite: Any, tmp_path: Path) -> None:
    if not has_suite(suite):
        pytest.skip(f"this Python has no {suite}")
    command = [sys.executable, RUNNER, replaced, suite]
    done = run(command, folder=tmp_path, limit=280)  # the suites write files
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("OK")
    assert "Ran 0 tests" not in done.stderr
    if replaced == "asyncio":
        assert int(done.stdout.split()[-1]) > 0  # servers of ours
