"""Whether a file gives what Python gives, draw by draw."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stochbn.execution.reference import reference
from stochbn.export.program import ExportError, Predicting, reason
from stochbn.network.calling import NetworkInput
from stochbn.network.replica import Network
from stochbn.summary import Summary

__all__ = ["TOLERANCE", "Runner", "compare"]

TOLERANCE = 1e-4
"""What an output may differ by; of numbers above 1, in proportion to the largest."""

Runner = Callable[[NetworkInput], dict[str, Tensor]]
"""What runs a file: from inputs to its outputs, by their names."""


def compare(run: Runner, given: Predicting) -> float:
    """The largest difference of a file's outputs from a slow loop over its draws.

    They are compared on the example, and on random inputs of another number.

    Raises:
        ExportError: it is larger than `TOLERANCE`; the message says which output differs, where, and by how much.
    """
    others = _random(given.example)
    pairs = (given.example, f"the example ({len(given.example)} examples)"), (others, f"{len(others)} random examples")
    largest = 0.0
    for inputs, where in pairs:
        wanted = _slow(given, inputs)
        try:
            found = run(inputs)
        except Exception as error:
            raise ExportError(f"the exported network fails on {where}: {reason(error)}") from error
        if given.sets is not None:  # of the file's own outputs, as a threshold may lie between these and Python's
            wanted |= given.sets.within(found)
        for name in given.outputs:
            one, other = found[name], wanted[name].to(found[name].dtype)
            if one.dtype == torch.bool:
                one, other = one.double(), other.double()
            if one.shape != other.shape:
                raise ExportError(
                    f"the exported network differs from Python on {where}: {name} has the shape {list(one.shape)}, "
                    f"and {list(other.shape)} in Python"
                )
            difference = float((one - other).abs().amax()) / max(1.0, float(other.abs().amax()))
            if not difference <= TOLERANCE:  # nor NaN
                raise ExportError(
                    f"the exported network differs from Python on {where}: {name} by {difference:.2g}, allowed is "
                    f"{TOLERANCE:g}; nothing has been written"
                )
            largest = max(largest, difference)
    return largest


def _slow(given: Predicting, inputs: NetworkInput) -> dict[str, Tensor]:
    """The outputs for all draws, one pass after another."""
    network = Network.of(given.model)
    network.look()
    summary = Summary(given.task, temperature=given.temperature)
    with torch.no_grad(), network.replica() as replica:
        replica.modes(frozenset())
        for draw in given.drawn:
            raw = reference(replica, draw, inputs, given.task)
            if not summary.count:
                given.task.check(raw)
            summary.add(raw[None])
    prediction = summary.prediction()
    return {name: getattr(prediction, name) for name in given.outputs if name not in given.set_outputs}


def _random(example: NetworkInput) -> NetworkInput:
    """Random inputs like an example, and more of them: whole numbers are taken from it, others are normal."""
    generator = torch.Generator().manual_seed(0)
    count = len(example) + 2
    chosen = torch.randint(len(example), (count,), generator=generator)

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor[chosen]
        numbers = tensor.double()
        noise = torch.randn(count, *tensor.shape[1:], generator=generator, dtype=torch.float64)
        return (numbers.mean() + numbers.std(correction=0) * noise).to(tensor.dtype)

    return example.map(drawn)
