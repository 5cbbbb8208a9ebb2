"""The prediction sets that 'stochbn conformal' makes: by which method, and what is told of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from stochbn.conformal import Rule

__all__ = ["METHODS", "Asked"]

METHODS = {
    "classes": ("lac", "aps", "raps", "saps"),
    "labels": ("crc",),
    "numbers": ("normalized", "absolute", "cqr"),
}
"""The methods for each sort of prediction, the default one first."""

Predictions = Iterator[tuple[Any, "Tensor"]]
"""Predictions and labels, batch by batch."""


@dataclass(frozen=True)
class Asked:
    """What sets are to be made.

    Attributes:
        sort: ``classes``, ``labels`` or ``numbers``.
        coverage: how often they are to hold the truth, or what share of it.
        method: one of `METHODS`.
        by_class: whether each class has a threshold.
        weights: of classes, ``[K]``; None for none.
        mask: the only class whose places count; None counts all.
        ignore: a label of what does not count.
    """

    sort: str
    coverage: float
    method: str
    by_class: bool = False
    weights: Tensor | None = None
    mask: int | None = None
    ignore: int | None = None

    def check(self, objects: Any, classes: int, groups: Sequence[str] | None) -> None:
        """Refuse too few held-out examples before any prediction.

        Args:
            objects: the examples.
            classes: how many there are; 0 if that is not known.
            groups: the group of each example; None for none.

        Raises:
            ValueError: there are too few, in all or in a class or group.
        """
        import torch

        from stochbn.conformal.base import quantile

        counts = {"": len(objects)} if groups is None else Counter(groups)
        for name, count in counts.items():
            quantile(torch.zeros(count), self.coverage, "" if groups is None else f" of the group {name!r}")
        if self.sort != "classes":
            return
        labels = objects.labels
        if labels.ndim != 1 or not len(labels):
            raise ValueError(
                f"expected one label for each held-out example, got labels {list(labels.shape)}; see --dense"
            )
        if self.by_class:
            count = max(classes, int(labels.max()) + 1, 2)
            for k in range(count):
                quantile(torch.zeros(int((labels == k).sum())), self.coverage, f" of class {k}")

    def made(self, predictions: Predictions, groups: Sequence[str] | None) -> tuple[Rule, str]:
        """The sets of held-out predictions, and what is to be told of them.

        Raises:
            TypeError, ValueError: as `stochbn.conformal`.
        """
        found = getattr(self, f"_{self.sort}")(predictions, groups)
        sets: Rule = found[0]
        return sets, found[1]

    def _classes(self, predictions: Predictions, groups: Sequence[str] | None) -> tuple[Rule, str]:
        import torch

        from stochbn import conformal

        parts = []
        for prediction, labels in predictions:
            if prediction.probs.ndim != 2:
                raise ValueError(
                    f"expected one prediction for each example, got probabilities {list(prediction.probs.shape)}; "
                    "dense outputs need --dense"
                )
            parts.append((prediction.probs.cpu(), labels))
        probs, labels = map(torch.cat, zip(*parts, strict=True))
        kinds: Any = {name: getattr(conformal, name) for name in METHODS["classes"]}
        options = {"weights": self.weights, "by_class": self.by_class, "groups": groups}
        sets = kinds[self.method](probs, labels, self.coverage, **options)
        count = f"{len(labels):,} held-out examples"
        if self.by_class:
            least = int(labels.bincount(minlength=sets.classes).min())
            return sets, (
                f"Sets of {self._percent} for each of {sets.classes} classes, from {count}, at least {least} of a "
                f"class ({self._varies(least)} in such a class)."
            )
        if self.weights is not None:
            return sets, f"Sets of {self._percent} for the new mix of classes, an estimate, from {count}."
        return sets, f"Sets of {self._percent}{self._from(len(labels), groups)}"

    def _labels(self, predictions: Predictions, groups: Sequence[str] | None) -> tuple[Rule, str]:
        from stochbn.conformal import Tally

        tally, done = None, 0
        for prediction, labels in predictions:
            probs = prediction.probs.movedim(prediction.class_axis, 1)
            if tally is None:
                tally = Tally(probs.shape[1], self.mask, self.ignore)
            if probs.ndim == 2 and labels.numel() == probs.numel():
                labels = labels.reshape(probs.shape)
            tally.add(probs, labels, None if groups is None else groups[done : done + len(labels)])
            done += len(labels)
        assert tally is not None
        sets = tally.sets(self.coverage, by_group=groups is not None)
        what = "true labels" if self.mask is None else f"places of class {self.mask}"
        left = f"; {tally.empty:,} others have none and do not count" if tally.empty else ""
        each = f" in each of {len(sets.groups)} groups" if groups is not None else ""
        return sets, (
            f"Sets that hold {self._percent} of an example's {what} on average{each}, from {tally.examples:,} held-out "
            f"examples{left}."
        )

    def _numbers(self, predictions: Predictions, groups: Sequence[str] | None) -> tuple[Rule, str]:
        import torch

        from stochbn import conformal
        from stochbn.conformal.cqr import normal_quantiles

        means, stds, targets = [], [], []
        for prediction, labels in predictions:
            if labels.numel() != prediction.mean.numel():
                raise ValueError(f"expected targets {list(prediction.mean.shape)}, got {list(labels.shape)}")
            means.append(prediction.mean.cpu())
            targets.append(labels.to(means[-1]).reshape(means[-1].shape))
            if self.method != "absolute":
                if prediction.total_std is None or not bool((prediction.total_std > 0).all()):
                    raise ValueError(
                        f"--method {self.method} needs standard deviations above 0, which these predictions do not "
                        "have: take --method absolute, for intervals of one width"
                    )
                stds.append(prediction.total_std.cpu())
        mean, truth = torch.cat(means), torch.cat(targets)
        std = torch.cat(stds) if stds else None
        if self.method == "cqr":
            sets: Rule = conformal.cqr(*normal_quantiles(mean, std, self.coverage), truth, self.coverage, groups=groups)
        else:
            sets = conformal.intervals(mean, std, truth, self.coverage, groups=groups)
        several = f" of the {mean[0].numel()} numbers of an example, on average" if mean[0].numel() > 1 else ""
        return sets, f"Intervals of {self._percent}{several}{self._from(len(mean), groups)}"

    @property
    def _percent(self) -> str:
        return f"{100 * self.coverage:g} %"

    def _from(self, count: int, groups: Sequence[str] | None) -> str:
        told = f" from {count:,} held-out examples"
        if groups is None:
            return f"{told} ({self._varies(count)})."
        counts = Counter(groups)
        least = min(counts.values())
        return (
            f" for each of {len(counts)} groups,{told}, at least {least} of a group ({self._varies(least)} in such a "
            "group)."
        )

    def _varies(self, count: int) -> str:
        """Between what the coverage of a threshold from so many examples lies in 95 % of cases, without ties.

        Source: Vovk, 2012, "Conditional validity of inductive conformal predictors": it has a beta distribution.
        """
        from scipy.stats import beta

        place = math.ceil((count + 1) * self.coverage - 1e-9)
        low, high = beta.ppf([0.025, 0.975], place, count + 1 - place)
        return f"on new data like it 95 % of such thresholds cover {100 * low:.1f} to {100 * high:.1f} %"
