"""The objects that a detector finds in an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from stochbn.tasks.boxes import Placement

__all__ = ["Objects"]


@dataclass(frozen=True, eq=False)
class Objects:
    """The D objects that are detected in one image, from the most to the least probable.

    Attributes:
        boxes: ``[D, 4]``, the mean over draws: left, top, right and bottom, in pixels of the network's input.
        scores: ``[D]``: the probability of the most probable class.
        labels: ``[D]``: that class.
        probs: ``[D, K]``: the probabilities of all classes, the mean over draws.
        box_std: ``[D, 4]``: the standard deviation over draws of each side of the box.
        entropy: ``[D]``, nats: of `probs`; the sum over classes where each class has a probability of its own.
        mutual_information: ``[D]``, nats: the part of it that is due to the draws.
        anchors: ``[D]``: which of the head's anchors, or queries, each is.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    probs: Tensor
    box_std: Tensor
    entropy: Tensor
    mutual_information: Tensor
    anchors: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def in_picture(self, placement: Placement) -> Objects:
        """The same objects, with `boxes` and `box_std` in pixels of the picture.

        Args:
            placement: where the picture lies in the network's input: `stochbn.sources.Preprocessing.placement`.
        """
        return replace(self, boxes=placement.outward(self.boxes), box_std=placement.outward_std(self.box_std))

    def described(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Each object, for JSON.

        Args:
            names: of the K classes.
        """
        return [
            {
                "class": names[int(self.labels[i])],
                "score": round(float(self.scores[i]), 6),
                "box": [round(side, 3) for side in self.boxes[i].tolist()],
                "box_std": [round(side, 4) for side in self.box_std[i].tolist()],
                "entropy": round(float(self.entropy[i]), 6),
                "mutual_information": round(float(self.mutual_information[i]), 6),
            }
            for i in range(len(self))
        ]
