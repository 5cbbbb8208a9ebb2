"""Conformalised quantiles: what is added to both ends of predicted intervals so that they hold the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from torch import Tensor

from stochbn.conformal.base import Rule, by_group, numbers
from stochbn.conformal.intervals import check_estimate, ends

__all__ = ["QuantileIntervals", "cqr", "normal_quantiles"]


@dataclass(frozen=True)
class QuantileIntervals(Rule):
    """Makes prediction intervals of predicted quantiles.

    Attributes:
        threshold: what is added to both ends, in the unit of the numbers; negative where the quantiles are too far
            apart. Of each group ``[G]`` with `groups`.
        coverage: how often intervals hold the truth, at least, of exchangeable examples.
        groups: names of groups, in each of which the coverage holds.
    """

    threshold: float | Tensor
    coverage: float
    groups: tuple[str, ...] = ()

    kind: ClassVar[str] = "quantiles"

    def __call__(self, lower: Any, upper: Any, groups: Any = None) -> Tensor:
        """``[2, N, ...]``: the lower and the upper end for predicted quantiles ``[N, ...]``.

        Where the ends would cross, both are at their middle.

        Raises:
            TypeError, ValueError: they are no finite numbers of one shape.
        """
        lower, upper = numbers(lower=lower, upper=upper)
        margin = self._thresholds(groups, lower)
        middle = (lower + upper) / 2
        return torch.stack([torch.minimum(lower - margin, middle), torch.maximum(upper + margin, middle)])

    def of(self, prediction: Any, groups: Any = None) -> Tensor:
        """The intervals ``[2, N, ...]`` of a `stochbn.predictions.Estimate`, about its normal quantiles."""
        check_estimate(prediction)
        return self(*normal_quantiles(prediction.mean, prediction.total_std, self.coverage), groups)

    def within(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``low`` and ``high``, in the shape of the means."""
        if self.groups or "total_std" not in outputs:
            return {}
        half = (NormalDist().inv_cdf((1 + self.coverage) / 2) * outputs["total_std"] + self.threshold).clamp(min=0)
        return {"low": outputs["mean"] - half, "high": outputs["mean"] + half}

    def columns(self, prediction: Any, names: Sequence[str], groups: Any = None) -> dict[str, list[Any]]:
        """``low`` and ``high``, of several numbers ``low_0``, ``low_1``, ..."""
        return ends(self.of(prediction, groups))

    def scores(self, lower: Any, upper: Any, targets: Any) -> Tensor:
        """``[N, ...]``, float64: how far targets are outside of the quantiles; negative inside.

        Raises:
            TypeError, ValueError: as the call.
        """
        lower, upper, targets = numbers(lower=lower, upper=upper, targets=targets)
        return torch.maximum(lower - targets, targets - upper)

    def check(self) -> None:
        """Refuse intervals that cannot be stored."""
        self._check_threshold()


def cqr(lower: Any, upper: Any, targets: Any, coverage: float = 0.9, *, groups: Any = None) -> QuantileIntervals:
    """Intervals between predicted quantiles, wider or narrower at both ends by as much as held-out examples need.

    Args:
        lower: ``[N]``, ``[N, D]`` or dense: the quantile at ``(1 - coverage) / 2``, predicted for held-out examples by
            a network that was trained for it, or of a normal distribution, see `normal_quantiles`.
        upper: likewise at ``(1 + coverage) / 2``.
        targets: their true values.
        coverage: as for `stochbn.conformal.intervals`.
        groups: as for `stochbn.conformal.intervals`.

    Raises:
        TypeError, ValueError: no finite numbers of one shape, or too few examples for the coverage.

    Source: Romano, Patterson and Candes, 2019, "Conformalized quantile regression".

    >>> cqr([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.5, 3.0, 1.5], 0.75)([0.0], [1.0])
    tensor([[-2.],
            [ 3.]], dtype=torch.float64)
    """
    scores = QuantileIntervals(0.0, float(coverage)).scores(lower, upper, targets)
    threshold, names = by_group(scores, coverage, groups)
    return QuantileIntervals(threshold, float(coverage), names)


def normal_quantiles(mean: Tensor, std: Tensor | None, coverage: float) -> tuple[Tensor, Tensor]:
    """The quantiles of normal distributions between which a share of ``coverage`` lies, in float64.

    Raises:
        ValueError: there are no standard deviations.
    """
    if std is None:
        raise ValueError("these intervals need standard deviations, and this network's predictions have none")
    mean, std = numbers(mean=mean, std=std)
    z = NormalDist().inv_cdf((1 + coverage) / 2)
    return mean - z * std, mean + z * std
