"""When draws are enough: the error of a mean over draws, and the examples that need more of them.

Draws come in pairs with opposite noise. In the mean of a pair, linear responses cancel, and how the means of pairs
differ tells the error that is left. An example has a few pairs only, so its error is shrunk towards its variance times
the ratio of error to variance in the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Spread", "Stopping"]

PAIRS = 10.0
"""How many pairs the ratio of the batch counts as, beside the example's own pairs."""
DRAWS = 1.0
"""How many pairs the variance of the batch counts as. Without it, examples whose draws agree by chance stop early."""
RATIO, BEFORE = 0.5, 0.1
"""The ratio of error to variance that is expected before any draw, and how many pairs this counts as."""
EVEN = 1.15
"""Independent pairs have a squared error that is larger than that of quasi-random pairs by this factor, at least."""
TYPICAL, MOST = 0.4, 2.5
"""If the ratio of error to variance is below `TYPICAL`, the factor is larger, by at most `MOST` times."""
ROUNDING = 1e-6
"""Standard errors of probabilities below this are rounding, which more draws do not lower."""


@dataclass
class Spread:
    """How the draws of each example of a batch differ, up to its last draw.

    Attributes:
        count: ``[N]``: draws that have been made.
        draws: ``[N]``: the sum over draws of squared distances from their mean, summed over classes.
        pairs: ``[N]``: the same of the means of pairs of draws.
    """

    count: Tensor
    draws: Tensor
    pairs: Tensor

    def add(self, examples: Tensor, made: int, draws: Tensor, pairs: Tensor) -> None:
        """Add what so many more draws of some examples have added to the sums."""
        self.count[examples] += made
        self.draws[examples] += draws
        self.pairs[examples] += pairs

    @property
    def variance(self) -> Tensor:
        """``[N]``: the variance of one draw."""
        return self.draws / (self.count - 1)

    def error(self, even: bool) -> Tensor:
        """``[N]``: the squared error of a mean over n draws, times n.

        Args:
            even: whether draws are quasi-random, so that pairs are spread more evenly than independent ones.
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
    """Says which examples need more draws.

    Without a `tolerance`, the squared errors of probabilities are to be, in the mean over the examples of a batch,
    those of `draws` independent draws. The fewest draws for that are in proportion to the root of each example's error
    (Neyman, 1934).

    Attributes:
        draws: how many independent draws a mean is to be worth.
        tolerance: the standard error at which an example is done, in place of that.
        even: whether draws are quasi-random.
        apart: whether examples may stop one by one; otherwise all stop together.
        first: draws before the first question; even, and at least 4.
        step: draws from one question to the next; even.
    """

    draws: int
    tolerance: float | None = None
    even: bool = True
    apart: bool = True
    first: int = 4
    step: int = 2

    @property
    def most(self) -> int:
        """How many draws to make at most: whole pairs."""
        return self.draws // 2 * 2

    def next(self, count: int, together: int) -> int:
        """How many draws to make next, after `count`, where a pass makes `together`: whole pairs."""
        block = max(together // 2 * 2, 2)
        return min(block, self.first - count) if count < self.first else block

    def asks(self, count: int) -> bool:
        """Whether it is time to ask, after so many draws."""
        return count >= self.first and (count - self.first) % self.step == 0

    def waiting(self, spread: Spread) -> Tensor:
        """``[N]``: which examples need more draws than they have."""
        error = spread.error(self.even)
        if self.tolerance is not None:
            waiting = error > self.tolerance**2 * spread.count
        else:
            allowed = (spread.variance.sum() / self.draws).clamp(min=len(error) * ROUNDING**2)
            root = error.sqrt() if self.apart else error.mean().sqrt().expand_as(error)
            waiting = root * root.sum() > allowed * spread.count
        return waiting if self.apart else waiting.any().expand_as(waiting)
