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
"""Examples of the data that the network is traced with."""


@about_networks()
def export(
    given: Given,
    path: Annotated[Path, typer.Option("--out", help="File to write. Its ending, .onnx or .pt2, sets the format.")],
    data: Data = None,
    posterior: PosteriorFile = None,
    draws: Annotated[int, typer.Option(min=1, help="Number of draws of the statistics in the file.")] = 16,
    seed: Seed = 0,
) -> None:
    """Write a network with its draws as one file, for services: ONNX, or torch.export's .pt2.

    The same input always gets the same probabilities, entropy and mutual information. The file takes any number of
    inputs like those of the data. Its outputs are compared with Python's before it is saved.
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
