"""The prediction of a chunk of examples as columns of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from stochbn.dense_masks import Masks, write_masks
from stochbn.posteriors.thresholds import Thresholds
from stochbn.predictions import Answer
from stochbn.sources.objects import Chunk
from stochbn.table_files import Columns
from stochbn.tasks.boxes import Placement
from stochbn.texts import as_utf8

__all__ = ["columns_of"]

T = TypeVar("T")


def columns_of(
    chunk: Chunk,
    prediction: Any,
    key_name: str,
    classes: Sequence[str],
    top: int,
    masks: Masks | None = None,
    thresholds: Thresholds | None = None,
) -> Columns:
    """The columns of a chunk: keys, predictions and errors, as valid Unicode.

    With thresholds, they include the set or interval of each example.

    Raises:
        TypeError: the thresholds are for another task.
        ValueError: the prediction is dense, with no folder for masks, or not of as many examples as the chunk has; or
            sets are by group, and the chunk has no groups.
    """
    keys = _readable(chunk.keys, chunk)
    placements = [None] * len(keys) if chunk.placements is None else _readable(chunk.placements, chunk)
    found: Columns = {}
    if prediction is not None:
        groups = None if thresholds is None else _groups(chunk, thresholds)
        if masks is None:
            found = _predicted(prediction, placements, classes, top, thresholds, groups)
        else:
            sets = None if thresholds is None else thresholds.sets.of(prediction, groups)
            rows = write_masks(prediction, keys, masks.folder, masks.seen, sets)
            found = {name: [row[name] for row in rows] for name in rows[0]}
    count = len(next(iter(found.values()), ()))
    if count != len(keys):
        raise ValueError(f"the network gave predictions for {count} examples of a batch of {len(keys)}")
    if found and key_name in (*found, "error"):
        raise ValueError(f"the key's column is called {key_name!r}, as one of the predictions is; rename it")
    if len(keys) < len(chunk.keys):  # the columns have a gap at every error
        for name, values in found.items():
            following = iter(values)
            found[name] = [next(following) if error is None else None for error in chunk.errors]
    columns: Columns = {key_name: chunk.keys, **found, "error": chunk.errors}
    return {as_utf8(name): list(map(as_utf8, values)) if _texts(values) else values for name, values in columns.items()}


def _texts(values: Sequence[Any]) -> bool:
    return any(isinstance(value, str) for value in values)


def _groups(chunk: Chunk, thresholds: Thresholds) -> list[str] | None:
    """The groups of the examples that can be read; None where sets are not by group."""
    if thresholds.by is None:
        return None
    if chunk.groups is None:
        raise ValueError(
            f"the posterior's prediction sets are by {thresholds.by!r}, which this data does not have: give data with "
            "that column, or make sets again without --by"
        )
    return _readable(chunk.groups, chunk)


def _readable(values: Sequence[T], chunk: Chunk) -> list[T]:
    """The values of the examples that can be read."""
    return [value for value, error in zip(values, chunk.errors, strict=True) if error is None]


def _predicted(
    prediction: Any,
    placements: Sequence[Placement | None],
    classes: Sequence[str],
    top: int,
    thresholds: Thresholds | None,
    groups: list[str] | None,
) -> Columns:
    if not isinstance(prediction, Answer):
        raise ValueError(f"expected one prediction for each example, got {type(prediction).__name__}")
    found: Columns = prediction.picture_columns(placements, classes, top)
    if thresholds is not None:
        probs = getattr(prediction, "probs", None)
        names = [as_utf8(name) for name in classes or map(str, range(0 if probs is None else probs.shape[1]))]
        measures = {name: found.pop(name) for name in ("entropy", "mutual_information") if name in found}
        found |= thresholds.sets.columns(prediction, names, groups) | measures
    return found
