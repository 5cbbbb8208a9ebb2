"""Conformal risk control: labels of an example, or places of a mask, of which no more than a share is missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stochbn.arrays import as_tensor
from stochbn.conformal.base import Rule, check_coverage, group_names, too_few
from stochbn.conformal.sets import named
from stochbn.predictions import Prediction

__all__ = ["LabelSets", "Tally", "crc"]

SHIFT = 12
"""Binary digits of a probability in float32 that are dropped, rounding it down by less than 0.05 %."""
CELLS = (0x3F800000 >> SHIFT) + 1
"""How many different probabilities from 0 to 1 are left."""


@dataclass(frozen=True)
class LabelSets(Rule):
    """Makes sets of the labels of an example, or masks of places: what has at least a certain probability.

    Attributes:
        threshold: the lowest probability in a set; of each group ``[G]`` with `groups`.
        coverage: the share of an example's true labels, or places, that sets hold on average, at least.
        labels: K, the number of labels or classes.
        mask: the only class whose places count; None counts all.
        groups: names of groups, in each of which the coverage holds.
    """

    threshold: float | Tensor
    coverage: float
    labels: int
    mask: int | None = None
    groups: tuple[str, ...] = ()

    kind: ClassVar[str] = "labels"

    def __call__(self, probs: Any, groups: Any = None) -> Tensor:
        """True where a label is in an example's set: ``[N, K, ...]``, or ``[N, ...]``, the mask of one class.

        Args:
            probs: ``[N, K, ...]``.
            groups: the group of each example, for sets by group. In one that was not among the held-out examples all
                is in the set.

        Raises:
            TypeError, ValueError: these are no probabilities of so many labels, or groups are missing.
        """
        probs = _probabilities(probs, self.labels)
        if self.mask is not None:
            probs = probs[:, self.mask]
        least = self._thresholds(groups, probs)
        if isinstance(least, Tensor):
            least = torch.where(least.isinf(), 0.0, least)
        held: Tensor = probs >= least
        return held

    def of(self, prediction: Any, groups: Any = None) -> Tensor:
        """The sets of a `stochbn.Prediction`, with the classes on axis 1."""
        if not isinstance(prediction, Prediction):
            raise TypeError(f"these sets are of labels or classes, got a {type(prediction).__name__}")
        return self(prediction.probs.movedim(prediction.class_axis, 1), groups)

    def within(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``set``: truth values as the call gives them."""
        probs = outputs["probs"] if self.mask is None else outputs["probs"][:, self.mask]
        return {} if self.groups else {"set": probs >= self.threshold}

    def columns(self, prediction: Any, names: Sequence[str], groups: Any = None) -> dict[str, list[Any]]:
        """``set``: the names of the labels in each example's set."""
        found = self.of(prediction, groups)
        if found.ndim != 2:
            raise ValueError(f"expected one row for each example, got sets {list(found.shape)}: they become pictures")
        return {"set": named(found, names)}

    def truth(self, labels: Any, shape: Sequence[int], ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
        """What is true ``[N, K, ...]``, or ``[N, ...]`` of one class, and which of it counts, as `crc` reads labels.

        Raises:
            TypeError, ValueError: labels that do not fit probabilities of this shape.
        """
        labels = as_tensor(labels)
        if labels.is_floating_point() and bool((labels == labels.round()).all()):
            labels = labels.long()
        if labels.is_floating_point():
            raise TypeError(f"expected whole numbers as labels, got {labels.dtype}")
        shape, places = list(shape), [shape[0], *shape[2:]]
        counted = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
        highest = 1 if list(labels.shape) == shape else self.labels - 1
        if list(labels.shape) not in (shape, places):
            raise ValueError(f"expected labels {places}, or 0 and 1 {shape}, got {list(labels.shape)}")
        if ((labels < 0) | (labels > highest))[counted].any():
            raise ValueError(f"labels must lie between 0 and {highest}, found {int(labels[counted].min())} to "
                             f"{int(labels[counted].max())}; leave others out with ignore_index")  # fmt: skip
        if list(labels.shape) == shape:
            if self.mask is not None:
                labels, counted = labels[:, self.mask], counted[:, self.mask]
            return (labels == 1) & counted, counted
        if self.mask is not None:
            return (labels == self.mask) & counted, counted
        true = torch.zeros(shape, dtype=torch.bool, device=labels.device)
        true.scatter_(1, labels.where(counted, 0)[:, None], counted[:, None])
        return true, counted[:, None].expand(shape)

    def check(self) -> None:
        """Refuse sets that cannot be stored."""
        if type(self.labels) is not int or self.labels < 1:
            raise ValueError(f"sets must have a number of labels of at least 1, got {self.labels!r:.40}")
        if self.mask is not None and (type(self.mask) is not int or not 0 <= self.mask < self.labels):
            raise ValueError(f"the mask of sets must be one of {self.labels} classes or None, got {self.mask!r:.40}")
        self._check_threshold()


class Tally:
    """Held-out examples as they come, for `crc`: memory does not depend on how many there are.

    Args:
        labels: K, the number of labels or classes.
        mask: as for `crc`.
        ignore_index: as for `crc`.

    Attributes:
        empty: how many others were, which do not count.
    """

    def __init__(self, labels: int, mask: int | None = None, ignore_index: int | None = None) -> None:
        if mask is not None and not 0 <= mask < labels:
            raise ValueError(f"mask must be one of the classes 0 to {labels - 1}, got {mask!r}")
        self._rule = LabelSets(0.0, 0.5, labels, mask)
        self._ignore, self.empty = ignore_index, 0
        self._shares: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @property
    def examples(self) -> int:
        """How many examples have something true."""
        return sum(self._counts.values())

    def add(self, probs: Any, truth: Any, groups: Any = None) -> None:
        """Count some examples; see `crc`.

        Raises:
            TypeError, ValueError: as `crc`.
        """
        probs = _probabilities(probs, self._rule.labels)
        true, _ = self._rule.truth(truth, probs.shape, self._ignore)
        true = true.to(probs.device)
        shown = probs if self._rule.mask is None else probs[:, self._rule.mask]
        named = [""] * len(probs) if groups is None else group_names(groups, len(probs))
        for one, held, name in zip(shown, true, named, strict=True):
            found = one[held].clamp(max=1).float()
            if not len(found):
                self.empty += 1
                continue
            cells = (found.view(torch.int32) >> SHIFT).long().cpu()
            shares = self._shares.setdefault(name, torch.zeros(CELLS, dtype=torch.float64))
            shares.index_add_(0, cells, torch.full((len(cells),), 1 / len(cells), dtype=torch.float64))
            self._counts[name] = self._counts.get(name, 0) + 1

    def sets(self, coverage: float, *, by_group: bool = False) -> LabelSets:
        """The sets of all that was added.

        Raises:
            ValueError: the coverage is none, or there are too few examples for it.
        """
        check_coverage(coverage)
        names = tuple(sorted(self._shares))
        found = [self._least(name, coverage, f" of the group {name!r}" if by_group else "") for name in names]
        if not names:
            raise too_few(0, coverage, " in which anything is true")
        threshold = torch.tensor(found, dtype=torch.float64) if by_group else found[0]
        rule = self._rule
        return LabelSets(threshold, float(coverage), rule.labels, rule.mask, names if by_group else ())

    def _least(self, name: str, coverage: float, which: str) -> float:
        """The largest probability above which the mean share of what is true is enough."""
        count = self._counts[name]
        needed = (count + 1) * coverage - 1e-9  # the loss of the new example is 1 at most
        if needed > count:
            raise too_few(count, coverage, which)
        total = self._shares[name].flip(0).cumsum(0)
        place = CELLS - 1 - int(torch.searchsorted(total, min(needed, total[-1].item())))
        return torch.tensor(place << SHIFT, dtype=torch.int32).view(torch.float32).item()


def crc(
    probs: Any,
    truth: Any,
    coverage: float = 0.9,
    *,
    mask: int | None = None,
    ignore_index: int | None = None,
    groups: Any = None,
) -> LabelSets:
    """Sets that hold a share of each example's true labels, or of the places of its mask, on average over examples.

    The risk that is controlled is the false-negative rate of an example: ``1 - coverage`` of what is true is missed on
    average, at most. Everything with at least a certain probability is in the set. Examples in which nothing is true,
    such as pictures without the class of the mask, do not count.

    Args:
        probs: ``[N, K]`` or dense ``[N, K, ...]``, predicted for held-out examples.
        truth: 0 and 1 in that shape, for any number of labels, or classes ``[N, ...]``.
        coverage: the share that sets are to hold.
        mask: the class whose places count, such as 1 for a lesion before a background; None counts all classes.
        ignore_index: a label of what does not count.
        groups: the group of each example, ``[N]``: a threshold for each group, so that the coverage holds in each.

    Raises:
        TypeError, ValueError: no probabilities, labels that do not fit, or too few examples for the coverage.

    Source: Angelopoulos et al., 2024 (first 2022), "Conformal risk control". Thresholds are rounded down, by less than
    0.05 %.

    >>> sets = crc([[0.9, 0.2], [0.8, 0.7], [0.3, 0.6]], [[1, 0], [1, 1], [0, 1]], coverage=0.5)
    >>> sets([[0.75, 0.1]])
    tensor([[ True, False]])
    """
    probs = as_tensor(probs)
    tally = Tally(probs.shape[1] if probs.ndim > 1 else 0, mask, ignore_index)
    tally.add(probs, truth, groups)
    return tally.sets(coverage, by_group=groups is not None)


def _probabilities(given: Any, labels: int) -> Tensor:
    """Probabilities ``[N, K, ...]`` of each label.

    Raises:
        ValueError: they are none, or of another number of labels.
    """
    probs = as_tensor(given)
    if probs.ndim < 2 or not probs.is_floating_point() or probs.shape[1] != labels:
        expected = f"of {labels} labels [N, {labels}, ...]" if labels else "[N, K, ...]"
        raise ValueError(f"expected floating-point probabilities {expected}, got {probs.dtype} {list(probs.shape)}")
    if probs.numel() and not bool(((probs >= 0) & (probs <= 1 + 1e-5)).all()):
        raise ValueError("probabilities must lie between 0 and 1, found NaN or others; pass probabilities, not logits")
    return probs
