"""The data of predictions: a stream of examples with keys, and a sample of it without labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stochbn.cli.subject import Subject

if TYPE_CHECKING:
    from stochbn.paper.data import Images
    from stochbn.sources import Chunk, Stream

__all__ = ["sampled", "stream_of"]

BATCH = 128
"""Examples of a sample that are in a batch, at most."""


def stream_of(subject: Subject, data: str | None, engine: str = "local") -> Stream:
    """The examples; Parquet files as what other processes can share.

    Raises:
        ValueError: the engine, or a URL, needs Parquet files and a network of the user's own.
    """
    from stochbn.sources import holds_parquet, is_url

    source = data or subject.data
    parquet = source is not None and holds_parquet(source)
    if subject.open_parquet is not None and source is not None and parquet:
        return subject.open_parquet(source, "test")
    if engine == "ray" or (data is not None and is_url(data)):
        asked = "--engine ray" if engine == "ray" else data
        raise ValueError(f"{asked} takes Parquet files, and a network of --model; got --data {source}")
    objects = subject.load(data, "test")
    stream: Stream = objects if hasattr(objects, "chunks") else _Images(objects)
    return stream


def sampled(stream: Stream, count: int, seed: int, size: int = BATCH) -> list[Any]:
    """Inputs of some examples that can be read, in batches.

    They are taken at random where the data can be read in any order. Of Parquet files and loaders they are the first
    ones. Examples that cannot be read, or hold what is not finite, are left out.

    Args:
        stream: the data.
        count: how many to take, at most; a loader gives whole batches.
        seed: where the order comes from.
        size: of the batches; a loader of the user's own has batches of its own sizes.
    """
    from torch import Tensor

    from stochbn.scoring import without_nan

    mixed: Any = stream.shuffled(seed) if hasattr(stream, "shuffled") else stream
    found, left = [], count
    for chunk in mixed.chunks(min(size, count)):
        inputs = without_nan(chunk).inputs
        if inputs is not None:
            found.append(inputs[:left] if isinstance(inputs, Tensor) else inputs)
        left -= len(chunk.keys)
        if left <= 0:
            break
    return found


class _Images:
    """A data set of images in memory as a stream; keys are their numbers."""

    key_name = "image"

    def __init__(self, images: Images) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def shuffled(self, seed: int) -> _Images:
        """The same images in a random order."""
        return _Images(self._images.shuffled(seed))

    def chunks(self, size: int, start: int = 0) -> Iterator[Chunk]:
        """The images from a position on."""
        import torch

        from stochbn.sources import Chunk

        rest = self._images.take(torch.arange(start, len(self)))
        for inputs, labels in rest.batches(size):
            yield Chunk(list(range(start, start + len(labels))), [None] * len(labels), inputs)
            start += len(labels)
