"""Running the command as a person or a script runs it: in a process of its own."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from helpers import LIMIT, posix_only

from fastlisten import Endpoint

COMMAND = [sys.executable, "-m", "fastlisten"]
LISTENING = "listening on "

signals = posix_only("signals between processes")


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=LIMIT * 3, **options
    )


def is_one_line(done: "subprocess.CompletedProcess[str]", status: int, text: str) -> None:
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("fastlisten: ")
    assert done.stderr.count("\n") == 1
    assert text in done.stderr


class Server:
    """A running `fastlisten serve` and the endpoint that its first line tells."""

    def __init__(self, process: "subprocess.Popen[str]", as_json: bool) -> None:
        self.process = process
        self.first = self.line()
        if as_json:
            self.endpoint = Endpoint.parse(json.loads(self.first)["endpoint"])
        else:
            assert self.first.startswith(LISTENING), (self.first, process.poll())
            self.endpoint = Endpoint.parse(self.first.removeprefix(LISTENING))

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def line_with(self, text: str) -> None:
        """Read lines until one has text; pytest's time limit ends a wait that is in vain."""
        while text not in (line := self.line()):
            assert line or self.process.poll() is None, f"{text!r} never came"

    def end(self, number: int) -> tuple[int, list[str], str]:
        """Send a signal; return the status, the lines that were left on stdout, and stderr."""
        self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, output.splitlines(), errors

    @property
    def target(self) -> Any:
        return self.endpoint.sockaddr

    @property
    def url(self) -> str:
        return f"http://{self.endpoint}/"


@contextlib.contextmanager
def serve(*arguments: str, **options: Any) -> Iterator[Server]:
    """Run `fastlisten serve` until the block ends."""
    with subprocess.Popen(
        [*COMMAND, "serve", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        **options,
    ) as process:
        try:
            yield Server(process, "--json" in arguments)
        finally:
            if process.poll() is None:
                process.kill()
