"""What of SBN does what: the centre of the statistics, their noise, its size, and what the posterior was fitted on.

For every plain network of a finished run, the methods below predict all test images; `tabulate` compares each with the
plain network on the same images, for single networks and for all as an ensemble.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stochbn.metrics as metrics
from stochbn.evaluation.predicting import predict_all
from stochbn.measuring.goodness import observe
from stochbn.metrics.differences import paired
from stochbn.network.fingerprint import Fingerprint
from stochbn.paper.recipes import Member, Recipe
from stochbn.paper.study import Made, Study, mixture, score
from stochbn.paper.training import augmented
from stochbn.posteriors import KINDS, FactorizedLog, Posterior
from stochbn.predictive import Predictive
from stochbn.report.tables import Table, write_tables
from stochbn.sources import architectures
from stochbn.sources.named import Images

__all__ = ["ablate", "methods_of", "tabulate"]

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

    Args:
        folder: a finished run.
        members: how many of its plain networks; None is all of them.
        images: test images of known, and of unknown, classes to predict, at most: the first ones. None is all.
        progress: called with the number of predictions made and of all.

    Raises:
        FileNotFoundError: this is no run folder, or a network or its predictions are missing.
        ValueError: a file is damaged, of an earlier version, or of an ablation with another number of images; the run
            has fewer networks.
        OSError: the folder cannot be written.
    """
    study = _study(folder, members, images)
    chosen = study.members[:members]
    for member in chosen:
        if (file := folder / member.name / "ablation.safetensors").exists():
            raise ValueError(
                f"{str(file)!r} is of an earlier version, whose ablations are read no more: delete it, and the "
                "predictions are made again"
            )
    methods = list(methods_of(study.recipe))
    study.make(dict.fromkeys(chosen, methods), _predict, progress=progress)
    return tabulate(folder, members=members, images=images)


def _study(folder: Path, members: int | None, images: int | None) -> Study:
    return Study.of(folder, "ablation", {"images": images}, _relevant, networks=members, calibrates=False)


def _relevant(settings: Mapping[str, Any], method: str) -> Mapping[str, Any]:
    return settings


def _predict(study: Study, member: Member, methods: Sequence[str], parts: Mapping[str, Images]) -> Iterator[Made]:
    recipe, images = study.recipe, study.settings["images"]
    model, every = study.network(member), methods_of(recipe)
    fit = _fit(recipe, member, model, parts["train"])
    for name in methods:
        posterior = every[name](fit, model)
        draws = 1 if posterior.batch_size == math.inf else recipe.draws
        predictor = Predictive(model, posterior, draws, tolerance=0)
        generator = torch.Generator().manual_seed(recipe.schedule(member).seed)
        shown = {part: parts[part].first(images or len(parts[part])) for part in ("known", "unknown") if part in parts}
        yield name, {part: predict_all(predictor, few, generator).probs.log().cpu() for part, few in shown.items()}, {}


def _fit(recipe: Recipe, member: Member, model: nn.Module, images: Images) -> Fit:
    """How posteriors are fitted to a network; what several of them are fitted to is observed once."""
    seed = recipe.schedule(member).seed
    images = images.shuffled(seed).first(FIT_IMAGES)
    linear = architectures.batch_norms_of_linear_layers(model)
    fingerprint = Fingerprint.of(model)

    @functools.cache
    def observed(on_augmented: bool, drawn: str) -> dict[str, Tensor]:
        shown = augmented(images, seed) if on_augmented else images
        ordinary = linear if drawn == "convolutions" else []
        return observe(model, shown, recipe.statistics_batch, seed, deterministic=ordinary)

    def fit(kind: str, on_augmented: bool = False, drawn: str = "all") -> Posterior:
        found = observed(on_augmented, drawn)
        accumulator = KINDS[kind].accumulator()
        for rows in zip(*found.values(), strict=True):
            accumulator.update({layer: row[None].double() for layer, row in zip(found, rows, strict=True)})
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
    of a difference is that of its mean over all networks and images, paired image by image.

    Args:
        folder: the run.
        members: as for `ablate`.
        images: likewise.

    Raises:
        FileNotFoundError, ValueError: predictions are missing or damaged.
        OSError: the folder cannot be written.
    """
    study = _study(folder, members, images)
    recipe, chosen = study.recipe, study.members[:members]
    plain, labels = study.plain(images, images)
    methods = {"plain": plain[:members]} | {
        name: [study.read(member, name) for member in chosen] for name in methods_of(recipe)
    }
    groups: dict[str, list[slice]] = {"one network": [slice(None)]}
    if len(chosen) > 1:
        single = [slice(i, i + 1) for i in range(len(chosen))]
        groups = {"single networks": single, f"ensemble of {len(chosen)}": [slice(None)]}
    rows = {}
    for what, parts in groups.items():
        averaged = {name: [mixture(every[part]) for part in parts] for name, every in methods.items()}
        rows[what] = {name: _scores(found, averaged["plain"], labels) for name, found in averaged.items()}
    data = f"{recipe.network} on {recipe.data}, {len(labels)} images"
    shown = [_table(f"{data}: {what}", scores) for what, scores in rows.items()]
    about = {"recipe": recipe.as_dict(), "objects": len(labels), "scores": rows}
    write_tables(folder / "ablation", about, shown)
    return shown


def _scores(
    found: Sequence[Mapping[str, Tensor]], plain: Sequence[Mapping[str, Tensor]], labels: Tensor
) -> dict[str, float]:
    """The mean scores of a method over networks, or over one ensemble, and what it changes."""
    rows = [score(probs, labels) | _changes(probs, before, labels) for probs, before in zip(found, plain, strict=True)]
    means = {key: statistics.mean(row[key] for row in rows) for key in rows[0] if not key.endswith("_se")}
    if len(rows) == 1 or found is plain:
        return means | {key: value for key, value in rows[0].items() if key.endswith("_se")}
    # Networks see the same images: differences are averaged over networks first, then over images.
    each = [
        metrics.nll_of_each(probs["known"], labels) - metrics.nll_of_each(before["known"], labels)
        for probs, before in zip(found, plain, strict=True)
    ]
    change = torch.stack(each).mean(0)
    means["nll_change_se"] = math.sqrt(change.var().item() / len(change))
    for key in ("calibrated_nll_change", "auroc_change"):
        if key in means:
            means[f"{key}_se"] = statistics.stdev(row[key] for row in rows) / math.sqrt(len(rows))
    return means


def _changes(probs: Mapping[str, Tensor], plain: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
    """What a method changes from the plain network."""
    before, after = (metrics.calibrated_nll_of_each(one["known"], labels) for one in (plain, probs))
    unknown = (plain["unknown"], probs["unknown"]) if "unknown" in probs else None
    return paired((plain["known"], probs["known"]), labels, unknown, (before, after))


def _table(title: str, scores: Mapping[str, Mapping[str, float]]) -> Table:
    def change(name: str, key: str) -> str:
        row = scores[name]
        return f"{row[key]:+.4f} ± {row[f'{key}_se']:.4f}" if name != "plain" and f"{key}_se" in row else "-"

    rows = [
        [
            name,
            f"{row['error']:.2f}",
            f"{row['nll']:.4f}",
            change(name, "nll_change"),
            f"{row['calibrated_nll']:.4f}",
            change(name, "calibrated_nll_change"),
            f"{row['temperature']:.2f}",
            f"{100 * row['ece']:.2f}",
            f"{row['auroc']:.4f}" if "auroc" in row else "-",
        ]
        for name, row in scores.items()
    ]
    columns = ["method", "error %", "NLL", "from plain", "calibrated NLL", "from plain", "best T", "ECE %", "AUROC"]
    return Table(title, columns, rows)
