"""The picture: user and system CPU a connection, stacked, and the C loop as the line to reach."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from .results import Results, Summary
from .servers import BASELINE

PANELS = ("close", "echo", "http")
"""The workloads that are drawn, as far as a run has them."""


SUFFIXES = (".svg", ".png")

OURS, OTHERS, SYSTEM, WHOLE, LINE = "#1b7837", "#4477aa", "#bbbbbb", "#ddcc77", "#cc3311"


def add(stem: Path, suffix: str) -> Path:
    """Return the path with the suffix after it; with_suffix() would take the ".1" of "run-0.1" away."""
    return stem.with_name(stem.name + suffix)


def draw(results: Results, stem: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Write STEM.svg and STEM.png; return their paths, [] when there is nothing of PANELS."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.artist import Artist
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    panels = [
        (name, clients, sorted(rows, key=lambda row: row.middle))
        for (name, clients), group in groupby(results.summaries(), key=lambda s: (s.workload, s.concurrency))
        if name in PANELS and (rows := list(group))
    ]
    if not panels:
        return []
    mpl.rcParams["svg.hashsalt"] = "fastlisten"  # the same figures make the same file
    mpl.rcParams["svg.fonttype"] = "none"  # letters as letters: a third of the size
    tallest = max(len(rows) for *_, rows in panels)
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(6.2 * len(panels), 1.6 + 0.3 * tallest),
        squeeze=False,
        layout="constrained",
    )
    for axis, (name, clients, rows) in zip(axes[0], panels, strict=True):
        _panel(axis, f"{name}, {clients} clients", rows)
    legend: list[Artist] = [
        Patch(color=OURS, label="user, fastlisten"),
        Patch(color=OTHERS, label="user, others"),
        Patch(color=SYSTEM, label="system"),
    ]
    everything = [row for *_, rows in panels for row in rows]
    if not all(row.user + row.system for row in everything):
        legend.append(Patch(color=WHOLE, label="user and system: too short to split"))
    if any(row.server == BASELINE for row in everything):
        legend.append(Line2D([], [], color=LINE, linestyle="--", linewidth=1, label="C loop"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    m = results.machine
    figure.suptitle(
        f"CPU time of the server for one connection, median of {panels[0][2][0].rounds} rounds\n"
        f"{results.date[:10]}, {m['system']} {m['kernel']}, {m['processor']}, "
        f"CPython {m['python']}",
        fontsize=10,
    )
    paths = [add(stem, suffix) for suffix in suffixes]
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths


def _panel(axis, title: str, rows: list[Summary]) -> None:  # type: ignore[no-untyped-def]
    places = range(len(rows))
    user = [row.user for row in rows]
    colours = [OURS if row.server.startswith("fastlisten") else OTHERS for row in rows]
    axis.barh(places, user, color=colours)
    axis.barh(places, [row.system for row in rows], left=user, color=SYSTEM)
    whole = [0.0 if row.user + row.system else row.middle for row in rows]
    axis.barh(places, whole, color=WHOLE)
    for place, row in enumerate(rows):
        ratio = f" ({row.ratio:.2f})" if row.ratio is not None else ""
        axis.annotate(
            f" {row.middle:.1f}{ratio}", (row.middle, place), va="center", fontsize=7, clip_on=False
        )
        if row.server == BASELINE:
            axis.axvline(row.middle, color=LINE, linestyle="--", linewidth=1)
    axis.set_yticks(places, [row.server for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, max(row.middle for row in rows) * 1.22)
    axis.set_xlabel("µs of CPU")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
