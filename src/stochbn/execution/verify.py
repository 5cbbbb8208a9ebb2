"""Try the faster ways: which ones work with a network and inputs of one kind, and why not the others.

The results are cached for the network. They depend on the kind of the input (shapes of an example, types, every
argument that is not a tensor), the task, the modules in training mode, autocast, the posterior, and the weights. If one
of these changes, the ways are tried again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from stochbn.execution.follow import Followed, follow, follow_effects
from stochbn.execution.plan import WAYS, Call, Plan, Verdict, make_plan
from stochbn.execution.run import CallAgainError, Passes
from stochbn.execution.ways import bfloat16, channels_last, compiled, prefix, stacked
from stochbn.network.calling import NetworkInput
from stochbn.network.knowledge import Knowledge
from stochbn.network.replica import Network
from stochbn.undisturbed import without_gradients

__all__ = ["effects", "examine"]

UNTRIED = ("bfloat16", "compiled")
"""Ways that are not tried here: bfloat16 is checked in every call, and compiling takes long."""


@without_gradients
def effects(network: Network, inputs: NetworkInput, training: frozenset[str]) -> bool:
    """Find out, and cache for the network, whether it can run on a copy, and whether passes change it.

    Args:
        network: the network.
        inputs: what passes are made of.
        training: names of the modules in training mode.

    Returns:
        Whether passes draw random numbers, or may.
    """
    key, known = ("effects", inputs.kind(), training), network.known
    random: bool | None = True if known.in_place else known.get(key)
    if random is not None:
        return random
    few = inputs.take(slice(0, 3)) if inputs.divisible else inputs
    for examples in (few, inputs):
        try:
            found = follow_effects(network, examples, training)
        except Exception:  # which the pass itself will raise, if it is not for the number of examples
            continue
        _note(known, found)
        known.keep(key, found.random)
        return found.random
    return True


def _note(known: Knowledge, followed: Followed) -> None:
    known.in_place = known.in_place or followed.in_place
    known.state |= followed.state
    known.stateful |= followed.stateful
    known.caches |= followed.caches


def examine(network: Network, inputs: NetworkInput, call: Call) -> tuple[Verdict, dict[str, str]]:
    """The verdict about a network and such inputs, with the reasons against ways, by name."""
    if not inputs.divisible or not len(inputs):
        random = effects(network, inputs, call.training)
        reason = "there are no examples" if inputs.divisible else "the arguments do not share a first axis of examples"
        return Verdict(Followed(dependent=reason, random=random)), {}
    if network.known.in_place:
        return Verdict(Followed(in_place=network.known.in_place, random=True)), {}
    key, examples, known = call.key(network, inputs), len(inputs), network.known
    refused = {"bfloat16": "it would round more than the network's own type"} if call.exact else {}
    if reason := compiled.applies(call.compile, inputs.on_cpu):
        refused["compiled"] = reason
    for verdict in (known.get(key), known.get((key, examples))):
        if verdict is not None and verdict.followed.sizes.hold(examples):
            return verdict, refused
    followed, at_examples = _followed(network, inputs, call)
    if followed is None:  # for these examples, at least
        random = effects(network, inputs, call.training)
        return Verdict(Followed(dependent="it could not be followed", random=random)), refused
    _note(known, followed)
    verdict = Verdict(followed) if followed.in_place or followed.dependent else _tried(network, inputs, call, followed)
    known.keep((key, examples) if at_examples else key, verdict)
    return verdict, refused


def _followed(network: Network, inputs: NetworkInput, call: Call) -> tuple[Followed | None, bool]:
    """The result of tracing, and whether it used all examples, because it holds only for this number of them."""
    examples = len(inputs)
    try:
        followed = _twice(network, inputs, 3, call)
        if followed.sizes.hold(examples) or followed.in_place:
            return followed, False
    except Exception:  # not with three examples, then
        pass
    try:
        return _twice(network, inputs, examples, call), True
    except Exception:  # which the pass itself will raise
        return None, True


def _twice(network: Network, inputs: NetworkInput, count: int, call: Call) -> Followed:
    """Trace two passes, with different numbers of examples.

    A length that equals the number of examples by chance differs from it in the other pass. If the two traces differ,
    the conclusions hold only for the first number of examples.
    """
    draw = call.sample(1)[0]

    def follow_with(count: int) -> Followed:
        return follow(network, spread(inputs, count), draw, call.task, call.training)

    followed = follow_with(count)
    if followed.in_place or followed.dependent:
        return followed
    other = next((n for n in (2, 3, count + 1, count - 1) if n != count and followed.sizes.hold(n)), None)
    if other is None:
        return followed
    try:
        second = follow_with(other)
    except Exception:
        second = None
    if second is not None and second.trace == followed.trace and second.sizes.hold(count):
        if second.dependent:
            return second
        followed.sizes.meet(second.sizes)
    else:
        followed.sizes.pin()
    return followed


def spread(inputs: NetworkInput, count: int) -> NetworkInput:
    """Choose examples that are evenly spread over a batch; some repeat if there are fewer."""
    return inputs.take(torch.linspace(0, len(inputs) - 1, count, device=inputs.device).round().long())


def _tried(network: Network, inputs: NetworkInput, call: Call, followed: Followed) -> Verdict:
    """The ways that make passes of some examples without an error, each alone and all together.

    Every call compares its results with slow passes (`Passes`), because they depend on its own examples.
    """
    cpu, autocast, settings = inputs.on_cpu, torch.is_autocast_enabled("cpu"), call.settings
    some, draws = spread(inputs, min(max(3, followed.sizes.low), followed.sizes.high)), call.sample(2)
    with network.replica() as replica:
        reasons = {
            "prefix": prefix.applies(followed),
            "stacked": stacked.applies(replica, followed, cpu=cpu, autocast=autocast),
            "channels_last": channels_last.applies(replica, followed, cpu=cpu),
            "bfloat16": bfloat16.applies(
                replica, followed, cpu=cpu, autocast=autocast, weights=settings.weights, supported=settings.bfloat16
            ),
        }
    refused = {way: reason for way, reason in reasons.items() if reason}

    def works(refused: Mapping[str, str]) -> bool:
        untried = dict.fromkeys(UNTRIED, "not here")
        plan = make_plan(Verdict(followed, refused), len(some), settings, cpu=cpu, refused=untried)
        plan = _strained(plan, len(some), "pieces" not in refused and "pieces" in settings.ways)
        with network.replica() as replica:
            passes = Passes(network, replica, some, call, plan)
            try:
                passes.attempt(draws)
                passes.attempt(draws[:1])
                passes.close()
            except CallAgainError:
                raise
            except Exception:  # a way that raises anything is skipped
                replica.usable = False
                return False
        return True

    if not works(refused):
        tried = [way for way in WAYS if way not in refused and way not in UNTRIED]
        for way in tried:
            others = {other: "not tried" for other in WAYS if other != way and other not in refused}
            if not works({**refused, **others}):
                refused[way] = "it fails on some of the examples"
        if not works(refused):
            refused |= dict.fromkeys(tried, "the ways together fail on some of the examples")
    return Verdict(followed, refused)


def _strained(plan: Plan, examples: int, apart: bool) -> Plan:
    """The plan with sizes such that every way takes part in passes over this many examples, in pieces if `apart`."""
    size = (examples + 1) // 2 if apart else examples
    return replace(plan, size=size, rows=4 * examples if plan.rows else 0)
