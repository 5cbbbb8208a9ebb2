"""What commands are given: data, and posteriors beside networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stochbn.cli.console import follow, progress_bars

if TYPE_CHECKING:  # the experiments are imported by the commands that use them
    from stochbn.sources.checkpoints import Checkpoint
    from stochbn.sources.named import Images

__all__ = ["check_images", "default_posterior", "load_images"]


def load_images(source: str, split: str) -> Images:
    """Load data with a progress bar."""
    from stochbn.sources.named import load

    with progress_bars() as bars:
        return load(source, split, follow(bars, f"loading {source} ({split})"))


def default_posterior(network: Path) -> Path:
    """Where the posterior of a network, or of weights, is if nothing else is said: beside it."""
    name = network.name.removesuffix(".safetensors")
    return network.with_name(f"{name.removesuffix('.pt').removesuffix('.pth')}.sbn.safetensors")


def check_images(checkpoint: Checkpoint, images: Images, labelled: bool = False) -> None:
    """Refuse images that a network was not built for."""
    arguments = checkpoint.arguments
    expected = (arguments["channels"], arguments["size"], arguments["size"])
    if images.shape != expected:
        raise ValueError(
            f"{images.name} has images of {list(images.shape)} (channels, height, width), the network takes "
            f"{list(expected)}"
        )
    if labelled and images.classes != checkpoint.classes:
        raise ValueError(
            f"{images.name} has the classes {', '.join(images.classes)}, the network was trained on "
            f"{', '.join(checkpoint.classes)}; select its classes as in NAME:0-{arguments['classes'] - 1}"
        )
