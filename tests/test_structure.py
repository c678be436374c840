"""The plan of the house, read from the sources: who may import whom, and what stands in one place only."""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fastlisten"

pytestmark = pytest.mark.skipif(
    not (PACKAGE / "_core" / "state.pyx").exists(), reason="needs the sources, and the package is installed"
)

LONGEST_FUNCTION = 70  # lines
MOST_FIELDS = 20
FAMILIES = (  # of options
    "BindOptions",
    "ServeOptions",
    "TLSOptions",
    "FirstOptions",
    "WorkerOptions",
    "StatusOptions",
    "ServiceOptions",
    "InnerOptions",
)

# Longer functions, each with the reason.
LONG_FUNCTIONS: dict[str, str] = {}

# Classes with more fields, each with the reason.
MANY_FIELDS = {
    "aio/_transport.pxd:Transport": "each level of inheritance costs a close 2 % of its instructions",
}

Sources = Mapping[str, str]
"""Texts by their paths below the package."""


def sources(*suffixes: str) -> dict[str, str]:
    """Return the package's own texts."""
    return {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*"))
        if path.suffix in suffixes
    }


def module_of(path: str) -> str:
    """Return the module that a file belongs to; a .pxd and a .pyi are part of their .pyx."""
    parts = Path(path).with_suffix("").parts
    return ".".join(("fastlisten", *(parts[:-1] if parts[-1] == "__init__" else parts)))


# --- Python and Cython, as far as these rules look

IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(fastlisten[\w.]*)[ \t]+c?import[ \t]+(\(.*?\)|[^\n]*)"
    r"|c?import[ \t]+(fastlisten[\w.]+))",
    re.MULTILINE | re.DOTALL,
)
EXTERN = re.compile(r'^[ \t]*cdef extern from "(fastlisten/[^"]+)"', re.MULTILINE)
FUNCTION = re.compile(
    r"^([ \t]*)(?:async def|def|cpdef|cdef(?!\s+(?:extern|class|struct|union|enum|packed))[^=\n]*?)"
    r"\s*\b(\w+)\(",
    re.MULTILINE,
)
CLASS = re.compile(r"^([ \t]*)cdef class (\w+)", re.MULTILINE)


def imported(text: str, modules: set[str]) -> set[str]:
    """Return the modules of the package that a text imports or cimports, wherever in it."""
    found = set()
    for source, names, plain in IMPORT.findall(text):
        if plain:
            found.add(plain)
            continue
        submodules = {f"{source}.{name}" for name in re.findall(r"\w+", names)} & modules
        found |= submodules or {source}
    return found | {"fastlisten._core.port" for _ in EXTERN.findall(text)}


def import_graph(texts: Sources) -> dict[str, set[str]]:
    modules = {module_of(path) for path in texts}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for path, text in texts.items():
        graph[module_of(path)] |= imported(text, modules) - {module_of(path)}
    return graph


def circle_in(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of one circle of imports, [] when there is none."""
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module not in done:
            for other in sorted(graph.get(module, ())):
                if circle := visit(other, [*way, module]):
                    return circle
            done.add(module)
        return []

    for module in sorted(graph):
        if circle := visit(module, []):
            return circle
    return []


def functions(text: str) -> Iterator[tuple[str, int, str]]:
    """Give each function of a Python or Cython text: its name, how many lines it has, and what it says."""
    lines = text.splitlines()
    for match in FUNCTION.finditer(text):
        first = text.count("\n", 0, match.start(2))
        head = first
        while head < len(lines) and not lines[head].rstrip().endswith((":", "-1", "gil", "*", "None")):
            head += 1  # the arguments go on
        if head == len(lines) or not lines[head].rstrip().endswith(":"):
            continue  # a declaration
        last = head
        for number in range(head + 1, len(lines)):
            line = lines[number]
            if line.strip() and not line.startswith((match[1] + " ", match[1] + "\t")):
                break
            if line.strip():
                last = number
        yield match[2], last - first + 1, "\n".join(lines[first : last + 1])


def c_functions(text: str) -> Iterator[tuple[str, int, str]]:
    """The same for a C header, whose functions begin and end at the margin."""
    for match in re.finditer(
        r"^static inline [^;{]*?(\w+)\([^;{]*\)\n\{.*?^\}", text, re.MULTILINE | re.DOTALL
    ):
        yield match[1], match[0].count("\n") + 1, match[0]


def long_functions(texts: Sources) -> list[str]:
    return [
        f"{path}:{name}"
        for path, text in texts.items()
        for name, length, _ in (c_functions(text) if path.endswith(".h") else functions(text))
        if length > LONGEST_FUNCTION
    ]


def who_calls(name: str, texts: Sources) -> set[str]:
    """Return the functions that call another one."""
    return {
        f"{path}:{function}"
        for path, text in texts.items()
        for function, _, body in functions(text)
        if re.search(rf"\b{name}\(", re.sub(r"#.*", "", body.partition("\n")[2]))
    }


def fields(texts: Sources) -> dict[str, int]:
    """Return how many fields each extension type has."""
    counted = {}
    for path, text in texts.items():
        for match in CLASS.finditer(text):
            rest = text[text.index("\n", match.end()) + 1 :]
            body = re.split(r"^\S", rest, maxsplit=1, flags=re.MULTILINE)[0]
            declared = re.findall(r"^    cdef (?!.*\()([^#\n]+)", body, re.MULTILINE)
            counted[f"{path}:{match[2]}"] = sum(line.count(",") + 1 for line in declared)
    return counted


# --- the rules


def strangers_in_core(texts: Sources) -> list[str]:
    """Return what the core imports from above it, and where it speaks of a Listener."""
    core = {path: text for path, text in texts.items() if path.startswith("_core/")}
    modules = {module_of(path) for path in texts}
    return [
        f"{path} imports {name}"
        for path, text in core.items()
        for name in imported(text, modules)
        if not name.startswith("fastlisten._core.")
    ] + [f"{path} names Listener" for path, text in core.items() if re.search(r"\bListener\b(?!\.)", text)]


def declared_options(texts: Sources) -> dict[str, list[str]]:
    """Return where each option is declared: annotated in a class, or named in a collection, with others."""
    tree = ast.parse(texts["_options.py"])
    names = [
        item.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in FAMILIES
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    ]
    places: dict[str, list[str]] = {name: [] for name in names}
    for path, text in texts.items():
        if not path.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(text)):
            found: list[str] = []
            if isinstance(node, ast.ClassDef):
                found = [
                    item.target.id
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                ]
            elif isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
                entries = node.keys if isinstance(node, ast.Dict) else node.elts
                found = [
                    entry.value
                    for entry in entries
                    if isinstance(entry, ast.Constant) and isinstance(entry.value, str)
                ]
            named = [name for name in found if name in places]
            if len(named) > 1 or path == "_options.py":  # one alone may be another thing's name
                for name in named:
                    places[name].append(path)
    return places


BACK_OFF = re.compile(
    r"^(?:cdef )?(?:\w+ )?([A-Z_]*(?:PAUSE|DELAY|BACK_?OFF)[A-Z_]*)\b[^=\n]*=", re.MULTILINE
)


def back_offs(texts: Sources) -> set[str]:
    """Return the files in which a constant says how long accepting pauses."""
    return {path for path, text in texts.items() if BACK_OFF.search(text)}


def test_nothing_in_the_core_knows_who_is_above_it() -> None:
    assert strangers_in_core(sources(".py", ".pyx", ".pxd", ".pyi", ".h")) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = import_graph(sources(".py", ".pyx", ".pxd"))
    assert "fastlisten._core.accept" in graph["fastlisten._core.acceptor"]
    assert circle_in(graph) == []


def test_no_function_is_long() -> None:
    long = long_functions(sources(".py", ".pyx", ".pxd", ".h"))
    assert sorted(long) == sorted(LONG_FUNCTIONS)


def test_no_class_has_many_fields() -> None:
    counted = fields(sources(".pyx", ".pxd"))
    assert "_core/acceptor.pxd:Acceptor" in counted
    assert sorted(name for name, count in counted.items() if count > MOST_FIELDS) == sorted(MANY_FIELDS)


def test_one_function_accepts() -> None:
    assert who_calls("port_accept", sources(".pyx", ".pxd")) == {"_core/accept.pyx:accept_one"}


def test_one_place_says_how_long_accepting_pauses() -> None:
    assert back_offs(sources(".py", ".pyx", ".pxd", ".h")) == {"_core/accept.pyx"}


LOG_CALL = re.compile(
    r'(?:\b(?<!asyncio)_?log(?:\(\))?|getLogger\("fastlisten"\))'
    r"\.(?:debug|info|warning|error|exception|critical|log)\("
)


def log_calls(texts: Sources) -> dict[str, str]:
    """Return the calls of the logger `fastlisten`, each by where it stands."""
    found = {}
    for path, text in texts.items():
        for call in LOG_CALL.finditer(text):
            depth, end = 1, call.end()
            while depth:
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                end += 1
            found[f"{path}:{text.count(chr(10), 0, call.start()) + 1}"] = text[call.start() : end]
    return found


def events(texts: Sources) -> set[str]:
    """Return the events that records, workers and the command tell of."""
    before = r'"event": |tell_of\(|_tell\(|_warn\(|_event\(text, |put\(\(|^ +f?"listening.*\n +'
    told = rf'(?:{before})\s*"([a-z_ -]+)"'
    found = {event for text in texts.values() for event in re.findall(told, text, re.MULTILINE)}
    return found | set(re.findall(r'event = "(.*?)" if .* else "(.*?)"', texts["_core/admission.pyx"])[0])


def test_each_line_of_the_log_says_what_it_is_about() -> None:
    texts = {path: text for path, text in sources(".py", ".pyx").items() if path != "cli/log.py"}
    calls = log_calls(texts)
    assert len(calls) > 10
    assert [where for where, call in calls.items() if "extra=" not in call] == []
    document = (PACKAGE.parent / "LOG.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \| [A-Z]+ \|", document, re.MULTILINE)
    of_workers = document.partition("`Workers` tell")[2].partition(", with")[0]
    of_command = document.partition("of the workers, and ")[2].partition(";")[0]
    listed = set(re.findall("`([a-z_ -]+)`", " ".join([*rows, of_workers, of_command])))
    assert listed == events(texts)


def test_an_option_is_declared_once() -> None:
    places = declared_options(sources(".py"))
    assert {"backlog", "threads", "busy"} <= set(places)
    assert {name: found for name, found in places.items() if found != ["_options.py"]} == {}


# --- that the rules can fail


def test_the_rules_see_what_breaks_them() -> None:
    upwards = "def f():\n    from fastlisten._listener import Listener\n"
    assert len(strangers_in_core({"_core/a.pyx": upwards, "_listener.py": ""})) == 2
    lazily = {
        "a.py": "def f():\n    from fastlisten import b\n",
        "b.pxd": "from fastlisten.a cimport (\n x\n)\n",
    }
    assert circle_in(import_graph(lazily)) == ["fastlisten.a", "fastlisten.b"]
    body = "    pass\n" * LONGEST_FUNCTION
    indented = body.replace("    ", "        ")
    long = {
        "a.py": f"class A:\n    async def f(\n        self,\n    ) -> None:\n{indented}",
        "a.pyx": f"cdef int g(int a) except -1:\n{body}\n\ndef h():\n    pass\n",
        "a.pxd": "cdef int g(int a) except -1\n" * LONGEST_FUNCTION,
        "a.h": f"static inline int k(void)\n{{\n{body}}}\n",
    }
    assert long_functions(long) == ["a.py:f", "a.pyx:g", "a.h:k"]
    twice = {"a.pyx": "cdef int f():\n    port_accept(1)\n\ncdef int g():\n    return port_accept(2)\n"}
    assert who_calls("port_accept", twice) == {"a.pyx:f", "a.pyx:g"}
    pauses = {"a.py": "PAUSE_FIRST, PAUSE_LAST = 1, 2\n", "b.pyx": "cdef int64_t LAST_DELAY = 3\n"}
    assert back_offs(pauses) == {"a.py", "b.pyx"}
    options = "class BindOptions(TypedDict):\n    backlog: int\n    mode: int\n"
    again = {
        "_options.py": options,
        "a.py": 'NAMES = ("backlog", "mode")\n',
        "b.py": "class A:\n    backlog: int\n    mode: int\n",
    }
    assert declared_options(again)["backlog"] == ["_options.py", "a.py", "b.py"]
    wide = (
        "cdef class A:\n    cdef int a, b\n    cdef object c\n    cdef int f(self, int a) noexcept\n\nx = 1\n"
    )
    assert fields({"a.pxd": wide}) == {"a.pxd:A": 3}
