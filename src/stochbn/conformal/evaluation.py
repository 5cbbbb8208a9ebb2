"""How often sets of classes hold the truth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochbn.metrics import checked_predictions

__all__ = ["evaluate"]


def evaluate(sets: Tensor, labels: Any) -> dict[str, float]:
    """How often sets hold the truth, and how large they are.

    Args:
        sets: ``[N, K]``, as `stochbn.conformal.Sets` gives them.
        labels: ``[N]``.

    Returns:
        ``coverage``: the share of examples whose class is in their set. ``worst_class_coverage``: that of the class for
        which it is lowest. ``size``: the mean number of classes in a set. ``empty``: the share of empty sets.

    Raises:
        TypeError, ValueError: no sets ``[N, K]`` of truth values, or labels that do not fit.

    >>> evaluate(torch.tensor([[True, True], [False, True]]), [0, 0])
    {'coverage': 0.5, 'worst_class_coverage': 0.5, 'size': 1.5, 'empty': 0.0}
    """
    if not isinstance(sets, Tensor) or sets.dtype != torch.bool or sets.ndim != 2:
        raise TypeError("expected sets [N, K] of truth values, as stochbn.conformal makes them")
    uniform = torch.full(sets.shape, 1 / max(sets.shape[1], 1), dtype=torch.float64, device=sets.device)
    _, labels = checked_predictions(uniform, labels)
    held = sets.gather(1, labels[:, None])[:, 0].double()
    sizes = sets.sum(1).double()
    by_class = [held[labels == label].mean().item() for label in labels.unique().tolist()]
    return {
        "coverage": held.mean().item(),
        "worst_class_coverage": min(by_class),
        "size": sizes.mean().item(),
        "empty": (sizes == 0).double().mean().item(),
    }
