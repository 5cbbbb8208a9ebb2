"""Averages over draws, made as the draws come, of each object until it is done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochbn.tasks import Task

__all__ = ["Summary", "per_object"]


class Summary:
    """The average over draws of the objects of a batch, each until it is done.

    Args:
        task: what the draws are of.
        keep: also keep every draw.
        tolerance: the standard error at which an object is done; 0 for never.
        temperature: what logits are divided by.
        first: draws of every object before it is asked which are done. Fewer agree by chance too often: objects that
            are done too early seem more certain than they are, and the unknown is detected less well.
        step: draws from one such question to the next.
    """

    def __init__(
        self,
        task: Task,
        keep: bool = False,
        tolerance: float = 0.0,
        temperature: float = 1.0,
        first: int = 8,
        step: int = 4,
    ) -> None:
        self.task, self.tolerance, self.temperature = task, tolerance, temperature
        self.first, self.step = first, step
        self.count = 0
        self._kept: list[Tensor] | None = [] if keep else None
        self._done: list[tuple[Tensor, ...]] = []

    def add(self, raw: Tensor) -> None:
        """Add draws of the objects that are not done, ``[S, M, C, ...]``."""
        values, seconds = self.task.values(raw, self.temperature)
        if self._kept is not None:
            self._kept.append(self.task.keep(raw, self.temperature))
        made = len(values)
        total = self.count + made
        mean, second = (values.mean(0), seconds.mean(0)) if made > 1 else (values[0], seconds[0])
        squares = self._reduced((values - mean).square().sum(0)) if made > 1 and self._needed else None
        if not self.count:
            self.count, self.mean, self.second = total, mean, second
            self.objects = torch.arange(len(mean), device=mean.device)
            if self._needed:
                self.squares = self._reduced(torch.zeros_like(mean)) if squares is None else squares
            return
        change = mean - self.mean
        if self._needed:
            self.squares += self._reduced(change.square()) * (self.count * made / total)
            if squares is not None:
                self.squares += squares
        self.mean.add_(change, alpha=made / total)
        self.second.lerp_(second, made / total)
        self.count = total

    @property
    def _needed(self) -> bool:
        return self.tolerance > 0 or self.task.spread

    def _reduced(self, squares: Tensor) -> Tensor:
        return squares if self.task.spread else per_object(squares)

    def next(self, together: int) -> int:
        """How many draws to make in the next pass, if as many as `together` can be."""
        return min(together, self.first - self.count) if self.tolerance and self.count < self.first else together

    def waiting(self) -> Tensor | None:
        """``[M]``: which objects are not done, if it is time to ask and some are."""
        if not self.tolerance or self.count < self.first or self.count % self.step:
            return None
        waiting = (
            per_object(self.squares) > (self.tolerance * self.count) ** 2
            if self.task.spread
            else (self.squares > (self.tolerance * self.count) ** 2)
        )
        return None if bool(waiting.all()) else waiting

    def finish(self, waiting: Tensor) -> None:
        """The objects that are not waiting get no more draws."""
        done = ~waiting
        held = (self.objects, self.mean, self.second, *((self.squares,) if self._needed else ()))
        counts = torch.full((int(done.sum()),), self.count, device=done.device)
        self._done.append((*(values[done] for values in held), counts))
        held = tuple(values[waiting] for values in held)
        self.objects, self.mean, self.second = held[:3]
        if self._needed:
            self.squares = held[3]

    def prediction(self) -> Any:
        """What has been averaged, for all objects in their order.

        Raises:
            ValueError: an output was not finite.
        """
        held = (self.objects, self.mean, self.second, *((self.squares,) if self._needed else ()))
        counts = torch.full((len(self.objects),), self.count, device=self.mean.device)
        columns = [torch.cat(column) for column in zip(*self._done, (*held, counts), strict=True)]
        if self._done:
            order = columns[0].argsort()
            columns = [column[order] for column in columns]
        mean, second = columns[1:3]
        if not mean.isfinite().all():
            raise ValueError(
                "the network's output is not finite (NaN or infinity) for some of these objects; check the input "
                "for NaN and infinity"
            )
        variance = None
        if self.task.spread:
            variance = columns[3] / (columns[-1] - 1).clamp(min=1).view(-1, *[1] * (mean.ndim - 1))
        return self.task.prediction(mean, second, variance, torch.cat(self._kept) if self._kept is not None else None)


def per_object(squares: Tensor) -> Tensor:
    """``[N]``: squares ``[N, C, ...]`` summed over axis 1, with the mean over places of dense outputs.

    >>> per_object(torch.ones(2, 3)), per_object(torch.ones(2, 3, 4, 4))
    (tensor([3., 3.]), tensor([3., 3.]))
    """
    if squares.ndim > 1:
        squares = squares.sum(1)
    return squares.flatten(1).mean(1) if squares.ndim > 1 else squares
