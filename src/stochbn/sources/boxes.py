"""True boxes of pictures as people store them: COCO's files, and columns of boxes as data sets of the Hub have them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as repr_of
from typing import Any

import torch
from torch import Tensor

from stochbn.schema import listing
from stochbn.sources.hub import DataError
from stochbn.tasks.boxes import padded

__all__ = ["CocoBoxes", "are_boxes", "boxes_of_cells", "class_feature", "moved", "read_coco"]

CLASS_KEYS = ("category", "categories", "category_id", "label", "labels", "class")
"""What the classes of the boxes in a cell are called, the first that is there."""
BOX_KEYS = ("bbox", "bboxes", "boxes")
MOST_CLASS = 2**31
"""Above all numbers of classes."""
TYPES = {int: "a whole number", str: "a text", list: "a list"}
"""What types of JSON are called in messages."""


@dataclass(frozen=True, eq=False)
class CocoBoxes:
    """What a file of COCO's form says of pictures.

    Attributes:
        boxes: of each picture by its file name, ``[m, 6]``: left, top, right, bottom, class, and 1 for a crowd.
        sizes: height and width of each.
        classes: the names of the categories, in the order of their ids, which numbers them from 0.
    """

    boxes: Mapping[str, Tensor]
    sizes: Mapping[str, tuple[int, int]]
    classes: tuple[str, ...]


def read_coco(path: Path) -> CocoBoxes:
    """The boxes in a file of COCO's form, such as ``instances_val2017.json``.

    Raises:
        DataError: it is no such file, names a picture or category that it does not have, or has two of one id or name.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    parts = ("images", "annotations", "categories")
    if not isinstance(found, dict) or not all(isinstance(found.get(part), list) for part in parts):
        raise DataError(f"{str(path)!r} is no file of COCO's form: it must have the lists {', '.join(parts)}")
    images, annotations, kinds = (
        [_Entry(one, f"{part}[{i}] of {str(path)!r}") for i, one in enumerate(found[part])] for part in parts
    )
    names = _by_id(images, "file_name")
    names = {key: name.replace("\\", "/") for key, name in names.items()}
    classes = dict(sorted(_by_id(kinds, "name", only=(int,)).items()))
    for what, given in (("images", names), ("categories", classes)):
        if twice := [name for name, count in Counter(given.values()).items() if count > 1]:
            raise DataError(f"{str(path)!r} has several {what} of one name: {listing(map(repr, twice))}")
    sizes = {
        names[one.get("id", int, str)]: (one.get("height", int), one.get("width", int))
        for one in images
        if "height" in one.fields and "width" in one.fields
    }
    number = {key: i for i, key in enumerate(classes)}
    rows: dict[str, list[list[float]]] = {name: [] for name in names.values()}
    for one in annotations:
        image, kind, crowd = one.get("image_id", int, str), one.get("category_id", int), one.fields.get("iscrowd", 0)
        if image not in names:
            raise one.refused("image_id", "an id of images")
        if kind not in number:
            raise one.refused("category_id", "an id of categories")
        if crowd not in (0, 1) or isinstance(crowd, float):
            raise one.refused("iscrowd", "0, 1, true or false")
        box = one.get("bbox", list)
        try:
            sides = _sides(box)
        except (OverflowError, TypeError, ValueError) as error:
            raise one.refused("bbox", "finite left, top, width and height, none of negative size") from error
        rows[names[image]].append([*sides, number[kind], float(crowd)])
    return CocoBoxes({name: _stacked(one) for name, one in rows.items()}, sizes, tuple(classes.values()))


@dataclass(frozen=True)
class _Entry:
    """An entry of a list in a file of COCO's form.

    Attributes:
        fields: the entry.
        where: what it is called in messages: its list, its position from 0, and the file.

    Raises:
        DataError: it is no mapping.
    """

    fields: dict[str, Any]
    where: str

    def __post_init__(self) -> None:
        if not isinstance(self.fields, dict):
            raise DataError(f"{self.where} is {repr_of(self.fields)}; expected a mapping")

    def get(self, name: str, *kinds: type) -> Any:
        """A field of one of the types; true and false are no numbers.

        Raises:
            DataError: it is missing, or of another type.
        """
        if name not in self.fields:
            raise DataError(f"{self.where} has no {name!r}; it has {listing(self.fields)}")
        value = self.fields[name]
        if isinstance(value, float) and value.is_integer() and int in kinds:  # as other programs write whole numbers
            return int(value)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise self.refused(name, " or ".join(TYPES[kind] for kind in kinds))
        return value

    def refused(self, name: str, expected: str) -> DataError:
        """The error for a field with a wrong value."""
        return DataError(f"{self.where} has {name!r}: {repr_of(self.fields[name])}; expected {expected}")


def _by_id(entries: Sequence[_Entry], name: str, only: tuple[type, ...] = (int, str)) -> dict[Any, str]:
    """A text of each entry by the entry's id.

    Raises:
        DataError: two have one id.
    """
    found: dict[Any, str] = {}
    for one in entries:
        key = one.get("id", *only)
        if key in found:
            raise DataError(
                f"{one.where} has the id {repr_of(key)}, as {found[key]!r} has: ids must differ; number them anew "
                "where files were merged"
            )
        found[key] = one.get(name, str)
    return found


def are_boxes(cells: Sequence[Any]) -> bool:
    """Whether the cells of a column are boxes: mappings, or lists of mappings, with a box.

    >>> are_boxes([None, {"bbox": [[0, 0, 2, 2]], "category": [1]}]), are_boxes([0, 1])
    (True, False)
    """
    cell = next((cell for cell in cells if cell), None)
    one = cell[0] if isinstance(cell, (list, tuple)) else cell
    return isinstance(one, Mapping) and any(key in one for key in BOX_KEYS)


def boxes_of_cells(cells: Sequence[Any], where: str) -> tuple[Tensor, tuple[str, ...]]:
    """Labels ``[N, M, 6]`` of a column of boxes, and the names of their classes where these are names.

    A cell is a mapping with ``bbox``, boxes as left, top, width and height, and ``category``, of each its class; or a
    list of mappings with one of each. A picture without a box has an empty one. Names are numbered in alphabetical
    order.

    Args:
        cells: the column.
        where: what it is called in messages.

    Raises:
        ValueError: a cell has no such boxes.
    """
    given: list[list[tuple[list[float], Any]]] = []
    try:
        for cell in cells:
            whole = [cell] if isinstance(cell, Mapping) else list(cell or ())
            several = isinstance(cell, Mapping)
            pairs = []
            for one in whole:
                boxes, classes = (_entry(one, keys) for keys in (BOX_KEYS, CLASS_KEYS))
                pairs += list(zip(boxes, classes, strict=True)) if several else [(boxes, classes)]
            given.append([(_sides(box), kind) for box, kind in pairs])
        kinds = {kind for one in given for _, kind in one}
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} has a cell without boxes ({error}): expected 'bbox', of each box left, top, width and height, "
            "and 'category', of each its class"
        ) from error
    names = tuple(sorted(kinds)) if kinds and all(isinstance(kind, str) for kind in kinds) else ()
    if not names and not all(isinstance(kind, int) and abs(kind) < MOST_CLASS for kind in kinds):
        raise ValueError(
            f"{where} has classes that are neither whole numbers nor names: {listing(map(repr_of, kinds))}"
        )
    number = {name: i for i, name in enumerate(names)}
    rows = [_stacked([[*box, number.get(kind, kind), 0.0] for box, kind in one]) for one in given]
    return padded(rows), names


def class_feature(feature: Any) -> Any:
    """The type of the classes in a column of boxes, as `datasets` has it; None where it cannot be told."""
    feature = getattr(feature, "feature", feature)
    feature = feature[0] if isinstance(feature, (list, tuple)) and feature else feature
    if not isinstance(feature, Mapping):
        return None
    found = next((feature[key] for key in CLASS_KEYS if key in feature), None)
    return getattr(found, "feature", found)


def moved(boxes: Tensor, preprocess: Any, size: tuple[int, int], changed: tuple[int, int]) -> Tensor:
    """Boxes ``[M, 6]`` of a picture, brought to where its preprocessing brings them.

    Args:
        boxes: their sides are in pixels of the picture.
        preprocess: the preprocessing. Where it changes sizes it says by ``preprocess.boxes(boxes, size)`` how sides
            ``[M, 4]`` change, as `stochbn.sources.Preprocessing` does.
        size: height and width of the picture.
        changed: height and width of what it becomes.

    Raises:
        ValueError: the sizes differ, and the preprocessing does not say how boxes change.
    """
    change = getattr(preprocess, "boxes", None)
    if change is None and size != changed:
        raise ValueError(
            f"its picture has {size[0]}x{size[1]} pixels, the preprocessing makes {changed[0]}x{changed[1]} of them, "
            "and nothing says where it moves boxes: take --size, or give the function an attribute boxes, a function "
            "of boxes [M, 4] (left, top, right, bottom) and of (height, width)"
        )
    return boxes if change is None else torch.cat([change(boxes[:, :4], size), boxes[:, 4:]], 1)


def _sides(box: Any) -> list[float]:
    """Left, top, right and bottom of left, top, width and height.

    Raises:
        OverflowError, TypeError, ValueError: they are none.
    """
    if isinstance(box, str):
        raise TypeError(f"box {repr_of(box)} is a text")
    left, top, width, height = map(float, box)
    if not (width >= 0 and height >= 0):
        raise ValueError(f"box {list(box)} has a negative width or height: expected left, top, width and height")
    sides = [left, top, left + width, top + height]
    if not all(map(math.isfinite, sides)):
        raise ValueError(f"box {list(box)} is not finite")
    return sides


def _stacked(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).view(-1, 6)


def _entry(cell: Mapping[str, Any], keys: Sequence[str]) -> Any:
    name = next((key for key in keys if key in cell), None)
    if name is None:
        raise KeyError(f"no {keys[0]}, but {', '.join(map(str, cell))}")
    return cell[name]
