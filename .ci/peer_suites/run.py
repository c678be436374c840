"""run.py [--needs] [short | NAME...]: other projects' server tests, on the loop that they know and on ours.

suites.toml has the list.  Fails on a test that passes on the one and not on the other, unless it is excused
there.  With --needs it prints what has to be installed.  `nox -s peers` does both, `.ci/peers` calls that.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
CI = HERE.parent
TRIES = 3  # how often a test that differs runs again, on both, before it counts
LIMIT = 1200  # seconds for one run of a suite, unless suites.toml says otherwise
TEST_LIMIT = 60  # seconds for one test


@dataclass(frozen=True)
class Suite:
    """A table of suites.toml; its head says what each field is."""

    name: str
    version: str
    sha256: str
    tests: list[str]
    loops: list[str] = field(default_factory=lambda: ["asyncio", "uvloop"])
    needs: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)
    without_on_uvloop: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    debian: str = ""
    short: list[str] = field(default_factory=list)
    fixed_ports: bool = False
    limit: int = LIMIT
    excused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What came of a run.  made: servers and adopted clients of ours."""

    made: int
    outcomes: dict[str, str]

    def passed(self) -> set[str]:
        return {test for test, outcome in self.outcomes.items() if outcome == "passed"}


def suites(names: list[str]) -> list[Suite]:
    """Those of these names, all without any; `short` alone means the part that .ci/run has."""
    tables = tomllib.loads((HERE / "suites.toml").read_text(encoding="utf-8"))
    every = [Suite(name=name, **table) for name, table in tables.items()]
    if names == ["short"]:
        return [replace(suite, tests=suite.short, loops=suite.loops[:1]) for suite in every if suite.short]
    unknown = set(names) - tables.keys()
    if unknown:
        sys.exit(f"no such suite: {', '.join(sorted(unknown))}; there are: {', '.join(tables)}")
    return [suite for suite in every if not names or suite.name in names]


# --- their sources ----------------------------------------------------------------------------------


def bash(script: str, *arguments: str) -> str:
    """Run it with lib.sh at hand; return what it prints."""
    script = f'set -euo pipefail; . "$0"; {script}'
    command = ["bash", "-c", script, str(CI / "lib.sh"), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def archive(suite: Suite, cache: Path) -> Path:
    """The archive of its sources, from the cache or fetched into it; its sum is checked each time."""
    folder = cache / "sources" / f"{suite.name}-{suite.version}"
    if not list(folder.glob("*.tar.gz")):
        folder.mkdir(parents=True, exist_ok=True)
        if suite.debian:
            print(f"{suite.name}: its sdist has no such tests, Debian's source package has", flush=True)
            fetch = 'apt_view "$1/apt" "$2"; cd "$4"; quietly apt-get "${APT[@]}" source -d --tar-only "$3"'
            bash(fetch, str(cache), *suite.debian.split(), str(folder))
        else:
            wanted = (f"{suite.name}=={suite.version}", "--no-deps", "--no-binary", suite.name)
            command = [sys.executable, "-m", "pip", "download", "-q", *wanted]
            subprocess.run([*command, "-d", str(folder)], check=True)
    (found,) = folder.glob("*.tar.gz")
    digest = hashlib.sha256(found.read_bytes()).hexdigest()
    if digest != suite.sha256:
        found.unlink()
        sys.exit(f"{found.name}: sha256 {digest}, not {suite.sha256}")
    return found


def unpack(suite: Suite, source: Path, folder: Path) -> Path:
    """A fresh tree, without the package itself where that would hide the installed one; return where."""
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(source) as tar:
        tar.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    if not any(Path(test).parts[0] == suite.name for test in suite.tests):
        shutil.rmtree(root / suite.name, ignore_errors=True)
    return root


# --- runs -------------------------------------------------------------------------------------------


def choice(suite: Suite, loop: str) -> tuple[str, ...]:
    """pytest's option that leaves tests out on this base loop."""
    names = suite.without + suite.without_on_uvloop * (loop == "uvloop")
    return ("-k", f"not ({' or '.join(names)})") if names else ()


def run(suite: Suite, loop: str, side: str, root: Path, tests: list[str], limit: int) -> Result:
    """Run these tests in the tree; side: "base" or "ours".  What they print lies beside it."""
    result = root.parent / f"{loop}.json"
    result.unlink(missing_ok=True)
    environment = os.environ | suite.environment
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(HERE)}
    environment |= {"PEER_LOOP": loop, "PEER_OURS": "1" if side == "ours" else "", "PEER_RESULT": str(result)}
    first = ("-q", "-p", "no:cacheprovider", "-p", "peer_loop", "-p", "pytest_timeout")
    command = [sys.executable, "-m", "pytest", *first, f"--timeout={TEST_LIMIT}", *suite.options, *tests]
    command += choice(suite, loop)
    whole = tests == suite.tests
    log = root.parent / (f"{loop}.log" if whole else f"{loop}-again.log")
    with log.open("w", encoding="utf-8") as output:
        try:
            subprocess.run(
                command,
                cwd=root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"{suite.name} on {loop}, {side}: not done after {limit} s, {log}", flush=True)
    done = Result(0, {})
    if result.exists():
        done = Result(**json.loads(result.read_text(encoding="utf-8")))
    if whole and not done.outcomes:
        print(*log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:], sep="\n")
    return done


def run_both(
    suite: Suite, loop: str, roots: dict[str, Path], tests: list[str], limit: int
) -> tuple[Result, Result]:
    """Run these tests on the base loop and on ours, at the same time where they can be."""
    with ThreadPoolExecutor(1 if suite.fixed_ports else 2) as pool:
        base, ours = (pool.submit(run, suite, loop, side, roots[side], tests, limit) for side in roots)
        return base.result(), ours.result()


def differences(suite: Suite, loop: str, roots: dict[str, Path], suspects: set[str]) -> set[str]:
    """Those that pass on the base loop and not on ours each time that they run again, at last alone."""
    for attempt in range(TRIES):
        groups = [sorted(suspects)] if attempt == 0 else [[test] for test in sorted(suspects)]
        for group in groups if suspects else []:
            base, ours = run_both(suite, loop, roots, group, TEST_LIMIT * (len(group) + 1))
            suspects -= set(group) - (base.passed() - ours.passed())
    return suspects


def compare(suite: Suite, loop: str, roots: dict[str, Path]) -> bool:
    """Run the suite on both, print what differs; return whether nothing does but what is excused."""
    base, ours = run_both(suite, loop, roots, suite.tests, suite.limit)
    differ = differences(suite, loop, roots, base.passed() - ours.passed()) if ours.outcomes else set()
    excused = {test for test in differ if any(test.startswith(name) for name in suite.excused)}
    print(
        f"note: {suite.name} {suite.version} on {loop}: {len(base.passed())} passed on base,",
        f"{len(ours.passed())} on ours, {len(differ)} differ, {len(excused)} of them excused;",
        f"{ours.made} servers and adopted clients of ours",
        flush=True,
    )
    for test in sorted(differ - excused):
        print(f"  passes on base and not on ours: {test}", flush=True)
    return bool(base.passed() and ours.made) and differ == excused


def needed(chosen: list[Suite]) -> set[str]:
    """What has to be installed: the projects, what their tests need, and the loops."""
    needs = {need for suite in chosen for need in (f"{suite.name}=={suite.version}", *suite.needs)}
    if any("uvloop" in suite.loops for suite in chosen):
        (uvloop,) = suites(["uvloop"])
        needs.add(f"uvloop=={uvloop.version}")
    return needs


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--needs"]:
        print(*needed(suites(arguments[1:])), sep="\n")
        return
    cache = Path(bash('echo "$CACHE"')) / "peers"
    failed = []
    for suite in suites(arguments):
        source = archive(suite, cache)
        roots = {side: unpack(suite, source, cache / "runs" / suite.name / side) for side in ("base", "ours")}
        failed += [f"{suite.name} on {loop}" for loop in suite.loops if not compare(suite, loop, roots)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
