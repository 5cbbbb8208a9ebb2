"""How well a factorised Normal and LogNormal fit the observed statistics of mini-batches: marginals and dependence."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import kstest, norm
from torch import Tensor, nn

from stochbn.network.replica import Network
from stochbn.posteriors import TINY, Factorized, FactorizedLog
from stochbn.posteriors.moments import Moments
from stochbn.sources.objects import Objects
from stochbn.statistics import mini_batches, observing

__all__ = ["Diagnosis", "diagnose", "distances", "layer_parameters", "observe", "rescaling"]


def observe(
    model: nn.Module,
    images: Objects,
    batch_size: int,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
    *,
    deterministic: Collection[str] = (),
) -> dict[str, Tensor]:
    """The statistics of every mini-batch, which `stochbn.fit` only keeps the moments of.

    Args:
        model: the network.
        images: its training data.
        batch_size: examples in a mini-batch.
        seed: where the order of the images comes from.
        report: called with the number of images done and of all.
        deterministic: layers that work with their running statistics meanwhile; they are left out.

    Returns:
        For every layer ``[M, 2, C]`` in float32: mean and biased variance in each of M mini-batches.
    """
    found: dict[str, list[Tensor]] = {}
    batches = (inputs for inputs, _ in images.shuffled(seed).batches(batch_size))
    network = Network.of(model)
    network.look()
    with observing(network, frozenset(network.trained()) - set(deterministic)) as see:
        for count, inputs in enumerate(mini_batches(model, batches, batch_size), start=1):
            for layer, statistics in see(inputs, count - 1).items():
                found.setdefault(layer, []).append(statistics.float())
            report(count * batch_size, len(images) // batch_size * batch_size)
    return {layer: torch.cat(rows) for layer, rows in found.items()}


def layer_parameters(posterior: Factorized | FactorizedLog) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Location and scale of every layer's Normal means and Normal log-variances, each ``[C]``."""
    if isinstance(posterior, FactorizedLog):
        log_location, log_scale2 = posterior.log_mean, posterior.log_variance
    else:
        log_scale2 = posterior.log_variance_variance
        log_location = posterior.variance_mean.log() - log_scale2 / 2
    vectors = torch.stack([posterior.mean_mean, posterior.mean_variance.sqrt(), log_location, log_scale2.sqrt()])
    parts = torch.split(vectors, list(posterior.layers.values()), dim=1)
    return {layer: (p[0], p[1], p[2], p[3]) for layer, p in zip(posterior.layers, parts, strict=True)}


def distances(observations: Mapping[str, Tensor], posterior: Factorized | FactorizedLog) -> dict[str, dict[str, float]]:
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


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What observed mini-batches say of the factorised form.

    Attributes:
        distances: for every layer the Kolmogorov-Smirnov distances of its means and variances: `distances`.
        correlations: ``[L, L]``: the mean absolute correlation between the means and log-variances of two layers'
            channels; on the diagonal that between different ones of the same layer.
        chance: the mean absolute correlation that independent statistics show in so few mini-batches.
        shares: ``[K]``: the share of the variance in each principal direction, largest first. Means count in the
            standard deviations of their channels' activations, log-variances by half, as they act on what a layer
            puts out.
    """

    distances: dict[str, dict[str, float]]
    correlations: Tensor
    chance: float
    shares: Tensor

    @property
    def worst(self) -> tuple[str, float]:
        """The layer that is fitted worst, and the larger of its two distances."""
        found = {layer: max(distance.values()) for layer, distance in self.distances.items()}
        layer = max(found, key=lambda name: found[name])
        return layer, found[layer]

    @property
    def distance_by_chance(self) -> float:
        """The Kolmogorov-Smirnov distance of so few mini-batches from the distribution fitted to them."""
        return 0.75 * self.chance

    @property
    def dependence(self) -> tuple[float, float | None]:
        """The mean absolute correlation within layers, and between layers if there are several."""
        layers = len(self.correlations)
        apart = self.correlations[~torch.eye(layers, dtype=torch.bool)]
        return self.correlations.diagonal().mean().item(), apart.mean().item() if layers > 1 else None

    @property
    def kind(self) -> str:
        """The kind of posterior to use."""
        if self.worst[1] > POOR_FIT + self.distance_by_chance:
            return "empirical"
        within, across = self.dependence
        return "joint" if max(within, across or 0.0) > 1.5 * self.chance else "factorized"

    @property
    def advice(self) -> list[str]:
        """What it means, and which posterior to use, in sentences."""
        worst, distance = self.worst
        marginal = (
            f"Normal and LogNormal fit some layers poorly: the distance is {distance:.3f} in {worst}."
            if self.kind == "empirical"
            else f"Normal and LogNormal fit every layer well: the largest distance is {distance:.3f} ({worst})."
        )
        within, apart = self.dependence
        across = f"{apart:.2f} between layers, " if apart is not None else ""
        share = self.shares[:16].sum().item()
        dependence = (
            f"The mean absolute correlation is {within:.2f} within layers, {across}{self.chance:.2f} would be chance; "
            f"one direction carries {100 * self.shares[0].item():.0f} % of the variance, {min(16, len(self.shares))} "
            f"carry {100 * share:.0f} %."
        )
        return [marginal, dependence, VERDICTS[self.kind]]


VERDICTS = {
    "empirical": "Use --kind empirical, which replays what was observed and assumes no form.",
    "joint": "The statistics of a mini-batch move together, which the factorised form leaves out: it has too little "
    "noise in what the channels add up to. Use --kind joint.",
    "factorized": "They are next to independent: --kind factorized loses little.",
}
"""Which posterior to use, and why."""

POOR_FIT = 0.1
"""A mean Kolmogorov-Smirnov distance that shows in a histogram."""


def diagnose(observations: Mapping[str, Tensor]) -> Diagnosis:
    """Say how well the factorised form fits observed mini-batches.

    Args:
        observations: what `observe` returned, with as many observations of every layer.

    Raises:
        ValueError: fewer than 10 mini-batches, or layers with different numbers of observations.
    """
    counts = {layer: len(rows) for layer, rows in observations.items()}
    count = next(iter(counts.values()), 0)
    if count < 10:
        raise ValueError(f"expected at least 10 mini-batches, got {count}; use more data or a smaller batch size")
    if len(set(counts.values())) > 1:
        raise ValueError(f"expected as many observations of every layer, got {counts}")
    moments = {layer: Moments.of(rows) for layer, rows in observations.items()}
    posterior = Factorized.from_moments(moments, batch_size=None, mini_batches=count)
    rows = [o.double() for o in observations.values()]
    logs = [_log_variances(r[:, 1]) for r in rows]
    weighted = [
        torch.cat([r[:, 0] / r[:, 1].mean(0).clamp(min=TINY).sqrt(), log / 2], 1)
        for r, log in zip(rows, logs, strict=True)
    ]
    weighted = [w - w.mean(0) for w in weighted]
    standard = [w[:, w.square().sum(0) > 0] for w in weighted]
    standard = [w / w.square().sum(0).sqrt() for w in standard]
    correlations = torch.zeros(len(standard), len(standard), dtype=torch.float64)
    for i, one in enumerate(standard):
        for j, other in enumerate(standard[: i + 1]):
            total, pairs = (one.T @ other).abs().sum().item(), one.shape[1] * other.shape[1]
            if i == j:  # a statistic's correlation with itself does not count
                total, pairs = total - one.shape[1], pairs - one.shape[1]
            correlations[i, j] = correlations[j, i] = total / max(pairs, 1)
    spectrum = torch.linalg.svdvals(torch.cat(weighted, 1)).square()
    return Diagnosis(
        distances(observations, posterior), correlations, math.sqrt(2 / (math.pi * count)), spectrum / spectrum.sum()
    )


def rescaling(
    observations: Mapping[str, Tensor], batch_size: int, others: Mapping[str, Tensor], other_size: int
) -> dict[str, dict[str, float]]:
    """How statistics observed at another mini-batch size compare with what `rescale` makes of these.

    Args:
        observations: what `observe` returned at `batch_size`.
        batch_size: examples in these mini-batches.
        others: what it returned at `other_size`.
        other_size: examples in those mini-batches.

    Returns:
        For every layer the ratio of observed to rescaled, the median over channels: of the standard deviation of the
        means under ``mean``, of that of the log-variances under ``log_variance``, and of the expected variance under
        ``variance``; 1 is as rescaled.
    """

    def summary(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        means, variances = rows.double().unbind(1)
        return means.std(0), _log_variances(variances).std(0), variances.mean(0)

    root = math.sqrt(batch_size / other_size)
    found = {}
    for layer, rows in observations.items():
        (mean, log, variance), (mean_other, log_other, variance_other) = summary(rows), summary(others[layer])
        ratios = {"mean": mean_other / (root * mean), "log_variance": log_other / (root * log)}
        ratios["variance"] = variance_other / variance
        found[layer] = {name: ratio[ratio.isfinite()].median().item() for name, ratio in ratios.items()}
    return found


def _log_variances(variances: Tensor) -> Tensor:
    """Of ``[M, C]``; a channel dead in some mini-batch must not have it count as an infinitely small variance."""
    return variances.maximum((1e-3 * variances.mean(0)).clamp(min=TINY)).log()


def _distance(values: Tensor, location: Tensor, scale: Tensor) -> float:
    varying = ((scale > 0) & values.isfinite().all(0)).nonzero()[:, 0].tolist()
    found = [kstest(values[:, c].numpy(), norm(location[c].item(), scale[c].item()).cdf).statistic for c in varying]
    return float(np.mean(found)) if found else 0.0
