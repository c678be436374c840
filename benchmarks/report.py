"""Tables in the terminal: a run's figures, and how they stand to an older run's."""

from __future__ import annotations

from itertools import chain, groupby
from statistics import median

from rich.console import Console
from rich.table import Table

from .results import Results, Summary, rank_test
from .servers import BASELINE, SERVERS
from .workloads import CLIENTS, FAMILIES, WORKLOADS

SURE = 0.01
"""A difference is called one when chance alone would make it this seldom: of a hundred rows of
equal runs, one is called different. Five rounds a side are the fewest that can reach it."""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def baseline(workload: str) -> str:
    """Return what the ratios of a workload are to, in words."""
    name = WORKLOADS[workload].baseline
    return "the C loop" if name == BASELINE else name


def readme(results: Results, picture: str) -> str:
    """Return what FIGURES.md says of a run, in Markdown. `picture`: the path to its picture.

    Raises ValueError when the run has none of FAMILIES.
    """
    tables = families(results.summaries())
    if not tables:
        raise ValueError(f"the run has none of {', '.join(chain(*FAMILIES))}")
    measured = dict.fromkeys(row.workload for row in results.summaries())
    only = "" if measured.keys() == WORKLOADS.keys() else f"--only {','.join(measured)} "
    lines = [
        "µs of the server's CPU for one connection, or for one answer where it has several, "
        "user + system = **total**, and in brackets the total's ratio to the baseline; "
        f"median of {max(row.rounds for row in chain(*tables))} rounds.",
        f"{_machine(results)}; commit {results.machine['commit'] or 'unknown'}; "
        f"`python -m benchmarks {only}"
        f"--rounds {results.settings['rounds']} --cpu {results.settings['cpu_seconds']:g}`.",
        "",
        f"![The same as bars]({picture})",
    ]
    for rows in tables:
        lines += ["", *_markdown(rows)]
    return "\n".join(lines)


def families(summaries: list[Summary]) -> list[list[Summary]]:
    """Return the rows of each of FAMILIES that has any."""
    found = ([row for row in summaries if row.workload in family] for family in FAMILIES)
    return [rows for rows in found if rows]


def _markdown(rows: list[Summary]) -> list[str]:
    """Return the lines of a table with a column for each workload and number of clients."""
    cells = {(row.server, row.workload, row.concurrency): _cell(row) for row in rows}
    columns = list(dict.fromkeys((row.workload, row.concurrency) for row in rows))
    several = len(columns) > len({workload for workload, _ in columns})
    titles = [
        f"{workload}: {WORKLOADS[workload].about}" + f", {_clients(clients)}" * several
        for workload, clients in columns
    ]
    lines = [
        f"| server, to {baseline(rows[0].workload)} | {' | '.join(titles)} |",
        f"|---|{'---|' * len(titles)}",
    ]
    for server in [name for name in SERVERS if any(row.server == name for row in rows)]:
        name = f"**{server}**" if server.startswith("fastlisten") else server
        words = " | ".join(cells.get((server, *column), "") for column in columns)
        lines.append(f"| {name} | {words} |")
    return lines


def _clients(number: int) -> str:
    return f"{number:,} client" + "s" * (number != 1)


def _cell(row: Summary) -> str:
    split = f"{row.user:.1f} + {row.system:.1f} = " if row.user + row.system else ""
    ratio = f" ({row.ratio:.2f})" if row.ratio is not None else ""
    return f"{split}**{row.middle:.1f}**{ratio}"


def show(results: Results, console: Console) -> None:
    """Print a table for each workload."""
    console.print(_machine(results))
    for name, group in groupby(results.summaries(), key=lambda s: s.workload):
        rows = list(group)
        console.print(_table(name, rows))
        for line in growth(rows):
            console.print(line, markup=False, highlight=False)
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
        title=f"{name}: {workload.about}; in {workload.unit}, "
        f"median (least to greatest) of {max(row.rounds for row in rows)} rounds",
        title_justify="left",
    )
    table.add_column("server")
    for title in ("clients", *(("user", "system") if split else ())):
        table.add_column(title, justify="right")
    for metric in rows[0].columns:
        table.add_column("total" if split else METRICS.get(metric, metric), justify="right")
    table.add_column(f"to {baseline(name)}", justify="right")
    for row in rows:
        ratio = (
            f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})" if row.ratio is not None else ""
        )
        told = row.user + row.system > 0
        table.add_row(
            row.server,
            f"{row.concurrency:,}",
            *([f"{part:.1f}" if told else "" for part in (row.user, row.system)] if split else []),
            *(
                _number(value)
                + (f" ({_number(row.low)} to {_number(row.high)})" if metric == workload.figure else "")
                for metric, value in row.columns.items()
            ),
            ratio,
            style="bold" if row.server.startswith("fastlisten") else None,
        )
    return table


METRICS = {
    "cpu_us": "CPU",
    "bytes": "memory",
    "p50_ms": "p50",
    "p99_ms": "p99",
    "p999_ms": "p99.9",
    "last_ms": "last",
}
"""What the tables call the metrics."""

FLAT = 1.15
"""A cost that grows by no more than this from 64 clients to the most is called flat."""


def growth(rows: list[Summary]) -> list[str]:
    """Return a line for each server that was measured with CLIENTS at once and with more."""
    lines = []
    for server in dict.fromkeys(row.server for row in rows):
        costs = {row.concurrency: row.middle for row in rows if row.server == server}
        most = max(costs)
        if CLIENTS in costs and most > CLIENTS:
            times = costs[most] / costs[CLIENTS]
            word = "flat" if times <= FLAT else "not flat"
            lines.append(
                f"{server}: {most:,} clients cost {times:.2f} of {CLIENTS} each, {word} within {FLAT}"
            )
    return lines


def verdict(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[str, float]:
    """Return "better", "worse", "within noise" or "too few rounds", then to now, and the p-value."""
    chance = rank_test(a, b)
    if chance <= SURE:
        return ("better" if median(b) < median(a) else "worse"), chance
    fewest = rank_test(tuple(map(float, range(len(a)))), tuple(float(len(a) + i) for i in range(len(b))))
    return ("within noise" if fewest <= SURE else "too few rounds"), chance


def compare(old: Results, new: Results, console: Console) -> bool:
    """Print, for each figure that both runs have, whether it is better or worse; False if they have none.

    Compared are the ratios to the baseline of the same round, so that a machine that is slower today
    does not make everything worse. Where there are none, for memory and for the baseline itself, the
    figures are: those tell of the machine too.
    """
    before = {row.key: row for row in old.summaries()}
    pairs = [(then, now) for now in new.summaries() if (then := before.get(now.key))]
    table = Table(title=f"against {old.date}: ratios to the baseline, or figures", title_justify="left")
    for column in ("workload", "clients", "server", "then", "now", "verdict", "p"):
        table.add_column(column)
    for then, now in pairs:
        if then.ratios and now.ratios and now.server != WORKLOADS[now.workload].baseline:
            values = then.ratios, now.ratios
            words = [f"{median(ratios):.3f}" for ratios in values]
        else:
            values = then.values, now.values
            words = [f"{_number(median(figures))} {WORKLOADS[now.workload].unit}" for figures in values]
        word, chance = verdict(*values)
        table.add_row(
            now.workload,
            f"{now.concurrency:,}",
            now.server,
            *words,
            word,
            f"{chance:.3f}",
            style={"better": "green", "worse": "red"}.get(word),
        )
    if pairs:
        console.print(table)
    return bool(pairs)
