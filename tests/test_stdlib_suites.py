"""The standard library's own tests of what the drop-ins replace, with the drop-ins in their place."""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from helpers.programs import run, selected, side_by_side

# By its path: what else the package of helpers imports would be there before the drop-ins.
RUNNER = Path(__file__).parent / "helpers" / "stdlib_suite.py"


def has_suite(name: Any) -> Any:
    """Whether this interpreter came with that test module; distributions often leave them out."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def run_suite(case: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    replaced, suite = case
    with tempfile.TemporaryDirectory() as folder:  # the suites write files
        return run([sys.executable, RUNNER, replaced, suite], folder=Path(folder), limit=280, status=None)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[tuple[str, str], subprocess.CompletedProcess[str]]:
    return side_by_side(
        run_suite, [case for case in selected(request, "replaced", "suite") if has_suite(case[1])]
    )


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
def test_suite(replaced: str, suite: str, results: dict[tuple[str, str], Any]) -> None:
    if not has_suite(suite):
        pytest.skip(f"this Python has no {suite}")
    done = results[replaced, suite]
    assert done.returncode == 0, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("OK")
    assert "Ran 0 tests" not in done.stderr
    if replaced == "asyncio":
        assert int(done.stdout.split()[-1]) > 0  # servers of ours
