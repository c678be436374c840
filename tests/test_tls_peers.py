"""Other people's programs and each kind of TLS server: curl, nginx, openssl, sslscan, frameworks."""

import asyncio
import contextlib
import http.client
import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastlisten import aio
from helpers import LIMIT, connect, needs, probes, wait_until
from helpers.aio import LOOPS, in_thread
from helpers.certificates import Pair, certificate, server_context
from helpers.programs import run, running
from helpers.tls_servers import WAYS, TlsServer, Web, tls_server

pytestmark = needs("the openssl command")

all_ways = pytest.mark.parametrize("way", WAYS)
FEW = ["serve-threads", "ThreadingTCPServer", "EventLoop", "EventLoop-handshake_threads"]


@pytest.fixture(scope="module")
def somebody(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Give the certificate of a client."""
    return certificate(tmp_path_factory.mktemp("somebody"), "somebody")


@pytest.fixture(scope="module")
def asking(pair: Pair, somebody: Pair) -> ssl.SSLContext:
    """Give a server's context that lets clients have a certificate."""
    context = server_context(pair)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_verify_locations(somebody.cert)
    return context


def curl(port: int, pair: Pair, *options: str, times: int = 2) -> str:
    """Ask so many times, and return all answers."""
    url = f"https://localhost:{port}/"
    command = ["curl", "-sS", "--http1.1", "--connect-to", "::127.0.0.1:", "--cacert", str(pair.cert)]
    return run([*command, *options, *[url] * times]).stdout


@needs("the curl command")
@all_ways
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_curl(way: str, version: str, asking: ssl.SSLContext, pair: Pair, somebody: Pair) -> None:
    """Keeps its connection, comes again on a new one with its session, and shows a certificate."""
    only = (f"--tlsv{version}", "--tls-max", version)
    with tls_server(way, asking, Web) as server:
        assert curl(server.port, pair, *only) == f"new TLSv{version}" * 2
        assert server.begun == 1
        answers = curl(server.port, pair, *only, "-H", "Connection: close")
        if "TCPServer" not in way:  # it ends, as the original, without close_notify: OpenSSL may forget then
            assert answers == f"new TLSv{version}resumed TLSv{version}"
        shown = ("--cert", str(somebody.cert), "--key", str(somebody.key))
        assert curl(server.port, pair, *only, *shown, times=1) == f"new TLSv{version} somebody"
    assert (server.failures(), server.reports) == ({}, [])


NGINX = """\
daemon off;
master_process off;
worker_processes 1;
pid nginx.pid;
error_log stderr warn;
events { worker_connections 200; }
http {
    access_log off;
    client_body_temp_path t; proxy_temp_path t; fastcgi_temp_path t; uwsgi_temp_path t; scgi_temp_path t;
    proxy_http_version 1.1;
    proxy_set_header Host localhost;
    proxy_ssl_name localhost;
    proxy_ssl_verify on;
    proxy_ssl_trusted_certificate %(cert)s;
    proxy_ssl_certificate %(own_cert)s;
    proxy_ssl_certificate_key %(own_key)s;
    proxy_ssl_protocols TLSv1.2 TLSv1.3;
    proxy_ssl_session_reuse on;
    upstream kept { server 127.0.0.1:%(port)d; keepalive 4; }
    server {
        listen unix:%(folder)s/s;
        location /kept { proxy_pass https://kept; proxy_set_header Connection ""; }
        location /each { proxy_pass https://127.0.0.1:%(port)d; }
    }
}
"""


@contextlib.contextmanager
def nginx(server: TlsServer, pair: Pair, own: Pair, folder: Path) -> Iterator[Any]:
    """Run nginx before a server, until the block ends; what asks it for a path is given."""
    (folder / "nginx.conf").write_text(
        NGINX
        % {
            "cert": pair.cert,
            "own_cert": own.cert,
            "own_key": own.key,
            "port": server.port,
            "folder": folder,
        }
    )

    def ask(path: str) -> str:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = connect(str(folder / "s"))
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.status == 200
            return answer.read().decode()

    def listens() -> bool:
        with contextlib.suppress(OSError):
            connect(str(folder / "s")).close()
            return True
        return False

    command = [str(probes.nginx()), "-p", f"{folder}/", "-c", "nginx.conf", "-e", "stderr"]
    with running(command, folder=folder) as process:
        wait_until(listens)
        yield ask
        process.terminate()
        _, said = process.communicate(timeout=LIMIT)
    assert said == ""


@needs("nginx")
@all_ways
def test_nginx_as_a_proxy(
    way: str, asking: ssl.SSLContext, pair: Pair, somebody: Pair, unix_paths: Path
) -> None:
    """With a connection for each request, whose sessions it reuses, and with one that it keeps."""
    with (
        tls_server(way, asking, Web) as server,
        nginx(server, pair, somebody, unix_paths) as ask,
    ):
        answers = [ask("/each") for _ in range(3)]
        assert answers == ["new TLSv1.3 somebody"] + ["resumed TLSv1.3 somebody"] * 2
        assert server.begun == 3
        assert len({ask("/kept") for _ in range(3)}) == 1
        assert server.begun == 4
    assert (server.failures(), server.reports) == ({}, [])


@needs("the sslscan command")
@pytest.mark.parametrize("way", ["serve-threads", "EventLoop"])  # it takes seconds
def test_sslscan(way: str, pair: Pair) -> None:
    """It finds nothing old, and what it tries is counted by its reason."""
    with tls_server(way, server_context(pair), Web) as server:
        found = run(["sslscan", "--no-colour", "--ipv4", f"localhost:{server.port}"]).stdout
        assert re.search(r"^TLSv1\.3 +enabled$", found, re.MULTILINE), found
        assert re.findall(r"^(\S+) +enabled$", found, re.MULTILINE) == ["TLSv1.2", "TLSv1.3"]
        assert "Server supports TLS Fallback SCSV" in found
        wait_until(lambda: server.over() >= 20)
    assert server.failures().keys() == {"closed", "cipher", "version"}
    assert server.reports == []


# socketserver's servers, the original's too, say no close_notify: OpenSSL forgets such a session.
@pytest.mark.parametrize("way", [way for way in FEW if "TCPServer" not in way])
def test_openssl_resumes_a_session_that_the_server_keeps(way: str, pair: Pair) -> None:
    with tls_server(way, server_context(pair), Web) as server:
        target = f"127.0.0.1:{server.port}"
        said = run(["openssl", "s_client", "-connect", target, "-tls1_2", "-reconnect", "-no_ticket"]).stdout
        assert (said.count("New, TLSv1.2"), said.count("Reused, TLSv1.2")) == (1, 5)


def test_openssl_s_time(pair: Pair) -> None:
    """Several servers at once, by many new sessions and by many that are resumed."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(tls_server(way, server_context(pair), Web)) for way in FEW]
        asking = [
            stack.enter_context(running(["openssl", "s_time", "-connect", f"127.0.0.1:{server.port}", *how]))
            for server in servers
            for how in (("-new", "-www", "/", "-time", "1"), ("-reuse", "-www", "/", "-time", "1"))
        ]
        for process in asking:
            said, errors = process.communicate(timeout=LIMIT)
            assert (process.returncode, errors) == (0, ""), (said, errors)
            assert int(re.search(r"(\d+) connections in .* real seconds", said)[1]) > 0  # type: ignore[index]
    assert [server.failures() for server in servers] == [{}] * len(servers)
    assert [server.reports for server in servers] == [[]] * len(servers)


# --- frameworks on our event loops

our_loops = pytest.mark.parametrize(
    "loop", [{"asyncio": "EventLoop", "uvloop": "UvloopEventLoop"}[name] for name in LOOPS]
)


async def is_asked_by_curl(server: Any, port: int, pair: Pair) -> None:
    """Have curl ask on a connection that is kept, and on new ones, and assert that it is a server of ours."""
    assert isinstance(server, aio.Server)
    assert await in_thread(curl, port, pair) == "hello" * 2
    assert await in_thread(curl, port, pair, "-H", "Connection: close") == "hello" * 2
    stats = server.stats()
    assert (stats.accepted, stats.tls_handshakes, stats.tls_failures) == (3, 3, {})


@needs("the curl command")
@our_loops
def test_uvicorn(loop: str, pair: Pair) -> None:
    uvicorn = pytest.importorskip("uvicorn")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["scheme"] == "https"
        headers = [(b"content-length", b"5")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"hello"})

    async def main() -> None:
        config = uvicorn.Config(
            app,
            port=0,
            lifespan="off",
            log_config=None,
            ssl_certfile=pair.cert,
            ssl_keyfile=pair.key,
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        async with asyncio.timeout(LIMIT):
            while not server.started:
                await asyncio.sleep(0.005)
            (made,) = server.servers
            await is_asked_by_curl(made, made.sockets[0].getsockname()[1], pair)
            server.should_exit = True
            await serving

    with asyncio.Runner(loop_factory=getattr(aio, loop)) as runner:
        runner.run(main())


@needs("the curl command")
@our_loops
def test_aiohttp(loop: str, pair: Pair) -> None:
    web = pytest.importorskip("aiohttp.web")

    async def hello(request: Any) -> Any:
        assert request.secure
        return web.Response(text="hello")

    async def main() -> None:
        app = web.Application()
        app.add_routes([web.get("/", hello)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server_context(pair))
        await site.start()
        await is_asked_by_curl(site._server, runner.addresses[0][1], pair)
        await runner.cleanup()

    with asyncio.Runner(loop_factory=getattr(aio, loop)) as runner:
        runner.run(main())
