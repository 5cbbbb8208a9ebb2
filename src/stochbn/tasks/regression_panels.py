"""The figures of a report about a regression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochbn.tasks.base import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["panels"]

SHOWN = 500
"""Points of a method that are shown, at most; chosen at random."""
BINS = 10
"""Of predictions by their standard deviation, with as many examples each."""

Evidence = Mapping[str, Tensor]
"""``mean`` and ``truth`` ``[N, ...]`` of a method and, where it is known, ``std`` of an observation."""


def panels(found: Mapping[str, Evidence]) -> Sequence[Panel]:
    """Predicted against true, errors against their standard deviation, and coverage by level.

    Args:
        found: of each method, by its name; of several numbers an example, the first is shown.
    """
    first = {name: {key: _first(one) for key, one in evidence.items()} for name, evidence in found.items()}
    several = next(iter(found.values()))["mean"].numel() > len(next(iter(found.values()))["mean"])
    which = " Shown is the first number of each example." if several else ""
    known = {name: evidence for name, evidence in first.items() if "std" in evidence}

    def against_truth(axes: Axes, colors: Mapping[str, str]) -> None:
        for name, one in first.items():
            some = torch.randperm(len(one["mean"]), generator=torch.Generator().manual_seed(0))[:SHOWN]
            x, y = one["mean"][some].tolist(), one["truth"][some].tolist()
            axes.plot(x, y, ".", ms=3, alpha=0.6, color=colors[name], label=name)
        low, high = (float(one) for one in torch.cat([*first[next(iter(first))].values()][:2]).aminmax())
        axes.plot([low, high], [low, high], ls=":", lw=1, color="#767676")
        axes.set(xlabel="predicted mean", ylabel="true number")
        axes.legend(loc="best", fontsize=8)

    def by_std(axes: Axes, colors: Mapping[str, str]) -> None:
        largest = 0.0
        for name, one in known.items():
            parts = one["std"].argsort().tensor_split(min(BINS, len(one["std"])))
            x = [one["std"][part].square().mean().sqrt().item() for part in parts]
            y = [(one["truth"] - one["mean"])[part].square().mean().sqrt().item() for part in parts]
            axes.plot(x, y, "o-", ms=4, color=colors[name], label=name)
            largest = max(largest, *x, *y)
        axes.plot([0, largest], [0, largest], ls=":", lw=1, color="#767676")
        axes.set(
            xlabel="predicted standard deviation", ylabel="root mean squared error", xlim=(0, None), ylim=(0, None)
        )
        axes.legend(loc="best", fontsize=8)

    def coverage(axes: Axes, colors: Mapping[str, str]) -> None:
        levels = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
        for name, one in known.items():
            off = ((one["truth"] - one["mean"]) / one["std"]).abs()
            share = (off[:, None] <= torch.special.ndtri((1 + levels) / 2)).double().mean(0)
            error = (share * (1 - share) / len(off)).sqrt()
            axes.errorbar(levels.tolist(), share.tolist(), (1.96 * error).tolist(), fmt=".-", ms=4, elinewidth=1,
                          color=colors[name], label=name)  # fmt: skip
        axes.plot([0, 1], [0, 1], ls=":", lw=1, color="#767676")
        axes.set(xlim=(0, 1), ylim=(0, 1.03), xlabel="level of the interval", ylabel="share of truths in it")
        axes.legend(loc="best", fontsize=8)

    shown = [
        Panel(
            "How far is it off?",
            f"Predicted means and true numbers; on the dotted line they are equal.{which}",
            against_truth,
        )
    ]
    if known:
        shown += [
            Panel(
                "Is it off where it says so?",
                "The root mean squared error in tenths of the examples, from the smallest to the largest predicted "
                f"standard deviation; on the dotted line they are equal, and above it the method is too sure.{which}",
                by_std,
            ),
            Panel(
                "Do its intervals hold the truth as often as they say?",
                "The share of true numbers in central intervals of a Normal distribution, with 95 % intervals; below "
                f"the dotted line the method is too sure.{which}",
                coverage,
            ),
        ]
    return shown


def _first(values: Tensor) -> Tensor:
    """The first number of each example, ``[N]``."""
    return values.reshape(len(values), -1)[:, 0]
