"""patch() and unpatch(), and `fastlisten run`, which does it before a program."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import LIMIT, posix_only
from helpers.programs import line_of, plain_environment, python, run, running, wait_until_asleep

# Whether each of these is ours: by the bases of the classes, and where the function was made.
WHOSE = """
import json, sys

def whose():
    import asyncio, http.server, socket, socketserver
    loop = asyncio.new_event_loop()
    loop.close()
    kinds = {
        "socket": socket.socket,
        "server": socketserver.TCPServer,
        "threading": socketserver.ThreadingTCPServer,
        "http": http.server.ThreadingHTTPServer,
        "selector": asyncio.SelectorEventLoop,
        "loop": type(loop),
    }
    found = {name: any(base.__module__.startswith("fastlisten") for base in kind.__mro__)
             for name, kind in kinds.items()}
    found["create_server"] = socket.create_server.__module__.startswith("fastlisten")
    return found
"""

ALL = {"socket", "server", "threading", "http", "selector", "loop", "create_server"}
# Windows' own event loop is no selector loop, and stays.
OURS = ALL if os.name != "nt" else ALL - {"loop"}


def ours(told: dict[str, bool]) -> set[str]:
    assert told.keys() == ALL
    return {name for name, is_ours in told.items() if is_ours}


BEFORE_OR_AFTER = """
if sys.argv[1] == "after":
    whose()
import fastlisten
for _ in range(int(sys.argv[2])):
    fastlisten.patch()
told = whose()
fastlisten.unpatch()
fastlisten.unpatch()
print(json.dumps([told, whose(), fastlisten.patch(), whose()]))
"""


@pytest.mark.parametrize("times", ["1", "2"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_all_is_ours_and_then_the_originals_again(when: str, times: str) -> None:
    """Whether the modules were imported before or are imported later; a class that was derived meanwhile, as
    http.server's own are, stays what it is."""
    derived = {"http"} if when == "before" else set()
    told, undone, nothing, again = python(WHOSE + BEFORE_OR_AFTER, when, times)
    assert (ours(told), ours(undone), nothing, ours(again)) == (OURS, derived, None, OURS)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ("socket=False", OURS - {"socket", "create_server"}),
        ("asyncio=False", OURS - {"selector", "loop"}),
        ("http=False", OURS - {"http"}),
        ("socketserver=False", OURS - {"server", "threading"}),
    ],
)
def test_what_is_not_asked_for_stays(options: str, left: set[str]) -> None:
    program = f"whose()\nimport fastlisten\nfastlisten.patch({options})\nprint(json.dumps(whose()))\n"
    assert ours(python(WHOSE + program)) == left


SERVES = """
import fastlisten
fastlisten.patch()
import http.server, socketserver, threading, urllib.request, asyncio, socket
from helpers import exchange

told = []
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        told.append(threading.current_thread().name)
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")
    def log_message(self, *args):
        pass

with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/", timeout=10) as answer:
        told.append(answer.read().decode())
    server.shutdown()
    thread.join()

async def main():
    async def echo(reader, writer):
        told.append(type(writer.transport).__module__)
        writer.write(await reader.read())
        writer.close()
    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        address = server.sockets[0].getsockname()
        told.append((await asyncio.get_running_loop().run_in_executor(None, exchange, address)).decode())

with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
    runner.run(main())
import json
print(json.dumps(told))
"""


def test_a_patched_program_serves_with_our_loop_and_transports() -> None:
    name, hello, module, echoed = python(SERVES)
    assert (name, hello, module, echoed) == ("fastlisten", "hello", "fastlisten.aio._transport", "ping")


TOO_LATE = """
import json, sys, warnings
import early
from socketserver import TCPServer
class Mine(TCPServer):
    pass
import fastlisten
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    fastlisten.patch()
    fastlisten.patch()
print(json.dumps([[str(warning.message), warning.category.__name__] for warning in told]))
"""


def test_who_has_an_original_already_is_named(tmp_path: Path) -> None:
    """By a name of its own, or by a class that is derived from one; once."""
    (tmp_path / "early.py").write_text(
        "from asyncio import SelectorEventLoop as Loop\nimport socket\n"
        "class Special(socket.socket):\n    pass\n"
    )
    path = os.pathsep.join([str(tmp_path), plain_environment()["PYTHONPATH"]])
    ((message, category),) = python(TOO_LATE, environment=plain_environment(PYTHONPATH=path))
    assert category == "RuntimeWarning"
    assert message == (
        "fastlisten.patch() came too late for __main__.Mine, __main__.TCPServer, early.Loop, early.Special: "
        "call it before they are imported"
    )


# --- fastlisten run

PROGRAM = """
import multiprocessing, os, subprocess

def child(results):
    results.put(whose())

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=child, args=(results,))
    process.start()
    spawned = results.get(timeout=30)
    process.join()
    started = json.loads(subprocess.check_output([sys.executable, __file__, "child"]))
    print(json.dumps([whose(), spawned, started, sys.argv[1:], __name__, __file__, sys.path[0],
                      [name for name in sys.path if "_startup" in name]]))
    sys.exit(7)
"""
CHILD = """
if __name__ == "__main__" and sys.argv[1:] == ["child"]:
    print(json.dumps(whose()))
    sys.exit(0)
"""


@pytest.mark.parametrize("how", ["script", "module"])
def test_run_runs_a_program_as_it_is(how: str, tmp_path: Path) -> None:
    """Its arguments, __main__, search path and exit status are its own; its children are patched, too."""
    program = WHOSE + CHILD + PROGRAM
    where = tmp_path / "program.py"
    where.write_text(program)
    what = {"script": [str(where)], "module": ["-m", "program"]}[how]
    done = run(
        [sys.executable, "-W", "error", "-m", "fastlisten", "run", *what, "--port", "-m", "x"],
        folder=tmp_path,
        status=7,
    )
    assert done.stderr == ""
    own, spawned, started, arguments, name, file, first, left = json.loads(done.stdout)
    assert (ours(own), ours(spawned), ours(started)) == (OURS, OURS, OURS)
    assert (arguments, name, left) == (["--port", "-m", "x"], "__main__", [])
    assert (Path(file), Path(first)) == (where, where.parent)


def test_run_runs_a_folder_with_a_main(tmp_path: Path) -> None:
    (tmp_path / "__main__.py").write_text(WHOSE + "print(json.dumps(whose()))\n")
    done = run([sys.executable, "-m", "fastlisten", "run", str(tmp_path)])
    assert ours(json.loads(done.stdout)) == OURS


@posix_only("a command is a file that can be executed")
def test_run_starts_an_installed_command(tmp_path: Path) -> None:
    """By its name alone, as `flask` or `hypercorn` is."""
    command = tmp_path / "some-server"
    command.write_text(f"#!{sys.executable}\n{WHOSE}print(json.dumps([whose(), sys.argv[1:]]))\n")
    command.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = run(
        [sys.executable, "-m", "fastlisten", "run", "some-server", "-x"],
        environment=plain_environment(PATH=path),
    )
    told, arguments = json.loads(done.stdout)
    assert (ours(told), arguments) == (OURS, ["-x"])


def test_another_sitecustomize_still_comes(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('theirs')\n")
    (tmp_path / "program.py").write_text(
        "import sitecustomize, socketserver\n"
        "print(sitecustomize.__file__, socketserver.TCPServer.__mro__[1].__name__)\n"
    )
    path = os.pathsep.join([str(tmp_path), plain_environment()["PYTHONPATH"]])
    done = run(
        [sys.executable, "-m", "fastlisten", "run", "program.py"],
        environment=plain_environment(PYTHONPATH=path),
        folder=tmp_path,
    )
    # the first line is from the interpreter that reads the command
    assert done.stdout.splitlines() == ["theirs", "theirs", f"{tmp_path / 'sitecustomize.py'} AcceptMixIn"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run needs a program: SCRIPT or -m MODULE"),
        (["no-such-program"], "no-such-program is neither a file nor an installed command"),
        (["./no-such-program"], "./no-such-program is neither a file nor an installed command"),
        (["-m"], "argument -m: expected one argument"),
        (["-x", "program"], "unrecognized arguments: -x"),
    ],
)
def test_what_run_is_asked_wrongly(arguments: list[str], message: str) -> None:
    done = run([sys.executable, "-m", "fastlisten", "run", *arguments], status=2)
    assert done.stderr.startswith(f"fastlisten: {message}"), done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("flag", ["-I", "-E", "-S"])
def test_run_says_with_which_flags_it_cannot_reach_a_program(flag: str, tmp_path: Path) -> None:
    """-I and -S may leave the interpreter without the package, so it is put on the path by hand."""
    program = (
        f"import sys; sys.path[:0] = {[*plain_environment()['PYTHONPATH'].split(os.pathsep)]!r}\n"
        "from fastlisten.cli import main\nsys.exit(main(['run', '-m', 'this']))\n"
    )
    done = run([sys.executable, flag, "-c", program], status=2)
    assert done.stderr == (
        "fastlisten: run reaches the program by PYTHONPATH and site: not with -I, -E or -S\n"
    )


SIGNALLED = """
import os, signal, sys, time
print(os.getpid(), flush=True)
try:
    signal.pause()
except KeyboardInterrupt:
    print("interrupted", flush=True)
    raise
"""


@posix_only("it waits for a signal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_program_as_without_us(number: int, tmp_path: Path) -> None:
    """It is the same process, so that what has started it signals the program itself."""
    where = tmp_path / "program.py"
    where.write_text(SIGNALLED)
    ended: list[Any] = []
    for how in ([], ["-m", "fastlisten", "run"]):
        with running([sys.executable, *how, str(where)]) as process:
            assert int(line_of(process)) == process.pid
            wait_until_asleep(process)
            process.send_signal(number)
            out, _ = process.communicate(timeout=LIMIT)
            ended.append((process.returncode, out))
    assert ended[0] == ended[1]
