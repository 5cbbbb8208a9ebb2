"""What each way of making passes earns: a call with all of them, without each, and with none, in plain passes.

LeNet-5, VGG-11 and ResNet-18 of this project, and three networks of others: MONAI's U-Net, EfficientNet-B0 and a
Segformer of Transformers, each where its package is installed (``pip install --no-deps monai efficientnet_pytorch
transformers regex tokenizers``). All have random weights and random images, and every example gets all 24 quasi-random
draws, so the figures say what passes cost and nothing of accuracy. All calls of a network are interleaved. Run it as
``python benchmarks/ways.py``; it takes minutes.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plain import plain_passes, settle
from rich.progress import track
from torch import nn

import stochbn
from stochbn.execution import WAYS, Settings
from stochbn.files import write_bytes, write_json
from stochbn.measuring.timing import seconds
from stochbn.report.tables import Table
from stochbn.sources import architectures

UNREACHED = 1e-9
"""A tolerance at which no example is done before it has had all draws."""


def unet() -> nn.Module:
    """MONAI's U-Net for two-dimensional images, with batch norm."""
    from monai.networks.nets import UNet  # type: ignore[import-not-found]

    network: nn.Module = UNet(2, 1, 3, (8, 16, 32), (2, 2), num_res_units=1, norm="BATCH")
    return network


def efficientnet() -> nn.Module:
    """EfficientNet-B0 of efficientnet_pytorch."""
    from efficientnet_pytorch import EfficientNet  # type: ignore[import-not-found]

    network: nn.Module = EfficientNet.from_name("efficientnet-b0", num_classes=5)
    return network


def segformer() -> nn.Module:
    """A small Segformer of Transformers, whose only batch norm is in its head."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation  # type: ignore[import-not-found]

    widths = {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 64}
    network: nn.Module = SegformerForSemanticSegmentation(SegformerConfig(num_labels=5, **widths))
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "LeNet-5": (lambda: architectures.build("lenet5"), (1, 28, 28), 100),
    "LeNet-5, large batch": (lambda: architectures.build("lenet5"), (1, 28, 28), 1000),
    "VGG-11": (lambda: architectures.build("vgg11", width=0.5, classes=5), (3, 32, 32), 100),
    "ResNet-18": (lambda: architectures.build("resnet18", width=0.25, classes=5), (3, 32, 32), 32),
    "U-Net": (unet, (1, 48, 48), 16),
    "EfficientNet-B0": (efficientnet, (3, 64, 64), 16),
    "Segformer": (segformer, (3, 64, 64), 16),
    "tabular 30-256-256-4": (
        lambda: nn.Sequential(
            nn.Linear(30, 256), nn.BatchNorm1d(256), nn.ReLU(),
            nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 4),
        ),
        (30,),
        32,
    ),
}  # fmt: skip
"""For each network how to build it, the shape of an example, and the number of examples in a batch."""


def measure(build: Callable[[], nn.Module], shape: tuple[int, ...], batch: int, repetitions: int) -> dict[str, Any]:
    """Units of a call with all ways, without each, and with none: medians of interleaved repetitions."""
    torch.manual_seed(0)
    model = build().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    data = [torch.randn(32, *shape) for _ in range(8)]
    settle(model, data)
    posterior = stochbn.fit(model, data, 16)
    x = torch.randn(batch, *shape)
    choices = {
        "all": frozenset(WAYS),
        **{f"without {way}": frozenset(WAYS) - {way} for way in WAYS},
        "none": frozenset(),
    }
    calls: dict[str, Callable[[], object]] = {}
    taken = {}
    for name, ways in choices.items():
        predictive = stochbn.Predictive(model, posterior, tolerance=UNREACHED, settings=Settings(ways=ways))
        predictive(x)
        calls[name] = lambda predictive=predictive: predictive(x)
        taken[name] = [
            line.partition(":")[0] for line in predictive.explain(x).splitlines() if line.endswith(": taken")
        ]

    plain = plain_passes(model, x)
    units: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        unit = min(seconds(plain) for _ in range(5))
        for name, call in calls.items():
            units[name].append(seconds(call) / unit)
    return {"batch": batch, "taken": taken["all"], "units": {n: statistics.median(u) for n, u in units.items()}}


def main() -> None:
    """Measure, print, and write benchmarks/ways.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="which (default: all)")
    parser.add_argument("--repetitions", type=int, default=5, help="repetitions of every call (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default: 2)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for ways.json and .md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    for name in track(options.networks, "networks"):
        build, shape, batch = NETWORKS[name]
        try:
            found[name] = measure(build, shape, batch, options.repetitions)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    machine = f"{platform.processor() or platform.machine()}, {options.threads} of {os.cpu_count()} cores"
    machine = f"{machine}, torch {torch.__version__}"
    title = f"Units (plain eager forward passes) of a call with 24 draws of every example; {machine}"
    columns = ["network", "batch", "all ways", *(f"without {way}" for way in WAYS), "none"]
    rows = [
        [name, str(one["batch"]), *(_cell(one, column) for column in ("all", *(f"without {w}" for w in WAYS), "none"))]
        for name, one in found.items()
    ]
    table = Table(title, columns, rows)
    print(table.markdown())
    write_bytes(options.out / "ways.md", table.markdown().encode() + b"\n")
    write_json(options.out / "ways.json", {"machine": machine, "networks": found})


def _cell(one: dict[str, Any], column: str) -> str:
    way = column.removeprefix("without ")
    return "not taken" if way in WAYS and way not in one["taken"] else f"{one['units'][column]:.1f}"


if __name__ == "__main__":
    main()
