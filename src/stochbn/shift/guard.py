"""Estimate by how much the look changes the statistics of a layer: take out what the mix explains, shrink the rest.

The rows of an example, see `stochbn.posteriors.reference.Reference`, depend linearly on the mix, such as the
probabilities of the classes. If the mean rows of new examples differ from the usual ones, the mix may have changed, or
the look of the inputs, or both. So the part that another mix explains is subtracted first. What is left is made white,
and divided in two:

* Directions that no mix can explain. How far the rows are along them, relative to what
  chance gives n examples, is the evidence for a changed look. The shift along them is shrunk towards 0 by that evidence
  (James and Stein, 1961), in blocks of directions of like strength.
* Directions that a changed mix could explain, too. The shift along them is shrunk by the ratio of two variances: how
  much the look has changed along the other directions, and the uncertainty of the estimated mix, whose standard error
  is `sigma` in each component.

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
"""What the evidence of a block of directions has to exceed; chance gives 1."""
BLOCKS = (2, 2, 4, 8, 16, 32)
"""How many directions are shrunk together; all that have no strength of their own are one more block."""
MOST = 3
"""One in so many directions of a layer may be explained by the mix."""
LEAST_DOF = 0.5
NEGLIGIBLE = 1e-3
"""Directions of the mix that are weaker than this share of the strongest are left out."""


class Shifted(NamedTuple):
    """What was found in a layer.

    Attributes:
        shift: ``[2C]``: by how much the look changes the rows, shrunk.
        evidence: the squared distance along directions that no mix explains, over what chance gives; 1 is usual.
    """

    shift: Tensor
    evidence: float


class Guard:
    """The guard of one layer.

    Args:
        layer: what is usual there.
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
        """``[..., 2C]`` rows, less what they are about, divided by the root of their covariance."""
        scaled = rows / self._layer.own
        along = scaled @ self._layer.directions.T
        return scaled - (self._shrink * along) @ self._layer.directions

    def coloured(self, white: Tensor) -> Tensor:
        """The inverse of `white`."""
        along = white @ self._layer.directions.T
        return self._layer.own * (white + (self._stretch * along) @ self._layer.directions)

    def apart(self, white: Tensor) -> Tensor:
        """What of white rows no mix explains."""
        return white - (white @ self.explained.T) @ self.explained

    def left(self, mean: Tensor, change: Tensor) -> Tensor:
        """White rows ``[..., 2C]``: what mean rows differ by from the usual ones, without what the mix explains.

        Args:
            mean: ``[..., 2C]``.
            change: ``[..., M]``: the reduced mix.
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
        """By how much the look has changed.

        Args:
            mean: ``[2C]``, the mean rows of new examples.
            change: ``[M]``, the reduced mix of the new examples.
            examples: how many there are.
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
