"""Which distribution over the statistics, and with how much noise: a comparison on the networks of a finished run.

For some of its plain networks, posteriors of every kind are fitted to the training images, as they come out and with
their noise calibrated on the images that the run held out. Each, and exact inference on a part of the objects, leaves
its predictions in the member's folder, under ``comparison``; `tabulate` reads these alone. Networks trained in bfloat16
predict in it too. With an augmentation, every draw changes its input too, and the folder is ``comparison-augmented``.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stochbn
import stochbn.augment as augment
from stochbn.evaluation.fitting import fit_posterior
from stochbn.evaluation.predicting import PREDICT_BATCH, on_accelerator, predict_all
from stochbn.files import check_folder, read_tensors, write_bytes, write_json, write_tensors
from stochbn.paper import figures
from stochbn.paper.recipes import Recipe
from stochbn.paper.report import read_recipe
from stochbn.paper.runner import PREDICTIONS, load_parts, packed, unpacked
from stochbn.paper.scores import divergence, mixture, score_all
from stochbn.paper.training import keep_freed_memory
from stochbn.predictive import Predictor
from stochbn.processes import ProcessError, interrupts_held
from stochbn.report.tables import Table
from stochbn.sources import checkpoints
from stochbn.sources.named import Images

__all__ = ["METHODS", "Settings", "compare", "draw", "tabulate"]

COMPARISON = "stochbn.comparison/1"
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
        unknown: unknown objects to predict, at most.
        exact: known objects for exact inference, which is made where inputs are not augmented.
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
    check_folder(folder, *(f"{settings.name}.{ending}" for ending in ("json", "md", "png", "svg")))
    recipe = read_recipe(folder)
    if not recipe.held_out:
        raise ValueError(
            f"{str(folder)!r} is a run that trained on all images, so there are none to calibrate on; make one with "
            "--held-out 0.1"
        )
    if recipe.members < settings.members:
        raise ValueError(f"{str(folder)!r} has {recipe.members} plain networks, {settings.members} were asked for")
    if recipe.evaluate_on != "test":
        raise ValueError(
            f"{str(folder)!r} was evaluated on its held-out images, so there are none left to calibrate on; make a run "
            "that is evaluated on test images"
        )
    plain = [member.name for member in recipe.all_members() if member.kind == "plain"]
    for name in plain:  # refused before the work, not after it
        read_tensors(folder / name / "predictions.safetensors", PREDICTIONS)
    names = plain[: settings.members]
    for name in names:
        check_folder(folder / name / settings.name)
    tasks = [(name, method) for name in names for method in settings.methods]
    waiting = [task for task in tasks if _stored(folder, *task, settings) is None]
    progress(len(tasks) - len(waiting), len(tasks))
    if waiting:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        start = threads, packed(load_parts(recipe))
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start, start) as pool:
            started: list[BaseProcess] = []
            try:
                with interrupts_held():
                    others = multiprocessing.active_children()
                    running = [pool.submit(_predict, folder, recipe, settings, *task) for task in waiting]
                    started = [process for process in multiprocessing.active_children() if process not in others]
                for done, future in enumerate(as_completed(running), start=1):
                    future.result()
                    progress(len(tasks) - len(waiting) + done, len(tasks))
            except Exception as error:
                pool.shutdown(cancel_futures=True)
                raise ProcessError(f"the comparison failed, run again to continue: {error}") from error
            except BaseException:  # Ctrl-C, which the processes do not see
                for process in started:
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                raise
    return tabulate(folder, settings)


_parts: dict[str, Images] = {}


def _start(threads: int, data: dict[str, Any]) -> None:
    """Give a process its data once, for all of its tasks."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    _parts.update(unpacked(data))


def _file(folder: Path, member: str, method: str, settings: Settings) -> Path:
    return folder / member / settings.name / f"{method.replace(', ', '-')}.safetensors"


def _stored(
    folder: Path, member: str, method: str, settings: Settings
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """A method's log-probabilities and what is noted beside them, if they are there."""
    file = _file(folder, member, method, settings)
    if not file.exists():
        return None
    tensors, about = read_tensors(file, COMPARISON)
    stored = {"augment": "", **about["settings"], "members": settings.members}  # others do not matter to this one
    if stored != asdict(settings):
        raise ValueError(
            f"{str(file)!r} is of a comparison with other settings ({about['settings']}); delete the folders "
            f"{settings.name!r} in the run folder, or use these settings"
        )
    return tensors, about


def _predict(folder: Path, recipe: Recipe, settings: Settings, member: str, method: str) -> None:
    """Make one method's predictions with one network."""
    model = on_accelerator(checkpoints.load(folder / member / "network.safetensors").model)
    seed = next(recipe.schedule(m).seed for m in recipe.all_members() if m.name == member)
    train, known = _first(_parts["train"].shuffled(seed), settings.fit_images), _parts["known"]
    about: dict[str, Any] = {"settings": asdict(settings)}
    device = next(model.parameters()).device.type
    arithmetic = torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16-mixed")
    predictor: Predictor
    if method == "exact":
        batches = (inputs for inputs, _ in train.batches(64 * (recipe.statistics_batch - 1)))
        predictor = stochbn.Exact(model, batches, recipe.statistics_batch, settings.draws)
        parts = {"known": _first(known, settings.exact)}
        if "unknown" in _parts:
            parts["unknown"] = _first(_parts["unknown"], min(settings.exact, settings.unknown))
    else:
        kind, *changes = method.split(", ")
        views = augment.named(settings.augment) if settings.augment else None
        posterior = fit_posterior(model, train, recipe.statistics_batch, seed, kind=kind, augment=views)
        if "recentred" in changes:
            posterior = posterior.recentre(model)
        if "calibrated" in changes:
            held_out = _first(_parts["held-out"], settings.held_out)
            with arithmetic:
                own = recipe.statistics_batch
                posterior = stochbn.calibrate(
                    model,
                    posterior,
                    held_out.batches(PREDICT_BATCH),
                    batch_sizes=[own / 4, own / 2, own, 2 * own, 4 * own, math.inf],
                    temperature=False,
                    augment=views,
                    seed=seed,
                )
        about["batch_size"] = posterior.batch_size
        predictor = stochbn.Predictive(model, posterior, settings.draws, tolerance=0, augment=views)
        parts = {"known": known}
        if "unknown" in _parts:
            parts["unknown"] = _first(_parts["unknown"], settings.unknown)
    generator = torch.Generator().manual_seed(seed)
    with arithmetic:
        tensors = {part: predict_all(predictor, images, generator).probs.log().cpu() for part, images in parts.items()}
    file = _file(folder, member, method, settings)
    file.parent.mkdir(exist_ok=True)
    write_tensors(file, COMPARISON, tensors, about)


def _first(images: Images, most: int) -> Images:
    return images.take(torch.arange(min(most, len(images))))


def tabulate(folder: Path, settings: Settings) -> list[Table]:
    """Write the tables and the figure of a comparison into its run folder, from its stored predictions.

    ``comparison.json`` has every number, ``comparison.md`` the tables, ``comparison.png`` and ``.svg`` the methods'
    calibrated NLL between those of ensembles. With an augmentation they are called ``comparison-augmented``.

    Raises:
        FileNotFoundError, ValueError: predictions are missing, or of other settings.
    """
    recipe = read_recipe(folder)
    names = [member.name for member in recipe.all_members() if member.kind == "plain"]
    stored = [read_tensors(folder / name / "predictions.safetensors", PREDICTIONS)[0] for name in names]
    labels = stored[0]["labels"]
    plain = [
        {
            part: tensors[f"plain.{part}"][: settings.unknown if part == "unknown" else None].exp()
            for part in ("known", "unknown")
            if f"plain.{part}" in tensors
        }
        for tensors in stored
    ]
    chosen = range(settings.members)
    methods: dict[str, list[dict[str, Tensor]]] = {"plain": plain[: settings.members]}
    sizes: dict[str, list[float]] = {}
    for method in settings.methods:
        found = [_read(folder, names[i], method, settings) for i in chosen]
        methods[method] = [probs for probs, _ in found]
        if method != "exact":
            sizes[method] = [about["batch_size"] for _, about in found]
    exact = methods.pop("exact", [])
    # Ensembles begin with the networks that are compared, so that one of them is what an ensemble of 1 is.
    ensembles = {
        f"ensemble of {size}": [mixture([plain[(first + i) % len(plain)] for i in range(size)]) for first in chosen]
        for size in range(1, len(plain) + 1)
    }
    rows, _ = score_all(methods, ensembles, labels)
    for method, found_sizes in sizes.items():
        for row, size in zip(rows[method], found_sizes, strict=True):
            row["batch_size"] = size
    near = _beside(exact, methods, ensembles, labels) if exact else {}
    drawn = f", input drawn too ({settings.augment})" if settings.augment else ""
    data = f"{recipe.network} on {recipe.data}, {len(labels)} objects{drawn}"
    several = settings.members > 1
    title = f"{data}: {f'mean and standard deviation over {settings.members} networks' if several else 'one network'}"
    objects = f"the first {len(exact[0]['known'])} objects, on which inference was exact too" if exact else ""
    written, shown = (_tables(title, objects, rows, near, spread) for spread in (True, False))
    about = {"settings": asdict(settings), "recipe": recipe.as_dict(), "methods": rows, "beside_exact": near}
    write_json(folder / f"{settings.name}.json", about)
    write_bytes(folder / f"{settings.name}.md", "\n\n".join(table.markdown() for table in written).encode() + b"\n")
    draw(folder, settings.name, about)
    return shown


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
    ensembles: Mapping[str, Sequence[Mapping[str, Tensor]]],
    labels: Tensor,
) -> dict[str, list[dict[str, float]]]:
    """The scores on the objects on which inference was exact too, and how far predictions are from it."""

    def first(every: Mapping[str, Sequence[Mapping[str, Tensor]]]) -> dict[str, list[dict[str, Tensor]]]:
        return {name: [{k: p[k][: len(e)] for k, e in exact[0].items()} for p in one] for name, one in every.items()}

    few = {**first(methods), "exact": [dict(probs) for probs in exact]}
    near, _ = score_all(few, first(ensembles), labels[: len(exact[0]["known"])])
    for name, each in few.items():
        for row, probs, e in zip(near[name], each, exact, strict=True):
            row["kl"] = divergence(e["known"], probs["known"])
    return near


def _read(folder: Path, member: str, method: str, settings: Settings) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A method's probabilities of known and unknown objects, and what is noted beside them."""
    stored = _stored(folder, member, method, settings)
    if stored is None:
        raise FileNotFoundError(f"the comparison in {str(folder)!r} lacks {method!r} of {member}; run it to its end")
    tensors, about = stored
    return {part: logs.exp() for part, logs in tensors.items()}, about


def _tables(
    title: str,
    objects: str,
    rows: Mapping[str, Sequence[Mapping[str, float]]],
    near: Mapping[str, Sequence[Mapping[str, float]]],
    spread: bool,
) -> list[Table]:
    """All methods on all objects, and beside exact inference on some, with or without standard deviations."""

    def table(
        title: str, rows: Mapping[str, Sequence[Mapping[str, float]]], columns: Mapping[str, tuple[str, int, float]]
    ) -> Table:
        cells = [
            [name, *(_cell(found, *column, spread) for column in columns.values())] for name, found in rows.items()
        ]
        return Table(title, ["method", *columns], cells)

    columns = {
        "noise of": ("batch_size", 0, 1.0),
        "error %": ("error", 2, 1.0),
        "NLL": ("nll", 4, 1.0),
        "calibrated NLL": ("calibrated_nll", 4, 1.0),
        "ECE %": ("ece", 2, 100.0),
        "best T": ("temperature", 2, 1.0),
        "AURC %": ("aurc", 3, 100.0),
        "AUROC": ("auroc", 4, 1.0),
        "FPR95 %": ("fpr95", 1, 100.0),
        "DEE": ("dee", 2, 1.0),
    }
    if not spread:  # for a terminal, narrower ones
        quality = ("error %", "NLL", "calibrated NLL", "ECE %", "best T", "DEE")
        uses = ("noise of", "AURC %", "AUROC", "FPR95 %")
        parts = {title: quality, "Selective prediction, and detection of the unknown": uses}
    else:
        parts = {title: tuple(columns)}
    few = ("NLL", "ECE %", "best T", "AUROC")  # so few objects say little about the rest
    beside = {"KL to exact": ("kl", 5, 1.0)} | {name: columns[name] for name in few}
    shown = [table(title, rows, {name: columns[name] for name in names}) for title, names in parts.items()]
    return [*shown, *([table(f"{objects[0].upper()}{objects[1:]}", near, beside)] if near else [])]


def _cell(rows: Sequence[Mapping[str, float]], key: str, digits: int, factor: float, spread: bool) -> str:
    values = [factor * row[key] for row in rows if key in row]
    if not values:
        return "-"
    if key == "batch_size":
        return "/".join(f"{value:g}" for value in sorted(set(values)))
    if max(values) == math.inf:
        return "more"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if spread and len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"
