"""Convolutions with their weights in channels-last layout, in which a CPU is faster.

Applies to: networks with two-dimensional convolutions whose Python code does not look at the layout of tensors. Error:
rounding, as sums may be taken in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stochbn.execution.follow import Followed
from stochbn.network.replica import Replica

__all__ = ["applies", "channels_last_weights"]


def applies(replica: Replica, followed: Followed, *, cpu: bool) -> str:
    """Why the way must not be tried; empty if it may."""
    if not cpu:
        return "it is for CPUs"
    if not _convolutions(replica):
        return "there are no two-dimensional convolutions in another layout"
    return "the network's code looks at the layout of tensors" if followed.reads_layout else ""


def channels_last_weights(replica: Replica) -> dict[str, Tensor]:
    """Copies in channels-last layout, by their names, of the weights of convolutions that are not in it.

    Each call makes them anew: nothing tells of every write to a weight, such as by ``.data``.
    """
    own = _convolutions(replica)
    return {name: weight.detach().clone(memory_format=torch.channels_last) for name, weight in own.items()}


def _convolutions(replica: Replica) -> dict[str, Tensor]:
    """The weights, by their names, of two-dimensional convolutions that are in another layout."""
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
