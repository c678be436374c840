"""The extension modules; everything else about the build is in pyproject.toml."""

import os
import platform
import struct
import sysconfig

# Before anything that such a system may lack.
if platform.python_implementation() != "CPython":
    raise SystemExit(
        f"fastlisten needs CPython: its accept loop is a C extension that "
        f"{platform.python_implementation()} has not been shown to run"
    )
if struct.calcsize("P") < 8 or sysconfig.get_platform() == "win32":
    raise SystemExit(
        "fastlisten needs a 64-bit Python: its counters are 64-bit numbers that threads share, and no "
        "32-bit system has been shown to run it"
    )

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

# A cross build for Windows runs on Linux, so ask for the target, not for the running system.
WINDOWS = sysconfig.get_platform().startswith("win")

PACKAGE = Path("fastlisten")

# The one place for directives. Types and checks cost nothing at run time; no signature is guessed.
DIRECTIVES = {
    "language_level": "3",
    "binding": True,
    "boundscheck": False,
    "wraparound": False,
    "initializedcheck": False,
    "cdivision": True,
    "embedsignature": True,
    "embedsignature.format": "python",
    "auto_pickle": False,
    "autotestdict": False,
    "freethreading_compatible": True,
}

# `nox -s coverage`: each line calls the tracer, also without the GIL. Cython.Coverage finds the C beside its
# source only.
TRACE = bool(os.environ.get("FASTLISTEN_TRACE"))
if TRACE:
    DIRECTIVES["linetrace"] = True


def extension(source: Path) -> Extension:
    return Extension(
        ".".join(source.with_suffix("").parts),
        [str(source)],
        depends=[str(header) for header in sorted(PACKAGE.rglob("*.h"))],
        include_dirs=["."],  # headers are named from the root: fastlisten/_core/port.h
        define_macros=[("CYTHON_TRACE_NOGIL", "1")] if TRACE else [],
        libraries=["ws2_32"] if WINDOWS else [],
    )


setup(
    ext_modules=cythonize(
        [extension(source) for source in sorted(PACKAGE.rglob("*.pyx"))],
        build_dir=None if TRACE else "build/cython",  # generated C stays out of the source tree
        compiler_directives=DIRECTIVES,
    ),
)
