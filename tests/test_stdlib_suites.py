"""The standard library's own tests of what the drop-ins replace, with the drop-ins in their place."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).parent / "helpers" / "stdlib_suite.py"


def has_suite(name):
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
def test_suite(replaced, suite, tmp_path):
    if not has_suite(suite):
        pytest.skip(f"this Python has no {suite}")
    done = subprocess.run(
        [sys.executable, str(RUNNER), replaced, suite],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=tmp_path,  # the suites write files
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))},
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 0, done.stderr
    assert last.startswith("OK")
    assert "Ran 0 tests" not in done.stderr
    if replaced == "asyncio":
        assert int(done.stdout.split()[-1]) > 0  # servers of ours
