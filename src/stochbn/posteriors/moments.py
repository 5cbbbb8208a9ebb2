"""Moments of observations, as running sums that can be merged."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Moments"]


@dataclass(frozen=True)
class Moments:
    """The number of observations, their mean and their sum of squared deviations from it, in float64."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, observations: Tensor) -> Moments:
        """Compute the moments over the first axis of ``[n, ...]``."""
        observations = observations.double()
        mean = observations.sum(0) / max(len(observations), 1)
        return cls(len(observations), mean, (observations - mean).square().sum(0))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of observations together.

        Source: Chan, Golub and LeVeque, 1983, the parallel update.
        """
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.squares + other.squares + delta.square() * (self.count * other.count / count),
        )

    @property
    def variance(self) -> Tensor:
        """The unbiased variance of the observations; 0 for a single one."""
        return self.squares / max(self.count - 1, 1)
