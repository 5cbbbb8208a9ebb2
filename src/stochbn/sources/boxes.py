"""True boxes of pictures as people store them: COCO's files, and columns of boxes as data sets of the Hub have them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
        DataError: it is no such file, or names a picture or category that it does not have.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    parts = ("images", "annotations", "categories")
    if not isinstance(found, dict) or not all(isinstance(found.get(part), list) for part in parts):
        raise DataError(f"{str(path)!r} is no file of COCO's form: it must have the lists {', '.join(parts)}")
    try:
        kinds = sorted(found["categories"], key=lambda kind: int(kind["id"]))
        number = {int(kind["id"]): i for i, kind in enumerate(kinds)}
        names = {image["id"]: str(image["file_name"]).replace("\\", "/") for image in found["images"]}
        sizes = {
            names[image["id"]]: (int(image["height"]), int(image["width"]))
            for image in found["images"]
            if "height" in image and "width" in image
        }
        rows: dict[str, list[list[float]]] = {name: [] for name in names.values()}
        for one in found["annotations"]:
            box = _sides(one["bbox"])
            rows[names[one["image_id"]]].append(
                [*box, number[int(one["category_id"])], float(bool(one.get("iscrowd")))]
            )
        classes = tuple(str(kind["name"]) for kind in kinds)
    except (KeyError, TypeError, ValueError) as error:
        told = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{str(path)!r} is no file of COCO's form: an entry {told}") from error
    if len(set(names.values())) < len(names) or len(set(classes)) < len(classes):
        raise DataError(f"{str(path)!r} has two pictures, or two categories, of one name")
    return CocoBoxes({name: _stacked(one) for name, one in rows.items()}, sizes, classes)


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
                boxes, kinds = (_entry(one, keys) for keys in (BOX_KEYS, CLASS_KEYS))
                pairs += list(zip(boxes, kinds, strict=True)) if several else [(boxes, kinds)]
            given.append([(_sides(box), kind) for box, kind in pairs])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} has a cell without boxes ({error}): expected 'bbox', of each box left, top, width and height, "
            "and 'category', of each its class"
        ) from error
    kinds = {kind for one in given for _, kind in one}
    names = tuple(sorted(kinds)) if kinds and all(isinstance(kind, str) for kind in kinds) else ()
    if not names and not all(isinstance(kind, int) for kind in kinds):
        raise ValueError(f"{where} has classes that are neither whole numbers nor names: {listing(map(repr, kinds))}")
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
        ValueError: they are none.
    """
    left, top, width, height = map(float, box)
    if not (width >= 0 and height >= 0):
        raise ValueError(f"box {list(box)} has a negative width or height: expected left, top, width and height")
    return [left, top, left + width, top + height]


def _stacked(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).view(-1, 6)


def _entry(cell: Mapping[str, Any], keys: Sequence[str]) -> Any:
    name = next((key for key in keys if key in cell), None)
    if name is None:
        raise KeyError(f"no {keys[0]}, but {', '.join(map(str, cell))}")
    return cell[name]
