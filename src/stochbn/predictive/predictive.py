"""Predictive distribution of a network whose batch-norm statistics are drawn from a posterior."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Sequence, Sized
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from stochbn.augment import Augment, check_augment
from stochbn.caller import warn
from stochbn.execution import WAYS, Call, Draw, Passes, Plan, Settings, passes, planned, repeated
from stochbn.interface import Interface, InterfaceOptions, shows_options
from stochbn.network.calling import Batch, NetworkInput, network_input
from stochbn.network.fingerprint import totals
from stochbn.network.replica import Network
from stochbn.posteriors import Posterior, check_draws
from stochbn.posteriors.checks import check_posterior
from stochbn.stopping import Stopping
from stochbn.summary import Summary
from stochbn.tasks import Task
from stochbn.undisturbed import without_gradients

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Predictive", "Predictor", "checked_generator"]

LARGEST_TOLERANCE = 1e100


class Predictor(Protocol):
    """Anything that turns a batch into a `stochbn.Prediction` (or, for numbers, a `stochbn.predictions.Estimate`)."""

    def __call__(self, x: Batch, *, generator: torch.Generator | None = None, keep_draws: bool | None = None) -> Any:
        """Predict a batch."""
        ...


class Predictive:
    """Average the predictions of a network over draws of its batch-norm statistics from a posterior.

    **Draws.** `draws` sets the accuracy: in the mean over a batch, probabilities are about as accurate as means over
    this many independent draws. Fewer passes suffice, because draws are quasi-random
    (``Posterior.iter_draws(quasi=True)``) and come in opposite pairs. The means of the pairs give an estimate of the
    error. Every example gets at least 4 draws, and examples whose draws differ most get most of the others.
    benchmarks/suite.md has the numbers of passes on many networks. If the output is symmetric in the noise, opposite
    draws add nothing. Nearly all draws are then made, and the squared error can be twice that of independent draws.

    **Passes** run in evaluation mode, without gradients, on a copy of the network for each calling thread. The copy
    shares the parameters, and has its own buffers, flags, hooks and Python state. So the network itself does not
    change, further training takes effect, and one predictive serves many threads. Hooks are copied too, and see all
    passes. A network that cannot be copied runs in place, one call at a time. Examples that may affect each other go
    through the network together, and sampling stops for all of them at once. The fastest equivalent execution is used,
    see `explain`. Memory does not grow with the number of draws.

    Args:
        model: the network.
        posterior: what `stochbn.fit`, `stochbn.calibrate` or `stochbn.load` returned. None is the plain network: one
            pass with its running averages or, with `augment`, as many as there are draws. A posterior without noise,
            such as `stochbn.calibrate` may choose, takes one pass too, and predictions have a ``note`` that says why.
        draws: how many independent draws to be worth, at least 1. At most so many are made, and all of them with
            ``tolerance=0`` or `keep_draws`.
        task: what the output means, a name or a `stochbn.Task`; None is what ``config.problem_type`` of a network says,
            or ``"classification"``: logits ``[N, K]``, or dense ``[N, K, H, W]``. ``"binary"``: one logit, ``[N]`` or
            ``[N, 1]``. ``"multilabel"``: a logit for each label. ``"regression"``: numbers ``[N]`` or ``[N, D]``, or a
            pair of them and their log-variances. ``"survival"``, ``"detection"``, ``"embedding"``: see `stochbn.tasks`.
            Of numbers, embeddings and detections, all examples get all draws unless a `tolerance` is given.
        logits: where the logits (or numbers) are in an output that is not a tensor: a key, a field or a position. None
            looks for ``logits``, then ``out``, then the first entry of a tuple. For regression also a pair of places,
            of the mean and of the log-variance.
        class_axis: the axis of the classes or labels in the output; None is axis 1.
        output: ``"logits"``, or ``"probs"`` for a network whose output has been through a softmax or a sigmoid.
        inputs: what the network takes of a batch: None is its first entry, or of a mapping the entries that
            ``forward`` has arguments for; a number is so many leading entries, as positional arguments; a function
            gives a tensor, a tuple of arguments or a mapping of named ones.
        generator: where draws come from; None is PyTorch's global generator, and with one given that is
            left alone.
        keep_draws: also return the log-probabilities of each draw, ``[S, N, K]``; memory then grows with S, and every
            example gets all draws.
        tolerance: a standard error of mean probabilities at which an example is done, in place of what `draws` says. It
            is asked after 4, 6, 8, ... draws. The standard error is the root of the sum over classes (and mean over
            places, for dense predictions) of squared errors, as the pairs of the example and of the batch tell it. With
            0, every example gets as many draws as `draws` says, all in the network's own number type; otherwise, passes
            on a CPU with bfloat16 instructions are in bfloat16 where rounding is small beside the noise of the draws,
            which is checked in each call on some of its examples.
        check: what a posterior must have in common with the network: ``"weights"``, so that one of other weights is
            refused, also one of this network from before it was trained on; or ``"shape"``, names and sizes of layers.
            Where weights change after construction, the next call warns.
        augment: a function ``fn(x, generator)`` that gives a randomly changed batch, each example changed in a way of
            its own: every draw sees the inputs anew. `stochbn.augment` has some whose changes are spread evenly over
            draws. It is given the first tensor of the inputs, and a generator on the CPU. Averages then are over draws
            of the statistics and of the input (test-time augmentation); choose noise and temperature after both, with
            ``calibrate(augment=)``.
        clean: whether the first draw sees the inputs as they are.
        compile: whether to compile the network with ``torch.compile``, for long jobs. Compiling takes 5 to 100 seconds
            for each kind of input, before the first pass. On CPUs it needs a C++ compiler, and is used where passes are
            not in bfloat16, which is as fast. See ``explain`` for what is used.
        settings: what passes may do, a `stochbn.Settings`, for measurements: ``Settings(ways=frozenset())`` makes them
            one draw at a time in the network's own type. None is ``Settings()``.

    Raises:
        TypeError, ValueError: a wrong argument, or a posterior of another network.
    """

    @shows_options(Interface.of)
    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior | None = None,
        draws: int = 50,
        *,
        generator: torch.Generator | None = None,
        keep_draws: bool = False,
        tolerance: float | None = None,
        check: Literal["weights", "shape"] = "weights",
        augment: Augment | None = None,
        clean: bool = True,
        compile: bool = False,
        settings: Settings | None = None,
        **interface: Unpack[InterfaceOptions],
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module as the network, got {type(model).__name__}")
        check_draws(draws)
        if posterior is not None:
            check_posterior(posterior, model, check)
        if tolerance is not None:
            if not isinstance(tolerance, (int, float)) or isinstance(tolerance, bool):
                raise TypeError(f"tolerance must be a number or None, got {tolerance!r}")
            if not 0 <= tolerance <= LARGEST_TOLERANCE:
                shown = tolerance if isinstance(tolerance, float) else "a number out of range"
                raise ValueError(f"tolerance must be a finite number from 0 to {LARGEST_TOLERANCE:g}, got {shown}")
        if settings is not None and not isinstance(settings, Settings):
            raise TypeError(f"settings must be a stochbn.Settings or None, got {type(settings).__name__}")
        self._model = model
        self.posterior = posterior
        self.draws = draws
        self.task, self.inputs = Interface.of(model, **interface)
        self.generator = generator
        self.keep_draws = keep_draws
        self.tolerance = tolerance
        self.check = check
        check_augment(augment)
        self.augment = augment
        self.clean = clean
        self.compile = compile
        self.settings = settings or Settings()
        self._network = Network.of(model)
        self._network.look()
        self._weights = self._seen_weights()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {type(self._model).__name__}: {self.draws} draws of {self.posterior!r}>"

    @property
    def model(self) -> nn.Module:
        """The network. It cannot be replaced: make another predictive for another network."""
        return self._model

    def __call__(self, x: Batch, *, generator: torch.Generator | None = None, keep_draws: bool | None = None) -> Any:
        """Predict a batch: a tensor, an ``(input, ...)`` tuple, or a mapping of argument names to tensors.

        Args:
            x: the batch, moved to the network's device.
            generator: overrides the one given at construction.
            keep_draws: overrides the value given at construction.

        Returns:
            The task's prediction: a `stochbn.Prediction` for classes, a `stochbn.Estimate` for numbers, or another.

        Raises:
            RuntimeError, ValueError: the network cannot process this input, or its output is not finite.
            TypeError: the batch or the network's output is of a type that is not supported.
        """
        inputs = network_input(self.model, x, self.inputs)
        keep = self.keep_draws if keep_draws is None else keep_draws
        generator = checked_generator(self.generator if generator is None else generator)
        state = (torch.default_generator if generator is None else generator).get_state()
        attempts = itertools.count()

        def make(whole: str) -> Any:
            source = generator
            if next(attempts):  # again, with the same random numbers; the global generator is not reset
                source = torch.Generator() if generator is None else generator
                source.set_state(state)
            return self._predict(inputs, source, keep, whole)

        return repeated(make)

    def predict(
        self,
        loader: Iterable[Batch],
        *,
        generator: torch.Generator | None = None,
        keep_draws: bool | None = None,
        progress: Callable[[int, int | None], object] | None = None,
    ) -> Any:
        """Predict all batches of a loader, and join the predictions on the CPU.

        Args:
            loader: batches, each as for a call; such as a DataLoader.
            generator: as for a call; one for all batches.
            keep_draws: as for a call.
            progress: called after each batch with the number of batches done, and of all if the loader has a length.

        Returns:
            The same as one call with all examples. Only predictions stay in memory.

        Raises:
            TypeError: the loader is a tensor, or not iterable.
            ValueError: there are no batches. For the rest, see a call.
        """
        if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
            raise TypeError(f"expected an iterable of batches, such as a DataLoader, got {type(loader).__name__}")
        total = len(loader) if isinstance(loader, Sized) else None
        generator = checked_generator(self.generator if generator is None else generator)
        predictions = []
        for done, batch in enumerate(loader, start=1):
            prediction = self(batch, generator=generator, keep_draws=keep_draws)
            kept = prediction.draws_kept
            averages = [values.cpu() for values in prediction.averages]
            predictions.append(prediction.of(averages, None if kept is None else kept.cpu()))
            if progress is not None:
                progress(done, total)
        if not predictions:
            raise ValueError("there are no batches: the loader is empty or already used up")
        return predictions[0].cat(predictions)

    def explain(self, x: Batch) -> str:
        """Describe how the passes over a batch are made: which faster executions are used, and why not the others.

        Args:
            x: a batch, as for a prediction.
        """
        inputs = network_input(self.model, x, self.inputs)
        plan = self._planned(inputs)
        if self._network.known.in_place:
            where = f"on the network itself, one call at a time ({self._network.known.in_place})"
        else:
            where = "on a copy of the network that shares its parameters"
            if self._network.known.stateful:
                where += ", a fresh one for each pass, as passes change it, or may"
        lines = [f"Passes run {where}."]
        if self._once and self.posterior is not None and self.posterior.choice:
            lines.append(f"There is one pass. {self.posterior.choice}")
        if plan.together:
            lines.append(f"All examples go through the network together: {plan.together}.")
        if plan.units:
            lines.append(f"Run once for all draws: {', '.join(sorted({unit.name or 'all' for unit in plan.units}))}.")
        refused: dict[str, list[str]] = {}
        for way in WAYS:
            later = ", once few examples are left" if way == "stacked" and plan.draws(inputs.count) < 2 else ""
            later = ", unless a check in the call finds its rounding too large" if way == "bfloat16" else later
            if way in plan.ways:
                lines.append(f"{way}: taken{later}")
            else:
                refused.setdefault(plan.refused.get(way, "other ways serve"), []).append(way)
        lines += [f"{', '.join(ways)}: not taken: {reason}" for reason, ways in refused.items()]
        return "\n".join(lines)

    def mixed(self, x: Batch) -> str:
        """Why an example's prediction may depend on the others of its batch; empty if it is proven that it does not.

        This is about the network. Without ``tolerance=0``, the number of draws of an example depends on the others too.

        Args:
            x: a batch of two examples or more, as for a prediction.
        """
        return self._planned(network_input(self.model, x, self.inputs), whole="").together

    @without_gradients
    def _planned(self, inputs: NetworkInput, **changes: Any) -> Plan:
        self._network.look()
        call = replace(self._call(self._stopping(self.keep_draws) is None, inputs), **changes)
        return planned(self._network, inputs, call)

    @without_gradients
    def _predict(self, inputs: NetworkInput, generator: torch.Generator | None, keep: bool, whole: str) -> Any:
        self._network.look()
        self._compare_weights()
        call = self._call(self._stopping(keep) is None, inputs)

        def seed() -> int:
            device = generator.device if generator is not None else "cpu"
            return int(torch.randint(2**62, (), generator=generator, device=device))

        call = replace(call, whole=whole or call.whole, masks=call.masks and seed)
        if self.augment is not None:
            call = replace(call, seed=seed())
        with passes(self._network, inputs, call) as made:
            stopping = self._stopping(keep, apart=not made.plan.together)
            temperature = self.posterior.temperature if self.posterior is not None else 1.0
            summary = Summary(self._read_as, keep, stopping, temperature)
            most = self.draws if stopping is None else stopping.most
            with closing(self._drawn(most, generator)) as drawn:
                while block := list(itertools.islice(drawn, summary.next(made.draws))):
                    summary.add(self._pass(made, block))
                    waiting = summary.waiting()
                    if waiting is None:
                        continue
                    if not bool(waiting.any()):
                        break
                    summary.finish(waiting)
                    made.keep(waiting)
        prediction = summary.prediction()
        if self._once and self.posterior is not None:
            reason = self.posterior.choice if "at one pass" in self.posterior.choice else "the posterior has no noise"
            note = f"one pass without draws, so nothing is due to them: {reason}"
            prediction = replace(prediction, note=f"{note}; {prediction.note}" if prediction.note else note)
        return prediction

    @property
    def _read_as(self) -> Task:
        """The task with its fitted parts, such as a residual variance."""
        return self.task.calibrated(self.posterior)

    @property
    def _once(self) -> bool:
        """Whether all draws are equal, so that one pass suffices."""
        return self.augment is None and (self.posterior is None or self.posterior.noiseless)

    def _compare_weights(self) -> None:
        """Warn, once for each change, if the posterior no longer belongs to the network's weights."""
        weights = self._seen_weights()
        if weights == self._weights:
            return
        self._weights = weights
        assert self.posterior is not None
        try:
            self.posterior.check(self.model)
        except ValueError as error:
            warn(f"the network has changed since this predictive was made: {error}")

    def _seen_weights(self) -> tuple[Any, ...]:
        """What identifies the current weights; empty if they are not checked."""
        if self.posterior is None or self.check == "shape":
            return ()
        return self._network.weights(), totals(self._network.known.parameters)

    def _pass(self, made: Passes, block: Sequence[Draw]) -> Tensor:
        return made(block)

    def _stopping(self, keep: bool, apart: bool = True) -> Stopping | None:
        """The rule for when examples have enough draws; None if they get all."""
        first, tolerance = self.settings.first, self.tolerance
        if keep or self._once or tolerance == 0 or self.draws < first or (tolerance is None and not self.task.early):
            return None
        even = self.posterior is not None and self.posterior.quasi_gain > 1 and self.augment is None
        return Stopping(self.draws, tolerance, even, apart, first, self.settings.step)

    def _call(self, exact: bool, inputs: NetworkInput) -> Call:
        posterior, whole = self.posterior, ""
        if self._once:
            whole = "there is one pass"
        elif self.draws < self.settings.first:
            whole = "there are too few draws for a plan to pay"
        return Call(
            task=self.task,
            settings=self.settings,
            whole=whole,
            posterior=posterior,
            sample=self._sample,
            exact=exact,
            compile=self.compile,
            averaged=self.draws,
            temperature=posterior.temperature if posterior is not None else 1.0,
            augment=self.augment,
            clean=self.clean,
        )

    def _sample(self, count: int) -> list[Draw]:
        """The same draws every time, so that equal generators give equal predictions."""
        if self.posterior is None:
            return [{}] * count
        return list(self.posterior.iter_draws(count, torch.Generator().manual_seed(0)))

    def _drawn(self, count: int, generator: torch.Generator | None) -> Generator[Draw, None, None]:
        """The statistics of each pass."""
        if self.posterior is None:
            yield from ({} for _ in range(1 if self._once else count))
            return
        yield from self.posterior.iter_draws(1 if self._once else count, generator, quasi=True)


def checked_generator(generator: Any) -> torch.Generator | None:
    """Check that an argument is a generator."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"expected a torch.Generator or None as the generator, got {type(generator).__name__}")
    return generator
