"""Least ambiguous sets: all classes above one probability."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stochbn.conformal.sets import Sets, fitted

__all__ = ["lac", "score"]


def score(probs: Tensor, drawn: Tensor | None, penalty: float, free: int) -> Tensor:
    """``[N, K]``: one minus the probability of each class."""
    return 1 - probs


def lac(
    probs: Any,
    labels: Any,
    coverage: float = 0.9,
    *,
    weights: Any = None,
    by_class: bool = False,
    groups: Any = None,
) -> Sets:
    """The smallest sets on average, of all classes above one probability; the difficult examples' are the poorest.

    Args:
        probs: ``[N, K]``, predicted for held-out examples.
        labels: ``[N]``, their classes.
        coverage: how often sets are to hold the truth.
        weights: how many times as frequent each class is in new data as among the held-out examples, ``[K]``, where the
            mix of classes alone has changed. Sets hold the truth as often as asked for in the new mix if it is known
            (Tibshirani et al., 2019; Podkopaev and Ramdas, 2021). ``torch.tensor(a.mix) / torch.tensor(a.usual)`` of a
            posterior's ``adaptation`` is an estimate, which confusions of classes bias. None is the same mix.
        by_class: a threshold for each class, from the held-out examples of that class alone, so that sets hold the
            truth as often as asked for in every class (Vovk, 2013), whatever the mix. Each class needs enough examples.
        groups: ``[N]``, the group of each held-out example, such as its hospital or camera: a threshold for each group,
            so that sets hold the truth as often as asked for in every group (Mondrian sets). The sets are then called
            with the groups of the new examples. Each group needs enough examples.

    Raises:
        TypeError, ValueError: no probabilities, labels, weights or groups that do not fit, too few examples for the
            coverage, or two of `weights`, `by_class` and `groups`.

    Source: Sadinle, Lei and Wasserman, 2019, "Least ambiguous set-valued classifiers".

    >>> lac([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.2, 0.3, 0.5]], [0, 1, 2], 0.75)([[0.5, 0.4, 0.1]])
    tensor([[ True, False, False]])
    """
    return fitted("lac", probs, labels, coverage, weights, by_class, groups)
