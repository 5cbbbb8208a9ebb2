"""The command that writes a network and its posterior for services: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stochbn.cli.console import say, status
from stochbn.cli.inputs import default_posterior, find_posterior
from stochbn.cli.options import NetworkFile, PosteriorFile, Seed
from stochbn.files import check_file

__all__ = ["export"]

ENDINGS = {".onnx": "onnx", ".pt2": "pt2"}


def export(
    network: NetworkFile,
    path: Annotated[Path, typer.Option("--out", help="File to write: its ending, .onnx or .pt2, says of which kind.")],
    posterior: PosteriorFile = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of the statistics that the file has.")] = 16,
    seed: Seed = 0,
) -> None:
    """Write a network with SBN as one file, for services: ONNX, or torch.export's .pt2.

    The same input always gets the same probabilities, entropy and mutual information. The file is compared with Python
    before it is there.
    """
    import torch

    import stochbn
    from stochbn.paper import checkpoints

    if path.suffix not in ENDINGS:
        raise ValueError(f"--out must end in {' or '.join(ENDINGS)}, got {str(path)!r}")
    check_file(path)
    checkpoint = checkpoints.load(network)
    fitted = find_posterior(network, posterior)
    if fitted is None:
        raise FileNotFoundError(
            f"there is no posterior {str(default_posterior(network))!r}: run 'stochbn fit' on the network first, or "
            "name one with --posterior"
        )
    size = checkpoint.arguments["size"]
    generator = torch.Generator().manual_seed(seed)
    example = torch.randn(4, checkpoint.arguments["channels"], size, size, generator=generator)
    write = getattr(stochbn.export, ENDINGS[path.suffix])
    with status(f"exporting {network.name}"):
        try:
            found = write(checkpoint.model, fitted, path, example, draws, seed=seed)
        except ImportError as error:
            raise ValueError(str(error)) from error
    say(
        f"Saved {path}: {draws} draws, {found.bytes / 2**20:.1f} MiB. Its outputs ({', '.join(found.outputs)}) differ "
        f"from Python's by {found.difference:.1g} at most, on random inputs.",
        path,
    )
