"""What the service manager is told of the command: that it is ready, that it stops; sd_notify(3)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import fastlisten
from fastlisten.cli.log import complain

if TYPE_CHECKING:
    from fastlisten import Notifier


@contextlib.contextmanager
def notifier() -> Iterator[Notifier | None]:
    """Give what tells the manager, until the block ends; None when no manager has started this process.

    One that cannot be used is told of on stderr: it is not for the manager to end a service.
    """
    found = None
    if "NOTIFY_SOCKET" in os.environ:
        try:
            found = fastlisten.Notifier()
        except (OSError, ValueError) as error:
            _failed(error)
    try:
        yield found
    finally:
        if found is not None:
            found.close()


def ready(notifier: Notifier | None, status: str) -> None:
    """Tell that it listens; what fails is told on stderr."""
    if notifier is not None:
        try:
            notifier.ready(status)
        except OSError as error:
            _failed(error)


def stopping(notifier: Notifier | None, status: str | None = None) -> None:
    """Tell that it ends; for signal handlers, too, and so what fails is told nobody."""
    if notifier is not None:
        with contextlib.suppress(OSError):
            notifier.stopping(status)


def _failed(error: Exception) -> None:
    text = getattr(error, "strerror", None) or error
    complain(f"the service manager is not told: {text}; serving goes on", "manager not told", "WARNING")
