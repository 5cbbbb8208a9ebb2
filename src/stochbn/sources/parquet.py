"""Parquet files in a folder or in an object store, read range by range, as each of many machines needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from stochbn.schema import Schema
from stochbn.sources.columns import Columns, Roles
from stochbn.sources.files import from_names, listed
from stochbn.sources.hub import DataError, saved_splits
from stochbn.sources.objects import Chunk, RowObjects
from stochbn.sources.opening import kind_of, tables_in
from stochbn.sources.pictures import Decoding, Preprocessing, check_range
from stochbn.sources.rows import TableRows, roles_of, undecoded
from stochbn.sources.stores import filesystem, is_url
from stochbn.sources.tables import as_dataset, conformed, unified

LOOKED_AT = 10_000
"""Rows that tell whether texts are numbers."""

__all__ = ["ParquetObjects", "holds_parquet"]


@dataclass(frozen=True)
class ParquetObjects:
    """The rows of Parquet files, in the order of their names, as a stream; a table that pickles as names and numbers.

    Attributes:
        name: what was opened.
        files: the paths, or URLs that fsspec opens.
        lengths: how many rows each has.
        columns: which columns are what.
        preprocess: from an image, or the tensor of an example, to the network's input.
        features: the types of the columns, which hold those of all files.
        roles: what the columns are.
        schema: what the data is, as it was opened.
        decoding: how images are read.
    """

    name: str
    files: tuple[str, ...]
    lengths: tuple[int, ...]
    columns: Columns = field(default_factory=Columns)
    preprocess: Callable[[Any], Any] | None = None
    features: Any = None
    roles: Roles | None = None
    schema: Schema = field(default_factory=Schema)
    decoding: Decoding | None = None

    @classmethod
    def open(
        cls,
        source: str,
        split: str | None = None,
        prefer: Sequence[str] = (),
        columns: Columns | None = None,
        preprocess: Callable[[Any], Any] | None = None,
        decoding: Decoding | None = None,
    ) -> ParquetObjects:
        """Open a Parquet file or a folder of them: a path, or a URL that fsspec knows, such as ``s3://bucket/folder``.

        Args:
            source: the file or folder.
            split: which split of a folder: files in a folder of that name, or whose names begin with it.
            prefer: without `split`, the names of splits to look for, where there are any.
            columns: which columns are what; see `TableRows`.
            preprocess: from an image, or the tensor of an example, to the network's input.

            decoding: how images are read.

        Raises:
            DataError: there are no such files, or they cannot be read.
        """
        fs, root = filesystem(source)
        about = Schema()
        try:
            names = [root] if fs.isfile(root) else []
            found = None if names else from_names(root, fs.find(root)) if is_url(source) else listed(Path(source))
        except OSError as error:
            raise DataError(f"{source!r} cannot be listed: {error}") from error
        if found is not None:
            paths, about = tables_in(found, "parquet", split, prefer, source)
            names = [str(path) for path in paths]
        if not names:
            raise DataError(f"{source!r} is no Parquet file and no folder that holds any")
        if other := [name for name in names if not is_url(source) and not Path(name).is_file()]:
            raise DataError(f"{other[0]!r} is no regular file; remove it from the data")
        footers = [_footer(fs, name) for name in names]
        lengths = tuple(count for count, _ in footers)
        files = tuple(fs.unstrip_protocol(name) if is_url(source) else name for name in names)
        if not sum(lengths):
            raise DataError(f"{source!r} holds no examples")
        whole = unified([(name, schema) for name, (_, schema) in zip(files, footers, strict=True)], repr(source))
        opened = cls(source, files, lengths, columns or Columns(), preprocess, whole.features, decoding=decoding)
        table = undecoded(as_dataset(next(iter(opened._tables(0, LOOKED_AT)))))
        roles = roles_of(table, repr(source), opened.columns, whole.index)
        whole.check((*roles.inputs, roles.key, roles.group), repr(source))
        if roles.pictures:
            check_range(preprocess)
        decoding = decoding or Decoding()
        schema = about.described(
            name=about.name or source,
            kind="pictures" if roles.pictures else "rows",
            count=sum(lengths),
            files=len(files),
            inputs=roles.inputs,
            types=roles.types,
            label=roles.label,
            key=roles.key,
            left_out=(*about.left_out, *roles.left_out),
            exif=decoding.upright,
            page=decoding.page,
        )
        return replace(opened, roles=roles, schema=schema)

    def __len__(self) -> int:
        return sum(self.lengths)

    @property
    def key_name(self) -> str:
        """What the keys are."""
        return self.columns.key or "row"

    @property
    def _folders(self) -> tuple[Path, ...]:
        """Where images may lie that the files name: the folder that was opened; with a URL there is none."""
        if is_url(self.name):
            return ()
        path = Path(self.name)
        return (path if path.is_dir() else path.parent,)

    def chunks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
        """The examples from one position to another, `size` at a time; a row group of a file is in memory at a time."""
        stop = len(self) if stop is None else min(stop, len(self))
        tables = _regrouped(self._tables(start, stop), size)
        for table in tables:
            yield self._chunk(table, start)
            start += len(table)

    def _tables(self, start: int, stop: int) -> Iterator[Any]:
        """Tables of the rows from one position to another, in pieces of a row group or less."""
        import pyarrow.parquet

        for name, length, end in zip(self.files, self.lengths, accumulate(self.lengths), strict=True):
            first = end - length
            if end <= start or first >= stop:
                continue
            fs, path = filesystem(name)
            with fs.open(path, "rb") as file:
                parquet = pyarrow.parquet.ParquetFile(file)
                for group in range(parquet.num_row_groups):
                    count = parquet.metadata.row_group(group).num_rows
                    low, high = max(start - first, 0), min(stop - first, count)
                    if low < high:
                        table = parquet.read_row_group(group).slice(low, high - low)
                        yield conformed(table, self.features)
                    first += count

    def _chunk(self, table: Any, start: int) -> Chunk:
        called = repr(self.name)
        rows = TableRows(as_dataset(table), called, folders=self._folders, roles=self.roles, decoding=self.decoding)
        preprocess = self.preprocess
        if preprocess is None and rows.is_picture:
            preprocess = Preprocessing()
        (chunk,) = RowObjects(self.name, rows, preprocess).chunks(len(table))
        keys = chunk.keys if rows.roles.key is not None else [start + i for i in range(len(table))]
        return replace(chunk, keys=list(keys))


def holds_parquet(source: str) -> bool:
    """Whether a path or URL is for `ParquetObjects`: a Parquet file, a folder with some, or any URL."""
    if is_url(source):
        return True
    path = Path(source)
    if path.is_dir():
        return saved_splits(path) is None and kind_of(listed(path)) == "parquet"
    return path.is_file() and path.suffix.lower() == ".parquet"


def _regrouped(tables: Iterator[Any], size: int) -> Iterator[Any]:
    """The same rows in tables of `size`, but for the last."""
    import pyarrow

    waiting: list[Any] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= size:
            joined, at = pyarrow.concat_tables(waiting), 0
            while len(joined) - at >= size:
                yield joined.slice(at, size)
                at += size
            waiting = [joined.slice(at)] if at < len(joined) else []
    if waiting:
        yield pyarrow.concat_tables(waiting)


def _footer(fs: Any, name: str) -> tuple[int, Any]:
    """How many rows a file has, and its schema."""
    import pyarrow.parquet

    try:
        with fs.open(name, "rb") as file:
            parquet = pyarrow.parquet.ParquetFile(file)
            return int(parquet.metadata.num_rows), parquet.schema_arrow
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{name!r} cannot be read as Parquet: {error}") from error
