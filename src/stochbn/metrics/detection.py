"""Scores of detections: average precision as COCO defines it, and whether scores and box deviations tell the truth."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from stochbn.tempering import best_temperature, tempered

__all__ = ["OVERLAPS", "average_precision", "calibrated_losses", "matched", "rank_correlation", "resamples"]

OVERLAPS = torch.from_numpy(np.linspace(0.5, 0.95, 10))
"""Intersections over union from which on a detection is right; COCO's AP is the mean over them."""
RECALLS = torch.from_numpy(np.linspace(0, 1, 101))
"""At which precision is read. Rounded as by NumPy, since a recall that is hit exactly counts."""
RESAMPLES = 200
"""Samples of pictures, with replacement, by which standard errors are estimated."""
CELLS = 2**22
"""Numbers that are held at a time."""
PARTS = 5


def matched(boxes: Tensor, labels: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Which true box each detection of one picture is matched with, at each of `OVERLAPS`.

    Detections choose in their order, each among the boxes of its class that are free, the one that it overlaps most.
    A crowd is chosen where no other box is left, by any number of detections.

    Args:
        boxes: ``[D, 4]``, from the likeliest detection on: left, top, right and bottom.
        labels: ``[D]``: their classes.
        truth: ``[M, 6]``: left, top, right, bottom, class, and 1 for a crowd.

    Returns:
        ``[T, D]``: the number of the true box, -1 for none; and whether it is a crowd, so that the detection does not
        count.

    Source: Lin et al., 2014, "Microsoft COCO: Common Objects in Context", and its evaluation server.

    >>> truth = torch.tensor([[0.0, 0, 10, 10, 1, 0]])
    >>> matched(torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 10]]), torch.tensor([1, 1]), truth)[0][[0, 9]]
    tensor([[ 0, -1],
            [-1,  0]])
    """
    found = torch.full((len(OVERLAPS), len(boxes)), -1)
    crowd = torch.zeros(len(OVERLAPS), len(boxes), dtype=torch.bool)
    if not len(boxes) or not len(truth):
        return found, crowd
    crowds = truth[:, 5] > 0
    overlap = _overlaps(boxes.double(), truth[:, :4].double(), crowds)
    overlap = overlap.where(labels[:, None] == truth[:, 4].long(), -1.0)
    free = torch.ones(len(OVERLAPS), len(truth), dtype=torch.bool)
    for number, row in enumerate(overlap):
        open_to = (row >= OVERLAPS[:, None]) & (free | crowds)
        own = open_to & ~crowds
        allowed = own.where(own.any(1, keepdim=True), open_to)
        # Of boxes that it overlaps alike, the last one, as COCO's evaluation has it.
        best = len(truth) - 1 - row.where(allowed, -2.0).flip(1).argmax(1)
        hit = allowed.any(1)
        found[:, number] = best.where(hit, -1)
        crowd[:, number] = hit & crowds[best]
        free[hit, best[hit]] = False
    return found, crowd


def _overlaps(boxes: Tensor, truth: Tensor, crowds: Tensor) -> Tensor:
    """``[D, M]``: intersection over union; with a crowd, over the area of the detection."""
    low, high = torch.maximum(boxes[:, None, :2], truth[:, :2]), torch.minimum(boxes[:, None, 2:], truth[:, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    own, others = ((one[:, 2:] - one[:, :2]).clamp(min=0).prod(1) for one in (boxes, truth))
    whole = torch.where(crowds, own[:, None], own[:, None] + others - shared)
    return shared / whole.clamp(min=torch.finfo(torch.float64).tiny)


def resamples(count: int) -> Tensor:
    """``[1 + RESAMPLES, N]``, float64: how often each picture is in a sample; the first row is all of them, once.

    They are the same whenever N is, so that methods can be compared by the same samples.
    """
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    times = torch.stack([sample.bincount(minlength=count) for sample in drawn])
    return torch.cat([torch.ones(1, count, dtype=torch.float64), times.double()])


def average_precision(
    scores: Tensor,
    labels: Tensor,
    pictures: Tensor,
    right: Tensor,
    counts: Tensor,
    truths: Tensor,
    weights: Tensor,
) -> Tensor:
    """``[B, T]``: the mean over classes of the average precision, in each of B weightings of pictures.

    Precision is read at 101 recalls, and is the highest at that recall or more. Classes without a true box do not
    count; it is NaN where there is none at all.

    Args:
        scores: ``[D]``: of the detections of all pictures, in the order of the pictures.
        labels: ``[D]``: their classes.
        pictures: ``[D]``: the picture of each.
        right: ``[T, D]``: whether it is matched with a true box, at each overlap.
        counts: ``[T, D]``: whether it counts: whether it is not matched with a crowd.
        truths: ``[N, K]``: how many true boxes, without crowds, each picture has of each class.
        weights: ``[B, N]``: how often each picture counts.

    Source: COCO's evaluation; see `matched`.
    """
    found = []
    for kind in (truths.sum(0) > 0).nonzero()[:, 0].tolist():
        chosen = (labels == kind).nonzero()[:, 0]
        chosen = chosen[scores[chosen].argsort(descending=True, stable=True)]
        boxes = weights @ truths[:, kind].double()  # [B]
        size = max(1, CELLS // max(len(chosen), 1))
        of_kind = torch.empty(len(weights), len(right), dtype=torch.float64)
        for some in torch.split(torch.arange(len(weights)), size):
            times = weights[some][:, pictures[chosen]]
            for step in range(len(right)):
                hit, counted = right[step, chosen], counts[step, chosen]
                of_kind[some, step] = _area((times * hit).cumsum(1), (times * counted).cumsum(1), boxes[some])
        found.append(of_kind.where(boxes[:, None] > 0, torch.nan))
    if not found:
        return torch.full((len(weights), len(right)), torch.nan, dtype=torch.float64)
    return torch.stack(found).nanmean(0)


def _area(right: Tensor, counted: Tensor, boxes: Tensor) -> Tensor:
    """``[B]``: the mean over recalls of precision, from right and all detections up to each, ``[B, D]``."""
    if not right.shape[1]:
        return torch.zeros(len(right), dtype=torch.float64)
    recall = right / boxes[:, None].clamp(min=1)
    precision = (right / (counted + torch.finfo(torch.float64).eps)).flip(1).cummax(1).values.flip(1)
    places = torch.searchsorted(recall.contiguous(), RECALLS.expand(len(recall), -1).contiguous())
    read = torch.nn.functional.pad(precision, (0, 1)).gather(1, places)
    return read.mean(1)


def rank_correlation(one: Tensor, other: Tensor, weights: Tensor) -> Tensor:
    """``[B]``: Spearman's rank correlation of two measures ``[D]`` in B weightings ``[B, D]``; NaN if one is constant.

    >>> rank_correlation(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 5, 4]), torch.ones(1, 3))
    tensor([0.5000], dtype=torch.float64)
    """
    if len(one) < 2:
        return torch.full((len(weights),), torch.nan, dtype=torch.float64)
    weights = weights.double()
    total = weights.sum(1, keepdim=True)
    ranks = []
    for measure in (one, other):
        values, place = torch.unique(measure, return_inverse=True)
        shares = torch.zeros(len(weights), len(values), dtype=torch.float64).index_add_(1, place, weights)
        rank = (shares.cumsum(1) - shares / 2)[:, place]
        ranks.append(rank - (weights * rank).sum(1, keepdim=True) / total)
    x, y = ranks
    spread = (weights * x * x).sum(1) * (weights * y * y).sum(1)
    return ((weights * x * y).sum(1) / spread.sqrt()).where(spread > 1e-12 * total[:, 0] ** 6, torch.nan)


def calibrated_losses(scores: Tensor, right: Tensor, pictures: Tensor, count: int) -> Tensor:
    """``[D]``, nats: the negative log-likelihood that detections are right, at the temperature best for other pictures.

    Pictures are in five parts, always the same. It is NaN where there are too few detections of both kinds to choose.

    Args:
        scores: ``[D]``: the probability that a detection is right.
        right: ``[D]``: whether it is.
        pictures: ``[D]``: the picture of each.
        count: N, of pictures.
    """
    logs = torch.stack([(1 - scores).log(), scores.log()], 1).clamp(min=math.log(torch.finfo(torch.float32).tiny))
    kinds, found = right.long(), torch.full((len(scores),), torch.nan, dtype=torch.float64)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    for part in order.tensor_split(PARTS):
        own = torch.isin(pictures, part)
        if right[~own].all() or not right[~own].any():
            return found.fill_(torch.nan)
        temperature = best_temperature(logs[~own], kinds[~own])
        if own.any():
            found[own] = tempered(logs[own], kinds[own], 1 / temperature).double()
    return found
