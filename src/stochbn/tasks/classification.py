"""Classification: one of K classes for each example, or for each pixel of a dense output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stochbn.caller import warn
from stochbn.metrics.entropies import entropy
from stochbn.network.calling import read_output
from stochbn.tasks.answers import Answer, frame
from stochbn.tasks.base import Join, Predictions, Scores, Task, floating, ratio_error, whole_labels
from stochbn.tasks.draw_scores import CLASS_SCORES, DrawScore

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Classification", "Prediction"]


@dataclass(frozen=True, eq=False, repr=False)
class Prediction(Answer):
    """Prediction of classes for N examples; for dense outputs every tensor has their spatial axes too.

    Attributes:
        probs: probabilities, the mean over draws, ``[N, K]`` in the layout of the network's output.
        expected_entropy: the mean over draws of each draw's entropy, ``[N]`` in nats: the uncertainty that remains when
            the statistics are known (aleatoric).
        log_probs: the log-probabilities of each draw, ``[S, N, K]``, with ``keep_draws=True``.
        class_axis: the axis of the classes in `probs`.
        note: why there is no mutual information, if one pass without draws was made.
    """

    probs: Tensor
    expected_entropy: Tensor
    log_probs: Tensor | None = None
    class_axis: int = 1
    note: str = ""

    @property
    def entropy(self) -> Tensor:
        """The entropy of `probs`, ``[N]`` in nats: the total uncertainty."""
        return entropy(self.probs, self.class_axis)

    @property
    def mutual_information(self) -> Tensor:
        """The part of the entropy that is due to the draws (epistemic), ``[N]`` in nats.

        It is the entropy of the mean minus the mean of the entropies. From S independent draws it is too small by a
        share of about 1 / S. Where sampling stops early it is smaller still, for single examples by half or more. With
        ``tolerance=0`` all examples get all draws.
        """
        return (self.entropy - self.expected_entropy).clamp(min=0)

    @property
    def measures(self) -> dict[str, Tensor]:
        """Entropy and mutual information."""
        return {"entropy": self.entropy, "mutual_information": self.mutual_information}

    def columns(self, classes: Sequence[str] = (), top: int = 1) -> dict[str, list[Any]]:
        """Return the prediction as columns of a table, with a row for each example, as ``stochbn predict`` writes them.

        Args:
            classes: the names of the classes; without them, their numbers are used.
            top: the number of most probable classes to name.

        Returns:
            ``class`` and ``probability`` (and ``class_2``, ... up to `top`), ``entropy`` and ``mutual_information``.

        Raises:
            ValueError: the number of names is wrong, or the output is dense.
        """
        names, found = self._names(classes), dict[str, list[Any]]()
        best, index = self.probs.topk(min(top, len(names)))
        for i in range(best.shape[1]):
            ending = f"_{i + 1}" if i else ""
            found[f"class{ending}"] = [names[j] for j in index[:, i].tolist()]
            found[f"probability{ending}"] = best[:, i].tolist()
        return found | self._in_columns()

    def _names(self, classes: Sequence[str]) -> list[str]:
        if self.probs.ndim != 2:
            raise ValueError(
                f"expected one prediction for each example, probabilities [N, K], got {list(self.probs.shape)}: dense "
                "outputs have no table; with 'stochbn predict' they need --masks FOLDER"
            )
        k = self.probs.shape[1]
        if classes and len(classes) != k:
            raise ValueError(f"there are {len(classes)} names of classes, and the network has {k} classes")
        return list(classes) or list(map(str, range(k)))

    def _in_columns(self) -> dict[str, list[Any]]:
        return {name: values.tolist() for name, values in self.measures.items()}

    def to_pandas(self, classes: Sequence[str] = ()) -> DataFrame:
        """Return a data frame with a row for each example: `columns`, and ``probability_<class>`` for each class.

        Args:
            classes: the names of the classes; without them, their numbers are used.

        Raises:
            ModuleNotFoundError: pandas is not installed.
            ValueError: as `columns`.
        """
        each = {f"probability_{name}": p.tolist() for name, p in zip(self._names(classes), self.probs.T, strict=True)}
        return frame(self.columns(classes) | each)

    @property
    def averages(self) -> tuple[Tensor, ...]:
        """The tensors that are averages over draws."""
        return self.probs, self.expected_entropy

    @property
    def draws_kept(self) -> Tensor | None:
        """The values that were kept of every draw."""
        return self.log_probs

    def of(self, averages: Sequence[Tensor], kept: Tensor | None) -> Prediction:
        """Return a prediction like this one, with other averages and draws."""
        return replace(self, probs=averages[0], expected_entropy=averages[1], log_probs=kept)


@dataclass(frozen=True)
class Classification(Task):
    """One of K classes: logits or probabilities ``[N, K, ...]``."""

    name: ClassVar[str] = "classification"
    outputs: ClassVar[tuple[str, ...]] = ("probs", "entropy", "mutual_information")
    one_class: ClassVar[bool] = True
    sets_hold: ClassVar[str] = "classes"
    calibrated_by: ClassVar[tuple[str, ...]] = tuple(CLASS_SCORES)
    labels_expected: ClassVar[str] = "whole numbers from 0 to K - 1"
    score_columns: ClassVar[Mapping[str, tuple[str, int, float]]] = {
        "error %": ("error", 2, 1),
        "NLL": ("nll", 4, 1),
        "Brier": ("brier", 4, 1),
        "ECE %": ("ece", 2, 100),
    }

    def raw(self, output: Any) -> Tensor:
        """The logits ``[N, K, ...]``, with the classes moved to axis 1."""
        found = floating(read_output(output, self.place), self.output or "logits")
        axis = 1 if self.class_axis is None else self.class_axis
        if not -found.ndim <= axis < found.ndim or axis % found.ndim == 0 or found.shape[axis] < 2:
            raise ValueError(
                f"expected {self.output or 'logits'} [N, K, ...] with K >= 2 classes on axis {axis}, found shape "
                f"{list(found.shape)}; name another place with logits=..., another axis with class_axis=..., or "
                'another task: task="binary" for one logit, task="regression" for outputs that are no classes'
            )
        found = found.movedim(axis, 1)
        return found.log() if self.output == "probs" else found

    def check(self, raw: Tensor) -> None:
        """Raise for probabilities in place of logits, or the reverse; warn if classes may be on another axis."""
        if self.output == "probs":
            total = raw.exp().sum(1)
            if raw.isnan().any() or not torch.allclose(total, torch.ones_like(total), atol=1e-2):
                raise ValueError(
                    'expected probabilities over classes on axis 1 with output="probs", but they do not sum to 1; '
                    'use output="logits" for logits, class_axis=... for another axis, or task="multilabel"'
                )
            return
        if self.class_axis is None:
            self._check_axis(raw)
        if self.output is None and raw.numel() and raw.amin() >= 0 and raw.amax() <= 1:
            total = raw.sum(1)
            if torch.allclose(total, torch.ones_like(total), atol=_rounding(raw)):
                raise ValueError(
                    "the network's outputs are probabilities (from 0 to 1, and 1 in sum), not logits: pass "
                    'output="probs" to take them as they are, or output="logits" if they are logits all the same'
                )
            if raw.numel() >= 16:
                warn(
                    "the network's outputs all lie between 0 and 1 and get a softmax: if they are sigmoids, pass "
                    'task="multilabel" with output="probs"; if they are logits, pass output="logits"',
                )

    def _check_axis(self, raw: Tensor) -> None:
        shape = list(raw.shape)
        square = len(set(shape[1:-1])) == 1 and shape[-1] != shape[1]
        likely = raw.ndim == 3 or (raw.ndim > 3 and (square or shape[-1] < min(shape[1:-1])))
        if likely and raw.shape[1:].numel():
            warn(
                f"the network's output has the shape {shape}, and axis 1 is taken as that of the classes; "
                "pass class_axis=1 if that is right, or class_axis=-1 if the classes are on the last axis",
            )

    def values(self, raw: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Probabilities, and their entropies."""
        probs = (raw if temperature == 1 else raw / temperature).softmax(2)
        return probs, entropy(probs, 2)

    def keep(self, raw: Tensor, temperature: float) -> Tensor:
        """Log-probabilities."""
        return (raw if temperature == 1 else raw / temperature).log_softmax(2)

    def prediction(self, mean: Tensor, second: Tensor, variance: Tensor | None, kept: Tensor | None) -> Prediction:
        """Probabilities in the layout of the output."""
        axis = 1 if self.class_axis is None else self.class_axis % mean.ndim
        if kept is not None:
            kept = kept.movedim(2, axis + 1)
        return Prediction(mean.movedim(1, axis), second, kept, class_axis=axis)

    def labels(self, batch: Any) -> Tensor:
        """The classes in a batch, whole numbers."""
        return whole_labels(self, batch, fractions=False)

    def draw_score(self, name: str, temperatures: Tensor) -> DrawScore:
        """The negative log-likelihood (``"nll"``) or the Brier score (``"brier"``) of mean probabilities."""
        return CLASS_SCORES[name](temperatures)

    def scores(self, predictions: Predictions, join: Join = dict, ignore: int | None = None) -> Scores:
        """Score all pixels together; the loss of an example is the mean NLL of its pixels.

        Memory does not grow with the pixels: only their number, mean scores and calibration bins are kept for each
        example.
        """
        from stochbn.metrics import BINS, evaluate

        keys = ("error", "nll", "brier")
        rows, bins = [], []  # for each example its pixels and their mean scores, and counts by confidence
        for prediction, labels in predictions:
            probs = prediction.probs.movedim(prediction.class_axis, 1).cpu()
            for one, truth, mask in zip(probs, labels, self.counted(labels, ignore), strict=True):
                if not mask.any():
                    continue
                scores = evaluate(one[None], truth[None], ignore_index=ignore)
                rows.append([float(mask.sum()), *(scores[key] for key in keys)])
                confidence, predicted = (values[mask] for values in one.double().max(0))
                bins.append(confidence_bins(confidence, (predicted == truth[mask]).double()))
        each = torch.tensor(rows, dtype=torch.float64).view(-1, 1 + len(keys))
        empty = torch.empty(0, 3, BINS, dtype=torch.float64)
        found = join({"each": each, "bins": torch.stack(bins) if bins else empty})
        places, *columns = found["each"].unbind(1)
        if not len(places):
            raise ValueError("there is nothing to evaluate: no place has a label that counts")
        values = {key: ((places * one).sum() / places.sum()).item() for key, one in zip(keys, columns, strict=True)}
        errors = {key: ratio_error(one, places) for key, one in zip(keys, columns, strict=True)}
        values["ece"], errors["ece"] = calibration_error(found["bins"], places)
        return Scores(values, errors, {"NLL": columns[keys.index("nll")]}, weights=places)


def _rounding(probs: Tensor) -> float:
    """The tolerance for sums of probabilities that were rounded to the coarsest type that holds these numbers."""
    for dtype in (torch.float16, torch.bfloat16):
        if probs.to(dtype).to(probs.dtype).equal(probs):
            return 4 * torch.finfo(dtype).eps
    return 1e-4


def confidence_bins(confidence: Tensor, right: Tensor) -> Tensor:
    """The sum of confidences, the correct predictions, and the count in each bin of equal width, ``[3, BINS]``."""
    from stochbn.metrics import BINS

    bins = (confidence.clamp(max=1 - 2**-53) * BINS).long()
    counts = torch.zeros(3, BINS, dtype=torch.float64)
    for row, values in enumerate((confidence, right, torch.ones_like(right))):
        counts[row].index_add_(0, bins.flatten(), values.double().flatten())
    return counts


def calibration_error(bins: Tensor, places: Tensor) -> tuple[float, float]:
    """The expected calibration error and its standard error, by the jackknife over examples.

    Args:
        bins: the `confidence_bins` of each example, ``[N, 3, BINS]``.
        places: the number of pixels of each example, ``[N]``.
    """
    total, n = bins.sum(0), len(bins)
    gaps = total[0] - total[1]
    without = (gaps - (bins[:, 0] - bins[:, 1])).abs().sum(1) / (places.sum() - places)
    error = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt().item() if n > 1 else torch.nan
    return (gaps.abs().sum() / places.sum()).item(), error
