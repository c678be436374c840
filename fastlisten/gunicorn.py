"""Workers of gunicorn whose event loop is ours: `gunicorn -k fastlisten.gunicorn.ASGIWorker app:app`.

ASGIWorker is gunicorn's own worker of that name, UvicornWorker that of uvicorn-worker (or of uvicorn, where
that is not installed).  Each is made when somebody asks for it, since neither package is a dependency.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
from typing import Any


def __getattr__(name: str) -> Any:
    """ASGIWorker and UvicornWorker; ImportError, with what to install, when that cannot be imported."""
    make = {"ASGIWorker": _asgi_worker, "UvicornWorker": _uvicorn_worker}.get(name)
    if make is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    worker = globals()[name] = make()
    return worker


def _asgi_worker() -> type:
    from fastlisten.aio._factory import serving

    try:
        original: Any = importlib.import_module("gunicorn.workers.gasgi")
    except ModuleNotFoundError as error:
        raise ImportError(f"ASGIWorker needs gunicorn 24 or later: pip install gunicorn ({error})") from None

    class ASGIWorker(original.ASGIWorker):  # type: ignore[misc]
        """gunicorn's ASGIWorker on an event loop of ours, of the kind that its setting asgi_loop chooses."""

        loop: Any

        def _setup_event_loop(self) -> None:
            super()._setup_event_loop()
            chosen = self.loop
            made: Any = serving(type(chosen))()
            self.loop = made
            chosen.close()
            asyncio.set_event_loop(made)

    return ASGIWorker


def _uvicorn_worker() -> type:
    try:
        importlib.import_module("gunicorn")
        config: Any = importlib.import_module("uvicorn.config")
    except ModuleNotFoundError as error:
        raise ImportError(f"UvicornWorker needs pip install gunicorn uvicorn-worker ({error})") from None
    if not hasattr(config.Config, "get_loop_factory"):
        raise ImportError("UvicornWorker needs uvicorn 0.36 or later, which can be told a loop by its name")
    try:
        original: Any = importlib.import_module("uvicorn_worker")
    except ModuleNotFoundError:
        original = importlib.import_module("uvicorn.workers")
    loop = "UvloopEventLoop" if importlib.util.find_spec("uvloop") else "EventLoop"

    class UvicornWorker(original.UvicornWorker):  # type: ignore[misc]
        """uvicorn's worker on an event loop of ours: uvloop's where that is installed, as with uvicorn."""

        CONFIG_KWARGS = original.UvicornWorker.CONFIG_KWARGS | {"loop": f"fastlisten.aio:{loop}"}

    return UvicornWorker
