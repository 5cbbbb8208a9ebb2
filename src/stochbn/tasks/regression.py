"""Regression: numbers, or numbers with a variance that the network gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from stochbn.network.calling import read_output
from stochbn.tasks.answers import Answer, table_columns
from stochbn.tasks.base import Join, Predictions, Scores, Task, floating, joined, standard_error

__all__ = ["Estimate", "Regression"]


@dataclass(frozen=True, eq=False, repr=False)
class Estimate(Answer):
    """What a predictive says of N objects where the network gives numbers: a mean and its uncertainty.

    Attributes:
        mean: ``[N]``, ``[N, D]`` or dense, in the layout of the network's output: the mean over draws.
        variance: of the same shape: the variance over draws (epistemic).
        noise_variance: of the same shape: the mean over draws of the variance that the network itself gives
            (aleatoric); 0 for a network that gives none.
        draws: ``[S, N, ...]``: every draw, if ``keep_draws=True`` asked for them.
        note: why there is no variance, where one pass without draws was made.
    """

    mean: Tensor
    variance: Tensor
    noise_variance: Tensor
    draws: Tensor | None = None
    note: str = ""

    @property
    def std(self) -> Tensor:
        """The standard deviation over draws."""
        return self.variance.sqrt()

    @property
    def total_std(self) -> Tensor:
        """The standard deviation of an observation: of the draws and of the network's own variance together."""
        return (self.variance + self.noise_variance).sqrt()

    @property
    def measures(self) -> dict[str, Tensor]:
        """The standard deviations."""
        return {"std": self.std, "total_std": self.total_std}

    def columns(self, classes: Sequence[str] = (), top: int = 1) -> dict[str, list[Any]]:
        """The estimate as columns of a table, a row for each example: as ``stochbn predict`` writes them.

        Args:
            classes: has no effect.
            top: has no effect.

        Returns:
            ``mean``, ``std`` and ``total_std``, of several numbers ``mean_0``, ``mean_1``, ...

        Raises:
            ValueError: the output is dense, with more than one row an example.
        """
        return table_columns({"mean": self.mean, **self.measures})

    @property
    def averages(self) -> tuple[Tensor, ...]:
        """The tensors that are averages over draws."""
        return self.mean, self.variance, self.noise_variance

    @property
    def draws_kept(self) -> Tensor | None:
        """What was kept of every draw."""
        return self.draws

    def of(self, averages: Sequence[Tensor], kept: Tensor | None) -> Estimate:
        """An estimate like this one, of other averages and draws."""
        mean, variance, noise = averages
        return replace(self, mean=mean, variance=variance, noise_variance=noise, draws=kept)

    def mixed(self, other: Estimate, share: float) -> Estimate:
        """The mixture of this estimate and another one of the same objects, which has a share of it.

        What the two means differ by is variance over draws too.
        """
        mean, variance, noise = (b.to(a) for a, b in zip(self.averages, other.averages, strict=True))
        between = share * (1 - share) * (mean - self.mean).square()
        return Estimate(
            self.mean.lerp(mean, share),
            self.variance.lerp(variance, share) + between,
            self.noise_variance.lerp(noise, share),
        )


@dataclass(frozen=True)
class Regression(Task):
    """Numbers ``[N]``, ``[N, D]`` or ``[N, D, ...]``, or a pair of them: mean and log-variance of each.

    A tuple of exactly two tensors of one shape is such a pair, and so is what two places name.
    """

    name: ClassVar[str] = "regression"
    outputs: ClassVar[tuple[str, ...]] = ("mean", "std", "total_std")
    has_classes: ClassVar[bool] = False
    takes_pair: ClassVar[bool] = True
    early: ClassVar[bool] = False
    spread: ClassVar[bool] = True
    binned: ClassVar[bool] = True
    part: ClassVar[tuple[str, str]] = ("tenth", "tenths of the predicted numbers")
    uncertainty: ClassVar[tuple[str, ...]] = ("total_std", "total_std_0")
    score_columns: ClassVar[Mapping[str, tuple[str, int, float]]] = {
        "RMSE": ("rmse", 4, 1),
        "MAE": ("mae", 4, 1),
        "NLL": ("nll", 4, 1),
        "CRPS": ("crps", 4, 1),
        "in 90 % intervals, %": ("coverage", 1, 100),
        "their width": ("width", 4, 1),
    }

    def mix(self, raw: Tensor) -> Tensor:
        """The numbers, ``[N, D, ...]``."""
        numbers = raw[:, 0]
        return numbers if numbers.ndim > 1 else numbers[:, None]

    def raw(self, output: Any) -> Tensor:
        """``[N, 1, ...]``, the numbers, or ``[N, 2, ...]``, the means and log-variances."""
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
        """The numbers, and the variances that the network gives them (0 if it gives none)."""
        return raw[:, :, 0], raw[:, :, 1].exp() if raw.shape[2] == 2 else torch.zeros_like(raw[:, :, 0])

    def prediction(self, mean: Tensor, second: Tensor, variance: Tensor | None, kept: Tensor | None) -> Estimate:
        """Mean, standard deviation over draws, and that of an observation."""
        return Estimate(mean, torch.zeros_like(mean) if variance is None else variance, second, kept)

    def scores(self, predictions: Predictions, join: Join = dict, ignore: int | None = None) -> Scores:
        """`stochbn.metrics.regression`; the loss is the NLL where the network gives variances, or the squared error."""
        from stochbn.metrics import gaussian_nll_of_each, regression

        if ignore is not None:
            raise ValueError("numbers have no label that could be ignored: leave out of the data what does not count")
        batches: list[dict[str, Tensor]] = []
        for prediction, labels in predictions:
            if labels.numel() != prediction.mean.numel():
                shapes = list(prediction.mean.shape), list(labels.shape)
                raise ValueError(f"expected targets {shapes[0]}, as the network predicts, got {shapes[1]}")
            truth = labels.to(prediction.mean).reshape(prediction.mean.shape)
            std, noise = prediction.total_std, prediction.noise_variance
            batch = {"mean": prediction.mean, "std": std, "noise": noise, "truth": truth}
            batches.append({name: values.double().cpu() for name, values in batch.items()})
        mean, std, noise, truth = joined(batches, join).values()
        squares = (truth - mean).square().reshape(len(mean), -1).mean(1)
        off = (truth - mean).abs().reshape(len(mean), -1).mean(1)
        rmse = squares.mean().sqrt().item()
        errors = {"rmse": standard_error(squares) / max(2 * rmse, 1e-300), "mae": standard_error(off)}
        if not (std > 0).all():
            return Scores({"rmse": rmse, "mae": off.mean().item()}, errors, squares, "squared error")
        values = regression(mean, std, truth)
        if not (noise > 0).all():
            return Scores(values, errors, squares, "squared error")
        each = gaussian_nll_of_each(mean, std, truth).reshape(len(mean), -1).mean(1)
        return Scores(values, {**errors, "nll": standard_error(each)}, each)
