"""Save and load trained networks of the paper's experiments."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stochbn.files import read_tensors, write_tensors
from stochbn.sources.architectures import build

__all__ = ["Checkpoint", "load", "save"]

FORMAT = "stochbn.network/1"


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


def save(path: str | os.PathLike[str], checkpoint: Checkpoint, *, half: bool = False) -> None:
    """Save weights and description as safetensors, as a whole or not at all.

    Args:
        path: the file.
        checkpoint: the checkpoint.
        half: keep the weights of convolutions and linear layers in half precision; batch norms stay as they are.

    Raises:
        OSError: the file cannot be written.
    """
    about = {
        "network": checkpoint.network,
        "arguments": checkpoint.arguments,
        "data": checkpoint.data,
        "classes": list(checkpoint.classes),
    }
    tensors = checkpoint.model.state_dict()
    if half:
        tensors = {name: value.half() if value.ndim > 1 else value for name, value in tensors.items()}
    write_tensors(path, FORMAT, tensors, about)


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
        model.load_state_dict(tensors)
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
