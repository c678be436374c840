"""What went wrong, in the words of the command line and with what may help."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Iterator

from fastlisten import Endpoint
from fastlisten._endpoint import DESCRIPTOR, NO_IP, UNIX
from fastlisten.cli.arguments import (
    ADMISSION_OPTIONS,
    BIND_OPTIONS,
    DEFAULT_ENDPOINT,
    SERVE_OPTIONS,
    WORKER_OPTIONS,
)
from fastlisten.cli.errors import FAILED, MISUSED, CommandError
from fastlisten.cli.handlers import BUILT_IN
from fastlisten.cli.port_holder import holder_of, what_stands_at

# What a path may have in sockaddr_un, without the null at its end: unix(7), and BSD's unix(4).
PATH_LENGTH = 107 if sys.platform == "linux" else 103  # bytes


def read_endpoint(text: str, option: str = "") -> Endpoint:
    """Return the endpoint of an argument, or of an option; raises CommandError with what may have been
    meant."""
    try:
        return Endpoint.parse(text)
    except ValueError as error:
        raise CommandError(f"{option}{error}{_hint(text)}", MISUSED) from error


@contextlib.contextmanager
def binding(endpoint: Endpoint, option: str = "") -> Iterator[None]:
    """Raise CommandError for what goes wrong in bind() inside; option: what the endpoint is for."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"{option}{bind_failure(endpoint, error)}", FAILED) from error
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        # An option that does not fit the endpoint, or that this system does not have.
        raise CommandError(f"{option}cannot listen on {endpoint}: {as_option(error)}", MISUSED) from error


def _hint(text: str) -> str:
    """Return what a text that is no endpoint was probably meant to be, as a question, or ""."""
    import difflib  # not at the top: for who has mistyped

    if text.startswith(NO_IP):
        return ""
    if handler := difflib.get_close_matches(text, BUILT_IN, 1):
        return f"; is the handler {handler[0]} meant? it follows an endpoint: {DEFAULT_ENDPOINT} {handler[0]}"
    port = DEFAULT_ENDPOINT.rpartition(":")[2]
    host, _, last = text.rpartition(":")
    for meant in (f":{text}", f"{text}:{port}", f"[{host}]:{last}", f"[{text}]:{port}"):
        try:
            Endpoint.parse(meant)
        except ValueError:
            continue
        return f"; is {meant} meant?"
    return ""


def as_option(error: Exception, **others: str) -> str:
    """Return the words of an error that begin with a parameter's name with the option's in its place.

    others: by the parameter the option, for those that are called otherwise.
    """
    same = (*BIND_OPTIONS, *SERVE_OPTIONS, *WORKER_OPTIONS, *ADMISSION_OPTIONS)
    names = {name: name for name in same} | others
    pattern = rf"^({'|'.join(names)})\b"
    return re.sub(pattern, lambda found: "--" + names[found[0]].replace("_", "-"), str(error))


def bind_failure(endpoint: Endpoint, error: OSError) -> str:
    """Return why nothing can listen on endpoint, and who is there when somebody is."""
    text = f"{error.strerror or error}"
    path = endpoint.host.removeprefix(UNIX) if endpoint.host.startswith(UNIX) else ""
    if error.errno == errno.EADDRINUSE:
        if holder := holder_of(endpoint):
            text += f" by {holder}"
        elif path.startswith("/"):
            text = what_stands_at(path) or text
    elif error.errno == errno.EACCES and 0 < endpoint.port < 1024:
        text += ": ports below 1024 need privileges"
    elif error.errno == errno.EINVAL:
        text = _not_a_listener(endpoint) or _interface_missing(endpoint) or text
    elif error.errno is None and len(os.fsencode(path)) > PATH_LENGTH:  # Python's own, without a number
        text += f": {len(os.fsencode(path))} bytes, of at most {PATH_LENGTH}"
    return f"cannot listen on {endpoint}: {text}"


def _not_a_listener(endpoint: Endpoint) -> str | None:
    """Say that a descriptor is a client's connection, if it is one."""
    if not endpoint.host.startswith(DESCRIPTOR):
        return None
    try:
        with socket.socket(fileno=os.dup(int(endpoint.host.removeprefix(DESCRIPTOR)))) as passed:
            passed.getpeername()
    except OSError:
        return None
    return (
        "it is a connection, not a listening socket, which systemd passes with Accept=no and inetd with "
        "wait; systemd: and inetd: take either"
    )


def _interface_missing(endpoint: Endpoint) -> str | None:
    """Say that an address is one on each interface (RFC 4007, section 11), if it names none."""
    try:
        address = ipaddress.IPv6Address(endpoint.host)
    except ValueError:
        return None
    if not address.is_link_local or address.scope_id is not None:
        return None
    names = [name for _, name in socket.if_nameindex() if name != "lo"] or ["eth0"]
    meant = Endpoint(f"{address}%{names[0]}", endpoint.port)
    return f"a link-local address needs its interface, as in {meant}"
