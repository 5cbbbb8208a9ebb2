"""Embeddings: a vector, or a map, for each example, such as the features that a search compares."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from stochbn.tasks.base import Join, Predictions, Scores, Task
from stochbn.tasks.regression import Estimate, Regression

__all__ = ["Embedding"]


@dataclass(frozen=True)
class Embedding(Regression):
    """Task of networks with a vector (or map) ``[N, D, ...]`` for each example, such as features for a search.

    There are no labels, so nothing is calibrated or scored, and ``total_std`` is None.
    """

    name: ClassVar[str] = "embedding"
    takes_pair: ClassVar[bool] = False
    sets_hold: ClassVar[str] = ""
    calibrated_by: ClassVar[tuple[str, ...]] = ()
    score_columns: ClassVar[Mapping[str, tuple[str, int, float]]] = {}

    def _pair(self, output: Any) -> Sequence[Any] | None:
        return None

    def prediction(self, mean: Tensor, second: Tensor, variance: Tensor | None, kept: Tensor | None) -> Estimate:
        """Mean and variance over draws."""
        return replace(super().prediction(mean, second, variance, kept), note="")

    def calibrated(self, posterior: Any) -> Embedding:
        """The task itself."""
        return self

    def caveat(self, posterior: Any, known: Collection[str]) -> str:
        """Empty: a vector is not observed."""
        return ""

    def scores(self, predictions: Predictions, join: Join = dict, ignore: int | None = None) -> Scores:
        """Raise an error: an embedding has no scores."""
        return Task.scores(self, predictions, join, ignore)
