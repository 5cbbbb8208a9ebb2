"""A study of a finished run: what several methods predict with its plain networks, and their scores.

A method's log-probabilities with a network are a file in the network's folder, in a folder with the name of the study.
Every file is written whole, and what is there is not made again, so that a study that was stopped continues. Tables
are of these files alone.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stochbn.metrics as metrics
from stochbn.distributed import Ranks
from stochbn.evaluation.predicting import on_accelerator
from stochbn.files import check_folder, read_tensors, write_tensors
from stochbn.paper.recipes import Member, Recipe
from stochbn.paper.report import read_recipe
from stochbn.paper.runner import PREDICTIONS, load_parts, packed, unpacked
from stochbn.predictions import entropy
from stochbn.processes import side_by_side
from stochbn.report.tables import Table
from stochbn.sources import checkpoints
from stochbn.sources.named import Images

__all__ = [
    "COLUMNS",
    "Made",
    "Predict",
    "Probs",
    "Rows",
    "Study",
    "cell",
    "divergence",
    "divergence_of_each",
    "ensembles",
    "mixture",
    "score",
    "score_all",
    "table",
]

Made = tuple[str, dict[str, Tensor], dict[str, Any]]
"""A method, its log-probabilities by the part of the data, and what to note beside them."""
Predict = Callable[["Study", Member, Sequence[str], Mapping[str, Images]], Iterator[Made]]
"""Makes some methods' predictions with one network, one after another; a function of a module."""
Probs = Mapping[str, Tensor]
"""Probabilities ``[N, K]`` by the part of the data: ``known``, ``unknown``."""
Rows = Mapping[str, Sequence[Mapping[str, float]]]
"""The scores of each method with each network."""

COLUMNS = {
    "error %": ("error", 2, 1.0), "NLL": ("nll", 4, 1.0), "calibrated NLL": ("calibrated_nll", 4, 1.0),
    "ECE %": ("ece", 2, 100.0), "best T": ("temperature", 2, 1.0), "AURC %": ("aurc", 3, 100.0),
    "AUROC": ("auroc", 4, 1.0), "FPR95 %": ("fpr95", 1, 100.0), "DEE": ("dee", 2, 1.0),
}  # fmt: skip
"""Columns of tables: the score, its digits, and a factor."""


@dataclass(frozen=True, eq=False)
class Study:
    """A study of a run.

    Attributes:
        folder: the run's.
        name: of the study: of its files in the run's folder and of the folders beside the networks.
        settings: how much is compared, as JSON holds it.
        relevant: which settings a method's predictions depend on; a function of a module.
        recipe: the run's.
        members: its plain networks.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    relevant: Callable[[Mapping[str, Any], str], Mapping[str, Any]]
    recipe: Recipe
    members: Sequence[Member]

    @classmethod
    def of(
        cls,
        folder: Path,
        name: str,
        settings: Mapping[str, Any],
        relevant: Callable[[Mapping[str, Any], str], Mapping[str, Any]],
        *,
        networks: int | None,
        calibrates: bool,
    ) -> Study:
        """The study of a run that can be studied.

        Args:
            folder: the run.
            name: of the study.
            settings: how much is compared.
            relevant: which of them a method depends on.
            networks: so many of its plain networks are asked for; None is all.
            calibrates: whether images are needed that the run held out.

        Raises:
            FileNotFoundError: this is no run folder.
            ValueError: it has fewer networks, or has held no images out.
            OSError: the study's files cannot be written.
        """
        check_folder(folder, *(f"{name}.{ending}" for ending in ("json", "md", "png", "svg")))
        recipe = read_recipe(folder)
        if calibrates and not recipe.held_out:
            raise ValueError(
                f"{str(folder)!r} is a run that trained on all images, so there are none to calibrate on; make one "
                "with --held-out 0.1"
            )
        if networks is not None and not 1 <= networks <= recipe.members:
            raise ValueError(f"{str(folder)!r} has {recipe.members} plain networks, {networks} were asked for")
        members = [member for member in recipe.all_members() if member.kind == "plain"]
        return cls(folder, name, settings, relevant, recipe, members)

    @property
    def format(self) -> str:
        """Of its files."""
        return f"stochbn.{self.name.partition('-')[0]}/1"

    def file(self, member: Member, method: str) -> Path:
        """Where a method's predictions with a network are."""
        return self.folder / member.name / self.name / f"{method.replace(', ', '-')}.safetensors"

    def stored(self, member: Member, method: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A method's log-probabilities with a network and what is noted beside them, if they are there.

        Raises:
            ValueError: the file is damaged, or was made with other settings.
        """
        file = self.file(member, method)
        if not file.exists():
            return None
        tensors, about = read_tensors(file, self.format)
        if self.relevant(about["settings"], method) != self.relevant(self.settings, method):
            raise ValueError(
                f"{str(file)!r} was made with other settings ({about['settings']}); delete the folders {self.name!r} "
                "in the run folder, or use these settings"
            )
        return tensors, about

    def read(self, member: Member, method: str, prefix: str = "") -> dict[str, Tensor]:
        """A method's probabilities with a network.

        Raises:
            FileNotFoundError: they are not there.
        """
        found = self.stored(member, method)
        if found is None:
            raise FileNotFoundError(
                f"the {self.name} in {str(self.folder)!r} lacks {method!r} of {member.name}; run it to its end"
            )
        parts = [part for part in ("known", "unknown") if f"{prefix}{part}" in found[0]]
        return {part: found[0][f"{prefix}{part}"].exp() for part in parts}

    def plain(self, known: int | None, unknown: int | None) -> tuple[list[dict[str, Tensor]], Tensor]:
        """What each plain network predicts for the first so many images, or all, and the labels of the known ones.

        Raises:
            FileNotFoundError, ValueError: predictions are missing or damaged.
        """
        most = {"known": known, "unknown": unknown}
        found, labels = [], torch.empty(0)
        for member in self.members:
            tensors, _ = read_tensors(self.folder / member.name / "predictions.safetensors", PREDICTIONS)
            labels = tensors["labels"][:known]
            parts = {part: tensors.get(f"plain.{part}") for part in most}
            found.append({part: logs[: most[part]].exp() for part, logs in parts.items() if logs is not None})
        return found, labels

    def network(self, member: Member) -> nn.Module:
        """A network, on the accelerator if there is one."""
        return on_accelerator(checkpoints.load(self.folder / member.name / "network.safetensors").model)

    def make(
        self,
        methods: Mapping[Member, Sequence[str]],
        predict: Predict,
        *,
        jobs: int = 1,
        ranks: Ranks | None = None,
        progress: Callable[[int, int], None],
    ) -> None:
        """Make the predictions that are not there yet.

        Args:
            methods: of each network.
            predict: makes them.
            jobs: networks side by side.
            ranks: the processes of a job, which share the networks.
            progress: called with the number of predictions made and of all, of this rank.

        Raises:
            FileNotFoundError, ValueError: the run's own predictions or data are missing; files are of other settings.
            ProcessError: a process failed.
        """
        for member in methods:  # refused before the work, not after it
            read_tensors(self.folder / member.name / "predictions.safetensors", PREDICTIONS)
            check_folder(self.folder / member.name / self.name)
        ranks = ranks or Ranks(None)
        own = dict(itertools.islice(methods.items(), ranks.rank, None, ranks.count))
        missing = {m: [one for one in wanted if self.stored(m, one) is None] for m, wanted in own.items()}
        waiting = {member: lacking for member, lacking in missing.items() if lacking}
        total = sum(map(len, own.values()))
        counted = itertools.count(total - sum(map(len, waiting.values())))

        def step() -> None:
            progress(next(counted), total)

        step()
        parts = load_parts(self.recipe) if waiting else {}
        if jobs == 1:
            for member, lacking in waiting.items():
                _make(self, member, lacking, parts, predict, step)
        else:
            tasks = {m.name: (self, m, lacking, packed(parts), predict) for m, lacking in waiting.items()}
            side_by_side(_make_unpacked, tasks, jobs, step)


def _make(
    study: Study,
    member: Member,
    lacking: Sequence[str],
    parts: Mapping[str, Images],
    predict: Predict,
    step: Callable[[], None],
) -> None:
    for method, tensors, about in predict(study, member, lacking, parts):
        file = study.file(member, method)
        file.parent.mkdir(exist_ok=True)
        write_tensors(file, study.format, tensors, {"settings": dict(study.settings), **about})
        step()


def _make_unpacked(
    study: Study,
    member: Member,
    lacking: Sequence[str],
    arrays: dict[str, Any],
    predict: Predict,
    step: Callable[[], None],
) -> None:
    _make(study, member, lacking, unpacked(arrays), predict, step)


def mixture(predictions: Sequence[Probs]) -> dict[str, Tensor]:
    """The mean probabilities of several networks."""
    return {part: torch.stack([p[part] for p in predictions]).mean(0) for part in predictions[0]}


def ensembles(plain: Sequence[Probs], chosen: int) -> dict[str, list[dict[str, Tensor]]]:
    """Ensembles of 1, 2, ... networks, by the size: each begins with one of the first `chosen` networks."""
    around = [*plain, *plain]
    return {
        f"ensemble of {size}": [mixture(around[first : first + size]) for first in range(chosen)]
        for size in range(1, len(plain) + 1)
    }


def score(probs: Probs, labels: Tensor) -> dict[str, float]:
    """The scores of one prediction of known and, if there are any, unknown images."""
    found = metrics.evaluate(probs["known"], labels)
    best = metrics.calibrated_nll(probs["known"], labels)
    found |= {"calibrated_nll": best["nll"], "temperature": best["temperature"]}
    found["aurc"] = metrics.risk_coverage(entropy(probs["known"]), probs["known"].argmax(1) != labels)["aurc"]
    if "unknown" in probs:
        found |= metrics.ood(entropy(probs["known"]), entropy(probs["unknown"]))
    return found


def score_all(
    methods: Mapping[str, Sequence[Probs]], yardstick: Mapping[str, Sequence[Probs]], labels: Tensor
) -> dict[str, list[dict[str, float]]]:
    """The scores of methods and of `ensembles` with every network, with how large an ensemble is as good (``dee``)."""
    rows = {name: [score(p, labels) for p in found] for name, found in {**methods, **yardstick}.items()}
    reached = [statistics.mean(row["calibrated_nll"] for row in rows[name]) for name in yardstick]
    for found in rows.values():
        nll = statistics.mean(row["calibrated_nll"] for row in found)
        for row in found:
            row["dee"] = metrics.deep_ensemble_equivalent(nll, reached)
    return rows


def divergence(exact: Tensor, probs: Tensor) -> float:
    """The mean Kullback-Leibler divergence of predictions from exact ones, in nats."""
    return max(divergence_of_each(exact, probs).mean().item(), 0.0)


def divergence_of_each(exact: Tensor, probs: Tensor) -> Tensor:
    """What `divergence` is the mean of: ``[N]``."""
    tiny = torch.finfo(probs.dtype).tiny
    return (exact.double() * (exact.clamp(min=tiny).log() - probs.clamp(min=tiny).log())).sum(1)


def table(
    title: str,
    rows: Rows,
    columns: Sequence[str],
    *,
    spread: bool = False,
    first: str = "method",
    more: Mapping[str, Callable[[str], str]] | None = None,
) -> Table:
    """Mean scores over networks as a table.

    Args:
        title: its title.
        rows: the scores.
        columns: some of `COLUMNS`.
        spread: whether standard deviations over networks are shown.
        first: the name of the column of methods.
        more: columns before the scores, each by what it shows of a method.
    """
    more = more or {}
    body = [
        [name, *(show(name) for show in more.values()), *(cell(found, *COLUMNS[one], spread) for one in columns)]
        for name, found in rows.items()
    ]
    return Table(title, [first, *more, *columns], body)


def cell(rows: Sequence[Mapping[str, float]], key: str, digits: int, factor: float, spread: bool = False) -> str:
    """A score's mean over networks, and its standard deviation if wanted; what no ensemble reaches is ``more``."""
    values = [factor * row[key] for row in rows if key in row]
    if not values:
        return "-"
    if max(values) == math.inf:
        return "more"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if spread and len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"
