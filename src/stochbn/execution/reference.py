"""The slow, obvious way to make a pass. Every faster way is checked against it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stochbn.network.calling import NetworkInput
from stochbn.network.replica import Replica
from stochbn.tasks import Task

__all__ = ["reference"]


def reference(replica: Replica, draw: Mapping[str, Tensor], inputs: NetworkInput, task: Task) -> Tensor:
    """Make a pass under one draw; return the raw values ``[N, C, ...]`` that the task reads from the output.

    Raises:
        RuntimeError, ValueError, TypeError: as the network, or the task that reads its output, raises them.
    """
    replica.statistics(draw)
    return task.raw(inputs.call(replica.model, replica.through))
