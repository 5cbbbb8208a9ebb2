"""A user's own loader as data: any iterable of batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochbn.arrays import as_array
from stochbn.schema import Schema
from stochbn.sources.labels import as_labels
from stochbn.sources.objects import Chunk, ahead
from stochbn.tasks.boxes import boxes_of_targets

__all__ = ["LoaderObjects"]


class LoaderObjects:
    """The batches of a loader, in its own order and sizes.

    Args:
        name: its name in messages.
        loader: an iterable that can be read several times, such as a DataLoader: of tensors, ``(input, label)`` tuples,
            or mappings with ``labels``.
        limit: the largest number of examples.
        rank, ranks: take only every `ranks`-th batch, from number `rank` on.
    """

    key_name = "row"
    classes: tuple[str, ...] = ()

    def __init__(
        self, name: str, loader: Iterable[Any], limit: int | None = None, rank: int = 0, ranks: int = 1
    ) -> None:
        if isinstance(loader, Iterator):
            raise ValueError(f"{name!r} gives an iterator, used up after one pass; return a list or a DataLoader")
        self.name, self.loader, self.limit, self.rank, self.ranks = name, loader, limit, rank, ranks

    @property
    def schema(self) -> Schema:
        """What is known of it without going through it."""
        return Schema(name=self.name, kind="batches of a loader, in its own order")

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        try:
            count = len(self.loader.dataset)  # type: ignore[attr-defined]
            whole = self.ranks == 1 and not getattr(self.loader, "drop_last", False)
            if whole and getattr(self.loader, "sampler", None) is not None:
                count = min(count, len(self.loader.sampler))  # type: ignore[attr-defined]
                return count if self.limit is None else min(count, self.limit)
        except (AttributeError, TypeError):
            pass
        return sum(len(labels) for _, labels in self._batches())

    @property
    def labels(self) -> Tensor:
        """``[N]``.

        Raises:
            ValueError: batches have none.
        """
        found = torch.cat([labels for _, labels in self._batches()])
        if bool((found == -1).any()):
            raise ValueError(
                f"{self.name} gives batches without labels; expected (input, labels), or mappings with labels"
            )
        return found

    def shuffled(self, seed: int) -> LoaderObjects:
        """The same: the order is the loader's."""
        return self

    def first(self, count: int) -> LoaderObjects:
        """The first of the examples, in whole batches."""
        return LoaderObjects(self.name, self.loader, count, self.rank, self.ranks)

    def shard(self, rank: int, count: int, size: int) -> LoaderObjects:
        """Every `count`-th of the loader's batches, from number `rank` on; the loader itself makes all of them."""
        return LoaderObjects(self.name, self.loader, self.limit, self.rank + self.ranks * rank, self.ranks * count)

    def shard_positions(self, rank: int, count: int, size: int) -> Tensor:
        """Where each example of a shard is among all, ``[n]``; the loader is gone through once more."""
        lengths = [len(labels) for _, labels in self._batches()]
        batches = torch.split(torch.arange(sum(lengths)), lengths)
        return torch.cat([torch.empty(0, dtype=torch.int64), *batches[rank::count]])

    def batches(self, size: int) -> Iterator[tuple[Any, Tensor]]:
        """The loader's batches, read ahead, and their labels."""
        with contextlib.closing(ahead(self._batches())) as batches:
            yield from batches

    def chunks(self, size: int, start: int = 0) -> Iterator[Chunk]:
        """The loader's batches from the one that begins at a position on."""
        before = 0
        for inputs, labels in self._batches():
            if before >= start:
                yield Chunk([before + i for i in range(len(labels))], [None] * len(labels), inputs)
            before += len(labels)

    def _batches(self) -> Iterator[tuple[Any, Tensor]]:
        done = 0
        for number, batch in enumerate(self.loader):
            inputs, labels = _parts(batch, self.name)
            if number % self.ranks == self.rank:
                yield inputs, labels
            done += len(labels)
            if self.limit is not None and done >= self.limit:
                return


def _parts(batch: Any, name: str) -> tuple[Any, Tensor]:
    """What the network gets of a batch, and labels; -1 where there are none."""
    labels: Any = None
    inputs = batch
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
        inputs = {key: value for key, value in batch.items() if key != "labels"}
    elif isinstance(batch, (tuple, list)):
        inputs = batch[0] if batch else None
        labels = batch[1] if len(batch) > 1 else None
    first = next((v for v in inputs.values() if isinstance(v, Tensor)), None) if isinstance(inputs, Mapping) else inputs
    if not isinstance(first, Tensor) or not first.ndim:
        raise ValueError(
            f"{name} gives a {type(batch).__name__} of {type(first).__name__}; expected tensors, (input, label) tuples "
            "or mappings of tensors"
        )
    if isinstance(labels, (list, tuple)) and labels and all(isinstance(one, Mapping) for one in labels):
        return inputs, boxes_of_targets(labels)
    labels = as_array(labels)
    if isinstance(labels, (list, tuple)) and len(labels) == len(first) and not any(map(torch.is_tensor, labels)):
        labels = np.asarray(labels)
    if not isinstance(labels, (Tensor, np.ndarray)):
        return inputs, torch.full((len(first),), -1)
    return inputs, as_labels(labels.cpu() if isinstance(labels, Tensor) else labels, f"{name}")[0]
