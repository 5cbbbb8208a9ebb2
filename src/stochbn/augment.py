"""Random augmentations of the input, another one in every draw: `Predictive(..., augment=...)`.

An augmentation is any function ``fn(x, generator)`` that gives a randomly changed batch of the same shape, each object
changed in its own way. Those here are also spread evenly over the draws of an object, so that fewer draws serve. A
transform of torchvision, which draws from PyTorch's global generator, becomes one by::

    lambda x, generator: torch.stack([transform(image) for image in x])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Augment", "Spread", "Views", "chain", "check_augment", "flip", "named", "reflected", "shift", "turns"]

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""A random change of a batch ``[N, ...]``, of which the generator is on the CPU."""
STEPS = (0.7548776662466927, 0.5698402909980532)
"""Steps of a sequence that fills the square evenly, whatever its length: powers of the inverse plastic number."""


def check_augment(augment: Augment | None) -> None:
    """Refuse what is no augmentation; None is none.

    Raises:
        TypeError: it cannot be called.
    """
    if augment is not None and not callable(augment):
        raise TypeError(f"augment must be a function of a batch and a generator, got {augment!r:.60}")


class Views:
    """What the draws of a batch see: draw 0 the clean input, each other one an augmentation of its own.

    What a draw sees depends on the seed, its number and the objects that are left, so it can be made again.

    Args:
        augment: the augmentation.
        objects: how many there are at first.
        seed: where the augmentations come from.
        clean: whether draw 0 sees the input as it is.
    """

    def __init__(self, augment: Augment, objects: int, seed: int, clean: bool = True) -> None:
        self._augment, self._seed, self._clean = augment, seed, clean
        self._spread = augment.spread(objects, self._generator(-1)) if isinstance(augment, _Ready) else None

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
        """Go on with some of the objects only."""
        if self._spread is not None:
            self._spread.keep(mask)

    def _generator(self, draw: int) -> torch.Generator:
        return torch.Generator().manual_seed((self._seed + 1_000_003 * (draw + 1)) % 2**63)


class Spread(ABC):
    """Changes of a batch's objects that are spread evenly over their draws."""

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
        """Go on with some of the objects only."""


class _Ready(ABC):
    """An augmentation that can be spread over draws; as a function it gives a single one."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The batch, each object changed at random."""
        return self.spread(len(x), generator).apply(x, 0)

    @abstractmethod
    def spread(self, objects: int, generator: torch.Generator) -> Spread:
        """Changes for so many objects that are spread evenly over their draws."""


class flip(_Ready):  # noqa: N801 - it is used as a function: flip()
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


class shift(_Ready):  # noqa: N801
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


class chain(_Ready):  # noqa: N801
    """Several of the ready augmentations, one after another.

    Raises:
        TypeError: one of them is not of this module. Chain others in a function of your own.
    """

    def __init__(self, *augmentations: Any) -> None:
        for one in augmentations:
            if not isinstance(one, _Ready):
                raise TypeError(
                    f"chain takes the augmentations of stochbn.augment, got {one!r:.60}; chain others in a function of "
                    "your own"
                )
        if not augmentations:
            raise TypeError("chain needs at least one augmentation")
        self.augmentations: Sequence[_Ready] = augmentations

    def spread(self, objects: int, generator: torch.Generator) -> Spread:
        """All of them, spread independently of each other."""
        return _Several([one.spread(objects, generator) for one in self.augmentations])

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.augmentations))})"

    def __str__(self) -> str:
        return ",".join(map(str, self.augmentations))


class turns(_Ready):  # noqa: N801
    """Several augmentations in turn, draw by draw, and over again.

    Each may be of this module, whose draws are then spread evenly among themselves, or a function. One that is given
    twice has twice as many draws. `stochbn.choose_augmentation` finds such turns.

    Raises:
        TypeError: one of them is no function.
    """

    def __init__(self, *augmentations: Augment) -> None:
        if not augmentations:
            raise TypeError("turns needs at least one augmentation")
        for one in augmentations:
            if not callable(one):
                raise TypeError(f"turns takes functions of a batch and a generator, got {one!r:.60}")
        self.augmentations = augmentations

    def spread(self, objects: int, generator: torch.Generator) -> Spread:
        """Each of the augmentations, spread over the draws that it has."""
        views: dict[int, Views] = {}
        for one in self.augmentations:
            seed = int(torch.randint(2**62, (), generator=generator))
            views.setdefault(id(one), Views(one, objects, seed, clean=False))
        return _Turns([views[id(one)] for one in self.augmentations])

    def __repr__(self) -> str:
        return f"turns({', '.join(map(repr, self.augmentations))})"

    def __str__(self) -> str:
        return "|".join(map(str, self.augmentations))


def named(text: str) -> Augment:
    """The augmentation of a description, such as ``"flip,shift:4"``, or of several with bars between: `turns`.

    ``str`` gives the description of those of this module.

    Raises:
        ValueError: it names another one.

    >>> named("flip,shift:4")
    chain(flip(), shift(4))
    >>> named("flip|shift:2|flip")
    turns(flip(), shift(2), flip())
    """
    several: dict[str, Augment] = {}
    descriptions = ["".join(one.split()) for one in text.split("|")]
    for one in descriptions:
        several.setdefault(one, _one_named(one))
    return several[descriptions[0]] if len(descriptions) == 1 else turns(*(several[one] for one in descriptions))


def _one_named(text: str) -> Augment:
    found: list[_Ready] = []
    for part in text.split(","):
        name, _, number = part.strip().partition(":")
        if name == "flip" and not number:
            found.append(flip())
        elif name == "shift" and number.isdecimal() and int(number):
            found.append(shift(int(number)))
        else:
            raise ValueError(
                f"unknown augmentation {part!r:.40}; expected flip, shift:PIXELS, or both with a comma between: "
                "flip,shift:4"
            )
    return found[0] if len(found) == 1 else chain(*found)


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


class _Several(Spread):
    def __init__(self, spreads: Sequence[Spread]) -> None:
        self._spreads = spreads

    def apply(self, x: Tensor, draw: int) -> Tensor:
        for spread in self._spreads:
            x = spread.apply(x, draw)
        return x

    def undo(self, values: Tensor, draw: int) -> Tensor:
        for spread in reversed(self._spreads):
            values = spread.undo(values, draw)
        return values

    def keep(self, mask: Tensor) -> None:
        for spread in self._spreads:
            spread.keep(mask)


class _Turns(Spread):
    """The views of each draw; equal ones are the same object, and count how often they have been used before."""

    def __init__(self, views: Sequence[Views]) -> None:
        self._views = views

    def apply(self, x: Tensor, draw: int) -> Tensor:
        view, number = self._view(draw)
        return view(x, number)

    def undo(self, values: Tensor, draw: int) -> Tensor:
        view, number = self._view(draw)
        return view.moved_back(values, number)

    def keep(self, mask: Tensor) -> None:
        for view in {id(view): view for view in self._views}.values():
            view.keep(mask)

    def _view(self, draw: int) -> tuple[Views, int]:
        """The view of a draw, and its number among those of this view."""
        turn, place = divmod(draw, len(self._views))
        view = self._views[place]
        before = [other is view for other in self._views]
        return view, turn * sum(before) + sum(before[:place])


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
