"""Scores of class probabilities: error, calibration, and detection of unknown classes."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochbn.arrays import as_tensor
from stochbn.tempering import best_temperature, blocks, cross_validated, tempered

__all__ = [
    "calibrated_nll",
    "calibrated_nll_of_each",
    "deep_ensemble_equivalent",
    "entropy_cdf",
    "evaluate",
    "nll_of_each",
    "ood",
    "risk_coverage",
]

BINS = 15
"""The number of bins of equal width in calibration errors."""

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def evaluate(probs: Any, labels: Any, *, ignore_index: int | None = None) -> dict[str, float]:
    """Compute error, negative log-likelihood, Brier score and calibration error of predicted probabilities.

    All sums are in float64.

    Args:
        probs: ``[N, K]``, or ``[N, K, H, W]`` for dense predictions: a tensor, an array or nested lists (float64).
        labels: ``[N]`` or ``[N, H, W]``: whole numbers from 0 to K - 1.
        ignore_index: a label to ignore, such as 255 for the edges of segmentations.

    Returns:
        ``error``: percent of examples (or pixels) whose most probable class is wrong.
        ``nll``: mean negative log-likelihood in nats; a probability of 0 counts as the smallest normal number
        of its type, so that an underflow does not make it infinite.
        ``brier``: mean squared distance between the probabilities and the one-hot label, summed over classes (0 to 2).
        ``ece``: expected calibration error of the most probable class, a fraction, in 15 bins of equal width
        (Guo et al., 2017). The last bin includes a confidence of exactly 1.

    Raises:
        ImportError: torchmetrics is not installed.
        TypeError: arguments that are not numbers, or labels that are not whole numbers.
        ValueError: empty or mismatched arguments, probabilities that are negative, not finite or do not sum to 1, or
            labels out of range; the message says which.

    >>> found = evaluate([[0.75, 0.25], [1.0, 0.0]], [0, 0])
    >>> {name: round(value, 4) for name, value in found.items()}
    {'error': 0.0, 'nll': 0.1438, 'brier': 0.0625, 'ece': 0.125}
    """
    probs, labels = checked_predictions(probs, labels, ignore_index)
    classification = torchmetrics_classification()
    confidence, predicted = probs.max(1)
    right = predicted == labels
    # torchmetrics puts a confidence of exactly 1 into a bin of its own, and takes one above 1, which rounding may
    # leave, as a sign that these are logits. It adds up in the type that it is given.
    confidence = confidence.double().clamp(max=1 - 2**-53)
    return {
        "error": 100 * (1 - right.double().mean()).item(),
        "nll": _nll(probs, labels).mean().item(),
        "brier": _brier(probs, labels),
        "ece": classification.binary_calibration_error(confidence, right.long(), n_bins=BINS, norm="l1").item(),
    }


def nll_of_each(probs: Any, labels: Any, temperature: float | None = None) -> Tensor:
    """Compute the negative log-likelihood of each example, whose mean `evaluate` returns, ``[N]`` in nats (float64).

    Args:
        probs: as `evaluate`.
        labels: as `evaluate`.
        temperature: the probabilities are raised to its inverse and normalised again; None leaves them as they are.

    Raises:
        TypeError, ValueError: as `evaluate`.
    """
    if temperature is None:
        return _nll(*checked_predictions(probs, labels))
    if not 0 < temperature < math.inf:
        raise ValueError(f"expected a positive, finite temperature, got {temperature}; None is no temperature")
    return tempered(*_log_probabilities(probs, labels), 1 / temperature)


def ood(entropy_known: Any, entropy_unknown: Any) -> dict[str, float]:
    """Compute how well a score, such as the entropy, separates unknown examples (higher scores) from known ones.

    Args:
        entropy_known: scores of examples from the training distribution, ``[N]``.
        entropy_unknown: scores of examples from another distribution, ``[M]``.

    Returns:
        ``auroc``: the probability that an unknown example has the higher score, ties counting half.
        ``aupr``: average precision with the unknown examples as positives.
        ``fpr95``: the share of known examples above the threshold that at least 95 % of the unknown ones reach.
        All are fractions.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: an argument is empty, not finite or not a vector.
    """
    known, unknown = _scores(entropy_known, "entropy_known"), _scores(entropy_unknown, "entropy_unknown")
    counts, above = _counted(known, unknown)  # not by torchmetrics, which adds up in torch's default type
    precisions, recalls = above[1] / above.sum(0), above[1] / len(unknown)
    return {
        "auroc": auroc(known, unknown),
        "aupr": precisions.mul(counts[1] / len(unknown)).sum().item(),
        "fpr95": (above[0][recalls >= 0.95 - 1e-12][-1] / len(known)).item(),
    }


def auroc(known: Tensor, unknown: Tensor) -> float:
    """Compute the probability that an unknown example has the higher score, ties counting half, in float64.

    Source: Mann and Whitney, 1947.
    """
    counts, above = _counted(known, unknown)
    higher = above[1] - counts[1]
    return ((counts[0] * (higher + counts[1] / 2)).sum() / (len(known) * len(unknown))).item()


def _counted(known: Tensor, unknown: Tensor) -> tuple[Tensor, Tensor]:
    """Count the known and unknown examples at each score, and at or above it, ``[2, V]`` in float64."""
    _, group = torch.unique(torch.cat([known, unknown]), return_inverse=True)
    parts = group.split([len(known), len(unknown)])
    counts = torch.stack([part.bincount(minlength=int(group.max()) + 1) for part in parts]).double()
    return counts, counts.flip(1).cumsum(1).flip(1)


def calibrated_nll(probs: Any, labels: Any, held_out: tuple[Any, Any] | None = None) -> dict[str, float]:
    """Compute the negative log-likelihood after the best temperature, for a fair comparison of methods.

    Without a temperature, better calibrated methods look better than more accurate ones (Ashukha et al., 2020, section
    3). Probabilities are raised to the power 1 / T and normalised again. T above 1 makes them less certain.

    Args:
        probs: ``[N, K]`` (or dense), as for `evaluate`.
        labels: their labels.
        held_out: other probabilities and labels to choose T on. None chooses T by cross-validation, for each of five
            random parts on the other four. The parts are always the same.

    Returns:
        ``nll``: mean negative log-likelihood in nats, tempered.
        ``temperature``: the temperature chosen on `held_out`, or the best one for all of `probs`.

    Raises:
        TypeError, ValueError: as `evaluate`; also fewer than 10 examples to cross-validate on.

    Source: Ashukha et al., 2020, arXiv 2002.06470.
    """
    logs, labels = _log_probabilities(probs, labels)
    if held_out is not None:
        if not isinstance(held_out, (tuple, list)) or len(held_out) != 2:
            raise TypeError(f"expected held_out as a pair of probabilities and labels, got {_given(held_out)}")
        chosen_on, their_labels = _log_probabilities(*held_out)
        if chosen_on.shape[1] != logs.shape[1]:
            raise ValueError(
                f"the held-out probabilities are of {chosen_on.shape[1]} classes, the others of {logs.shape[1]}"
            )
        temperature = best_temperature(chosen_on, their_labels)
        return {"nll": tempered(logs, labels, 1 / temperature).mean().item(), "temperature": temperature}
    return {"nll": cross_validated(logs, labels).mean().item(), "temperature": best_temperature(logs, labels)}


def calibrated_nll_of_each(probs: Any, labels: Any) -> Tensor:
    """Compute the NLL of each example at the cross-validated temperature, as `calibrated_nll`, ``[N]`` in nats.

    Raises:
        TypeError, ValueError: as `calibrated_nll`.
    """
    return cross_validated(*_log_probabilities(probs, labels))


def deep_ensemble_equivalent(nll: float, ensembles: Sequence[float]) -> float:
    """Compute the size of the deep ensemble with the same calibrated NLL as a method (DEE).

    Sizes are interpolated linearly. The smallest value is 1, for a method that is no better than a single network. If
    no given ensemble reaches the method, the value is infinite. The first size that reaches it counts.

    Args:
        nll: the method's `calibrated_nll`, in nats.
        ensembles: the `calibrated_nll` of ensembles of 1, 2, 3, ... networks, in nats.

    Raises:
        TypeError: arguments that are not numbers.
        ValueError: no ensembles, or a number that is not finite.

    Source: Ashukha et al., 2020, section 4.

    >>> deep_ensemble_equivalent(0.75, [1.0, 0.5, 0.25])
    1.5
    """
    reached = as_numbers(nll, "nll").double()
    sizes = as_numbers(ensembles, "ensembles").double()
    numbers = reached.numel() == 1 and sizes.ndim == 1 and len(sizes) > 0
    if not numbers or not torch.cat([reached.view(1), sizes]).isfinite().all():
        raise ValueError(f"expected finite NLLs of at least one ensemble, got {_given(nll)} and {_given(ensembles)}")
    method: float = reached.item()
    if method >= sizes[0]:
        return 1.0
    pairs: Iterator[tuple[float, float]] = pairwise(sizes.tolist())
    for size, (worse, better) in enumerate(pairs, start=1):
        if method >= better:
            return size + (worse - method) / (worse - better)
    return math.inf


def risk_coverage(uncertainty: Any, losses: Any) -> dict[str, Any]:
    """Compute the mean loss of the most certain examples, for every share of them (selective prediction).

    Args:
        uncertainty: an uncertainty such as the entropy, ``[N]``. Examples are taken in order of it. The risk is the
            expectation over random orders of examples with the same uncertainty.
        losses: 0 or 1 for a correct or wrong prediction, or any other loss, ``[N]``.

    Returns:
        ``coverage``: the share of examples, 1/N to 1, ``[N]``.
        ``risk``: the mean loss of these examples, ``[N]``.
        ``aurc``: the mean of the risk over all coverages, the area under the curve (Geifman and El-Yaniv, 2017);
        lower is better.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: an argument is empty, not finite or not a vector, or their lengths differ.
    """
    scores, losses = _scores(uncertainty, "uncertainty"), _scores(losses, "losses")
    if len(scores) != len(losses):
        raise ValueError(f"expected as many losses as uncertainties, got {len(losses)} and {len(scores)}")
    _, group, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    # Among examples with equal uncertainty, the expected loss is the mean.
    means = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, group, losses) / counts
    answered = torch.arange(1, len(losses) + 1, dtype=torch.float64)
    risk = means.repeat_interleave(counts).cumsum(0) / answered
    return {"coverage": answered / len(losses), "risk": risk, "aurc": risk.mean().item()}


def entropy_cdf(entropy: Any) -> tuple[Tensor, Tensor]:
    """Compute the empirical distribution function of entropies, as in the paper's figures.

    Args:
        entropy: entropies, ``[N]`` in nats.

    Returns:
        The sorted distinct entropies and the fraction of examples at or below each, both ``[M]`` in float64.

    Raises:
        TypeError: the argument is not numeric.
        ValueError: the argument is empty, not finite or not a vector.
    """
    values, counts = torch.unique(_scores(entropy, "entropy"), return_counts=True)
    return values, counts.cumsum(0).double() / counts.sum()


def checked_predictions(probs: Any, labels: Any, ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
    """Convert arguments of `evaluate` to probabilities ``[N, K]`` and labels ``[N]``, int64 on the same device.

    Raises:
        TypeError, ValueError: as `evaluate`.
    """
    probs, labels = as_numbers(probs, "probabilities"), _tensor(labels, "labels")
    if probs.ndim < 2 or probs.shape[1] < 2 or probs.dtype not in FLOATS:
        raise ValueError(
            "expected floating-point probabilities [N, K, ...] with at least 2 classes, "
            f"got {probs.dtype} {list(probs.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"expected whole-number labels, got {labels.dtype}")
    if probs.ndim == 2 and labels.ndim == 2 and labels.shape[1] == 1:  # a column, as of a table
        labels = labels[:, 0]
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
    if ignore_index is not None:
        counted = labels != ignore_index
        if not counted.any():
            raise ValueError(f"there is nothing to evaluate: all labels are {ignore_index}, which is ignored")
        probs, labels = probs[counted], labels[counted]
    checked_probabilities(probs)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels must lie between 0 and {classes - 1} for {classes} classes, "
            f"found {labels.min().item()} to {labels.max().item()}"
        )
    return probs, labels


def checked_probabilities(probs: Tensor) -> None:
    """Check that rows ``[N, K]`` are probabilities."""
    if not probs.isfinite().all():
        raise ValueError("the probabilities contain NaN or infinity")
    if (probs < 0).any():
        raise ValueError(f"probabilities must not be negative, found {probs.min().item():.6g}")
    if not len(probs):
        return
    sums = probs.sum(1, dtype=torch.float64)
    tolerance = 1e-3 if probs.dtype.itemsize >= 4 else 2e-2
    if (sums - 1).abs().max() > tolerance:
        worst = sums[(sums - 1).abs().argmax()].item()
        raise ValueError(
            f"probabilities must sum to 1 over the classes (axis 1), found a sum of {worst:.6g}; "
            "pass probabilities, not logits or log-probabilities"
        )


def _nll(probs: Tensor, labels: Tensor) -> Tensor:
    return 0.0 - _logarithms(probs.gather(1, labels[:, None]))[:, 0]


def _brier(probs: Tensor, labels: Tensor) -> float:
    total = 0.0
    for part, chosen in blocks(probs, labels):
        distance = part.to(torch.float64, copy=True)
        distance.scatter_add_(1, chosen[:, None], torch.full_like(distance[:, :1], -1))
        total += float(distance.square_().sum())
    return total / len(labels)


def _log_probabilities(probs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Logarithms of probabilities, and labels."""
    probs, labels = checked_predictions(probs, labels)
    return _logarithms(probs), labels


def _logarithms(probs: Tensor) -> Tensor:
    """Of probabilities, in float64 and not below that of the smallest number of their own type."""
    return probs.to(torch.float64, copy=True).clamp_(min=torch.finfo(probs.dtype).tiny).log_()


def _scores(values: Any, name: str) -> Tensor:
    """A vector of finite numbers in float64 on the CPU."""
    scores = as_numbers(values, name)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name} must be a vector of at least one number, got shape {list(scores.shape)}")
    scores = scores.double().cpu()
    if not scores.isfinite().all():
        raise ValueError(f"{name} contains NaN or infinity")
    return scores


def _tensor(values: Any, name: str) -> Tensor:
    """Convert an argument to a tensor without gradients."""
    try:
        found = as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        kind = ValueError if isinstance(error, (ValueError, OverflowError)) else TypeError
        raise kind(
            f"expected {name} as a tensor, an array or lists of numbers, all rows of the same length; "
            f"got {_given(values)} ({error})"
        ) from error
    if found.is_complex() or found.layout != torch.strided or found.is_meta:
        raise TypeError(
            f"expected {name} as a dense tensor of real numbers, got {found.dtype} on {found.device}, {found.layout}"
        )
    return found


def as_numbers(values: Any, name: str) -> Tensor:
    """Do the same, and keep Python's numbers in float64."""
    found = _tensor(values, name)
    python = not isinstance(values, (Tensor, np.ndarray, np.generic)) and not hasattr(values, "to_numpy")
    if found.is_floating_point() and python:
        return torch.as_tensor(values, dtype=torch.float64).detach()
    return found


def _given(value: Any) -> str:
    """A short description of an argument, for errors."""
    text = type(value).__name__ if isinstance(value, (Tensor, np.ndarray)) else reprlib.repr(value)
    return f"{text} of shape {list(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else text


def torchmetrics_classification() -> Any:
    """The functions of torchmetrics, which this package needs and `import stochbn` does not."""
    try:
        from torchmetrics.functional import classification
    except ModuleNotFoundError as error:
        message = "stochbn.metrics needs torchmetrics: pip install 'stochbn[metrics]'"
        raise ModuleNotFoundError(message, name="torchmetrics") from error
    return classification
