"""Scores of regression and of multi-label classification, and the calibration of single classes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stochbn.metrics.classification import (
    BINS,
    as_numbers,
    auroc,
    checked_predictions,
    torchmetrics_classification,
)

__all__ = [
    "class_ece",
    "crps_of_each",
    "gaussian_nll_of_each",
    "multilabel",
    "pinball",
    "pinball_of_each",
    "regression",
]


def regression(mean: Any, std: Any, targets: Any, coverage: float = 0.9) -> dict[str, float]:
    """Compute errors, likelihood and coverage of Normal distributions with predicted means and standard deviations.

    Args:
        mean: ``[N]``, ``[N, D]`` or dense.
        std: standard deviations of the same shape, positive, such as ``prediction.total_std``.
        targets: the true values.
        coverage: the level of the central intervals to score.

    Returns:
        ``rmse`` and ``mae``: root mean squared and mean absolute error, in the targets' units.
        ``nll``: mean negative log-likelihood in nats.
        ``crps``: mean continuous ranked probability score, in the targets' units (Gneiting and Raftery, 2007).
        ``coverage``: the share of targets in their central intervals of `coverage`.
        ``width``: the mean width of these intervals, in the targets' units.

    Raises:
        TypeError, ValueError: arguments that are not finite numbers of one shape, a standard deviation that is not
            positive, or a coverage that is not between 0 and 1.

    >>> {name: round(value, 3) for name, value in regression([0.0, 1.0], [1.0, 1.0], [0.0, 3.0]).items()}
    {'rmse': 1.414, 'mae': 1.0, 'nll': 1.919, 'crps': 0.843, 'coverage': 0.5, 'width': 3.29}
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must lie between 0 and 1, such as 0.9, got {coverage!r}")
    nll = gaussian_nll_of_each(mean, std, targets)
    mean, std, targets = (as_numbers(value, "numbers").double() for value in (mean, std, targets))
    error = targets - mean
    z = error / std
    half = torch.special.ndtri(torch.tensor((1 + coverage) / 2, dtype=torch.float64))
    return {
        "rmse": error.square().mean().sqrt().item(),
        "mae": error.abs().mean().item(),
        "nll": nll.mean().item(),
        "crps": crps_of_each(mean, std, targets).mean().item(),
        "coverage": (z.abs() <= half).double().mean().item(),
        "width": (2 * half * std).mean().item(),
    }


def crps_of_each(mean: Any, std: Any, targets: Any) -> Tensor:
    """Compute the continuous ranked probability score of each target under a Normal distribution, in targets' shape.

    Raises:
        TypeError, ValueError: as `regression`.

    Source: Gneiting and Raftery, 2007, "Strictly proper scoring rules, prediction, and estimation".
    """
    mean, std, targets = _checked(mean, std, targets)
    z = (targets - mean) / std
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    crps: Tensor = std * (z * (2 * torch.special.ndtr(z) - 1) + 2 * density - 1 / math.sqrt(math.pi))
    return crps


def gaussian_nll_of_each(mean: Any, std: Any, targets: Any) -> Tensor:
    """The negative log-likelihood (nats) of each target under a Normal distribution, of the targets' shape, in float64.

    Raises:
        TypeError, ValueError: as `regression`.
    """
    mean, std, targets = _checked(mean, std, targets)
    nll: Tensor = ((targets - mean) / std).square() / 2 + std.log() + math.log(2 * math.pi) / 2
    return nll


def _checked(mean: Any, std: Any, targets: Any) -> list[Tensor]:
    """Convert to finite numbers of one shape in float64, with positive standard deviations."""
    if std is None:
        raise TypeError(
            "the standard deviations are None: nothing is known of single observations until stochbn.calibrate has "
            'fitted a residual variance (task="regression")'
        )
    found = {"mean": mean, "std": std, "targets": targets}
    numbers = {name: as_numbers(value, name).double() for name, value in found.items()}
    shapes = {name: list(value.shape) for name, value in numbers.items()}
    if len(set(map(tuple, shapes.values()))) > 1 or not numbers["mean"].numel() or not shapes["mean"]:
        raise ValueError(f"expected mean, std and targets of one shape [N, ...], got {shapes}")
    for name, value in numbers.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} has NaN or infinity; leave such examples out")
    if (numbers["std"] <= 0).any():
        raise ValueError(f"standard deviations must be positive, found {numbers['std'].min().item():g}")
    return list(numbers.values())


def pinball(quantiles: Any, targets: Any, level: float) -> float:
    """Compute the mean pinball loss of predicted quantiles, in the targets' units. It is lowest for the true quantiles.

    Args:
        quantiles: the predicted quantiles, ``[N, ...]``.
        targets: the true values.
        level: the level of the quantiles, between 0 and 1.

    Raises:
        TypeError, ValueError: arguments that are not finite numbers of one shape, or a level that is not between 0 and
        1.

    >>> pinball([1.0, 1.0], [2.0, 0.0], 0.9)
    0.5
    """
    quantiles, targets = as_numbers(quantiles, "quantiles").double(), as_numbers(targets, "targets").double()
    if quantiles.shape != targets.shape or not quantiles.numel():
        raise ValueError(
            f"expected quantiles and targets of one shape [N, ...], got {list(quantiles.shape)} and "
            f"{list(targets.shape)}"
        )
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level!r}")
    if not (quantiles.isfinite().all() and targets.isfinite().all()):
        raise ValueError("quantiles or targets have NaN or infinity; leave such examples out")
    return pinball_of_each(quantiles, targets, level).mean().item()


def pinball_of_each(quantiles: Tensor, targets: Tensor, level: float) -> Tensor:
    """Compute the pinball loss of each predicted quantile at a level, of their shape."""
    error = targets - quantiles
    return torch.maximum(level * error, (level - 1) * error)


def multilabel(probs: Any, labels: Any) -> dict[str, float]:
    """Compute scores of multi-label predictions.

    Args:
        probs: ``[N, K]``, the probability of each label.
        labels: ``[N, K]``, 0 or 1.

    Returns:
        ``error``: percent of labels whose probability is on the wrong side of one half.
        ``nll``: mean negative log-likelihood of a label, in nats.
        ``brier``: mean squared difference of probability and label.
        ``ece``: expected calibration error of a label's probability, a fraction, in 15 bins of equal width.
        ``auroc``: the mean over labels of the probability that an example with the label has a higher score than one
        without it. Labels that all or no examples have are left out.

    Raises:
        ImportError: torchmetrics is not installed.
        TypeError, ValueError: arguments that are not of one shape ``[N, K]``, or a value out of range.
    """
    probs, labels = as_numbers(probs, "probabilities"), as_numbers(labels, "labels")
    if probs.ndim != 2 or probs.shape != labels.shape or not probs.numel() or not probs.is_floating_point():
        raise ValueError(
            f"expected floating-point probabilities and labels of one shape [N, K], got {probs.dtype} "
            f"{list(probs.shape)} and {list(labels.shape)}"
        )
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("labels must be 0 or 1")
    if not ((probs >= 0) & (probs <= 1)).all():
        raise ValueError("probabilities must lie between 0 and 1, and none be NaN")
    classification = torchmetrics_classification()
    tiny, probs = torch.finfo(probs.dtype).tiny, probs.double()
    truth = labels.to(probs.device, torch.float64)
    right = torch.where(truth > 0, probs, 1 - probs)
    both = (truth.sum(0) > 0) & (truth.sum(0) < len(truth))
    if both.any():
        columns = zip(probs[:, both].cpu().T, truth[:, both].cpu().T > 0, strict=True)
        each = [auroc(column[~there], column[there]) for column, there in columns]
        mean_auroc = sum(each) / len(each)
    else:
        mean_auroc = math.nan
    calibration = classification.binary_calibration_error(
        probs.flatten().clamp(max=1 - 2**-53), truth.flatten().long(), n_bins=BINS, norm="l1"
    )
    return {
        "error": 100 * ((probs >= 0.5) != (truth > 0)).double().mean().item(),
        "nll": -right.clamp(min=tiny).log().mean().item(),
        "brier": (probs - truth).square().mean().item(),
        "ece": calibration.item(),
        "auroc": mean_auroc,
    }


def class_ece(probs: Any, labels: Any) -> Tensor:
    """Compute the expected calibration error of each class's probability, ``[K]`` as fractions, in 15 equal bins.

    `evaluate` scores the most probable class. A network may be calibrated in that, and not in single classes.

    Args:
        probs: ``[N, K]`` (or dense), as for `evaluate`.
        labels: their labels.

    Raises:
        ImportError: torchmetrics is not installed.
        TypeError, ValueError: as `evaluate`.

    Source: Kumar, Liang and Ma, 2019, "Verified uncertainty calibration" (marginal calibration).
    """
    probs, labels = checked_predictions(probs, labels)
    classification = torchmetrics_classification()
    each = [
        classification.binary_calibration_error(
            column.double().clamp(max=1 - 2**-53), (labels == k).long(), n_bins=BINS, norm="l1"
        )
        for k, column in enumerate(probs.unbind(1))
    ]
    return torch.stack(each).double()
