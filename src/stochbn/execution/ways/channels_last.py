"""Run convolutions with their weights in channels-last layout, which is faster on a CPU.

Applies to: networks with two-dimensional convolutions whose Python code does not read the layout of tensors. Error:
rounding, because sums may be taken in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stochbn.execution.follow import Followed
from stochbn.network.replica import Replica

__all__ = ["applies", "channels_last_weights"]


def applies(replica: Replica, followed: Followed, *, cpu: bool) -> str:
    """The reason not to try this way; empty if there is none."""
    if not cpu:
        return "it is for CPUs"
    if not _convolutions(replica):
        return "there are no two-dimensional convolutions in another layout"
    return "the network's code looks at the layout of tensors" if followed.reads_layout else ""


def channels_last_weights(replica: Replica) -> dict[str, Tensor]:
    """Copies in channels-last layout of the weights of convolutions in other layouts, by name.

    Each call makes them again, because writes to a weight through ``.data`` cannot be detected.
    """
    own = _convolutions(replica)
    return {name: weight.detach().clone(memory_format=torch.channels_last) for name, weight in own.items()}


def _convolutions(replica: Replica) -> dict[str, Tensor]:
    """The weights of two-dimensional convolutions in other layouts, by name."""
    weights: dict[str, Tensor] = {}
    for name, module in replica.modules.items():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            weight = module._parameters.get("weight")
            # With one channel, is_contiguous() tells no layouts apart, but a convolution goes by the strides.
            if weight is not None and weight.stride() != _strides(weight.shape):
                weights[f"{name}.weight" if name else "weight"] = weight
    return weights


def _strides(shape: torch.Size) -> tuple[int, ...]:
    _, channels, height, width = shape
    return channels * height * width, 1, channels * width, channels
