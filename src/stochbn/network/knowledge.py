"""What has been found out about a network since it was last changed."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stochbn.network.snapshot import Snapshot, Surroundings

__all__ = ["Knowledge"]


KEPT = 64
"""Entries that are kept of one network at most."""


class Knowledge:
    """What has been found out about a network since it was last changed.

    Attributes:
        in_place: why passes must run on the user's own object; empty if they need not.
        stateful: passes change the replica, so each gets one of its own.
        caches: the first pass on a replica keeps what depends on parameters and buffers alone, so each call gets a
            replica of its own.
        state: names of parameters that passes write to, or may: replicas have copies of them.
        parameters: the network's.
        buffers: the network's, but those of batch norms.
    """

    def __init__(self, snapshot: Snapshot, model: nn.Module | None = None) -> None:
        self.in_place = ""
        self.stateful = bool(snapshot.opaque)  # whether passes change it could not be told
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
        """Whether it is of a network in this state, with code that reads the same outside of it."""
        known = self._snapshot
        same = known.of_this(model) and known.versions(without=self._buffers) == self._versions
        return same and self._surroundings.same()

    def settle(self) -> None:
        """Note that passes have been made, which may write outside of the network too."""
        self._surroundings.settle()

    def get(self, key: Hashable) -> Any:
        """What is kept under a key; None if nothing is."""
        return self._kept.get(key)

    def keep(self, key: Hashable, value: Any) -> None:
        """Keep something, and forget the oldest of too many."""
        self._kept[key] = value
        for old in list(self._kept)[:-KEPT]:
            self._kept.pop(old, None)
