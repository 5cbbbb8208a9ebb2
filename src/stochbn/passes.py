"""Forward passes of one network under many statistics, as cheap as they can be made with the same results."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stochbn.network.calling import call, channels_last_weights, copied, find_logits, length, modes, take
from stochbn.network.layers import batch_norms, buffer_names, running_statistics

__all__ = ["Early", "Forward", "Plan"]

PIECE = 8 * 2**20
"""Bytes that the largest activation of a pass on a CPU should have. Larger ones fall out of the cache, and the memory
allocator hands them back to the system after every use."""

ROWS = 16
"""Objects in a pass below which a pass costs about as much as one of so many."""

MULTIPLYING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""The layers that may run in bfloat16."""

FEW = 32
"""Objects, at least, to judge rounding by. Few of them bear most of the noise: of 8, a tenth of samples are far off."""

LARGE = 2**16
"""Weights of these layers below which a pass takes no less time in bfloat16."""


@dataclass(frozen=True)
class Plan:
    """How passes over one input are made.

    Attributes:
        weights: the convolutions' weights in channels-last layout, by their names; empty for the network's own layout.
        size: how many objects go through the network together; None for all.
        separable: whether an object's logits are the same without the others of its batch.
        rows: how many objects may go through the network together under different draws; 0 for none.
        head: the layer that makes the logits, if the others run in bfloat16; None for the network's own type.
        early: the layers that give the same under every draw, as they come before the first batch norm.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    size: int | None = None
    separable: bool = False
    rows: int = 0
    head: nn.Module | None = None
    early: tuple[nn.Module, ...] = ()

    def draws(self, objects: int) -> int:
        """How many draws of so many objects to make in one pass: 1, 2 or a multiple of 4."""
        fit = self.rows // objects
        return fit // 4 * 4 if fit >= 4 else max(1, fit // 2 * 2)


class Early:
    """What layers that do not depend on the draw make of the objects of a call.

    The first pass over the objects notes their outputs, later ones take them from here instead of running the layers.

    Args:
        layers: a plan's `early` ones.
    """

    def __init__(self, layers: Sequence[nn.Module] = ()) -> None:
        self._layers = layers
        self._outputs: dict[nn.Module, Tensor] = {}
        self._noted: dict[nn.Module, int] = {}
        self._known = False

    def take(self, objects: Tensor) -> None:
        """Keep some of the objects: a mask over those there are, ``[N]``."""
        for layer, out in self._outputs.items():
            with _versioned():
                self._outputs[layer] = out[objects].contiguous(memory_format=_layout(out))

    def done(self, objects: int) -> None:
        """All objects have gone through the network; layers that have not seen each of them once are run every time."""
        if not self._known:
            self._outputs = {layer: out for layer, out in self._outputs.items() if self._noted[layer] == objects}
            self._known = True

    @contextmanager
    def used(self, start: int, stop: int, objects: int, times: int) -> Iterator[None]:
        """Within it the network is called with those from `start` to `stop` of so many objects, all of them `times`."""

        def note(layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if not isinstance(out, Tensor) or len(out) != times * (stop - start):
                self._noted[layer] = -objects
                return
            if layer not in self._outputs:
                shape = (objects, *out.shape[1:])
                with _versioned():
                    self._outputs[layer] = torch.empty(
                        shape, dtype=out.dtype, device=out.device, memory_format=_layout(out)
                    )
            self._outputs[layer][start:stop] = out[: stop - start]
            self._noted[layer] = self._noted.get(layer, 0) + stop - start

        served = {layer: out._version for layer, out in self._outputs.items()} if self._known else {}
        with ExitStack() as stack:
            for layer in self._layers:
                if not self._known:
                    stack.callback(layer.register_forward_hook(note, prepend=True).remove)
                elif layer in self._outputs:
                    out = self._outputs[layer][start:stop]
                    _replace_forward(layer, torch.cat([out] * times) if times > 1 else out, stack)
            yield
        for layer, version in served.items():  # one that the network wrote to served this pass, but no other
            if self._outputs[layer]._version != version:
                del self._outputs[layer]


class Forward:
    """A network's logits with buffers in place of its own.

    `plan` finds the cheapest way that gives the same logits. On a CPU convolutions run in channels-last layout, large
    batches in pieces that stay in cache, and several draws of few objects in one pass, each object normalised by the
    statistics of its draw; everywhere, the layers before the first batch norm run once. A network that cannot run so,
    or whose objects affect each other, is run as it is: this is found out by five small passes or six, over a
    sixteenth of the objects or an eighth, when inputs of a new shape come. Where the processor multiplies bfloat16
    numbers, all but the layer that makes the logits may run in these; whether rounding matters beside the noise of the
    draws takes eight more passes over up to 32 objects, again when some come that are half as large again as before.

    Args:
        model: the network.
        place: where the logits are in its output, as for `stochbn.Predictive`.
        compiled: run the passes through ``torch.compile``. Where that fails they run without it, with a warning.
    """

    def __init__(self, model: nn.Module, place: str | int | None = None, *, compiled: bool = False) -> None:
        self.model = model
        self.place = place
        self._measured: dict[Any, _Measured] = {}
        self._rounding: dict[Any, _Rounding] = {}
        self._stacks = True
        self._compiled: Callable[..., Any] | None = torch.compile(self._functional) if compiled else None

    def __call__(
        self, draws: Sequence[Mapping[str, Tensor]], inputs: Any, plan: Plan, early: Early | None = None
    ) -> list[Tensor]:
        """The logits ``[N, K, ...]`` of each draw of buffers, which are brought to the network's type and device.

        Args:
            draws: the buffers of each draw.
            inputs: the network's input.
            plan: how to make the passes.
            early: of these inputs, under the same plan; None for running all layers.

        Raises:
            RuntimeError, ValueError, TypeError: as `stochbn.network.calling.call` and `find_logits` there raise them.
        """
        if len(draws) > 1:
            try:
                return self._stacked(draws, inputs, plan, early or Early())
            except (RuntimeError, ValueError):  # such as when only some of the objects come to a batch norm
                self._stacks = False
                return [logits for draw in draws for logits in self([draw], inputs, plan, early)]
        own = dict(self.model.named_buffers(remove_duplicate=False))
        tensors = {**plan.weights, **{name: value.to(own[name]) for name, value in draws[0].items()}}
        if plan.size is None:  # objects that are not told apart
            return [self._logits(tensors, inputs, plan.head)]
        early, objects, found = early or Early(), length(inputs), []
        for start in range(0, max(objects, 1), plan.size):
            stop = min(start + plan.size, objects)
            with early.used(start, stop, objects, 1):
                piece = take(inputs, slice(start, stop)) if stop - start < objects else inputs
                if self._compiled is not None and plan.separable and 0 < stop - start < ROWS:
                    # Compiled code is made again for one object, and for fewer than 16 in a convolution.
                    piece = take(piece, torch.arange(ROWS).clamp(max=stop - start - 1))
                found.append(self._logits(tensors, piece, plan.head)[: stop - start])
        early.done(objects)
        return [found[0] if len(found) == 1 else torch.cat(found)]

    def plan(
        self, inputs: Any, sample: Callable[[], Sequence[Mapping[str, Tensor]]] | None = None, averaged: int = 50
    ) -> Plan:
        """How to make many passes over `inputs`; what it measures for their shape serves all later calls.

        Args:
            inputs: the network's input.
            sample: gives some independent draws to judge rounding by: passes are made in bfloat16 if that changes
                probabilities, in the mean square, by at most a quarter of the variance of a mean over draws. None for
                passes in the network's own type.
            averaged: how many draws that mean is over.
        """
        try:
            objects = length(inputs)
        except ValueError:
            objects = 0
        # A network that is compiled already would be compiled again for every other layout and number of objects.
        if not objects or any(m._compiled_call_impl or hasattr(m, "_orig_mod") for m in self.model.modules()):
            return Plan()
        key = _shape(inputs), objects > 1, torch.is_autocast_enabled("cpu")
        if key not in self._measured:
            try:
                measured = self._measure(inputs, objects)
            except (RuntimeError, ValueError, TypeError):  # which the pass itself will raise, with its own shape
                measured = None
            if measured is None:
                return Plan()
            self._measured[key] = measured
        found = self._measured[key]
        activation, head = found.activation, None
        rounds = found.separable and self._compiled is None and _on_cpu(inputs) and _multiplies_bfloat16()
        if sample is not None and rounds:
            head = self._rounded(key, inputs, found.channels_last, sample, averaged)
        if head is not None:
            weights = self._low(head)
            activation /= 2
        else:
            weights = channels_last_weights(self.model) if found.channels_last else {}
        pieces = max(1, round(objects * activation / PIECE)) if found.separable and _on_cpu(inputs) else 1
        size = math.ceil(objects / pieces)
        rows = max(size // 3, min(ROWS, int(PIECE / max(activation, 1)))) if found.stackable and self._stacks else 0
        return Plan(weights, size, found.separable, rows, head, found.early)

    def _measure(self, inputs: Any, objects: int) -> _Measured | None:
        """What is known of such inputs, from some objects of these; None if they tell nothing."""
        few = objects // 16 | 1
        # Objects from anywhere, and every second of them in the opposite order: their neighbours are others each time.
        twice = take(inputs, _spread(objects, 2 * few))
        order = torch.arange(length(twice) - 1, -1, -2)
        part = take(twice, order)
        sizes = [0]
        outputs: dict[nn.Module, list[Any]] = {}

        def arrive(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = (*args, *kwargs.values())
            sizes.extend(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))

        def note(layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if len(sizes) == 1 or layer in outputs:  # before the first batch norm, or once more
                outputs.setdefault(layer, []).append(out)

        with torch.no_grad(), modes(self.model, lambda module: False), ExitStack() as hooks:
            alone = find_logits(call(self.model, {}, part), self.place)
            if alone.softmax(1).isnan().any():
                return None
            for norm in batch_norms(self.model).values():
                hooks.callback(norm.register_forward_pre_hook(arrive, with_kwargs=True).remove)
            for module in self.model.modules():
                if isinstance(module, MULTIPLYING):
                    hooks.callback(module.register_forward_hook(note, prepend=True).remove)
            weights = channels_last_weights(self.model) if _on_cpu(inputs) else {}
            for tensors in (weights, {}) if weights else ({},):
                del sizes[1:]
                outputs.clear()
                try:
                    with _versioned():
                        together = find_logits(call(self.model, tensors, twice), self.place)
                except (RuntimeError, ValueError):  # such as from view() on a tensor in channels-last layout
                    continue
                if len(together) > 1 and (together == together[:1]).all():
                    return None  # equal objects do not tell whether they affect each other
                if len(alone) == len(order) and len(together) == length(twice) and _agree(alone, together[order]):
                    hooks.close()
                    activation = max(sizes) / len(together)
                    if self._compiled is not None:
                        return _Measured(bool(tensors), activation, True)
                    plan, draws = Plan(tensors), self._neighbours()
                    wanted = [alone, self(draws[1:], part, plan)[0]]
                    early = {layer: out[order] for layer, out in _unchanged(outputs, len(together), activation).items()}
                    if early and not self._served(early, draws[1], part, plan, wanted[1]):
                        early = {}
                    stackable = self._stackable(draws, part, plan, wanted)
                    return _Measured(bool(tensors), activation, True, stackable, tuple(early))
        return _Measured()

    def _served(
        self, outputs: Mapping[nn.Module, Tensor], draw: Mapping[str, Tensor], inputs: Any, plan: Plan, wanted: Tensor
    ) -> bool:
        """Whether a draw gives the wanted logits with these outputs in place of the layers' own."""
        with ExitStack() as stack:
            for layer, out in outputs.items():
                _replace_forward(layer, out, stack)
            return _agree(wanted, self([draw], inputs, plan)[0])

    def _neighbours(self) -> list[dict[str, Tensor]]:
        """Two draws: the running statistics, and others near them."""
        draws: list[dict[str, Tensor]] = [{}, {}]
        for name, layer in batch_norms(self.model).items():
            mean, variance = running_statistics(layer)
            moved = mean + 0.1 * (variance + layer.eps).sqrt(), 1.2 * variance
            for draw, values in zip(draws, ((mean, variance), moved), strict=True):
                draw.update(zip(buffer_names(name), values, strict=True))
        return draws

    def _stackable(
        self, draws: Sequence[Mapping[str, Tensor]], inputs: Any, plan: Plan, wanted: Sequence[Tensor]
    ) -> bool:
        """Whether these draws give the wanted logits in one pass."""
        if not _on_cpu(inputs) or torch.is_autocast_enabled("cpu"):
            return False
        for layer in batch_norms(self.model).values():
            mean, variance = running_statistics(layer)
            # The draws' statistics come on top of the network's own, which must leave them digits enough.
            if mean.dtype.itemsize < 4 or not (mean.abs() <= 1000 * (variance + layer.eps).sqrt()).all():
                return False
        try:
            return all(map(_agree, wanted, self._stacked(draws, inputs, plan, Early())))
        except (RuntimeError, ValueError):
            return False

    def _rounded(
        self,
        key: Any,
        inputs: Any,
        channels_last: bool,
        sample: Callable[[], Sequence[Mapping[str, Tensor]]],
        averaged: int,
    ) -> nn.Module | None:
        """The layer that makes the logits, if the others may run in bfloat16: by objects as large as any before."""
        known = self._rounding.get(key)
        if known is not None and known.head is None:
            return None
        sizes = _amplitudes(inputs)
        largest = sizes.max().item()
        if known is None or largest > known.largest or known.head not in set(self.model.modules()):
            if not math.isfinite(largest):
                return None
            ranks = _spread(len(sizes), max(FEW, len(sizes) // 16))
            chosen = take(inputs, sizes.argsort(stable=True)[ranks])
            known = _Rounding(self._head(chosen, channels_last, sample(), averaged), 1.5 * largest)
            self._rounding[key] = known
        return known.head

    def _head(
        self, inputs: Any, channels_last: bool, draws: Sequence[Mapping[str, Tensor]], averaged: int
    ) -> nn.Module | None:
        """The layer that makes the logits, if passes with the others in bfloat16 round little beside these draws."""
        called: list[nn.Module] = []
        layers = [module for module in self.model.modules() if isinstance(module, MULTIPLYING)]
        if torch.is_autocast_enabled("cpu") or any(m.weight.dtype != torch.float32 for m in layers):
            return None
        if sum(m.weight.numel() for m in layers) < LARGE:
            return None
        with torch.no_grad(), modes(self.model, lambda module: False), ExitStack() as hooks:
            for layer in layers:
                hooks.callback(layer.register_forward_hook(lambda module, args, out: called.append(module)).remove)
            own = Plan(channels_last_weights(self.model) if channels_last else {})
            full = [self([draw], inputs, own)[0].softmax(1) for draw in draws]
            hooks.close()
            if not called:
                return None
            low = Plan(self._low(called[-1]), head=called[-1])
            try:
                rounded = [self([draw], inputs, low)[0] for draw in draws]
            except (RuntimeError, ValueError):  # such as from a layer of another kind, whose weights are not bfloat16
                return None
        if any(logits.dtype != torch.float32 for logits in rounded):
            return None
        probs = torch.stack(full)
        error = (torch.stack(rounded).softmax(2) - probs).square().mean()
        return called[-1] if error <= probs.var(0).mean() / (4 * averaged) else None

    def _stacked(self, draws: Sequence[Mapping[str, Tensor]], inputs: Any, plan: Plan, early: Early) -> list[Tensor]:
        """The logits of several draws from one pass over as many copies of the input.

        The network's own statistics stay. What comes into a batch norm is shifted and scaled before, so that it leaves
        as if normalised by those of its draw: ``(x - m_s) sqrt((v + eps) / (v_s + eps)) + m``.
        """
        objects = length(inputs)
        rows = len(draws) * objects

        def exchange(scale: Tensor, shift: Tensor, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *others = args
            if len(x) != rows or x.shape[1] != scale.shape[1]:
                raise ValueError("a batch norm whose input is not [N, C, ...] for the network's N objects")
            shape = (rows, -1) + (1,) * (x.ndim - 2)
            return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(x.dtype), *others

        with ExitStack() as hooks:
            for name, layer in batch_norms(self.model).items():
                if buffer_names(name)[0] not in draws[0]:
                    continue
                mean, variance = running_statistics(layer)
                means, variances = (torch.stack([d[key] for d in draws]).to(mean) for key in buffer_names(name))
                scale = ((variance + layer.eps) / (variances + layer.eps)).sqrt()
                each = [v.repeat_interleave(objects, 0) for v in (scale, mean - means * scale)]
                hooks.callback(layer.register_forward_pre_hook(functools.partial(exchange, each[0], each[1])).remove)
            hooks.enter_context(early.used(0, objects, objects, len(draws)))
            logits = self._logits(plan.weights, _repeated(inputs, len(draws)), plan.head)
        early.done(objects)
        if len(logits) != rows:
            raise ValueError("the output has no logits for each object")
        return list(torch.split(logits, objects))

    def _low(self, head: nn.Module) -> dict[str, Tensor]:
        """The weights in bfloat16, those of convolutions in channels-last layout, of all layers but `head`."""
        found = {}
        for prefix, module in self.model.named_modules():
            if not isinstance(module, MULTIPLYING) or module is head:
                continue
            for name, value in module.named_parameters(recurse=False):
                planes = isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and value.ndim == 4
                layout = torch.channels_last if planes else torch.contiguous_format
                found[f"{prefix}.{name}"] = value.detach().to(torch.bfloat16, memory_format=layout)
        return found

    def _logits(self, tensors: Mapping[str, Tensor], inputs: Any, head: nn.Module | None) -> Tensor:
        if head is not None:
            hook = head.register_forward_pre_hook(lambda module, args: tuple(map(_full, args)))
            try:
                return find_logits(call(self.model, tensors, _in_bfloat16(inputs)), self.place)
            finally:
                hook.remove()
        if self._compiled is None:
            return find_logits(call(self.model, tensors, inputs), self.place)
        try:
            return find_logits(self._compiled(dict(tensors), *_dynamic(copied(inputs))), self.place)
        except Exception as error:
            logits = find_logits(call(self.model, tensors, inputs), self.place)
            self._compiled = None
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"{type(self.model).__name__} cannot be compiled, so its passes are made without torch.compile; "
                f"that is slower and gives the same results ({type(error).__name__}: {reason})",
                stacklevel=4,  # who called the predictive
            )
            return logits

    def _functional(self, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return functional_call(self.model, tensors, args, kwargs, tie_weights=False)


@dataclass(frozen=True)
class _Measured:
    """What is known of inputs of one shape.

    Attributes:
        channels_last: whether convolutions work in that layout.
        activation: the largest input of a batch norm, in bytes for an object.
        separable: whether an object's logits are the same without the others.
        stackable: whether several draws can be made in one pass.
        early: the layers before the first batch norm whose outputs can be kept.
    """

    channels_last: bool = False
    activation: float = 0.0
    separable: bool = False
    stackable: bool = False
    early: tuple[nn.Module, ...] = ()


@dataclass(frozen=True)
class _Rounding:
    """Whether inputs of one shape may be rounded.

    Attributes:
        head: the layer that makes the logits, if the others run in bfloat16; None if they must not.
        largest: the largest number in inputs for which this holds.
    """

    head: nn.Module | None
    largest: float


@contextmanager
def _versioned() -> Iterator[None]:
    """Tensors that are made within it tell whether they have been written to, as those of inference mode do not."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _unchanged(outputs: Mapping[nn.Module, Sequence[Any]], objects: int, activation: float) -> dict[nn.Module, Tensor]:
    """Of layers' outputs, the single ones with a row for each object that nothing has written to since.

    None if together they are larger than the largest input of a batch norm, so that keeping them costs little memory.
    """
    kept = {
        layer: made[0]
        for layer, made in outputs.items()
        if len(made) == 1 and isinstance(made[0], Tensor) and len(made[0]) == objects and made[0]._version == 0
    }
    return kept if sum(t.numel() * t.element_size() for t in kept.values()) <= objects * activation else {}


def _replace_forward(layer: nn.Module, out: Tensor, stack: ExitStack) -> None:
    """Let a layer give this output, until the stack is closed."""
    if "forward" in vars(layer):
        stack.callback(setattr, layer, "forward", layer.forward)
    else:
        stack.callback(delattr, layer, "forward")
    layer.forward = lambda *args, **kwargs: out


def _layout(tensor: Tensor) -> torch.memory_format:
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it; without them such passes are slower, not faster."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(supported is not None and supported() for supported in asked)


def _spread(objects: int, most: int) -> Tensor:
    """At most so many of the objects, evenly spread from the first to the last: their indices."""
    return torch.linspace(0, objects - 1, min(objects, most)).round().long()


def _amplitudes(inputs: Any) -> Tensor:
    """``[N]``: the largest absolute number of every object."""
    tensors = (inputs,) if isinstance(inputs, Tensor) else inputs.values()
    return torch.stack(
        [
            t.reshape(len(t), -1).abs().amax(1).float() if t.is_floating_point() and t.numel() else torch.zeros(len(t))
            for t in tensors
            if isinstance(t, Tensor)
        ]
    ).amax(0)


def _in_bfloat16(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.bfloat16() if inputs.dtype == torch.float32 else inputs
    return {k: _in_bfloat16(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _full(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def _repeated(inputs: Any, times: int) -> Any:
    if isinstance(inputs, Tensor):
        return torch.cat([inputs] * times)
    return {k: torch.cat([v] * times) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _dynamic(called: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments, marked so that other numbers of objects need no compilation of their own."""
    args, kwargs = called
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim and value.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(value, 0)
    return called


def _shape(inputs: Any) -> Any:
    """What inputs of another number of objects have in common."""
    tensors = {"": inputs} if isinstance(inputs, Tensor) else {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    return tuple((name, value.shape[1:], value.dtype, value.device) for name, value in sorted(tensors.items()))


def _on_cpu(inputs: Any) -> bool:
    tensors = (inputs,) if isinstance(inputs, Tensor) else inputs.values()
    return all(value.device.type == "cpu" for value in tensors if isinstance(value, Tensor))


def _agree(first: Tensor, second: Tensor) -> bool:
    """Whether logits are the same but for rounding.

    Rounding grows with the logits, but for those that mask a class (-1e9, minus infinity): these must be the same.
    """
    if first.shape != second.shape:
        return False
    rounding = 3e-2 if first.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu") else 1e-4
    masks = first.abs() > 1e4
    scale = first.masked_fill(masks, 0).abs().amax().item()
    logits, others = (logits.masked_fill(masks, 0) for logits in (first, second))
    return torch.allclose(first[masks], second[masks], rtol=rounding) and torch.allclose(
        logits, others, rtol=0, atol=rounding * scale + 1e-30
    )
