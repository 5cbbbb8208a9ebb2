"""Predict a stream of any length into a table, in parts that outlive a killed process.

Predictions become columns, and columns become Arrow tables. These are written in parts of a fixed number of rows, as
Parquet files in a folder beside the table. Each file is written as a whole or not at all. A run that is started again
makes the missing parts. When all parts exist, they are joined to the table. Every batch uses the draws of the seed, so
the table does not depend on interruptions, nor on which process made which part.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochbn.dense_masks import Masks
from stochbn.files import check_file, write, write_json
from stochbn.predicted_columns import columns_of
from stochbn.predictive import Predictive, Predictor
from stochbn.sources.objects import Chunk, Stream, ahead
from stochbn.table_files import Columns, as_table, joined, widest, write_table

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Engine", "Scored", "check_table", "part_size", "parts_folder", "score", "scored",
           "without_nan"]  # fmt: skip

Engine = Callable[[Sequence[int]], "Iterable[tuple[int, pyarrow.Table]]"]
"""A function from the numbers of parts to these parts with their rows, in any order."""

ENDINGS = (".csv", ".parquet")


@dataclass
class Scored:
    """A summary of a table.

    Attributes:
        rows: the number of rows.
        failed: the number of rows with an error.
        least: the least certain of the other rows, the least certain first.
        ranked_by: the column that ranks them, if there is one.
    """

    rows: int = 0
    failed: int = 0
    least: list[dict[str, Any]] = field(default_factory=list)
    ranked_by: str | None = None

    def add(self, table: pyarrow.Table, uncertainty: Sequence[str], shown: int) -> None:
        """Count rows, and update the least certain ones by the first of some columns that exists."""
        import pyarrow.compute

        fine = table.filter(pyarrow.compute.is_null(table[table.column_names[-1]]))
        self.rows += len(table)
        self.failed += len(table) - len(fine)
        name = next((name for name in uncertainty if name in table.column_names), None)
        if name is not None:
            self.ranked_by = name
            order = pyarrow.compute.sort_indices(fine, [(name, "descending")])  # stable
            self.least += fine.take(order[:shown]).to_pylist()
            self.least = sorted(self.least, key=lambda row: -row[name])[:shown]


def check_table(path: Path, inputs: Iterable[str | os.PathLike[str] | None] = ()) -> None:
    """Check, before the work begins, that `score` can write a file.

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
    uncertainty: Sequence[str] = (),
    shown: int = 5,
) -> Scored:
    """Predict all examples of a stream into a CSV or Parquet file, and summarise it.

    There is a row for every example, in order: its key, its prediction, and under ``error`` why it could not be read.
    Memory depends on `batch` and `part`, not on the number of examples.

    Args:
        predictor: what predicts; None where an engine does.
        stream: the examples.
        path: the file, of which the ending says the format.
        settings: whatever else the result depends on, as JSON; parts of other settings are not continued.
        about: what a Parquet file says of itself in its metadata, as JSON.
        classes: the names of the classes.
        top: how many of the most probable classes to write.
        batch: examples in a forward pass.
        part: rows in a part; brought to a multiple of `batch`.
        seed: where draws come from.
        strict: whether an example that cannot be read is an error.
        masks: a folder for pictures of dense predictions, see `stochbn.dense_masks`; None for other predictions.
        progress: called with the number of examples done and of all.
        engine: what predicts the parts elsewhere; None predicts them here.
        uncertainty: columns of which the first that is there tells how certain a row is.
        shown: how many of the least certain rows to give.

    Raises:
        OSError: the file cannot be written.
        ValueError: its ending says no format, there are parts of other settings, the prediction is of a kind that is no
            table, or, with `strict`, an example cannot be read.
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
    import pyarrow.parquet

    written, found = sorted(parts.glob("part-*.parquet")), Scored()
    schema = widest(map(pyarrow.parquet.read_schema, written))

    def tables() -> Iterator[pyarrow.Table]:
        for one in written:
            table = joined([_read_part(one)], schema)
            found.add(table, uncertainty, shown)
            yield table

    write(path, lambda temporary: write_table(temporary, tables, schema, about))
    shutil.rmtree(parts)
    return found


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
            masked = _read_part(_part(parts, before), ["mask"])
            pictures.add(mask for column in masked.columns for mask in column.to_pylist() if mask is not None)
    if done < total:
        tables: list[pyarrow.Table] = []
        with contextlib.closing(ahead(iter(stream.chunks(batch, done)))) as chunks:
            for chunk in chunks:
                columns = scored(predictor, chunk, stream.key_name, classes, top, seed, pictures)
                tables.append(as_table(columns))
                if strict:
                    _refuse_errors(tables[-1])
                done += len(chunk.keys)
                progress(done, total)
                if sum(map(len, tables)) >= part:
                    _write_part(parts, number, tables)
                    tables, number = [], number + 1
        if tables:
            _write_part(parts, number, tables)


def _take_parts(
    engine: Engine, parts: Path, total: int, part: int, strict: bool, progress: Callable[[int, int], None]
) -> None:
    """Write the parts that are missing, as an engine makes them."""
    missing = [number for number in range(math.ceil(total / part)) if not _part(parts, number).exists()]
    done = sum(map(_length, parts.glob("part-*.parquet")))
    progress(done, total)
    for number, table in engine(missing):
        if strict:
            _refuse_errors(table)
        _write_part(parts, number, [table])
        done += len(table)
        progress(done, total)
    if done != total:
        raise RuntimeError(f"the engine gave {done} rows for {total} examples")


def _refuse_errors(table: pyarrow.Table) -> None:
    """Refuse rows of examples that could not be read.

    Raises:
        ValueError: there is one.
    """
    names = table.column_names
    keys, errors = table[names[0]], table[names[-1]]
    if errors.null_count < len(errors):
        place = next(i for i, error in enumerate(errors) if error.is_valid)
        raise ValueError(f"{keys[place]} {errors[place]}; without --strict it becomes a row with an error")


def scored(
    predictor: Predictor,
    chunk: Chunk,
    key_name: str,
    classes: Sequence[str],
    top: int,
    seed: int,
    masks: Masks | None = None,
) -> Columns:
    """The rows of a chunk, predicted with the draws of a seed, as columns.

    Raises:
        ValueError: as `columns_of`.
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
    if not classes and posterior is not None and posterior.schema is not None:
        probs = getattr(prediction, "probs", None)  # of as many classes as the data of the fit had names
        named = probs is not None and probs.ndim == 2 and probs.shape[1] == len(posterior.schema.classes)
        classes = posterior.schema.classes if named else ()
    return columns_of(chunk, prediction, key_name, classes, top, masks, thresholds)


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


def _claim(parts: Path, about: dict[str, Any]) -> None:
    """Take a folder of parts for these settings, or find it to be theirs."""
    told = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    run = parts / "run.json"
    if run.exists() and any(parts.glob("part-*.jsonl")):
        raise ValueError(
            f"{str(parts)!r} holds rows that an earlier version of stochbn wrote, which this one does not continue: "
            "delete the folder, and run again"
        )
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
    return parts / f"part-{number:08d}.parquet"


def _write_part(parts: Path, number: int, tables: Sequence[pyarrow.Table]) -> None:
    import pyarrow.parquet

    table = joined(tables, widest(one.schema for one in tables))
    write(_part(parts, number), lambda temporary: pyarrow.parquet.write_table(table, temporary, compression="none"))


def _length(part: Path) -> int:
    import pyarrow.parquet

    return int(pyarrow.parquet.read_metadata(part).num_rows)


def _read_part(part: Path, columns: Sequence[str] | None = None) -> pyarrow.Table:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(part, columns=columns)
