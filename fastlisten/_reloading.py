"""A server's TLS context that serves a new certificate from when its files have changed.

The files are looked at where a handshake has begun, in the callback that OpenSSL has for the name that the
client asks for; it is called without a name, too, and takes a context that is to be used in place of the
first: SSL_CTX_set_tlsext_servername_callback(3).  A context that handshakes use is never changed: between its
new certificate and its new key another handshake would get both.  What is resumed is the first context's, so
that sessions go on across a change.
"""

from __future__ import annotations

import functools
import os
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

# Files that have changed no longer ago than this may change again without another time of change, in seconds.
SETTLED = 2.0

# What is set on a context by calling these is not taken over to another by OpenSSL.
_SETTINGS = (
    "load_dh_params",
    "load_verify_locations",
    "set_alpn_protocols",
    "set_ciphers",
    "set_ciphersuites",
    "set_default_verify_paths",
    "set_ecdh_curve",
    "set_groups",
    "set_psk_server_callback",
    "set_server_sigalgs",
)

_looking = threading.Lock()  # held by the thread that looks at the files


def _after_fork_in_child() -> None:
    """The thread that held the lock is not there."""
    global _looking
    _looking = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _refuse_password() -> str:
    """OpenSSL would ask at the terminal."""
    raise ValueError("the key is encrypted")


class Pair:
    """A certificate's file and its key's, the context that has them, and what is known of the files."""

    def __init__(self, certfile: Path, keyfile: Path | None) -> None:
        self.certfile = certfile
        self.keyfile = keyfile
        self.context: ssl.SSLContext | None = None
        self.names: frozenset[str] = frozenset()
        self.tried: tuple[object, ...] = ()  # the files as they were loaded, or could not be
        self.unsettled = True  # they may have changed since without a sign

    def look(self) -> tuple[object, ...]:
        """What tells whether the files are others than before."""
        found: list[object] = []
        for path in (self.certfile, self.certfile if self.keyfile is None else self.keyfile):
            try:
                stat = os.stat(path)
                found.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))
            except OSError as error:
                found.append(error.errno)
        return tuple(found)

    def load_into(self, context: ssl.SSLContext) -> None:
        """Load both; raises as SSLContext.load_cert_chain().  What was tried is noted."""
        files = self.look()
        self.tried, self.unsettled = files, True
        context.load_cert_chain(self.certfile, self.keyfile, _refuse_password)
        names = _names_in(self.certfile)
        newest = max((file[3] for file in files if isinstance(file, tuple)), default=0)
        self.unsettled = self.look() != files or 0 <= time.time() - newest / 1e9 < SETTLED
        self.context, self.names = context, names


def decoded(certfile: Path) -> dict[str, Any]:
    """What SSLSocket.getpeercert() would tell of the first certificate in a file."""
    # There is nothing public that decodes a certificate which was not verified.
    return ssl._ssl._test_decode_cert(certfile)  # type: ignore[attr-defined, no-any-return]


def _names_in(certfile: Path) -> frozenset[str]:
    """The names that a certificate is for, in lower case: RFC 6125, section 6.4."""
    cert = decoded(certfile)
    names = [value for kind, value in cert.get("subjectAltName", ()) if kind == "DNS"]
    if not names:
        names = [value for part in cert.get("subject", ()) for kind, value in part if kind == "commonName"]
    return frozenset(name.lower() for name in names)


class ReloadingContext(ssl.SSLContext):
    """What reloading() returns; its sni_callback is taken."""

    _pairs: tuple[Pair, ...] = ()
    _set: tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...] = ()  # the calls of _SETTINGS
    _every: float
    _look_at: float  # time.monotonic()

    def _begin(self, pairs: Sequence[Pair], every: float) -> None:
        for number, pair in enumerate(pairs):
            pair.load_into(ssl.SSLContext(self.protocol) if number else self)
        self._pairs = tuple(pairs)
        self._every = every
        self._look_at = time.monotonic() + every
        self.sni_callback = _choose

    def _look(self) -> None:
        """Load what has changed, if it is time to look; the others go on with what there is meanwhile."""
        if time.monotonic() < self._look_at or not _looking.acquire(blocking=False):
            return
        try:
            self._look_at = time.monotonic() + self._every
            for pair in self._pairs:
                before, now = pair.tried, pair.look()
                if now != before or pair.unsettled:
                    self._load(pair, told=now == before)
        finally:
            _looking.release()

    def _load(self, pair: Pair, told: bool) -> None:
        """Load a pair anew, whole or not at all.  told: the log has these files already."""
        import logging  # not at the top: it is needed seldom

        log = logging.getLogger("fastlisten")
        context = ssl.SSLContext(self.protocol)
        try:
            for name, arguments, named in self._set:
                getattr(context, name)(*arguments, **named)
            pair.load_into(context)
        except Exception as error:  # whatever it is, the old one is still there
            if not told:
                text = "%s cannot be loaded, the certificate stays as it was: %s"
                extra = {"event": "certificate kept", "files": _text(pair), "reason": str(error)}
                log.warning(text, _text(pair), error, extra=extra)
        else:
            if not told:
                extra = {"event": "certificate loaded", "files": _text(pair)}
                log.info("%s is served from now on", _text(pair), extra=extra)

    def _of(self, name: str | None) -> ssl.SSLContext | None:
        """The context for a name; the first pair's, where none has it."""
        if name is not None and len(self._pairs) > 1:
            exact = name.lower()
            wildcard = "*." + exact.partition(".")[2]
            for wanted in (exact, wildcard):
                for pair in self._pairs:
                    if wanted in pair.names:
                        return pair.context
        return self._pairs[0].context


def _text(pair: Pair) -> str:
    certfile = os.fsdecode(pair.certfile)
    return certfile if pair.keyfile is None else f"{certfile} with {os.fsdecode(pair.keyfile)}"


def _choose(connection: Any, name: str | None, context: Any) -> None:
    """OpenSSL asks at the beginning of a handshake."""
    context._look()
    chosen = context._of(name)
    if chosen is not context:
        chosen.verify_mode = context.verify_mode  # getpeercert() asks it for that
        if chosen.keylog_filename != context.keylog_filename:
            chosen.keylog_filename = context.keylog_filename
        connection.context = chosen


def _kept(name: str) -> Callable[..., Any]:
    """A method of SSLContext that does the same for the contexts of the pairs, now and later."""
    method = getattr(ssl.SSLContext, name)

    @functools.wraps(method)
    def call(self: ReloadingContext, *arguments: Any, **named: Any) -> Any:
        result = method(self, *arguments, **named)
        self._set += ((name, arguments, named),)
        for pair in self._pairs:
            if pair.context is not self:
                getattr(pair.context, name)(*arguments, **named)
        return result

    return call


for _name in _SETTINGS:
    if hasattr(ssl.SSLContext, _name):
        setattr(ReloadingContext, _name, _kept(_name))


def make(certfile: Path | Sequence[Any], keyfile: Path | None, every: float) -> ReloadingContext:
    """reloading(), whose docstring says all."""
    if isinstance(certfile, list | tuple):
        if keyfile is not None:
            raise TypeError("keyfile is for one certfile; of several each has its own: (certfile, keyfile)")
        given = [one if isinstance(one, tuple) else (one, None) for one in certfile]
    else:
        given = [(certfile, keyfile)]
    if not given:
        raise ValueError("at least one certificate is needed")
    if not isinstance(every, int | float):
        raise TypeError(f"every must be a number of seconds, not {type(every).__name__}")
    if not every >= 0:
        raise ValueError(f"every must not be negative, not {every!r}")
    context = ReloadingContext(ssl.PROTOCOL_TLS_SERVER)
    context._begin([Pair(*one) for one in given], every)
    return context
