"""The methods of `shift.py`: what each makes of unlabelled examples, and how it then predicts others.

All but the yardstick Tent need no gradients. Each method takes the examples that were `Seen`, and returns a
function from other examples to probabilities. Methods for streams take the batches one after another.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from harm_networks import Data, Recipe
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import stochbn
from stochbn import Posterior, Predictive, conformal, metrics
from stochbn.conformal import Sets
from stochbn.shift import Adapter

__all__ = ["METHODS", "STREAMS", "Method", "Predict", "Seen", "Stream", "Subject", "seed_of"]

DRAWS = 8
"""Draws of the methods with noise, for every example."""
PSEUDO = 16
"""What the source counts for in the blend of Schneider et al., in examples."""
TENT_STEPS, TENT_RATE = 10, 1e-3
HALF_LIFE = 128
"""Of the streams, in examples."""
BATCH = 250

Predict = Callable[[Tensor], Tensor]
"""From inputs ``[N, ...]`` to probabilities ``[N, K]``."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained network with what was chosen and fitted on its training data.

    Attributes:
        name: the network's.
        model: in evaluation mode.
        posterior: of `stochbn.fit`.
        temperature: the best one for the plain network on held-out data.
        sets: conformal sets of 90 % by held-out clean data: of the plain network, with its temperature, and with noise;
            of the ensemble, if there is one.
        members: the networks of an ensemble, of which this one is the first; empty if there is none.
    """

    name: str
    model: nn.Module
    posterior: Posterior
    temperature: float
    sets: Mapping[str, Sets]
    members: tuple[Subject, ...] = ()

    @classmethod
    def of(cls, name: str, model: nn.Module, recipe: Recipe, data: Data) -> Subject:
        """Fit, and choose on held-out data."""
        held_out = data.held_out.batches(250)
        posterior = stochbn.fit(model, data.train.loader(True), augment=recipe.augment, reference=held_out)
        unset = cls(name, model, posterior, 1.0, {})
        inputs, labels = next(data.held_out.batches(len(data.held_out)))
        probs = _plain(Seen(unset, inputs))(inputs)
        temperature = metrics.calibrated_nll(probs, labels, (probs, labels))["temperature"]
        chosen = replace(unset, temperature=temperature)
        found = {"plain": probs, "tempered": _tempered(Seen(chosen, inputs))(inputs)}
        found["noise"] = _source_noise(Seen(chosen, inputs))(inputs[:1000])
        sets = {kind: conformal.lac(one, labels[: len(one)], 0.9) for kind, one in found.items()}
        return replace(chosen, sets=sets)

    def with_members(self, others: Sequence[Subject], data: Data) -> Subject:
        """The same network as the first of an ensemble, whose sets are chosen on held-out data."""
        joined = replace(self, members=(self, *others))
        inputs, labels = next(data.held_out.batches(len(data.held_out)))
        probs = _ensemble(Seen(joined, inputs))(inputs)
        return replace(joined, sets={**self.sets, "ensemble": conformal.lac(probs, labels, 0.9)})


class Seen:
    """Unlabelled examples that a network is to be adapted to.

    Attributes:
        subject: the network.
        examples: ``[n, ...]``.
    """

    def __init__(self, subject: Subject, examples: Tensor) -> None:
        self.subject, self.examples = subject, examples

    @functools.cached_property
    def adapted(self) -> Posterior:
        """The posterior after `stochbn.adapt` with its defaults."""
        return adapted(self.subject.model, self.subject.posterior, self.examples)


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        adapt: from the examples to predictions.
        adapting: forward passes over each example that is adapted to, at least; a backward pass counts as two.
        predicting: passes over each example that is predicted.
        sets: which conformal sets it uses.
        slow: whether every third cell of a regime is enough.
        several: whether it needs the members of an ensemble.
    """

    adapt: Callable[[Seen], Predict]
    adapting: int = 0
    predicting: int = 1
    sets: str = "plain"
    slow: bool = False
    several: bool = False


def seed_of(*words: object) -> int:
    """A seed for anything that has a name."""
    return zlib.crc32(" ".join(map(str, words)).encode())


@torch.no_grad()
def predicted(model: nn.Module, temperature: float, inputs: Tensor) -> Tensor:
    """Probabilities ``[N, K]`` of a network in evaluation mode."""
    parts = [model(part.contiguous(memory_format=torch.channels_last)) for part in inputs.split(BATCH)]
    probs: Tensor = (torch.cat(parts) / temperature).softmax(1)
    return probs


def _plain(seen: Seen) -> Predict:
    return functools.partial(predicted, seen.subject.model, 1.0)


def _tempered(seen: Seen) -> Predict:
    return functools.partial(predicted, seen.subject.model, seen.subject.temperature)


def _noisy(subject: Subject, posterior: Posterior) -> Predict:
    predictive = Predictive(subject.model, posterior, DRAWS)

    def predict(inputs: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.cat([predictive(part, generator=generator).probs for part in inputs.split(BATCH)])

    return predict


def _source_noise(seen: Seen) -> Predict:
    return _noisy(seen.subject, seen.subject.posterior)


@torch.no_grad()
def with_statistics(model: nn.Module, examples: Tensor, share: float) -> nn.Module:
    """A copy of a network whose statistics are, layer after layer, those of examples by a share and else its own.

    Source: Nado et al., 2020 (a share of 1), and Schneider et al., 2020, equation 2.
    """
    copied = copy.deepcopy(model)

    def blend(layer: _BatchNorm, args: tuple[Tensor, ...]) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        axes = [axis for axis in range(args[0].ndim) if axis != 1]
        variance, mean = torch.var_mean(args[0], axes, correction=0)
        layer.running_mean.lerp_(mean, share)
        layer.running_var.lerp_(variance, share)

    layers = [layer for layer in copied.modules() if isinstance(layer, _BatchNorm)]
    handles = [layer.register_forward_pre_hook(blend) for layer in layers]
    copied.eval()(examples)
    for handle in handles:
        handle.remove()
    return copied


def _prediction_time(seen: Seen) -> Predict:
    return functools.partial(predicted, with_statistics(seen.subject.model, seen.examples, 1.0), 1.0)


def _blended(seen: Seen) -> Predict:
    share = len(seen.examples) / (len(seen.examples) + PSEUDO)
    return functools.partial(predicted, with_statistics(seen.subject.model, seen.examples, share), 1.0)


def _tent(seen: Seen) -> Predict:
    """Minimise the entropy by the layers' weights and biases (Wang et al., 2021), on one batch."""
    model = copy.deepcopy(seen.subject.model).requires_grad_(False)
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    for layer in layers:
        layer.train().requires_grad_(True)
    optimizer = torch.optim.Adam([p for layer in layers for p in layer.parameters()], lr=TENT_RATE)
    for _ in range(TENT_STEPS):
        logs = model(seen.examples).log_softmax(1)
        loss = -(logs.exp() * logs).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return functools.partial(predicted, with_statistics(model, seen.examples, 1.0), 1.0)


def adapted(model: nn.Module, posterior: Posterior, examples: Tensor, prior: float | None = None) -> Posterior:
    """The posterior after `stochbn.adapt`, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stochbn.adapt(model, posterior, [examples], prior=prior)


def centre_of(subject: Subject, posterior: Posterior) -> Predict:
    """Predictions by the centre of a posterior, as after ``rescale(math.inf)``."""
    return functools.partial(predicted, posterior.rescale(math.inf).write_to(subject.model).eval(), 1.0)


def _adapt(seen: Seen) -> Predict:
    return centre_of(seen.subject, seen.adapted)


def _adapt_noise(seen: Seen) -> Predict:
    return _noisy(seen.subject, seen.adapted)


def _adapt_prior(seen: Seen) -> Predict:
    return centre_of(seen.subject, adapted(seen.subject.model, seen.subject.posterior, seen.examples, 16))


def _unguarded(seen: Seen) -> Predict:
    unguarded = replace(seen.subject.posterior, reference=None)
    return centre_of(seen.subject, adapted(seen.subject.model, unguarded, seen.examples))


def _averaged(predictions: Sequence[Predict]) -> Predict:
    return lambda inputs: torch.stack([predict(inputs) for predict in predictions]).mean(0)


def _ensemble(seen: Seen) -> Predict:
    return _averaged([_plain(Seen(one, seen.examples)) for one in seen.subject.members])


def _ensemble_adapted(seen: Seen) -> Predict:
    return _averaged([_adapt(seen), *(_adapt(Seen(one, seen.examples)) for one in seen.subject.members[1:])])


MEMBERS = 3
METHODS: dict[str, Method] = {
    "plain": Method(_plain),
    "plain + temperature": Method(_tempered, sets="tempered"),
    "prediction-time BN": Method(_prediction_time, 1),
    "blend, N = 16": Method(_blended, 1),
    "Tent": Method(_tent, 3 * TENT_STEPS + 1, slow=True),
    "SBN": Method(_source_noise, 0, DRAWS, "noise", slow=True),
    "adapt": Method(_adapt, 7),
    "adapt + noise": Method(_adapt_noise, 7, DRAWS, "noise"),
    "adapt, prior = 16": Method(_adapt_prior, 7, slow=True),
    "adapt, no guard": Method(_unguarded, 2, slow=True),
    "ensemble of 3": Method(_ensemble, 0, MEMBERS, "ensemble", several=True),
    "ensemble of 3, each adapted": Method(_ensemble_adapted, 7 * MEMBERS, MEMBERS, "ensemble", several=True),
}
"""All methods by their names in tables."""


class Stream:
    """A method in a stream: it sees a batch, and then predicts others.

    Args:
        method: the name of one of `STREAMS`.
        subject: the network.
    """

    def __init__(self, method: str, subject: Subject) -> None:
        self._method, self._subject = method, subject
        self._adapter = None
        if method == "adapt":
            self._adapter = Adapter(subject.model, subject.posterior, half_life=HALF_LIFE)

    def update(self, examples: Tensor) -> Predict:
        """Predictions after one more batch; methods without a memory use that batch alone."""
        if self._adapter is not None:
            return centre_of(self._subject, self._adapter.update(examples))
        return METHODS[self._method].adapt(Seen(self._subject, examples))


STREAMS = ("plain", "plain + temperature", "prediction-time BN", "blend, N = 16", "adapt")
"""Methods that are shown on streams."""
