"""What `fastlisten top` has seen of a service, as lines and numbers."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from fastlisten import Endpoint
from fastlisten.cli.scrape import Snapshot, is_controlled, scrape

REMEMBERED = 60.0  # seconds that the sparkline is of
BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-=+*%#"

# The columns of a worker's row, those first that are to be seen on a narrow screen, and how wide they are.
COLUMNS = (
    ("worker", 6),
    ("/s", 7),
    ("active", 6),
    ("queued", 6),
    ("refused", 7),
    ("state", 8),
    ("pending", 7),
    ("errors", 6),
    ("starts", 6),
    ("accepted", 10),
)


class View:
    """What has been seen so far."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.now: Snapshot | None = None
        self.trouble = ""
        self.controlled = False  # the service does what is asked
        self.chosen = 0  # which worker a key is for
        self._before: Snapshot | None = None
        self._rates: deque[tuple[float, float]] = deque()  # times, and clients a second then

    def look(self) -> None:
        """Ask once more; what goes wrong is in `trouble`."""
        try:
            found = scrape(self.endpoint)
            if self.now is None:  # it is seen for the first time, or again
                self.controlled = is_controlled(self.endpoint)
        except (OSError, ValueError) as error:
            self.trouble = getattr(error, "strerror", None) or str(error)
            self.now = self._before = None
            return
        self.trouble = ""
        self.saw(found)

    def saw(self, found: Snapshot) -> None:
        """This is so now."""
        self._before, self.now = self.now, found
        self._rates.append((found.at, self.rate()))
        while self._rates[0][0] < found.at - REMEMBERED:
            self._rates.popleft()

    def workers(self) -> list[str]:
        """The numbers of the workers."""
        rows = self.now.rows if self.now is not None else ()
        return sorted({worker for _, worker in rows if worker}, key=int)

    def choose(self, step: int) -> None:
        """Another worker."""
        self.chosen = min(max(self.chosen + step, 0), max(len(self.workers()) - 1, 0))

    def rate(self, row: tuple[str, str] | None = None) -> float:
        """Clients accepted a second since the look before, of a row or of all."""
        if self.now is None or self._before is None:
            return 0.0
        seconds = max(self.now.at - self._before.at, 1e-3)
        now, before = (_accepted(one, row) for one in (self.now, self._before))
        return max(now - before, 0) / seconds

    def plain(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        assert self.now is not None
        rows = []
        for key, values in self.now.rows.items():
            listener, worker = key
            rates: dict[str, Any] = {
                "listener": listener,
                "worker": worker or None,
                "per_second": round(self.rate(key), 1),
            }
            rows.append(rates | values)
        return {
            "endpoint": str(self.endpoint),
            "state": self.now.state,
            "per_second": round(self.rate(), 1),
            "reasons": self.now.reasons,
            "rows": rows,
        }

    # --- lines ----------------------------------------------------------------------------------------

    def summary(self) -> list[str]:
        """What is so of all workers together."""
        if self.now is None:
            return [f"{self.endpoint}  no answer: {self.trouble}"]
        now = self.now
        counted = [f"accepted {now.total('accepted_connections') or 0:.0f}", f"{self.rate():.0f}/s"]
        for name, metric, most in (
            ("active", "active_connections", "connection_capacity"),
            ("queue", "queued_connections", "queued_connections_limit"),
            ("pending", "pending_connections", ""),
        ):
            value, limit = now.total(metric), now.total(most)
            if value is not None and (value or name != "pending"):
                counted.append(f"{name} {value:.0f}" + (f"/{limit:.0f}" if limit else ""))
        lines = [f"{self.endpoint}  {now.state}  {time.strftime('%H:%M:%S')}", "  ".join(counted)]
        for title, metric in (
            ("refused", "refused_connections"),
            ("accept errors", "accept_errors"),
            ("TLS failures", "tls_handshake_failures"),
        ):
            counts = now.reasons.get(metric, {})
            reasons = [f"{reason} {count:.0f}" for reason, count in counts.items() if count]
            if reasons:
                lines.append(f"{title}: {', '.join(reasons)}")
        return lines

    def sparkline(self, width: int, bars: str) -> str:
        """Clients a second in the last minute, the newest at the right."""
        rates = [rate for _, rate in self._rates][-max(width, 1) :]
        most = max(rates, default=0)
        return "".join(bars[_bar(rate, most, len(bars))] for rate in rates)

    def table(self, width: int) -> tuple[list[str], list[list[str]]]:
        """As many of the columns as there is room for, and a row for each worker."""
        titles: list[str] = []
        room = width
        for title, wide in COLUMNS:
            if titles and room < wide:
                break
            titles.append(title)
            room -= wide + 2
        rows = []
        for key in self.now.rows if self.now is not None else ():
            cells = self._cells(key)
            rows.append([cells[title] for title in titles])
        return titles, rows

    def _cells(self, key: tuple[str, str]) -> dict[str, str]:
        assert self.now is not None
        row = self.now.rows[key]

        def number(name: str) -> str:
            return f"{row[name]:.0f}" if name in row else "-"

        worker = key[1] or "-"
        if self.controlled and key[1] in self.workers()[self.chosen : self.chosen + 1]:
            worker = f">{worker}"
        state = "paused" if row.get("paused") else "serves" if row.get("worker_ready", 1) else "starting"
        return {
            "worker": worker,
            "/s": f"{self.rate(key):.0f}",
            "active": number("active_connections"),
            "queued": number("queued_connections"),
            "refused": number("refused_connections"),
            "state": state,
            "pending": number("pending_connections"),
            "errors": number("handler_errors"),
            "starts": number("worker_starts"),
            "accepted": number("accepted_connections"),
        }


def _accepted(snapshot: Snapshot, row: tuple[str, str] | None) -> float:
    if row is None:
        return snapshot.total("accepted_connections") or 0
    return snapshot.rows.get(row, {}).get("accepted_connections", 0)


def _bar(rate: float, most: float, bars: int) -> int:
    return min(int(rate / most * bars), bars - 1) if most else 0
