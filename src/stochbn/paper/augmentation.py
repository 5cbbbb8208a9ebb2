"""What draws over the input add to draws of the statistics, on the networks of a finished run.

For some of its plain networks, draws are made over the statistics alone, over the input alone, and over both, as they
come and with noise and temperature calibrated on the images that the run held out; if wanted, also over augmentations
that are chosen greedily on these images, and with snapshots of each network. Ensembles of the run's networks with and
without draws over the input are the yardstick. Fewer draws are the first ones of many. What draws predict is averaged
at once; the log-probabilities lie in the member's folder, under ``augmentation``, and `tabulate` reads these alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stochbn
import stochbn.augment as augment
import stochbn.metrics as metrics
from stochbn.distributed import Ranks
from stochbn.evaluation.fitting import fit_posterior
from stochbn.evaluation.predicting import PREDICT_BATCH, on_accelerator
from stochbn.files import check_folder, read_tensors, write_bytes, write_json, write_tensors
from stochbn.paper import figures
from stochbn.paper.recipes import Member, Recipe
from stochbn.paper.report import read_recipe
from stochbn.paper.runner import PREDICTIONS, load_parts
from stochbn.paper.scores import mixture, score_all
from stochbn.paper.snapshotting import Cycles, take_snapshots
from stochbn.report.tables import Table
from stochbn.sources import checkpoints
from stochbn.sources.named import Images

__all__ = ["CHOSEN", "METHODS", "SNAPSHOT_METHODS", "Settings", "draw", "draw_over_inputs", "tabulate"]

AUGMENTATION = "stochbn.augmentation/1"
STATISTICS = "statistics"
INPUT = "input"
BOTH = "both"
METHODS = (STATISTICS, INPUT, f"{INPUT}, calibrated", BOTH, f"{BOTH}, calibrated")
"""What is drawn; calibrated: with the temperature, and where statistics are drawn the noise, best held-out."""
CHOSEN = f"{INPUT}, chosen, calibrated"
"""Augmentations that are chosen greedily, at the temperature that is best for them."""
CHOICES = 15
"""How many draws beside that of the clean input are chosen; then they begin again."""
SNAPSHOTS = "snapshots"
SNAPSHOT_METHODS = (f"{SNAPSHOTS}, {INPUT}", f"{SNAPSHOTS}, {BOTH}")
"""What is drawn with each snapshot of a network; the first draw alone is of the clean input."""


@dataclass(frozen=True)
class Settings:
    """How much is compared.

    Attributes:
        augment: the augmentation, as `stochbn.augment.named` takes it.
        members: how many of the run's plain networks.
        counts: numbers of draws, from few to many.
        fit_images: training images to fit posteriors to, at most.
        held_out: held-out images to calibrate on, at most.
        images: test images of known, and of unknown, classes to predict, at most.
        candidates: augmentations to choose from, with bars between, as `stochbn.augment.named` takes them; empty for
            no choice.
        snapshots: how snapshots of each network are taken; None takes none.
    """

    augment: str
    members: int = 3
    counts: tuple[int, ...] = (4, 8, 16, 48)
    fit_images: int = 8192
    held_out: int = 2000
    images: int = 5000
    candidates: str = ""
    snapshots: Cycles | None = None

    def __post_init__(self) -> None:
        for description in (self.augment, self.candidates or self.augment):
            augment.named(description)  # refuses what cannot be
        numbers = {name: value for name, value in asdict(self).items() if isinstance(value, int)}
        for name, value in {**numbers, "counts": min(self.counts, default=0)}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if sorted(set(self.counts)) != list(self.counts):
            raise ValueError(f"counts must rise, got {list(self.counts)}")


def draw_over_inputs(
    folder: Path,
    settings: Settings,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks | None = None,
) -> list[Table]:
    """Make the predictions that are not there yet, and write and return the tables.

    Args:
        folder: a finished run whose recipe held images out.
        settings: how much to compare.
        progress: called with the number of predictions made and of all, of this rank.
        ranks: the processes of a job, which share the networks and the folder. Each takes whole networks, as the
            snapshots of one follow each other. All return when the last is done, and rank 0 alone has tables.

    Raises:
        FileNotFoundError: this is no run folder, or a network or its predictions are missing.
        ValueError: the run held nothing out, has fewer networks, or holds predictions with other settings.
        OSError: the folder cannot be written.
    """
    ranks = ranks or Ranks(None)
    with ranks.failing_together():
        _make_predictions(folder, settings, progress, ranks)
    with ranks.failing_together():
        return tabulate(folder, settings) if ranks.rank == 0 else []


def _make_predictions(folder: Path, settings: Settings, progress: Callable[[int, int], None], ranks: Ranks) -> None:
    """Make the predictions that are not there yet, of the networks that are this rank's."""
    check_folder(folder, *(f"augmentation.{ending}" for ending in ("json", "md", "png", "svg")))
    recipe = read_recipe(folder)
    if not recipe.held_out:
        raise ValueError(
            f"{str(folder)!r} is a run that trained on all images, so there are none to calibrate on; make one with "
            "--held-out 0.1"
        )
    if recipe.members < settings.members:
        raise ValueError(f"{str(folder)!r} has {recipe.members} plain networks, {settings.members} were asked for")
    own = _plain(recipe)[ranks.rank :: ranks.count]
    tasks = [(member, method) for member in own for method in _methods(member, settings)]
    waiting = [task for task in tasks if _stored(folder, *task, settings) is None]
    progress(len(tasks) - len(waiting), len(tasks))
    parts = load_parts(recipe) if waiting else {}
    for done, (member, method) in enumerate(waiting, start=len(tasks) - len(waiting) + 1):
        _predict(folder, recipe, settings, member, method, parts)
        progress(done, len(tasks))


def _plain(recipe: Recipe) -> list[Member]:
    return [member for member in recipe.all_members() if member.kind == "plain"]


def _methods(member: Member, settings: Settings) -> tuple[str, ...]:
    """Those that are compared, or for networks of larger ensembles alone the one that is combined."""
    if member.index >= settings.members:
        return (INPUT,)
    chosen = (CHOSEN,) if settings.candidates else ()
    return METHODS + chosen + (SNAPSHOT_METHODS if settings.snapshots is not None else ())


def _file(folder: Path, member: Member, method: str) -> Path:
    return folder / member.name / "augmentation" / f"{method.replace(', ', '-')}.safetensors"


def _stored(
    folder: Path, member: Member, method: str, settings: Settings
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    file = _file(folder, member, method)
    if not file.exists():
        return None
    tensors, about = read_tensors(file, AUGMENTATION)
    if _comparable(about["settings"], method) != _comparable(_described(settings), method):
        raise ValueError(
            f"{str(file)!r} was made with other settings ({about['settings']}); delete the folders 'augmentation' in "
            "the run folder, or use these settings"
        )
    return tensors, about


def _described(settings: Settings) -> dict[str, Any]:
    return {**asdict(settings), "counts": list(settings.counts)}


def _comparable(described: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The settings that a method depends on."""
    others = {"members", *(() if method == CHOSEN else ("candidates",))}
    others |= set() if method in SNAPSHOT_METHODS else {"snapshots"}
    return {name: value for name, value in described.items() if name not in others}


def _predict(
    folder: Path, recipe: Recipe, settings: Settings, member: Member, method: str, parts: Mapping[str, Images]
) -> None:
    """Make one method's predictions with one network, for every number of draws."""
    model = on_accelerator(checkpoints.load(folder / member.name / "network.safetensors").model)
    seed = recipe.schedule(member).seed
    changes = None if method == STATISTICS else augment.named(settings.augment)
    train = _first(parts["train"].shuffled(seed), settings.fit_images)
    held_out = _first(parts["held-out"], settings.held_out)
    about: dict[str, Any] = {"settings": _described(settings)}
    if method == CHOSEN:
        candidates = augment.named(settings.candidates)
        several = candidates.augmentations if isinstance(candidates, augment.turns) else (candidates,)
        batches = held_out.batches(PREDICT_BATCH)
        changes = stochbn.choose_augmentation(model, None, batches, several, draws=CHOICES, seed=seed)
        about["augmentations"] = list(map(repr, changes.augmentations))
    if method in SNAPSHOT_METHODS:
        assert settings.snapshots is not None
        trained = changes if recipe.augment else None
        place = folder / member.name / SNAPSHOTS
        members = take_snapshots(
            model, parts["train"], recipe, settings.snapshots, seed=seed, augment=trained, folder=place
        )
        fitted = [(one.model, one.posterior) for one in members if one.posterior is not None]
    else:
        batch = recipe.statistics_batch
        fitted = [(model, fit_posterior(model, train, batch, seed, kind="joint", augment=changes))]
    if INPUT in method:
        fitted = [(one, posterior.recentre(one)) for one, posterior in fitted]
    if "calibrated" in method:
        noise = [float("inf")] if INPUT in method else None
        options: dict[str, Any] = {"batch_sizes": noise, "temperature": True, "augment": changes, "seed": seed}
        fitted = [
            (one, stochbn.calibrate(one, posterior, held_out.batches(PREDICT_BATCH), **options))
            for one, posterior in fitted
        ]
    elif INPUT in method:
        fitted = [(one, posterior.rescale(float("inf"))) for one, posterior in fitted]
    posterior = fitted[0][1]
    about["batch_size"] = "inf" if posterior.batch_size == float("inf") else posterior.batch_size
    about["temperature"] = posterior.temperature
    counts = _counts(method, settings)
    predictives = [
        stochbn.Predictive(one, posterior, counts[-1], tolerance=0, augment=changes) for one, posterior in fitted
    ]
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for part in ("known", "unknown"):
        if part not in parts:
            continue
        rows: dict[int, list[Tensor]] = {count: [] for count in counts}
        for inputs, _ in _first(parts[part], settings.images).batches(PREDICT_BATCH):
            every = [one(inputs, generator=generator, keep_draws=True).log_probs.exp() for one in predictives]
            for count, means in rows.items():
                mean = torch.stack([probs[:count].mean(0) for probs in every]).mean(0)
                means.append(mean.log().cpu())
        tensors |= {f"{count}.{part}": torch.cat(means) for count, means in rows.items()}
    file = _file(folder, member, method)
    file.parent.mkdir(exist_ok=True)
    write_tensors(file, AUGMENTATION, tensors, about)


def _counts(method: str, settings: Settings) -> tuple[int, ...]:
    """How many draws are averaged: of each snapshot few, and one, which is a plain pass where its input is drawn."""
    return (1, *settings.counts[:2]) if method in SNAPSHOT_METHODS else settings.counts


def _first(images: Images, most: int) -> Images:
    return images.take(torch.arange(min(most, len(images))))


def tabulate(folder: Path, settings: Settings) -> list[Table]:
    """Write ``augmentation.json``, ``.md`` and a figure into a run folder, from the stored predictions.

    Raises:
        FileNotFoundError, ValueError: predictions are missing, or of other settings.
        OSError: the folder cannot be written.
    """
    recipe = read_recipe(folder)
    members = _plain(recipe)
    plain = []
    labels = torch.empty(0)
    for member in members:
        kept, _ = read_tensors(folder / member.name / "predictions.safetensors", PREDICTIONS)
        labels = kept["labels"][: settings.images]
        parts = [part for part in ("known", "unknown") if f"plain.{part}" in kept]
        plain.append({part: kept[f"plain.{part}"][: settings.images].exp() for part in parts})

    def read(member: Member, method: str, count: int) -> dict[str, Tensor]:
        found = _stored(folder, member, method, settings)
        if found is None:
            raise FileNotFoundError(f"{str(folder)!r} lacks {method!r} of {member.name}; run it to its end")
        parts = [part for part in ("known", "unknown") if f"{count}.{part}" in found[0]]
        return {part: found[0][f"{count}.{part}"].exp() for part in parts}

    chosen = range(settings.members)
    methods: dict[str, list[dict[str, Tensor]]] = {"plain": [plain[i] for i in chosen]}
    passes: dict[str, int] = {"plain": 1}
    trainings: dict[str, float] = {"plain": 1.0}
    for method in _methods(members[0], settings):
        times = 1 if settings.snapshots is None or method not in SNAPSHOT_METHODS else settings.snapshots.count
        for count in _counts(method, settings):
            name = f"{method}, {count}" if times == 1 else f"{method}, {count} each"
            methods[name] = [read(members[i], method, count) for i in chosen]
            passes[name] = count * times
            trainings[name] = 1.0 if times == 1 else _trainings(recipe, settings.snapshots)
    few = settings.counts[min(1, len(settings.counts) - 1)]
    with_input = [read(member, INPUT, few) for member in members]
    ensembles, others = {}, {}
    for size in range(1, len(plain) + 1):
        groups = [[(first + i) % len(plain) for i in range(size)] for first in chosen]
        ensembles[f"ensemble of {size}"] = [mixture([plain[i] for i in group]) for group in groups]
        passes[f"ensemble of {size}"] = size
        trainings |= {f"ensemble of {size}": size, f"ensemble of {size}, {INPUT}, {few} each": size}
        if size > 1:
            others[f"ensemble of {size}, {INPUT}, {few} each"] = [
                mixture([with_input[i] for i in group]) for group in groups
            ]
            passes[f"ensemble of {size}, {INPUT}, {few} each"] = size * few
    rows, _ = score_all({**methods, **others}, ensembles, labels)
    noise = {
        method: [stored[1] for i in chosen if (stored := _stored(folder, members[i], method, settings)) is not None]
        for method in _methods(members[0], settings)
    }
    added = {count: _added(methods, count, labels) for count in settings.counts}
    title = f"{recipe.network} on {recipe.data}, {len(labels)} objects, {settings.augment}"
    several = f": mean over {settings.members} networks" if settings.members > 1 else ""
    shown = [_table(title + several, rows, passes, trainings), _added_table(added)]
    about = {
        "settings": _described(settings), "recipe": recipe.as_dict(), "methods": rows, "passes": passes,
        "trainings": {name: trainings[name] for name in rows},
        "chosen": {method: [{k: v for k, v in one.items() if k != "settings"} for one in chosen_here]
                   for method, chosen_here in noise.items()},
        "statistics_add": added,
    }  # fmt: skip
    write_json(folder / "augmentation.json", about)
    write_bytes(folder / "augmentation.md", "\n\n".join(table.markdown() for table in shown).encode() + b"\n")
    draw(folder, about)
    return shown


def draw(folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """Draw the figure of what ``augmentation.json`` holds into a folder."""
    curves: dict[str, list[tuple[int, list[float]]]] = {}
    for name, found in about["methods"].items():
        method = "ensembles" if name.startswith("ensemble") and INPUT not in name else name.rpartition(", ")[0] or name
        if name.startswith("ensemble") and INPUT in name:
            method = f"ensembles, {INPUT}"
        curves.setdefault(method, []).append((about["passes"][name], [row["calibrated_nll"] for row in found]))
    recipe, settings = about["recipe"], about["settings"]
    title = f"{recipe['network']} on {recipe['data']}, at most {settings['images']} objects, {settings['augment']}"
    return figures.save_passes(folder / "augmentation", curves, title=title)


def _added(methods: Mapping[str, Sequence[Mapping[str, Tensor]]], count: int, labels: Tensor) -> dict[str, float]:
    """What drawing the statistics too changes, at equal augmentation, draws and calibration: means over networks."""
    found = {}
    for suffix, key in (("", "as_it_is"), (", calibrated", "calibrated")):
        pairs = list(zip(methods[f"{INPUT}{suffix}, {count}"], methods[f"{BOTH}{suffix}, {count}"], strict=True))
        for name, each in (("nll", metrics.nll_of_each), ("calibrated_nll", metrics.calibrated_nll_of_each)):
            change = torch.stack([each(b["known"], labels) - each(a["known"], labels) for a, b in pairs]).mean(0)
            found[f"{key}_{name}"] = change.mean().item()
            found[f"{key}_{name}_se"] = (change.var() / len(change)).sqrt().item()
    return found


def _trainings(recipe: Recipe, cycles: Cycles | None) -> float:
    """What a network and its snapshots take of training, beside the network alone."""
    return 1.0 if cycles is None else 1 + cycles.count * cycles.epochs / recipe.epochs


def _table(
    title: str,
    rows: Mapping[str, Sequence[Mapping[str, float]]],
    passes: Mapping[str, int],
    trainings: Mapping[str, float],
) -> Table:
    columns = {
        "error %": ("error", 2, 1.0), "NLL": ("nll", 4, 1.0), "calibrated NLL": ("calibrated_nll", 4, 1.0),
        "ECE %": ("ece", 2, 100.0), "best T": ("temperature", 2, 1.0), "AUROC": ("auroc", 4, 1.0),
        "FPR95 %": ("fpr95", 1, 100.0), "DEE": ("dee", 2, 1.0),
    }  # fmt: skip

    def cell(found: Sequence[Mapping[str, float]], key: str, digits: int, factor: float) -> str:
        values = [factor * row[key] for row in found if key in row]
        if not values:
            return "-"
        mean = statistics.mean(values)
        return "more" if mean == float("inf") else f"{mean:.{digits}f}"

    body = [
        [name, str(passes[name]), f"{trainings[name]:g}", *(cell(found, *column) for column in columns.values())]
        for name, found in rows.items()
    ]
    return Table(title, ["drawn", "passes", "trainings", *columns], body)


def _added_table(added: Mapping[int, Mapping[str, float]]) -> Table:
    keys = [f"{key}_{name}" for key in ("as_it_is", "calibrated") for name in ("nll", "calibrated_nll")]
    body = [
        [str(count), *(f"{found[key]:+.4f} ± {found[f'{key}_se']:.4f}" for key in keys)]
        for count, found in added.items()
    ]
    columns = ["draws", "NLL", "after best T", "NLL, calibrated", "after best T, calibrated"]
    return Table("What drawing the statistics adds to draws over the input, with paired standard errors", columns, body)
