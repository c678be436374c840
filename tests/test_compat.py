"""Listeners of fastlisten.bind() in frameworks that take a ready socket or descriptor.

Each case is a whole program: it binds, prints its port, hands the listener over, and serves until it
is killed.  The middle of each is the way that FRAMEWORKS.md says.
"""

import importlib.util
import os
import subprocess
import sys
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import LIMIT, connect, read_all

HEAD = """\
import fastlisten
listener = fastlisten.bind(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
"""

ASYNCIO = """\
import asyncio
async def hello(reader, writer):
    await reader.readuntil(b"\\r\\n\\r\\n")
    writer.write(b"HTTP/1.1 200 OK\\r\\n\\r\\nhello")
    await writer.drain()
    writer.close()
async def main():
    server = await asyncio.start_server(hello, sock=listener)
    await server.serve_forever()
"""

ASGI = """\
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})
"""

WSGI = """\
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "5")])
    return [b"hello"]
"""

FLASK = """\
import flask
app = flask.Flask("hello")
@app.route("/")
def hello():
    return "hello"
"""

HANDED_ON = """\
import os, sys
os.set_inheritable(listener.fileno(), True)
os.execv(sys.executable, [sys.executable, "-m", {command}, "--bind", f"fd://{{listener.fileno()}}", "{app}"])
"""

# name: the modules it needs, and the program after HEAD
PROGRAMS = {
    "asyncio": ([], ASYNCIO + "asyncio.run(main())\n"),
    "uvloop": (["uvloop"], ASYNCIO + "import uvloop\nuvloop.run(main())\n"),
    "uvicorn": (
        ["uvicorn"],
        ASGI
        + """\
import uvicorn
uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning")).run(sockets=[listener])
""",
    ),
    "hypercorn": (["hypercorn"], HANDED_ON.format(command='"hypercorn"', app="asgi_app:app")),
    "gunicorn": (["gunicorn"], HANDED_ON.format(command='"gunicorn"', app="wsgi_app:app")),
    "waitress": (["waitress"], WSGI + "import waitress\nwaitress.serve(app, sockets=[listener])\n"),
    "aiohttp": (
        ["aiohttp"],
        """\
import asyncio
from aiohttp import web
async def hello(request):
    return web.Response(text="hello")
async def main():
    app = web.Application()
    app.router.add_get("/", hello)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    await asyncio.Event().wait()
asyncio.run(main())
""",
    ),
    "tornado": (
        ["tornado"],
        """\
import asyncio
import tornado.httpserver, tornado.web
class Hello(tornado.web.RequestHandler):
    def get(self):
        self.write("hello")
async def main():
    server = tornado.httpserver.HTTPServer(tornado.web.Application([("/", Hello)]))
    listener.setblocking(False)
    server.add_sockets([listener])
    await asyncio.Event().wait()
asyncio.run(main())
""",
    ),
    "twisted": (
        ["twisted"],
        """\
from twisted.internet import reactor
from twisted.web import resource, server
class Hello(resource.Resource):
    isLeaf = True
    def render_GET(self, request):
        return b"hello"
listener.setblocking(False)
reactor.adoptStreamPort(listener.fileno(), listener.family, server.Site(Hello()))
listener.close()
reactor.run()
""",
    ),
    "gevent": (
        ["gevent"],
        """\
from gevent.server import StreamServer
def hello(sock, address):
    while b"\\r\\n\\r\\n" not in sock.recv(9999):
        pass
    sock.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\nhello")
    sock.close()
listener.setblocking(False)
StreamServer(listener, hello).serve_forever()
""",
    ),
    "trio": (
        ["trio"],
        """\
import socket, trio
async def hello(stream):
    await stream.receive_some(9999)
    await stream.send_all(b"HTTP/1.1 200 OK\\r\\n\\r\\nhello")
    await stream.aclose()
async def main():
    plain = socket.socket(fileno=listener.detach())  # trio takes socket.socket and no subclass
    await trio.serve_listeners(hello, [trio.SocketListener(trio.socket.from_stdlib_socket(plain))])
trio.run(main)
""",
    ),
    "werkzeug": (
        ["werkzeug"],
        WSGI
        + """\
from werkzeug.serving import make_server
make_server("127.0.0.1", 0, app, threaded=True, fd=listener.fileno()).serve_forever()
""",
    ),
    "werkzeug with the loop": (
        ["werkzeug"],
        WSGI
        + """\
from fastlisten.socketserver import AcceptMixIn
from werkzeug.serving import ThreadedWSGIServer
class Server(AcceptMixIn, ThreadedWSGIServer):
    pass
Server("127.0.0.1", 0, app, fd=listener.fileno()).serve_forever()
""",
    ),
    "Flask": (
        ["flask", "werkzeug"],
        FLASK
        + """\
from werkzeug.serving import make_server
make_server("127.0.0.1", 0, app, threaded=True, fd=listener.fileno()).serve_forever()
""",
    ),
    "wsgiref": (
        [],
        WSGI
        + """\
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
server = WSGIServer(listener.getsockname(), WSGIRequestHandler, bind_and_activate=False)
server.socket.close()
server.socket = listener
server.server_name, server.server_port = listener.getsockname()
server.setup_environ()
server.set_app(app)
server.serve_forever()
""",
    ),
    "wsgiref with the loop": (
        [],
        WSGI
        + """\
listener.close()
from fastlisten.socketserver import AcceptMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
class Server(AcceptMixIn, WSGIServer):
    pass
server = Server(("127.0.0.1", 0), WSGIRequestHandler)
print(server.server_port, flush=True)
server.set_app(app)
server.serve_forever()
""",
    ),
}

XMLRPC = """\
from xmlrpc.server import SimpleXMLRPCServer
server = SimpleXMLRPCServer(listener.getsockname(), bind_and_activate=False)
server.socket.close()
server.socket = listener
server.register_function(pow)
server.serve_forever()
"""

XMLRPC_WITH_THE_LOOP = """\
listener.close()
from fastlisten.socketserver import AcceptMixIn
from xmlrpc.server import SimpleXMLRPCServer
class Server(AcceptMixIn, SimpleXMLRPCServer):
    pass
server = Server(("127.0.0.1", 0))
print(server.server_address[1], flush=True)
server.register_function(pow)
server.serve_forever()
"""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Any]:
    """Run a program in a process of its own; gives its port, and kills it at the end."""
    (tmp_path / "asgi_app.py").write_text(ASGI)
    (tmp_path / "wsgi_app.py").write_text(WSGI)
    errors = tmp_path / "stderr"
    running: list[Any] = []
    path = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))

    def start(program: Any, ports: Any = 1) -> Any:
        with errors.open("wb") as stderr:
            process: Any = subprocess.Popen(
                [sys.executable, "-c", HEAD + program],
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": path},
            )
        running.append(process)
        lines = [process.stdout.readline() for _ in range(ports)]
        assert lines[-1], errors.read_text()
        return int(lines[-1])

    yield start
    for process in running:
        process.terminate()  # gunicorn's master has workers to end
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(LIMIT)
        process.stdout.close()


@pytest.mark.parametrize("name", PROGRAMS)
def test_http(name: Any, serve: Any) -> None:
    modules, program = PROGRAMS[name]
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    if "execv" in program and os.name == "nt":
        pytest.skip("a descriptor that is handed on through exec is POSIX")
    port = serve(program, ports=1 + program.count("print("))
    for _ in range(3):
        answer = exchange_http(port)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.split(b" ")[1] == b"200", answer
        assert body == b"hello"


def exchange_http(port: Any) -> Any:
    """One GET, read to the end of the stream."""
    with connect(("127.0.0.1", port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        return read_all(client)


@pytest.mark.parametrize("program", [XMLRPC, XMLRPC_WITH_THE_LOOP], ids=["", "with the loop"])
def test_xmlrpc_server(program: Any, serve: Any) -> None:
    port = serve(program, ports=1 + program.count("print("))
    with xmlrpc.client.ServerProxy(f"http://127.0.0.1:{port}/") as proxy:
        assert proxy.pow(2, 10) == 1024
