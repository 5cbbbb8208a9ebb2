"""Run several draws of few examples in one pass, each example normalised by the statistics of its draw.

The batch norm gets the statistics 0 and 1, with which it divides by sqrt(1 + eps). Its input is shifted and scaled
before, row by row, for the statistics of draw s: (x - m_s) sqrt((1 + eps) / (v_s + eps)).

Applies to: networks whose examples are proven not to affect each other. Every batch norm has the examples on the first
axis, and does nothing with its input but normalise it. Error: rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stochbn.execution.follow import Followed
from stochbn.network.layers import buffer_names
from stochbn.network.replica import Replica

__all__ = ["Stack", "applies"]


def applies(replica: Replica, followed: Followed, *, cpu: bool, autocast: bool) -> str:
    """The reason not to try this way; empty if there is none."""
    if not cpu:
        return "it is for CPUs"
    if any(p.is_floating_point() and p.dtype.itemsize < 4 for p in replica.model.parameters()):
        return "in half precision it would round more than slow passes do"
    if autocast:
        return "autocast would round what is shifted and scaled"
    return followed.irregular


class Stack:
    """Hooks that normalise each row of a pass by the statistics of its draw.

    Args:
        replica: the network.
        norms: the number of rows of an example in the input of each batch norm, by name.
    """

    def __init__(self, replica: Replica, norms: Mapping[str, int]) -> None:
        self._replica = replica
        self._norms = {name: per for name, per in norms.items() if name in replica.norms}
        self._scales: dict[nn.Module, tuple[Tensor, Tensor, int]] = {}
        self._neutral: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __call__(self, draws: Sequence[Mapping[str, Tensor]], examples: int) -> None:
        """Prepare the next pass for these draws, with this many examples each."""
        self._scales.clear()
        for name, per in self._norms.items():
            layer = self._replica.norms[name]
            mean_name, variance_name = buffer_names(name)
            if mean_name not in draws[0]:
                continue
            means, variances = (torch.stack([draw[key] for draw in draws]) for key in (mean_name, variance_name))
            means, variances = means.to(layer.running_mean), variances.to(layer.running_var)
            scale = ((1 + layer.eps) / (variances + layer.eps)).sqrt()
            self._scales[layer] = scale, -means * scale, examples * per
            if mean_name not in self._neutral:
                self._neutral |= {mean_name: torch.zeros_like(means[0]), variance_name: torch.ones_like(means[0])}
                self._handles.append(layer.register_forward_pre_hook(self._exchange))
        self._replica.statistics(self._neutral)

    def _exchange(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if layer not in self._scales:
            return None
        scale, shift, rows = self._scales[layer]
        x, *others = args
        if len(x) != len(scale) * rows or x.shape[1] != scale.shape[1]:
            raise ValueError("a batch norm whose input is not [N, C, ...] for the network's N examples")
        shape = (len(scale), 1, -1) + (1,) * (x.ndim - 2)
        drawn = x.view(len(scale), rows, *x.shape[1:]) if x.is_contiguous() else x.unflatten(0, (len(scale), rows))
        return torch.addcmul(shift.view(shape), drawn, scale.view(shape)).flatten(0, 1).to(x.dtype), *others

    def pause(self) -> None:
        """Disable the hooks for the next passes."""
        self._scales.clear()

    def remove(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()
