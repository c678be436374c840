"""Whole exchanges over a Connection: any data, partial sends, faults, many clients, TLS."""

import socket
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlisten
from helpers import LIMIT, connect, echo, needs, posix_only, serving
from helpers.pairs import SENDING


@pytest.mark.parametrize("timeout", [None, 20.0])
@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 300_000), max_size=6),
    st.integers(1000, 100_000),
    st.sampled_from(SENDING),
    st.booleans(),
)
def test_whatever_is_sent_arrives(
    timeout: float | None, sizes: list[int], step: int, method: str, narrow: bool
) -> None:
    """Any sizes, through narrow buffers and partial sends, in order and complete."""
    with fastlisten.bind(("127.0.0.1", 0)) as listener:
        if narrow:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with connect(listener, receive_buffer=4096 if narrow else 0) as client:
            connection = listener.accept_many(1)[0]
            connection.settimeout(timeout)
            parts = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
            failed: list[BaseException] = []

            def send() -> None:
                try:
                    with connection:
                        for part in parts:
                            if method == "sendall":
                                connection.sendall(part)
                                continue
                            view = memoryview(part)
                            while len(view):
                                whole = view if method == "send" else [view[:7], view[7:]]
                                view = view[getattr(connection, method)(whole) :]
                except BaseException as error:
                    failed.append(error)

            sender = threading.Thread(target=send)
            sender.start()
            received = []
            while part := client.recv(step):
                received.append(part)
            sender.join(LIMIT)
    assert not failed
    assert b"".join(received) == b"".join(parts)


PARTIAL = """
import json, threading, socket, fastlisten
from helpers import connect, read_all
data = bytes(range(256)) * 40
with fastlisten.bind(("127.0.0.1", 0)) as listener, connect(listener) as client:
    with listener.accept_many(1)[0] as connection:
        connection.settimeout({timeout})
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
    received = []
    # The client's calls are cut short too.
    print(json.dumps(read_all(client) == data))
"""


@pytest.mark.parametrize("timeout", [None, 5.0])
@pytest.mark.parametrize(
    "plan",
    [[(-1, 50), (-7, 100)], [("EINTR", 5), (-9, 3), ("EINTR", 3)], [("EINTR", 1)]],
    ids=repr,
)
def test_sendall_goes_on_after_partial_sends_and_signals(
    faults: Any, timeout: float | None, plan: Any
) -> None:
    assert faults.python(PARTIAL.format(timeout=timeout), send=plan) is True


SPURIOUS = """
import json, fastlisten
from helpers import connect
with fastlisten.bind(("127.0.0.1", 0)) as listener, connect(listener) as client:
    with listener.accept_many(1)[0] as connection:
        connection.settimeout(5.0)
        client.sendall(b"here")
        print(json.dumps([connection.recv(10).decode(), connection.send(b"x")]))
"""


def test_a_timed_call_that_finds_nothing_after_all_waits_again(faults: Any) -> None:
    """poll(2), BUGS: what is reported ready may still block."""
    plan = [("EAGAIN", 3)]
    assert faults.python(SPURIOUS, recv=plan, send=plan) == ["here", 1]


def test_errors_of_the_calls_come_out_as_they_are(faults: Any) -> None:
    code = """
import json, fastlisten, sys, socket
from helpers import connect, told
seen = []
for standard in (True, False):
    with fastlisten.bind(("127.0.0.1", 0)) as listener, connect(listener):
        accepted = listener.accept()[0] if standard else listener.accept_many(1)[0]
        with accepted:
            seen.append([repr(told(accepted.recv, 1)), repr(told(accepted.send, b"x")),
                         repr(told(accepted.sendall, b"x")), repr(told(accepted.sendmsg, [b"x"]))])
print(json.dumps(seen))
"""
    codes = ["EPIPE", "ENOBUFS", "EIO"]
    seen = faults.python(code, recv=[("EIO", 2)], send=[(c, 1) for c in codes * 2])
    assert seen[0] == seen[1]
    assert "BrokenPipeError" in seen[1][1]


@posix_only("the echo needs no port of its own there; the loop's tests cover it")
def test_an_echo_of_a_hundred_clients() -> None:
    with fastlisten.bind(("127.0.0.1", 0)) as listener, serving(listener, echo, threads=4):
        for number in range(100):
            with connect(listener) as client:
                text = b"%d" % number
                client.sendall(text)
                assert client.recv(10) == text


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a certificate for localhost that is valid for a day."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "1",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost",
            "-keyout",
            "key",
            "-out",
            "certificate",
        ],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=50,
    )
    return folder


@needs("the openssl command")
@pytest.mark.parametrize("threads", [0, 2])
def test_tls(certificate: Path, threads: int) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate / "certificate", certificate / "key")
    trusting = ssl.create_default_context(cafile=str(certificate / "certificate"))

    def handler(connection: Any) -> None:
        with server.wrap_socket(connection.socket(), server_side=True) as secure:
            echo(secure)

    with (
        fastlisten.bind(("127.0.0.1", 0)) as listener,
        serving(listener, handler, threads=threads),
    ):
        for _ in range(3):
            with (
                connect(listener) as plain,
                trusting.wrap_socket(plain, server_hostname="localhost") as client,
            ):
                client.sendall(b"secret" * 10_000)
                received = b""
                while len(received) < 60_000:
                    received += client.recv(1 << 16)
                assert received == b"secret" * 10_000
