"""patch() and unpatch(): ours in the place of the standard library's, for a program that is not changed."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

# What was replaced: (where, name) and the original.
_replaced: dict[tuple[Any, str], Any] = {}
_lock = threading.RLock()


def patch(*, socket: bool = True, socketserver: bool = True, http: bool = True, asyncio: bool = True) -> None:
    """Put fastlisten's names in the place of the standard library's, in these modules.

    socket: what fastlisten.socket has.  socketserver, http: the servers of socketserver and http.server.
    asyncio: the selector event loop, and uvloop's, become those of fastlisten.aio.
    A module that is not imported yet is patched when it is.  Called again it changes what is new.

    Call it before whatever uses these names is imported: a module that has taken an original before, or has
    derived a class from it, keeps it.  A RuntimeWarning names those, but for the standard library's own.

    >>> import subprocess, sys
    >>> program = '''
    ... import fastlisten
    ... fastlisten.patch()
    ... from socketserver import TCPServer
    ... print(TCPServer.__bases__[0])
    ... '''
    >>> print(subprocess.check_output([sys.executable, "-c", program], text=True).strip())
    <class 'fastlisten.socketserver.AcceptMixIn'>
    """
    wanted = {
        "socket": (socket, _patch_socket),
        "socketserver": (socketserver, _patch_socketserver),
        "http.server": (http, _patch_http),
        "asyncio": (asyncio, _patch_asyncio),
        "uvloop": (asyncio, _patch_uvloop),
    }
    with _lock:
        before = set(_replaced)
        for name, (asked, apply) in wanted.items():
            if not asked:
                continue
            if name in sys.modules:
                apply(sys.modules[name])
            else:
                _finder.waiting[name] = apply
        if _finder.waiting and _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
        kept = sorted(_kept_by({key: _replaced[key] for key in set(_replaced) - before}))
    if kept:
        warnings.warn(
            f"fastlisten.patch() came too late for {', '.join(kept)}: call it before they are imported",
            RuntimeWarning,
            stacklevel=2,
        )


def unpatch() -> None:
    """Put the originals back in all that patch() has changed, if it has changed anything.

    What was made of ours meanwhile stays so: a class derived from one, a name that somebody has taken.

    >>> import fastlisten
    >>> fastlisten.unpatch()
    """
    with _lock:
        _finder.waiting.clear()
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        while _replaced:
            (where, name), original = _replaced.popitem()
            setattr(where, name, original)


def _replace(where: Any, name: str, ours: Any) -> None:
    original = vars(where)[name]
    if original is not ours:
        _replaced.setdefault((where, name), original)
        setattr(where, name, ours)


# --- the modules ------------------------------------------------------------------------------------


def _patch_names(module: ModuleType, drop_in: ModuleType) -> None:
    """Put the drop-in's own names in the place of the module's."""
    theirs = vars(module)
    for name, ours in vars(drop_in).items():
        public = name in theirs and not name.startswith("_")
        if public and ours is not theirs[name] and getattr(ours, "__module__", None) is not None:
            _replace(module, name, ours)


def _patch_socket(module: ModuleType) -> None:
    from fastlisten import socket

    _patch_names(module, socket)


def _patch_socketserver(module: ModuleType) -> None:
    from fastlisten import socketserver

    _patch_names(module, socketserver)


def _patch_http(module: ModuleType) -> None:
    from fastlisten.http import server

    _patch_names(module, server)


def _patch_asyncio(module: ModuleType) -> None:
    """Wherever asyncio keeps the class of its selector loop: its names, and the policies' _loop_factory."""
    from fastlisten.aio._loop import EventLoop, SelectorEventLoop

    events = sys.modules.get("asyncio.unix_events") or sys.modules["asyncio.windows_events"]
    for place in (module, events):
        for name, value in list(vars(place).items()):
            if value is SelectorEventLoop and not name.startswith("_"):
                _replace(place, name, EventLoop)
    for value in list(vars(events).values()):
        if isinstance(value, type) and vars(value).get("_loop_factory") is SelectorEventLoop:
            _replace(value, "_loop_factory", EventLoop)


def _patch_uvloop(module: ModuleType) -> None:
    from fastlisten.aio._uvloop import UvloopEventLoop

    _replace(module, "Loop", UvloopEventLoop)


# --- what keeps an original -------------------------------------------------------------------------


def _kept_by(replaced: dict[tuple[Any, str], Any]) -> Iterator[str]:
    """The names under which modules, but for the standard library's and ours, have these originals, and their
    classes that were derived from one."""
    originals = {id(original): original for original in replaced.values()}
    for name, module in list(sys.modules.items()):
        if not _is_a_users(name):
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in originals:
                yield f"{name}.{attribute}"
    for original in originals.values():
        if isinstance(original, type):
            for derived in _subclasses(original):
                if _is_a_users(derived.__module__):
                    yield f"{derived.__module__}.{derived.__qualname__}"


def _is_a_users(module: str) -> bool:
    return module.partition(".")[0] not in {*sys.stdlib_module_names, "fastlisten", "uvloop"} or (
        module == "__main__"
    )


def _subclasses(cls: type) -> Iterator[type]:
    derived: type
    for derived in type.__subclasses__(cls):
        yield derived
        yield from _subclasses(derived)


# --- modules that are imported later ----------------------------------------------------------------


class _Finder:
    """Finds modules as the other finders do, and has those that wait be patched once they are loaded."""

    def __init__(self) -> None:
        self.waiting: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: Any = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                spec.loader = _Loader(spec.loader)
                found: ModuleSpec = spec
                return found
        return None


class _Loader:
    """A loader, and what patch() does once it has loaded."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        spec: Any = module.__spec__
        spec.loader = module.__loader__ = self._loader
        with _lock:
            apply = _finder.waiting.pop(module.__name__, None)
            if apply is not None:
                apply(module)


_finder: Any = _Finder()
