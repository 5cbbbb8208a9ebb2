"""Scores of a mean over draws at several temperatures, updated draw by draw, for `stochbn.calibrate`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["CLASS_SCORES", "DrawScore", "check_labels"]


class DrawScore(ABC):
    """Scores a mean over draws, which are added one by one, at several temperatures.

    Args:
        temperatures: what raw values are divided by, ``[T]``.

    Attributes:
        name: the name of the score in reports; empty is its name in `Task.calibrated_by`.
        unit: its unit in reports; empty if it has none.
    """

    name: ClassVar[str] = ""
    unit: ClassVar[str] = ""

    def __init__(self, temperatures: Tensor) -> None:
        self.temperatures = temperatures
        self.total: Tensor | None = None
        self.draws = 0

    @abstractmethod
    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add the raw values ``[N, C, ...]`` of a draw."""

    @abstractmethod
    def of_each(self, labels: Tensor) -> Tensor:
        """The score of each example (and pixel) at each temperature, ``[T, N, ...]`` in float64."""


class NLL(DrawScore):
    """The negative log-likelihood of classes, of logits ``[N, K, ...]``."""

    name = "NLL"
    unit = "nats"

    def add(self, logits: Tensor, labels: Tensor) -> None:
        each = self.log_likelihoods(logits, labels)
        self.total = each if self.total is None else torch.logaddexp(self.total, each)
        self.draws += 1

    def log_likelihoods(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The log-probability of each label at each temperature, in one draw, ``[T, N, ...]`` in float64."""
        check_labels(logits, labels)
        labels = labels.to(logits.device)[:, None].long()
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        each = [(logits / t).log_softmax(1).gather(1, labels)[:, 0] for t in self.temperatures.tolist()]
        return torch.stack(each).double()

    def of_each(self, labels: Tensor) -> Tensor:
        assert self.total is not None
        # A probability of 0 counts as the smallest float32 number, as in the metrics.
        return (math.log(self.draws) - self.total).clamp(max=-math.log(torch.finfo(torch.float32).tiny))


class Brier(DrawScore):
    """The Brier score of classes: the squared distance of the probabilities from those of certainty of the label."""

    name = "Brier score"

    def add(self, logits: Tensor, labels: Tensor) -> None:
        check_labels(logits, labels)
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        each = torch.stack([(logits / t).softmax(1) for t in self.temperatures.tolist()])
        self.total = each if self.total is None else self.total + each
        self.draws += 1

    def of_each(self, labels: Tensor) -> Tensor:
        assert self.total is not None
        probs = self.total.double() / self.draws
        chosen = labels.to(probs.device)[None, :, None].long().expand(len(probs), *[-1] * (labels.ndim + 1))
        right = probs.gather(2, chosen)
        return probs.square().sum(2) - 2 * right[:, :, 0] + 1


CLASS_SCORES: dict[str, type[DrawScore]] = {"nll": NLL, "brier": Brier}
"""Scores of classes, by their names."""


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Check that labels fit logits ``[N, K, ...]``.

    Raises:
        ValueError: they do not have the shape ``[N, ...]``, or are not classes.
    """
    if labels.shape != logits[:, 0].shape:
        raise ValueError(
            f"expected labels {list(logits[:, 0].shape)} for the network's logits {list(logits.shape)}, got "
            f"{list(labels.shape)}"
        )
    if labels.numel() and (labels.min() < 0 or labels.max() >= logits.shape[1]):
        raise ValueError(
            f"labels must lie between 0 and {logits.shape[1] - 1} for {logits.shape[1]} classes, found "
            f"{labels.min().item()} to {labels.max().item()}"
        )
