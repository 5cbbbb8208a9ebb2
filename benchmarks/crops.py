"""Draws over the input by crops and changes of colour, beside the flips and shifts of training.

The networks are the three trained ResNet-18 of ``results/trained/resnet18``, which were trained with flips and shifts.
Each predicts test images of the five classes that it knows, with at most 8 draws over the input alone, the first of
them clean. Temperatures are the best on training images that were held out, and `stochbn.choose_augmentation` chooses
on these too. No choice sees test data. Run it as::

    STOCHBN_DATA=... python benchmarks/crops.py

It takes a quarter of an hour of one core, and writes crops.json and crops.md.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stochbn
from stochbn import Predictive, augment, metrics
from stochbn.files import write_bytes, write_json
from stochbn.measuring.timing import machine
from stochbn.metrics.differences import paired
from stochbn.report.tables import Table
from stochbn.sources import checkpoints
from stochbn.sources.named import Images, as_input, load
from stochbn.tempering import best_temperature

ROOT = Path(__file__).parent.parent
NETWORKS = tuple(ROOT / "results" / "trained" / "resnet18" / f"plain-{i}" / "network.safetensors" for i in range(3))
DATA = "cifar10:0-4"
DRAWS = 8
BATCH = 250
HELD_OUT, TEST = 1500, 2500
"""How many images of each part."""
PLAIN, TRAINED, CHOSEN = "plain network", "flip,shift:4", "chosen of these, draw by draw"
FIXED = (
    TRAINED,
    "flip",
    "flip,crop:0.8",
    "flip,crop:0.6",
    "flip,colour:0.1",
    "flip,shift:4,colour:0.1",
)
SCORES = {"error": 2, "nll": 4, "calibrated_nll": 4, "ece": 2}
"""The scores and their digits."""


def log_probs(model: nn.Module, images: Images, changes: augment.Augment | None) -> Tensor:
    """``[N, K]``: of the mean probabilities over the draws."""
    predictive = Predictive(model, None, DRAWS, augment=changes)
    generator = torch.Generator().manual_seed(1)
    parts = [predictive(as_input(x), generator=generator).probs for x in images.pixels.split(BATCH)]
    return torch.cat(parts).double().log()


def chosen(model: nn.Module, held_out: Images) -> augment.turns:
    """What is chosen on held-out images."""
    batches = zip(map(as_input, held_out.pixels.split(BATCH)), held_out.labels.split(BATCH), strict=True)
    candidates = [augment.named(one) for one in FIXED]
    return stochbn.choose_augmentation(model, None, batches, candidates, draws=DRAWS, passes=6 * len(FIXED) + 1)


def measure(model: nn.Module, held_out: Images, test: Images) -> dict[str, Any]:
    """The scores of every way at the held-out temperature, its probabilities, and what was chosen."""
    turns = chosen(model, held_out)
    ways: dict[str, augment.Augment | None] = {PLAIN: None, **{one: augment.named(one) for one in FIXED}, CHOSEN: turns}
    found: dict[str, Any] = {"chosen": str(turns), "ways": {}}
    for name, changes in ways.items():
        temperature = best_temperature(log_probs(model, held_out, changes), held_out.labels)
        logs = log_probs(model, test, changes)
        probs = (logs / temperature).softmax(1)
        scores = metrics.evaluate(probs, test.labels)
        found["ways"][name] = {
            "error": scores["error"],
            "nll": scores["nll"],
            "calibrated_nll": metrics.calibrated_nll(probs, test.labels)["nll"],
            "ece": 100 * scores["ece"],
            "probs": probs,
        }
        print(name, {key: value for key, value in found["ways"][name].items() if key != "probs"}, flush=True)
    return found


def page(found: dict[str, Any]) -> str:
    """The table and what was chosen."""
    titles = ("draws over the input", "error %", "NLL", "calibrated NLL", "ECE %", f"NLL less that of `{TRAINED}`")
    rows = [
        [name, *(f"{row[key]:.{digits}f}" for key, digits in SCORES.items()), row["difference"]]
        for name, row in found["ways"].items()
    ]
    title = f"At most {DRAWS} draws over the input, means over three ResNet-18; {found['about']}"
    choices = "\n".join(f"- network {i}: `{text}`" for i, text in enumerate(found["chosen"]))
    told = "Chosen on held-out images, for the draws after the clean one:"
    return f"{Table(title, titles, rows).markdown()}\n\n{told}\n\n{choices}\n"


def summarised(networks: list[dict[str, Any]], labels: Tensor) -> dict[str, Any]:
    """Means over networks, and differences with the paired standard error of one network."""
    ways: dict[str, Any] = {}
    for name in networks[0]["ways"]:
        each = [network["ways"][name] for network in networks]
        ways[name] = {key: statistics.mean(one[key] for one in each) for key in SCORES}
        beside = [network["ways"][TRAINED]["probs"] for network in networks]
        pairs = [paired((two, one["probs"]), labels) for two, one in zip(beside, each, strict=True)]
        mean, error = (statistics.mean(pair[key] for pair in pairs) for key in ("nll_change", "nll_change_se"))
        ways[name]["difference"] = "-" if name == TRAINED else f"{mean:+.4f} ± {error:.4f}"
    return {"ways": ways, "chosen": [network["chosen"] for network in networks]}


def main() -> None:
    """Measure, print, and write crops.json and crops.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, help="use so many images of each part, for a quick look without files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for crops.json and .md")
    options = parser.parse_args()
    _, held_out = load(DATA, "train").held_out(0.1, seed=0)
    test = load(DATA, "test")
    held_out = held_out.shuffled(0).first(options.few or HELD_OUT)
    test = test.shuffled(0).first(options.few or TEST)
    networks = [measure(checkpoints.load(file).model, held_out, test) for file in NETWORKS]
    about = f"{len(held_out):,} held-out and {len(test):,} test images, {machine()}, Python {platform.python_version()}"
    found = {"about": about, **summarised(networks, test.labels)}
    print(page(found))
    if options.few is None:
        write_json(options.out / "crops.json", found)
        write_bytes(options.out / "crops.md", page(found).encode())


if __name__ == "__main__":
    main()
