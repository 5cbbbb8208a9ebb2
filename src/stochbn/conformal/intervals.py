"""Intervals about predicted means, by the residuals of held-out examples in units of their standard deviations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stochbn.conformal.base import Rule, by_group, numbers
from stochbn.predictions import Estimate

__all__ = ["Intervals", "check_estimate", "ends", "intervals"]


@dataclass(frozen=True)
class Intervals(Rule):
    """Makes prediction intervals of means and standard deviations.

    Attributes:
        threshold: half an interval's width, in standard deviations or, without `scaled`, in the unit of the numbers; of
            each group ``[G]`` with `groups`.
        coverage: how often intervals hold the truth, at least, of exchangeable examples.
        scaled: whether widths are in standard deviations.
        groups: names of groups, in each of which the coverage holds.
    """

    threshold: float | Tensor
    coverage: float
    scaled: bool = True
    groups: tuple[str, ...] = ()

    kind: ClassVar[str] = "intervals"

    def __call__(self, mean: Any, std: Any = None, groups: Any = None) -> Tensor:
        """``[2, N, ...]``: the lower and the upper end for means and standard deviations ``[N, ...]``.

        Args:
            mean: the predicted means.
            std: their standard deviations; not used without `scaled`.
            groups: the group of each example, for intervals by group. In one that was not among the held-out examples
                they are infinite.

        Raises:
            TypeError, ValueError: they are no finite numbers of one shape, or a standard deviation is negative or
                missing.
        """
        mean, spread = self._read(mean, std)
        half = self._thresholds(groups, mean) * spread
        return torch.stack((mean - half, mean + half))

    def of(self, prediction: Any, groups: Any = None) -> Tensor:
        """The intervals ``[2, N, ...]`` of a `stochbn.predictions.Estimate`."""
        check_estimate(prediction)
        return self(prediction.mean, prediction.total_std if self.scaled else None, groups)

    def within(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``low`` and ``high``, in the shape of the means."""
        if self.groups or (self.scaled and "total_std" not in outputs):
            return {}
        half = self.threshold * (outputs["total_std"] if self.scaled else torch.ones_like(outputs["mean"]))
        return {"low": outputs["mean"] - half, "high": outputs["mean"] + half}

    def columns(self, prediction: Any, names: Sequence[str], groups: Any = None) -> dict[str, list[Any]]:
        """``low`` and ``high``, of several numbers ``low_0``, ``low_1``, ..."""
        return ends(self.of(prediction, groups))

    def scores(self, mean: Any, std: Any, targets: Any) -> Tensor:
        """``[N, ...]``, float64: how far targets are from means, in standard deviations.

        Raises:
            TypeError, ValueError: as the call, or a standard deviation is 0.
        """
        mean, spread = self._read(mean, std, positive=True)
        mean, targets = numbers(mean=mean, targets=targets)
        scores: Tensor = (targets - mean).abs() / spread
        return scores

    def check(self) -> None:
        """Refuse intervals that cannot be stored."""
        if type(self.scaled) is not bool:
            raise ValueError("intervals must tell whether they are in standard deviations")
        self._check_threshold()

    def _read(self, mean: Any, std: Any, *, positive: bool = False) -> tuple[Tensor, Tensor]:
        if not self.scaled:
            (mean,) = numbers(mean=mean)
            return mean, torch.ones_like(mean)
        if std is None:
            raise ValueError(
                "these intervals are in standard deviations, and there are none: pass std, or fit without it"
            )
        mean, std = numbers(mean=mean, std=std)
        if (std < 0).any() or (positive and (std == 0).any()):
            wanted = "positive" if positive else "at least 0"
            raise ValueError(f"standard deviations must be {wanted}, found {std.min().item():g}")
        return mean, std


def check_estimate(prediction: Any) -> None:
    """Refuse predictions that are no numbers.

    Raises:
        TypeError: they are not.
    """
    if not isinstance(prediction, Estimate):
        raise TypeError(f"these intervals are of numbers, got a {type(prediction).__name__}")


def ends(found: Tensor) -> dict[str, list[float]]:
    """Intervals ``[2, N]`` or ``[2, N, D]`` as columns of a table.

    Raises:
        ValueError: they are dense, with more than one row an example.
    """
    if found.ndim > 3:
        raise ValueError(f"expected one row for each example, got intervals {list(found.shape)}")
    each = found.reshape(2, found.shape[1], -1)
    count = each.shape[2]
    return {
        f"{name}_{i}" if count > 1 else name: each[end, :, i].tolist()
        for end, name in enumerate(("low", "high"))
        for i in range(count)
    }


def intervals(mean: Any, std: Any, targets: Any, coverage: float = 0.9, *, groups: Any = None) -> Intervals:
    """Intervals about predicted means, as wide as their standard deviations have to be multiplied to hold the truth.

    Args:
        mean: ``[N]``, ``[N, D]`` or dense, predicted for held-out examples.
        std: their standard deviations, positive, such as ``prediction.total_std``. None makes intervals of one width,
            by the residuals themselves.
        targets: their true values.
        coverage: how often intervals are to hold the truth. Of several numbers, or places, an example: the share of an
            example's numbers that intervals are to hold, on average over examples.
        groups: the group of each example, ``[N]``: a factor for each group, so that the coverage holds in every group.

    Raises:
        TypeError, ValueError: no finite numbers of one shape, a standard deviation that is not positive, or too few
            examples for the coverage.

    Source: Lei et al., 2018, "Distribution-free predictive inference for regression" (locally weighted); of several
    numbers Angelopoulos et al., 2024, "Conformal risk control".

    >>> intervals([0.0, 0.0, 0.0], [1.0, 1.0, 2.0], [1.0, -2.0, 6.0], 0.75)([5.0], [2.0])
    tensor([[-1.],
            [11.]], dtype=torch.float64)
    """
    unfitted = Intervals(0.0, float(coverage), scaled=std is not None)
    threshold, names = by_group(unfitted.scores(mean, std, targets), coverage, groups)
    return Intervals(threshold, float(coverage), std is not None, names)
