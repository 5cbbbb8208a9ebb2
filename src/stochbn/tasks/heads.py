"""Detectors of torchvision and Transformers as networks that give boxes and scores of every anchor, for `Detection`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stochbn.tasks.binary import logit
from stochbn.tasks.detection import Detection

__all__ = ["DenseHead", "EncoderHead"]

PARTS = "backbone", "head", "anchor_generator", "box_coder"
"""What a one-stage detector of torchvision consists of."""


class DenseHead(nn.Module):
    """A one-stage detector of torchvision (RetinaNet, SSD, SSDlite, FCOS) up to its head, without suppression.

    It takes a batch of images of one size ``[N, 3, H, W]``, with pixels from 0 to 1, at the size that they come in. It
    gives boxes ``[N, A, 4]``, in pixels, and logits ``[N, A, K]``. Statistics are drawn in it as in any network::

        head = DenseHead(torchvision.models.detection.fcos_resnet50_fpn(...))
        posterior = stochbn.fit(head, loader, task=head.task)
        predictive = stochbn.Predictive(head, posterior, task=head.task)
        predictive(images).objects[0].boxes

    Args:
        detector: the detector.

    Attributes:
        detector: the detector, which stays as it is.
        task: what the output means.

    Raises:
        TypeError: it is none of these, or a detector of two stages, whose second stage sees only what the first chose.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        if missing := [name for name in PARTS if not hasattr(detector, name)]:
            stages = hasattr(detector, "rpn")
            why = "is of two stages, and its second stage sees other boxes in every draw" if stages else ""
            raise TypeError(
                f"{type(detector).__name__} {why or f'has no {missing[0]}'}: expected a one-stage detector of "
                "torchvision, such as RetinaNet, SSD or FCOS; for others give boxes and scores of all anchors, see "
                "stochbn.tasks.detection.Detection"
            )
        self.detector = detector
        competing = any(kind.__name__ == "SSD" for kind in type(detector).__mro__)
        self.task = Detection(place=("boxes", "scores"), output="logits", background=0 if competing else None)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Boxes and logits of every anchor."""
        detector: Any = self.detector
        height, width = images.shape[-2:]
        mean, std = (torch.tensor(values).to(images)[:, None, None] for values in self._scale())
        x = (images - mean) / std
        features = detector.backbone(x)
        features = [features] if isinstance(features, Tensor) else list(features.values())
        found = detector.head(features)
        given = SimpleNamespace(tensors=x, image_sizes=[(height, width)] * len(x))
        anchors = torch.stack(detector.anchor_generator(given, features))
        coder, codes = detector.box_coder, found["bbox_regression"]
        decode = coder.decode_single if hasattr(coder, "decode_single") else coder.decode
        boxes = decode(codes.flatten(0, 1), anchors.flatten(0, 1)).view(codes.shape)
        scores = found["cls_logits"]
        if "bbox_ctrness" in found:  # how central the anchor is in its object, as FCOS multiplies it in
            scores = logit((scores.sigmoid() * found["bbox_ctrness"].sigmoid()).sqrt())
        return {"boxes": boxes, "scores": scores}

    def _scale(self) -> tuple[list[float], list[float]]:
        """What images are normalised by."""
        transform: Any = getattr(self.detector, "transform", None)
        return list(getattr(transform, "image_mean", [0.0])), list(getattr(transform, "image_std", [1.0]))


class EncoderHead(nn.Module):
    """A detector of Transformers that selects queries (RT-DETR, D-FINE), up to the detection that it selects them by.

    The decoder refines those places of the encoder's feature maps that have the highest scores. They are others in
    every draw, so what the decoder gives cannot be averaged. The boxes and scores by which they are selected can: there
    is one for every place, and they are trained as detections. They are coarser than the decoder's::

        head = EncoderHead(transformers.RTDetrForObjectDetection.from_pretrained(...))
        posterior = stochbn.fit(head, loader)

    It takes images ``[N, 3, H, W]``, and gives boxes ``[N, A, 4]`` (left, top, right and bottom, in pixels) and logits
    ``[N, A, K]``.

    Args:
        detector: the detector.

    Attributes:
        detector: the detector, which stays as it is.
        task: what the output means.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        self.task = Detection(place=("boxes", "scores"), output="logits")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Boxes and logits of every place.

        Raises:
            TypeError: the detector's output has no scores of all places.
        """
        found = self.detector(images)
        codes, scores = (getattr(found, name, None) for name in ("enc_outputs_coord_logits", "enc_outputs_class"))
        if not isinstance(codes, Tensor) or not isinstance(scores, Tensor):
            raise TypeError(
                f"{type(self.detector).__name__} gives no enc_outputs_class and enc_outputs_coord_logits: expected a "
                "detector of Transformers that selects queries, such as RTDetrForObjectDetection"
            )
        height, width = images.shape[-2:]
        centre, half = torch.split(codes.sigmoid(), 2, -1)
        half = half / 2
        corners = torch.cat([centre - half, centre + half], -1)
        return {"boxes": corners * corners.new_tensor([width, height, width, height]), "scores": scores}
