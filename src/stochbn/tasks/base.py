"""The base class of tasks: how a network's output is read, averaged, calibrated, scored and shown."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from stochbn.arrays import as_array, as_tensor
from stochbn.tasks.answers import Answer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stochbn.tasks.draw_scores import DrawScore

__all__ = [
    "Change",
    "Join",
    "Panel",
    "Predictions",
    "Scores",
    "Task",
    "floating",
    "joined",
    "ratio_error",
    "standard_error",
]

Predictions = Iterable[tuple[Any, Tensor]]
"""Predictions and labels, batch by batch."""
Join = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Concatenates tensors ``[n, ...]`` of all processes that share the data."""


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of one method on labelled data.

    Attributes:
        values: the scores, by name.
        errors: the standard errors of the scores, as far as they are known.
        losses: the losses of each example, ``[N]`` in float64, by name. Methods are compared by the first that both
            have.
        weights: the weight of each example, such as its number of pixels, ``[N]``; None: equal weights.
        evidence: the data of the report's figures.
        resampled: scores that are no means over examples, ``[1 + B]``, by name: of all examples, and of B samples of
            them with replacement, which are the same for all methods. Methods are compared by the first, where higher
            is better.
    """

    values: Mapping[str, float]
    errors: Mapping[str, float]
    losses: Mapping[str, Tensor]
    weights: Tensor | None = None
    evidence: Mapping[str, Tensor] = field(default_factory=dict)
    resampled: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def examples(self) -> int:
        """N."""
        return len(next(iter(self.losses.values())) if self.weights is None else self.weights)

    def change(self, other: Scores) -> Change:
        """What changes from this method to another one that was scored on the same examples."""
        if self.resampled:
            name = next(iter(self.resampled))
            sample = other.resampled[name] - self.resampled[name]
            return Change(name, sample[0].item(), spread_of(sample[1:]), higher_is_better=True)
        name = next(name for name in other.losses if name in self.losses)
        change = other.losses[name] - self.losses[name]
        weights = torch.ones_like(change) if self.weights is None else self.weights
        mean = ((weights * change).sum() / weights.sum()).item()
        return Change(name, mean, ratio_error(change, weights))


@dataclass(frozen=True)
class Change:
    """What changes from one method to another.

    Attributes:
        name: what was compared, such as a loss.
        change: how much higher it is, of a loss in the mean.
        error: the standard error of that, paired over examples; NaN where it is not known.
        higher_is_better: whether more of it is better.
    """

    name: str
    change: float
    error: float
    higher_is_better: bool = False

    @property
    def what(self) -> str:
        """What was compared, in words."""
        return self.name if self.higher_is_better else f"mean {self.name}"

    @property
    def worse(self) -> bool:
        """Whether the other method is worse, by more than twice the standard error."""
        return (-self.change if self.higher_is_better else self.change) > 2 * self.error


@dataclass(frozen=True, eq=False)
class Panel:
    """A figure of a report.

    Attributes:
        title: the heading, a question.
        caption: sentences that explain the figure.
        draw: draws the figure, given the axes and the colour of each method.
    """

    title: str
    caption: str
    draw: Callable[[Axes, Mapping[str, str]], None]


@dataclass(frozen=True)
class Task(ABC):
    """Base class of tasks: what a network's output means.

    A task turns an output into raw values, a tensor ``[N, C, ...]`` of float32 or finer. Draws of these are averaged,
    and the task turns the averages into a prediction. A subclass must define `raw`, `values` and `prediction`. The
    other methods make it usable in `stochbn.calibrate` and at the command line.

    Attributes:
        place: the place in the output, see `stochbn.network.calling.read_output`; for regression also a pair of places,
            of the mean and of the log-variance.
        class_axis: the axis of the classes in the output; None is axis 1.
        output: ``"logits"`` or ``"probs"``; None is logits, unless they look like something else.

    Raises:
        TypeError, ValueError: a field is of the wrong type, or applies only to tasks with classes.
    """

    name: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]]
    """The attributes of a prediction that an exported network outputs."""
    has_classes: ClassVar[bool] = True
    """Whether `class_axis` and `output` apply."""
    takes_pair: ClassVar[bool] = False
    """Whether `place` may be a pair."""
    one_class: ClassVar[bool] = False
    """Whether each example, or pixel, has one class. This allows prediction sets, ensembles and unknown classes."""
    sets_hold: ClassVar[str] = ""
    """What prediction sets contain: ``classes``, ``labels`` or ``numbers``; empty if there are none."""
    early: ClassVar[bool] = True
    """Whether sampling may stop early by default, because the scale of errors is known."""
    spread: ClassVar[bool] = False
    """Whether the variance over draws is part of the prediction."""
    binned: ClassVar[bool] = False
    """Whether `mix` returns numbers, whose shares in bins are the mix, instead of shares."""
    part: ClassVar[tuple[str, str]] = ("class", "classes")
    """The word for one component of the mix, singular and plural."""
    uncertainty: ClassVar[tuple[str, ...]] = ("entropy",)
    """Columns of a table that measure uncertainty; the first that exists is used."""
    calibrated_by: ClassVar[tuple[str, ...]] = ()
    """The scores that `stochbn.calibrate` can minimise; none if the task cannot be calibrated."""
    fits_residual: ClassVar[bool] = False
    """Whether `stochbn.calibrate` fits a residual variance, and no temperature."""
    score_columns: ClassVar[Mapping[str, tuple[str, int, float]]] = {}
    """The columns of a table of scores: the name of the score, its digits, and a factor; empty without scores."""

    place: Any = None
    class_axis: int | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        if self.output not in (None, "logits", "probs"):
            raise ValueError(f'output must be "logits", "probs" or None, got {self.output!r}')
        axis = self.class_axis
        if axis is not None and (not isinstance(axis, int) or isinstance(axis, bool)):
            raise TypeError(f"class_axis must be a whole number or None, got {axis!r}")
        if not self.has_classes and (axis is not None or self.output is not None):
            raise ValueError(
                f"the task {self.name!r} has no classes, so class_axis and output do not apply; leave them out"
            )
        if isinstance(self.place, (tuple, list)):
            if not self.takes_pair:
                raise ValueError(
                    f"the task {self.name!r} reads one place of the output, got the pair {self.place!r}; the tasks "
                    "'regression' and 'detection' read two"
                )
            if len(self.place) != 2:
                raise ValueError(f"expected two places, of the mean and of the log-variance, got {self.place!r}")
            object.__setattr__(self, "place", tuple(self.place))

    # From an output to a prediction

    @abstractmethod
    def raw(self, output: Any) -> Tensor:
        """Read the raw values ``[N, C, ...]`` from a network's output.

        Raises:
            TypeError, ValueError: the task cannot read this type or shape.
        """

    def check(self, raw: Tensor) -> None:  # noqa: B027 - numbers can be anything
        """Warn of raw values that do not look as the task expects.

        Raises:
            ValueError: the values cannot belong to the task.
        """

    @abstractmethod
    def values(self, raw: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Turn raw values ``[S, N, C, ...]`` into two tensors ``[S, N, ...]`` to average over draws.

        The first makes the prediction, and its variance over draws decides when sampling stops.
        """

    @abstractmethod
    def prediction(self, mean: Tensor, second: Tensor, variance: Tensor | None, kept: Tensor | None) -> Answer:
        """Make the prediction from the means of both values, the variance of the first over draws, and kept draws."""

    def calibrated(self, posterior: Any) -> Task:
        """Return the task with the parts that `stochbn.calibrate` fitted, other than a temperature."""
        return self

    def caveat(self, posterior: Any, known: Collection[str]) -> str:
        """Sentences about the limits of predictions; empty for none.

        Args:
            posterior: the posterior of the draws, or None.
            known: the columns, or scores, that exist.
        """
        return ""

    def keep(self, raw: Tensor, temperature: float) -> Tensor:
        """Select what to keep of every draw from raw values ``[S, N, C, ...]``."""
        return self.values(raw, temperature)[0]

    def mix(self, raw: Tensor) -> Tensor:
        """The contribution of raw values ``[N, C, ...]`` to the mix of a group: shares ``[N, K, ...]``, or numbers."""
        return self.values(raw[None], 1.0)[0][0]

    def description(self) -> dict[str, Any]:
        """The task for a file: the arguments of `stochbn.tasks.make_task`."""
        return {"name": self.name, "place": self.place, "class_axis": self.class_axis, "output": self.output}

    # Labels, and how calibrate uses them

    def labels(self, batch: Any) -> Tensor:
        """The labels of a batch: its second entry or, in a mapping, the entry ``labels``.

        Raises:
            TypeError: there are none, or they are of another type.
        """
        found = labels_in(batch)
        if found is None or found.is_complex():
            raise TypeError(
                f"expected held-out batches as (input, labels) or mappings with 'labels', {self.labels_expected}; got "
                f"{_described(found, batch)}"
            )
        return found

    labels_expected: ClassVar[str] = "numbers"
    """What labels are, in words."""

    def paired(self, raw: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Bring raw values ``[N, C, ...]`` and labels (or a mask of them) into the layout of `draw_score`."""
        return raw, labels

    def counted(self, labels: Tensor, ignore: int | None) -> Tensor:
        """A mask of the labels that count, of their shape.

        Raises:
            ValueError: a label is to be ignored, and this task does not support it.
        """
        return torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels != ignore

    def units(self, labels: Tensor) -> str:
        """The name of what is counted: ``"examples"``, or parts of them."""
        return "places" if labels.numel() > len(labels) else "examples"

    def draw_score(self, name: str, temperatures: Tensor) -> DrawScore:
        """The score of the mean over draws at several temperatures, for `stochbn.calibrate`.

        Raises:
            ValueError: `name` is not among `calibrated_by`.
        """
        raise ValueError(f"there is no score {name!r} for the task {self.name!r}")

    # Scores

    def scores(self, predictions: Predictions, join: Join = dict, ignore: int | None = None) -> Scores:
        """Score predictions, with the same result in all processes that share them.

        Args:
            predictions: the predictions of this process's batches, with their labels.
            join: concatenates tensors of all processes that share the data.
            ignore: a label to ignore.

        Raises:
            ValueError: labels that do not fit the predictions, or a task without scores.
        """
        raise ValueError(f"the task {self.name!r} has no scores")

    def panels(self, scores: Mapping[str, Scores]) -> Sequence[Panel]:
        """The figures of a report, from the scores of each method by name."""
        return []


def floating(values: Any, what: str) -> Tensor:
    """Convert floating-point values to float32 or finer, because half precision is too coarse to average in.

    Raises:
        TypeError: they are not floating-point.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"expected a floating-point tensor of {what} in the network's output, found {kind}")
    return values.float() if values.dtype.itemsize < 4 else values


def labels_in(batch: Any) -> Tensor | None:
    """The labels of a batch as a tensor; None if there are no numeric labels."""
    labels: Any = None
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
    elif hasattr(batch, "get"):
        labels = batch.get("labels")
    labels = as_array(labels)
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "fiub":
        return as_tensor(labels)
    return labels if isinstance(labels, Tensor) else None


def whole_labels(task: Task, batch: Any, *, fractions: bool) -> Tensor:
    """The labels of a batch as whole numbers.

    Args:
        task: the name of the task, for messages.
        batch: the batch.
        fractions: whether to accept whole numbers as floating-point numbers or truth values, as losses for 0 and 1 do.

    Raises:
        TypeError: there are none, or they are not whole numbers.
    """
    labels = labels_in(batch)
    if labels is not None and not labels.is_complex():
        if not labels.is_floating_point() and labels.dtype != torch.bool:
            return labels
        if fractions and bool(((whole := labels.long()) == labels).all()):
            return whole
    raise TypeError(
        f"expected held-out batches as (input, labels) or mappings with 'labels', {task.labels_expected}; got "
        f"{_described(labels, batch)}"
    )


def _described(labels: Tensor | None, batch: Any) -> str:
    return f"{labels.dtype} labels" if labels is not None else f"a {type(batch).__name__} without them"


def joined(batches: Sequence[Mapping[str, Tensor]], join: Join) -> dict[str, Tensor]:
    """Concatenate the tensors of all batches of all processes.

    Raises:
        ValueError: there are none.
    """
    if not batches:
        raise ValueError("there is nothing to evaluate: the data has no batches")
    return join({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})


def standard_error(values: Tensor) -> float:
    """The standard error of the mean of ``[N]`` values; NaN for a single one."""
    return (values.double().var() / len(values)).sqrt().item() if len(values) > 1 else math.nan


def spread_of(samples: Tensor) -> float:
    """The standard deviation of those of ``[B]`` values that are no NaN; NaN for fewer than two."""
    known = samples[~samples.isnan()]
    return known.std().item() if len(known) > 1 else math.nan


def ratio_error(values: Tensor, weights: Tensor) -> float:
    """The standard error of a weighted mean ``sum(weights * values) / sum(weights)`` over examples ``[N]``."""
    mean = (weights * values).sum() / weights.sum()
    return standard_error(weights * (values - mean)) * len(values) / weights.sum().item()


def influence_error(influences: Tensor) -> float:
    """The standard error of a statistic from the influence ``[N]`` of each example on it; NaN for a single example."""
    n = len(influences)
    return math.sqrt(n / (n - 1) * influences.double().square().sum().item()) if n > 1 else math.nan
