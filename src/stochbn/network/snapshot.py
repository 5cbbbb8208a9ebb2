"""What a network consists of, to tell whether it has been changed."""

from __future__ import annotations

import functools
import operator
import types
from collections import deque
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Snapshot"]

_ATOMS = {
    bool, int, float, complex, str, bytes, type(None), type, types.FunctionType, types.BuiltinFunctionType,
    types.MethodType, types.ModuleType, torch.dtype, torch.device, torch.Size, torch.Generator, torch.memory_format,
    torch.layout, slice, range, type(Ellipsis), type(NotImplemented), np.dtype,
}  # fmt: skip


class Snapshot(NamedTuple):
    """All that a network consists of, down to numbers, tensors and functions, in a fixed order.

    Two snapshots of one network with the same objects in the same places mean that nothing was assigned in between.

    Attributes:
        leaves: everything.
        parameters: the parameters among it.
        tensors: all other tensors.
        opaque: what cannot be looked into, such as arrays of NumPy and objects with slots.
    """

    leaves: list[Any]
    parameters: list[nn.Parameter]
    tensors: list[Tensor]
    opaque: list[Any]

    @classmethod
    def of(cls, root: nn.Module, *, inside: bool = True) -> Snapshot:
        """The snapshot of a network.

        Args:
            root: the network.
            inside: also what the modules in it consist of.
        """
        leaves, parameters, tensors, opaque = snapshot = cls([], [], [], [])
        seen = {id(root)}
        waiting: list[Any] = [vars(root)]
        while waiting:
            container = waiting.pop()
            if isinstance(container, dict):
                leaves.extend(container)
                values: Iterable[Any] = container.values()
            else:
                values = container
            for value in values:
                kind = type(value)
                if kind in _ATOMS or getattr(kind, "ABOUT_A_NETWORK", False) or isinstance(value, np.generic):
                    leaves.append(value)
                elif kind is nn.Parameter or kind is Tensor or isinstance(value, Tensor):
                    leaves.append(value)
                    if id(value) not in seen:
                        seen.add(id(value))
                        if isinstance(value, nn.Parameter):
                            parameters.append(value)
                        else:
                            tensors.append(value)
                elif isinstance(value, (dict, list, tuple, set, frozenset, deque)):
                    leaves.append(kind)
                    if value and id(value) not in seen:
                        seen.add(id(value))
                        waiting.append(value)
                else:
                    leaves += kind, value
                    if id(value) in seen or (not inside and isinstance(value, nn.Module)):
                        continue
                    seen.add(id(value))
                    if isinstance(value, functools.partial):
                        waiting.append((value.func, value.args, value.keywords))
                    elif hasattr(value, "__dict__"):
                        waiting.append(vars(value))
                    else:
                        opaque.append(value)
        return snapshot

    def same(self, other: Snapshot) -> bool:
        """Whether both have the same objects in the same places."""
        return len(self.leaves) == len(other.leaves) and all(map(operator.is_, self.leaves, other.leaves))

    def versions(self, without: Collection[int] = ()) -> list[int]:
        """How often each tensor that is no parameter has been written to, but those of some identities."""
        return [t._version for t in self.tensors if id(t) not in without and not t.is_inference()]
