"""Choose on held-out data which augmentations to average over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stochbn.augment import Augment, turns
from stochbn.network.calling import Batch
from stochbn.posteriors import Posterior, check_draws
from stochbn.predictive.predictive import Predictive
from stochbn.tasks import Classification
from stochbn.tasks.draw_scores import check_labels
from stochbn.tempering import best_temperature, tempered

__all__ = ["choose_augmentation"]


def choose_augmentation(
    model: nn.Module,
    posterior: Posterior | None,
    held_out: Iterable[Batch],
    candidates: Sequence[Augment],
    *,
    draws: int = 8,
    passes: int = 48,
    clean: bool = True,
    progress: Callable[[int], None] = lambda objects: None,
    seed: int = 0,
    **reading: Any,
) -> turns:
    """Choose the augmentation of each draw that lowers the calibrated NLL of held-out data most.

    `held_out` is read once. Every batch goes through the network `passes` times, equally often with each candidate. Of
    these draws, `draws` are chosen greedily: each time the one that gives the lowest NLL at its best temperature,
    averaged with those chosen before. So augmentations that do not help are left out. Choose noise and temperature
    afterwards, with ``calibrate(augment=)``.

    Args:
        model: the network.
        posterior: its posterior, to draw the statistics too; None augments the input alone.
        held_out: batches of ``(input, labels)``, or mappings with ``labels``, that the network was **not** trained on;
            some thousand examples. Their log-probabilities are kept: 4 bytes for each pass, example and class.
        candidates: the augmentations to choose from, such as ``[flip(), shift(2), chain(flip(), shift(4))]``.
        draws: how many to choose; a `Predictive` with as many draws uses each of them once.
        passes: forward passes over the held-out data, at least one for each candidate.
        clean: whether the clean input is the first draw, as for `Predictive`.
        progress: called with the number of examples done so far.
        seed: the seed of the draws.
        reading: how the network is called and read, as for `Predictive`: ``logits``, ``class_axis``, ``output``,
            ``inputs``, ``check``.

    Returns:
        The chosen augmentations, one for each draw in turn, for ``Predictive(augment=)`` and ``calibrate(augment=)``.

    Raises:
        TypeError, ValueError: a wrong argument, fewer passes than candidates, no held-out examples, labels that do not
            fit, or outputs that are not finite.

    Source: Lyzhov et al., 2020, "Greedy policy search", arXiv 2002.09103.
    """
    check_draws(draws)
    candidates = list(candidates)
    if not candidates:
        raise ValueError("there are no candidates; pass augmentations to choose from")
    each = (passes - clean) // len(candidates)
    if each < 1:
        raise ValueError(
            f"{passes} passes are too few for {len(candidates)} candidates{' and the clean input' if clean else ''}; "
            "pass more passes, or fewer candidates"
        )
    reading |= {"keep_draws": True, "clean": False}
    predictives = [Predictive(model, posterior, each, augment=one, **reading) for one in candidates]
    if clean:
        predictives.insert(0, Predictive(model, posterior, 1, **reading))
    rows: list[list[Tensor]] = [[] for _ in predictives]
    truth: list[Tensor] = []
    for number, batch in enumerate(held_out):
        truth.append(Classification().labels(batch).cpu())
        for predictive, kept in zip(predictives, rows, strict=True):
            generator = torch.Generator().manual_seed(seed + 7919 * number)
            found = predictive(batch, generator=generator)
            kept.append(found.log_probs.movedim(found.class_axis + 1, 2).cpu())
            check_labels(kept[-1][0], truth[-1])
        progress(sum(map(len, truth)))
    if not truth:
        raise ValueError("there are no held-out examples: the iterable is empty or already used up")
    pools = [torch.cat(kept, 1) for kept in rows]
    labels = torch.cat(truth).long()
    total = torch.full_like(pools[0][0], -math.inf)
    if clean:
        total = pools.pop(0)[0]
    return turns(*(candidates[place] for place in _greedy(total, pools, labels, draws - clean or 1)))


def _greedy(total: Tensor, pools: Sequence[Tensor], labels: Tensor, count: int) -> list[int]:
    """Choose the pool of each draw greedily, for the lowest calibrated NLL of the sum after every step.

    Args:
        total: ``[N, K]``: the logarithm of the sum of probabilities so far.
        pools: log-probabilities ``[P, N, K]`` of each candidate, whose draws are taken in order and over again.
        labels: ``[N]``.
        count: how many draws to choose.
    """
    chosen: list[int] = []
    for _ in range(count):
        sums = [torch.logaddexp(total, pool[chosen.count(place) % len(pool)]) for place, pool in enumerate(pools)]
        scores = [_calibrated(logs, labels) for logs in sums]
        best = min(range(len(pools)), key=scores.__getitem__)
        chosen.append(best)
        total = sums[best]
    return chosen


def _calibrated(logs: Tensor, labels: Tensor) -> float:
    """The NLL at the best temperature, without cross-validation: one number cannot overfit thousands of examples."""
    if logs.ndim > 2:
        logs = logs.movedim(1, -1).flatten(0, -2)
    logs, labels = logs.double().log_softmax(1), labels.flatten()
    return tempered(logs, labels, 1 / best_temperature(logs, labels)).mean().item()
