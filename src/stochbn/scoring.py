"""Predicting a stream of any length into a table, in parts that outlive a process that is killed.

Rows are written in parts of a fixed number, each whole or not at all, in a folder beside the table; a run that is begun
again makes those that are missing, and the table is put together when all are there. Every batch sees the draws of the
seed, so that a table is the same however often its making was interrupted, and whoever made which part of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stochbn.dense_masks import Masks, write_masks
from stochbn.files import check_file, write, write_json
from stochbn.posteriors.thresholds import Thresholds
from stochbn.predictions import Answer
from stochbn.predictive import Predictive, Predictor
from stochbn.sources.objects import Chunk, Stream, ahead
from stochbn.table_files import read_table, write_table
from stochbn.texts import as_utf8

__all__ = ["Engine", "Row", "check_table", "part_size", "parts_folder", "rows_of", "score", "scored", "without_nan"]

Row = dict[str, Any]
"""A line of the table; None where there is nothing to say."""
Engine = Callable[[Sequence[int]], Iterable[tuple[int, Sequence[Row]]]]
"""Given the numbers of parts, gives each with its rows, in any order."""

ENDINGS = (".csv", ".parquet")


def check_table(path: Path, inputs: Iterable[str | os.PathLike[str] | None] = ()) -> None:
    """Refuse a file that `score` could not write: for use before the work whose result it is to hold.

    Args:
        path: the file.
        inputs: as for `stochbn.files.check_file`.

    Raises:
        OSError: as `stochbn.files.check_file`.
        ValueError: its ending says no format.
    """
    check_file(path, inputs)
    if path.suffix not in ENDINGS:
        raise ValueError(f"the table {str(path)!r} ends in {path.suffix!r}; name one that ends in .csv or .parquet")


def score(
    predictor: Predictor | None,
    stream: Stream,
    path: Path,
    *,
    settings: dict[str, Any],
    about: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
    top: int = 1,
    batch: int = 250,
    part: int = 4000,
    seed: int = 0,
    strict: bool = False,
    masks: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    engine: Engine | None = None,
) -> Iterator[Row]:
    """Predict all objects of a stream into a CSV or Parquet file, and give its rows once it is written.

    Memory depends on `batch` and `part`, not on how many objects there are. A row for every object, in their order: its
    key, what is predicted, and under ``error`` why it could not be read.

    Args:
        predictor: what predicts; None where an engine does.
        stream: the objects.
        path: the file, of which the ending says the format.
        settings: whatever else the result depends on, as JSON; parts of other settings are not continued.
        about: what a Parquet file says of itself in its metadata, as JSON.
        classes: the names of the classes.
        top: how many of the most probable classes to write.
        batch: objects in a forward pass.
        part: rows in a part; brought to a multiple of `batch`.
        seed: where draws come from.
        strict: whether an object that cannot be read is an error.
        masks: a folder for pictures of dense predictions, see `stochbn.dense_masks`; None for other predictions.
        progress: called with the number of objects done and of all.
        engine: what predicts the parts elsewhere; None predicts them here.

    Raises:
        OSError: the file cannot be written.
        ValueError: its ending says no format, there are parts of other settings, the prediction is of a kind that is no
            table, or, with `strict`, an object cannot be read.
    """
    check_table(path)
    part = part_size(part, batch)
    total = len(stream)
    claimed = {**settings, "total": total, "top": top, "batch": batch, "part": part, "seed": seed}
    parts = parts_folder(path)
    _claim(parts, claimed)
    try:
        if engine is not None:
            _take_parts(engine, parts, total, part, strict, progress)
        else:
            assert predictor is not None
            _make_parts(predictor, stream, parts, classes, top, batch, part, seed, strict, masks, progress)
    except BaseException:
        if not any(parts.glob("part-*")):  # nothing to continue
            shutil.rmtree(parts)
        raise
    written = sorted(parts.glob("part-*.jsonl"))
    write(path, lambda temporary: write_table(temporary, lambda: map(_read_part, written), about))
    shutil.rmtree(parts)
    return read_table(path)


def part_size(part: int, batch: int) -> int:
    """The rows in a part that is to have about so many: whole batches."""
    return max(1, part // batch) * batch


def _make_parts(
    predictor: Predictor,
    stream: Stream,
    parts: Path,
    classes: Sequence[str],
    top: int,
    batch: int,
    part: int,
    seed: int,
    strict: bool,
    masks: Path | None,
    progress: Callable[[int, int], None],
) -> None:
    """Write the parts that are missing."""
    total = len(stream)
    number = next(i for i in itertools.count() if not _part(parts, i).exists())  # an engine may have left gaps
    done = sum(_length(_part(parts, i)) for i in range(number))
    progress(done, total)
    pictures = None if masks is None else Masks(masks)
    if pictures is not None:
        for before in range(number):
            pictures.add(row["mask"] for row in _read_part(_part(parts, before)) if row["error"] is None)
    if done < total:
        rows: list[Row] = []
        with contextlib.closing(ahead(iter(stream.chunks(batch, done)))) as chunks:
            for chunk in chunks:
                rows += scored(predictor, chunk, stream.key_name, classes, top, seed, pictures)
                if strict:
                    _refuse_errors(rows[-len(chunk.keys) :])
                done += len(chunk.keys)
                progress(done, total)
                if len(rows) >= part:
                    _write_part(parts, number, rows)
                    rows, number = [], number + 1
        if rows:
            _write_part(parts, number, rows)


def _take_parts(
    engine: Engine, parts: Path, total: int, part: int, strict: bool, progress: Callable[[int, int], None]
) -> None:
    """Write the parts that are missing, as an engine makes them."""
    missing = [number for number in range(math.ceil(total / part)) if not _part(parts, number).exists()]
    done = sum(map(_length, parts.glob("part-*.jsonl")))
    progress(done, total)
    for number, rows in engine(missing):
        if strict:
            _refuse_errors(rows)
        _write_part(parts, number, rows)
        done += len(rows)
        progress(done, total)
    if done != total:
        raise RuntimeError(f"the engine gave {done} rows for {total} objects")


def _refuse_errors(rows: Sequence[Row]) -> None:
    """Refuse rows of objects that could not be read.

    Raises:
        ValueError: there is one.
    """
    for row in rows:
        if row["error"]:
            key = next(iter(row.values()))
            raise ValueError(f"{key} {row['error']}; without --strict it becomes a row with an error")


def scored(
    predictor: Predictor,
    chunk: Chunk,
    key_name: str,
    classes: Sequence[str],
    top: int,
    seed: int,
    masks: Masks | None = None,
) -> list[Row]:
    """The rows of a chunk, predicted with the draws of a seed.

    Raises:
        ValueError: as `rows_of`.
    """

    def predicted(inputs: Any) -> Any:
        return None if inputs is None else predictor(inputs, generator=torch.Generator().manual_seed(seed))

    try:
        prediction = predicted(chunk.inputs)
    except ValueError:
        # An input that is no number spoils the others' predictions where the network does not take it.
        usable = without_nan(chunk)
        if usable is chunk:
            raise
        chunk, prediction = usable, predicted(usable.inputs)
    posterior = predictor.posterior if isinstance(predictor, Predictive) else None
    thresholds = None if posterior is None else posterior.thresholds
    return rows_of(chunk, prediction, key_name, classes, top, masks, thresholds)


def without_nan(chunk: Chunk) -> Chunk:
    """The chunk itself, or one in which examples with an input that is not finite have an error."""
    if not isinstance(chunk.inputs, Tensor) or chunk.inputs.isfinite().all():
        return chunk
    finite = chunk.inputs.flatten(1).isfinite().all(1)
    fine = iter(finite.tolist())
    told = "holds NaN or infinity, for which the network gives no prediction"
    errors = [error if error is not None or next(fine) else told for error in chunk.errors]
    return replace(chunk, errors=errors, inputs=chunk.inputs[finite] if finite.any() else None)


def parts_folder(path: Path) -> Path:
    """Where the parts of a table are while it is made."""
    return path.with_name(f"{path.name}.parts")


def rows_of(
    chunk: Chunk,
    prediction: Any,
    key_name: str,
    classes: Sequence[str],
    top: int,
    masks: Masks | None = None,
    thresholds: Thresholds | None = None,
) -> list[Row]:
    """A row for each object of a chunk; texts in it are valid Unicode. With thresholds, also its set or interval.

    Raises:
        TypeError: the thresholds are for another task.
        ValueError: the prediction is dense, with no folder for masks, or not of as many objects as the chunk has; or
            sets are by group, and the chunk has no groups.
    """
    keys = [key for key, error in zip(chunk.keys, chunk.errors, strict=True) if error is None]
    readable, predicted = len(keys), list[Row]()
    if prediction is not None:
        groups = None if thresholds is None else _groups(chunk, thresholds)
        if masks is None:
            predicted = _predicted(prediction, classes, top, thresholds, groups)
        else:
            sets = None if thresholds is None else thresholds.sets.of(prediction, groups)
            predicted = write_masks(prediction, keys, masks.folder, masks.seen, sets)
    if len(predicted) != readable:
        raise ValueError(f"the network gave predictions for {len(predicted)} objects of a batch of {readable}")
    if predicted and key_name in (*predicted[0], "error"):
        raise ValueError(f"the key's column is called {key_name!r}, as one of the predictions is; rename it")
    following = iter(predicted)
    rows = [
        {key_name: key, **(next(following) if error is None else {}), "error": error}
        for key, error in zip(chunk.keys, chunk.errors, strict=True)
    ]
    return [{as_utf8(name): as_utf8(value) for name, value in row.items()} for row in rows]


def _groups(chunk: Chunk, thresholds: Thresholds) -> list[str] | None:
    """The groups of the examples that can be read; None where sets are not by group."""
    if thresholds.by is None:
        return None
    if chunk.groups is None:
        raise ValueError(
            f"the posterior's prediction sets are by {thresholds.by!r}, which this data does not have: give data with "
            "that column, or make sets again without --by"
        )
    return [group for group, error in zip(chunk.groups, chunk.errors, strict=True) if error is None]


def _predicted(
    prediction: Any, classes: Sequence[str], top: int, thresholds: Thresholds | None, groups: list[str] | None
) -> list[Row]:
    if not isinstance(prediction, Answer):
        raise ValueError(f"expected one prediction for each object, got {type(prediction).__name__}")
    found = prediction.columns(classes, top)
    if thresholds is not None:
        probs = getattr(prediction, "probs", None)
        names = [as_utf8(name) for name in classes or map(str, range(0 if probs is None else probs.shape[1]))]
        measures = {name: found.pop(name) for name in ("entropy", "mutual_information") if name in found}
        found |= thresholds.sets.columns(prediction, names, groups) | measures
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]


def _claim(parts: Path, about: dict[str, Any]) -> None:
    """Take a folder of parts for these settings, or find it to be theirs."""
    told = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    run = parts / "run.json"
    if run.exists():
        if json.loads(run.read_text()).get("settings") != told:
            raise ValueError(
                f"{str(parts)!r} holds the parts of a run with other options, data or weights: run with these to "
                "continue it, or delete the folder"
            )
        return
    if parts.exists() and any(parts.iterdir()):
        raise FileExistsError(f"{str(parts)!r} is needed for parts of the table, but holds other things; move it")
    parts.mkdir(exist_ok=True)
    write_json(run, {"settings": told})


def _part(parts: Path, number: int) -> Path:
    return parts / f"part-{number:08d}.jsonl"


def _write_part(parts: Path, number: int, rows: Sequence[Row]) -> None:
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    write(_part(parts, number), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _length(part: Path) -> int:
    with part.open("rb") as lines:
        return sum(1 for _ in lines)


def _read_part(part: Path) -> list[Row]:
    with part.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
