"""How a network is called: its input taken from a batch, its modes and buffers set for one call, its logits found."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = [
    "Batch",
    "call",
    "channels_last_weights",
    "copied",
    "copied_buffers",
    "find_logits",
    "join",
    "length",
    "modes",
    "network_input",
    "split",
    "take",
]

Batch = Any
"""A tensor, an ``(input, ...)`` tuple or list, or a mapping of the network's argument names to tensors."""


def network_input(model: nn.Module, batch: Batch) -> Tensor | dict[str, Any]:
    """The part of a batch that the network takes, on the network's device.

    A tensor is taken as it is, a tuple or list by its first entry, a mapping by the entries that
    the network's ``forward`` has arguments for (so a mapping may carry labels and identifiers too).

    Raises:
        TypeError: the batch is none of these, or a mapping without any argument of the network.
        ValueError: the batch is an empty tuple.
    """
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError("got an empty tuple as a batch; expected (input, ...)")
        batch = batch[0]
    device = next((p.device for p in model.parameters()), None)
    if isinstance(batch, Tensor):
        return batch.to(device) if device is not None else batch
    if isinstance(batch, Mapping):
        arguments = inspect.signature(model.forward).parameters.values()
        takes_any = any(a.kind is a.VAR_KEYWORD for a in arguments)
        names = {a.name for a in arguments}
        chosen = {key: value for key, value in batch.items() if takes_any or key in names}
        if not any(isinstance(value, Tensor) for value in chosen.values()):
            raise TypeError(
                f"got a batch with the entries {sorted(map(str, batch))}, none of which is a tensor argument of "
                f"{type(model).__name__}.forward; its arguments are {sorted(names)}"
            )
        return {
            key: value.to(device) if isinstance(value, Tensor) and device is not None else value
            for key, value in chosen.items()
        }
    raise TypeError(
        f"got a batch of type {type(batch).__name__}; expected a tensor, an (input, ...) tuple or a mapping of "
        "argument names to tensors"
    )


def split(inputs: Tensor | dict[str, Any], size: int) -> Iterator[Tensor | dict[str, Any]]:
    """The consecutive pieces of `size` objects of a network's input; a smaller remainder is dropped."""
    for start in range(0, length(inputs) - size + 1, size):
        yield take(inputs, slice(start, start + size))


def take(inputs: Tensor | dict[str, Any], objects: slice | Tensor) -> Tensor | dict[str, Any]:
    """Some objects of a network's input; what is no tensor stays."""
    if isinstance(inputs, Tensor):
        return inputs[objects]
    return {k: v[objects] if isinstance(v, Tensor) else v for k, v in inputs.items()}


def join(first: Tensor | dict[str, Any], second: Tensor | dict[str, Any]) -> Tensor | dict[str, Any]:
    """The objects of two of a network's inputs in one; what is no tensor is taken from the second.

    Raises:
        ValueError: their objects differ in shape, or the two in their arguments.
    """
    try:
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            return torch.cat([first, second])
        if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
            return {k: torch.cat([first[k], v]) if isinstance(v, Tensor) else v for k, v in second.items()}
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"these objects do not fit into a mini-batch of the others: {error}") from error
    raise ValueError("expected inputs with the same arguments, got different ones for the objects and the others")


def length(inputs: Tensor | dict[str, Any]) -> int:
    """The number of objects in a network's input.

    Raises:
        ValueError: its tensors have no batch axis, or disagree about its length.
    """
    tensors = [inputs] if isinstance(inputs, Tensor) else [v for v in inputs.values() if isinstance(v, Tensor)]
    lengths = {t.shape[0] if t.ndim else None for t in tensors}
    count = lengths.pop()
    if count is None or lengths:
        shapes = [list(t.shape) for t in tensors]
        raise ValueError(f"expected tensors that share a first (batch) axis, got shapes {shapes}")
    return count


@contextmanager
def modes(model: nn.Module, training: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Put every module in training (or evaluation) mode as `training` says, and back afterwards.

    The flags are set one by one because ``train()`` and ``eval()`` may be overridden with side effects.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = training(module)
        yield
    finally:
        for module, flag in before:
            module.training = flag


def call(model: nn.Module, buffers: Mapping[str, Tensor], inputs: Tensor | dict[str, Any]) -> Any:
    """The network's output with `buffers` in place of its own, for this one call.

    Raises:
        RuntimeError, ValueError: as the network raised it, with the shapes of the input put in front.
    """
    args, kwargs = copied(inputs)
    try:
        return functional_call(model, dict(buffers), args, kwargs, tie_weights=False)
    except (RuntimeError, ValueError) as error:
        if type(error) not in (RuntimeError, ValueError):  # a subclass, such as out of memory, says more than we could
            raise
        shape = (
            list(inputs.shape)
            if isinstance(inputs, Tensor)
            else {k: list(v.shape) for k, v in inputs.items() if isinstance(v, Tensor)}
        )
        raise type(error)(f"{type(model).__name__} failed on an input of shape {shape}: {error}") from error


def copied(inputs: Tensor | dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments to call a network with: copies, as it may write to them, and the next draw needs them unchanged."""
    if isinstance(inputs, Tensor):
        return (inputs.clone(),), {}
    return (), {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def copied_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers, for `call` with a network in training mode, which writes to them.

    A module that is registered under several names has its buffers under the first only (`call` would not put those of
    the second back), and a buffer that several modules share is one copy.
    """
    copies: dict[int, Tensor] = {}
    return {
        f"{prefix}.{name}" if prefix else name: copies.setdefault(id(buffer), buffer.clone())
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
    }


def channels_last_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies in channels-last layout, by their names, of the weights of convolutions that are not in it."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            weight = module._parameters.get("weight")
            # With one channel, is_contiguous() tells no layouts apart, but a convolution goes by the strides.
            if weight is not None and weight.stride() != _channels_last_strides(weight.shape):
                name = f"{name}.weight" if name else "weight"
                found[name] = weight.detach().clone(memory_format=torch.channels_last)
    return found


def _channels_last_strides(shape: torch.Size) -> tuple[int, ...]:
    _, channels, height, width = shape
    return channels * height * width, 1, channels * width, channels


def find_logits(output: Any, place: str | int | None = None) -> Tensor:
    """The logits ``[N, K, ...]`` in a network's output.

    Args:
        output: a tensor, a tuple or list, a mapping, or an object with fields (a dataclass, say).
        place: the key, field or position of the logits. None takes a tensor as it is, the entry or field
            ``logits`` (or ``out``, as torchvision's segmentation networks call it) where there is one, and
            otherwise the first entry of a tuple.

    Raises:
        ValueError: there is nothing at that place, or it is not ``[N, K, ...]`` with at least two classes.
        TypeError: what is there is not a floating-point tensor.
    """
    logits = output if isinstance(output, Tensor) and place is None else _entry(output, place)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"expected a floating-point tensor of logits in the network's output, found {kind}")
    if logits.ndim < 2 or logits.shape[1] < 2:
        raise ValueError(
            f"expected logits [N, K, ...] with K >= 2 classes on axis 1, found shape {list(logits.shape)}; "
            "name another place with logits=..., and give a one-logit binary network a second logit of 0"
        )
    return logits


def _entry(output: Any, place: str | int | None) -> Any:
    for candidate in ("logits", "out") if place is None else (place,):
        if isinstance(output, Mapping) and candidate in output:
            return output[candidate]
        if isinstance(candidate, str) and not isinstance(output, (Tensor, Mapping)) and hasattr(output, candidate):
            return getattr(output, candidate)
        if isinstance(candidate, int) and isinstance(output, Sequence) and -len(output) <= candidate < len(output):
            return output[candidate]
    if place is None and isinstance(output, (tuple, list)) and output:
        return output[0]
    wanted = "logits" if place is None else place
    entries = f" with the entries {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
    raise ValueError(
        f"the network's output is a {type(output).__name__}{entries} and has nothing at {wanted!r}; "
        "say where its logits are with logits=<key, field or position>"
    )
