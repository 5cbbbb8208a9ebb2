"""Running a recipe: every member is trained, fitted and evaluated in a folder of its own.

A run folder holds ``run.json`` (recipe, versions, data fingerprints), a folder for each member with its ``network``,
the log of its ``training``, its posterior (``network.sbn``), ``predictions`` (log-probabilities, the mean over draws),
``draws`` (those of every draw) and, for the first plain network, the observed ``statistics``; and what
`stochbn.paper.report` makes of these. Every file is written whole, and a file that is there is not made again: a run
that was stopped continues where it was.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import stochbn
from stochbn.distributed import Ranks
from stochbn.evaluation.fitting import fit_posterior
from stochbn.evaluation.predicting import Report, on_accelerator, predict_all, predict_member
from stochbn.files import write_tensors
from stochbn.measuring.goodness import observe
from stochbn.paper import folders
from stochbn.paper.recipes import Member, Recipe
from stochbn.paper.training import TOGETHER, augmented, train, train_together
from stochbn.posteriors import Posterior
from stochbn.processes import side_by_side
from stochbn.sources import architectures, checkpoints, named
from stochbn.sources.checkpoints import Checkpoint
from stochbn.sources.named import Images

__all__ = [
    "DRAWS",
    "PREDICTIONS",
    "STATISTICS",
    "fit_images",
    "fit_member",
    "fit_posterior",
    "load_parts",
    "packed",
    "predict_all",
    "predict_member",
    "run",
    "unpacked",
]

PREDICTIONS = "stochbn.predictions/1"
DRAWS = "stochbn.draws/1"
DRAWS_LIMIT = 2**28
"""Bytes of a member's draws up to which they are kept unless something else is asked for."""
STATISTICS = "stochbn.statistics/1"

Progress = Callable[[str, str, int, int], None]
"""Called with a name, a stage, and how much of how much is done: of a data set to load, or a member to train, fit,
observe and predict with."""


def run(
    recipe: Recipe,
    folder: Path,
    *,
    jobs: int = 1,
    keep_draws: bool | None = None,
    progress: Progress = lambda *_: None,
    ranks: Ranks | None = None,
) -> None:
    """Train, fit and evaluate every member of a recipe in a run folder, continuing what is there.

    Args:
        recipe: what to run.
        folder: the run folder; it is made, or belongs to a run of the same recipe on the same data.
        jobs: members side by side, each in a process of its own with an equal share of the cores.
        keep_draws: whether every draw's log-probabilities are kept, in ``draws.safetensors`` of each member: for each
            method and part, as ``sbn.known``, ``[S, N, K]`` in float16. None keeps them up to 256 MiB for a member.
        progress: called with a member's name, its stage, and how much of how much is done.
        ranks: the processes of a job, which share the members and the folder; all return when the last is done.

    Raises:
        ValueError: the folder holds another run, or something else.
        ProcessError: a member's process failed.
        stochbn.sources.named.DataError: the data cannot be had.
        OSError: the folder cannot be written.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if jobs > 1 and recipe.processes > 1:
        raise ValueError(f"members that take {recipe.processes} processes each are trained one by one: use jobs=1")
    ranks = ranks or Ranks(None)
    if ranks.count > 1 and recipe.processes > 1:
        raise ValueError(
            f"members that take {recipe.processes} processes each are trained by one rank: use no torchrun"
        )
    with ranks.failing_together():
        parts = _prepare(recipe, folder, progress, ranks.rank == 0)
    with ranks.failing_together():
        _run_members(recipe, recipe.all_members()[ranks.rank :: ranks.count], folder, parts, jobs, keep_draws, progress)


def _prepare(recipe: Recipe, folder: Path, progress: Progress, claims: bool) -> dict[str, Images]:
    """The data of a recipe that can be run, in a folder that is the run's."""
    folders.check(recipe, folder)
    parts = load_parts(recipe, progress)
    if recipe.statistics_batch > len(parts["train"]):
        raise ValueError(
            f"statistics_batch is {recipe.statistics_batch}, more than the {len(parts['train'])} training images"
        )
    for member in recipe.all_members():
        with torch.device("meta"):  # refuses what cannot be built, before a folder is made
            architectures.build(recipe.network, **recipe.network_arguments(member, parts["train"]))
    if claims:
        folders.claim(recipe, folder, parts)
    return parts


def _run_members(
    recipe: Recipe,
    members: Sequence[Member],
    folder: Path,
    parts: dict[str, Images],
    jobs: int,
    keep_draws: bool | None,
    progress: Progress,
) -> None:
    """Run some members of a recipe."""
    waiting = [m for m in members if not all(path.exists() for path in _outputs(folder, m))]
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and device.type == "cuda" and recipe.processes == 1 and recipe.precision in TOGETHER:
        untrained = [member for member in waiting if not (folder / member.name / "network.safetensors").exists()]
        _train_together(recipe, untrained, folder, parts, device, progress)
    if jobs == 1:
        for member in waiting:
            _run_member(recipe, member, folder, parts, keep_draws, progress)
        return
    tasks = {member.name: (recipe, member, folder, packed(parts), keep_draws) for member in waiting}
    side_by_side(_run_unpacked, tasks, jobs, progress)


def _run_unpacked(
    recipe: Recipe, member: Member, folder: Path, arrays: dict[str, Any], keep_draws: bool | None, progress: Progress
) -> None:
    _run_member(recipe, member, folder, unpacked(arrays), keep_draws, progress)


def packed(parts: dict[str, Images]) -> dict[str, Any]:
    """Data as arrays, which travel by value: tensors would need as much shared memory, which containers lack."""
    return {name: (i.pixels.numpy(), i.labels.numpy(), i.classes, i.name) for name, i in parts.items()}


def unpacked(arrays: dict[str, Any]) -> dict[str, Images]:
    """The data that `packed` made arrays of."""
    return {
        part: Images(torch.from_numpy(pixels), torch.from_numpy(labels), classes, name)
        for part, (pixels, labels, classes, name) in arrays.items()
    }


def _train_together(
    recipe: Recipe,
    members: Sequence[Member],
    folder: Path,
    parts: dict[str, Images],
    device: torch.device,
    progress: Progress,
) -> None:
    """Train members side by side on a GPU."""
    if not members:
        return

    def report(step: int, steps: int, loss: float) -> None:
        for member in members:
            progress(member.name, "train", step, steps)

    homes = [folder / member.name for member in members]
    for home in homes:
        home.mkdir(exist_ok=True)
    models = train_together(
        [_build(recipe, member, parts["train"]) for member in members],
        parts["train"],
        [recipe.schedule(member) for member in members],
        device,
        held_out=parts.get("held-out"),
        states=[home / "training.safetensors" for home in homes],
        logs=[home / "training.csv" for home in homes],
        report=report,
        store_every=60.0,
    )
    for model, member, home in zip(models, members, homes, strict=True):
        _save(recipe, member, model, parts["train"], home)


def _build(recipe: Recipe, member: Member, images: Images) -> Callable[[], nn.Module]:
    build = architectures.build_with_uniform_scale if recipe.uniform_scale else architectures.build
    return functools.partial(build, recipe.network, **recipe.network_arguments(member, images))


def _save(recipe: Recipe, member: Member, model: nn.Module, images: Images, home: Path) -> None:
    """Save a network that is trained; the state of its training is of no use any more."""
    arguments = recipe.network_arguments(member, images)
    checkpoint = Checkpoint(model, recipe.network, arguments, recipe.data, images.classes)
    checkpoints.save(home / "network.safetensors", checkpoint)
    (home / "training.safetensors").unlink(missing_ok=True)


def _run_member(
    recipe: Recipe,
    member: Member,
    folder: Path,
    parts: dict[str, Images],
    keep_draws: bool | None,
    progress: Progress,
) -> None:
    home = folder / member.name
    home.mkdir(exist_ok=True)
    images = parts["train"]
    started = time.perf_counter()

    def report(step: int, steps: int, loss: float) -> None:
        progress(member.name, "train", step, steps)

    network = home / "network.safetensors"
    if not network.exists():
        model = train(
            _build(recipe, member, images),
            images,
            recipe.schedule(member),
            held_out=parts.get("held-out"),
            state=home / "training.safetensors",
            log=home / "training.csv",
            **({} if recipe.processes > 1 else {"report": report}),
        )
        _save(recipe, member, model, images, home)
    model = on_accelerator(checkpoints.load(network).model)
    images = fit_images(recipe, member, images)

    posterior = home / "network.sbn.safetensors"
    if not posterior.exists():
        follow = lambda done, total: progress(member.name, "fit", done, total)  # noqa: E731
        fit_member(recipe, member, model, images, follow).save(posterior)
    predictions, *statistics = _outputs(folder, member)
    for path in statistics:
        if not path.exists():
            observed = observe(
                model,
                images,
                recipe.statistics_batch,
                recipe.schedule(member).seed,
                lambda done, total: progress(member.name, "observe", done, total),
            )
            write_tensors(path, STATISTICS, observed, {"batch_size": recipe.statistics_batch})
    if predictions.exists():
        return
    if keep_draws is None:
        objects = sum(len(parts[part]) for part in ("known", "unknown") if part in parts)
        keep_draws = 2 * recipe.draws * objects * len(images.classes) * torch.float16.itemsize <= DRAWS_LIMIT
    tensors = predict_member(
        model,
        stochbn.load(posterior),
        parts["known"],
        parts.get("unknown"),
        recipe.draws,
        recipe.schedule(member).seed,
        lambda done, total: progress(member.name, "predict", done, total),
        keep_draws=keep_draws,
    )
    draws = {key.removesuffix(".draws"): value for key, value in tensors.items() if key.endswith(".draws")}
    if draws:
        write_tensors(home / "draws.safetensors", DRAWS, draws, {"member": member.name})
    means = {key: value for key, value in tensors.items() if not key.endswith(".draws")}
    about = {"member": member.name, "seconds": round(time.perf_counter() - started, 1)}
    write_tensors(predictions, PREDICTIONS, means, about)


def fit_images(recipe: Recipe, member: Member, images: Images) -> Images:
    """The training images as posteriors are fitted to them: each augmented once, if the recipe says so."""
    return augmented(images, recipe.schedule(member).seed) if recipe.augment_fit else images


def fit_member(
    recipe: Recipe,
    member: Member,
    model: nn.Module,
    images: Images,
    report: Report = lambda done, total: None,
) -> Posterior:
    """The posterior that a recipe says, fitted to what `fit_images` gave."""
    ordinary = architectures.batch_norms_of_linear_layers(model) if recipe.drawn == "convolutions" else []
    seed = recipe.schedule(member).seed
    return fit_posterior(
        model, images, recipe.statistics_batch, seed, report, kind=recipe.posterior, deterministic=ordinary
    )


def load_parts(recipe: Recipe, progress: Progress = lambda *_: None) -> dict[str, Images]:
    """The data of a recipe: ``train``, ``known`` and, if it has any, ``held-out`` and ``unknown``."""

    def load(source: str, split: str) -> Images:
        return named.load(source, split, lambda done, total: progress(f"{source} ({split})", "load", done, total))

    parts = {"train": load(recipe.data, "train")}
    if recipe.held_out:
        parts["train"], parts["held-out"] = parts["train"].held_out(recipe.held_out, seed=0)
        if not len(parts["held-out"]):
            raise ValueError(f"held_out={recipe.held_out} of these images is none; hold out more")
    parts["train"] = _first(parts["train"], recipe.train_images)
    known = parts["held-out"] if recipe.evaluate_on == "held-out" else load(recipe.data, "test")
    parts["known"] = _first(known, recipe.test_images)
    if recipe.unknown is not None:
        parts["unknown"] = _first(load(recipe.unknown, "test"), recipe.test_images)
    return parts


def _first(images: Images, most: int | None) -> Images:
    """A random `most` of the images, always the same ones."""
    return images if most is None or most >= len(images) else images.shuffled(0).take(torch.arange(most))


def _outputs(folder: Path, member: Member) -> list[Path]:
    """What a member leaves for the report: predictions, and for the first plain network statistics."""
    names = ["predictions", "statistics"] if member == Member("plain", 0) else ["predictions"]
    return [folder / member.name / f"{name}.safetensors" for name in names]
