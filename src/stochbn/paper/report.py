"""From stored predictions to the paper's tables and figures; nothing here runs a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stochbn import metrics
from stochbn.files import read_tensors, write_bytes, write_json
from stochbn.paper import figures, tables
from stochbn.paper.runner import PREDICTIONS
from stochbn.predictive import entropy

__all__ = ["Method", "read_run", "write"]


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


def read_run(folder: Path) -> tuple[dict[str, Any], list[Method]]:
    """A run's description and the paper's methods, each without and with SBN, from its stored predictions.

    Raises:
        FileNotFoundError: this is no run folder, or predictions of a member are missing.
        ValueError: a file in it is damaged.
    """
    file = folder / "run.json"
    if not file.exists():
        raise FileNotFoundError(f"{str(folder)!r} is no run folder: it has no run.json")
    about = json.loads(file.read_text())
    count = about["recipe"]["members"]
    groups = {
        "SBN": ["plain-0"],
        "Deep Ensembles": [f"plain-{i}" for i in range(count)],
        "Dropout": ["dropout-0"],
    }
    stored: dict[str, dict[str, Tensor]] = {}
    about["seconds"] = {}
    for member in dict.fromkeys(name for names in groups.values() for name in names):
        stored[member], described = read_tensors(folder / member / "predictions.safetensors", PREDICTIONS)
        about["seconds"][member] = described["seconds"]

    def mean(members: Sequence[str], key: str) -> Tensor:
        return torch.stack([stored[name][key].exp() for name in members]).mean(0)

    methods = [
        Method(
            name,
            sbn,
            len(members),
            mean(members, f"{kind}.known"),
            stored[members[0]]["labels"],
            mean(members, f"{kind}.unknown"),
        )
        for name, members in groups.items()
        for sbn, kind in ((False, "plain"), (True, "sbn"))
    ]
    return about, methods


def write(folder: Path) -> list[tables.Table]:
    """Write a run's tables and entropy figure into its folder, from its stored predictions, and return the tables.

    ``results.json`` has every number with the run's settings, ``results.md`` the tables, ``entropy-cdf.png`` and
    ``.svg`` the figure.

    Raises:
        FileNotFoundError, ValueError: as `read_run`.
        OSError: the folder cannot be written.
    """
    about, methods = read_run(folder)
    scores = [method.scores() for method in methods]
    recipe = about["recipe"]
    shown = [
        tables.accuracy(scores, about["data"]["known"]["name"]),
        tables.out_of_domain(scores, about["data"]["unknown"]["name"]),
    ]
    write_json(folder / "results.json", {**about, "scores": scores})
    write_bytes(folder / "results.md", "\n\n".join(table.markdown() for table in shown).encode() + b"\n")
    figures.save_entropy_cdf(
        folder / "entropy-cdf",
        {(m.name, m.sbn): entropy(m.unknown) for m in methods if m.unknown is not None},
        classes=methods[0].known.shape[1],
        title=f"{recipe['network']} trained on {recipe['data']}, tested on {recipe['unknown']}",
    )
    return shown
