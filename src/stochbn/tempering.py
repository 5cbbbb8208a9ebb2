"""Probabilities at another temperature, and the best one for given labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["best_temperature", "blocks", "cross_validated", "tempered"]

BLOCK = 2**22
"""The number of probabilities that are converted to float64 at a time: 32 MB."""

PARTS = 5
"""The number of parts in a cross-validation. The temperature of each part is chosen on the others."""


def blocks(rows: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive examples with their labels, so many that float64 copies of them stay small."""
    size = max(1, BLOCK // rows.shape[1])
    return zip(torch.split(rows, size), torch.split(labels, size), strict=True)


def cross_validated(logs: Tensor, labels: Tensor) -> Tensor:
    """The negative log-likelihood of every example, ``[N]``, at the best temperature for the other parts.

    The parts are random and always the same.

    Raises:
        ValueError: fewer than 10 examples.
    """
    if len(labels) < 10:
        raise ValueError(f"expected at least 10 examples to cross-validate the temperature on, got {len(labels)}")
    found = logs.new_empty(len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(labels.device)
    for part in order.tensor_split(PARTS):
        rest = torch.ones_like(labels, dtype=torch.bool).index_fill_(0, part, False)
        temperature = best_temperature(logs[rest], labels[rest])
        found[part] = tempered(logs[part], labels[part], 1 / temperature)
    return found


def tempered(logs: Tensor, labels: Tensor, power: float) -> Tensor:
    """The negative log-likelihoods ``[N]`` of probabilities that are raised to a power and normalised again."""
    parts = blocks(logs, labels)
    return -torch.cat([(power * part).log_softmax(1).gather(1, chosen[:, None])[:, 0] for part, chosen in parts])


def best_temperature(logs: Tensor, labels: Tensor) -> float:
    """The temperature from 0.05 to 20 with the lowest NLL, which is convex in its inverse."""
    return 1 / _lowest(lambda power: tempered(logs, labels, power).mean().item(), 0.05, 20.0)


def _lowest(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function of one valley is lowest between two positive numbers, to 1e-4 of it: golden-section search."""
    golden = (math.sqrt(5) - 1) / 2
    low, high = math.log(low), math.log(high)
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = function(math.exp(left)), function(math.exp(right))
    while high - low > 1e-4:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = function(math.exp(left))
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = function(math.exp(right))
    return math.exp((low + high) / 2)
