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
        temperature: what logits are divided by.
        mean: the score of an object, in nats if it is the NLL.
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
        objects: how many held-out objects (or labels, or places of dense outputs) were scored.
        options: one for each noise, as they were passed.
        chosen: which of them has the lowest score.
    """

    score: str
    objects: int
    options: tuple[Option, ...]
    chosen: Option

    @property
    def unclear(self) -> list[Option]:
        """The others that these objects cannot tell from the chosen one: within two standard errors."""
        return [one for one in self.options if one is not self.chosen and one.more <= APART * one.error]

    def __str__(self) -> str:
        name = {"nll": "NLL", "brier": "Brier score"}[self.score]
        first = f"The {name} of {self.objects:,} held-out objects is lowest with {self.chosen.name}"
        sentences = [f"{first}: {self.chosen.mean:.4f}."]
        plain = [one for one in self.options if one.batch_size == math.inf and one is not self.chosen]
        sentences += [f"With {one.name} it is higher by {one.more:.4f} \u00b1 {one.error:.4f}." for one in plain]
        if self.unclear:
            sentences.append(f"These objects do not tell it apart from {_listed(self.unclear)}.")
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
        self.total = torch.zeros(noises * temperatures, dtype=torch.float64)
        self.products = torch.zeros(len(self.total), len(self.total), dtype=torch.float64)
        self.count = 0
        self.shape = noises, temperatures

    def add(self, scores: Tensor) -> None:
        """Add those of a batch, ``[B, T, N]``; the places of a dense output are summed, as they are not independent."""
        flat = scores.flatten(0, 1)
        self.total += flat.sum(1)
        self.products.addmm_(flat, flat.T)
        self.count += flat.shape[1]

    def share(self, ranks: Ranks) -> None:
        """Add up those of all ranks."""
        self.total, self.products = ranks.total(self.total), ranks.total(self.products)
        self.count = int(ranks.total(torch.tensor(self.count)))

    def options(self, batch_sizes: Sequence[float], temperatures: Tensor, objects: int) -> tuple[Option, ...]:
        """Each noise at its best temperature, beside the best noise at its best."""
        table = self.total.view(self.shape)
        chosen = int(self.total.argmin())
        options = []
        for row, (size, losses) in enumerate(zip(batch_sizes, table, strict=True)):
            at = int(losses.argmin())
            place = row * self.shape[1] + at
            more = (self.total[place] - self.total[chosen]).item()
            squares = self.products[place, place] - 2 * self.products[place, chosen] + self.products[chosen, chosen]
            variance = max(squares.item() - more**2 / self.count, 0) / (self.count - 1) if self.count > 1 else math.inf
            error = 0.0 if place == chosen else math.sqrt(self.count * variance) / objects
            best = _refined(losses, temperatures, at)
            options.append(Option(size, best, losses[at].item() / objects, more / objects, error))
        return tuple(options)


def _refined(losses: Tensor, temperatures: Tensor, at: int) -> float:
    """The minimum of the parabola through the lowest loss and its neighbours, over the logarithm of temperatures."""
    if not 0 < at < len(losses) - 1:
        return temperatures[at].item()
    left, middle, right = losses[at - 1 : at + 2].tolist()
    curvature = left - 2 * middle + right
    step = (left - right) / (2 * curvature) if curvature > 0 else 0.0
    return (temperatures[at] * (temperatures[at + 1] / temperatures[at]) ** step).item()
