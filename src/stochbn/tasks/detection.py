"""Detection: boxes and class scores of dense heads, averaged over draws anchor by anchor, then suppressed once."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from stochbn.caller import warn
from stochbn.metrics.entropies import entropy
from stochbn.network.calling import read_output
from stochbn.tasks.answers import Answer
from stochbn.tasks.base import Join, Panel, Predictions, Scores, Task, floating
from stochbn.tasks.binary import logit
from stochbn.tasks.boxes import LABELS, Placement, boxes_of_targets, checked_boxes
from stochbn.tasks.objects import Objects

__all__ = ["Detection", "DetectionPrediction", "suppressed"]

CANDIDATES = 1000
"""Anchors of an image, those with the highest scores, that suppression looks at."""
SELECTED = "enc_topk_logits"
"""What the output of Transformers' detectors has whose queries are selected by their scores."""

ORDERS = (
    "Anchors come last: transpose [N, A, 4 + K]. If these are detections, or queries, that the network has selected by "
    "their scores (300 of them, say), then others are selected in every draw, and they cannot be averaged: give the "
    "head's output from before the selection (of Ultralytics' networks with two heads, model.model[-1].end2end = False)"
)
"""What to do where the axes cannot be those of a dense head."""


@dataclass(frozen=True, eq=False, repr=False)
class DetectionPrediction(Answer):
    """What a predictive says of the objects in N images; `objects` has those of each image.

    Attributes:
        anchors: ``[N, 4 + K, A]``: the box and the class probabilities of each anchor, the mean over draws.
        variance: ``[N, 4 + K, A]``: their variance over draws.
        expected_entropy: ``[N, A]``, nats: the mean over draws of the entropy of the class.
        task: says how objects are chosen among anchors.
        draws: ``[S, N, 4 + K, A]``: every draw, if ``keep_draws=True`` asked for them.
        note: why nothing is due to draws, where one pass without draws was made.
    """

    anchors: Tensor
    variance: Tensor
    expected_entropy: Tensor
    task: Detection
    draws: Tensor | None = None
    note: str = ""

    @functools.cached_property
    def objects(self) -> list[Objects]:
        """The objects in each image: anchors that are likely to show one, without those that overlap a likelier one."""
        return [self._objects(*one) for one in zip(self.anchors, self.variance, self.expected_entropy, strict=True)]

    def _objects(self, anchors: Tensor, variance: Tensor, expected: Tensor) -> Objects:
        boxes, probs = anchors[:4].T, anchors[4:].T
        shown = probs if self.task.background is None else probs.index_fill(1, self.task.background_index(probs), -1.0)
        scores, labels = shown.max(1)
        chosen = suppressed(boxes, scores, labels, self.task)
        total = self.task.entropies(probs[chosen], 1)
        return Objects(
            boxes[chosen],
            scores[chosen],
            labels[chosen],
            probs[chosen],
            variance[:4].T[chosen].sqrt(),
            total,
            (total - expected[chosen]).clamp(min=0),
            chosen,
        )

    @property
    def entropy(self) -> Tensor:
        """``[N, A]``, nats: the entropy of the class of each anchor."""
        return self.task.entropies(self.anchors[:, 4:], 1)

    @property
    def mutual_information(self) -> Tensor:
        """``[N, A]``, nats: the part of the entropy that is due to the draws."""
        return (self.entropy - self.expected_entropy).clamp(min=0)

    @property
    def std(self) -> Tensor:
        """``[N, 4 + K, A]``: the standard deviation over draws of boxes and probabilities."""
        return self.variance.sqrt()

    @property
    def measures(self) -> dict[str, Tensor]:
        """How many objects an image has."""
        return {"objects": torch.tensor([float(len(one)) for one in self.objects])}

    def columns(self, classes: Sequence[str] = (), top: int = 1) -> dict[str, list[Any]]:
        """The prediction as columns of a table, a row for each image; boxes are in pixels of the network's input.

        Args:
            classes: the names of the classes; none are their numbers.
            top: has no effect.

        Returns:
            ``objects``: how many there are; ``detections``: these as JSON, with ``class``, ``score``, ``box``,
            ``box_std``, ``entropy`` and ``mutual_information`` of each; ``mutual_information``: the largest of them.

        Raises:
            ValueError: there are other numbers of names.
        """
        return self.picture_columns([None] * len(self.anchors), classes, top)

    def picture_columns(
        self, placements: Sequence[Placement | None], classes: Sequence[str] = (), top: int = 1
    ) -> dict[str, list[Any]]:
        """`columns`, with boxes and their standard deviations in pixels of the pictures whose placement is known."""
        count = self.anchors.shape[1] - 4
        if classes and len(classes) != count:
            raise ValueError(f"there are {len(classes)} names of classes, and the network has {count} classes")
        names = list(classes) or list(map(str, range(count)))
        found = [
            one if placement is None else one.in_picture(placement)
            for one, placement in zip(self.objects, placements, strict=True)
        ]
        texts = [json.dumps(one.described(names)) for one in found]
        largest = [max(one.mutual_information.tolist(), default=0.0) for one in found]
        return {"objects": [len(one) for one in found], "detections": texts, "mutual_information": largest}

    @property
    def averages(self) -> tuple[Tensor, ...]:
        """The tensors that are averages over draws."""
        return self.anchors, self.variance, self.expected_entropy

    @property
    def draws_kept(self) -> Tensor | None:
        """Boxes and probabilities of every draw."""
        return self.draws

    def of(self, averages: Sequence[Tensor], kept: Tensor | None) -> DetectionPrediction:
        """A prediction like this one, of other averages and draws."""
        anchors, variance, expected = averages
        return replace(self, anchors=anchors, variance=variance, expected_entropy=expected, draws=kept)

    def mixed(self, other: DetectionPrediction, share: float) -> DetectionPrediction:
        """The mixture of this prediction and another one; what they differ by is variance over draws too."""
        found = super().mixed(other, share)
        between = share * (1 - share) * (other.anchors.to(self.anchors) - self.anchors).square()
        return replace(found, variance=found.variance + between)


@dataclass(frozen=True)
class Detection(Task):
    """Boxes and class scores of A anchors (or queries), as dense heads give them before non-maximum suppression.

    The network gives either one tensor ``[N, 4 + K, A]``, of boxes (centre, width and height) and class probabilities
    as the YOLO family does in evaluation mode; or boxes ``[N, A, 4]`` (left, top, right and bottom) and class logits
    ``[N, A, K]``, as a pair or at two `place`s. Boxes and probabilities are averaged over draws anchor by anchor, and
    suppressed once. So an anchor must be the same in every pass: a head that selects its anchors or queries by their
    scores, such as RT-DETR's, has to give the scores from before the selection. `stochbn.tasks.heads` reads the
    detectors of torchvision.

    Every example gets all draws. Labels are true boxes: `stochbn.tasks.boxes.LABELS`, or one mapping for each image
    with ``boxes`` and ``labels``. `calibrate` does not take them.

    Attributes:
        box_format: ``"xyxy"`` (left, top, right, bottom) or ``"cxcywh"`` (centre, width, height); None is the second
            for one tensor, and the first for a pair.
        background: the class that is no object, -1 for the last; its scores then go through a softmax with the others.
            None is none: each class has a probability of its own.
        threshold: the probability that an object has at least.
        overlap: intersection over union with a likelier object of its class above which an anchor is suppressed.
        most: objects in an image, at most.
    """

    name: ClassVar[str] = "detection"
    outputs: ClassVar[tuple[str, ...]] = ("anchors", "std", "entropy", "mutual_information")
    takes_pair: ClassVar[bool] = True
    early: ClassVar[bool] = False
    spread: ClassVar[bool] = True
    uncertainty: ClassVar[tuple[str, ...]] = ("mutual_information",)
    labels_expected: ClassVar[str] = LABELS
    score_columns: ClassVar[Mapping[str, tuple[str, int, float]]] = {
        "AP %": ("ap", 2, 100),
        "AP50 %": ("ap50", 2, 100),
        "ECE %": ("ece", 2, 100),
        "NLL": ("nll", 4, 1),
        "calibrated NLL": ("calibrated_nll", 4, 1),
        "box correlation": ("box_correlation", 3, 1),
    }

    box_format: str | None = None
    background: int | None = None
    threshold: float = 0.05
    overlap: float = 0.5
    most: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_axis is not None:
            raise ValueError(
                "class_axis does not apply to detections: pass [N, 4 + K, A], or boxes and scores [N, A, K]"
            )
        if self.box_format not in (None, "xyxy", "cxcywh"):
            raise ValueError(f'box_format must be "xyxy", "cxcywh" or None, got {self.box_format!r}')
        for name in ("threshold", "overlap"):
            if not isinstance(getattr(self, name), (int, float)) or not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)!r}")
        if not isinstance(self.most, int) or self.most < 1:
            raise ValueError(f"most must be a whole number of at least 1, got {self.most!r}")

    def raw(self, output: Any) -> Tensor:
        """``[N, 4 + K, A]``: boxes (left, top, right, bottom), and logits of classes."""
        pair = self._pair(output)
        if pair is None:
            found = floating(read_output(output, self.place), "boxes and class scores")
            if found.ndim != 3 or found.shape[1] < 5:
                raise ValueError(
                    f"expected boxes and class scores [N, 4 + K, A] before non-maximum suppression, found "
                    f"{list(found.shape)}; name boxes [N, A, 4] and scores [N, A, K] with logits=(BOXES, SCORES), or "
                    "wrap a detector of torchvision with stochbn.tasks.heads.DenseHead"
                )
            if found.shape[2] < found.shape[1]:
                raise ValueError(
                    f"found {list(found.shape)}, which as [N, 4 + K, A] would be {found.shape[2]} anchors of "
                    f"{found.shape[1] - 4} classes. {ORDERS}"
                )
            boxes, scores = found[:, :4], found[:, 4:]
        else:
            boxes, scores = (floating(values, "boxes and class scores") for values in pair)
            if boxes.ndim != 3 or scores.ndim != 3 or boxes.shape[2] != 4 or boxes.shape[:2] != scores.shape[:2]:
                raise ValueError(
                    f"expected boxes [N, A, 4] and class scores [N, A, K], found {list(boxes.shape)} and "
                    f"{list(scores.shape)}"
                )
            boxes, scores = boxes.mT, scores.mT
        boxes_are = self.box_format or ("cxcywh" if pair is None else "xyxy")
        if boxes_are == "cxcywh":
            centre, half = boxes[:, :2], boxes[:, 2:] / 2
            boxes = torch.cat([centre - half, centre + half], 1)
        if self._is("probs", single=pair is None):
            scores = scores.log() if self.background is not None else logit(scores)
        return torch.cat([boxes, scores], 1)

    def _pair(self, output: Any) -> Sequence[Any] | None:
        """Boxes and scores, where they are two tensors.

        Raises:
            ValueError: they are of queries that others may take the place of in the next draw.
        """
        selects = output.get(SELECTED) if isinstance(output, Mapping) else getattr(output, SELECTED, None)
        if selects is not None:
            raise ValueError(
                "this detector selects the queries of its decoder by their scores, as RT-DETR does: query 5 of one "
                "draw is another object than query 5 of the next, so their average would mean nothing. What can be "
                "averaged is the encoder's own detection, of every place of its feature maps: take "
                "stochbn.tasks.heads.EncoderHead(model)"
            )
        if isinstance(self.place, tuple):
            return [read_output(output, place) for place in self.place]
        pair = self.place is None and isinstance(output, (tuple, list)) and len(output) == 2
        shapes = [value.shape for value in output if isinstance(value, Tensor) and value.ndim == 3] if pair else []
        return list(output) if len(shapes) == 2 and shapes[0][2] == 4 and shapes[0][:2] == shapes[1][:2] else None

    def description(self) -> dict[str, Any]:
        """What a file keeps of the task, with what the probabilities depend on."""
        return {**super().description(), "box_format": self.box_format, "background": self.background}

    def _is(self, kind: str, *, single: bool) -> bool:
        return (self.output or ("probs" if single else "logits")) == kind

    def check(self, raw: Tensor) -> None:
        """Refuse logits that are taken for probabilities; warn of probabilities that may be taken for logits."""
        scores = raw[:, 4:]
        if scores.isnan().any():
            raise ValueError(
                "expected class probabilities from 0 to 1 after the boxes, found others: pass output='logits' if they "
                "are logits, and boxes and scores [N, 4 + K, A] with the anchors last; scores of an object and of its "
                "class (YOLO before version 8) are to be multiplied first"
            )
        if self.output is None and scores.numel() >= 16 and scores.amin() >= 0 and scores.amax() <= 1:
            warn(
                'the class scores all lie between 0 and 1 and are taken for logits: pass output="probs" if they are '
                'probabilities, or output="logits" if they are logits all the same',
            )

    def probabilities(self, raw: Tensor, axis: int, temperature: float = 1.0) -> Tensor:
        """The probabilities of logits whose classes are on an axis."""
        scores = raw / temperature
        return scores.sigmoid() if self.background is None else scores.softmax(axis)

    def entropies(self, probs: Tensor, axis: int) -> Tensor:
        """The entropy of probabilities whose classes are on an axis; of classes of their own, the sum."""
        found = entropy(probs, axis)
        return found if self.background is not None else found + entropy(1 - probs, axis)

    def background_index(self, probs: Tensor) -> Tensor:
        """``[1]``: the class that is no object, of probabilities ``[A, K]``."""
        assert self.background is not None
        return torch.tensor([self.background % probs.shape[1]], device=probs.device)

    def values(self, raw: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Boxes and probabilities ``[S, N, 4 + K, A]``, and entropies ``[S, N, A]``."""
        probs = self.probabilities(raw[:, :, 4:], 2, temperature)
        return torch.cat([raw[:, :, :4], probs], 2), self.entropies(probs, 2)

    def mix(self, raw: Tensor) -> Tensor:
        """The probabilities of each anchor, ``[N, K, A]``."""
        return self.probabilities(raw[:, 4:], 1)

    def prediction(
        self, mean: Tensor, second: Tensor, variance: Tensor | None, kept: Tensor | None
    ) -> DetectionPrediction:
        """Boxes and probabilities of each anchor, of which objects are chosen where they are asked for."""
        return DetectionPrediction(mean, torch.zeros_like(mean) if variance is None else variance, second, self, kept)

    def scores(self, predictions: Predictions, join: Join = dict, ignore: int | None = None) -> Scores:
        """Average precision, and whether scores and box deviations tell the truth: `detection_scores.score`.

        The detections of an image are its `objects`, so average precision is that of scores from `threshold` on.
        """
        from stochbn.tasks.detection_scores import evidence_of, score

        if ignore is not None:
            raise ValueError("detections have no label that could be ignored: mark true boxes as crowds instead")
        batches = []
        for prediction, given in predictions:
            classes = prediction.anchors.shape[1] - 4
            truths = checked_boxes(given if isinstance(given, Tensor) else boxes_of_targets(given), classes)
            batches.append(evidence_of(prediction.objects, truths, classes, self.most))
        return score(batches, join)

    def panels(self, scores: Mapping[str, Scores]) -> Sequence[Panel]:
        """Precision by recall, and the errors of boxes by their standard deviation."""
        from stochbn.tasks.detection_scores import panels

        return panels({name: one.evidence for name, one in scores.items()})


def suppressed(boxes: Tensor, scores: Tensor, labels: Tensor, task: Detection) -> Tensor:
    """``[D]``: the anchors that are left by non-maximum suppression within each class, from the likeliest on.

    Args:
        boxes: ``[A, 4]``: left, top, right and bottom.
        scores: ``[A]``.
        labels: ``[A]``.
        task: has the threshold, the overlap and the number of objects.

    >>> boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.9], [5, 5, 6, 6], [0, 0, 2, 2]])
    >>> suppressed(boxes, torch.tensor([0.6, 0.9, 0.3, 0.5]), torch.tensor([0, 0, 0, 1]), Detection())
    tensor([1, 3, 2])
    """
    likely = (scores >= task.threshold).nonzero()[:, 0]
    order = likely[scores[likely].argsort(descending=True, stable=True)][:CANDIDATES]
    some, classes = boxes[order].double(), labels[order]
    area = (some[:, 2:] - some[:, :2]).clamp(min=0).prod(1)
    low, high = torch.maximum(some[:, None, :2], some[None, :, :2]), torch.minimum(some[:, None, 2:], some[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    union = area[:, None] + area - shared
    above = (shared > task.overlap * union) & (classes[:, None] == classes)
    rows, kept = above.cpu(), list[int]()
    gone = torch.zeros(len(order), dtype=torch.bool)
    for i in range(len(order)):
        if not gone[i]:
            kept.append(i)
            gone |= rows[i]
    return order[torch.tensor(kept[: task.most], dtype=torch.long, device=order.device)]
