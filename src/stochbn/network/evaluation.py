"""Which modules of a network stay in evaluation mode while it is trained."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from stochbn.network.calling import modes

__all__ = ["kept_in_evaluation"]


def kept_in_evaluation(model: nn.Module) -> set[nn.Module]:
    """The modules that stay in evaluation mode when ``train()`` is called.

    Where a module has a ``train`` of its own, as backbones with frozen batch norms have, it is called on a copy of the
    module, since it may change more than flags. Scripted and traced modules count: their buffers cannot be
    exchanged, so in training mode they would write to the network's own.
    """
    found: set[nn.Module] = set()
    with modes(model, _own_flag):
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                found.add(module)
            elif type(module).train is not nn.Module.train or "train" in vars(module):
                found.update(_kept_by(module))
    return found


def _kept_by(module: nn.Module) -> list[nn.Module]:
    trained: Any
    try:
        trained = copy.deepcopy(module)
        trained.train()
    except Exception:  # what is in a module of a user may refuse to be copied in many ways
        return []
    inside = list(module.modules())
    copies = list(trained.modules())
    if len(inside) != len(copies):
        return []
    return [one for one, other in zip(inside, copies, strict=True) if not other.training]


def _own_flag(module: nn.Module) -> bool:
    return module.training
