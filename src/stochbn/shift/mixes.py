"""What a network's outputs say of the mix of a group of examples: the shares of classes, labels, or bins of numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochbn.tasks import Task

__all__ = ["edges_of", "mixes_of"]

BINS = 10
MOST_NUMBERS = 4
"""Numbers that a network may predict for an example to have bins; more are no mix."""


def mixes_of(task: Task, output: Any, edges: Tensor | None = None) -> Tensor:
    """``[N, K]``, float32: what each example adds to the mix; K is 0 where the task has none.

    Args:
        task: what the output means.
        output: the network's.
        edges: ``[numbers, 9]``, between the bins of a regression's numbers.

    Raises:
        TypeError, ValueError: the task cannot read the output.
    """
    values = task.mix(task.raw(output)).detach().float().cpu()
    values = values.flatten(2).mean(2) if values.ndim > 2 else values
    if not task.binned:
        return values
    if edges is None or not len(edges):
        return values[:, :0]
    bins = torch.stack([torch.bucketize(values[:, d].contiguous(), edges[d]) for d in range(len(edges))], 1)
    return torch.nn.functional.one_hot(bins, BINS).flatten(1).float()


def edges_of(task: Task, output: Any) -> Tensor:
    """``[numbers, 9]``: edges of bins that hold as many of these examples each; ``[0, 9]`` where there are no bins."""
    empty = torch.empty(0, BINS - 1)
    if not task.binned:
        return empty
    values = task.mix(task.raw(output)).detach().float().cpu()
    values = values.flatten(2).mean(2) if values.ndim > 2 else values
    if values.shape[1] > MOST_NUMBERS:
        return empty
    return values.quantile(torch.arange(1, BINS) / BINS, dim=0).T.contiguous()
