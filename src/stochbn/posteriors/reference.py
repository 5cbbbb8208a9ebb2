"""What examples of the training data look like to a network: what new data is compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["SIZES", "Layer", "Reference"]

LARGEST, LEAST = 1e12, 1e-6
"""What numbers of a reference may be; own standard deviations are at least the second."""
SIZES = tuple(2**power for power in range(9))
"""Sizes of mini-batches whose usual distances are kept."""


class Layer(NamedTuple):
    """The part of a `Reference` that is about one batch norm with C channels.

    Attributes:
        centre: ``[2C]``, the means of the rows.
        own: ``[2C]``, the standard deviations that the channels have of their own.
        mixing: ``[M, 2C]``, how rows change with the mix.
        directions: ``[R, 2C]``, orthonormal.
        strengths: ``[R]``.
    """

    centre: Tensor
    own: Tensor
    mixing: Tensor
    directions: Tensor
    strengths: Tensor


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Reference:
    """How examples of the training data look in every batch norm of a network in evaluation mode, without their labels.

    Each example has a row of 2C numbers in a batch norm with C channels: the means over its places of the standardised
    activations, and of their squares. Standardised means by the running statistics of the layer. Rows depend linearly
    on the *mix*, which is what the network predicts for the example, such as its probabilities of the classes. What is
    left of them has the covariance ``own (I + directions' strengths directions) own`` (a factor analysis). All tensors
    are float32; D is the number of channels of all `layers`.

    Attributes:
        layers: the number of channels of every layer that is compared, by its name.
        examples: how many examples it was made from.
        task: what the network's outputs were taken to mean, the arguments of `stochbn.tasks.make_task`.
        usual: ``[K]``: the mean mix. K is 0 where the network's task has none.
        basis: ``[K, M]``: what the mix is reduced to, ``(mix - usual) @ basis``.
        spread: ``[M, M]``: what makes the reduced mix white.
        edges: ``[numbers, 9]``: between the bins of the numbers that a regression predicts, else ``[0, 9]``.
        running: ``[2, D]``: the running statistics that rows are standardised by.
        centre: ``[2, D]``, the mean rows.
        own: ``[2, D]``, the standard deviations that channels have of their own.
        mixing: ``[M, 2, D]``, how rows change with the reduced mix.
        directions: ``[R, 2, D]``, orthonormal in each layer.
        strengths: ``[R, L]``, the variances along them, beside 1.
        levels: ``[S, 2, 2, L]``, for each of the `SIZES` that there are: the mean and the standard deviation, over
            mini-batches, of the logarithm of two distances in each layer: of the look, and of what of it no mix
            explains.
        quantiles: ``[S, 3, Q]``: the usual distances of mini-batches: in look, in look where they are of one or two
            classes alone, and in mix.
    """

    layers: Mapping[str, int]
    examples: int
    task: Mapping[str, Any]
    usual: Tensor
    basis: Tensor
    spread: Tensor
    edges: Tensor
    running: Tensor
    centre: Tensor
    own: Tensor
    mixing: Tensor
    directions: Tensor
    strengths: Tensor
    levels: Tensor
    quantiles: Tensor

    def __post_init__(self) -> None:
        channels, count = sum(self.layers.values()), len(self.layers)
        k, m, r, s = len(self.usual), self.basis.shape[-1], len(self.strengths), len(self.quantiles)
        shapes: dict[str, tuple[int, ...]] = {
            "usual": (k,),
            "basis": (k, m),
            "spread": (m, m),
            "edges": (self.edges.shape[0], 9),
            "running": (2, channels),
            "centre": (2, channels),
            "own": (2, channels),
            "mixing": (m, 2, channels),
            "directions": (r, 2, channels),
            "strengths": (r, count),
            "levels": (s, 2, 2, count),
            "quantiles": (s, 3, self.quantiles.shape[-1]),
        }
        if not self.layers:
            raise ValueError("the reference has no layers")
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"the reference's {name} must be float32 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
                )
            if not (tensor.abs() <= LARGEST).all():
                raise ValueError(f"the reference's {name} must be finite, and at most {LARGEST:g}")
        if not 1 <= s <= len(SIZES) or self.quantiles.shape[-1] < 2:
            raise ValueError(f"the reference's quantiles must be of 1 to {len(SIZES)} sizes, got {s}")
        if len(self.edges) and k != len(self.edges) * (self.edges.shape[1] + 1):
            raise ValueError(f"the reference's edges make {len(self.edges)} times 10 bins, but its mix has {k}")
        if (self.quantiles.diff(dim=-1) < 0).any():
            raise ValueError("the reference's quantiles must not fall")
        if (self.levels[:, 1] <= 0).any():
            raise ValueError("the reference's levels must have positive standard deviations")
        if (self.own < LEAST).any() or (self.strengths < 0).any():
            raise ValueError(f"the reference's own must be at least {LEAST:g}, and its strengths not negative")

    def __repr__(self) -> str:
        return f"<Reference: {self.examples} examples in {len(self.layers)} layers, a mix of {len(self.usual)}>"

    @property
    def nbytes(self) -> int:
        """How many bytes its tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All its tensors by their names."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.type == "Tensor"}

    def of_layers(self) -> Iterator[tuple[str, Layer]]:
        """The parts that are about one layer each, in order."""
        sizes = list(self.layers.values())
        parts = [torch.split(tensor, sizes, dim=-1) for tensor in (self.centre, self.own, self.mixing, self.directions)]
        for number, (name, centre, own, mixing, directions) in enumerate(zip(self.layers, *parts, strict=True)):
            strengths = self.strengths[:, number]
            rows = centre.flatten(), own.flatten(), mixing.flatten(1), directions.flatten(1)
            yield name, Layer(*rows, strengths)

    def reduced(self, mix: Tensor) -> Tensor:
        """``[..., M]`` for a mix ``[..., K]``: what it differs by from the usual one, reduced."""
        return (mix - self.usual) @ self.basis

    def description(self) -> dict[str, Any]:
        """What is no tensor, for a file."""
        return {"layers": list(self.layers.items()), "examples": self.examples, "task": dict(self.task)}

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], about: Any) -> Reference:
        """The one of a file.

        Raises:
            ValueError: something is missing, or cannot be.
        """
        from stochbn.tasks import make_task

        names = {f.name for f in fields(cls) if f.type == "Tensor"}
        if missing := names - tensors.keys():
            raise ValueError(f"the reference has no {min(missing)}")
        if not isinstance(about, dict) or about.keys() != {"layers", "examples", "task"}:
            raise ValueError(f"the reference's description is {about!r:.60}")
        if type(about["examples"]) is not int or about["examples"] < 1 or not isinstance(about["task"], dict):
            raise ValueError(
                f"the reference has {about['examples']!r:.40} examples, for the task {about['task']!r:.40}"
            )
        pairs = about["layers"]
        if not isinstance(pairs, list) or not all(
            isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) and type(p[1]) is int and p[1] > 0
            for p in pairs
        ):
            raise ValueError(f"the reference's layers must be pairs of a name and a number, got {pairs!r:.60}")
        make_task(**about["task"])
        held = {name: tensors[name] for name in names}
        return cls(layers=dict(pairs), examples=about["examples"], task=about["task"], **held)

    def between(self, size: int) -> tuple[Tensor, Tensor]:
        """`levels` and `quantiles` for mini-batches of any size: interpolated, and the larger of the two next to it."""
        place = min(max(math.log2(size), 0), len(self.quantiles) - 1)
        low = int(place)
        high = min(low + 1, len(self.quantiles) - 1) if place > low else low
        return (
            torch.lerp(self.levels[low], self.levels[high], place - low),
            torch.maximum(self.quantiles[low], self.quantiles[high]),
        )

    def check_running(self, found: Mapping[str, Tensor]) -> None:
        """Refuse a network with other running statistics than those that rows were standardised by.

        Args:
            found: ``[2, C]`` for every layer.

        Raises:
            ValueError: the message names the first layer.
        """
        parts = torch.split(self.running, list(self.layers.values()), dim=1)
        for name, own in zip(self.layers, parts, strict=True):
            if name in found and not torch.allclose(found[name], own, rtol=1e-3, atol=1e-6, equal_nan=True):
                raise ValueError(
                    f"the running statistics of the layer {name!r} are not those that the posterior was fitted with: "
                    "it has been trained, or adapted, since; fit again, or load the network's buffers too"
                )
