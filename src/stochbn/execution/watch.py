"""Watch the modules of a network while it is traced: which one runs, with which inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from stochbn.execution.places import Flow
from stochbn.execution.sizes import plain
from stochbn.network.replica import Replica
from stochbn.network.snapshot import Snapshot

__all__ = ["MULTIPLYING", "Frame", "Trace", "Unit", "Watch", "memory_of"]

MULTIPLYING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""The layers that take most of the time, and so are worth skipping."""


@dataclass(frozen=True)
class Unit:
    """A call of a module whose output is the same under every draw.

    Attributes:
        name: the module's name.
        call: the number of the call in a pass, from 0.
        per: the number of rows of an example in every tensor of the output; 0 if it does not depend on examples.
        size: bytes of the output for each example.
    """

    name: str
    call: int
    per: tuple[int, ...]
    size: float


@dataclass
class Frame:
    """A call of a module that has not ended."""

    name: str
    module: nn.Module
    call: int
    drawn: bool = False
    multiplies: bool = False
    inputs: frozenset[int] = frozenset()


class Trace(Protocol):
    """What is known about the tensors so far."""

    examples: int
    frames: list[Frame]
    clock: int
    written: dict[int, int]

    def flow(self, tensor: Tensor) -> Flow:
        """Where the examples are in a tensor."""
        ...


class Watch:
    """Hooks on a copy that record which module is running, and the inputs and outputs of modules."""

    def __init__(self, replica: Replica, follower: Trace) -> None:
        self.follower = follower
        self.irregular, self.last = "", ""
        self.rows: dict[str, int] = {}
        self.activation = 0
        self._names = {module: name for name, module in replica.model.named_modules()}
        self._norms = {norm: name for name, norm in replica.norms.items()}
        self._calls: dict[str, int] = {}
        self._ended: list[tuple[Frame, Frame | None, int, list[Tensor], Any]] = []
        self._hooked = {
            module: not all(map(_idle, (*module._forward_hooks.values(), *module._forward_pre_hooks.values())))
            for module in self._names
        }
        self._before = {module: _own_state(module) for module in self._names}
        self._handles = [
            handle
            for module in self._names
            if not isinstance(module, torch.jit.ScriptModule)
            for handle in (
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, with_kwargs=True),
            )
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self._names[module]
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        self.follower.frames.append(Frame(name, module, call, inputs=frozenset(map(id, tensors))))
        if module not in self._norms:
            return
        # The number of elements is a symbol here, and must not count as a conclusion of the network.
        self.activation = max([self.activation, *(plain(t.numel()) * t.element_size() for t in tensors)])
        for frame in self.follower.frames:
            frame.drawn = True
        flow = self.follower.flow(args[0]) if args and isinstance(args[0], Tensor) else Flow(mixed="no input")
        per = self.rows.setdefault(self._norms[module], flow.per)
        if flow.axis != 0 or per != flow.per or args[0].ndim < 2:
            self.irregular = self.irregular or f"batch norm {name!r} has the examples elsewhere than on its first axis"

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        frame = self.follower.frames.pop()
        while frame.module is not module:  # of a module that raised, whose caller continued
            frame = self.follower.frames.pop()
        parent = self.follower.frames[-1] if self.follower.frames else None
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        if isinstance(module, MULTIPLYING):
            self.last = frame.name
        self._ended.append((frame, parent, self.follower.clock, tensors, output))

    def changed(self) -> set[nn.Module]:
        """The modules whose attributes or buffers the pass has changed."""
        norms = {id(t) for norm in self._norms for t in (norm.running_mean, norm.running_var)}
        changed = set()
        for module, (before, versions) in self._before.items():
            after, now = _own_state(module)
            others = [(a, b) for a, b in zip(after.leaves, before.leaves, strict=False) if a is not b]
            same = len(after.leaves) == len(before.leaves) and all(id(a) in norms for a, _ in others)
            if not same or now != versions:
                changed.add(module)
        return changed

    def caches(self, changed: Iterable[nn.Module]) -> bool:
        """Whether a pass changed nothing but caches of tensors, which depend on parameters and buffers alone."""
        for module in changed:
            before, versions = self._before[module]
            after, now = _own_state(module)
            held, left = set(map(id, before.leaves)), set(map(id, after.leaves))
            new = [leaf for leaf in after.leaves if id(leaf) not in held]
            flows = [self.follower.flow(leaf) for leaf in new if isinstance(leaf, Tensor)]
            named = all(isinstance(leaf, (Tensor, str, torch.device, torch.dtype)) for leaf in new)
            if not named or not held <= left or any(not flow.constant or flow.drawn for flow in flows):
                return False
            if any(now.get(tensor) != version for tensor, version in versions.items()):
                return False
        return bool(changed)

    def units(self, changed: Iterable[nn.Module]) -> tuple[Unit, ...]:
        """The outermost calls without side effects whose outputs do not depend on the draw."""
        changed = set(changed)
        usable: dict[int, Unit] = {}
        for frame, _, clock, tensors, output in self._ended:
            flows = [self.follower.flow(t) for t in tensors]
            if frame.drawn or not frame.multiplies or any(f.drawn or f.mixed or f.axis not in (0, None) for f in flows):
                continue
            if any(self.follower.written.get(memory_of(t), 0) > clock for t in tensors):
                continue
            if any(module in changed or self._hooked[module] for module in frame.module.modules()):
                continue
            if not tensors or any(isinstance(leaf, (int, float)) for leaf in pytree.tree_leaves(output)):
                continue
            size = sum(t.numel() * t.element_size() for t in tensors) / self.follower.examples
            per = tuple(f.per if f.axis == 0 else 0 for f in flows)
            usable[id(frame)] = Unit(frame.name, frame.call, per, size)
        return tuple(
            usable[id(frame)]
            for frame, parent, *_ in self._ended
            if id(frame) in usable and (parent is None or id(parent) not in usable)
        )


def memory_of(tensor: Tensor) -> int:
    """A value that two tensors have in common if they share their memory."""
    try:
        return tensor.untyped_storage().data_ptr() or -id(tensor)
    except (RuntimeError, NotImplementedError):
        return -id(tensor)


def _idle(hook: Any) -> bool:
    """Whether a hook has no side effect beyond its module.

    These are hooks of PyTorch's norms, and those of Transformers that collect hidden states on request.
    """
    library = str(getattr(hook, "__module__", "")).startswith("transformers.")
    return library or isinstance(getattr(hook, "__self__", hook), (WeightNorm, SpectralNorm))


def _own_state(module: nn.Module) -> tuple[Snapshot, dict[int, int]]:
    """The attributes of a module itself, and the number of writes to each of its tensors, by identity."""
    snapshot = Snapshot.of(module, inside=False)
    tensors = [*snapshot.tensors, *snapshot.parameters]
    return snapshot, {id(t): t._version for t in tensors if not t.is_inference()}
