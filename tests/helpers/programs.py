"""Programs in processes of their own: run() to their end, running() beside a test."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

import fastlisten
from helpers.waiting import asleep, wait_until

ROOT = Path(os.path.abspath(fastlisten.__file__)).parent.parent
TESTS = Path(os.path.abspath(__file__)).parent.parent

Program = str | Sequence[str | os.PathLike[str]]
"""A Python program's text, or a command and its arguments."""


def plain_environment(**added: str) -> dict[str, str]:
    """Return this process's environment with the package that is tested, and these helpers, on the path."""
    paths = [str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **added}


def sanitizers() -> dict[str, str]:
    """Return the variables that a Python with our modules under a sanitizer needs; run() has them.

    They are for what starts it in its turn: strace, unshare or a service manager.
    """
    names = ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS", "PYTHONMALLOC")
    return {name: os.environ[name] for name in names if name in os.environ}


def environment_of(program: Program, environment: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return what a program is to have; None: plain_environment(), as far as it is for such a program.

    A sanitizer's runtime is for our modules alone: curl hangs under it before its first line.
    """
    if environment is not None:
        return environment
    plain = plain_environment()
    if not isinstance(program, str) and os.fspath(program[0]) != sys.executable:
        plain.pop("LD_PRELOAD", None)
    return plain


def interpreter() -> list[str]:
    """Return the command that runs Python as this one is run, with warnings as errors."""
    dev = ["-X", "dev"] if sys.flags.dev_mode else []
    return [sys.executable, *dev, "-W", "error"]


def command_of(program: Program, arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return a whole command; `options` are the interpreter's, for a program's text."""
    if isinstance(program, str):
        return [*interpreter(), *options, "-c", program, *arguments]
    assert not options
    return [*(os.fspath(part) for part in program), *arguments]


Case = TypeVar("Case", bound=Hashable)
Result = TypeVar("Result")

AT_A_TIME = 3  # programs that mostly wait, for each processor's sake no more


def selected(request: pytest.FixtureRequest, *names: str) -> list[Any]:
    """Return the values of these parameters in the module's tests that are to run and have them."""
    found = []
    for item in request.session.items:
        if item.path == request.path and (call := getattr(item, "callspec", None)) is not None:
            values = tuple(call.params[name] for name in names if name in call.params)
            if len(values) == len(names):
                found.append(values[0] if len(names) == 1 else values)
    return found


def side_by_side(function: Callable[[Case], Result], cases: Sequence[Case]) -> dict[Case, Result]:
    """Return what the function returns for each case; it runs a program that waits most of the time."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return dict(zip(cases, pool.map(function, cases), strict=True))


def run(
    program: Program,
    *arguments: str,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    limit: float = 30.0,
    status: int | None = 0,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, within `limit` seconds, and return its status and what it printed.

    Another status than `status` fails the test, with what the program printed; None takes any.
    """
    try:
        done = subprocess.run(
            command_of(program, arguments, options),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment_of(program, environment),
            cwd=folder,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"no end within {limit} s\n{error.stdout!r}\n{error.stderr!r}") from None
    if status is not None:
        assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@contextlib.contextmanager
def running(
    program: Program,
    *arguments: str,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[subprocess.Popen[str]]:
    """Run a program beside the test, its three streams in pipes; it is killed if it has not ended by the end.

    A test that fails is told what the program has said on standard error.
    """
    process = subprocess.Popen(
        command_of(program, arguments, options),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment_of(program, environment),
        cwd=folder,
        pass_fds=pass_fds,
    )
    with process:
        try:
            yield process
        except BaseException:
            process.kill()
            with contextlib.suppress(ValueError):  # the test has read it to its end
                sys.stderr.write(process.communicate(timeout=5)[1])
            raise
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    """Read the next line that a running program prints; "" if it has ended."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def wait_until_asleep(process: subprocess.Popen[str]) -> None:
    """Wait until a program's main thread sleeps in a system call; proc_pid_stat(5).  A signal that comes just
    before the call does not end it.  Returns at once where the system does not tell."""
    if os.path.exists(f"/proc/{process.pid}/stat"):
        wait_until(lambda: asleep(str(process.pid)))


def python(code: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """Run a program to its end and return the JSON that its last line of output holds."""
    done = run(code, *arguments, environment=environment)
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
