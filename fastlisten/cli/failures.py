"""What went wrong, in the words of the command line and with what may help."""

from __future__ import annotations

import errno
import re

from fastlisten import Endpoint
from fastlisten.cli.arguments import (
    ADMISSION_OPTIONS,
    BIND_OPTIONS,
    DEFAULT_ENDPOINT,
    SERVE_OPTIONS,
    WORKER_OPTIONS,
)
from fastlisten.cli.port_holder import holder_of, what_stands_at


def endpoint_hint(text: str) -> str:
    """Return what a text that is no endpoint was probably meant to be, as a question, or ""."""
    port = DEFAULT_ENDPOINT.rpartition(":")[2]
    meant = f":{text}" if text.isdecimal() else f"{text}:{port}"
    try:
        Endpoint.parse(meant)
    except ValueError:
        return ""
    return f"; is {meant} meant?"


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
    if error.errno == errno.EADDRINUSE:
        if holder := holder_of(endpoint):
            text += f" by {holder}"
        elif endpoint.host.startswith("unix:/"):
            text = what_stands_at(endpoint.host.removeprefix("unix:")) or text
    elif error.errno == errno.EACCES and 0 < endpoint.port < 1024:
        text += ": ports below 1024 need privileges"
    return f"cannot listen on {endpoint}: {text}"
