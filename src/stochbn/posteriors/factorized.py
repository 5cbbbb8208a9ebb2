"""The paper's distribution, independent for every statistic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from stochbn.posteriors.accumulators import Accumulator, Observation
from stochbn.posteriors.base import Posterior
from stochbn.posteriors.checks import check_tensor
from stochbn.posteriors.moments import Moments
from stochbn.posteriors.noise import normals

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Factorized", "MomentsOfLayers", "VarianceMomentsOfLayers", "stacked"]

P = TypeVar("P", bound=Posterior)


class MomentsOfLayers(Accumulator[P]):
    """The moments of every layer's statistics over its calls in all mini-batches, in float64."""

    enough = 5000  # gives standard deviations to 1 %: the relative standard error of one is 1 / sqrt(2 n)

    def __init__(self) -> None:
        super().__init__()
        self.moments: dict[str, Moments] = {}

    @property
    def layers(self) -> dict[str, int]:
        """The number of channels of every layer that was called."""
        return {name: moments.mean.shape[1] for name, moments in self.called.items()}

    @property
    def called(self) -> dict[str, Moments]:
        """The moments of every layer that was called, ``[2, C]``."""
        return {name: moments for name, moments in self.moments.items() if moments.count}

    def update(self, observation: Observation) -> None:
        """Add a mini-batch.

        Raises:
            ValueError: a layer has another number of channels than before.
        """
        self.moments = _joined(self.moments, {name: Moments.of(calls) for name, calls in observation.items()})
        self.seen += 1

    def merge(self, other: Self) -> Self:
        """A new accumulator that has seen the mini-batches of both. It is exact to the rounding of float64.

        Raises:
            ValueError: a layer has another number of channels in the other.
        """
        merged = type(self)()
        merged.moments = _joined(self.moments, other.moments)
        merged.seen = self.seen + other.seen
        return merged

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The moments of every layer."""
        tensors = {
            f"{i}.{part}": getattr(moments, part)
            for i, moments in enumerate(self.moments.values())
            for part in ("mean", "squares")
        }
        counts = [(name, moments.count) for name, moments in self.moments.items()]
        return tensors, {"seen": self.seen, "counts": counts}

    def with_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Self:
        """A new accumulator that remembers what `state` gave."""
        found = type(self)()
        found.seen = about["seen"]
        found.moments = {
            name: Moments(count, tensors[f"{i}.mean"], tensors[f"{i}.squares"])
            for i, (name, count) in enumerate(about["counts"])
        }
        return found


class VarianceMomentsOfLayers(MomentsOfLayers["Factorized"]):
    """The moments of means and variances."""

    def _posterior(self, **about: Any) -> Factorized:
        return Factorized.from_moments(self.called, **about)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Factorized(Posterior):
    r"""The paper's posterior, independent for every channel of every layer.

    .. math:: \mu_c \sim \mathrm{Normal}(m_c, s_c^2), \qquad \sigma_c^2 \sim \mathrm{LogNormal}(m'_c, s'^2_c)

    Normal and LogNormal have the mean and the variance of the observed mini-batches' statistics (Atanov et al., 2018,
    section 3). The variance of a dead channel (0 in every mini-batch) is always drawn as 0, and a statistic that never
    varied as its value.

    Attributes:
        mean_mean: ``[D]``, float64, like all below: mean of the mini-batch means.
        mean_variance: variance of the mini-batch means.
        variance_mean: mean of the mini-batch variances.
        variance_variance: variance of the mini-batch variances.
    """

    kind: ClassVar[str] = "factorized"
    quasi_gain: ClassVar[float] = 2.0
    accumulator = VarianceMomentsOfLayers

    mean_mean: Tensor
    mean_variance: Tensor
    variance_mean: Tensor
    variance_variance: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self._tensors():
            check_tensor(self, name, (self.channels,), torch.float64, negative=name == "mean_mean")

    @classmethod
    def from_moments(cls, moments: Mapping[str, Moments], **about: Any) -> Factorized:
        """Make the posterior from moments of the means and variances, ``[2, C]`` for every layer.

        Args:
            moments: of every layer.
            about: all attributes of `Posterior`; `layers` may be left out.
        """
        center, spread = stacked(moments)
        about.setdefault("layers", {name: one.mean.shape[1] for name, one in moments.items()})
        return cls(
            mean_mean=center[0].clone(),
            mean_variance=spread[0].clone(),
            variance_mean=center[1].clone(),
            variance_variance=spread[1].clone(),
            **about,
        )

    @property
    def log_variance_variance(self) -> Tensor:
        """``[D]``: the variance of the logarithm of the drawn variances, s'^2 = ln(1 + Var[sigma^2] / E[sigma^2]^2)."""
        alive = self.variance_mean > 0
        ratio = self.variance_variance.sqrt() / self.variance_mean.where(alive, 1)
        return torch.where(alive, ratio.square(), 0).log1p()

    @property
    def expected(self) -> Tensor:
        """The expected means and the expected variances, ``[2, D]`` in float64."""
        return torch.stack([self.mean_mean, self.variance_mean])

    @property
    def variance_of_means(self) -> Tensor:
        """The variance of the means, ``[D]`` in float64."""
        return self.mean_variance

    def _noise(self, generator: torch.Generator | None, device: torch.device, quasi: bool) -> Iterator[Tensor]:
        # sigma^2 = E[sigma^2] exp(s' z - s'^2 / 2) has the wanted mean, and needs no logarithm of a dead channel's 0.
        vectors = (self.mean_mean, self.mean_variance.sqrt(), self.variance_mean, self.log_variance_variance)
        m, s, v, log_s2 = (vector.to(device) for vector in vectors)
        log_s = log_s2.sqrt()
        for z in normals(2 * len(m), generator, device, quasi):
            first, second = z.view(len(z), 2, -1).unbind(1)
            yield torch.stack([m + s * first, v * (log_s * second - log_s2 / 2).exp()], 1)

    def _scaled(self, factor: float) -> Self:
        spread = self.variance_mean.square() * (factor * self.log_variance_variance).expm1()
        return replace(self, mean_variance=factor * self.mean_variance, variance_variance=spread)

    def _moved(self, mean: Tensor, variance: Tensor) -> Self:
        spread = variance.square() * self.log_variance_variance.expm1()
        return replace(self, mean_mean=mean, variance_mean=variance, variance_variance=spread)


def stacked(moments: Mapping[str, Moments]) -> tuple[Tensor, Tensor]:
    """Means and variances of the statistics of all layers, ``[2, D]`` each."""
    means, variances = [m.mean for m in moments.values()], [m.variance for m in moments.values()]
    return torch.cat(means, dim=1), torch.cat(variances, dim=1)


def _joined(first: Mapping[str, Moments], second: Mapping[str, Moments]) -> dict[str, Moments]:
    joined = dict(first)
    for name, moments in second.items():
        if name not in joined:
            joined[name] = moments
            continue
        if joined[name].mean.shape != moments.mean.shape:
            shapes = joined[name].mean.shape[1], moments.mean.shape[1]
            raise ValueError(f"layer {name!r} has {shapes[1]} channels here and had {shapes[0]} before")
        joined[name] = joined[name].merge(moments)
    return joined
