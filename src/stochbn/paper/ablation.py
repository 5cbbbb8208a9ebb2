"""What of SBN does what: the centre of the statistics, their noise, its size, and what the posterior was fitted on.

For every plain network of a finished run, the methods below predict all test images; `tabulate` compares each with the
plain network on the same images, for single networks and for all as an ensemble.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stochbn.metrics as metrics
from stochbn.evaluation.predicting import on_accelerator, predict_all
from stochbn.files import check_folder, read_tensors, write_bytes, write_json, write_tensors
from stochbn.measuring.goodness import observe
from stochbn.metrics.differences import paired
from stochbn.network.fingerprint import Fingerprint
from stochbn.paper.recipes import Member, Recipe
from stochbn.paper.report import read_recipe
from stochbn.paper.runner import PREDICTIONS, load_parts
from stochbn.paper.training import augmented
from stochbn.posteriors import KINDS, FactorizedLog, Posterior
from stochbn.predictions import entropy
from stochbn.predictive import Predictive
from stochbn.report.tables import Table
from stochbn.sources import architectures, checkpoints
from stochbn.sources.named import Images

__all__ = ["ablate", "methods_of", "tabulate"]

ABLATION = "stochbn.ablation/1"
FIT_IMAGES = 8192
"""Training images that posteriors are fitted to, at most: 512 mini-batches of 16."""
SIZES = (4, 64)
"""Sizes of mini-batches whose noise is tried beside that of the fitted ones."""

Fit = Callable[..., Posterior]


def methods_of(recipe: Recipe) -> dict[str, Callable[[Fit, nn.Module], Posterior]]:
    """The methods, each by what it predicts with: a posterior, given how to fit one to the network.

    ``fit(kind)`` fits to training images as they are; ``on_augmented=True`` to images as training with augmentation
    shows them, ``drawn="convolutions"`` leaves the batch norms of linear layers as they are.
    """

    def logarithmic(fit: Fit, **settings: Any) -> FactorizedLog:
        posterior = fit("factorized-log", **settings)
        assert isinstance(posterior, FactorizedLog)
        return posterior

    found: dict[str, Callable[[Fit, nn.Module], Posterior]] = {
        "centre of moments, no noise": lambda fit, model: fit("factorized").rescale(math.inf),
        "median, no noise": lambda fit, model: logarithmic(fit).median(),
        "factorized": lambda fit, model: fit("factorized"),
        "factorized, about running statistics": lambda fit, model: fit("factorized").recentre(model),
        "factorized-log": lambda fit, model: fit("factorized-log"),
        "joint": lambda fit, model: fit("joint"),
        "joint, about running statistics": lambda fit, model: fit("joint").recentre(model),
    }
    for size in SIZES:
        found[f"factorized, noise of {size}"] = lambda fit, model, size=size: fit("factorized").rescale(size)  # type: ignore[misc]
        found[f"joint, noise of {size}"] = lambda fit, model, size=size: fit("joint").rescale(size)  # type: ignore[misc]
    if recipe.augment:
        found["median, no noise, fitted on augmented"] = lambda fit, model: logarithmic(fit, on_augmented=True).median()
        found["factorized-log, fitted on augmented"] = lambda fit, model: fit("factorized-log", on_augmented=True)
        found["joint, fitted on augmented"] = lambda fit, model: fit("joint", on_augmented=True)
    if recipe.network == "lenet5":
        found["factorized-log, convolutions alone"] = lambda fit, model: fit("factorized-log", drawn="convolutions")
        found["joint, convolutions alone"] = lambda fit, model: fit("joint", drawn="convolutions")
    return found


def ablate(
    folder: Path,
    *,
    members: int | None = None,
    images: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Table]:
    """Make the predictions that are not there yet, and write and return the tables.

    Every member's are in its folder, as ``ablation.safetensors``, written when all of its methods are done.

    Args:
        folder: a finished run.
        members: how many of its plain networks; None is all of them.
        images: test images of known, and of unknown, classes to predict, at most: the first ones. None is all.
        progress: called with the number of predictions made and of all.

    Raises:
        FileNotFoundError: this is no run folder, or a network or its predictions are missing.
        ValueError: a file is damaged or of an ablation with another number of images; the run has fewer networks.
        OSError: the folder cannot be written.
    """
    check_folder(folder, "ablation.json", "ablation.md")
    recipe = read_recipe(folder)
    chosen = _members(recipe, members)
    for member in chosen:  # refused before the work, not after it
        read_tensors(folder / member.name / "predictions.safetensors", PREDICTIONS)
    methods = methods_of(recipe)
    waiting = [member for member in chosen if not _file(folder, member).exists()]
    for member in chosen:
        if member not in waiting:
            _stored(folder, member, images)
    done, total = (len(chosen) - len(waiting)) * len(methods), len(chosen) * len(methods)
    progress(done, total)
    parts = load_parts(recipe) if waiting else {}
    for part in {"known", "unknown"} & parts.keys():
        parts[part] = parts[part].take(torch.arange(min(len(parts[part]), images or len(parts[part]))))
    for member in waiting:
        tensors: dict[str, Tensor] = {}
        model = on_accelerator(checkpoints.load(folder / member.name / "network.safetensors").model)
        fit = _fit(recipe, member, model, parts["train"])
        for name, make in methods.items():
            posterior = make(fit, model)
            draws = 1 if posterior.batch_size == math.inf else recipe.draws
            generator = torch.Generator().manual_seed(recipe.schedule(member).seed)
            for part in ("known", "unknown"):
                if part in parts:
                    predictor = Predictive(model, posterior, draws, tolerance=0)
                    tensors[f"{name}.{part}"] = predict_all(predictor, parts[part], generator).probs.log().cpu()
            done += 1
            progress(done, total)
        write_tensors(_file(folder, member), ABLATION, tensors, {"member": member.name, "images": images})
    return tabulate(folder, members=members, images=images)


def _members(recipe: Recipe, plain: int | None) -> list[Member]:
    """The networks to compare; the run has at least so many plain ones."""
    if plain is not None and not 1 <= plain <= recipe.members:
        raise ValueError(f"the run has {recipe.members} plain networks, {plain} were asked for")
    return [member for member in recipe.all_members() if member.kind == "plain"][:plain]


def _stored(folder: Path, member: Member, images: int | None) -> dict[str, Tensor]:
    """A member's log-probabilities, by method and part."""
    file = _file(folder, member)
    tensors, about = read_tensors(file, ABLATION)
    if about["images"] != images:
        raise ValueError(
            f"{str(file)!r} is of {about['images'] or 'all'} images of each kind, {images or 'all'} were asked for; "
            "delete the files 'ablation.safetensors' in the run folder, or ask for as many"
        )
    return tensors


def _file(folder: Path, member: Member) -> Path:
    return folder / member.name / "ablation.safetensors"


def _fit(recipe: Recipe, member: Member, model: nn.Module, images: Images) -> Fit:
    """How posteriors are fitted to a network; what several of them are fitted to is observed once."""
    seed = recipe.schedule(member).seed
    images = images.shuffled(seed).take(torch.arange(min(len(images), FIT_IMAGES)))
    linear = architectures.batch_norms_of_linear_layers(model)
    fingerprint = Fingerprint.of(model)

    @functools.cache
    def observed(on_augmented: bool, drawn: str) -> dict[str, Tensor]:
        shown = augmented(images, seed) if on_augmented else images
        ordinary = linear if drawn == "convolutions" else []
        return observe(model, shown, recipe.statistics_batch, seed, deterministic=ordinary)

    def fit(kind: str, on_augmented: bool = False, drawn: str = "all") -> Posterior:
        statistics = observed(on_augmented, drawn)
        accumulator = KINDS[kind].accumulator()
        for rows in zip(*statistics.values(), strict=True):
            accumulator.update({layer: row[None].double() for layer, row in zip(statistics, rows, strict=True)})
        posterior: Posterior = accumulator.posterior(
            batch_size=recipe.statistics_batch,
            skipped=dict.fromkeys(linear, "deterministic") if drawn == "convolutions" else {},
            fingerprint=fingerprint,
        )
        return posterior

    return fit


def tabulate(folder: Path, *, members: int | None = None, images: int | None = None) -> list[Table]:
    """Write ``ablation.json`` and ``ablation.md`` into a run folder, from stored predictions, and return the tables.

    Scores of single networks are means over them, and so are the differences from the plain network; the standard error
    of a difference is that of its mean over all networks and objects, paired object by object.

    Args:
        folder: the run.
        members: as for `ablate`.
        images: likewise.

    Raises:
        FileNotFoundError, ValueError: predictions are missing or damaged.
        OSError: the folder cannot be written.
    """
    recipe = read_recipe(folder)
    predictions: list[dict[str, Tensor]] = []
    labels = torch.empty(0)
    for member in _members(recipe, members):
        stored, _ = read_tensors(folder / member.name / "predictions.safetensors", PREDICTIONS)
        labels = stored["labels"][:images]
        found = _stored(folder, member, images)
        plain = {key: value[:images] for key, value in stored.items() if key in ("plain.known", "plain.unknown")}
        predictions.append({key: value.exp() for key, value in {**plain, **found}.items()})
    names = ["plain", *methods_of(recipe)]
    several = len(predictions) > 1
    compared = {"single networks" if several else "one network": [[one] for one in predictions]}
    if several:
        compared[f"ensemble of {len(predictions)}"] = [predictions]
    rows = {what: {name: _scores(name, groups, labels) for name in names} for what, groups in compared.items()}
    data = f"{recipe.network} on {recipe.data}, {len(labels)} objects"
    shown = [_table(f"{data}: {what}", scores) for what, scores in rows.items()]
    write_json(folder / "ablation.json", {"recipe": recipe.as_dict(), "objects": len(labels), "scores": rows})
    write_bytes(folder / "ablation.md", "\n\n".join(table.markdown() for table in shown).encode() + b"\n")
    return shown


def _scores(name: str, several: Sequence[Sequence[Mapping[str, Tensor]]], labels: Tensor) -> dict[str, float]:
    """The mean scores of a method over several ensembles, which may be of one network each, and what it changes."""
    rows = [_score(_mean(members, name), _mean(members, "plain"), labels) for members in several]
    found = {key: statistics.mean(row[key] for row in rows) for key in rows[0] if not key.endswith("_se")}
    if name != "plain" and len(rows) > 1:
        # Networks see the same objects: differences are averaged over networks first, then over objects.
        nll = [
            metrics.nll_of_each(_mean(m, name)["known"], labels)
            - metrics.nll_of_each(_mean(m, "plain")["known"], labels)
            for m in several
        ]
        found["nll_change_se"] = _error_of_mean(torch.stack(nll).mean(0))
        for key in ("calibrated_nll_change", "auroc_change"):
            if key in found:
                found[f"{key}_se"] = statistics.stdev(row[key] for row in rows) / math.sqrt(len(rows))
    else:
        found |= {key: value for key, value in rows[0].items() if key.endswith("_se")}
    return found


def _score(probs: Mapping[str, Tensor], plain: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
    found = metrics.evaluate(probs["known"], labels)
    best = metrics.calibrated_nll(probs["known"], labels)
    found |= {"calibrated_nll": best["nll"], "temperature": best["temperature"]}
    calibrated = (
        metrics.calibrated_nll_of_each(plain["known"], labels),
        metrics.calibrated_nll_of_each(probs["known"], labels),
    )
    unknown = None
    if "unknown" in probs:
        found |= metrics.ood(entropy(probs["known"]), entropy(probs["unknown"]))
        unknown = plain["unknown"], probs["unknown"]
    return found | paired((plain["known"], probs["known"]), labels, unknown, calibrated)


def _mean(members: Sequence[Mapping[str, Tensor]], name: str) -> dict[str, Tensor]:
    parts = [part for part in ("known", "unknown") if f"{name}.{part}" in members[0]]
    return {part: torch.stack([member[f"{name}.{part}"] for member in members]).mean(0) for part in parts}


def _error_of_mean(values: Tensor) -> float:
    return math.sqrt(values.var().item() / len(values))


def _table(title: str, scores: Mapping[str, Mapping[str, float]]) -> Table:
    def change(row: Mapping[str, float], key: str) -> str:
        if f"{key}_se" not in row:
            return "-"
        return f"{row[key]:+.4f} ± {row[f'{key}_se']:.4f}"

    rows = [
        [
            name,
            f"{row['error']:.2f}",
            f"{row['nll']:.4f}",
            change(row, "nll_change") if name != "plain" else "-",
            f"{row['calibrated_nll']:.4f}",
            change(row, "calibrated_nll_change") if name != "plain" else "-",
            f"{row['temperature']:.2f}",
            f"{100 * row['ece']:.2f}",
            f"{row['auroc']:.4f}" if "auroc" in row else "-",
        ]
        for name, row in scores.items()
    ]
    columns = ["method", "error %", "NLL", "from plain", "calibrated NLL", "from plain", "best T", "ECE %", "AUROC"]
    return Table(title, columns, rows)
