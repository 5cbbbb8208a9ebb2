"""The paper's distribution, fitted as in its published experiments: by moments of the logarithm of the variance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stochbn.posteriors.accumulators import Observation
from stochbn.posteriors.base import TINY, Posterior
from stochbn.posteriors.checks import check_tensor
from stochbn.posteriors.factorized import MomentsOfLayers, stacked
from stochbn.posteriors.noise import normals

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FLOOR", "FactorizedLog", "LogMomentsOfLayers"]

FLOOR = 1e-6
"""Added to a mini-batch's variance before taking its logarithm, as published."""


class LogMomentsOfLayers(MomentsOfLayers["FactorizedLog"]):
    """The moments of every layer's means and log-variances over its calls in all mini-batches, in float64."""

    def update(self, observation: Observation) -> None:
        """Add a mini-batch.

        Raises:
            ValueError: a layer has another number of channels than before.
        """
        logarithms = {
            name: torch.stack([calls[:, 0], (calls[:, 1] + FLOOR).log()], 1) for name, calls in observation.items()
        }
        super().update(logarithms)

    def _posterior(self, **about: Any) -> FactorizedLog:
        center, spread = stacked(self.called)
        return FactorizedLog(
            mean_mean=center[0].clone(),
            mean_variance=spread[0].clone(),
            log_mean=center[1].clone(),
            log_variance=spread[1].clone(),
            **about,
        )


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class FactorizedLog(Posterior):
    r"""The paper's posterior, fitted by moments of ln sigma^2 as in the published experiments.

    .. math:: \mu_c \sim \mathrm{Normal}(m_c, s_c^2), \qquad \ln \sigma_c^2 \sim \mathrm{Normal}(m'_c, s'^2_c)

    independent for every channel of every layer. `Factorized` is the same family, fitted by moments of sigma^2 itself.
    The two differ if the variances of mini-batches are not log-normal. 1e-6 is added to each variance first, so the
    variance of a dead channel is drawn as 1e-6.

    Attributes:
        mean_mean: ``[D]``, float64, like all below: mean of the mini-batch means.
        mean_variance: variance of the mini-batch means.
        log_mean: mean of the logarithm of the mini-batch variances.
        log_variance: variance of the logarithm of the mini-batch variances.
    """

    kind: ClassVar[str] = "factorized-log"
    quasi_gain: ClassVar[float] = 2.0
    accumulator = LogMomentsOfLayers

    mean_mean: Tensor
    mean_variance: Tensor
    log_mean: Tensor
    log_variance: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self._tensors():
            check_tensor(self, name, (self.channels,), torch.float64, negative=name.endswith("_mean"))

    @property
    def expected(self) -> Tensor:
        """The expected means and the expected variances, ``[2, D]`` in float64."""
        return torch.stack([self.mean_mean, (self.log_mean + self.log_variance / 2).exp()])

    @property
    def variance_of_means(self) -> Tensor:
        """The variance of the means, ``[D]`` in float64."""
        return self.mean_variance

    def median(self) -> Self:
        r"""Return a posterior without noise, with every statistic at its median: m_c and exp(m'_c).

        The published experiments call predictions with these statistics "no SBN". They differ from the network's
        running variances, which are arithmetic means of unbiased variances, and from ``rescale(math.inf)``, which has
        the expected values.
        """
        none = torch.zeros_like(self.mean_mean)
        return replace(self, mean_variance=none, log_variance=none, batch_size=math.inf, fitted_size=None)

    def _noise(self, generator: torch.Generator | None, device: torch.device, quasi: bool) -> Iterator[Tensor]:
        center = torch.stack([self.mean_mean, self.log_mean]).to(device)
        spread = torch.stack([self.mean_variance, self.log_variance]).sqrt().to(device)
        for z in normals(center.numel(), generator, device, quasi):
            drawn = center + spread * z.view(len(z), 2, -1)
            drawn[:, 1].exp_()
            yield drawn

    def _scaled(self, factor: float) -> Self:
        return replace(
            self,
            mean_variance=factor * self.mean_variance,
            log_mean=self.log_mean + (1 - factor) / 2 * self.log_variance,
            log_variance=factor * self.log_variance,
        )

    def _moved(self, mean: Tensor, variance: Tensor) -> Self:
        return replace(self, mean_mean=mean, log_mean=variance.clamp(min=TINY).log() - self.log_variance / 2)
