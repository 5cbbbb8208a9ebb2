"""The networks of the paper's experiments (Atanov et al., 2018, section 5)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stochbn.paper.data import Images

__all__ = ["NETWORKS", "PreActivationBlock", "arguments_for", "build", "lenet5", "resnet18", "vgg11"]


def lenet5(classes: int = 10, channels: int = 1, size: int = 28, dropout: float = 0.0) -> nn.Sequential:
    """LeNet-5 with batch normalisation: two 5x5 convolutions (20, 50) and a hidden linear layer of 500.

    Args:
        classes: number of classes K; the output is logits ``[N, K]``.
        channels: input channels.
        size: height and width of the input in pixels, at least 16.
        dropout: rate of the dropout after every ReLU; 0 leaves the dropout layers out.

    Raises:
        ValueError: the input is too small for two 5x5 convolutions with 2x2 pooling.
    """
    side = ((size - 4) // 2 - 4) // 2
    if side < 1:
        raise ValueError(f"LeNet-5 needs inputs of at least 16x16 pixels, got {size}x{size}")

    return nn.Sequential(
        nn.Conv2d(channels, 20, 5), nn.BatchNorm2d(20), *_activation(dropout, pooled=True),
        nn.Conv2d(20, 50, 5), nn.BatchNorm2d(50), *_activation(dropout, pooled=True),
        nn.Flatten(), nn.Linear(50 * side**2, 500), nn.BatchNorm1d(500), *_activation(dropout),
        nn.Linear(500, classes),
    )  # fmt: skip


def vgg11(
    classes: int = 10,
    channels: int = 3,
    size: int = 32,
    width: float = 1.0,
    dropout: float = 0.0,
    classifier_dropout: float = 0.0,
) -> nn.Sequential:
    """VGG-11 for small images: eight 3x3 convolutions with batch norm, five poolings and one linear layer.

    Args:
        classes: number of classes K; the output is logits ``[N, K]``.
        channels: input channels.
        size: height and width of the input in pixels, at least 32.
        width: factor on the number of channels of every layer.
        dropout: rate of the dropout after each ReLU that no pooling follows; 0 leaves it out.
        classifier_dropout: rate of the dropout before the linear layer; 0 leaves it out.

    Raises:
        ValueError: the input is too small for five 2x2 poolings, or the width leaves a layer without channels.
    """
    side = size // 32
    if side < 1:
        raise ValueError(f"VGG-11 needs inputs of at least 32x32 pixels, got {size}x{size}")
    plan = [(64, True), (128, True), (256, False), (256, True), (512, False), (512, True), (512, False), (512, True)]
    widths = [channels, *(_scaled(outputs, width) for outputs, _ in plan)]
    layers: list[nn.Module] = []
    for (inputs, outputs), (_, pooled) in zip(pairwise(widths), plan, strict=True):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += _activation(0.0 if pooled else dropout, pooled)
    return nn.Sequential(*layers, nn.Flatten(), *_dropout(classifier_dropout), nn.Linear(widths[-1] * side**2, classes))


def resnet18(
    classes: int = 10, channels: int = 3, size: int = 32, width: float = 1.0, dropout: float = 0.0
) -> nn.Sequential:
    """Pre-activation ResNet-18 for small images (He et al., 2016): 3x3 stem, stages of 2 blocks, 64 to 512 channels.

    Args:
        classes: number of classes K; the output is logits ``[N, K]``.
        channels: input channels.
        size: height and width of the input in pixels, at least 8.
        width: factor on the number of channels of every layer.
        dropout: rate of the dropout between the two convolutions of every block; 0 leaves it out.

    Raises:
        ValueError: the input is too small for three strides of 2, or the width leaves a layer without channels.
    """
    if size < 8:
        raise ValueError(f"ResNet-18 needs inputs of at least 8x8 pixels, got {size}x{size}")
    widths = [_scaled(64, width), *(_scaled(outputs, width) for outputs in (64, 128, 256, 512))]
    blocks: list[nn.Module] = []
    for stage, (inputs, outputs) in enumerate(pairwise(widths)):
        blocks.append(PreActivationBlock(inputs, outputs, stride=2 if stage else 1, dropout=dropout))
        blocks.append(PreActivationBlock(outputs, outputs, stride=1, dropout=dropout))
    return nn.Sequential(
        nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), *blocks,
        nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(widths[-1], classes),
    )  # fmt: skip


class PreActivationBlock(nn.Module):
    """A residual block that normalises before each of its two 3x3 convolutions.

    Where the shape changes, the shortcut is a 1x1 convolution of the first activation.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Sequential(*_dropout(dropout))
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C_in, H, W]`` to ``[N, C_out, H / stride, W / stride]``."""
        activated = self.bn1(x).relu_()
        residual = self.conv2(self.dropout(self.bn2(self.conv1(activated)).relu_()))
        output: Tensor = residual + (x if self.shortcut is None else self.shortcut(activated))
        return output


NETWORKS: dict[str, Callable[..., nn.Module]] = {"lenet5": lenet5, "vgg11": vgg11, "resnet18": resnet18}


def arguments_for(images: Images) -> dict[str, Any]:
    """What every network is built with for these images: number of classes, channels and size.

    Raises:
        ValueError: they are not square.
    """
    channels, height, width = images.shape
    if height != width:
        raise ValueError(f"{images.name} has images of {height}x{width} pixels; the networks take square ones")
    return {"classes": len(images.classes), "channels": channels, "size": height}


def build(name: str, **arguments: object) -> nn.Module:
    """The network with this name, in channels-last layout (faster convolutions).

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; there are {', '.join(NETWORKS)}")
    known = inspect.signature(NETWORKS[name]).parameters
    if unknown := [argument for argument in arguments if argument not in known]:
        raise ValueError(f"{name} has no argument {unknown[0]}; it has {', '.join(known)}")
    model: nn.Module = NETWORKS[name](**arguments).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _activation(dropout: float, pooled: bool = False) -> list[nn.Module]:
    """ReLU, dropout and max-pooling. ReLU commutes with the other two, and is cheapest on what pooling leaves."""
    return [*_dropout(dropout), *([nn.MaxPool2d(2)] if pooled else []), nn.ReLU(inplace=True)]


def _dropout(rate: float) -> list[nn.Module]:
    return [nn.Dropout(rate)] if rate else []


def _scaled(channels: int, width: float) -> int:
    if not 0 < width < math.inf:
        raise ValueError(f"the width factor must be a positive number, got {width}")
    scaled = round(channels * width)
    if scaled < 1:
        raise ValueError(f"a width factor of {width} leaves a layer without channels; use a larger one")
    return scaled
