"""Binary classification: one logit, or probability, for the second of two classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stochbn.caller import warn
from stochbn.network.calling import read_output
from stochbn.tasks.base import Task, floating, whole_labels
from stochbn.tasks.classification import Classification, Prediction

__all__ = ["Binary", "check_sigmoid", "logit"]


@dataclass(frozen=True)
class Binary(Classification):
    """Task of networks with one logit (or probability) for the second of two classes, ``[N]`` or ``[N, 1, ...]``.

    Probabilities are those of both classes, ``[N, 2, ...]``.
    """

    name: ClassVar[str] = "binary"

    def raw(self, output: Any) -> Tensor:
        """Two logits ``[N, 2, ...]``: 0 and the network's."""
        found = floating(read_output(output, self.place), "one logit for each example")
        axis = 1 if self.class_axis is None else self.class_axis
        if found.ndim == 1:
            found = found[:, None]
        elif not -found.ndim <= axis < found.ndim or found.shape[axis] != 1:
            raise ValueError(
                f"expected one logit for each example, [N], [N, 1] or [N, 1, ...], found shape {list(found.shape)}; "
                'a network with a logit for each class needs task="classification", one with a logit for each label '
                'task="multilabel"'
            )
        else:
            found = found.movedim(axis, 1)
        if self.output == "probs":
            found = logit(found)
        return torch.cat([torch.zeros_like(found), found], 1)

    def check(self, raw: Tensor) -> None:
        """Warn of probabilities in place of logits."""
        check_sigmoid(self, raw[:, 1])

    def prediction(self, mean: Tensor, second: Tensor, variance: Tensor | None, kept: Tensor | None) -> Prediction:
        """Probabilities of both classes on axis 1."""
        return Prediction(mean, second, kept)

    labels_expected: ClassVar[str] = "0 or 1, [N] or in the shape of the output"

    def labels(self, batch: Any) -> Tensor:
        """The classes in a batch, 0 or 1, also as fractions or truth values."""
        return whole_labels(self, batch, fractions=True)

    def paired(self, raw: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Remove the axis of the logit from labels that have it."""
        if labels.ndim == raw.ndim:
            labels = labels.squeeze(1 if self.class_axis is None else self.class_axis)
        return raw, labels


def logit(probs: Tensor) -> Tensor:
    """The logits of probabilities, finite for 0 and 1; NaN for values that are not probabilities."""
    possible = (probs >= 0) & (probs <= 1)
    return probs.logit(eps=torch.finfo(probs.dtype).eps).where(possible, float("nan"))


def check_sigmoid(task: Task, raw: Tensor) -> None:
    """Warn of probabilities in place of logits, and raise for the reverse.

    Raises:
        ValueError: they should be probabilities and are not.
    """
    if task.output == "probs":
        if raw.isnan().any():
            raise ValueError('expected probabilities from 0 to 1 with output="probs", found others; are they logits?')
    elif task.output is None and raw.numel() >= 16 and raw.amin() >= 0 and raw.amax() <= 1:
        warn(
            "the network's outputs all lie between 0 and 1 and get a sigmoid: if they are probabilities already, pass "
            'output="probs"; if they are logits, pass output="logits"',
        )
