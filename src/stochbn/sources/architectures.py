"""The networks of the paper's experiments (Atanov et al., 2018, section 5)."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stochbn.sources.named import Images

__all__ = [
    "NETWORKS",
    "RESNET_BLOCKS",
    "VGG_CONVOLUTIONS",
    "PreActivationBlock",
    "PreActivationBottleneck",
    "arguments_for",
    "batch_norms_of_linear_layers",
    "build",
    "build_with_uniform_scale",
    "lenet5",
    "resnet",
    "resnet18_final_bn",
    "vgg",
]

VGG_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""For each depth, how many convolutions stand before each of the five poolings."""

RESNET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""For each depth, how many blocks each of the four stages has."""


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


def vgg(
    depth: int = 11,
    classes: int = 10,
    channels: int = 3,
    size: int = 32,
    width: float = 1.0,
    dropout: float = 0.0,
    classifier_dropout: float = 0.0,
    bias: bool = True,
) -> nn.Sequential:
    """VGG for small images: 3x3 convolutions with batch norm, five poolings and one linear layer.

    Args:
        depth: 11, 13, 16 or 19, which counts the three linear layers of the original of which one is left.
        classes: number of classes K; the output is logits ``[N, K]``.
        channels: input channels.
        size: height and width of the input in pixels, at least 32.
        width: factor on the number of channels of every layer.
        dropout: rate of the dropout after each ReLU that no pooling follows; 0 leaves it out.
        classifier_dropout: rate of the dropout before the linear layer; 0 leaves it out.
        bias: whether convolutions have biases, as published; batch norm takes them out again.

    Raises:
        ValueError: the input is too small for five 2x2 poolings, or the width leaves a layer without channels.
    """
    side = size // 32
    if side < 1:
        raise ValueError(f"VGG-{depth} needs inputs of at least 32x32 pixels, got {size}x{size}")
    plan = [
        (outputs, i == count - 1)
        for outputs, count in zip((64, 128, 256, 512, 512), VGG_CONVOLUTIONS[depth], strict=True)
        for i in range(count)
    ]
    widths = [channels, *(_scaled(outputs, width) for outputs, _ in plan)]
    layers: list[nn.Module] = []
    for (inputs, outputs), (_, pooled) in zip(pairwise(widths), plan, strict=True):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias), nn.BatchNorm2d(outputs)]
        layers += _activation(0.0 if pooled else dropout, pooled)
    return nn.Sequential(*layers, nn.Flatten(), *_dropout(classifier_dropout), nn.Linear(widths[-1] * side**2, classes))


def resnet(
    depth: int = 18,
    classes: int = 10,
    channels: int = 3,
    size: int = 32,
    width: float = 1.0,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Pre-activation ResNet for small images (He et al., 2016) as published: no batch norm before the pooling.

    A 3x3 stem convolution with batch norm and ReLU, four stages of 64 to 512 channels (four times as many behind
    bottleneck blocks, from depth 50 on), average pooling and a linear layer.

    Args:
        depth: 18, 34, 50, 101 or 152.
        classes: number of classes K; the output is logits ``[N, K]``.
        channels: input channels.
        size: height and width of the input in pixels, at least 8.
        width: factor on the number of channels of every layer.
        dropout: rate of the dropout before the last convolution of every block; 0 leaves it out.

    Raises:
        ValueError: the input is too small for three strides of 2, or the width leaves a layer without channels.
    """
    stem, blocks, outputs = _resnet_trunk(depth, channels, size, width, dropout)
    return nn.Sequential(
        stem, nn.BatchNorm2d(stem.out_channels), nn.ReLU(inplace=True), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(outputs, classes),
    )  # fmt: skip


def resnet18_final_bn(
    classes: int = 10, channels: int = 3, size: int = 32, width: float = 1.0, dropout: float = 0.0
) -> nn.Sequential:
    """Pre-activation ResNet-18 as He et al. (2016) have it, not as published: batch norm and ReLU before the pooling.

    Nothing stands between the stem convolution and the first block. The arguments are those of `resnet`.

    Raises:
        ValueError: as `resnet`.
    """
    stem, blocks, outputs = _resnet_trunk(18, channels, size, width, dropout)
    return nn.Sequential(
        stem, *blocks, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(outputs, classes),
    )  # fmt: skip


class PreActivationBlock(nn.Module):
    """A residual block that normalises before each of its two 3x3 convolutions.

    Where the shape changes, the shortcut is a 1x1 convolution of the first activation.
    """

    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Sequential(*_dropout(dropout))
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = _shortcut(inputs, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C_in, H, W]`` to ``[N, C_out, H / stride, W / stride]``."""
        activated = self.bn1(x).relu_()
        residual = self.conv2(self.dropout(self.bn2(self.conv1(activated)).relu_()))
        output: Tensor = residual + (x if self.shortcut is None else self.shortcut(activated))
        return output


class PreActivationBottleneck(nn.Module):
    """A residual block of a 1x1, a 3x3 and a 1x1 convolution, each behind batch norm and ReLU; the last widens by 4.

    Where the shape changes, the shortcut is a 1x1 convolution of the first activation.
    """

    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        outputs = self.expansion * channels
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.dropout = nn.Sequential(*_dropout(dropout))
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C_in, H, W]`` to ``[N, 4 C, H / stride, W / stride]``."""
        activated = self.bn1(x).relu_()
        hidden = self.conv2(self.bn2(self.conv1(activated)).relu_())
        residual = self.conv3(self.dropout(self.bn3(hidden).relu_()))
        output: Tensor = residual + (x if self.shortcut is None else self.shortcut(activated))
        return output


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": lenet5,
    **{f"vgg{depth}": functools.partial(vgg, depth) for depth in VGG_CONVOLUTIONS},
    **{f"resnet{depth}": functools.partial(resnet, depth) for depth in RESNET_BLOCKS},
    "resnet18-final-bn": resnet18_final_bn,
}
"""The networks by name."""


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
    """The network with this name and fresh weights, in channels-last layout (faster convolutions).

    Args:
        name: one of `NETWORKS`.
        arguments: of the network's function.

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


def build_with_uniform_scale(name: str, **arguments: object) -> nn.Module:
    """As `build`, with the scale of every batch norm from U(0, 1) in place of 1: as published, and as PyTorch in 2018.

    Convolutions and linear layers need nothing of the kind: they are drawn today as they were then.

    Raises:
        ValueError: as `build`.
    """
    model = build(name, **arguments)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight)
    return model


def batch_norms_of_linear_layers(model: nn.Module) -> list[str]:
    """The names of the batch norms that normalise vectors, not images: they stand behind linear layers."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm1d)]


def _resnet_trunk(
    depth: int, channels: int, size: int, width: float, dropout: float
) -> tuple[nn.Conv2d, list[nn.Module], int]:
    """The stem convolution, the blocks, and how many channels come out of them."""
    if size < 8:
        raise ValueError(f"ResNet-{depth} needs inputs of at least 8x8 pixels, got {size}x{size}")
    block = PreActivationBlock if depth < 50 else PreActivationBottleneck
    first = inputs = _scaled(64, width)
    blocks: list[nn.Module] = []
    for stage, (channels_inside, count) in enumerate(zip((64, 128, 256, 512), RESNET_BLOCKS[depth], strict=True)):
        scaled = _scaled(channels_inside, width)
        for i in range(count):
            blocks.append(block(inputs, scaled, stride=2 if stage and not i else 1, dropout=dropout))
            inputs = block.expansion * scaled
    return nn.Conv2d(channels, first, 3, padding=1, bias=False), blocks, inputs


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    return None if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


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
