"""What is measured of a network, as tables and figures: what draws cost, and how well the factorised form fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stochbn.measuring.goodness import Diagnosis
from stochbn.report.style import COLORS, SEQUENCE, save
from stochbn.report.tables import Table

__all__ = ["diagnosis", "rescaling", "save_costs", "save_diagnosis"]

NEAR = 0.15
"""Dots whose logarithms differ by less share a label."""


def diagnosis(title: str, found: Diagnosis) -> Table:
    """How well the factorised form fits every layer: marginal fit, and mean absolute correlation within the layer."""
    within = found.correlations.diagonal().tolist()
    rows = [
        [layer, f"{distance['mean']:.3f}", f"{distance['variance']:.3f}", f"{correlation:.3f}"]
        for (layer, distance), correlation in zip(found.distances.items(), within, strict=True)
    ]
    meaning = (
        "KS is the Kolmogorov-Smirnov distance, the largest gap between the observed and the fitted distribution "
        f"function (0 to 1; about {found.distance_by_chance:.3f} by chance)"
    )
    columns = ["layer", "KS of means", "KS of variances", "mean abs. correlation within"]
    return Table(f"{title}; {meaning}", columns, rows)


def rescaling(title: str, ratios: Mapping[str, Mapping[str, float]]) -> Table:
    """Observed statistics over rescaled ones, layer by layer."""
    keys = {"spread of means": "mean", "of log-variances": "log_variance", "expected variance": "variance"}
    rows = [[layer, *(f"{ratio[key]:.3f}" for key in keys.values())] for layer, ratio in ratios.items()]
    return Table(title, ["layer", *keys], rows)


def save_diagnosis(path: Path, diagnosis: Diagnosis, *, title: str) -> list[Path]:
    """Draw a diagnosis of the factorised form: marginal fit, correlations, share of variance. PNG and SVG.

    Args:
        path: where to, without an ending.
        diagnosis: what `stochbn.measuring.goodness.diagnose` returned.
        title: the figure's title.

    Returns:
        The files written.
    """
    from matplotlib.figure import Figure

    names = list(diagnosis.distances)
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    fit, correlation, variance = figure.subplots(1, 3)
    for key, color in (("mean", SEQUENCE[1]), ("variance", SEQUENCE[0])):
        fit.plot(range(len(names)), [diagnosis.distances[n][key] for n in names], "o-", color=color, label=key, ms=4)
    fit.axhline(diagnosis.distance_by_chance, color=COLORS["plain"], lw=1, ls=":", label="by chance")
    fit.set(ylim=(0, None), ylabel="Kolmogorov-Smirnov (KS) distance", title="largest gap between observed and fitted")
    fit.legend(fontsize=8)
    shown = correlation.imshow(diagnosis.correlations.numpy(), vmin=0, cmap="viridis")
    figure.colorbar(shown, ax=correlation, shrink=0.85)
    correlation.set_title(f"mean |correlation|; chance: {diagnosis.chance:.3f}")
    step = max(1, math.ceil(len(names) / 12))
    for axis in (fit.xaxis, correlation.xaxis, correlation.yaxis):
        axis.set_ticks(range(0, len(names), step), names[::step], fontsize=7)
    for axes in (fit, correlation):
        axes.set_xlabel("layer")
        axes.tick_params(axis="x", rotation=90 if max(map(len, names)) > 3 else 0)
    cumulative = diagnosis.shares.cumsum(0)
    variance.semilogx(range(1, len(cumulative) + 1), 100 * cumulative, color="black")
    variance.set(xlabel="leading directions", ylabel="share of variance, %", ylim=(0, 101), title="variance in common")
    variance.grid(alpha=0.3)
    for axes in (fit, correlation, variance):
        axes.title.set_fontsize(9)
    figure.suptitle(title, fontsize=10)
    return save(figure, path)


def save_costs(path: Path, found: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Draw the error of mean probabilities against cost, log-log, one panel for each network: PNG and SVG.

    Each dot says how many draws it is. Lines join those of which no other one is as accurate at less cost.

    Args:
        path: where to, without an ending.
        found: what `stochbn.measuring.cost.measure` returned, by a title.

    Returns:
        The files written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(max(5, 4.4 * len(found)), 4.4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (title, one) in zip(panels, found.items(), strict=True):
        units, variance = one["units"], one["variance"]
        counts = np.array([4, 16, 50, 200])
        errors = np.sqrt(variance / counts)
        axes.plot(counts * units["textbook"], errors, "-", color=COLORS["plain"], label="independent draws, textbook")
        for word, label, color, beside in (
            ("quasi", "as many quasi-random draws as written, for every example", SEQUENCE[1], (6, 1)),
            ("draws", "draws= as written, by default: easy examples get fewer", SEQUENCE[0], (-7, -3)),
        ):
            dots = [
                (units[name], math.sqrt(variance / worth), name.split()[1])
                for name, worth in one["worth"].items()
                if name.startswith(word)
            ]
            best = [dot for dot in dots if not any(x < dot[0] and y <= dot[1] for x, y, _ in dots)]
            axes.plot(*zip(*sorted((x, y) for x, y, _ in best), strict=True), "-", color=color, lw=1.4)
            axes.plot([x for x, _, _ in dots], [y for _, y, _ in dots], "o", ms=4, color=color, label=label)
            for x, y, text in _merged(dots):
                axes.annotate(text, (x, y), beside, textcoords="offset points", fontsize=7, color=color, zorder=4,
                              bbox={"fc": "white", "ec": "none", "pad": 0.6, "alpha": 0.8},
                              ha="left" if beside[0] > 0 else "right")  # fmt: skip
        wanted = math.sqrt(variance / 50)
        axes.axhline(wanted, color="black", lw=0.8, ls=":")
        axes.annotate("as accurate as 50 independent draws", (0.98, wanted), (0, 3), ("axes fraction", "data"),
                      "offset points", ha="right", fontsize=7)  # fmt: skip
        axes.axvline(5, color="black", lw=0.8, ls=":")
        axes.annotate("5 passes", (5, 0.02), (3, 0), ("data", "axes fraction"), "offset points", fontsize=7)
        axes.set(xscale="log", yscale="log", title=title)
        axes.set_xlabel("cost, plain forward passes")
        axes.set_xlim(left=0.42 * min(units[name] for name in one["worth"]))
        axes.set_xticks([1, 2, 5, 10, 20, 50, 100, 200], ["1", "2", "5", "10", "20", "50", "100", "200"])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.title.set_fontsize(9)
        axes.tick_params(labelsize=7)
        axes.xaxis.label.set_fontsize(8)
    panels[0].set_ylabel("RMS error of mean probabilities", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=7)
    return save(figure, path)


def _merged(dots: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Dots with their labels, of which those so near to each other that labels would overlap share one."""
    found: list[tuple[float, float, str]] = []
    for x, y, text in dots:
        if found and abs(math.log(x / found[-1][0])) < NEAR and abs(math.log(y / found[-1][1])) < NEAR:
            found[-1] = min(x, found[-1][0]), (y + found[-1][1]) / 2, f"{found[-1][2]}, {text}"
        else:
            found.append((x, y, text))
    return found
