"""What all rules share: thresholds of scores, groups of examples, and what a posterior's file holds of a rule."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from stochbn.arrays import as_array, as_tensor
from stochbn.caller import warn

__all__ = ["ROUNDING", "Rule", "by_group", "check_coverage", "group_names", "is_number", "numbers", "quantile"]

ROUNDING = 1e-6
"""How far above the threshold a score may be that is equal to it but for the rounding of probabilities in float32."""


class Rule(ABC):
    """Makes sets of predictions: what scores no higher than a threshold is in the set.

    Attributes:
        threshold: one, or float64 ``[G]`` with one for each group, or ``[K]`` with one for each class.
        coverage: how often sets hold the truth, at least, of exchangeable examples.
        groups: the names of the groups, in the order of their thresholds; none where there are no groups.
    """

    kind: ClassVar[str]
    """What it is called in a file."""
    unstored: ClassVar[tuple[str, ...]] = ("threshold",)
    """Fields that are no settings in a file."""

    threshold: float | Tensor
    coverage: float
    groups: tuple[str, ...]
    __call__: Callable[..., Tensor]

    @abstractmethod
    def of(self, prediction: Any, groups: Any = None) -> Tensor:
        """The sets of a prediction, as the rule's call makes them of its tensors.

        Raises:
            TypeError, ValueError: the prediction is of another task, or as the call.
        """

    @abstractmethod
    def within(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sets from the outputs of an exported network, by their names in its file; nothing is checked.

        Of sets by group, which need more than these outputs, there are none.
        """

    @abstractmethod
    def columns(self, prediction: Any, names: Sequence[str], groups: Any = None) -> dict[str, list[Any]]:
        """The sets as columns of a table, a row for each example.

        Args:
            prediction: of the examples.
            names: of all classes or labels; none where there are none.
            groups: as for the call.

        Raises:
            TypeError, ValueError: as `of`, or the prediction is dense, with more than one row an example.
        """

    @abstractmethod
    def check(self) -> None:
        """Refuse a rule that cannot be stored.

        Raises:
            TypeError, ValueError: a setting cannot be; the message names it.
        """

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        """What describes the rule in a file, beside its threshold."""
        return tuple(field.name for field in fields(cls) if field.name not in cls.unstored)  # type: ignore[arg-type]

    def _check_threshold(self, length: int | None = None) -> None:
        """Refuse thresholds of a wrong type or number, and a coverage that is none.

        Args:
            length: how many thresholds there may be beside one, or one for each group.
        """
        if not isinstance(self.coverage, float) or not 0 < self.coverage < 1:
            raise ValueError(f"the coverage of sets must lie between 0 and 1, got {self.coverage!r:.40}")
        groups = self.groups
        if not isinstance(groups, tuple) or not all(isinstance(name, str) for name in groups):
            raise ValueError(f"the groups of sets must be texts, got {groups!r:.60}")
        threshold = torch.as_tensor(self.threshold)
        if threshold.dtype != torch.float64 and isinstance(self.threshold, Tensor):
            raise ValueError(f"the thresholds of sets must be float64, got {threshold.dtype}")
        shapes: tuple[Any, ...] = ((len(groups),),) if groups else ((), *([(length,)] if length else []))
        if threshold.shape not in shapes or bool(threshold.isnan().any()):
            each = (
                "one for each group"
                if groups
                else f"one threshold{f', or one for each of {length} classes' if length else ''}"
            )
            raise ValueError(f"sets must have {each}, and no NaN")

    def _thresholds(self, groups: Any, like: Tensor) -> Tensor | float:
        """The threshold of each example, ``[N, 1, ...]`` for a tensor ``[N, ...]``, or one for all.

        An example of a group that was not among the held-out ones has an infinite one, so that its set is everything.

        Raises:
            ValueError: the groups are missing, or no rule by group has been made.
        """
        if not self.groups:
            if groups is not None:
                raise ValueError("these sets are not by group: leave groups out")
            return self.threshold.to(like.device) if isinstance(self.threshold, Tensor) else self.threshold
        if groups is None:
            raise ValueError("these sets are by group: pass groups, the group of each example")
        place = {name: i for i, name in enumerate(self.groups)}
        named = group_names(groups, len(like))
        if new := sorted(set(named) - place.keys()):
            shown = ", ".join(map(repr, new[:5])) + (f" and {len(new) - 5} more" if len(new) > 5 else "")
            warn(f"sets of groups that were not among the held-out examples hold everything: {shown}")
        index = [place.get(name, len(place)) for name in named]
        known = torch.as_tensor(self.threshold, dtype=torch.float64)
        each = torch.cat([known, known.new_tensor([math.inf])])[torch.tensor(index, dtype=torch.int64)]
        return each.to(like.device).view(-1, *[1] * (like.ndim - 1))


def quantile(
    scores: Tensor, coverage: float, which: str = "", *, weights: Tensor | None = None, count: int = 0
) -> float:
    """The threshold that holds the scores of new examples as often as asked for.

    It is the k-th smallest of n scores, where k = ceil((n + 1) coverage). Where an example has several scores, each has
    a weight, and those of an example sum to 1: then the mean share of them above the threshold is controlled.

    Args:
        scores: ``[M]``, of the held-out examples.
        coverage: how often, or what share on average.
        which: what is added to the word "examples" in the error.
        weights: ``[M]``; None is 1 for each.
        count: n, where it is not M.

    Raises:
        ValueError: the coverage is none, or there are too few examples for it.

    Source: with weights, Angelopoulos et al., 2024, "Conformal risk control", theorem 1 for a loss of at most 1.
    """
    check_coverage(coverage)
    count = count or len(scores)
    if (count + 1) * coverage - 1e-9 > count:
        raise too_few(count, coverage, which)
    ordered, order = scores.double().sort()
    total = (
        torch.arange(1, len(scores) + 1, dtype=torch.float64) if weights is None else weights[order].double().cumsum(0)
    )
    # What is a whole number but for rounding, as 10 * 0.9, is one.
    place = int(torch.searchsorted(total.to(ordered.device), (count + 1) * coverage - 1e-9))
    return ordered[min(place, len(ordered) - 1)].item()


def too_few(count: int, coverage: float, which: str = "") -> ValueError:
    """The error of fewer held-out examples than a coverage needs."""
    needed = math.ceil(coverage / (1 - coverage) - 1e-9)
    return ValueError(
        f"a coverage of {coverage:g} needs at least {needed} held-out examples{which}, got {count}; pass more, or ask "
        "for less"
    )


def check_coverage(coverage: Any) -> None:
    """Refuse a coverage that does not lie between 0 and 1.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(coverage, (int, float)) or not 0 < coverage < 1:
        raise ValueError(f"coverage must lie between 0 and 1, such as 0.9, got {coverage!r}")


def by_group(
    scores: Tensor, coverage: float, groups: Any, *, weights: Tensor | None = None
) -> tuple[float | Tensor, tuple[str, ...]]:
    """The threshold of all scores, or of each group, and the names of the groups.

    Args:
        scores: ``[N]``, or ``[N, D]`` where an example has several.
        coverage: how often.
        groups: the group of each of N examples; None is one for all.
        weights: of the scores, of the same shape; None is the same for all of an example.

    Raises:
        ValueError: as `quantile`, or another number of groups.
    """
    each = scores.reshape(len(scores), -1) if scores.numel() else scores.reshape(0, 1)
    weights = torch.full_like(each, 1 / max(each.shape[1], 1)) if weights is None else weights.reshape(each.shape)
    if groups is None:
        return quantile(each.flatten(), coverage, weights=weights.flatten(), count=len(each)), ()
    named = group_names(groups, len(each))
    names = tuple(sorted(set(named)))
    found = []
    for name in names:
        chosen = torch.tensor([one == name for one in named], device=each.device)
        which = f" of the group {name!r}"
        found.append(
            quantile(
                each[chosen].flatten(), coverage, which, weights=weights[chosen].flatten(), count=int(chosen.sum())
            )
        )
    return torch.tensor(found, dtype=torch.float64), names


def group_names(groups: Any, count: int) -> list[str]:
    """The group of each example as a text; a missing one is the empty text.

    >>> group_names([1, 2.0, "b", None], 4)
    ['1', '2', 'b', '']

    Raises:
        TypeError: they are no sequence.
        ValueError: there are not as many as examples.
    """
    values = as_array(groups)
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"groups must be a sequence with the group of each example, got {type(groups).__name__}")
    if len(values) != count or any(isinstance(value, (list, tuple, dict)) for value in values):
        raise ValueError(f"expected a group for each of {count} examples, got {len(values)}")
    return [_group_name(value) for value in values]


def _group_name(value: Any) -> str:
    """A whole number is the same group whatever its type; pandas has them as floats where one is missing."""
    if value is None or value != value:  # NaN
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def numbers(**values: Any) -> list[Tensor]:
    """Finite numbers of one shape, in float64.

    Raises:
        TypeError, ValueError: they are not.
    """
    tensors = {name: as_tensor(value).double() for name, value in values.items()}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    first = next(iter(shapes.values()))
    if not first or any(shape != first for shape in shapes.values()):
        raise ValueError(f"expected {', '.join(shapes)} of one shape [N, ...], got {shapes}")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has NaN or infinity; leave such examples out")
    return list(tensors.values())


def is_number(value: Any) -> bool:
    """Whether this is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
