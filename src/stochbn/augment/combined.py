"""Combine augmentations, and make them from descriptions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stochbn.augment.images import colour, crop, flip, shift
from stochbn.augment.views import Augment, Ready, Spread, Views

__all__ = ["chain", "named", "turns"]


class chain(Ready):  # noqa: N801
    """Apply several augmentations of `stochbn.augment`, one after another.

    Raises:
        TypeError: one of them is another function. Chain such functions in your own function.
    """

    def __init__(self, *augmentations: Any) -> None:
        for one in augmentations:
            if not isinstance(one, Ready):
                raise TypeError(
                    f"chain takes the augmentations of stochbn.augment, got {one!r:.60}; chain others in a function of "
                    "your own"
                )
        if not augmentations:
            raise TypeError("chain needs at least one augmentation")
        self.augmentations: Sequence[Ready] = augmentations

    def spread(self, objects: int, generator: torch.Generator) -> Spread:
        """All of them, spread independently of each other."""
        return _Several([one.spread(objects, generator) for one in self.augmentations])

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.augmentations))})"

    def __str__(self) -> str:
        return ",".join(map(str, self.augmentations))


class turns(Ready):  # noqa: N801
    """Apply a different augmentation in each draw, in turn and repeatedly.

    Each may be an augmentation of `stochbn.augment`, whose draws are spread evenly, or a function. An augmentation that
    is given twice has twice as many draws. `stochbn.choose_augmentation` returns such turns.

    Raises:
        TypeError: one of them is not a function.
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
    """Make an augmentation from a description such as ``"flip,shift:4"``, or from several, separated by bars: `turns`.

    ``str`` returns the description of an augmentation of this module.

    Raises:
        ValueError: it names an unknown augmentation.

    >>> named("flip,shift:4")
    chain(flip(), shift(4))
    >>> named("flip|crop:0.5,colour:0.1|flip")
    turns(flip(), chain(crop(0.5), colour(0.1)), flip())
    """
    several: dict[str, Augment] = {}
    descriptions = ["".join(one.split()) for one in text.split("|")]
    for one in descriptions:
        several.setdefault(one, _one_named(one))
    return several[descriptions[0]] if len(descriptions) == 1 else turns(*(several[one] for one in descriptions))


SHARES: dict[str, Callable[[float], Ready]] = {"crop": crop, "colour": colour}
"""Augmentations with a number between 0 and 1 as argument."""


def _number(text: str) -> float:
    """The number between 0 and 1 in a text; 0 if there is none."""
    return float(text) if re.fullmatch(r"0?\.\d+", text) else 0.0


def _one_named(text: str) -> Augment:
    found: list[Ready] = []
    for part in text.split(","):
        name, _, number = part.strip().partition(":")
        if name == "flip" and not number:
            found.append(flip())
        elif name == "shift" and number.isdecimal() and int(number):
            found.append(shift(int(number)))
        elif name in SHARES and (share := _number(number)):
            found.append(SHARES[name](share))
        else:
            raise ValueError(
                f"unknown augmentation {part!r:.40}; expected flip, shift:PIXELS, crop:SMALLEST, colour:STRENGTH "
                "(these between 0 and 1), or several with commas between: flip,shift:4"
            )
    return found[0] if len(found) == 1 else chain(*found)


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
    """The views of each draw; equal ones are the same example, and count how often they have been used before."""

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
