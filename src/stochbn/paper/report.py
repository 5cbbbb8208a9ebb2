"""From stored predictions to the paper's tables and figures; nothing here runs a network."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stochbn.evaluation.methods import Method, methods, score
from stochbn.files import check_folder, read_tensors
from stochbn.measuring.goodness import distances
from stochbn.paper import figures
from stochbn.paper.folders import RESULTS
from stochbn.paper.page import page_of_run
from stochbn.paper.published import published
from stochbn.paper.recipes import Recipe
from stochbn.paper.runner import PREDICTIONS, STATISTICS
from stochbn.paper.schedule import read_log
from stochbn.posteriors import Factorized, FactorizedLog, load
from stochbn.report.page import write_page
from stochbn.report.results import tabulate, write
from stochbn.report.tables import Published, Table, write_tables

__all__ = ["read_recipe", "read_run", "read_statistics", "tabulate_run", "write_run", "write_seeds"]


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
    loss and accuracy, where there are logs; and ``report.html`` has all of this on one page, with pictures of examples.

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
    shown = tabulate_run(first, scores)
    write_tables(folder / "results", {**about, "scores": scores}, shown)
    return shown


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


def _published(recipe: Mapping[str, Any]) -> Published | None:
    return published(recipe["network"], recipe["data"])


def _names(about: Mapping[str, Any]) -> tuple[str, str | None]:
    """The names of a run's known and, if it has any, unknown data."""
    return about["data"]["known"]["name"], about["data"].get("unknown", {}).get("name")
