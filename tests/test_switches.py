"""The switches of "One line": real programs, whose own code is not changed, on our event loops and servers.

Each is started as its users start it, is asked over HTTP who serves, and is ended as its users end it.
"""

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import LIMIT, posix_only, read_all, wait_until
from helpers.programs import plain_environment

pytestmark = posix_only("a group of processes is ended by a signal")

# Says what its event loop's and its connection's classes are.
ASGI = """\
import asyncio
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    loop = type(asyncio.get_running_loop())
    body = ("loop " + " ".join(base.__module__ for base in loop.__mro__)).encode()
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})
"""

# Says in which thread it is called: the drop-in's threads have our name.
WSGI = """\
import threading
def app(environ, start_response):
    body = ("thread " + threading.current_thread().name).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""

FLASK = """\
import threading
import flask
app = flask.Flask("hello")
@app.route("/")
def hello():
    return "thread " + threading.current_thread().name
"""

DJANGO = """\
import sys, threading
from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpResponse
from django.urls import path
settings.configure(DEBUG=True, SECRET_KEY="x", ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__)
def hello(request):
    return HttpResponse("thread " + threading.current_thread().name)
urlpatterns = [path("", hello)]
if __name__ == "__main__":
    execute_from_command_line(sys.argv)
"""

SCRIPT = """\
import http.server, sys, threading
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.wfile.write(b"HTTP/1.0 200 OK\\r\\n\\r\\nthread " + threading.current_thread().name.encode())
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

RUN = ["-m", "fastlisten", "run"]
OUR_LOOP = r"loop fastlisten\.aio\._"
OUR_THREAD = r"thread fastlisten"

# name: the modules it needs, what is in app.py, the command after `python`, and what it answers
PROGRAMS: dict[str, tuple[list[str], str, list[str], str]] = {
    "uvicorn": (
        ["uvicorn"],
        ASGI,
        ["-m", "uvicorn", "app:app", "--port", "PORT", "--loop", "fastlisten.aio:EventLoop"],
        OUR_LOOP + "loop",
    ),
    "uvicorn, uvloop": (
        ["uvicorn", "uvloop"],
        ASGI,
        ["-m", "uvicorn", "app:app", "--port", "PORT", "--loop", "fastlisten.aio:UvloopEventLoop"],
        OUR_LOOP + "uvloop",
    ),
    "gunicorn ASGIWorker": (
        ["gunicorn.workers.gasgi"],
        ASGI,
        ["-m", "gunicorn", "-b", "127.0.0.1:PORT", "-k", "fastlisten.gunicorn.ASGIWorker", "app:app"],
        OUR_LOOP,
    ),
    "gunicorn ASGIWorker, asyncio": (
        ["gunicorn.workers.gasgi"],
        ASGI,
        [
            *("-m", "gunicorn", "-b", "127.0.0.1:PORT", "--asgi-loop", "asyncio"),
            *("-k", "fastlisten.gunicorn.ASGIWorker", "app:app"),
        ],
        OUR_LOOP + "loop",
    ),
    "gunicorn UvicornWorker": (
        ["gunicorn", "uvicorn", "uvicorn_worker"],
        ASGI,
        ["-m", "gunicorn", "-b", "127.0.0.1:PORT", "-k", "fastlisten.gunicorn.UvicornWorker", "app:app"],
        OUR_LOOP,
    ),
    "run flask": (["flask"], FLASK, [*RUN, "flask", "run", "--port", "PORT"], OUR_THREAD),
    "run flask, reloader": (
        ["flask"],
        FLASK,
        [*RUN, "-m", "flask", "run", "--port", "PORT", "--debug"],
        OUR_THREAD,
    ),
    "run runserver": (
        ["django"],
        DJANGO,
        [*RUN, "app.py", "runserver", "127.0.0.1:PORT", "--noreload"],
        OUR_THREAD,
    ),
    "run runserver, reloader": (
        ["django"],
        DJANGO,
        [*RUN, "app.py", "runserver", "127.0.0.1:PORT"],
        OUR_THREAD,
    ),
    "run hypercorn": (
        ["hypercorn"],
        ASGI,
        [*RUN, "hypercorn", "app:app", "--bind", "127.0.0.1:PORT"],
        OUR_LOOP + "loop",
    ),
    "run http.server": (
        [],
        "",
        [*RUN, "-m", "http.server", "PORT", "-b", "127.0.0.1"],
        "app.py",
    ),
    "run script": ([], SCRIPT, [*RUN, "app.py", "PORT"], OUR_THREAD),
}


def free_port() -> int:
    """A port that nobody has at this moment: these programs do not all tell which one they got."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextlib.contextmanager
def started(command: list[str], folder: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a group of its own, which is ended with it."""
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=plain_environment(PYTHONDONTWRITEBYTECODE="1"),
            **options,
        )
        with process:
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def ask(port: int, process: subprocess.Popen[str], folder: Path) -> str:
    """Wait until somebody listens, and return the body of the answer."""
    clients: list[socket.socket] = []

    def connected() -> bool:
        assert process.poll() is None, (folder / "output").read_text()
        with contextlib.suppress(ConnectionRefusedError):
            clients.append(socket.create_connection(("127.0.0.1", port), LIMIT))
        return bool(clients)

    wait_until(connected, 4 * LIMIT)
    with clients[0] as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        head, _, body = read_all(client).partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0], (head, body, (folder / "output").read_text())
    return body.decode()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_served_by_ours(name: str, tmp_path: Path) -> None:
    """And Ctrl-C, which goes to its whole group, ends it."""
    modules, text, arguments, answer = PROGRAMS[name]
    for module in modules:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            pytest.skip(f"could not import {module!r}")
        pytest.importorskip(module)
    (tmp_path / "app.py").write_text(text)
    port = free_port()
    command = [sys.executable, *(part.replace("PORT", str(port)) for part in arguments)]
    with started(command, tmp_path) as process:
        body = ask(port, process, tmp_path)
        assert re.search(answer, body), (body, (tmp_path / "output").read_text())
        os.killpg(process.pid, signal.SIGINT)
        process.wait(LIMIT)
    told = (tmp_path / "output").read_text()
    assert "Traceback" not in told or "KeyboardInterrupt" in told, told
    assert process.returncode in (0, 130, -signal.SIGINT), told


def test_the_switches_of_the_readme_are_among_these() -> None:
    """Each command of its table, with the port left out."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\| `((?:uvicorn|gunicorn|fastlisten run) [^`]*)` \|", readme, re.MULTILINE)
    tried = [" ".join(arguments) for _, _, arguments, _ in PROGRAMS.values()]
    assert len(commands) == 3
    for command in commands:
        words = command.removeprefix("fastlisten ").split()
        assert any(all(word in line.split() for word in words) for line in tried), command


@pytest.mark.parametrize("worker", ["ASGIWorker", "UvicornWorker"])
def test_a_worker_class_without_gunicorn_says_what_to_install(worker: str) -> None:
    program = (
        "import sys\nsys.modules['gunicorn'] = None\n"
        f"try:\n    from fastlisten.gunicorn import {worker}\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=plain_environment(), check=True
    )
    assert done.stdout.startswith(f"{worker} needs ")
    assert "pip install" in done.stdout
