"""Memory that processes share."""

from __future__ import annotations

import mmap
import os

# On Windows memory that processes share has a name, and no descriptor.
_HAS_NAMES = not hasattr(mmap, "MAP_SHARED")


def shared_memory(
    length: int, named: bool = False, name: int | str | None = None
) -> tuple[mmap.mmap, int | str | None]:
    """Memory of zeros that forks of this process share, and what stands for it in others.

    named: something is to stand for it: a descriptor that is not inherited yet, the caller's to close, or on
    Windows a name.  name: it was made by another process, which calls it so.  A page costs nothing before it
    is written to.
    """
    if named and _HAS_NAMES:
        name = f"fastlisten-{os.getpid()}-{os.urandom(16).hex()}"
    elif named:
        name = _file()
        os.ftruncate(name, length)
    if isinstance(name, str):
        return mmap.mmap(-1, length, tagname=name), name  # type: ignore[call-arg,unused-ignore]
    return mmap.mmap(-1 if name is None else name, length), name


def _file() -> int:
    """A descriptor of memory, not inherited by programs, of no size yet."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fastlisten", os.MFD_CLOEXEC)
    import tempfile  # much to import

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
