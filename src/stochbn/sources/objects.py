"""Data for commands: in any order for fitting and evaluating, or as a stream with keys for predicting."""

from __future__ import annotations

import contextlib
import queue
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from stochbn.schema import Schema
from stochbn.sources.boxes import moved
from stochbn.sources.pictures import Preprocessing, check_not_turned
from stochbn.tasks.boxes import Placement

__all__ = ["Chunk", "Objects", "RowObjects", "Rows", "Stream", "ahead", "shard_index"]

T = TypeVar("T")


class Objects(Protocol):
    """Examples that can be read in batches, and in a random order."""

    @property
    def name(self) -> str:
        """What was opened."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; none where they have no names."""
        ...

    @property
    def labels(self) -> Tensor:
        """``[N]``: their labels; there is an error where they have none."""
        ...

    def __len__(self) -> int:
        """N."""
        ...

    def shuffled(self, seed: int) -> Objects:
        """The same examples in a random order that depends on the seed alone."""
        ...

    def first(self, count: int) -> Objects:
        """The first of the examples, at most so many."""
        ...

    def shard(self, rank: int, count: int, size: int) -> Objects:
        """Every `count`-th batch of `size` consecutive examples, from number `rank` on."""
        ...

    def shard_positions(self, rank: int, count: int, size: int) -> Tensor:
        """Where each example of a shard is among all, ``[n]``."""
        ...

    def batches(self, size: int) -> Iterator[tuple[Any, Tensor]]:
        """Consecutive batches of inputs and labels, ``[n]``; -1 is the label of an example without one."""
        ...


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive examples of a stream.

    Attributes:
        keys: what each of them is called.
        errors: why it cannot be read; None where it can.
        inputs: a batch of those that can be read, in their order; None if there are none.
        groups: the group of each, for prediction sets by group; None where there are no groups.
        labels: of those that can be read; None where they were not asked for.
        placements: where the picture of each lies in its input: None for one that cannot be read, and where it is no
            picture or the preprocessing is no `Preprocessing`. None instead of the list stands for all None.
    """

    keys: list[str | int]
    errors: list[str | None]
    inputs: Any
    groups: list[str] | None = None
    labels: Tensor | None = None
    placements: Sequence[Placement | None] | None = None


class Stream(Protocol):
    """Examples with keys, one chunk after another."""

    @property
    def key_name(self) -> str:
        """What the keys are: the name of their column."""
        ...

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def chunks(self, size: int, start: int = 0) -> Iterator[Chunk]:
        """The examples from position `start` on, `size` at a time."""
        ...


class Rows(Protocol):
    """Examples that can be read by position."""

    key_name: str

    @property
    def has_boxes(self) -> bool:
        """Whether labels are true boxes, see `stochbn.tasks.boxes.LABELS`, in pixels of the picture as it is read."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; none where labels are numbers."""
        ...

    @property
    def groups(self) -> list[str] | None:
        """The group of each, for prediction sets by group; None where there are no groups."""
        ...

    def __len__(self) -> int:
        """How many there are."""
        ...

    def key(self, position: int) -> str | int:
        """What an example is called."""
        ...

    def read(self, position: int) -> Any:
        """An example: an image, or a tensor. Raises a ValueError if it cannot be read."""
        ...

    def labels(self) -> Tensor | None:
        """``[N]``, or None."""
        ...


@dataclass(frozen=True, eq=False)
class RowObjects:
    """Rows with their preprocessing and order.

    Attributes:
        name: the name of the data.
        rows: the rows.
        preprocess: turns a row into the network's input; None if rows are inputs.
        order: positions; None: all rows in their order.
        schema: the schema of the data.
    """

    name: str
    rows: Rows
    preprocess: Callable[[Any], Any] | None = None
    order: Tensor | None = None
    schema: Schema | None = None

    def __len__(self) -> int:
        return len(self.rows) if self.order is None else len(self.order)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; none where they have no names."""
        return self.rows.classes

    @property
    def key_name(self) -> str:
        """What the keys are."""
        return self.rows.key_name

    @property
    def groups(self) -> list[str] | None:
        """The group of each, for prediction sets by group; None where there are no groups."""
        found = self.rows.groups
        return found if found is None or self.order is None else [found[i] for i in self.order.tolist()]

    @property
    def labels(self) -> Tensor:
        """``[N]``.

        Raises:
            ValueError: there are none.
        """
        found = self.rows.labels()
        if found is None:
            raise ValueError(
                f"{self.name} has no labels: have a folder for each class, or name their column or array with --label"
            )
        return found if self.order is None else found[self.order]

    def shuffled(self, seed: int) -> RowObjects:
        """The same examples in a random order that depends on the seed alone."""
        mixed = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return replace(self, order=mixed if self.order is None else self.order[mixed])

    def first(self, count: int) -> RowObjects:
        """The first of the examples."""
        order = torch.arange(len(self)) if self.order is None else self.order
        return replace(self, order=order[:count])

    def shard(self, rank: int, count: int, size: int) -> RowObjects:
        """Every `count`-th batch of `size` consecutive examples, from number `rank` on."""
        order = torch.arange(len(self)) if self.order is None else self.order
        return replace(self, order=order[self.shard_positions(rank, count, size)])

    def shard_positions(self, rank: int, count: int, size: int) -> Tensor:
        """Where each example of a shard is among all, ``[n]``."""
        return shard_index(len(self), rank, count, size)

    def batches(self, size: int) -> Iterator[tuple[Any, Tensor]]:
        """Consecutive batches of inputs and labels, read ahead.

        Raises:
            ValueError: an example cannot be read; the message names it.
        """
        labels = self.rows.labels()
        order = torch.arange(len(self)) if self.order is None else self.order

        def read() -> Iterator[tuple[Any, Tensor]]:
            told = False
            for index in torch.split(order, size) if len(order) else ():
                chunk = self._chunk(index.tolist(), labels)
                for key, error in zip(chunk.keys, chunk.errors, strict=True):
                    if error is not None:
                        raise ValueError(f"{self.name}: {key} {error}")
                if not told and not (finite := chunk.inputs.reshape(len(index), -1).isfinite().all(1)).all():
                    first, told = chunk.keys[int(finite.int().argmin())], True
                    warnings.warn(
                        f"{self.name}: {self.key_name} {first} holds NaN or infinity; leave such rows out where the "
                        "network does not take them",
                        stacklevel=2,
                    )
                yield chunk.inputs, torch.full((len(index),), -1) if chunk.labels is None else chunk.labels

        with contextlib.closing(ahead(read())) as batches:
            yield from batches

    def chunks(self, size: int, start: int = 0) -> Iterator[Chunk]:
        """The examples from a position on."""
        order = torch.arange(len(self)) if self.order is None else self.order
        for index in torch.split(order[start:], size) if start < len(self) else ():
            yield self._chunk(index.tolist())

    def _chunk(self, positions: Sequence[int], labels: Tensor | None = None) -> Chunk:
        errors: list[str | None] = []
        inputs: list[Tensor] = []
        given: list[Tensor] = []
        placements: list[Placement | None] = []
        for position in positions:
            label = None if labels is None else labels[position]
            try:
                found, label, placement = self._example(position, label)
                if inputs and found.shape != inputs[0].shape:
                    raise ValueError(
                        f"is {list(found.shape)}, others are {list(inputs[0].shape)}: bring them to one size, with "
                        "--size"
                    )
            except (ValueError, OSError) as error:
                errors.append(" ".join(str(error).split()))
                placements.append(None)
                continue
            errors.append(None)
            placements.append(placement)
            inputs.append(found)
            given += [] if label is None else [label]
        known = self.rows.groups
        groups = None if known is None else [known[i] for i in positions]
        keys = [self.rows.key(i) for i in positions]
        stacked = torch.stack(inputs) if inputs else None
        return Chunk(keys, errors, stacked, groups, torch.stack(given) if given else None, placements)

    def _example(self, position: int, label: Tensor | None) -> tuple[Tensor, Tensor | None, Placement | None]:
        """An example as the network's input, its label, and where its picture lies in the input.

        Raises:
            ValueError, OSError: it is none; the message says why.
        """
        given = self.rows.read(position)
        try:
            found = given if self.preprocess is None else self.preprocess(given)
        except Exception as error:  # a user's function may raise anything
            raise ValueError(f"cannot be preprocessed: {error or type(error).__name__}") from error
        if isinstance(found, np.ndarray):
            found = torch.from_numpy(found)
        if not isinstance(found, Tensor):
            raise ValueError(f"became {type(found).__name__} by preprocessing; expected a tensor")
        placement = None
        if not isinstance(given, Tensor):
            if label is not None and self.rows.has_boxes:
                if not label.isnan().all():
                    check_not_turned(given)
                label = moved(label, self.preprocess, (given.height, given.width), (found.shape[-2], found.shape[-1]))
            if isinstance(self.preprocess, Preprocessing):
                placement = self.preprocess.placement((given.height, given.width))
        return found, label, placement


def shard_index(length: int, rank: int, count: int, size: int) -> Tensor:
    """The positions in every `count`-th of the batches of `size` that `length` examples make, from number `rank` on.

    >>> shard_index(7, rank=1, count=2, size=2)
    tensor([2, 3, 6])
    """
    positions = torch.arange(length)
    return positions[positions // size % count == rank]


def ahead(items: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """The same items, made by a thread while the ones before are used; at most `depth` of them wait.

    What the thread raises is raised here. Closing the generator ends the thread.
    """
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(entry, timeout=0.05)
                return

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            more, item = waiting.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stopped.set()
        thread.join()
