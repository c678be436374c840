"""packaging.py DIST [TREE...]: what the sdist and the wheel in the folder DIST hold; run at a tree's root.

The sdist holds what git does; the wheel, which is built from the sdist, what is needed at run time. Neither
holds generated C, and none was left beside the sources, here or in each TREE, where a build has run too.
"""

import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Set
from pathlib import Path

# What git has and an sdist need not: settings and scripts of those who work on it.
NOT_PUBLISHED = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")


def compare(what: str, found: Set[str], wanted: Set[str]) -> None:
    for title, names in (("lacks", wanted - found), ("should not hold", found - wanted)):
        if names:
            sys.exit(f"{what} {title} {sorted(names)}")


def git_files() -> set[str]:
    """Return the names of the files that git has or would add, without those that are gone."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(command, text=True).split("\0")
    return {name for name in names if name and Path(name).exists()}


def check_sdist(sdist: Path, tracked: Set[str]) -> None:
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {name for name in files if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    compare(sdist.name, files, {name for name in tracked if not name.startswith(NOT_PUBLISHED)} | made)


def check_wheel(wheel: Path, tracked: Set[str]) -> None:
    package = {name for name in tracked if name.startswith("fastlisten/")}
    sources = {name[:-4] for name in package if name.endswith(".pyx")}
    with zipfile.ZipFile(wheel) as archive:
        files = {n for n in archive.namelist() if not re.match(r"fastlisten-[^/]*\.dist-info/", n)}
    built = {re.sub(r"\.[^/]*\.so$", "", name): name for name in files if name.endswith(".so")}
    compare(f"{wheel.name}: extension modules", set(built), sources)
    needed = {name for name in package if name.endswith((".py", ".pyi", "/py.typed", "/grafana.json", ".bt"))}
    compare(wheel.name, files - set(built.values()), needed)


def check_tree(tree: Path) -> None:
    files = (tree / "fastlisten").rglob("*")
    generated = sorted(str(file) for file in files if file.suffix in (".c", ".cpp", ".html"))
    if generated:
        sys.exit(f"generated beside the sources: {generated}")


def main(dist: Path, *trees: Path) -> None:
    tracked = git_files()
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    check_sdist(sdist, tracked)
    check_wheel(wheel, tracked)
    for tree in (Path(), *trees):
        check_tree(tree)
    print(f"note: {sdist.name} {wheel.name}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
