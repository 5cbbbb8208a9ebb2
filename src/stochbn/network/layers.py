"""Find the batch norms of a network, and their names without wrappers."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "batch_norms", "buffer_names", "listed", "qualified_names", "running_statistics", "undrawable", "unwrap",
    "with_statistics",
]  # fmt: skip

WRAPPED = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "_FabricModule": "_original_module",
}
"""Wrapper classes by name, so that nothing is imported, and the attribute that holds the wrapped module."""

OF_TRAINING = {"data", "dataset", "loader", "dataloader", "train_loader", "epochs", "trainer", "config", "cfg"}
"""Names of the first argument of methods that train."""

AVERAGES = re.compile("EMA|Ema")
"""Names of classes with a moving average of a network as their `module`, such as timm's ModelEmaV3."""


def unwrap(model: nn.Module) -> nn.Module:
    """Remove all wrappers from a network.

    These are ``torch.compile``, ``DataParallel``, ``DistributedDataParallel``, ``AveragedModel`` and other moving
    averages, ``FullyShardedDataParallel``, checkpointing and Lightning Fabric.

    Raises:
        TypeError: `model` is not a module, or one whose ``train()`` trains it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module as the network, got {type(model).__name__}{_inside(model)}")
    while (place := _wrapped(model)) is not None:
        model = model._modules[place]  # type: ignore[assignment]
    if _trains(type(model).train):
        raise TypeError(
            f"the train() of {type(model).__name__} takes no mode and may start a training: it is something around a "
            f"network; pass the network in it{_inside(model)}"
        )
    return model


def _inside(model: object) -> str:
    """Advice on which attribute of a Python object is a network."""
    for name in ("model", "module_", "module", "net", "network"):
        try:
            found = getattr(model, name, None)
        except Exception:  # a property may raise anything
            continue
        if isinstance(found, nn.Module) and found is not model:
            return f", {type(model).__name__}(...).{name}" if isinstance(model, nn.Module) else f"; pass its .{name}"
    return ""


@functools.cache
def _trains(train: Callable[..., Any]) -> bool:
    """Whether the ``train`` of a class trains, as in ultralytics' YOLO, instead of setting a mode."""
    if train is nn.Module.train:
        return False
    try:
        _, *parameters = inspect.signature(train).parameters.values()
    except (TypeError, ValueError):
        return False
    if not parameters or parameters[0].name == "mode" or parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return False
    return not isinstance(parameters[0].default, bool) and (
        len(parameters) > 1 or parameters[0].default is not inspect.Parameter.empty or parameters[0].name in OF_TRAINING
    )


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch-norm layers of a network by name, in registration order.

    ``BatchNorm1d``, ``2d``, ``3d``, ``SyncBatchNorm`` and all their subclasses count. A layer that is registered under
    several names is listed once, under the first. Names are those without wrappers, also for wrapped parts, see
    `qualified_names`. Layers that cannot be drawn are left out, see `undrawable`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the network has no batch norm that can be drawn, or one without running statistics.
    """
    model = unwrap(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("got a scripted or traced network, whose buffers cannot be exchanged; pass the original module")
    layers = {name: m for name, _, m in _walk(model) if isinstance(m, _BatchNorm)}
    if not layers:
        others = "".join(f"; its layer {name!r} cannot be drawn: {why}" for name, why in undrawable(model).items())
        raise ValueError(
            f"{type(model).__name__} has no batch-norm layers, so there are no statistics to draw; "
            f"stochbn needs a network with BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm or a subclass{others}"
            f"{_what_to_do(model)}"
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


def _what_to_do(model: nn.Module) -> str:
    """Advice for a network without batch norm, which may be frozen or fused."""
    modules = list(model.modules())
    if any("FrozenBatchNorm" in type(module).__name__ for module in modules):
        return (
            ". Build the network with torch.nn.BatchNorm2d (norm_layer= of torchvision) and load the same weights: its "
            "buffers have the same names"
        )
    if any(hasattr(module, "forward_fuse") or hasattr(module, "fuse") for module in modules):
        return (
            ". Its class can fuse batch norms into the convolutions before them, as some libraries do on loading or "
            "before predicting: load the network without fuse()"
        )
    return ""


def qualified_names(model: nn.Module) -> dict[str, str]:
    """The names of the layers of `batch_norms` with wrappers, as in the names of their buffers.

    Without wrappers, they are the same names.
    """
    return {name: place for name, place, m in _walk(model) if isinstance(m, _BatchNorm)}


def undrawable(model: nn.Module) -> dict[str, str]:
    """The layers that normalise like batch norms but cannot be drawn, by name, with the reason.

    ``FrozenBatchNorm``: the layer never sees mini-batch statistics, such as torchvision's ``FrozenBatchNorm2d``.
    ``scripted``: the layer is part of a scripted or traced module, whose buffers cannot be replaced.
    """
    found = {}
    for name, _, module in _walk(unwrap(model)):
        if isinstance(module, torch.jit.ScriptModule):
            if "BatchNorm" in str(getattr(module, "original_name", "")):
                found[name] = "scripted"
        elif not isinstance(module, _BatchNorm) and "FrozenBatchNorm" in type(module).__name__:
            found[name] = "FrozenBatchNorm"
    return found


def running_statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The running mean and running variance of a layer that `batch_norms` returned, each ``[C]``."""
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    return mean, var


def with_statistics(model: nn.Module, statistics: Mapping[str, Tensor]) -> nn.Module:
    """Make a copy of a network, without wrappers, with other running statistics.

    Args:
        model: the network.
        statistics: the mean and variance of each layer, ``[2, C]``, by name.

    Raises:
        ValueError: the network's type cannot hold them.
    """
    layers = batch_norms(written := copy.deepcopy(unwrap(model)))
    with torch.no_grad():
        for name, values in statistics.items():
            for statistic, value in zip(running_statistics(layers[name]), values, strict=True):
                if not statistic.copy_(value).isfinite().all():
                    raise ValueError(f"{statistic.dtype} cannot hold the statistics of {name!r}; use float32")
    return written


def buffer_names(layer: str) -> tuple[str, str]:
    """The qualified names of a layer's running mean and running variance.

    >>> buffer_names("layer1.bn")
    ('layer1.bn.running_mean', 'layer1.bn.running_var')
    """
    prefix = f"{layer}." if layer else ""
    return f"{prefix}running_mean", f"{prefix}running_var"


def listed(names: Iterable[str], most: int = 5) -> str:
    """List names for a message: the first ones, and the number of the others."""
    names = [repr(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _wrapped(module: nn.Module) -> str | None:
    """The attribute with the module that a wrapper wraps; None for other modules."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    for cls in type(module).__mro__:
        place = WRAPPED.get(cls.__name__, "module" if AVERAGES.search(cls.__name__) else "")
        if isinstance(module._modules.get(place), nn.Module):
            return place
    return None


def _walk(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield every module once: its name without wrappers, its name in `model`, and the module."""
    seen: set[int] = set()

    def below(module: nn.Module, name: str, place: str) -> Iterator[tuple[str, str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        wrapped = _wrapped(module)
        if wrapped is not None:
            inner = module._modules[wrapped]
            assert inner is not None
            yield from below(inner, name, _joined(place, wrapped))
            return
        yield name, place, module
        for key, child in module.named_children():
            yield from below(child, _joined(name, key), _joined(place, key))

    return below(model, "", "")


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
