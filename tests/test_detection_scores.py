"""Scores of detections against COCO's own evaluation, and against slow ones."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import seeded
from stochbn import metrics
from stochbn.metrics.detection import calibrated_losses, matched, rank_correlation, resamples
from stochbn.tasks import Detection
from stochbn.tasks.boxes import boxes_of_targets, checked_boxes, padded
from stochbn.tasks.detection import DetectionPrediction
from stochbn.tasks.detection_scores import evidence_of, score

CLASSES = 3


def some_boxes(count: int, generator: torch.Generator) -> Tensor:
    corner = 40 * torch.rand(count, 2, generator=generator)
    return torch.cat([corner, corner + 4 + 16 * torch.rand(count, 2, generator=generator)], 1)


def picture(generator: torch.Generator, crowds: float = 0.15) -> tuple[Tensor, Tensor]:
    """True boxes ``[m, 6]``, and anchors ``[4 + K, 30]`` of which some are near them."""
    count = int(torch.randint(0, 6, (1,), generator=generator))
    truth = torch.cat(
        [
            some_boxes(count, generator),
            torch.randint(0, CLASSES, (count, 1), generator=generator),
            (torch.rand(count, 1, generator=generator) < crowds).float(),
        ],
        1,
    )
    near = truth[:, :4].repeat(3, 1)
    near = near + 0.8 * torch.randn(near.shape, generator=generator)
    others = some_boxes(30 - len(near), generator)
    probs = torch.rand(30, CLASSES, generator=generator) ** 3
    for anchor in range(len(near)):
        if torch.rand(1, generator=generator) < 0.8:
            probs[anchor, int(truth[anchor % count, 4])] += 0.5 * torch.rand(1, generator=generator)[0]
    tied = ((20 * probs).floor() / 20 + 0.01).clamp(max=0.99)
    return truth, torch.cat([torch.cat([near, others]), tied], 1).T


def pictures(count: int, seed: int) -> tuple[Tensor, DetectionPrediction]:
    made = [picture(seeded(seed + i)) for i in range(count)]
    anchors = torch.stack([anchors for _, anchors in made])
    spread = torch.rand(anchors.shape, generator=seeded(seed)) ** 2
    return padded([truth for truth, _ in made]), DetectionPrediction(anchors, spread, anchors[:, 0], Detection())


def coco(labels: Tensor, prediction: DetectionPrediction) -> tuple[float, float]:
    """AP and AP50 by the evaluation of COCO's authors."""
    reference: Any = pytest.importorskip("pycocotools.coco")
    evaluation: Any = pytest.importorskip("pycocotools.cocoeval")
    truths = checked_boxes(labels, CLASSES)
    annotations: list[dict[str, Any]] = []
    for i, truth in enumerate(truths):
        for *sides, kind, crowd in truth.tolist():
            box = [sides[0], sides[1], sides[2] - sides[0], sides[3] - sides[1]]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i + 1, "category_id": int(kind) + 1, "bbox": box,
                 "area": box[2] * box[3], "iscrowd": int(crowd)}
            )  # fmt: skip
    found = []
    for i, one in enumerate(prediction.objects):
        for sides, kind, p in zip(one.boxes.double().tolist(), one.labels.tolist(), one.scores.tolist(), strict=True):
            box = [sides[0], sides[1], sides[2] - sides[0], sides[3] - sides[1]]
            found.append({"image_id": i + 1, "category_id": kind + 1, "bbox": box, "score": p})
    with contextlib.redirect_stdout(io.StringIO()):
        whole = reference.COCO()
        whole.dataset = {
            "images": [{"id": i + 1} for i in range(len(truths))],
            "categories": [{"id": k + 1} for k in range(CLASSES)],
            "annotations": annotations,
        }
        whole.createIndex()
        judged = evaluation.COCOeval(whole, whole.loadRes(found), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return judged.stats[0], judged.stats[1]


def in_batches(prediction: DetectionPrediction, labels: Tensor, size: int) -> Iterator[tuple[Any, Tensor]]:
    for index in torch.split(torch.arange(len(labels)), size):
        yield prediction.of([values[index] for values in prediction.averages], None), labels[index]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12))
def test_average_precision_is_that_of_cocos_evaluation(seed: int, count: int) -> None:
    labels, prediction = pictures(count, seed)
    if not (labels[:, :, 5] == 0).any():
        return
    found = Detection().scores(in_batches(prediction, labels, 5))
    assert (found.values["ap"], found.values["ap50"]) == pytest.approx(coco(labels, prediction), abs=1e-12)


def test_detections_are_forecasts_of_being_right() -> None:
    labels, prediction = pictures(40, 7)
    found = Detection().scores(in_batches(prediction, labels, 7))
    scores, right, of, std, error = [], [], [], [], []
    for i, (one, truth) in enumerate(zip(prediction.objects, checked_boxes(labels, CLASSES), strict=True)):
        taken: set[int] = set()
        for box, spread, kind, p in zip(one.boxes.double(), one.box_std.double(), one.labels, one.scores, strict=True):
            best, which, crowd = 0.5, None, False
            for number, true in enumerate(truth):
                low, high = torch.maximum(box[:2], true[:2]), torch.minimum(box[2:], true[2:4])
                shared = (high - low).clamp(min=0).prod()
                areas = [(each[2:4] - each[:2]).prod() for each in (box, true)]
                whole = areas[0] if true[5] else areas[0] + areas[1] - shared
                if (
                    true[4] == kind
                    and number not in taken
                    and shared / whole >= best
                    and not (true[5] and which is not None)
                ):
                    best, which, crowd = shared / whole, number, bool(true[5])
            if crowd and any(not truth[n, 5] for n in [which] if n is not None):
                raise AssertionError
            if which is not None and not crowd:
                taken.add(which)
            if crowd:
                continue
            scores.append(float(p))
            right.append(which is not None)
            of.append(i)
            if which is not None:
                size = (box[2:] - box[:2]).prod().sqrt()
                std.append(float(spread.square().mean().sqrt() / size))
                error.append(float((box - truth[which, :4]).square().mean().sqrt() / size))
    p, hit = torch.tensor(scores).double(), torch.tensor(right)
    assert found.values["nll"] == pytest.approx(-torch.where(hit, p, 1 - p).log().mean().item(), rel=1e-6)
    wanted = metrics.evaluate(torch.stack([1 - p, p], 1).float(), hit.long())
    assert found.values["nll"] == pytest.approx(wanted["nll"], rel=1e-5)
    bins = (p * 15).long().clamp(max=14)
    ece = sum(abs((p[bins == b] - hit[bins == b].double()).sum().item()) for b in range(15)) / len(p)
    assert found.values["ece"] == pytest.approx(ece, rel=1e-6)
    ranks = torch.stack([torch.tensor(one).argsort().argsort().double() for one in (std, error)])
    assert found.values["box_correlation"] == pytest.approx(torch.corrcoef(ranks)[0, 1].item(), abs=1e-6)


def test_errors_are_those_of_many_data_sets() -> None:
    """The bootstrap's standard errors are near the deviation between independent samples of pictures."""
    samples = [pictures(30, 1000 * i) for i in range(40)]
    every = [Detection().scores([(prediction, labels)]) for labels, prediction in samples]
    for name in ("ap", "ap50", "ece", "nll", "box_correlation"):
        values = torch.tensor([one.values[name] for one in every])
        claimed = torch.tensor([one.errors[name] for one in every])
        assert 0.6 < claimed.mean() / values.std() < 1.7, name


def test_a_change_is_paired_over_pictures() -> None:
    labels, prediction = pictures(40, 3)
    better = DetectionPrediction(
        torch.cat([prediction.anchors[:, :4], prediction.anchors[:, 4:] ** 1.1], 1), prediction.variance,
        prediction.expected_entropy, Detection(),
    )  # fmt: skip
    one, other = (Detection().scores([(each, labels)]) for each in (prediction, better))
    change = one.change(other)
    assert change.higher_is_better
    assert change.change == pytest.approx(other.values["ap"] - one.values["ap"], abs=1e-12)
    assert change.error < one.errors["ap"] / 2
    assert one.change(one).error == 0
    assert one.examples == 40


def test_a_temperature_is_chosen_on_other_pictures() -> None:
    generator = seeded(4)
    true = torch.rand(4000, generator=generator).double()
    hit = torch.rand(4000, generator=generator) < true
    sure = torch.special.expit(2 * torch.special.logit(true, eps=1e-6))
    losses = calibrated_losses(sure, hit, torch.arange(4000) // 8, 500)
    assert losses.mean() == pytest.approx(-torch.where(hit, true, 1 - true).log().mean().item(), abs=3e-3)
    assert calibrated_losses(sure, torch.ones(4000, dtype=torch.bool), torch.arange(4000), 4000).isnan().all()


@given(st.integers(2, 12), st.integers(0, 1000))
def test_rank_correlation_counts_examples_as_often_as_they_are_there(count: int, seed: int) -> None:
    one, other = (torch.randint(0, 5, (count,), generator=seeded(seed + i)).double() for i in range(2))
    times = torch.randint(0, 3, (count,), generator=seeded(seed + 2))
    repeated = one.repeat_interleave(times), other.repeat_interleave(times)
    found = rank_correlation(one, other, times[None].double())
    wanted = (
        rank_correlation(*repeated, torch.ones(1, len(repeated[0]))) if times.sum() > 1 else torch.tensor([math.nan])
    )
    torch.testing.assert_close(found.float(), wanted.float(), equal_nan=True)


def test_resamples_are_the_same_for_all_methods_and_begin_with_the_data_itself() -> None:
    found = resamples(12)
    assert (found[0] == 1).all()
    assert (found.sum(1) == 12).all()
    assert found.equal(resamples(12))


def test_a_detection_of_a_crowd_counts_neither_way() -> None:
    truth = torch.tensor([[0.0, 0, 20, 20, 0, 1], [0, 0, 10, 10, 0, 0]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 9, 9], [30, 30, 40, 40]])
    number, crowd = matched(boxes, torch.zeros(3, dtype=torch.long), truth)
    assert number[0].tolist() == [1, 0, -1]
    assert crowd[0].tolist() == [False, True, False]


def test_what_cannot_be_scored_is_refused() -> None:
    labels, prediction = pictures(3, 0)
    box = torch.tensor([[[0.0, 0, 5, 5, 0]]])
    one = prediction.of([values[:1] for values in prediction.averages], None)
    for wrong, message in (
        (labels[:, 0], r"expected labels \[N, M, 5\] or \[N, M, 6\]"),
        (box * torch.tensor([1, 1, -1, 1, 1]), "ends before it begins"),
        (box + torch.tensor([0, 0, 0, 0, 3]), "is of class 3, and the network has the classes 0 to 2"),
        (box + torch.tensor([0, 0, 0, 0, 0.5]), "is of class 0.5"),
        (box.where(torch.arange(5) != 2, math.nan), "that is no number"),
        (box.expand(1, 0, 5), "no picture has a box"),
    ):
        with pytest.raises(ValueError, match=message):
            Detection().scores([(one, wrong)])
    with pytest.raises(ValueError, match="mark true boxes as crowds"):
        Detection().scores([(one, box)], ignore=0)
    with pytest.raises(ValueError, match="no batches"):
        Detection().scores([])


def test_mappings_of_targets_are_labels() -> None:
    labels, prediction = pictures(5, 2)
    targets = [
        {"boxes": one[:, :4], "labels": one[:, 4].long(), "iscrowd": one[:, 5].long()}
        for one in checked_boxes(labels, CLASSES)
    ]
    torch.testing.assert_close(boxes_of_targets(targets), labels, equal_nan=True)
    assert Detection().scores([(prediction, targets)]).values == Detection().scores([(prediction, labels)]).values  # type: ignore[list-item]
    with pytest.raises(TypeError, match="with tensors 'boxes'"):
        boxes_of_targets([{"boxes": torch.zeros(1, 4)}])
    with pytest.raises(ValueError, match="of the same m"):
        boxes_of_targets([{"boxes": torch.zeros(1, 4), "labels": torch.zeros(2)}])


def test_processes_together_have_the_scores_of_one() -> None:
    labels, prediction = pictures(12, 5)
    whole = Detection().scores([(prediction, labels)])
    truths = checked_boxes(labels, CLASSES)
    parts = [
        evidence_of(prediction.objects[start : start + 6], truths[start : start + 6], CLASSES, 100) for start in (0, 6)
    ]
    joined = score(parts[:1], lambda own: {name: torch.cat([one, parts[1][name]]) for name, one in own.items()})
    assert joined.values == whole.values
    assert joined.errors == whole.errors


def test_a_picture_without_detections_has_scores_too() -> None:
    labels, prediction = pictures(4, 9)
    silent = prediction.of([torch.zeros_like(values) for values in prediction.averages], None)
    found = Detection().scores([(silent, labels)])
    assert found.values["ap"] == 0
    assert "nll" not in found.values
