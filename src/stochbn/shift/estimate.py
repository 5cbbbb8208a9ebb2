"""Making a `Reference` from the rows and mixes of training examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stochbn.posteriors.reference import SIZES, Layer, Reference
from stochbn.shift.guard import Guard
from stochbn.shift.mixes import BINS, binned, edges_of
from stochbn.tasks import Task

__all__ = ["distances", "excess", "make_reference"]

DIRECTIONS = 64
"""Directions of the covariance that are kept, at most; and components of the mix."""
PER_DIRECTION = 16
"""Examples that each direction needs."""
OVERSAMPLED = 16
ITERATIONS = 4
ROUNDING = 1e-3
"""The least standard deviation of a row's entry, in those of the activations; what is smaller may be rounding."""
PER_EXAMPLE = 32
"""The examples that a size of mini-batches needs for each of its own, for its usual distances to be known."""
LEAST_OWN = 0.05
"""The share of a variance that is a channel's own, at least."""
LEAST_VARIANCE = 1e-4
"""The least variance of a row's entry, as a share of the mean variance of all entries of its kind."""
RIDGE = 1e-3
GROUPS = 512
"""Mini-batches of each size whose distances are taken from each half of the examples."""
QUANTILES = 513


def make_reference(rows: Mapping[str, Tensor], mixes: Tensor, task: Task, running: Mapping[str, Tensor]) -> Reference:
    """The reference of training examples.

    Usual distances are those of one half of the examples from what the other half gives, so they are not too small.

    Args:
        rows: ``[N, 2C]`` for every layer.
        mixes: ``[N, K]``, shares or numbers, see `stochbn.shift.mixes.mixes_of`.
        task: what outputs were taken to mean.
        running: ``[2, C]`` for every layer, the running statistics that rows were standardised by.
    """
    edges = edges_of(mixes) if task.binned else torch.empty(0, BINS - 1, dtype=torch.float32)
    mixes = binned(mixes, edges) if task.binned else mixes
    generator = torch.Generator().manual_seed(0)
    with torch.autocast("cpu", enabled=False):
        whole, usual, basis, spread = _fitted(rows, mixes, generator)
        kept = _usual_distances(rows, mixes, generator)
    layers = {name: row.shape[1] // 2 for name, row in rows.items()}

    def joined(part: str) -> Tensor:
        return torch.cat([getattr(one, part).unflatten(-1, (2, -1)) for one in whole.values()], -1).contiguous()

    return Reference(
        layers=layers,
        examples=len(mixes),
        task=task.description(),
        usual=usual,
        basis=basis,
        spread=spread,
        edges=edges,
        running=torch.cat(list(running.values()), 1),
        centre=joined("centre"),
        own=joined("own"),
        mixing=joined("mixing"),
        directions=joined("directions"),
        strengths=torch.stack([one.strengths for one in whole.values()], 1),
        levels=kept[0],
        quantiles=kept[1],
    )


def _fitted(
    rows: Mapping[str, Tensor], mixes: Tensor, generator: torch.Generator
) -> tuple[dict[str, Layer], Tensor, Tensor, Tensor]:
    """All layers, the usual mix, its basis, and what makes it white."""
    usual = mixes.mean(0)
    centred = mixes - usual
    basis = torch.eye(mixes.shape[1], dtype=torch.float32)
    if mixes.shape[1] > DIRECTIONS:
        basis = _principal(centred, DIRECTIONS, generator)[1].T
    reduced = (centred @ basis).double()
    count = max(mixes.shape[1], 1)
    gram = reduced.T @ reduced / len(mixes)
    identity = torch.eye(len(gram), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gram + 1e-4 * identity)
    spread = (vectors * values.clamp(min=1e-12).rsqrt()) @ vectors.T
    solver = torch.linalg.inv(gram + RIDGE / count * identity)
    layers = {name: _layer(row, reduced, solver, generator) for name, row in rows.items()}
    return layers, usual, basis, spread.float()


def _layer(rows: Tensor, reduced: Tensor, solver: Tensor, generator: torch.Generator) -> Layer:
    count, width = rows.shape
    centre = rows.mean(0)
    centred = rows - centre
    mixing = (solver @ (reduced.T @ centred.double()) / count).float()
    left = centred - reduced.float() @ mixing
    variance = left.square().mean(0)
    floor = (LEAST_VARIANCE * variance.view(2, -1).mean(1)).clamp(min=ROUNDING**2)
    variance = torch.maximum(variance, floor.repeat_interleave(width // 2))
    number = min(DIRECTIONS, max(1, count // PER_DIRECTION), width // 2)
    values, vectors = _principal(left / variance.sqrt(), number, generator)
    loadings = vectors * (values / count**0.5)[:, None]
    share = (1 - loadings.square().sum(0)).clamp(min=LEAST_OWN)
    own = (variance * share).sqrt()
    _, strengths, directions = torch.linalg.svd(loadings / share.sqrt(), full_matrices=False)
    padding = DIRECTIONS - number  # the same number in every layer, so that they fit into one tensor
    directions = torch.cat([directions, directions.new_zeros(padding, width)])
    strengths = torch.cat([strengths.square(), strengths.new_zeros(padding)])
    return Layer(centre, own, mixing, directions, strengths)


def _principal(rows: Tensor, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The largest singular values ``[R]`` and right singular vectors ``[R, W]`` of ``[N, W]``, by subspace iteration.

    Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1. ``torch.svd_lowrank`` takes no generator.
    """
    wide = min(number + OVERSAMPLED, *rows.shape)
    basis = torch.randn(rows.shape[1], wide, generator=generator, dtype=torch.float32)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(rows.T @ torch.linalg.qr(rows @ basis)[0])[0]
    _, values, inner = torch.linalg.svd(rows @ basis, full_matrices=False)
    return values[:number], (inner @ basis.T)[:number]


def distances(
    guards: Mapping[str, Guard], means: Mapping[str, Tensor], change: Tensor, spread: Tensor, size: float
) -> tuple[Tensor, Tensor]:
    """How far mini-batches are from what is usual: logarithms ``[B, 2, L]`` in every layer, and ``[B]`` in their mix.

    Args:
        guards: of all layers.
        means: ``[B, 2C]`` for every layer, the mean rows of mini-batches.
        change: ``[B, M]``, their reduced mixes.
        spread: what makes these white.
        size: examples in a mini-batch.
    """
    found = []
    for name, guard in guards.items():
        white = guard.left(means[name], change)
        look = size * white.square().mean(-1)
        apart = size * guard.apart(white).square().sum(-1) / max(guard.freedom, 1)
        found.append(torch.stack([look, apart], -1))
    return torch.stack(found, -1).clamp(min=1e-30).log(), size * (change @ spread).square().sum(-1)


def excess(logs: Tensor, levels: Tensor) -> Tensor:
    """``[B]``: how far mini-batches are in all layers together: standard deviations above the mean, to the power of 4.

    The sum over layers grows where one layer is far from usual, and where many are a little. Of the powers from 1 to 6,
    and the maximum, the fourth found most corruptions of held-out training data.

    Args:
        logs: ``[B, 2, L]``, as `distances` gives them.
        levels: ``[2, 2, L]``: their usual means and standard deviations.
    """
    return ((logs - levels[0]) / levels[1]).amax(1).clamp(min=0).pow(4).sum(1)


def _usual_distances(rows: Mapping[str, Tensor], mixes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`Reference.levels` and `Reference.quantiles`."""
    halves = [slice(0, None, 2), slice(1, None, 2)]
    sizes = [size for size in SIZES if size <= max(1, len(mixes) // PER_EXAMPLE)]
    usual_ones: list[list[Any]] = [[] for _ in sizes]
    others: list[list[Any]] = [[] for _ in sizes]
    for own, other in (halves, halves[::-1]):
        half = {name: row[other] for name, row in rows.items()}
        layers, usual, basis, spread = _fitted(half, mixes[other], generator)
        guards = {name: Guard(layer) for name, layer in layers.items()}
        mine = {name: row[own] for name, row in rows.items()}
        for number, size in enumerate(sizes):
            for found, weights in (
                (usual_ones, _groups(len(mixes[own]), size, generator)),
                (others, _groups_of_few_classes(mixes[own], size, generator)),
            ):
                means = {name: weights @ row for name, row in mine.items()}
                change = (weights @ mixes[own] - usual) @ basis
                found[number].append(distances(guards, means, change, spread, size))
    levels, quantiles, shares = [], [], torch.linspace(0, 1, QUANTILES, dtype=torch.float32)
    for same, mixed in zip(usual_ones, others, strict=True):
        logs = torch.cat([logs for logs, _ in same])
        level = torch.stack([logs.mean(0), logs.std(0).clamp(min=1e-3)])
        looks = [excess(torch.cat([logs for logs, _ in parts]), level) for parts in (same, mixed)]
        mix = torch.cat([mix for _, mix in same])
        quantiles.append(torch.stack([values.quantile(shares) for values in (*looks, mix)]))
        levels.append(level)
    return torch.stack(levels), torch.stack(quantiles)


def _groups(count: int, size: int, generator: torch.Generator) -> Tensor:
    """``[GROUPS, count]``: weights that make means over random mini-batches."""
    return _weights(torch.rand(GROUPS, count, generator=generator, dtype=torch.float32), size)


def _groups_of_few_classes(mixes: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """The same of one or two classes that the network predicts, as long as there are examples of them."""
    if not mixes.shape[1]:
        return _groups(len(mixes), size, generator)
    predicted = mixes.argmax(1)
    classes = predicted[torch.randint(len(predicted), (GROUPS, 2), generator=generator)]
    inside = (predicted == classes[:, :1]) | (predicted == classes[:, 1:])
    return _weights(torch.rand(GROUPS, len(mixes), generator=generator, dtype=torch.float32) + inside, size)


def _weights(ranks: Tensor, size: int) -> Tensor:
    """Equal weights for the `size` members of each row that have the highest ranks."""
    return torch.zeros_like(ranks).scatter_(1, ranks.topk(size, 1).indices, 1 / size)
