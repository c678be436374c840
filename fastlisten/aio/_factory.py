"""Which event loops: loop_factory(), new_event_loop() and run()."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from fastlisten.aio._create import check_defaults, create_server, default_options
from fastlisten.aio._loop import EventLoop, SelectorEventLoop, Serving

_T = TypeVar("_T")

_OPTIONS = default_options(create_server)


def new_event_loop() -> EventLoop:
    """An EventLoop; the caller closes it."""
    return EventLoop()


def loop_factory(
    base: Callable[[], asyncio.AbstractEventLoop] | None = None, **options: Any
) -> Callable[[], asyncio.AbstractEventLoop]:
    """A class of event loops whose servers are ours, for asyncio.Runner(loop_factory=...) and its like.

    base: the class of event loops to build on, EventLoop by default: asyncio.SelectorEventLoop, uvloop.Loop,
    or one derived from them.  options: those of create_server(), which it has as defaults.
    Raises TypeError for an option that create_server() does not have and for a base that is no class of
    selector loops, ValueError for a bad value.
    """
    unknown = options.keys() - _OPTIONS
    if unknown:
        names = ", ".join(sorted(_OPTIONS))
        raise TypeError(f"no option of a loop: {', '.join(sorted(unknown))}; there are: {names}")
    check_defaults(options)
    kind = EventLoop if base is None else serving(base)
    members = {"__module__": kind.__module__, "server_options": options}
    return cast(Callable[[], asyncio.AbstractEventLoop], type(kind.__name__, (kind,), members))


def serving(base: Any) -> type[Serving]:
    """A class of event loops like `base` whose servers are ours.

    Raises TypeError when that is no class of asyncio's or uvloop's selector loops.
    """
    if isinstance(base, type):
        if issubclass(base, Serving):
            return base
        if base is SelectorEventLoop:
            return EventLoop
        if issubclass(base, SelectorEventLoop):
            return type(base.__name__, (Serving, base), {"__module__": base.__module__})
        uvloop = sys.modules.get("uvloop.loop")
        if uvloop is not None and issubclass(base, uvloop.Loop):
            from fastlisten.aio._uvloop import UvloopEventLoop
            from fastlisten.aio._uvloop_transports import KnowsTransports

            if issubclass(UvloopEventLoop, base):
                return UvloopEventLoop
            return type(base.__name__, (Serving, KnowsTransports, base), {"__module__": base.__module__})
    raise TypeError(f"{base!r} is no class of selector event loops, asyncio's or uvloop's")


def run(
    main: Coroutine[Any, Any, _T],
    *,
    debug: bool | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> _T:
    """asyncio.run() on an EventLoop, or on what `loop_factory` makes; returns what `main` does."""
    with asyncio.Runner(debug=debug, loop_factory=loop_factory or new_event_loop) as runner:
        return runner.run(main)
