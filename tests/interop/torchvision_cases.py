"""Networks of torchvision, timm and segmentation-models-pytorch, without any download."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from interop_check import Case
from torch import Tensor, nn

__all__ = ["CASES"]

CLASSES = 5


def images(size: int, *, frames: int = 0) -> Callable[[int, int], Tensor]:
    shape = (3, frames, size, size) if frames else (3, size, size)
    return lambda seed, count: torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def torchvision(name: str, size: int = 64, *, place: str = "models", **settings: Any) -> Case:
    def build() -> nn.Module:
        networks = importlib.import_module(f"torchvision.{place}")
        model: nn.Module = getattr(networks, name)(weights=None, num_classes=CLASSES, **settings)
        return model

    dense = place.endswith("segmentation")
    read = (lambda output: output["out"]) if dense else (lambda output: output)
    frames = 4 if place.endswith("video") else 0
    return Case("torchvision", name, build, images(size, frames=frames), read=read, objects=3)


def timm(name: str, size: int = 64, **settings: Any) -> Case:
    def build() -> nn.Module:
        model: nn.Module = importlib.import_module("timm").create_model(name, num_classes=CLASSES, **settings)
        return model

    return Case("timm", name, build, images(size), objects=3)


def segmentation(network: str, encoder: str = "resnet18", size: int = 64) -> Case:
    def build() -> nn.Module:
        library = importlib.import_module("segmentation_models_pytorch")
        model: nn.Module = getattr(library, network)(encoder, encoder_weights=None, classes=3)
        return model

    return Case("segmentation_models_pytorch", f"{network}, {encoder}", build, images(size), objects=2)


class Detector(nn.Module):
    """The class logits of torchvision's SSDlite for every anchor, by the backbone and head of the detector."""

    def __init__(self) -> None:
        super().__init__()
        detection = importlib.import_module("torchvision.models.detection")
        self.detector = detection.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=CLASSES
        )

    def forward(self, x: Tensor) -> Mapping[str, Tensor]:
        features = list(self.detector.backbone(x).values())
        result: Mapping[str, Tensor] = self.detector.head(features)
        return result


CASES = [
    *map(torchvision, ("resnet18", "resnext50_32x4d", "wide_resnet50_2", "mobilenet_v2", "mobilenet_v3_small",
                       "shufflenet_v2_x0_5", "mnasnet0_5", "efficientnet_b0", "regnet_y_400mf", "densenet121")),
    torchvision("vgg11_bn"),
    torchvision("googlenet", 96, aux_logits=False, init_weights=False),
    torchvision("inception_v3", 96, aux_logits=False, init_weights=False),
    torchvision("fcn_resnet50", place="models.segmentation", weights_backbone=None, aux_loss=False),
    torchvision("deeplabv3_mobilenet_v3_large", place="models.segmentation", weights_backbone=None, aux_loss=False),
    torchvision("lraspp_mobilenet_v3_large", place="models.segmentation", weights_backbone=None),
    torchvision("r3d_18", 32, place="models.video"),
    torchvision("mc3_18", 32, place="models.video"),
    Case("torchvision", "ssdlite320, detection head", Detector, images(64),
         {"logits": "cls_logits", "class_axis": -1}, lambda output: output["cls_logits"].movedim(-1, 1), objects=2),
    *map(timm, ("resnet10t", "resnet26d", "resnet18",
                "regnetx_002", "regnety_002", "efficientnet_b0", "mobilenetv2_050", "mobilenetv3_small_050",
                "mobilenetv4_conv_small", "mnasnet_small", "ghostnet_050", "lcnet_050", "tinynet_e", "hardcorenas_a",
                "fbnetc_100", "spnasnet_100", "mixnet_s", "densenet121", "dla34", "dpn48b", "res2net50_14w_8s",
                "resnest14d", "skresnet18", "vovnet39a", "ese_vovnet19b_dw", "repvgg_a0", "hrnet_w18_small",
                "cspresnet50", "selecsls42", "xception41", "rexnet_100", "gernet_s")),
    *map(segmentation, ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus")),
    segmentation("PAN", size=128),
    segmentation("Unet", "timm-efficientnet-b0"),
]  # fmt: skip
