"""The suite's own guards: a check that cannot fail checks nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import posix_only, wait_until

HERE = Path(__file__).parent

LEAKS = """
import os, threading
spare = os.dup(1)
ended = threading.Event()

def test_leaves_a_descriptor():
    os.dup(1)

def test_closes_a_strangers_descriptor():
    os.close(spare)

def test_leaves_a_thread():
    threading.Thread(target=ended.wait, args=(20,), daemon=True).start()

def test_leaves_nothing():
    ended.set()
"""


@posix_only("descriptors are not counted there")
def test_the_guard_fails_a_test_that_leaves_something(tmp_path: Path) -> None:
    conftest = (HERE / "conftest.py").read_text()
    assert "ENDING = 3.0" in conftest
    (tmp_path / "conftest.py").write_text(conftest.replace("ENDING = 3.0", "ENDING = 0.1"))
    shutil.copytree(HERE / "helpers", tmp_path / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "test_leak.py").write_text(LEAKS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=50,
    )
    told = [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("ERROR ")]
    assert told == [
        "ERROR test_leak.py::test_leaves_a_descriptor",
        "ERROR test_leak.py::test_closes_a_strangers_descriptor",
        "ERROR test_leak.py::test_leaves_a_thread",
    ], done.stdout + done.stderr


def test_a_condition_that_stays_false_is_told() -> None:
    with pytest.raises(AssertionError, match="the moon"):
        wait_until(lambda: False, 0.01, "the moon")
