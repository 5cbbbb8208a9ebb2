"""The part of a page about detections: from which score on to take them, classes, and pictures with their boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stochbn.metrics.detection import OVERLAPS, average_precision, matched
from stochbn.report import curves
from stochbn.report.objects import Source, address
from stochbn.report.page import Boxed, Curve, Rectangle, Section
from stochbn.report.style import inline, line_of
from stochbn.report.tables import Table
from stochbn.tasks.base import Scores
from stochbn.tasks.boxes import checked_boxes

__all__ = ["SeenPictures", "detection_parts"]

SCORES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""From which on detections are taken, in the table of these."""
COUNT = 12
"""Pictures that are shown of each kind."""
SIDE = 360
"""Pixels of the longer side of a picture."""
NAMED = 4
"""Detections of a picture that are named below it."""


@dataclass
class SeenPictures:
    """The pictures that a method is least and most certain of, as they come; no others are kept.

    A picture is as uncertain as its most uncertain detection: by mutual information, or by entropy where no draws
    differ.

    Attributes:
        source: how pictures are called.
        names: of the classes; none are numbers.
    """

    source: Source
    names: Sequence[str] = ()
    method: str = ""
    _seen: int = 0
    _least: list[tuple[tuple[float, float], Boxed]] = field(default_factory=list)
    _most: list[tuple[tuple[float, float], Boxed]] = field(default_factory=list)

    def add(self, method: str, inputs: Any, prediction: Any, labels: Any) -> None:
        """Look at some pictures ``[n, C, H, W]``; those of another method than before take the place of all before."""
        if method != self.method:
            self.method, self._seen, self._least, self._most = method, 0, [], []
        truths = checked_boxes(labels, prediction.anchors.shape[1] - 4)
        for row, (one, truth) in enumerate(zip(prediction.objects, truths, strict=True)):
            self._seen += 1
            unsure = tuple(max(values.tolist(), default=0.0) for values in (one.mutual_information, one.entropy))
            key = unsure[0], unsure[1]
            least = len(self._least) < COUNT or key > self._least[-1][0]
            most = len(one) > 0 and (len(self._most) < COUNT or key < self._most[-1][0])
            if not (least or most) or not isinstance(inputs, Tensor):
                continue
            shown = self._boxed(self._seen - 1, inputs[row], one, truth)
            if shown is not None and least:
                self._least = sorted([*self._least, (key, shown)], key=_unsure)[::-1][:COUNT]
            if shown is not None and most:
                self._most = sorted([*self._most, (key, shown)], key=_unsure)[:COUNT]

    def _boxed(self, number: int, picture: Tensor, found: Any, truth: Tensor) -> Boxed | None:
        """A picture with its boxes; None where the input is no picture."""
        image = address(picture.cpu(), SIDE)
        if image is None:
            return None
        places, crowd = matched(found.boxes.cpu(), found.labels.cpu(), truth)
        rectangles = []
        for i, box in enumerate(found.boxes.tolist()):
            kind = "right" if places[0, i] >= 0 else "wrong"
            rectangles.append(Rectangle(box, kind, float(found.scores[i])))
        own = set(places[0][~crowd[0]].tolist())
        missed = [i for i in range(len(truth)) if i not in own and not truth[i, 5]]
        rectangles += [Rectangle(truth[i, :4].tolist(), "missed", 1.0) for i in missed]
        lines = []
        for i in range(min(NAMED, len(found))):
            spread = float(found.box_std[i].square().mean().sqrt())
            lines.append(
                f"{self._name(int(found.labels[i]))} {100 * float(found.scores[i]):.0f} %"
                + (f", box ± {spread:.2g} pixels" if spread else "")
            )
        if len(found) > NAMED:
            lines.append(f"and {len(found) - NAMED} more")
        if missed:
            lines.append(f"missed: {', '.join(sorted({self._name(int(truth[i, 4])) for i in missed}))}")
        return Boxed(self.source.name(number), image, picture.shape[-1], picture.shape[-2], rectangles, lines)

    def _name(self, kind: int) -> str:
        return self.names[kind] if kind < len(self.names) else f"class {kind}"

    def sections(self) -> list[Section]:
        """What was kept."""
        label = line_of("plain", self.method == "SBN").label
        note = (
            f"The pictures that {label} is {{}} certain of: those whose most uncertain detection has the {{}} mutual "
            "information, or entropy where draws do not differ. The opacity of a box is its score. Blue boxes are "
            f"right, with an overlap of {OVERLAPS[0]:g} or more with a true box of their class; orange ones are not; "
            "dashed yellow ones are true boxes that were missed."
        )
        parts = (("least", "Least certain", "highest", self._least), ("most", "Most certain", "lowest", self._most))
        return [
            Section(key, title, note.format(key, extreme), [], pictures=[shown for _, shown in kept])
            for key, title, extreme, kept in parts
            if kept
        ]


def _unsure(kept: tuple[tuple[float, float], Boxed]) -> tuple[float, float]:
    return kept[0]


def detection_parts(
    scores: Mapping[str, Scores], names: Sequence[str], seen: SeenPictures
) -> tuple[list[Section], list[Curve], list[str]]:
    """Sections, figures and sentences about detections.

    Args:
        scores: of ``plain`` and, where there is a posterior, ``SBN``.
        names: of the classes; none are numbers.
        seen: pictures to show.
    """
    last = list(scores)[-1]
    evidence, label = scores[last].evidence, line_of("plain", last == "SBN").label
    answering = Section(
        "answering",
        "Which detections to take",
        "Choose the share of wrong detections that you can live with, and take those whose score, in the column "
        "'detections' of 'stochbn predict', is at least that of the row. Precision is the share of these that are "
        f"right, with an overlap of {OVERLAPS[0]:g} or more with a true box of their class; recall is the share of "
        "true boxes that are found.",
        [score_table(evidence, label)],
    )
    classes = Section("classes", "Classes", f"By {label}.", [class_table(evidence, names)])
    sure = {}
    for method, one in scores.items():
        counts = one.evidence["counts"][:, 0]
        sure["plain", method == "SBN"] = one.evidence["score"][counts], one.evidence["right"][counts, 0]
    reliable = Curve(
        "Are detections as often right as it says?",
        "Reliability: on the dotted line, of the detections with a score of 80 % four fifths are right; below it the "
        "method is too sure. Bars are 95 % intervals.",
        inline(curves.reliability(sure, what="score of a detection"), "reliability"),
    )
    values = scores[last].values
    said = f"AP is {100 * values['ap']:.2f} %, and at an overlap of 0.5 {100 * values['ap50']:.2f} %."
    return [answering, classes, *seen.sections()], [reliable], [said]


def score_table(evidence: Mapping[str, Tensor], label: str) -> Table:
    """Precision and recall of the detections of at least some scores, all classes together."""
    body, (count, _) = [], evidence["truths"].shape
    for least in SCORES:
        taken = (evidence["score"] >= least) & evidence["counts"][:, 0]
        right, given = int(evidence["right"][taken, 0].sum()), int(taken.sum())
        body.append(
            [f"{least:g}", f"{given:,}", f"{given / count:.2f}", _percent(right, given),
             _percent(right, int(evidence["truths"].sum()))]
        )  # fmt: skip
    columns = ["score at least", "detections", "of a picture", "precision %", "recall %"]
    return Table(f"If detections of at least a score are taken, by {label}", columns, body)


def class_table(evidence: Mapping[str, Tensor], names: Sequence[str]) -> Table:
    """A row for each class: true boxes, detections, average precision and mean scores."""
    truths, body = evidence["truths"], []
    right, counts, ones = evidence["right"], evidence["counts"], torch.ones(1, len(truths), dtype=torch.float64)
    for k in range(truths.shape[1]):
        own = evidence["label"] == k
        if not truths[:, k].any() and not own.any():
            continue
        of_class = torch.zeros_like(truths)
        of_class[:, k] = truths[:, k]
        score, label, picture = (evidence[name][own] for name in ("score", "label", "picture"))
        precision = average_precision(score, label, picture, right[own].T, counts[own].T, of_class, ones)[0]
        shown = [_percent(float(one), 1) if truths[:, k].any() else "-" for one in (precision.mean(), precision[0])]
        hit, taken = right[own, 0], counts[own, 0]
        means = [f"{100 * part.mean().item():.1f}" if len(part) else "-" for part in
                 (evidence["score"][own][hit], evidence["score"][own][taken & ~hit])]  # fmt: skip
        name = names[k] if k < len(names) else str(k)
        body.append([name, f"{int(truths[:, k].sum()):,}", f"{int(own.sum()):,}", *shown, *means])
    columns = ["class", "true boxes", "detections", "AP %", "AP50 %", "mean score where right %", "where not %"]
    return Table("By class", columns, body)


def _percent(part: float, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"
