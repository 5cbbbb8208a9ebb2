"""Where the examples of a batch are in a tensor, and whether a constant is the same for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Flow", "Lookup", "MixedError", "Place", "constant", "joined", "only", "uniform"]


@dataclass(frozen=True)
class Flow:
    """Where the examples of a batch are in a tensor.

    Attributes:
        axis: the axis of the examples; None if the tensor does not depend on them.
        per: the number of consecutive entries of this axis for each example.
        drawn: whether the tensor depends on drawn statistics.
        own: whether its values depend on the network's parameters or buffers, which may change unnoticed.
        mixed: why an entry may depend on several examples or on its position in the batch; empty if none does.
    """

    axis: int | None = None
    per: int = 1
    drawn: bool = False
    mixed: str = ""
    own: bool = False

    @property
    def constant(self) -> bool:
        """Whether the tensor does not depend on the examples."""
        return self.axis is None and not self.mixed


class MixedError(Exception):
    """Raised if an operation combines examples; the message says which operation."""


Lookup = Callable[[Tensor], Flow]
Place = tuple[int, int]
"""The axis of the examples and the number of entries for each."""


def uniform(tensor: Tensor, axis: int, examples: int, flow: Lookup) -> bool:
    """Whether the entries of a constant along an axis are the same for every example, for all weights."""
    if tensor.shape[axis] <= 1 or tensor.stride(axis) == 0 or not tensor.numel():
        return True
    if tensor.shape[axis] % examples or flow(tensor).own or flow(tensor).drawn:
        return False
    rows = tensor.reshape(*tensor.shape[:axis], examples, -1, *tensor.shape[axis + 1 :])
    return bool((rows == rows.narrow(axis, 0, 1)).all())


def only(tensor: Any, flow: Lookup) -> Place:
    """Where the examples are in a tensor, which must depend on them.

    Raises:
        MixedError: it does not.
    """
    if not isinstance(tensor, Tensor) or flow(tensor).axis is None:
        raise MixedError("an operation whose first input does not depend on the examples, but another does")
    place = flow(tensor)
    assert place.axis is not None
    return place.axis, place.per


def constant(flow: Lookup, *tensors: Any) -> None:
    """Check that tensors do not depend on the examples.

    Raises:
        MixedError: one does.
    """
    for t in pytree.tree_leaves(tensors):
        if isinstance(t, Tensor) and not flow(t).constant:
            raise MixedError("an operation whose weights depend on the examples")


def joined(old: Flow, new: Flow) -> Flow:
    """The flow of a tensor after an operation has written to it."""
    drawn, own = old.drawn or new.drawn, old.own or new.own
    if old.mixed or new.mixed:
        return Flow(mixed=old.mixed or new.mixed, drawn=drawn, own=own)
    if old.axis is not None and new.axis is not None and (old.axis, old.per) != (new.axis, new.per):
        return Flow(mixed="a tensor that is written to with examples on another axis", drawn=drawn, own=own)
    return replace(old if new.axis is None else new, drawn=drawn, own=own)
