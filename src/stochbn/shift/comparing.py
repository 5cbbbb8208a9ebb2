"""Compare mini-batches with training data: p-values of their look and of their mix."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochbn.network.calling import NetworkInput
from stochbn.network.layers import listed
from stochbn.posteriors.adaptation import UNUSUAL
from stochbn.posteriors.reference import SIZES, Reference
from stochbn.shift.estimate import GROUPS, distances, excess
from stochbn.shift.guard import Guard
from stochbn.shift.looking import Looker
from stochbn.shift.mixes import binned, mixes_of
from stochbn.tasks import Task, make_task

__all__ = ["Comparison", "Reading"]

NAMED = 3


@dataclass(frozen=True)
class Reading:
    """How unusual a mini-batch is.

    Attributes:
        examples: the number of examples.
        p: the joint p-value: twice the smaller of `look` and `mixed`, at most 1. Without a mix it is `look`.
        look: the p-value of the inputs' look, after subtracting the effect of a changed mix.
        mixed: the p-value of the mix of classes. It is unreliable if the look has changed.
        layers: the squared distance of each layer, divided by its usual value.
        mix: the mean of the network's predictions, such as the share of each class.
        each: the p-value of the look of each example, ``[N]``.
        parts: the components of the mix, such as ``"classes"``.
        alarm: whether a monitor sounds the alarm, see `stochbn.shift.Monitor`.
    """

    examples: int
    p: float
    look: float
    mixed: float
    layers: Mapping[str, float]
    mix: tuple[float, ...]
    each: Tensor
    parts: str = "classes"
    alarm: bool = False

    def __str__(self) -> str:
        size = f"{self.examples} example{'s' if self.examples > 1 else ''}"
        if self.look <= UNUSUAL:
            most = sorted(self.layers, key=self.layers.__getitem__, reverse=True)[:NAMED]
            what = f"the look of the inputs is unusual (p = {self.look:.2g}), most in {listed(most)}"
        elif self.mixed <= UNUSUAL:
            what = f"the mix of {self.parts} is unusual (p = {self.mixed:.2g}), the look of the inputs is not"
        else:
            what = f"neither look nor mix is unusual (p = {self.p:.2g})"
        return f"{'Alarm: in' if self.alarm else 'In'} {size} {what}."

    def description(self) -> dict[str, Any]:
        """The numbers about all examples together, for JSON, which has no infinity."""
        found = {name: getattr(self, name) for name in ("examples", "p", "look", "mixed")}
        return {**found, "layers": {name: min(value, sys.float_info.max) for name, value in self.layers.items()}}


class Comparison:
    """Compares rows and mixes of mini-batches with a reference.

    Args:
        reference: the reference.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.task: Task = make_task(**reference.task)
        self.guards = {name: Guard(layer) for name, layer in reference.of_layers()}
        self._largest = SIZES[len(reference.quantiles) - 1]

    def seen(self, look: Looker, inputs: NetworkInput) -> tuple[dict[str, Tensor], Tensor]:
        """The rows of examples in every compared layer, ``[N, 2C]``, and their mixes, ``[N, K]``.

        Args:
            look: sends them through the network.
            inputs: the examples.

        Raises:
            ValueError: the running statistics changed since the fit, a layer was not called, or activations are not
                finite.
        """
        self.reference.check_running({name: look.running(name) for name in self.guards})
        rows, output = look(inputs)
        if missing := [name for name in self.guards if name not in rows]:
            raise ValueError(f"the layer {missing[0]!r} of the network was not called as in the fit")
        mixes = self.mixes(output, len(inputs))
        if not all(bool(values.isfinite().all()) for values in (*rows.values(), mixes)):
            raise ValueError(
                "the examples give activations that are not finite; check them for NaN, infinity and numbers that are "
                "too large"
            )
        return {name: rows[name] for name in self.guards}, mixes

    def mixes(self, output: Any, examples: int) -> Tensor:
        """The contribution of each example to the mix, ``[N, K]``; K is 0 if the reference has no mix."""
        if not len(self.reference.usual):
            return torch.empty(examples, 0, dtype=torch.float32)
        values = mixes_of(self.task, output)
        return binned(values, self.reference.edges) if self.task.binned else values

    def distances(self, means: Mapping[str, Tensor], mixes: Tensor, examples: int) -> tuple[Tensor, Tensor, Tensor]:
        """How unusual mini-batches of one size are: p-values of look and mix, each ``[B]``, and of layers, ``[B, L]``.

        If the mix is unusual, the look is compared with that of mini-batches of one or two classes, because rows do not
        depend on the mix quite linearly. Mini-batches that are larger than those of the reference are compared with its
        largest ones.

        Args:
            means: the mean rows of every layer, ``[B, 2C]``.
            mixes: the mixes, ``[B, K]``.
            examples: the number of examples in a mini-batch.
        """
        size = min(examples, self._largest)
        levels, (usual, of_few_classes, mixed) = self.reference.between(size)
        with torch.autocast("cpu", enabled=False):
            logs, mix = distances(self.guards, means, self.reference.reduced(mixes), self.reference.spread, size)
        far, p_mix = excess(logs, levels), _p_value(mix, mixed)
        look = torch.where(p_mix > UNUSUAL, _p_value(far, usual), _p_value(far, of_few_classes))
        return look, p_mix, (logs[:, 0] - levels[0, 0]).exp()

    def reading(self, means: Mapping[str, Tensor], mix: Tensor, examples: int, each: Tensor | None = None) -> Reading:
        """How unusual a mini-batch is.

        Args:
            means: ``[2C]`` for every layer.
            mix: ``[K]``.
            examples: how many there are.
            each: the p-value of each example's look.
        """
        rows = {name: means[name][None] for name in self.guards}
        look, mixed, layers = self.distances(rows, mix[None], examples)
        p = [float(look), float(mixed)] if len(mix) else [float(look)]
        return Reading(
            examples=examples,
            p=min(1.0, len(p) * min(p)),
            look=float(look),
            mixed=float(mixed) if len(mix) else 1.0,
            layers=dict(zip(self.guards, layers[0].tolist(), strict=True)),
            mix=tuple(mix.tolist()),
            each=torch.empty(0) if each is None else each,
            parts=self.task.part[1],
        )

    def of_rows(self, rows: Mapping[str, Tensor], mixes: Tensor) -> Reading:
        """How unusual a mini-batch is, and each of its examples.

        Args:
            rows: ``[N, 2C]`` for every layer.
            mixes: ``[N, K]``.
        """
        each = self.distances({name: rows[name] for name in self.guards}, mixes, 1)[0]
        means = {name: rows[name].mean(0) for name in self.guards}
        return self.reading(means, mixes.mean(0), len(mixes), each)


def _p_value(values: Tensor, quantiles: Tensor) -> Tensor:
    """The share of a distribution with these quantiles that is at least as large; never 0."""
    below = torch.searchsorted(quantiles.contiguous(), values.contiguous()) / len(quantiles)
    return (1 - below).clamp(min=1 / (2 * GROUPS + 1))
