"""Every block of code in the documents runs; CONTRIBUTING.md says how a block is read."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers import LIMIT, PROBES, posix_only, read_all, wait_until
from helpers.programs import plain_environment, running

ROOT = Path(__file__).parent.parent
PORT = 11000
# The two commands that set everything up; .ci/run runs them, in a fresh copy.
SET_UP = "python3 -m venv "

if os.name == "posix":
    import fcntl

    @pytest.fixture(autouse=True)
    def _the_port(request: pytest.FixtureRequest) -> Iterator[None]:
        """Let one run of these tests at a time use the documents' port, while no stranger does."""
        block = request.node.callspec.params.get("block") if hasattr(request.node, "callspec") else None
        if block is None or str(PORT) not in block.code:
            yield
            return
        turn = os.open(tempfile.gettempdir(), os.O_RDONLY)  # a lock on the folder leaves no file behind
        try:
            fcntl.flock(turn, fcntl.LOCK_EX)
            try:
                socket.create_server(("", PORT)).close()
            except OSError as error:
                pytest.skip(f"needs port {PORT}, which something else on this machine has: {error}")
            yield
        finally:
            os.close(turn)


class Block(NamedTuple):
    """A fenced block of a document."""

    document: str
    line: int
    language: str
    code: str


def blocks() -> list[Block]:
    found = []
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md")]):
        document = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        for fence in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, fence.start()) + 1
            found.append(Block(document, line, fence[1], fence[2]))
    return found


def these(language: str) -> pytest.MarkDecorator:
    chosen = [block for block in blocks() if block.language == language]
    return pytest.mark.parametrize(
        "block", chosen, ids=[f"{block.document}-{block.line}" for block in chosen]
    )


def is_set_up(block: Block) -> bool:
    return block.code.startswith(SET_UP)


def environment() -> dict[str, str]:
    """Return an environment in which this interpreter's commands come first in the path."""
    scripts = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    return plain_environment(
        PATH=os.pathsep.join([*scripts, os.environ["PATH"]]),
        # A one-liner leaves its socket to the end of the interpreter, which only a pydebug build remarks on.
        PYTHONWARNINGS="ignore::ResourceWarning:sys",
    )


def client_of(process: subprocess.Popen[str]) -> socket.socket:
    """Connect to the documents' port as soon as the process listens there."""

    def connected() -> socket.socket | None:
        assert process.poll() is None, process.communicate()
        try:
            return socket.create_connection(("localhost", PORT), LIMIT)
        except ConnectionRefusedError:
            return None

    client = wait_until(connected, LIMIT, f"{process.args!r} listens on {PORT}")
    assert isinstance(client, socket.socket)
    return client


def end(process: subprocess.Popen[str]) -> str:
    """Press Ctrl-C if the process still runs, and return its output."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT)
    if process.returncode in (-signal.SIGINT, 130):
        assert err.rstrip().endswith("KeyboardInterrupt") or not err, err
    else:
        assert (process.returncode, err) == (0, "")
    return out


def test_the_readme_has_two_commands_that_set_everything_up() -> None:
    commands = [b.code for b in blocks() if b.document == "README.md" and is_set_up(b)]
    assert len(commands) == 2
    serve, test = commands
    assert "fastlisten serve" in serve
    assert "pytest" in test
    assert all(command.count("\n") == 1 for command in commands)


def test_no_block_of_the_readme_goes_untried() -> None:
    assert {block.language for block in blocks() if block.document == "README.md"} <= {"python", "sh"}


@posix_only("Ctrl-C ends one process")
@these("python")
def test_python(block: Block, tmp_path: Path) -> None:
    if ":http" in block.code and not PROBES["names of services"]():
        pytest.skip("needs names of services")
    file = tmp_path / "block.py"
    file.write_text(block.code, encoding="utf-8")
    command = [sys.executable, "-W", "error", "-u", str(file)]
    with running(command, environment=environment(), folder=tmp_path) as process:
        if str(PORT) in block.code and ("bind(" in block.code or "workers=" in block.code):
            with client_of(process) as client:
                if "recv" in block.code:
                    client.sendall(b"hello\n")
                client.shutdown(socket.SHUT_WR)
                assert read_all(client) == b"hello\n"
            if "serve(" in block.code:  # else it ends by itself, and Ctrl-C could come too late for it
                end(process)
                return
        out, err = process.communicate(timeout=LIMIT)
        assert (process.returncode, err) == (0, ""), out


@posix_only("a block of shell is for bash")
@these("sh")
def test_shell(block: Block, tmp_path: Path) -> None:
    if is_set_up(block):
        assert block.code.startswith(f"{SET_UP}.venv && .venv/bin/pip install ")
        return  # .ci/run runs it
    with contextlib.ExitStack() as stack:
        if str(PORT) in block.code:  # what talks to the service that README.md has just started
            serve = [sys.executable, "-m", "fastlisten", "serve"]
            server = stack.enter_context(running(serve, environment=environment(), folder=tmp_path))
            client_of(server).close()
        bash = ["bash", "-euo", "pipefail", "-c", block.code]
        shell = stack.enter_context(running(bash, environment=environment(), folder=tmp_path))
        out, err = shell.communicate(timeout=LIMIT)
        assert (shell.returncode, err) == (0, ""), out
        if str(PORT) in block.code:
            assert "hello" in out
            server.terminate()
            server.communicate(timeout=LIMIT)
            assert server.returncode == 0
