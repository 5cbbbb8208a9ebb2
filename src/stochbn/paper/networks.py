"""The networks of the paper's experiments (Atanov et al., 2018, section 5)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

__all__ = ["NETWORKS", "build", "lenet5"]


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

    def activation() -> list[nn.Module]:
        return [nn.ReLU(inplace=True), *([nn.Dropout(dropout)] if dropout else [])]

    return nn.Sequential(
        nn.Conv2d(channels, 20, 5), nn.BatchNorm2d(20), *activation(), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5), nn.BatchNorm2d(50), *activation(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(50 * side**2, 500), nn.BatchNorm1d(500), *activation(),
        nn.Linear(500, classes),
    )  # fmt: skip


NETWORKS: dict[str, Callable[..., nn.Module]] = {"lenet5": lenet5}


def build(name: str, **arguments: object) -> nn.Module:
    """The network with this name, in channels-last layout (faster convolutions).

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; there are {', '.join(NETWORKS)}")
    model: nn.Module = NETWORKS[name](**arguments).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
