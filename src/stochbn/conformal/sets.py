"""Sets of classes: what the methods for classification share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stochbn.arrays import as_tensor
from stochbn.conformal.base import ROUNDING, Rule, by_group, is_number, quantile
from stochbn.metrics import checked_predictions, checked_probabilities
from stochbn.predictions import MultilabelPrediction, Prediction

__all__ = ["METHODS", "Method", "Sets", "fitted", "named", "probabilities", "sorted_probabilities"]

Method = Literal["lac", "aps", "raps", "saps"]
METHODS: tuple[Method, ...] = ("lac", "aps", "raps", "saps")
"""Each is a module beside this one, whose ``score`` says how badly a class fits."""


@dataclass(frozen=True)
class Sets(Rule):
    """Makes prediction sets of probabilities: the classes whose score is no higher than a threshold.

    Attributes:
        method: ``"lac"``, ``"aps"``, ``"raps"`` or ``"saps"``.
        threshold: the highest score in a set; of each class ``[K]``, float64, where held-out examples were weighted, or
            each class has its own; of each group ``[G]`` with `groups`.
        classes: K.
        coverage: how often sets hold the truth, at least, of exchangeable examples.
        penalty: of `raps`, for each rank beyond the free ones; of `saps`, for each rank beyond the first.
        free: ranks without a penalty.
        generator: where the random parts of scores come from; None for none.
        by_class: whether the coverage holds for the examples of each class, and not just for all together.
        groups: names of groups, in each of which the coverage holds; none where there are no groups.
    """

    method: Method
    threshold: float | Tensor
    classes: int
    coverage: float
    penalty: float = 0.0
    free: int = 0
    generator: torch.Generator | None = None
    by_class: bool = False
    groups: tuple[str, ...] = ()

    kind: ClassVar[str] = "sets"
    unstored: ClassVar[tuple[str, ...]] = ("threshold", "generator")

    def __call__(self, probs: Any, groups: Any = None) -> Tensor:
        """The sets of examples: ``[N, K]``, true where a class is in an example's set, which may be empty.

        Args:
            probs: ``[N, K]``.
            groups: the group of each example, for sets by group. In one that was not among the held-out examples all
                classes are in the set.

        Raises:
            TypeError, ValueError: these are no probabilities ``[N, K]``, or of another number of classes, or groups are
                missing.
        """
        probs = probabilities(probs)
        if probs.shape[1] != self.classes:
            raise ValueError(f"expected probabilities of {self.classes} classes, as fitted, got {list(probs.shape)}")
        return self.held(probs, self._thresholds(groups, probs))

    def held(self, probs: Tensor, threshold: Tensor | float) -> Tensor:
        """Which classes of checked probabilities ``[N, K]``, float64, score no higher than a threshold."""
        return self._scores(probs) <= threshold + ROUNDING

    def scores(self, probs: Any, labels: Any) -> Tensor:
        """``[N]``, float64: how badly each example's own class fits.

        Raises:
            TypeError, ValueError: no probabilities ``[N, K]``, or labels that do not fit.
        """
        probabilities(probs)
        probs, labels = checked_predictions(probs, labels)
        return self._scores(probs.double()).gather(1, labels[:, None])[:, 0]

    def of(self, prediction: Any, groups: Any = None) -> Tensor:
        """The sets ``[N, K]`` of a `stochbn.Prediction`."""
        if not isinstance(prediction, Prediction) or isinstance(prediction, MultilabelPrediction):
            raise TypeError(f"these sets are of one class for each example, got a {type(prediction).__name__}")
        return self(prediction.probs, groups)

    def within(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``set``: ``[N, K]``, truth values."""
        return {} if self.groups else {"set": self.held(outputs["probs"].double(), self.threshold)}

    def columns(self, prediction: Any, names: Sequence[str], groups: Any = None) -> dict[str, list[Any]]:
        """``set``: the names of the classes in each example's set."""
        return {"set": named(self.of(prediction, groups), names)}

    def check(self) -> None:
        """Refuse sets that cannot be stored."""
        if self.generator is not None:
            raise ValueError(
                "sets with a generator are random, and a generator cannot be stored: fit them without generator="
            )
        if self.method not in METHODS:
            raise ValueError(f"the method of sets must be one of {', '.join(METHODS)}, got {self.method!r:.40}")
        if type(self.classes) is not int or self.classes < 2:
            raise ValueError(f"sets must have a number of classes of at least 2, got {self.classes!r:.40}")
        if not is_number(self.penalty) or not 0 <= self.penalty < 1e100:
            raise ValueError(f"the penalty of sets must be at least 0, got {self.penalty!r:.40}")
        if type(self.free) is not int or not 0 <= self.free < 2**31 or type(self.by_class) is not bool:
            raise ValueError("sets must have a number of free ranks of at least 0, and tell whether they are by class")
        if self.by_class and self.groups:
            raise ValueError("sets are by class or by group, not both")
        self._check_threshold(self.classes)
        if self.by_class and not isinstance(self.threshold, Tensor):
            raise ValueError("sets by class must have a threshold for each class")

    def _scores(self, probs: Tensor) -> Tensor:
        """``[N, K]``, float64: how badly each class fits."""
        return _score(self.method)(probs, _drawn(self.generator, probs), self.penalty, self.free)


Score = Callable[[Tensor, "Tensor | None", float, int], Tensor]
"""From probabilities ``[N, K]`` in float64, random numbers ``[N, 1]`` or None, a penalty and free ranks to scores."""


def _score(method: str) -> Score:
    from importlib import import_module

    found: Score = import_module(f"stochbn.conformal.{method}").score
    return found


def sorted_probabilities(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities ``[N, K]`` of each example in descending order, and the classes that they are of.

    Of equal ones the class with the lower number is first. ONNX has no stable sort, but its TopK orders them alike.
    """
    if torch.compiler.is_exporting():
        return probs.topk(probs.shape[1], dim=1)
    ordered, order = probs.sort(stable=True, dim=1, descending=True)
    return ordered, order


def _drawn(generator: torch.Generator | None, probs: Tensor) -> Tensor | None:
    """Random numbers from 0 to 1, ``[N, 1]``; None without a generator."""
    if generator is None:
        return None
    drawn = torch.rand(len(probs), 1, generator=generator, dtype=torch.float64, device=generator.device)
    return drawn.to(probs.device)


def fitted(
    method: Method,
    probs: Any,
    labels: Any,
    coverage: float,
    weights: Any,
    by_class: bool,
    groups: Any,
    **options: Any,
) -> Sets:
    """Sets of a method with the thresholds of held-out examples; see `stochbn.conformal.lac`."""
    if by_class and weights is not None:
        raise ValueError("weights are for one threshold: with by_class the mix of classes does not matter")
    if groups is not None and (by_class or weights is not None):
        raise ValueError("groups cannot be given together with by_class or weights")
    probs = probabilities(probs)
    unfitted = Sets(method, math.inf, probs.shape[1], float(coverage), by_class=by_class, **options)
    scores = unfitted.scores(probs, labels)
    labels = as_tensor(labels).to(scores.device)
    if by_class:
        of = [quantile(scores[labels == k], coverage, f" of class {k}") for k in range(probs.shape[1])]
        return replace(unfitted, threshold=scores.new_tensor(of))
    if weights is not None:
        quantile(scores, coverage)  # which refuses too few examples
        return replace(unfitted, threshold=_weighted(scores, labels, weights, probs.shape[1], coverage))
    threshold, names = by_group(scores, coverage, groups)
    return replace(unfitted, threshold=threshold, groups=names)


def _weighted(scores: Tensor, labels: Tensor, weights: Any, classes: int, coverage: float) -> Tensor:
    """``[K]``: for each class that a new example may have, the weighted quantile of the scores and its own, unknown.

    It is infinite where the weight of the new example's class is too large beside that of all held-out ones.
    """
    try:
        weights = as_tensor(weights, torch.float64).to(scores.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"weights must be a number for each class, got {weights!r:.60}") from error
    if weights.shape != (classes,):
        raise ValueError(f"expected a weight for each of {classes} classes, got {list(weights.shape)}")
    if not weights.isfinite().all() or (weights < 0).any() or not weights.any():
        raise ValueError("weights must be finite and not negative, and not all 0")
    ordered, order = scores.sort()
    total = weights[labels[order]].cumsum(0)
    if not total[-1]:
        raise ValueError("no held-out example is of a class that has a weight; pass some of these classes")
    needed = coverage * (total[-1] + weights) * (1 - 1e-12)
    place = torch.searchsorted(total, needed)
    return torch.cat([ordered, ordered.new_tensor([math.inf])])[place]


def named(sets: Tensor, names: Sequence[str]) -> list[list[str]]:
    """The names of what is in each set ``[N, K]``."""
    return [[name for name, one in zip(names, row, strict=True) if one] for row in sets.tolist()]


def probabilities(given: Any) -> Tensor:
    """Probabilities ``[N, K]`` in float64.

    Raises:
        TypeError, ValueError: they are none.
    """
    probs = as_tensor(given)
    if probs.ndim != 2 or not probs.is_floating_point():
        raise ValueError(
            f"expected floating-point probabilities [N, K], got {probs.dtype} {list(probs.shape)}; the places of dense "
            "predictions are not exchangeable: see stochbn.conformal.crc, which controls a rate for each example"
        )
    checked_probabilities(probs)
    return probs.double()
