"""Tracing one pass: every tensor operation that really runs, and what Python code reads of sizes and values."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from stochbn.execution.masks import DispatchMode
from stochbn.execution.rules import Flow, MixedError, flows_of, joined
from stochbn.execution.sizes import ObjectCount, Shape, Sizes, is_symbol, plain, symbols
from stochbn.execution.watch import Frame, memory_of
from stochbn.network.replica import Replica
from stochbn.network.snapshot import Snapshot

__all__ = ["Follower", "OfTheOriginal", "Reads"]


class OfTheOriginal(BaseException):
    """The copy uses a tensor of the user's network. No ``except Exception`` of a network catches it."""


class Follower(DispatchMode):  # type: ignore[no-untyped-call]
    """Follows the objects through all tensor operations."""

    def __init__(self, replica: Replica, objects: int, foreign: frozenset[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.objects, self.foreign = objects, foreign
        self.sizes = Sizes(objects)
        self.reasons: list[str] = []
        self.branches = False
        self.called: bool | None = None  # within a function of PyTorch's that Python calls, where that is seen
        snapshot = Snapshot.of(replica.model)
        self.derived: set[int] = set()
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
                self.set(statistic, Flow(drawn=True))
                self._statistics[id(statistic)] = norm

    def flow(self, tensor: Tensor) -> Flow:
        """Where the objects are in a tensor."""
        found = self._flows.get(id(tensor))
        if found is None:  # not seen before: the network's own, or an alias such as ``.data``
            written = self._contents.get(memory_of(tensor), "") if self._contents else ""
            found = Flow(mixed=written)
        return found

    def set(self, tensor: Tensor, flow: Flow) -> None:
        """Note where the objects are in a tensor."""
        if id(tensor) not in self._flows:
            self._alive.append(tensor)  # so that no other tensor gets its identity
            self._sharing.setdefault(memory_of(tensor), []).append(tensor)
        self._flows[id(tensor)] = flow

    def read(self, tensor: Any, what: str) -> None:
        """Python code looks at the values of a tensor."""
        if not isinstance(tensor, Tensor):
            return
        if not self.flow(tensor).constant or self.flow(tensor).drawn:
            self.reasons.append(what)
            self.branches = True
        elif memory_of(tensor) in self.own or id(tensor) in self.derived:  # which may change without a sign
            self.reasons.append("Python code depends on the values of a parameter or buffer")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        # What Python lists become tensors by is not seen to be called, but what is in the lists is: symbols of sizes.
        if self.called is False and func is not torch.ops.aten.lift_fresh.default:
            self.reasons.append("operations that Python does not call hide what depends on the number of objects")
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
        if any(memory_of(t) in self.own or id(t) in self.derived for t in tensors):
            self.derived.update(map(id, made))
        try:
            random = torch.Tag.nondeterministic_seeded in func.tags and not _off(func, args, kwargs)
            if random and any(not self.flow(t).constant for t in tensors):
                raise MixedError("random numbers are drawn")
            if _form(args) != form:
                raise MixedError(f"the operation {name} changes the shape of a tensor in place")
            if name == "as_strided_":  # of axes of length 1, as pooling does
                flows = [self.flow(args[0])]
            else:
                flows = flows_of(func, args, kwargs, outputs, self.flow, self.objects)
        except MixedError as mixed:
            drawn = any(self.flow(t).drawn for t in tensors)
            flows = [Flow(mixed=f"{mixed}{self._where()}", drawn=drawn) for _ in made]
        except Exception:  # an operation with arguments that no rule expects
            drawn = any(self.flow(t).drawn for t in tensors)
            flows = [
                Flow(mixed=f"the operation {name} could not be followed{self._where()}", drawn=drawn) for _ in made
            ]
        self._look_at_sizes(name, args, made, flows)
        self._note(func, args, kwargs, made, flows, multiplies=name in _MULTIPLYING)
        return outputs

    def _look_at_sizes(self, name: str, args: Any, made: list[Tensor], flows: list[Flow]) -> None:
        """What goes otherwise for other numbers of objects, and the course of the pass, which must not."""
        self.trace.append((name, [tuple(t.shape) for t, flow in zip(made, flows, strict=True) if flow.constant]))
        flow = self.flow(args[0]) if args and isinstance(args[0], Tensor) else Flow()
        if flow.axis is None:
            return
        dims = args[1] if len(args) > 1 and name.startswith("squeeze") else range(args[0].ndim + 1)
        dims = [dims] if isinstance(dims, int) else dims
        if name.startswith("squeeze") and any(dim in (flow.axis, flow.axis - args[0].ndim) for dim in dims):
            self.sizes.same(lambda n: n * flow.per > 1)
        elif name in ("split", "split_with_sizes", "unbind", "unsafe_split", "chunk"):
            dim = (args[1:] or (0,))[0] if name == "unbind" else (args[2:] or (0,))[0]
            if dim % args[0].ndim == flow.axis:
                self.sizes.pin()

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
            self._contents.setdefault(storage, after.mixed or "objects are written into a tensor of the network")
        for other in self._sharing.get(storage, []):
            before = self.flow(other)
            if other.shape == tensor.shape or (before.axis, before.per) == (after.axis, after.per) or after.constant:
                self._flows[id(other)] = joined(before, after)
            else:
                reason = after.mixed or "a tensor is filled part by part"
                self._flows[id(other)] = Flow(mixed=reason, drawn=before.drawn or after.drawn)
        self.set(tensor, after)

    def _look_at_statistics(self, name: str, tensors: list[Tensor]) -> None:
        """Drawn statistics, and what goes into a batch norm, must be used by that batch norm alone."""
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
    """Sees where Python code reads sizes and values of tensors."""

    def __init__(self, follower: Follower) -> None:
        super().__init__()
        follower.called = False
        self.follower = follower

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        follower, name = self.follower, getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name in ("__get__", "__set__") else name
        if torch._C._functorch.peek_interpreter_stack() is not None:
            follower.reasons.append("torch.func hides the number of objects from the code that it transforms")
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
        elif attribute in ("nbytes", "size_bytes") and not follower.flow(args[0]).constant:
            follower.sizes.pin()
        elif name in ("__getitem__", "__setitem__"):
            self._look_at_bounds(args[0], args[1])
        elif found and name not in _TAKE_SIZES and name not in _CREATING:
            follower.sizes.pin()
        outer, follower.called = follower.called, True
        try:
            result = func(*args, **kwargs)
        finally:
            follower.called = outer
        if name in _CREATING and found:
            self._created(result, given)
        elif attribute in ("shape", "size", "__len__", "numel", "nelement"):
            return self._symbolic(args[0], result, attribute, args[1:], kwargs)
        return result

    def _created(self, result: Any, given: list[Any]) -> None:
        """A constant that is as long as there are objects is followed as one of them: its length is."""
        flow, objects = self.follower.flow(result), self.follower.objects
        if not flow.constant:
            return
        lengths = next((v for v in given if isinstance(v, (tuple, list))), given)
        axes = [result.ndim - len(lengths) + place for place, v in enumerate(lengths) if is_symbol(v)]
        if len(axes) == 1 and not symbols(given)[0].offset:
            self.follower.set(result, Flow(axis=axes[0], per=result.shape[axes[0]] // objects, drawn=flow.drawn))
        else:
            self.follower.sizes.pin()

    def _look_at_bounds(self, tensor: Any, index: Any) -> None:
        """A slice of objects takes all of them, or not, for as many as there are."""
        flow, sizes = self.follower.flow(tensor), self.follower.sizes
        if flow.axis is None:
            return
        entries = list(index) if isinstance(index, tuple) else [index]
        taking = [e for e in entries if e is not None and e is not Ellipsis]
        width = sum(e.ndim if isinstance(e, Tensor) and e.dtype == torch.bool else 1 for e in taking)
        axis = 0
        for entry in entries:
            if entry is Ellipsis:
                axis += tensor.ndim - width
            elif isinstance(entry, slice) and axis == flow.axis:
                for bound in filter(None, (entry.start, entry.stop)):
                    least = -(-abs(int(bound)) // flow.per)
                    sizes.same(functools.partial(operator.le, least))
            axis += 0 if entry is None or entry is Ellipsis else 1

    def _symbolic(self, tensor: Any, result: Any, attribute: str, args: Any, kwargs: Any) -> Any:
        flow = self.follower.flow(tensor)
        if flow.mixed:
            self.follower.reasons.append(f"Python code reads the size of a tensor that has been mixed: {flow.mixed}")
        if flow.axis is None:
            return result
        if attribute in ("numel", "nelement"):
            return ObjectCount(self.follower.sizes, result // self.follower.objects)
        count = ObjectCount(self.follower.sizes, flow.per)
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
_HARMLESS = {"view", "detach", "clone", "contiguous", "permute", "_unsafe_view", "transpose"}


def _form(args: Any) -> tuple[Any, ...]:
    """Shape of the first argument, and how its entries are laid out."""
    if not args or not isinstance(args[0], Tensor):
        return ()
    strides = [s for s, n in zip(args[0].stride(), args[0].shape, strict=True) if n > 1]
    return args[0].shape, strides, args[0].storage_offset()


def _off(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation that can draw random numbers draws none: dropout that is off."""
    names = [argument.name for argument in func._schema.arguments]
    bound = {**{a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}, **kwargs}
    bound |= dict(zip(names, args, strict=False))
    if "dropout_p" in bound:
        return bool(bound["dropout_p"] == 0)
    return "train" in bound and not bound["train"]
