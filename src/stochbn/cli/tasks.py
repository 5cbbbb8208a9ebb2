"""Scores of networks that give more or less than one class for each object: numbers, labels, and dense outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from stochbn.augment import Augment
    from stochbn.cli.subject import Subject
    from stochbn.distributed import Ranks
    from stochbn.posteriors import Posterior
    from stochbn.report.tables import Table

__all__ = ["Scored", "score_tasks", "tabulate"]

BATCH = 100
COLUMNS = {
    "regression": {
        "RMSE": ("rmse", 4, 1), "MAE": ("mae", 4, 1), "NLL": ("nll", 4, 1), "CRPS": ("crps", 4, 1),
        "in 90 % intervals, %": ("coverage", 1, 100), "their width": ("width", 4, 1),
    },
    "multilabel": {
        "error %": ("error", 2, 1), "NLL": ("nll", 4, 1), "Brier": ("brier", 4, 1), "ECE %": ("ece", 2, 100),
        "AUROC": ("auroc", 4, 1),
    },
    "dense": {
        "error %": ("error", 2, 1), "NLL": ("nll", 4, 1), "Brier": ("brier", 4, 1), "ECE %": ("ece", 2, 100),
    },
}  # fmt: skip
"""The columns of each sort's table: the score, its digits, and a factor."""


@dataclass(frozen=True)
class Scored:
    """Scores without and with SBN.

    Attributes:
        sort: ``regression``, ``multilabel`` or ``dense``.
        scores: of each method, by its name.
        change: what SBN changes in the mean loss of an object; None without a posterior.
        change_se: its standard error, paired over objects.
        loss: what the loss is: the NLL, or the squared error where a network says nothing of its uncertainty.
        errors: of few objects, the standard error of each method's NLL, or RMSE; none where objects count unlike.
    """

    sort: str
    scores: dict[str, dict[str, float]]
    change: float | None
    change_se: float | None
    loss: str
    errors: dict[str, float]


def score_tasks(
    subject: Subject,
    posterior: Posterior | None,
    data: Any,
    ranks: Ranks,
    *,
    draws: int,
    seed: int,
    augment: Augment | None,
    ignore: int | None,
    progress: Callable[[int, int], object],
) -> Scored:
    """Score a network without and, where there is a posterior, with SBN.

    `data` is the share of this rank; the scores are those of all ranks' data, the same on every rank.

    Raises:
        ValueError: labels that do not fit the network's output.
    """
    import torch

    from stochbn import Predictive
    from stochbn.report.tables import FEW_OBJECTS

    methods: dict[str, Any] = {"plain": Predictive(subject.model, **subject.settings)}
    if posterior is not None:
        methods["SBN"] = Predictive(subject.model, posterior, draws, augment=augment, **subject.settings)
    found, losses, sort, loss, done = {}, {}, "", "NLL", 0
    places: Tensor | None = None  # that count, of each object
    for name, predictive in methods.items():
        generator = torch.Generator().manual_seed(seed)

        def predictions(predictive: Any = predictive, generator: Any = generator) -> Iterator[tuple[Any, Tensor]]:
            nonlocal done
            for inputs, labels in data.batches(BATCH):
                yield predictive(inputs, generator=generator), labels
                done += len(labels)
                progress(done, len(methods) * len(data))

        task = subject.settings.get("task", "classification")
        if task == "regression":
            sort, (found[name], losses[name]) = "regression", _regression(predictions(), ranks)
            if "nll" not in found["plain"]:
                loss = "squared error"
        elif task == "multilabel":
            sort, (found[name], losses[name]) = "multilabel", _multilabel(predictions(), ranks)
        else:
            sort, (found[name], losses[name], places) = "dense", _dense(predictions(), ranks, ignore)
    errors = {}
    if ignore is None and 1 < len(losses["plain"]) <= FEW_OBJECTS:
        for name, each in losses.items():
            error = _standard_error(each)
            errors[name] = error if loss == "NLL" else error / max(2 * found[name]["rmse"], 1e-300)
    if posterior is None:
        return Scored(sort, found, None, None, loss, errors)
    change = losses["SBN"] - losses["plain"]
    weights = torch.ones_like(change) if places is None else places
    mean = (weights * change).sum() / weights.sum()
    # Of a ratio, as objects have different numbers of places that count.
    error = _standard_error(weights * (change - mean)) * len(change) / weights.sum().item()
    return Scored(sort, found, mean.item(), error, loss, errors)


def _standard_error(values: Tensor) -> float:
    """That of their mean; NaN for a single one."""
    return (values.double().var() / len(values)).sqrt().item() if len(values) > 1 else math.nan


def tabulate(scored: Scored, name: str) -> list[Table]:
    """The scores of data of a name, and what SBN changes."""
    from stochbn.report.tables import Table

    columns = COLUMNS[scored.sort]
    known = "nll" if scored.loss == "NLL" else "rmse"

    def cell(method: str, key: str, digits: int, factor: float) -> str:
        score = scored.scores[method].get(key, math.nan)
        if not math.isfinite(score):
            return "-"
        error = scored.errors.get(method, math.nan) if key == known else math.nan
        more = f" ± {factor * error:.{digits}f}" if math.isfinite(error) else ""
        return f"{factor * score:.{digits}f}{more}"

    rows = [[method, *(cell(method, *column) for column in columns.values())] for method in scored.scores]
    title = f"{name}; ± standard error" if scored.errors else name
    tables = [Table(title, ["method", *columns], rows)]
    if scored.change is not None and scored.change_se is not None:
        known_error = math.isfinite(scored.change_se)
        title = f"What SBN changes in the mean {scored.loss}"
        title += ", with its standard error paired over objects" if known_error else ""
        difference = f"{scored.change:+.4f}" + (f" ± {scored.change_se:.4f}" if known_error else "")
        tables.append(Table(title, ["method", "difference"], [["SBN", difference]]))
    return tables


def _regression(predictions: Iterator[tuple[Any, Tensor]], ranks: Ranks) -> tuple[dict[str, float], Tensor]:
    """Scores, and the loss of each object: the squared error, or the NLL where the network gives variances."""
    from stochbn import metrics

    batches: list[dict[str, Tensor]] = []
    for prediction, labels in predictions:
        if labels.numel() != prediction.mean.numel():
            shapes = list(prediction.mean.shape), list(labels.shape)
            raise ValueError(f"expected targets {shapes[0]}, as the network predicts, got {shapes[1]}")
        truth = labels.to(prediction.mean).reshape(prediction.mean.shape)
        batch = {
            "mean": prediction.mean,
            "std": prediction.total_std,
            "noise": prediction.noise_variance,
            "truth": truth,
        }
        batches.append({name: values.double().cpu() for name, values in batch.items()})
    mean, std, noise, truth = _joined(batches, ranks).values()
    each = (truth - mean).square().reshape(len(mean), -1).mean(1)
    if not (std > 0).all():
        return {"rmse": each.mean().sqrt().item(), "mae": (truth - mean).abs().mean().item()}, each
    scores = metrics.regression(mean, std, truth)
    if (noise > 0).all():
        each = metrics.gaussian_nll_of_each(mean, std, truth).reshape(len(mean), -1).mean(1)
    return scores, each


def _multilabel(predictions: Iterator[tuple[Any, Tensor]], ranks: Ranks) -> tuple[dict[str, float], Tensor]:
    import torch

    from stochbn import metrics

    batches = [
        {"probs": p.probs.cpu(), "labels": y.reshape(p.probs.shape) if y.numel() == p.probs.numel() else y}
        for p, y in predictions
    ]
    probs, labels = _joined(batches, ranks).values()
    scores = metrics.multilabel(probs, labels)
    right = torch.where(labels > 0, probs, 1 - probs).double().clamp(min=torch.finfo(probs.dtype).tiny)
    return scores, -right.log().mean(1)


def _joined(batches: list[dict[str, Tensor]], ranks: Ranks) -> dict[str, Tensor]:
    """The tensors of all batches of all ranks behind each other."""
    import torch

    return ranks.joined({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})


def _dense(
    predictions: Iterator[tuple[Any, Tensor]], ranks: Ranks, ignore: int | None
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Scores of all places together, which are added up batch by batch; of each object the mean NLL, and its places."""
    import torch

    from stochbn import metrics

    keys = ("error", "nll", "brier")
    rows = []  # of each object its places, and their mean scores
    counts = torch.zeros(3, metrics.BINS, dtype=torch.float64)
    for prediction, labels in predictions:
        probs = prediction.probs.movedim(prediction.class_axis, 1).cpu()
        counted = torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels != ignore
        for one, truth, mask in zip(probs, labels, counted, strict=True):
            if not mask.any():
                continue
            scores = metrics.evaluate(one[None], truth[None], ignore_index=ignore)
            rows.append([float(mask.sum()), *(scores[key] for key in keys)])
            confidence, predicted = (values[mask] for values in one.double().max(0))
            bins = (confidence.clamp(max=1 - 2**-53) * metrics.BINS).long()
            right = (predicted == truth[mask]).double()
            for row, values in enumerate((torch.ones_like(right), confidence, right)):
                counts[row].index_add_(0, bins, values)
    each = torch.tensor(rows, dtype=torch.float64).view(-1, 1 + len(keys))
    places, *values = ranks.joined({"each": each})["each"].unbind(1)
    if not len(places):
        raise ValueError("there is nothing to evaluate: no place has a label that counts")
    counts = ranks.total(counts)
    scores = {key: ((places * one).sum() / places.sum()).item() for key, one in zip(keys, values, strict=True)}
    scores["ece"] = ((counts[1] - counts[2]).abs().sum() / places.sum()).item()
    return scores, values[keys.index("nll")], places
