"""Run Python in a process whose socket calls fail as planned, by the library of faults.c."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastlisten

SOURCE = Path(__file__).with_name("faults.c")
ROOT = Path(fastlisten.__file__).parent.parent
FOR_EVER = -1


def environment(**added: str) -> dict[str, str]:
    """Return this process's environment with the package that is tested here on the path."""
    paths = [str(ROOT), str(SOURCE.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **added}


def interpreter() -> list[str]:
    """Return the command that runs Python as this one is run."""
    dev = ["-X", "dev"] if sys.flags.dev_mode else []
    return [sys.executable, *dev, "-W", "error"]


class Faults:
    """The built library, and processes that run under it.

    A plan is a list of (error name or number, count): each error is given so often, in that
    order. The number 0 lets that many calls succeed; -N cuts a transfer to N bytes.
    """

    def __init__(self, library: Path) -> None:
        self.library = library

    def environment(self, while_file: Any = None, **plans: list[tuple[Any, int]]) -> dict[str, str]:
        """Return the environment of a process under these plans, one for each call's name."""
        entries = []
        for call, plan in plans.items():
            for code, count in plan:
                number = getattr(errno, code) if isinstance(code, str) else code
                entries.append(f"{call}={number}*{count}")
        # A sanitizer's runtime, if there is one, has to come first.
        preload = [os.environ.get("LD_PRELOAD", ""), str(self.library)]
        added = {"LD_PRELOAD": " ".join(filter(None, preload)), "FAULTS": ",".join(entries)}
        if while_file is not None:
            added["FAULTS_WHILE"] = str(while_file)
        return environment(**added)

    @contextlib.contextmanager
    def process(
        self, code: str, *arguments: str, while_file: Any = None, **plans: list[tuple[Any, int]]
    ) -> Iterator[subprocess.Popen[str]]:
        """Give a running process; at the end it must have ended well, or it is killed."""
        with running(code, *arguments, environment=self.environment(while_file, **plans)) as process:
            yield process

    def python(self, code: str, *arguments: str, **plans: list[tuple[Any, int]]) -> Any:
        """Run a program to its end and return the JSON that its last line of output holds."""
        with self.process(code, *arguments, **plans) as process:
            return last_line(process)


@contextlib.contextmanager
def running(
    code: str, *arguments: str, environment: dict[str, str], **named: Any
) -> Iterator[subprocess.Popen[str]]:
    """Give a Python process that runs `code`; it has to end with status 0 within the body."""
    process = subprocess.Popen(
        [*interpreter(), "-c", code, *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **named,
    )
    with process:
        try:
            yield process
            output, errors = process.communicate(timeout=20)
        except BaseException:
            process.kill()
            # What it said is the best hint at what went wrong.
            sys.stderr.write(process.communicate(timeout=5)[1])
            raise
    assert process.returncode == 0, f"status {process.returncode}\n{output}\n{errors}"
    for word in ("Exception ignored", "Exception in thread", "Fatal Python error", "unclosed"):
        assert word not in errors, errors


def last_line(process: subprocess.Popen[str]) -> Any:
    """Wait for the process to end and return what its last line of output says, as JSON."""
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, f"status {process.returncode}\n{output}\n{errors}"
    return json.loads(output.splitlines()[-1])


def build(folder: Path) -> Faults:
    """Compile faults.c in `folder`."""
    library = folder / "faults.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(library)]
    subprocess.run([*command, str(SOURCE), "-ldl", "-lpthread"], check=True, timeout=50)
    return Faults(library)
