"""What predictives return: class probabilities with their uncertainty, or numbers with theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Estimate", "MultilabelPrediction", "Prediction", "entropy"]


def entropy(probs: Tensor, axis: int = 1) -> Tensor:
    """The entropy in nats over an axis of probabilities: that of the classes, ``[N, K, ...]`` to ``[N, ...]``.

    >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor([0.6931, 0.0000])
    """
    total: Tensor = torch.special.entr(probs).sum(axis)
    return total


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """What a predictive says of N objects; for dense outputs every tensor has their places too.

    Attributes:
        probs: probabilities ``[N, K]``, the mean over draws, in the layout of the network's output.
        expected_entropy: ``[N]``, nats: the mean over draws of each draw's entropy, the uncertainty that
            remains when the statistics are known (aleatoric).
        log_probs: ``[S, N, K]``, the log-probabilities of each draw, if ``keep_draws=True`` asked for them.
        class_axis: the axis of the classes in `probs`.
        note: why there is no mutual information, where one pass without draws was made.
    """

    probs: Tensor
    expected_entropy: Tensor
    log_probs: Tensor | None = None
    class_axis: int = 1
    note: str = ""

    @property
    def entropy(self) -> Tensor:
        """``[N]``, nats: the entropy of `probs`, the total uncertainty."""
        return entropy(self.probs, self.class_axis)

    @property
    def mutual_information(self) -> Tensor:
        """``[N]``, nats: entropy of the mean minus mean of the entropies, the part due to the draws (epistemic).

        From S independent draws it comes out too small by about a share 1 / S. Objects that are done after few draws
        have it smaller still, for single ones by half or more; `tolerance=0` gives all objects all draws.
        """
        return (self.entropy - self.expected_entropy).clamp(min=0)

    def __repr__(self) -> str:
        return _line(self, "probs", entropy=self.entropy, mutual_information=self.mutual_information)

    def columns(self, classes: Sequence[str] = (), top: int = 1) -> dict[str, list[Any]]:
        """The prediction as columns of a table, a row for each example: as ``stochbn predict`` writes them.

        Args:
            classes: the names of the classes; none are their numbers.
            top: how many of the most probable classes to name.

        Returns:
            ``class`` and ``probability`` (and ``class_2``, ... up to `top`), ``entropy`` and ``mutual_information``.

        Raises:
            ValueError: there are other numbers of names, or the output is dense, with more than one row an example.
        """
        names, found = self._names(classes), dict[str, list[Any]]()
        best, index = self.probs.topk(min(top, len(names)))
        for i in range(best.shape[1]):
            ending = f"_{i + 1}" if i else ""
            found[f"class{ending}"] = [names[j] for j in index[:, i].tolist()]
            found[f"probability{ending}"] = best[:, i].tolist()
        return found | self._measures()

    def _names(self, classes: Sequence[str]) -> list[str]:
        if self.probs.ndim != 2:
            raise ValueError(
                f"expected probabilities [N, K], one row for each example, got {list(self.probs.shape)}: dense outputs "
                "have no table"
            )
        k = self.probs.shape[1]
        if classes and len(classes) != k:
            raise ValueError(f"there are {len(classes)} names of classes, and the network has {k} classes")
        return list(classes) or list(map(str, range(k)))

    def _measures(self) -> dict[str, list[Any]]:
        return {"entropy": self.entropy.tolist(), "mutual_information": self.mutual_information.tolist()}

    def to_pandas(self, classes: Sequence[str] = ()) -> DataFrame:
        """A data frame with a row for each example: `columns`, and ``probability_<class>`` of each class.

        Args:
            classes: the names of the classes; none are their numbers.

        Raises:
            ModuleNotFoundError: pandas is not installed.
            ValueError: as `columns`.
        """
        each = {f"probability_{name}": p.tolist() for name, p in zip(self._names(classes), self.probs.T, strict=True)}
        return _frame(self.columns(classes) | each)

    @staticmethod
    def cat(predictions: Sequence[Any]) -> Any:
        """One prediction for the objects of several of one type, in their order.

        Raises:
            ValueError: there are none, or they differ in their classes, draws or types.
        """
        if not predictions:
            raise ValueError("there are no predictions to join; expected at least one")
        kept = [p.draws_kept for p in predictions if p.draws_kept is not None]
        if len(kept) not in (0, len(predictions)):
            raise ValueError("some of the predictions to join kept their draws and others did not")
        if len({type(p) for p in predictions}) > 1:
            raise ValueError("the predictions to join are of different tasks")
        try:
            columns = [torch.cat(column) for column in zip(*(p.averages for p in predictions), strict=True)]
            joined = predictions[0].of(columns, torch.cat(kept, dim=1) if kept else None)
            return joined if len({p.note for p in predictions}) == 1 else replace(joined, note="")
        except RuntimeError as error:
            raise ValueError(f"the predictions differ in their classes or draws: {error}") from error

    @property
    def averages(self) -> tuple[Tensor, ...]:
        """The tensors that are averages over draws."""
        return self.probs, self.expected_entropy

    @property
    def draws_kept(self) -> Tensor | None:
        """What was kept of every draw."""
        return self.log_probs

    def of(self, averages: Sequence[Tensor], kept: Tensor | None) -> Prediction:
        """A prediction like this one, of other averages and draws."""
        return replace(self, probs=averages[0], expected_entropy=averages[1], log_probs=kept)

    def mixed(self, other: Prediction, share: float) -> Prediction:
        """The mixture of this prediction and another one of the same objects, which has a share of it."""
        averages = [a.lerp(b.to(a), share) for a, b in zip(self.averages, other.averages, strict=True)]
        return replace(self.of(averages, None), note="")


@dataclass(frozen=True, eq=False, repr=False)
class MultilabelPrediction(Prediction):
    """What a predictive says of the labels of N objects: each has a probability of its own.

    Attributes are those of `Prediction`; `entropy` and `expected_entropy` are sums over labels.
    """

    @property
    def entropy(self) -> Tensor:
        """``[N]``, nats: the sum over labels of their entropies."""
        return entropy(self.probs, self.class_axis) + entropy(1 - self.probs, self.class_axis)

    def columns(self, classes: Sequence[str] = (), top: int = 1) -> dict[str, list[Any]]:
        """The prediction as columns of a table: ``probability_<label>`` of each label, and the measures.

        Args:
            classes: the names of the labels; none are their numbers.
            top: has no effect, as every label has a column.

        Raises:
            ValueError: as `Prediction.columns`.
        """
        names = self._names(classes)
        return {f"probability_{name}": self.probs[:, i].tolist() for i, name in enumerate(names)} | self._measures()


@dataclass(frozen=True, eq=False, repr=False)
class Estimate:
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

    def __repr__(self) -> str:
        return _line(self, "mean", std=self.std, total_std=self.total_std)

    def columns(self) -> dict[str, list[Any]]:
        """The estimate as columns of a table, a row for each example: as ``stochbn predict`` writes them.

        Returns:
            ``mean``, ``std`` and ``total_std``, of several numbers ``mean_0``, ``mean_1``, ...

        Raises:
            ValueError: the output is dense, with more than one row an example.
        """
        found: dict[str, list[Any]] = {}
        for name, values in (("mean", self.mean), ("std", self.std), ("total_std", self.total_std)):
            if values.ndim > 2:
                raise ValueError(f"expected numbers [N] or [N, D] for each example, got {list(values.shape)}: no table")
            columns = values.reshape(len(values), -1).T
            for i, column in enumerate(columns):
                found[f"{name}_{i}" if len(columns) > 1 else name] = column.tolist()
        return found

    def to_pandas(self) -> DataFrame:
        """A data frame with a row for each example: `columns`.

        Raises:
            ModuleNotFoundError: pandas is not installed.
            ValueError: as `columns`.
        """
        return _frame(self.columns())

    cat = staticmethod(Prediction.cat)

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


def _line(prediction: Any, name: str, **measures: Tensor) -> str:
    """What a prediction is, in one line: its shape, and measures in the mean over examples."""
    shape = f"{name} {list(getattr(prediction, name).shape)}"
    means = [f"mean {key.replace('_', ' ')} {float(values.mean()):.3g}" for key, values in measures.items()]
    kept = prediction.draws_kept
    parts = [shape, *means, *([f"{len(kept)} draws kept"] if kept is not None else [])]
    return f"<{type(prediction).__name__}: {', '.join(parts)}{f'; {prediction.note}' if prediction.note else ''}>"


def _frame(columns: dict[str, list[Any]]) -> DataFrame:
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to_pandas needs pandas: pip install pandas", name="pandas") from error
    return pandas.DataFrame(columns)
