"""What draws over the input add to draws of the statistics, on the networks of a finished run.

For some of its plain networks, draws are made over the statistics alone, over the input alone, and over both, as they
come and with noise and temperature calibrated on the images that the run held out; if wanted, also over augmentations
that are chosen greedily on these images, and with snapshots of each network. Ensembles of the run's networks with and
without draws over the input are the yardstick. Fewer draws are the first ones of many. What draws predict is averaged
at once; the log-probabilities lie in the member's folder, under ``augmentation``, and `tabulate` reads these alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stochbn
import stochbn.augment as augment
import stochbn.metrics as metrics
from stochbn.augment import Augment
from stochbn.distributed import Ranks
from stochbn.evaluation.fitting import fit_posterior
from stochbn.evaluation.predicting import PREDICT_BATCH
from stochbn.paper import figures
from stochbn.paper.recipes import Member, Recipe
from stochbn.paper.snapshotting import Cycles, take_snapshots
from stochbn.paper.study import Made, Study, ensembles, score_all, table
from stochbn.posteriors import Posterior
from stochbn.report.tables import Table, write_tables
from stochbn.sources.named import Images

__all__ = ["CHOSEN", "METHODS", "SNAPSHOT_METHODS", "Settings", "draw", "draw_over_inputs", "tabulate"]

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
        study = _study(folder, settings)
        methods = {member: _methods(member, settings) for member in study.members}
        study.make(methods, _predict, ranks=ranks, progress=progress)
    with ranks.failing_together():
        return tabulate(folder, settings) if ranks.rank == 0 else []


def _study(folder: Path, settings: Settings) -> Study:
    described = {**asdict(settings), "counts": list(settings.counts)}
    return Study.of(folder, "augmentation", described, _relevant, networks=settings.members, calibrates=True)


def _relevant(settings: Mapping[str, Any], method: str) -> dict[str, Any]:
    others = {"members", *(() if method == CHOSEN else ("candidates",))}
    others |= set() if method in SNAPSHOT_METHODS else {"snapshots"}
    return {name: value for name, value in settings.items() if name not in others}


def _methods(member: Member, settings: Settings) -> tuple[str, ...]:
    """Those that are compared, or for networks of larger ensembles alone the one that is combined."""
    if member.index >= settings.members:
        return (INPUT,)
    chosen = (CHOSEN,) if settings.candidates else ()
    return METHODS + chosen + (SNAPSHOT_METHODS if settings.snapshots is not None else ())


def _counts(method: str, settings: Settings) -> tuple[int, ...]:
    """How many draws are averaged: of each snapshot few, and one, which is a plain pass where its input is drawn."""
    return (1, *settings.counts[:2]) if method in SNAPSHOT_METHODS else settings.counts


def _predict(study: Study, member: Member, methods: Sequence[str], parts: Mapping[str, Images]) -> Iterator[Made]:
    described = dict(study.settings)
    cycles = described["snapshots"]
    described |= {"counts": tuple(described["counts"]), "snapshots": None if cycles is None else Cycles(**cycles)}
    settings = Settings(**described)
    model, seed = study.network(member), study.recipe.schedule(member).seed
    for method in methods:
        about: dict[str, Any] = {}
        changes = None if method == STATISTICS else augment.named(settings.augment)
        if method == CHOSEN:
            candidates = augment.named(settings.candidates)
            several = candidates.augmentations if isinstance(candidates, augment.turns) else (candidates,)
            held_out = parts["held-out"].first(settings.held_out).batches(PREDICT_BATCH)
            changes = stochbn.choose_augmentation(model, None, held_out, several, draws=CHOICES, seed=seed)
            about["augmentations"] = list(map(repr, changes.augmentations))
        fitted = _fitted(study, member, model, method, settings, changes, parts)
        posterior = fitted[0][1]
        about["batch_size"] = "inf" if posterior.batch_size == float("inf") else posterior.batch_size
        about["temperature"] = posterior.temperature
        counts = _counts(method, settings)
        predictives = [stochbn.Predictive(one, p, counts[-1], tolerance=0, augment=changes) for one, p in fitted]
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        for part in ("known", "unknown"):
            if part not in parts:
                continue
            rows: dict[int, list[Tensor]] = {count: [] for count in counts}
            for inputs, _ in parts[part].first(settings.images).batches(PREDICT_BATCH):
                every = [one(inputs, generator=generator, keep_draws=True).log_probs.exp() for one in predictives]
                for count, means in rows.items():
                    mean = torch.stack([probs[:count].mean(0) for probs in every]).mean(0)
                    means.append(mean.log().cpu())
            tensors |= {f"{count}.{part}": torch.cat(means) for count, means in rows.items()}
        yield method, tensors, about


def _fitted(
    study: Study,
    member: Member,
    model: nn.Module,
    method: str,
    settings: Settings,
    changes: Augment | None,
    parts: Mapping[str, Images],
) -> list[tuple[nn.Module, Posterior]]:
    """The network, or its snapshots, with the posteriors that a method draws from."""
    recipe, seed = study.recipe, study.recipe.schedule(member).seed
    if method in SNAPSHOT_METHODS:
        assert settings.snapshots is not None
        shown = changes if recipe.augment else None
        place = study.folder / member.name / SNAPSHOTS
        taken = take_snapshots(
            model, parts["train"], recipe, settings.snapshots, seed=seed, augment=shown, folder=place
        )
        fitted = [(one.model, one.posterior) for one in taken if one.posterior is not None]
    else:
        train = parts["train"].shuffled(seed).first(settings.fit_images)
        fitted = [(model, fit_posterior(model, train, recipe.statistics_batch, seed, kind="joint", augment=changes))]
    if INPUT in method:
        fitted = [(one, posterior.recentre(one)) for one, posterior in fitted]
    if "calibrated" in method:
        sizes = [float("inf")] if INPUT in method else None
        options: dict[str, Any] = {"batch_sizes": sizes, "temperature": True, "augment": changes, "seed": seed}
        held_out = parts["held-out"].first(settings.held_out)
        return [
            (one, stochbn.calibrate(one, posterior, held_out.batches(PREDICT_BATCH), **options))
            for one, posterior in fitted
        ]
    return [(one, posterior.rescale(float("inf"))) for one, posterior in fitted] if INPUT in method else fitted


def tabulate(folder: Path, settings: Settings) -> list[Table]:
    """Write ``augmentation.json``, ``.md`` and a figure into a run folder, from the stored predictions.

    Raises:
        FileNotFoundError, ValueError: predictions are missing, or of other settings.
        OSError: the folder cannot be written.
    """
    study = _study(folder, settings)
    recipe, members, chosen = study.recipe, study.members, study.members[: settings.members]
    plain, labels = study.plain(settings.images, settings.images)
    methods = {"plain": plain[: settings.members]}
    passes: dict[str, int] = {"plain": 1}
    trainings: dict[str, float] = {"plain": 1.0}
    for method in _methods(members[0], settings):
        cycles = settings.snapshots if method in SNAPSHOT_METHODS else None
        for count in _counts(method, settings):
            name = f"{method}, {count}" if cycles is None or cycles.count == 1 else f"{method}, {count} each"
            methods[name] = [study.read(member, method, f"{count}.") for member in chosen]
            passes[name] = count * (1 if cycles is None else cycles.count)
            trainings[name] = _trainings(recipe, cycles)
    few = settings.counts[min(1, len(settings.counts) - 1)]
    yardstick = ensembles(plain, settings.members)
    drawn = ensembles([study.read(member, INPUT, f"{few}.") for member in members], settings.members)
    for size, name in enumerate(yardstick, start=1):
        both = f"{name}, {INPUT}, {few} each"
        passes |= {name: size, both: size * few}
        trainings |= {name: size, both: size}
        if size > 1:
            methods[both] = drawn[name]
    rows = score_all(methods, yardstick, labels)
    noise = {
        method: [{k: v for k, v in found[1].items() if k != "settings"} for found in every if found is not None]
        for method in _methods(members[0], settings)
        if (every := [study.stored(member, method) for member in chosen])
    }
    added = {count: _added(methods, count, labels) for count in settings.counts}
    title = f"{recipe.network} on {recipe.data}, {len(labels)} images, {settings.augment}"
    several = f": mean over {settings.members} networks" if settings.members > 1 else ""
    columns = ("error %", "NLL", "calibrated NLL", "ECE %", "best T", "AUROC", "FPR95 %", "DEE")
    more = {"passes": lambda name: str(passes[name]), "trainings": lambda name: f"{trainings[name]:g}"}
    shown = [table(title + several, rows, columns, first="drawn", more=more), _added_table(added)]
    about = {
        "settings": dict(study.settings), "recipe": recipe.as_dict(), "methods": rows, "passes": passes,
        "trainings": {name: trainings[name] for name in rows}, "chosen": noise, "statistics_add": added,
    }  # fmt: skip
    write_tables(folder / "augmentation", about, shown)
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
    title = f"{recipe['network']} on {recipe['data']}, at most {settings['images']} examples, {settings['augment']}"
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


def _added_table(added: Mapping[int, Mapping[str, float]]) -> Table:
    keys = [f"{key}_{name}" for key in ("as_it_is", "calibrated") for name in ("nll", "calibrated_nll")]
    body = [
        [str(count), *(f"{found[key]:+.4f} ± {found[f'{key}_se']:.4f}" for key in keys)]
        for count, found in added.items()
    ]
    columns = ["draws", "NLL", "after best T", "NLL, calibrated", "after best T, calibrated"]
    return Table("What drawing the statistics adds to draws over the input, with paired standard errors", columns, body)
