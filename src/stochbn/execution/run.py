"""The state of one call: the remaining examples, what is cached for them, and how their passes are made."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from stochbn.augment import Views
from stochbn.execution.masks import Masks
from stochbn.execution.plan import Call, Draw, Plan
from stochbn.execution.reference import reference
from stochbn.execution.ways import bfloat16
from stochbn.execution.ways.channels_last import channels_last_weights
from stochbn.execution.ways.compiled import Compiled
from stochbn.execution.ways.pieces import pieces
from stochbn.execution.ways.prefix import PrefixCache
from stochbn.execution.ways.stacked import Stack
from stochbn.network.calling import NetworkInput
from stochbn.network.replica import Network, Replica

__all__ = ["CallAgainError", "Passes"]

EARLY = 2
"""The number of draws that decide whether rounding matters."""
PROBED = 4
"""The number of examples whose first draw is repeated in the slow way."""


class CallAgainError(Exception):
    """Raised if a call must be repeated, because its passes unexpectedly changed the network, or mix examples.

    Args:
        whole: why all examples must go through the network together; empty if passes changed the network.
    """

    def __init__(self, whole: str = "") -> None:
        super().__init__(whole)
        self.whole = whole


class Passes:
    """Makes the passes of one call.

    Args:
        network: the user's network, with what is known about it.
        replica: the network to run.
        inputs: the examples.
        call: the requirements of the call.
        plan: how to make the passes.
    """

    def __init__(self, network: Network, replica: Replica, inputs: NetworkInput, call: Call, plan: Plan) -> None:
        self.plan = plan
        self._first = True
        self._network, self._replica, self._call = network, replica, call
        self._inputs = inputs
        self._examples = inputs.count
        self._unchecked = bool(plan.head)
        self._cache: PrefixCache | None = None
        self._stack: Stack | None = None
        self._head: bfloat16.Head | None = None
        self._generators: dict[int, Any] = {}
        self._made = 0  # draws so far, which select the augmentation
        self._views: Views | None = None
        self._view: NetworkInput | None = None  # what the first draw sees
        if call.augment is not None:
            self._views = Views(call.augment, len(inputs.first), call.seed, call.clean)
        self._masks = call.masks if plan.random else None
        self._seed: int | None = None
        self._weights: dict[str, Tensor] | None = None
        self._known: tuple[Tensor, Tensor] | None = None  # examples, and their raw values in the slow way
        self._begin()

    def _begin(self) -> None:
        self._cache = PrefixCache(self.plan.units, self._examples) if self.plan.units else None
        self._install(self._replica)

    def _install(self, replica: Replica, mark: bool = True) -> None:
        """Bring a replica into the state that passes need.

        Args:
            replica: the one to run.
            mark: changes from here on are looked for.
        """
        self._replica, plan = replica, self.plan
        replica.modes(self._call.training)
        if "compiled" in plan.ways:
            replica.compiled = replica.compiled or Compiled(replica.model)
            replica.through = replica.compiled
        if self._network.known.caches and not self._network.known.in_place:
            self._warm_up()
        if mark:
            replica.mark()
        if self._weights is None:  # copies of the weights as they are at this call
            low = functools.partial(bfloat16.low_weights, head=plan.head)
            make = low if plan.head else channels_last_weights if "channels_last" in plan.ways else None
            copies = make(replica) if make is not None else {}
            state = self._network.known.state  # what passes write to is no copy
            self._weights = {name: copy for name, copy in copies.items() if name not in state}
        replica.exchange(self._weights)
        if plan.head:
            self._head = bfloat16.Head(replica, plan.head)
        if plan.rows:
            self._stack = Stack(replica, plan.norms)
        if self._cache is not None:
            self._cache.install(replica)

    def _warm_up(self) -> None:
        """Make a pass that fills the caches of a fresh replica, which serves only this call."""
        self._replica.usable = False
        if not self._replica.warm:
            few = self._inputs.take(slice(0, self.plan.least)) if self._inputs.divisible else self._inputs
            with Masks(0):
                reference(self._replica, {}, few, self._call.task)
            self._replica.warm = True

    def _uninstall(self) -> None:
        for mechanism in (self._cache, self._stack, self._head):
            if mechanism is not None:
                mechanism.remove()
        self._stack = self._head = self._replica.through = None
        self._replica.restore()

    def close(self) -> None:
        """Restore the replica.

        Raises:
            CallAgainError: a pass unexpectedly changed it.
        """
        self._uninstall()
        self._network.known.settle()
        self._look_for_changes()

    def _look_for_changes(self) -> None:
        known = self._network.known
        if not known.stateful and not known.in_place and self._replica.changed():
            known.stateful = True
            raise CallAgainError

    @property
    def draws(self) -> int:
        """The largest number of draws in the next call."""
        if self._unchecked:
            return self._call.settings.first
        return self._together

    @property
    def _together(self) -> int:
        """The number of draws in a pass."""
        return self.plan.draws(self._examples) if self.plan.rows else 1

    def __call__(self, draws: Sequence[Draw]) -> Tensor:
        """Make S draws of the remaining examples; return their raw values ``[S, M, C, ...]``.

        Raises:
            RuntimeError, ValueError, TypeError: as the network, or the task that reads its output, raises them.
        """
        try:
            values = self._checked(draws) if self._unchecked else self.attempt(draws)
        except CallAgainError:
            raise
        except Exception:
            if self.plan.size is None:
                raise
            # A way that worked on some examples may fail on others. The slow way shows whose error it is.
            self._change(Plan(together=self.plan.together))
            values = torch.stack([self._one(draw, self._made + i) for i, draw in enumerate(draws)])
        if self._first:
            self._call.task.check(values[0])
            if self.plan.size is not None and not self.plan.head:
                self._compare(values[0], draws[0])
            self._first, self._view = False, None
        self._made += len(draws)
        return values

    def again(self) -> None:
        """Repeat the augmentations of the first draws in the next ones."""
        self._made = 0

    def exchange(self, inputs: NetworkInput) -> None:
        """Make the next passes with other examples; only for plans without ways, which cache nothing."""
        self._inputs = inputs

    def keep(self, mask: Tensor) -> None:
        """Keep only some of the examples for the next passes."""
        self._inputs = self._inputs.take(mask)
        self._examples = len(self._inputs)
        if self._views is not None:
            self._views.keep(mask)
        if self._cache is not None:
            self._cache.take(mask)

    def attempt(self, draws: Sequence[Draw], made: int = 0) -> Tensor:
        """Make draws without checks, and raise any error of the plan's ways.

        Args:
            draws: the draws of the statistics.
            made: the number of draws that this call has made before.
        """
        together, blocks = self._together, []
        for start in range(0, len(draws), together):
            block, number = draws[start : start + together], self._made + made + start
            if len(block) > 1 and len(block) * self._examples >= self.plan.least:
                blocks.append(self._stacked(block, number))
            else:
                blocks.extend(self._one(draw, number + i)[None] for i, draw in enumerate(block))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _one(self, draw: Draw, number: int) -> Tensor:
        """Make one pass of the examples, with the inputs of the draw of this number."""
        if self._stack is not None:
            self._stack.pause()
        made, seen = [], self._seen(number)
        if self.plan.size is None:
            self._renew()
            with nullcontext() if self._masks is None else Masks(lambda: self._seed_of(number)):
                values = reference(self._replica, draw, seen, self._call.task)
            return self._restored(values, number)
        for start, stop in pieces(self._examples, self.plan.size):
            inputs = self._piece(seen, start, stop)
            self._renew()
            if self._cache is not None:
                self._cache.begin(start, stop, 1, self.plan.least)
            values = reference(self._replica, draw, inputs, self._call.task)
            made.append(values[: stop - start])
        if self._cache is not None:
            self._cache.done()
        return self._restored(made[0] if len(made) == 1 else torch.cat(made), number)

    def _seed_of(self, number: int) -> int:
        """The seed of the random numbers of the draw of this number."""
        if self._seed is None:
            assert self._masks is not None
            self._seed = self._masks()
        return (self._seed + number) % 2**63

    def _seen(self, number: int) -> NetworkInput:
        """The inputs of the draw of this number, with the first tensor augmented."""
        if self._views is None:
            return self._inputs
        views, first = self._views, self._first and number == self._made
        if first and self._view is not None:  # only once, as the function may return something else the next time
            return self._view
        seen = self._inputs.with_first(lambda tensor: views(tensor, number))
        if first:
            self._view = seen
        return seen

    def _restored(self, values: Tensor, number: int) -> Tensor:
        return values if self._views is None else self._views.undo(values, self._inputs.first, number)

    def _stacked(self, draws: Sequence[Draw], number: int) -> Tensor:
        assert self._stack is not None
        times = len(draws)
        if self._views is None:
            inputs = self._inputs.map(lambda tensor: torch.cat([tensor] * times))
        else:
            inputs = functools.reduce(NetworkInput.join, (self._seen(number + i) for i in range(times)))
        inputs = bfloat16.rounded(inputs) if self.plan.head else inputs
        self._renew()
        self._stack(draws, self._examples)
        if self._cache is not None:
            self._cache.begin(0, self._examples, times)
        values = self._call.task.raw(inputs.call(self._replica.model))
        if self._cache is not None:
            self._cache.done()
        values = values.reshape(times, self._examples, *values.shape[1:])
        if self._views is None:
            return values
        return torch.stack([self._restored(one, number + i) for i, one in enumerate(values)])

    def _piece(self, seen: NetworkInput, start: int, stop: int) -> NetworkInput:
        inputs = seen if stop - start == self._examples else seen.take(slice(start, stop))
        if stop - start < self.plan.least:
            inputs = inputs.take(torch.arange(self.plan.least, device=inputs.device).clamp(max=stop - start - 1))
        return bfloat16.rounded(inputs) if self.plan.head else inputs

    def _renew(self) -> None:
        """Make a new replica for each pass, if passes change it."""
        if self._network.known.stateful and not self._network.known.in_place:
            fresh = self._network.fresh(generators=self._generators)
            if fresh is None:  # it can no longer be copied
                raise CallAgainError
            self._uninstall()
            self._install(fresh)

    def _change(self, plan: Plan, failed: bool = True) -> None:
        """Continue with another plan; after a failure with a new replica, because the old one may be inconsistent."""
        fresh = self._network.fresh() if failed and not self._network.known.in_place else None
        self._uninstall()
        if not failed:
            self._look_for_changes()
        self.plan, self._unchecked, self._weights = plan, False, None
        self._replica.usable &= not failed
        self._replica = fresh or self._replica
        self._begin()

    def _checked(self, draws: Sequence[Draw]) -> Tensor:
        """Make the first draws of a plan that rounds, or of its exact plan if rounding matters."""
        self._unchecked = False
        exact = self.plan.exact
        if exact is None:
            return self.attempt(draws)
        values = self._rounded(draws)
        if values is not None:
            return values
        self._change(exact, failed=False)
        return self.attempt(draws)

    def _rounded(self, draws: Sequence[Draw]) -> Tensor | None:
        """Make the first draws with rounding; return None if it matters, or if that is unknown.

        If passes have one draw each, two draws decide, so that few are wasted.
        """
        probe = bfloat16.probe_examples(self._examples, len(draws))
        if probe is None:
            return None
        early = min(EARLY, len(draws)) if self._together == 1 else len(draws)
        values = self.attempt(draws[:early])
        raw = self._slowly(draws[0], probe)
        self._known = probe, raw
        full = self._call.task.values(raw[None], self._call.temperature)[0][0]
        low = self._call.task.values(values, self._call.temperature)[0]
        if bfloat16.matters(low, full, probe, self._call.averaged):
            return None
        return torch.cat([values, self.attempt(draws[early:], early)]) if early < len(draws) else values

    def _slowly(self, draw: Draw, examples: Tensor) -> Tensor:
        """Make a draw of some examples in the slow way."""
        self._renew()
        self._uninstall()
        raw = reference(self._replica, draw, self._seen(self._made).take(examples), self._call.task)
        self._replica.restore()
        self._install(self._replica, mark=False)
        return raw

    def _compare(self, values: Tensor, draw: Draw) -> None:
        """Repeat the first draw of some examples in the slow way, and compare.

        Without the others, and in the opposite order unless the check of rounding has made this pass, they have other
        neighbours. So an error in the proof of their independence would show.

        Raises:
            CallAgainError: they differ by more than rounding.
        """
        last = self._examples - 1
        some = torch.linspace(last, 0, min(max(PROBED, self.plan.least), last + 1)).round().long()
        try:
            some, raw = self._known or (some, self._slowly(draw, some))
            same = _agree(values[some.to(values.device)], raw)
        except CallAgainError:
            raise
        except Exception as error:
            raise CallAgainError("it fails on some of the examples without the others") from error
        if not same:
            raise CallAgainError("some examples have other outputs beside others")


def _agree(first: Tensor, second: Tensor) -> bool:
    """Whether raw values are equal up to rounding.

    Rounding is relative to the size of the values. Values that mask a class (-1e9, minus infinity) must be equal.
    """
    if first.shape != second.shape:
        return False
    rounding = 3e-2 if torch.is_autocast_enabled("cpu") or first.dtype.itemsize < 4 else 1e-4
    masks = first.abs() > 1e4
    scale = first.masked_fill(masks, 0).abs().amax().item() if first.numel() else 0.0
    values, others = (each.masked_fill(masks, 0) for each in (first, second))
    return torch.allclose(first[masks], second[masks], rtol=rounding) and torch.allclose(
        values, others, rtol=0, atol=rounding * scale + 1e-30
    )
