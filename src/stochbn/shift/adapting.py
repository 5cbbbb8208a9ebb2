"""Adapting a posterior to unlabelled examples of data that has changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from stochbn.distributed import Ranks
from stochbn.network.calling import Batch, InputsOf, NetworkInput, network_input
from stochbn.network.layers import listed
from stochbn.network.replica import Network
from stochbn.posteriors import Posterior
from stochbn.posteriors.adaptation import Adaptation
from stochbn.shift.comparing import UNUSUAL, Comparison, Reading
from stochbn.shift.looking import Looker, looking
from stochbn.shift.mixes import mixes_of

__all__ = ["Adapter", "adapt"]

ERRORS = (0.4, 0.2, 0.1, 0.05, 0.02, 0.01)
"""The standard errors of the mix, round by round."""
MOST_ROUNDS = 24
SETTLED = 0.005
"""The share of examples whose class changes from one round to the next below which the mix stays."""
PRIOR = 64
"""What the source counts for without a guard, in examples."""
TOGETHER = 512
"""Examples that go through the network together, at most."""
TOGETHER_BYTES = 2**26
"""What their inputs may take."""
LEAST_VARIANCE = 0.3
"""An adapted variance is at least this share of the smaller one of the source's and of what is seen."""
CHANGED = 0.2
"""The share of examples of another class from which on a changed mix is worth a warning."""


@dataclass
class _Part:
    """What has been seen of some examples.

    Attributes:
        examples: how many, with less weight on those of long ago.
        rows: ``[2C]`` for every layer, summed.
        mixes: ``[K]``, summed.
    """

    examples: float
    rows: dict[str, Tensor]
    mixes: Tensor

    def plus(self, other: _Part | None) -> _Part:
        """Both together."""
        if other is None:
            return self
        rows = {name: row + other.rows[name] for name, row in self.rows.items()}
        return _Part(self.examples + other.examples, rows, self.mixes + other.mixes)

    def times(self, weight: float) -> _Part:
        """The same examples with another weight."""
        rows = {name: weight * row for name, row in self.rows.items()}
        return _Part(weight * self.examples, rows, weight * self.mixes)


def adapt(
    model: nn.Module,
    posterior: Posterior,
    batches: Iterable[Batch],
    *,
    prior: float | None = None,
    inputs: InputsOf = None,
    group: ProcessGroup | None = None,
) -> Posterior:
    """Move a posterior's centre to unlabelled examples of data that has changed, if their look has changed.

    Each batch norm's running statistics are moved by as much as the look of the new examples differs, with what another
    mix of classes explains taken out first, see `stochbn.shift.guard`. Without evidence of another look the centre is
    the network's own, exactly. Layers behind others see what the adapted ones give them. The noise stays. That takes
    six passes over the examples or some more, until the mix stays, at most 24. The examples stay in memory. Eight are
    enough to begin with, and more are better.

    What was concluded is in the posterior's ``adaptation``, which prints as sentences.

    Args:
        model: the network.
        posterior: one fitted to it. With a reference, which `stochbn.fit` makes, the mix of classes is taken care of;
            without one all that differs counts as another look, of which a warning tells.
        batches: unlabelled examples of the new data: an iterable of what the network takes, as for `stochbn.fit`. Up to
            512 examples, or 64 MiB of them, go through the network together; more go one group after another.
        prior: so many examples of the training data are added to the new ones, at the source's statistics: the shift is
            multiplied by ``n / (n + prior)``. None is 0 with a reference, where the evidence decides, and else 64.
        inputs: what the network takes of a batch, as for `stochbn.Predictive`.
        group: in a job of several processes (ranks), the process group whose ranks adapt together: each passes its own
            examples, in as many groups as the others, and every one gets the posterior that one process
            would adapt to all of them together. None is this process's examples alone.

    Returns:
        The same posterior about other statistics: ``centre`` is ``"adapted"``.

    Raises:
        TypeError, ValueError: a wrong argument, a posterior of another network, no examples, examples that the network
            cannot process, or activations that are not finite.
    """
    ranks = Ranks.of(group, "adapted")
    with ranks.failing_together():
        adapter = Adapter(model, posterior, prior=prior, inputs=inputs)
        if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
            raise TypeError(
                f"expected an iterable of batches, such as a DataLoader, got {type(batches).__name__}; "
                "pass [tensor] to treat one tensor as a single batch"
            )
        groups = list(_joined(adapter._input(batch) for batch in batches))
    ranks.check_same({"prior": prior, "groups of examples": len(groups)})
    with ranks.failing_together():
        adapter._ranks = ranks
        adapter._all_of(groups)
    adapted = adapter.posterior
    if ranks.rank == 0:
        adapter._warn(adapted)
    return adapted


class Adapter:
    """Adapts a posterior to a stream, batch by batch.

    Args:
        model: the network.
        posterior: one fitted to it.
        half_life: the number of examples after which earlier ones count half; None is all alike.
        prior: as for `adapt`.
        inputs: as for `adapt`.

    Raises:
        TypeError, ValueError: a wrong argument, or a posterior of another network.
    """

    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior,
        *,
        half_life: float | None = None,
        prior: float | None = None,
        inputs: InputsOf = None,
    ) -> None:
        if not isinstance(posterior, Posterior):
            raise TypeError(f"expected a posterior from stochbn.fit or stochbn.load, got {type(posterior).__name__}")
        posterior.check(model)
        for name, value in (("prior", prior), ("half_life", half_life)):
            if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool)):
                raise TypeError(f"{name} must be a number of examples or None, got {value!r:.40}")
        if prior is not None and not 0 <= prior < 1e12:
            raise ValueError(f"prior must be a number of examples from 0 on, got {prior!r:.40}")
        if half_life is not None and not 0 < half_life < 1e12:
            raise ValueError(f"half_life must be a positive number of examples, got {half_life!r:.40}")
        self._model, self._inputs, self._half_life = model, inputs, half_life
        self._ranks = Ranks(None)
        self._source, unusable = posterior.centred(model)
        if unusable:
            raise ValueError(
                f"the running statistics of {listed(unusable)} are not finite, or have negative variances, so there is "
                "nothing to adapt; train the network, or load its buffers too"
            )
        reference = posterior.reference
        self._comparison = None if reference is None else Comparison(reference)
        self._prior = float(prior if prior is not None else 0 if reference is not None else PRIOR)
        self._mix = torch.empty(0) if reference is None else reference.usual
        self._seen: _Part | None = None
        self._reading: Reading | None = None
        self._moved: dict[str, Tensor] = {}  # standardised, [2, C]
        self._statistics: dict[str, Tensor] = {}
        self._evidence: dict[str, float] = {}

    def update(self, batch: Batch) -> Posterior:
        """Fold in a batch of unlabelled examples, and return the posterior that is adapted to all so far.

        Raises:
            TypeError, ValueError: as `adapt`; the batch then does not count.
        """
        state = dict(vars(self))
        self._moved, self._statistics, self._evidence = {}, {}, {}
        try:
            return self._folded(batch)
        except BaseException:
            vars(self).update(state)
            raise

    def _folded(self, batch: Batch) -> Posterior:
        inputs = self._input(batch)
        before = self._seen
        if before is not None and self._half_life is not None:
            before = before.times(0.5 ** (len(inputs) / self._half_life))
        network = Network.of(self._model)
        network.look()
        with looking(network) as look:
            self._read(look, [inputs])
            for error in self._rounds(ERRORS if before is None else ERRORS[-1:]):
                self._seen = self._pass(look, inputs, before, error).plus(before)
        return self.posterior

    @property
    def posterior(self) -> Posterior:
        """The posterior that is adapted to all examples so far; the source where there were none."""
        if self._seen is None:
            return self._source
        sizes = list(self._source.layers.values())
        parts = torch.split(self._source.expected, sizes, dim=1)
        moved = [self._statistics.get(n, p).double() for n, p in zip(self._source.layers, parts, strict=True)]
        guarded = self._comparison is not None
        about = Adaptation(
            examples=round(self._seen.examples),
            guarded=guarded,
            look=1.0 if self._reading is None else self._reading.look,
            mixed=1.0 if self._reading is None else self._reading.mixed,
            mix=tuple(self._mix.tolist()) if guarded else (),
            usual=tuple(self._comparison.reference.usual.tolist()) if self._comparison is not None else (),
            parts=("class", "classes") if self._comparison is None else self._comparison.task.part,
            evidence=dict(self._evidence) if guarded else {},
            moved={name: float(one[0].square().mean().sqrt()) for name, one in self._moved.items()},
        )
        mean, variance = torch.cat(moved, 1)
        return self._source.adapted(mean, variance, about)

    def _input(self, batch: Batch) -> NetworkInput:
        taken = network_input(self._model, batch, self._inputs)
        if not taken.divisible or not len(taken):
            raise ValueError(
                "expected batches of at least one example, with the examples on the first axis of every tensor; "
                f"got shapes {[list(tensor.shape) for tensor in taken.tensors()]}"
            )
        return taken

    def _all_of(self, batches: list[NetworkInput]) -> None:
        """Go through batches round by round: each is seen beside what was last seen of the others."""
        if not batches:
            raise ValueError("there are no batches to adapt to: the iterable is empty or already used up")
        parts: list[_Part | None] = [None] * len(batches)
        network = Network.of(self._model)
        network.look()
        with looking(network) as look:
            self._read(look, batches)
            for error in self._rounds(ERRORS):
                for number, inputs in enumerate(batches):
                    others = _sum(part for other, part in enumerate(parts) if other != number)
                    parts[number] = self._pass(look, inputs, others, error)
                self._seen = _sum(parts)

    def _read(self, look: Looker, batches: list[NetworkInput]) -> None:
        """How unusual the examples are to the network as it is."""
        rows: dict[str, list[Tensor]] = {}
        mixes = []
        for inputs in batches:
            found, output = look(inputs)
            mixes.append(self._mixes(output))
            for name, values in found.items():
                rows.setdefault(name, []).append(values)
        if self._comparison is None:  # the passes have found out which layers are usable
            return
        if missing := [name for name in self._comparison.guards if name not in rows]:
            raise ValueError(f"the layer {missing[0]!r} of the network was not called as in the fit")
        joined = {name: torch.cat(values) for name, values in rows.items()}
        if not all(bool(values.isfinite().all()) for values in (*joined.values(), *mixes)):
            raise ValueError("the examples give activations that are not finite; check them for NaN")
        together = self._ranks.joined({"mixes": torch.cat(mixes)})["mixes"]
        self._reading = self._comparison.reading(self._ranks.joined(joined), together)

    def _mixes(self, output: Any) -> Tensor:
        """``[N, K]``: the mixes of an output."""
        if self._comparison is None or not len(self._comparison.reference.usual):
            return torch.empty(1, 0)
        return mixes_of(self._comparison.task, output, self._comparison.reference.edges)

    def _pass(self, look: Looker, inputs: NetworkInput, others: _Part | None, error: float) -> _Part:
        """Send a batch through the network while its layers are adapted to it and to what was seen of others."""
        sums: dict[str, Tensor] = {}
        count = float(self._ranks.total(torch.tensor(float(len(inputs)))))
        examples = count + (0.0 if others is None else others.examples)
        change = None if self._comparison is None else self._comparison.reference.reduced(self._mix)
        weight = examples / (examples + self._prior)

        def rule(name: str, rows: Tensor) -> Tensor | None:
            guard = None if self._comparison is None else self._comparison.guards.get(name)
            if name not in self._source.layers or (self._comparison is not None and guard is None):
                return None
            if others is not None and name not in others.rows:
                raise ValueError(f"the layer {name!r} was called for some of the batches only; pass those alone")
            sums[name] = self._ranks.total(rows.sum(0))
            mean = (sums[name] + (0.0 if others is None else others.rows[name])) / examples
            if not bool(mean.isfinite().all()):
                raise ValueError(f"the examples give activations that are not finite in {name!r}; check them for NaN")
            source = look.source(name)[1]
            if guard is not None and change is not None:
                found = guard.shifted(mean, change, examples, error)
                self._evidence[name], shift = found.evidence, found.shift
            else:
                shift = mean - look.source(name).flatten()
            first, second = (weight * shift).view(2, -1)
            seen = mean[len(source) :] - mean[: len(source)].square()
            variance = source + second - first.square()
            variance = torch.maximum(variance, LEAST_VARIANCE * torch.minimum(seen.clamp(min=0), source))
            self._moved[name] = torch.stack([first, variance])
            self._statistics[name] = look.moved(name, self._moved[name])
            return self._moved[name]

        _, output = look(inputs, rule)
        return _Part(count, sums, self._ranks.total(self._mixes(output).sum(0)))

    def _rounds(self, errors: Sequence[float]) -> Iterator[float]:
        """The standard error of the mix in each round; after the last one, rounds go on until the mix stays."""
        for number in range(MOST_ROUNDS):
            yield errors[min(number, len(errors) - 1)]
            if self._seen is None or not len(self._seen.mixes):
                return
            before, self._mix = self._mix, self._seen.mixes / self._seen.examples
            if number >= len(errors) - 1 and float((self._mix - before).abs().sum()) / 2 < SETTLED:
                return

    def _warn(self, adapted: Posterior) -> None:
        """Warn of what the evidence does not tell."""
        about = adapted.adaptation
        if about is None:
            return
        if not about.guarded:
            warnings.warn(
                "the posterior has no reference, so another mix of classes cannot be told from another look of the "
                "inputs: if the new examples are of some classes alone, the network gets worse; fit again, with this "
                "release and reference=True",
                stacklevel=3,
            )
        elif about.look <= UNUSUAL and about.distance > CHANGED:
            warnings.warn(
                f"both the look of the inputs and the mix of classes have changed ({100 * about.distance:.0f} % of the "
                "examples are of other classes than in training), which cannot be told apart with certainty: check the "
                "adapted network on labelled examples, or adapt to examples of all classes",
                stacklevel=3,
            )


def _joined(batches: Iterable[NetworkInput]) -> Iterator[NetworkInput]:
    """Batches joined to groups that go through the network together, as far as they are alike."""
    group: NetworkInput | None = None
    for inputs in batches:
        if group is not None:
            size = sum(tensor.nbytes for one in (group, inputs) for tensor in one.tensors())
            alike = group.kind() == inputs.kind()
            if alike and len(group) + len(inputs) <= TOGETHER and size <= TOGETHER_BYTES:
                group = group.join(inputs)
                continue
            yield group
        group = inputs
    if group is not None:
        yield group


def _sum(parts: Iterable[_Part | None]) -> _Part | None:
    total: _Part | None = None
    for part in parts:
        if part is not None:
            total = part.plus(total)
    return total
