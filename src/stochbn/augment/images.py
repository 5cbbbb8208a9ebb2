"""Ready augmentations of images, spread evenly over the draws of an example."""

from __future__ import annotations

import torch
from torch import Tensor

from stochbn.augment.views import Ready, Spread

__all__ = ["flip", "reflected", "shift"]

STEPS = (0.7548776662466927, 0.5698402909980532)
"""Steps of a sequence that fills the square evenly, whatever its length: powers of the inverse plastic number."""


class flip(Ready):  # noqa: N801 - it is used as a function: flip()
    """Horizontal flips of images ``[N, C, H, W]``: of each object, half of its draws.

    Two draws in a row are alike, as the statistics of one are those of the other mirrored, and the next two are the
    opposite. Dense outputs are flipped back.
    """

    def spread(self, objects: int, generator: torch.Generator) -> Spread:
        """Half of the objects begin with a flip."""
        return _Flips(torch.rand(objects, generator=generator) < 0.5)

    def __repr__(self) -> str:
        return "flip()"

    def __str__(self) -> str:
        return "flip"


class shift(Ready):  # noqa: N801
    """Shifts of images ``[N, C, H, W]`` by up to some pixels along both axes, filled by reflection.

    The shifts of an object's draws fill the square of all shifts evenly, whatever the number of draws.

    Args:
        pixels: how far, at least 1; as the random crops of training have it.

    Raises:
        ValueError: `pixels` is not a whole number of at least 1.
    """

    def __init__(self, pixels: int) -> None:
        if not isinstance(pixels, int) or isinstance(pixels, bool) or pixels < 1:
            raise ValueError(f"pixels must be a whole number of at least 1, got {pixels!r}")
        self.pixels = pixels

    def spread(self, objects: int, generator: torch.Generator) -> Spread:
        """Each object's sequence of shifts begins somewhere of its own."""
        return _Shifts(torch.rand(objects, 2, generator=generator, dtype=torch.float64), self.pixels)

    def __repr__(self) -> str:
        return f"shift({self.pixels})"

    def __str__(self) -> str:
        return f"shift:{self.pixels}"


class _Flips(Spread):
    def __init__(self, first: Tensor) -> None:
        self._first = first

    def apply(self, x: Tensor, draw: int) -> Tensor:
        _check_images(x, "flip")
        return self._flipped(x, draw)

    def undo(self, values: Tensor, draw: int) -> Tensor:
        return self._flipped(values, draw)

    def keep(self, mask: Tensor) -> None:
        self._first = self._first[mask.cpu()]

    def _flipped(self, x: Tensor, draw: int) -> Tensor:
        flipped = (self._first ^ bool(draw // 2 % 2)).to(x.device)
        return torch.where(flipped.view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)


class _Shifts(Spread):
    def __init__(self, first: Tensor, pixels: int) -> None:
        self._first, self._pixels = first, pixels

    def apply(self, x: Tensor, draw: int) -> Tensor:
        _check_images(x, "shift")
        height, width = x.shape[2:]
        if min(height, width) <= self._pixels:
            raise ValueError(f"shift({self._pixels}) needs larger images than {height}x{width}")
        steps = self._first.new_tensor(STEPS)
        moves = ((self._first + draw * steps).frac() * (2 * self._pixels + 1)).floor().long() - self._pixels
        down, right = moves.to(x.device).unbind(1)
        rows = reflected(torch.arange(height, device=x.device) + down[:, None], height)
        columns = reflected(torch.arange(width, device=x.device) + right[:, None], width)
        index = torch.arange(len(x), device=x.device)[:, None, None]
        moved = x[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return moved.contiguous(memory_format=_layout(x))

    def undo(self, values: Tensor, draw: int) -> Tensor:
        raise ValueError(
            "shift has no inverse: what is moved out of the picture has no outputs; for dense outputs use flip()"
        )

    def keep(self, mask: Tensor) -> None:
        self._first = self._first[mask.cpu()]


def _check_images(x: Tensor, name: str) -> None:
    if x.ndim != 4:
        raise ValueError(f"{name} is for images [N, C, H, W], got a batch of shape {list(x.shape)}")


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def reflected(position: Tensor, size: int) -> Tensor:
    """Positions outside an axis, mirrored at its first and last element."""
    position = position.abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position)
