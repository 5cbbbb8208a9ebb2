"""Call a network: take its input from a batch, and read a task's values from its output."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stochbn.network.layers import unwrap

__all__ = ["Batch", "InputsOf", "NetworkInput", "network_input", "read_output", "refuse_other_axis"]

Batch = Any
"""A tensor, an ``(input, ...)`` tuple or list, or a mapping of the network's argument names to tensors."""

NESTED = 8
"""How deep nested arguments are searched."""

InputsOf = int | Callable[[Any], Any] | None
"""Selects the network's input from a batch: a number of leading entries of a tuple, which become positional arguments,
or a function from a batch to a tensor, a tuple of positional arguments or a mapping of named ones. None: see
`Batch`."""


@dataclass(frozen=True)
class NetworkInput:
    """The arguments of a network for N examples. All tensors have the examples on their first axis.

    Tensors without an axis, such as a scale, are for all examples.

    Attributes:
        args: the positional arguments.
        kwargs: the named arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """N.

        Raises:
            ValueError: the tensors have no first (batch) axis, or disagree about its length.
        """
        lengths = {t.shape[0] for t in self.tensors() if t.ndim}
        if len(lengths) != 1:
            shapes = [list(t.shape) for t in self.tensors()]
            raise ValueError(f"expected tensors that share a first (batch) axis, got shapes {shapes}")
        return lengths.pop()

    def tensors(self) -> list[Tensor]:
        """All arguments that are tensors."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]

    @property
    def shares_axis(self) -> bool:
        """Whether all tensors that have axes agree in the length of the first."""
        return len({t.shape[0] for t in self.tensors() if t.ndim}) == 1

    @functools.cached_property
    def divisible(self) -> bool:
        """Whether the examples can be separated: all tensors are arguments, and have a common first axis."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        tensors = self.tensors()
        shared = self.shares_axis and all(t.ndim for t in tensors)
        return shared and sum(isinstance(leaf, Tensor) for leaf in leaves) == len(tensors)

    @property
    def count(self) -> int:
        """The number of examples that can be separated: N, or 1 if they cannot."""
        return len(self) if self.divisible else 1

    @property
    def first(self) -> Tensor:
        """The first tensor with an axis, or else the first tensor. Augmentations change it."""
        return next((t for t in self.tensors() if t.ndim), self.tensors()[0])

    def map(self, change: Callable[[Tensor], Tensor]) -> NetworkInput:
        """Apply a function to every tensor; other arguments stay."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return NetworkInput(tuple(map(changed, self.args)), {k: changed(v) for k, v in self.kwargs.items()})

    def with_first(self, change: Callable[[Tensor], Tensor]) -> NetworkInput:
        """Replace the first tensor."""
        first = self.first
        return self.map(lambda tensor: change(tensor) if tensor is first else tensor)

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        return self.tensors()[0].device

    @property
    def on_cpu(self) -> bool:
        """Whether all tensors are on a CPU."""
        return all(tensor.device.type == "cpu" for tensor in self.tensors())

    def take(self, examples: slice | Tensor) -> NetworkInput:
        """Select some of the examples."""
        return self.map(lambda tensor: tensor[examples] if tensor.ndim else tensor)

    def split(self, size: int) -> Iterator[NetworkInput]:
        """Yield consecutive pieces of `size` examples; a smaller remainder is dropped."""
        for start in range(0, len(self) - size + 1, size):
            yield self.take(slice(start, start + size))

    def join(self, other: NetworkInput) -> NetworkInput:
        """Join the examples of both; other arguments, and tensors without an axis, are taken from `other`.

        Raises:
            ValueError: their examples differ in shape, or the two in their arguments.
        """
        if len(self.args) != len(other.args) or self.kwargs.keys() != other.kwargs.keys():
            raise ValueError("expected inputs with the same arguments, got different ones for examples and others")

        def joined(first: Any, second: Any) -> Any:
            return torch.cat([first, second]) if isinstance(second, Tensor) and second.ndim else second

        try:
            args = tuple(joined(a, b) for a, b in zip(self.args, other.args, strict=True))
            return NetworkInput(args, {k: joined(self.kwargs[k], v) for k, v in other.kwargs.items()})
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"these examples do not fit into a mini-batch of the others: {error}") from error

    def call(self, model: nn.Module, through: Callable[..., Any] | None = None) -> Any:
        """Call the network with copies of the arguments, because it may write to them.

        Args:
            model: the network.
            through: what to call instead, such as its compiled code.

        Raises:
            RuntimeError, ValueError: the network's error, with the shapes of the input added.
        """
        copies = self.map(Tensor.clone)
        try:
            return (through or model)(*copies.args, **copies.kwargs)
        except (RuntimeError, ValueError) as error:
            if type(error) not in (RuntimeError, ValueError):  # a subclass, such as out of memory, says more
                raise
            named = {k: list(v.shape) for k, v in self.kwargs.items() if isinstance(v, Tensor)}
            shapes = [list(v.shape) for v in self.args if isinstance(v, Tensor)]
            shown = named if not shapes else shapes[0] if len(shapes) == 1 and not named else [*shapes, named]
            raise type(error)(f"{type(model).__name__} failed on an input of shape {shown}: {error}") from error

    def kind(self) -> Any:
        """The kind of the input, without its examples: shapes, types, and all arguments that are not tensors.

        Simple values, and lists or mappings of them, are compared by value; other arguments by identity and attributes.
        """
        return tuple(map(_described, self.args)), tuple((k, _described(v)) for k, v in sorted(self.kwargs.items()))


def _described(value: Any, within: tuple[int, ...] = ()) -> Any:
    """A description that changes if the value changes; `within` has the identities of its containers."""
    if isinstance(value, Tensor):
        return value.shape[1:], value.dtype, value.device
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return type(value), value
    if id(value) in within or len(within) > NESTED:
        return type(value), _Identity(value)
    within = (*within, id(value))
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_described(one, within) for one in value)
    if isinstance(value, dict):
        pairs = ((_described(key, within), _described(one, within)) for key, one in value.items())
        return type(value), tuple(pairs)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_described(one, within) for one in value)
    attributes = vars(value) if hasattr(value, "__dict__") and not isinstance(value, nn.Module) else {}
    return type(value), _Identity(value), _described(dict(attributes), within)


class _Identity:
    """Compares by identity, and keeps the object alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def network_input(model: nn.Module, batch: Batch, inputs: InputsOf = None) -> NetworkInput:
    """Take the network's input from a batch, and move it to the network's device.

    A tensor is taken as it is. Of a tuple or list the first entry is taken, and of a mapping the entries that are
    arguments of the network's ``forward``, so it may contain labels and identifiers too. For a wrapped network
    (``torch.compile``, ``DataParallel``) the arguments are those of the network inside.

    Args:
        model: the network.
        batch: the batch.
        inputs: another selection of the input: a number of leading entries, or a function.

    Raises:
        TypeError: the batch is of another type, or a mapping without any argument of the network.
        ValueError: the batch is an empty tuple, or has fewer entries than `inputs` selects.
    """
    device = next((p.device for p in model.parameters()), None)

    def on_device(found: NetworkInput) -> NetworkInput:
        return found.map(lambda tensor: tensor.to(device)) if device is not None else found

    if inputs is not None:
        return on_device(_chosen(batch, inputs))
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError("got an empty tuple as a batch; expected (input, ...)")
        batch = batch[0]
    if isinstance(batch, Tensor):
        return on_device(NetworkInput((batch,)))
    if isinstance(batch, Mapping):
        inner = unwrap(model)
        arguments = inspect.signature(inner.forward).parameters.values()
        takes_any = any(a.kind is a.VAR_KEYWORD for a in arguments)
        names = {a.name for a in arguments}
        chosen = {key: value for key, value in batch.items() if takes_any or key in names}
        if not any(isinstance(value, Tensor) for value in chosen.values()):
            raise TypeError(
                f"got a batch with the entries {sorted(map(str, batch))}, none of which is a tensor argument of "
                f"{type(inner).__name__}.forward; its arguments are {sorted(names)}"
            )
        return on_device(NetworkInput((), chosen))
    raise TypeError(
        f"got a batch of type {type(batch).__name__}; expected a tensor, an (input, ...) tuple or a mapping of "
        f"argument names to tensors, or inputs=... to say what the network takes{_as_tensor(batch)}"
    )


def _as_tensor(batch: Any) -> str:
    """How to make a tensor of an array or a table, as advice."""
    if hasattr(batch, "to_numpy"):
        return "; torch.tensor(x.to_numpy(), dtype=torch.float32) makes a tensor of it, with its columns in their order"
    return "; torch.from_numpy(x) makes a tensor of it" if hasattr(batch, "__array__") else ""


def _chosen(batch: Batch, inputs: int | Callable[[Any], Any]) -> NetworkInput:
    if isinstance(inputs, int) and not isinstance(inputs, bool):
        if inputs < 1:
            raise ValueError(f"inputs must be at least 1, the number of entries that the network takes, got {inputs}")
        if not isinstance(batch, (tuple, list)) or len(batch) < inputs:
            given = f"{len(batch)} entries" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"
            raise ValueError(
                f"expected batches that are tuples of at least {inputs} entries (inputs={inputs}), got {given}"
            )
        chosen: Any = tuple(batch[:inputs])
    elif callable(inputs):
        chosen = inputs(batch)
    else:
        raise TypeError(f"inputs must be a number of leading entries or a function of a batch, got {inputs!r}")
    if isinstance(chosen, Tensor):
        return NetworkInput((chosen,))
    if isinstance(chosen, Mapping):
        arguments = NetworkInput((), dict(chosen))
    elif isinstance(chosen, (tuple, list)):
        arguments = NetworkInput(tuple(chosen))
    else:
        raise TypeError(
            f"inputs must give a tensor, a tuple of arguments or a mapping of named ones, got {type(chosen).__name__}"
        )
    if not arguments.tensors():
        raise TypeError(f"inputs must give at least one tensor, got a {type(chosen).__name__} without any tensor")
    return arguments


def refuse_other_axis(output: Any, inputs: NetworkInput) -> None:
    """Refuse a network whose examples are not on the first axis of its input.

    Raises:
        ValueError: the outputs have as many rows as the second axis of the input, for example with time first.
    """
    first = inputs.first
    if first.ndim < 2 or not inputs.shares_axis:
        return
    lengths = {leaf.shape[0] for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.ndim}
    if len(first) not in lengths and first.shape[1] in lengths:
        raise ValueError(
            f"the network gave outputs for {first.shape[1]} examples from {len(first)} along the first axis of "
            f"{list(first.shape)}: its input seems to have time on the first axis (batch_first=False), which would be "
            "split in place of the examples. Pass batches with the examples first, and a network that turns them, such "
            "as one with forward(self, x): return net(x.transpose(0, 1)); or pass batch_size=None, which takes batches "
            "as they come, with reference=False"
        )


def read_output(output: Any, place: str | int | None = None) -> Any:
    """Read an entry of a network's output.

    Args:
        output: a tensor, a tuple or list, a mapping, or an object with fields, such as a dataclass.
        place: a key, field or position. None takes a tensor as it is, the entry or field ``logits`` (or ``out``, as in
            torchvision's segmentation networks) if there is one, and otherwise the first entry of a tuple.

    Raises:
        ValueError: there is no such entry.
    """
    if isinstance(output, Tensor) and place is None:
        return output
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
