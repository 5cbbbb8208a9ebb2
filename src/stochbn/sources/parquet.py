"""Parquet files in a folder or in an object store, read range by range, as each of many machines needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from stochbn.sources.hub import DataError
from stochbn.sources.objects import Chunk, RowObjects
from stochbn.sources.opening import Columns
from stochbn.sources.pictures import Preprocessing
from stochbn.sources.rows import TableRows
from stochbn.sources.stores import filesystem, is_url

__all__ = ["ParquetObjects", "holds_parquet"]


@dataclass(frozen=True)
class ParquetObjects:
    """The rows of Parquet files, in the order of their names, as a stream; a table that pickles as names and numbers.

    Attributes:
        name: what was opened.
        files: the paths, or URLs that fsspec opens.
        lengths: how many rows each has.
        columns: which columns are what.
        preprocess: from an image, or the tensor of an object, to the network's input.
    """

    name: str
    files: tuple[str, ...]
    lengths: tuple[int, ...]
    columns: Columns = field(default_factory=Columns)
    preprocess: Callable[[Any], Any] | None = None

    @classmethod
    def open(
        cls,
        source: str,
        split: str | None = None,
        prefer: Sequence[str] = (),
        columns: Columns | None = None,
        preprocess: Callable[[Any], Any] | None = None,
    ) -> ParquetObjects:
        """Open a Parquet file or a folder of them: a path, or a URL that fsspec knows, such as ``s3://bucket/folder``.

        Args:
            source: the file or folder.
            split: which split of a folder: files in a folder of that name, or whose names begin with it.
            prefer: without `split`, the names of splits to look for, where there are any.
            columns: which columns are what; see `TableRows`.
            preprocess: from an image, or the tensor of an object, to the network's input.

        Raises:
            DataError: there are no such files, or they cannot be read.
        """
        fs, root = filesystem(source)
        try:
            names = [root] if fs.isfile(root) else sorted(fs.glob(f"{root.rstrip('/')}/**/*.parquet"))
        except OSError as error:
            raise DataError(f"{source!r} cannot be listed: {error}") from error
        if not names:
            raise DataError(f"{source!r} is no Parquet file and no folder that holds any")
        names = _of_split(names, root, split, prefer, source)
        if other := [name for name in names if not is_url(source) and not Path(name).is_file()]:
            raise DataError(f"{other[0]!r} is no regular file; remove it from the data")
        lengths = [_length(fs, name) for name in names]
        files = tuple(fs.unstrip_protocol(name) if is_url(source) else name for name in names)
        if not sum(lengths):
            raise DataError(f"{source!r} holds no objects")
        return cls(source, files, tuple(lengths), columns or Columns(), preprocess)

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
        """The objects from one position to another, `size` at a time; a row group of a file is in memory at a time."""
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
                        yield parquet.read_row_group(group).slice(low, high - low)
                    first += count

    def _chunk(self, table: Any, start: int) -> Chunk:
        import datasets

        try:  # without a fingerprint of our own, all of the table would be hashed to make one
            loaded = datasets.Dataset(table, fingerprint="rows")
        except Exception as error:  # what the files say of their columns may be anything
            raise DataError(f"{self.name!r} describes its columns wrongly: {error}") from error
        wanted = self.columns.inputs, self.columns.label, self.columns.key
        rows = TableRows(loaded, repr(self.name), *wanted, self._folders)
        preprocess = self.preprocess
        if preprocess is None and rows.is_picture:
            preprocess = Preprocessing()
        (chunk,) = RowObjects(self.name, rows, preprocess).chunks(len(table))
        keys = chunk.keys if self.columns.key is not None else [start + i for i in range(len(table))]
        return Chunk(list(keys), chunk.errors, chunk.inputs)


def holds_parquet(source: str) -> bool:
    """Whether a path or URL is for `ParquetObjects`: a Parquet file, a folder with some, or any URL."""
    if is_url(source):
        return True
    path = Path(source)
    if path.is_dir():
        return any(path.rglob("*.parquet"))
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


def _length(fs: Any, name: str) -> int:
    """How many rows a file has, by its footer."""
    import pyarrow.parquet

    try:
        with fs.open(name, "rb") as file:
            return int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{name!r} cannot be read as Parquet: {error}") from error


def _of_split(names: list[str], root: str, split: str | None, prefer: Sequence[str], source: str) -> list[str]:
    """The files of a split."""

    def belongs(name: str, split: str) -> bool:
        *folders, file = Path(name[len(root) :].lstrip("/")).parts or (name,)
        return split in folders or file.startswith((f"{split}-", f"{split}.", f"{split}_"))

    for wanted in (split,) if split is not None else prefer:
        chosen = [name for name in names if belongs(name, wanted)]
        if chosen:
            return chosen
    if split is not None:
        raise DataError(f"{source!r} has no Parquet files of a split {split!r}")
    return names
