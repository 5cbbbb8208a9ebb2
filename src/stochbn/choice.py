"""What `calibrate` tried, how it compares, and how sure the choice is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stochbn.distributed import Ranks

__all__ = ["Choice", "Option", "Totals"]

APART = 2.0
"""Two scores are told apart if they differ by more standard errors of their difference than this."""


class Option(NamedTuple):
    """A noise that `calibrate` tried, at the temperature that is best for it.

    Attributes:
        batch_size: the effective mini-batch size; ``math.inf`` is no noise.
        temperature: what logits are divided by, refined between those that were tried.
        mean: the score of an object at the best temperature that was tried, in nats if it is the NLL.
        more: by how much that is above the chosen option's.
        error: the standard error of `more`, of scores of the same objects.
    """

    batch_size: float
    temperature: float
    mean: float
    more: float
    error: float

    @property
    def name(self) -> str:
        """In words.

        >>> Option(16, 1.0, 0.3, 0.0, 0.0).name, Option(math.inf, 1.0, 0.3, 0.0, 0.0).name
        ('the noise of mini-batches of 16', 'no noise')
        """
        return "no noise" if self.batch_size == math.inf else f"the noise of mini-batches of {self.batch_size:g}"


@dataclass(frozen=True)
class Choice:
    """How the options that `calibrate` chose from compare. As a string, it is that in words.

    Attributes:
        score: ``"nll"`` or ``"brier"``.
        objects: how many held-out objects were scored.
        units: what these are: ``"objects"``, ``"labels"`` of them, or ``"places"`` of dense outputs.
        options: one for each noise, as they were passed.
        chosen: which of them has the lowest score.
    """

    score: str
    objects: int
    units: str
    options: tuple[Option, ...]
    chosen: Option

    @property
    def unclear(self) -> list[Option]:
        """The others that these objects cannot tell from the chosen one: within two standard errors."""
        return [one for one in self.options if one is not self.chosen and one.more <= APART * one.error]

    def __str__(self) -> str:
        name = {"nll": "NLL", "brier": "Brier score"}[self.score]
        first = f"The {name} of {self.objects:,} held-out {self.units} is lowest with {self.chosen.name}"
        sentences = [f"{first}: {self.chosen.mean:.4f}."]
        plain = [one for one in self.options if one.batch_size == math.inf and one is not self.chosen]
        sentences += [f"With {one.name} it is higher by {one.more:.4f} \u00b1 {one.error:.4f}." for one in plain]
        if self.unclear:
            sentences.append(f"These {self.units} do not tell it apart from {_listed(self.unclear)}.")
        return " ".join(sentences)


def _listed(options: Sequence[Option]) -> str:
    """Options in words.

    >>> _listed([Option(8, 1.0, 0.3, 0.0, 0.0), Option(16, 1.0, 0.3, 0.0, 0.0), Option(math.inf, 1.0, 0.3, 0.0, 0.0)])
    'the noise of mini-batches of 8 or 16, or from no noise'
    """
    sizes = [f"{one.batch_size:g}" for one in options if one.batch_size != math.inf]
    names = []
    if sizes:
        names.append(f"the noise of mini-batches of {' or '.join(filter(None, [', '.join(sizes[:-1]), sizes[-1]]))}")
    if len(sizes) < len(options):
        names.append("no noise")
    return ", or from ".join(names)


class Totals:
    """The scores of all objects under each noise and temperature, as far as their means and differences need them.

    Args:
        noises: how many noises there are.
        temperatures: how many temperatures.
    """

    def __init__(self, noises: int, temperatures: int) -> None:
        self.shape = noises, temperatures
        self.objects = 0
        self._sums = torch.zeros(noises * temperatures + 1, dtype=torch.float64)  # the last one is of the units
        self._products = torch.zeros(len(self._sums), len(self._sums), dtype=torch.float64)

    @property
    def total(self) -> Tensor:
        """``[B, T]``: the sums of all scores."""
        return self._sums[:-1].view(self.shape)

    @property
    def units(self) -> int:
        """How many labels or places of the objects count, or objects."""
        return int(self._sums[-1])

    def add(self, scores: Tensor, units: Tensor) -> None:
        """Add those of a batch.

        Args:
            scores: ``[B, T, N]``, those of the labels and places of an object summed, as they are not independent.
            units: ``[N]``: how many of these each object has.
        """
        flat = torch.cat([scores.flatten(0, 1), units[None].double()])
        self._sums += flat.sum(1)
        self._products.addmm_(flat, flat.T)
        self.objects += len(units)

    def share(self, ranks: Ranks) -> None:
        """Add up those of all ranks."""
        self._sums, self._products = ranks.total(self._sums), ranks.total(self._products)
        self.objects = int(ranks.total(torch.tensor(self.objects)))

    def options(self, batch_sizes: Sequence[float], temperatures: Tensor) -> tuple[Option, ...]:
        """Each noise at its best temperature, beside the best noise at its best."""
        chosen = int(self.total.argmin())
        options = []
        for row, (size, losses) in enumerate(zip(batch_sizes, self.total, strict=True)):
            at = int(losses.argmin())
            place = row * self.shape[1] + at
            more = ((self._sums[place] - self._sums[chosen]) / self.units).item()
            error = 0.0 if place == chosen else self._error(place, chosen, more)
            best = _refined(losses, temperatures, at)
            options.append(Option(size, best, losses[at].item() / self.units, more, error))
        return tuple(options)

    def _error(self, place: int, chosen: int, more: float) -> float:
        """The standard error of a mean difference of a unit: that of a ratio of sums over objects."""
        if self.objects < 2:
            return math.inf
        weights = torch.zeros_like(self._sums)
        weights[place], weights[chosen], weights[-1] = 1, -1, -more
        squares = max((weights @ self._products @ weights).item(), 0)
        return math.sqrt(squares * self.objects / (self.objects - 1)) / self.units


def _refined(losses: Tensor, temperatures: Tensor, at: int) -> float:
    """The minimum of the parabola through the lowest loss and its neighbours, over the logarithm of temperatures."""
    if not 0 < at < len(losses) - 1:
        return temperatures[at].item()
    left, middle, right = losses[at - 1 : at + 2].tolist()
    curvature = left - 2 * middle + right
    step = (left - right) / (2 * curvature) if curvature > 0 else 0.0
    return (temperatures[at] * (temperatures[at + 1] / temperatures[at]) ** step).item()
