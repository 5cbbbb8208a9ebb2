"""Regression: numbers, with or without a variance from the network."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from stochbn.network.calling import read_output
from stochbn.tasks.answers import Answer, table_columns
from stochbn.tasks.base import Join, Panel, Predictions, Scores, Task, floating, joined, standard_error
from stochbn.tasks.draw_scores import DrawScore
from stochbn.tasks.regression_panels import panels
from stochbn.tasks.residual import Moments, Residual

__all__ = ["Estimate", "Regression"]

UNKNOWN = (
    "total_std is None, as neither the network nor a calibration says how far observations are from their mean; std is "
    "that of the draws alone"
)
ADAPTED = "the posterior was adapted after its residual variance was fitted, so total_std is that of other data"
REMEDY = "fit it to labelled data that the network was not trained on, with 'stochbn calibrate' or stochbn.calibrate"
LEVELS = (0.5, 0.8, 0.9, 0.95)
"""The levels of the central intervals whose coverage is scored."""


@dataclass(frozen=True, eq=False, repr=False)
class Estimate(Answer):
    """Prediction of numbers for N examples: a mean and its uncertainty.

    Attributes:
        mean: the mean over draws, ``[N]``, ``[N, D]`` or dense, in the layout of the network's output.
        variance: the variance over draws (epistemic), of the same shape.
        noise_variance: the mean over draws of the network's own variance (aleatoric), of the same shape; 0 for a
            network without variances.
        total_variance: the variance of an observation, of the same shape; None if it is not known, see `total_std`.
        draws: every draw, ``[S, N, ...]``, with ``keep_draws=True``.
        note: a remark, such as why there is no variance if one pass without draws was made.
    """

    mean: Tensor
    variance: Tensor
    noise_variance: Tensor
    total_variance: Tensor | None = None
    draws: Tensor | None = None
    note: str = ""

    @property
    def std(self) -> Tensor:
        """The standard deviation over draws: the uncertainty of the mean, not that of a single observation."""
        return self.variance.sqrt()

    @property
    def total_std(self) -> Tensor | None:
        """The standard deviation of an observation, or None if it is not known.

        It is known after `stochbn.calibrate` has fitted a residual variance on held-out data, or from the network's own
        variances. The standard deviation over draws is far too small for it.
        """
        return None if self.total_variance is None else self.total_variance.sqrt()

    @property
    def measures(self) -> dict[str, Tensor]:
        """The standard deviations that are known."""
        return {"std": self.std} if self.total_std is None else {"std": self.std, "total_std": self.total_std}

    def columns(self, classes: Sequence[str] = (), top: int = 1) -> dict[str, list[Any]]:
        """Return the estimate as columns of a table, with a row for each example, as ``stochbn predict`` writes them.

        Args:
            classes: has no effect.
            top: has no effect.

        Returns:
            ``mean``, ``std`` and, if it is known, ``total_std``; for several numbers ``mean_0``, ``mean_1``, ...

        Raises:
            ValueError: the output is dense.
        """
        return table_columns({"mean": self.mean, **self.measures})

    @property
    def averages(self) -> tuple[Tensor, ...]:
        """The tensors that are averages over draws; the total variance is the last, if it is known."""
        known = () if self.total_variance is None else (self.total_variance,)
        return self.mean, self.variance, self.noise_variance, *known

    @property
    def draws_kept(self) -> Tensor | None:
        """The numbers of every draw."""
        return self.draws

    def of(self, averages: Sequence[Tensor], kept: Tensor | None) -> Estimate:
        """Return an estimate like this one, with other averages and draws."""
        mean, variance, noise, *total = averages
        found = total[0] if total else None
        return replace(self, mean=mean, variance=variance, noise_variance=noise, total_variance=found, draws=kept)

    def mixed(self, other: Estimate, share: float) -> Estimate:
        """Return the mixture of this estimate and another one of the same examples, which has the weight `share`.

        The difference of the two means adds to the variance over draws. The total is known if both know it.
        """
        mean, variance, noise, *total = (b.to(self.mean) for b in other.averages)
        between = share * (1 - share) * (mean - self.mean).square()
        known = (
            self.total_variance.lerp(total[0], share) + between if self.total_variance is not None and total else None
        )
        return Estimate(
            self.mean.lerp(mean, share),
            self.variance.lerp(variance, share) + between,
            self.noise_variance.lerp(noise, share),
            known,
            note=UNKNOWN if UNKNOWN in self.note + other.note else "",
        )


@dataclass(frozen=True)
class Regression(Task):
    """Task of networks that predict numbers ``[N]``, ``[N, D]`` or ``[N, D, ...]``, or means and log-variances.

    A tuple of exactly two tensors of one shape is a pair of mean and log-variance. Two places name such a pair too.

    Attributes:
        residual: the variance of an observation, as `stochbn.calibrate` has fitted it; predictives set it.
    """

    name: ClassVar[str] = "regression"
    outputs: ClassVar[tuple[str, ...]] = ("mean", "std", "total_std")
    has_classes: ClassVar[bool] = False
    takes_pair: ClassVar[bool] = True
    early: ClassVar[bool] = False
    spread: ClassVar[bool] = True
    binned: ClassVar[bool] = True
    sets_hold: ClassVar[str] = "numbers"
    part: ClassVar[tuple[str, str]] = ("tenth", "tenths of the predicted numbers")
    uncertainty: ClassVar[tuple[str, ...]] = ("total_std", "total_std_0", "std", "std_0")
    calibrated_by: ClassVar[tuple[str, ...]] = ("nll",)
    fits_residual: ClassVar[bool] = True
    score_columns: ClassVar[Mapping[str, tuple[str, int, float]]] = {
        "RMSE": ("rmse", 4, 1),
        "MAE": ("mae", 4, 1),
        "NLL": ("nll", 4, 1),
        "CRPS": ("crps", 4, 1),
        "pinball": ("pinball", 4, 1),
        **{f"in {100 * level:g} % intervals, %": (f"coverage_{100 * level:g}", 1, 100) for level in LEVELS},
        "width of 90 %": ("width", 4, 1),
    }

    residual: Residual | None = None

    def mix(self, raw: Tensor) -> Tensor:
        """The numbers, ``[N, D, ...]``."""
        numbers = raw[:, 0]
        return numbers if numbers.ndim > 1 else numbers[:, None]

    def raw(self, output: Any) -> Tensor:
        """The numbers ``[N, 1, ...]``, or the means and log-variances ``[N, 2, ...]``."""
        found = self._pair(output)
        if found is None:
            return floating(read_output(output, self.place), "numbers").unsqueeze(1)
        mean, log_variance = (floating(values, "numbers") for values in found)
        if mean.shape != log_variance.shape:
            raise ValueError(
                f"expected means and log-variances of one shape, found {list(mean.shape)} and "
                f"{list(log_variance.shape)}"
            )
        return torch.stack([mean, log_variance], 1)

    def _pair(self, output: Any) -> Sequence[Any] | None:
        if isinstance(self.place, tuple):
            return [read_output(output, place) for place in self.place]
        pair = self.place is None and isinstance(output, (tuple, list)) and len(output) == 2
        if pair and all(isinstance(value, Tensor) for value in output) and output[0].shape == output[1].shape:
            return list(output)
        return None

    def values(self, raw: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The numbers ``[S, N, ...]``, and the network's variances ``[S, N, 1, ...]``; none if it has none."""
        return raw[:, :, 0], raw[:, :, 1:].exp()

    def prediction(self, mean: Tensor, second: Tensor, variance: Tensor | None, kept: Tensor | None) -> Estimate:
        """Mean, variance over draws, and the variance of an observation if it is known."""
        draws = torch.zeros_like(mean) if variance is None else variance
        noise = second[:, 0] if second.shape[1] else None
        total = None if noise is None else draws + noise
        if self.residual is not None:
            total = self.residual.total(draws, noise)
        note = UNKNOWN if total is None else ADAPTED if self.residual is not None and self.residual.adapted else ""
        return Estimate(mean, draws, torch.zeros_like(mean) if noise is None else noise, total, kept, note)

    def calibrated(self, posterior: Any) -> Regression:
        """The task with the residual variance that a posterior has."""
        found = None if posterior is None else posterior.residual_variance
        return self if found is None else replace(self, residual=found)

    def caveat(self, posterior: Any, known: Collection[str]) -> str:
        """A sentence if the variance of an observation is not known, or was fitted on other data."""
        if not any(name == "nll" or name.startswith("total_std") for name in known):
            return f"{UNKNOWN}. To know it, {REMEDY}."
        adapted = posterior is not None and posterior.residual_variance and posterior.residual_variance.adapted
        return f"{ADAPTED[0].upper()}{ADAPTED[1:]}: {REMEDY}." if adapted else ""

    def counted(self, labels: Tensor, ignore: int | None) -> Tensor:
        """All of them."""
        if ignore is not None:
            raise ValueError("numbers have no label that could be ignored: leave out of the data what does not count")
        return torch.ones_like(labels, dtype=torch.bool)

    def units(self, labels: Tensor) -> str:
        """``"numbers"`` if an example has several."""
        return "numbers" if labels.numel() > len(labels) else "examples"

    def draw_score(self, name: str, temperatures: Tensor) -> DrawScore:
        """The moments that a residual variance is fitted to."""
        return Moments(temperatures) if name == "nll" else super().draw_score(name, temperatures)

    def scores(self, predictions: Predictions, join: Join = dict, ignore: int | None = None) -> Scores:
        """Errors of the mean and, if the variance of an observation is known, scores of its Normal distribution.

        ``coverage_90`` is the share of targets in the central intervals of 90 %; other levels are named alike.
        ``pinball`` is the mean pinball loss of the quantiles at their ends.
        """
        batches: list[dict[str, Tensor]] = []
        for prediction, labels in predictions:
            self.counted(labels, ignore)
            if labels.numel() != prediction.mean.numel():
                shapes = list(prediction.mean.shape), list(labels.shape)
                raise ValueError(f"expected targets {shapes[0]}, as the network predicts, got {shapes[1]}")
            truth = labels.to(prediction.mean).reshape(prediction.mean.shape)
            batch = {"mean": prediction.mean, "truth": truth}
            if prediction.total_std is not None:
                batch["std"] = prediction.total_std
            batches.append({name: values.double().cpu() for name, values in batch.items()})
        found = joined(batches, join)
        mean, truth, std = found["mean"], found["truth"], found.get("std")
        each = {"rmse": (truth - mean).square(), "mae": (truth - mean).abs()}
        if std is not None:
            each |= _of_normal(mean, std, truth)
        rows = {name: one.reshape(len(mean), -1).mean(1) for name, one in each.items()}
        values = {name: one.mean().item() for name, one in rows.items()}
        errors = {name: standard_error(one) for name, one in rows.items()}
        values["rmse"] = values["rmse"] ** 0.5
        errors["rmse"] /= max(2 * values["rmse"], 1e-300)
        losses = {"squared error": rows["rmse"]}
        return Scores(values, errors, losses if std is None else {"NLL": rows["nll"], **losses}, evidence=found)

    def panels(self, scores: Mapping[str, Scores]) -> Sequence[Panel]:
        """Predicted against true, errors against their standard deviation, and coverage by level."""
        return panels({name: one.evidence for name, one in scores.items()})


def _of_normal(mean: Tensor, std: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Scores of each number under a Normal distribution, of the numbers' shape.

    Source: Gneiting and Raftery, 2007, "Strictly proper scoring rules, prediction, and estimation".
    """
    from stochbn.metrics import crps_of_each, gaussian_nll_of_each, pinball_of_each

    found = {"nll": gaussian_nll_of_each(mean, std, truth), "crps": crps_of_each(mean, std, truth)}
    off, losses = (truth - mean).abs() / std, []
    for level in LEVELS:
        half = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64))
        found[f"coverage_{100 * level:g}"] = (off <= half).double()
        ends = [(mean + sign * half * std, (1 + sign * level) / 2) for sign in (-1, 1)]
        losses += [pinball_of_each(end, truth, quantile) for end, quantile in ends]
        if level == 0.9:
            found["width"] = 2 * half * std
    return {**found, "pinball": torch.stack(losses).mean(0)}
