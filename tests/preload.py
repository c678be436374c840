"""Run Python in a process whose socket calls fail as planned, by the library of faults.c."""

import contextlib
import ctypes
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support import compiler

import fastlisten

SOURCE = Path(__file__).with_name("faults.c")
ROOT = Path(fastlisten.__file__).parent.parent


def plain_environment(**added: str) -> dict[str, str]:
    """Return this process's environment with the package that is tested here on the path."""
    paths = [str(ROOT), str(SOURCE.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **added}


def interpreter() -> list[str]:
    """Return the command that runs Python as this one is run."""
    dev = ["-X", "dev"] if sys.flags.dev_mode else []
    return [sys.executable, *dev, "-W", "error"]


Plan = list[tuple[Any, int]]


def written(**plans: Plan) -> str:
    """Return plans as faults.c reads them, each under its call's name.

    A plan is a list of (error name or number, count): each error is given so often, in that
    order. The number 0 lets that many calls succeed; -N cuts a transfer to N bytes. For `open`,
    any other number has a stranger take a descriptor first.
    """
    entries = []
    for call, plan in plans.items():
        for code, count in plan:
            number = getattr(errno, code) if isinstance(code, str) else code
            entries.append(f"{call}={number}*{count}")
    return ",".join(entries)


def change_plan(**plans: Plan) -> None:
    """Replace the plan of this process, which runs under the library."""
    ctypes.CDLL(None).faults_plan(written(**plans).encode())


class Faults:
    """The built library, and processes that run under it."""

    def __init__(self, library: Path) -> None:
        self.library = library

    def environment(self, while_file: Any = None, **plans: Plan) -> dict[str, str]:
        """Return the environment of a process under these plans."""
        # A sanitizer's runtime, if there is one, has to come first.
        preload = [os.environ.get("LD_PRELOAD", ""), str(self.library)]
        added = {"LD_PRELOAD": " ".join(filter(None, preload)), "FAULTS": written(**plans)}
        if while_file is not None:
            added["FAULTS_WHILE"] = str(while_file)
        return plain_environment(**added)

    def python(self, code: str, *arguments: str, **plans: Plan) -> Any:
        """Run a program to its end and return the JSON that its last line of output holds."""
        return python(code, *arguments, environment=self.environment(**plans))


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


class Server:
    """A process of server.py: its port, and its commands as methods that return what it answers."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise AssertionError(process.communicate(timeout=10)[1])
        self.address = ("127.0.0.1", int(line))

    def ask(self, *words: Any) -> Any:
        """Send one command and return its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"no answer to {words}: {self.process.communicate(timeout=10)[1]}")
        found = json.loads(line)
        assert "answer" in found, found
        return found["answer"]


@contextlib.contextmanager
def server(
    *, environment: dict[str, str] | None = None, pass_fds: tuple[int, ...] = (), **options: Any
) -> Iterator[Server]:
    """Give a process of server.py; at the end it is told to end and has to end well."""
    command = [*interpreter(), str(SOURCE.with_name("server.py"))]
    process = subprocess.Popen(
        [*command, *(f"{name}={value!r}" for name, value in options.items())],
        env=environment or plain_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
    )
    with process:
        try:
            yield Server(process)
            output, errors = process.communicate(timeout=20)
        except BaseException:
            process.kill()
            # What it said is the best hint at what went wrong.
            sys.stderr.write(process.communicate(timeout=5)[1])
            raise
    check(process.returncode, output, errors)


def build(folder: Path) -> Faults:
    """Compile faults.c in `folder`."""
    library = folder / "faults.so"
    command = [compiler(), "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(library)]
    subprocess.run([*command, str(SOURCE), "-ldl", "-lpthread"], check=True, timeout=50)
    return Faults(library)
