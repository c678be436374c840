"""fastlisten.reloading(): a context that serves new files when they change on disk."""

import asyncio
import contextlib
import functools
import logging
import os
import shutil
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fastlisten
from fastlisten import aio
from helpers import connect, needs, serving
from helpers.aio import LOOPS
from helpers.certificates import Pair, certificate, client_context
from helpers.programs import run


@pytest.fixture(scope="module")
def made(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Give two pairs for localhost, and one for another name and a wildcard."""
    names = [("localhost",), ("www.example.org", "*.example.net")]
    return [pair, *(certificate(tmp_path_factory.mktemp("pair"), *some) for some in names)]


@pytest.fixture
def live(tmp_path: Path, made: list[Pair]) -> Pair:
    """Give the first pair as files that a test changes."""
    pair = Pair(tmp_path / "cert.pem", tmp_path / "key.pem")
    put(made[0], pair)
    return pair


@pytest.fixture
def trusting(made: list[Pair]) -> ssl.SSLContext:
    return client_context(*made)


def put_file(source: Path, target: Path) -> None:
    """Replace a file by a copy of another, whole, as those who renew certificates do."""
    new = target.with_name("new")
    shutil.copyfile(source, new)
    new.replace(target)


def put(source: Pair, target: Pair) -> None:
    put_file(source.key, target.key)
    put_file(source.cert, target.cert)


@functools.cache
def number_of(pair: Pair) -> str:
    return run(["openssl", "x509", "-in", pair.cert, "-noout", "-serial"]).stdout.strip().partition("=")[2]


def handshake(
    server: ssl.SSLContext, client: ssl.SSLContext, name: str | None = "localhost", **options: Any
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Shake hands in memory; return the server's and the client's side."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(up, down, server_side=True)
    theirs = client.wrap_bio(down, up, server_hostname=name, **options)
    left = [theirs, ours]
    while left:
        for side in left.copy():
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
                left.remove(side)
    return ours, theirs


def served(server: ssl.SSLContext, client: ssl.SSLContext, name: str | None = "localhost") -> Any:
    """Return the serial number of the certificate that a client is shown."""
    found = handshake(server, client, name)[1].getpeercert()
    assert found is not None
    return found["serialNumber"]


def test_new_files_are_served(made: list[Pair], live: Pair, trusting: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "fastlisten")
    context = fastlisten.reloading(live.cert, live.key, every=0)
    assert isinstance(context, ssl.SSLContext)
    assert served(context, trusting) == number_of(made[0])
    put(made[1], live)
    for _ in range(3):
        assert served(context, trusting) == number_of(made[1])
    put(made[0], live)
    assert served(context, trusting) == number_of(made[0])
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]


def test_one_file_with_both(made: list[Pair], tmp_path: Path, trusting: Any) -> None:
    both = tmp_path / "both.pem"

    def write(pair: Pair) -> None:
        both.write_bytes(pair.key.read_bytes() + pair.cert.read_bytes())

    write(made[0])
    context = fastlisten.reloading(str(both), every=0)
    write(made[1])
    assert served(context, trusting) == number_of(made[1])


def test_a_client_that_asks_for_no_name(made: list[Pair], live: Pair, trusting: Any) -> None:
    trusting.check_hostname = False
    context = fastlisten.reloading(live.cert, live.key, every=0)
    put(made[1], live)
    assert served(context, trusting, None) == number_of(made[1])


def test_half_a_change_is_left_alone(made: list[Pair], live: Pair, trusting: Any, caplog: Any) -> None:
    """Whichever file is first, and told once until they change again."""
    context = fastlisten.reloading(live.cert, live.key, every=0)
    for first, second in (("cert", "key"), ("key", "cert")):
        for old, new in ((made[0], made[1]), (made[1], made[0])):
            caplog.clear()
            put_file(getattr(new, first), getattr(live, first))
            for _ in range(3):
                assert served(context, trusting) == number_of(old)
            (record,) = caplog.records
            assert record.levelname == "WARNING"
            assert "stays as it was" in record.getMessage()
            put_file(getattr(new, second), getattr(live, second))
            assert served(context, trusting) == number_of(new)


@pytest.mark.parametrize("fault", ["gone", "empty", "half"])
def test_files_that_cannot_be_read(
    made: list[Pair], live: Pair, trusting: Any, caplog: Any, fault: str
) -> None:
    context = fastlisten.reloading(live.cert, live.key, every=0)
    if fault == "gone":
        live.cert.unlink()
    else:
        text = made[1].cert.read_bytes()
        live.cert.write_bytes(text[: len(text) // 2] if fault == "half" else b"")
    for _ in range(3):
        assert served(context, trusting) == number_of(made[0])
    assert len(caplog.records) == 1
    put(made[1], live)
    assert served(context, trusting) == number_of(made[1])


def test_the_files_are_looked_at_now_and_then(made: list[Pair], live: Pair, trusting: Any) -> None:
    context = fastlisten.reloading(live.cert, live.key, every=1000)
    put(made[1], live)
    assert served(context, trusting) == number_of(made[0])


def test_a_change_that_leaves_no_trace_is_seen(made: list[Pair], live: Pair, trusting: Any) -> None:
    """In the same tick of the file system's clock, with the same length, in place."""
    both = live.cert
    texts = [made[n].key.read_bytes() + made[n].cert.read_bytes() for n in (0, 1)]
    longest = max(map(len, texts))
    both.write_bytes(texts[0].ljust(longest, b"\n"))
    context = fastlisten.reloading(both, every=0)
    before = both.stat()
    with both.open("r+b") as file:
        file.write(texts[1].ljust(longest, b"\n"))
    os.utime(both, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert served(context, trusting) == number_of(made[1])


def test_the_names_of_several_pairs(made: list[Pair], trusting: Any) -> None:
    context = fastlisten.reloading([made[0], made[2]])
    for name, pair in (
        ("localhost", made[0]),
        ("www.example.org", made[2]),
        ("WWW.Example.ORG", made[2]),
        ("a.example.net", made[2]),
    ):
        assert served(context, trusting, name) == number_of(pair)
    trusting.check_hostname = False
    for stranger in ("example.net", "a.b.example.net", "nobody.example", "127.0.0.1", None):
        assert served(context, trusting, stranger) == number_of(made[0])


def test_each_of_several_pairs_changes_by_itself(made: list[Pair], live: Pair, trusting: Any) -> None:
    context = fastlisten.reloading([made[2], live], every=0)
    assert served(context, trusting) == number_of(made[0])
    put(made[1], live)
    assert served(context, trusting) == number_of(made[1])
    assert served(context, trusting, "www.example.org") == number_of(made[2])


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_what_is_set_holds_for_new_files(
    made: list[Pair], live: Pair, trusting: Any, version: str, tmp_path: Path
) -> None:
    """Set before the change or after it: protocols, ciphers, who is trusted, and who is asked."""
    own = certificate(tmp_path, "somebody")
    trusting.load_cert_chain(*own)
    trusting.maximum_version = ssl.TLSVersion[version]
    trusting.set_alpn_protocols(["h2", "http/1.1"])
    context = fastlisten.reloading(live.cert, live.key, every=0)
    context.set_alpn_protocols(["http/1.1"])
    put(made[1], live)
    assert served(context, trusting) == number_of(made[1])
    context.load_verify_locations(own.cert)
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
    for pair in (made[1], made[0]):
        put(pair, live)
        ours, theirs = handshake(context, trusting)
        theirs.write(b"hello")
        assert ours.read() == b"hello"
        found: Any = ours.getpeercert()
        assert found["subject"][0][0] == ("commonName", "somebody")
        assert theirs.selected_alpn_protocol() == ours.selected_alpn_protocol() == "http/1.1"
        cipher = theirs.cipher()
        assert cipher is not None
        assert version == "TLSv1_3" or cipher[0] == "ECDHE-ECDSA-AES128-GCM-SHA256"
    nobody = client_context(*made)
    nobody.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        handshake(context, nobody)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_sessions_go_on_across_a_change(made: list[Pair], live: Pair, trusting: Any, version: str) -> None:
    trusting.maximum_version = ssl.TLSVersion[version]
    context = fastlisten.reloading(live.cert, live.key, every=0)
    ours, theirs = handshake(context, trusting)
    ours.write(b"hello")
    assert theirs.read() == b"hello"  # with TLS 1.3 the session comes before it
    put(made[1], live)
    ours, theirs = handshake(context, trusting, session=theirs.session)
    assert ours.session_reused
    ours.write(b"hello")
    assert theirs.read() == b"hello"


def test_no_handshake_fails_while_the_files_change(made: list[Pair], live: Pair, trusting: Any) -> None:
    context = fastlisten.reloading(live.cert, live.key, every=0)
    over = threading.Event()

    def shake() -> set[str]:
        seen = set()
        while not over.is_set():
            seen.add(served(context, trusting))
        return seen

    with ThreadPoolExecutor(3) as pool:
        shaking = [pool.submit(shake) for _ in range(3)]
        try:
            for number in range(60):
                put(made[number % 2], live)
        finally:
            over.set()
        seen = set.union(*(one.result() for one in shaking))
    assert seen <= {number_of(made[0]), number_of(made[1])}


# --- wherever a context works


@contextlib.contextmanager
def by_serve(context: ssl.SSLContext) -> Iterator[Any]:
    def handler(connection: fastlisten.TLSConnection) -> None:
        connection.recv(1)

    with fastlisten.bind("127.0.0.1:0") as listener, serving(listener, handler, ssl=context, threads=2):
        yield listener.getsockname()


@contextlib.contextmanager
def by_loop(new_loop: Callable[[], asyncio.AbstractEventLoop], context: ssl.SSLContext) -> Iterator[Any]:
    """A server on an event loop that runs in a thread."""
    loop = new_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def do(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)

    async def ends(server: Any) -> None:
        server.close()
        await server.wait_closed()

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    try:
        server = do(asyncio.start_server(served, "127.0.0.1", 0, ssl=context))
        yield server.sockets[0].getsockname()
        do(ends(server))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


WAYS: dict[str, Callable[[ssl.SSLContext], Any]] = {
    "serve": by_serve,
    **{name: functools.partial(by_loop, new_loop) for name, new_loop in LOOPS.items()},
    "ours": functools.partial(by_loop, aio.new_event_loop),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_server(made: list[Pair], live: Pair, trusting: Any, way: Any) -> None:
    context = fastlisten.reloading(live.cert, live.key, every=0)
    with way(context) as address:

        def shown() -> Any:
            with trusting.wrap_socket(connect(address), server_hostname="localhost") as client:
                found = client.getpeercert()
                with contextlib.suppress(OSError):
                    client.unwrap()
                return found["serialNumber"]

        assert shown() == number_of(made[0])
        put(made[1], live)
        assert shown() == number_of(made[1])


# --- what is wrong at once


def test_what_cannot_be_loaded(made: list[Pair], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fastlisten.reloading(tmp_path / "nothing.pem")
    with pytest.raises(ssl.SSLError, match="KEY_VALUES_MISMATCH"):
        fastlisten.reloading(made[0].cert, made[1].key)
    with pytest.raises(ssl.SSLError):
        fastlisten.reloading(made[0].cert)
    locked = tmp_path / "locked.pem"
    run(["openssl", "ec", "-in", made[0].key, "-out", locked, "-aes128", "-passout", "pass:secret"])
    with pytest.raises(ValueError, match="the key is encrypted"):
        fastlisten.reloading(made[0].cert, locked)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (([],), ValueError),
        ((["a.pem"], "key.pem"), TypeError),
        ((None,), TypeError),
        ((3,), TypeError),
    ],
)
def test_what_is_no_certificate(arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        fastlisten.reloading(*arguments)


@pytest.mark.parametrize(("every", "error"), [(-1, ValueError), (float("nan"), ValueError), ("1", TypeError)])
def test_what_is_no_time(live: Pair, every: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="every"):
        fastlisten.reloading(live.cert, live.key, every=every)


@needs("fork")
def test_a_forked_child_reloads(made: list[Pair], live: Pair) -> None:
    """Also when the fork came while another thread looked at the files."""
    program = f"""
import os, ssl, threading
import fastlisten
from fastlisten import _reloading
context = fastlisten.reloading({str(live.cert)!r}, {str(live.key)!r}, every=0)
_reloading._looking.acquire()
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
else:
    assert _reloading._looking.acquire(timeout=0)
    os._exit(0)
"""
    run(program)
