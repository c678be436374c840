"""OPERATION.md's manifest for Kubernetes, and a kubelet that goes by it, in a fifth of the time."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastlisten
from helpers import LIMIT, connect, read_all, wait_until
from helpers.command import COMMAND, signals
from helpers.programs import running
from helpers.status import get

OPERATION = Path(__file__).parent.parent / "OPERATION.md"
FASTER = 5.0

# How long clients are still sent to a pod that is deleted: until each node has heard of it; seconds.
REMOVAL = 8.0


class Manifest:
    """What it says, with all times divided by FASTER."""

    def __init__(self) -> None:
        found = re.search(r"```yaml\n(spec:.*?)```", OPERATION.read_text(encoding="utf-8"), re.DOTALL)
        assert found is not None
        self._text = found[1]
        self.grace = self._number("terminationGracePeriodSeconds")

    def _number(self, name: str, after: str = "") -> float:
        match = re.search(rf"{after}.*?{name}: (\d+)", self._text, re.DOTALL)
        assert match is not None
        return int(match[1]) / FASTER

    def arguments(self, **replaced: str) -> list[str]:
        """Return the container's, with others for some."""
        match = re.search(r"args: \[(.*)\]", self._text)
        assert match is not None
        words = [word.strip('"') for word in match[1].split(", ")]
        times = [str(int(word) / FASTER) if word.isdigit() else word for word in words]
        return [replaced.get(word, word) for word in times]

    def probe(self, name: str) -> tuple[str, float, int]:
        """Return what a probe asks for, every how many seconds, and how many failures are too many."""
        match = re.search(rf"{name}:\n +httpGet: {{path: (\S+), port: 9100}}\n", self._text)
        assert match is not None
        return (
            match[1],
            self._number("periodSeconds", name),
            round(self._number("failureThreshold", name) * FASTER),
        )


class Kubelet:
    """Asks a pod's probes until the block ends; which of them have said no too often is noted, with when."""

    def __init__(self, manifest: Manifest, address: Any) -> None:
        self._manifest, self._address = manifest, address
        self._over = threading.Event()
        self.said_no: dict[str, float] = {}

    def answers(self, path: str) -> bool:
        with contextlib.suppress(OSError, IndexError):
            return get(self._address, path).status == 200
        return False

    def _probe(self, name: str) -> None:
        path, period, threshold = self._manifest.probe(name)
        failures = 0
        while not self._over.wait(period):
            failures = 0 if self.answers(path) else failures + 1
            if failures >= threshold:
                self.said_no.setdefault(name, time.monotonic())

    def __enter__(self) -> Kubelet:
        path, period, threshold = self._manifest.probe("startupProbe")
        wait_until(lambda: self.answers(path), FASTER * period * threshold, "it starts in time")
        self._threads = [
            threading.Thread(target=self._probe, args=(name,)) for name in ("readinessProbe", "livenessProbe")
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def pod(manifest: Manifest) -> Iterator[tuple[Any, Any, Any]]:
    """Run the container; give its process, where it serves, and its status port."""
    arguments = manifest.arguments(
        **{":8000": "127.0.0.1:0", ":9100": "127.0.0.1:0", "module:function": "echo"}
    )
    with running([*COMMAND, *arguments]) as process:
        assert process.stdout is not None
        found = [process.stdout.readline().split(" on ")[1].strip() for _ in range(2)]
        service, status = (fastlisten.Endpoint.parse(text).sockaddr for text in found)
        yield process, service, status


@signals
def test_a_pod_that_is_deleted_refuses_nobody() -> None:
    """Who is sent there until the endpoint is removed is served, and who is there then can finish."""
    manifest = Manifest()
    with pod(manifest) as (process, service, status), Kubelet(manifest, status) as kubelet:
        with connect(service) as there:
            there.sendall(b"a")
            assert there.recv(1) == b"a"
            deleted = time.monotonic()
            process.send_signal(signal.SIGTERM)
            while time.monotonic() < deleted + REMOVAL / FASTER:
                with connect(service) as client:
                    client.sendall(b"x")
                    client.shutdown(socket.SHUT_WR)
                    assert read_all(client) == b"x"
            wait_until(lambda: "readinessProbe" in kubelet.said_no)
            assert process.stdout is not None
            while "draining for at most" not in process.stdout.readline():
                pass
            there.sendall(b"b")
            assert there.recv(1) == b"b"
            assert kubelet.answers("/healthz")
        process.wait(LIMIT)
        assert time.monotonic() - deleted < manifest.grace
    assert process.returncode == 0


def test_the_grace_is_longer_than_lame_duck_and_drain() -> None:
    manifest = Manifest()
    words = manifest.arguments()
    lame_duck, drain = (float(words[words.index(name) + 1]) for name in ("--lame-duck", "--drain"))
    assert lame_duck > REMOVAL / FASTER
    assert lame_duck + drain < manifest.grace
