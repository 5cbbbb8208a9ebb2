"""Which optimizer, learning rate and length of a cycle suits snapshots: held-out calibrated NLL of a run's network.

For a plain network of a run made with ``--held-out``, snapshots are taken in several ways, and their ensembles, of one
plain pass each, are scored on the held-out images alone, beside the network itself. Run it as
``python benchmarks/snapshots.py RUN --try sgd:0.05:2 --try adam:0.001:2``; it trains for some minutes a way.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
from rich.progress import Progress
from torch import nn

from stochbn import Ensemble, Predictive, augment, metrics
from stochbn.evaluation.predicting import PREDICT_BATCH
from stochbn.files import write_bytes
from stochbn.paper.report import read_recipe
from stochbn.paper.runner import load_parts
from stochbn.paper.snapshotting import Cycles, take_snapshots
from stochbn.report.tables import Table
from stochbn.sources import checkpoints


def main() -> None:
    """Measure, print, and write snapshots-NETWORK.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run that held images out")
    parser.add_argument("--member", type=int, default=0, help="which plain network (default: 0)")
    parser.add_argument("--count", type=int, default=3, help="snapshots (default: 3)")
    parser.add_argument("--try", dest="ways", action="append", required=True, help="OPTIMIZER:RATE:EPOCHS, repeated")
    parser.add_argument("--augment", help="how training images are changed, such as flip,shift:4 (default: not)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the table")
    options = parser.parse_args()
    recipe = read_recipe(options.run)
    model = checkpoints.load(options.run / f"plain-{options.member}" / "network.safetensors").model
    parts = load_parts(recipe)
    changes = augment.named(options.augment) if options.augment else None

    def scored(models: list[nn.Module]) -> list[str]:
        ensemble = Ensemble([Predictive(one) for one in models])
        probs = torch.cat([ensemble(x).probs for x, _ in parts["held-out"].batches(PREDICT_BATCH)])
        found = metrics.evaluate(probs, parts["held-out"].labels)
        calibrated = metrics.calibrated_nll(probs, parts["held-out"].labels)
        return [f"{found['error']:.2f}", f"{found['nll']:.4f}", f"{calibrated['nll']:.4f}"]

    rows = [["the network itself", "", "", *scored([model])]]
    for way in options.ways:
        cycles = Cycles.of(options.count, way)
        optimizer, rate, epochs = way.split(":")
        with Progress() as bars:
            bar = bars.add_task(way, total=None)
            members = take_snapshots(
                model, parts["train"], recipe, cycles, seed=options.member, augment=changes,
                progress=lambda done, total, bar=bar: bars.update(bar, completed=done, total=total),
            )  # fmt: skip
        networks = [member.model for member in members]
        rows.append([optimizer, rate, epochs, *scored(networks)])
        rows.append(["with the network itself", rate, epochs, *scored([model, *networks])])
        rows.append(["the last alone", rate, epochs, *scored(networks[-1:])])
        print(rows[-3:], flush=True)
    title = (
        f"Ensembles of {options.count} snapshots of a {recipe.network} on {len(parts['held-out'])} held-out images of "
        f"{recipe.data}; {platform.machine()}, torch {torch.__version__}"
    )
    columns = ["snapshots by", "highest rate", "epochs a cycle", "error %", "NLL", "calibrated NLL"]
    table = Table(title, columns, rows)
    write_bytes(options.out / f"snapshots-{recipe.network}.md", table.markdown().encode() + b"\n")
    print(table.markdown())


if __name__ == "__main__":
    main()
