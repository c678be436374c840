"""fastlisten.patch() before the program, in each Python that `fastlisten run` starts, directly or not."""

from __future__ import annotations

import importlib
import os
import sys


def _import_hidden() -> None:
    """Import the sitecustomize that this one stands before, if there is one."""
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != folder]
    own = sys.modules.pop("sitecustomize")
    try:
        importlib.import_module("sitecustomize")  # the other one
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault("sitecustomize", own)


def _patch() -> None:
    try:
        from fastlisten._patch import patch
    except ImportError:
        return  # another Python than the one that fastlisten is installed for
    patch()


if __name__ == "sitecustomize":  # and not somebody who looks at all modules of the package
    _patch()
    _import_hidden()
