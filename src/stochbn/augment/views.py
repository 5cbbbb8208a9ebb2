"""What the draws of a batch see, by any augmentation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Augment", "Ready", "Spread", "Views", "check_augment"]

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""A random change of a batch ``[N, ...]``, of which the generator is on the CPU."""


def check_augment(augment: Augment | None) -> None:
    """Refuse what is no augmentation; None is none.

    Raises:
        TypeError: it cannot be called.
    """
    if augment is not None and not callable(augment):
        raise TypeError(f"augment must be a function of a batch and a generator, got {augment!r:.60}")


class Views:
    """What the draws of a batch see: draw 0 the clean input, each other one an augmentation of its own.

    What a draw sees depends on the seed, its number and the examples that are left, so it can be made again.

    Args:
        augment: the augmentation.
        objects: how many there are at first.
        seed: where the augmentations come from.
        clean: whether draw 0 sees the input as it is.
    """

    def __init__(self, augment: Augment, objects: int, seed: int, clean: bool = True) -> None:
        self._augment, self._seed, self._clean = augment, seed, clean
        self._spread = augment.spread(objects, self._generator(-1)) if isinstance(augment, Ready) else None

    def __call__(self, x: Tensor, draw: int) -> Tensor:
        """The batch as a draw sees it.

        Raises:
            TypeError, ValueError: the augmentation gave no tensor, or one of another shape, type or device.
        """
        if self._clean and not draw:
            return x
        if self._spread is not None:
            return self._spread.apply(x, draw)
        changed = self._augment(x, self._generator(draw))
        if not isinstance(changed, Tensor):
            raise TypeError(f"the augmentation must give a tensor, got {type(changed).__name__}")
        wanted, given = ((list(t.shape), t.dtype, t.device) for t in (x, changed))
        if wanted != given:
            raise ValueError(f"the augmentation must give a batch like the one it gets, {wanted}, got {given}")
        return changed

    def undo(self, values: Tensor, x: Tensor, draw: int) -> Tensor:
        """A draw's raw outputs: dense ones ``[N, C, H, W]`` moved back, others as they are.

        Raises:
            ValueError: they are dense, and the augmentation has no inverse.
        """
        if values.ndim < 3 or values.ndim != x.ndim or values.shape[2:] != x.shape[2:] or (self._clean and not draw):
            return values
        return self.moved_back(values, draw)

    def moved_back(self, values: Tensor, draw: int) -> Tensor:
        """A draw's dense outputs ``[N, C, H, W]`` where they are for the input as it is.

        Raises:
            ValueError: the augmentation has no inverse.
        """
        if self._spread is not None:
            return self._spread.undo(values, draw)
        inverse = getattr(self._augment, "inverse", None)
        if inverse is None:
            raise ValueError(
                "outputs have a place for each place of the input, so an augmentation that moves places needs an "
                "attribute inverse(values, generator) that moves them back; of the ready ones, flip has one"
            )
        restored: Tensor = inverse(values, self._generator(draw))
        return restored

    def keep(self, mask: Tensor) -> None:
        """Go on with some of the examples only."""
        if self._spread is not None:
            self._spread.keep(mask)

    def _generator(self, draw: int) -> torch.Generator:
        return torch.Generator().manual_seed((self._seed + 1_000_003 * (draw + 1)) % 2**63)


class Spread(ABC):
    """Changes of a batch's examples that are spread evenly over their draws."""

    @abstractmethod
    def apply(self, x: Tensor, draw: int) -> Tensor:
        """The batch as a draw sees it."""

    @abstractmethod
    def undo(self, values: Tensor, draw: int) -> Tensor:
        """Dense outputs ``[N, C, H, W]`` moved back to the places of the input.

        Raises:
            ValueError: that cannot be done.
        """

    @abstractmethod
    def keep(self, mask: Tensor) -> None:
        """Go on with some of the examples only."""


class Ready(ABC):
    """An augmentation that can be spread over draws; as a function it gives a single one."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The batch, each example changed at random."""
        return self.spread(len(x), generator).apply(x, 0)

    @abstractmethod
    def spread(self, objects: int, generator: torch.Generator) -> Spread:
        """Changes for so many examples that are spread evenly over their draws."""
