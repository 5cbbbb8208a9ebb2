"""Exact inference, which posteriors approximate."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from stochbn.execution import Call, passes, repeated
from stochbn.interface import Interface, InterfaceOptions, shows_options
from stochbn.network.calling import Batch, NetworkInput, network_input
from stochbn.network.layers import batch_norms
from stochbn.network.replica import Network, named_modules
from stochbn.posteriors import check_draws
from stochbn.statistics import mini_batches
from stochbn.summary import Summary
from stochbn.undisturbed import without_gradients

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Exact"]


class Exact:
    """Exact inference: each example is predicted as a part of random training mini-batches.

    For every draw and example, the example and B - 1 training examples go through the network together. Batch norm is
    in training mode, all else in evaluation mode. Probabilities are averaged over draws. Posteriors approximate this,
    and can be compared with it. It costs `draws` forward passes of B examples **for each example**: the example changes
    the statistics of its mini-batch, so nothing after the first batch norm can be shared. Passes run on a copy of the
    network, as those of `Predictive`.

    Args:
        model: the network.
        batches: training data, as for `stochbn.fit`, shuffled. The first `draws` mini-batches of B - 1 examples are
            kept in memory; draw s is always with mini-batch s, so predictions are deterministic.
        batch_size: B, at least 2.
        draws: the number of mini-batches.
        keep_draws: also return the log-probabilities of each draw.
        interface: `task`, `logits`, `class_axis`, `output` and `inputs`, as for `Predictive`.

    Raises:
        TypeError, ValueError: a wrong argument, or too few training examples.

    Source: Atanov et al., 2018, section 3.
    """

    @shows_options(Interface.of)
    def __init__(
        self,
        model: Any,
        batches: Iterable[Batch],
        batch_size: int = 16,
        draws: int = 50,
        *,
        keep_draws: bool = False,
        **interface: Unpack[InterfaceOptions],
    ) -> None:
        batch_norms(model)
        check_draws(draws)
        if not isinstance(batch_size, int) or isinstance(batch_size, bool):
            raise TypeError(f"batch_size must be a whole number, got {batch_size!r}")
        if batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, an example and another one, got {batch_size}")
        self.model = model
        self.task, self.inputs = Interface.of(model, **interface)
        self.keep_draws = keep_draws
        self._network = Network.of(model)
        modules = named_modules(self._network.model)
        norms = {name for name, module in modules.items() if isinstance(module, _BatchNorm)}
        self._norms = self._network.trained() & norms  # others use their running statistics in training too
        try:
            self.others = list(itertools.islice(mini_batches(model, batches, batch_size - 1, self.inputs), draws))
        except ValueError as error:
            raise ValueError(f"no mini-batches of {batch_size - 1} training examples to join: {error}") from error
        if len(self.others) < draws:
            raise ValueError(
                f"{draws} draws need as many mini-batches of {batch_size - 1} training examples, there were "
                f"{len(self.others)}; pass more data, larger batches or fewer draws"
            )

    def __call__(self, x: Batch, *, generator: torch.Generator | None = None, keep_draws: bool | None = None) -> Any:
        """Predict a batch, one example at a time; arguments as for `Predictive`, but a generator has no effect.

        Raises:
            RuntimeError, ValueError: the network cannot process this input, or its output is not finite.
            TypeError: the batch or the network's output is of a type that is not supported.
        """
        inputs = network_input(self.model, x, self.inputs)
        if not len(inputs):
            raise ValueError("there are no examples in this batch")
        keep = self.keep_draws if keep_draws is None else keep_draws
        self._network.look()
        norms = self._norms
        call = Call(self.task, training=norms, whole="an example is to be normalised with its mini-batch")
        ones = list(inputs.split(1))
        return repeated(lambda _: self._predict(ones, call, Summary(self.task, keep)))

    @without_gradients
    def _predict(self, ones: list[NetworkInput], call: Call, summary: Summary) -> Any:
        with passes(self._network, self.others[0].join(ones[0]), call) as made:
            for others in self.others:
                values = []
                for one in ones:
                    made.exchange(others.join(one))
                    values.append(made([{}])[:, -1:])
                summary.add(torch.cat(values, 1))
        return summary.prediction()
