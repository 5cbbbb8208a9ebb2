"""The data of predictions: a stream of examples with keys, and a sample of it without labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from stochbn.cli.subject import Subject

if TYPE_CHECKING:
    from stochbn.sources import Chunk, Stream
    from stochbn.sources.named import Images

__all__ = ["sampled", "share", "stream_of"]

BATCH = 128
"""Largest number of examples in a batch of a sample."""


def stream_of(subject: Subject, data: str | None, engine: str = "local", group: str | None = None) -> Stream:
    """Open data as a stream of examples, with the groups in column `group`; processes can share Parquet files.

    Raises:
        ValueError: the engine, or a URL, needs Parquet files and a network of the user's own.
    """
    from stochbn.sources import holds_parquet, is_url

    source = data or subject.data
    parquet = source is not None and holds_parquet(source)
    if subject.open_parquet is not None and source is not None and parquet:
        return subject.open_parquet(source, "test", group)
    if engine == "ray" or (data is not None and is_url(data)):
        asked = "--engine ray" if engine == "ray" else data
        raise ValueError(f"{asked} takes Parquet files, and a network of --model; got --data {source}")
    objects = subject.load(data, "test", group=group)
    stream: Stream = objects if hasattr(objects, "chunks") else _Images(objects)
    return stream


def sampled(stream: Stream, count: int, seed: int, size: int = BATCH) -> list[Any]:
    """A sample of the inputs, in batches.

    The examples are chosen at random if the data can be read in any order. Of Parquet files and loaders they are the
    first ones. Examples that cannot be read, or have values that are not finite, are left out.

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


def share(batches: list[Any], rank: int, count: int) -> list[Any]:
    """The share of one rank in batches that all ranks have.

    All shares are equal. Batches of the same shape are joined first, so at most ``count - 1`` of their examples are
    left out.

    Args:
        batches: tensors ``[n, ...]``, or mappings of these.
        rank: which rank.
        count: how many ranks there are.

    Raises:
        ValueError: there are fewer examples than ranks, or batches of another kind.
    """
    import torch
    from torch import Tensor

    if count == 1:
        return batches
    alike: dict[Any, list[dict[str, Tensor]]] = {}
    for batch in batches:
        parts = {"": batch} if isinstance(batch, Tensor) else batch
        if not isinstance(parts, Mapping) or not all(isinstance(one, Tensor) and one.ndim for one in parts.values()):
            raise ValueError(
                f"ranks can share tensors, or mappings of tensors, got {type(batch).__name__}; use one process"
            )
        key = tuple((name, tuple(one.shape[1:]), one.dtype) for name, one in parts.items())
        alike.setdefault(key, []).append(dict(parts))
    found: list[Any] = []
    for group in alike.values():
        joined = {name: torch.cat([one[name] for one in group]) for name in group[0]}
        size = len(next(iter(joined.values()))) // count
        own = {name: one[rank * size : (rank + 1) * size] for name, one in joined.items()}
        if size:
            found.append(own.get("", own))
    if not found:
        raise ValueError(f"there are fewer examples than the {count} ranks; start fewer")
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
