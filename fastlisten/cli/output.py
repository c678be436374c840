"""Writing to a stdout that may be closed, full, or have lost its reader."""

from __future__ import annotations

import os
import sys


def write(text: str) -> None:
    """Write to stdout at once, and carry on without it when its reader has gone.

    Raises OSError when it cannot be written for another reason, such as a full disk.
    """
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # "| head -1" has read enough
        discard()


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
