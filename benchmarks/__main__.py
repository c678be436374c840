"""``python -m benchmarks``: measure, print, and write JSON and pictures."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NoReturn

from ._build import build
from .runner import Cell, Sample, SampleError, Sampler, Settings, plan, raise_file_limit
from .servers import SERVERS
from .workloads import QUICK, WORKLOADS

ROUNDS = 7
CPU_SECONDS = 3.0
"""A full run: 21 s of CPU a figure, of which results.SPLIT_SECONDS would do for the split."""

QUICK_ROUNDS = 3
QUICK_CPU_SECONDS = 0.1
QUICK_PROBE = 300
QUICK_LIMIT = 50.0
"""Seconds that the rounds of --quick may take: on a slow machine there are fewer."""


CLONE = Path(__file__).parent.parent
PICTURE = "benchmarks/results/latest"
"""Of the run that FIGURES.md shows; its samples are not kept in git."""


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="CPU time of the server for one connection, for fastlisten and its peers.",
        epilog="python -m benchmarks instructions --help: the count that CI guards; "
        "python -m benchmarks import --help: the cost of the import; "
        "python -m benchmarks aims --help: what was aimed at, and what a run says of it",
    )
    p.add_argument("--quick", action="store_true", help="under 60 s: close and echo, short samples")
    p.add_argument(
        "--only",
        metavar="NAME,...",
        default="",
        help="only these servers and workloads (the C loop is always there): "
        + ", ".join([*WORKLOADS, *SERVERS]),
    )
    p.add_argument("--rounds", type=int, metavar="N", help=f"rounds, {ROUNDS} by default")
    p.add_argument(
        "--cpu",
        type=float,
        metavar="SECONDS",
        help=f"server CPU time that a sample should take, {CPU_SECONDS:g} by default",
    )
    p.add_argument(
        "--alive",
        action="store_true",
        help="have the servers that are compared all run, and load them in turns: for a machine whose speed "
        "changes, with many rounds and little --cpu",
    )
    p.add_argument("--out", type=Path, metavar="STEM", help="write STEM.json, STEM.svg, STEM.png")
    p.add_argument("--compare", type=Path, metavar="OLD.json", help="say what is better or worse than then")
    p.add_argument("--show", type=Path, metavar="OLD.json", help="show an old run, measure nothing")
    p.add_argument(
        "--readme",
        type=Path,
        metavar="OLD.json",
        help=f"print an old run for FIGURES.md, and draw its picture there: {PICTURE}.svg (or --out)",
    )
    return p


def refuse(line: str) -> NoReturn:
    """End with a line about what was asked for wrongly, before anything is measured."""
    print(line, file=sys.stderr)
    raise SystemExit(2)


def read(path: Path) -> Results:
    """Return the results of an old run, or refuse."""
    try:
        return Results.read(path)
    except (OSError, ValueError) as error:
        refuse(str(error))


def check_output(stem: Path) -> None:
    """Refuse what could not be written when all is measured, or drawn."""
    if not stem.name or not stem.parent.is_dir():
        refuse(f"--out: {stem.parent} is not a folder")
    paths = [stem.parent, *(path for suffix in (".json", *SUFFIXES) if (path := add(stem, suffix)).exists())]
    for path in paths:
        if not os.access(path, os.W_OK) or (path != stem.parent and path.is_dir()):
            refuse(f"--out: {path} cannot be written")
    if importlib.util.find_spec("matplotlib") is None:
        refuse("pictures need matplotlib: pip install -e '.[bench]'")


def choose(names: str, quick: bool) -> list[Cell]:
    """Return the cells to measure for an --only list. Raises ValueError on an unknown name."""
    chosen = frozenset(filter(None, map(str.strip, names.split(","))))
    if unknown := chosen - SERVERS.keys() - WORKLOADS.keys():
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    workloads = chosen & WORKLOADS.keys() or (QUICK if quick else WORKLOADS.keys())
    servers = chosen & SERVERS.keys()
    cells = [
        Cell(workload, clients, server)
        for name, workload in WORKLOADS.items()
        if name in workloads
        for clients in workload.concurrency
        for server in workload.choose(servers)
    ]
    if idle := servers - {cell.server.name for cell in cells}:
        raise ValueError(f"in none of the workloads: {', '.join(sorted(idle))}")
    return cells


def too_late(order: list[tuple[int, Cell]], i: int, elapsed: float, limit: float) -> bool:
    """Whether sample `i` begins a round that would end after `limit` seconds."""
    turn = order[i][0]
    return turn > order[i - 1][0] and elapsed * (turn + 1) / turn > limit


def measure(cells: list[Cell], settings: Settings, console: Console) -> tuple[list[Sample], list[str]]:
    """Take all samples, with a progress bar and the time left."""
    order = plan(cells, settings.rounds, settings.seed, by_group=settings.alive)
    samples: list[Sample] = []
    failures: list[str] = []
    seconds: dict[Cell, float] = {}
    columns = (
        TextColumn("{task.description}", table_column=None),
        BarColumn(),
        TextColumn("{task.fields[place]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    start = time.monotonic()
    limit = settings.limit_s
    with (
        closing(Sampler(settings)) as sampler,
        Progress(*columns, console=console, refresh_per_second=1, transient=True) as progress,
    ):
        task = progress.add_task("", total=len(order), place="", left="")
        for i, (turn, cell) in enumerate(order):
            progress.update(
                task,
                description=f"{cell.workload.name} {cell.server.name}",
                place=f"{i + 1} of {len(order)}",
            )
            before = time.monotonic()
            if limit and too_late(order, i, before - start, limit):
                console.print(f"{turn} of {settings.rounds} rounds: more would take over {limit:g} s")
                break
            try:
                samples.append(sampler.take(turn, cell))
            except SampleError as error:
                failures.append(f"{cell.workload.name} ({cell.concurrency}), round {turn}: {error}")
            except KeyboardInterrupt:  # what is measured is measured
                failures.append(f"interrupted after {i} of {len(order)} samples")
                break
            now = time.monotonic()
            seconds[cell] = now - before
            # What a cell took is known from its first round on; until then, as the mean so far.
            usual = (now - start) / (i + 1)
            left = sum(seconds.get(later, usual) for _, later in order[i + 1 :])
            share = (now - start) / (now - start + left)
            words = f"{left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left"
            progress.update(task, completed=share * len(order), left=words)
    return samples, failures


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if arguments and arguments[0] == "instructions":
        from . import instructions

        return instructions.main(arguments[1:])
    if arguments and arguments[0] == "import":
        from . import importing

        return importing.main(arguments[1:])
    if arguments and arguments[0] == "aims":
        from . import aims

        return aims.main(arguments[1:])
    options = parser().parse_args(arguments)
    # A file is wider than the 80 columns that are assumed of it.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    if options.readme:
        results, stem = read(options.readme), options.out or CLONE / PICTURE
        if not options.out:
            stem.parent.mkdir(exist_ok=True)
        check_output(stem)
        try:
            words = readme(results, os.path.relpath(add(stem, ".svg"), CLONE / "benchmarks"))
        except ValueError as error:
            refuse(f"{options.readme}: {error}")
        draw(results, stem, (".svg",))
        print(words)
        return 0
    if options.out:
        check_output(options.out)
    old = read(options.compare) if options.compare else None
    results = read(options.show) if options.show else run(options, old, console)
    if options.out:  # first, as the samples are worth more than what is said of them
        path = add(options.out, ".json")
        results.write(path)
        console.print("wrote", *map(str, [path, *draw(results, options.out)]))
    show(results, console)
    if old and not compare(old, results, console):
        refuse(NOTHING_IN_COMMON)
    return 1 if results.failures else 0


NOTHING_IN_COMMON = "--compare: the two runs have no workload, clients and server in common"


def run(options: argparse.Namespace, old: Results | None, console: Console) -> Results:
    """Measure what the options say; refuse what they say wrongly, or what `old` has nothing of."""
    rounds = options.rounds
    if rounds is None:
        rounds = QUICK_ROUNDS if options.quick else ROUNDS
    cpu = options.cpu
    if cpu is None:
        cpu = QUICK_CPU_SECONDS if options.quick else CPU_SECONDS
    if rounds < 1 or not 0 < cpu < float("inf"):
        refuse("--rounds and --cpu must be above 0")
    if len(os.sched_getaffinity(0)) < 2:
        refuse("two cores are needed: one for the server, one for the load")
    try:
        cells = choose(options.only, options.quick)
    except ValueError as error:
        refuse(f"--only: {error}")
    lacks = {cell.server.name: cell.server.missing() for cell in cells}
    lacks |= {cell.workload.name: cell.workload.missing() for cell in cells}
    for name, missing in lacks.items():
        if missing:
            console.print(f"left out: {name}, which needs {missing}")
    cells = [cell for cell in cells if not (lacks[cell.server.name] or lacks[cell.workload.name])]
    if not cells:
        refuse("--only: nothing is left to measure")
    if old and not {(c.workload.name, c.concurrency, c.server.name) for c in cells} & old.keys():
        refuse(NOTHING_IN_COMMON)
    settings = Settings(rounds, cpu, alive=options.alive)
    if options.quick:
        settings.probe, settings.limit_s = QUICK_PROBE, QUICK_LIMIT
    try:
        build("load.c")
    except RuntimeError as error:
        refuse(str(error))
    facts = machine()
    raise_file_limit()
    os.sched_setaffinity(0, {settings.load_core})  # and so every child that does not move
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, signal.default_int_handler)  # end the servers, keep the samples
    return Results.of(settings, facts, *measure(cells, settings, console))


try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from .picture import SUFFIXES, add, draw
    from .report import compare, readme, show
    from .results import Results, machine
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install -e '.[bench]'") from None

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
