"""Programs in processes of their own."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastlisten

ROOT = Path(fastlisten.__file__).parent.parent
TESTS = Path(__file__).parent.parent


def plain_environment(**added: str) -> dict[str, str]:
    """Return this process's environment with the package that is tested here on the path."""
    paths = [str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **added}


def interpreter() -> list[str]:
    """Return the command that runs Python as this one is run."""
    dev = ["-X", "dev"] if sys.flags.dev_mode else []
    return [sys.executable, *dev, "-W", "error"]


def python(code: str, *arguments: str, environment: dict[str, str]) -> Any:
    """Run a program to its end and return the JSON that its last line of output holds."""
    done = subprocess.run(
        [*interpreter(), "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    check(done.returncode, done.stdout, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def check(status: int | None, output: str, errors: str) -> None:
    """Assert that a process ended well and that its interpreter had nothing to complain of."""
    assert status == 0, f"status {status}\n{output}\n{errors}"
    complaints = ("Exception ignored", "Exception in thread", "Fatal Python error", "unclosed")
    for word in (*complaints, "cannot be preloaded"):
        assert word not in errors, errors


def descriptor_table(pid: int) -> int:
    """Return for how many descriptors a process has room; proc_pid_status(5), FDSize."""
    with open(f"/proc/{pid}/status") as status:
        return int(status.read().split("FDSize:")[1].split()[0])


@contextlib.contextmanager
def child(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python code in a process of its own; it is killed at the end if it has not ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    """Read the next line that the process prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()
