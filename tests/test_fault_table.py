"""One failing call does not end a server: each call, in each way of serving, once and always; FAULTS.md."""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import pytest

from helpers import needs
from helpers.fault_cells import BEGIN, CALLS, LOOPS_CALLS, Cell
from helpers.fault_modes import MODES
from helpers.faults import Faults
from helpers.programs import selected, side_by_side

pytestmark = needs("Linux", "a C compiler", "calls that go to libc")

DOCUMENT = Path(__file__).parent.parent / "FAULTS.md"

SPEAK_FIRST = "`serve(first_bytes=)`, `proxy=`, `admission=`"
COLUMNS = {
    "`accept()`": ["accept()"],
    "`accept_async()`": ["accept_async()"],
    "`for`": ["for"],
    "`async for`": ["async for"],
    "`serve()`, `ThreadingTCPServer`": [
        *["serve() inline", "serve() threads", "serve() range", "serve() several", "ThreadingTCPServer"],
    ],
    "`serve(busy=)`": ["serve() busy", "serve() busy threads"],
    "asyncio's servers": ["create_server()", "create_server() no poller", "start_server()"],
    "... with `busy=`": ["create_server() busy", "start_server() busy"],
    SPEAK_FIRST: [
        *["serve() first bytes", "serve() proxy", "serve() busy proxy"],
    ],
    "asyncio's servers with these": ["create_server() first bytes", "create_server() proxy"],
}

# The system's names of those that faults.c has another word for, and which of them is meant.
ROWS = {
    "wake": "send, of a wake-up",
    "heard": "recv, of a wake-up",
    "ioctl": "ioctl(FIONBIO)",
    "poller": "epoll_create1",
    "watch": "epoll_ctl, ADD",
    "change": "epoll_ctl, MOD",
    "unwatch": "epoll_ctl, DEL",
    "ready": "epoll_wait",
    "malloc": "malloc, calloc, realloc",
    "loop's watch": "loop's epoll_ctl, ADD",
    "loop's change": "loop's epoll_ctl, MOD",
    "loop's unwatch": "loop's epoll_ctl, DEL",
}


# Whether anything is let go of, or watched anew, while these fail depends on what comes first; not all words
# need be seen.  In its debug mode asyncio asks for the time more often.
BY_CHANCE = {"unwatch", "loop's unwatch", "loop's watch", *(["clock_gettime"] if sys.flags.dev_mode else [])}
# A listener that is closed wakes who waits in accept_async(), unless that was cancelled a moment before.
# accept() waits where it is called before the client comes.
# Who speaks first has the place there, and nobody need be refused.
BY_CHANCE_IN = {("heard", "`accept_async()`"), ("poll", "`accept()`")} | {
    (call, SPEAK_FIRST) for call in ("ioctl", "send", "shutdown")
}

Cells = dict[str, Cell]


@pytest.fixture(scope="module")
def cells_of(faults: Faults, request: pytest.FixtureRequest) -> Callable[[str], Cells]:
    """Return what happened in a mode; each is run once."""

    def run(mode: str) -> Cells:
        program = "import sys; from helpers.fault_cells import main; main(*sys.argv[1:])"
        return cast(Cells, faults.python(program, mode))

    known = side_by_side(run, selected(request, "mode"))
    return lambda mode: known[mode] if mode in known else known.setdefault(mode, run(mode))


@pytest.mark.parametrize("mode", MODES)
def test_no_failing_call_leaves_anybody_stuck(cells_of: Callable[[str], Cells], mode: str) -> None:
    """Everybody is answered or told, it is told once, and what can recover does so at once."""
    cells = cells_of(mode)
    assert cells
    assert {what: cell for what, cell in cells.items() if cell["wrong"]} == {}


def text_of(cells: Iterable[tuple[str, Cell]], call: str) -> str:
    """What came of a call's failures, as the table says it; "" if it was not made."""
    words: dict[bool, set[str]] = {}
    for what, cell in cells:
        name, moment, _ = what.split(", ")
        if name == call:
            words.setdefault(moment == BEGIN, set()).update(cell["outcomes"])
    if True in words and words[True] > words.get(False, set()):
        words[True] -= words.get(False, set())  # what happens then, too, is said there
    texts = {at_first: ", ".join(sorted(found)) or "nothing" for at_first, found in words.items()}
    match texts.get(True), texts.get(False):
        case None, later:
            return later or ""
        case first, None:
            return f"{first} at first" if first != "nothing" else first
        case first, later:
            return str(later) if first == later else f"{first} at first, then {later}"


def words_of(text: str) -> set[str]:
    return set(re.findall("paused|mended|given up|lost|dropped|refused|told|raised", text))


def test_the_table_of_the_document_is_what_happens(cells_of: Callable[[str], Cells]) -> None:
    """Put the lines that are asked for into FAULTS.md when something else is meant to happen."""
    written = DOCUMENT.read_text(encoding="utf-8")
    lines = ["| call | error | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for call, code in {**CALLS, **LOOPS_CALLS}.items():
        beginning = f"| {ROWS.get(call, call)} | {code} | "
        rows = [row for row in written.splitlines() if row.startswith(beginning)]
        known = (
            rows[0].removeprefix(beginning).removesuffix(" |").split(" | ") if rows else [""] * len(COLUMNS)
        )
        texts = []
        for (column, modes), before in zip(COLUMNS.items(), known, strict=True):
            cells = [cell for mode in modes for cell in cells_of(mode).items()]
            text = text_of(cells, call)
            by_chance = call in BY_CHANCE or (call, column) in BY_CHANCE_IN
            texts.append(before if by_chance and words_of(text) <= words_of(before) else text)
        lines.append(f"{beginning}{' | '.join(texts)} |")
    table = "\n".join(lines)
    assert table in written, f"\n{table}\n"
