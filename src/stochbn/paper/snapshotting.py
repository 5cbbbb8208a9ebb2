"""Snapshots of the experiments' networks, each set in a folder of its own beside its network."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import stochbn
from stochbn.augment import Augment
from stochbn.paper.recipes import Recipe
from stochbn.predictive import Predictive
from stochbn.sources.named import Images

__all__ = ["OPTIMIZERS", "Cycles", "take_snapshots"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
}


@dataclass(frozen=True)
class Cycles:
    """The cycles of the learning rate that snapshots are taken in.

    Attributes:
        count: how many, so how many snapshots.
        epochs: passes over the training data in each.
        optimizer: its name in `OPTIMIZERS`.
        learning_rate: the highest one.
    """

    count: int = 3
    epochs: int = 2
    optimizer: str = "adam"
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if not 0 < self.learning_rate < float("inf") or min(self.count, self.epochs) < 1:
            raise ValueError(
                "expected a positive learning rate and at least one epoch and one cycle, got "
                f"{self.learning_rate}, {self.epochs} and {self.count}"
            )

    @classmethod
    def of(cls, count: int, description: str) -> Cycles:
        """So many cycles of a description, ``OPTIMIZER:RATE:EPOCHS``.

        Raises:
            ValueError: it is none.

        >>> Cycles.of(3, "sgd:0.05:2")
        Cycles(count=3, epochs=2, optimizer='sgd', learning_rate=0.05)
        """
        try:
            optimizer, rate, epochs = description.split(":")
            return cls(count, int(epochs), optimizer, float(rate))
        except ValueError as error:
            raise ValueError(
                f"a cycle is OPTIMIZER:RATE:EPOCHS, such as adam:0.001:2, got {description!r:.40}"
            ) from error

    @property
    def name(self) -> str:
        """What tells it from others, for the name of a folder."""
        return f"{self.count}x{self.epochs}-{self.optimizer}-{self.learning_rate:g}"


class Shuffled:
    """Images in mini-batches, in another random order each time; `set_epoch` says which order comes next."""

    def __init__(self, images: Images, batch_size: int, seed: int) -> None:
        self._images, self._batch_size, self._seed = images, batch_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the images, counted from 0, is the next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._images) // self._batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._epoch += 1
        for inputs, labels in self._images.shuffled(self._seed + self._epoch).batches(self._batch_size):
            if len(labels) == self._batch_size:
                yield inputs, labels


def take_snapshots(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    cycles: Cycles,
    *,
    seed: int,
    augment: Augment | None,
    folder: Path | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Predictive]:
    """The snapshots of a network with their posteriors, trained in the mini-batches and number type of its recipe.

    Args:
        model: the network.
        images: its training data.
        recipe: how it was trained.
        cycles: how often the learning rate falls, and how far.
        seed: where the order of the images and their augmentations come from.
        augment: how training images are changed at random; None as they are.
        folder: where the snapshots are kept, and found again.
        progress: called with the number of steps done and of all.
    """
    half = recipe.precision == "bf16-mixed"
    device = next(model.parameters()).device.type
    arithmetic: Any = torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()
    with arithmetic:
        ensemble = stochbn.snapshots(
            model,
            Shuffled(images, recipe.batch_size, 1000 * seed),
            cross_entropy,
            count=cycles.count,
            epochs=cycles.epochs,
            optimizer=functools.partial(OPTIMIZERS[cycles.optimizer], lr=cycles.learning_rate),
            batch_size=recipe.statistics_batch,
            augment=augment,
            folder=None if folder is None else folder / cycles.name,
            seed=seed,
            progress=progress,
        )
    return [member for member in ensemble.members if isinstance(member, Predictive)]
