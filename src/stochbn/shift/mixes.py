"""What a network's outputs say of the mix of a group of examples: the shares of classes, labels, or bins of numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochbn.tasks import Task

__all__ = ["binned", "edges_of", "mixes_of"]

BINS = 10
MOST_NUMBERS = 4
"""Numbers that a network may predict for an example to have bins; more are no mix."""


def mixes_of(task: Task, output: Any) -> Tensor:
    """``[N, K]``, float32: what each example adds to the mix: shares of classes or labels, or numbers to be `binned`.

    Args:
        task: what the output means.
        output: the network's.

    Raises:
        TypeError, ValueError: the task cannot read the output.
    """
    values = task.mix(task.raw(output)).detach().float().cpu()
    return values.flatten(2).mean(2) if values.ndim > 2 else values


def binned(values: Tensor, edges: Tensor) -> Tensor:
    """``[N, 10 numbers]``: in which bins the numbers ``[N, numbers]`` are; ``[N, 0]`` where there are no bins."""
    if not len(edges) or values.shape[1] != len(edges):
        return values[:, :0]
    bins = torch.stack([torch.bucketize(values[:, d].contiguous(), edges[d]) for d in range(len(edges))], 1)
    return torch.nn.functional.one_hot(bins, BINS).flatten(1).float()


def edges_of(values: Tensor) -> Tensor:
    """``[numbers, 9]``: edges of bins with as many of these examples each; ``[0, 9]`` for too many numbers."""
    if not 0 < values.shape[1] <= MOST_NUMBERS:
        return torch.empty(0, BINS - 1, dtype=torch.float32)
    shares = torch.arange(1, BINS, dtype=torch.float32) / BINS
    return values.quantile(shares, dim=0).T.contiguous()
