"""The keys of `fastlisten top`: what they are, and what each has the service do."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator

from fastlisten.cli.scrape import post
from fastlisten.cli.view import View

HELP = "q end"
HELP_OF_CONTROL = "p pause  r resume  d drain  q end"
HELP_OF_WORKERS = "p pause  r resume  d drain  up/down choose  x restart worker  q end"

_ARROWS = {"\x1b[A": "k", "\x1bOA": "k", "\x1b[B": "j", "\x1bOB": "j"}  # as in vi(1)
_STEPS = {"k": -1, "j": 1}


class Keys:
    """Does what the keys ask.

    line: the last of what is shown: which keys there are, a question, or the service's answer.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._told = ""
        self._asks = False  # whether to drain

    @property
    def line(self) -> str:
        """The last line of what is shown."""
        if self._asks:
            return "drain? y"
        if self._told or not self._view.controlled:
            return self._told or HELP
        return HELP_OF_WORKERS if self._view.workers() else HELP_OF_CONTROL

    def press(self, key: str) -> bool:
        """Do what this key asks, "" being none; returns whether to go on."""
        asked, self._asks = self._asks, False
        if not key:
            self._asks = asked
            return True
        self._told = ""
        if key == "q":
            return False
        view = self._view
        if not view.controlled:
            return True
        workers = view.workers()
        if key in _STEPS:
            view.choose(_STEPS[key])
        elif key == "d":
            self._asks = True
        elif key == "x" and workers:
            self._post(f"/restart?worker={workers[view.chosen]}")
        elif target := {"p": "/pause", "r": "/resume", "y": "/drain" if asked else ""}.get(key):
            self._post(target)
        return True

    def _post(self, target: str) -> None:
        try:
            self._told = f"{target}: {post(self._view.endpoint, target)}"
        except (OSError, ValueError) as error:
            self._told = f"{target}: {getattr(error, 'strerror', None) or error}"


@contextlib.contextmanager
def keyboard() -> Iterator[Callable[[float], str]]:
    """What waits so many seconds for a key, and returns it, or ""."""
    try:
        import termios
        import tty

        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (ImportError, OSError, ValueError, termios.error):  # no terminal, or one of Windows
        yield _without_keys
        return
    typed: list[str] = []

    def pressed(seconds: float) -> str:
        if not typed and select.select([number], [], [], seconds)[0]:
            text = os.read(number, 64).decode(errors="replace")
            typed.extend([_ARROWS[text]] if text in _ARROWS else text)
        return typed.pop(0) if typed else ""

    tty.setcbreak(number)
    try:
        yield pressed
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


def _without_keys(seconds: float) -> str:
    time.sleep(seconds)
    return ""
