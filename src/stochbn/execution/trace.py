"""Trace one pass: every tensor operation that runs, and every size and value that Python code reads."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from stochbn.execution.masks import DispatchMode, arguments, draws
from stochbn.execution.places import Flow, MixedError, joined
from stochbn.execution.rules import flows_of
from stochbn.execution.sizes import ExampleCount, Shape, Sizes, is_symbol, plain, symbols
from stochbn.execution.watch import Frame, memory_of
from stochbn.network.replica import Replica
from stochbn.network.snapshot import Snapshot

__all__ = ["Follower", "OfTheOriginal", "Reads"]


class OfTheOriginal(BaseException):
    """Raised if the copy uses a tensor of the user's network. ``except Exception`` in a network does not catch it."""


class Follower(DispatchMode):  # type: ignore[no-untyped-call]
    """Follows the examples through all tensor operations."""

    def __init__(self, replica: Replica, examples: int, foreign: frozenset[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.examples, self.foreign = examples, foreign
        self.sizes = Sizes(examples)
        self.reasons: list[str] = []
        self.branches = False
        self.random = False
        self.called: bool | None = None  # within a PyTorch function that was called from Python and seen
        snapshot = Snapshot.of(replica.model)
        self.own = set(map(memory_of, [*snapshot.parameters, *snapshot.tensors]))
        self.irregular = ""
        self.reads_layout = False
        self.frames: list[Frame] = []
        self.written: dict[int, int] = {}
        self.clock = 0
        self.largest = 0
        self._flows: dict[int, Flow] = {}
        self._alive: list[Tensor] = []
        self._sharing: dict[int, list[Tensor]] = {}
        self._contents: dict[int, str] = {}
        self.trace: list[Any] = []
        self._norms = {id(norm): name for name, norm in replica.norms.items()}
        self._statistics: dict[int, nn.Module] = {}
        for norm in replica.norms.values():
            for statistic in (norm.running_mean, norm.running_var):
                assert statistic is not None
                self.set(statistic, Flow(drawn=True, own=True))
                self._statistics[id(statistic)] = norm

    def flow(self, tensor: Tensor) -> Flow:
        """Where the examples are in a tensor."""
        found = self._flows.get(id(tensor))
        if found is None:  # not seen before: the network's own, or an alias such as ``.data``
            written = self._contents.get(memory_of(tensor), "") if self._contents else ""
            found = Flow(mixed=written, own=memory_of(tensor) in self.own)
        return found

    def set(self, tensor: Tensor, flow: Flow) -> None:
        """Record where the examples are in a tensor."""
        if id(tensor) not in self._flows:
            self._alive.append(tensor)  # so that no other tensor gets its identity
            self._sharing.setdefault(memory_of(tensor), []).append(tensor)
        self._flows[id(tensor)] = flow

    def read(self, tensor: Any, what: str) -> None:
        """Record that Python code reads the values of a tensor."""
        if not isinstance(tensor, Tensor):
            return
        if not self.flow(tensor).constant or self.flow(tensor).drawn:
            self.reasons.append(what)
            self.branches = True
        elif self.flow(tensor).own:  # which may change without a sign
            self.reasons.append("Python code depends on the values of a parameter or buffer")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        # Functions that turn Python lists into tensors are not seen, but symbols in the lists are.
        if self.called is False and func is not torch.ops.aten.lift_fresh.default:
            self.reasons.append("operations that Python does not call hide what depends on the number of examples")
        if any(memory_of(t) in self.foreign for t in tensors):
            raise OfTheOriginal
        name = func._schema.name.removeprefix("aten::")
        if name in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2"):
            for t in tensors:
                self.read(t, "Python code or a shape depends on the values of tensors")
        self._look_at_statistics(name, tensors)
        form = _form(args)
        outputs = func(*args, **kwargs)
        self.clock += 1
        made = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
        own, bound = any(self.flow(t).own for t in tensors), arguments(func, args, kwargs)
        try:
            if torch.Tag.nondeterministic_seeded in func.tags and draws(bound):
                if bound.get("generator") is None:
                    self.random = True
                    self.reasons.append("random numbers are drawn")
                if any(not self.flow(t).constant for t in tensors):
                    raise MixedError("random numbers are drawn")
            if _form(args) != form:
                raise MixedError(f"the operation {name} changes the shape of a tensor in place")
            if name == "as_strided_":  # of axes of length 1, as pooling does
                flows = [self.flow(args[0])]
            else:
                flows = flows_of(func, args, kwargs, outputs, self.flow, self.examples)
        except Exception as error:  # other than MixedError: an operation with arguments that no rule expects
            why = error if isinstance(error, MixedError) else f"the operation {name} could not be followed"
            drawn = any(self.flow(t).drawn for t in tensors)
            flows = [Flow(mixed=f"{why}{self._where()}", drawn=drawn) for _ in made]
        flows = [replace(flow, own=True) for flow in flows] if own else flows
        self._look_at_sizes(name, bound, made, flows)
        self._note(func, args, kwargs, made, flows, multiplies=name in _MULTIPLYING)
        return outputs

    def _look_at_sizes(self, name: str, bound: dict[str, Any], made: list[Tensor], flows: list[Flow]) -> None:
        """Record what depends on the number of examples, and the operations, which must not depend on it."""
        shapes = [
            (flow.axis, flow.per, *(n for axis, n in enumerate(t.shape) if axis != flow.axis))
            for t, flow in zip(made, flows, strict=True)
            if not flow.mixed and t.numel()  # of nothing, any length is as good
        ]
        self.trace.append((name, shapes))
        source = bound.get("self")
        flow = self.flow(source) if isinstance(source, Tensor) else Flow()
        if not isinstance(source, Tensor) or flow.axis is None:
            return
        dims = bound.get("dim", range(source.ndim))
        if flow.axis in {dim % source.ndim for dim in ([dims] if isinstance(dims, int) else dims or ())}:
            if name.startswith("squeeze"):
                self.sizes.same(lambda n: n * flow.per > 1)
            elif name in ("split", "split_with_sizes", "unbind", "unsafe_split", "unsafe_split_with_sizes"):
                self.sizes.pin()  # there are as many parts

    def _note(self, func: Any, args: Any, kwargs: Any, made: list[Tensor], flows: list[Flow], multiplies: bool) -> None:
        drawn = any(flow.drawn for flow in flows)
        for frame in self.frames:
            frame.drawn |= drawn
            frame.multiplies |= multiplies
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.is_write and isinstance(value, Tensor)
        ] + [kwargs[a.name] for a in func._schema.arguments if a.is_write and isinstance(kwargs.get(a.name), Tensor)]
        for tensor in written:
            new = flows[0] if flows else Flow()
            for out, flow in zip(made, flows, strict=True):
                new = flow if out is tensor else new
            self._write(tensor, new)
        for tensor, flow in zip(made, flows, strict=True):
            if flow.axis is not None:
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
            if not any(tensor is t for t in written):
                self.set(tensor, flow)

    def _write(self, tensor: Tensor, flow: Flow) -> None:
        storage = memory_of(tensor)
        self.written[storage] = self.clock
        after = joined(self.flow(tensor), flow)
        if not after.constant:
            self._contents.setdefault(storage, after.mixed or "examples are written into a tensor of the network")
        for other in self._sharing.get(storage, []):
            before = self.flow(other)
            if other.shape == tensor.shape or (before.axis, before.per) == (after.axis, after.per) or after.constant:
                self._flows[id(other)] = joined(before, after)
            else:
                reason = after.mixed or "a tensor is filled part by part"
                self._flows[id(other)] = Flow(mixed=reason, drawn=before.drawn or after.drawn)
        self.set(tensor, after)

    def _look_at_statistics(self, name: str, tensors: list[Tensor]) -> None:
        """Check that drawn statistics, and the input of a batch norm, are used by this batch norm alone."""
        for t in tensors:
            norm = self._statistics.get(id(t))
            if norm is not None and all(frame.module is not norm for frame in self.frames):
                self.irregular = self.irregular or "the statistics of a batch norm are used outside of it"
        frame = self.frames[-1] if self.frames else None
        if frame is None or id(frame.module) not in self._norms or "batch_norm" in name or name in _HARMLESS:
            return
        if any(id(t) in frame.inputs for t in tensors):
            reason = f"batch norm {frame.name!r} does more with its input than normalise it"
            self.irregular = self.irregular or reason

    def _where(self) -> str:
        return f" (in {self.frames[-1].name!r})" if self.frames and self.frames[-1].name else ""


class Reads(TorchFunctionMode):
    """Records where Python code reads sizes and values of tensors."""

    def __init__(self, follower: Follower) -> None:
        super().__init__()
        follower.called = False
        self.follower = follower

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        follower, name = self.follower, getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name in ("__get__", "__set__") else name
        if torch._C._functorch.peek_interpreter_stack() is not None:
            follower.reasons.append("torch.func hides the number of examples from the code that it transforms")
        found = symbols((args, kwargs))
        given = [v for v in (*args, *kwargs.values()) if not isinstance(v, Tensor)]
        args, kwargs = plain(args), plain(kwargs)
        if name == "__set__":
            func(*args, **kwargs)
            if attribute == "data":
                follower.set(args[0], follower.flow(args[1]))
            return None
        if attribute in _READING:
            follower.read(args[0], "Python code reads the values of tensors")
        elif attribute in ("is_contiguous", "stride"):
            follower.reads_layout |= not follower.flow(args[0]).constant
            if attribute == "stride" and not follower.flow(args[0]).constant:
                follower.sizes.pin()  # strides are products of sizes
        elif name in ("__getitem__", "__setitem__"):
            self._look_at_bounds(args[0], args[1])
        elif found and name not in _TAKE_SIZES and name not in _CREATING:
            follower.sizes.pin()
        outer, follower.called, begun = follower.called, True, len(follower.trace)
        try:
            result = func(*args, **kwargs)
        finally:
            follower.called = outer
        if name in _CREATING and found:
            self._created(name, result, given, begun)
        elif attribute in ("shape", "size", "__len__", "numel", "nelement"):
            return self._symbolic(args[0], result, attribute, args[1:], kwargs)
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        counts = name == "is_same_size" or (attribute not in _OF_ANY and _counts(result))
        if counts and not all(follower.flow(t).constant for t in tensors):
            follower.sizes.pin()  # the number may be that of examples
        return result

    def _created(self, name: str, result: Any, given: list[Any], begun: int) -> None:
        """Follow a constant whose length is the number of examples as if it had the axis of the examples.

        Its length is removed from the trace, from the operation `begun` on.
        """
        flow, examples = self.follower.flow(result), self.follower.examples
        if not flow.constant:
            return
        lengths = next((v for v in given if isinstance(v, (tuple, list))), given)
        axes = [result.ndim - len(lengths) + place for place, v in enumerate(lengths) if is_symbol(v)]
        stretched = name not in _STRETCHING or all(result.stride(axis) == 0 for axis in axes)
        if len(axes) == 1 and not symbols(given)[0].offset and stretched:
            axis, per = axes[0], result.shape[axes[0]] // examples
            self.follower.set(result, Flow(axis=axis, per=per, drawn=flow.drawn))
            others = [n for place, n in enumerate(result.shape) if place != axis]
            self.follower.trace[begun:] = [(name, [(axis, per, *others)])]
        else:
            self.follower.sizes.pin()

    def _look_at_bounds(self, tensor: Any, index: Any) -> None:
        """Record whether a slice takes all examples, which may differ for other numbers of them."""
        flow, sizes = self.follower.flow(tensor), self.follower.sizes
        if flow.axis is None:
            return
        entries = list(index) if isinstance(index, tuple) else [index]
        widths = [_width(entry) for entry in entries]
        axis = 0
        for entry, width in zip(entries, widths, strict=True):
            if isinstance(entry, slice) and axis == flow.axis:
                for bound in filter(None, (entry.start, entry.stop)):
                    least = -(-abs(int(bound)) // flow.per)
                    for compare in (operator.le, operator.lt):  # as many are all, and more of them are not
                        sizes.same(lambda n, compare=compare, least=least: compare(least, n))  # type: ignore[misc]
            axis += tensor.ndim - sum(widths) if entry is Ellipsis else width

    def _symbolic(self, tensor: Any, result: Any, attribute: str, args: Any, kwargs: Any) -> Any:
        flow = self.follower.flow(tensor)
        if flow.mixed:
            self.follower.reasons.append(f"Python code reads the size of a tensor that has been mixed: {flow.mixed}")
        if flow.axis is None:
            return result
        if attribute in ("numel", "nelement"):
            return ExampleCount(self.follower.sizes, result // self.follower.examples)
        count = ExampleCount(self.follower.sizes, flow.per)
        if attribute == "__len__":
            return count if flow.axis == 0 else result
        if isinstance(result, torch.Size):
            return Shape(count if axis == flow.axis else n for axis, n in enumerate(result))
        dim = kwargs.get("dim", args[0] if args else 0)
        return count if dim % tensor.ndim == flow.axis else result


_MULTIPLYING = {"convolution", "addmm", "mm", "bmm", "baddbmm", "linear", "_scaled_dot_product_flash_attention_for_cpu"}
_TAKE_SIZES = {"view", "reshape", "unflatten", "flatten", "permute"}
_CREATING = {
    "zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full", "expand", "repeat",
    "broadcast_to", "tile",
}  # fmt: skip
_READING = ("tolist", "numpy", "__array__", "data_ptr", "__dlpack__", "storage", "untyped_storage", "_typed_storage")
_STRETCHING = {"expand", "broadcast_to"}
_OF_ANY = {
    "dim", "ndim", "ndimension", "element_size", "itemsize", "_version", "output_nr", "get_device", "storage_offset",
    "stride",
}  # fmt: skip
"""What gives whole numbers that are not those of examples."""
_HARMLESS = {"view", "detach", "clone", "contiguous", "permute", "_unsafe_view", "transpose"}


def _form(args: Any) -> tuple[Any, ...]:
    """Shape of the first argument, and how its entries are laid out."""
    if not args or not isinstance(args[0], Tensor):
        return ()
    strides = [s for s, n in zip(args[0].stride(), args[0].shape, strict=True) if n > 1]
    return args[0].shape, strides, args[0].storage_offset()


def _width(entry: Any) -> int:
    """The number of axes that an entry of an index covers."""
    if entry is None or entry is Ellipsis or isinstance(entry, bool):
        return 0
    return entry.ndim if isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8) else 1


def _counts(result: Any) -> bool:
    """Whether a result is a whole number, or contains one."""
    return not isinstance(result, Tensor) and any(type(leaf) is int for leaf in pytree.tree_leaves(result))
