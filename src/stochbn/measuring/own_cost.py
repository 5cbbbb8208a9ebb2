"""What uncertainty costs with any network: time, in plain passes, and the accuracy that it buys."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import stochbn
from stochbn.measuring.timing import machine, median_seconds, moments, seconds
from stochbn.network.calling import network_input
from stochbn.posteriors import Posterior
from stochbn.report.tables import Table

__all__ = ["measure", "tabulate"]

FITTED = 2048
"""Training objects that posteriors are fitted to."""


def measure(
    model: nn.Module,
    train: Any,
    x: Any,
    *,
    name: str,
    settings: Mapping[str, Any],
    reference: int,
    repetitions: int,
    seed: int,
    progress: Callable[[str], object] = lambda what: None,
) -> dict[str, Any]:
    """Time calls side by side, and compare what they predict with many independent draws.

    Args:
        model: a network of classes, in evaluation mode.
        train: training data, to fit a joint posterior to.
        x: a batch of inputs.
        name: of the network.
        settings: how a `stochbn.Predictive` reads it.
        reference: independent draws whose mean counts as the truth.
        repetitions: of every timing, and of the estimate of an error.
        seed: where draws come from.
        progress: called with what is measured next.

    Returns:
        ``unit_ms``, the time of a plain pass; ``call``, ``every``, ``textbook`` and ``first`` in units: a call with the
        defaults, one with all quasi-random draws, 50 draws as a tutorial makes them, and the first call; ``fit`` over
        plain passes over the same mini-batches; ``worth``, how many independent draws a call's probabilities are worth.
    """
    progress("fitting")
    batches = [inputs for inputs, _ in train.batches(512)]
    posterior = stochbn.fit(model, batches, 16)
    inputs = network_input(model, x)

    def plain() -> object:
        with torch.no_grad():
            return inputs.call(model)

    progress("times")
    default = stochbn.Predictive(model, posterior, **settings)
    every = stochbn.Predictive(model, posterior, tolerance=0, **settings)
    twin = copy.deepcopy(model)
    one = stochbn.Predictive(twin, **settings)
    buffers, drawn = dict(twin.named_buffers(remove_duplicate=False)), next(posterior.iter_draws(1))
    first = seconds(lambda: default(x))
    pieces = [piece for batch in batches for piece in network_input(model, batch).split(16)]

    def passes() -> object:
        with torch.no_grad():
            return [piece.call(model) for piece in pieces]

    ways: dict[str, Callable[[], object]] = {
        "unit": plain,
        "call": lambda: default(x),
        "every": lambda: every(x),
        "textbook": lambda: _textbook(one, buffers, drawn, x),
        "fit": lambda: stochbn.fit(model, batches, 16),
        "passes": passes,
    }
    took = median_seconds(ways, repetitions)
    progress(f"{reference} reference draws")
    truth, variance = _reference(one, buffers, posterior, x, reference, seed)
    errors = [
        _apart(default(x, generator=torch.Generator().manual_seed(seed + 1 + i)).probs, truth)
        for i in range(repetitions)
    ]
    own = variance / reference  # of the truth itself: nothing can be told to be nearer
    return {
        "network": name, "batch": len(inputs), "reference": reference, "repetitions": repetitions,
        "machine": machine(),
        "unit_ms": 1000 * took["unit"], "call": took["call"] / took["unit"], "every": took["every"] / took["unit"],
        "textbook": 50 * took["textbook"] / took["unit"], "first": first / took["unit"],
        "fit": took["fit"] / took["passes"], "worth": variance / max(own, statistics.mean(errors) - own),
    }  # fmt: skip


def tabulate(measured: Sequence[Mapping[str, Any]]) -> Table:
    """What `measure` gave, a row for each batch size."""
    columns = {"unit, ms": ("unit_ms", 1), "a call": ("call", 1), "worth draws": ("worth", 0),
               "all draws": ("every", 1), "50 textbook draws": ("textbook", 1), "first call": ("first", 1),
               "fit": ("fit", 2)}  # fmt: skip
    rows = [
        [f"{one['network']}, batch {one['batch']}", *(f"{one[key]:.{digits}f}" for key, digits in columns.values())]
        for one in measured
    ]
    return Table(f"Costs in units, plain passes of the same objects; {measured[0]['machine']}",
                 ["network", *columns], rows)  # fmt: skip


def _textbook(one: stochbn.Predictive, buffers: Mapping[str, Tensor], drawn: Mapping[str, Tensor], x: Any) -> Tensor:
    """Probabilities of a draw as a tutorial would make it: copied into the buffers, then a pass."""
    for name, values in drawn.items():
        buffers[name].copy_(values)
    probs: Tensor = one(x).probs
    return probs


def _reference(
    one: stochbn.Predictive, buffers: Mapping[str, Tensor], posterior: Posterior, x: Any, draws: int, seed: int
) -> tuple[Tensor, float]:
    """The mean probabilities of independent draws, and the variance of one: over draws, averaged over what is given."""
    generator = torch.Generator().manual_seed(seed + 10_000)
    mean, variance = moments(_textbook(one, buffers, drawn, x) for drawn in posterior.iter_draws(draws, generator))
    return mean, variance.mean().item()


def _apart(probs: Tensor, truth: Tensor) -> float:
    return (probs.double() - truth).square().mean().item()
