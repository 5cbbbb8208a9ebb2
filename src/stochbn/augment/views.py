"""The augmented inputs of the draws of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Augment", "Ready", "Spread", "Views", "check_augment"]

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""A function that changes a batch ``[N, ...]`` at random, with a generator on the CPU."""


def check_augment(augment: Augment | None) -> None:
    """Check that an argument is an augmentation or None.

    Raises:
        TypeError: it is not callable.
    """
    if augment is not None and not callable(augment):
        raise TypeError(f"augment must be a function of a batch and a generator, got {augment!r:.60}")


class Views:
    """The inputs of the draws of a batch: the clean input for draw 0, and an augmented one for each other draw.

    The input of a draw depends on the seed, the number of the draw and the remaining examples, so it can be repeated.

    Args:
        augment: the augmentation.
        objects: the number of examples at first.
        seed: the seed of the augmentations.
        clean: whether draw 0 sees the input unchanged.
    """

    def __init__(self, augment: Augment, objects: int, seed: int, clean: bool = True) -> None:
        self._augment, self._seed, self._clean = augment, seed, clean
        self._spread = augment.spread(objects, self._generator(-1)) if isinstance(augment, Ready) else None

    def __call__(self, x: Tensor, draw: int) -> Tensor:
        """The augmented batch of a draw.

        Raises:
            TypeError, ValueError: the augmentation did not return a tensor of the same shape, type and device.
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
        """The raw outputs of a draw: dense ones ``[N, C, H, W]`` mapped back, others unchanged.

        Raises:
            ValueError: they are dense, and the augmentation has no inverse.
        """
        if values.ndim < 3 or values.ndim != x.ndim or values.shape[2:] != x.shape[2:] or (self._clean and not draw):
            return values
        return self.moved_back(values, draw)

    def moved_back(self, values: Tensor, draw: int) -> Tensor:
        """The dense outputs ``[N, C, H, W]`` of a draw, mapped back to the unchanged input.

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
        """Keep only some of the examples."""
        if self._spread is not None:
            self._spread.keep(mask)

    def _generator(self, draw: int) -> torch.Generator:
        return torch.Generator().manual_seed((self._seed + 1_000_003 * (draw + 1)) % 2**63)


class Spread(ABC):
    """Augmentations of a batch's examples that are spread evenly over their draws."""

    @abstractmethod
    def apply(self, x: Tensor, draw: int) -> Tensor:
        """The batch as a draw sees it."""

    @abstractmethod
    def undo(self, values: Tensor, draw: int) -> Tensor:
        """Dense outputs ``[N, C, H, W]``, mapped back to the positions of the input.

        Raises:
            ValueError: there is no inverse.
        """

    @abstractmethod
    def keep(self, mask: Tensor) -> None:
        """Keep only some of the examples."""


class Ready(ABC):
    """An augmentation that can be spread over draws; called as a function it makes a single one."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The batch, each example changed at random."""
        return self.spread(len(x), generator).apply(x, 0)

    @abstractmethod
    def spread(self, objects: int, generator: torch.Generator) -> Spread:
        """Augmentations for this many examples that are spread evenly over their draws."""
