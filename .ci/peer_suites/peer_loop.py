"""A pytest plugin: which loop the tests run on, whether it is ours, and what came of each test, for run.py.

PEER_LOOP is asyncio or uvloop, PEER_OURS is set where the loop is to be ours, PEER_RESULT names the file to
write.  It must be loaded first (-p): whatever takes asyncio's names later gets ours.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import pytest

outcomes: dict[str, str] = {}
made = 0  # servers and adopted clients of ours


def ours() -> None:
    """Put fastlisten's loops in the place of the others, and nothing else; count what they make."""
    import fastlisten
    from fastlisten.aio import Server
    from fastlisten.aio._loop import Serving

    fastlisten.patch(socket=False, socketserver=False, http=False)

    def counted(kind: Any, name: str) -> None:
        function = getattr(kind, name)

        def call(*args: Any, **options: Any) -> Any:
            global made
            made += 1
            return function(*args, **options)

        setattr(kind, name, call)

    counted(Server, "__init__")
    counted(Serving, "connect_accepted_socket")


if os.environ.get("PEER_OURS"):
    ours()
if os.environ["PEER_LOOP"] == "uvloop":
    import uvloop

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The worst of a test's phases and subtests is what came of it."""
    rank = ("passed", "skipped", "failed")
    known = outcomes.get(report.nodeid, "passed")
    outcomes[report.nodeid] = max(known, report.outcome, key=rank.index)


def pytest_sessionfinish() -> None:
    with open(os.environ["PEER_RESULT"], "w", encoding="utf-8") as file:
        json.dump({"made": made, "outcomes": outcomes}, file)
