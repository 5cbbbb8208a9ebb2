"""Run the layers before the first batch norm of every path only once for all draws.

Applies to: calls of modules whose outputs are proven not to depend on the draw, without side effects and user hooks,
and whose outputs are not written to afterwards. Error: none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stochbn.execution.follow import Followed
from stochbn.execution.watch import Unit
from stochbn.network.replica import Replica

__all__ = ["PrefixCache", "applies"]


def applies(followed: Followed) -> str:
    """The reason not to try this way; empty if there is none."""
    if not followed.units:
        return "nothing that is worth keeping comes before the first batch norm, without side effects"
    if sum(unit.size for unit in followed.units) > 2 * followed.largest:
        return "its outputs take more memory than twice the largest tensor of a pass"
    return ""


class _Kept:
    """The output of one call of a module for all examples, filled piece by piece."""

    def __init__(self, per: Sequence[int]) -> None:
        self.per = per
        self.tensors: list[Tensor] = []
        self.structure: Any = None
        self.examples = 0

    def fill(self, output: Any, start: int, stop: int, examples: int) -> None:
        leaves, self.structure = pytree.tree_flatten(output)
        for place, (out, per) in enumerate(zip(leaves, self.per, strict=True)):
            if place == len(self.tensors):
                shape = (examples * per, *out.shape[1:])
                self.tensors.append(
                    torch.empty(shape, dtype=out.dtype, device=out.device, memory_format=_layout(out)) if per else out
                )
            if per:
                self.tensors[place][start * per : stop * per] = out[: (stop - start) * per]
        self.examples += stop - start

    def rows(self, start: int, stop: int, times: int, least: int) -> Any:
        chosen = [t[start * per : stop * per] if per else t for t, per in zip(self.tensors, self.per, strict=True)]
        missing = least - (stop - start) * times
        if missing > 0:  # the last example is repeated, as in the input
            pairs = zip(chosen, self.per, strict=True)
            chosen = [torch.cat([t, *[t[-per:]] * missing]) if per else t for t, per in pairs]
        if times > 1:
            chosen = [torch.cat([t] * times) if per else t for t, per in zip(chosen, self.per, strict=True)]
        return pytree.tree_unflatten(chosen, self.structure)

    def take(self, mask: Tensor) -> None:
        self.tensors = [
            t[mask.repeat_interleave(per)].contiguous(memory_format=_layout(t)) if per else t
            for t, per in zip(self.tensors, self.per, strict=True)
        ]


class PrefixCache:
    """Keeps the outputs of modules in the first pass over the examples, and returns them in later passes.

    Args:
        units: the calls whose outputs are kept.
        examples: the number of examples.
    """

    def __init__(self, units: Sequence[Unit], examples: int) -> None:
        self._units = {(unit.name, unit.call): unit for unit in units}
        self._kept: dict[tuple[str, int], _Kept] = {}
        self._examples = examples
        self._calls: dict[str, int] = {}
        self._now = (0, 0, 1, 1)
        self._complete = False
        self._replaced: list[tuple[nn.Module, Any]] = []

    def install(self, replica: Replica) -> None:
        """Replace the calls of a network, until `remove`."""
        for name in {name for name, _ in self._units}:
            module = replica.modules[name]
            self._replaced.append((module, vars(module).get("forward")))
            vars(module)["forward"] = self._serving(name, module.forward)

    def remove(self) -> None:
        """Restore the network."""
        for module, own in self._replaced:
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own
        self._replaced.clear()

    def begin(self, start: int, stop: int, times: int, least: int = 1) -> None:
        """Begin a pass of the examples `start` to `stop`, each `times`, padded to `least` with copies of the last."""
        self._now = start, stop, times, least
        self._calls = dict.fromkeys(self._calls, 0)

    def done(self) -> None:
        """End the first pass over all examples; calls that have not seen each example once will run every time."""
        if not self._complete:
            self._kept = {key: kept for key, kept in self._kept.items() if kept.examples == self._examples}
            self._complete = True

    def take(self, mask: Tensor) -> None:
        """Keep some of the examples."""
        for kept in self._kept.values():
            kept.take(mask)

    def _serving(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def serve(*args: Any, **kwargs: Any) -> Any:
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            key = name, call
            if self._complete and key in self._kept:
                return self._kept[key].rows(*self._now)
            output = forward(*args, **kwargs)
            if not self._complete and key in self._units:
                start, stop, *_ = self._now
                kept = self._kept.setdefault(key, _Kept(self._units[key].per))
                kept.fill(output, start, stop, self._examples)
            return output

        return serve


def _layout(tensor: Tensor) -> torch.memory_format:
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format
