"""True boxes of pictures, as labels for detection, and where pictures lie in the input of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["LABELS", "Placement", "boxes_of_targets", "checked_boxes", "padded"]

LABELS = (
    "[N, M, 5] or [N, M, 6]: left, top, right, bottom, class and, if there are six, 1 for a crowd; rows of NaN where a "
    "picture has fewer than M boxes"
)
"""What labels of a batch are."""


@dataclass(frozen=True)
class Placement:
    """Where a picture lies in the network's input, after it was resized, and padded or cropped.

    Attributes:
        scale: pixels of the input for each pixel of the picture, along its width and along its height.
        shift: left and top of the picture, in pixels of the input; negative where it is cropped.

    >>> placement = Placement((2.0, 2.0), (0.0, 10.0))
    >>> placement.inward(torch.tensor([[1.0, 1.0, 3.0, 4.0]]))
    tensor([[ 2., 12.,  6., 18.]])
    >>> placement.outward(torch.tensor([[2.0, 12.0, 6.0, 18.0]]))
    tensor([[1., 1., 3., 4.]])
    """

    scale: tuple[float, float]
    shift: tuple[float, float]

    def inward(self, boxes: Tensor) -> Tensor:
        """Boxes ``[M, 4]`` (left, top, right, bottom) of the picture, in pixels of the input."""
        return boxes * boxes.new_tensor(self.scale * 2) + boxes.new_tensor(self.shift * 2)

    def outward(self, boxes: Tensor) -> Tensor:
        """Boxes ``[M, 4]`` of the input, in pixels of the picture."""
        return (boxes - boxes.new_tensor(self.shift * 2)) / boxes.new_tensor(self.scale * 2)

    def outward_std(self, std: Tensor) -> Tensor:
        """Standard deviations ``[M, 4]`` of the sides of boxes of the input, in pixels of the picture."""
        return std / std.new_tensor(self.scale * 2)


def padded(boxes: Sequence[Tensor]) -> Tensor:
    """The boxes of several pictures, ``[m, 6]`` each, as labels ``[N, M, 6]``.

    >>> padded([torch.zeros(1, 6), torch.zeros(0, 6)]).shape
    torch.Size([2, 1, 6])
    """
    most = max(map(len, boxes), default=0)
    found = torch.full((len(boxes), most, 6), torch.nan, dtype=torch.float64)
    for row, one in zip(found, boxes, strict=True):
        row[: len(one)] = one
    return found


def boxes_of_targets(targets: Sequence[Mapping[str, Any]]) -> Tensor:
    """Labels ``[N, M, 6]`` of one mapping for each picture, as torchvision's detectors are trained with.

    Args:
        targets: with ``boxes`` ``[m, 4]`` (left, top, right, bottom), ``labels`` ``[m]`` and, if there are crowds,
            ``iscrowd`` ``[m]``.

    Raises:
        TypeError: a mapping has no such tensors.
        ValueError: they are of different lengths.
    """
    found = []
    for one in targets:
        boxes, labels = one.get("boxes"), one.get("labels")
        if not isinstance(boxes, Tensor) or not isinstance(labels, Tensor):
            raise TypeError(f"expected mappings with tensors 'boxes' [m, 4] and 'labels' [m], got {sorted(one)}")
        crowd = one.get("iscrowd")
        crowd = torch.zeros(len(labels)) if crowd is None else crowd
        if boxes.numel() != 4 * len(labels) or labels.ndim != 1 or crowd.shape != labels.shape:
            raise ValueError(
                f"expected boxes [m, 4] and labels [m] of the same m, got {list(boxes.shape)} and {list(labels.shape)}"
            )
        parts = [boxes.view(-1, 4), labels[:, None], crowd[:, None]]
        found.append(torch.cat([part.detach().cpu().double() for part in parts], 1))
    return padded(found)


def checked_boxes(labels: Tensor, classes: int) -> list[Tensor]:
    """The true boxes of each picture, ``[m, 6]``, float64, of labels ``[N, M, 5]`` or ``[N, M, 6]``.

    Args:
        labels: see `LABELS`.
        classes: K, of the network.

    Raises:
        ValueError: they are no boxes, or of classes that the network does not have.
    """
    if labels.ndim != 3 or labels.shape[2] not in (5, 6):
        raise ValueError(
            f"expected labels {LABELS}; got {list(labels.shape)}. At the command line name a file of COCO's form, "
            "--label instances.json, or a column of boxes"
        )
    labels = labels.detach().cpu().double()
    if labels.shape[2] == 5:
        labels = torch.cat(
            [labels, labels.new_zeros(*labels.shape[:2], 1).where(~labels[:, :, :1].isnan(), torch.nan)], 2
        )
    missing = labels.isnan()
    if (missing.any(2) != missing.all(2)).any() or labels.isinf().any():
        raise ValueError("a box of the labels has a side or a class that is no number")
    there = labels[~missing.all(2)]
    if (there[:, 2:4] < there[:, :2]).any():
        raise ValueError(
            "a box of the labels ends before it begins: boxes are left, top, right and bottom, and not left, top, "
            "width and height as COCO's files have them"
        )
    kinds = there[:, 4]
    if (kinds != kinds.round()).any() or (kinds < 0).any() or (kinds >= classes).any():
        wrong = next(k for k in kinds.tolist() if k != round(k) or not 0 <= k < classes)
        raise ValueError(
            f"a box is of class {wrong:g}, and the network has the classes 0 to {classes - 1}: where classes of the "
            "data have names, name the network's classes in its module, with classes = [...]"
        )
    return [one[~none.all(1)] for one, none in zip(labels, missing, strict=True)]
