"""Diagnose the data of a fit: does it differ from the training data, by how much, and why?

A network's running statistics are averages over its training mini-batches. If a fit observes other averages, and
predictions with them differ from the network's own by more than chance, the network was trained on other data, or the
data is preprocessed differently. `Diagnosis` keeps some examples of a fit and compares predictions.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.modules.batchnorm import _BatchNorm

from stochbn.augment import flip
from stochbn.execution.masks import Masks
from stochbn.network.calling import Batch, NetworkInput, read_output
from stochbn.network.layers import batch_norms, listed, running_statistics
from stochbn.network.replica import Network
from stochbn.posteriors import Posterior
from stochbn.posteriors.base import BEGUN, BROKEN
from stochbn.posteriors.moments import Moments
from stochbn.statistics import observing
from stochbn.undisturbed import undisturbed, without_gradients

__all__ = ["Diagnosis", "Difference"]

KEPT = 256
"""The largest number of examples for comparing predictions."""
KEPT_BYTES = 2**26
"""The largest size of these examples, in bytes."""
CLASSES = 0.02
"""A mean KL divergence of class probabilities below this, in nats, causes no warning."""
NUMBERS = 0.05
"""A mean squared difference of other outputs below this share of their variance over examples causes no warning."""
ERRORS = 2.0
"""A difference must exceed chance by this many standard errors."""
UNSETTLED = 0.01
"""The largest share of initial values, 0 and 1, in running statistics that still describe the training data."""
ALIKE = 0.1
"""Data is not shuffled if two labels of a mini-batch are equal more often than in all data, by this probability."""


class Difference(NamedTuple):
    """The difference of predictions with the observed statistics from the network's own.

    Attributes:
        mean: the mean over examples of the KL divergence of class probabilities, in nats, or of the squared difference
            of other outputs, divided by their variance over examples.
        error: its standard error.
        changed: the share of examples with another predicted class; None for outputs that are not classes.
        changed_error: its standard error.
    """

    mean: float
    error: float
    changed: float | None = None
    changed_error: float = 0.0

    def __str__(self) -> str:
        if self.changed is None:
            return f"outputs differ by {math.sqrt(self.mean):.2f} of their standard deviation"
        return (
            f"{100 * self.changed:.1f} \u00b1 {100 * self.changed_error:.1f} % of these examples are classified "
            f"otherwise (mean KL divergence {self.mean:.3f} \u00b1 {self.error:.3f} nats)"
        )


class Diagnosis:
    """Inspects the data of a fit while it is read.

    Args:
        batch_size: the size of the mini-batches; None takes incoming batches as they come.
        labelled: whether batches contain labels, as in ``(input, labels)``.
    """

    def __init__(self, batch_size: int | None, labelled: bool = True) -> None:
        self._size = batch_size
        self._labelled = labelled
        self._examples: list[NetworkInput] = []
        self._count = self._bytes = 0
        self._labels: list[Tensor] = []  # of each incoming batch, [n]
        self._axes = 0  # that labels have: 1, or more for dense ones

    def watched(self, data: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the same batches, and record their labels."""
        for batch in data:
            labels = _labels(batch) if self._labelled else None
            if labels is not None:
                self._axes = labels.ndim
                if labels.ndim == 1:
                    self._labels.append(labels.long())
            yield batch

    def keep(self, mini_batch: NetworkInput) -> None:
        """Keep a mini-batch, if it is one of the first."""
        size = sum(tensor.nbytes for tensor in mini_batch.tensors())
        if self._count < KEPT and self._bytes + size <= KEPT_BYTES and mini_batch.divisible:
            self._examples.append(mini_batch.map(Tensor.clone))
            self._count += len(mini_batch)
            self._bytes += size

    def warnings(
        self, network: Network, posterior: Posterior, training: frozenset[str], unusable: Mapping[str, str]
    ) -> list[str]:
        """The warnings about a fit.

        Args:
            network: the network.
            posterior: the fitted posterior.
            training: the names of the modules that were in training mode.
            unusable: layers whose running statistics cannot be the centre, and the reasons.
        """
        told = list(_off_centre(posterior, unusable))
        if order := self.unshuffled():
            return [
                *told,
                f"the data is not shuffled: {order}, so mini-batches do not vary as in training and their noise is "
                "wrong; pass a DataLoader with shuffle=True",
            ]
        plain = functools.cache(lambda: self._outputs(network, {}))
        if label := self.one_label(plain):
            return [
                *told,
                f"all examples that were read have the label {label}, so the noise is that of mini-batches of one "
                "class; pass a DataLoader with shuffle=True, or data of all classes",
            ]
        settled = all(map(_settled, batch_norms(network.model).values()))
        if told or not settled or (outputs := plain()) is None:
            return told
        found = self.difference(outputs, network, posterior)
        if found is None:
            return []
        return [_told(found, self.augmented(outputs, network, posterior, training), posterior, network)]

    def unshuffled(self) -> str:
        """A warning about the order of the examples; empty if there is no sign of a problem."""
        rows = [
            row for labels in self._labels for row in torch.split(labels, self._size or len(labels)) if len(row) > 1
        ]
        if len(rows) < 2:
            return ""
        overall = _agreement(torch.cat(rows))
        within = torch.tensor([_agreement(row) for row in rows], dtype=torch.float64)
        excess = within.mean().item() - overall
        if excess <= ALIKE or excess <= 3 * (within.std() / math.sqrt(len(within))).item():
            return ""
        constant = (within == 1).double().mean().item()
        what = (
            f"{100 * constant:.0f} % of the mini-batches have one label only"
            if constant > 0.5
            else f"two examples of a mini-batch have the same label {100 * within.mean().item():.0f} % of the time"
        )
        return f"{what}, and two examples of all {100 * overall:.0f} % of the time"

    def one_label(self, plain: Callable[[], Tensor | None]) -> str:
        """A warning if all examples have one label and the plain network predicts several classes; otherwise empty."""
        labels = torch.cat(self._labels) if self._labels else torch.empty(0)
        if len(labels) < 4 * (self._size or 16) or (labels != labels[0]).any():
            return ""
        outputs = plain()
        several = labels[0] >= 0 and outputs is not None and outputs.ndim == 2 and 1 < outputs.shape[1] > int(labels[0])
        return str(int(labels[0])) if several else ""

    def difference(self, plain: Tensor, network: Network, posterior: Posterior) -> Difference | None:
        """Compare predictions with the observed statistics and plain ones; None if they cannot be compared.

        It is also None if the difference is small, or as expected between running statistics and their expectation.
        """
        found = self._compared(plain, network, posterior.recentre_observed(), None)
        if found is None or found.mean - ERRORS * found.error <= (NUMBERS if found.changed is None else CLASSES):
            return None
        chance = [self._compared(plain, network, _by_chance(network, posterior), seed) for seed in range(4)]
        usual = torch.tensor([one.mean for one in chance if one is not None], dtype=torch.float64)
        if not len(usual) or found.mean - ERRORS * found.error <= usual.mean() + 2 * usual.std():
            return None
        return found

    def augmented(
        self, plain: Tensor, network: Network, posterior: Posterior, training: frozenset[str]
    ) -> Difference | None:
        """The difference with random flips and padded crops, if it is less than half; otherwise None."""
        if not all(batch.first.ndim == 4 and min(batch.first.shape[2:]) >= 8 for batch in self._examples):
            return None
        kinds = (None, "zeros", "reflect")
        found = [self._observed_again(plain, network, posterior, training, kind) for kind in kinds]
        if found[0] is None:
            return None
        changed = [one for one in found[1:] if one is not None]
        best = min(changed, default=None, key=lambda one: one.mean)
        return best if best is not None and best.mean < found[0].mean / 2 else None

    @undisturbed
    def _observed_again(
        self, plain: Tensor, network: Network, posterior: Posterior, training: frozenset[str], padding: str | None
    ) -> Difference | None:
        """The difference with statistics of the kept mini-batches, augmented with such padding."""
        moments: dict[str, Moments] = {}
        change = _flipped_and_shifted(padding) if padding is not None else None
        try:
            with observing(network, training) as observe:
                for number, batch in enumerate(self._examples):
                    shown = batch if change is None else batch.with_first(change)
                    for name, calls in observe(shown, number).items():
                        moments[name] = moments.get(name, Moments.of(calls[:0])).merge(Moments.of(calls))
        except Exception:  # such as of a network that takes no images, which shows nothing
            return None
        if not posterior.layers.keys() <= moments.keys():
            return None
        mean, variance = torch.cat([_total(moments[name]) for name in posterior.layers], 1)
        return self._compared(plain, network, posterior._moved(mean, variance.clamp(min=0)), None, exact=True)

    def _compared(
        self, plain: Tensor, network: Network, posterior: Posterior, seed: int | None, exact: bool = False
    ) -> Difference | None:
        """The difference under a draw with a seed, or with the expected statistics."""
        if seed is not None:
            draw = next(posterior.iter_draws(1, torch.Generator().manual_seed(seed)))
        else:
            # Mini-batches have a smaller variance than all examples, by the variance of their means.
            mean, variance = posterior.expected
            total = variance if exact else variance + posterior.variance_of_means
            draw = next(replace(posterior._moved(mean, total), batch_size=math.inf).iter_draws(1))
        other = self._outputs(network, draw)
        if other is None:
            return None
        if not self._are_classes(plain):
            differences = (other - plain).square() / plain.var(0).clamp(min=1e-12)
            return _mean(differences.reshape(len(plain), -1).mean(1))
        log_p, log_q = plain.log_softmax(1), other.log_softmax(1)
        divergence = (log_p.exp() * (log_p - log_q)).nan_to_num(0, 0, 0).sum(1)
        changed = (plain.argmax(1) != other.argmax(1)).double()
        found, share = (_mean(values.reshape(len(plain), -1).mean(1)) for values in (divergence, changed))
        return found._replace(changed=share.mean, changed_error=share.error)

    def _are_classes(self, outputs: Tensor) -> bool:
        """Whether there are labels, whole numbers, of the classes that the outputs have on axis 1."""
        if self._axes != outputs.ndim - 1 or not self._axes or outputs.shape[1] < 2:
            return False
        return all(labels.min() >= 0 and labels.max() < outputs.shape[1] for labels in self._labels)

    @without_gradients
    def _outputs(self, network: Network, draw: Mapping[str, Tensor]) -> Tensor | None:
        """``[N, ...]``, float64: the outputs for the kept examples with drawn statistics, or with the network's own."""
        if self._count < 2 or network.known.stateful:
            return None
        made = []
        try:
            with network.copied() as replica, Masks(0):
                replica.modes(frozenset())
                replica.statistics(draw)
                for batch in self._examples:
                    output = read_output(batch.call(replica.model))
                    if not isinstance(output, Tensor) or len(output) != len(batch):
                        return None
                    made.append(output.detach().cpu().double())
            outputs = torch.cat(made)
        except Exception:  # what a prediction would raise, which is not for a fit to tell
            return None
        return outputs if outputs.isfinite().all() else None


def _off_centre(posterior: Posterior, unusable: Mapping[str, str]) -> Iterator[str]:
    """What to tell of layers whose running statistics are no centre; nothing where no layer was ever trained."""
    for why, plain in ((BROKEN, "are NaN or wrong"), (BEGUN, "are not what draws vary about")):
        names = [name for name, found in unusable.items() if found == why]
        if names and (why == BROKEN or len(names) < len(posterior.layers)):
            yield (
                f"the running statistics of {listed(names)} are {why}, so draws of these layers are centred on what "
                f"was observed; the plain network uses them as they are, so its predictions {plain}"
            )


def _told(found: Difference, better: Difference | None, posterior: Posterior, network: Network) -> str:
    """Describe what is wrong, why, and what to do.

    Args:
        found: the difference.
        better: the difference with random flips and padded crops, if it is less than half.
        posterior: the posterior.
        network: the network.
    """
    most = _most(network, posterior)
    told = f"these mini-batches have other statistics than training, most in {most}: with them {found}"
    if better is not None:
        cause = (
            "With random flips and padded crops less than half of that is left, so training probably had such "
            "augmentation: pass it as augment="
        )
    else:
        cause = (
            "The usual causes: the data is of another domain, is preprocessed otherwise, or is not augmented as in "
            "training (pass augment=); or layers were frozen in training (pass them as deterministic=)"
        )
    about = (
        "Draws have the network's own statistics as their centre (recentre_observed() gives them these); their noise "
        "is that of these mini-batches"
        if posterior.centre == "running"
        else 'Draws have these statistics as their centre; centre="running" keeps the network\'s own'
    )
    return f"{told}. {cause}. {about}"


def _most(network: Network, posterior: Posterior) -> str:
    """The layers whose statistics differ most, relative to their standard deviations."""
    layers, sizes = batch_norms(network.model), list(posterior.layers.values())
    far = {}
    parts = torch.split(posterior.recentre_observed().expected, sizes, dim=1)
    for name, (mean, variance) in zip(posterior.layers, parts, strict=True):
        own = [part.detach().cpu().double() for part in running_statistics(layers[name])]
        scale = own[1].clamp(min=0) + layers[name].eps
        shift = (mean - own[0]).square() / scale
        far[name] = (shift + ((variance + layers[name].eps) / scale).log().square() / 4).mean().nan_to_num().item()
    return listed(sorted(far, key=far.__getitem__, reverse=True)[:3])


def _settled(layer: _BatchNorm) -> bool:
    """Whether running statistics are averages of mini-batches, without a part of their initial 0 and 1."""
    steps = layer.num_batches_tracked
    if steps is None:
        return True
    mean, variance = running_statistics(layer)
    if not int(steps):  # which a checkpoint may lack
        return bool(mean.any()) or bool((variance != 1).any())
    left = 0.0 if layer.momentum is None else (1 - layer.momentum) ** int(steps)
    return left < UNSETTLED


def _by_chance(network: Network, posterior: Posterior) -> Posterior:
    """The expected difference of running statistics from observed ones, for this mini-batch size, as a posterior."""
    shares = []
    for layer in batch_norms(network.model).values():
        steps = 1 if layer.num_batches_tracked is None else max(int(layer.num_batches_tracked), 1)
        shares.append(1 / steps if layer.momentum is None else layer.momentum / max(2 - layer.momentum, 1e-3))
    factor = min(1.0, max(shares) + 1 / posterior.mini_batches)
    return posterior.centred(network.model)[0]._scaled(factor)


def _mean(values: Tensor) -> Difference:
    return Difference(values.mean().item(), (values.std() / math.sqrt(len(values))).item())


def _total(moments: Moments) -> Tensor:
    """Mean and variance of all examples, by the law of total variance, ``[2, C]``."""
    mean, variance = moments.mean
    return torch.stack([mean, variance + moments.variance[0]])


def _agreement(labels: Tensor) -> float:
    """The probability that two examples have the same label."""
    counts = Counter(labels.tolist()).values()
    return sum(count * (count - 1) for count in counts) / (len(labels) * (len(labels) - 1))


def _labels(batch: Batch) -> Tensor | None:
    """The labels beside the inputs of a batch, if they are whole numbers."""
    labels: Any = None
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
    elif isinstance(batch, Mapping):
        labels = next((batch[key] for key in ("labels", "label", "targets", "target") if key in batch), None)
    if not isinstance(labels, Tensor) or labels.is_complex() or not labels.numel():
        return None
    if labels.is_floating_point() and not bool(((labels == 0) | (labels == 1)).all()):
        return None
    labels = labels.detach().cpu().long()
    whole: Tensor = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    return whole


def _flipped_and_shifted(padding: str) -> Callable[[Tensor], Tensor]:
    """Random flips and padded crops, by an eighth of the sides, of images ``[N, C, H, W]``."""
    generator = torch.Generator().manual_seed(0)

    def change(x: Tensor) -> Tensor:
        flipped = flip()(x, generator)
        height, width = x.shape[2:]
        margins = max(1, height // 8), max(1, width // 8)
        sides = (margins[1], margins[1], margins[0], margins[0])
        padded = pad(flipped, sides) if padding == "zeros" else pad(flipped, sides, mode="reflect")
        tops = torch.randint(2 * margins[0] + 1, (len(x),), generator=generator).tolist()
        lefts = torch.randint(2 * margins[1] + 1, (len(x),), generator=generator).tolist()
        crops = [
            image[:, top : top + height, left : left + width]
            for image, top, left in zip(padded, tops, lefts, strict=True)
        ]
        return torch.stack(crops)

    return change
