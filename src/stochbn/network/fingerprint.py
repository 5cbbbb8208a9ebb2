"""A few numbers that tell a network's weights from others, however they are stored."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stochbn.network.layers import unwrap

__all__ = ["Fingerprint", "Part", "Sums", "totals"]

WHOLE = 2048
"""Entries of a parameter of which each is looked at, at most: batch norms have no more."""
SAMPLED = 512
"""About how many entries of larger parameters are looked at: training changes all of them."""
HALF = torch.finfo(torch.float16).max
"""What infinity counts as, which larger numbers become in half precision."""
TOLERANCE = 1e-10
"""What sums in float64 may differ by, beside the sum of absolute values: their rounding is a thousandth of it."""


@dataclass(frozen=True)
class Sums:
    """What is kept of one parameter.

    Attributes:
        entries: how many numbers it has, looked at or not.
        size: the sum of the absolute values of those that were looked at, each with a weight of its own.
        rounded: sums of them with these weights: as they are, and as float32, float16, bfloat16, and bfloat16 after
            float16 would round them.
    """

    entries: int
    size: float
    rounded: tuple[float, ...]

    def same(self, other: Sums) -> bool:
        """Whether these are of the other's parameter, or of a rounded form of it."""
        if self.entries != other.entries:
            return False
        allowed = TOLERANCE * max(self.size, other.size)
        return any(abs(one - two) <= allowed for one in self.rounded for two in other.rounded)


@dataclass(frozen=True)
class Part:
    """Some of a network's parameters, in their order."""

    parameters: tuple[Sums, ...]

    @classmethod
    def of(cls, parameters: Iterable[Tensor]) -> Part:
        """The part that consists of these parameters; those that are no real numbers are left out."""
        real = [p.detach() for p in parameters if p.is_floating_point() and not p.is_meta and p.numel()]
        if not real:
            return cls(())
        sampled = [_sampled(parameter) for parameter in real]
        counts = [len(entries) for entries in sampled]
        flat = torch.cat([entries.to(real[0].device, torch.float64) for entries in sampled]).cpu()
        single = flat.float()
        half = single.half()
        rounded = torch.stack(
            [flat, single.double(), half.double(), single.bfloat16().double(), half.bfloat16().double()]
        )
        rounded = torch.nan_to_num(rounded, 0.0, HALF, -HALF)
        weights = 1 + (torch.arange(max(counts), dtype=torch.float64) * ((5**0.5 - 1) / 2)).frac()
        weighted = torch.cat([rounded[:1].abs(), rounded]) * torch.cat([weights[:count] for count in counts])
        sums = [part.sum(1).tolist() for part in torch.split(weighted, counts, dim=1)]
        return cls(tuple(Sums(p.numel(), size, tuple(rest)) for p, (size, *rest) in zip(real, sums, strict=True)))

    def same(self, other: Part) -> bool:
        """Whether these are the other's parameters, each as it is or rounded."""
        return len(self.parameters) == len(other.parameters) and all(
            one.same(two) for one, two in zip(self.parameters, other.parameters, strict=True)
        )


@dataclass(frozen=True)
class Fingerprint:
    """What tells the weights of a network from others, in a few numbers.

    It stays the same when the network is moved to another device, wrapped, compiled, or rounded to half precision or
    bfloat16 and back, whole or in part. Running statistics are no weights, so they do not count. All entries of small
    parameters and some of large ones are looked at, which takes some milliseconds for a ResNet-50; a change to other
    entries alone is not noticed.

    Attributes:
        norms: the weights and biases of the batch norms.
        others: all other parameters.
    """

    norms: Part
    others: Part

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """The fingerprint of a network."""
        model = unwrap(model)
        norms = {id(p) for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
        parameters = list(model.parameters())
        return cls(
            norms=Part.of(p for p in parameters if id(p) in norms),
            others=Part.of(p for p in parameters if id(p) not in norms),
        )

    def difference(self, other: Fingerprint) -> str | None:
        """Which weights differ, in words; None if none do."""
        norms, others = not self.norms.same(other.norms), not self.others.same(other.others)
        if norms and others:
            return "those of the batch norms and those of other layers"
        if norms:
            return "those of the batch norms alone"
        return "those of layers other than the batch norms" if others else None

    def description(self) -> dict[str, list[list[float]]]:
        """What `from_description` reads: numbers alone, for a file."""
        return {
            name: [[sums.entries, sums.size, *sums.rounded] for sums in part.parameters]
            for name, part in vars(self).items()
        }

    @classmethod
    def from_description(cls, description: Any) -> Fingerprint:
        """The fingerprint that was described.

        Raises:
            ValueError: it is none.
        """
        if not isinstance(description, dict) or description.keys() != {"norms", "others"}:
            raise ValueError(f"fingerprint must have norms and others, got {description!r:.100}")
        parts = {}
        for name, parameters in description.items():
            if not isinstance(parameters, list) or not all(map(_describes_sums, parameters)):
                raise ValueError(
                    f"fingerprint must have 7 finite numbers for each of the {name}, got {parameters!r:.100}"
                )
            parts[name] = Part(tuple(Sums(one[0], float(one[1]), tuple(map(float, one[2:]))) for one in parameters))
        return cls(**parts)


def totals(parameters: Iterable[Tensor]) -> tuple[float, ...]:
    """The sums of parameters, of all of their entries: a quick sign of writes by ``.data``, which leave no other."""
    real = [p.detach() for p in parameters if p.is_floating_point() and not p.is_meta and p.layout == torch.strided]
    if not real:
        return ()
    return tuple(torch.stack([p.sum().to(real[0].device, torch.float64) for p in real]).nan_to_num().tolist())


def _describes_sums(numbers: Any) -> bool:
    return (
        isinstance(numbers, list)
        and len(numbers) == 7
        and all(type(n) in (int, float) and abs(n) < 1e300 for n in numbers)
        and type(numbers[0]) is int
        and min(numbers[:2]) >= 0
    )


def _sampled(parameter: Tensor) -> Tensor:
    """``[n]``: evenly spread entries of a parameter, in the order of its indices, whatever its memory layout."""
    count = parameter.numel()
    step = 1 if count <= WHOLE else math.ceil(count / SAMPLED)
    if parameter.is_contiguous():
        return parameter.view(-1)[::step]
    places = torch.arange(0, count, step, device=parameter.device)
    return parameter[torch.unravel_index(places, parameter.shape)]
