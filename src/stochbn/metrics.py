"""Errors, calibration and out-of-distribution scores, from probabilities, labels and entropies alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["entropy_cdf", "evaluate", "ood"]

BINS = 15


def evaluate(probs: Any, labels: Any) -> dict[str, float]:
    """Error, negative log-likelihood, Brier score and calibration error of predicted probabilities.

    Args:
        probs: ``[N, K]``, or ``[N, K, H, W]`` for dense predictions: a tensor or what `torch.as_tensor` takes.
        labels: ``[N]`` or ``[N, H, W]``: whole numbers from 0 to K - 1.

    Returns:
        ``error``: percent of objects (or pixels) whose most probable class is wrong.
        ``nll``: mean negative log-likelihood in nats; a probability of 0 counts as the smallest normal number
        of its type, so that an underflow does not read as infinity.
        ``brier``: mean squared distance between the probabilities and the one-hot label, summed over classes (0 to 2).
        ``ece``: expected calibration error of the most probable class, a fraction, in 15 bins of
        equal width (Guo et al., 2017).

    Raises:
        ImportError: torchmetrics is not installed.
        TypeError: labels that are not whole numbers.
        ValueError: empty or mismatched arguments, probabilities that are negative, not finite or do not sum to 1, or
            labels out of range; the message says which.
    """
    probs, labels = torch.as_tensor(probs), torch.as_tensor(labels)
    if probs.ndim < 2 or probs.shape[1] < 2 or not probs.is_floating_point():
        raise ValueError(
            "expected floating-point probabilities [N, K, ...] with at least 2 classes, "
            f"got {probs.dtype} {list(probs.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"expected whole-number labels, got {labels.dtype}")
    if labels.shape != probs[:, 0].shape:
        raise ValueError(
            f"expected labels of shape {list(probs[:, 0].shape)} for probabilities {list(probs.shape)}, "
            f"got {list(labels.shape)}"
        )
    if not labels.numel():
        raise ValueError("there is nothing to evaluate: probabilities and labels are empty")
    classes = probs.shape[1]
    probs = probs.movedim(1, -1).reshape(-1, classes)
    labels = labels.reshape(-1).to(probs.device, torch.int64)
    _check_probabilities(probs)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels must lie between 0 and {classes - 1} for {classes} classes, "
            f"found {labels.min().item()} to {labels.max().item()}"
        )
    classification = _torchmetrics()
    # torchmetrics puts a confidence of exactly 1 into a bin of its own, and takes one above 1, which rounding may
    # leave, as a sign that these are logits.
    clipped = probs.clamp(0, 1 - 2**-24)
    chosen = probs.gather(1, labels[:, None]).double().clamp(min=torch.finfo(probs.dtype).tiny)
    one_hot = torch.nn.functional.one_hot(labels, classes)
    return {
        "error": 100 * (probs.argmax(1) != labels).double().mean().item(),
        "nll": 0.0 - chosen.log().mean().item(),
        "brier": (probs.double() - one_hot).square().sum(1).mean().item(),
        "ece": classification.multiclass_calibration_error(clipped, labels, classes, n_bins=BINS, norm="l1").item(),
    }


def ood(entropy_known: Any, entropy_unknown: Any) -> dict[str, float]:
    """How well a score, such as the entropy, tells unknown objects (which should have more of it) from known ones.

    Args:
        entropy_known: ``[N]``, scores of objects from the training distribution.
        entropy_unknown: ``[M]``, scores of objects from another.

    Returns:
        ``auroc``: the probability that an unknown object has the higher score, ties counting half.
        ``aupr``: average precision with the unknown objects as positives.
        ``fpr95``: the share of known objects above the threshold that at least 95 % of the unknown ones reach.
        All are fractions.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: an argument is empty, not finite or not a vector.
    """
    known, unknown = _scores(entropy_known, "entropy_known"), _scores(entropy_unknown, "entropy_unknown")
    classification = _torchmetrics()
    target = torch.cat([torch.zeros(len(known)), torch.ones(len(unknown))]).long()
    # Ranks keep the order and the ties and lie in [0, 1], where torchmetrics takes scores as they are.
    ranks = torch.unique(torch.cat([known, unknown]), return_inverse=True)[1].double()
    score = ranks / max(ranks.max().item(), 1)
    specificity, _ = classification.binary_specificity_at_sensitivity(score, target, min_sensitivity=0.95)
    return {
        "auroc": classification.binary_auroc(score, target).item(),
        "aupr": classification.binary_average_precision(score, target).item(),
        "fpr95": 1 - specificity.item(),
    }


def entropy_cdf(entropy: Any) -> tuple[Tensor, Tensor]:
    """The empirical distribution function of entropies, as in the paper's figures.

    Args:
        entropy: ``[N]``, nats.

    Returns:
        The sorted distinct entropies and the fraction of objects at or below each, both ``[M]`` in float64.

    Raises:
        ValueError: the argument is empty, not finite or not a vector.
    """
    values, counts = torch.unique(_scores(entropy, "entropy"), return_counts=True)
    return values, counts.cumsum(0).double() / counts.sum()


def _check_probabilities(probs: Tensor) -> None:
    if not probs.isfinite().all():
        raise ValueError("the probabilities contain NaN or infinity")
    if (probs < 0).any():
        raise ValueError(f"probabilities must not be negative, found {probs.min().item():.6g}")
    sums = probs.double().sum(1)
    tolerance = 1e-3 if probs.dtype.itemsize >= 4 else 2e-2
    if (sums - 1).abs().max() > tolerance:
        worst = sums[(sums - 1).abs().argmax()].item()
        raise ValueError(
            f"probabilities must sum to 1 over the classes (axis 1), found a sum of {worst:.6g}; "
            "pass probabilities, not logits or log-probabilities"
        )


def _scores(values: Any, name: str) -> Tensor:
    scores = torch.as_tensor(values).double().cpu()
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name} must be a vector of at least one number, got shape {list(scores.shape)}")
    if not scores.isfinite().all():
        raise ValueError(f"{name} contains NaN or infinity")
    return scores


def _torchmetrics() -> Any:
    try:
        from torchmetrics.functional import classification
    except ModuleNotFoundError as error:
        message = "stochbn.metrics needs torchmetrics: pip install 'stochbn[metrics]'"
        raise ModuleNotFoundError(message, name="torchmetrics") from error
    return classification
