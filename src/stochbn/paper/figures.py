"""The paper's figures."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import norm
from torch import Tensor

from stochbn.measuring.goodness import distances, layer_parameters
from stochbn.posteriors import Factorized, FactorizedLog
from stochbn.report.curves import HEIGHT, WIDTH
from stochbn.report.style import COLORS, SEQUENCE, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from stochbn.paper.schedule import Epoch

__all__ = ["save_changes", "save_equivalents", "save_passes", "save_statistics", "save_training", "training"]


def training(logs: Mapping[str, Sequence[Epoch]], *, stacked: bool = False) -> Figure:
    """The loss and the accuracy of every epoch, for each network.

    Thin lines are of training images while the weights change, thick ones of held-out images, where there are some.

    Args:
        logs: each network's log, by its name.
        stacked: whether the two panels stand one above the other, and not side by side.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, 1.6 * HEIGHT) if stacked else (9, 3.4), layout="constrained")
    panels = figure.subplots(*((2, 1) if stacked else (1, 2)))
    colors = {name: SEQUENCE[i % len(SEQUENCE)] for i, name in enumerate(logs)}
    thick = False
    for axes, key, label in zip(panels, ("loss", "accuracy"), ("loss (nats)", "accuracy"), strict=True):
        for name, epochs in logs.items():
            numbers = [one.epoch for one in epochs]
            axes.plot(
                numbers, [getattr(one, key) for one in epochs], ".-", color=colors[name], lw=0.8, ms=3, label=name
            )
            held_out = [getattr(one, f"held_out_{key}") for one in epochs]
            if None not in held_out:
                thick = True
                axes.plot(numbers, held_out, ".-", color=colors[name], lw=1.8, ms=3)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    title = "thin: in training; thick: held-out" if thick else "in training"
    panels[0].legend(fontsize=7, title=title, title_fontsize=7)
    return figure


def save_training(path: Path, logs: Mapping[str, Sequence[Epoch]]) -> list[Path]:
    """Draw the loss and the accuracy of every epoch, for each network: PNG and SVG.

    Args:
        path: where to, without an ending.
        logs: each network's log, by its name.

    Returns:
        The files written.
    """
    return save(training(logs), path)


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


def save_changes(path: Path, networks: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> list[Path]:
    """Draw what methods change in the NLL and in the calibrated NLL of each network: PNG.

    Bars are two standard errors, and a row is one network, an ensemble or a network with dropout.

    Args:
        path: where to, without an ending.
        networks: by network, group and pair of methods as ``SBN - plain`` what `stochbn.metrics.differences.paired`
            gives.

    Returns:
        The file written.
    """
    from matplotlib.figure import Figure

    rows = [(f"{name}, {group}", pairs) for name, groups in networks.items() for group, pairs in groups.items()]
    figure = Figure(figsize=(7, 1.4 + 0.36 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, label in zip(panels, ("nll", "calibrated_nll"), ("NLL", "after the best temperature"), strict=True):
        for i, method in enumerate(("SBN", "joint", "input")):
            shown = [
                (row + (i - 1) * 0.22, change[f"{key}_change"], 2 * change[f"{key}_change_se"])
                for row, (_, pairs) in enumerate(rows)
                if f"{key}_change" in (change := pairs.get(f"{method} - plain", {}))
            ]
            places, changes, bars = zip(*shown, strict=True)
            axes.errorbar(changes, places, xerr=bars, fmt="o", ms=4, capsize=2, lw=1, color=SEQUENCE[i], label=method)
        axes.axvline(0, color="black", lw=0.8)
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("nats, less the plain network", fontsize=8)
        axes.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(rows)), [name for name, _ in rows])
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside upper center")
    figure.supxlabel("bars: two standard errors, paired over test images; left of the line is better", fontsize=7)
    return save(figure, path, (".png",))


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
        observations: what `stochbn.measuring.goodness.observe` returned.
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
