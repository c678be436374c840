"""DESIGN.md says what is so: its picture, its table of what is where, and the links of all documents."""

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import pytest

from test_structure import PACKAGE, import_graph, module_of, sources

ROOT = PACKAGE.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md")])

# A reader is lost in more lines.
MOST_LINES = {"DESIGN.md": 150, "README.md": 200}

pytestmark = pytest.mark.skipif(
    not (PACKAGE / "_core" / "state.pyx").exists(), reason="needs the sources, and the package is installed"
)

# Boxes that stand for several files, and files that have no box: they import for others.
FOLDERS = {
    "fastlisten.cli": "fastlisten.cli.",
    "fastlisten._startup": "fastlisten._startup.",
    "fastlisten._status": "fastlisten._status.",
    "fastlisten._workers": "fastlisten._workers.",
}
NO_BOX = {"fastlisten", "fastlisten.__main__", "fastlisten.aio", "fastlisten.http", "fastlisten._core"}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def picture() -> tuple[dict[str, str], set[tuple[str, str]]]:
    """Return the picture's boxes, the module of each by its name in the picture, and its arrows."""
    match = re.search(r"```mermaid\n(.*?)```", read("DESIGN.md"), re.DOTALL)
    assert match is not None
    folder = ""
    boxes: dict[str, str] = {}
    arrows: set[tuple[str, str]] = set()
    for line in match[1].splitlines():
        if found := re.search(r'subgraph \w+\["fastlisten/(.*)"\]', line):
            folder = found[1]
            continue
        for name, text in re.findall(r'(\w+)\["(.*?)"\]', line):
            boxes[name] = module_of(folder + text.partition("<br>")[0].rstrip("/"))
        steps = [step.split(" & ") for step in re.sub(r'\[".*?"\]', "", line).strip().split(" --> ")]
        for before, after in pairwise(steps):
            arrows |= {(one, other) for one in before for other in after}
    return boxes, arrows


def box_of(module: str) -> str:
    for box, prefix in FOLDERS.items():
        if module.startswith(prefix):
            return box
    return module


def imports() -> dict[str, set[str]]:
    """Return which box imports which others; what has no box is seen through."""
    graph = import_graph(sources(".py", ".pyx", ".pxd"))
    boxes: dict[str, set[str]] = {}
    for module, others in graph.items():
        seen = set().union(*(graph[other] if other in NO_BOX else {other} for other in others))
        boxes.setdefault(box_of(module), set()).update(map(box_of, seen - NO_BOX))
    return {box: others - {box} for box, others in boxes.items() if box not in NO_BOX}


def reached(box: str, graph: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    while new := {other for one in (found or {box}) for other in graph.get(one, ())} - found:
        found |= new
    return found


def test_the_picture_shows_every_file() -> None:
    boxes, arrows = picture()
    assert {name for arrow in arrows for name in arrow} == set(boxes)
    assert sorted(boxes.values()) == sorted(imports())


def test_the_picture_s_arrows_are_the_imports() -> None:
    boxes, arrows = picture()
    drawn: dict[str, set[str]] = {}
    for one, other in arrows:
        drawn.setdefault(boxes[one], set()).add(boxes[other])
    real = imports()
    assert [(one, other) for one in drawn for other in drawn[one] - real[one]] == []
    assert [(one, other) for one in real for other in real[one] - reached(one, drawn)] == []


def test_what_is_where() -> None:
    rows = re.findall(r"^\| (.*) \| (.*?\]\((fastlisten/.*?)\).*) \|$", read("DESIGN.md"), re.MULTILINE)
    assert len(rows) > 5
    for what, where, path in rows:
        for name in re.findall(r"`(\w+)(?:\(\))?`", where.partition("](")[0]):
            definition = rf"^[ \t]*(?:cdef |def |class |static )[^\n=]*\b{name}\b"
            assert re.search(definition, read(path), re.MULTILINE), f"{what}: {path} has no {name}"


def links() -> Iterator[tuple[Path, str]]:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                yield document, target


def anchors(document: Path) -> set[str]:
    """Return the names that a document's headings have as targets of links."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    dead = []
    for document, target in links():
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(f"{document.name}: {target}")
    assert dead == []


@pytest.mark.parametrize("name", MOST_LINES)
def test_a_document_stays_short(name: str) -> None:
    assert len(read(name).splitlines()) <= MOST_LINES[name]
