"""Copy a network, sharing its parameters and nothing else."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stochbn.network.layers import unwrap
from stochbn.network.snapshot import Snapshot

__all__ = ["copied_with", "put_in_training"]

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


def put_in_training(model: nn.Module) -> bool:
    """Whether its ``train()``, which may be overridden, could be called."""
    try:
        model.train()
    except Exception:
        return False
    return True


def copied_with(
    model: nn.Module, own: Iterable[str], generators: dict[int, Any]
) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Make a deep copy whose parameters share the storage of the network's, except those in `own`.

    Args:
        model: the network.
        own: the names of parameters that are copied.
        generators: copies of the network's own random generators, by the identity of the originals. They are used, and
            missing ones are added, so that copies with the same mapping draw one sequence.

    Returns:
        The copy, and pairs of each of its tensors with the original. Registered parameters have no pairs; parameters
        that are not registered, as in plain lists of modules, have.

    Raises:
        Exception: the network, or a part of it, cannot be copied.
    """
    own = set(own)
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in memo:
            continue
        data = parameter.detach()
        if type(parameter) is nn.Parameter:
            learns = parameter.requires_grad and not parameter.is_inference()
            shared = nn.Parameter(data.clone() if name in own else data, requires_grad=learns)
        else:
            shared = parameter if name not in own else copy.deepcopy(parameter)
        vars(shared).update(vars(parameter))
        memo[id(parameter)] = shared
    snapshot = Snapshot.of(model)
    unregistered = [parameter for parameter in snapshot.parameters if id(parameter) not in memo]
    for parameter in unregistered:
        memo[id(parameter)] = copy.deepcopy(parameter)
    tensors = [*snapshot.tensors, *unregistered]
    for leaf in snapshot.leaves:
        if isinstance(leaf, GENERATORS):
            generators.setdefault(id(leaf), copy.deepcopy(leaf))
    memo.update(generators)
    for tensor in tensors:
        memo.setdefault(id(tensor), tensor.detach().clone())
    for module in model.modules():
        if isinstance(module, nn.Module) and type(module).__name__ == "OptimizedModule":
            memo[id(module)] = copy.deepcopy(unwrap(module), memo)
    with torch.no_grad():
        twin = copy.deepcopy(model, memo)
    if not set(map(id, twin.modules())).isdisjoint(map(id, model.modules())):
        raise ValueError("a part of it gives itself for a copy")
    return twin, [(memo[id(tensor)], tensor) for tensor in tensors]
