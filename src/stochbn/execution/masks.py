"""Random numbers of a pass, such as dropout masks, from the pass's own generator."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from stochbn.network.calling import NetworkInput
from stochbn.network.replica import Network, Replica
from stochbn.undisturbed import without_gradients

__all__ = ["DispatchMode", "Masks", "arguments", "draws", "dropping_modules"]


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that sees tensor operations, without importing the compiler, which takes seconds."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


LARGE = 4096
"""On a CPU, larger dropout masks are made from 16 random bits for each entry, which is much faster."""


class Masks(DispatchMode):  # type: ignore[no-untyped-call]
    """A context in which random numbers are those after ``torch.manual_seed(seed)``, without using a global generator.

    Large dropout masks on a CPU also come from this seed, but are made in a faster way (`LARGE`).

    Args:
        seed: the seed of the pass, or a function that returns it when it is needed.

    Attributes:
        used: whether random numbers were taken.
    """

    def __init__(self, seed: int | Callable[[], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self.used = False
        self._generators: dict[torch.device, torch.Generator] = {}

    def restart(self, seed: int) -> None:
        """Start again with another seed."""
        self._seed = seed
        self._generators.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        bound = arguments(func, args, kwargs)
        if not draws(bound):
            return func(*args, **kwargs)
        self.used = True
        if bound.get("generator") is not None:
            return func(*args, **kwargs)
        device = kwargs.get("device")
        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if device is None and tensors:
            device = tensors[0].device
        device = torch.device(device or "cpu")
        if device.type == "meta":  # which has no numbers
            return func(*args, **kwargs)
        generator = self._generator(device)
        if func.overloadpacket is torch.ops.aten.native_dropout:
            return _dropout(args[0], args[1], generator)
        if func is torch.ops.aten.bernoulli_.float:
            return _bernoulli(bound["self"], bound["p"], generator)
        taking = _taking_generator(func)
        if taking is None:
            return _in_place_of_global(generator, functools.partial(func, *args, **kwargs))
        place = [argument.name for argument in taking._schema.arguments].index("generator")
        if taking is func and place < len(args):
            return func(*args[:place], generator, *args[place + 1 :], **kwargs)
        return taking(*args, **{**kwargs, "generator": generator})

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            seed = self._seed if isinstance(self._seed, int) else self._seed()
            self._generators[device] = torch.Generator(device).manual_seed(seed)
        return self._generators[device]


def arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of an operation by name, with defaults."""
    schema = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return {**defaults, **dict(zip((argument.name for argument in schema), args, strict=False)), **kwargs}


def draws(bound: dict[str, Any]) -> bool:
    """Whether an operation draws random numbers with these arguments; dropout that is off does not."""
    return bound.get("dropout_p") != 0 and bound.get("train") is not False and bound.get("training") is not False


@functools.cache
def _taking_generator(func: Any) -> Any:
    """The overload of an operation that also takes a generator; None if there is none."""
    wanted = [(argument.name, str(argument.type)) for argument in func._schema.arguments]
    for overload in (func, *(getattr(func.overloadpacket, name) for name in func.overloadpacket.overloads())):
        found = [(argument.name, str(argument.type)) for argument in overload._schema.arguments]
        others = [one for one in found if one[0] != "generator"]
        if len(others) < len(found) and others == [one for one in wanted if one[0] != "generator"]:
            return overload
    return None


def _in_place_of_global(generator: torch.Generator, call: Callable[[], Any]) -> Any:
    """Make a call that uses PyTorch's global generator, with the state of another generator."""
    device = generator.device
    own = (
        torch.default_generator
        if device.type == "cpu"
        else getattr(torch, device.type).default_generators[device.index or 0]
    )
    before = own.get_state()
    try:
        try:
            own.set_state(generator.get_state())
            result = call()
            generator.set_state(own.get_state())
        finally:
            own.set_state(before)
    finally:  # again, as an interrupt may have come in between
        own.set_state(before)
    return result


def _bernoulli(mask: Tensor, kept: float, generator: torch.Generator) -> Tensor:
    """Fill a mask with ones, each with the probability `kept`, and zeros.

    16 bits cannot represent all probabilities. The threshold is rounded up or down at random, so that the probability
    of every entry is `kept` to 48 bits.
    """
    if mask.device.type != "cpu" or mask.numel() < LARGE or not 0 <= kept <= 1:
        return mask.bernoulli_(kept, generator=generator)
    words = torch.empty(-(-mask.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    bits = words.view(torch.int16)[: mask.numel()].view(mask.shape)
    threshold = math.floor(kept * 2**16 + torch.rand((), dtype=torch.float64, generator=generator).item()) - 2**15
    return mask.copy_(torch.ones_like(bits) if threshold == 2**15 else bits < threshold)


def _dropout(x: Tensor, rate: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The function of ``native_dropout``, which takes no generator."""
    kept = _bernoulli(torch.empty_like(x), 1 - rate, generator)
    return (x * kept / (1 - rate) if rate < 1 else torch.zeros_like(x)), kept.bool()


class _Dropouts(TorchFunctionMode):
    """Notes in which module the functions of dropout are called with a positive rate."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.running = [""]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            if (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0)) > 0:
                self.names.add(self.running[-1])
        elif "dropout" in name or name == "multi_head_attention_forward":
            try:
                bound = inspect.signature(func).bind(*args, **kwargs)
                bound.apply_defaults()
                rate = bound.arguments.get("p", bound.arguments.get("dropout_p", 0))
                on = bound.arguments.get("training", True)
            except (TypeError, ValueError):  # a function of C++, of which Python does not know the arguments
                rate, on = 1, True
            if rate > 0 and on:
                self.names.add(self.running[-1])
        return func(*args, **kwargs)


@without_gradients
def dropping_modules(network: Network, inputs: NetworkInput) -> set[str] | Exception:
    """The names of modules that call dropout with a positive rate when all but the batch norms are in training mode.

    A pass over a copy finds them, or over the network itself if it cannot be copied. Returns the error if it fails.
    """
    with network.copied() as replica:
        return _dropping(replica, inputs)


def _dropping(replica: Replica, inputs: NetworkInput) -> set[str] | Exception:
    replica.modes(frozenset(name for name, m in replica.modules.items() if not isinstance(m, _BatchNorm)))
    dropouts = _Dropouts()
    names = {module: name for name, module in replica.modules.items()}

    def enter(module: nn.Module, args: Any) -> None:
        dropouts.running.append(names[module])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        dropouts.running.pop()

    handles = []
    for module in replica.modules.values():
        if not isinstance(module, torch.jit.ScriptModule):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with Masks(0), dropouts:
            inputs.call(replica.model)
    except Exception as error:  # which the pass itself will raise, if it is not for training mode
        return error
    finally:  # of the network itself, where it cannot be copied
        for handle in handles:
            handle.remove()
    return dropouts.names
