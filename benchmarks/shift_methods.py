"""The methods of `shift.py`: what each makes of unlabelled examples, and how it then predicts others.

All but the yardstick Tent need no gradients. Each method takes a `Subject` and the examples to adapt to, and returns a
function from other examples to probabilities. Methods for streams take the batches one after another.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from harm_networks import Data, Recipe
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import stochbn
from stochbn import Posterior, Predictive, conformal, metrics
from stochbn.conformal import Sets
from stochbn.shift import Adapter

__all__ = ["METHODS", "STREAMS", "Method", "Predict", "Stream", "Subject", "seed_of"]

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
        sets: conformal sets of 90 % by held-out clean data: of the plain network, with its temperature, and with noise.
    """

    name: str
    model: nn.Module
    posterior: Posterior
    temperature: float
    sets: Mapping[str, Sets]

    @classmethod
    def of(cls, name: str, model: nn.Module, recipe: Recipe, data: Data) -> Subject:
        """Fit, and choose on held-out data."""
        posterior = stochbn.fit(model, data.train.loader(True), augment=recipe.augment)
        unset = cls(name, model, posterior, 1.0, {})
        inputs, labels = next(data.held_out.batches(len(data.held_out)))
        probs = _plain(unset, inputs)(inputs)
        temperature = metrics.calibrated_nll(probs, labels, (probs, labels))["temperature"]
        chosen = replace(unset, temperature=temperature)
        found = {"plain": probs, "tempered": _tempered(chosen, inputs)(inputs)}
        found["noise"] = _source_noise(chosen, inputs[:1000])(inputs[:1000])
        sets = {kind: conformal.lac(one, labels[: len(one)], 0.9) for kind, one in found.items()}
        return replace(chosen, sets=sets)


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        adapt: from a subject and examples to predictions.
        adapting: forward passes over each example that is adapted to; a backward pass counts as two.
        predicting: passes over each example that is predicted.
        sets: which conformal sets it uses.
        slow: whether it is left out where there are many cells.
    """

    adapt: Callable[[Subject, Tensor], Predict]
    adapting: int = 0
    predicting: int = 1
    sets: str = "plain"
    slow: bool = False


def seed_of(*words: object) -> int:
    """A seed for anything that has a name."""
    return zlib.crc32(" ".join(map(str, words)).encode())


@torch.no_grad()
def predicted(model: nn.Module, temperature: float, inputs: Tensor) -> Tensor:
    """Probabilities ``[N, K]`` of a network in evaluation mode."""
    parts = [model(part.contiguous(memory_format=torch.channels_last)) for part in inputs.split(BATCH)]
    probs: Tensor = (torch.cat(parts) / temperature).softmax(1)
    return probs


def _plain(subject: Subject, examples: Tensor) -> Predict:
    return functools.partial(predicted, subject.model, 1.0)


def _tempered(subject: Subject, examples: Tensor) -> Predict:
    return functools.partial(predicted, subject.model, subject.temperature)


def _noisy(subject: Subject, posterior: Posterior) -> Predict:
    predictive = Predictive(subject.model, posterior, DRAWS)

    def predict(inputs: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.cat([predictive(part, generator=generator).probs for part in inputs.split(BATCH)])

    return predict


def _source_noise(subject: Subject, examples: Tensor) -> Predict:
    return _noisy(subject, subject.posterior)


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


def _prediction_time(subject: Subject, examples: Tensor) -> Predict:
    return functools.partial(predicted, with_statistics(subject.model, examples, 1.0), 1.0)


def _blended(subject: Subject, examples: Tensor) -> Predict:
    share = len(examples) / (len(examples) + PSEUDO)
    return functools.partial(predicted, with_statistics(subject.model, examples, share), 1.0)


def _tent(subject: Subject, examples: Tensor) -> Predict:
    """Minimise the entropy by the layers' weights and biases (Wang et al., 2021), on one batch."""
    model = copy.deepcopy(subject.model).requires_grad_(False)
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    for layer in layers:
        layer.train().requires_grad_(True)
    optimizer = torch.optim.Adam([p for layer in layers for p in layer.parameters()], lr=TENT_RATE)
    for _ in range(TENT_STEPS):
        logs = model(examples).log_softmax(1)
        loss = -(logs.exp() * logs).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return functools.partial(predicted, with_statistics(model, examples, 1.0), 1.0)


def adapted(subject: Subject, examples: Tensor, *, prior: float | None = None, guard: bool = True) -> Posterior:
    """The posterior after `stochbn.adapt`, without its warnings."""
    posterior = subject.posterior if guard else replace(subject.posterior, reference=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stochbn.adapt(subject.model, posterior, [examples], prior=prior)


def centre_of(subject: Subject, posterior: Posterior) -> Predict:
    """Predictions by the centre of a posterior, as after ``rescale(math.inf)``."""
    return functools.partial(predicted, posterior.rescale(math.inf).write_to(subject.model).eval(), 1.0)


def _adapt(subject: Subject, examples: Tensor) -> Predict:
    return centre_of(subject, adapted(subject, examples))


def _adapt_noise(subject: Subject, examples: Tensor) -> Predict:
    return _noisy(subject, adapted(subject, examples))


def _adapt_prior(subject: Subject, examples: Tensor) -> Predict:
    return centre_of(subject, adapted(subject, examples, prior=16))


def _unguarded(subject: Subject, examples: Tensor) -> Predict:
    return centre_of(subject, adapted(subject, examples, guard=False))


METHODS: dict[str, Method] = {
    "plain": Method(_plain),
    "plain + temperature": Method(_tempered, sets="tempered"),
    "prediction-time BN": Method(_prediction_time, 1),
    "blend, N = 16": Method(_blended, 1),
    "Tent": Method(_tent, 3 * TENT_STEPS + 1, slow=True),
    "SBN": Method(_source_noise, 0, DRAWS, "noise", slow=True),
    "adapt": Method(_adapt, 7),
    "adapt + noise": Method(_adapt_noise, 7, DRAWS, "noise", slow=True),
    "adapt, prior = 16": Method(_adapt_prior, 7),
    "adapt, no guard": Method(_unguarded, 7),
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
        return METHODS[self._method].adapt(self._subject, examples)


STREAMS = ("plain", "plain + temperature", "prediction-time BN", "blend, N = 16", "adapt")
"""Methods that are shown on streams."""
