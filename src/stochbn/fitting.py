"""Fitting a posterior to a network and its training data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Literal, overload

import torch
from torch import nn

from stochbn.network.calling import Batch
from stochbn.network.layers import batch_norms, running_statistics
from stochbn.posteriors import KINDS, Empirical, Factorized, Joint, Posterior
from stochbn.statistics import mini_batches, observer

__all__ = ["fit"]


@overload
def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    batch_size: int | None = 16,
    kind: Literal["joint"] = "joint",
    *,
    max_batches: int = 512,
    directions: int | None = None,
) -> Joint: ...


@overload
def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    batch_size: int | None = 16,
    *,
    kind: Literal["factorized"],
) -> Factorized: ...


@overload
def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    batch_size: int | None = 16,
    *,
    kind: Literal["empirical"],
    max_batches: int = 512,
) -> Empirical: ...


@overload
def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    batch_size: int | None = 16,
    kind: str = "joint",
    *,
    max_batches: int = 512,
    directions: int | None = None,
) -> Posterior: ...


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    batch_size: int | None = 16,
    kind: str = "joint",
    *,
    max_batches: int = 512,
    directions: int | None = None,
) -> Posterior:
    """Fit a distribution over the batch-norm statistics of a trained network, in one pass over its training data.

    The network ends exactly as it began. While a mini-batch passes, all of it is in training mode, also layers that
    were set to ``eval()`` on their own, so dropout, if it has any, is on and draws from PyTorch's global generator, as
    when the network was trained. Memory does not grow with the amount of data.

    Args:
        model: a trained network with batch-norm layers.
        batches: training data, such as a DataLoader: an iterable of tensors, of ``(input, ...)`` tuples, or of
            mappings of the network's argument names to tensors. Shuffle it: the objects of a mini-batch should be a
            random sample.
        batch_size: the size of the mini-batches whose statistics are observed: fewer objects, more noise. The paper
            uses 16. Incoming batches are split to this size, **and the remainder of each that is smaller is
            dropped**. None takes the incoming batches as they come.
        kind: ``"joint"``, a Gaussian with the covariance of all layers' statistics; ``"empirical"``, the observed
            statistics themselves, replayed (Teye et al., 2018); or ``"factorized"``, the paper's Stochastic Batch
            Normalization, independent for every channel. Why joint is the default: docs/posteriors.md.
        max_batches: for the kinds joint and empirical, how many mini-batches' statistics to keep at most, a random
            sample of all, chosen by hashes of the statistics. Each takes 8 bytes for every channel (512 of them 109 MB for a ResNet-50), and the time to
            make a joint posterior grows with their square, from some thousands on with their cube.
        directions: for the kind joint, how many principal directions to keep at most; None keeps all. What they leave
            out of a statistic's variance becomes noise of its own.

    Returns:
        The posterior. A layer that is called several times in one forward pass gives one observation per call;
        one that is never called, or cannot update its running averages, keeps them and is listed in ``skipped``.

    Raises:
        TypeError: an argument is of the wrong type, or the batches are of none of the types above.
        ValueError: the network has no batch norm, or one without running statistics; there are no batches, or none of
            at least `batch_size` objects; a layer saw non-finite activations, or (but for the kind factorized) was not
            called for all mini-batches; an unknown `kind`.

    Source: Atanov et al., 2018, section 3 (one-pass moments in place of the exponential smoothing).
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; there are {', '.join(map(repr, KINDS))}")
    for name, value, least in (("max_batches", max_batches, 2), ("directions", directions, 1)):
        if value is None and name == "directions":
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    layers = batch_norms(model)
    uncalled = {name: torch.empty(0, 2, layer.num_features) for name, layer in layers.items()}
    accumulator = KINDS[kind].accumulator(max_batches=max_batches, directions=directions)
    observe = observer(model)
    for inputs in mini_batches(model, batches, batch_size):
        accumulator.update({**uncalled, **observe(inputs)})
    observed = accumulator.layers
    if not observed:
        raise ValueError(
            "no batch-norm layer saw mini-batch statistics: none was called, or all are frozen (they do not update "
            "their running statistics in training mode)"
        )
    if accumulator.seen == 1:
        warnings.warn(
            "only one mini-batch was observed, so the statistics have no spread and every draw is the same; "
            "pass more data or a smaller batch_size",
            stacklevel=2,
        )
    posterior: Posterior = accumulator.posterior(
        batch_size=batch_size,
        dtype=running_statistics(layers[next(iter(observed))])[0].dtype,
        skipped=tuple(name for name in layers if name not in observed),
    )
    return posterior
