"""Which distribution over the statistics, and with how much noise: a comparison on the networks of a finished run.

For some of its plain networks, posteriors of every kind are fitted to the training images, as they come out and with
their noise calibrated on the images that the run held out; exact inference is made on a part of the test images.
Networks trained in bfloat16 predict in it too. With an augmentation, every draw changes its input too, and the
folders are called ``comparison-augmented``.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stochbn
import stochbn.augment as augment
from stochbn.evaluation.fitting import fit_posterior
from stochbn.evaluation.predicting import PREDICT_BATCH, predict_all
from stochbn.paper import figures
from stochbn.paper.recipes import Member
from stochbn.paper.study import COLUMNS, Made, Rows, Study, cell, divergence, ensembles, score_all, table
from stochbn.posteriors import Posterior
from stochbn.predictive import Predictor
from stochbn.report.tables import Table, write_tables
from stochbn.sources.named import Images

__all__ = ["METHODS", "Settings", "compare", "draw", "tabulate"]

METHODS = (
    "factorized", "joint", "empirical", "factorized, calibrated", "joint, calibrated", "empirical, calibrated",
    "joint, recentred", "joint, recentred, calibrated",
)  # fmt: skip
"""Kinds of posteriors: as fitted, about the network's running statistics, with the noise best for held-out images."""


@dataclass(frozen=True)
class Settings:
    """How much is compared.

    Attributes:
        members: how many of the run's plain networks; each is a seed.
        draws: of every method.
        fit_images: training images to fit posteriors to, at most.
        held_out: held-out images to calibrate on, at most.
        unknown: unknown images to predict, at most.
        exact: known images for exact inference, which is made where inputs are not augmented.
        augment: the augmentation of fits, calibration and predictions, as `stochbn.augment.named` takes it; empty for
            none.
    """

    members: int = 3
    draws: int = 50
    fit_images: int = 8192
    held_out: int = 2000
    unknown: int = 2000
    exact: int = 1000
    augment: str = ""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "augment" and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.augment:
            augment.named(self.augment)  # refuses what cannot be

    @property
    def name(self) -> str:
        """Of the folders and files that a comparison has."""
        return "comparison-augmented" if self.augment else "comparison"

    @property
    def methods(self) -> tuple[str, ...]:
        """What is compared."""
        return METHODS if self.augment else (*METHODS, "exact")


def compare(
    folder: Path, settings: Settings, *, jobs: int = 1, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Table]:
    """Make the predictions of a comparison that are not there yet, and write and return its tables.

    Args:
        folder: a finished run whose recipe held images out.
        settings: how much to compare.
        jobs: networks side by side.
        progress: called with the number of predictions made and of all.

    Raises:
        FileNotFoundError: this is no run folder, or a network is missing.
        ValueError: the run held nothing out, has fewer networks, or holds a comparison with other settings.
        ProcessError: a process failed.
        OSError: the folder cannot be written.
    """
    study = _study(folder, settings)
    if study.recipe.evaluate_on != "test":
        raise ValueError(
            f"{str(folder)!r} was evaluated on its held-out images, so there are none left to calibrate on; make a run "
            "that is evaluated on test images"
        )
    study.plain(None, None)  # of ensembles: refused before the work, not after it
    methods = dict.fromkeys(study.members[: settings.members], settings.methods)
    study.make(methods, _predict, jobs=jobs, progress=progress)
    return tabulate(folder, settings)


def _study(folder: Path, settings: Settings) -> Study:
    return Study.of(folder, settings.name, asdict(settings), _relevant, networks=settings.members, calibrates=True)


def _relevant(settings: Mapping[str, Any], method: str) -> dict[str, Any]:
    return {"augment": "", **settings, "members": None}


def _predict(study: Study, member: Member, methods: Sequence[str], parts: Mapping[str, Images]) -> Iterator[Made]:
    settings, recipe = Settings(**study.settings), study.recipe
    model, seed = study.network(member), recipe.schedule(member).seed
    train = parts["train"].shuffled(seed).first(settings.fit_images)
    views = augment.named(settings.augment) if settings.augment else None
    device = next(model.parameters()).device.type
    arithmetic = torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16-mixed")

    @functools.cache
    def fitted(kind: str) -> Posterior:
        return fit_posterior(model, train, recipe.statistics_batch, seed, kind=kind, augment=views)

    for method in methods:
        about: dict[str, Any] = {}
        most = {"known": len(parts["known"]), "unknown": settings.unknown}
        predictor: Predictor
        if method == "exact":
            batches = (inputs for inputs, _ in train.batches(64 * (recipe.statistics_batch - 1)))
            predictor = stochbn.Exact(model, batches, recipe.statistics_batch, settings.draws)
            most = {part: min(count, settings.exact) for part, count in most.items()}
        else:
            kind, *changes = method.split(", ")
            posterior = fitted(kind)
            if "recentred" in changes:
                posterior = posterior.recentre(model)
            if "calibrated" in changes:
                held_out = parts["held-out"].first(settings.held_out).batches(PREDICT_BATCH)
                own = recipe.statistics_batch
                sizes = [own / 4, own / 2, own, 2 * own, 4 * own, math.inf]
                with arithmetic:
                    posterior = stochbn.calibrate(
                        model, posterior, held_out, batch_sizes=sizes, temperature=False, augment=views, seed=seed
                    )
            about["batch_size"] = posterior.batch_size
            predictor = stochbn.Predictive(model, posterior, settings.draws, tolerance=0, augment=views)
        generator = torch.Generator().manual_seed(seed)
        with arithmetic:
            tensors = {
                part: predict_all(predictor, parts[part].first(count), generator).probs.log().cpu()
                for part, count in most.items()
                if part in parts
            }
        yield method, tensors, about


def tabulate(folder: Path, settings: Settings) -> list[Table]:
    """Write the tables and the figure of a comparison into its run folder, from its stored predictions.

    ``comparison.json`` has every number, ``comparison.md`` the tables, ``comparison.png`` and ``.svg`` the methods'
    calibrated NLL between those of ensembles. With an augmentation they are called ``comparison-augmented``.

    Raises:
        FileNotFoundError, ValueError: predictions are missing, or of other settings.
    """
    study = _study(folder, settings)
    chosen = study.members[: settings.members]
    plain, labels = study.plain(None, settings.unknown)
    methods = {method: [study.read(member, method) for member in chosen] for method in settings.methods}
    exact = methods.pop("exact", [])
    methods = {"plain": plain[: settings.members], **methods}
    yardstick = ensembles(plain, settings.members)
    rows = score_all(methods, yardstick, labels)
    for method in METHODS:
        for row, member in zip(rows[method], chosen, strict=True):
            row["batch_size"] = (study.stored(member, method) or ({}, {}))[1]["batch_size"]
    near = _beside(exact, methods, yardstick, labels) if exact else {}
    drawn = f", input drawn too ({settings.augment})" if settings.augment else ""
    data = f"{study.recipe.network} on {study.recipe.data}, {len(labels)} images{drawn}"
    several = settings.members > 1
    title = f"{data}: {f'mean and standard deviation over {settings.members} networks' if several else 'one network'}"
    beside = f"The first {len(exact[0]['known'])} images, on which inference was exact too" if exact else ""
    about = {
        "settings": dict(study.settings), "recipe": study.recipe.as_dict(), "methods": rows, "beside_exact": near
    }  # fmt: skip
    write_tables(folder / settings.name, about, _tables(title, beside, rows, near, spread=True))
    draw(folder, settings.name, about)
    return _tables(title, beside, rows, near, spread=False)


def draw(folder: Path, name: str, about: Mapping[str, Any]) -> list[Path]:
    """Draw the figure of what the JSON file of a comparison holds into a folder.

    Args:
        folder: where to.
        name: of the files, without an ending.
        about: what it holds.
    """
    nlls = {method: [row["calibrated_nll"] for row in rows] for method, rows in about["methods"].items()}
    reached = [statistics.mean(values) for method, values in nlls.items() if method.startswith("ensemble")]
    methods = {method: values for method, values in nlls.items() if not method.startswith("ensemble")}
    recipe, drawn = about["recipe"], about["settings"].get("augment")
    title = f"{recipe['network']} on {recipe['data']}{f', input drawn too ({drawn})' if drawn else ''}"
    return figures.save_equivalents(folder / name, methods, reached, title=title)


def _beside(
    exact: Sequence[Mapping[str, Tensor]],
    methods: Mapping[str, Sequence[Mapping[str, Tensor]]],
    yardstick: Mapping[str, Sequence[Mapping[str, Tensor]]],
    labels: Tensor,
) -> dict[str, list[dict[str, float]]]:
    """The scores on the images on which inference was exact too, and how far predictions are from it."""

    def first(every: Mapping[str, Sequence[Mapping[str, Tensor]]]) -> dict[str, list[dict[str, Tensor]]]:
        return {name: [{k: p[k][: len(e)] for k, e in exact[0].items()} for p in one] for name, one in every.items()}

    few = {**first(methods), "exact": [dict(probs) for probs in exact]}
    near = score_all(few, first(yardstick), labels[: len(exact[0]["known"])])
    for name, each in few.items():
        for row, probs, e in zip(near[name], each, exact, strict=True):
            row["kl"] = divergence(e["known"], probs["known"])
    return near


def _tables(title: str, beside: str, rows: Rows, near: Rows, *, spread: bool) -> list[Table]:
    """All methods on all images, and beside exact inference on some; with standard deviations, or narrower."""

    def noise(name: str) -> str:
        sizes = {row["batch_size"] for row in rows[name] if "batch_size" in row}
        return "/".join(f"{size:g}" for size in sorted(sizes)) or "-"

    noise_of = {"noise of": noise}
    if spread:
        shown = [table(title, rows, list(COLUMNS), spread=True, more=noise_of)]
    else:
        quality = table(title, rows, ("error %", "NLL", "calibrated NLL", "ECE %", "best T", "DEE"), more=noise_of)
        uses = ("AURC %", "AUROC", "FPR95 %")
        shown = [quality, table("Selective prediction, and detection of the unknown", rows, uses, more=noise_of)]
    if near:
        far = {"KL to exact": lambda name: cell(near[name], "kl", 5, 1.0, spread)}
        shown.append(table(beside, near, ("NLL", "ECE %", "best T", "AUROC"), spread=spread, more=far))
    return shown
