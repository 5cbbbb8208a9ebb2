"""Estimate the effect of a changed look on a layer's statistics: subtract what the mix explains, and shrink the rest.

The rows of an example, see `stochbn.posteriors.reference.Reference`, depend linearly on the mix, such as the
probabilities of the classes. If the mean rows of new examples differ from the usual ones, the mix may have changed, or
the look of the inputs, or both. So the part that a changed mix explains is subtracted first. The rest is made white,
and split into two parts:

* Directions that no mix can explain. The distance of the rows along them, relative to that expected by chance for n
  examples, is the evidence for a changed look. The shift along them is shrunk towards 0 by this evidence (James and
  Stein, 1961), in blocks of directions of similar strength.
* Directions that a changed mix could explain too. The shift along them is shrunk by the ratio of two variances: the
  change of the look along the other directions, and the uncertainty of the estimated mix, whose standard error is
  `sigma` in each component.

Without evidence the shift is exactly 0. The mix is not known at first, so an adaptation begins with a large `sigma` and
ends with a small one.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from stochbn.posteriors.reference import Layer

__all__ = ["Guard", "Shifted"]

THRESHOLD = 1.5
"""The evidence of a block of directions must exceed this; by chance it is 1."""
BLOCKS = (2, 2, 4, 8, 16, 32)
"""The numbers of directions that are shrunk together; those without their own strength are one more block."""
MOST = 3
"""The mix may explain at most one in this many directions of a layer."""
LEAST_DOF = 0.5
NEGLIGIBLE = 1e-3
"""Directions of the mix that are weaker than this share of the strongest are left out."""


class Shifted(NamedTuple):
    """The shift of a layer.

    Attributes:
        shift: the change of the rows by the look, shrunk, ``[2C]``.
        evidence: the squared distance along directions that no mix explains, divided by its expected value by chance.
    """

    shift: Tensor
    evidence: float


class Guard:
    """The guard of one layer.

    Args:
        layer: the reference of the layer.
    """

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        strengths = layer.strengths
        self._shrink = 1 - (1 + strengths).rsqrt()
        self._stretch = (1 + strengths).sqrt() - 1
        whole = layer.mixing.new_empty(0, len(layer.centre))
        self._strength = strengths.new_empty(0)
        if len(layer.mixing):
            _, values, vectors = torch.linalg.svd(self.white(layer.mixing), full_matrices=False)
            strong = int((values > NEGLIGIBLE * values[:1].clamp(min=1e-30)).sum())
            count = min(strong, len(layer.centre) // MOST)
            whole, self._strength = vectors[:count], values[:count]
        self.explained = whole

    def white(self, rows: Tensor) -> Tensor:
        """Subtract the centre from rows ``[..., 2C]``, and divide by the root of their covariance."""
        scaled = rows / self._layer.own
        along = scaled @ self._layer.directions.T
        return scaled - (self._shrink * along) @ self._layer.directions

    def coloured(self, white: Tensor) -> Tensor:
        """The inverse of `white`."""
        along = white @ self._layer.directions.T
        return self._layer.own * (white + (self._stretch * along) @ self._layer.directions)

    def apart(self, white: Tensor) -> Tensor:
        """The part of white rows that no mix explains."""
        return white - (white @ self.explained.T) @ self.explained

    def left(self, mean: Tensor, change: Tensor) -> Tensor:
        """The difference of mean rows from the usual ones, without what the mix explains, as white rows ``[..., 2C]``.

        Args:
            mean: the mean rows, ``[..., 2C]``.
            change: the reduced mix, ``[..., M]``.
        """
        return self.white(mean - self._layer.centre - change @ self._layer.mixing)

    @functools.cached_property
    def freedom(self) -> int:
        """The number of directions that no mix explains."""
        return len(self._layer.centre) - len(self.explained)

    @functools.cached_property
    def _blocks(self) -> list[tuple[slice, float]]:
        """Directions that are shrunk together, and how many of them no mix explains."""
        directions = self._layer.directions
        free = directions.square().sum(1) - (directions @ self.explained.T).square().sum(1)
        found, start = [], 0
        for size in BLOCKS:
            part = slice(start, min(start + size, len(free)))
            if part.start >= part.stop:
                break
            found.append((part, float(free[part].sum())))
            start = part.stop
        return found

    def shifted(self, mean: Tensor, change: Tensor, examples: float, sigma: float) -> Shifted:
        """Estimate the change of the look.

        Args:
            mean: the mean rows of new examples, ``[2C]``.
            change: the reduced mix of the new examples, ``[M]``.
            examples: their number.
            sigma: the standard error of each component of the mix.
        """
        white = self.left(mean, change)
        inside = self.explained @ white
        outside = white - inside @ self.explained
        evidence = examples * float(outside.square().sum()) / max(self.freedom, LEAST_DOF)
        along = self._layer.directions @ outside
        rest = outside - along @ self._layer.directions
        freedom = self.freedom - sum(dof for _, dof in self._blocks)
        outside = _weight(rest, freedom, examples) * rest
        shrunk = torch.zeros_like(along)
        for part, dof in self._blocks:
            shrunk[part] = _weight(along[part], dof, examples) * along[part]
        outside = outside + shrunk @ self._layer.directions
        variance = max(0.0, evidence - 1) / examples
        error = 1 / examples + (self._strength * sigma).square()
        inside = inside * (variance / (variance + error))
        return Shifted(self.coloured(outside + inside @ self.explained), evidence)


def _weight(values: Tensor, freedom: float, examples: float) -> float:
    """What a block of white values is multiplied by."""
    distance = examples * float(values.square().sum()) / max(freedom, LEAST_DOF)
    return max(0.0, 1 - THRESHOLD / max(distance, 1e-9))
