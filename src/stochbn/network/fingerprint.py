"""Fingerprints: a few numbers that identify a network's weights, in any precision."""

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
"""Parameters with at most this many entries are used as a whole; batch norms have no more."""
SAMPLED = 512
"""About this many entries of larger parameters are used, because training changes all of them."""
HALF = torch.finfo(torch.float16).max
"""Infinity, which larger numbers become in half precision, counts as this."""
TOLERANCE = 1e-10
"""The tolerance of sums in float64, relative to the sum of absolute values; rounding is a thousandth of it."""


@dataclass(frozen=True)
class Sums:
    """The fingerprint of one parameter.

    Attributes:
        entries: its number of entries, used or not.
        size: the weighted sum of the absolute values of the used entries.
        rounded: weighted sums of these entries: exact, and rounded to float32, float16, bfloat16, and to bfloat16 after
            float16.
    """

    entries: int
    size: float
    rounded: tuple[float, ...]

    def same(self, other: Sums) -> bool:
        """Whether both are of the same parameter, up to rounding."""
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
        """Make the part from parameters; those that are not real numbers are left out."""
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
        """Whether both are of the same parameters, up to rounding."""
        return len(self.parameters) == len(other.parameters) and all(
            one.same(two) for one, two in zip(self.parameters, other.parameters, strict=True)
        )


@dataclass(frozen=True)
class Fingerprint:
    """A few numbers that identify the weights of a network.

    A fingerprint stays the same if the network is moved to another device, wrapped, compiled, or rounded to half
    precision or bfloat16 and back, as a whole or in part. Running statistics do not count. It uses all entries of small
    parameters and some of large ones, which takes some milliseconds for a ResNet-50. A change of other entries alone is
    not detected.

    Attributes:
        norms: the weights and biases of the batch norms.
        others: all other parameters.
    """

    norms: Part
    others: Part

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """Compute the fingerprint of a network."""
        model = unwrap(model)
        norms = {id(p) for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
        parameters = list(model.parameters())
        return cls(
            norms=Part.of(p for p in parameters if id(p) in norms),
            others=Part.of(p for p in parameters if id(p) not in norms),
        )

    def difference(self, other: Fingerprint) -> str | None:
        """Describe which weights differ; None if none do."""
        norms, others = not self.norms.same(other.norms), not self.others.same(other.others)
        if norms and others:
            return "those of the batch norms and those of other layers"
        if norms:
            return "those of the batch norms alone"
        return "those of layers other than the batch norms" if others else None

    def description(self) -> dict[str, list[list[float]]]:
        """The numbers for a file, which `from_description` reads."""
        return {
            name: [[sums.entries, sums.size, *sums.rounded] for sums in part.parameters]
            for name, part in vars(self).items()
        }

    @classmethod
    def from_description(cls, description: Any) -> Fingerprint:
        """Read a fingerprint from its description.

        Raises:
            ValueError: it is not a fingerprint.
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
    """The sums of all entries of parameters, which quickly show writes through ``.data``."""
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
    """Evenly spread entries of a parameter, ``[n]``, in index order for any memory layout."""
    count = parameter.numel()
    step = 1 if count <= WHOLE else math.ceil(count / SAMPLED)
    if parameter.is_contiguous():
        return parameter.view(-1)[::step]
    places = torch.arange(0, count, step, device=parameter.device)
    return parameter[torch.unravel_index(places, parameter.shape)]
