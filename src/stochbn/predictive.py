"""Predictive distributions: a network under draws of its statistics, with dropout left on, and ensembles of these."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from stochbn.network.calling import (
    Batch,
    call,
    copied_buffers,
    find_logits,
    join,
    length,
    modes,
    network_input,
    split,
    take,
)
from stochbn.network.layers import batch_norms
from stochbn.passes import Early, Forward, Plan
from stochbn.posteriors import Posterior, check_draws
from stochbn.statistics import mini_batches

__all__ = ["Ensemble", "Exact", "MCDropout", "Prediction", "Predictive", "entropy"]

FIRST = 8
"""Quasi-random draws of every object before it is asked which objects are done. Fewer agree by chance too often: the
objects that are done too early seem more certain than they are, and the unknown is detected less well."""
STEP = 4
"""Draws from one such question to the next."""
TOLERANCE = 0.42
"""The standard error at which an object is done, times the root of ``draws``; chosen on held-out images."""


def entropy(probs: Tensor) -> Tensor:
    """The entropy in nats over the class axis (axis 1) of probabilities ``[N, K, ...]``, as ``[N, ...]``."""
    total: Tensor = torch.special.entr(probs).sum(1)
    return total


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a predictive says of N objects; for dense outputs every tensor has their spatial axes at its end.

    Attributes:
        probs: probabilities ``[N, K]``, the mean over draws.
        expected_entropy: ``[N]``, nats: the mean over draws of each draw's entropy, the uncertainty that
            remains when the statistics are known (aleatoric).
        log_probs: ``[S, N, K]``, the log-probabilities of each draw, if ``keep_draws=True`` asked for them.
    """

    probs: Tensor
    expected_entropy: Tensor
    log_probs: Tensor | None = None

    @property
    def entropy(self) -> Tensor:
        """``[N]``, nats: the entropy of `probs`, the total uncertainty."""
        return entropy(self.probs)

    @property
    def mutual_information(self) -> Tensor:
        """``[N]``, nats: entropy of the mean minus mean of the entropies, the part due to the draws (epistemic).

        From S draws it comes out too small by about a share 1 / S: by an eighth for an object that is done after 8.
        """
        return (self.entropy - self.expected_entropy).clamp(min=0)

    @staticmethod
    def cat(predictions: Sequence[Prediction]) -> Prediction:
        """One prediction for the objects of several, in their order.

        Raises:
            ValueError: there are none, or they differ in their classes or draws.
        """
        if not predictions:
            raise ValueError("there are no predictions to join; expected at least one")
        kept = [p.log_probs for p in predictions if p.log_probs is not None]
        if len(kept) not in (0, len(predictions)):
            raise ValueError("some of the predictions to join kept their draws and others did not")
        try:
            return Prediction(
                torch.cat([p.probs for p in predictions]),
                torch.cat([p.expected_entropy for p in predictions]),
                torch.cat(kept, dim=1) if kept else None,
            )
        except RuntimeError as error:
            raise ValueError(f"the predictions differ in their classes or draws: {error}") from error


class Predictor(Protocol):
    """Anything that turns a batch into a `Prediction`."""

    def __call__(
        self, x: Batch, *, generator: torch.Generator | None = None, keep_draws: bool | None = None
    ) -> Prediction: ...


class Predictive:
    """The predictive distribution of a network whose batch-norm statistics are drawn from a posterior.

    `draws` says how accurate probabilities should be: on average over objects about as accurate as a mean over so many
    independent draws. That takes fewer passes, at most half as many for posteriors with covariances or variances,
    because draws are quasi-random (``Posterior.iter_draws(quasi=True)``), and fewer still because each object gets
    draws only until its probabilities are known to a `tolerance`: one on which the draws next to agree is done after 8,
    however many `draws` are. What it comes to on three networks is measured in benchmarks/README.md; where the response
    to noise is even, so that opposite draws tell nothing new, draws are worth half as much.

    The passes are made in the way that is fastest on a CPU with the same results (`stochbn.passes`), which some small
    passes find out at the first call for a shape of input. Probabilities are averaged over draws as they come, so
    memory does not grow with their number. The network runs in evaluation mode without gradients, and its parameters,
    buffers, modes and hooks end as they began; its own hooks see all of these passes. One network can serve one call at
    a time: during a call its buffers are exchanged, so threads need a copy each.

    Args:
        model: the network. Its output may be logits ``[N, K]`` or, for dense predictions, ``[N, K, H, W]``.
        posterior: what `stochbn.fit` or `stochbn.load` returned. None is the plain network: one pass with
            its running averages.
        draws: how many independent draws to be worth, at least 1; half as many quasi-random ones are made, in eights.
        logits: where the logits are in an output that is not a tensor: a key, a field or a position. None looks for
            ``logits``, then ``out``, then the first entry of a tuple.
        generator: where draws come from; None is PyTorch's global generator, and with one given that is
            left alone.
        keep_draws: also return the log-probabilities of each draw, ``[S, N, K]``; memory then grows with S, and every
            object gets all draws.
        tolerance: a standard error of mean probabilities at which an object is done, asked after 8, 12, 16, ... draws:
            the root of the sum over classes (and mean over places, for dense predictions) of the squared standard
            errors that as many independent draws would have. None is 0.42 / sqrt(draws), so 0.06 for 50. With 0, every
            object gets as many draws as `draws` says, all in the network's own number type; otherwise, passes on a CPU
            with bfloat16 instructions are in bfloat16 where rounding is small beside the noise of the draws, judged by
            the first objects of a shape and again by clearly larger ones.
        compiled: make the passes through ``torch.compile``: they stay in the network's number type then, and the first
            call takes some ten seconds more. It pays for many batches where there are no bfloat16 instructions.

    Raises:
        TypeError, ValueError: a wrong argument, or a posterior of another network.
    """

    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior | None = None,
        draws: int = 50,
        *,
        logits: str | int | None = None,
        generator: torch.Generator | None = None,
        keep_draws: bool = False,
        tolerance: float | None = None,
        compiled: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module as the network, got {type(model).__name__}")
        check_draws(draws)
        if posterior is not None:
            if not isinstance(posterior, Posterior):
                raise TypeError(
                    f"expected a posterior from stochbn.fit or stochbn.load, got {type(posterior).__name__}"
                )
            posterior.check(model)
        if tolerance is not None:
            if not isinstance(tolerance, (int, float)) or isinstance(tolerance, bool):
                raise TypeError(f"tolerance must be a number or None, got {tolerance!r}")
            if not 0 <= tolerance < math.inf:
                raise ValueError(f"tolerance must be a finite number of at least 0, got {tolerance}")
        self.model = model
        self.posterior = posterior
        self.draws = draws
        self.logits = logits
        self.generator = generator
        self.keep_draws = keep_draws
        self.tolerance = tolerance
        self._forward = Forward(model, logits, compiled=compiled)

    def __call__(
        self, x: Batch, *, generator: torch.Generator | None = None, keep_draws: bool | None = None
    ) -> Prediction:
        """Predict a batch: a tensor, an ``(input, ...)`` tuple, or a mapping of argument names to tensors.

        Args:
            x: the batch, moved to the network's device.
            generator: in place of the one given at construction.
            keep_draws: in place of what was given at construction.

        Raises:
            RuntimeError, ValueError: the network cannot process this input, or its output is not finite.
            TypeError: the batch or the network's output is of a type that is not supported.
        """
        inputs = network_input(self.model, x)
        keep = self.keep_draws if keep_draws is None else keep_draws
        generator = self.generator if generator is None else generator
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"expected a torch.Generator or None as the generator, got {type(generator).__name__}")
        temperature = self.posterior.temperature if self.posterior is not None else 1.0
        tolerance = 0.0 if keep else TOLERANCE / math.sqrt(self.draws) if self.tolerance is None else self.tolerance
        plan = self._plan(inputs, exact=tolerance == 0)
        average, early = _Average(keep, temperature, tolerance, plan.separable), Early(plan.early)
        draws = self._enough() if tolerance else self.draws
        with torch.no_grad(), modes(self.model, self._trains), closing(self._passes(draws, generator)) as passes:
            objects = length(inputs) if plan.rows else 1
            while block := list(itertools.islice(passes, average.next(plan.draws(objects)))):
                for logits in self._forward(block, inputs, plan, early):
                    average.add(logits)
                waiting = average.waiting()
                if waiting is not None:
                    objects = int(waiting.sum())
                    if not objects:
                        break
                    inputs = take(inputs, waiting)
                    early.take(waiting)
        return average.prediction()

    def _plan(self, inputs: Any, exact: bool) -> Plan:
        # Few passes are not worth the small ones that planning them may take.
        if self.posterior is None or self.draws < FIRST:
            return Plan()
        return self._forward.plan(inputs, None if exact else self._sample, self.draws)

    def _sample(self) -> list[Mapping[str, Tensor]]:
        """The same draws every time, so that equal generators give equal predictions."""
        assert self.posterior is not None
        return list(self.posterior.iter_draws(4, torch.Generator().manual_seed(0)))

    def _trains(self, module: nn.Module) -> bool:
        return False

    def _enough(self) -> int:
        """The number of quasi-random draws that are worth `draws` independent ones."""
        gain = self.posterior.quasi_gain if self.posterior is not None else 1.0
        if gain == 1 or self.draws < FIRST:
            return self.draws
        # Sobol points are evenly spread in multiples of a power of two: two draws more than one are not worth seven.
        return FIRST * max(1, math.ceil((self.draws / gain - 2) / FIRST))

    def _passes(self, draws: int, generator: torch.Generator | None) -> Generator[Mapping[str, Tensor], None, None]:
        """The buffers of each forward pass."""
        if self.posterior is None:
            yield {}
            return
        yield from self.posterior.iter_draws(draws, generator, quasi=True)


class Exact:
    """The exact procedure: each object takes part in random training mini-batches, whose statistics are used.

    For every draw and every object, B - 1 objects of one training mini-batch and the object itself go through the
    network together, with batch norm in training mode and all else in evaluation mode, and probabilities are averaged
    over draws. It is the yardstick that the posteriors approximate, and B times as expensive: `draws` forward passes
    of B objects **for each object**. The object changes the statistics of its mini-batch from the first batch norm on,
    and with them all activations of the others behind it, so only what lies before that layer could be shared between
    objects; that is too little to be worth it.

    Args:
        model: the network.
        batches: training data, as for `stochbn.fit`, shuffled. The first `draws` mini-batches of B - 1 objects are kept
            in memory; draw s is always with mini-batch s, so predictions are deterministic.
        batch_size: B, at least 2.
        draws: the number of mini-batches.
        logits: where the logits are, as for `Predictive`.
        keep_draws: also return the log-probabilities of each draw.

    Raises:
        TypeError, ValueError: a wrong argument, or too few training objects.

    Source: Atanov et al., 2018, section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        batch_size: int = 16,
        draws: int = 50,
        *,
        logits: str | int | None = None,
        keep_draws: bool = False,
    ) -> None:
        batch_norms(model)
        check_draws(draws)
        if not isinstance(batch_size, int) or isinstance(batch_size, bool):
            raise TypeError(f"batch_size must be a whole number, got {batch_size!r}")
        if batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, an object and another one, got {batch_size}")
        self.model = model
        self.logits = logits
        self.keep_draws = keep_draws
        try:
            self.others = list(itertools.islice(mini_batches(model, batches, batch_size - 1), draws))
        except ValueError as error:
            raise ValueError(f"no mini-batches of {batch_size - 1} training objects to join: {error}") from error
        if len(self.others) < draws:
            raise ValueError(
                f"{draws} draws need as many mini-batches of {batch_size - 1} training objects, there were "
                f"{len(self.others)}; pass more data, larger batches or fewer draws"
            )

    def __call__(
        self, x: Batch, *, generator: torch.Generator | None = None, keep_draws: bool | None = None
    ) -> Prediction:
        """Predict a batch, object by object; arguments as for `Predictive`, but a generator has no effect.

        Raises:
            RuntimeError, ValueError: the network cannot process this input, or its output is not finite.
            TypeError: the batch or the network's output is of a type that is not supported.
        """
        inputs = network_input(self.model, x)
        if not length(inputs):
            raise ValueError("there are no objects in this batch")
        keep = self.keep_draws if keep_draws is None else keep_draws

        def logits(others: Any, one: Any) -> Tensor:
            return find_logits(call(self.model, copied_buffers(self.model), join(others, one)), self.logits)[-1:]

        with torch.no_grad(), modes(self.model, lambda module: isinstance(module, _BatchNorm)):
            average = _Average(keep)
            for others in self.others:
                average.add(torch.cat([logits(others, one) for one in split(inputs, 1)]))
        return average.prediction()


class _Average:
    """The average over draws of the objects of a batch, each until it is done.

    Args:
        keep: keep the log-probabilities of every draw.
        temperature: what logits are divided by.
        tolerance: the standard error at which an object is done; 0 for never.
        separable: objects can be done one by one; otherwise they are together.
    """

    def __init__(self, keep: bool, temperature: float = 1.0, tolerance: float = 0.0, separable: bool = True) -> None:
        self.temperature = temperature
        self.tolerance = tolerance
        self.separable = separable
        self.count = 0
        self.kept: list[Tensor] | None = [] if keep else None
        self.done: list[tuple[Tensor, Tensor, Tensor]] = []  # objects, their probabilities and expected entropies

    def add(self, logits: Tensor) -> None:
        """Add one draw of the objects that are not done, ``[M, K, ...]``."""
        if logits.dtype.itemsize < 4:  # half precision is too coarse to average in
            logits = logits.float()
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.kept is not None:
            self.kept.append(logits.log_softmax(1))
        probs = logits.softmax(1)
        self.count += 1
        if self.count == 1:
            self.objects = torch.arange(len(probs), device=probs.device)
            self.mean, self.expected, self.squares = probs, entropy(probs), probs.new_zeros(len(probs))
            return
        change = probs - self.mean
        self.mean.add_(change, alpha=1 / self.count)
        self.expected.lerp_(entropy(probs), 1 / self.count)
        if self.tolerance:
            self.squares += _per_object(change * (probs - self.mean))

    def next(self, together: int) -> int:
        """How many draws to make in the next pass, if as many as `together` can be."""
        return min(together, FIRST - self.count) if self.tolerance and self.count < FIRST else together

    def waiting(self) -> Tensor | None:
        """``[M]``: which objects are not done; None if no more are done than before."""
        if not self.tolerance or self.count < FIRST or self.count % STEP:
            return None
        done = self.squares <= (self.tolerance * self.count) ** 2
        if not self.separable:
            done = done.all().expand_as(done)
        if not done.any():
            return None
        self.done.append((self.objects[done], self.mean[done], self.expected[done]))
        waiting = ~done
        self.objects, self.mean, self.expected, self.squares = (
            values[waiting] for values in (self.objects, self.mean, self.expected, self.squares)
        )
        return waiting

    def prediction(self) -> Prediction:
        """What has been averaged.

        Raises:
            ValueError: an output was not finite.
        """
        mean, expected = self.mean, self.expected
        if self.done:
            objects, means, entropies = zip(*self.done, (self.objects, mean, expected), strict=True)
            order = torch.cat(objects).argsort()
            mean, expected = torch.cat(means)[order], torch.cat(entropies)[order]
        if not mean.isfinite().all():
            raise ValueError(
                "the network's output is not finite (NaN or infinity) for some of these objects; check the input "
                "for NaN and infinity"
            )
        return Prediction(mean, expected, torch.stack(self.kept) if self.kept is not None else None)


def _per_object(terms: Tensor) -> Tensor:
    """``[N]``: terms ``[N, K, ...]`` summed over classes, with the mean over places of dense predictions."""
    total = terms.sum(1)
    return total.flatten(1).mean(1) if total.ndim > 1 else total


class MCDropout(Predictive):
    """The predictive distribution of a network with its dropout layers left on (Gal and Ghahramani, 2016).

    With a posterior every pass also draws the batch-norm statistics: the paper's "Dropout + SBN". All other
    layers are in evaluation mode. Arguments are those of `Predictive`, but every object gets all draws: masks are
    independent, so there are fewer to save. A generator also seeds the dropout masks.

    Raises:
        ValueError: also for a network without dropout layers of a positive rate.
    """

    def __init__(
        self,
        model: nn.Module,
        draws: int = 50,
        posterior: Posterior | None = None,
        *,
        logits: str | int | None = None,
        generator: torch.Generator | None = None,
        keep_draws: bool = False,
    ) -> None:
        super().__init__(
            model, posterior, draws, logits=logits, generator=generator, keep_draws=keep_draws, tolerance=0
        )
        if not any(isinstance(m, _DropoutNd) and m.p > 0 for m in model.modules()):
            raise ValueError(
                f"{type(model).__name__} has no dropout layers with a positive rate, so every pass would be the "
                "same; use Predictive for it, or a network trained with torch.nn.Dropout layers"
            )

    def _plan(self, inputs: Any, exact: bool) -> Plan:
        return Plan()  # masks depend on the memory layout and on which objects are predicted together

    def _trains(self, module: nn.Module) -> bool:
        return isinstance(module, _DropoutNd)

    def _passes(self, draws: int, generator: torch.Generator | None) -> Generator[Mapping[str, Tensor], None, None]:
        passes = super()._passes(draws, generator) if self.posterior is not None else ({} for _ in range(draws))
        if generator is None:
            yield from passes
            return
        seeds = torch.randint(2**62, (draws,), generator=generator, device=generator.device).tolist()
        devices = sorted({p.device.index for p in self.model.parameters() if p.device.type == "cuda"})
        for seed, buffers in zip(seeds, passes, strict=True):
            with torch.random.fork_rng(devices):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every other device too
                for device in devices:
                    torch.cuda.default_generators[device].manual_seed(seed)
                yield buffers


class Ensemble:
    """The equally weighted mixture of several predictives: Deep Ensembles (Lakshminarayanan et al., 2017).

    Members can be any predictives: ``Predictive(model)`` for a plain network, with a posterior for the paper's
    "Deep Ensembles + SBN". Entropy and mutual information are those of the mixture over all members' draws.

    Args:
        members: at least one predictive; all predict the same classes.

    Raises:
        ValueError: there are no members.
        TypeError: a member is not a predictive.
    """

    def __init__(self, members: Sequence[Predictor]) -> None:
        self.members = list(members)
        if not self.members:
            raise ValueError("an ensemble needs at least one member, got none")
        for member in self.members:
            if not callable(member) or isinstance(member, nn.Module):
                raise TypeError(
                    f"expected predictives as members, got {type(member).__name__}; "
                    "wrap a plain network as stochbn.Predictive(network)"
                )

    def __call__(
        self, x: Batch, *, generator: torch.Generator | None = None, keep_draws: bool | None = None
    ) -> Prediction:
        """Predict a batch with every member, one after another; arguments as for `Predictive`.

        ``log_probs`` are the draws of all members, one member's after another's.

        Raises:
            ValueError: the members predict different numbers of classes.
        """
        total: Prediction | None = None
        kept: list[Tensor] = []
        for count, member in enumerate(self.members, start=1):
            p = member(x, generator=generator, keep_draws=keep_draws)
            if p.log_probs is not None:
                kept.append(p.log_probs)
            if total is None:
                total = Prediction(p.probs, p.expected_entropy)
                continue
            if p.probs.shape != total.probs.shape:
                raise ValueError(
                    f"member {count} predicts {list(p.probs.shape)}, those before it {list(total.probs.shape)}; "
                    "all members of an ensemble must predict the same classes"
                )
            total = Prediction(
                total.probs.lerp(p.probs.to(total.probs), 1 / count),
                total.expected_entropy.lerp(p.expected_entropy.to(total.probs), 1 / count),
            )
        assert total is not None
        return Prediction(
            total.probs, total.expected_entropy, torch.cat(kept) if len(kept) == len(self.members) else None
        )
