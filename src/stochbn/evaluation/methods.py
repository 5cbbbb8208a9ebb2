"""What methods predict for the same test data, and their scores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import stochbn.metrics as metrics
from stochbn.metrics.differences import paired, standard_errors
from stochbn.predictions import entropy

__all__ = ["Method", "methods", "score"]

LEAST_ERRORS = 10
"""So many known examples must be classified wrongly for a best temperature."""


@dataclass(frozen=True, eq=False)
class Method:
    """What one method predicts.

    Attributes:
        name: ``plain`` (a single network), ``Deep Ensembles`` or ``Dropout``.
        sbn: whether the batch-norm statistics were drawn.
        members: number of networks.
        known: probabilities ``[N, K]`` for test examples of the known classes.
        labels: their labels ``[N]``.
        unknown: probabilities ``[M, K]`` for examples of other classes, if there are any.
        expected_entropy: ``[N]``, nats: the mean of the entropies over draws and networks for the known examples,
            which is their aleatoric uncertainty; None in runs of earlier versions.
        median: with SBN, the same method with every statistic at its median in place of draws, which is what the
            published experiments call "no SBN"; where that was predicted.
    """

    name: str
    sbn: bool
    members: int
    known: Tensor
    labels: Tensor
    unknown: Tensor | None = None
    expected_entropy: Tensor | None = None
    median: Method | None = None

    @functools.cached_property
    def calibrated(self) -> Tensor | None:
        """The NLL of every example after the best temperature for others; None where too few are classified wrongly.

        With hardly any error among them the best temperature is 0, and one error elsewhere costs more than all else.
        """
        wrong = (self.known.argmax(1) != self.labels).sum().item()
        return metrics.calibrated_nll_of_each(self.known, self.labels) if wrong >= LEAST_ERRORS else None

    def scores(self) -> dict[str, Any]:
        """Name, `metrics.evaluate` of the known examples, mean entropies (nats) and `metrics.ood` of the entropies.

        The number of known ``objects``, and the standard errors of `standard_errors`, are with them.
        With at least 10 known examples that are classified wrongly also ``calibrated_nll`` (nats) and the best
        ``temperature``.
        """
        found: dict[str, Any] = {"method": self.name, "sbn": self.sbn, "members": self.members}
        found |= metrics.evaluate(self.known, self.labels)
        if self.calibrated is not None:
            found["calibrated_nll"] = self.calibrated.mean().item()
            found["temperature"] = metrics.calibrated_nll(self.known, self.labels)["temperature"]
        found["entropy_known"] = entropy(self.known).mean().item()
        if self.unknown is not None:
            found["entropy_unknown"] = entropy(self.unknown).mean().item()
            found |= metrics.ood(entropy(self.known), entropy(self.unknown))
        return found | {"objects": len(self.labels)} | standard_errors(self.known, self.labels, self.unknown)


def methods(plain: Sequence[Mapping[str, Tensor]], dropout: Sequence[Mapping[str, Tensor]]) -> list[Method]:
    """The paper's methods, each without and, where there are posteriors, with SBN.

    Args:
        plain: what `stochbn.evaluation.predicting.predict_member` returned for networks without dropout: the first is
            the single network, several are also a Deep Ensemble.
        dropout: likewise for networks with dropout; several are averaged.
    """
    groups = {"plain": plain[:1], "Deep Ensembles": plain if len(plain) > 1 else [], "Dropout": dropout}

    def mean(
        members: Sequence[Mapping[str, Tensor]], key: str, of: Callable[[Tensor], Tensor] = Tensor.exp
    ) -> Tensor | None:
        there = members and all(key in m for m in members)
        return torch.stack([of(m[key]) for m in members]).mean(0) if there else None

    def method(name: str, members: Sequence[Mapping[str, Tensor]], kind: str, **others: Any) -> Method | None:
        known = mean(members, f"{kind}.known")
        if known is None:
            return None
        unknown = mean(members, f"{kind}.unknown")
        expected = mean(members, f"{kind}.known.expected_entropy", Tensor.double)
        return Method(name, kind == "sbn", len(members), known, members[0]["labels"], unknown, expected, **others)

    found = []
    for name, members in groups.items():
        found.append(method(name, members, "plain"))
        found.append(method(name, members, "sbn", median=method(name, members, "median")))
    return [one for one in found if one is not None]


def score(found: Sequence[Method]) -> list[dict[str, Any]]:
    """The scores of every method; one with SBN also has its differences from the same one without (`paired`).

    Where the same one at the medians of the statistics was predicted, its scores are under ``median_`` and the
    differences from it under ``noise_``.
    """
    scores = [method.scores() for method in found]
    without = {method.name: method for method in found if not method.sbn}
    for method, row in zip(found, scores, strict=True):
        if method.sbn and method.name in without:
            row |= _changes(without[method.name], method)
        if method.median is not None:
            beside = method.median.scores()
            changes = _changes(method.median, method)
            row |= {f"median_{name}": value for name, value in beside.items() if isinstance(value, float)}
            row |= {f"noise_{name}": value for name, value in changes.items()}
    return scores


def _changes(one: Method, other: Method) -> dict[str, float]:
    """What changes from one method to another."""
    unknown = None if one.unknown is None or other.unknown is None else (one.unknown, other.unknown)
    calibrated = None if one.calibrated is None or other.calibrated is None else (one.calibrated, other.calibrated)
    return paired((one.known, other.known), other.labels, unknown, calibrated)
