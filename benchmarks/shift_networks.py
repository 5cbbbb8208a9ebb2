"""The networks of `shift.py`: some of `harm_networks.py`, and the committed ResNet-18s of the paper's experiments."""

from __future__ import annotations

from pathlib import Path

import torch
from harm_networks import CROPS, RECIPES, Data, Examples, Recipe, trained
from torch import nn

from stochbn.sources import architectures, checkpoints
from stochbn.sources.named import load

__all__ = ["SEEDS", "members", "with_recipe"]

FOLDER = Path(__file__).parents[1] / "results" / "trained" / "resnet18"
SEEDS = {"ResNet-18": 0, "ResNet-18, seed 1": 1, "ResNet-18, seed 2": 2}
"""The committed networks, which differ in the seed of their training alone."""


def with_recipe(name: str, folder: Path) -> tuple[Recipe, nn.Module]:
    """A network in evaluation mode, with the recipe that it was trained by.

    Args:
        name: of `shift.NETWORKS`.
        folder: where trained networks of `harm_networks` are, or are put after training.
    """
    if name not in SEEDS:
        return RECIPES[name], trained(name, folder)
    model: nn.Module = checkpoints.load(FOLDER / f"plain-{SEEDS[name]}" / "network.safetensors").model.eval()
    return COMMITTED, model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def members(name: str) -> list[str]:
    """The networks that make an ensemble with this one, which is the first of them; none if there are no others."""
    return list(SEEDS) if name == next(iter(SEEDS)) else []


def _cifar5() -> Data:
    """The first five classes of CIFAR-10, divided as for the committed ResNet-18; the others are the other five."""
    train, held_out = load("cifar10:0-4", "train").held_out(0.1, seed=0)
    parts = train, held_out, load("cifar10:0-4", "test"), load("cifar10:5-9", "train")
    return Data(*(Examples(part.pixels, part.labels) for part in parts))


COMMITTED = Recipe(
    _cifar5,
    lambda: architectures.build("resnet18", classes=5, width=0.25),
    "CIFAR-10 (JPEG copy), classes 0-4, flips and crops, 60 epochs",
    "classes 5-9",
    epochs=60,
    rate=1e-3,
    augment=CROPS,
)
