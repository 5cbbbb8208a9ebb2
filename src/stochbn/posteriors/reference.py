"""The reference: what training examples look like in every batch norm, for comparison with new data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["SIZES", "Layer", "Reference"]

LARGEST, LEAST = 1e12, 1e-6
"""The largest absolute value in a reference, and the smallest of its own standard deviations."""
SIZES = tuple(2**power for power in range(9))
"""The sizes of mini-batches with stored distances."""


class Layer(NamedTuple):
    """The part of a `Reference` that is about one batch norm with C channels.

    Attributes:
        centre: the means of the rows, ``[2C]``.
        own: the channels' own standard deviations, ``[2C]``.
        mixing: how rows change with the mix, ``[M, 2C]``.
        directions: orthonormal directions, ``[R, 2C]``.
        strengths: the variances along them, beyond 1, ``[R]``.
    """

    centre: Tensor
    own: Tensor
    mixing: Tensor
    directions: Tensor
    strengths: Tensor


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Reference:
    """Describes training examples in every batch norm of a network in evaluation mode, without their labels.

    In a batch norm with C channels, each example has a row of 2C numbers: the means over its positions of the
    standardised activations, and of their squares. Activations are standardised by the layer's running statistics. Rows
    depend linearly on the *mix*, the network's prediction for the example, such as its class probabilities. The rest
    has the covariance ``own (I + directions' strengths directions) own`` (a factor analysis). All tensors are float32;
    D is the number of channels of all `layers`.

    Attributes:
        layers: the number of channels of every layer that is compared, by name.
        examples: the number of training examples.
        task: the meaning of the network's output, as arguments of `stochbn.tasks.make_task`.
        usual: the mean mix, ``[K]``. K is 0 if the task has no mix.
        basis: reduces the mix, as ``(mix - usual) @ basis``, ``[K, M]``.
        spread: makes the reduced mix white, ``[M, M]``.
        edges: the edges of the bins of numbers that a regression predicts, ``[numbers, 9]``; ``[0, 9]`` for other
            tasks.
        running: the running statistics that standardise rows, ``[2, D]``.
        centre: the mean rows, ``[2, D]``.
        own: the channels' own standard deviations, ``[2, D]``.
        mixing: how rows change with the reduced mix, ``[M, 2, D]``.
        directions: directions, orthonormal in each layer, ``[R, 2, D]``.
        strengths: the variances along them, beyond 1, ``[R, L]``.
        levels: for each size of mini-batches, the mean and the standard deviation of the logarithm of two distances in
            each layer: of the look, and of its part that no mix explains, ``[S, 2, 2, L]``.
        quantiles: quantiles of the distances of mini-batches: of the look, of the look of mini-batches with one or two
            classes, and of the mix, ``[S, 3, Q]``.
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
        """The size of its tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All its tensors, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.type == "Tensor"}

    def of_layers(self) -> Iterator[tuple[str, Layer]]:
        """The part for each layer, in order."""
        sizes = list(self.layers.values())
        parts = [torch.split(tensor, sizes, dim=-1) for tensor in (self.centre, self.own, self.mixing, self.directions)]
        for number, (name, centre, own, mixing, directions) in enumerate(zip(self.layers, *parts, strict=True)):
            strengths = self.strengths[:, number]
            rows = centre.flatten(), own.flatten(), mixing.flatten(1), directions.flatten(1)
            yield name, Layer(*rows, strengths)

    def reduced(self, mix: Tensor) -> Tensor:
        """The reduced difference ``[..., M]`` of a mix ``[..., K]`` from the usual one."""
        return (mix - self.usual) @ self.basis

    def description(self) -> dict[str, Any]:
        """All fields that are not tensors, for a file."""
        return {"layers": list(self.layers.items()), "examples": self.examples, "task": dict(self.task)}

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], about: Any) -> Reference:
        """Read a reference from a file.

        Raises:
            ValueError: a field is missing or invalid.
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
        """`levels`, interpolated, and `quantiles`, the larger of the two neighbours, for mini-batches of any size."""
        place = min(max(math.log2(size), 0), len(self.quantiles) - 1)
        low = int(place)
        high = min(low + 1, len(self.quantiles) - 1) if place > low else low
        return (
            torch.lerp(self.levels[low], self.levels[high], place - low),
            torch.maximum(self.quantiles[low], self.quantiles[high]),
        )

    def check_running(self, found: Mapping[str, Tensor]) -> None:
        """Check that a network has the running statistics that standardise the rows.

        Args:
            found: the network's, ``[2, C]`` for every layer.

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
