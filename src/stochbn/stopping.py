"""When to stop sampling: the error of a mean over draws, and which examples need more draws.

Draws come in pairs with opposite noise. In the mean of a pair, linear responses cancel. The error is estimated from the
differences between the means of pairs. An example has only a few pairs, so its estimate is shrunk towards its variance
times the ratio of error to variance in the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Spread", "Stopping"]

PAIRS = 10.0
"""The weight of the batch's ratio, as a number of pairs, against the example's own pairs."""
DRAWS = 1.0
"""The weight of the batch's variance, as a number of pairs. Without it, sampling stops where draws agree by chance."""
RATIO, BEFORE = 0.5, 0.1
"""The prior ratio of error to variance, and its weight, as a number of pairs."""
EVEN = 1.15
"""The squared error of independent pairs is at least this many times that of quasi-random pairs."""
TYPICAL, MOST = 0.4, 2.5
"""Below a ratio of error to variance of `TYPICAL` the factor `EVEN` grows, by at most `MOST` times."""
ROUNDING = 1e-6
"""Standard errors of probabilities below this are rounding errors, which more draws do not lower."""


@dataclass
class Spread:
    """The spread of the draws of each example in a batch.

    Attributes:
        count: the number of draws so far, ``[N]``.
        draws: the sum over draws of squared distances from their mean, summed over classes, ``[N]``.
        pairs: the same for the means of pairs of draws, ``[N]``.
    """

    count: Tensor
    draws: Tensor
    pairs: Tensor

    def add(self, examples: Tensor, made: int, draws: Tensor, pairs: Tensor) -> None:
        """Add the sums of further draws of some examples."""
        self.count[examples] += made
        self.draws[examples] += draws
        self.pairs[examples] += pairs

    @property
    def variance(self) -> Tensor:
        """The variance of one draw, ``[N]``."""
        return self.draws / (self.count - 1)

    def error(self, even: bool) -> Tensor:
        """The squared error of a mean over n draws, times n, ``[N]``.

        Args:
            even: whether draws are quasi-random, so that pairs are spread more evenly than independent pairs.
        """
        freedom = self.count / 2 - 1
        variance, error = self.variance, 2 * self.pairs / freedom
        total, observed = variance.sum(), error.sum()
        if not total > 0:
            return torch.zeros_like(error)
        known = float(freedom.mean())
        ratio = (known * float(observed / total) + BEFORE * RATIO) / (known + BEFORE)
        gain = EVEN * min(MOST, max(1.0, math.sqrt(TYPICAL / ratio))) if even else 1.0
        own = error * (ratio * total / observed) if observed > 0 else ratio * variance
        likely = (freedom * variance + DRAWS * variance.sqrt().mean().square()) / (freedom + DRAWS)
        return (freedom * own + PAIRS * ratio * likely) / (freedom + PAIRS) / gain


@dataclass(frozen=True)
class Stopping:
    """The rule that decides which examples need more draws.

    Without a `tolerance`, the mean squared error of the examples of a batch must be that of `draws` independent draws.
    The number of draws is lowest if each example gets draws in proportion to the root of its error (Neyman, 1934).

    Attributes:
        draws: the number of independent draws whose accuracy is wanted.
        tolerance: if given, sampling stops for an example below this standard error.
        even: whether draws are quasi-random.
        apart: whether examples may stop one by one; otherwise all stop together.
        first: the number of draws before the first check; even, and at least 4.
        step: the number of draws between checks; even.
    """

    draws: int
    tolerance: float | None = None
    even: bool = True
    apart: bool = True
    first: int = 4
    step: int = 2

    @property
    def most(self) -> int:
        """The largest number of draws, in whole pairs."""
        return self.draws // 2 * 2

    def next(self, count: int, together: int) -> int:
        """The number of draws to make after `count`, in whole pairs; a pass makes `together` draws."""
        block = max(together // 2 * 2, 2)
        return min(block, self.first - count) if count < self.first else block

    def asks(self, count: int) -> bool:
        """Whether to check after `count` draws."""
        return count >= self.first and (count - self.first) % self.step == 0

    def waiting(self, spread: Spread) -> Tensor:
        """Which examples need more draws, ``[N]``."""
        error = spread.error(self.even)
        if self.tolerance is not None:
            waiting = error > self.tolerance**2 * spread.count
        else:
            allowed = (spread.variance.sum() / self.draws).clamp(min=len(error) * ROUNDING**2)
            root = error.sqrt() if self.apart else error.mean().sqrt().expand_as(error)
            waiting = root * root.sum() > allowed * spread.count
        return waiting if self.apart else waiting.any().expand_as(waiting)
