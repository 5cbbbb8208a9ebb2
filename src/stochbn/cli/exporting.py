"""The command that writes a network and its posterior for services: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stochbn.cli.console import say, status
from stochbn.cli.options import Data, PosteriorFile, Seed
from stochbn.cli.subject import Given, Subject, about_networks
from stochbn.files import check_file

__all__ = ["export"]

ENDINGS = {".onnx": "onnx", ".pt2": "pt2"}
EXAMPLE = 4
"""Objects of the data that the network is followed with."""


@about_networks()
def export(
    given: Given,
    path: Annotated[Path, typer.Option("--out", help="File to write: its ending, .onnx or .pt2, says of which kind.")],
    data: Data = None,
    posterior: PosteriorFile = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of the statistics that the file has.")] = 16,
    seed: Seed = 0,
) -> None:
    """Write a network with SBN as one file, for services: ONNX, or torch.export's .pt2.

    The same input always gets the same probabilities, entropy and mutual information. The file takes inputs like those
    of the data, in any number, and is compared with Python before it is there.
    """
    import stochbn

    if path.suffix not in ENDINGS:
        raise ValueError(f"--out must end in {' or '.join(ENDINGS)}, got {str(path)!r}")
    check_file(path, [*given.files, data, posterior])
    subject = Subject.held(given, posterior)
    fitted = subject.need_posterior(posterior)
    objects = subject.load(data, "test")
    schema = getattr(objects, "schema", None)
    preprocess = subject.preprocess if schema is not None and schema.kind == "pictures" else None
    example = next(inputs for inputs, *_ in objects.batches(EXAMPLE))
    write = getattr(stochbn.export, ENDINGS[path.suffix])
    with status(f"exporting {subject.name}"):
        try:
            found = write(
                subject.model, fitted, path, example, draws, seed=seed, classes=subject.classes or None,
                preprocess=preprocess, **subject.settings,
            )  # fmt: skip
        except ImportError as error:
            raise ValueError(str(error)) from error
    say(
        f"Saved {path}: {draws} draws, {found.bytes / 2**20:.3g} MiB. Its outputs ({', '.join(found.outputs)}) differ "
        f"from Python's by {found.difference:.1g} at most, on random inputs.",
        path,
    )
