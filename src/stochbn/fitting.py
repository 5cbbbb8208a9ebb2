"""Fitting a posterior to a network and its training data."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from stochbn.calling import Batch
from stochbn.layers import batch_norms, running_statistics
from stochbn.posteriors import Factorized
from stochbn.statistics import Moments, mini_batches, observer

__all__ = ["fit"]

KINDS = ("factorized",)


def fit(
    model: nn.Module, batches: Iterable[Batch], batch_size: int | None = 16, kind: str = "factorized"
) -> Factorized:
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
        kind: ``"factorized"``, the paper's Stochastic Batch Normalization.

    Returns:
        The posterior. A layer that is called several times in one forward pass gives one observation per call;
        one that is never called, or cannot update its running averages, keeps them and is listed in ``skipped``.

    Raises:
        TypeError: an argument is of the wrong type, or the batches are of none of the types above.
        ValueError: the network has no batch norm, or one without running statistics; there are no batches, or none of
            at least `batch_size` objects; a layer saw non-finite activations; an unknown `kind`.

    Source: Atanov et al., 2018, section 3 (one-pass moments in place of the exponential smoothing).
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; this release has {', '.join(map(repr, KINDS))}")
    layers = batch_norms(model)
    moments: dict[str, Moments] = {}
    seen = 0
    observe = observer(model)
    for inputs in mini_batches(model, batches, batch_size):
        for name, observation in observe(inputs).items():
            new = Moments.of(observation)
            moments[name] = moments[name].merge(new) if name in moments else new
        seen += 1
    if not moments:
        raise ValueError(
            "no batch-norm layer saw mini-batch statistics: none was called, or all are frozen (they do not update "
            "their running statistics in training mode)"
        )
    return Factorized.from_moments(
        {name: moments[name] for name in layers if name in moments},
        batch_size=batch_size,
        mini_batches=seen,
        dtype=running_statistics(layers[next(iter(moments))])[0].dtype,
        skipped=[name for name in layers if name not in moments],
    )
