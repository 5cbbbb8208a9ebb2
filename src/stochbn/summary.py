"""Averages over draws, updated with each draw, until sampling stops for each example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochbn.stopping import Spread, Stopping
from stochbn.tasks import Task

__all__ = ["Summary", "per_object"]


class Summary:
    """Averages draws for the examples of a batch, until sampling stops for each.

    Args:
        task: the task of the outputs.
        keep: also keep every draw.
        stopping: decides which examples need more draws; None: all of them, until the end.
        temperature: what logits are divided by.
    """

    def __init__(
        self, task: Task, keep: bool = False, stopping: Stopping | None = None, temperature: float = 1.0
    ) -> None:
        self.task, self.stopping, self.temperature = task, stopping, temperature
        self.count = 0
        self._kept: list[Tensor] | None = [] if keep else None
        self._done: list[tuple[Tensor, ...]] = []

    def add(self, raw: Tensor) -> None:
        """Add draws of the examples that need more, ``[S, M, C, ...]``; whole pairs, if sampling may stop early."""
        values, seconds = self.task.values(raw, self.temperature)
        if self._kept is not None:
            self._kept.append(self.task.keep(raw, self.temperature))
        made, mean, second = len(values), values.mean(0), seconds.mean(0)
        if not self.count:
            self.mean, self.second = torch.zeros_like(mean), torch.zeros_like(second)
            zeros = per_object(self.mean)
            self.squares = torch.zeros_like(mean if self.task.spread else zeros)
            self.objects = torch.arange(len(mean), device=mean.device)
            self.spread = Spread(zeros.clone(), zeros.clone(), zeros.clone())
        total = self.count + made
        change = mean - self.mean
        if self.task.spread or self.stopping is not None:
            between = change.square() * (self.count * made / total)
            squares = (values - mean).square().sum(0) + between
            if self.task.spread:
                self.squares += squares
            if self.stopping is not None:
                pairs = values.reshape(made // 2, 2, *mean.shape).mean(1)
                of_pairs = (pairs - mean).square().sum(0) + between / 2
                self.spread.add(self.objects, made, per_object(squares), per_object(of_pairs))
        self.mean.add_(change, alpha=made / total)
        self.second.lerp_(second, made / total)
        self.count = total

    def next(self, together: int) -> int:
        """The number of draws to make next; a pass makes `together` draws."""
        return together if self.stopping is None else self.stopping.next(self.count, together)

    def waiting(self) -> Tensor | None:
        """Which examples need more draws, ``[M]``; None if it is not time to check, or if all do."""
        if self.stopping is None or not self.stopping.asks(self.count):
            return None
        waiting = self.stopping.waiting(self.spread)[self.objects]
        return None if bool(waiting.all()) else waiting

    def finish(self, waiting: Tensor) -> None:
        """Stop sampling for all examples that are not waiting."""
        self._done.append(self._held(~waiting))
        self.objects, self.mean, self.second, self.squares = (
            values[waiting] for values in (self.objects, self.mean, self.second, self.squares)
        )

    def _held(self, which: Tensor | slice = slice(None)) -> tuple[Tensor, ...]:
        """Positions, means and variance over draws of some of the examples that still get draws."""
        variance = self.squares[which] / max(self.count - 1, 1)
        return self.objects[which], self.mean[which], self.second[which], variance

    def prediction(self) -> Any:
        """Make the prediction for all examples, in their original order.

        Raises:
            ValueError: an output is not finite.
        """
        objects, *columns = (torch.cat(column) for column in zip(*self._done, self._held(), strict=True))
        if self._done:
            order = objects.argsort()
            columns = [column[order] for column in columns]
        mean, second, variance = columns
        if not mean.isfinite().all():
            raise ValueError(
                "the network's output is not finite (NaN or infinity) for some of these examples; check the input "
                "for NaN and infinity"
            )
        kept = None if self._kept is None else torch.cat(self._kept)
        return self.task.prediction(mean, second, variance if self.task.spread else None, kept)


def per_object(squares: Tensor) -> Tensor:
    """Sum ``[N, C, ...]`` over axis 1, and take the mean over the positions of dense outputs: ``[N]``.

    >>> per_object(torch.ones(2, 3)), per_object(torch.ones(2, 3, 4, 4))
    (tensor([3., 3.]), tensor([3., 3.]))
    """
    if squares.ndim > 1:
        squares = squares.sum(1)
    return squares.flatten(1).mean(1) if squares.ndim > 1 else squares
