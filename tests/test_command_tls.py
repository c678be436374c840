"""fastlisten serve --tls-cert."""

import contextlib
import shutil
import signal
import ssl
import subprocess
from pathlib import Path

import pytest

from fastlisten.cli import main
from helpers import connect, read_all, reset
from helpers.certificates import Pair, certificate, client_context, expired
from helpers.command import Server, is_one_line, serve, signals
from helpers.programs import run

ANYWHERE = "127.0.0.1:0"


@pytest.fixture(scope="module")
def other(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return certificate(tmp_path_factory.mktemp("other"), "somebody")


def over_tls(server: Server, context: ssl.SSLContext) -> ssl.SSLSocket:
    return context.wrap_socket(connect(server.target), server_hostname="localhost")


def test_echo_over_tls(pair: Pair) -> None:
    with (
        serve(ANYWHERE, "--tls-cert", str(pair.cert), "--tls-key", str(pair.key)) as server,
        over_tls(server, client_context(pair)) as client,
    ):
        client.sendall(b"hello")
        assert client.recv(10) == b"hello"


@signals
def test_nothing_a_client_does_is_told_but_counted(pair: Pair) -> None:
    options = ["--tls-cert", str(pair.cert), "--tls-key", str(pair.key), "--handshake-timeout", "0.2"]
    options += ["--first-bytes", "0"]  # or who is silent would not get as far as a handshake
    with serve(ANYWHERE, *options, "--json") as server:
        with connect(server.target) as silent:
            assert silent.recv(1) == b""
        with connect(server.target) as plain, contextlib.suppress(ConnectionResetError):
            plain.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            read_all(plain)
        client = over_tls(server, client_context(pair))
        client.sendall(b"hello")
        assert client.recv(10) == b"hello"
        # What is no record of TLS, after the handshake: the handler's connection has an error.
        with connect(server.target) as raw:
            up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
            side = client_context(pair).wrap_bio(down, up, server_hostname="localhost")
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
            raw.sendall(up.read())
            while True:
                down.write(raw.recv(1 << 16))
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
                    break
            raw.sendall(up.read() + b"no record of TLS at all")
            with contextlib.suppress(ConnectionResetError):
                read_all(raw)
        reset(client)
        status, lines, errors = server.end(signal.SIGTERM)
        assert (status, errors) == (0, "")
        assert '"tls_failures": {"timeout": 1, "not TLS": 1}' in lines[-1]
        assert '"tls_handshakes": 2' in lines[-1]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_http_with_client_certificates(pair: Pair, other: Pair) -> None:
    options = ["--tls-cert", str(pair.cert), "--tls-key", str(pair.key), "--tls-ca", str(other.cert)]
    with serve(ANYWHERE, "http", *options) as server:
        url = f"https://localhost:{server.endpoint.port}/"
        command = ["curl", "-sS", "--connect-to", "::127.0.0.1:", "--cacert", str(pair.cert), url]
        assert run([*command, "--cert", str(other.cert), "--key", str(other.key)]).stdout == "fastlisten\n"
        assert run(command, status=None).returncode != 0


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--tls-key", "key"], 2, "--tls-key needs --tls-cert"),
        (["--tls-ca", "cert"], 2, "--tls-ca needs --tls-cert"),
        (["--handshake-timeout", "1"], 2, "--handshake-timeout needs --tls-cert"),
        (
            ["--tls-cert", "cert", "--tls-key", "key", "--handshake-timeout", "0"],
            2,
            "--handshake-timeout must be",
        ),
        (["--tls-cert", "cert", "--handshake-timeout", "soon"], 2, "'soon' is not a time in seconds"),
        (["--tls-cert", "nothing"], 1, "--tls-cert nothing: No such file or directory"),
        (["--tls-cert", "."], 1, "--tls-cert .: Is a directory"),
        (["--tls-cert", "cert"], 1, "--tls-cert cert: no key is in it; --tls-key names its file"),
        (["--tls-cert", "cert", "--tls-key", "nothing"], 1, "--tls-key nothing: No such file"),
        (["--tls-cert", "cert", "--tls-key", "cert"], 1, "--tls-key cert: no key is in it"),
        (["--tls-cert", "key", "--tls-key", "key"], 1, "--tls-cert key: no certificate is in it"),
        (
            ["--tls-cert", "cert", "--tls-key", "other"],
            1,
            "the key in other is not that of the certificate in",
        ),
        (["--tls-cert", "cert", "--tls-key", "locked"], 1, "the key is encrypted"),
        (["--tls-cert", "half", "--tls-key", "key"], 1, "half and its key cannot be used: "),
        (["--tls-cert", "old", "--tls-key", "key"], 1, "--tls-cert old: the certificate has ended at "),
        (["--tls-cert", "cert", "--tls-key", "key", "--tls-ca", "nothing"], 1, "--tls-ca nothing: No such"),
        (["--tls-cert", "cert", "--tls-key", "key", "--tls-ca", "key"], 1, "--tls-ca key: no certificate is"),
    ],
)
def test_a_mistake_is_one_clear_line(
    files: Path,
    arguments: list[str],
    status: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    ended = main(["serve", ANYWHERE, *arguments])
    is_one_line(subprocess.CompletedProcess(arguments, ended, *capsys.readouterr()), status, text)


@pytest.fixture(scope="module")
def files(pair: Pair, other: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    shutil.copy(expired(folder, pair).cert, folder / "old")
    shutil.copy(pair.cert, folder / "cert")
    shutil.copy(pair.key, folder / "key")
    shutil.copy(other.key, folder / "other")
    text = pair.cert.read_text()
    (folder / "half").write_text(text[: len(text) // 2])
    run(
        ["openssl", "ec", "-in", "key", "-out", "locked", "-aes128", "-passout", "pass:secret"], folder=folder
    )
    return folder
