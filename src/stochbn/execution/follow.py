"""Trace a network through one pass: do examples affect each other, what precedes the first batch norm, what changes?

The pass is made with a few examples on a copy that owns all of its tensors. A dispatch mode sees every tensor operation
that runs, and follows the axis of the examples through it (`stochbn.execution.rules`). A function mode sees where
Python code reads values of a tensor, or the number of examples, which is replaced by a symbol
(`stochbn.execution.sizes`). So conclusions depend on the operations, not on the values of some examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stochbn.execution.masks import Masks
from stochbn.execution.places import Flow
from stochbn.execution.sizes import Sizes
from stochbn.execution.trace import Follower, OfTheOriginal, Reads
from stochbn.execution.watch import Unit, Watch, memory_of
from stochbn.network.calling import NetworkInput
from stochbn.network.replica import Network
from stochbn.network.snapshot import Snapshot
from stochbn.tasks import Task

__all__ = ["Followed", "follow", "follow_effects"]


@dataclass(frozen=True)
class Followed:
    """What a pass shows about a network, for inputs of one kind.

    Attributes:
        in_place: why passes must run on the user's own object; empty if they need not.
        dependent: why an example's output may depend on the others; empty if it is proven that it does not.
        random: whether a pass draws random numbers, or may, if its code depends on values.
        sizes: the numbers of examples for which this holds.
        stateful: whether a pass changes buffers or attributes.
        caches: whether these changes are only caches for later passes, which depend on parameters and buffers alone.
        state: the names of parameters that a pass writes to, or all if another pass may write to others.
        reads_layout: whether Python code reads the memory layout of tensors.
        irregular: why draws cannot share a pass; empty if every batch norm has the examples on the first axis.
        rows: the number of rows of an example in the input of each batch norm, by name.
        units: the module calls whose outputs can be kept from one draw to the next.
        activation: bytes for each example of the largest input of a batch norm.
        largest: bytes for each example of the largest tensor.
        last: the name of the last linear layer or convolution that was called.
        trace: the operations, and the shapes of results that do not depend on the examples.
    """

    in_place: str = ""
    dependent: str = ""
    random: bool = False
    sizes: Sizes = field(default_factory=lambda: Sizes(0))
    stateful: bool = False
    caches: bool = False
    state: frozenset[str] = frozenset()
    reads_layout: bool = False
    irregular: str = ""
    rows: Mapping[str, int] = field(default_factory=dict)
    units: tuple[Unit, ...] = ()
    activation: float = 0.0
    largest: float = 0.0
    last: str = ""
    trace: tuple[Any, ...] = field(default=(), repr=False)


def follow_effects(network: Network, inputs: NetworkInput, training: frozenset[str]) -> Followed:
    """Find out, before any pass, whether passes change the network, and whether they can run on a copy.

    Args:
        network: the network.
        inputs: some examples.
        training: names of the modules to put in training mode.

    Raises:
        Exception: as the network raises it.
    """
    replica = network.fresh(own_parameters=True)
    if replica is None:
        return Followed(in_place=network.known.in_place, random=True)
    replica.modes(training)
    follower = Follower(replica, 1, _storages(network.model))
    replica.mark()
    watch = Watch(replica, follower)
    copies = inputs.map(Tensor.clone)
    for tensor in copies.tensors():
        follower.set(tensor, Flow(mixed="it is the input"))
    try:
        with Masks(0), Reads(follower), follower:
            replica.model(*copies.args, **copies.kwargs)
    except OfTheOriginal:
        return Followed(in_place=_CLOSURE, random=True)
    finally:
        watch.remove()
    state = _state(network.model, replica.model, follower)
    caches = not state and watch.caches(watch.changed())
    return Followed(
        random=follower.random or follower.branches,
        stateful=replica.changed() and not caches,
        caches=caches,
        state=state,
    )


def follow(
    network: Network, inputs: NetworkInput, draw: Mapping[str, Tensor], task: Task, training: frozenset[str]
) -> Followed:
    """Trace a network through one pass over some examples.

    Args:
        network: the network.
        inputs: the examples.
        draw: statistics for the pass, which count as drawn.
        task: reads what the caller needs from the output, with the examples on the first axis.
        training: names of the modules to put in training mode.

    Raises:
        Exception: as the network raises it.
    """
    replica = network.fresh(own_parameters=True)
    if replica is None:
        return Followed(in_place=network.known.in_place, random=True)
    replica.modes(training)
    replica.statistics({name: value.clone() for name, value in draw.items()})
    follower = Follower(replica, len(inputs), _storages(network.model))
    watch = Watch(replica, follower)
    copies = inputs.map(Tensor.clone)
    for tensor in copies.tensors():
        follower.set(tensor, Flow(axis=0))
    try:
        with Masks(0), Reads(follower), follower:
            output = replica.model(*copies.args, **copies.kwargs)
    except OfTheOriginal:
        return Followed(in_place=_CLOSURE, random=True)
    finally:
        watch.remove()
    follower.called = None
    with follower:
        flow = follower.flow(task.raw(output))
    dependent = next(iter(follower.reasons), flow.mixed)
    if not dependent and flow.axis is None:
        dependent = "the output does not depend on the examples"
    if not dependent and (flow.axis != 0 or flow.per != 1):
        dependent = "the output has the examples elsewhere than on its first axis"
    if any(isinstance(m, torch.jit.ScriptModule) or _calls_scripted(m) for m in replica.modules.values()):
        dependent = dependent or "it has scripted code, whose conclusions from sizes cannot be seen"
    changed = watch.changed()
    written = _written(network.model, replica.model)
    caches = not written and watch.caches(changed)
    return Followed(
        dependent=dependent,
        random=follower.random or follower.branches,
        sizes=follower.sizes,
        stateful=(bool(changed) and not caches) or bool(written),
        caches=caches,
        state=_state(network.model, replica.model, follower),
        reads_layout=follower.reads_layout,
        irregular=follower.irregular or watch.irregular,
        rows=watch.rows,
        units=() if dependent else watch.units(changed),
        activation=watch.activation / len(inputs),
        largest=follower.largest / len(inputs),
        last=watch.last,
        trace=tuple(follower.trace),
    )


_CLOSURE = "its forward pass uses layers or tensors of the original (a closure over the network, say)"


def _calls_scripted(module: nn.Module) -> bool:
    """Whether a method of a module names a scripted function."""
    for function in (f for cls in type(module).__mro__ if cls is not nn.Module for f in vars(cls).values()):
        code = getattr(function, "__code__", None)
        if code is not None:
            named = (function.__globals__.get(name) for name in code.co_names)
            if any(isinstance(value, torch.jit.ScriptFunction) for value in named):
                return True
    return False


def _storages(model: nn.Module) -> frozenset[int]:
    snapshot = Snapshot.of(model)
    return frozenset(s for s in map(memory_of, [*snapshot.parameters, *snapshot.tensors]) if s > 0)


def _written(original: nn.Module, copy: nn.Module) -> frozenset[str]:
    theirs = dict(original.named_parameters())
    return frozenset(name for name, p in copy.named_parameters() if name in theirs and not _equal(p, theirs[name]))


def _state(original: nn.Module, copy: nn.Module, follower: Follower) -> frozenset[str]:
    """The parameters that passes write to; all of them if a pass depends on values that it reads."""
    if follower.branches:
        return frozenset(name for name, _ in original.named_parameters())
    return _written(original, copy)


def _equal(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first, second) or bool(((first == second) | (first.isnan() & second.isnan())).all())
