"""The base class of all kinds of posteriors: layers, draws, rescaling and files."""

from __future__ import annotations

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stochbn.conformal import Rule
from stochbn.network.fingerprint import Fingerprint
from stochbn.network.layers import batch_norms, buffer_names, listed, running_statistics, unwrap, with_statistics
from stochbn.posteriors.accumulators import Accumulator
from stochbn.posteriors.adaptation import Adaptation
from stochbn.posteriors.checks import check_draws, check_fields, check_network, positive
from stochbn.posteriors.reference import Reference
from stochbn.posteriors.residual import residual_still_valid
from stochbn.posteriors.saved import save
from stochbn.posteriors.thresholds import Thresholds, still_valid
from stochbn.schema import Schema
from stochbn.sharing import push_to_hub
from stochbn.tasks.residual import Residual

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BEGUN", "BROKEN", "TINY", "Posterior"]

TINY = torch.finfo(torch.float32).tiny
BROKEN, BEGUN = "not finite, or have negative variances", "still the 0 and 1 that they began as"
"""Why running statistics cannot be the centre of draws."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Posterior(ABC):
    """Distribution over the mean and the variance of every channel of every batch-norm layer of a network.

    A posterior does not hold the network. It knows the names and sizes of the layers, and draws their named buffers.

    Attributes:
        layers: the number of channels of every layer, by its qualified name. Tensors of the subclasses concatenate the
            channels of all layers, D in total.
        batch_size: the size of the mini-batches whose noise the draws have: that of the observed ones or, after
            `rescale`, another. ``math.inf`` is no noise; None if mini-batches were taken as they came.
        mini_batches: the number of observed mini-batches.
        dtype: the type of draws, that of the network's own running statistics.
        skipped: layers of the network that are not drawn, by name, and the reasons, such as "not called",
            "deterministic" or "stays in evaluation mode". Predictions use their running statistics.
        temperature: what the logits of every draw are divided by; 1 unless `stochbn.calibrate` chose another.
        fingerprint: a fingerprint of the weights that it was fitted with; None if they are not known.
        centre: the mean and expected variance of draws: ``"running"``, the network's own running statistics;
            ``"observed"``, the averages over the observed mini-batches; or ``"adapted"``, the running statistics after
            `stochbn.adapt`.
        observed: the averages over the observed mini-batches, means and variances, ``[2, D]`` in float64; None if they
            are the centre.
        fitted_size: the size of the observed mini-batches, which `fitted` restores.
        choice: why `stochbn.calibrate` chose this noise, centre and temperature, in a sentence.
        reference: the reference that new data is compared with; None if there is none.
        adaptation: what `stochbn.adapt` concluded, if it moved the centre; it prints as sentences.
        thresholds: prediction sets that hold with this noise, centre and temperature, see `with_sets`; or None.
        residual_variance: the variance of observed numbers, see `stochbn.tasks.residual.Residual`; None until it is
            calibrated.
        schema: the data of the command ``stochbn fit``, for later commands; None if it is not known.
    """

    kind: ClassVar[str]
    quasi_gain: ClassVar[float]
    """Variance of a mean over n independent draws, over that of n quasi-random ones; see benchmarks/quasi.py."""
    accumulator: ClassVar[Callable[..., Accumulator[Any]]]
    """What `fit` adds mini-batches to and makes a posterior from; its arguments are options of `fit` for this kind."""

    layers: Mapping[str, int]
    batch_size: float | None
    mini_batches: int
    dtype: torch.dtype = torch.float32
    skipped: Mapping[str, str] = field(default_factory=dict)
    temperature: float = 1.0
    fingerprint: Fingerprint | None = None
    centre: Literal["running", "observed", "adapted"] = "observed"
    observed: Tensor | None = None
    fitted_size: float | None = None
    choice: str = ""
    reference: Reference | None = None
    adaptation: Adaptation | None = None
    thresholds: Thresholds | None = None
    residual_variance: Residual | None = None
    schema: Schema | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "temperature", float(self.temperature))  # tensors take no int of 64 bits or more
        if self.fitted_size is None and self.batch_size != math.inf:
            object.__setattr__(self, "fitted_size", self.batch_size)
        object.__setattr__(self, "thresholds", still_valid(self))
        object.__setattr__(self, "residual_variance", residual_still_valid(self))

    def __repr__(self) -> str:
        size = "as they came" if self.batch_size is None else f"of {self.batch_size:g}"
        about = f"the {self.centre} statistics"
        noise = f"the noise of mini-batches {size} about {about}"
        if self.noiseless:
            noise = "no noise: the plain network" if self.centre == "running" else f"no noise, {about}"
        return (
            f"<{type(self).__name__}: {self.channels} channels in {len(self.layers)} layers, from {self.mini_batches} "
            f"mini-batches; {noise}, temperature {self.temperature:.4g}>"
        )

    @property
    def noiseless(self) -> bool:
        """Whether all draws are equal, as after ``rescale(math.inf)``. One pass is then enough."""
        return self.batch_size == math.inf

    @property
    def channels(self) -> int:
        """The number of channels of all layers together, D."""
        return sum(self.layers.values())

    @property
    @abstractmethod
    def expected(self) -> Tensor:
        """The expected means and the expected variances, ``[2, D]`` in float64."""

    @property
    @abstractmethod
    def variance_of_means(self) -> Tensor:
        """The variance of the means, ``[D]`` in float64."""

    @abstractmethod
    def _noise(self, generator: torch.Generator | None, device: torch.device, quasi: bool) -> Iterator[Tensor]:
        """Yield blocks of draws without end: means and variances, ``[B, 2, D]`` in float64."""

    @abstractmethod
    def _scaled(self, factor: float) -> Self:
        """Return the same with the variance of means and log-variances times `factor`, about the same `expected`."""

    @abstractmethod
    def _moved(self, mean: Tensor, variance: Tensor) -> Self:
        """Return the same noise about other expected means and variances, each ``[D]`` in float64."""

    def iter_draws(
        self, n: int, generator: torch.Generator | None = None, *, quasi: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Draw one at a time: yield `n` mappings of buffer names to ``[C]``, the same as `draw` returns stacked.

        Memory does not grow with `n`. With equal generators, the first ``n`` of ``n + m`` draws are those of ``n``.

        Args:
            n: the number of draws, at least 1.
            generator: the source of the noise; None is PyTorch's global generator.
            quasi: spread the draws evenly over the distribution, so that averages need fewer of them. They come in
                antithetic pairs, whose noise has opposite signs. For the kind joint, the noise along the leading
                directions comes from scrambled Sobol points (Owen, 1998). The kind empirical always draws its
                mini-batches without replacement.

        Raises:
            TypeError, ValueError: `n` is not a whole number of at least 1.
            ValueError: a draw is too large for `dtype`.
        """
        check_draws(n)
        device = generator.device if generator is not None else torch.device("cpu")
        sizes = list(self.layers.values())
        names = [buffer_names(layer) for layer in self.layers]
        batches = self._noise(generator, device, quasi)
        if self.noiseless:
            batches = itertools.repeat(self.expected.to(device)[None])
        for noise in batches:
            drawn = noise[:n].to(self.dtype)
            if not drawn.isfinite().all():
                raise ValueError(
                    f"the posterior drew statistics that {self.dtype} cannot hold; fit it to the network in float32"
                )
            rows = [layer.flatten(0, 1).unbind() for layer in torch.split(drawn, sizes, dim=2)]
            for mean in range(0, 2 * len(drawn), 2):
                draw = {}
                for (mean_name, variance_name), values in zip(names, rows, strict=True):
                    draw[mean_name], draw[variance_name] = values[mean], values[mean + 1]
                yield draw
            n -= len(drawn)
            if not n:
                return

    def draw(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw all statistics `n` times: ``{"<layer>.running_mean": [n, C], "<layer>.running_var": [n, C], ...}``.

        Args:
            n: the number of draws, at least 1.
            generator: the source of the noise; None is PyTorch's global generator.

        Raises:
            TypeError, ValueError: `n` is not a whole number of at least 1.
        """
        rows = list(self.iter_draws(n, generator))
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def rescale(self, batch_size: float) -> Self:
        """Return a posterior with the noise of another mini-batch size: more for smaller sizes, none for ``math.inf``.

        The variances of the means and of the log-variances are multiplied by the old size over the new one. This is
        exact for means of independent examples, and an approximation for variances and for later layers. See
        docs/posteriors.md for measurements. The expected means and variances stay.

        Args:
            batch_size: the new size; it need not be a whole number.

        Raises:
            TypeError: it is not a number.
            ValueError: it is not a positive number, or the size that this posterior was fitted at is not known.
        """
        if not isinstance(batch_size, Real) or isinstance(batch_size, bool):
            raise TypeError(f"batch_size must be a positive number, got {batch_size!r:.40}")
        if not positive(batch_size) and batch_size != math.inf:
            raise ValueError(f"batch_size must be a positive number, got {batch_size!r:.40}")
        if type(batch_size) not in (int, float):
            batch_size = float(batch_size)
        size = self.fitted_size if self.noiseless else self.batch_size
        if size is None:
            why = "has no noise" if self.noiseless else "was fitted to mini-batches as they came (batch_size=None)"
            raise ValueError(
                f"this posterior {why}, and the size of mini-batches whose noise it had is not known, so it cannot be "
                "rescaled; fit it with a batch_size"
            )
        if math.isinf(batch_size):  # keep the noise of the fitted size, but do not draw it
            fitted = size if self.fitted_size is None else self.fitted_size
            return replace(self._scaled(size / fitted), batch_size=math.inf, fitted_size=fitted, choice="")
        return replace(self._scaled(size / batch_size), batch_size=batch_size, choice="")

    def fitted(self) -> Self:
        """Return the posterior with the noise that `stochbn.fit` fitted, at temperature 1; its centre stays."""
        unscaled = replace(self, residual_variance=None)
        if self.fitted_size is not None and self.batch_size != self.fitted_size:
            unscaled = unscaled.rescale(self.fitted_size)
        elif self.noiseless:  # of mini-batches as they came
            unscaled = replace(unscaled, batch_size=None)
        return replace(unscaled, temperature=1.0, choice="")

    def median(self) -> Self | None:
        """Return a posterior without noise, with every statistic at its median; None for kinds that have no medians."""
        return None

    def recentre(self, model: nn.Module, *, weights: bool = True) -> Self:
        """Return the same noise about the network's own running statistics, as with ``fit(centre="running")``.

        Without noise (``rescale(math.inf)``) predictions are then those of the plain network, to rounding.

        Args:
            model: the network.
            weights: also check the network's weights, as `check` does.

        Raises:
            ValueError: the network has other layers or weights, or its running statistics are not finite or negative.
        """
        self.check(model, weights)
        centred, unusable = self.centred(model)
        if unusable:
            raise ValueError(
                f"the running statistics of {type(unwrap(model)).__name__} are {BROKEN}: {listed(unusable)}"
            )
        return centred

    def centred(self, model: nn.Module, *, begun: bool = True) -> tuple[Self, dict[str, str]]:
        """Return the same noise about usable running statistics, and why those of other layers are not usable.

        A layer whose running statistics are not finite, or whose variances are negative, stays where it is.

        Args:
            model: the network.
            begun: whether initial running statistics, 0 and 1, are usable.
        """
        layers = batch_norms(model)
        parts: list[Tensor] = []
        unusable: dict[str, str] = {}
        for name, own in zip(self.layers, torch.split(self.expected, list(self.layers.values()), dim=1), strict=True):
            running = torch.stack([part.detach().cpu().double() for part in running_statistics(layers[name])])
            if not bool(running.isfinite().all()) or bool((running[1] < 0).any()):
                unusable[name] = BROKEN
            elif not begun and not running[0].any() and bool((running[1] == 1).all()):
                unusable[name] = BEGUN
            parts.append(own if name in unusable else running)
        if len(unusable) == len(self.layers):
            return self, unusable
        observed = self.expected if self.observed is None else self.observed
        moved = self._moved(*torch.cat(parts, dim=1))
        return replace(moved, centre="running", observed=observed, choice="", adaptation=None), unusable

    def adapted(self, mean: Tensor, variance: Tensor, about: Adaptation) -> Self:
        """Return the same noise about the statistics of `stochbn.adapt`, each ``[D]`` in float64."""
        observed = self.expected if self.observed is None else self.observed
        return replace(self._moved(mean, variance), centre="adapted", observed=observed, choice="", adaptation=about)

    def with_sets(
        self,
        sets: Rule,
        *,
        examples: int | None = None,
        draws: int | None = None,
        augment: str | None = None,
        by: str | None = None,
    ) -> Self:
        """Return a posterior with prediction sets, also in its file. Another noise, centre or temperature drops them.

        Args:
            sets: sets or intervals of `stochbn.conformal`, without a generator, from held-out predictions with this
                posterior.
            examples: the number of held-out examples.
            draws: the number of draws of these predictions.
            augment: the augmentation of these draws, as text.
            by: for sets by group, the column with the groups, which ``stochbn predict`` reads.

        Raises:
            TypeError, ValueError: the sets cannot be stored.
        """
        return replace(self, thresholds=Thresholds.of(self, sets, examples, draws, augment, by))

    def write_to(self, model: nn.Module) -> nn.Module:
        """Return a copy of the network whose running statistics are the centre of this posterior.

        It runs without stochbn, and any exporter takes it. Wrappers are removed.

        Raises:
            ValueError: a posterior of another network, or statistics that the network's type cannot hold.
        """
        self.check(model)
        if self.temperature != 1:
            warnings.warn(f"divide the logits of this copy by {self.temperature:.4g}, the temperature", stacklevel=2)
        parts = torch.split(self.expected, list(self.layers.values()), dim=1)
        return with_statistics(model, dict(zip(self.layers, parts, strict=True)))

    def recentre_observed(self) -> Self:
        """Return the same noise about the averages over the observed mini-batches, the paper's centre."""
        if self.observed is None:
            return self
        return replace(self._moved(*self.observed), centre="observed", observed=None, choice="", adaptation=None)

    check = check_network
    save = save
    push_to_hub = push_to_hub

    @classmethod
    def _tensors(cls) -> list[str]:
        return [f.name for f in fields(cls) if f.type == "Tensor"]
