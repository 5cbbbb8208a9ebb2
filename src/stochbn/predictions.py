"""What predictives return: class probabilities with their uncertainty, or numbers with theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Estimate", "MultilabelPrediction", "Prediction", "entropy"]


def entropy(probs: Tensor, axis: int = 1) -> Tensor:
    """The entropy in nats over an axis of probabilities: that of the classes, ``[N, K, ...]`` to ``[N, ...]``.

    >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor([0.6931, 0.0000])
    """
    total: Tensor = torch.special.entr(probs).sum(axis)
    return total


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a predictive says of N objects; for dense outputs every tensor has their places too.

    Attributes:
        probs: probabilities ``[N, K]``, the mean over draws, in the layout of the network's output.
        expected_entropy: ``[N]``, nats: the mean over draws of each draw's entropy, the uncertainty that
            remains when the statistics are known (aleatoric).
        log_probs: ``[S, N, K]``, the log-probabilities of each draw, if ``keep_draws=True`` asked for them.
        class_axis: the axis of the classes in `probs`.
        note: why there is no mutual information, where one pass without draws was made.
    """

    probs: Tensor
    expected_entropy: Tensor
    log_probs: Tensor | None = None
    class_axis: int = 1
    note: str = ""

    @property
    def entropy(self) -> Tensor:
        """``[N]``, nats: the entropy of `probs`, the total uncertainty."""
        return entropy(self.probs, self.class_axis)

    @property
    def mutual_information(self) -> Tensor:
        """``[N]``, nats: entropy of the mean minus mean of the entropies, the part due to the draws (epistemic).

        From S independent draws it comes out too small by about a share 1 / S. Objects that are done after few draws
        have it smaller still, for single ones by half or more; `tolerance=0` gives all objects all draws.
        """
        return (self.entropy - self.expected_entropy).clamp(min=0)

    @staticmethod
    def cat(predictions: Sequence[Any]) -> Any:
        """One prediction for the objects of several of one type, in their order.

        Raises:
            ValueError: there are none, or they differ in their classes, draws or types.
        """
        if not predictions:
            raise ValueError("there are no predictions to join; expected at least one")
        kept = [p.draws_kept for p in predictions if p.draws_kept is not None]
        if len(kept) not in (0, len(predictions)):
            raise ValueError("some of the predictions to join kept their draws and others did not")
        if len({type(p) for p in predictions}) > 1:
            raise ValueError("the predictions to join are of different tasks")
        try:
            columns = [torch.cat(column) for column in zip(*(p.averages for p in predictions), strict=True)]
            joined = predictions[0].of(columns, torch.cat(kept, dim=1) if kept else None)
            return joined if len({p.note for p in predictions}) == 1 else replace(joined, note="")
        except RuntimeError as error:
            raise ValueError(f"the predictions differ in their classes or draws: {error}") from error

    @property
    def averages(self) -> tuple[Tensor, ...]:
        """The tensors that are averages over draws."""
        return self.probs, self.expected_entropy

    @property
    def draws_kept(self) -> Tensor | None:
        """What was kept of every draw."""
        return self.log_probs

    def of(self, averages: Sequence[Tensor], kept: Tensor | None) -> Prediction:
        """A prediction like this one, of other averages and draws."""
        return replace(self, probs=averages[0], expected_entropy=averages[1], log_probs=kept)

    def mixed(self, other: Prediction, share: float) -> Prediction:
        """The mixture of this prediction and another one of the same objects, which has a share of it."""
        averages = [a.lerp(b.to(a), share) for a, b in zip(self.averages, other.averages, strict=True)]
        return replace(self.of(averages, None), note="")


@dataclass(frozen=True, eq=False)
class MultilabelPrediction(Prediction):
    """What a predictive says of the labels of N objects: each has a probability of its own.

    Attributes are those of `Prediction`; `entropy` and `expected_entropy` are sums over labels.
    """

    @property
    def entropy(self) -> Tensor:
        """``[N]``, nats: the sum over labels of their entropies."""
        return entropy(self.probs, self.class_axis) + entropy(1 - self.probs, self.class_axis)


@dataclass(frozen=True, eq=False)
class Estimate:
    """What a predictive says of N objects where the network gives numbers: a mean and its uncertainty.

    Attributes:
        mean: ``[N]``, ``[N, D]`` or dense, in the layout of the network's output: the mean over draws.
        variance: of the same shape: the variance over draws (epistemic).
        noise_variance: of the same shape: the mean over draws of the variance that the network itself gives
            (aleatoric); 0 for a network that gives none.
        draws: ``[S, N, ...]``: every draw, if ``keep_draws=True`` asked for them.
        note: why there is no variance, where one pass without draws was made.
    """

    mean: Tensor
    variance: Tensor
    noise_variance: Tensor
    draws: Tensor | None = None
    note: str = ""

    @property
    def std(self) -> Tensor:
        """The standard deviation over draws."""
        return self.variance.sqrt()

    @property
    def total_std(self) -> Tensor:
        """The standard deviation of an observation: of the draws and of the network's own variance together."""
        return (self.variance + self.noise_variance).sqrt()

    cat = staticmethod(Prediction.cat)

    @property
    def averages(self) -> tuple[Tensor, ...]:
        """The tensors that are averages over draws."""
        return self.mean, self.variance, self.noise_variance

    @property
    def draws_kept(self) -> Tensor | None:
        """What was kept of every draw."""
        return self.draws

    def of(self, averages: Sequence[Tensor], kept: Tensor | None) -> Estimate:
        """An estimate like this one, of other averages and draws."""
        mean, variance, noise = averages
        return replace(self, mean=mean, variance=variance, noise_variance=noise, draws=kept)

    def mixed(self, other: Estimate, share: float) -> Estimate:
        """The mixture of this estimate and another one of the same objects, which has a share of it.

        What the two means differ by is variance over draws too.
        """
        mean, variance, noise = (b.to(a) for a, b in zip(self.averages, other.averages, strict=True))
        between = share * (1 - share) * (mean - self.mean).square()
        return Estimate(
            self.mean.lerp(mean, share),
            self.variance.lerp(variance, share) + between,
            self.noise_variance.lerp(noise, share),
        )
