"""Convert labels to numbers: names, numbers as text, truth values, unsigned integers, in one column or several."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochbn.schema import listing

__all__ = ["MISSING", "NUMBER", "as_labels", "labels_of_columns", "usual_label"]

USUAL = ("label", "labels", "target", "targets", "class", "y")
"""What a column of labels is called where none is named, the first that is there; ``y`` only without an ``x``."""
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
MISSING = {"", "na", "n/a", "nan", "null", "none", "<na>"}
"""What stands for no label among numbers, in small letters. Among texts these are names like any other, but for ''."""


def usual_label(names: Collection[str]) -> str | None:
    """The column that is called as labels usually are."""
    small = {name.lower(): name for name in reversed(list(names))}
    return next((small[name] for name in USUAL if name in small and (name != "y" or "x" not in small)), None)


def as_labels(values: Any, where: str, order: Sequence[str] | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """Convert labels to numbers ``[N, ...]``; also return the names of the classes if labels are names.

    Names are numbered in alphabetical order. Texts that are all numbers are converted, and truth values become 0 and 1.
    A missing label is -1, or NaN among fractions.

    Args:
        values: an array, a tensor, or a list of the cells of a column.
        where: the name of the labels in messages.
        order: the names in another order, as in ordered categories.

    Raises:
        ValueError: they are neither numbers nor names.
    """
    if isinstance(values, Tensor):
        values = values.float().numpy() if values.dtype in (torch.bfloat16, torch.float16) else values.numpy()
    array = values if isinstance(values, np.ndarray) else _array(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind in "OUS":
        cells = [one.decode() if isinstance(one, bytes) else one for one in array.ravel().tolist()]
        if array.ndim == 1 and all(cell is None or isinstance(cell, str) for cell in cells):
            return _of_texts(["" if cell is None else cell.strip() for cell in cells], where, order)
        raise ValueError(f"{where} has labels that are no numbers; see --label")
    if array.dtype.kind == "b":
        return torch.from_numpy(array.astype(np.int64)), ()
    if array.dtype.kind in "iu":
        if array.size and array.dtype.kind == "u" and int(array.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"{where} has labels up to {array.max()}, which are no numbers of classes")
        return torch.from_numpy(array.astype(np.int64)), ()
    if array.dtype.kind != "f":
        raise ValueError(f"{where} has labels of type {array.dtype}; expected numbers or names of classes")
    return _whole(torch.from_numpy(np.array(array))), ()


def labels_of_columns(columns: Mapping[str, Any], name: str) -> tuple[Tensor, tuple[str, ...]]:
    """The labels of one column, as `as_labels` has them, ``[N, M, 6]`` of boxes, or ``[N, columns]`` of several.

    Args:
        columns: what each column holds, by its name.
        name: of the data, in messages.

    Raises:
        ValueError: they are neither numbers, names nor boxes, or, of several columns, not all numbers.
    """
    from stochbn.sources.boxes import are_boxes, boxes_of_cells

    if len(columns) == 1 and are_boxes(values := next(iter(columns.values()))):
        return boxes_of_cells(values, f"the column {next(iter(columns))!r} of {name}")
    found = {column: as_labels(values, f"the column {column!r} of {name}") for column, values in columns.items()}
    if len(found) == 1:
        return next(iter(found.values()))
    for column, (labels, classes) in found.items():
        if classes or labels.ndim != 1:
            raise ValueError(
                f"several columns of labels must each hold one number a row, and {column!r} of {name} does not"
            )
    return torch.stack([labels.double() for labels, _ in found.values()], 1), ()


def _array(values: Sequence[Any]) -> np.ndarray[Any, Any]:
    """A list of cells as an array; None among numbers is NaN."""
    present = [value for value in values if value is not None]
    if len(present) < len(values) and not any(isinstance(value, str) for value in present):
        values = [np.nan if value is None else value for value in values]
    try:
        found = np.asarray(values)
    except ValueError:  # lists of several lengths
        found = np.empty(len(values), dtype=object)
        found[:] = list(values)
    if found.dtype.kind in "US" and not all(isinstance(value, (str, bytes)) for value in values):
        found = np.asarray(values, dtype=object)
    return found


def _whole(found: Tensor) -> Tensor:
    """Fractions as whole numbers where all of them are, as pandas stores whole numbers among which some are missing."""
    known = found[~found.isnan()]
    if found.ndim == 1 and len(known) < len(found) and len(known) and bool((known == known.round()).all()):
        return torch.where(found.isnan(), -1.0, found).to(torch.int64)
    return found


def _of_texts(cells: list[str], where: str, order: Sequence[str] | None) -> tuple[Tensor, tuple[str, ...]]:
    small = {cell.lower() for cell in cells}
    numbers = [cell for cell in dict.fromkeys(cells) if NUMBER.fullmatch(cell)]
    if numbers and all(NUMBER.fullmatch(cell) or cell in MISSING for cell in small):
        values = torch.tensor([float(cell) if NUMBER.fullmatch(cell) else torch.nan for cell in cells]).double()
        known = values[~values.isnan()]
        if bool((known == known.round()).all()) and all(re.fullmatch(r"\s*[+-]?\d+(\.0*)?\s*", one) for one in numbers):
            return torch.where(values.isnan(), -1.0, values).to(torch.int64), ()
        return values, ()
    if small - MISSING and small - MISSING <= {"true", "false"}:
        number = {"true": 1, "false": 0}
        return torch.tensor([number.get(cell.lower(), -1) for cell in cells]), ()
    if len(numbers) > 1 and 2 * sum(NUMBER.fullmatch(cell) is not None for cell in cells) > len(cells):
        others = [repr(cell) for cell in dict.fromkeys(cells) if not NUMBER.fullmatch(cell)]
        raise ValueError(
            f"{where} has labels that are numbers but for {listing(others)}: give all classes numbers, or all names"
        )
    names = tuple(order) if order is not None else tuple(sorted({cell for cell in cells if cell}))
    if not names:
        return torch.full((len(cells),), -1), ()
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number.get(cell, -1) for cell in cells]), names
