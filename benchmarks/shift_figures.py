"""The figures of `shift.py`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stochbn.files import write
from stochbn.report.style import COLORS, SEQUENCE

__all__ = ["save_all"]

LINES = {
    "plain": (COLORS["plain"], "o-"),
    "prediction-time BN": (SEQUENCE[1], "s--"),
    "adapt": (COLORS["SBN"], "o-"),
}
"""The colour and the line of each method."""


def save_all(found: dict[str, Any], folder: Path) -> None:
    """Draw all figures as PNG files.

    Args:
        found: what was measured, by network.
        folder: where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "shift-severity": by_severity(found),
        "shift-examples": by_examples(found),
        "shift-classes": by_classes(found),
    }
    for name, figure in figures.items():
        write(folder / f"{name}.png", functools.partial(figure.savefig, dpi=110))


def by_severity(found: dict[str, Any]) -> Figure:
    """Error, ECE and coverage against the severity, a column for each network."""
    figure = Figure(figsize=(1.2 + 3.1 * len(found), 7), layout="constrained")
    grid = figure.subplots(3, len(found), squeeze=False, sharex=True)
    words = {"error": "error, %", "ece": "ECE, %", "coverage": "coverage of 90 % sets, %"}
    for column, (name, network) in enumerate(found.items()):
        kinds = network["regimes"]
        chosen = {0: kinds["clean"]} | {s: kinds[f"severity {s}"] for s in range(1, 6) if f"severity {s}" in kinds}
        for axes, (key, label) in zip(grid[:, column], words.items(), strict=True):
            for method, (color, style) in LINES.items():
                values = [regime["methods"][method][key] for regime in chosen.values()]
                axes.plot(list(chosen), values, style, color=color, label=method, ms=4)
            if key == "coverage":
                axes.axhline(90, color="black", lw=0.8, ls=":")
                axes.set_xlabel("severity of the corruption (0: clean)")
            axes.set_ylim(0, 101 if key == "coverage" else None)
            _finish(axes, label if column == 0 else "")
        grid[0, column].set_title(name, fontsize=10)
    grid[0, 0].legend(fontsize=8)
    return figure


def by_examples(found: dict[str, Any]) -> Figure:
    """The error at severity 5 against the number of unlabelled examples, on the corruptions that all numbers have."""
    figure = Figure(figsize=(1.2 + 3.1 * len(found), 3), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (name, network) in zip(panels, found.items(), strict=True):
        kinds = network["regimes"]
        counts = {8: "8 examples", 32: "32 examples", 128: "severity 5", 512: "512 examples"}
        shared = set(kinds["8 examples"]["cells"])
        for method, (color, style) in LINES.items():
            values = []
            for kind in counts.values():
                cells = kinds[kind]["methods"][method]["by_cell"]
                values.append(sum(cells[cell]["error"] for cell in shared) / len(shared))
            axes.plot(range(len(counts)), values, style, color=color, label=method, ms=4)
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
        axes.set_xlabel("unlabelled examples, severity 5")
        axes.set_ylim(0, None)
        axes.set_title(name, fontsize=10)
        _finish(axes, "error, %" if axes is panels[0] else "")
    panels[0].legend(fontsize=8)
    return figure


def by_classes(found: dict[str, Any]) -> Figure:
    """What adapting to two classes alone does to the error: a dot for each pair, clean and under corruption."""
    figure = Figure(figsize=(1.2 + 3.1 * len(found), 5.6), layout="constrained")
    grid = figure.subplots(2, len(found), squeeze=False)
    for row, (kind, words) in enumerate({"two classes": "clean", "two classes, severity 5": "severity 5"}.items()):
        for axes, (name, network) in zip(grid[row], found.items(), strict=True):
            methods = network["regimes"][kind]["methods"]
            most, right = 1.0, 1.0
            for method, marker in (("prediction-time BN", "s"), ("adapt", "o")):
                cells = methods[method]["by_cell"]
                before = [methods["plain"]["by_cell"][cell]["error"] for cell in cells]
                after = [one["error"] for one in cells.values()]
                axes.scatter(before, after, 16, LINES[method][0], marker, alpha=0.75, label=method, linewidths=0)
                most, right = max(most, *after), max(right, *before)
            axes.plot([0, right], [0, right], ":", color="black", lw=0.8, label="as the plain network")
            axes.set(xlim=(-0.04 * right, 1.04 * right), ylim=(-0.04 * most, 1.04 * max(most, right)))
            axes.set_title(f"{name}, two classes, {words}", fontsize=9)
            axes.set_xlabel("error of the plain network, %")
            _finish(axes, "error after adapting, %" if axes is grid[row][0] else "")
    grid[0, 0].legend(fontsize=8)
    return figure


def _finish(axes: Axes, label: str) -> None:
    axes.grid(alpha=0.3)
    axes.set_ylabel(label)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(8)
    axes.yaxis.label.set_fontsize(8)
