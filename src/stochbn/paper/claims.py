"""The paper's claims on the networks of a finished run, with the joint posterior and draws over the input beside them.

Every method makes all its draws, but one: the joint posterior with the defaults of the library, where sampling stops
early. Its passes are counted. Predictions that a run lacks are made for each of its networks, one file a method;
`tabulate` reads these alone.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stochbn.augment as augment
import stochbn.metrics as metrics
from stochbn.evaluation.fitting import fit_posterior
from stochbn.evaluation.predicting import predict_all
from stochbn.execution import Draw, Passes
from stochbn.files import read_tensors
from stochbn.metrics.differences import paired
from stochbn.paper.recipes import Member, Recipe
from stochbn.paper.report import read_recipe
from stochbn.paper.runner import PREDICTIONS, fit_images
from stochbn.paper.study import Made, Probs, Study, divergence_of_each, mixture, score
from stochbn.predictive import Exact, Predictive, Predictor
from stochbn.report.facts import surroundings
from stochbn.report.tables import Table, write_tables
from stochbn.sources.named import Images

__all__ = ["DROPOUT", "ENSEMBLE", "ONE", "predict", "settings_of", "tabulate"]

INPUTS = 8
"""Draws with the input changed at random."""
EXACT = 200
"""Test images for exact inference, which takes ``draws`` mini-batches for each."""
PLAIN, CENTRE, SBN = "plain", "centre alone", "SBN"
"""The network as it is; the paper's posterior with every statistic at its median, "no SBN" as published; its draws."""
JOINT, DEFAULTS, INPUT = "joint", "joint, defaults", "input"
"""Beside that: all draws from the joint posterior, those after which sampling stops by default, and of the input."""
OWN = JOINT, DEFAULTS, INPUT
EXACTLY, OBSERVED = "exact", "joint, observed centre"
"""Exact inference on a few images, and the joint posterior about the centre that it has: that of mini-batches."""
RUN = {PLAIN: "plain", CENTRE: "median", SBN: "sbn"}
"""What a run itself predicts, and the names in its files."""
ONE, ENSEMBLE, DROPOUT = "one network", "ensemble of", "Dropout"
COMPARED = (
    (CENTRE, PLAIN), (SBN, CENTRE), (SBN, PLAIN), (JOINT, PLAIN), (DEFAULTS, PLAIN), (INPUT, PLAIN), (JOINT, SBN),
    (DEFAULTS, JOINT), (INPUT, SBN),
)  # fmt: skip
"""Pairs of methods whose difference, the first less the second, is computed."""


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """How predictions are made: with the augmentation of training, or small shifts where there was none."""
    return {"augment": "flip,shift:4" if recipe.augment else "shift:1", "inputs": INPUTS, "exact": EXACT}


def predict(folder: Path, *, jobs: int = 1, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Make the predictions that are not there yet, in the folder of a finished run.

    Args:
        folder: the run.
        jobs: networks side by side.
        progress: called with the number of predictions made and of all.

    Raises:
        FileNotFoundError: this is no run folder, or a network or its predictions are missing.
        ValueError: a file is damaged or was made with other settings.
        ProcessError: a process failed.
        OSError: the folder cannot be written.
    """
    study = _study(folder)
    first = study.members[0]
    few = EXACTLY, OBSERVED
    methods = {member: (*OWN, *(few if member == first else ())) for member in study.members}
    study.make(methods, _predict, jobs=jobs, progress=progress)


def _study(folder: Path) -> Study:
    settings = settings_of(read_recipe(folder))
    return Study.of(folder, "claims", settings, _relevant, networks=None, calibrates=False)


def _relevant(settings: Mapping[str, Any], method: str) -> Mapping[str, Any]:
    return settings


class _Counting(Predictive):
    """A predictive that counts the passes of examples."""

    passes = 0

    def _pass(self, made: Passes, block: Sequence[Draw]) -> Tensor:
        values = super()._pass(made, block)
        self.passes += len(values) * values.shape[1]
        return values


def _predict(study: Study, member: Member, methods: Sequence[str], parts: Mapping[str, Images]) -> Iterator[Made]:
    recipe, settings = study.recipe, study.settings
    model, seed = study.network(member), recipe.schedule(member).seed
    shown = fit_images(recipe, member, parts["train"])
    changes = augment.named(settings["augment"])
    batch, few = recipe.statistics_batch, {"known": parts["known"].first(settings["exact"])}
    every = {part: parts[part] for part in ("known", "unknown") if part in parts}
    joint = functools.partial(fit_posterior, model, shown, batch, seed, kind="joint", batches=None)
    running = joint(centre="running")
    for method in methods:
        predictor: Predictor
        if method == EXACTLY:
            others = (inputs for inputs, _ in shown.shuffled(seed).batches(64 * (batch - 1)))
            predictor = Exact(model, others, batch, recipe.draws)
        elif method == INPUT:
            predictor = Predictive(model, None, settings["inputs"], tolerance=0, augment=changes)
        elif method == DEFAULTS:
            predictor = _Counting(model, running, recipe.draws)
        else:
            posterior = running if method == JOINT else joint(centre="observed")
            predictor = Predictive(model, posterior, recipe.draws, tolerance=0)
        images, generator = every if method in OWN else few, torch.Generator().manual_seed(seed)
        logs = {part: predict_all(predictor, some, generator).probs.log().cpu() for part, some in images.items()}
        total = sum(map(len, images.values()))
        yield method, logs, {"passes": predictor.passes / total} if isinstance(predictor, _Counting) else {}


def tabulate(folder: Path) -> dict[str, Any]:
    """Write ``claims.json`` and ``claims.md`` into a run's folder, from its stored predictions.

    Scores of one network and of ensembles of some of the run's are means over them. So are differences, and their
    standard errors, paired image by image: that of the mean is at most the mean of the networks' own.

    Returns:
        What ``claims.json`` holds: ``scores`` by group and method, ``changes`` by group and pair of methods,
        ``exact``, the divergence (nats) of two posteriors from exact inference on some images, ``passes`` of an image
        with one network by method, and the ``recipe``.

    Raises:
        FileNotFoundError, ValueError: predictions are missing, damaged or of other settings.
        OSError: the folder cannot be written.
    """
    study = _study(folder)
    recipe = study.recipe
    methods, labels = _read(study, study.members)
    groups: dict[str, Mapping[str, Sequence[Probs]]] = {}
    count = len(study.members)
    for size in range(1, count + 1):
        starts = range(count if size < count else 1)
        name = ONE if size == 1 else f"{ENSEMBLE} {size}"
        groups[name] = {
            method: [mixture([every[(start + i) % count] for i in range(size)]) for start in starts]
            for method, every in methods.items()
        }
    dropout = [member for member in recipe.all_members() if member.kind == "dropout"]
    if dropout:
        groups[DROPOUT] = _read(study, dropout)[0]
    exact, observed = (study.read(study.members[0], method)["known"] for method in (EXACTLY, OBSERVED))
    few = {PLAIN: methods[PLAIN][0]["known"], SBN: methods[SBN][0]["known"], OBSERVED: observed}
    divergences = {method: divergence_of_each(exact, probs[: len(exact)]) for method, probs in few.items()}
    farther = divergences[SBN] - divergences[OBSERVED]
    about = {
        "recipe": recipe.as_dict(), "settings": dict(study.settings), "images": len(labels), **surroundings(),
        "passes": {SBN: recipe.draws, JOINT: recipe.draws, DEFAULTS: _passes(study), INPUT: study.settings["inputs"]},
        "scores": {name: {m: _mean([score(p, labels) for p in each]) for m, each in group.items()}
                   for name, group in groups.items()},
        "changes": {name: _changes(group, labels) for name, group in groups.items()},
        "exact": {"images": len(exact), **{f"kl_{method}": kl.mean().item() for method, kl in divergences.items()},
                  "kl_change": farther.mean().item(), "kl_change_se": math.sqrt(farther.var().item() / len(exact))},
    }  # fmt: skip
    write_tables(folder / "claims", about, [table(about)])
    return about


def _read(study: Study, members: Sequence[Member]) -> tuple[dict[str, list[Probs]], Tensor]:
    """The probabilities of every method with some networks of one kind, and the labels."""
    found: dict[str, list[Probs]] = {}
    labels = torch.empty(0)
    for member in members:
        tensors, _ = read_tensors(study.folder / member.name / "predictions.safetensors", PREDICTIONS)
        labels = tensors["labels"]
        parts = [part for part in ("known", "unknown") if f"plain.{part}" in tensors]
        for method, key in RUN.items():
            if f"{key}.known" in tensors:
                found.setdefault(method, []).append({part: tensors[f"{key}.{part}"].exp() for part in parts})
        for method in OWN if member.kind == "plain" else ():
            found.setdefault(method, []).append(study.read(member, method))
    return found, labels


def _passes(study: Study) -> float:
    """The mean number of passes of an image with one network, by the defaults."""
    stored = [study.stored(member, DEFAULTS) for member in study.members]
    return statistics.mean(float(one[1]["passes"]) for one in stored if one is not None)


def _changes(group: Mapping[str, Sequence[Probs]], labels: Tensor) -> dict[str, dict[str, float]]:
    calibrated = {m: [metrics.calibrated_nll_of_each(p["known"], labels) for p in each] for m, each in group.items()}
    found = {}
    for method, base in COMPARED:
        if method not in group or base not in group:
            continue
        rows = []
        for i, (after, before) in enumerate(zip(group[method], group[base], strict=True)):
            unknown = (before["unknown"], after["unknown"]) if "unknown" in after else None
            known, nlls = (before["known"], after["known"]), (calibrated[base][i], calibrated[method][i])
            rows.append(paired(known, labels, unknown, nlls))
        found[f"{method} - {base}"] = _mean(rows)
    return found


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.mean(row[key] for row in rows) for key in rows[0]}


def table(about: Mapping[str, Any]) -> Table:
    """The scores of every method, with what it changes from the plain network and its passes for a prediction."""
    recipe, settings = about["recipe"], about["settings"]
    rows = []
    for group, scores in about["scores"].items():
        size = int(group.removeprefix(ENSEMBLE)) if group.startswith(ENSEMBLE) else 1
        for method, row in scores.items():
            change = about["changes"][group].get(f"{method} - {PLAIN}")
            cost = size * (recipe["draws"] if group == DROPOUT else about["passes"].get(method, 1))
            rows.append([
                f"{group}: {method}", f"{cost:.1f}".removesuffix(".0"), f"{row['error']:.2f}",
                f"{row['nll']:.4f}", difference(change, "nll"),
                f"{row['calibrated_nll']:.4f}", difference(change, "calibrated_nll"), f"{100 * row['ece']:.2f}",
                f"{row['auroc']:.4f}" if "auroc" in row else "-",
            ])  # fmt: skip
    columns = ["method", "passes", "error %", "NLL", "from plain", "calibrated NLL", "from plain", "ECE %", "AUROC"]
    title = f"{recipe['network']} on {recipe['data']}, {about['images']} test images, input: {settings['augment']}"
    return Table(title, columns, rows)


def difference(change: Mapping[str, float] | None, key: str, digits: int = 4) -> str:
    """A difference and its standard error as text; a dash where there is none."""
    if change is None or f"{key}_change" not in change:
        return "-"
    return f"{change[f'{key}_change']:+.{digits}f} ± {change[f'{key}_change_se']:.{digits}f}"
