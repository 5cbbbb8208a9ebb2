"""Which modules of a network are batch norms, and what they are called."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["batch_norms", "buffer_names", "running_statistics", "unwrap"]


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch-norm layers of a network, by their qualified names, in registration order.

    ``BatchNorm1d``, ``2d``, ``3d``, ``SyncBatchNorm`` and every subclass of them count. A layer
    that is registered under several names is listed once, under the first.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the network has no batch norm, or one without running statistics.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module as the network, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("got a scripted or traced network, whose buffers cannot be exchanged; pass the original module")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no batch-norm layers, so there are no statistics to draw; "
            "stochbn needs a network with BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm or a subclass"
        )
    for name, layer in layers.items():
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError(
                f"batch-norm layer {name!r} keeps no running statistics (track_running_stats=False), so its "
                "predictions depend on the batch they are made in; train it with track_running_stats=True"
            )
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
            raise ValueError(f"batch-norm layer {name!r} is lazy and not initialised; run the network once first")
    return layers


def running_statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The running mean and running variance of a layer that `batch_norms` returned, each ``[C]``."""
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    return mean, var


def buffer_names(layer: str) -> tuple[str, str]:
    """The qualified names of a layer's running mean and running variance."""
    prefix = f"{layer}." if layer else ""
    return f"{prefix}running_mean", f"{prefix}running_var"


def unwrap(model: nn.Module) -> nn.Module:
    """TEMPORARY."""
    while type(model).__name__ in ("OptimizedModule", "DataParallel", "DistributedDataParallel", "AveragedModel"):
        model = model._orig_mod if type(model).__name__ == "OptimizedModule" else model.module
    return model
