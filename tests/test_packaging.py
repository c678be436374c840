"""What a user gets: the public names, each with an example that runs, and their version."""

import doctest
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fastlisten
from helpers import LIMIT, not_under_wine
from helpers.programs import plain_environment, run

# Those that cannot be imported without a package that is no dependency.
OPTIONAL = {"fastlisten.aio._uvloop": "uvloop", "fastlisten.aio._uvloop_transports": "uvloop"}

MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(fastlisten.__path__, "fastlisten.")
    if not name.endswith("__main__")
    and (name not in OPTIONAL or importlib.util.find_spec(OPTIONAL[name]) is not None)
)


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def examples() -> list[doctest.DocTest]:
    """Return the docstrings with examples, of Python and of extension modules alike."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for name in ["fastlisten", *MODULES]:
        part = module(name)
        # The finder takes no function of an extension module for one of the module's own.
        for key, value in vars(part).items():
            if getattr(value, "__module__", None) == name:
                for test in finder.find(value, f"{name}.{key}", module=False, globs=vars(part) | {}):
                    if test.examples:
                        found[test.name] = test
    return [found[name] for name in sorted(found)]


@pytest.mark.parametrize("test", examples(), ids=lambda test: test.name)
def test_example(test: doctest.DocTest) -> None:
    told: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=told.append)
    assert result.attempted
    assert not result.failed, "".join(told)


@pytest.mark.parametrize("name", fastlisten.__all__)
def test_a_public_name_has_a_docstring_and_an_example(name: str) -> None:
    value = getattr(fastlisten, name)
    assert inspect.getdoc(value)
    prefix = f"{value.__module__}.{name}"
    assert [t.name for t in examples() if t.name == prefix or t.name.startswith(f"{prefix}.")]


def test_the_public_names_are_those_that_are_there() -> None:
    assert sorted(fastlisten.__all__) == list(fastlisten.__all__)
    assert set(fastlisten.__all__) <= set(dir(fastlisten))
    for name in fastlisten.__all__:
        assert getattr(fastlisten, name).__module__.startswith("fastlisten.")
    public = {
        name for name, value in vars(fastlisten).items() if name[0] != "_" and not inspect.ismodule(value)
    }
    assert public == set(fastlisten.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tls'"):
        _ = fastlisten.tls  # type: ignore[attr-defined]


def test_the_version_is_the_distribution_s() -> None:
    assert importlib.metadata.version("fastlisten") == fastlisten.__version__


def test_it_needs_nothing_but_python() -> None:
    required = importlib.metadata.requires("fastlisten") or []
    assert [line for line in required if "extra ==" not in line] == []


def test_importing_it_starts_and_opens_nothing() -> None:
    # and brings in neither asyncio nor the servers that it stands in for. What Windows sees as
    # /dev/fd through Wine's drive Z: is Wine's server's.
    code = (
        "import os, sys, threading\n"
        "fds = lambda: os.listdir('/dev/fd') if os.name == 'posix' else []\n"
        "before = len(fds())\n"
        "import fastlisten\n"
        "assert len(fds()) == before\n"
        "assert threading.active_count() == 1\n"
        "print(*{'asyncio', 'socketserver', 'http.server', 'ssl', 'fastlisten._tls'} & set(sys.modules))\n"
    )
    done = run(code)
    assert (done.stdout, done.stderr) == ("\n", "")


@not_under_wine("Python's shutil copies files by a call that Wine 8 lacks")
def test_a_source_tree_that_is_not_built_says_so(tmp_path: Path) -> None:
    """After `pip install .` Python finds the clone before what is installed, in its directory."""
    built = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(fastlisten.__path__[0], tmp_path / "fastlisten", ignore=built)
    for command in (["-c", "import fastlisten"], ["-m", "fastlisten", "hosts"]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=plain_environment(),
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        assert done.returncode == 1
        assert "is fastlisten's source, without the extension modules of this Python. " in done.stderr
        assert "build them there: pip install -e .\n" in done.stderr
