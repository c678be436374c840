"""`fastlisten run`: a Python program as it is, with fastlisten.patch() before it."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from fastlisten.cli.errors import MISUSED, CommandError

# Python's `site` imports what is there, in the program's own children, too: a reloader's, multiprocessing's.
STARTUP = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "_startup")


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own arguments, and those of the program that `run` runs: all after its name; and the
    program that `workers` runs: all after --."""
    own = len(arguments)
    if arguments[:1] == ["workers"] and "--" in arguments:
        own = arguments.index("--")
        return list(arguments[:own]), list(arguments[own + 1 :])
    if arguments[:1] == ["run"]:
        own = 3 if arguments[1:2] == ["-m"] else 2  # run -m MODULE, or run SCRIPT
    return list(arguments[:own]), list(arguments[own:])


def run_command(options: argparse.Namespace) -> int:
    """Run the program in this process's place; where there is no such thing, in a child's."""
    flags = sys.flags
    if flags.isolated or flags.ignore_environment or flags.no_site:
        raise CommandError("run reaches the program by PYTHONPATH and site: not with -I, -E or -S", MISUSED)
    command = _command(options)
    path = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": STARTUP + (os.pathsep + path if path else "")}
    sys.stdout.flush()
    sys.stderr.flush()
    if hasattr(os, "fork"):
        os.execve(command[0], command, environment)
    with subprocess.Popen(command, env=environment) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # Ctrl-C is the program's, which has it, too
                continue


def _command(options: argparse.Namespace) -> list[str]:
    """What Python would be called with to run this program; or the installed command of this name."""
    python = [sys.executable, *subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]
    if options.module is not None:
        return [*python, "-m", options.module, *options.arguments]
    script = options.script
    if script is None:
        raise CommandError("run needs a program: SCRIPT or -m MODULE (see fastlisten run --help)", MISUSED)
    if os.path.isfile(script) or os.path.isfile(os.path.join(script, "__main__.py")):
        return [*python, script, *options.arguments]
    beside = os.path.dirname(sys.executable)  # a virtual environment that is not activated
    found = None if os.path.dirname(script) else shutil.which(script, path=beside) or shutil.which(script)
    if found is None:
        raise CommandError(f"{script} is neither a file nor an installed command", MISUSED)
    return [found, *options.arguments]
