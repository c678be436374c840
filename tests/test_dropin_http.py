"""fastlisten.http.server beside http.server."""

import http
import http.client
import http.server
import os
import re
import socketserver
import subprocess
import sys
import threading

import pytest

import fastlisten
from fastlisten import http as dropin_http
from fastlisten import socketserver as dropin_socketserver
from fastlisten.http import server as dropin
from helpers import LIMIT, exchange

BOTH = pytest.mark.parametrize("module", [http.server, dropin], ids=["original", "dropin"])
SERVERS = [name for name in http.server.__all__ if name.endswith("Server")]


def test_names():
    assert dropin.__all__ == http.server.__all__
    for name in dir(http.server):
        if name in SERVERS:
            assert issubclass(getattr(dropin, name), getattr(http.server, name))
            assert repr(getattr(dropin, name)) == repr(getattr(http.server, name))
        elif not name.startswith("__") and name not in ("socketserver",):
            assert getattr(dropin, name) is getattr(http.server, name), name
        assert name in dir(dropin)
    for name in http.__all__:
        assert getattr(dropin_http, name) is getattr(http, name)


def test_the_classes_are_the_drop_in_servers():
    assert issubclass(dropin.HTTPServer, dropin_socketserver.TCPServer)
    assert issubclass(dropin.ThreadingHTTPServer, dropin.HTTPServer)
    assert issubclass(dropin.ThreadingHTTPServer, socketserver.ThreadingMixIn)
    for name in SERVERS:
        for attribute in ("allow_reuse_address", "allow_reuse_port", "daemon_threads", "request_queue_size"):
            theirs = getattr(getattr(http.server, name), attribute, None)
            assert getattr(getattr(dropin, name), attribute, None) == theirs


class Hello(http.server.BaseHTTPRequestHandler):
    """Answers with the path, and keeps the connection."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = self.path.encode()
        self.send_response(http.HTTPStatus.OK)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("name", ["HTTPServer", "ThreadingHTTPServer"])
def test_requests(name):
    with getattr(dropin, name)(("127.0.0.1", 0), Hello) as server:
        assert type(server.socket) is fastlisten.Listener
        assert server.server_port == server.server_address[1]
        assert server.server_name
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            for _ in range(3):
                client = http.client.HTTPConnection(*server.server_address, timeout=LIMIT)
                for path in ("/a", "/b"):  # two requests on one connection
                    client.request("GET", path)
                    assert client.getresponse().read() == path.encode()
                client.close()
        finally:
            server.shutdown()
            thread.join(LIMIT)


def test_shutdown_does_not_wait_for_clients_that_stay():
    with dropin.ThreadingHTTPServer(("127.0.0.1", 0), Hello) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        client = http.client.HTTPConnection(*server.server_address, timeout=LIMIT)
        client.request("GET", "/early")
        assert client.getresponse().read() == b"/early"
        server.shutdown()
        thread.join(LIMIT)
        assert not thread.is_alive()
        client.request("GET", "/late")
        assert client.getresponse().read() == b"/late"
        client.close()


@pytest.mark.parametrize("module", ["http.server", "fastlisten.http.server"])
def test_command_line(module, tmp_path):
    (tmp_path / "hello.txt").write_bytes(b"hello\n")
    command = [sys.executable, "-u", "-m", module, "--bind", "127.0.0.1", "--directory", str(tmp_path), "0"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))},
    ) as process:
        try:
            line = process.stdout.readline()
            match = re.fullmatch(r"Serving HTTP on 127\.0\.0\.1 port (\d+) \(http://.*:\1/\) \.\.\.\n", line)
            assert match, line + process.stderr.read()
            answer = exchange(("127.0.0.1", int(match[1])), b"GET /hello.txt HTTP/1.0\r\n\r\n")
            assert answer.endswith(b"\r\n\r\nhello\n")
            assert "GET /hello.txt HTTP/1.0" in process.stderr.readline()
        finally:
            process.kill()
            process.communicate()


def test_command_line_uses_the_loop(tmp_path):
    """The module that runs as __main__ is the original, on the drop-in's servers."""
    program = (
        "import runpy, sys, http.server\n"
        "sys.argv = ['server', '--help']\n"
        "try:\n"
        "    runpy.run_module('fastlisten.http.server', run_name='__main__')\n"
        "except SystemExit:\n"
        "    import socketserver, fastlisten.socketserver\n"
        "    print(socketserver is fastlisten.socketserver)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))},
    )
    assert done.stdout.endswith("True\n")
    assert "--directory" in done.stdout


@BOTH
def test_bind_errors_are_the_originals(module):
    with module.HTTPServer(("127.0.0.1", 0), Hello) as server:
        assert server.fileno() == server.socket.fileno()
    with pytest.raises(OverflowError, match="port must be 0-65535"):
        module.HTTPServer(("127.0.0.1", 70000), Hello)
