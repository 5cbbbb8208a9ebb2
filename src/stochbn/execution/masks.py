"""Random numbers of a pass, such as dropout masks, from a generator of the pass's own."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from stochbn.network.calling import NetworkInput
from stochbn.network.replica import Network, Replica

__all__ = ["DispatchMode", "Masks", "dropping_modules"]


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that sees tensor operations and does not import the compiler, which takes seconds, to keep out of it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Masks(DispatchMode):  # type: ignore[no-untyped-call]
    """Within it, random numbers are those that ``torch.manual_seed(seed)`` would give, and no global generator is used.

    Args:
        seed: of the pass.

    Attributes:
        used: whether random numbers were taken.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self.used = False
        self._generators: dict[torch.device, torch.Generator] = {}

    def restart(self, seed: int) -> None:
        """Have the next random numbers be the first ones of another seed."""
        self._seed = seed
        self._generators.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self.used = True
        device = kwargs.get("device")
        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if device is None and tensors:
            device = tensors[0].device
        generator = self._generator(torch.device(device or "cpu"))
        if func.overloadpacket is torch.ops.aten.native_dropout:
            return _dropout(args[0], args[1], generator)
        if any(argument.name == "generator" for argument in func._schema.arguments):
            if kwargs.get("generator") is None:
                kwargs["generator"] = generator
            return func(*args, **kwargs)
        drawn = getattr(func.overloadpacket, "generator", None)  # such as rand, which has another overload for it
        return func(*args, **kwargs) if drawn is None else drawn(*args, generator=generator, **kwargs)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def _dropout(x: Tensor, rate: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The function of ``native_dropout``, which takes no generator."""
    kept = torch.empty_like(x).bernoulli_(1 - rate, generator=generator)
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


def dropping_modules(network: Network, inputs: NetworkInput) -> set[str]:
    """Names of the modules that call dropout with a positive rate when all but the batch norms are in training mode.

    It is found out by a pass, over a copy where the network can be copied, and is empty for one that fails in training
    mode.
    """
    with network.copied() as replica:
        return _dropping(replica, inputs)


def _dropping(replica: Replica, inputs: NetworkInput) -> set[str]:
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
        with torch.inference_mode(False), torch.no_grad(), Masks(0), dropouts:
            inputs.call(replica.model)
    except Exception:  # which the pass itself will raise, if it is not for training mode
        return set()
    finally:  # of the network itself, where it cannot be copied
        for handle in handles:
            handle.remove()
    return dropouts.names
