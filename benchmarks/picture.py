"""The picture: CPU of an answer as bars, ours in one colour and the others in another, beside their like."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from .report import families
from .results import Results, Summary
from .servers import BASELINE, SERVERS
from .workloads import CLIENTS

SUFFIXES = (".svg", ".png")

OURS = {"user": "#1b7837", "system": "#a6dba0", "whole": "#5aae61"}
OTHERS = {"user": "#41618c", "system": "#bcccdf", "whole": "#7f9cc0"}
LINE = "#cc3311"

GAP = 0.6
"""Between two groups, in bars."""


def add(stem: Path, suffix: str) -> Path:
    """Return the path with the suffix after it; with_suffix() would take the ".1" of "run-0.1" away."""
    return stem.with_name(stem.name + suffix)


def panels(results: Results) -> list[list[list[Summary]]]:
    """Return what is drawn: for each family of workloads a line of panels, each the rows of one workload."""
    lines = (
        [list(group) for _, group in groupby(rows, key=lambda row: row.workload)]
        for family in families(results.summaries())
        if (rows := [row for row in family if row.concurrency == CLIENTS])
    )
    return list(lines)


def places(rows: list[Summary]) -> list[tuple[float, Summary]]:
    """Return each row and its place from the top: those of one group side by side, the best first."""
    groups: dict[str, list[Summary]] = {}
    for row in rows:
        groups.setdefault(SERVERS[row.server].group if row.server in SERVERS else "", []).append(row)
    placed: list[tuple[float, Summary]] = []
    for number, group in enumerate(groups.values()):
        group.sort(key=lambda row: row.middle)
        placed += [(len(placed) + i + GAP * number, row) for i, row in enumerate(group)]
    return placed


def draw(results: Results, stem: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Write STEM.svg and STEM.png; return their paths, [] when there is nothing to draw."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.artist import Artist
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines = panels(results)
    if not lines:
        return []
    mpl.rcParams["svg.hashsalt"] = "fastlisten"  # the same figures make the same file
    mpl.rcParams["svg.fonttype"] = "none"  # letters as letters: a third of the size
    heights = [0.9 + 0.3 * max(places(rows)[-1][0] + 1 for rows in line) for line in lines]
    widest = max(map(len, lines))
    figure, axes = plt.subplots(
        len(lines),
        widest,
        figsize=(6.2 * widest, 0.9 + sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for line_axes, line in zip(axes, lines, strict=True):
        for axis in line_axes[len(line) :]:
            axis.set_axis_off()
        for axis, rows in zip(line_axes, line, strict=False):
            _panel(axis, rows)
    everything = [row for line in lines for rows in line for row in rows]
    legend: list[Artist] = []
    for part, words in (("user", ": user"), ("system", ": system"), ("whole", "")):
        if any((row.user + row.system > 0) == (part != "whole") for row in everything):
            legend += [
                Patch(color=colours[part], label=name + words)
                for name, colours in (("fastlisten", OURS), ("others", OTHERS))
            ]
    if any(row.server == BASELINE for row in everything):
        legend.append(Line2D([], [], color=LINE, linestyle="--", linewidth=1, label="C loop"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    m = results.machine
    figure.suptitle(
        f"CPU time of the server for one answer, median of {everything[0].rounds} rounds\n"
        f"{results.date[:10]}, {m['system']} {m['kernel']}, {m['processor']}, "
        f"CPython {m['python']}",
        fontsize=10,
    )
    paths = [add(stem, suffix) for suffix in suffixes]
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths


def _panel(axis, rows: list[Summary]) -> None:  # type: ignore[no-untyped-def]
    placed = places(rows)
    for place, row in placed:
        colours = OURS if row.server.startswith("fastlisten") else OTHERS
        if row.user + row.system:
            axis.barh(place, row.user, color=colours["user"])
            axis.barh(place, row.system, left=row.user, color=colours["system"])
        else:
            axis.barh(place, row.middle, color=colours["whole"])
        ratio = f" ({row.ratio:.2f})" if row.ratio is not None else ""
        axis.annotate(
            f" {row.middle:.1f}{ratio}", (row.middle, place), va="center", fontsize=7, clip_on=False
        )
        if row.server == BASELINE:
            axis.axvline(row.middle, color=LINE, linestyle="--", linewidth=1)
    axis.set_yticks([place for place, _ in placed], [row.server for _, row in placed], fontsize=8)
    axis.margins(y=0.02)
    axis.invert_yaxis()
    axis.set_xlim(0, max(row.middle for row in rows) * 1.22)
    axis.set_xlabel("µs of CPU")
    axis.set_title(f"{rows[0].workload}, {CLIENTS} clients", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
