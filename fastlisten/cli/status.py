"""The command's status port, bound before anything is served."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastlisten import Endpoint, Listener
from fastlisten._bind import bind_status
from fastlisten.cli.errors import MISUSED, CommandError
from fastlisten.cli.failures import binding, read_endpoint

if TYPE_CHECKING:
    from fastlisten._status.thread import StatusThread


def status_endpoint(options: argparse.Namespace) -> Endpoint | None:
    """Where --status is to be; None where nobody asks for it."""
    if options.status is None:
        for name in ("lame_duck", "status_control"):
            if getattr(options, name) is not None:
                raise CommandError(f"--{name.replace('_', '-')} needs --status", MISUSED)
        return None
    return read_endpoint(options.status, "--status: ")


@contextlib.contextmanager
def status_thread(options: argparse.Namespace, listener: Listener) -> Iterator[StatusThread | None]:
    """Answer there about a listener until the block ends; None where nobody asks for it."""
    endpoint = status_endpoint(options)
    if endpoint is None:
        yield None
        return
    from fastlisten._status.thread import StatusThread  # only for who asks for it

    with binding(endpoint, "--status: "):
        where = bind_status(endpoint)
    with StatusThread(where, [listener]) as thread:
        yield thread
