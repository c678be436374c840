"""The TLS context that --tls-cert and its companions ask for."""

from __future__ import annotations

import argparse
import ssl
import time

import fastlisten
from fastlisten._reloading import decoded
from fastlisten.cli.errors import FAILED, CommandError


def tls_context(options: argparse.Namespace) -> ssl.SSLContext:
    """Return a context that serves these files, also when they change; CommandError says what is wrong."""
    cert, key, ca = options.tls_cert, options.tls_key, options.tls_ca
    if b"-----BEGIN CERTIFICATE-----" not in _read("--tls-cert", cert):
        raise CommandError(f"--tls-cert {cert}: no certificate is in it", FAILED)
    if b"PRIVATE KEY-----" not in _read("--tls-key", key or cert):
        if key is None:
            raise CommandError(f"--tls-cert {cert}: no key is in it; --tls-key names its file", FAILED)
        raise CommandError(f"--tls-key {key}: no key is in it", FAILED)
    try:
        context = fastlisten.reloading(cert, key)
    except (OSError, ValueError) as error:
        text = f"{cert} and its key cannot be used: {error}"
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            text = f"the key in {key or cert} is not that of the certificate in {cert}"
        raise CommandError(text, FAILED) from error
    end = decoded(cert)["notAfter"]
    if ssl.cert_time_to_seconds(end) < time.time():
        raise CommandError(f"--tls-cert {cert}: the certificate has ended at {end}", FAILED)
    if ca is not None:
        _read("--tls-ca", ca)
        try:
            context.load_verify_locations(ca)
        except ssl.SSLError as error:
            raise CommandError(f"--tls-ca {ca}: no certificate is in it", FAILED) from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _read(option: str, path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CommandError(f"{option} {path}: {getattr(error, 'strerror', None) or error}", FAILED) from error
