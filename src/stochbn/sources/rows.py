"""Objects that are read by their position: folders of images, tables of `datasets`, and arrays."""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochbn.sources.inside import open_regular
from stochbn.sources.pictures import decode, is_picture, stored_picture
from stochbn.texts import unambiguous

__all__ = ["ArrayRows", "FolderRows", "TableRows", "undecoded"]

NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
SEEN = 1000
"""How many cells of a column of text are looked at, to tell whether it holds numbers."""


class FolderRows:
    """The images in a folder and the folders in it, in the order of their paths.

    Where all of them lie in folders of their own, these are the classes, in alphabetical order.

    Raises:
        ValueError: there are no images.
    """

    key_name = "file"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = sorted(path.relative_to(folder) for path in folder.rglob("*") if is_picture(path))
        if not self.files:
            raise ValueError(f"the folder {str(folder)!r} holds no images")
        labelled = all(len(file.parts) > 1 for file in self.files)
        self.classes: tuple[str, ...] = tuple(sorted({file.parts[0] for file in self.files})) if labelled else ()

    def __len__(self) -> int:
        return len(self.files)

    def key(self, position: int) -> str:
        """The path within the folder; bytes in it that are not UTF-8 are escaped."""
        return unambiguous(self.files[position].as_posix())

    def read(self, position: int) -> Any:
        """The image."""
        with open_regular(self.folder / self.files[position]) as file:
            return decode(file)

    def labels(self) -> Tensor | None:
        """The numbers of the classes."""
        number = {name: i for i, name in enumerate(self.classes)}
        return torch.tensor([number[file.parts[0]] for file in self.files]) if number else None


class TableRows:
    """The rows of a `datasets.Dataset`, which stays on disk: a column of images, or columns of numbers.

    Args:
        table: the data set.
        name: what it is called in messages.
        inputs: the column of images or arrays, or the columns of numbers; none are the first column of images or,
            where there is none, all columns of numbers but key and label; one of texts of
            which most are numbers is among them. Where there are none either, the first column of lists.
        label: the column of labels; None is the first of type ClassLabel, or one called ``label``.
        key: the column of keys; None numbers the rows.
        folders: where images may lie that the table names in place of their bytes; none are opened without.

    Raises:
        ValueError: there are no such columns.
    """

    def __init__(
        self,
        table: Any,
        name: str,
        inputs: tuple[str, ...] = (),
        label: str | None = None,
        key: str | None = None,
        folders: Sequence[Path] = (),
    ) -> None:
        import datasets

        table = undecoded(table)
        features = table.features
        for wanted in (*inputs, *filter(None, (label, key))):
            if wanted not in features:
                raise ValueError(f"{name} has no column {wanted!r}; it has {', '.join(features)}")
        pictures = [c for c, feature in features.items() if isinstance(feature, datasets.Image) or _is_encoded(feature)]
        of_classes = [c for c, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        self.label = label or next(iter(of_classes), "label" if "label" in features else None)
        texts = [c for c, feature in features.items() if _is_text(feature)]
        asked = set(inputs or (() if pictures else features)).intersection(texts).difference((self.label, key))
        written = {c for c in asked if _mostly_numbers(table.select_columns([c])[:SEEN][c])}
        numeric = [c for c, f in features.items() if (_is_numeric(f) or c in written) and c not in (self.label, key)]
        lists = [c for c, feature in features.items() if _is_numeric(getattr(feature, "feature", None))]
        self.inputs = inputs or tuple(pictures[:1]) or tuple(numeric) or tuple(lists[:1])
        if not self.inputs:
            raise ValueError(f"{name} has no column of images or numbers; it has {', '.join(features)}: see --input")
        if no_numbers := [column for column in self.inputs if column in texts and column not in written]:
            raise ValueError(f"the column {no_numbers[0]!r} of {name} holds text; name columns of images or numbers")
        for column in (*self.inputs, *filter(None, (self.label, key))):
            if _opens(features[column]) and (column not in self.inputs[:1] or column not in pictures):
                raise ValueError(f"the column {column!r} of {name} is of files; name columns of images or numbers")
        if self.label is not None and _is_text(features[self.label]):
            table = table.class_encode_column(self.label)
        self.is_picture = self.inputs[0] in pictures
        if self.is_picture:
            table = table.cast_column(self.inputs[0], datasets.Image(decode=False))
        feature = table.features[self.label] if self.label is not None else None
        self.classes: tuple[str, ...] = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()
        self.key_name = key or "row"
        self.table, self.name, self.folders = table, name, tuple(folders)
        self._inputs = table.select_columns(list(self.inputs))
        self._cells = None if self.is_picture or len(self.inputs) > 1 else self._inputs.with_format("arrow")
        self._keys = table.select_columns([key]) if key is not None else None

    def __len__(self) -> int:
        return len(self.table)

    def key(self, position: int) -> str | int:
        """The key, or the number of the row."""
        return position if self._keys is None else str(self._keys[position][self.key_name])

    def read(self, position: int) -> Any:
        """An image, or a tensor of the row's numbers in float32."""
        if (found := self._list_of_numbers(position)) is not None:
            return found
        row = self._inputs[position]
        if self.is_picture:
            return stored_picture(row[self.inputs[0]], self.folders)
        cells = [_number(row[column], column) for column in self.inputs]
        try:
            tensor = torch.tensor(cells if len(cells) > 1 else cells[0], dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"holds what is no number: {error}") from error
        return tensor if tensor.ndim else tensor[None]

    def _list_of_numbers(self, position: int) -> Tensor | None:
        """A row that is one list of numbers, without a Python object for each; None where it is something else."""
        import pyarrow.types

        if self._cells is None:
            return None
        (cell,) = self._cells[position].column(0).chunks
        if not (pyarrow.types.is_list(cell.type) or pyarrow.types.is_fixed_size_list(cell.type)) or cell.null_count:
            return None
        values, kind = cell.flatten(), cell.type.value_type
        if values.null_count or not (pyarrow.types.is_floating(kind) or pyarrow.types.is_integer(kind)):
            return None
        return torch.tensor(values.to_numpy(), dtype=torch.float32)

    def labels(self) -> Tensor | None:
        """The column of labels."""
        if self.label is None:
            return None
        values = self.table[self.label][:]
        if not all(isinstance(value, numbers.Number) for value in values):
            raise ValueError(f"the column {self.label!r} of {self.name} has labels that are no numbers; see --label")
        return torch.tensor(values)


class ArrayRows:
    """The rows of arrays: integers as they are, bytes as shares of 255, other numbers as float32.

    Args:
        inputs: ``[N, ...]``; may be mapped from a file.
        labels: ``[N]``, if there are labels.
        keys: ``[N]``; None numbers the rows.
        key_name: what the keys are called.

    Raises:
        ValueError: the arrays disagree in N, or hold no numbers.
    """

    classes: tuple[str, ...] = ()

    def __init__(
        self,
        inputs: np.ndarray[Any, Any],
        labels: np.ndarray[Any, Any] | None = None,
        keys: np.ndarray[Any, Any] | None = None,
        key_name: str = "row",
    ) -> None:
        if inputs.ndim < 1 or inputs.dtype.kind not in "fiub":
            raise ValueError(f"expected an array of numbers [N, ...], got {inputs.dtype} {list(inputs.shape)}")
        if labels is not None and labels.dtype.kind not in "fiub":
            raise ValueError(f"expected labels that are numbers, from 0 to K - 1 for K classes, got {labels.dtype}")
        for name, other in (("labels", labels), ("keys", keys)):
            if other is not None and len(other) != len(inputs):
                raise ValueError(f"there are {len(inputs)} inputs and {len(other)} {name}; expected as many")
        self.inputs, self.targets, self.keys, self.key_name = inputs, labels, keys, key_name

    def __len__(self) -> int:
        return len(self.inputs)

    def key(self, position: int) -> str | int:
        """The key, or the number of the row."""
        return position if self.keys is None else unambiguous(str(self.keys[position]))

    def read(self, position: int) -> Tensor:
        """A row as a tensor."""
        row = np.array(self.inputs[position])
        if row.dtype == np.uint8:
            return torch.from_numpy(row.astype(np.float32) / 255)
        return torch.from_numpy(row.astype(np.int64 if row.dtype.kind in "iu" else np.float32))

    def labels(self) -> Tensor | None:
        """The labels."""
        return None if self.targets is None else torch.from_numpy(np.array(self.targets))


def undecoded(table: Any) -> Any:
    """A `datasets.Dataset` whose cells are what is stored; `datasets` itself would open any file or URL they name."""
    for name, feature in table.features.items():
        if getattr(feature, "decode", False):
            table = table.cast_column(name, dataclasses.replace(feature, decode=False))
    return table


def _opens(feature: Any) -> bool:
    """Whether a column holds images, sound or the like, at any depth, which `datasets` reads from files."""
    if isinstance(feature, Mapping):
        return any(map(_opens, feature.values()))
    if isinstance(feature, (list, tuple)):
        return any(map(_opens, feature))
    inner = getattr(feature, "feature", None)
    is_file = hasattr(feature, "decode") and type(feature).__name__ != "Json"
    return is_file or (inner is not None and _opens(inner))


def _number(value: Any, column: str) -> Any:
    """A cell as it is, or what is written in it.

    Raises:
        ValueError: it is empty, or a text that is no number.
    """
    if value is None:
        raise ValueError(f"has no number in the column {column!r}")
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"holds {value!r:.40} in the column {column!r}, which is no number") from None


def _mostly_numbers(texts: list[str | None]) -> bool:
    """Whether most texts are numbers, as in a column where a few are mistyped."""
    return 2 * sum(NUMBER.fullmatch(text or "") is not None for text in texts) > len(texts)


def _is_encoded(feature: Any) -> bool:
    """Whether a column holds bytes, or bytes and a path as `datasets` stores images: pictures without their type."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"} and _is_encoded(feature["bytes"])
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _is_numeric(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", ""))
    return dtype.startswith(("int", "uint", "float", "bool"))
