"""The extension modules; everything else about the build is in pyproject.toml."""

import platform
import sysconfig

from Cython.Build import cythonize
from setuptools import Extension, setup

if platform.python_implementation() != "CPython":
    raise SystemExit(
        f"fastlisten needs CPython: its accept loop is a C extension that "
        f"{platform.python_implementation()} has not been shown to run"
    )

# A cross build for Windows runs on Linux, so ask for the target, not for the running system.
WINDOWS = sysconfig.get_platform().startswith("win")

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


def extension(name: str) -> Extension:
    return Extension(
        f"fastlisten.{name}",
        [f"fastlisten/{name}.pyx"],
        depends=["fastlisten/_port.h"],
        libraries=["ws2_32"] if WINDOWS else [],
    )


setup(
    ext_modules=cythonize(
        [extension("_accept"), extension("_connection"), extension("_loop"), extension("_transport")],
        build_dir="build/cython",  # generated C stays out of the source tree
        compiler_directives=DIRECTIVES,
    ),
)
