"""Tables in the terminal: a run's figures, and how they stand to an older run's."""

from __future__ import annotations

from itertools import groupby
from statistics import median

from rich.console import Console
from rich.table import Table

from .results import Results, Summary, rank_test
from .servers import SERVERS
from .workloads import WORKLOADS

SURE = 0.01
"""A difference is called one when chance alone would make it this seldom: of a hundred rows of
equal runs, one is called different. Five rounds a side are the fewest that can reach it."""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


README_WORKLOADS = ("close", "echo", "http")


def readme(results: Results, picture: str) -> str:
    """Return what README.md says of a run, in Markdown. `picture`: the path to its picture.

    Raises ValueError when the run has none of README_WORKLOADS.
    """
    rows = [row for row in results.summaries() if row.workload in README_WORKLOADS]
    if not rows:
        raise ValueError(f"the run has none of {', '.join(README_WORKLOADS)}")
    cells = {(row.server, row.workload): _cell(row) for row in rows}
    workloads = tuple(name for name in README_WORKLOADS if any(row.workload == name for row in rows))
    servers = [name for name in SERVERS if any(row.server == name for row in rows)]
    titles = [f"{name}: {WORKLOADS[name].about}" for name in workloads]
    lines = [
        "µs of the server's CPU for one connection, user + system = **total**, and in brackets the "
        f"total's ratio to the C `accept4` loop; median of {max(row.rounds for row in rows)} rounds.",
        f"{_machine(results)}; commit {results.machine['commit'] or 'unknown'}.",
        "",
        f"![The same as bars]({picture})",
        "",
        f"| server | {' | '.join(titles)} |",
        f"|---|{'---|' * len(titles)}",
    ]
    for server in servers:
        name = f"**{server}**" if server.startswith("fastlisten") else server
        words = " | ".join(cells.get((server, workload), "") for workload in workloads)
        lines.append(f"| {name} | {words} |")
    return "\n".join(lines)


def _cell(row: Summary) -> str:
    split = f"{row.user:.1f} + {row.system:.1f} = " if row.user + row.system else ""
    ratio = f" ({row.ratio:.2f})" if row.ratio is not None else ""
    return f"{split}**{row.middle:.1f}**{ratio}"


def show(results: Results, console: Console) -> None:
    """Print a table for each workload."""
    console.print(_machine(results))
    for name, rows in groupby(results.summaries(), key=lambda s: s.workload):
        console.print(_table(name, list(rows)))
    for failure in results.failures:
        console.print(f"failed: {failure}", style="red", markup=False, soft_wrap=True)


def _machine(results: Results) -> str:
    m = results.machine
    packages = ", ".join(f"{name} {version}" for name, version in m["packages"].items())
    return (
        f"{results.date}, {m['system']} {m['kernel']} {m['architecture']}, {m['processor']}, "
        f"{m['cores']} cores, CPython {m['python']}, {m['cc']}, {m['go'] or 'no go'}; {packages}"
    )


def _table(name: str, rows: list[Summary]) -> Table:
    workload = WORKLOADS[name]
    split = any(row.user or row.system for row in rows)
    table = Table(
        title=f"{name}: {workload.about}; {workload.figure.split('_')[0]} in {workload.unit}, "
        f"median (least to greatest) of {max(row.rounds for row in rows)} rounds",
        title_justify="left",
    )
    table.add_column("server")
    table.add_column("clients", justify="right")
    if split:
        table.add_column("user", justify="right")
        table.add_column("system", justify="right")
    table.add_column("total" if split else workload.figure, justify="right")
    table.add_column("to the C loop", justify="right")
    for row in rows:
        ratio = (
            f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})" if row.ratio is not None else ""
        )
        table.add_row(
            row.server,
            f"{row.concurrency:,}",
            *([f"{row.user:.1f}", f"{row.system:.1f}"] if split else []),
            f"{_number(row.middle)} ({_number(row.low)} to {_number(row.high)})",
            ratio,
            style="bold" if row.server.startswith("fastlisten") else None,
        )
    return table


def verdict(old: Summary, new: Summary) -> tuple[str, float]:
    """Return "better", "worse", "within noise" or "too few rounds", and the p-value."""
    a, b = old.ratios, new.ratios
    if not a or not b:
        return "not comparable", 1.0
    chance = rank_test(a, b)
    if chance <= SURE:
        return ("better" if median(b) < median(a) else "worse"), chance
    fewest = rank_test(tuple(map(float, range(len(a)))), tuple(float(len(a) + i) for i in range(len(b))))
    return ("within noise" if fewest <= SURE else "too few rounds"), chance


def compare(old: Results, new: Results, console: Console) -> None:
    """Print, for each figure that both runs have, whether it is better or worse.

    Compared are the ratios to the C loop of the same round, so that a machine that is slower today
    does not make everything worse.
    """
    before = {(s.workload, s.concurrency, s.server): s for s in old.summaries()}
    table = Table(title=f"against {old.date}, ratios to the C loop", title_justify="left")
    for column in ("workload", "clients", "server", "then", "now", "verdict", "p"):
        table.add_column(column)
    for now in new.summaries():
        then = before.get((now.workload, now.concurrency, now.server))
        if then is None or then.ratio is None or now.ratio is None or set(now.ratios) == {1.0}:
            continue
        word, chance = verdict(then, now)
        table.add_row(
            now.workload,
            f"{now.concurrency:,}",
            now.server,
            f"{then.ratio:.3f}",
            f"{now.ratio:.3f}",
            word,
            f"{chance:.3f}",
            style={"better": "green", "worse": "red"}.get(word),
        )
    console.print(table)
