"""The empirical posterior, which replays the statistics of mini-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stochbn.posteriors.accumulators import Sample
from stochbn.posteriors.base import Posterior
from stochbn.posteriors.checks import check_tensor

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Empirical", "Replayed"]


class Replayed(Sample["Empirical"]):
    """The mini-batches of an empirical posterior."""

    def _posterior(self, **about: Any) -> Empirical:
        return Empirical.from_statistics(self.statistics(), **about)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Empirical(Posterior):
    """Posterior that replays the statistics of observed mini-batches, as MC-BN does (Teye et al., 2018).

    Draws are without replacement. Once all mini-batches have been drawn, they are drawn again in another order.

    Attributes:
        statistics: ``[M, 2, D]``, float32: means and variances in each of M mini-batches.
    """

    kind: ClassVar[str] = "empirical"
    quasi_gain: ClassVar[float] = 1.0
    accumulator = Replayed

    statistics: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tensor(self, "statistics", (None, 2, self.channels), torch.float32, negative=True)
        if not len(self.statistics):
            raise ValueError("statistics must be of at least one mini-batch")
        if (self.statistics[:, 1] < 0).any():
            raise ValueError("statistics must have no negative variances")

    @classmethod
    def from_statistics(cls, statistics: Tensor, **about: Any) -> Empirical:
        """Make the posterior from the statistics of mini-batches, ``[M, 2, D]``, and all attributes of `Posterior`."""
        return cls(statistics=statistics.float(), **about)

    @property
    def expected(self) -> Tensor:
        """The expected means and the expected variances, ``[2, D]`` in float64."""
        return self.statistics.mean(0, dtype=torch.float64)

    @property
    def variance_of_means(self) -> Tensor:
        """The variance of the means, ``[D]`` in float64."""
        return self.statistics[:, 0].double().var(0, correction=0)

    def _noise(self, generator: torch.Generator | None, device: torch.device, quasi: bool) -> Iterator[Tensor]:
        while True:
            for i in torch.randperm(len(self.statistics), generator=generator, device=device).tolist():
                yield self.statistics[i : i + 1].to(device, torch.float64)

    def _scaled(self, factor: float) -> Self:
        (mean, variance), root = self.expected, math.sqrt(factor)
        means = mean + root * (self.statistics[:, 0] - mean)
        # Scales the logarithm of the variances, without that of a dead channel's 0; then restores the expected value.
        ratios = torch.where(variance > 0, self.statistics[:, 1] / variance.where(variance > 0, 1), 1).pow(root)
        return replace(self, statistics=torch.stack([means, ratios * (variance / ratios.mean(0))], 1).float())

    def _moved(self, mean: Tensor, variance: Tensor) -> Self:
        old_mean, old = self.expected
        means = self.statistics[:, 0] + (mean - old_mean)
        variances = torch.where(old > 0, self.statistics[:, 1] * (variance / old.where(old > 0, 1)), variance)
        return replace(self, statistics=torch.stack([means, variances], 1).float())
