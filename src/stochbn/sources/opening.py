"""Open data by name: a folder, a file, a data set on the Hub, or a loader of the user."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochbn.schema import Schema, counted, listing
from stochbn.sources.columns import Columns
from stochbn.sources.files import Listing, listed, of_split
from stochbn.sources.folders import METADATA, FolderRows
from stochbn.sources.hub import HUB, DataError, described, folders_of, load_splits, saved_splits
from stochbn.sources.labels import usual_label
from stochbn.sources.loaders import LoaderObjects
from stochbn.sources.networks import find
from stochbn.sources.objects import RowObjects, Rows
from stochbn.sources.pictures import Decoding, Preprocessing, check_range, endings
from stochbn.sources.rows import ArrayRows, TableRows, roles_of
from stochbn.sources.tables import Unified, as_dataset, open_parquet, read_csv

__all__ = ["KINDS", "Columns", "kind_of", "open_objects", "renumbered"]

KINDS = "a folder of images, Parquet, CSV, .npy or .npz, a data set on the Hub (owner/name), or module:loader"
TABLES = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "csv"}
USUAL_INPUTS = ("x", "X", "inputs", "images", "data")
"""What an array of inputs is called where none is named."""


def open_objects(
    source: str,
    split: str | None = None,
    prefer: Sequence[str] = (),
    columns: Columns | None = None,
    preprocess: Callable[[Any], Any] | None = None,
    classes: tuple[str, ...] | None = None,
    decoding: Decoding | None = None,
) -> RowObjects | LoaderObjects:
    """Open data; examples are read when they are needed. Its `schema` says what was taken, and what was left out.

    Args:
        source: a folder of images, or with a folder of images for each class or split; a file that ends in
            ``.parquet``, ``.csv``, ``.npy`` or ``.npz``; a folder of Parquet or CSV files, or one that ``save_to_disk``
            wrote; a data set on the Hub; or ``module:loader``: an iterable of batches, or a function that returns one.
        split: which split, where there are several.
        prefer: without `split`, the names of splits to look for.
        columns: which columns are what.
        preprocess: from an image, or the tensor of an example, to the network's input. For images, None is a plain
            `Preprocessing`.
        classes: the names of the network's classes: labels that have names are brought to their numbers.
        decoding: how images are read.

    Raises:
        DataError, ValueError: it cannot be opened; the message says what to do.
    """
    columns, decoding = columns or Columns(), decoding or Decoding()
    path = Path(source)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source) and not path.exists():
        if columns.group is not None:
            raise DataError(f"{source!r} is a loader, whose batches have no column {columns.group!r}: name a table")
        return _loader(source)
    if path.is_file():
        rows, schema = _file(path, columns, decoding)
    elif path.is_dir():
        rows, schema = _folder(path, split, prefer, columns, decoding)
    elif source in HUB or re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        rows, schema = _hub(source, split, prefer, columns, decoding)
    else:
        raise DataError(f"there is no data {source!r}; expected {KINDS}")
    pictures = isinstance(rows, FolderRows) or getattr(rows, "is_picture", False)
    if pictures:
        preprocess = Preprocessing() if preprocess is None else preprocess
        check_range(preprocess)
    if not len(rows):
        raise DataError(f"{source!r} holds no examples{_left(schema)}")
    try:
        known, notes = rows.classes, schema.notes
    except ValueError as error:  # of labels, which not everyone needs
        known, notes = (), (*schema.notes, f"Its labels cannot be used: {error}.")
    about = schema.described(
        name=schema.name or source,
        count=len(rows),
        classes=known,
        notes=notes,
        exif=decoding.upright,
        page=decoding.page,
    )
    opened = RowObjects(about.name, rows, preprocess, schema=about)
    return renumbered(opened, classes) if classes and known else opened


def kind_of(found: Listing) -> str | None:
    """What the files of a folder are: ``pictures``, ``parquet`` or ``csv``, of which there are more; None if none.

    Pictures beside a few tables are the data, as tables beside pictures mostly are about them.
    """
    shown = endings()
    counts = {"pictures": 0, "parquet": 0, "csv": 0}
    for file in found.files:
        ending = file.suffix.lower()
        if ending in TABLES and file.name not in METADATA:
            counts[TABLES[ending]] += 1
        elif ending in shown:
            counts["pictures"] += 1
    best = max(counts, key=lambda kind: counts[kind])
    return best if counts[best] else None


def tables_in(
    found: Listing, kind: str, split: str | None, prefer: Sequence[str], source: str
) -> tuple[list[Path], Schema]:
    """The files of tables in a folder that are of a split, and what is known of the data then."""
    chosen = found.only(ending for ending, one in TABLES.items() if one == kind)
    positions, name = of_split(chosen.files, split, prefer, source)
    files = [found.root / chosen.files[i] for i in positions]
    others = len(chosen.files) - len(files)
    notes = (f"{counted(others, 'files')} more, of other splits.",) if others else ()
    shown = f"{source} ({name})" if name and others else source
    return files, Schema(name=shown, files=len(files), left_out=chosen.reasons, notes=notes)


def _left(schema: Schema) -> str:
    return f": left out {'; '.join(schema.left_out)}" if schema.left_out else ""


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


def _folder(
    folder: Path, split: str | None, prefer: Sequence[str], columns: Columns, decoding: Decoding
) -> tuple[Rows, Schema]:
    saved = saved_splits(folder)
    if saved is not None:
        return _one_of(saved, str(folder), (folder,), split, prefer, columns, decoding)
    found = listed(folder)
    kind = kind_of(found)
    if kind == "pictures":
        return _pictures(folder, found, split, prefer, columns, decoding)
    if kind is None or described(folder):
        return _hub(str(folder), split, prefer, columns, decoding, left_out=found.reasons)
    files, about = tables_in(found, kind, split, prefer, str(folder))
    return _tables(files, kind, str(folder), columns, decoding, (folder,), about)


def _pictures(
    folder: Path, found: Listing, split: str | None, prefer: Sequence[str], columns: Columns, decoding: Decoding
) -> tuple[Rows, Schema]:
    pictures = found.only(endings())
    name, notes = split, tuple[str, ...]()
    if split is None or not (folder / split).is_dir():
        _, name = of_split(pictures.files, split, prefer, str(folder), by_file=False)
    if name is not None:  # the folder of the split is the data
        found = listed(folder / name)
        others = len(pictures.files) - len(found.only(endings()).files)
        notes = (f"{counted(others, 'pictures')} more, of other splits.",) if others else ()
    about = [file for file in found.files if file.name in METADATA]
    pictures = found.only(endings(), but=about)
    rows = FolderRows(pictures, tuple(about), columns.label, decoding, columns.group)
    return rows, Schema(
        name=f"{folder} ({name})" if name is not None else str(folder),
        kind="pictures",
        files=len(rows),
        label=rows.label,
        left_out=(*pictures.reasons, *rows.left_out),
        notes=(*notes, *rows.notes),
    )


def _hub(
    source: str,
    split: str | None,
    prefer: Sequence[str],
    columns: Columns,
    decoding: Decoding,
    left_out: tuple[str, ...] = (),
) -> tuple[Rows, Schema]:
    loaded, location = load_splits(source)
    rows, schema = _one_of(loaded, location, folders_of(location), split, prefer, columns, decoding, shown=source)
    return rows, schema.described(left_out=(*left_out, *schema.left_out))


def _one_of(
    splits: dict[str, Any],
    location: str,
    folders: tuple[Path, ...],
    split: str | None,
    prefer: Sequence[str],
    columns: Columns,
    decoding: Decoding,
    shown: str | None = None,
) -> tuple[Rows, Schema]:
    """The rows of one of several splits that `datasets` has."""
    name = _chosen(list(splits), split, prefer, location)
    shown = f"{shown or location} ({name})" if len(splits) > 1 else shown or location
    told = (f"Other splits: {', '.join(other for other in splits if other != name)}.",) if len(splits) > 1 else ()
    called = f"{location!r} ({name})" if name else repr(location)
    return _rows(splits[name], called, columns, decoding, folders, Schema(name=shown, notes=told))


def _tables(
    files: Sequence[Path],
    kind: str,
    source: str,
    columns: Columns,
    decoding: Decoding,
    folders: tuple[Path, ...],
    about: Schema,
) -> tuple[Rows, Schema]:
    """The rows of files of tables, with their columns by name."""
    if kind == "csv":
        text = (*columns.label, columns.key, columns.group, *(columns.held.label if columns.held else ()))
        table, whole = read_csv(files, source, text)
        table = as_dataset(table)
    else:
        table, whole = open_parquet(files, source)
    return _rows(table, repr(source), columns, decoding, folders, about, whole)


def _rows(
    table: Any,
    name: str,
    columns: Columns,
    decoding: Decoding,
    folders: tuple[Path, ...],
    about: Schema,
    whole: Unified | None = None,
) -> tuple[Rows, Schema]:
    roles = roles_of(table, name, columns, None if whole is None else whole.index)
    if whole is not None:
        whole.check((*roles.inputs, roles.key, roles.group), name)
    return TableRows(table, name, folders=folders, roles=roles, decoding=decoding), about.described(
        kind="pictures" if roles.pictures else "rows",
        inputs=roles.inputs,
        types=roles.types,
        label=roles.label,
        key=roles.key,
        left_out=(*about.left_out, *roles.left_out),
    )


def _file(path: Path, columns: Columns, decoding: Decoding) -> tuple[Rows, Schema]:
    ending = path.suffix.lower()
    if ending in (".npy", ".npz"):
        return _arrays(path, columns)
    kind = TABLES.get(ending)
    if kind is None:
        raise DataError(f"{str(path)!r} ends in {ending!r}; expected {KINDS}")
    return _tables([path], kind, str(path), columns, decoding, (path.parent,), Schema(files=1))


def _arrays(path: Path, columns: Columns) -> tuple[Rows, Schema]:
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # also what would need pickle
        raise DataError(f"{str(path)!r} cannot be read as arrays of numbers: {error}") from error
    about = Schema(kind="arrays", files=1)
    if isinstance(loaded, np.ndarray):
        if replace(columns, held=None) != Columns():
            raise DataError(f"{str(path)!r} is one array; --input, --label and --key name arrays in an .npz")
        return ArrayRows(loaded), about.described(kind="rows")
    with loaded:
        names = list(loaded)
        asked = columns.named(("arrays",), names, repr(str(path)))

        def pick(name: str | None) -> Any:
            try:
                return None if name is None else loaded[name]
            except Exception as error:  # of a damaged archive, or what would need pickle
                raise DataError(f"the array {name!r} of {str(path)!r} cannot be read: {error}") from error

        if len(asked.inputs) > 1:
            raise DataError(f"name one array of {str(path)!r} with --input, not {len(asked.inputs)}")
        candidates = (*USUAL_INPUTS, *(names if len(names) == 1 else ()))
        taken = asked.inputs[0] if asked.inputs else next((name for name in candidates if name in names), None)
        if taken is None:
            raise DataError(f"{str(path)!r} has the arrays {', '.join(names)}; say with --input which are the inputs")
        usual = "y" if "y" in names else usual_label([name for name in names if name != taken])
        label = asked.label or tuple(filter(None, (usual,)))
        inputs, keys, groups = map(pick, (taken, asked.key, asked.group))
        labels = {name: pick(name) for name in label} or None
    others = [name for name in names if name not in (taken, *label, asked.key, asked.group)]
    try:
        rows = ArrayRows(inputs, labels, keys, asked.key or "row", groups)
    except ValueError as error:
        raise DataError(f"{str(path)!r}: {error}") from error
    return rows, about.described(
        inputs=(taken,),
        types=(str(inputs.dtype),),
        label=label,
        key=asked.key,
        left_out=(f"the arrays {', '.join(others)}",) if others else (),
    )


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


def renumbered(opened: RowObjects, classes: tuple[str, ...]) -> RowObjects:
    """With labels that count the network's classes, -1 for others, where the data's classes have names.

    True boxes of other classes are left out, and the schema says how many.
    """
    own = opened.classes
    if not own or own == classes or (all(name.isdigit() for name in own) and not set(own) <= set(classes)):
        return opened
    numbers = torch.tensor([*(classes.index(name) if name in classes else -1 for name in own), -1])
    schema = None if opened.schema is None else opened.schema.described(classes=classes)
    if schema is not None and opened.rows.has_boxes and (told := _boxes_of_others(opened.rows, classes)):
        schema = schema.described(left_out=(*schema.left_out, told))
    return replace(opened, rows=_Renumbered(opened.rows, numbers, classes), schema=schema)


def _boxes_of_others(rows: Rows, classes: tuple[str, ...]) -> str:
    """How many boxes are of classes that a network does not have, and of which; empty if there are none."""
    labels = rows.labels()
    kinds = [] if labels is None else labels[:, :, 4][~labels[:, :, 4].isnan()].long().tolist()
    own = rows.classes
    others = Counter(own[kind] if 0 <= kind < len(own) else str(kind) for kind in kinds)
    others = Counter({name: count for name, count in others.items() if name not in classes})
    told = f"{counted(others.total(), 'boxes')} of classes that the network does not have: "
    return told + listing(name for name, _ in others.most_common()) if others else ""


class _Renumbered:
    """Rows with other numbers for their labels.

    Args:
        rows: the rows.
        numbers: the new number of each class, and -1 for a label that is missing. Boxes of number -1 are left out.
        classes: the names for the new numbers.
    """

    def __init__(self, rows: Rows, numbers: Tensor, classes: tuple[str, ...]) -> None:
        self.rows, self.numbers, self.classes = rows, numbers, classes
        self.key_name, self.key, self.read, self.groups = rows.key_name, rows.key, rows.read, rows.groups
        self.has_boxes = rows.has_boxes

    def __len__(self) -> int:
        return len(self.rows)

    def labels(self) -> Tensor | None:
        """The new numbers."""
        found = self.rows.labels()
        if found is None or not self.has_boxes:
            return None if found is None else self.numbers[found]
        there, found = ~found[:, :, 4].isnan(), found.clone()
        kinds = found[:, :, 4][there].long().clamp(-1, len(self.numbers) - 1)  # those at the ends have no name
        found[:, :, 4][there] = self.numbers[kinds].double()
        found[found[:, :, 4] < 0] = torch.nan
        return found
