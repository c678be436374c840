"""Build the fuzz targets beside it without libFuzzer, under the sanitizers, and run them; .ci/fuzz has it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.probes import compiler

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def try_examples(target: str, header: str, number: int, folder: Path) -> None:
    """Try so many random examples of a target, for a header of the core; nothing may be found."""
    if sys.platform == "win32":
        pytest.skip("its compiler has other options")
    if not (ROOT / "fastlisten" / "_core" / header).exists():
        pytest.skip("needs the sources, and the package is installed")
    program = folder / "target"
    build = [compiler(), "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}", "-o", str(program)]
    build += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", str(HERE / f"{target}.c")]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "sanitize" in done.stderr:
        pytest.skip("needs a compiler with sanitizers")
    assert done.returncode == 0, done.stderr
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    for seed in range(2):
        command = [str(program), str(seed), str(number)]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert (ran.returncode, ran.stdout) == (0, f"{number} inputs\n"), ran.stderr
