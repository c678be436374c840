"""A process of server.py, steered line by line: the side of the test."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from helpers.programs import check, interpreter, plain_environment


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
    command = [*interpreter(), "-m", "helpers.server"]
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
