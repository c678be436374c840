"""slowhttptest's slow heads, slow bodies and slow readers: a good client is answered all the while."""

import contextlib
import subprocess
import time

import pytest

from helpers import LIMIT, connect, needs
from helpers.programs import line_of, running

pytestmark = needs("the slowhttptest command")

SLOW = 100
BODY = 1_000_000  # more than the buffers of both ends hold, so that who reads slowly is waited for
HEAD = f"HTTP/1.0 200 OK\\r\\nContent-Length: {BODY}\\r\\n\\r\\n"

# A request has half a second, and so has its answer.
SERVE = f"""
import sys, threading, time
import fastlisten

class Request:
    def __init__(self, connection):
        self.connection, self.end, self.data = connection, time.monotonic() + 0.5, b""

    def more(self):
        self.connection.settimeout(max(self.end - time.monotonic(), 0.001))
        received = self.connection.recv(65536)
        if not received:
            raise ConnectionError("it has left")
        self.data += received

def handle(connection):
    request = Request(connection)
    try:
        while b"\\r\\n\\r\\n" not in request.data:
            request.more()
        head, _, body = request.data.lower().partition(b"\\r\\n\\r\\n")
        length = head.partition(b"content-length:")[2].split()[:1] or [0]
        while len(request.data) < len(head) + 4 + int(length[0]):
            request.more()
        connection.settimeout(0.5)
        connection.sendall(b"{HEAD}" + bytes({BODY}))
    except OSError:
        pass

with fastlisten.bind("127.0.0.1:0") as listener:
    threading.Thread(target=lambda: (sys.stdin.read(), listener.stop())).start()
    print(listener.getsockname()[1], flush=True)
    listener.serve(handle, threads=(1, 64), first_bytes=1.0)
"""

DROP_IN = f"""
import sys, threading
from fastlisten.http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    timeout = 0.5

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", "{BODY}")
        self.end_headers()
        self.wfile.write(bytes({BODY}))

    do_POST = do_GET

    def log_message(self, *arguments):
        pass

class Server(ThreadingHTTPServer):
    first_bytes_timeout = 1.0

    def handle_error(self, *arguments):  # who is slow is timed out, or has gone
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(*arguments)

with Server(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown())).start()
    print(server.server_port, flush=True)
    server.serve_forever()
"""

UVICORN = f"""
import asyncio, socket, sys, threading
import uvicorn
from fastlisten import aio

async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-length", b"{BODY}"), (b"connection", b"close")]
    await send({{"type": "http.response.start", "status": 200, "headers": headers}})
    await send({{"type": "http.response.body", "body": bytes({BODY})}})

async def main(sock):
    config = uvicorn.Config(app, lifespan="off", log_level="error", timeout_graceful_shutdown=0)
    server = uvicorn.Server(config)
    threading.Thread(target=lambda: (sys.stdin.read(), setattr(server, "should_exit", True))).start()
    await server.serve(sockets=[sock])

with socket.create_server(("127.0.0.1", 0)) as sock:
    print(sock.getsockname()[1], flush=True)
    with asyncio.Runner(loop_factory=aio.EventLoop) as runner:
        runner.run(main(sock))
"""

SERVERS = {"serve": SERVE, "drop-in": DROP_IN, "uvicorn": UVICORN}
MODES = {"slow heads": ["-H"], "slow bodies": ["-B", "-s", "8192"], "slow readers": ["-X"]}


def answered(port: int) -> None:
    """Ask, and have the whole answer."""
    with connect(("127.0.0.1", port)) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        received = 0
        while more := client.recv(1 << 20):
            received += len(more)
        assert received > BODY


def has_ended(process: subprocess.Popen[str]) -> bool:
    """Tell whether it has ended, after a moment in which it might."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.05)
    return process.returncode is not None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SERVERS)
def test_who_is_slow_keeps_nobody_else_waiting(name: str, mode: str) -> None:
    if name == "uvicorn":
        pytest.importorskip("uvicorn")
    with running(SERVERS[name]) as server, contextlib.ExitStack() as stack:
        port = int(line_of(server))
        url = f"http://127.0.0.1:{port}/"
        options = ["-c", str(SLOW), "-r", str(SLOW), "-l", "2", "-i", "1", "-p", str(int(LIMIT))]
        attack = stack.enter_context(
            subprocess.Popen(
                ["slowhttptest", *MODES[mode], *options, "-u", url], stdout=subprocess.PIPE, text=True
            )
        )
        stack.callback(attack.kill)
        asked = 0
        while not has_ended(attack):
            begun = time.monotonic()
            answered(port)
            assert time.monotonic() - begun < LIMIT
            asked += 1
        output = attack.communicate()[0]
        assert attack.returncode == 0, output
        told = [line for line in output.splitlines() if "service available" in line]
        assert told, output
        assert all("YES" in line for line in told), output
        assert asked > 1
        answered(port)
        server.communicate(timeout=LIMIT)
    assert server.returncode == 0
