"""Rules for operations that only move entries. They are applied to a tensor with the example number of each entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stochbn.execution.places import Flow, Lookup, MixedError, Place, constant, only, uniform
from stochbn.execution.sizes import MOST

__all__ = ["MOVES", "index", "moved"]

MOVES = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand",
    "select", "slice", "split", "split_with_sizes", "unbind", "narrow", "cat", "stack", "repeat", "flip", "roll",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "unfold", "constant_pad_nd",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d", "diagonal", "movedim", "index_select", "repeat_interleave", "unflatten", "view_as",
}  # fmt: skip
_ALONG = {
    "select": ("dim",), "slice": ("dim",), "narrow": ("dim",), "split": ("dim",), "split_with_sizes": ("dim",),
    "unbind": ("dim",), "index_select": ("dim",), "unfold": ("dimension",), "flip": ("dims",), "roll": ("dims",),
    "diagonal": ("dim1", "dim2"),
}  # fmt: skip
"""The operations that take entries by their positions along some axes, and what they call these."""
_LAST = {
    "pixel_shuffle": 3, "pixel_unshuffle": 3, "channel_shuffle": 3, "native_channel_shuffle": 3,
    **{f"{kind}_pad{k}d": k for kind in ("reflection", "replication") for k in (1, 2, 3)},
}  # fmt: skip
"""The operations that move entries along the last axes, and along how many."""


def _look_at_positions(name: str, bound: dict[str, Any], axis: int | None, ndim: int) -> None:
    """Refuse operations that select examples by position, because the selection may differ for more examples.

    Raises:
        MixedError: the operation does.
    """
    if axis is None:
        return
    dims = [dim for key in _ALONG.get(name, ()) for dim in (bound[key] if key == "dims" else [bound[key]])]
    taken = name == "roll" and not dims
    if name == "slice" and bound["start"] in (None, 0) and bound["step"] == 1:
        dims = dims if (MOST if bound["end"] is None else bound["end"]) < MOST else []
    if name == "constant_pad_nd":
        dims = [-1 - place // 2 for place, amount in enumerate(bound["pad"]) if amount]
    last = _LAST.get(name, 0)
    if taken or axis in {dim % ndim for dim in dims} or axis >= ndim - last:
        raise MixedError("an operation that takes entries by an example's place in the batch")


def _labels(tensor: Tensor, flow: Flow, examples: int) -> Tensor:
    """The example number of every entry, in the layout of the tensor; -1 if it has none."""
    shape, stride = tensor.shape, tensor.stride()
    kept = [1 if s == 0 and axis != flow.axis else n for axis, (n, s) in enumerate(zip(shape, stride, strict=True))]
    if flow.axis is not None and stride[flow.axis] == 0:  # examples that share their numbers have labels of their own
        labels = torch.empty(kept, dtype=torch.int32).fill_(-1)
    else:
        labels = torch.empty_strided(kept, stride, dtype=torch.int32).fill_(-1)
    if flow.axis is not None:
        numbers = torch.arange(examples, dtype=torch.int32).repeat_interleave(flow.per)
        labels.copy_(numbers.view([-1 if axis == flow.axis else 1 for axis in range(len(shape))]))
    return labels.expand(shape)


def _place_of(labels: Tensor, examples: int) -> Place | None:
    if bool((labels == -1).all()):
        return None
    for axis, size in enumerate(labels.shape):
        if size and size % examples == 0:
            numbers = torch.arange(examples, dtype=labels.dtype).repeat_interleave(size // examples)
            wanted = numbers.view([-1 if other == axis else 1 for other in range(labels.ndim)])
            if bool(((labels == wanted) | (labels == -1)).all()):
                return axis, size // examples
    raise MixedError("an operation that moves entries between examples, or takes some examples")


def moved(
    func: Any,
    bound: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    made: Sequence[Tensor],
    flow: Lookup,
    examples: int,
) -> list[Place | None]:
    """Where the examples are after an operation that only moves entries.

    Raises:
        MixedError: it moves entries between examples, or selects them by their position in the batch.
    """
    name = func._schema.name.removeprefix("aten::")
    source: Any = args[0]
    if isinstance(source, Tensor):
        _look_at_positions(name, bound, flow(source).axis, source.ndim)

    def label(value: Any, first: bool) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not first and not value.is_floating_point():  # where to take entries from
            constant(flow, value)
            return value
        return _labels(value, flow(value), examples)

    labelled = pytree.tree_map(lambda v: label(v, first=False), args[1:])
    if name == "constant_pad_nd":
        labelled = [labelled[0], -1]  # the numbers between are no example's
    results = func(pytree.tree_map(lambda v: label(v, first=True), source), *labelled, **kwargs)
    places = [_place_of(t, examples) for t in pytree.tree_leaves(results) if isinstance(t, Tensor)]
    for place, out in zip(places, made, strict=True):
        for t in pytree.tree_leaves(args):
            if place is None or not isinstance(t, Tensor) or flow(t).axis is not None:
                continue
            axis = place[0]
            if name == "stack":
                new = bound["dim"] % out.ndim
                if axis == new:
                    raise MixedError("an operation that joins numbers that depend on their place in the batch")
                axis -= axis > new
            elif t.ndim != out.ndim:
                continue
            if t.shape[axis] == out.shape[axis] and not uniform(t, axis, examples, flow):
                raise MixedError("an operation that joins examples with numbers that go by their place in the batch")
    return places


def index(bound: dict[str, Any], made: Sequence[Tensor], flow: Lookup, examples: int) -> list[Place | None]:
    """Where the examples are after indexing with tensors."""
    source, indices = bound["self"], bound["indices"]
    first, *others = indices
    if any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices):
        constant(flow, indices)
    if flow(source).axis is None and first is not None and not any(one is not None for one in others):
        return [only(first, flow)]
    constant(flow, indices)
    axis = 0
    for one in indices:
        width = one.ndim if one is not None and one.dtype in (torch.bool, torch.uint8) else 1
        if one is not None and axis <= (flow(source).axis or 0) < axis + width:
            raise MixedError("an operation that takes entries by an example's place in the batch")
        axis += width
    func = torch.ops.aten.index.Tensor
    return moved(func, bound, (source, indices), {}, made, flow, examples)
