"""Posteriors of the experiments' networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

import stochbn
from stochbn.augment import Augment
from stochbn.distributed import Ranks
from stochbn.fit_data import most_batches
from stochbn.posteriors import Posterior, make_accumulator
from stochbn.sources.objects import Objects

__all__ = ["fit_posterior"]

REFERENCE_BATCH = 256


def fit_posterior(
    model: nn.Module,
    images: Objects,
    batch_size: int,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
    *,
    kind: str = "factorized",
    centre: Literal["running", "observed"] = "observed",
    batches: float | None = math.inf,
    deterministic: Collection[str] = (),
    augment: Augment | None = None,
    ranks: Ranks | None = None,
    reference: bool | Objects = False,
    settings: Mapping[str, Any] | None = None,
) -> Posterior:
    """Fit a posterior on training images in a random order, which the seed determines.

    Args:
        model: the network.
        images: its training data.
        batch_size: examples in a mini-batch whose statistics are observed.
        seed: where the order comes from, and the masks of dropout.
        report: called with the number of images done and of all that are read.
        kind: as for `stochbn.fit`; the paper's by default.
        centre: likewise; the paper's by default.
        batches: how many mini-batches to observe, likewise; all of them by default.
        deterministic: layers that are ordinary batch norms, as for `stochbn.fit`.
        augment: how mini-batches are changed at random, likewise.
        ranks: those that fit together, each to its share of the images.
        reference: whether to keep what new data is compared with, as for `stochbn.fit`; or the examples to make it of.
        settings: what the output means: ``task``, ``logits``, ``class_axis`` and ``output``, likewise.
    """
    ranks = ranks or Ranks(None)
    mixed = images.shuffled(seed)
    if ranks.count > 1:
        mixed = mixed.shard(ranks.rank, ranks.count, batch_size)

    whole = batch_size * int(min(len(mixed) // batch_size, most_batches(make_accumulator(kind), batches)))

    def follow(done: int, total: int | None) -> None:
        report(done * batch_size, whole)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return stochbn.fit(
            model,
            mixed.batches(32 * batch_size),
            batch_size,
            kind,
            centre=centre,
            batches=batches,
            deterministic=deterministic,
            augment=augment,
            group=ranks.group,
            progress=follow,
            reference=reference if isinstance(reference, bool) else _inputs_of(reference.shuffled(seed)),
            **(settings or {}),
        )


def _inputs_of(examples: Objects) -> Iterator[Any]:
    return (inputs for inputs, _ in examples.batches(REFERENCE_BATCH))
