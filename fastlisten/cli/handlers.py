"""The handler that a name stands for: a built-in one, or a function of a module."""

from __future__ import annotations

import importlib
import operator
import os
import sys
import traceback
from collections.abc import Callable

from fastlisten import Connection
from fastlisten.cli.errors import MISUSED, CommandError

# By name, so that each is imported when it is asked for: http brings in all of http.server.
BUILT_IN = {"echo": "fastlisten.cli.echo:echo", "http": "fastlisten.cli.http:http"}


def load_handler(name: str) -> Callable[[Connection], object]:
    """Return a built-in handler, or import "module:function", also from the working directory.

    Raises CommandError when there is no such handler or its module cannot be imported.
    """
    module_name, colon, path = BUILT_IN.get(name, name).partition(":")
    if not (colon and module_name and path):
        known = ", ".join(BUILT_IN)
        raise CommandError(f"handler {name!r} is neither {known} nor module:function", MISUSED)
    if name not in BUILT_IN and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does; an installed script does not
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code runs, and can raise anything
        text = f"handler {name!r}: {_import_failure(error)}"
        if isinstance(error, ImportError) and module_name.endswith(".py"):
            module_name = module_name.removesuffix(".py").replace("/", ".")
            text += f"; a module is named without its .py: {module_name}:{path}"
        raise CommandError(text, MISUSED) from error
    try:
        handler = operator.attrgetter(path)(module)
    except AttributeError as error:
        raise CommandError(f"handler {name!r}: {error}", MISUSED) from error
    if not callable(handler):
        raise CommandError(f"handler {name!r} is not callable but {type(handler).__name__}", MISUSED)
    import inspect  # not at the top: for who serves

    try:
        inspect.signature(handler).bind(None)
    except TypeError as error:
        text = f"handler {name!r} cannot be called with a connection and nothing else"
        raise CommandError(f"{text}: {error}", MISUSED) from error
    except ValueError:  # it tells nothing, as some of C do
        pass
    return handler  # type: ignore[no-any-return]


def _import_failure(error: Exception) -> str:
    """Say in one line what went wrong, and where when it was in the imported code."""
    text = f"{type(error).__name__}: {error}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and frame.filename != __file__
    ]
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text
