"""UvloopEventLoop: uvloop.Loop with fastlisten's servers."""

from __future__ import annotations

from fastlisten.aio._loop import Serving
from fastlisten.aio._uvloop_transports import KnowingUvloop


class UvloopEventLoop(Serving, KnowingUvloop):
    """uvloop.Loop with fastlisten's servers."""
