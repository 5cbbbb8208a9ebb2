"""Forward passes of one network under many draws of its statistics: the obvious way, and faster ones with its results.

    inputs -> verify (follow, and try the ways) -> plan -> run (on a replica) -> raw values of each draw

`reference` is the obvious way, and `ways` has the faster ones, a module each. `follow` proves, from passes over a copy,
what a network does to the examples of a batch; `verify` is where ways are tried, of which `run` compares the results
with slow passes in every call; `plan` says which ways a call takes; `run` holds all state of a call.
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
"""How often a call begins again where its passes are found to change the network."""
Made = TypeVar("Made")


def planned(network: Network, inputs: NetworkInput, call: Call) -> Plan:
    """How the passes of a call are made; what it takes to find that out is kept for later calls."""
    if call.whole:
        random = effects(network, inputs, call.training)
        return Plan(together=call.whole, random=random, refused=dict.fromkeys(WAYS, call.whole))
    verdict, refused = examine(network, inputs, replace(call, augment=None))
    if call.augment is not None:
        refused["prefix"] = "every draw sees the inputs in another way"
    if network.known.stateful:  # each copy would be compiled anew
        refused.setdefault("compiled", "passes change the network, or may, so each runs on a copy of its own")
    return make_plan(verdict, inputs.count, call.settings, cpu=inputs.on_cpu, refused=refused)


@scope
def passes(network: Network, inputs: NetworkInput, call: Call) -> Generator[Passes, None, None]:
    """The passes of one call, on a replica of this thread's own; `Network.look` comes before it.

    It is for functions that run `without_gradients`.

    Raises:
        CallAgainError: the call is to be made again, see `repeated`.
    """
    plan = planned(network, inputs, call)
    with network.replica() as replica:
        made = Passes(network, replica, inputs, call, plan)
        yield made
        made.close()


def repeated(make: Callable[[str], Made]) -> Made:
    """What is made with the passes of a call, which begins again where these turn out to be other than was known.

    Passes may change the network. That is found out once for it, unless other threads change it meanwhile. Or examples
    may have other outputs beside others. Then this call makes passes of all of them.

    Args:
        make: is given why examples must go through the network together, for ``Call(whole=)``; empty if they need not.
    """
    whole = ""
    for _ in range(ATTEMPTS):
        try:
            return make(whole)
        except CallAgainError as error:  # noqa: PERF203
            whole = whole or error.whole
    return make(whole)
