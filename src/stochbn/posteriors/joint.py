"""The joint posterior: one Gaussian over all statistics of a network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stochbn.posteriors.accumulators import KEPT, Sample
from stochbn.posteriors.base import TINY, Posterior
from stochbn.posteriors.checks import check_tensor, check_whole
from stochbn.posteriors.noise import SOBOL, normals, sobol

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Directions", "Joint"]


class Directions(Sample["Joint"]):
    """The mini-batches of a joint posterior.

    Args:
        max_batches: how many mini-batches to keep, at least 2.
        directions: how many principal directions the posterior has at most; None keeps all.

    Raises:
        TypeError, ValueError: one of them is not such a whole number.
    """

    def __init__(self, max_batches: int = KEPT, directions: int | None = None) -> None:
        super().__init__(max_batches)
        if directions is not None:
            check_whole("directions", directions, 1)
        self.directions = directions

    def _posterior(self, **about: Any) -> Joint:
        return Joint.from_statistics(self.statistics(), self.directions, **about)

    def settings(self) -> dict[str, Any]:
        """The options that it was made with, which are those of its kind."""
        return {**super().settings(), "directions": self.directions}


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Joint(Posterior):
    r"""Posterior that is one Gaussian over the means and log-variances of all layers, with their correlations.

    .. math:: (\mu, \ln \sigma^2) = m + \sum_k z_k f_k + \sqrt{r} \, \varepsilon

    with a standard normal z_k for each direction f_k, and an epsilon for each entry. The directions are the principal
    directions of the observed covariance. It is shrunk towards its diagonal by the amount of Ledoit and Wolf, in the
    form of Schaefer and Strimmer (2005). The residual r restores the variance that shrinkage and omitted directions
    remove. So every mean and log-variance has exactly the observed variance, and every mean and variance the observed
    expectation. The covariance matrix is never computed. Memory is K + 2 vectors of length 2 D, which are read once for
    each draw, or once for 8 quasi-random draws.

    A channel that was dead (variance 0) in some mini-batches has the LogNormal spread of its variances' moments. One
    that was dead in all of them is drawn with the smallest float32 number as its variance.

    Attributes:
        location: m, ``[2 D]`` in float64: the expected means, and the log-variances that give the observed expected
            variances.
        directions: f_k, ``[K, 2 D]`` in float32: the principal directions, largest first, each as long as its standard
            deviation.
        residual: r, ``[2 D]`` in float64: the independent variance of each entry.
        shrinkage: from 0 (the observed correlations) to 1 (no correlations).
    """

    kind: ClassVar[str] = "joint"
    quasi_gain: ClassVar[float] = 2.0
    accumulator = Directions

    location: Tensor
    directions: Tensor
    residual: Tensor
    shrinkage: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tensor(self, "location", (2 * self.channels,), torch.float64, negative=True)
        check_tensor(self, "directions", (None, 2 * self.channels), torch.float32, negative=True)
        check_tensor(self, "residual", (2 * self.channels,), torch.float64, negative=False)
        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"shrinkage must be from 0 to 1, got {self.shrinkage}")

    @classmethod
    def from_statistics(cls, statistics: Tensor, most: int | None = None, **about: Any) -> Joint:
        """Make the posterior from the statistics of mini-batches.

        Args:
            statistics: means and variances, ``[M, 2, D]``.
            most: the largest number of directions; None keeps all, the smaller of M - 1 and 2 D.
            about: all attributes of `Posterior`.
        """
        m = len(statistics)
        rows = statistics.double()
        expected = rows[:, 1].mean(0)
        # Without a floor, a channel that was dead in a mini-batch would have the logarithm minus infinity.
        floor = (1e-3 * expected).clamp(min=TINY)
        # Nor may a channel outweigh all others because it is constant in every mini-batch and differs between them.
        scale = expected.maximum(rows[:, 0].var(0, correction=0)).clamp(min=TINY).sqrt()
        rows = torch.cat([rows[:, 0], rows[:, 1].maximum(floor)], 1)
        varies = (rows != rows[0]).any(0)
        rows[:, len(scale) :].log_()
        location = rows.mean(0)
        rows -= location
        rows *= varies  # rounding errors of constant statistics would be perfectly correlated, and shrinkage 0
        # The floor inflates the spread of the logarithm, so it is limited to that of the moments.
        part = slice(len(scale), None)
        wanted = (
            statistics[:, 1].double().var(0, correction=min(m - 1, 1)) / expected.clamp(min=TINY).square()
        ).log1p()
        spread = rows[:, part].square().sum(0) / max(m - 1, 1)
        excessive = (statistics[:, 1] < floor).any(0) & (spread > wanted)
        rows[:, part] *= torch.where(excessive, wanted / spread.clamp(min=TINY), 1).sqrt()
        total = rows.square().sum(0) / max(m - 1, 1)
        shrinkage = _shrinkage(rows, total)
        # Directions are ordered by their effect on the normalised activations: a shift, in their standard deviations,
        # or a factor, the root of that of the variance.
        products = _products(rows, torch.cat([1 / scale, torch.full_like(scale, 0.5)]))
        vectors = torch.linalg.eigh(products).eigenvectors.flip(1)
        rank = min(m - 1, rows.shape[1])
        vectors = vectors[:, : rank if most is None else min(most, rank)]
        directions = (vectors.T @ rows).mul_(math.sqrt((1 - shrinkage) / max(m - 1, 1)))
        residual = (total - torch.linalg.vector_norm(directions, dim=0).square()).clamp(min=0)
        location[len(scale) :] = expected.clamp(min=TINY).log() - total[len(scale) :] / 2
        return cls(location=location, directions=directions.float(), residual=residual, shrinkage=shrinkage, **about)

    @property
    def _log_variance_variance(self) -> Tensor:
        tail = slice(self.channels, None)
        return self.directions[:, tail].double().square().sum(0) + self.residual[tail]

    @property
    def expected(self) -> Tensor:
        """The expected means and the expected variances, ``[2, D]`` in float64."""
        mean, log_variance = self.location.view(2, -1)
        return torch.stack([mean, (log_variance + self._log_variance_variance / 2).exp()])

    @property
    def variance_of_means(self) -> Tensor:
        """The variance of the means, ``[D]`` in float64."""
        head = slice(self.channels)
        return self.directions[:, head].double().square().sum(0) + self.residual[head]

    def _noise(self, generator: torch.Generator | None, device: torch.device, quasi: bool) -> Iterator[Tensor]:
        location, directions, own = (t.to(device) for t in (self.location, self.directions, self.residual.sqrt()))
        leading = min(len(directions), SOBOL)
        points = sobol(leading, generator, device) if quasi and leading else None
        for z in normals(len(directions) + len(own), generator, device, quasi):
            if points is not None:
                z[:, :leading] = next(points)
            drawn = location + (z[:, : len(directions)].float() @ directions).double()
            drawn = drawn.addcmul_(own, z[:, len(directions) :]).view(len(z), 2, -1)
            drawn[:, 1].exp_()
            yield drawn

    def _scaled(self, factor: float) -> Self:
        shift = torch.cat([torch.zeros(self.channels), (1 - factor) / 2 * self._log_variance_variance])
        return replace(
            self,
            location=self.location + shift,
            directions=math.sqrt(factor) * self.directions,
            residual=factor * self.residual,
        )

    def _moved(self, mean: Tensor, variance: Tensor) -> Self:
        return replace(
            self, location=torch.cat([mean, variance.clamp(min=TINY).log() - self._log_variance_variance / 2])
        )


def _shrinkage(rows: Tensor, variance: Tensor) -> float:
    """The shrinkage of the correlations of `rows` ``[M, P]``, of mean 0, with the lowest expected squared error.

    The formula needs the sum of the squared errors of all correlations, and that of their squares (Schaefer and
    Strimmer, 2005). Both are computed from products between rows, without the P^2 correlations.
    """
    m = len(rows)
    if m < 3:
        return 1.0
    varies = variance > 0
    scale = torch.where(varies, 1 / variance.where(varies, 1).sqrt(), 0)
    gram = _products(rows, scale)
    products = gram.square().sum() - varies.sum() * (m - 1) ** 2
    fourth = sum((rows[:, part] * scale[part]).pow(4).sum() for part in _parts(len(scale)))
    squared = gram.diagonal().square().sum() - fourth
    errors = m / (m - 1) ** 3 * (squared - products / m)
    correlations = products / (m - 1) ** 2
    return min(max((errors / correlations).item(), 0.0), 1.0) if correlations > 0 else 1.0


def _products(rows: Tensor, weights: Tensor) -> Tensor:
    """``[M, M]``: the rows' products with each other, their entries times `weights`, without a copy of all of them."""
    total = rows.new_zeros(len(rows), len(rows))
    for part in _parts(len(weights)):
        weighted = rows[:, part] * weights[part]
        total.addmm_(weighted, weighted.T)
    return total


def _parts(length: int) -> list[slice]:
    return [slice(start, start + 4096) for start in range(0, length, 4096)]
