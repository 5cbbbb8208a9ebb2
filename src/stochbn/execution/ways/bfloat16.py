"""Run all layers except the last in bfloat16, if the processor has instructions for it.

Applies to: networks in float32 with enough weights, whose examples are proven not to affect each other. Error: rounding
to 8 bits, which is not small. So every call repeats a draw of some of its examples in the network's own type. It
continues in bfloat16 only if the squared errors are small compared with the variance of the mean.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from stochbn.execution.follow import Followed
from stochbn.execution.watch import MULTIPLYING
from stochbn.network.calling import NetworkInput
from stochbn.network.replica import Replica

__all__ = ["Head", "applies", "low_weights", "matters", "probe_examples", "rounded"]

SHARE = 20
"""The check may take at most one in this many passes."""
FEW, ENOUGH = 16, 64
"""The check takes a sixth of the examples, but at least `FEW` and at most `ENOUGH`. Each costs up to four draws."""


def applies(
    replica: Replica, followed: Followed, *, cpu: bool, autocast: bool, weights: int, supported: bool | None
) -> str:
    """The reason not to try this way; empty if there is none.

    Args:
        replica: the network.
        followed: the result of tracing a pass.
        cpu: whether the inputs are on a CPU.
        autocast: whether the call is within autocast.
        weights: the smallest number of weights for which it saves time.
        supported: whether the processor has the instructions; None detects it.
    """
    if not cpu:
        return "it is for CPUs"
    if not (_supported() if supported is None else supported):
        return "this processor has no instructions for it"
    layers = [m for m in replica.modules.values() if isinstance(m, MULTIPLYING)]
    if autocast or any(m.weight.dtype != torch.float32 for m in layers):
        return "the network does not run in float32"
    if sum(m.weight.numel() for m in layers) < weights:
        return f"fewer than {weights} weights"
    return "" if followed.last else "no layer makes the logits"


def low_weights(replica: Replica, head: str) -> dict[str, Tensor]:
    """The weights of all layers except `head` in bfloat16, those of convolutions in channels-last layout.

    Each call makes them again, like those in channels-last layout.
    """
    weights = {}
    for prefix, module in replica.modules.items():
        if not isinstance(module, MULTIPLYING) or prefix == head:
            continue
        for name, value in module._parameters.items():
            if value is not None:
                planes = isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and value.ndim == 4
                layout = torch.channels_last if planes else torch.contiguous_format
                key = f"{prefix}.{name}" if prefix else name
                weights[key] = value.detach().to(torch.bfloat16, memory_format=layout)
    return weights


def rounded(inputs: NetworkInput) -> NetworkInput:
    """The inputs with float32 tensors in bfloat16."""
    return inputs.map(lambda t: t.bfloat16() if t.dtype == torch.float32 else t)


class Head:
    """A hook that gives the layer of the logits its input in float32."""

    def __init__(self, replica: Replica, name: str) -> None:
        self._handle = replica.modules[name].register_forward_pre_hook(lambda _, args: tuple(map(_full, args)))

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()


def probe_examples(examples: int, draws: int) -> Tensor | None:
    """The examples whose draw is repeated: at most a twentieth of the passes; None if there are too few."""
    count = min(examples * draws // SHARE, max(examples // 6, FEW), ENOUGH)
    return torch.linspace(0, examples - 1, count).round().long() if count >= 4 else None


def matters(low: Tensor, full: Tensor, probe: Tensor, averaged: int) -> bool:
    """Whether rounding changes averages by more than a quarter of the variance of a mean over draws.

    Args:
        low: the values to average, of S draws of N examples, with rounding, ``[S, N, ...]``.
        full: the values of the first draw of some of the examples, without rounding, ``[n, ...]``.
        probe: the positions of these examples, ``[n]``.
        averaged: the number of independent draws whose accuracy is wanted.
    """
    error = (low[0, probe] - full).square().sum() / len(full)
    variance = low.var(0).sum() / low.shape[1]
    if len(low) == 2:  # with opposite noise, whose distances are twice those of independent draws
        variance = variance / 2
    return not bool(error <= variance / (4 * averaged))


@functools.cache
def _supported() -> bool:
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(supported is not None and supported() for supported in asked)


def _full(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
