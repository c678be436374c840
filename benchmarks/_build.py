"""Build the C and Go programs of this folder on the spot, once for each text and compiler."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

NATIVE = Path(__file__).parent / "native"


def compiler_version(command: str) -> str:
    """Return the first line of what the compiler says about itself, or "" when it is not there."""
    if shutil.which(command) is None:
        return ""
    flag = "version" if command == "go" else "--version"
    answer = subprocess.run([command, flag], capture_output=True, text=True, check=False)
    return answer.stdout.partition("\n")[0]


def cc() -> str:
    """Return the C compiler's command: $CC, else ``cc``, or ``gcc`` where only that is there."""
    return os.environ.get("CC") or ("cc" if shutil.which("cc") or not shutil.which("gcc") else "gcc")


def cache_folder() -> Path:
    """Return where built programs are kept between runs, outside the source tree."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "fastlisten-benchmarks"


def build(name: str) -> Path:
    """Return the program built from native/NAME (``load.c``, ``server.go``).

    Raises RuntimeError with the compiler's words when it cannot be built.
    """
    source = NATIVE / name
    compiler = "go" if source.suffix == ".go" else cc()
    version = compiler_version(compiler)
    if not version:
        raise RuntimeError(
            f"{name} needs the command {compiler!r}, which is not there"
            + " ($CC names another)" * (compiler != "go")
        )
    key = hashlib.sha256(version.encode())
    for path in (source, *sorted(NATIVE.glob("*.h"))):
        key.update(path.read_bytes())
    program = cache_folder() / f"{source.stem}-{key.hexdigest()[:16]}"
    if program.exists():
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    # Another process may build the same: each writes its own file, and the last rename wins.
    unfinished = program.with_suffix(f".{os.getpid()}")
    command = (
        [compiler, "build", "-o", str(unfinished), str(source)]
        if compiler == "go"
        else [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(unfinished), str(source)]
    )
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise RuntimeError(f"{name} did not build:\n{answer.stderr}")
    unfinished.rename(program)
    print(f"built {name}", file=sys.stderr)
    return program
