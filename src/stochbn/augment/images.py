"""Augmentations of images, spread evenly over the draws of an example."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torch.quasirandom import SobolEngine

from stochbn.augment.views import Ready, Spread

__all__ = ["colour", "crop", "flip", "reflected", "shift"]

STEPS = (0.7548776662466927, 0.5698402909980532)
"""Steps of a sequence that fills the square evenly at any length: powers of the inverse plastic number."""
CROPS, COLOURS = slice(0, 4), slice(4, 7)
"""Separate dimensions of a Sobol sequence, so that crops and colours of a chain are not correlated."""
ASPECT = 4 / 3
"""The largest ratio of a crop's aspect ratio to that of the image; the smallest is its inverse."""


class flip(Ready):  # noqa: N801 - it is used as a function: flip()
    """Flip images ``[N, C, H, W]`` horizontally, in half of the draws of each example.

    The two draws of an antithetic pair have the same flip, and the next pair has the opposite one. Dense outputs are
    flipped back.
    """

    def spread(self, objects: int, generator: torch.Generator) -> Spread:
        """Half of the examples begin with a flip."""
        return _Flips(torch.rand(objects, generator=generator) < 0.5)

    def __repr__(self) -> str:
        return "flip()"

    def __str__(self) -> str:
        return "flip"


class shift(Ready):  # noqa: N801
    """Shift images ``[N, C, H, W]`` by up to some pixels along both axes, filled by reflection.

    The shifts of an example's draws fill the square of all shifts evenly, for any number of draws.

    Args:
        pixels: the largest shift, at least 1, such as the padding of random crops in training.

    Raises:
        ValueError: `pixels` is not a whole number of at least 1.
    """

    def __init__(self, pixels: int) -> None:
        if not isinstance(pixels, int) or isinstance(pixels, bool) or pixels < 1:
            raise ValueError(f"pixels must be a whole number of at least 1, got {pixels!r}")
        self.pixels = pixels

    def spread(self, objects: int, generator: torch.Generator) -> Spread:
        """Each example's sequence of shifts begins somewhere of its own."""
        return _Shifts(_starts(objects, 2, generator), self.pixels)

    def __repr__(self) -> str:
        return f"shift({self.pixels})"

    def __str__(self) -> str:
        return f"shift:{self.pixels}"


class crop(Ready):  # noqa: N801
    """Crop images ``[N, C, H, W]`` at random, and resize the crops to the size of the image by bilinear interpolation.

    The area of a crop is uniform from `smallest` to 1. The ratio of width to height is 3/4 to 4/3 of the image's. The
    position is uniform. The crops of an example's draws are spread evenly over all of these.

    Args:
        smallest: the smallest share of the image's area in a crop, between 0 and 1.

    Raises:
        ValueError: `smallest` is not such a number.

    Source: Szegedy et al., 2015, "Going deeper with convolutions", arXiv 1409.4842.
    """

    def __init__(self, smallest: float = 0.5) -> None:
        self.smallest = _share("smallest", smallest)

    def spread(self, objects: int, generator: torch.Generator) -> Spread:
        """Each example's sequence of crops begins somewhere of its own."""
        return _Crops(_starts(objects, 4, generator), CROPS, self.smallest)

    def __repr__(self) -> str:
        return f"crop({self.smallest})"

    def __str__(self) -> str:
        return f"crop:{self.smallest}"


class colour(Ready):  # noqa: N801
    """Change contrast, brightness and, with several channels, the colour balance of images ``[N, C, H, W]``.

    Contrast changes by a factor within `strength` of 1. Brightness and colour balance change by up to `strength`
    standard deviations of each channel of the image. So the change is the same with normalised inputs. Values are not
    clipped.

    Args:
        strength: the strength of the changes, between 0 and 1.

    Raises:
        ValueError: `strength` is not such a number.
    """

    def __init__(self, strength: float = 0.1) -> None:
        self.strength = _share("strength", strength)

    def spread(self, objects: int, generator: torch.Generator) -> Spread:
        """Each example's sequence of changes begins somewhere of its own."""
        return _Colours(_starts(objects, 3, generator), COLOURS, self.strength)

    def __repr__(self) -> str:
        return f"colour({self.strength})"

    def __str__(self) -> str:
        return f"colour:{self.strength}"


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


class _Even(Spread):
    """Changes by numbers in [0, 1) that fill the cube evenly: a Sobol sequence, shifted for each example."""

    def __init__(self, first: Tensor, dimensions: slice, amount: float) -> None:
        self._first, self._dimensions, self._amount = first, dimensions, amount

    def numbers(self, draw: int) -> Tensor:
        """``[D, N]``: the numbers of a draw, in float64."""
        sequence: Any = SobolEngine  # which has no types
        point: Tensor = sequence(COLOURS.stop).fast_forward(draw).draw(1, dtype=torch.float64)
        return (self._first + point[0, self._dimensions]).frac().T

    @abstractmethod
    def apply(self, x: Tensor, draw: int) -> Tensor:
        """The batch as a draw sees it."""

    def keep(self, mask: Tensor) -> None:
        self._first = self._first[mask.cpu()]


class _Crops(_Even):
    def apply(self, x: Tensor, draw: int) -> Tensor:
        _check_images(x, "crop")
        grid = _grid(self.boxes(draw).float().to(x.device), x)
        values = x if x.is_floating_point() else x.float()
        found = grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)
        found = found if x.is_floating_point() else found.round()
        return found.to(x.dtype).contiguous(memory_format=_layout(x))

    def boxes(self, draw: int) -> Tensor:
        """``[4, N]``: top, left, height and width of each crop, as shares of the image's."""
        area, ratio, down, right = self.numbers(draw)
        area = self._amount + (1 - self._amount) * area
        ratio = ((2 * ratio - 1) * math.log(ASPECT)).exp()
        height, width = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
        return torch.stack([down * (1 - height), right * (1 - width), height, width])

    def undo(self, values: Tensor, draw: int) -> Tensor:
        raise ValueError(
            "crop has no inverse: what is outside of it has no outputs; for dense outputs use flip() and colour()"
        )


class _Colours(_Even):
    def apply(self, x: Tensor, draw: int) -> Tensor:
        _check_images(x, "colour")
        if not x.is_floating_point():
            raise ValueError(f"colour is for images in floating point, as networks take them, got {x.dtype}")
        contrast, brightness, angle = self.numbers(draw).to(x.device, x.dtype)
        channels = torch.arange(x.shape[1], device=x.device) / x.shape[1]
        balance = (2 * math.pi * (angle[:, None] + channels)).cos() if len(channels) > 1 else torch.zeros_like(channels)
        change = self._amount * (2 * brightness[:, None] - 1 + balance)
        std, mean = torch.std_mean(x, (2, 3), correction=0)
        factor = 1 + self._amount * (2 * contrast[:, None] - 1)
        added = (1 - factor) * mean + change * std
        found: Tensor = x * factor[..., None, None].to(x.dtype) + added[..., None, None].to(x.dtype)
        return found

    def undo(self, values: Tensor, draw: int) -> Tensor:
        return values


def _grid(boxes: Tensor, x: Tensor) -> Tensor:
    """``[N, H, W, 2]``: where each place of the boxes lies, for `grid_sample`."""
    top, left, height, width = boxes
    rows, columns = ((torch.arange(size, device=x.device) + 0.5) / size for size in x.shape[2:])
    down = 2 * (top[:, None] + height[:, None] * rows) - 1
    right = 2 * (left[:, None] + width[:, None] * columns) - 1
    shape = len(x), x.shape[2], x.shape[3]
    grid = torch.stack([right[:, None, :].expand(shape), down[:, :, None].expand(shape)], -1)
    return grid.to(x.dtype) if x.is_floating_point() else grid


def _starts(objects: int, dimensions: int, generator: torch.Generator) -> Tensor:
    return torch.rand(objects, dimensions, generator=generator, dtype=torch.float64)


def _share(name: str, value: float) -> float:
    """A number between 0 and 1.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1:
        raise ValueError(f"{name} must be a number between 0 and 1, got {value!r}")
    return float(value)


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
