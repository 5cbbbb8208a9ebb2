"""What becomes of a network when the data changes, and what `stochbn.adapt` and `stochbn.shift.Monitor` do about it.

Three of the networks of `harm_networks.py`, and the three ResNet-18s of `results/trained`, meet corrupted images, other
mixes of classes, both, and streams. In each case, a cell, methods are shown unlabelled examples and then predict other
ones, whose labels score them. What is chosen (a temperature, thresholds of conformal sets) is chosen on held-out clean
data, a part of the training data. No choice sees test data. Run it as::

    STOCHBN_DATA=... python benchmarks/shift.py --threads 1

It reads MNIST and CIFAR-10 from the folder that STOCHBN_DATA names, or from the Hugging Face Hub. Networks are trained
first, and kept in ``runs/shift``. Finished regimes are kept there too, for each version of the library and of these
files. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import shift_figures
import torch
from harm_networks import Data
from shift_methods import METHODS, Seen, Stream, Subject
from shift_networks import SEEDS, members, with_recipe
from shift_regimes import TESTS, Cell, Regime, alarms, regimes
from shift_report import alarm_scores, criteria, report
from torch import Tensor

import stochbn
from stochbn import conformal, metrics
from stochbn.files import write_bytes, write_json
from stochbn.measuring.timing import machine, seconds

NETWORKS = {"LeNet-5": 1, "ResNet-20": 2, "VGG-11": 1, **dict.fromkeys(SEEDS, 2)}
"""The networks, and which share of the cells of most regimes is measured: one in so many."""
SLOW = 3
"""Slow methods take part in one in so many cells; where not all cells are kept, at severity 5 alone."""
GROUPS = {"LeNet-5": 30, "ResNet-20": 15, "VGG-11": 15, **dict.fromkeys(SEEDS, 15)}
"""Mini-batches of each corruption for the alarm."""

CELL_SCORES = ("error", "coverage")
"""What is committed for each cell, in the order of the cells that a method took part in."""

Scored = tuple[Tensor, Tensor]
"""Probabilities ``[N, K]`` and labels."""


def cell_of(cell: Cell, regime: Regime, methods: list[str], subject: Subject) -> tuple[dict[str, Scored], Any]:
    """What each method predicts in a cell, and what `adapt` said of the examples; None for streams."""
    found: dict[str, list[Scored]] = {name: [] for name in methods}
    streams = {name: Stream(name, subject) for name in methods} if regime.stream else {}
    said = None
    for step in cell.steps():
        seen = Seen(subject, step.examples)
        for name in methods:
            predict = streams[name].update(step.examples) if regime.stream else METHODS[name].adapt(seen)
            found[name].append((predict(step.inputs), step.labels))
        if not regime.stream and "adapt" in methods:
            about = seen.adapted.adaptation
            assert about is not None
            said = {"look": about.look, "mixed": about.mixed}
    joined = {name: (torch.cat([p for p, _ in rows]), torch.cat([y for _, y in rows])) for name, rows in found.items()}
    return joined, said


def compared(regime: Regime, subject: Subject, thinned: bool) -> list[str]:
    """The methods that are compared in a regime."""
    names = [name for name in regime.methods or METHODS if not METHODS[name].several]
    if subject.members and not regime.stream:
        names += [name for name, method in METHODS.items() if method.several]
    return [name for name in names if not (METHODS[name].slow and thinned and regime.methods)]


def measure(regime: Regime, subject: Subject, thinned: bool, before: dict[str, Any] | None) -> dict[str, Any]:
    """All cells of a regime: scores of each cell, and the ECE over all of them together.

    Args:
        regime: the regime.
        subject: the network.
        thinned: whether not all of its cells are measured.
        before: what was measured before; only methods that are not in it are measured.
    """
    have: dict[str, Any] = {} if before is None else before["methods"]
    names = [name for name in compared(regime, subject, thinned) if name not in have]
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    pooled: dict[str, list[Scored]] = {name: [] for name in names}
    said = []
    for number, cell in enumerate(regime.cells):
        methods = [name for name in names if number % SLOW == 0 or not METHODS[name].slow]
        found, one = cell_of(cell, regime, methods, subject)
        said.append(one)
        for name, (probs, labels) in found.items():
            sets = conformal.evaluate(subject.sets[METHODS[name].sets](probs), labels)
            scores = metrics.evaluate(probs, labels)
            pooled[name].append((probs, labels))
            rows[name][cell.name] = {
                "error": scores["error"],
                "nll": scores["nll"],
                "coverage": 100 * sets["coverage"],
                "size": sets["size"],
            }
    plain = rows["plain"] if "plain" in rows else have["plain"]["by_cell"]
    return {
        "about": regime.about,
        "cells": [cell.name for cell in regime.cells],
        "adapt": said if before is None else before["adapt"],
        "methods": have | {name: summary(rows[name], plain, pooled[name]) for name in names},
    }


def summary(cells: dict[str, Any], plain: dict[str, Any], pooled: list[Scored]) -> dict[str, Any]:
    """Means over cells, and the change against the plain network with paired standard errors over cells."""
    found: dict[str, Any] = {
        key: statistics.mean(one[key] for one in cells.values()) for key in next(iter(cells.values()))
    }
    probs, labels = (torch.cat(parts) for parts in zip(*pooled, strict=True))
    found["ece"] = 100 * metrics.evaluate(probs, labels)["ece"]
    for key in ("error", "nll"):
        changes = [one[key] - plain[name][key] for name, one in cells.items()]
        error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else 0.0
        found |= {f"{key}_change": statistics.mean(changes), f"{key}_change_se": error, f"{key}_worst": max(changes)}
    rounded = {name: {key: float(f"{value:.5g}") for key, value in one.items()} for name, one in cells.items()}
    return found | {"by_cell": rounded}


def network_of(name: str, folder: Path, rows: Path, few: int | None) -> dict[str, Any]:
    """All regimes of a network; each is written to the folder `rows` once it is finished, and read from there again."""
    file = rows / f"{name.lower().replace(', ', '-')}{'' if few is None else f'-{few}'}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"regimes": {}}
    if found.get("finished") == list(METHODS):
        return found
    recipe, model = with_recipe(name, folder)
    data: Data = recipe.data()
    thin = NETWORKS[name] if few is None else 15
    kinds = regimes(data, thin=thin, tests=TESTS if few is None else few)
    subject = Subject.of(name, model, recipe, data)
    others = [Subject.of(other, *reversed(with_recipe(other, folder)), data) for other in members(name)[1:]]
    if others:
        subject = subject.with_members(others, data)
    found |= {
        "name": name,
        "about": recipe.about,
        "thin": thin,
        "examples": {part: len(examples) for part, examples in data._asdict().items()},
        "temperature": subject.temperature,
        "reference": subject.posterior.reference.nbytes if subject.posterior.reference else 0,
    }
    if "alarms" not in found:
        found["alarms"] = alarms(subject, data, GROUPS[name] if few is None else 2)
        write_json(file, found)
    for kind, regime in kinds.items():
        before = found["regimes"].get(kind)
        if before is not None and before["methods"].keys() >= set(compared(regime, subject, thin > 1)):
            continue
        took = seconds(
            lambda kind=kind, regime=regime, before=before: found["regimes"].update(
                {kind: measure(regime, subject, thin > 1, before)}
            )
        )
        write_json(file, found)
        methods = found["regimes"][kind]["methods"]
        errors = ", ".join(f"{method} {one['error']:.1f}" for method, one in methods.items())
        print(f"{name}, {kind} ({len(regime.cells)} cells, {took:.0f} s): {errors}", flush=True)
    found["finished"] = list(METHODS)
    write_json(file, found)
    return found


def published(network: dict[str, Any]) -> dict[str, Any]:
    """What is committed: all scores, without the cells of most scores and the single readings of the alarm."""
    kinds: dict[str, Any] = {}
    for kind, regime in network["regimes"].items():
        methods = {}
        for name, one in regime["methods"].items():
            cells = {key: f"{' '.join(str(cell[key]) for cell in one['by_cell'].values())}" for key in CELL_SCORES}
            methods[name] = {key: float(f"{v:.5g}") for key, v in one.items() if key != "by_cell"} | {"cells": cells}
        kinds[kind] = {"about": regime["about"], "cells": "; ".join(regime["cells"]), "methods": methods}
    return network | {"regimes": kinds, "alarms": alarm_scores(network["alarms"])}


def version() -> str:
    """A checksum of the library's code and of what measures here, so that rows of different versions are not mixed."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    files = [here / f"shift_{part}.py" for part in ("corruptions", "methods", "regimes")]
    for file in [*sorted(Path(stochbn.__file__).parent.rglob("*.py")), *files]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def main() -> None:
    """Train, measure, print, and write shift.json, shift.md and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="which (default: all)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads (default: all processors)")
    parser.add_argument("--few", type=int, help="a quick look: one cell in 15, with so many test examples")
    parser.add_argument("--runs", type=Path, default=Path("runs/shift"), help="folder for networks and finished rows")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder for shift.json, .md and figures"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    code = version()
    rows = options.runs / code
    rows.mkdir(parents=True, exist_ok=True)
    found = {name: network_of(name, options.runs / "networks", rows, options.few) for name in options.networks}
    for network in found.values():
        network["criteria"] = criteria(network)
    library = f"stochbn {stochbn.__version__} ({code}), Python {platform.python_version()}"
    about = f"{machine()}, threads: {options.threads}, {library}"
    text = report(found, about)
    print(text)
    write_json(options.out / "shift.json", {"machine": about, "networks": {k: published(v) for k, v in found.items()}})
    write_bytes(options.out / "shift.md", f"{text}\n".encode())
    shift_figures.save_all({name: one for name, one in found.items() if "seed" not in name}, options.out / "figures")


if __name__ == "__main__":
    main()
