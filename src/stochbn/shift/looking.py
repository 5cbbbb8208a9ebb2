"""Passes in evaluation mode that see the rows of every example in every batch norm, and may move its statistics."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

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
        yield Looker(replica)


class Looker(TorchFunctionMode):
    """Sends mini-batches through a network in evaluation mode and returns the rows that its batch norms see.

    Rows are the means over the places of an example of the standardised activations, and of their squares. They are
    standardised by the layer's own running statistics, whatever it goes on with. They are taken from the input of
    ``batch_norm`` itself, whatever a layer does before and after, so that channels are on axis 1.

    Args:
        replica: the network to run.

    Attributes:
        unusable: layers without rows, and why: they are called more than once in a pass, or do not have an example on
            each position of their first axis. Layers that do not call ``batch_norm`` are not seen at all.
    """

    def __init__(self, replica: Replica) -> None:
        super().__init__()
        self.unusable: dict[str, str] = {}
        self._replica = replica
        self._rule: Rule | None = None
        self._rows: dict[str, Tensor] = {}
        self._count = 0
        replica.modes(frozenset())
        replica.statistics({})
        self._own = {name: _moments(layer) for name, layer in replica.norms.items()}
        self._names = {id(layer.running_mean): name for name, layer in replica.norms.items()}

    @without_gradients
    def __call__(self, inputs: NetworkInput, rule: Rule | None = None) -> tuple[dict[str, Tensor], Any]:
        """The rows ``[N, 2C]`` of a mini-batch, float32, in every usable layer that was called; and the output.

        Args:
            inputs: the mini-batch.
            rule: what each layer goes on with.
        """
        self._rows, self._rule, self._count = {}, rule, len(inputs)
        with Masks(0), self:
            output = inputs.call(self._replica.model)
        return {name: rows for name, rows in self._rows.items() if name not in self.unusable}, output

    def moved(self, name: str, standardised: Tensor) -> Tensor:
        """``[2, C]``: a mean and variance in the units of a layer's activations, from standardised ones."""
        mean, scale, _ = self._own[name]
        return torch.stack([mean + scale * standardised[0], scale.square() * standardised[1]])

    def running(self, name: str) -> Tensor:
        """``[2, C]``, float32: a layer's running statistics."""
        return torch.stack([part.detach().cpu().float() for part in running_statistics(self._replica.norms[name])])

    def source(self, name: str) -> Tensor:
        """``[2, C]``: a layer's own statistics, standardised by themselves."""
        _, _, variance = self._own[name]
        return torch.stack([torch.zeros_like(variance), variance])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "batch_norm":
            return func(*args, **kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        name = next((self._names[id(tensor)] for tensor in tensors if id(tensor) in self._names), None)
        found = None if name is None else self._seen(name, tensors[0])
        if name is None or found is None:
            return func(*args, **kwargs)
        mean, variance = running_statistics(self._replica.norms[name])
        moved = dict(zip((id(mean), id(variance)), self.moved(name, found), strict=True))

        def exchanged(value: Any) -> Any:
            return moved[id(value)].to(mean.device, mean.dtype) if id(value) in moved else value

        return func(*map(exchanged, args), **{key: exchanged(value) for key, value in kwargs.items()})

    def _seen(self, name: str, x: Tensor) -> Tensor | None:
        """Note the rows of a layer's input, and ask what it is to go on with."""
        if name in self.unusable:
            return None
        if x.ndim < 2 or x.shape[0] != self._count or not x.numel():
            self.unusable[name] = "it does not see an example on each position of its first axis"
        elif name in self._rows:
            self.unusable[name] = "it is called more than once in a pass"
        else:
            with torch.autocast("cpu", enabled=False):
                self._rows[name] = rows = self._of(name, x)
                return self._rule(name, rows) if self._rule is not None else None
        return None

    def _of(self, name: str, x: Tensor) -> Tensor:
        mean, scale, _ = self._own[name]
        places = list(range(2, x.ndim))
        left = x.detach().float() - mean.to(x.device).view(-1, *[1] * len(places))
        first = left.mean(places) if places else left.clone()
        left.square_()
        second = left.mean(places) if places else left
        return torch.cat([first.cpu() / scale, second.cpu() / scale.square()], 1)


def _moments(layer: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Running mean, the root of running variance and epsilon, and their share of it, each ``[C]`` in float32."""
    mean, variance = (part.detach().cpu().float() for part in running_statistics(layer))
    scale = (variance + layer.eps).sqrt()
    return mean, scale, variance / scale.square()
