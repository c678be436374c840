"""Certificates, by the openssl command, and contexts that have them."""

import ssl
from pathlib import Path
from typing import NamedTuple

from helpers.programs import run


class Pair(NamedTuple):
    """The files of a certificate and of its key."""

    cert: Path
    key: Path


def certificate(folder: Path, name: str = "localhost", *alternatives: str, key: str = "ec") -> Pair:
    """Make a self-signed certificate for these names in `folder`, valid for two days."""
    names = ",".join(f"DNS:{one}" for one in (name, *alternatives))
    kind = {
        "ec": ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        "rsa": ("-newkey", "rsa:2048"),
    }[key]
    pair = Pair(folder / f"{name}.cert.pem", folder / f"{name}.key.pem")
    run(
        [
            *("openssl", "req", "-x509", *kind, "-nodes", "-days", "2"),
            *("-subj", f"/CN={name}", "-addext", f"subjectAltName={names}"),
            *("-keyout", pair.key.name, "-out", pair.cert.name),
        ],
        folder=folder,
        limit=50,
    )
    return pair


def expired(folder: Path, pair: Pair) -> Pair:
    """Make one in `folder` that ended a day ago, with the key of another."""
    old = Pair(folder / "expired.cert.pem", pair.key)
    request = [
        "openssl",
        "req",
        "-new",
        "-key",
        str(pair.key),
        "-subj",
        "/CN=localhost",
        "-out",
        "expired.csr",
    ]
    run(request, folder=folder)
    run(
        [
            *("openssl", "x509", "-req", "-in", "expired.csr", "-signkey", str(pair.key), "-days", "-1"),
            *("-out", old.cert.name),
        ],
        folder=folder,
    )
    return old


def server_context(pair: Pair) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    return context


def client_context(*trusted: Pair) -> ssl.SSLContext:
    """Return a client's context that trusts these certificates alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for pair in trusted:
        context.load_verify_locations(pair.cert)
    return context


def tls_contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Make a certificate for localhost in `folder`; return the server's context and that of a client."""
    pair = certificate(folder, key="rsa")
    return server_context(pair), client_context(pair)
