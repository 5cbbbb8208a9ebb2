"""Tables of predictions as CSV and Parquet files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from stochbn.texts import from_spreadsheet, in_spreadsheet

__all__ = ["read_table", "write_table"]

Row = dict[str, Any]
Parts = Callable[[], Iterable[Sequence[Row]]]
"""Gives the rows of a table from its beginning, some at a time."""

LONGEST_CELL = 2**31 - 1
"""Characters of a cell of a CSV file that are read, at most."""


def write_table(path: Path, parts: Parts, about: Mapping[str, Any] | None = None) -> None:
    """Write rows as CSV or Parquet, by the ending of the path.

    In CSV, texts that a spreadsheet would run as formulas begin with an apostrophe, see `stochbn.texts.in_spreadsheet`;
    lists of texts are JSON.
    In Parquet, texts are as they are, and what the table is about is JSON under the key ``stochbn`` of its metadata.
    """
    columns = _columns(parts())
    if path.suffix == ".csv":
        _write_csv(path, columns, parts())
    else:
        _write_parquet(path, columns, parts(), about)


def read_table(path: Path) -> Iterator[Row]:
    """The rows of a file of `write_table`, with all texts as they were; in CSV all cells are texts."""
    if path.suffix == ".csv":
        csv.field_size_limit(LONGEST_CELL)
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield {from_spreadsheet(name): from_spreadsheet(cell) for name, cell in row.items()}
        return
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        for rows in table.iter_batches():
            yield from rows.to_pylist()


def _columns(parts: Iterable[Sequence[Row]]) -> list[str]:
    """The columns of a table: those of its first row that has a prediction, or of the first one."""
    columns: list[str] = []
    for row in chain.from_iterable(parts):
        if row["error"] is None:
            return list(row)
        columns = columns or list(row)
    return columns


def _write_csv(path: Path, columns: Sequence[str], parts: Iterable[Sequence[Row]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(map(_cell, columns))
        for rows in parts:
            writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return in_spreadsheet(value)
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:.6g}" if isinstance(value, float) else value


def _write_parquet(
    path: Path, columns: Sequence[str], parts: Iterable[Sequence[Row]], about: Mapping[str, Any] | None
) -> None:
    import pyarrow
    import pyarrow.parquet

    parts = iter(parts)
    first = next(parts)

    def kind(column: str) -> Any:
        if column == columns[0] and isinstance(first[0][column], int):
            return pyarrow.int64()
        if column == "set" and column != columns[0]:
            return pyarrow.list_(pyarrow.string())
        text = column in (columns[0], "error", "mask") or column.startswith("class")
        return pyarrow.string() if text else pyarrow.float32()

    schema = pyarrow.schema([(column, kind(column)) for column in columns])
    if about is not None:
        schema = schema.with_metadata({"stochbn": json.dumps(about)})
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for rows in chain([first], parts):
            cells = [{column: row.get(column) for column in columns} for row in rows]
            writer.write_table(pyarrow.Table.from_pylist(cells, schema=schema))
