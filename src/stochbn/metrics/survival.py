"""Scores of predicted survival in discrete time, with examples that were censored, and the Kaplan-Meier estimate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["brier_scores", "concordance", "kaplan_meier"]

PAIRS = 2**22
"""Pairs of examples that are compared at a time."""


def kaplan_meier(times: Tensor, events: Tensor, count: int) -> Tensor:
    """``[T]``: the estimated share without the event at the end of each interval (Kaplan and Meier, 1958).

    >>> kaplan_meier(torch.tensor([0, 1, 1]), torch.tensor([1, 1, 0]), 2)
    tensor([0.6667, 0.3333], dtype=torch.float64)
    """
    happened = times[events > 0].bincount(minlength=count).double()
    at_risk = times.bincount(minlength=count).flip(0).cumsum(0).flip(0).double()
    return (1 - happened / at_risk.clamp(min=1)).cumprod(0)


def brier_scores(survival: Tensor, times: Tensor, events: Tensor) -> Tensor:
    """``[N, T]``, float64: the Brier score of each example at the end of each interval, weighted against censoring.

    Means over examples estimate the Brier score that there would be without censoring, if that does not depend on the
    event. Intervals that no example was seen in are left out.

    Args:
        survival: ``[N, T]``.
        times: ``[N]``: the interval of the event, or that at whose end an example was last seen.
        events: ``[N]``: 1 for the event.

    Source: Graf et al., 1999, "Assessment and comparison of prognostic classification schemes for survival data".

    >>> brier_scores(torch.tensor([[0.5], [0.5]]), torch.tensor([0, 0]), torch.tensor([1, 0])).tolist()
    [[0.25], [0.25]]
    """
    count = survival.shape[1]
    censored = times[events == 0].bincount(minlength=count).double()
    # Whoever is censored in an interval was seen to its end, after the events in it.
    left = times.bincount(minlength=count).flip(0).cumsum(0).flip(0) - times[events > 0].bincount(minlength=count)
    seen = torch.nn.functional.pad((1 - censored / left.clamp(min=1)).cumprod(0), (1, 0), value=1.0)[:-1]
    usable = seen > 0
    ends = torch.arange(count)
    happened = (times[:, None] <= ends) & (events[:, None] > 0)
    alive = (times[:, None] > ends) | ((times[:, None] == ends) & (events[:, None] == 0))
    at_event = torch.where(happened, 1 / seen[times][:, None], 0.0)
    at_end = torch.where(alive, 1 / seen.where(usable, 1.0), 0.0)
    found = survival.double().square() * at_event + (1 - survival.double()).square() * at_end
    return found[:, usable]


def concordance(predicted: Tensor, times: Tensor, events: Tensor) -> tuple[float, float]:
    """Harrell's concordance of predicted times with what was seen, and its standard error.

    It is the share of pairs in the right order among those of which one is known to have had the event first. Equal
    predictions count one half. Of two that end in one interval, a censored example is the later one. Both are NaN
    where there are no such pairs.

    Args:
        predicted: ``[N]``: larger for a later event.
        times: ``[N]``.
        events: ``[N]``.

    Source: Harrell et al., 1982, "Evaluating the yield of medical tests". The error is that of a ratio of U-statistics.

    >>> concordance(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 1]), torch.tensor([1, 1, 0]))[0]
    1.0
    """
    right, pairs = torch.zeros(2, len(times), dtype=torch.float64)
    known = events > 0
    for part in torch.split(known.nonzero()[:, 0], max(1, PAIRS // max(len(times), 1))):
        later = (times > times[part, None]) | ((times == times[part, None]) & ~known)
        agree = (predicted > predicted[part, None]).double() + (predicted == predicted[part, None]).double() / 2
        agree *= later
        for total, values in ((right, agree), (pairs, later.double())):
            total[part] += values.sum(1)
            total += values.sum(0)
    if not pairs.any():
        return math.nan, math.nan
    index = (right.sum() / pairs.sum()).item()
    influences = 2 * (right - index * pairs) / pairs.sum()
    n = len(influences)
    return index, math.sqrt(n / (n - 1) * influences.square().sum().item())
