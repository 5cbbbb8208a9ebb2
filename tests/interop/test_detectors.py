"""Detectors of torchvision against a slow loop over draws, and its own non-maximum suppression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochbn
from stochbn.tasks.heads import DenseHead

pytestmark = [pytest.mark.networks, pytest.mark.filterwarnings("ignore")]
detection: Any = pytest.importorskip("torchvision.models.detection")
ops: Any = pytest.importorskip("torchvision.ops")

PLAIN: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 5}
DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "retinanet": lambda: detection.retinanet_resnet50_fpn(**PLAIN),
    "fcos": lambda: detection.fcos_resnet50_fpn(**PLAIN),
    "ssdlite": lambda: detection.ssdlite320_mobilenet_v3_large(**PLAIN),
}


def images(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, 96, 96, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_is_averaged_anchor_by_anchor_and_suppressed_once(name: str) -> None:
    torch.manual_seed(0)
    head = DenseHead(DETECTORS[name]())
    head.train()
    with torch.no_grad():
        for step in range(3):
            head(images(4, step))
    head.eval()
    posterior = stochbn.fit(head, [images(16, 7)], 4, task=head.task)
    x = images(2, 9)
    found = stochbn.Predictive(head, posterior, 5, task=head.task)(x, generator=torch.Generator().manual_seed(0))
    boxes, probs = [], []
    for draw in posterior.iter_draws(5, torch.Generator().manual_seed(0), quasi=True):
        with torch.no_grad():
            out = torch.func.functional_call(head, draw, (x,))
        boxes.append(out["boxes"])
        probs.append(out["scores"].softmax(2) if head.task.background == 0 else out["scores"].sigmoid())
    mean, std, p = torch.stack(boxes).mean(0), torch.stack(boxes).std(0), torch.stack(probs).mean(0)
    torch.testing.assert_close(found.anchors[:, :4].mT, mean, atol=2e-2, rtol=1e-3)
    torch.testing.assert_close(found.anchors[:, 4:].mT, p, atol=1e-4, rtol=1e-3)
    first = 1 if head.task.background == 0 else 0
    for i, objects in enumerate(found.objects):
        scores, labels = found.anchors[i, 4 + first :].T.max(1)
        likely = (scores >= head.task.threshold).nonzero()[:, 0]
        likely = likely[scores[likely].argsort(descending=True, stable=True)][:1000]
        corners = found.anchors[i, :4].T[likely]
        kept = ops.batched_nms(corners.double(), scores[likely].double(), labels[likely], head.task.overlap)
        assert set(objects.anchors.tolist()) == set(likely[kept[: head.task.most]].tolist())
        torch.testing.assert_close(objects.box_std, std[i, objects.anchors], atol=2e-2, rtol=1e-2)
        assert (objects.labels == labels[objects.anchors] + first).all()


@pytest.mark.parametrize("name", DETECTORS)
def test_one_pass_gives_the_boxes_and_scores_of_the_detector_itself(name: str) -> None:
    """Those of its best detections, found again among the anchors: it clips boxes, and has its own suppression."""
    torch.manual_seed(0)
    detector: Any = DETECTORS[name]().eval()
    detector.transform.min_size, detector.transform.max_size = (96,), 96
    detector.transform.fixed_size = None if name != "ssdlite" else (96, 96)
    detector.score_thresh = 0.0  # with random weights nothing is likely
    x, head = images(1, 3), DenseHead(detector)
    with torch.no_grad():
        own, found = detector(list(x))[0], stochbn.Predictive(head, task=head.task)(x)
    assert len(own["boxes"])
    anchors = found.anchors[0].T
    boxes = torch.stack([anchors[:, 0::2][:, :2].clamp(0, 96), anchors[:, 1::2][:, :2].clamp(0, 96)], 2).flatten(1)
    for box, score, label in zip(own["boxes"][:20], own["scores"], own["labels"], strict=False):
        near = (boxes - box).abs().amax(1) < 1e-2
        assert near.any()
        assert (anchors[near, 4 + label] - score).abs().min() < 1e-4


def test_detectors_that_cannot_be_drawn_say_why() -> None:
    with pytest.raises(TypeError, match="is of two stages, and its second stage sees other boxes in every draw"):
        DenseHead(detection.fasterrcnn_resnet50_fpn(**PLAIN))
    frozen = detection.retinanet_resnet50_fpn(**PLAIN)
    frozen.backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=ops.FrozenBatchNorm2d
    )
    with pytest.raises(ValueError, match=r"FrozenBatchNorm.*norm_layer= of torchvision"):
        stochbn.fit(DenseHead(frozen), [images(8, 0)], 4)
