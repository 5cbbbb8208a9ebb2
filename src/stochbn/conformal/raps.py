"""Regularised adaptive prediction sets: a penalty keeps sets small where there are many classes."""

from __future__ import annotations

from typing import Any

import torch

from stochbn.conformal.aps import score
from stochbn.conformal.base import is_number
from stochbn.conformal.sets import Sets, fitted

__all__ = ["raps", "score"]


def raps(
    probs: Any,
    labels: Any,
    coverage: float = 0.9,
    *,
    penalty: float = 0.01,
    free: int = 5,
    weights: Any = None,
    generator: torch.Generator | None = None,
    by_class: bool = False,
    groups: Any = None,
) -> Sets:
    """As `aps`, with a penalty on classes of a low rank, which keeps sets small where there are many classes.

    Args:
        probs: ``[N, K]``, predicted for held-out examples.
        labels: ``[N]``, their classes.
        coverage: how often sets are to hold the truth.
        penalty: what each rank beyond the free ones adds to a class's score; at least 0.
        free: how many of the most probable classes have no penalty.
        weights: as for `lac`.
        generator: as for `aps`.
        by_class: as for `lac`.
        groups: as for `lac`.

    Raises:
        TypeError, ValueError: as `lac`, or a negative penalty.

    Source: Angelopoulos et al., 2021, "Uncertainty sets for image classifiers using conformal prediction".
    """
    if not is_number(penalty) or penalty < 0 or type(free) is not int or free < 0:
        raise ValueError(f"expected a penalty and a number of free ranks of at least 0, got {penalty!r} and {free!r}")
    options = {"penalty": float(penalty), "free": free, "generator": generator}
    return fitted("raps", probs, labels, coverage, weights, by_class, groups, **options)
