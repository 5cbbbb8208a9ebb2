"""The command that scores data of any length with a network and its posterior: predict."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stochbn.cli.console import follow, progress_bars, say, show
from stochbn.cli.options import Augmentation, Data, Draws, PosteriorFile, Seed
from stochbn.cli.subject import Given, Subject, about_networks

if TYPE_CHECKING:
    from torch import nn

    from stochbn.paper.data import Images
    from stochbn.sources import Chunk

__all__ = ["predict"]

SHOWN = 5
"""Rows that are shown: those with the largest uncertainty."""


@about_networks()
def predict(
    given: Given,
    path: Annotated[Path, typer.Option("--out", help="CSV or Parquet file, by its ending: one row for each object.")],
    data: Data = None,
    posterior: PosteriorFile = None,
    draws: Draws = 50,
    augment: Augmentation = None,
    seed: Seed = 0,
    top: Annotated[int, typer.Option("--top", min=1, help="So many of the most probable classes of each object.")] = 1,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Objects in a forward pass.")] = 250,
    part: Annotated[int, typer.Option("--part", min=1, help="Rows that are written at a time.")] = 4000,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at an object that cannot be read, in place of a row with an error.")
    ] = False,
    masks: Annotated[
        Path | None,
        typer.Option("--masks", help="Folder for PNG masks of class and entropy, if outputs are dense."),
    ] = None,
) -> None:
    """Predict data of any length with SBN: class, probability, entropy and mutual information of each object.

    Regression gives mean and standard deviation. Run it again to go on after it was stopped, killed even: rows are kept
    in OUT.parts until all are there.
    """
    from stochbn.augment import named
    from stochbn.files import check_folder
    from stochbn.paper.tables import Table
    from stochbn.predictive import Predictive
    from stochbn.scoring import check_table, score

    changes = named(augment) if augment is not None else None
    check_table(path)
    if masks is not None:
        check_folder(masks)
    subject = Subject.one(given)
    fitted = subject.need_posterior(posterior)
    predictive = Predictive(subject.model, fitted, draws, augment=changes, **subject.settings)
    objects = subject.load(data, "test")
    stream = objects if hasattr(objects, "chunks") else _Images(objects)
    read = {field.name: str(getattr(given, field.name)) for field in fields(given)}
    files = {"weights": _digest(subject.model), "posterior": _digest(posterior or subject.posterior)}
    with progress_bars() as bars:
        rows = score(
            predictive,
            stream,
            path,
            settings={
                **read,
                **files,
                "data": objects.name,
                "draws": draws,
                "augment": augment,
                "masks": masks and str(masks),
            },
            classes=subject.classes,
            top=top,
            batch=batch,
            part=part,
            seed=seed,
            strict=strict,
            masks=masks,
            progress=follow(bars, "predicting"),
        )
    count, failed, least = _summary(rows)
    if least:
        columns = [column for column in least[0] if column != "error"]
        cells = [[_shown(row[column]) for column in columns] for row in least]
        show([Table("least certain", [column.replace("_", " ") for column in columns], cells)])
    say(f"Saved {count} predictions as {path}; entropies are in nats.", path)
    if failed:
        say(f"{failed} objects could not be read: the column 'error' says why.")


def _summary(rows: Iterator[dict[str, Any]]) -> tuple[int, int, list[dict[str, Any]]]:
    """How many rows there are, how many of them have an error, and the least certain ones."""
    count = failed = 0

    def readable() -> Iterator[dict[str, Any]]:
        nonlocal count, failed
        for row in rows:
            count += 1
            if row["error"]:
                failed += 1
            else:
                yield row

    def uncertainty(row: dict[str, Any]) -> float:
        return next(float(row[name]) for name in ("entropy", "total_std", "total_std_0") if name in row)

    least = heapq.nlargest(SHOWN, readable(), key=uncertainty)
    return count, failed, least


def _shown(value: Any) -> str:
    try:
        return f"{float(value):.3f}" if "." in str(value) else str(value)
    except ValueError:
        return str(value)


def _digest(what: nn.Module | Path | None) -> str:
    """A checksum of a network's state, or of a file."""
    import safetensors.torch

    digest = hashlib.sha256()
    if isinstance(what, Path):
        digest.update(what.read_bytes())
    elif what is not None:
        for name, tensor in what.state_dict().items():
            digest.update(name.encode())
            digest.update(safetensors.torch.save({"": tensor.detach().cpu().contiguous().clone()}))
    return digest.hexdigest()


class _Images:
    """A data set of images in memory as a stream; keys are their numbers."""

    key_name = "image"

    def __init__(self, images: Images) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def chunks(self, size: int, start: int = 0) -> Iterator[Chunk]:
        """The images from a position on."""
        import torch

        from stochbn.sources import Chunk

        rest = self._images.take(torch.arange(start, len(self)))
        for inputs, labels in rest.batches(size):
            yield Chunk(list(range(start, start + len(labels))), [None] * len(labels), inputs)
            start += len(labels)
