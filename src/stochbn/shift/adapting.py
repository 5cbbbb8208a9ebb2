"""Adapt a posterior to unlabelled examples of data that has changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from stochbn.distributed import Ranks
from stochbn.network.calling import Batch, InputsOf, NetworkInput, network_input
from stochbn.network.layers import listed
from stochbn.network.replica import Network
from stochbn.posteriors import Posterior
from stochbn.posteriors.adaptation import UNUSUAL, Adaptation
from stochbn.posteriors.base import BROKEN
from stochbn.posteriors.checks import check_posterior
from stochbn.posteriors.thresholds import sums_of_centre
from stochbn.shift.comparing import Comparison, Reading
from stochbn.shift.looking import Looker, looking
from stochbn.shift.parts import Part, grouped, total

__all__ = ["Adapter", "adapt"]

ERRORS = (0.4, 0.2, 0.1, 0.05, 0.02, 0.01)
"""The standard errors of the mix, round by round."""
MOST_ROUNDS = 24
SETTLED = 0.005
"""The mix has converged if the share of examples whose class changes from one round to the next is below this."""
PRIOR = 64
"""The weight of the training statistics without a guard, as a number of examples."""
LEAST_VARIANCE = 0.3
"""An adapted variance is at least this share of the smaller of the training variance and the new one."""
EVIDENCE, FEW = 0.1, 8
"""Statistics move if the p-value of the look is at most `EVIDENCE`; with fewer than `FEW` examples, `UNUSUAL`."""
CHANGED = 0.2
"""A changed mix causes a warning if at least this share of examples changed class."""


def adapt(
    model: nn.Module,
    posterior: Posterior,
    batches: Iterable[Batch],
    *,
    prior: float | None = None,
    inputs: InputsOf = None,
    group: ProcessGroup | None = None,
) -> Posterior:
    """Adapt a posterior to unlabelled examples of new data, if their look has changed.

    Two things can change: the look, which is how the inputs of a class look, and the mix, which is how often each class
    occurs. For each batch norm, the difference between the new examples and the reference is computed. The part that a
    changed mix explains is subtracted, see `stochbn.shift.guard`. The running statistics are moved by the rest. If the
    p-value of the look is above 0.1 (above 0.01 for fewer than eight examples), nothing is moved, and the centre is
    exactly the network's own. Later layers are adapted to the outputs of the earlier adapted layers. The distribution
    of the draws around the centre does not change.

    With a reference and evidence of a change this takes at least 7 passes over the examples, and at most 25: passes are
    repeated until the estimated mix no longer changes. Otherwise it takes 2. The examples stay in memory. Eight can be
    enough, and about a hundred are better, as the statistics of few are noisy.

    The posterior's ``adaptation`` says what was concluded, and prints as sentences.

    Args:
        model: the network.
        posterior: a posterior fitted to it. With a reference, which `stochbn.fit` makes, a change of the mix is
            subtracted. Without one, every difference counts as a change of the look, with a warning.
        batches: unlabelled examples of the new data: an iterable of batches, as for `stochbn.fit`. Up to 512 examples,
            or 64 MiB of them, go through the network together; more go in several groups.
        prior: strength of the pull towards the training statistics, as a number of examples: the shift is multiplied by
            ``n / (n + prior)``. None means 0 with a reference, and 64 without one.
        inputs: what the network takes of a batch, as for `stochbn.Predictive`.
        group: in a job of several processes (ranks), the process group whose ranks adapt together. Each rank passes its
            own examples, in as many groups as the others. Every rank gets the posterior that one process would adapt to
            all of them in one group. None: this process alone.

    Returns:
        A copy of the posterior that is centred on the adapted statistics. Its ``centre`` is ``"adapted"``. Thresholds
        of prediction sets are kept and marked: they guarantee no coverage on this data.

    Raises:
        TypeError, ValueError: a wrong argument, a posterior of another network, no examples, examples that the network
            cannot process, or activations that are not finite.
    """
    ranks = Ranks.of(group, "adapted")
    with ranks.failing_together():
        adapter = Adapter(model, posterior, prior=prior, inputs=inputs)
        if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
            raise TypeError(
                f"expected an iterable of batches, such as a DataLoader, got {type(batches).__name__}; "
                "pass [batch] to adapt to a single batch"
            )
        groups = list(grouped(adapter._input(batch) for batch in batches))
        if not groups:
            raise ValueError(
                "there are no examples to adapt to, and at least one example is needed: the iterable is empty or "
                "already used up"
            )
    ranks.check_same({"prior": prior, "groups of examples": len(groups)})
    with ranks.failing_together():
        adapter._ranks = ranks
        try:
            adapter._all_of(groups)
        finally:  # closures that keep a process group until the interpreter ends can abort the process
            adapter._ranks = Ranks(None)
    adapted = adapter.posterior
    if ranks.rank == 0:
        adapter._warn(adapted)
    return adapted


class Adapter:
    """Adapts a posterior to a stream, batch by batch.

    Args:
        model: the network.
        posterior: a posterior fitted to it.
        half_life: after this many further examples, an earlier example has half its weight. None gives all examples the
            same weight.
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
        check_posterior(posterior, model, "weights")
        settings: dict[str, Any] = {"prior": prior, "half_life": half_life}
        for name, value in settings.items():
            if value is not None and (not isinstance(value, Real) or isinstance(value, bool)):
                raise TypeError(f"{name} must be a number of examples or None, got {value!r:.40}")
        if prior is not None and not 0 <= float(prior) < 1e12:
            raise ValueError(f"prior must be a number of examples from 0 on, got {prior!r:.40}")
        if half_life is not None and not 0 < float(half_life) < 1e12:
            raise ValueError(f"half_life must be a positive number of examples, got {half_life!r:.40}")
        self._model, self._inputs, self._half_life = model, inputs, half_life
        self._ranks = Ranks(None)
        self._source, unusable = replace(posterior, thresholds=None, residual_variance=None).centred(model, begun=False)
        if broken := [name for name, why in unusable.items() if why == BROKEN]:
            raise ValueError(
                f"the running statistics of {listed(broken)} are not finite, or have negative variances, so there is "
                "nothing to adapt; train the network, or load its buffers too"
            )
        self._fixed = set(unusable)
        self._thresholds = posterior.thresholds
        if self._thresholds and not self._thresholds.adapted:  # dropped if they do not belong to the running statistics
            self._thresholds = replace(self._source, thresholds=self._thresholds).thresholds
        self._residual = posterior.residual_variance
        if self._residual and not self._residual.adapted:
            self._residual = replace(self._source, residual_variance=self._residual).residual_variance
        reference = posterior.reference
        self._comparison = None if reference is None else Comparison(reference)
        self._prior = float(prior if prior is not None else 0 if reference is not None else PRIOR)
        self._mix = torch.empty(0, dtype=torch.float32) if reference is None else reference.usual
        self._plain: Part | None = None  # all examples, as seen by the network before adaptation
        self._seen: Part | None = None
        self._begun = False  # whether statistics were moved by the last batch of a stream
        self._reading: Reading | None = None
        self._moved: dict[str, Tensor] = {}  # standardised, [2, C]
        self._statistics: dict[str, Tensor] = {}
        self._evidence: dict[str, float] = {}

    def update(self, batch: Batch) -> Posterior:
        """Update with a batch of unlabelled examples, and return the posterior that is adapted to all so far.

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
        self._source.check(self._model)
        inputs = self._input(batch)
        if not len(inputs):
            raise ValueError("the batch has no examples")
        before, plain = self._seen, self._plain
        if before is not None and plain is not None and self._half_life is not None:
            weight = 0.5 ** (len(inputs) / float(self._half_life))
            before, plain = before.times(weight), plain.times(weight)
        network = Network.of(self._model)
        network.look()
        with looking(network) as look:
            self._read(look, [inputs], plain)
            begins = self._moves and not self._begun
            if begins and self._comparison is not None:
                self._mix = self._comparison.reference.usual
            for error in self._rounds(ERRORS if begins else ERRORS[-1:]):
                self._seen = self._pass(look, inputs, before, error).plus(before)
            self._begun = self._moves
        return self.posterior

    @property
    def posterior(self) -> Posterior:
        """The posterior that is adapted to all examples so far, or the original one, without thresholds."""
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
        adapted = self._source.adapted(mean, variance, about)
        residual = self._residual and self._residual.after_adapting(sums_of_centre(adapted))
        return replace(
            adapted,
            thresholds=self._thresholds and self._thresholds.after_adapting(adapted),
            residual_variance=residual,
        )

    def _input(self, batch: Batch) -> NetworkInput:
        taken = network_input(self._model, batch, self._inputs)
        if not taken.divisible:
            raise ValueError(
                "expected batches with the examples on the first axis of every tensor; "
                f"got shapes {[list(tensor.shape) for tensor in taken.tensors()]}"
            )
        return taken

    @property
    def _moves(self) -> bool:
        """Whether there is evidence for a changed look; always True without a reference."""
        if self._reading is None:
            return True
        return self._reading.look <= (EVIDENCE if self._reading.examples >= FEW else UNUSUAL)

    def _all_of(self, batches: list[NetworkInput]) -> None:
        """Go through batches round by round: each is seen beside what was last seen of the others."""
        parts: list[Part | None] = [None] * len(batches)
        network = Network.of(self._model)
        network.look()
        with looking(network) as look:
            self._read(look, batches, None)
            for error in self._rounds(ERRORS if self._moves else ERRORS[-1:]):
                for number, inputs in enumerate(batches):
                    others = total(part for other, part in enumerate(parts) if other != number)
                    parts[number] = self._pass(look, inputs, others, error)
                self._seen = total(parts)
            if self._seen is None or not self._seen.rows:
                why = next(iter(look.unusable.values()), "its running statistics were never trained")
                raise ValueError(f"no batch norm of the network can be adapted: {why}")

    def _read(self, look: Looker, batches: list[NetworkInput], before: Part | None) -> None:
        """How unusual the examples are to the network before adaptation, together with earlier ones."""
        for inputs in batches:
            if self._comparison is None:
                look(inputs)  # this pass determines which layers are usable
                continue
            rows, mixes = self._comparison.seen(look, inputs)
            sums = {name: self._ranks.total(values.sum(0)) for name, values in rows.items()}
            count = float(self._ranks.total(torch.tensor(float(len(inputs)), dtype=torch.float64)))
            before = Part(count, sums, self._ranks.total(mixes.sum(0))).plus(before)
        if self._comparison is None or before is None:
            return
        self._plain, count = before, before.examples
        means = {name: values / count for name, values in before.rows.items()}
        self._reading = self._comparison.reading(means, before.mixes / count, max(1, round(count)))

    def _pass(self, look: Looker, inputs: NetworkInput, others: Part | None, error: float) -> Part:
        """Send a batch through the network while its layers adapt to it and to the other examples."""
        sums: dict[str, Tensor] = {}
        count = float(self._ranks.total(torch.tensor(float(len(inputs)), dtype=torch.float64)))
        examples = count + (0.0 if others is None else others.examples)
        change = None if self._comparison is None else self._comparison.reference.reduced(self._mix)
        weight = examples / (examples + self._prior)

        def rule(name: str, rows: Tensor) -> Tensor | None:
            guard = None if self._comparison is None else self._comparison.guards.get(name)
            if name not in self._source.layers or name in self._fixed or name in look.unusable:
                return None
            if self._comparison is not None and guard is None:
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
            if not self._moves or not bool(shift.any()):  # exactly the network's own
                self._moved.pop(name, None)
                self._statistics.pop(name, None)
                return None
            self._moved[name] = torch.stack([first, variance])
            self._statistics[name] = look.moved(name, self._moved[name])
            return self._moved[name]

        _, output = look(inputs, rule)
        mixes = torch.empty(1, 0, dtype=torch.float32)
        if self._comparison is not None:
            mixes = self._comparison.mixes(output, len(inputs))
        return Part(count, sums, self._ranks.total(mixes.sum(0)))

    def _rounds(self, errors: Sequence[float]) -> Iterator[float]:
        """The standard error of the mix in each round; the last one repeats until the mix has converged."""
        for number in range(MOST_ROUNDS):
            yield errors[min(number, len(errors) - 1)]
            if self._seen is None or not len(self._seen.mixes):
                return
            before, self._mix = self._mix, self._seen.mixes / self._seen.examples
            settled = number >= len(errors) - 1 and float((self._mix - before).abs().sum()) / 2 < SETTLED
            if settled or not self._moves:
                return

    def _warn(self, adapted: Posterior) -> None:
        """Warn if the conclusions are uncertain."""
        about = adapted.adaptation
        if about is None:
            return
        if not about.guarded:
            warnings.warn(
                "the posterior has no reference, so another mix of classes cannot be told from another look of the "
                "inputs: if the new examples are of some classes alone, the network gets worse; fit again, and pass "
                "reference= to be told why there is none",
                stacklevel=3,
            )
        elif about.moved and not about.usual and adapted.reference is not None:
            warnings.warn(
                f"the reference knows no mix, as it was made for the task {adapted.reference.task['name']!r}: another "
                "mix of classes or of numbers counts as another look; pass task= to fit if it is another one",
                stacklevel=3,
            )
        elif about.look <= UNUSUAL and about.distance > CHANGED:
            warnings.warn(
                f"both the look of the inputs and the mix of {about.parts[1]} have changed "
                f"({100 * about.distance:.0f} % of it differs from training), which cannot be told apart with "
                "certainty: check the adapted network on labelled examples, or adapt to examples of all of them",
                stacklevel=3,
            )
