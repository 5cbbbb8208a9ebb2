"""Passes in evaluation mode that see the rows of every example in every batch norm, and may move its statistics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from stochbn.execution.masks import Masks
from stochbn.network.calling import NetworkInput
from stochbn.network.layers import running_statistics
from stochbn.network.replica import Network, Replica
from stochbn.undisturbed import scope, without_gradients

__all__ = ["Looker", "looking"]

Rule = Callable[[str, Tensor], Tensor | None]
"""From a layer's name and the rows ``[N, 2C]`` of a mini-batch: the standardised mean and variance ``[2, C]`` to go on
with, or None for the layer's own."""


@scope
def looking(network: Network) -> Generator[Looker, None, None]:
    """Something that sends mini-batches through a copy of a network, or the network itself where it has no copy."""
    with network.copied() as replica:
        looker = Looker(replica)
        try:
            yield looker
        finally:
            looker.close()


class Looker:
    """Sends mini-batches through a network in evaluation mode and returns the rows that its batch norms see.

    Rows are the means over the places of an example of the standardised activations, and of their squares. They are
    standardised by the layer's own running statistics, whatever it goes on with.

    Args:
        replica: the network to run, which is changed.

    Attributes:
        unusable: layers without rows, and why: they are called more than once in a pass, or do not have an example on
            each position of their first axis.
    """

    def __init__(self, replica: Replica) -> None:
        self.unusable: dict[str, str] = {}
        self._replica = replica
        self._rule: Rule | None = None
        self._rows: dict[str, Tensor] = {}
        self._count = 0
        replica.modes(frozenset())
        self._own = {name: _moments(layer) for name, layer in replica.norms.items()}
        self._handles = [
            layer.register_forward_pre_hook(functools.partial(self._seen, name), with_kwargs=True)
            for name, layer in replica.norms.items()
        ]

    @without_gradients
    def __call__(self, inputs: NetworkInput, rule: Rule | None = None) -> tuple[dict[str, Tensor], Any]:
        """The rows ``[N, 2C]`` of a mini-batch, float32, in every usable layer that was called; and the output.

        Args:
            inputs: the mini-batch.
            rule: what each layer goes on with.
        """
        self._rows, self._rule, self._count = {}, rule, len(inputs)
        self._replica.statistics({})
        with Masks(0):
            output = inputs.call(self._replica.model)
        self._replica.statistics({})
        return {name: rows for name, rows in self._rows.items() if name not in self.unusable}, output

    def close(self) -> None:
        """Take the hooks away, and put the network's own statistics back."""
        for handle in self._handles:
            handle.remove()
        self._replica.restore()

    def moved(self, name: str, standardised: Tensor) -> Tensor:
        """``[2, C]``: a mean and variance in the units of a layer's activations, from standardised ones."""
        mean, scale, _ = self._own[name]
        return torch.stack([mean + scale * standardised[0], scale.square() * standardised[1]])

    def source(self, name: str) -> Tensor:
        """``[2, C]``: a layer's own statistics, standardised by themselves."""
        _, _, variance = self._own[name]
        return torch.stack([torch.zeros_like(variance), variance])

    def _seen(self, name: str, layer: _BatchNorm, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if name in self.unusable:
            return
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None or x.ndim < 2 or x.shape[0] != self._count or x.shape[1] != layer.num_features or not x.numel():
            self.unusable[name] = "it does not see examples on its first axis and channels on its second"
        elif name in self._rows:
            self.unusable[name] = "it is called more than once in a pass"
        else:
            self._rows[name] = rows = self._of(name, x)
            found = self._rule(name, rows) if self._rule is not None else None
            if found is not None:
                for key, value in zip(("running_mean", "running_var"), self.moved(name, found), strict=True):
                    own = layer._buffers[key]
                    assert own is not None
                    layer._buffers[key] = value.to(own.device, own.dtype)

    def _of(self, name: str, x: Tensor) -> Tensor:
        mean, scale, _ = self._own[name]
        flat = x.detach().flatten(2) if x.ndim > 2 else x.detach()[..., None]
        variance, own = torch.var_mean(flat.float(), 2, correction=0)
        first = (own.cpu() - mean) / scale
        return torch.cat([first, variance.cpu() / scale.square() + first.square()], 1)


def _moments(layer: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Running mean, the root of running variance and epsilon, and their share of it, each ``[C]`` in float32."""
    mean, variance = (part.detach().cpu().float() for part in running_statistics(layer))
    scale = (variance + layer.eps).sqrt()
    return mean, scale, variance / scale.square()
