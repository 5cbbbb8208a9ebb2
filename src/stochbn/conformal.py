"""Prediction sets and intervals that hold the truth as often as asked for, by held-out data.

This is split conformal prediction. A score says how badly a label, or a number, fits a prediction. Its quantile over
held-out objects is the threshold: what scores no higher is in the set. If held-out and new objects are exchangeable,
sets hold the truth of new objects with at least the coverage asked for, whatever the network::

    sets = stochbn.conformal.aps(predictive(held_out).probs, labels, coverage=0.9)
    sets(predictive(x).probs)                                   # [N, K], true for the classes in each object's set

Calibrate noise and temperature on other data than these held-out objects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from stochbn.arrays import as_tensor
from stochbn.metrics import checked_predictions, checked_probabilities

__all__ = ["Intervals", "Sets", "aps", "evaluate", "intervals", "lac", "raps"]

ROUNDING = 1e-6
"""How far above the threshold a score may be that is equal to it but for the rounding of probabilities in float32."""


@dataclass(frozen=True)
class Sets:
    """Makes prediction sets of probabilities: the classes whose score is no higher than a threshold.

    Attributes:
        method: ``"lac"``, ``"aps"`` or ``"raps"``.
        threshold: the highest score in a set; of each class ``[K]``, float64, where held-out objects were weighted, or
            each class has its own.
        classes: K.
        coverage: how often sets hold the truth, at least, of exchangeable objects.
        penalty: of `raps`, for each rank beyond the free ones.
        free: ranks without a penalty.
        generator: where the random parts of scores come from; None for none.
        by_class: whether the coverage holds for the objects of each class, and not just for all together.
    """

    method: Literal["lac", "aps", "raps"]
    threshold: float | Tensor
    classes: int
    coverage: float
    penalty: float = 0.0
    free: int = 0
    generator: torch.Generator | None = None
    by_class: bool = False

    def __call__(self, probs: Any) -> Tensor:
        """The sets of objects: ``[N, K]``, true where a class is in an object's set, which may be empty.

        Args:
            probs: ``[N, K]``.

        Raises:
            TypeError, ValueError: these are no probabilities ``[N, K]``, or of another number of classes.
        """
        probs = _probabilities(probs)
        if probs.shape[1] != self.classes:
            raise ValueError(f"expected probabilities of {self.classes} classes, as fitted, got {list(probs.shape)}")
        threshold = self.threshold.to(probs.device) if isinstance(self.threshold, Tensor) else self.threshold
        return self._scores(probs) <= threshold + ROUNDING

    def _scores(self, probs: Tensor) -> Tensor:
        """``[N, K]``, float64: how badly each class fits."""
        if self.method == "lac":
            return 1 - probs
        ordered, order = probs.sort(stable=True, dim=1, descending=True)
        scores = ordered.cumsum(1)
        if self.generator is not None:
            drawn = torch.rand(
                len(probs), 1, generator=self.generator, dtype=torch.float64, device=self.generator.device
            )
            scores -= drawn.to(probs.device) * ordered
        ranks = torch.arange(1, self.classes + 1, device=probs.device)
        scores += self.penalty * (ranks - self.free).clamp(min=0)
        return torch.empty_like(scores).scatter_(1, order, scores)


@dataclass(frozen=True)
class Intervals:
    """Makes prediction intervals of means and standard deviations.

    Attributes:
        factor: half an interval's width, in standard deviations.
        coverage: how often intervals hold the truth, at least, of exchangeable objects.
    """

    factor: float
    coverage: float

    def __call__(self, mean: Tensor, std: Tensor) -> Tensor:
        """``[2, N, ...]``: the lower and the upper end for means and standard deviations ``[N, ...]``.

        Raises:
            TypeError, ValueError: they are no finite numbers of one shape, or a standard deviation is negative.
        """
        mean, std = _numbers(mean=mean, std=std)
        _check_spread(std)
        return torch.stack([mean - self.factor * std, mean + self.factor * std])


def lac(probs: Any, labels: Any, coverage: float = 0.9, *, weights: Any = None, by_class: bool = False) -> Sets:
    """The smallest sets on average, of all classes above one probability; the difficult objects' are the poorest.

    Args:
        probs: ``[N, K]``, predicted for held-out objects.
        labels: ``[N]``, their classes.
        coverage: how often sets are to hold the truth.
        weights: how many times as frequent each class is in new data as among the held-out objects, ``[K]``, where the
            mix of classes alone has changed. Sets hold the truth as often as asked for in the new mix if it is known
            (Tibshirani et al., 2019; Podkopaev and Ramdas, 2021). ``torch.tensor(a.mix) / torch.tensor(a.usual)`` of a
            posterior's ``adaptation`` is an estimate, which confusions of classes bias. None is the same mix.
        by_class: a threshold for each class, from the held-out objects of that class alone, so that sets hold the truth
            as often as asked for in every class (Vovk, 2013), whatever the mix. Each class needs enough objects.

    Raises:
        TypeError, ValueError: no probabilities, labels or weights that do not fit, too few objects for the coverage, or
            weights beside `by_class`.

    Source: Sadinle, Lei and Wasserman, 2019, "Least ambiguous set-valued classifiers".

    >>> lac([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.2, 0.3, 0.5]], [0, 1, 2], 0.75)([[0.5, 0.4, 0.1]])
    tensor([[ True, False, False]])
    """
    return _fitted("lac", probs, labels, coverage, weights, by_class)


def aps(
    probs: Any,
    labels: Any,
    coverage: float = 0.9,
    *,
    weights: Any = None,
    generator: torch.Generator | None = None,
    by_class: bool = False,
) -> Sets:
    """Sets that adapt to how difficult an object is: the most probable classes until their sum is the threshold.

    Args:
        probs: ``[N, K]``, predicted for held-out objects.
        labels: ``[N]``, their classes.
        coverage: how often sets are to hold the truth.
        weights: as for `lac`.
        generator: has sets randomised, so that the coverage is as asked for and not above; held-out objects take from
            it first, then each call.
        by_class: as for `lac`.

    Raises:
        TypeError, ValueError: as `lac`.

    Source: Romano, Sesia and Candes, 2020, "Classification with valid and adaptive coverage".
    """
    return _fitted("aps", probs, labels, coverage, weights, by_class, generator=generator)


def raps(
    probs: Any,
    labels: Any,
    coverage: float = 0.9,
    *,
    penalty: float = 0.01,
    free: int = 5,
    weights: Any = None,
    generator: torch.Generator | None = None,
    by_class: bool = False,
) -> Sets:
    """As `aps`, with a penalty on classes of a low rank, which keeps sets small where there are many classes.

    Args:
        probs: ``[N, K]``, predicted for held-out objects.
        labels: ``[N]``, their classes.
        coverage: how often sets are to hold the truth.
        penalty: what each rank beyond the free ones adds to a class's score; at least 0.
        free: how many of the most probable classes have no penalty.
        weights: as for `lac`.
        generator: as for `aps`.
        by_class: as for `lac`.

    Raises:
        TypeError, ValueError: as `lac`, or a negative penalty.

    Source: Angelopoulos et al., 2021, "Uncertainty sets for image classifiers using conformal prediction".
    """
    if not 0 <= penalty < math.inf or not isinstance(free, int) or free < 0:
        raise ValueError(f"expected a penalty and a number of free ranks of at least 0, got {penalty!r} and {free!r}")
    options = {"penalty": penalty, "free": free, "generator": generator}
    return _fitted("raps", probs, labels, coverage, weights, by_class, **options)


def intervals(mean: Any, std: Any, targets: Any, coverage: float = 0.9) -> Intervals:
    """Intervals about predicted means, as wide as their standard deviations have to be multiplied to hold the truth.

    Args:
        mean: ``[N]`` or ``[N, D]``, predicted for held-out objects.
        std: their standard deviations, positive, such as ``prediction.total_std``.
        targets: their true values.
        coverage: how often intervals are to hold the truth; of several outputs, on average over these.

    Raises:
        TypeError, ValueError: no finite numbers of one shape, a standard deviation that is not positive, or too few
            objects for the coverage.

    Source: Lei et al., 2018, "Distribution-free predictive inference for regression" (locally weighted).
    """
    mean, std, targets = _numbers(mean=mean, std=std, targets=targets)
    _check_spread(std, positive=True)
    scores = ((targets - mean).abs() / std).flatten()
    return Intervals(_threshold(scores, coverage), float(coverage))


def evaluate(sets: Tensor, labels: Any) -> dict[str, float]:
    """How often sets hold the truth, and how large they are.

    Args:
        sets: ``[N, K]``, as `Sets` gives them.
        labels: ``[N]``.

    Returns:
        ``coverage``: the share of objects whose class is in their set. ``worst_class_coverage``: that of the class for
        which it is lowest. ``size``: the mean number of classes in a set. ``empty``: the share of empty sets.

    Raises:
        TypeError, ValueError: no sets ``[N, K]`` of truth values, or labels that do not fit.

    >>> evaluate(torch.tensor([[True, True], [False, True]]), [0, 0])
    {'coverage': 0.5, 'worst_class_coverage': 0.5, 'size': 1.5, 'empty': 0.0}
    """
    if not isinstance(sets, Tensor) or sets.dtype != torch.bool or sets.ndim != 2:
        raise TypeError("expected sets [N, K] of truth values, as stochbn.conformal makes them")
    uniform = torch.full(sets.shape, 1 / max(sets.shape[1], 1), dtype=torch.float64, device=sets.device)
    _, labels = checked_predictions(uniform, labels)
    held = sets.gather(1, labels[:, None])[:, 0].double()
    sizes = sets.sum(1).double()
    by_class = [held[labels == label].mean().item() for label in labels.unique().tolist()]
    return {
        "coverage": held.mean().item(),
        "worst_class_coverage": min(by_class),
        "size": sizes.mean().item(),
        "empty": (sizes == 0).double().mean().item(),
    }


def _fitted(
    method: Literal["lac", "aps", "raps"],
    probs: Any,
    labels: Any,
    coverage: float,
    weights: Any,
    by_class: bool,
    **options: Any,
) -> Sets:
    if by_class and weights is not None:
        raise ValueError("weights are for one threshold: with by_class the mix of classes does not matter")
    _probabilities(probs)
    probs, labels = checked_predictions(probs, labels)
    probs = probs.double()
    unfitted = Sets(method, math.inf, probs.shape[1], float(coverage), by_class=by_class, **options)
    scores = unfitted._scores(probs).gather(1, labels[:, None])[:, 0]
    threshold: float | Tensor
    if by_class:
        of = [_threshold(scores[labels == k], coverage, f" of class {k}") for k in range(probs.shape[1])]
        threshold = scores.new_tensor(of)
    elif weights is not None:
        _threshold(scores, coverage)  # which refuses too few objects
        threshold = _weighted_threshold(scores, labels, weights, probs.shape[1], coverage)
    else:
        threshold = _threshold(scores, coverage)
    return replace(unfitted, threshold=threshold)


def _weighted_threshold(scores: Tensor, labels: Tensor, weights: Any, classes: int, coverage: float) -> Tensor:
    """``[K]``: for each class that a new object may have, the weighted quantile of the scores and its own, unknown one.

    It is infinite where the weight of the new object's class is too large beside that of all held-out ones.
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
        raise ValueError("no held-out object is of a class that has a weight; pass some of these classes")
    needed = coverage * (total[-1] + weights) * (1 - 1e-12)
    place = torch.searchsorted(total, needed)
    return torch.cat([ordered, ordered.new_tensor([math.inf])])[place]


def _threshold(scores: Tensor, coverage: float, which: str = "") -> float:
    """The k-th smallest of n scores, where k = ceil((n + 1) coverage)."""
    if not isinstance(coverage, (int, float)) or not 0 < coverage < 1:
        raise ValueError(f"coverage must lie between 0 and 1, such as 0.9, got {coverage!r}")
    count = len(scores)
    # What is a whole number but for rounding, as 10 * 0.9, is one.
    place = math.ceil((count + 1) * coverage - 1e-9)
    if place > count:
        needed = math.ceil(coverage / (1 - coverage) - 1e-9)
        raise ValueError(
            f"a coverage of {coverage:g} needs at least {needed} held-out objects{which}, got {count}; pass more, or "
            "ask for less"
        )
    return scores.sort().values[place - 1].item()


def _probabilities(given: Any) -> Tensor:
    """Probabilities ``[N, K]`` in float64."""
    probs = as_tensor(given)
    if probs.ndim != 2 or not probs.is_floating_point():
        raise ValueError(
            f"expected floating-point probabilities [N, K], got {probs.dtype} {list(probs.shape)}; the places of dense "
            "predictions are not exchangeable, so take one object of each"
        )
    checked_probabilities(probs)
    return probs.double()


def _numbers(**values: Any) -> list[Tensor]:
    """Finite numbers of one shape, in float64."""
    tensors = {name: as_tensor(value).double() for name, value in values.items()}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    first = next(iter(shapes.values()))
    if not first or any(shape != first for shape in shapes.values()):
        raise ValueError(f"expected {', '.join(shapes)} of one shape [N, ...], got {shapes}")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has NaN or infinity; leave such objects out")
    return list(tensors.values())


def _check_spread(std: Tensor, *, positive: bool = False) -> None:
    if (std < 0).any() or (positive and (std == 0).any()):
        wanted = "positive" if positive else "at least 0"
        raise ValueError(f"standard deviations must be {wanted}, found {std.min().item():g}")
