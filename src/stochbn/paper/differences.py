"""What drawing the statistics changes in a method's scores, with standard errors paired over the test objects."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stochbn import metrics
from stochbn.predictions import entropy

__all__ = ["paired"]


def paired(
    known: tuple[Tensor, Tensor],
    labels: Tensor,
    unknown: tuple[Tensor, Tensor] | None = None,
    calibrated: tuple[Tensor, Tensor] | None = None,
) -> dict[str, float]:
    """Differences between two predictions of the same objects, the second minus the first, and their standard errors.

    Both predictions see the same objects, so their scores rise and fall together: the standard error is that of the
    mean of the differences object by object, and much smaller than those of the scores.

    Args:
        known: probabilities ``[N, K]`` of the two, for objects of known classes.
        labels: their labels ``[N]``.
        unknown: likewise ``[M, K]``, for objects of other classes.
        calibrated: what `stochbn.metrics.calibrated_nll_of_each` returns for either, where there are enough known
            objects. That each temperature was chosen on other objects is not in the standard error.

    Returns:
        ``error_change`` (percentage points), ``nll_change`` (nats), with `calibrated` the ``calibrated_nll_change``
        (nats), and with unknown objects ``entropy_unknown_change`` (nats) and ``auroc_change`` (of the entropies); each
        also with ``_se`` behind it. A single object has no standard error, so nothing is said of it.

    Source: for the AUROC, DeLong et al., Biometrics 44 (1988), 837-845.
    """
    found: dict[str, float] = {}
    if len(labels) < 2:
        return found

    def add(name: str, change: float, *differences: Tensor) -> None:
        found[f"{name}_change"] = change
        found[f"{name}_change_se"] = math.sqrt(sum(_variance_of_mean(d) for d in differences))

    wrong = [100 * (probs.argmax(1) != labels).double() for probs in known]
    add("error", (wrong[1] - wrong[0]).mean().item(), wrong[1] - wrong[0])
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
    """For every known object the share of unknown ones above it, and for every unknown one that of known ones below.

    Those that are level count half; the mean of either is the AUROC.
    """
    return 1 - _share_below(known, unknown), _share_below(unknown, known)


def _share_below(values: Tensor, others: Tensor) -> Tensor:
    ordered = others.sort().values
    below = torch.searchsorted(ordered, values, right=False) + torch.searchsorted(ordered, values, right=True)
    return below.double() / (2 * len(others))
