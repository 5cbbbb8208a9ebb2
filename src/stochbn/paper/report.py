"""From stored predictions to the paper's tables and figures; nothing here runs a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stochbn import metrics
from stochbn.files import read_tensors, write_bytes, write_json
from stochbn.paper import figures, tables
from stochbn.paper.recipes import Recipe
from stochbn.paper.runner import PREDICTIONS
from stochbn.paper.tables import Table
from stochbn.predictive import entropy

__all__ = ["Method", "methods", "tabulate", "write", "write_run"]


@dataclass(frozen=True, eq=False)
class Method:
    """What one method predicts.

    Attributes:
        name: ``SBN`` (a single network), ``Deep Ensembles`` or ``Dropout``.
        sbn: whether the batch-norm statistics were drawn.
        members: number of networks.
        known: probabilities ``[N, K]`` for test objects of the known classes.
        labels: their labels ``[N]``.
        unknown: probabilities ``[M, K]`` for objects of other classes, if there are any.
    """

    name: str
    sbn: bool
    members: int
    known: Tensor
    labels: Tensor
    unknown: Tensor | None = None

    def scores(self) -> dict[str, Any]:
        """Name, `metrics.evaluate` of the known objects, mean entropies (nats) and `metrics.ood` of the entropies."""
        found: dict[str, Any] = {"method": self.name, "sbn": self.sbn, "members": self.members}
        found |= metrics.evaluate(self.known, self.labels)
        found["entropy_known"] = entropy(self.known).mean().item()
        if self.unknown is not None:
            found["entropy_unknown"] = entropy(self.unknown).mean().item()
            found |= metrics.ood(entropy(self.known), entropy(self.unknown))
        return found


def methods(plain: Sequence[Mapping[str, Tensor]], dropout: Sequence[Mapping[str, Tensor]]) -> list[Method]:
    """The paper's methods, each without and, where there are posteriors, with SBN.

    Args:
        plain: what `stochbn.paper.runner.predict_member` returned for networks without dropout: the first is the
            single network, several are also a Deep Ensemble.
        dropout: likewise for networks with dropout; several are averaged.
    """
    groups = {"SBN": plain[:1], "Deep Ensembles": plain if len(plain) > 1 else [], "Dropout": dropout}

    def mean(members: Sequence[Mapping[str, Tensor]], key: str) -> Tensor | None:
        return torch.stack([m[key].exp() for m in members]).mean(0) if all(key in m for m in members) else None

    found = []
    for name, members in groups.items():
        for sbn, kind in ((False, "plain"), (True, "sbn")):
            if members and (known := mean(members, f"{kind}.known")) is not None:
                unknown = mean(members, f"{kind}.unknown")
                found.append(Method(name, sbn, len(members), known, members[0]["labels"], unknown))
    return found


def tabulate(scores: Sequence[dict[str, Any]], known: str, unknown: str | None) -> list[Table]:
    """The table of errors and calibration and, with unknown data, the out-of-domain table, from `Method.scores`."""
    return [tables.accuracy(scores, known), *([tables.out_of_domain(scores, unknown)] if unknown else [])]


def write(
    folder: Path, about: Mapping[str, Any], found: Sequence[Method], known: str, unknown: str | None, title: str
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

    Raises:
        OSError: the folder cannot be written.
    """
    scores = [method.scores() for method in found]
    shown = tabulate(scores, known, unknown)
    write_json(folder / "results.json", {**about, "scores": scores})
    write_bytes(folder / "results.md", "\n\n".join(table.markdown() for table in shown).encode() + b"\n")
    entropies = {(m.name, m.sbn): entropy(m.unknown) for m in found if m.unknown is not None}
    if entropies:
        classes = found[0].known.shape[1]
        figures.save_entropy_cdf(folder / "entropy-cdf", entropies, classes=classes, title=title)
    return shown


def write_run(folder: Path) -> list[Table]:
    """Write a run's tables and figure into its folder, from its stored predictions alone, and return the tables.

    Raises:
        FileNotFoundError: this is no run folder, or predictions of a member are missing.
        ValueError: a file in it is damaged.
        OSError: the folder cannot be written.
    """
    file = folder / "run.json"
    if not file.exists():
        raise FileNotFoundError(f"{str(folder)!r} is no run folder: it has no run.json")
    about = json.loads(file.read_text())
    recipe = Recipe(**about["recipe"])
    stored: dict[str, list[dict[str, Tensor]]] = {"plain": [], "dropout": []}
    about["seconds"] = {}
    for member in recipe.all_members():
        tensors, described = read_tensors(folder / member.name / "predictions.safetensors", PREDICTIONS)
        stored[member.kind].append(tensors)
        about["seconds"][member.name] = described["seconds"]
    title = f"{recipe.network} trained on {recipe.data}, tested on {recipe.unknown}"
    known, unknown = (about["data"].get(part, {}).get("name") for part in ("known", "unknown"))
    return write(folder, about, methods(stored["plain"], stored["dropout"]), known, unknown, title)
