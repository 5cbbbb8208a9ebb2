"""Figures of an evaluation: entropies, reliability, and selective prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

import stochbn.metrics as metrics
from stochbn.report.style import line_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["entropies_of_unknown", "known_and_unknown", "reliability", "risk_coverage"]

Methods = Mapping[tuple[str, bool], Tensor]
"""Something of each method, by its name and whether it draws the statistics."""

WIDTH, HEIGHT = 4.8, 3.7
"""Inches of a figure that has one panel: small, so that its words can be read on a telephone."""

RELIABILITY_BINS = 10


def entropies_of_unknown(entropies: Methods, *, classes: int, title: str = "") -> Figure:
    """The empirical distribution functions of entropies of unknown objects, as in the paper's figure.

    The curves are SBN, Dropout and Deep Ensembles, the latter two solid without and dashed with SBN, and in grey the
    plain network, which shows what SBN adds.

    Args:
        entropies: ``[N]``, nats, of each method.
        classes: the number of classes K: entropies end at ln K.
        title: the figure's title.
    """
    figure, axes = _panel(6, 4.2)
    for (method, sbn), values in entropies.items():
        label, color, style = line_of(method, sbn)
        _distribution(axes, values, label=label, ls=style, color=color, lw=1.8)
    _entropy_axis(axes, classes)
    axes.set(ylabel="fraction of unknown objects at or below", title=title)
    axes.legend(loc="best", fontsize=9, title="lower and further right is better", title_fontsize=8)
    return figure


def known_and_unknown(known: Methods, unknown: Methods, *, classes: int) -> Figure:
    """The empirical distribution functions of entropies of known objects, dotted, and of unknown ones.

    Args:
        known: ``[N]``, nats, of each method.
        unknown: ``[M]``, nats, likewise; empty where there are no unknown objects.
        classes: the number of classes K: entropies end at ln K.
    """
    figure, axes = _panel()
    for objects, found, style in (("known", known, ":"), ("unknown", unknown, "-")):
        for method, values in found.items():
            label, color, _ = line_of(*method)
            _distribution(axes, values, label=f"{label}, {objects}", ls=style, color=color, lw=1.8)
    _entropy_axis(axes, classes)
    axes.set_ylabel("fraction of objects at or below")
    axes.legend(loc="best", fontsize=8)
    return figure


def reliability(predictions: Mapping[tuple[str, bool], tuple[Tensor, Tensor]]) -> Figure:
    """How often methods are right, against how sure they are, in ten bins of equal width, with 95 % intervals.

    Args:
        predictions: the probability of the most probable class ``[N]`` and whether it is right ``[N]``, of each method.

    Source: intervals of a share as Wilson, Journal of the American Statistical Association 22 (1927), 209-212.
    """
    figure, axes = _panel()
    axes.plot([0, 1], [0, 1], ls=":", lw=1, color="#767676")
    for i, (method, (confidence, right)) in enumerate(predictions.items()):
        label, color, _ = line_of(*method)
        points = []
        numbers = (confidence.double() * RELIABILITY_BINS).long().clamp(0, RELIABILITY_BINS - 1)
        for number in sorted(set(numbers.tolist())):
            chosen = numbers == number
            low, high = _wilson(int(right[chosen].sum()), int(chosen.sum()))
            share = right[chosen].double().mean().item()
            points.append((confidence[chosen].double().mean().item(), share, share - low, high - share))
        x, y, below, above = map(list, zip(*points, strict=True))
        x = [value + 0.006 * (i - (len(predictions) - 1) / 2) for value in x]  # bars of two methods do not hide another
        bars = [[max(value, 0) for value in side] for side in (below, above)]
        axes.errorbar(x, y, bars, fmt="o", color=color, label=label, ms=4, elinewidth=1, capsize=2)
    axes.set(xlim=(0, 1.03), ylim=(0, 1.03), xlabel="probability of the predicted class", ylabel="share that is right")
    axes.legend(loc="best", fontsize=8)
    return figure


def risk_coverage(uncertain: Mapping[tuple[str, bool], tuple[Tensor, Tensor]]) -> Figure:
    """The share of errors among the objects that a method is most certain of, against how many these are.

    Args:
        uncertain: entropies ``[N]`` and whether the predicted class is wrong ``[N]``, of each method.
    """
    figure, axes = _panel()
    for method, (entropies, wrong) in uncertain.items():
        label, color, style = line_of(*method)
        curve = metrics.risk_coverage(entropies, wrong)
        axes.plot(100 * curve["coverage"], 100 * curve["risk"], ls=style, color=color, label=label, lw=1.6)
    axes.set(xlim=(0, 100), xlabel="answered, most certain first (%)", ylabel="wrong among these (%)")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", fontsize=8)
    return figure


def _panel(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    return figure, axes


def _distribution(axes: Axes, values: Tensor, **drawn: Any) -> None:
    x, y = metrics.entropy_cdf(values)
    axes.step([0, *x.tolist()], [0, *y.tolist()], where="post", **drawn)


def _entropy_axis(axes: Axes, classes: int) -> None:
    """An axis of entropies, which end at that of K equally probable classes."""
    limit = math.log(classes)
    axes.set(xlim=(0, limit), ylim=(0, 1), xlabel="entropy of the predictive distribution (nats)")
    ticks = [tick for tick in axes.get_xticks() if tick < 0.93 * limit]
    axes.set_xticks([*ticks, limit], [*(f"{tick:.3g}" for tick in ticks), f"ln {classes}"])


def _wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    z = 1.96
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return middle - half, middle + half
