"""Multi-label classification: any number of K labels for each example, each with a probability of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stochbn.metrics.entropies import entropy
from stochbn.network.calling import read_output
from stochbn.tasks.base import (
    Join,
    Predictions,
    Scores,
    Task,
    floating,
    influence_error,
    joined,
    standard_error,
    whole_labels,
)
from stochbn.tasks.binary import check_sigmoid, logit
from stochbn.tasks.classification import Prediction, calibration_error, confidence_bins
from stochbn.tasks.draw_scores import CLASS_SCORES, DrawScore

__all__ = ["Multilabel", "MultilabelPrediction"]


@dataclass(frozen=True, eq=False, repr=False)
class MultilabelPrediction(Prediction):
    """Prediction of labels for N examples, each label with its own probability.

    Attributes are those of `Prediction`; `entropy` and `expected_entropy` are sums over labels.
    """

    @property
    def entropy(self) -> Tensor:
        """The sum over labels of their entropies, ``[N]`` in nats."""
        return entropy(self.probs, self.class_axis) + entropy(1 - self.probs, self.class_axis)

    def columns(self, classes: Sequence[str] = (), top: int = 1) -> dict[str, list[Any]]:
        """Return the prediction as columns of a table: ``probability_<label>`` of each label, and the measures.

        Args:
            classes: the names of the labels; without them, their numbers are used.
            top: has no effect, as every label has a column.

        Raises:
            ValueError: as `Prediction.columns`.
        """
        names = self._names(classes)
        return {f"probability_{name}": self.probs[:, i].tolist() for i, name in enumerate(names)} | self._in_columns()


@dataclass(frozen=True)
class Multilabel(Task):
    """Task of networks with a logit (or probability) for each of K labels, ``[N, K, ...]``."""

    name: ClassVar[str] = "multilabel"
    sets_hold: ClassVar[str] = "labels"
    outputs: ClassVar[tuple[str, ...]] = ("probs", "entropy", "mutual_information")
    part: ClassVar[tuple[str, str]] = ("label", "labels")
    calibrated_by: ClassVar[tuple[str, ...]] = tuple(CLASS_SCORES)
    labels_expected: ClassVar[str] = "0 or 1 for each label, [N, K]"
    score_columns: ClassVar[Mapping[str, tuple[str, int, float]]] = {
        "error %": ("error", 2, 1),
        "NLL": ("nll", 4, 1),
        "Brier": ("brier", 4, 1),
        "ECE %": ("ece", 2, 100),
        "AUROC": ("auroc", 4, 1),
    }

    def raw(self, output: Any) -> Tensor:
        """The logits ``[N, K, ...]``, with the labels moved to axis 1."""
        found = floating(read_output(output, self.place), "logits")
        axis = 1 if self.class_axis is None else self.class_axis
        if not -found.ndim <= axis < found.ndim or axis % found.ndim == 0:
            raise ValueError(f"expected logits [N, K, ...] with labels on axis {axis}, found shape {list(found.shape)}")
        found = found.movedim(axis, 1)
        return logit(found) if self.output == "probs" else found

    def check(self, raw: Tensor) -> None:
        """Warn of probabilities in place of logits."""
        check_sigmoid(self, raw)

    def values(self, raw: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Probabilities of each label, and the sums of their entropies."""
        probs = (raw if temperature == 1 else raw / temperature).sigmoid()
        return probs, entropy(probs, 2) + entropy(1 - probs, 2)

    def keep(self, raw: Tensor, temperature: float) -> Tensor:
        """Log-probabilities of each label."""
        return torch.nn.functional.logsigmoid(raw / temperature)

    def prediction(
        self, mean: Tensor, second: Tensor, variance: Tensor | None, kept: Tensor | None
    ) -> MultilabelPrediction:
        """Probabilities in the layout of the output."""
        axis = 1 if self.class_axis is None else self.class_axis % mean.ndim
        if kept is not None:
            kept = kept.movedim(2, axis + 1)
        return MultilabelPrediction(mean.movedim(1, axis), second, kept, class_axis=axis)

    def labels(self, batch: Any) -> Tensor:
        """The labels in a batch, 0 or 1, also as fractions or truth values."""
        return whole_labels(self, batch, fractions=True)

    def paired(self, raw: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each label as a choice between two classes: raw values ``[N, 2, K, ...]`` for labels ``[N, K, ...]``."""
        return torch.stack([torch.zeros_like(raw), raw], 1), labels

    def units(self, labels: Tensor) -> str:
        """Labels."""
        return "labels"

    def draw_score(self, name: str, temperatures: Tensor) -> DrawScore:
        """The negative log-likelihood (``"nll"``) or the Brier score (``"brier"``) of each label."""
        return CLASS_SCORES[name](temperatures)

    def scores(self, predictions: Predictions, join: Join = dict, ignore: int | None = None) -> Scores:
        """`stochbn.metrics.multilabel`, with errors over examples; the loss of an example is its mean NLL."""
        from stochbn.metrics import multilabel

        batches = [
            {"probs": p.probs.cpu(), "labels": y.reshape(p.probs.shape) if y.numel() == p.probs.numel() else y}
            for p, y in predictions
        ]
        probs, labels = joined(batches, join).values()
        values = multilabel(probs, labels)
        there, exact = labels > 0, probs.double()
        losses = -torch.where(there, probs, 1 - probs).double().clamp(min=torch.finfo(probs.dtype).tiny).log().mean(1)
        bins = torch.stack([confidence_bins(p, y) for p, y in zip(exact, there.double(), strict=True)])
        errors = {
            "error": standard_error(100 * ((probs >= 0.5) != there).double().mean(1)),
            "nll": standard_error(losses),
            "brier": standard_error((exact - there.double()).square().mean(1)),
            "ece": calibration_error(bins, torch.full((len(probs),), probs.shape[1], dtype=torch.float64))[1],
            "auroc": _auroc_error(exact, there),
        }
        return Scores(values, errors, {"NLL": losses})


def _auroc_error(probs: Tensor, there: Tensor) -> float:
    """The standard error of the mean AUROC over labels ``[N, K]``; NaN where no label is there and is not.

    Source: DeLong, DeLong and Clarke-Pearson, 1988; examples are the same for all labels.
    """
    influences = []
    for p, with_it in zip(probs.T, there.T, strict=True):
        if not with_it.any() or with_it.all():
            continue
        influence = torch.zeros(len(p), dtype=torch.float64)
        for own, others in ((with_it, ~with_it), (~with_it, with_it)):
            ordered = p[others].sort().values
            below = (torch.searchsorted(ordered, p[own]) + torch.searchsorted(ordered, p[own], right=True)) / 2
            placement = below.double() / len(ordered)
            influence[own] = (placement - placement.mean()) / len(placement) * (1 if own is with_it else -1)
        influences.append(influence)
    return influence_error(torch.stack(influences).mean(0)) if influences else math.nan
