"""Forward passes of one network under many draws of its statistics: a reference execution, and faster equivalent ones.

    inputs -> verify (follow, and try the ways) -> plan -> run (on a replica) -> raw values of each draw

`reference` makes passes in the slow, obvious way. `ways` has the faster ways, one in each module. `follow` traces a
network on a copy, and proves what it does to the examples of a batch. `verify` tries the ways. `plan` chooses the ways
of a call. `run` holds the state of a call, and compares results with slow passes in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import TypeVar

from stochbn.execution.plan import WAYS, Call, Draw, Plan, Settings, make_plan
from stochbn.execution.run import CallAgainError, Passes
from stochbn.execution.verify import effects, examine
from stochbn.network.calling import NetworkInput
from stochbn.network.replica import Network
from stochbn.undisturbed import scope

__all__ = [
    "WAYS", "Call", "Draw", "Passes", "Plan", "Settings", "passes", "planned", "repeated",
]  # fmt: skip

ATTEMPTS = 8
"""How often a call starts again if its passes turn out to change the network."""
Made = TypeVar("Made")


def planned(network: Network, inputs: NetworkInput, call: Call) -> Plan:
    """Plan the passes of a call, and keep what was learned about the network for later calls."""
    if call.whole:
        random = effects(network, inputs, call.training)
        return Plan(together=call.whole, random=random, refused=dict.fromkeys(WAYS, call.whole))
    verdict, refused = examine(network, inputs, replace(call, augment=None))
    if call.augment is not None:
        refused["prefix"] = "every draw sees the inputs in another way"
    if network.known.stateful:  # each copy would be compiled again
        refused.setdefault("compiled", "passes change the network, or may, so each runs on a copy of its own")
    return make_plan(verdict, inputs.count, call.settings, cpu=inputs.on_cpu, refused=refused)


@scope
def passes(network: Network, inputs: NetworkInput, call: Call) -> Generator[Passes, None, None]:
    """The passes of one call, on this thread's own replica; call `Network.look` first.

    It is for functions that run `without_gradients`.

    Raises:
        CallAgainError: the call must be repeated, see `repeated`.
    """
    plan = planned(network, inputs, call)
    with network.replica() as replica:
        made = Passes(network, replica, inputs, call, plan)
        yield made
        made.close()


def repeated(make: Callable[[str], Made]) -> Made:
    """Make a call, and repeat it if its passes show something new about the network.

    Passes may turn out to change the network. This happens once for each network, unless other threads change it
    meanwhile. Or outputs may turn out to depend on the other examples. Then the call makes passes of all examples
    together.

    Args:
        make: makes the call, given the reason why examples must go through the network together, for ``Call(whole=)``;
            empty if they need not.
    """
    whole = ""
    for _ in range(ATTEMPTS):
        try:
            return make(whole)
        except CallAgainError as error:  # noqa: PERF203
            whole = whole or error.whole
    return make(whole)
