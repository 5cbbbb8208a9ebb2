"""How often prediction sets hold the truth, overall and in each class, with exact intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stochbn.conformal import evaluate
from stochbn.report.tables import Table

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["coverage_table", "coverages"]

CONFIDENCE = 0.95


def coverages(sets: Tensor, labels: Tensor, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The coverage and the size of sets, of all examples and of those of each class that occurs.

    The interval is that of Clopper and Pearson (1934), which covers the true coverage at least as often as it says.

    Args:
        sets: ``[N, K]``, true where a class is in an example's set.
        labels: ``[N]``.
        names: of the classes; none are numbers.

    Returns:
        Rows with ``class`` ("all" in the first one), ``examples``, ``coverage``, its interval's ends ``low`` and
        ``high``, ``size`` (the mean number of classes in a set) and ``empty``, a share.
    """
    from scipy.stats import binomtest

    rows = []
    for k in (None, *sorted(set(labels.tolist()))):
        chosen = slice(None) if k is None else labels == k
        scores, count = evaluate(sets[chosen], labels[chosen]), len(labels[chosen])
        interval = binomtest(round(scores["coverage"] * count), count).proportion_ci(CONFIDENCE, "exact")
        rows.append(
            {
                "class": "all" if k is None else names[k] if names else str(k),
                "examples": count,
                "coverage": scores["coverage"],
                "low": float(interval.low),
                "high": float(interval.high),
                "size": scores["size"],
                "empty": scores["empty"],
            }
        )
    return rows


def coverage_table(rows: Sequence[dict[str, Any]], coverage: float, method: str, *, by_class: bool) -> Table:
    """The rows of `coverages` as a table.

    Args:
        rows: the rows.
        coverage: what was asked for.
        method: of the sets.
        by_class: whether it was asked for in each class.
    """
    title = f"Prediction sets for {100 * coverage:g} %{' of each class' if by_class else ''}, by {method}"
    columns = ["class", "examples", "coverage %", "95 % interval", "classes in a set", "empty sets %"]
    body = [
        [
            row["class"],
            f"{row['examples']:,}",
            f"{100 * row['coverage']:.1f}",
            f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
            f"{row['size']:.2f}",
            f"{100 * row['empty']:.1f}",
        ]
        for row in rows
    ]
    return Table(title, columns, body)
