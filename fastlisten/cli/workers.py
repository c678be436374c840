"""`fastlisten workers`, and `fastlisten serve --workers`: a parent, and what it tells."""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

from fastlisten import Connection, Endpoint, Listener, ListenerStats, ServeResult
from fastlisten._workers.child import Target
from fastlisten._workers.workers import ProgramWorkers, Supervised, Workers, serve_target
from fastlisten.cli import log, output
from fastlisten.cli.arguments import BIND_OPTIONS, WORKER_OPTIONS, given
from fastlisten.cli.errors import FAILED, INTERRUPTED, MISUSED, CommandError
from fastlisten.cli.failures import as_option, bind_failure, read_endpoint
from fastlisten.cli.report import LINE_INTERVAL, LIVE_INTERVAL, Advice, counters, plain
from fastlisten.cli.status import status_endpoint


def serve_with_workers(
    endpoint: Endpoint,
    handler: Callable[[Connection], object],
    serving: dict[str, Any],
    options: argparse.Namespace,
) -> int:
    """`fastlisten serve --workers`; returns the exit status."""

    class Told(WorkersReport, Workers):
        """Workers that tell."""

    # A worker that is a fresh interpreter knows nothing of it yet.
    target = functools.partial(_logging, options.log_format, serve_target(handler, serving))
    return _run(lambda: Told(target, endpoint, **_options(options)), [endpoint], options, Advice.on(options))


def _logging(name: str, target: Target, *listeners: Listener) -> object:
    """Serve in a worker, with the log as the parent has it."""
    log.use(name)
    log.set_up(listener=", ".join(str(listener.endpoint) for listener in listeners))
    return target(*listeners)


def workers_command(options: argparse.Namespace) -> int:
    """`fastlisten workers`; returns the exit status."""
    if not options.arguments:
        raise CommandError("workers needs a program after --: workers -- COMMAND ARGUMENTS", MISUSED)
    endpoints = [read_endpoint(text) for text in options.bind]

    class Told(WorkersReport, ProgramWorkers):
        """Programs whose parent tells."""

    command = options.arguments
    return _run(lambda: Told(command, *endpoints, **_options(options)), endpoints, options)


def _options(options: argparse.Namespace) -> dict[str, Any]:
    return {**given(options, (*WORKER_OPTIONS, *BIND_OPTIONS)), "status": status_endpoint(options)}


def _run(
    make: Callable[[], Any],
    endpoints: list[Endpoint],
    options: argparse.Namespace,
    advice: Advice | None = None,
) -> int:
    where = ", ".join(map(str, endpoints))
    try:
        workers = make()
        workers.controlled = bool(options.status_control)
        workers.reports(options.json, advice)
        result = workers.run()
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise CommandError(f"cannot serve {where}: {as_option(error)}", MISUSED) from error
    except RuntimeError as error:
        raise CommandError(f"cannot serve {where}: {error}", FAILED) from error
    except OSError as error:
        if (endpoint := workers._binding) is None:
            raise CommandError(f"serving {where} failed: {error}", FAILED) from error
        option = "--status: " if len(workers._endpoints) == len(endpoints) else ""
        raise CommandError(f"{option}{bind_failure(endpoint, error)}", FAILED) from error
    workers.stopped(result)
    return INTERRUPTED if workers.why == "SIGINT" else 0


class WorkersReport(Supervised):
    """Tells what happens, and the counters, a row a worker; by no thread, so that the parent can fork."""

    why: str | None = None  # what has ended it
    _json = _live = False
    _drawn = 0  # lines of the counters that are on the screen

    def reports(self, as_json: bool, advice: Advice | None) -> None:
        """Say how to tell.  advice: None for programs, which write no counters."""
        self._advice = advice
        self._json = as_json
        self._log = output.Log()
        self._live = output.is_live() and not as_json
        self._before: tuple[ListenerStats, ...] = ()
        self._then = time.monotonic()
        if advice is not None:
            self._ticks.append((LIVE_INTERVAL if self._live else LINE_INTERVAL, self._tick))
        log.set_up()

    def _started(self) -> None:
        names = [str(endpoint) for endpoint in self.endpoints]
        self._event(
            f"listening on {', '.join(names)}",
            "started",
            endpoint=names[0],
            endpoints=names,
            workers=self._options.workers,
            process=os.getpid(),
        )
        if self.status_endpoint is not None:
            where = str(self.status_endpoint)
            self._event(f"status on {where}", "status", endpoint=where)

    def _tell(self, event: str, text: str, warning: bool = False, **values: Any) -> None:
        if event == "draining":
            self.why = values["signal"]
        self._event(text, event, "WARNING" if warning else "INFO", **values)

    def stopped(self, result: ServeResult) -> None:
        """Tell how it ended."""
        how = f"stopped by {self.why}: {result.finished} finished, {result.cut} cut"
        values: dict[str, object] = {"finished": result.finished, "cut": result.cut}
        if self._ticks:  # else nobody has counted
            total = self.stats().total
            how += f"; {total.accepted} accepted, {total.handled} handled"
            values |= plain(total)
        self._event(how, "stopped", signal=self.why, **values)

    def _tick(self) -> None:
        """Tell the counters, if they have changed or are seen live."""
        total, rows = self.stats()
        now = time.monotonic()
        if self._advice is not None:
            self._advice.look(total, rows, now)
        all_rows = (total, *rows)
        known = self._before if len(self._before) == len(all_rows) else all_rows
        rates = [
            (row.accepted - before.accepted) / (now - self._then)
            for row, before in zip(all_rows, known, strict=True)
        ]
        changed, self._before, self._then = all_rows != self._before, all_rows, now
        if not (changed or self._live):
            return
        if self._json:
            values = [
                {"worker": number, "per_second": round(rate, 1), **plain(row)}
                for number, (row, rate) in enumerate(zip(rows, rates[1:], strict=True))
            ]
            self._event("", "stats", per_second=round(rates[0], 1), **plain(total), workers=values)
            return
        lines = [f"{time.strftime('%H:%M:%S')} {counters(total, rates[0])}"]
        lines += [
            f"  worker {number}  {counters(row, rate)}"
            for number, (row, rate) in enumerate(zip(rows, rates[1:], strict=True))
        ]
        if not self._live:
            self._log.write("".join(f"{line}\n" for line in lines))
            return
        width, height = shutil.get_terminal_size()
        columns, room = max(width - 1, 1), max(height - 1, 2)
        if len(lines) > room:  # what has scrolled away could not be drawn over
            lines[room - 1 :] = [f"  and {len(rows) - room + 2} more workers"]
        up = f"\r\x1b[{self._drawn}A" if self._drawn else ""
        self._log.write(up + "".join(f"{line[:columns]}\x1b[K\n" for line in lines) + "\x1b[J")
        self._drawn = len(lines)

    def _event(self, text: str, event: str, level: str = "INFO", /, **values: object) -> None:
        if self._json:
            text = log.line_of(event, text, values, level)
        if self._drawn:  # the counters are drawn anew below it
            self._log.write(f"\r\x1b[{self._drawn}A\x1b[J")
            self._drawn = 0
        self._log.write(f"{text}\n")
