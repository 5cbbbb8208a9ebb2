from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import stochbn
from conftest import normal, seeded, settled
from stochbn import Predictive
from stochbn.tasks import Detection, make_task
from stochbn.tasks.detection import DetectionPrediction, suppressed
from stochbn.tasks.heads import DenseHead

CLASSES, ANCHORS = 3, 16
X = normal(5, 3, 8, 8, seed=2)


class Head(nn.Module):
    """A small network with a dense head, which gives boxes and scores in one of several forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4 + CLASSES, 1))

    def forward(self, x: Tensor) -> Any:
        found = self.body(x).flatten(2)
        centre = 8 * found[:, :2].sigmoid()
        size = 1 + 4 * found[:, 2:4].sigmoid()
        scores = 3 * found[:, 4:]
        corners = torch.cat([centre - size / 2, centre + size / 2], 1)
        if self.form == "yolo":
            return torch.cat([centre, size, scores.sigmoid()], 1), [found]
        if self.form == "named":
            return {"boxes": corners.mT, "scores": scores.mT}
        return corners.mT, scores.softmax(1).mT if self.form == "softmax" else scores.mT


TASKS: dict[str, Detection] = {
    "yolo": Detection(),
    "pair": Detection(),
    "named": Detection(place=("boxes", "scores")),
    "softmax": Detection(output="probs", background=0),
}


def network(form: str) -> nn.Module:
    return settled(Head(form), 3, 8, 8)


def slow(model: nn.Module, posterior: stochbn.Posterior, form: str, draws: int) -> Tensor:
    """Corners and probabilities ``[S, N, A, 4 + K]`` of every draw."""
    made = []
    for draw in posterior.iter_draws(draws, seeded(), quasi=True):
        with torch.no_grad():
            out = torch.func.functional_call(model, draw, (X,))
        if form == "yolo":
            one = out[0].mT
            centre, size, probs = one[..., :2], one[..., 2:4], one[..., 4:]
            boxes = torch.cat([centre - size / 2, centre + size / 2], 2)
        else:
            boxes, scores = (out["boxes"], out["scores"]) if form == "named" else out
            probs = scores if form == "softmax" else scores.sigmoid()
        made.append(torch.cat([boxes, probs], 2))
    return torch.stack(made).double()


def chosen(mean: Tensor, task: Detection) -> list[tuple[int, int]]:
    """Anchors and classes that greedy suppression leaves, one after another."""
    left = []
    for anchor, row in enumerate(mean.tolist()):
        scores = [p if task.background is None or k != task.background else -1.0 for k, p in enumerate(row[4:])]
        label = max(range(len(scores)), key=scores.__getitem__)
        if scores[label] >= task.threshold:
            left.append((scores[label], anchor, label, row[:4]))
    kept: list[tuple[int, int]] = []
    boxes: list[tuple[int, list[float]]] = []
    for _, anchor, label, box in sorted(left, key=lambda one: -one[0]):
        if all(other != label or overlap(box, before) <= task.overlap for other, before in boxes):
            kept.append((anchor, label))
            boxes.append((label, box))
    return kept[: task.most]


def overlap(one: list[float], other: list[float]) -> float:
    """Intersection over union."""
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


@pytest.mark.parametrize("form", TASKS)
def test_objects_are_those_of_a_slow_loop_suppressed_once(form: str) -> None:
    model, task = network(form), TASKS[form]
    posterior = stochbn.fit(model, [normal(64, 3, 8, 8, seed=3)], 8, task=task)
    found = Predictive(model, posterior, 9, task=task)(X, generator=seeded())
    assert type(found) is DetectionPrediction
    every = slow(model, posterior, form, 9)
    mean, std = every.mean(0), every.std(0)
    probs = every[..., 4:]
    each = -(probs * probs.clamp(min=1e-30).log()).sum(3)
    total = -(probs.mean(0) * probs.mean(0).log()).sum(2)
    if task.background is None:
        each -= ((1 - probs) * (1 - probs).clamp(min=1e-30).log()).sum(3)
        total -= ((1 - probs.mean(0)) * (1 - probs.mean(0)).log()).sum(2)
    torch.testing.assert_close(found.anchors.mT.double(), mean, atol=1e-4, rtol=1e-4)
    assert len(found.objects) == len(X)
    for i, objects in enumerate(found.objects):
        wanted = chosen(mean[i], task)
        assert list(zip(objects.anchors.tolist(), objects.labels.tolist(), strict=True)) == wanted
        index = objects.anchors
        torch.testing.assert_close(objects.boxes.double(), mean[i, index, :4], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(objects.probs.double(), mean[i, index, 4:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(objects.box_std.double(), std[i, index, :4], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(objects.entropy.double(), total[i, index], atol=1e-4, rtol=1e-4)
        information = (total - each.mean(0))[i, index].clamp(min=0)
        torch.testing.assert_close(objects.mutual_information.double(), information, atol=1e-4, rtol=1e-3)
        assert objects.scores.tolist() == sorted(objects.scores.tolist(), reverse=True)
    assert any(len(objects) for objects in found.objects)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 12), st.floats(0, 1), st.floats(0, 1), st.integers(1, 5))
def test_suppression_is_greedy(seed: int, count: int, threshold: float, most: float, number: int) -> None:
    generator = seeded(seed)
    corner, size = 4 * torch.rand(count, 2, generator=generator), 0.1 + 2 * torch.rand(count, 2, generator=generator)
    boxes, probs = torch.cat([corner, corner + size], 1), torch.rand(count, 2, generator=generator)
    task = Detection(threshold=threshold, overlap=most, most=number)
    scores, labels = probs.max(1) if count else (torch.empty(0), torch.empty(0, dtype=torch.long))
    wanted = chosen(torch.cat([boxes, probs], 1).double(), task)
    assert suppressed(boxes, scores, labels, task).tolist() == [anchor for anchor, _ in wanted]


def test_detections_are_rows_of_a_table_and_an_ensemble_mixes_anchors(tmp_path: Path) -> None:
    model, task = network("pair"), TASKS["pair"]
    posterior = stochbn.fit(model, [normal(64, 3, 8, 8, seed=3)], 8, task=task)
    predictive = Predictive(model, posterior, 9, task=task)
    found = predictive(X, generator=seeded())
    rows = found.columns(["a", "b", "c"])
    assert rows["objects"] == [len(one) for one in found.objects]
    first = json.loads(rows["detections"][0])
    assert [one["score"] for one in first] == pytest.approx(found.objects[0].scores.tolist(), abs=1e-5)
    assert {one["class"] for one in first} <= {"a", "b", "c"}
    with pytest.raises(ValueError, match="2 names of classes, and the network has 3"):
        found.columns(["a", "b"])
    plain = Predictive(model, task=task)
    both = stochbn.Ensemble([predictive, plain])(X, generator=seeded())
    torch.testing.assert_close(both.anchors, (found.anchors + plain(X).anchors) / 2, atol=1e-5, rtol=1e-4)
    exported = stochbn.export.pt2(model, posterior, tmp_path / "n.pt2", X, draws=4, task=task)
    assert exported.outputs == ("anchors", "std", "entropy", "mutual_information")
    joined = found.cat(
        [found.of([one[:2] for one in found.averages], None), found.of([one[2:] for one in found.averages], None)]
    )
    assert joined.columns() == found.columns()


@pytest.mark.parametrize(
    ("output", "task", "message"),
    [
        (torch.zeros(2, 16), Detection(), r"\[N, 4 \+ K, A\] before non-maximum suppression, found \[2, 16\]"),
        (torch.zeros(2, 4, 9), Detection(), "before non-maximum suppression"),
        ((torch.zeros(2, 9, 3), torch.zeros(2, 9, 3)), Detection(place=(0, 1)), r"expected boxes \[N, A, 4\]"),
        ([{"boxes": torch.zeros(3, 4)}], Detection(place="boxes"), "has nothing at 'boxes'"),
    ],
)
def test_outputs_that_are_no_dense_heads_are_refused(output: Any, task: Detection, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task.raw(output)


def test_scores_of_the_other_kind_are_refused() -> None:
    logits, boxes = 3 * normal(2, 9, 3), torch.rand(2, 9, 4)
    task = make_task("detection")
    with pytest.raises(ValueError, match="found others: pass output='logits'"):
        task.check(task.raw(torch.cat([boxes, logits], 2).mT))
    with pytest.warns(UserWarning, match='pass output="probs"'):
        task.check(task.raw((boxes, logits.sigmoid())))
    said = make_task("detection", output="logits")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said.check(said.raw((boxes, logits.sigmoid())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_axis": 2}, "class_axis does not apply"),
        ({"box_format": "xywh"}, "box_format must be"),
        ({"threshold": 2}, "threshold must lie"),
        ({"overlap": -0.1}, "overlap must lie"),
        ({"most": 0}, "most must be"),
    ],
)
def test_fields_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Detection(), **change)


class FrozenBatchNorm2d(nn.Module):
    """What torchvision and others call a batch norm whose statistics are constants."""


class Fused(nn.Sequential):
    """A network whose class can fuse, and did."""

    def fuse(self) -> None:
        """Fuse batch norms into convolutions."""


def test_networks_without_statistics_to_draw_are_told_what_to_do() -> None:
    frozen = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d())
    with pytest.raises(ValueError, match=r"FrozenBatchNorm.*norm_layer= of torchvision"):
        stochbn.fit(frozen, [X], 2)
    with pytest.raises(ValueError, match=r"load the network without fuse\(\)"):
        stochbn.fit(Fused(nn.Conv2d(3, 4, 1)), [X], 2)
    with pytest.raises(TypeError, match="has no backbone"):
        DenseHead(nn.Linear(2, 2))
