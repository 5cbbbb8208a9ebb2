"""Standard errors of scores, and of differences between two predictions, paired over the test examples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import stochbn.metrics as metrics
from stochbn.metrics.entropies import entropy

__all__ = ["paired", "standard_errors"]

RESAMPLED = 200
"""The number of bootstrap samples for the standard error of a calibration error."""
MOST_RESAMPLED = 10_000
"""The largest number of examples with a standard error of the ECE; for more it is small, and takes memory."""


def standard_errors(known: Tensor, labels: Tensor, unknown: Tensor | None = None) -> dict[str, float]:
    """Compute the standard errors of a method's scores, over examples.

    Args:
        known: probabilities ``[N, K]`` for examples of known classes.
        labels: their labels ``[N]``.
        unknown: likewise ``[M, K]``, for examples of other classes.

    Returns:
        ``error_se`` (percentage points), which is above 0 even without a wrong prediction; ``nll_se`` (nats);
        ``ece_se`` (by the bootstrap, for up to 10,000 examples); and with unknown examples ``auroc_se``. Empty for a
        single example, and for dense predictions, whose pixels are not independent.

    Source: of a share, Agresti and Coull, The American Statistician 52 (1998), 119-126: two more right and two more
    wrong; for the AUROC, DeLong et al., Biometrics 44 (1988), 837-845.
    """
    count = len(labels)
    if count < 2 or labels.ndim > 1:
        return {}
    confidence, predicted = known.max(1)
    right = predicted == labels
    share = ((~right).sum().item() + 2) / (count + 4)
    found = {"error_se": 100 * math.sqrt(share * (1 - share) / (count + 4))}
    found["nll_se"] = math.sqrt(_variance_of_mean(metrics.nll_of_each(known, labels)))
    if count <= MOST_RESAMPLED:
        found["ece_se"] = _spread_of_ece(confidence.double(), right.double())
    if unknown is not None and len(unknown) > 1:
        places = _placements(entropy(known), entropy(unknown))
        found["auroc_se"] = math.sqrt(sum(map(_variance_of_mean, places)))
    return found


def _spread_of_ece(confidence: Tensor, right: Tensor) -> float:
    """The standard deviation of the calibration error over bootstrap samples, independent of the order of examples.

    Examples are sorted first, wrong and correct ones separately, so that samples are the same even if confidences
    differ by rounding.
    """
    order = confidence.argsort(stable=True)
    order = order[right[order].argsort(stable=True)]
    confidence, right = confidence[order], right[order]
    count, bins = len(right), metrics.BINS
    draws = torch.randint(count, (RESAMPLED, count), generator=torch.Generator().manual_seed(0))
    place = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gaps = torch.zeros(RESAMPLED, bins, dtype=torch.float64)
    gaps.scatter_add_(1, place[draws], (confidence - right)[draws])
    return (gaps.abs().sum(1) / count).std().item()


def paired(
    known: tuple[Tensor, Tensor],
    labels: Tensor,
    unknown: tuple[Tensor, Tensor] | None = None,
    calibrated: tuple[Tensor, Tensor] | None = None,
) -> dict[str, float]:
    """Compute differences between two predictions of the same examples, second minus first, with standard errors.

    The standard error is that of the mean difference over examples. It is much smaller than those of the scores,
    because both predictions see the same examples.

    Args:
        known: probabilities ``[N, K]`` of the two, for examples of known classes.
        labels: their labels ``[N]``.
        unknown: likewise ``[M, K]``, for examples of other classes.
        calibrated: what `stochbn.metrics.calibrated_nll_of_each` returns for both, if there are enough known examples.
            The standard error does not include the choice of the temperatures.

    Returns:
        ``error_change`` (percentage points), ``nll_change`` (nats), with `calibrated` the ``calibrated_nll_change``
        (nats), and with unknown examples ``entropy_unknown_change`` (nats) and ``auroc_change`` (of the entropies).
        Each has a standard error, with the suffix ``_se``. That of the error is above 0 even if no example changes. The
        result is empty for a single example.

    Source: of the error, Bonett and Price, Journal of Educational and Behavioral Statistics 37 (2012), 479-488: one
    more example that becomes right, and one more that becomes wrong; for the AUROC, DeLong et al., Biometrics 44
    (1988), 837-845.
    """
    found: dict[str, float] = {}
    if len(labels) < 2:
        return found

    def add(name: str, change: float, *differences: Tensor) -> None:
        found[f"{name}_change"] = change
        found[f"{name}_change_se"] = math.sqrt(sum(_variance_of_mean(d) for d in differences))

    wrong = [100 * (probs.argmax(1) != labels).double() for probs in known]
    turned = wrong[1] - wrong[0]
    add("error", turned.mean().item(), torch.cat([turned, turned.new_tensor([-100.0, 100.0])]))
    nll = [metrics.nll_of_each(probs, labels) for probs in known]
    add("nll", (nll[1] - nll[0]).mean().item(), nll[1] - nll[0])
    if calibrated is not None:
        change = (calibrated[1] - calibrated[0]).double()
        add("calibrated_nll", change.mean().item(), change)
    if unknown is not None and len(unknown[0]) > 1:
        entropies = [entropy(probs).double() for probs in unknown]
        add("entropy_unknown", (entropies[1] - entropies[0]).mean().item(), entropies[1] - entropies[0])
        (a, b), (c, d) = (_placements(entropy(k), entropy(u)) for k, u in zip(known, unknown, strict=True))
        add("auroc", (d - b).mean().item(), c - a, d - b)
    return found


def _variance_of_mean(values: Tensor) -> float:
    return values.var().item() / len(values)


def _placements(known: Tensor, unknown: Tensor) -> tuple[Tensor, Tensor]:
    """For each known example the share of unknown ones above it, and for each unknown one that of known ones below.

    Ties count half. The mean of either is the AUROC.
    """
    return 1 - _share_below(known, unknown), _share_below(unknown, known)


def _share_below(values: Tensor, others: Tensor) -> Tensor:
    ordered = others.sort().values
    below = torch.searchsorted(ordered, values, right=False) + torch.searchsorted(ordered, values, right=True)
    return below.double() / (2 * len(others))
