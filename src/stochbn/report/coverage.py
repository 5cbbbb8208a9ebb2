"""How often prediction sets hold the truth, overall, in each class and in each group, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochbn.conformal import LabelSets, Rule, Sets
from stochbn.conformal.base import group_names
from stochbn.report.tables import Table

if TYPE_CHECKING:
    from stochbn.posteriors.thresholds import Thresholds

__all__ = ["Coverage", "coverage_table", "coverages"]

CONFIDENCE = 0.95
UNIT = {"sets": "classes in a set", "labels": "labels in a set", "intervals": "width", "quantiles": "width"}
"""What the size of a set is, by the kind of its rule."""

Join = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""From the tensors ``[n, ...]`` of one process to those of all processes, behind each other."""


class Coverage:
    """How much of the truth the sets of predictions hold, example by example, as predictions come.

    Args:
        thresholds: what makes the sets.
        ignore: a label of what does not count.
    """

    def __init__(self, thresholds: Thresholds, ignore: int | None = None) -> None:
        self._rule, self._ignore, self._batches = thresholds.sets, ignore, list[dict[str, Tensor]]()

    def add(self, prediction: Any, labels: Tensor, groups: Sequence[str] | None = None) -> None:
        """Count the examples of a prediction.

        Raises:
            TypeError, ValueError: the sets are for another task, or labels do not fit.
        """
        found = held_by(self._rule, self._rule.of(prediction, groups), labels, self._ignore)
        if self._rule.groups:
            place = {name: i for i, name in enumerate(self._rule.groups)}
            named = group_names(groups, len(found["held"]))
            found["group"] = torch.tensor([place.get(name, len(place)) for name in named])
        self._batches.append({name: values.cpu() for name, values in found.items()})

    def joined(self, join: Join = dict) -> dict[str, Tensor]:
        """Of all examples of all processes what `held_by` gives, and ``group``, ``[N]``, of sets by group."""
        names = self._batches[0] if self._batches else {}
        return join({name: torch.cat([batch[name] for batch in self._batches]) for name in names})


def held_by(rule: Rule, sets: Tensor, labels: Tensor, ignore: int | None = None) -> dict[str, Tensor]:
    """What sets of examples hold.

    Args:
        rule: what made them.
        sets: of N examples.
        labels: their labels, or targets.
        ignore: a label of what does not count.

    Returns:
        ``held``: ``[N]``, the share of what is true of an example that its set holds; NaN where nothing is true.
        ``size``: ``[N]``, how many classes or labels are in a set, per place of dense ones, or the width.
        ``each``: ``[N, K]``, the same share of one class; for sets of classes or labels.

    Raises:
        TypeError, ValueError: labels that do not fit.
    """
    count = len(labels)
    if isinstance(rule, Sets):
        each = torch.full(sets.shape, math.nan, dtype=torch.float32)
        held = sets.cpu().gather(1, labels.cpu()[:, None])[:, 0]
        each[range(count), labels.cpu()] = held.float()
        return {"held": held.double(), "size": sets.sum(1).double(), "each": each}
    if isinstance(rule, LabelSets):
        shape = [count, rule.labels, *(sets.shape[1:] if rule.mask is not None else sets.shape[2:])]
        true, counted = (part.to(sets.device) for part in rule.truth(labels, shape, ignore))
        if rule.mask is not None:
            true, counted, sets = (part[:, None] for part in (true, counted, sets))
        true, held, chosen = (
            part.flatten(2) if part.ndim > 2 else part[..., None] for part in (true, sets & true, sets & counted)
        )
        places = counted.any(1).reshape(count, -1).sum(1).clamp(min=1)
        return {
            "held": held.sum((1, 2)).double() / true.sum((1, 2)).double(),
            "size": chosen.sum((1, 2)).double() / places,
            "each": (held.sum(2).double() / true.sum(2).double()).float(),
        }
    low, high = sets.reshape(2, count, -1)
    if labels.numel() != low.numel():
        raise ValueError(f"expected targets {list(sets.shape[1:])}, got {list(labels.shape)}")
    truth = labels.to(low).reshape(low.shape)
    return {"held": ((low <= truth) & (truth <= high)).double().mean(1), "size": (high - low).double().mean(1)}


def coverages(
    found: Mapping[str, Tensor], rule: Rule, names: Sequence[str] = (), by: str | None = None
) -> list[dict[str, Any]]:
    """The coverage and the size of sets, of all examples and of those of each class and of each group that occurs.

    Of sets that hold the truth or do not, the interval is that of Clopper and Pearson (1934), which covers the true
    coverage at least as often as it says. Of those that hold a share of it, it is 1.96 standard errors of its mean.

    Args:
        found: what `Coverage` has joined.
        rule: what made the sets.
        names: of the classes; none are numbers.
        by: the column of the groups.

    Returns:
        Rows with ``of`` ("all" in the first one), ``examples``, ``coverage``, its interval's ends ``low`` and ``high``,
        ``size`` and ``empty``, the share of sets with nothing in them.
    """
    held, size = found["held"], found["size"]
    rows = [_row("all", held, size)]
    if "each" in found and not (isinstance(rule, LabelSets) and rule.mask is not None):
        for k, own in enumerate(found["each"].double().T):
            if not own.isnan().all():
                rows.append(_row(names[k] if names else str(k), own, size))
    for i, name in enumerate((*rule.groups, "others") if rule.groups else ()):
        if (chosen := found["group"] == i).any():
            rows.append(_row(f"{by} {name or 'missing'}", held[chosen], size[chosen]))
    return rows


def _row(name: str, held: Tensor, size: Tensor) -> dict[str, Any]:
    there = ~held.isnan()
    held, size = held[there], size[there]
    mean = held.mean().item()
    return {
        "of": name,
        "examples": len(held),
        "coverage": mean,
        **dict(zip(("low", "high"), _interval(held), strict=True)),
        "size": size.mean().item(),
        "empty": (size == 0).double().mean().item(),
    }


def _interval(held: Tensor) -> tuple[float, float]:
    """The ends of the 95 % interval of a mean of shares ``[n]``."""
    from scipy.stats import binomtest

    if not len(held):
        return math.nan, math.nan
    if bool(((held == 0) | (held == 1)).all()):
        found = binomtest(int(held.sum()), len(held)).proportion_ci(CONFIDENCE, "exact")
        return float(found.low), float(found.high)
    half = 1.96 * (held.std() / math.sqrt(len(held))).item()
    return max(held.mean().item() - half, 0.0), min(held.mean().item() + half, 1.0)


def coverage_table(rows: Sequence[Mapping[str, Any]], thresholds: Thresholds) -> Table:
    """The rows of `coverages` as a table.

    Args:
        rows: the rows.
        thresholds: what made the sets.
    """
    rule, percent = thresholds.sets, f"{100 * thresholds.sets.coverage:g} %"
    intervals = rule.kind in ("intervals", "quantiles")
    if isinstance(rule, LabelSets):
        what = f"the places of class {rule.mask}" if rule.mask is not None else "what is true"
        title = f"Prediction sets for {percent} of {what}"
    else:
        title = f"Prediction {'intervals' if intervals else 'sets'} for {percent}"
    by = thresholds.by or ("class" if getattr(rule, "by_class", False) else None)
    title += f" of each {by}" if by else ""
    title += f", by {rule.method}" if isinstance(rule, Sets) else ""
    unit = "share of places" if isinstance(rule, LabelSets) and rule.mask is not None else UNIT[rule.kind]
    columns = ["of", "examples", "coverage %", "95 % interval", unit, *([] if intervals else ["empty sets %"])]
    body = [
        [
            row["of"],
            f"{row['examples']:,}",
            f"{100 * row['coverage']:.1f}",
            f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
            f"{row['size']:.4g}" if intervals else f"{row['size']:.2f}",
            *([] if intervals else [f"{100 * row['empty']:.1f}"]),
        ]
        for row in rows
    ]
    return Table(title, columns, body)
