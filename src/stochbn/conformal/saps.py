"""Sorted adaptive prediction sets: of the probabilities the largest alone counts, and for the others their rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochbn.conformal.base import is_number
from stochbn.conformal.sets import Sets, fitted, sorted_probabilities

__all__ = ["saps", "score"]


def score(probs: Tensor, drawn: Tensor | None, penalty: float, free: int) -> Tensor:
    """``[N, K]``: the largest probability, and the penalty for each rank beyond the first.

    Of a class's own last step, a random part is left out.
    """
    ordered, order = sorted_probabilities(probs)
    steps = torch.full_like(ordered, penalty)
    steps[:, 0] = ordered[:, 0]
    scores = steps.cumsum(1)
    if drawn is not None:
        scores = scores - drawn * steps
    return torch.empty_like(scores).scatter_(1, order, scores)


def saps(
    probs: Any,
    labels: Any,
    coverage: float = 0.9,
    *,
    penalty: float = 0.1,
    weights: Any = None,
    generator: torch.Generator | None = None,
    by_class: bool = False,
    groups: Any = None,
) -> Sets:
    """Sets by the ranks of classes and the largest probability alone, for networks whose small probabilities mislead.

    Sets are small where a network gives many classes a little probability each. The method is made for a `generator`:
    without one, examples of which the network is very sure may have empty sets.

    Args:
        probs: ``[N, K]``, predicted for held-out examples.
        labels: ``[N]``, their classes.
        coverage: how often sets are to hold the truth.
        penalty: what each rank beyond the first adds to a class's score; above 0. Choose it on other data.
        weights: as for `lac`.
        generator: as for `aps`.
        by_class: as for `lac`.
        groups: as for `lac`.

    Raises:
        TypeError, ValueError: as `lac`, or a penalty that is not above 0.

    Source: Huang et al., 2024, "Conformal prediction for deep classifier via label ranking".
    """
    if not is_number(penalty) or penalty <= 0:
        raise ValueError(f"expected a penalty above 0, got {penalty!r}")
    options = {"penalty": float(penalty), "generator": generator}
    return fitted("saps", probs, labels, coverage, weights, by_class, groups, **options)
