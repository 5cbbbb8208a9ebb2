"""Embeddings: a vector, or a map, for each example, such as the features that a search compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stochbn.tasks.base import Join, Predictions, Scores, Task
from stochbn.tasks.regression import Regression

__all__ = ["Embedding"]


@dataclass(frozen=True)
class Embedding(Regression):
    """A vector (or map) ``[N, D, ...]`` for each object, such as the features that a search compares."""

    name: ClassVar[str] = "embedding"
    takes_pair: ClassVar[bool] = False
    score_columns: ClassVar[Mapping[str, tuple[str, int, float]]] = {}

    def _pair(self, output: Any) -> Sequence[Any] | None:
        return None

    def scores(self, predictions: Predictions, join: Join = dict, ignore: int | None = None) -> Scores:
        """Raise an error: an embedding has no scores."""
        return Task.scores(self, predictions, join, ignore)
