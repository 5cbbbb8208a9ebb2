"""What a network's output means: how each task reads it, what is averaged over draws, and what is told of that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stochbn.caller import warn
from stochbn.network.calling import read_output
from stochbn.network.layers import unwrap
from stochbn.predictions import Estimate, MultilabelPrediction, Prediction, entropy

__all__ = [
    "TASKS",
    "Binary",
    "Classification",
    "Embedding",
    "Multilabel",
    "Regression",
    "Task",
    "make_task",
    "task_named",
]

Place = str | int | None


@dataclass(frozen=True)
class Task(ABC):
    """What a network's output means.

    Every task turns an output into a tensor ``[N, C, ...]`` of float32 or finer, its raw values, on which draws are
    averaged, and an average into what a predictive returns.

    Attributes:
        place: where in the output to look, see `stochbn.network.calling.read_output`; for regression also a pair of
            places, of the mean and of the log-variance.
        class_axis: the axis of the classes in the output; None is axis 1.
        output: ``"logits"`` or ``"probs"``; None is logits, unless they look like something else.
    """

    name: ClassVar[str]
    early: ClassVar[bool] = True
    """Whether objects may be done early by default: where the scale of an error is known."""
    spread: ClassVar[bool] = False
    """Whether the variance over draws is part of the prediction."""
    binned: ClassVar[bool] = False
    """Whether `mix` gives numbers, of which the mix is the shares in bins, and not shares themselves."""
    part: ClassVar[tuple[str, str]] = ("class", "classes")
    """What the mix is of, one and several."""

    place: Any = None
    class_axis: int | None = None
    output: str | None = None

    @abstractmethod
    def raw(self, output: Any) -> Tensor:
        """The raw values ``[N, C, ...]`` in a network's output.

        Raises:
            TypeError, ValueError: they are not of a type or shape that the task can read.
        """

    def check(self, raw: Tensor) -> None:  # noqa: B027 - numbers can be anything
        """Refuse, or warn of, raw values that do not look like what the task expects.

        Raises:
            ValueError: they cannot be what the task expects.
        """

    @abstractmethod
    def values(self, raw: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """What is averaged over draws, from raw values ``[S, N, C, ...]``: two tensors ``[S, N, ...]``.

        The first gives the prediction, and its variance over draws says when an object is done.
        """

    @abstractmethod
    def prediction(self, mean: Tensor, second: Tensor, variance: Tensor | None, kept: Tensor | None) -> Any:
        """What a predictive returns, from the means of both values, the first's variance over draws and kept draws."""

    def keep(self, raw: Tensor, temperature: float) -> Tensor:
        """What of raw values ``[S, N, C, ...]`` is kept of every draw."""
        return self.values(raw, temperature)[0]

    def mix(self, raw: Tensor) -> Tensor:
        """What raw values ``[N, C, ...]`` say of the mix of a group of examples: shares ``[N, K, ...]``, or numbers."""
        return self.values(raw[None], 1.0)[0][0]


def _floating(values: Any, what: str) -> Tensor:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"expected a floating-point tensor of {what} in the network's output, found {kind}")
    return values.float() if values.dtype.itemsize < 4 else values  # half precision is too coarse to average in


@dataclass(frozen=True)
class Classification(Task):
    """One of K classes: logits or probabilities ``[N, K, ...]``."""

    name: ClassVar[str] = "classification"

    def raw(self, output: Any) -> Tensor:
        """The logits ``[N, K, ...]``, with the classes moved to axis 1."""
        found = _floating(read_output(output, self.place), self.output or "logits")
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
        """Refuse probabilities that are taken for logits, or the reverse; warn of classes that may be elsewhere."""
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


@dataclass(frozen=True)
class Binary(Classification):
    """One logit (or probability) for the second of two classes: ``[N]``, ``[N, 1]`` or ``[N, 1, ...]``.

    Probabilities are those of both classes, ``[N, 2, ...]``.
    """

    name: ClassVar[str] = "binary"

    def raw(self, output: Any) -> Tensor:
        """Two logits ``[N, 2, ...]``: 0 and the network's."""
        found = _floating(read_output(output, self.place), "one logit for each object")
        axis = 1 if self.class_axis is None else self.class_axis
        if found.ndim == 1:
            found = found[:, None]
        elif not -found.ndim <= axis < found.ndim or found.shape[axis] != 1:
            raise ValueError(
                f"expected one logit for each object, [N], [N, 1] or [N, 1, ...], found shape {list(found.shape)}; "
                'a network with a logit for each class needs task="classification", one with a logit for each label '
                'task="multilabel"'
            )
        else:
            found = found.movedim(axis, 1)
        if self.output == "probs":
            found = _logit(found)
        return torch.cat([torch.zeros_like(found), found], 1)

    def check(self, raw: Tensor) -> None:
        """Warn of probabilities that are taken for logits."""
        _check_sigmoid(self, raw[:, 1])

    def prediction(self, mean: Tensor, second: Tensor, variance: Tensor | None, kept: Tensor | None) -> Prediction:
        """Probabilities of both classes on axis 1."""
        return Prediction(mean, second, kept)


@dataclass(frozen=True)
class Multilabel(Task):
    """Any number of K labels, each with a logit (or probability) of its own: ``[N, K, ...]``."""

    name: ClassVar[str] = "multilabel"
    part: ClassVar[tuple[str, str]] = ("label", "labels")

    def raw(self, output: Any) -> Tensor:
        """The logits ``[N, K, ...]``, with the labels moved to axis 1."""
        found = _floating(read_output(output, self.place), "logits")
        axis = 1 if self.class_axis is None else self.class_axis
        if not -found.ndim <= axis < found.ndim or axis % found.ndim == 0:
            raise ValueError(f"expected logits [N, K, ...] with labels on axis {axis}, found shape {list(found.shape)}")
        found = found.movedim(axis, 1)
        return _logit(found) if self.output == "probs" else found

    def check(self, raw: Tensor) -> None:
        """Warn of probabilities that are taken for logits."""
        _check_sigmoid(self, raw)

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


@dataclass(frozen=True)
class Regression(Task):
    """Numbers ``[N]``, ``[N, D]`` or ``[N, D, ...]``, or a pair of them: mean and log-variance of each.

    A tuple of exactly two tensors of one shape is such a pair, and so is what two places name.
    """

    name: ClassVar[str] = "regression"
    early: ClassVar[bool] = False
    spread: ClassVar[bool] = True
    binned: ClassVar[bool] = True
    part: ClassVar[tuple[str, str]] = ("tenth", "tenths of the predicted numbers")

    def mix(self, raw: Tensor) -> Tensor:
        """The numbers, ``[N, D, ...]``."""
        numbers = raw[:, 0]
        return numbers if numbers.ndim > 1 else numbers[:, None]

    def raw(self, output: Any) -> Tensor:
        """``[N, 1, ...]``, the numbers, or ``[N, 2, ...]``, the means and log-variances."""
        found = self._pair(output)
        if found is None:
            return _floating(read_output(output, self.place), "numbers").unsqueeze(1)
        mean, log_variance = (_floating(values, "numbers") for values in found)
        if mean.shape != log_variance.shape:
            raise ValueError(
                f"expected means and log-variances of one shape, found {list(mean.shape)} and "
                f"{list(log_variance.shape)}"
            )
        return torch.stack([mean, log_variance], 1)

    def _pair(self, output: Any) -> Sequence[Any] | None:
        if isinstance(self.place, (tuple, list)):
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


@dataclass(frozen=True)
class Embedding(Regression):
    """A vector (or map) ``[N, D, ...]`` for each object, such as the features that a search compares."""

    name: ClassVar[str] = "embedding"

    def _pair(self, output: Any) -> Sequence[Any] | None:
        return None


TASKS: Mapping[str, type[Task]] = {
    task.name: task for task in (Classification, Binary, Multilabel, Regression, Embedding)
}
"""Every task by its name."""


PROBLEMS = {"multi_label_classification": "multilabel", "regression": "regression"}
"""The tasks of what the configs of Transformers call a ``problem_type``."""


def task_named(task: str | None, model: nn.Module) -> str:
    """The task that is given or, if it is None, the one that the network's own config names.

    Raises:
        TypeError: there is no network.
    """
    if task is not None:
        return task
    problem = getattr(getattr(unwrap(model), "config", None), "problem_type", None)
    return PROBLEMS.get(problem, "classification") if isinstance(problem, str) else "classification"


def make_task(name: str, place: Any = None, class_axis: int | None = None, output: str | None = None) -> Task:
    """The task of a name.

    >>> make_task("binary", "score").raw({"score": torch.tensor([1.5, -2.0])})
    tensor([[ 0.0000,  1.5000],
            [ 0.0000, -2.0000]])

    Raises:
        ValueError: there is no such task, or it has no classes for `class_axis` or `output` to be about.
        TypeError: an argument is of the wrong type.
    """
    if not isinstance(name, str) or name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(map(repr, TASKS))}")
    if output not in (None, "logits", "probs"):
        raise ValueError(f'output must be "logits", "probs" or None, got {output!r}')
    if class_axis is not None and (not isinstance(class_axis, int) or isinstance(class_axis, bool)):
        raise TypeError(f"class_axis must be a whole number or None, got {class_axis!r}")
    kind = TASKS[name]
    if issubclass(kind, Regression) and (class_axis is not None or output is not None):
        raise ValueError(f"the task {name!r} has no classes, so class_axis and output do not apply; leave them out")
    if isinstance(place, (tuple, list)) and kind is not Regression:
        raise ValueError(f'a pair of places is for task="regression" alone, got {place!r} for {name!r}')
    if isinstance(place, (tuple, list)) and len(place) != 2:
        raise ValueError(f"expected two places, of the mean and of the log-variance, got {place!r}")
    return kind(tuple(place) if isinstance(place, list) else place, class_axis, output)


def _rounding(probs: Tensor) -> float:
    """How far from 1 the sums of probabilities may be that were rounded to the type that these numbers fit into."""
    for dtype in (torch.float16, torch.bfloat16):
        if probs.to(dtype).to(probs.dtype).equal(probs):
            return 4 * torch.finfo(dtype).eps
    return 1e-4


def _logit(probs: Tensor) -> Tensor:
    """The logits of probabilities, finite for 0 and 1; NaN for what is no probability."""
    possible = (probs >= 0) & (probs <= 1)
    return probs.logit(eps=torch.finfo(probs.dtype).eps).where(possible, float("nan"))


def _check_sigmoid(task: Task, raw: Tensor) -> None:
    if task.output == "probs":
        if raw.isnan().any():
            raise ValueError('expected probabilities from 0 to 1 with output="probs", found others; are they logits?')
    elif task.output is None and raw.numel() >= 16 and raw.amin() >= 0 and raw.amax() <= 1:
        warn(
            "the network's outputs all lie between 0 and 1 and get a sigmoid: if they are probabilities already, pass "
            'output="probs"; if they are logits, pass output="logits"',
        )
