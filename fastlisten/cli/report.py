"""What a running `fastlisten serve` tells: how it began, its counters, how it ended."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from fastlisten import Endpoint, Listener, ListenerStats, ServeResult
from fastlisten.cli import output
from fastlisten.cli.log import line_of

LIVE_INTERVAL = 0.5  # seconds between two states of the live line: readable, and seen to move
LINE_INTERVAL = 2.0  # seconds between two lines of a log, at least
SATURATED = 5.0  # seconds
SILENT = 2.0  # seconds: a person at a terminal has not given up yet


class Advice:
    """Says what to change, once each: when all threads have had clients for long, and when a handler may wait
    in vain for clients that wait for it to speak.

    threads: serve()'s; 0, one client at a time, is asked for by who wants that.  first_bytes: clients have to
    speak before a handler gets them, for no other reason.
    """

    def __init__(self, threads: int | tuple[int, int], first_bytes: bool) -> None:
        self._most = threads if isinstance(threads, int) else threads[1]
        self._taken: float | None = None  # since when
        self._silent: float | None = None
        self._first_bytes = first_bytes
        self._told: set[str] = set()

    @classmethod
    def on(cls, options: argparse.Namespace) -> Advice:
        """On what the command line says."""
        return cls(options.threads, bool(options.first_bytes) and options.proxy is None)

    def look(self, total: ListenerStats, rows: Sequence[ListenerStats], now: float) -> None:
        """total, rows: the counters of the whole and of each process.  now: a monotonic clock, in seconds."""
        all_taken = self._most and min(map(_with_handlers, rows), default=0) >= self._most
        nobody_spoke = self._first_bytes and total.waiting and not total.handled and not _with_handlers(total)
        self._taken = (self._taken or now) if all_taken else None
        self._silent = (self._silent or now) if nobody_spoke else None
        if self._taken is not None and now - self._taken >= SATURATED and self._is_news("threads taken"):
            logging.getLogger("fastlisten").warning(
                "all %d threads have had clients for %g s, and others wait: --threads 1,%d would serve more, "
                "and connection.settimeout() in the handler ends who says nothing",
                *(self._most, SATURATED, self._most * 2),
                extra={"event": "threads taken", "threads": self._most},
            )
        if self._silent is not None and now - self._silent >= SILENT and self._is_news("nobody has spoken"):
            logging.getLogger("fastlisten").warning(
                "a client has sent nothing for %g s, and none has before: a handler gets it when it does. "
                "Where the handler is to speak first: --first-bytes 0",
                SILENT,
                extra={"event": "nobody has spoken"},
            )

    def _is_news(self, event: str) -> bool:
        news = event not in self._told
        self._told.add(event)
        return news


def _with_handlers(stats: ListenerStats) -> int:
    """How many clients are with handlers."""
    return stats.active - stats.waiting - stats.pending_connections


class Report:
    """Tells what a listener does: a live line on a terminal, lines or JSON objects elsewhere.

    Used with `with`: the counters are told by a thread until the block ends.
    """

    def __init__(self, listener: Listener, as_json: bool, advice: Advice) -> None:
        self._listener = listener
        self._advice = advice
        self._json = as_json
        self._live = output.is_live() and not as_json
        # What the thread is to tell now, None to end. A SimpleQueue and no Event, as a signal
        # handler puts here too: its put() is reentrant.
        self._news: queue.SimpleQueue[tuple[str, str, dict[str, object]] | None] = queue.SimpleQueue()
        self._output = threading.Lock()
        self._drawn = 0  # columns of the live line that are on the screen
        self._log = output.Log()
        # A daemon, because Ctrl-C can come between its start and the block that would end it.
        self._thread = threading.Thread(target=self._tell, name="report", daemon=True)

    def __enter__(self) -> Report:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._news.put(None)
        self._thread.join()
        with self._output:
            if self._drawn:
                self._log.write("\n")
                self._drawn = 0

    def started(self, handler: str, status: Endpoint | None) -> None:
        """Tell the endpoints that were really bound."""
        endpoint = str(self._listener.endpoint)
        self._event(
            f"listening on {endpoint}",
            "started",
            endpoint=endpoint,
            handler=handler,
            process=os.getpid(),
        )
        if status is not None:
            self._event(f"status on {status}", "status", endpoint=str(status))

    def draining(self, why: str, seconds: float) -> None:
        """Tell that the drain has begun; for signal handlers: the thread does the telling."""
        text = f"{why}: draining for at most {seconds:g} s"
        self._news.put(("draining", text, {"signal": why, "seconds": seconds}))

    def leaving(self, why: str, seconds: float) -> None:
        """Tell that the drain will begin; for signal handlers, too."""
        text = f"{why}: not ready any more, draining in {seconds:g} s"
        self._news.put(("leaving", text, {"signal": why, "seconds": seconds}))

    def control(self, path: str, text: str) -> None:
        """Tell what somebody had done at the status port."""
        self._news.put(("control", f"POST {path}: {text}", {"path": path}))

    def stopped(self, why: str | None, result: ServeResult | None) -> None:
        """Tell how it ended: why is the signal's name, result is None when it was interrupted."""
        stats = self._listener.stats()
        how = "stopped" if why is None else f"stopped by {why}"
        drain: dict[str, int] = {}
        if result is not None:
            how += f": {_connections(result.finished)} finished, {result.cut} cut"
            drain = {"finished": result.finished, "cut": result.cut}
        text = f"{how}; {stats.accepted} accepted, {stats.handled} handled"
        self._event(text, "stopped", signal=why, **drain, **plain(stats))

    @contextlib.contextmanager
    def cleared(self) -> Iterator[None]:
        """Take the live line off the screen while something else writes there."""
        with self._output:
            if self._drawn:
                self._log.write(f"\r{' ' * self._drawn}\r")
                self._drawn = 0
            yield

    def _event(self, text: str, event: str, **values: object) -> None:
        if self._json:
            text = line_of(event, text, values)
        with self.cleared():
            self._log.write(f"{text}\n")

    def _tell(self) -> None:
        interval = LIVE_INTERVAL if self._live else LINE_INTERVAL
        before, then = self._listener.stats(), time.monotonic()
        told = before
        while True:
            try:
                news = self._news.get(timeout=max(then + interval - time.monotonic(), 0))
            except queue.Empty:
                stats, now = self._listener.stats(), time.monotonic()
                self._advice.look(stats, [stats], now)
                rate = (stats.accepted - before.accepted) / (now - then)
                before, then = stats, now
                if self._live:
                    self._draw(counters(stats, rate))
                elif stats != told:
                    self._counted(stats, rate)
                    told = stats
                continue
            if news is None:
                return
            event, text, values = news
            self._event(text, event, **values)

    def _counted(self, stats: ListenerStats, rate: float) -> None:
        text = f"{time.strftime('%H:%M:%S')} {counters(stats, rate)}"
        self._event(text, "stats", per_second=round(rate, 1), **plain(stats))

    def _draw(self, line: str) -> None:
        # One column less than there are: some terminals wrap when the last one is written.
        line = line[: max(shutil.get_terminal_size().columns - 1, 1)]
        with self._output:
            self._log.write(f"\r{line.ljust(self._drawn)}")
            self._drawn = len(line)


class LogLines(logging.StreamHandler[Any]):
    """Writes log records to stderr, beside the live line and not into it."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        with self._report.cleared():
            super().emit(record)


def counters(stats: ListenerStats, rate: float) -> str:
    parts = [f"accepted {stats.accepted}", f"{rate:.0f}/s", f"active {stats.active}"]
    if stats.queue_depth is not None:
        parts.append(f"queue {stats.queue_depth}/{stats.queue_limit}")
    if stats.waiting:
        parts.append(f"waiting {stats.waiting}")
    if stats.refused:
        parts.append(f"refused {stats.refused}")
    if stats.handler_errors:
        parts.append(f"handler errors {stats.handler_errors}")
    parts += [f"{name} {count}" for name, count in sorted(stats.accept_errors.items())]
    if stats.tls_failures:
        parts.append(f"TLS failures {sum(stats.tls_failures.values())}")
    if stats.paused:
        parts.append("paused")
    return "  ".join(parts)


def plain(stats: ListenerStats) -> dict[str, object]:
    """Return the stats as JSON can hold them."""
    values = stats._asdict()
    return {
        **values,
        "accept_errors": dict(stats.accept_errors),
        "tls_failures": dict(stats.tls_failures),
        "refused_for": dict(stats.refused_for),
        "pending_times": stats.pending_times._asdict(),
    }


def _connections(count: int) -> str:
    return f"{count} connection" if count == 1 else f"{count} connections"
