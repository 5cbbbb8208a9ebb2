"""Networks of the YOLO family from Ultralytics' package, with random weights, against a slow loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stochbn
from stochbn.tasks import Detection

pytestmark = [pytest.mark.networks, pytest.mark.filterwarnings("ignore")]
ultralytics: Any = pytest.importorskip("ultralytics")
ONE_HEAD, TWO_HEADS = "yolo11n.yaml", "yolo26n.yaml"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("YOLO_OFFLINE", "True")
    monkeypatch.chdir(tmp_path)


def images(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, 96, 96, generator=torch.Generator().manual_seed(seed))


def network(name: str) -> Any:
    torch.manual_seed(0)
    return ultralytics.YOLO(name).model.eval()


@pytest.mark.parametrize("name", [ONE_HEAD, TWO_HEADS])
def test_a_yolo_network_is_averaged_anchor_by_anchor(name: str) -> None:
    model, x = network(name), images(2, 1)
    posterior = stochbn.fit(model, [images(16, 0)], 4, task="detection")
    found = stochbn.Predictive(model, posterior, 4, task="detection")(x, generator=torch.Generator().manual_seed(0))
    every = []
    for draw in posterior.iter_draws(4, torch.Generator().manual_seed(0), quasi=True):
        with torch.no_grad():
            one = torch.func.functional_call(model, draw, (x,))[0]
        centre, half = one[:, :2], one[:, 2:4] / 2
        every.append(torch.cat([centre - half, centre + half, one[:, 4:]], 1))
    torch.testing.assert_close(found.anchors, torch.stack(every).mean(0), atol=2e-2, rtol=1e-3)
    torch.testing.assert_close(found.std, torch.stack(every).std(0), atol=2e-2, rtol=1e-2)


def test_objects_of_one_pass_are_those_of_the_package() -> None:
    nms: Any = pytest.importorskip("ultralytics.utils.nms")
    model, x = network(ONE_HEAD), images(2, 1)
    with torch.no_grad():
        for parameter in model.model[-1].parameters():  # with random weights nothing is likely
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        out = model(x)[0]
    task = Detection(threshold=float(out[:, 4:].amax(1).quantile(0.7)))
    wanted = nms.non_max_suppression(out, conf_thres=task.threshold, iou_thres=task.overlap, max_det=task.most)
    found = stochbn.Predictive(model, task=task)(x).objects
    # The first ones: the package suppresses in half the digits, and random boxes overlap by as much as the limit.
    for objects, rows in zip(found, wanted, strict=True):
        torch.testing.assert_close(objects.scores[:3], rows[:3, 4], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(objects.boxes[:3], rows[:3, :4], atol=1e-2, rtol=1e-4)
        assert objects.labels[:3].tolist() == rows[:3, 5].tolist()


def test_a_network_whose_batch_norms_are_fused_says_what_to_do() -> None:
    yolo = ultralytics.YOLO(ONE_HEAD)
    yolo.predict(np.zeros((96, 96, 3), dtype=np.uint8), imgsz=96, verbose=False)
    stochbn.fit(yolo.model, [images(8, 0)], 4, task="detection")  # what it predicts with is another network
    yolo.fuse()
    assert not any(isinstance(one, nn.BatchNorm2d) for one in yolo.model.modules())
    with pytest.raises(ValueError, match=r"load the network without fuse\(\)"):
        stochbn.fit(yolo.model, [images(8, 0)], 4, task="detection")


def test_queries_that_are_selected_by_their_scores_are_refused() -> None:
    model = ultralytics.RTDETR("rtdetr-l.yaml").model.eval()
    with pytest.raises(ValueError, match=r"selected by their scores .* cannot be averaged"):
        stochbn.Predictive(model, task="detection")(images(1, 0))
    model = network(TWO_HEADS)
    model.model[-1].end2end = True
    with pytest.raises(ValueError, match=r"model.model\[-1\].end2end = False"):
        stochbn.Predictive(model, task="detection")(images(1, 0))
