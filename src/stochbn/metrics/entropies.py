"""The entropy of probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["entropy"]


def entropy(probs: Tensor, axis: int = 1) -> Tensor:
    """Compute the entropy in nats over the axis of the classes, from ``[N, K, ...]`` to ``[N, ...]``.

    >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor([0.6931, 0.0000])
    """
    total: Tensor = torch.special.entr(probs).sum(axis)
    return total
