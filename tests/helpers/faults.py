"""Run Python in a process whose socket calls fail as planned, by the library of faults.c."""

import ctypes
import errno
import os
from pathlib import Path
from typing import Any

from helpers.probes import compiler
from helpers.programs import plain_environment, python, run

SOURCE = Path(__file__).with_name("faults.c")

Plan = list[tuple[Any, int]]


def written(**plans: Plan) -> str:
    """Return plans as faults.c reads them, each under its call's name.

    A plan is a list of (error name or number, count): each error is given so often, in that
    order. The number 0 lets that many calls succeed; -N cuts a transfer to N bytes. For `open`,
    any other number has a stranger take a descriptor first.
    """
    entries = []
    for call, plan in plans.items():
        for code, count in plan:
            number = getattr(errno, code) if isinstance(code, str) else code
            entries.append(f"{call}={number}*{count}")
    return ",".join(entries)


def change_plan(**plans: Plan) -> None:
    """Replace the plan of this process, which runs under the library."""
    ctypes.CDLL(None).faults_plan(written(**plans).encode())


# Whose calls are counted and fail, see meant_for().
ANYBODYS, FASTLISTENS, OTHERS = range(3)


def meant_for(modules: int) -> None:
    """Have only calls fail that fastlisten's own modules make, or only those of all others, or ANYBODYS."""
    ctypes.CDLL(None).faults_of(modules)


def given(call: str) -> int:
    """Tell how often the call was made to fail in this process, which runs under the library."""
    count = ctypes.CDLL(None).faults_given
    count.restype = ctypes.c_long
    return int(count(call.encode()))


class Faults:
    """The built library, and processes that run under it."""

    def __init__(self, library: Path) -> None:
        self.library = library

    def environment(self, while_file: Any = None, **plans: Plan) -> dict[str, str]:
        """Return the environment of a process under these plans."""
        # A sanitizer's runtime, if there is one, has to come first.
        preload = [os.environ.get("LD_PRELOAD", ""), str(self.library)]
        added = {"LD_PRELOAD": " ".join(filter(None, preload)), "FAULTS": written(**plans)}
        if while_file is not None:
            added["FAULTS_WHILE"] = str(while_file)
        return plain_environment(**added)

    def python(self, code: str, *arguments: str, **plans: Plan) -> Any:
        """Run a program to its end and return the JSON that its last line of output holds."""
        return python(code, *arguments, environment=self.environment(**plans))


def build(folder: Path) -> Faults:
    """Compile faults.c in `folder`."""
    library = folder / "faults.so"
    command = [compiler(), "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(library)]
    run([*command, str(SOURCE), "-ldl", "-lpthread"], limit=50)
    return Faults(library)
