"""Adaptive conformal inference: sets for a stream that drifts, whose labels arrive after the predictions."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from stochbn.conformal.base import ROUNDING, is_number
from stochbn.conformal.cqr import QuantileIntervals
from stochbn.conformal.intervals import Intervals
from stochbn.conformal.sets import Sets

__all__ = ["Online", "aci"]


class Online:
    """Sets whose level follows how often they held the truth so far; see `aci`, which makes them.

    Attributes:
        level: the share of scores that the next set leaves out. It may leave [0, 1]: at 0 and below, sets are
            everything; at 1 and above, nothing.
        examples: how many labels have arrived.
        held: of how many of these the sets held the truth.
    """

    def __init__(
        self, rule: Sets | Intervals | QuantileIntervals, scores: Tensor, rate: float, window: int | None
    ) -> None:
        self.rule, self.rate = rule, rate
        self.level, self.examples, self.held = 1 - rule.coverage, 0, 0
        kept = scores.tolist()[-(window or len(scores)) :]
        self._latest, self._ordered = deque(kept, maxlen=window or len(kept)), sorted(kept)

    def __repr__(self) -> str:
        share = f"{100 * self.coverage:.1f} % of {self.examples:,} held the truth" if self.examples else "no labels yet"
        return f"<Online: {100 * self.rule.coverage:g} % asked for, {share}, level {self.level:.3f}>"

    @property
    def coverage(self) -> float:
        """How often sets held the truth so far; NaN before the first label."""
        return self.held / self.examples if self.examples else math.nan

    @property
    def threshold(self) -> float:
        """Of the next set."""
        count = len(self._ordered)
        place = math.ceil((count + 1) * (1 - self.level) - 1e-9)
        return math.inf if place > count else -math.inf if place < 1 else self._ordered[place - 1]

    def __call__(self, *predicted: Any) -> Tensor:
        """The sets of new examples, from what the rule takes: probabilities, or a mean and a standard deviation.

        Raises:
            TypeError, ValueError: as the rule's call.
        """
        found: Tensor = replace(self.rule, threshold=self.threshold)(*predicted)
        return found

    def update(self, *predicted_and_truth: Any) -> Tensor:
        """Learn from labels that have arrived, one example after another.

        Args:
            predicted_and_truth: what the call took of these examples, and then their labels or targets.

        Returns:
            ``[n]``: whether the set of each example held the truth, before its label was known.

        Raises:
            TypeError, ValueError: as the rule's ``scores``; nothing is learned then.
        """
        scores = cast(Any, self.rule).scores(*predicted_and_truth)
        rounding = ROUNDING if isinstance(self.rule, Sets) else 0.0  # as these sets are made
        found = []
        for score in scores.tolist():
            held = score <= self.threshold + rounding
            self.level += self.rate * ((1 - self.rule.coverage) - (not held))
            self.examples, self.held = self.examples + 1, self.held + held
            if len(self._latest) == self._latest.maxlen:
                del self._ordered[bisect_left(self._ordered, self._latest[0])]
            self._latest.append(score)
            insort(self._ordered, score)
            found.append(held)
        return torch.tensor(found, dtype=torch.bool)


def aci(
    rule: Sets | Intervals | QuantileIntervals, *held_out: Any, rate: float = 0.005, window: int | None = None
) -> Online:
    """Sets for a stream whose data drifts: after every label their level moves, so that the coverage is kept over time.

    In a stream of T examples, whatever happens in it, the share of sets that miss the truth differs from
    ``1 - coverage`` by at most ``(1 + rate) / (rate T)``. Scores are compared with those of the latest examples::

        online = stochbn.conformal.aci(sets, probs, labels)           # sets of lac, aps, ...; what they were made from
        which = online(predictive(x).probs)                           # sets now
        online.update(predictive(x).probs, labels_of_x)               # when the labels are known, in order

    Args:
        rule: sets or intervals with one threshold, made from the held-out examples.
        held_out: these examples: probabilities and labels, or means, standard deviations and targets.
        rate: how far one miss moves the level: a larger one follows faster, and sets vary more.
        window: how many of the latest scores are kept; None is as many as held-out examples.

    Raises:
        TypeError: this is no such rule.
        ValueError: the rule has several thresholds or is random, the rate is not between 0 and 1, the window is not at
            least 1, or as the rule's ``scores``.

    Source: Gibbs and Candes, 2021, "Adaptive conformal inference under distribution shift", proposition 4.1.
    """
    if not isinstance(rule, Sets | Intervals | QuantileIntervals):
        raise TypeError(f"expected sets or intervals of stochbn.conformal, got {type(rule).__name__}")
    if isinstance(rule.threshold, Tensor) or getattr(rule, "generator", None) is not None:
        raise ValueError("expected sets with one threshold: no weights, by_class, groups or generator")
    if not is_number(rate) or not 0 < rate < 1:
        raise ValueError(f"rate must lie between 0 and 1, such as 0.005, got {rate!r}")
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"window must be a whole number of at least 1, got {window!r}")
    scores = cast(Any, rule).scores(*held_out).flatten()
    if not len(scores):
        raise ValueError("there are no held-out examples")
    return Online(rule, scores, rate, window)
