"""Cached results about a network, which hold until it changes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stochbn.network.snapshot import Snapshot, Surroundings

__all__ = ["Knowledge"]


KEPT = 64
"""The largest number of cached entries for a network."""


class Knowledge:
    """Cached results about a network, which hold until it changes.

    Attributes:
        in_place: why passes must run on the user's own object; empty if they need not.
        stateful: whether passes change the replica, so that each needs its own.
        caches: whether the first pass on a replica fills caches that depend on parameters and buffers alone, so that
            each call needs its own replica.
        state: the names of parameters that passes write to, or may; replicas have copies of them.
        parameters: the network's parameters.
        buffers: the network's buffers, except those of batch norms.
    """

    def __init__(self, snapshot: Snapshot, model: nn.Module | None = None) -> None:
        self.in_place = ""
        self.stateful = bool(snapshot.opaque)  # it is unknown whether passes change it
        self.caches = False
        self.state: frozenset[str] = frozenset()
        self.parameters = snapshot.parameters
        modules = [] if model is None else list(model.modules())
        buffers = [(module, b) for module in modules for b in module._buffers.values() if b is not None]
        self.buffers = [buffer for module, buffer in buffers if not isinstance(module, _BatchNorm)]
        self._buffers = {id(buffer) for _, buffer in buffers}
        self._snapshot, self._versions = snapshot, snapshot.versions(without=self._buffers)
        self._surroundings = Surroundings(model, snapshot)
        self._kept: dict[Hashable, Any] = {}

    def is_of(self, model: nn.Module) -> bool:
        """Whether the results still hold for this state of the network and of its surroundings."""
        known = self._snapshot
        same = known.of_this(model) and known.versions(without=self._buffers) == self._versions
        return same and self._surroundings.same()

    def settle(self) -> None:
        """Record that passes were made, which may also write outside of the network."""
        self._surroundings.settle()

    def get(self, key: Hashable) -> Any:
        """The value for a key; None if there is none."""
        return self._kept.get(key)

    def keep(self, key: Hashable, value: Any) -> None:
        """Store a value, and drop the oldest if there are too many."""
        self._kept[key] = value
        for old in list(self._kept)[:-KEPT]:
            self._kept.pop(old, None)
