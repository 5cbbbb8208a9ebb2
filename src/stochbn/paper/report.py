"""From stored predictions to the paper's tables and figures; nothing here runs a network."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stochbn.metrics as metrics
from stochbn.files import check_folder, read_tensors, write_bytes, write_json
from stochbn.paper import figures, tables
from stochbn.paper.differences import paired, standard_errors
from stochbn.paper.folders import RESULTS
from stochbn.paper.goodness import distances
from stochbn.paper.page import page_of_run
from stochbn.paper.recipes import Recipe
from stochbn.paper.runner import PREDICTIONS, STATISTICS
from stochbn.paper.tables import Table
from stochbn.paper.training import read_log
from stochbn.posteriors import Factorized, FactorizedLog, load
from stochbn.predictions import entropy
from stochbn.report.page import write_page

__all__ = [
    "Method",
    "methods",
    "read_recipe",
    "read_run",
    "read_statistics",
    "score",
    "tabulate",
    "tabulate_run",
    "write",
    "write_run",
    "write_seeds",
]

LEAST_ERRORS = 10
"""So many known objects must be classified wrongly for a best temperature."""


@dataclass(frozen=True, eq=False)
class Method:
    """What one method predicts.

    Attributes:
        name: ``plain`` (a single network), ``Deep Ensembles`` or ``Dropout``.
        sbn: whether the batch-norm statistics were drawn.
        members: number of networks.
        known: probabilities ``[N, K]`` for test objects of the known classes.
        labels: their labels ``[N]``.
        unknown: probabilities ``[M, K]`` for objects of other classes, if there are any.
        expected_entropy: ``[N]``, nats: the mean of the entropies over draws and networks for the known objects,
            which is their aleatoric uncertainty; None in runs of earlier versions.
        median: with SBN, the same method with every statistic at its median in place of draws, which is what the
            published experiments call "no SBN"; where that was predicted.
    """

    name: str
    sbn: bool
    members: int
    known: Tensor
    labels: Tensor
    unknown: Tensor | None = None
    expected_entropy: Tensor | None = None
    median: Method | None = None

    @functools.cached_property
    def calibrated(self) -> Tensor | None:
        """The NLL of every object after the best temperature for others; None where too few are classified wrongly.

        With hardly any error among them the best temperature is 0, and one error elsewhere costs more than all else.
        """
        wrong = (self.known.argmax(1) != self.labels).sum().item()
        return metrics.calibrated_nll_of_each(self.known, self.labels) if wrong >= LEAST_ERRORS else None

    def scores(self) -> dict[str, Any]:
        """Name, `metrics.evaluate` of the known objects, mean entropies (nats) and `metrics.ood` of the entropies.

        The number of known ``objects``, and the standard errors of `standard_errors`, are with them.
        With at least 10 known objects that are classified wrongly also ``calibrated_nll`` (nats) and the best
        ``temperature``.
        """
        found: dict[str, Any] = {"method": self.name, "sbn": self.sbn, "members": self.members}
        found |= metrics.evaluate(self.known, self.labels)
        if self.calibrated is not None:
            found["calibrated_nll"] = self.calibrated.mean().item()
            found["temperature"] = metrics.calibrated_nll(self.known, self.labels)["temperature"]
        found["entropy_known"] = entropy(self.known).mean().item()
        if self.unknown is not None:
            found["entropy_unknown"] = entropy(self.unknown).mean().item()
            found |= metrics.ood(entropy(self.known), entropy(self.unknown))
        return found | {"objects": len(self.labels)} | standard_errors(self.known, self.labels, self.unknown)


def methods(plain: Sequence[Mapping[str, Tensor]], dropout: Sequence[Mapping[str, Tensor]]) -> list[Method]:
    """The paper's methods, each without and, where there are posteriors, with SBN.

    Args:
        plain: what `stochbn.paper.predicting.predict_member` returned for networks without dropout: the first is the
            single network, several are also a Deep Ensemble.
        dropout: likewise for networks with dropout; several are averaged.
    """
    groups = {"plain": plain[:1], "Deep Ensembles": plain if len(plain) > 1 else [], "Dropout": dropout}

    def mean(
        members: Sequence[Mapping[str, Tensor]], key: str, of: Callable[[Tensor], Tensor] = Tensor.exp
    ) -> Tensor | None:
        there = members and all(key in m for m in members)
        return torch.stack([of(m[key]) for m in members]).mean(0) if there else None

    def method(name: str, members: Sequence[Mapping[str, Tensor]], kind: str, **others: Any) -> Method | None:
        known = mean(members, f"{kind}.known")
        if known is None:
            return None
        unknown = mean(members, f"{kind}.unknown")
        expected = mean(members, f"{kind}.known.expected_entropy", Tensor.double)
        return Method(name, kind == "sbn", len(members), known, members[0]["labels"], unknown, expected, **others)

    found = []
    for name, members in groups.items():
        found.append(method(name, members, "plain"))
        found.append(method(name, members, "sbn", median=method(name, members, "median")))
    return [one for one in found if one is not None]


def score(found: Sequence[Method]) -> list[dict[str, Any]]:
    """The scores of every method; one with SBN also has its differences from the same one without (`paired`).

    Where the same one at the medians of the statistics was predicted, its scores are under ``median_`` and the
    differences from it under ``noise_``.
    """
    scores = [method.scores() for method in found]
    without = {method.name: method for method in found if not method.sbn}
    for method, row in zip(found, scores, strict=True):
        if method.sbn and method.name in without:
            row |= _changes(without[method.name], method)
        if method.median is not None:
            beside = method.median.scores()
            changes = _changes(method.median, method)
            row |= {f"median_{name}": value for name, value in beside.items() if isinstance(value, float)}
            row |= {f"noise_{name}": value for name, value in changes.items()}
    return scores


def _changes(one: Method, other: Method) -> dict[str, float]:
    """What changes from one method to another."""
    unknown = None if one.unknown is None or other.unknown is None else (one.unknown, other.unknown)
    calibrated = None if one.calibrated is None or other.calibrated is None else (one.calibrated, other.calibrated)
    return paired((one.known, other.known), other.labels, unknown, calibrated)


def tabulate(
    scores: Sequence[dict[str, Any]], known: str, unknown: str | None, published: str | None = None
) -> list[Table]:
    """The table of errors and calibration, with unknown data the out-of-domain table, and what SBN changes.

    Args:
        scores: of every method, from `score`. Those that earlier versions wrote have no differences: the table of what
            SBN changes is left out.
        known: name of the data of known classes.
        unknown: name of the data of unknown classes, if any.
        published: the network whose published numbers to show beside the measured ones, if any.
    """
    shown = [tables.accuracy(scores, known, published)]
    if unknown:
        shown.append(tables.out_of_domain(scores, unknown))
    if any("nll_change" in row for row in scores):
        shown.append(tables.changes(scores, known))
    if any("noise_nll_change" in row for row in scores):
        shown.append(tables.noise(scores, known))
    return shown


def write(
    folder: Path,
    about: Mapping[str, Any],
    found: Sequence[Method],
    known: str,
    unknown: str | None,
    title: str,
    published: str | None = None,
    scores: Sequence[dict[str, Any]] | None = None,
) -> list[Table]:
    """Write tables and entropy figure into a folder, and return the tables.

    ``results.json`` has every number with the settings, ``results.md`` the tables, ``entropy-cdf.png`` and ``.svg``
    the figure, where there is unknown data.

    Args:
        folder: an existing folder.
        about: the settings to record.
        found: the methods.
        known: name of the data of known classes.
        unknown: name of the data of unknown classes, if any.
        title: the figure's title.
        published: as for `tabulate`.
        scores: of the methods, where they are known already.

    Raises:
        OSError: the folder cannot be written.
    """
    scores = score(found) if scores is None else scores
    shown = _write_tables(folder, {**about, "scores": scores}, tabulate(scores, known, unknown, published))
    entropies = {(m.name, m.sbn): entropy(m.unknown) for m in found if m.unknown is not None}
    if entropies:
        classes = found[0].known.shape[1]
        known_entropies = {(m.name, m.sbn): entropy(m.known) for m in found}
        figures.save_entropy_cdf(folder / "entropy-cdf", entropies, classes=classes, title=title, known=known_entropies)
    return shown


def read_recipe(folder: Path) -> Recipe:
    """What a run folder is a run of.

    Raises:
        FileNotFoundError: this is no run folder.
        ValueError: its description is damaged.
    """
    file = folder / "run.json"
    if not file.exists():
        raise FileNotFoundError(f"{str(folder)!r} is no run folder: it has no run.json")
    try:
        return Recipe.from_dict(json.loads(file.read_text())["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is damaged or not of a run: {error}") from error


def read_run(folder: Path) -> tuple[dict[str, Any], list[Method]]:
    """A run's description (its ``run.json``, and each member's seconds) and what its methods predict.

    Raises:
        FileNotFoundError: this is no run folder, or predictions of a member are missing.
        ValueError: a file in it is damaged.
    """
    recipe = read_recipe(folder)
    about = json.loads((folder / "run.json").read_text())
    stored: dict[str, list[dict[str, Tensor]]] = {"plain": [], "dropout": []}
    about["seconds"] = {}
    for member in recipe.all_members():
        tensors, described = read_tensors(folder / member.name / "predictions.safetensors", PREDICTIONS)
        stored[member.kind].append(tensors)
        about["seconds"][member.name] = described["seconds"]
    return about, methods(stored["plain"], stored["dropout"])


def write_run(folder: Path) -> list[Table]:
    """Write a run's tables and figures into its folder, from what is stored there, and return the tables.

    Beside what `write` makes, ``statistics.png`` and ``.svg`` show observed and fitted statistics, and
    ``results.json`` has their distances for every layer, unless the file of the statistics, the largest of a run, is
    gone; ``training.png`` and ``.svg`` show every member's log of
    loss and accuracy, where there are logs; and ``report.html`` has all of this on one page, with pictures of objects.

    Raises:
        FileNotFoundError, ValueError: as `read_run`.
        OSError: the folder cannot be written.
    """
    check_folder(folder, *RESULTS)
    about, found = read_run(folder)
    if (folder / "plain-0" / "statistics.safetensors").exists():
        observations, posterior = read_statistics(folder)
        about["kolmogorov_smirnov"] = distances(observations, posterior)
        figures.save_statistics(folder / "statistics", observations, posterior)
    logs = {
        member.name: read_log(log)
        for member in read_recipe(folder).all_members()
        if (log := folder / member.name / "training.csv").exists()
    }
    if logs:
        figures.save_training(folder / "training", logs)
    recipe = about["recipe"]
    known, unknown = _names(about)
    title = f"{recipe['network']} trained on {recipe['data']}, tested on {recipe['unknown']}"
    scores = score(found)
    shown = write(folder, about, found, known, unknown, title, _published(recipe), scores)
    write_page(folder / "report.html", page_of_run(folder, about, found, scores, shown, logs))
    return shown


def read_statistics(folder: Path) -> tuple[dict[str, Tensor], Factorized | FactorizedLog]:
    """The first plain network's observed statistics, ``[M, 2, C]`` for every layer, and the posterior fitted to them.

    Raises:
        FileNotFoundError, ValueError: they are missing or damaged.
    """
    home = folder / "plain-0"
    posterior = load(home / "network.sbn.safetensors")
    if not isinstance(posterior, Factorized | FactorizedLog):
        raise ValueError(f"the posterior in {str(home)!r} is of the kind {posterior.kind}, not the paper's factorized")
    return read_tensors(home / "statistics.safetensors", STATISTICS)[0], posterior


def tabulate_run(about: Mapping[str, Any], scores: Sequence[dict[str, Any]]) -> list[Table]:
    """The tables of a run, from its description and its methods' scores."""
    return tabulate(scores, *_names(about), _published(about["recipe"]))


def write_seeds(runs: Sequence[Path], folder: Path) -> list[Table]:
    """Write the tables of several runs that differ in their seeds: mean and standard deviation of every number.

    What SBN changes has a standard error over the seeds in place of the deviation.

    Args:
        runs: at least two finished run folders.
        folder: where ``results.json`` and ``results.md`` go; it is made.

    Raises:
        FileNotFoundError, ValueError: as `read_run`; the runs differ in more than the seed, or not in the seed.
        OSError: the folder cannot be written.
    """
    check_folder(folder, *RESULTS)
    loaded = [read_run(run) for run in runs]
    recipes = [about["recipe"] for about, _ in loaded]
    seeds = [recipe["seed"] for recipe in recipes]
    first = loaded[0][0]
    if any({**recipe, "seed": 0} != {**recipes[0], "seed": 0} for recipe in recipes):
        raise ValueError("these runs differ in more than their seeds, so their numbers are not averaged")
    if any(about["data"] != first["data"] for about, _ in loaded):
        raise ValueError("these runs used different data, so their numbers are not averaged")
    if len(set(seeds)) < len(seeds) or len(seeds) < 2:
        raise ValueError(f"expected runs with at least two different seeds, got the seeds {seeds}")
    scores = [_over_seeds(rows) for rows in zip(*(score(found) for _, found in loaded), strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    about = {"recipe": {**recipes[0], "seed": seeds}, "data": first["data"], "runs": [str(run) for run in runs]}
    return _write_tables(folder, {**about, "scores": scores}, tabulate_run(first, scores))


def _over_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One method's scores in several runs: of each number mean and standard deviation, of a change the mean's error."""
    found: dict[str, Any] = {}
    for name, first in rows[0].items():
        if not all(name in row for row in rows):
            continue
        values = [row[name] for row in rows]
        if not isinstance(first, float):
            found[name] = first
        elif name.endswith("_change"):
            found[name] = statistics.mean(values)
            found[f"{name}_se"] = statistics.stdev(values) / math.sqrt(len(values))
        elif not name.endswith("_change_se"):
            found[name] = statistics.mean(values), statistics.stdev(values)
    return found


def _published(recipe: Mapping[str, Any]) -> str | None:
    """The network whose published numbers are from this recipe's data, if there are any."""
    network: str = recipe["network"]
    return network if recipe["data"] == tables.PUBLISHED_DATA.get(network) else None


def _names(about: Mapping[str, Any]) -> tuple[str, str | None]:
    """The names of a run's known and, if it has any, unknown data."""
    return about["data"]["known"]["name"], about["data"].get("unknown", {}).get("name")


def _write_tables(folder: Path, results: Any, shown: list[Table]) -> list[Table]:
    write_json(folder / "results.json", results)
    write_bytes(folder / "results.md", "\n\n".join(table.markdown() for table in shown).encode() + b"\n")
    return shown
