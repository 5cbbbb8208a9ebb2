"""The options of `calibrate`, how they compare, and which one is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stochbn.distributed import Ranks

__all__ = ["Choice", "Option", "Totals", "Tried"]


def _draws(way: Tried | Option) -> bool:
    """Whether an option draws the statistics or the input."""
    return way.passes > 1 or (bool(way.centre) and way.batch_size != math.inf)


class Tried(NamedTuple):
    """An option that `calibrate` tries.

    Attributes:
        centre: the centre of the draws, ``"running"``, ``"observed"`` or ``"adapted"``; empty for the plain network.
        batch_size: the size of the mini-batches whose noise the draws have; ``math.inf`` is no noise.
        passes: the number of passes for an example.
        row: its row of the scores.
        temperatures: the columns of the scores that may be chosen.
        selectable: whether it may be chosen.
    """

    centre: str
    batch_size: float
    passes: int
    row: int
    temperatures: tuple[int, ...]
    selectable: bool = True

    @property
    def drawing(self) -> bool:
        """Whether it draws, and so takes several passes."""
        return _draws(self)


class Option(NamedTuple):
    """An option of `calibrate`, at its best temperature.

    Attributes:
        centre: the centre of the draws, ``"running"``, ``"observed"`` or ``"adapted"``; empty for the plain network.
        batch_size: the size of the mini-batches whose noise the draws have; ``math.inf`` is no noise.
        passes: the number of passes for an example.
        temperature: what logits are divided by, refined between the values that were tried.
        mean: the mean score at the best temperature that was tried, in nats if it is the NLL.
        more: the difference from the plain network with its best temperature (or residual variance).
        error: the paired standard error of `more`.
        selectable: whether it could be chosen.
    """

    centre: str
    batch_size: float
    passes: int
    temperature: float
    mean: float
    more: float
    error: float
    selectable: bool = True

    @property
    def name(self) -> str:
        """The option in words.

        >>> Option("", math.inf, 1, 1.3, 0.3, 0.0, 0.0).name
        'the plain network at temperature 1.30'
        >>> Option("running", 16, 8, 1.0, 0.3, 0.0, 0.0).name
        'the noise of mini-batches of 16 about the running statistics'
        """
        if math.isnan(self.batch_size):
            return f"the noise that was fitted about the {self.centre} statistics"
        if not self.centre:
            return "the plain network" + ("" if self.temperature == 1 else f" at temperature {self.temperature:.2f}")
        noise = "no noise" if self.batch_size == math.inf else f"the noise of mini-batches of {self.batch_size:g}"
        return f"{noise} about the {self.centre} statistics"

    @property
    def drawing(self) -> bool:
        """Whether it draws, and so takes several passes."""
        return _draws(self)


@dataclass(frozen=True)
class Choice:
    """The options of `calibrate`, and which one it chose. ``str(choice)`` is a sentence with the reason.

    Attributes:
        score: ``"nll"``, ``"brier"``, or another of the task's `calibrated_by`.
        score_name: its name in words, such as ``"NLL"``.
        score_unit: its unit, such as ``"nats"``; empty if it has none.
        objects: the number of held-out examples that were scored, or of their parts.
        units: what was counted: ``"examples"``, their ``"labels"`` or ``"numbers"``, or ``"places"`` of dense outputs.
        options: all options; the plain network and the plain network with a temperature are the first two.
        chosen: the simplest option within one standard error of the best.
        beyond: what drawing is compared with, in words.
    """

    score: str
    score_name: str
    score_unit: str
    objects: int
    units: str
    options: tuple[Option, ...]
    chosen: Option
    beyond: str = "a temperature"

    @property
    def tempered(self) -> bool:
        """Whether temperatures were chosen. The second option is then the plain network with a temperature."""
        return len(self.options) > 1 and not self.options[1].centre

    @property
    def drawing(self) -> Option:
        """The best of the options that draw; the chosen one if it is one of them."""
        drawing = [one for one in self.options if one.drawing]
        return self.chosen if self.chosen.drawing else min(drawing, key=lambda one: one.mean, default=self.chosen)

    def __str__(self) -> str:
        name, unit = self.score_name, self.score_unit
        best, plain = self.drawing, self.options[0]
        on = f"beyond {self.beyond} on {self.objects:,} held-out {self.units}"
        if best.drawing and self.chosen is best:
            sure = -best.more > 2 * best.error
            verdict = "worth its passes" if sure else "probably worth its passes; more examples would tell"
            if -best.more <= best.error:
                verdict = "not worth its passes, but the best of what could be chosen"
            changed = f"{'lowers' if best.more < 0 else 'raises'} the {name} by {abs(best.more):.4f}"
            drawn = f"Drawing ({best.name}, {best.passes} passes)"
            return f"{drawn} {changed} \u00b1 {best.error:.4f} {unit}".rstrip() + f" {on}: {verdict}."
        told = f"{self.chosen.name[0].upper()}{self.chosen.name[1:]}"
        if best.drawing:
            told += f" does as well as drawing, at one pass: drawing changes the {name} by {best.more:+.4f} "
            told += f"\u00b1 {best.error:.4f} {unit}".rstrip() + f" {on}"
        else:
            told += " is the best of what was tried, at one pass"
        if self.tempered and self.chosen is not plain and not self.chosen.centre:
            told += (
                f", the temperature alone by {-plain.more:+.4f}"
                if best.drawing
                else (f"; the temperature changes the {name} by {-plain.more:+.4f}")
            )
            told += f" \u00b1 {plain.error:.4f} {unit}".rstrip()
        return f"{told}."


class Totals:
    """The scores of all examples under each noise and temperature, as far as their means and differences need them.

    Args:
        noises: how many ways to predict there are.
        temperatures: how many temperatures.
    """

    def __init__(self, noises: int, temperatures: int) -> None:
        self.shape = noises, temperatures
        self.objects = 0
        self.counted = 0  # examples that have any unit
        self._sums = torch.zeros(noises * temperatures + 1, dtype=torch.float64)  # the last one is of the units
        self._products = torch.zeros(len(self._sums), len(self._sums), dtype=torch.float64)

    @property
    def total(self) -> Tensor:
        """``[B, T]``: the sums of all scores."""
        return self._sums[:-1].view(self.shape)

    @property
    def units(self) -> int:
        """How many labels or places of the examples count, or examples."""
        return int(self._sums[-1])

    def add(self, scores: Tensor, units: Tensor) -> None:
        """Add those of a batch.

        Args:
            scores: ``[B, T, N]``, those of the labels and places of an example summed, as they are not independent.
            units: ``[N]``: how many of these each example has.
        """
        flat = torch.cat([scores.flatten(0, 1), units[None].double()])
        self._sums += flat.sum(1)
        self._products.addmm_(flat, flat.T)
        self.objects += len(units)
        self.counted += int((units > 0).sum())

    def share(self, ranks: Ranks) -> None:
        """Add up those of all ranks."""
        self._sums, self._products = ranks.total(self._sums), ranks.total(self._products)
        self.objects, self.counted = ranks.total(torch.tensor([self.objects, self.counted])).tolist()

    def options(self, tried: Sequence[Tried], temperatures: Tensor) -> tuple[Option, ...]:
        """Each way to predict at its best temperature, beside the plain network with a temperature, if any."""
        places = [self._best(one) for one in tried]
        reference = places[sum(not one.centre for one in tried) - 1]
        options = []
        for one, place in zip(tried, places, strict=True):
            more = ((self._sums[place] - self._sums[reference]) / self.units).item()
            at = place % self.shape[1]
            best = float(temperatures[at])
            if len(one.temperatures) > 1:
                best = _refined(self.total[one.row, list(one.temperatures)], temperatures, at)
            options.append(
                Option(
                    one.centre,
                    one.batch_size,
                    one.passes,
                    best,
                    self._sums[place].item() / self.units,
                    more,
                    self.error(place, reference),
                    one.selectable,
                )
            )
        return tuple(options)

    def choose(self, tried: Sequence[Tried]) -> int:
        """The simplest of the ways that may be chosen and are within one standard error of the best of them.

        Fewer passes are simpler, then the earlier ones in `tried`; among ways that draw, the best about each centre. A
        temperature costs no pass, so it comes before none, unless the best one lies at an end of the range: then the
        examples do not tell which it is.
        """
        places = [self._best(one) for one in tried]
        means = [self._sums[place].item() for place in places]
        allowed = [number for number, one in enumerate(tried) if one.selectable and math.isfinite(means[number])]
        best = min(allowed, key=means.__getitem__)
        candidates = [number for number in allowed if not tried[number].drawing]
        if (
            candidates[:2] == [0, 1]
            and not tried[1].centre
            and places[1] % self.shape[1] not in (0, len(tried[1].temperatures) - 1)
        ):
            candidates[:2] = [1, 0]
        for centre in dict.fromkeys(one.centre for one in tried):
            drawing = [n for n in allowed if tried[n].drawing and tried[n].centre == centre]
            candidates += [min(drawing, key=means.__getitem__)] if drawing else []
        near = [n for n in candidates if (means[n] - means[best]) / self.units <= self.error(places[n], places[best])]
        return near[0]

    def _best(self, one: Tried) -> int:
        """The place of a way's best temperature among the sums."""
        losses = self.total[one.row, list(one.temperatures)]
        return one.row * self.shape[1] + one.temperatures[int(losses.argmin())]

    def error(self, place: int, other: int) -> float:
        """The standard error of a mean difference of a unit: that of a ratio of sums over examples."""
        if place == other:
            return 0.0
        if self.counted < 2:
            return math.inf
        weights = torch.zeros_like(self._sums)
        more = ((self._sums[place] - self._sums[other]) / self.units).item()
        weights[place], weights[other], weights[-1] = 1, -1, -more
        squares = max((weights @ self._products @ weights).item(), 0)
        return math.sqrt(squares * self.counted / (self.counted - 1)) / self.units


def _refined(losses: Tensor, temperatures: Tensor, at: int) -> float:
    """The minimum of the parabola through the lowest loss and its neighbours, over the logarithm of temperatures."""
    if not 0 < at < len(losses) - 1:
        return temperatures[at].item()
    left, middle, right = losses[at - 1 : at + 2].tolist()
    curvature = left - 2 * middle + right
    step = (left - right) / (2 * curvature) if curvature > 0 else 0.0
    return (temperatures[at] * (temperatures[at + 1] / temperatures[at]) ** step).item()
