"""The command's status port, bound before anything is served."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import fastlisten
from fastlisten import Endpoint, Listener
from fastlisten.cli.errors import FAILED, MISUSED, CommandError
from fastlisten.cli.failures import bind_failure, endpoint_hint

if TYPE_CHECKING:
    from fastlisten._status.thread import StatusThread


def status_endpoint(options: argparse.Namespace) -> Endpoint | None:
    """Where --status is to be; None where nobody asks for it."""
    if options.status is None:
        if options.lame_duck is not None:
            raise CommandError("--lame-duck needs --status", MISUSED)
        return None
    try:
        return Endpoint.parse(options.status)
    except ValueError as error:
        raise CommandError(f"--status: {error}{endpoint_hint(options.status)}", MISUSED) from error


@contextlib.contextmanager
def status_thread(options: argparse.Namespace, listener: Listener) -> Iterator[StatusThread | None]:
    """Answer there about a listener until the block ends; None where nobody asks for it."""
    endpoint = status_endpoint(options)
    if endpoint is None:
        yield None
        return
    from fastlisten._status.thread import StatusThread  # only for who asks for it

    try:
        where = fastlisten.bind(endpoint)
    except OSError as error:
        raise CommandError(f"--status: {bind_failure(endpoint, error)}", FAILED) from error
    except (ValueError, AttributeError) as error:  # what this system does not have
        raise CommandError(f"--status: cannot listen on {endpoint}: {error}", MISUSED) from error
    with StatusThread(where, [listener]) as thread:
        yield thread
