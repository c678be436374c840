"""The USDT probes that a module was built with."""

import os
from pathlib import Path


def probes_in(path: str | os.PathLike[str]) -> dict[str, int]:
    """Return fastlisten's probes in an ELF file, and how many arguments each has.

    https://sourceware.org/systemtap/wiki/UserSpaceProbeImplementation: after the owner of a note come three
    addresses, then the provider, the name and the arguments, each with a zero behind it.
    """
    notes = [note[24:].split(b"\0")[:3] for note in Path(path).read_bytes().split(b"stapsdt\0")[1:]]
    return {
        name.decode(): len(arguments.split())
        for provider, name, arguments in notes
        if provider == b"fastlisten"
    }
