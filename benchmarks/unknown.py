"""Detectors of unknown classes of pytorch-ood, on the trained networks, with and without draws.

The networks are the three trained ResNet-18 of ``results/trained/resnet18``. They know five classes of CIFAR-10, and
the images of the other five are unknown. What a detector fits sees training images; every number that it leaves open is
its default, so nothing is chosen on test data. A detector is asked about the plain network, and under draws: of the
statistics by ``stochbn.fit`` with its defaults, or of the input by flips and shifts. Under draws its score is the mean
of the scores of all draws. Run it as::

    pip install pytorch-ood==0.4.0          # it needs a torchvision that was built for the installed torch
    STOCHBN_DATA=... python benchmarks/unknown.py

It takes a quarter of an hour of one core, and writes unknown.json and unknown.md.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pytorch_ood import detector
from torch import Tensor, nn

import stochbn
from stochbn import augment
from stochbn.augment import Views
from stochbn.files import write_bytes, write_json
from stochbn.measuring.timing import machine
from stochbn.paper.training import augment as training_augment
from stochbn.predictions import entropy
from stochbn.report.tables import Table
from stochbn.sources import checkpoints
from stochbn.sources.named import Images, as_input, load

ROOT = Path(__file__).parent.parent
NETWORKS = tuple(ROOT / "results" / "trained" / "resnet18" / f"plain-{i}" / "network.safetensors" for i in range(3))
KNOWN, UNKNOWN = "cifar10:0-4", "cifar10:5-9"
DRAWS = 8
BATCH = 250
FITTED, TEST = 5000, 2500
"""How many training images detectors are fitted to, and test images of known and of unknown classes."""
BODY = 11
"""The layers up to the last feature maps; a pooling, a flattening and a linear layer follow."""
PLAIN, STATISTICS, INPUT = "plain", f"{DRAWS} draws of the statistics", f"{DRAWS} draws of the input"
BASE = "Entropy"


@dataclass(frozen=True)
class Seen:
    """What the network made of some images.

    Attributes:
        maps: feature maps ``[N, D, H, W]``.
        features: their means over places, ``[N, D]``.
        logits: ``[N, K]``.
    """

    maps: Tensor
    features: Tensor
    logits: Tensor


class Network:
    """The trained network in two parts, under any statistics."""

    def __init__(self, model: nn.Sequential) -> None:
        self.model, self.body, self.head = model.eval(), model[:BODY], model[BODY:]
        self.linear: nn.Linear = model[-1]  # type: ignore[assignment]

    @torch.no_grad()
    def see(self, images: Tensor, draw: Mapping[str, Tensor]) -> Seen:
        """What it makes of inputs ``[N, C, H, W]`` with the statistics of a draw; none are its own."""
        maps = torch.cat([torch.func.functional_call(self.body, dict(draw), (x,)) for x in images.split(BATCH)])
        features = maps.mean((2, 3))
        return Seen(maps, features, self.linear(features))


Score = Callable[[Seen], Tensor]
"""From what the network made of images to scores ``[N]``; higher is less known."""


def detectors(network: Network, train: Seen, labels: Tensor) -> dict[str, Score]:
    """All detectors, fitted."""
    w, b = network.linear.weight.detach(), network.linear.bias.detach()
    of_logits = [
        detector.Entropy(None),
        detector.MaxSoftmax(None),
        detector.MaxLogit(None),
        detector.EnergyBased(None),
        detector.GEN(None),
        detector.KLMatching(None).fit_logits(train.logits, labels),
    ]
    of_features = [
        detector.KNN(None),
        detector.Mahalanobis(None),
        detector.RMD(None),
        detector.ViM(None, d=w.shape[1] // 2, w=w, b=b),
        detector.SHE(None, network.linear),
    ]
    of_maps = [detector.ReAct(None, network.head), detector.ASH(None, network.head)]
    found: dict[str, Score] = {}
    for one in of_logits:
        found[type(one).__name__] = lambda seen, one=one: one.predict_logits(seen.logits)  # type: ignore[misc]
    for one in of_features:
        one.fit_features(train.features, labels)
        found[type(one).__name__] = lambda seen, one=one: one.predict_features(seen.features)  # type: ignore[misc]
    of_maps[0].fit_feature_maps(train.maps, labels)
    for one in of_maps:
        found[type(one).__name__] = lambda seen, one=one: one.predict_feature_maps(seen.maps)  # type: ignore[misc]
    return found


def ways(network: Network, train: Images, images: Tensor) -> dict[str, Iterator[Seen]]:
    """What the network makes of test images, plain and in every draw."""
    torch.manual_seed(0)
    posterior = stochbn.fit(network.model, [as_input(training_augment(train.pixels[:1024]))], 16, reference=False)
    drawn = posterior.iter_draws(DRAWS, torch.Generator().manual_seed(0), quasi=True)
    views = Views(augment.named("flip,shift:4"), len(images), 0)
    return {
        PLAIN: iter([network.see(images, {})]),
        STATISTICS: (network.see(images, draw) for draw in drawn),
        INPUT: (network.see(views(images, number), {}) for number in range(DRAWS)),
    }


@torch.no_grad()
def measure(model: Any, train: Images, known: Images, unknown: Images) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """For each way and detector the scores of known and of unknown images."""
    network = Network(model)
    scores = detectors(network, network.see(as_input(train.pixels), {}), train.labels)
    images = torch.cat([as_input(known.pixels), as_input(unknown.pixels)])
    found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for way, draws in ways(network, train, images).items():
        sums = {name: torch.zeros(len(images), dtype=torch.float64) for name in scores}
        probs = torch.zeros(len(images), len(known.classes), dtype=torch.float64)
        for seen in draws:
            for name, score in scores.items():
                sums[name] += score(seen).double()
            probs += seen.logits.double().softmax(1)
        if way != PLAIN:
            sums["entropy of the mean (stochbn)"] = entropy(probs / DRAWS)
        split = {name: values.split([len(known), len(unknown)]) for name, values in sums.items()}
        found[way] = {name: (first, second) for name, (first, second) in split.items()}
    return found


def placements(known: Tensor, unknown: Tensor) -> tuple[Tensor, Tensor]:
    """For each known image the share of unknown ones with a higher score, and the other way round; ties count half."""

    def below(values: Tensor, others: Tensor) -> Tensor:
        ordered = others.sort().values
        return (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)) / 2 / len(others)

    return 1 - below(known, unknown), below(unknown, known)


def summarised(networks: list[Any]) -> dict[str, Any]:
    """Means over networks: AUROC and FPR95 in %, and what the AUROC is above that of the plain entropy.

    The standard error of the difference is that of DeLong et al., Biometrics 44 (1988), 837-845, of one network.
    """
    rows: dict[str, Any] = {}
    for way, names in networks[0].items():
        for name in names:
            each = []
            for network in networks:
                known, unknown = network[way][name]
                mine, base = placements(known, unknown), placements(*network[PLAIN][BASE])
                change = [a - b for a, b in zip(mine, base, strict=True)]
                error = math.sqrt(sum(float(part.var()) / len(part) for part in change))
                fpr95 = float((unknown < known.quantile(0.95)).double().mean())
                each.append((100 * float(mine[0].mean()), 100 * fpr95, 100 * float(change[0].mean()), 100 * error))
            auroc, fpr95, gain, error = (statistics.mean(values) for values in zip(*each, strict=True))
            rows.setdefault(way, {})[name] = {"auroc": auroc, "fpr95": fpr95, "gain": gain, "error": error}
    return rows


def page(found: dict[str, Any]) -> str:
    """The table."""
    ways = found["ways"]
    order = sorted(ways[INPUT], key=lambda name: -ways.get(PLAIN, {}).get(name, ways[INPUT][name])["auroc"])
    cells = "{auroc:.2f} ({gain:+.2f} ± {error:.2f})"
    rows = [
        [
            name,
            *(cells.format(**way[name]) if name in way else "-" for way in ways.values()),
            *(f"{way[name]['fpr95']:.1f}" if name in way else "-" for way in ways.values()),
        ]
        for name in order
    ]
    titles = ("detector", *(f"AUROC %, {way}" for way in ways), *(f"FPR95 %, {way}" for way in ways))
    about = "in brackets the difference from the entropy of the plain network"
    title = f"Known and unknown classes, means over three ResNet-18, {about}; {found['about']}"
    return Table(title, titles, rows).markdown()


def main() -> None:
    """Measure, print, and write unknown.json and unknown.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, help="use so many images of each part, for a quick look without files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for unknown.json and .md")
    options = parser.parse_args()
    train = load(KNOWN, "train").held_out(0.1, seed=0)[0].shuffled(0).first(options.few or FITTED)
    known, unknown = (load(name, "test").shuffled(0).first(options.few or TEST) for name in (KNOWN, UNKNOWN))
    networks = []
    for file in NETWORKS:
        networks.append(measure(checkpoints.load(file).model, train, known, unknown))
        print(file.parent.name, "done", flush=True)
    about = (
        f"{len(train):,} training, {len(known):,} known and {len(unknown):,} unknown images, pytorch-ood "
        f"{version('pytorch-ood')}, {machine()}, Python {platform.python_version()}"
    )
    found = {"about": about, "ways": summarised(networks)}
    print(page(found))
    if options.few is None:
        write_json(options.out / "unknown.json", found)
        write_bytes(options.out / "unknown.md", f"{page(found)}\n".encode())


if __name__ == "__main__":
    main()
