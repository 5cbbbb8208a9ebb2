"""Forward passes of one network under many draws of its statistics: the obvious way, and faster ones with its results.

    inputs -> verify (follow, and try the ways) -> plan -> run (on a replica) -> raw values of each draw

`reference` is the obvious way, and `ways` has the faster ones, a module each. `follow` proves, from passes over a copy,
what a network does to the objects of a batch; `verify` is where ways are tried, but for rounding to bfloat16, which
`run` checks in every call; `plan` says which ways a call takes; `run` holds all state of a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from stochbn.execution.plan import WAYS, Call, Draw, Plan, Settings, make_plan
from stochbn.execution.run import NetworkChangedError, Passes
from stochbn.execution.verify import examine, guard, refuse
from stochbn.network.calling import NetworkInput
from stochbn.network.replica import Network

__all__ = ["WAYS", "Call", "Draw", "NetworkChangedError", "Passes", "Plan", "Settings", "passes", "planned"]


def planned(network: Network, inputs: NetworkInput, call: Call) -> Plan:
    """How the passes of a call are made; what it takes to find that out is kept for later calls."""
    if call.whole:
        guard(network, inputs, call.training)
        return Plan(together=call.whole, refused=dict.fromkeys(WAYS, call.whole))
    verdict, refused = examine(network, inputs, replace(call, augment=None))
    if call.augment is not None:
        refused["prefix"] = "every draw sees the inputs in another way"
    return make_plan(verdict, inputs.count, call.settings, cpu=inputs.on_cpu, refused=refused)


@contextmanager
def passes(network: Network, inputs: NetworkInput, call: Call) -> Iterator[Passes]:
    """The passes of one call, on a replica of this thread's own; `Network.look` comes before it.

    Raises:
        NetworkChangedError: a pass changed more of the replica than it may, and was not known to.
    """
    with torch.inference_mode(False), torch.no_grad():
        plan = planned(network, inputs, call)
        with network.replica() as replica:
            made = Passes(network, replica, inputs, call, plan)
            yield made
            made.close()
        if made.rounds_too_much:
            refuse(network, inputs, call, "bfloat16", "rounding was not small beside the noise of the draws")
