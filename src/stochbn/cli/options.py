"""Options and arguments that several commands share."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "DATA_HELP",
    "Augmentation",
    "Data",
    "Draws",
    "Ignored",
    "Jobs",
    "Override",
    "PosteriorFile",
    "Seed",
]


DATA_HELP = (
    "digits, mnist, notmnist, a data set on the Hugging Face Hub, or a local folder; NAME:0-4 selects classes. The "
    "folder in the environment variable STOCHBN_DATA is searched first."
)
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="A folder of images, a file (.parquet, .csv, .npy, .npz), a data set on the Hub, or module:loader. For a "
        "network of 'stochbn paper train': images, named as there. (default: the data that such a network was trained "
        "on)",
        show_default=False,
    ),
]
Draws = Annotated[int, typer.Option(min=1, help="Number of draws of the statistics (or dropout passes) to average.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of all random numbers.")]
Jobs = Annotated[int, typer.Option(min=0, help="Networks to train at the same time; 0: one for each core.")]
Override = functools.partial(typer.Option, show_default=False)
Augmentation = Annotated[
    str | None,
    Override(
        "--augment",
        help="Augment images at random in every draw: flip, shift:PIXELS, crop:SMALLEST, colour:STRENGTH, or several "
        "with commas, such as flip,shift:4.",
    ),
]
Ignored = Annotated[int | None, Override("--ignore", help="A label of pixels to ignore, such as 255.")]
PosteriorFile = Annotated[
    Path | None,
    typer.Option(
        "--posterior",
        help="A posterior of 'stochbn fit' or 'stochbn calibrate'. (default: beside the weights, "
        "WEIGHTS.sbn.safetensors)",
        show_default=False,
    ),
]
