"""Writing to a stdout that may be closed, full, or have lost its reader."""

from __future__ import annotations

import contextlib
import os
import sys

from fastlisten.cli.errors import FAILED, CommandError
from fastlisten.cli.log import complain


def write(text: str) -> None:
    """Write to stdout at once, and carry on without it when its reader has gone.

    Raises OSError when it cannot be written for another reason, such as a full disk.
    """
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # "| head -1" has read enough
        discard()


def write_or_fail(text: str) -> None:
    """Write what the command was asked for.  Raises CommandError when that is not possible."""
    try:
        write(text)
    except OSError as error:
        raise CommandError(f"cannot write to stdout: {error.strerror}", FAILED) from error


def is_live() -> bool:
    """Whether stdout is a terminal on which a line can be written over."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


class Log:
    """What a service says, which does not end because nobody can read it.  The first failure is told on
    stderr."""

    _failed = False

    def write(self, text: str) -> None:
        """Write to stdout at once, if that is possible."""
        try:
            write(text)
        except OSError as error:
            if not self._failed:
                self._failed = True
                with contextlib.suppress(OSError):  # then nothing is left to tell it by
                    complain(f"stdout: {error.strerror}; serving goes on", level="WARNING")


def discard() -> None:
    """Let stdout lead nowhere, so that what its buffer still has does not fail once more at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def open_closed_streams() -> None:
    """Give a process that was started without stdout or stderr (">&-", pythonw) ones that lead nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)  # until the end, when nobody is left to close it
            setattr(sys, name, os.fdopen(nowhere, "w", encoding="utf-8", closefd=False))
