"""`fastlisten top`: a service's counters, seen as they change."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from fastlisten.cli import output
from fastlisten.cli.errors import FAILED, MISUSED, CommandError
from fastlisten.cli.failures import read_endpoint
from fastlisten.cli.keys import Keys, keyboard
from fastlisten.cli.view import BARS, PLAIN_BARS, View


def top_command(options: argparse.Namespace) -> int:
    """Look again and again until q or Ctrl-C, or once; returns the exit status."""
    endpoint = read_endpoint(options.endpoint)
    if options.json and not options.once:
        raise CommandError("--json needs --once", MISUSED)
    view = View(endpoint)
    view.look()
    if view.now is None:
        raise CommandError(f"cannot ask {endpoint}: {view.trouble}", FAILED)
    if not (options.once and options.json):
        show = _screen(options.once)
    if options.once:
        time.sleep(options.interval)  # for the rates
        view.look()
        if view.now is None:
            raise CommandError(f"cannot ask {endpoint}: {view.trouble}", FAILED)
        if options.json:
            output.write_or_fail(json.dumps(view.plain()) + "\n")
        else:
            with show(view, None):
                pass
        return 0
    keys = Keys(view)
    with contextlib.suppress(KeyboardInterrupt), keyboard() as pressed, show(view, keys) as draw:
        while keys.press(pressed(options.interval)):
            view.look()
            draw()
    return 0


# --- the screen


Show = Callable[[View, Keys | None], contextlib.AbstractContextManager[Callable[[], None]]]


def _screen(once: bool) -> Show:
    """What shows a view: on a terminal at one place, elsewhere, or on one that can only write, one after the
    other."""
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        text = "top needs rich, and --once --json does not: pip install 'fastlisten[top]'"
        raise CommandError(text, FAILED) from None
    console = Console(highlight=False)
    moves = console.is_terminal and not console.is_dumb_terminal and not once

    @contextlib.contextmanager
    def show(view: View, keys: Keys | None) -> Iterator[Callable[[], None]]:
        def drawn() -> Any:
            return _drawn(view, console, keys.line if keys is not None and console.is_terminal else "")

        if not moves:
            console.print(drawn())
            yield lambda: console.print(drawn())
            return
        with Live(drawn(), console=console, screen=True, auto_refresh=False) as live:
            yield lambda: live.update(drawn(), refresh=True)

    return show


def _drawn(view: View, console: Any, last: str) -> Any:
    """All of it, as rich draws it, and a last line, if there is one."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    width, height = console.width, console.height
    bars = BARS if (console.encoding or "").lower().startswith("utf") else PLAIN_BARS
    lines = [Text(line, style="" if view.now else "bold red", overflow="fold") for line in view.summary()]
    lines.append(Text(view.sparkline(width, bars), style="green", no_wrap=True))
    titles, rows = view.table(width)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title in titles:
        table.add_column(title, justify="left" if title in ("worker", "state") else "right", no_wrap=True)
    room = max(height - len(lines) - 2 - bool(last), 1) if console.is_terminal else len(rows)
    for row in rows[:room]:
        table.add_row(*row)
    foot = [Text(last, style="dim", no_wrap=True, overflow="crop")] if last else []
    return Group(*lines, *([table] if rows else ()), *foot)
