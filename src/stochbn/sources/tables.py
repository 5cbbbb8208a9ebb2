"""Tables in one file or several, CSV or Parquet: brought together by the names of columns, with types that hold all."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stochbn.sources.hub import DataError, cached
from stochbn.sources.labels import NUMBER, usual_label

__all__ = [
    "Unified",
    "as_dataset",
    "conformed",
    "index_columns",
    "mostly_numbers",
    "open_parquet",
    "read_csv",
    "unified",
]

UNNAMED = re.compile(r"(Unnamed: \d+(\.\d+)*|__index_level_\d+__)?")
"""What the index of a pandas table is called in a file: nothing, or one of these."""
PANDAS_INDEX = "the index of a pandas table"


def index_columns(schema: Any) -> dict[str, str]:
    """The columns that hold the index of a pandas table, and how that is known."""
    found = {name: PANDAS_INDEX for name in schema.names if UNNAMED.fullmatch(name)}
    told = (schema.pandas_metadata or {}).get("index_columns", [])
    return found | {name: PANDAS_INDEX for name in told if isinstance(name, str) and name in schema.names}


class Unified:
    """One schema for several files.

    Attributes:
        features: of the columns, as `datasets` has them.
        lacking: columns that not all files have, and one that does not.
        index: columns with the index of a pandas table.
    """

    def __init__(self, features: Any, lacking: Mapping[str, str], index: Mapping[str, str]) -> None:
        self.features, self.lacking, self.index = features, dict(lacking), dict(index)

    def check(self, columns: Iterable[str | None], name: str) -> None:
        """Refuse columns that are taken, and that a file lacks.

        Raises:
            DataError: there is one.
        """
        for column in columns:
            if column in self.lacking:
                raise DataError(
                    f"{self.lacking[column]!r} has no column {column!r}, which other files of {name} have: add it, or "
                    "name the columns to take with --input"
                )


def unified(schemas: Sequence[tuple[str, Any]], name: str) -> Unified:
    """One schema for files whose columns may be in another order, and of types that are not the same.

    Raises:
        DataError: a column has types that no one type holds, or the same classes under other numbers.
    """
    import datasets

    columns = list(dict.fromkeys(column for _, schema in schemas for column in schema.names))
    for file, schema in schemas:
        if len(set(schema.names)) < len(schema.names):
            twice = next(column for column in schema.names if schema.names.count(column) > 1)
            raise DataError(f"{file!r} has two columns {twice!r}; rename one")
    lacking = {c: file for c in columns for file, schema in schemas if c not in schema.names}
    try:
        own = [datasets.Features.from_arrow_schema(_plain(schema)) for _, schema in schemas]
    except Exception as error:  # what the files say of their columns may be anything
        raise DataError(f"{name} describes its columns wrongly: {error}") from error
    found: dict[str, Any] = {}
    for column in columns:
        kinds = [(file, f[column]) for (file, _), f in zip(schemas, own, strict=True) if column in f]
        found[column] = kinds[0][1]
        if all(kind == kinds[0][1] for _, kind in kinds):
            continue
        if any(isinstance(kind, datasets.ClassLabel) for _, kind in kinds):
            raise DataError(f"{name}: {kinds[0][0]!r} and others number the classes of {column!r} differently")
        types = [(file, schema.field(column).type) for file, schema in schemas if column in schema.names]
        found[column] = datasets.Features.from_arrow_schema(_of_type(column, _wider(types, column, name)))[column]
    index = {column: why for _, schema in schemas for column, why in index_columns(schema).items()}
    return Unified(datasets.Features(found), lacking, index)


def _of_type(column: str, kind: Any) -> Any:
    import pyarrow

    return pyarrow.schema([(column, kind)])


def _plain(schema: Any) -> Any:
    """Without dictionaries: categories are their values."""
    import pyarrow

    for i, field in enumerate(schema):
        if pyarrow.types.is_dictionary(field.type):
            schema = schema.set(i, field.with_type(field.type.value_type))
    return schema


def _wider(types: Sequence[tuple[str, Any]], column: str, name: str) -> Any:
    """A type that holds the values of several."""
    import pyarrow

    plain = [(file, kind.value_type if pyarrow.types.is_dictionary(kind) else kind) for file, kind in types]
    kinds = list(dict.fromkeys(kind for _, kind in plain if not pyarrow.types.is_null(kind)))
    texts = [kind for kind in kinds if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)]
    if texts and all(k in texts or _numeric(k) for k in kinds):
        return pyarrow.large_string() if pyarrow.large_string() in kinds else pyarrow.string()
    if all(_numeric(kind) for kind in kinds) and any(pyarrow.types.is_boolean(kind) for kind in kinds):
        kinds = [pyarrow.int8() if pyarrow.types.is_boolean(kind) else kind for kind in kinds]
    if any(pyarrow.types.is_floating(kind) for kind in kinds) and all(_numeric(kind) for kind in kinds):
        return pyarrow.float64()
    try:
        schemas = [_of_type(column, kind) for kind in kinds]
        return pyarrow.unify_schemas(schemas, promote_options="permissive").field(column).type
    except pyarrow.ArrowException as error:
        (first, one), *others = plain
        other, two = next((file, kind) for file, kind in others if kind != one)
        raise DataError(
            f"{name}: the column {column!r} is {one} in {first!r} and {two} in {other!r}; store both alike"
        ) from error


def _numeric(kind: Any) -> bool:
    import pyarrow

    of = pyarrow.types
    return bool(of.is_integer(kind) or of.is_floating(kind) or of.is_boolean(kind) or of.is_decimal(kind))


def conformed(table: Any, features: Any) -> Any:
    """A table's columns by their names, in the order and of the types of these features."""
    import datasets.table
    import pyarrow

    schema = features.arrow_schema
    for i, field in enumerate(table.schema):
        if pyarrow.types.is_dictionary(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(field.type.value_type))
    return datasets.table.table_cast(table.replace_schema_metadata(None), schema)


def read_csv(paths: Sequence[Path], name: str, text: Iterable[str | None]) -> tuple[Any, Unified]:
    """The rows of CSV files as one Arrow table: types are by all rows of a file, and labels and keys stay texts.

    Args:
        paths: the files.
        name: what they are called in messages.
        text: columns to leave as texts.

    Raises:
        DataError: a file cannot be read.
    """
    import pyarrow
    import pyarrow.csv

    tables = []
    for path in paths:
        try:
            with path.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
                first = lines.readline()
            delimiter = next((sign for sign in ",;\t|" if sign in first), ",")
            header = next(csv.reader([first], delimiter=delimiter), [])
            as_text = {c for c in text if c in header} | {usual_label(header)} - {None}
            found = pyarrow.csv.read_csv(
                path,
                parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(as_text, pyarrow.string())),
            )
        except (OSError, ValueError, pyarrow.ArrowException, csv.Error) as error:
            raise DataError(f"{str(path)!r} cannot be read as csv: {error}") from error
        tables.append(found)
    whole = unified([(str(path), t.schema) for path, t in zip(paths, tables, strict=True)], name)
    return pyarrow.concat_tables([conformed(table, whole.features) for table in tables]), whole


def as_dataset(table: Any) -> Any:
    """An Arrow table in memory as a `datasets.Dataset`."""
    import datasets

    return datasets.Dataset(table, fingerprint="rows")  # without one, all of the table would be hashed to make it


def open_parquet(paths: Sequence[Path], name: str) -> tuple[Any, Unified]:
    """The rows of Parquet files as a `datasets.Dataset`, which stays on disk.

    Raises:
        DataError: a file cannot be read.
    """
    import datasets
    import pyarrow.parquet

    def schema(path: Path) -> Any:
        try:
            return pyarrow.parquet.read_schema(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{str(path)!r} cannot be read as parquet: {error}") from error

    schemas = [(str(path), schema(path)) for path in paths]
    whole = unified(schemas, name)
    files = [str(path) for path in paths]
    with cached(name, "parquet"):
        found = datasets.load_dataset("parquet", data_files=files, split="train", features=whole.features)
    return found, whole


def mostly_numbers(column: Any) -> bool:
    """Whether most texts of a column are numbers, as where a few are mistyped; all of them are looked at."""
    import pyarrow.compute

    found = pyarrow.compute.match_substring_regex(column, f"^({NUMBER.pattern})$")
    count = pyarrow.compute.sum(found).as_py() or 0
    return bool(2 * count > len(column) - column.null_count and count)
