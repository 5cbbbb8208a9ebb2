"""Data by name: a folder, a file, a data set on the Hub, or a loader of the user's."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochbn.sources.hub import HUB, DataError, folders_of, load_splits
from stochbn.sources.loaders import LoaderObjects
from stochbn.sources.networks import find
from stochbn.sources.objects import RowObjects, Rows
from stochbn.sources.pictures import Preprocessing, is_picture
from stochbn.sources.rows import ArrayRows, FolderRows, TableRows

__all__ = ["KINDS", "Columns", "open_objects"]

KINDS = "a folder of images, Parquet, CSV, .npy or .npz, a data set on the Hub (owner/name), or module:loader"


@dataclass(frozen=True)
class Columns:
    """Which columns of a table, or arrays of a file, are what; None and nothing: see `TableRows`."""

    inputs: tuple[str, ...] = ()
    label: str | None = None
    key: str | None = None


def open_objects(
    source: str,
    split: str | None = None,
    prefer: Sequence[str] = (),
    columns: Columns | None = None,
    preprocess: Callable[[Any], Any] | None = None,
    classes: tuple[str, ...] | None = None,
) -> RowObjects | LoaderObjects:
    """Open data; objects are read when they are needed.

    Args:
        source: a folder of images, or with a folder of images for each class or split; a file that ends in
            ``.parquet``, ``.csv``, ``.npy`` or ``.npz``; a folder of Parquet files; a data set on the Hub; or
            ``module:loader``: an iterable of batches, or a function that returns one.
        split: which split, where there are several.
        prefer: without `split`, the names of splits to look for.
        columns: which columns are what.
        preprocess: from an image, or the tensor of an object, to the network's input. For images, None is a plain
            `Preprocessing`.
        classes: the names of the network's classes: labels that have names are brought to their numbers.

    Raises:
        DataError, ValueError: it cannot be opened; the message says what to do.
    """
    columns = columns or Columns()
    path, shown = Path(source), source
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source) and not path.exists():
        return _loader(source)
    if path.is_file():
        rows: Rows = _file(path, columns)
    elif path.is_dir() and _holds_images(path):
        chosen = _split_folder(path, split, prefer)
        rows = FolderRows(chosen)
        shown = source if chosen == path else f"{source} ({chosen.name})"
    elif path.is_dir() or source in HUB or re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        loaded, location = load_splits(source)
        name = _chosen(list(loaded), split, prefer, location)
        rows = TableRows(loaded[name], f"{location!r} ({name})", *_given(columns), folders_of(location))
        shown = f"{source} ({name})" if len(loaded) > 1 else source
    else:
        raise DataError(f"there is no data {source!r}; expected {KINDS}")
    if preprocess is None and (isinstance(rows, FolderRows) or getattr(rows, "is_picture", False)):
        preprocess = Preprocessing()
    opened = RowObjects(shown, rows, preprocess)
    if not len(opened):
        raise DataError(f"{source!r} holds no objects")
    return _renumbered(opened, classes) if classes else opened


def _loader(source: str) -> LoaderObjects:
    _, found = find(source, "loader")
    if callable(found) and not isinstance(found, Iterable):
        try:
            found = found()
        except Exception as error:  # a user's function may raise anything
            raise DataError(f"{source!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, Iterable):
        raise DataError(f"{source!r} gives {type(found).__name__}; expected an iterable of batches")
    return LoaderObjects(source, found)


def _given(columns: Columns) -> tuple[tuple[str, ...], str | None, str | None]:
    return columns.inputs, columns.label, columns.key


def _file(path: Path, columns: Columns) -> Rows:
    ending = path.suffix.lower()
    if ending in (".npy", ".npz"):
        return _arrays(path, columns)
    reader = {".parquet": "parquet", ".csv": "csv"}.get(ending)
    if reader is None:
        raise DataError(f"{str(path)!r} ends in {ending!r}; expected {KINDS}")
    import datasets

    shown, verbosity = datasets.utils.logging.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs may hold what is in the file
    try:
        table = datasets.load_dataset(reader, data_files=str(path), split="train")
    except Exception as error:  # the readers of each format raise errors of their own kinds
        cause = error.__cause__ or error
        raise DataError(f"{str(path)!r} cannot be read as {reader}: {cause}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()
    return TableRows(table, repr(str(path)), *_given(columns), (path.parent,))


def _arrays(path: Path, columns: Columns) -> ArrayRows:
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # also what would need pickle
        raise DataError(f"{str(path)!r} cannot be read as arrays of numbers: {error}") from error
    if isinstance(loaded, np.ndarray):
        if columns != Columns():
            raise DataError(f"{str(path)!r} is one array; --input, --label and --key name arrays in an .npz")
        return ArrayRows(loaded)
    with loaded:
        names = list(loaded)

        def pick(wanted: str | None, usual: tuple[str, ...]) -> Any:
            if wanted is not None and wanted not in names:
                raise DataError(f"{str(path)!r} has no array {wanted!r}; it has {', '.join(names)}")
            name = wanted or next((name for name in usual if name in names), None)
            try:
                return None if name is None else loaded[name]
            except Exception as error:  # of a damaged archive, or what would need pickle
                raise DataError(f"the array {name!r} of {str(path)!r} cannot be read: {error}") from error

        if len(columns.inputs) > 1:
            raise DataError(f"name one array of {str(path)!r} with --input, not {len(columns.inputs)}")
        usual = ("x", "X", "inputs", "images", "data", *(names if len(names) == 1 else ()))
        inputs = pick(columns.inputs[0] if columns.inputs else None, usual)
        if inputs is None:
            raise DataError(f"{str(path)!r} has the arrays {', '.join(names)}; say with --input which are the inputs")
        labels = pick(columns.label, ("y", "labels", "label", "targets"))
        keys = pick(columns.key, ())
    try:
        return ArrayRows(inputs, labels, keys, columns.key or "row")
    except ValueError as error:
        raise DataError(f"{str(path)!r}: {error}") from error


def _holds_images(folder: Path) -> bool:
    return any(is_picture(path) for path in folder.rglob("*"))


def _split_folder(folder: Path, split: str | None, prefer: Sequence[str]) -> Path:
    """The folder of a split, where the folders in it are splits."""
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
    splits = [name for name in inside if name in ("train", "test", "val", "valid", "validation") or name == split]
    if not splits:
        if split is not None:
            raise DataError(f"{str(folder)!r} has no folder {split!r}; it has {', '.join(inside) or 'none'}")
        return folder
    return folder / _chosen(splits, split, prefer, str(folder))


def _chosen(splits: list[str], split: str | None, prefer: Sequence[str], location: str) -> str:
    if split is not None:
        if split not in splits:
            raise DataError(f"{location!r} has no split {split!r}; it has {', '.join(map(repr, splits))}")
        return split
    if len(splits) == 1:
        return splits[0]
    found = next((name for name in prefer if name in splits), None)
    if found is None:
        raise DataError(f"{location!r} has the splits {', '.join(map(repr, splits))}; say with --split which")
    return found


def _renumbered(opened: RowObjects, classes: tuple[str, ...]) -> RowObjects:
    """With labels that count the network's classes, -1 for others, where the data's classes have names."""
    own = opened.classes
    if not own or own == classes or (all(name.isdigit() for name in own) and not set(own) <= set(classes)):
        return opened
    numbers = torch.tensor([classes.index(name) if name in classes else -1 for name in own])
    return replace(opened, rows=_Renumbered(opened.rows, numbers, classes))


class _Renumbered:
    """Rows with other numbers for their labels.

    Args:
        rows: the rows.
        numbers: the new number of each class.
        classes: the names for the new numbers.
    """

    def __init__(self, rows: Rows, numbers: Tensor, classes: tuple[str, ...]) -> None:
        self.rows, self.numbers, self.classes = rows, numbers, classes
        self.key_name, self.key, self.read = rows.key_name, rows.key, rows.read

    def __len__(self) -> int:
        return len(self.rows)

    def labels(self) -> Tensor | None:
        """The new numbers."""
        found = self.rows.labels()
        return None if found is None else self.numbers[found]
