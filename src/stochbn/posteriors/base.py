"""What all kinds of posteriors have in common: their layers, draws, noise of another size, and files."""

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
"""What running statistics are that no draw can have as its centre."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Posterior(ABC):
    """A distribution over the mean and the variance of every channel of every batch-norm layer of a network.

    It knows nothing of the network but the names and sizes of these layers: it draws named buffers.

    Attributes:
        layers: the number of channels of every layer, by its qualified name. Tensors of the subclasses hold all
            layers' channels one after another: D of them.
        batch_size: the size of the mini-batches whose noise this is: of the observed ones or, after `rescale`, of
            others. ``math.inf`` is no noise; None if mini-batches were taken as they came.
        mini_batches: how many were observed.
        dtype: what `draw` returns, the type of the network's own running statistics.
        skipped: layers of the network that are not drawn, by their names, and why, such as "not called",
            "deterministic" or "stays in evaluation mode". Predictions use their running averages.
        temperature: what the logits are divided by in every draw; 1 unless `stochbn.calibrate` chose another.
        fingerprint: of the weights that it was fitted with; None if they are not known.
        centre: what draws have as their mean and expected variance: ``"running"``, the network's own running
            statistics; ``"observed"``, the averages over the observed mini-batches; or ``"adapted"``, what
            `stochbn.adapt` made of the network's own.
        observed: ``[2, D]``, float64: these averages, means and variances, where the centre is another one; else None.
        fitted_size: the size of the mini-batches that were observed, to which `fitted` goes back.
        choice: why `stochbn.calibrate` chose this noise, centre and temperature, in a sentence.
        reference: what new data is compared with; None if it was left out.
        adaptation: what `stochbn.adapt` concluded, if it moved the centre; it prints as sentences.
        thresholds: of prediction sets that hold with this noise, centre and temperature, see `with_sets`; or None.
        residual_variance: of observed numbers, see `stochbn.tasks.residual.Residual`; None until it is calibrated.
        schema: what the data of the command ``stochbn fit`` was, which later commands hold to; None if it is not known.
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
        """Whether all draws are equal, as after ``rescale(math.inf)``: one pass is enough then."""
        return self.batch_size == math.inf

    @property
    def channels(self) -> int:
        """D: the number of channels of all layers together."""
        return sum(self.layers.values())

    @property
    @abstractmethod
    def expected(self) -> Tensor:
        """``[2, D]``, float64: the expected means and the expected variances."""

    @property
    @abstractmethod
    def variance_of_means(self) -> Tensor:
        """``[D]``, float64: the variance of the means."""

    @abstractmethod
    def _noise(self, generator: torch.Generator | None, device: torch.device, quasi: bool) -> Iterator[Tensor]:
        """Draws without end, as many at a time as are made together, ``[B, 2, D]`` in float64: means and variances."""

    @abstractmethod
    def _scaled(self, factor: float) -> Self:
        """The same with the variance of means and log-variances times `factor`, about the same `expected`."""

    @abstractmethod
    def _moved(self, mean: Tensor, variance: Tensor) -> Self:
        """The same noise about other expected means and variances, each ``[D]`` in float64."""

    def iter_draws(
        self, n: int, generator: torch.Generator | None = None, *, quasi: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Draw one at a time: `n` mappings of buffer names to ``[C]``, the same that `draw` stacks.

        Memory does not grow with `n`. With equal generators, the first ``n`` of ``n + m`` draws are those of ``n``.

        Args:
            n: the number of draws, at least 1.
            generator: where the noise comes from; None is PyTorch's global generator.
            quasi: spread the draws evenly over the distribution, so that averages over them need fewer. Each still
                has the posterior's distribution, but they are not independent. Every second draw has the noise of the
                one before with its sign changed (antithetic pairs) and, for the kind joint, what draws have along the
                leading directions comes from scrambled Sobol points (Owen, 1998). The kind empirical has no other
                draws than its own, without replacement.

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
        """`n` draws of all statistics, as ``{"<layer>.running_mean": [n, C], "<layer>.running_var": [n, C], ...}``.

        Args:
            n: the number of draws, at least 1.
            generator: where the noise comes from; None is PyTorch's global generator.

        Raises:
            TypeError, ValueError: `n` is not a whole number of at least 1.
        """
        rows = list(self.iter_draws(n, generator))
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def rescale(self, batch_size: float) -> Self:
        """The noise that mini-batches of another size have: more for a smaller one, none for ``math.inf``.

        The variances of the means and of the log-variances are in proportion to 1 / `batch_size`; what is expected of
        means and variances stays. That is exact for means of independent examples. It is an approximation for
        variances, and for layers behind others, whose input depends on the noise too; and the expected variance of
        small mini-batches is a little smaller in truth (by the variance of their means). How far it holds on real
        networks is measured in docs/posteriors.md.

        Args:
            batch_size: the size to have the noise of; it need not be a whole number.

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
        if math.isinf(batch_size):  # the noise is kept at the size that it was fitted at, and not drawn
            fitted = size if self.fitted_size is None else self.fitted_size
            return replace(self._scaled(size / fitted), batch_size=math.inf, fitted_size=fitted, choice="")
        return replace(self._scaled(size / batch_size), batch_size=batch_size, choice="")

    def fitted(self) -> Self:
        """The posterior as `stochbn.fit` made it: without what `stochbn.calibrate` chose; its centre stays."""
        unscaled = replace(self, residual_variance=None)
        if self.fitted_size is not None and self.batch_size != self.fitted_size:
            unscaled = unscaled.rescale(self.fitted_size)
        elif self.noiseless:  # of mini-batches as they came
            unscaled = replace(unscaled, batch_size=None)
        return replace(unscaled, temperature=1.0, choice="")

    def recentre(self, model: nn.Module, *, weights: bool = True) -> Self:
        """The same noise about the network's own running statistics, as ``fit(centre="running")`` has it.

        Without noise (``rescale(math.inf)``) predictions then are the plain network's, to the rounding of its type.

        Args:
            model: the network.
            weights: refuse a network with other weights, as `check` does.

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
        """The same noise about the running statistics, where a layer has usable ones, and what those of others are.

        A layer whose running statistics are not finite, or whose variances are negative, stays where it is.

        Args:
            model: the network.
            begun: whether the 0 and 1 that running statistics begin as are usable.
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
        """The same noise about statistics ``[D]`` each, in float64, which `stochbn.adapt` has found."""
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
        """The same with prediction sets, which go into its file; another noise, centre or temperature drops them.

        Args:
            sets: sets or intervals of `stochbn.conformal`, without a generator, from held-out predictions with it.
            examples: how many held-out examples there were.
            draws: of these predictions.
            augment: what draws did to the input, as text.
            by: of sets by group, the column of data that has the groups, which ``stochbn predict`` then reads.

        Raises:
            TypeError, ValueError: the sets cannot be stored.
        """
        return replace(self, thresholds=Thresholds.of(self, sets, examples, draws, augment, by))

    def write_to(self, model: nn.Module) -> nn.Module:
        """A copy of the network whose running statistics are the centre of this posterior.

        It needs no stochbn to run, and any exporter takes it. Wrappers are taken off.

        Raises:
            ValueError: a posterior of another network, or statistics that the network's type cannot hold.
        """
        self.check(model)
        if self.temperature != 1:
            warnings.warn(f"divide the logits of this copy by {self.temperature:.4g}, the temperature", stacklevel=2)
        parts = torch.split(self.expected, list(self.layers.values()), dim=1)
        return with_statistics(model, dict(zip(self.layers, parts, strict=True)))

    def recentre_observed(self) -> Self:
        """The same noise about the averages of the observed mini-batches' statistics, the paper's centre."""
        if self.observed is None:
            return self
        return replace(self._moved(*self.observed), centre="observed", observed=None, choice="", adaptation=None)

    check = check_network
    save = save
    push_to_hub = push_to_hub

    @classmethod
    def _tensors(cls) -> list[str]:
        return [f.name for f in fields(cls) if f.type == "Tensor"]
