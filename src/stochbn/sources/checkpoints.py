"""Save and load trained networks of the paper's experiments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stochbn.files import read_tensors, write_tensors
from stochbn.sources.architectures import build

__all__ = ["Checkpoint", "load", "save"]

FORMAT = "stochbn.network/1"
LARGE = 50_000
"""Entries from which on a weight is kept as whole numbers in a small file. Smaller ones, such as those of first layers,
change predictions more and fill less."""
BITS = 7
"""Of each of these numbers, sign included."""
SCALE = "scale of "
"""What comes before the name of a weight in the name of its scales."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained network, with the settings that rebuild it.

    Attributes:
        model: the network, in evaluation mode.
        network: its name in `stochbn.sources.architectures`.
        arguments: the arguments of its function.
        data: its training data, by the name for `stochbn.sources.named.load`.
        classes: the names of its classes.
    """

    model: nn.Module
    network: str
    arguments: dict[str, Any]
    data: str
    classes: tuple[str, ...]


def save(path: str | os.PathLike[str], checkpoint: Checkpoint, *, small: bool = False) -> None:
    """Save weights and description as safetensors, whole or not at all.

    Args:
        path: of the file.
        checkpoint: what to save.
        small: keep weights of convolutions and linear layers in less space, which rounds them: those of at least
            50,000 entries as whole numbers of 7 bits with a scale for each output channel, the others in half
            precision. Batch norms and biases stay as they are.

    Raises:
        ValueError: with `small`, a number is not finite, or too large for half precision.
        OSError: the file cannot be written.
    """
    about = {
        "network": checkpoint.network,
        "arguments": checkpoint.arguments,
        "data": checkpoint.data,
        "classes": list(checkpoint.classes),
    }
    tensors = checkpoint.model.state_dict()
    write_tensors(path, FORMAT, _rounded(tensors) if small else tensors, about)


def _rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in less space."""
    found = {}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{name!r} has numbers that are NaN or infinite, so the network cannot be rounded")
        if value.ndim < 2 or value.numel() < LARGE:
            found[name] = value.half() if value.ndim > 1 else value
            if not found[name].isfinite().all():
                size = value.abs().max().item()
                raise ValueError(f"{name!r} has a weight of size {size:g}; half precision ends at 65504")
            continue
        rows = value.detach().flatten(1)
        largest = 2 ** (BITS - 1) - 1
        scales = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny) / largest
        codes = (rows / scales).round().add(largest).to(torch.uint8).cpu().numpy()
        bits = np.unpackbits(codes.reshape(-1, 1), axis=1)[:, -BITS:]
        found |= {name: torch.from_numpy(np.packbits(bits)), f"{SCALE}{name}": scales}
    return found


def _unrounded(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Tensors of these shapes, from those that `_rounded` gave."""
    found = {name: value for name, value in tensors.items() if not name.startswith(SCALE)}
    for name in (key.removeprefix(SCALE) for key in tensors if key.startswith(SCALE)):
        if name not in found or name not in shapes:
            raise ValueError(f"it has scales of {name!r}, and no such weight")
        packed, scales, count = found[name], tensors[f"{SCALE}{name}"], shapes[name].numel()
        size, rows = -(-BITS * count // 8), shapes[name][0] if shapes[name] else 1
        if packed.dtype != torch.uint8 or packed.shape != (size,):
            raise ValueError(f"{name!r} is {packed.dtype} of shape {list(packed.shape)}, not {size} bytes of codes")
        if not scales.is_floating_point() or scales.shape != (rows, 1):
            raise ValueError(f"scales of {name!r} are {scales.dtype} of shape {list(scales.shape)}, not [{rows}, 1]")
        if not (scales.isfinite() & (scales > 0)).all():
            raise ValueError(f"scales of {name!r} are not all finite and positive")
        bits = np.unpackbits(packed.numpy(), count=BITS * count).reshape(-1, BITS)
        codes = torch.from_numpy(np.packbits(bits, axis=1) >> (8 - BITS)).float() - (2 ** (BITS - 1) - 1)
        found[name] = (codes.view(len(scales), -1) * scales).view(shapes[name])
    return found


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Load a checkpoint that `save` wrote. Nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, corrupt, not a network, or of another format version.
    """
    tensors, about = read_tensors(path, FORMAT)
    try:
        with torch.random.fork_rng():
            network, arguments = _layout(about["network"], about["arguments"], tensors)
            model = build(network, **arguments)
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        model.load_state_dict(_unrounded(tensors, shapes))
        trained_on, classes = about["data"], about["classes"]
        if not isinstance(trained_on, str):
            raise ValueError(f"its data is {trained_on!r:.60}, not the name of a data set")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError(f"its classes are {classes!r:.60}, not a list of names")
        if len(classes) != arguments.get("classes", len(classes)):
            raise ValueError(f"it has {arguments['classes']} classes and {len(classes)} names of classes")
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} does not hold a network of this release: {error}") from error
    return Checkpoint(model.eval(), network, arguments, trained_on, tuple(classes))


def _layout(network: str, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a network in a file, also of an earlier one: its weights tell what it had no name for."""
    if network == "resnet18" and "1.bn1.weight" in tensors:
        return "resnet18-final-bn", arguments
    if network == "vgg11" and "0.bias" not in tensors:
        return network, {"bias": False, **arguments}
    return network, arguments
