"""Networks with random weights, and the plain passes over them that benchmarks count in.

It needs torch alone: versions.py runs it beside older versions of stochbn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

__all__ = ["plain_passes", "settle"]


def settle(model: nn.Module, data: Iterable[Tensor]) -> None:
    """Give a network the running averages of some mini-batches; it ends in evaluation mode."""
    model.train()
    with torch.no_grad():
        for images in data:
            model(images)
    model.eval()


def plain_passes(model: nn.Module, *batches: Tensor) -> Callable[[], None]:
    """A call that makes a plain pass over each of the batches."""

    def made() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    return made
