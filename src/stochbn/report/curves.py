"""Figures of an evaluation: entropies, reliability, and selective prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

import stochbn.metrics as metrics
from stochbn.report.style import COLORS, line_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["entropies", "entropies_of_unknown", "panel", "reliability", "risk_coverage"]

Methods = Mapping[tuple[str, bool], Tensor]
"""Something of each method, by its name and whether it draws the statistics."""

WIDTH, HEIGHT = 4.8, 3.7
"""Inches of a figure that has one panel: small, so that its words can be read on a telephone."""

RELIABILITY_BINS = 10


def entropies(
    known: Methods, unknown: Methods, *, classes: int, title: str = "", size: tuple[float, float] = (WIDTH, HEIGHT)
) -> Figure:
    """The empirical distribution functions of entropies of known examples, dotted, and of unknown ones.

    The legend has each method's AUROC: how often, of a known and an unknown example, the unknown one has the higher
    entropy.

    Args:
        known: ``[N]``, nats, of each method.
        unknown: ``[M]``, nats, likewise; empty where there are no unknown examples.
        classes: the number of classes K: entropies end at ln K.
        title: the figure's title.
        size: its width and height in inches.
    """
    figure, axes = panel(*size)
    for method, values in unknown.items():
        label, color, style = line_of(*method)
        if method in known:
            label += f", AUROC {metrics.ood(known[method], values)['auroc']:.3f}"
        _distribution(axes, values, label=label, ls=style, color=color, lw=1.8)
    for method, values in known.items():
        label, color, style = line_of(*method)
        if unknown:
            _distribution(axes, values, ls=":", color=color, lw=1.2)
        else:
            _distribution(axes, values, label=label, ls=style, color=color, lw=1.8)
    if unknown and known:
        axes.plot([], [], ls="-", color=COLORS["plain"], lw=1.8, label="unknown classes")
        axes.plot([], [], ls=":", color=COLORS["plain"], lw=1.2, label="known classes")
    _entropy_axis(axes, classes)
    axes.set(ylabel="fraction of examples at or below", title=title)
    axes.legend(loc="best", fontsize=8)
    return figure


def entropies_of_unknown(unknown: Methods, *, classes: int, title: str = "", known: Methods | None = None) -> Figure:
    """`entropies` as a figure of its own: of unknown examples, as in the paper's figure, and of known ones if given."""
    return entropies(known or {}, unknown, classes=classes, title=title, size=(6, 4.2))


def reliability(
    predictions: Mapping[tuple[str, bool], tuple[Tensor, Tensor]],
    *,
    what: str = "probability of the predicted class",
    share: str = "share that is right",
) -> Figure:
    """How often methods are right, against how sure they are, in ten bins of equal width, with 95 % intervals.

    Args:
        predictions: the probability of the most probable class ``[N]`` and whether it is right ``[N]``, of each method.
        what: what the probabilities are of.
        share: what is right of these.

    Source: intervals of a share as Wilson, Journal of the American Statistical Association 22 (1927), 209-212.
    """
    figure, axes = panel()
    axes.plot([0, 1], [0, 1], ls=":", lw=1, color="#767676")
    for i, (method, (confidence, right)) in enumerate(predictions.items()):
        label, color, _ = line_of(*method)
        points = []
        numbers = (confidence.double() * RELIABILITY_BINS).long().clamp(0, RELIABILITY_BINS - 1)
        for number in sorted(set(numbers.tolist())):
            chosen = numbers == number
            low, high = _wilson(int(right[chosen].sum()), int(chosen.sum()))
            held = right[chosen].double().mean().item()
            points.append((confidence[chosen].double().mean().item(), held, held - low, high - held))
        x, y, below, above = map(list, zip(*points, strict=True))
        x = [value + 0.006 * (i - (len(predictions) - 1) / 2) for value in x]  # bars of two methods do not hide another
        bars = [[max(value, 0) for value in side] for side in (below, above)]
        axes.errorbar(x, y, bars, fmt="o", color=color, label=label, ms=4, elinewidth=1, capsize=2)
    axes.set(xlim=(0, 1.03), ylim=(0, 1.03), xlabel=what, ylabel=share)
    axes.legend(loc="best", fontsize=8)
    return figure


def risk_coverage(uncertain: Mapping[tuple[str, bool], tuple[Tensor, Tensor]]) -> Figure:
    """The share of errors among the examples that a method is most certain of, against how many these are.

    Args:
        uncertain: entropies ``[N]`` and whether the predicted class is wrong ``[N]``, of each method.
    """
    figure, axes = panel()
    for method, (values, wrong) in uncertain.items():
        label, color, style = line_of(*method)
        curve = metrics.risk_coverage(values, wrong)
        axes.plot(100 * curve["coverage"], 100 * curve["risk"], ls=style, color=color,
                  label=f"{label}, AURC {100 * curve['aurc']:.2f} %", lw=1.6)  # fmt: skip
    axes.set(xlim=(0, 100), xlabel="answered, most certain first (%)", ylabel="wrong among these (%)")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", fontsize=8)
    return figure


def panel(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure of one panel, with a faint grid."""
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
