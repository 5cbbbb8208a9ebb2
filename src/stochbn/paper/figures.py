"""The paper's figures."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import norm
from torch import Tensor

from stochbn.paper.goodness import Diagnosis, distances, layer_parameters
from stochbn.posteriors import Factorized, FactorizedLog
from stochbn.report import curves
from stochbn.report.style import COLORS, SEQUENCE, save

if TYPE_CHECKING:
    from stochbn.paper.training import Epoch

__all__ = [
    "save_costs",
    "save_diagnosis",
    "save_entropy_cdf",
    "save_equivalents",
    "save_passes",
    "save_statistics",
    "save_training",
]

NEAR = 0.15
"""Dots whose logarithms differ by less share a label."""


def save_entropy_cdf(
    path: Path,
    entropies: Mapping[tuple[str, bool], Tensor],
    *,
    classes: int,
    title: str,
    known: Mapping[tuple[str, bool], Tensor] | None = None,
) -> list[Path]:
    """Draw the empirical distribution functions of entropies as the paper's figure does: PNG and SVG.

    Args:
        path: where to, without an ending.
        entropies: ``[N]``, nats, for each method's name and whether it draws the statistics.
        classes: the number of classes K: entropies end at ln K.
        title: the figure's title.
        known: the same of known examples; None leaves them out.

    Returns:
        The files written.
    """
    return save(curves.entropies_of_unknown(entropies, classes=classes, title=title, known=known), path)


def save_training(path: Path, logs: Mapping[str, Sequence[Epoch]]) -> list[Path]:
    """Draw the loss and the accuracy of every epoch, for each network: PNG and SVG.

    Args:
        path: where to, without an ending.
        logs: each network's log, by its name.

    Returns:
        The files written.
    """
    return save(curves.training(logs), path)


def save_equivalents(
    path: Path, nlls: Mapping[str, Sequence[float]], ensembles: Sequence[float], *, title: str
) -> list[Path]:
    """Draw methods' calibrated NLL as points between lines at those of ensembles of 1, 2, ... networks: PNG and SVG.

    Bars are standard errors over networks of the difference from the plain network; a point is filled where that is
    more than twice its standard error.

    Args:
        path: where to, without an ending.
        nlls: calibrated NLL (nats) of every method with each network; one is ``plain``.
        ensembles: the mean of ensembles of 1, 2, ... networks.
        title: the figure's title.

    Returns:
        The files written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.1 + 0.32 * len(nlls)), layout="constrained")
    axes = figure.subplots()
    for size, nll in enumerate(ensembles, start=1):
        axes.axvline(nll, color=COLORS["Deep Ensembles"], lw=1, alpha=0.7)
        axes.annotate(f"{size}", (nll, 1), (0, 2), ("data", "axes fraction"), "offset points", ha="center", fontsize=8,
                      color=COLORS["Deep Ensembles"])  # fmt: skip
    for name, values in nlls.items():
        error, told = _from_plain(values, nlls["plain"])
        color = COLORS["plain"] if name == "plain" else COLORS["SBN"]
        axes.errorbar(statistics.mean(values), name, xerr=error, fmt="o", color=color, ms=6, capsize=3, elinewidth=1,
                      mfc=color if told or name == "plain" else "white")  # fmt: skip
    axes.invert_yaxis()
    axes.set(xlabel="calibrated NLL (nats); lines: Deep Ensembles of 1, 2, ... networks; further left is better")
    axes.set_title(title, fontsize=10, pad=16)
    axes.grid(axis="y", alpha=0.3)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(8)
    figure.supxlabel(_bars(nlls), fontsize=7)
    return save(figure, path)


def save_passes(path: Path, curves: Mapping[str, Sequence[tuple[int, Sequence[float]]]], *, title: str) -> list[Path]:
    """Draw calibrated NLL against cost in plain passes, a curve for each method: PNG and SVG.

    Bars and filled points are as in `save_equivalents`.

    Args:
        path: where to, without an ending.
        curves: numbers of passes and calibrated NLL (nats) with each network, by method; ``plain`` is one of them, and
            ensembles are the yardstick.
        title: the figure's title.

    Returns:
        The files written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    ((_, plain),) = curves["plain"]
    others = itertools.cycle(color for color in SEQUENCE if color != COLORS["Deep Ensembles"])
    for name, points in curves.items():
        ensemble = name.startswith("ensemble")
        color = COLORS["Deep Ensembles"] if ensemble else COLORS["plain"] if name == "plain" else next(others)
        style = "-" if name == "ensembles" else "--" if ensemble or "calibrated" in name else "-"
        style = ":" if name.startswith("snapshots") else style
        passes = [count for count, _ in sorted(points)]
        found = [values for _, values in sorted(points)]
        means = [statistics.mean(values) for values in found]
        bars, told = zip(*(_from_plain(values, plain) for values in found), strict=True)
        marker = "D" if name == "plain" else "s" if ensemble else "o"
        axes.errorbar(passes, means, bars, marker=marker, ms=5, ls=style, color=color, lw=1.6, label=name, mfc="white",
                      elinewidth=0.8, capsize=2, zorder=3 if name == "plain" else 2)  # fmt: skip
        filled = [(x, y) for x, y, is_told in zip(passes, means, told, strict=True) if is_told or name == "plain"]
        axes.plot(*zip(*filled, strict=True) if filled else ([], []), marker, ms=5, color=color, zorder=4)
    ticks = sorted({passes for points in curves.values() for passes, _ in points})
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xticks([tick for tick in ticks if tick in (1, 2, 3, 4, 8, 16, 32, 48)])
    axes.minorticks_off()
    axes.set(xlabel="passes (log scale)", ylabel="calibrated NLL (nats); lower is better")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="drawn", title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.supxlabel(_bars({"plain": plain}), fontsize=7)
    return save(figure, path)


def _from_plain(values: Sequence[float], plain: Sequence[float]) -> tuple[float, bool]:
    """The standard error over networks of a difference, and whether it is less than half of the difference."""
    differences = [value - other for value, other in zip(values, plain, strict=True)]
    if len(differences) < 2:
        return 0.0, False
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return error, abs(statistics.mean(differences)) > 2 * error > 0


def _bars(nlls: Mapping[str, Sequence[float]]) -> str:
    count = len(nlls["plain"])
    if count < 2:
        return "one network: no difference from plain can be told from chance"
    return f"bars: standard error of the difference from plain, over {count} networks; filled: more than twice that"


def save_costs(path: Path, found: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Draw the error of mean probabilities against cost, log-log, one panel for each network: PNG and SVG.

    Each dot says how many draws it is. Lines join those of which no other one is as accurate at less cost.

    Args:
        path: where to, without an ending.
        found: what `stochbn.paper.cost.measure` returned, by a title.

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
            ("quasi", "as many quasi-random draws as written, for every object", SEQUENCE[1], (6, 1)),
            ("draws", "draws= as written, by default: easy objects get fewer", SEQUENCE[0], (-7, -3)),
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


def save_diagnosis(path: Path, diagnosis: Diagnosis, *, title: str) -> list[Path]:
    """Draw a diagnosis of the factorised form: marginal fit, correlations, share of variance. PNG and SVG.

    Args:
        path: where to, without an ending.
        diagnosis: what `stochbn.paper.goodness.diagnose` returned.
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


def save_statistics(
    path: Path,
    observations: Mapping[str, Tensor],
    posterior: Factorized | FactorizedLog,
    *,
    layers: int = 3,
    channels: int = 2,
) -> list[Path]:
    """Draw observed statistics against the fitted Normal and LogNormal: PNG and SVG.

    Each row is a layer: the first, the last and some between them. For its first channels that vary, the row has the
    histogram of the mini-batch means and that of the log-variances, and the fitted densities as lines. The row's
    label gives the layer's mean Kolmogorov-Smirnov distances.

    Args:
        path: where to, without an ending.
        observations: what `stochbn.paper.goodness.observe` returned.
        posterior: the distribution fitted to the same network.
        layers: how many layers to show.
        channels: how many channels of each.

    Returns:
        The files written.
    """
    from matplotlib.figure import Figure

    names = list(posterior.layers)
    chosen = [names[round(i)] for i in np.linspace(0, len(names) - 1, min(layers, len(names)))]
    distance = distances(observations, posterior)
    parameters = layer_parameters(posterior)
    figure = Figure(figsize=(2.6 * 2 * channels, 2.1 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), 2 * channels, squeeze=False)
    for row, layer in zip(grid, chosen, strict=True):
        m, s, m_log, s_log = parameters[layer]
        finite = observations[layer][:, 1].log().isfinite().all(0)
        varying = ((s > 0) & finite).nonzero()[:channels, 0].tolist()
        for i, channel in enumerate(varying):
            means, variances = observations[layer][:, :, channel].unbind(1)
            for axes, values, location, scale, name, color in (
                (row[2 * i], means, m, s, "mean", SEQUENCE[1]),
                (row[2 * i + 1], variances.log(), m_log, s_log, "log-variance", SEQUENCE[0]),
            ):
                axes.hist(values.tolist(), bins="auto", density=True, color=color, alpha=0.45)
                low, high = axes.get_xlim()
                x = np.linspace(low, high, 200)
                axes.plot(x, norm.pdf(x, location[channel].item(), scale[channel].item()), color="black", lw=1.2)
                axes.set_title(f"channel {channel}: {name}", fontsize=8)
                axes.set_yticks([])
                axes.locator_params(axis="x", nbins=4)
                axes.tick_params(labelsize=7)
        d = distance[layer]
        row[0].set_ylabel(f"layer {layer}\nKS mean {d['mean']:.3f}\nKS variance {d['variance']:.3f}", fontsize=8)
    size = f"mini-batches of {posterior.batch_size}" if posterior.batch_size else "mini-batches"
    figure.suptitle(
        f"Statistics of {size} (bars) and the fitted Normal and LogNormal (lines)\n"
        "KS: the Kolmogorov-Smirnov distance, the largest gap between observed and fitted distribution (0 to 1)",
        fontsize=9,
    )
    return save(figure, path)
