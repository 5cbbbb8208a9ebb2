"""Posteriors of the experiments' networks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import stochbn
from stochbn.paper.data import Images
from stochbn.posteriors import Factorized, Posterior

__all__ = ["fit_posterior", "undrawn"]


def fit_posterior(
    model: nn.Module,
    images: Images,
    batch_size: int,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
    *,
    kind: str = "factorized",
) -> Posterior:
    """Fit a posterior on training images in a random order, which the seed determines.

    Args:
        model: the network.
        images: its training data.
        batch_size: objects in a mini-batch whose statistics are observed.
        seed: where the order comes from, and the masks of dropout.
        report: called with the number of images done and of all.
        kind: as for `stochbn.fit`; the paper's by default.
    """

    def batches() -> Any:
        done = 0
        for inputs, labels in images.shuffled(seed).batches(32 * batch_size):
            yield inputs
            done += len(labels)
            report(done, len(images))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return stochbn.fit(model, batches(), batch_size, kind)


def undrawn(posterior: Posterior, layers: Collection[str]) -> Factorized:
    """A factorised posterior without some layers: those keep their running statistics.

    As its layers are independent, the others are distributed as before.

    Args:
        posterior: a factorised one.
        layers: names of batch norms in it.

    Raises:
        ValueError: it is of another kind, or has no such layer.
    """
    if not isinstance(posterior, Factorized):
        raise ValueError(f"layers can be left out of a factorized posterior, not of one of the kind {posterior.kind}")
    if missing := [name for name in layers if name not in posterior.layers]:
        raise ValueError(f"the posterior has no layer {missing[0]!r}; it has {', '.join(posterior.layers)}")
    kept = torch.cat([torch.full((count,), name not in layers) for name, count in posterior.layers.items()])
    return replace(
        posterior,
        layers={name: count for name, count in posterior.layers.items() if name not in layers},
        skipped=(*posterior.skipped, *layers),
        mean_mean=posterior.mean_mean[kept],
        mean_variance=posterior.mean_variance[kept],
        variance_mean=posterior.variance_mean[kept],
        variance_variance=posterior.variance_variance[kept],
    )
