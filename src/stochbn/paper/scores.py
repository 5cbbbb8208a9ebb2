"""Scores of the predictions of several networks, beside those of their ensembles."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import stochbn.metrics as metrics
from stochbn.predictions import entropy

__all__ = ["divergence", "mixture", "score_all"]


def mixture(predictions: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean probabilities of several networks, of known and unknown objects."""
    return {part: torch.stack([p[part] for p in predictions]).mean(0) for part in predictions[0]}


def score_all(
    methods: Mapping[str, Sequence[Mapping[str, Tensor]]],
    ensembles: Mapping[str, Sequence[Mapping[str, Tensor]]],
    labels: Tensor,
) -> tuple[dict[str, list[dict[str, float]]], list[float]]:
    """The scores of methods and ensembles with every network, and the calibrated NLL of ensembles of 1, 2, ..."""
    rows = {name: [_score(p, labels) for p in found] for name, found in {**methods, **ensembles}.items()}
    reached = [statistics.mean(row["calibrated_nll"] for row in rows[name]) for name in ensembles]
    for found in rows.values():
        nll = statistics.mean(row["calibrated_nll"] for row in found)
        for row in found:
            row["dee"] = metrics.deep_ensemble_equivalent(nll, reached)
    return rows, reached


def _score(probs: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
    found = metrics.evaluate(probs["known"], labels)
    best = metrics.calibrated_nll(probs["known"], labels)
    found |= {"calibrated_nll": best["nll"], "temperature": best["temperature"]}
    wrong = probs["known"].argmax(1) != labels
    found["aurc"] = metrics.risk_coverage(entropy(probs["known"]), wrong)["aurc"]
    if "unknown" in probs:
        found |= metrics.ood(entropy(probs["known"]), entropy(probs["unknown"]))
    return found


def divergence(exact: Tensor, probs: Tensor) -> float:
    """The mean Kullback-Leibler divergence of predictions from exact ones, in nats."""
    tiny = torch.finfo(probs.dtype).tiny
    terms = exact.double() * (exact.clamp(min=tiny).log() - probs.clamp(min=tiny).log())
    return max(terms.sum(1).mean().item(), 0.0)
