"""Which classes are taken for which: a matrix, a table by class, and the most frequent confusions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stochbn.report.tables import Table

__all__ = ["Matrix", "class_table", "confusion_table", "confusions", "matrix_of"]

LARGEST = 20
"""Classes of a matrix that is shown; of more, the most frequent confusions say more."""
FREQUENT = 15
"""Confusions that are shown."""


@dataclass(frozen=True)
class Matrix:
    """A matrix of confusions for a page.

    Attributes:
        names: of the classes.
        counts: ``[K][K]``: how many examples of each class (rows) were taken for each (columns).
    """

    names: Sequence[str]
    counts: Sequence[Sequence[int]]

    def shade(self, row: int, column: int) -> float:
        """The share of a class that was taken for another, from 0 to 1: how dark a cell is."""
        return self.counts[row][column] / max(sum(self.counts[row]), 1)


def confusions(probs: Tensor, labels: Tensor) -> Tensor:
    """``[K, K]``: how many examples of each class (rows) have which most probable class (columns).

    Args:
        probs: ``[N, K]``.
        labels: ``[N]``.

    >>> confusions(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), torch.tensor([0, 1, 1]))
    tensor([[1, 0],
            [1, 1]])
    """
    classes = probs.shape[1]
    return torch.bincount(labels * classes + probs.argmax(1), minlength=classes**2).view(classes, classes)


def matrix_of(counts: Tensor, names: Sequence[str]) -> Matrix | None:
    """The matrix of a page; None of more classes than can be shown."""
    return None if len(counts) > LARGEST else Matrix(list(names), counts.tolist())


def class_table(probs: Tensor, labels: Tensor, names: Sequence[str]) -> Table:
    """A row for each class that occurs, or is predicted: how often it is right, and how sure predictions are.

    Args:
        probs: ``[N, K]``.
        labels: ``[N]``.
        names: of the K classes.
    """
    counts = confusions(probs, labels)
    of_class, predicted, right = counts.sum(1), counts.sum(0), counts.diagonal()
    confidence, chosen = probs.double().max(1)
    body = []
    for k, name in enumerate(names):
        if not of_class[k] and not predicted[k]:
            continue
        others = counts[k].clone()
        others[k] = 0
        most = int(others.argmax())
        sure = confidence[chosen == k]
        body.append(
            [
                name,
                f"{int(of_class[k]):,}",
                _percent(of_class[k] - right[k], of_class[k]),
                f"{int(predicted[k]):,}",
                _percent(right[k], predicted[k]),
                f"{100 * sure.mean().item():.1f}" if len(sure) else "-",
                f"{names[most]} ({int(others[most]):,})" if others[most] else "-",
            ]
        )
    columns = ["class", "examples", "wrong %", "predicted", "right when predicted %", "mean probability %",
               "most often taken for"]  # fmt: skip
    return Table("By class", columns, body)


def confusion_table(counts: Tensor, names: Sequence[str], unit: str = "examples") -> Table | None:
    """The most frequent confusions, of examples or places; None where there are none."""
    others = counts.clone().fill_diagonal_(0)
    values, places = others.flatten().sort(descending=True, stable=True)
    shown = [
        (int(n), *divmod(int(i), len(counts))) for n, i in zip(values[:FREQUENT], places[:FREQUENT], strict=True) if n
    ]
    if not shown:
        return None
    of_class, errors = counts.sum(1), int(others.sum())
    body = [
        [f"{names[k]}, taken for {names[other]}", f"{n:,}", _percent(n, of_class[k]), _percent(n, errors)]
        for n, k, other in shown
    ]
    return Table("Most frequent confusions", ["class", unit, "of the class %", "of all errors %"], body)


def _percent(part: Tensor | int, whole: Tensor | int) -> str:
    return f"{100 * int(part) / int(whole):.1f}" if int(whole) else "-"
