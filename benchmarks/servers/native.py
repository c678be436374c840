"""The servers in C and Go: this process becomes them."""

from __future__ import annotations

import os

from .._build import build


def program(work: str, source: str) -> None:
    """Build native/SOURCE and become it."""
    path = build(source)
    os.execv(path, [path.name, work])
