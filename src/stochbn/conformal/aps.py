"""Adaptive prediction sets: the most probable classes until their sum is a threshold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochbn.conformal.sets import Sets, fitted, sorted_probabilities

__all__ = ["aps", "score"]


def score(probs: Tensor, drawn: Tensor | None, penalty: float, free: int) -> Tensor:
    """``[N, K]``: the probability of each class and of all more probable ones; of its own, a random part is left out.

    Classes of a rank beyond the `free` ones get the penalty for each rank.
    """
    ordered, order = sorted_probabilities(probs)
    scores = ordered.cumsum(1)
    if drawn is not None:
        scores = scores - drawn * ordered
    ranks = torch.arange(1, probs.shape[1] + 1, device=probs.device, dtype=probs.dtype)
    scores = scores + penalty * (ranks - free).clamp(min=0)
    return torch.empty_like(scores).scatter_(1, order, scores)


def aps(
    probs: Any,
    labels: Any,
    coverage: float = 0.9,
    *,
    weights: Any = None,
    generator: torch.Generator | None = None,
    by_class: bool = False,
    groups: Any = None,
) -> Sets:
    """Sets that adapt to how difficult an example is: the most probable classes until their sum is the threshold.

    Args:
        probs: ``[N, K]``, predicted for held-out examples.
        labels: ``[N]``, their classes.
        coverage: how often sets are to hold the truth.
        weights: as for `lac`.
        generator: has sets randomised, so that the coverage is as asked for and not above; held-out examples take from
            it first, then each call.
        by_class: as for `lac`.
        groups: as for `lac`.

    Raises:
        TypeError, ValueError: as `lac`.

    Source: Romano, Sesia and Candes, 2020, "Classification with valid and adaptive coverage".
    """
    return fitted("aps", probs, labels, coverage, weights, by_class, groups, generator=generator)
