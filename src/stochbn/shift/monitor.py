"""The alarm for data that is no longer like the training data."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from numbers import Real
from typing import Any

from torch import nn

from stochbn.network.calling import Batch, InputsOf, network_input
from stochbn.network.replica import Network
from stochbn.posteriors import Posterior
from stochbn.shift.comparing import Comparison, Reading
from stochbn.shift.looking import looking

__all__ = ["Monitor"]

MOST = 1e300
"""The largest evidence, so that it stays finite in a service that runs on after the alarm."""
_COUNTING = threading.Lock()
"""Held while a mini-batch is counted, as threads may share a monitor."""


class Monitor:
    """Monitors a stream of mini-batches, and sounds the alarm when they are no longer like the training data.

    Each mini-batch takes one pass in evaluation mode. Its batch-norm statistics are compared with those of mini-batches
    of training examples of the same size, from the reference of `stochbn.fit`. This gives two p-values: one for the
    look of the inputs, and one for the mix of classes. The evidence of mini-batches is added up. If the data stays as
    in training and mini-batches are independent, false alarms are at least `every` mini-batches apart on average (the
    Shiryaev-Roberts rule on e-values: Shin, Ramdas and Rinaldo, 2023). This holds as far as the reference represents
    the data. A reference of 2,048 examples suffices for mini-batches of up to 64; larger ones are compared as if they
    had 64 examples. One monitor serves many threads.

    Args:
        posterior: a posterior of `stochbn.fit`, with its reference.
        every: the smallest average number of mini-batches between two false alarms. A larger value gives fewer false
            alarms, and later true ones.
        inputs: what the network takes of a batch, as for `stochbn.Predictive`.

    Attributes:
        evidence: the evidence so far; the alarm sounds when it reaches `every`.
        seen: the number of mini-batches since the start, or since `reset`.

    Raises:
        TypeError, ValueError: a wrong argument, or a posterior without a reference.
    """

    def __init__(self, posterior: Posterior, *, every: float = 1000, inputs: InputsOf = None) -> None:
        if not isinstance(posterior, Posterior):
            raise TypeError(f"expected a posterior from stochbn.fit or stochbn.load, got {type(posterior).__name__}")
        if posterior.reference is None:
            raise ValueError(
                "this posterior has no reference to compare new data with: it was fitted with reference=False, by an "
                "earlier release or to fewer than 256 usable examples, or all batch norms are called several times; "
                "fit again, and pass reference= to be told why there is none"
            )
        number: Any = every
        if not isinstance(number, Real) or isinstance(number, bool):
            raise TypeError(f"every must be a number of mini-batches, got {every!r:.40}")
        if not 1 < float(every) < math.inf:
            raise ValueError(f"every must be a number of mini-batches above 1, got {every!r:.40}")
        self._posterior, self._every, self._inputs = posterior, float(every), inputs
        self._comparison = Comparison(posterior.reference)
        self.evidence, self.seen = 0.0, 0

    def look(self, model: nn.Module, batch: Batch) -> Reading:
        """Measure how unusual a mini-batch is on its own, without adding to the evidence.

        Args:
            model: the network.
            batch: the mini-batch; labels after the inputs are ignored.

        Raises:
            ValueError: a posterior of another network, a mini-batch without examples, or one that the network cannot
                process.
        """
        self._posterior.check(model)
        inputs = network_input(model, batch, self._inputs)
        if not inputs.divisible or not len(inputs):
            raise ValueError("expected a mini-batch of at least one example, with the examples on the first axis")
        network = Network.of(model)
        network.look()
        with looking(network) as look:
            rows, mixes = self._comparison.seen(look, inputs)
        return self._comparison.of_rows(rows, mixes)

    def update(self, model: nn.Module, batch: Batch) -> Reading:
        """Add the next mini-batch of the stream; return how unusual it is, and whether the alarm sounds.

        Args:
            model: the network.
            batch: as for `look`.

        Raises:
            ValueError: as `look`.
        """
        reading = self.look(model, batch)
        worth = _e_value(reading.look)
        if reading.mix:
            worth = (worth + _e_value(reading.mixed)) / 2
        with _COUNTING:
            self.evidence = min((1 + self.evidence) * worth, MOST)
            self.seen += 1
            return replace(reading, alarm=self.evidence >= self._every)

    def reset(self) -> None:
        """Set the evidence and the count to 0. The alarm sounds again if the data still differs."""
        with _COUNTING:
            self.evidence, self.seen = 0.0, 0


def _e_value(p: float) -> float:
    """The evidence (e-value) of a p-value: ``kappa p^(kappa - 1)``, averaged over kappa from 0 to 1.

    Its mean is at most 1 if p is uniform (Vovk and Wang, 2021, section 2).
    """
    if p > 1 - 1e-6:
        return 0.5
    log = math.log(p)
    return (1 - p + p * log) / (p * log**2)
