"""What a status port tells, as numbers."""

from __future__ import annotations

import re
import socket
import time
from http import HTTPStatus
from typing import Any

from fastlisten import Endpoint

# A status port answers at once, or its parent has too much else to do; seconds.
PATIENCE = 5.0
MOST_BYTES = 1 << 24

_SAMPLE = re.compile(r"fastlisten_(\w+?)(?:_total)?\{(.*)\} (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Snapshot:
    """The counters of a service at one time.

    state: as /readyz has it.  rows: the numbers of each (listener, worker) by the metrics' names; the worker
    is "" where there is none.  reasons: {metric: {reason: number}}, of all rows.
    """

    def __init__(self, state: str, text: str) -> None:
        self.at = time.monotonic()
        self.state = state
        self.rows: dict[tuple[str, str], dict[str, float]] = {}
        self.reasons: dict[str, dict[str, float]] = {}
        for name, labels_text, value in _SAMPLE.findall(text):
            labels = dict(_LABEL.findall(labels_text))
            if "le" in labels or "listener" not in labels:
                continue
            row = self.rows.setdefault((labels["listener"], labels.get("worker", "")), {})
            row[name] = row.get(name, 0) + float(value)
            if reason := labels.get("reason"):
                reasons = self.reasons.setdefault(name, {})
                reasons[reason] = reasons.get(reason, 0) + float(value)

    def total(self, name: str) -> float | None:
        """The sum of all rows; None where no row has it."""
        found = [row[name] for row in self.rows.values() if name in row]
        return sum(found) if found else None


def scrape(endpoint: Endpoint) -> Snapshot:
    """Ask a status port.  Raises OSError, and ValueError for an answer that is not one's."""
    state, _ = _get(endpoint, "/readyz")
    text, status = _get(endpoint, "/metrics")
    if status != 200 or "fastlisten_build_info" not in text:
        raise ValueError("it answers, but not as a status port does")
    return Snapshot(state.strip(), text)


def is_controlled(endpoint: Endpoint) -> bool:
    """Whether a status port does what is asked by POST.  Raises as scrape()."""
    return _get(endpoint, "/pause")[1] == HTTPStatus.METHOD_NOT_ALLOWED


def post(endpoint: Endpoint, target: str) -> str:
    """Have a status port do something; returns its answer, a line.  Raises as scrape()."""
    return _ask(endpoint, "POST", target, "X-Fastlisten-Control: 1\r\nContent-Length: 0\r\n")[0].strip()


def _get(endpoint: Endpoint, path: str) -> tuple[str, int]:
    return _ask(endpoint, "GET", path)


def _ask(endpoint: Endpoint, method: str, target: str, fields: str = "") -> tuple[str, int]:
    address: Any = endpoint.sockaddr
    with socket.socket(endpoint.family, socket.SOCK_STREAM) as client:
        client.settimeout(PATIENCE)
        client.connect(address)
        client.sendall(f"{method} {target} HTTP/1.1\r\nHost: status\r\n{fields}\r\n".encode())
        parts, size = [], 0
        while size < MOST_BYTES and (part := client.recv(65536)):
            parts.append(part)
            size += len(part)
    head, _, body = b"".join(parts).decode(errors="replace").partition("\r\n\r\n")
    words = head.split(" ", 2)
    if len(words) < 3 or not words[1].isdecimal():
        raise ValueError("it answers, but not as a status port does")
    return body, int(words[1])
