"""Examples that are read by their position: tables of `datasets`, and arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochbn.conformal.base import group_names
from stochbn.sources.boxes import are_boxes, class_feature
from stochbn.sources.columns import Columns, Roles, choose
from stochbn.sources.labels import as_labels, labels_of_columns
from stochbn.sources.pictures import Decoding, stored_picture
from stochbn.sources.tables import index_columns, mostly_numbers
from stochbn.texts import unambiguous

__all__ = ["ArrayRows", "TableRows", "roles_of", "undecoded"]


class TableRows:
    """The rows of a `datasets.Dataset`, which stays on disk: a column of images, or columns of numbers.

    Args:
        table: the data set.
        name: what it is called in messages.
        inputs: the column of images or arrays, or the columns of numbers; see `choose` for none.
        label: the column of labels, likewise.
        key: the column of keys; None numbers the rows.
        folders: where images may lie that the table names in place of their bytes; none are opened without.
        roles: what the columns are, where that was chosen before.
        decoding: how images are read.

    Raises:
        ValueError: there are no such columns.
    """

    def __init__(
        self,
        table: Any,
        name: str,
        inputs: tuple[str, ...] = (),
        label: tuple[str, ...] = (),
        key: str | None = None,
        folders: Sequence[Path] = (),
        *,
        roles: Roles | None = None,
        decoding: Decoding | None = None,
    ) -> None:
        import datasets

        table = undecoded(table)
        self.roles = roles or roles_of(table, name, Columns(inputs, label, key))
        self.label, self.inputs, self.is_picture = self.roles.label, self.roles.inputs, self.roles.pictures
        if self.is_picture:
            table = table.cast_column(self.inputs[0], datasets.Image(decode=False))
        self.key_name = self.roles.key or "row"
        self.table, self.name, self.folders, self.decoding = table, name, tuple(folders), decoding
        self._inputs = table.select_columns(list(self.inputs))
        self._cells = None if self.is_picture or len(self.inputs) > 1 else self._inputs.with_format("arrow")
        self._keys = table.select_columns([self.roles.key]) if self.roles.key is not None else None

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
            return stored_picture(row[self.inputs[0]], self.folders, self.decoding)
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

    @cached_property
    def groups(self) -> list[str] | None:
        """The column of groups, as texts; None where none was asked for."""
        name = self.roles.group
        return None if name is None else group_names(self.table.select_columns([name])[:][name], len(self))

    @cached_property
    def has_boxes(self) -> bool:
        """Whether labels are true boxes."""
        return len(self.label) == 1 and are_boxes(self.table.select_columns(list(self.label))[:][self.label[0]])

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; none where labels are numbers."""
        return self._numbered[1]

    def labels(self) -> Tensor | None:
        """The column of labels, as numbers.

        Raises:
            ValueError: they are neither numbers nor names of classes.
        """
        return self._numbered[0]

    @cached_property
    def _numbered(self) -> tuple[Tensor | None, tuple[str, ...]]:
        import datasets

        if not self.label:
            return None, ()
        columns = self.table.select_columns(list(self.label))[:]
        labels, classes = labels_of_columns({name: columns[name] for name in self.label}, self.name)
        feature = (
            class_feature(self.table.features[self.label[0]]) if self.has_boxes else self.table.features[self.label[0]]
        )
        return labels, tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else classes


class ArrayRows:
    """The rows of arrays: integers as they are, bytes as shares of 255, other numbers as float32.

    Args:
        inputs: ``[N, ...]``; may be mapped from a file.
        labels: ``[N]`` or more, if there are labels: numbers, or names of classes; or several such arrays by names.
        keys: ``[N]``; None numbers the rows.
        key_name: what the keys are called.
        groups: ``[N]``, the group of each; None where none was asked for.

    Raises:
        ValueError: the arrays disagree in N, or hold no numbers.
    """

    has_boxes = False

    def __init__(
        self,
        inputs: np.ndarray[Any, Any],
        labels: np.ndarray[Any, Any] | Mapping[str, np.ndarray[Any, Any]] | None = None,
        keys: np.ndarray[Any, Any] | None = None,
        key_name: str = "row",
        groups: np.ndarray[Any, Any] | None = None,
    ) -> None:
        if inputs.ndim < 1 or inputs.dtype.kind not in "fiub":
            raise ValueError(f"expected an array of numbers [N, ...], got {inputs.dtype} {list(inputs.shape)}")
        given = labels if isinstance(labels, Mapping) else {} if labels is None else {"labels": labels}
        for name, other in (*(("labels", one) for one in given.values()), ("keys", keys), ("groups", groups)):
            if other is not None and len(other) != len(inputs):
                raise ValueError(f"there are {len(inputs)} inputs and {len(other)} {name}; expected as many")
        self.inputs, self.keys, self.key_name = inputs, keys, key_name
        self.groups = None if groups is None else group_names(groups, len(inputs))
        self.classes: tuple[str, ...] = ()
        self._labels: Tensor | None = None
        if len(given) > 1:
            self._labels, self.classes = labels_of_columns(given, "the arrays")
        elif given:
            self._labels, self.classes = as_labels(next(iter(given.values())), "the array of labels")

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
        return self._labels


def undecoded(table: Any) -> Any:
    """A `datasets.Dataset` whose cells are what is stored; `datasets` itself would open any file or URL they name."""
    for name, feature in table.features.items():
        if getattr(feature, "decode", False):
            table = table.cast_column(name, dataclasses.replace(feature, decode=False))
    return table


def roles_of(table: Any, name: str, asked: Columns, index: dict[str, str] | None = None) -> Roles:
    """What the columns of a table are, see `choose`."""
    column = table.data.column
    index = index_columns(table.data.schema) if index is None else index
    return choose(table.features, name, asked, lambda wanted: mostly_numbers(column(wanted)), index)


def _number(value: Any, column: str) -> Any:
    """A cell as it is, or what is written in it.

    Raises:
        ValueError: it is empty, or a text that is no number.
    """
    if value is None or value == "":
        raise ValueError(f"has no number in the column {column!r}")
    if not isinstance(value, str):
        return float(value) if isinstance(value, Decimal) else value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"holds {value!r:.40} in the column {column!r}, which is no number") from None
