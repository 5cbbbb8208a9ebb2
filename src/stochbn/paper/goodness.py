"""How well Normal and LogNormal fit the observed statistics of mini-batches, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from scipy.stats import kstest, norm
from torch import Tensor, nn

from stochbn.paper.data import Images
from stochbn.posteriors import Factorized
from stochbn.statistics import mini_batches, observer

__all__ = ["distances", "layer_parameters", "observe"]


def observe(
    model: nn.Module,
    images: Images,
    batch_size: int,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """The statistics of every mini-batch, which `stochbn.fit` only keeps the moments of.

    Args:
        model: the network.
        images: its training data.
        batch_size: objects in a mini-batch.
        seed: where the order of the images comes from.
        report: called with the number of images done and of all.

    Returns:
        For every layer ``[M, 2, C]`` in float32: mean and biased variance in each of M mini-batches.
    """
    found: dict[str, list[Tensor]] = {}
    batches = (inputs for inputs, _ in images.shuffled(seed).batches(batch_size))
    see = observer(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for count, inputs in enumerate(mini_batches(model, batches, batch_size), start=1):
            for layer, statistics in see(inputs).items():
                found.setdefault(layer, []).append(statistics.float())
            report(count * batch_size, len(images) // batch_size * batch_size)
    return {layer: torch.cat(rows) for layer, rows in found.items()}


def layer_parameters(posterior: Factorized) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Location and scale of every layer's Normal means and Normal log-variances, each ``[C]``."""
    log_scale2 = posterior.log_variance_variance
    vectors = torch.stack(
        [
            posterior.mean_mean,
            posterior.mean_variance.sqrt(),
            posterior.variance_mean.log() - log_scale2 / 2,
            log_scale2.sqrt(),
        ]
    )
    parts = torch.split(vectors, list(posterior.layers.values()), dim=1)
    return {layer: (p[0], p[1], p[2], p[3]) for layer, p in zip(posterior.layers, parts, strict=True)}


def distances(observations: Mapping[str, Tensor], posterior: Factorized) -> dict[str, dict[str, float]]:
    """Kolmogorov-Smirnov distance between observed and fitted distribution, averaged over a layer's channels.

    Channels that never vary, which any distribution concentrated there fits, are left out.

    Args:
        observations: what `observe` returned.
        posterior: the distribution.

    Returns:
        For every layer the distance (0 to 1) of the means under ``mean`` and of the variances under ``variance``.
    """
    return {
        layer: {
            "mean": _distance(observations[layer][:, 0].double(), m, s),
            "variance": _distance(observations[layer][:, 1].double().log(), m_log, s_log),
        }
        for layer, (m, s, m_log, s_log) in layer_parameters(posterior).items()
    }


def _distance(values: Tensor, location: Tensor, scale: Tensor) -> float:
    varying = ((scale > 0) & values.isfinite().all(0)).nonzero()[:, 0].tolist()
    found = [kstest(values[:, c].numpy(), norm(location[c].item(), scale[c].item()).cdf).statistic for c in varying]
    return float(np.mean(found)) if found else 0.0
