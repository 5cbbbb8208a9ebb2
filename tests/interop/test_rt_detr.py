"""RT-DETR of Transformers: its queries are refused, and its encoder's detections are averaged as by a slow loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochbn
from stochbn.tasks import Detection
from stochbn.tasks.heads import EncoderHead

pytestmark = [pytest.mark.networks, pytest.mark.filterwarnings("ignore")]
transformers: Any = pytest.importorskip("transformers")


def detector() -> nn.Module:
    torch.manual_seed(0)
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[24, 32, 40], feat_strides=[8, 16, 32], encoder_hidden_dim=32,
        encoder_ffn_dim=32, d_model=32, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=32, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=20, num_labels=4, anchor_image_size=None,
        num_denoising=0,
    )  # fmt: skip
    found: nn.Module = transformers.RTDetrForObjectDetection(config).eval()
    return found


def images(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, 96, 96, generator=torch.Generator().manual_seed(seed))


def test_selected_queries_are_refused() -> None:
    model = detector()
    for task in (Detection(), Detection(place=("pred_boxes", "logits"), box_format="cxcywh")):
        with pytest.raises(ValueError, match=r"selects the queries .*EncoderHead\(model\)"):
            stochbn.Predictive(model, task=task)(images(1, 0))


def test_the_encoders_detections_are_averaged_place_by_place() -> None:
    head, x = EncoderHead(detector()), images(2, 1)
    posterior = stochbn.fit(head, [images(16, 0)], 4)
    found = stochbn.Predictive(head, posterior, 4)(x, generator=torch.Generator().manual_seed(0))
    boxes, probs = [], []
    for draw in posterior.iter_draws(4, torch.Generator().manual_seed(0), quasi=True):
        with torch.no_grad():
            out = torch.func.functional_call(
                head.detector, {k.removeprefix("detector."): v for k, v in draw.items()}, (x,)
            )
        a, b, w, h = (96 * out.enc_outputs_coord_logits.sigmoid()).unbind(-1)
        boxes.append(torch.stack([a - w / 2, b - h / 2, a + w / 2, b + h / 2], 1))
        probs.append(out.enc_outputs_class.sigmoid().mT)
    wanted = torch.cat([torch.stack(boxes).mean(0), torch.stack(probs).mean(0)], 1)
    torch.testing.assert_close(found.anchors, wanted, atol=1e-3, rtol=1e-3)
    assert found.anchors.shape == (2, 4 + 4, 12 * 12 + 6 * 6 + 3 * 3)
    with pytest.raises(TypeError, match="gives no enc_outputs_class"):
        EncoderHead(nn.Conv2d(3, 4, 1))(x)
