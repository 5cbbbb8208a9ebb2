"""Tables of predictions: columns as Arrow tables, and these as CSV and Parquet files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stochbn.texts import in_spreadsheet

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Columns", "as_table", "joined", "widest", "write_table"]

Columns = dict[str, list[Any]]
"""A table by its columns, which are as long as each other; None where there is nothing to say."""


def as_table(columns: Columns) -> pyarrow.Table:
    """Columns as an Arrow table: the first one has keys, the last one errors; numbers between them are float32."""
    import pyarrow

    first, *_, last = columns

    def kind(name: str, values: list[Any]) -> Any:
        some = next((value for value in values if value is not None), None)
        if name == last or isinstance(some, str):
            return pyarrow.string()
        if isinstance(some, list):
            return pyarrow.list_(pyarrow.string())
        return pyarrow.int64() if name == first else pyarrow.float32()

    return pyarrow.table({name: pyarrow.array(values, kind(name, values)) for name, values in columns.items()})


def widest(schemas: Iterable[pyarrow.Schema]) -> pyarrow.Schema:
    """The schema with the most columns: tables in which no example could be read lack those of predictions."""
    return max(schemas, key=len)


def joined(tables: Sequence[pyarrow.Table], schema: pyarrow.Schema) -> pyarrow.Table:
    """Tables behind each other, with the columns of a schema; columns that one lacks are null there."""
    import pyarrow

    return pyarrow.concat_tables([schema.empty_table(), *tables], promote_options="default")


def write_table(
    path: Path,
    tables: Callable[[], Iterable[pyarrow.Table]],
    schema: pyarrow.Schema,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write tables behind each other as CSV or Parquet, by the ending of the path.

    In CSV, texts that a spreadsheet would run as formulas begin with an apostrophe, see `stochbn.texts.in_spreadsheet`;
    lists of texts are JSON.
    In Parquet, texts are as they are, and what the table is about is JSON under the key ``stochbn`` of its metadata.

    Args:
        path: the file.
        tables: gives the tables.
        schema: of all of them.
        about: what the table is about, as JSON.
    """
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(map(_cell, schema.names))
            for table in tables():
                columns = [map(_cell, column.to_pylist()) for column in table.columns]
                writer.writerows(zip(*columns, strict=True))
        return
    import pyarrow.parquet

    if about is not None:
        schema = schema.with_metadata({"stochbn": json.dumps(about)})
    with pyarrow.parquet.ParquetWriter(path, schema) as parquet:
        for table in tables():
            parquet.write_table(table.replace_schema_metadata(schema.metadata))


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return in_spreadsheet(value)
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:.6g}" if isinstance(value, float) else value
