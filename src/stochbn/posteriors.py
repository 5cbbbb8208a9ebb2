"""Distributions over the statistics of all batch-norm layers of a network."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from stochbn.files import read_tensors, write_tensors
from stochbn.network.layers import batch_norms, buffer_names, running_statistics
from stochbn.statistics import Moments

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Empirical", "Factorized", "Joint", "Posterior", "check_draws", "load"]

FORMAT = "stochbn.posterior/1"
TINY = torch.finfo(torch.float32).tiny
SOBOL = 64
"""Leading directions that quasi-random draws are spread along; pairs of opposite noise serve the others well enough."""
TOGETHER = 8
"""Quasi-random draws that are made at a time: reading the directions once for all of them saves most of the time."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Posterior(ABC):
    """A distribution over the mean and the variance of every channel of every batch-norm layer of a network.

    It knows nothing of the network but the names and sizes of these layers: it draws named buffers.

    Attributes:
        layers: the number of channels of every layer, by its qualified name. Tensors of the subclasses hold all
            layers' channels one after another: D of them.
        batch_size: the size of the mini-batches whose noise this is: of the observed ones or, after `rescale`, of
            others. None if mini-batches were taken as they came.
        mini_batches: how many were observed.
        dtype: what `draw` returns, the type of the network's own running statistics.
        skipped: batch-norm layers of the network without mini-batch statistics (never called, or frozen); predictions
            use their running averages.
        temperature: what the logits are divided by in every draw; 1 unless `stochbn.calibrate` chose another.
    """

    kind: ClassVar[str]
    worth: ClassVar[float] = 2.0
    """How many independent draws a quasi-random one is worth on the networks of benchmarks/README.md, or more."""

    layers: Mapping[str, int]
    batch_size: float | None
    mini_batches: int
    dtype: torch.dtype = torch.float32
    skipped: tuple[str, ...] = ()
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point torch.dtype, got {self.dtype}")
        if not all(isinstance(channels, int) and channels > 0 for channels in self.layers.values()):
            raise ValueError(f"layers must have whole numbers of channels of at least 1, got {dict(self.layers)}")
        if self.dtype.itemsize < 2:
            raise ValueError(f"dtype must have at least 16 bits, got {self.dtype}")
        if not isinstance(self.mini_batches, int) or self.mini_batches < 1:
            raise ValueError(f"mini_batches must be a whole number of at least 1, got {self.mini_batches!r}")
        if self.batch_size is not None and not self.batch_size > 0:
            raise ValueError(f"batch_size must be positive or None, got {self.batch_size}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a positive number, got {self.temperature}")

    @property
    def channels(self) -> int:
        """D: the number of channels of all layers together."""
        return sum(self.layers.values())

    @property
    @abstractmethod
    def expected(self) -> Tensor:
        """``[2, D]``, float64: the expected means and the expected variances."""

    @abstractmethod
    def _noise(self, generator: torch.Generator | None, device: torch.device, quasi: bool) -> Iterator[Tensor]:
        """Draws one at a time without end, each ``[2, D]`` in float64: means and variances."""

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
        for noise in itertools.islice(self._noise(generator, device, quasi), n):
            drawn = noise.to(self.dtype)
            if not drawn.isfinite().all():
                raise ValueError(
                    f"the posterior drew statistics that {self.dtype} cannot hold; fit it to the network in float32"
                )
            yield {
                name: values
                for layer, pair in zip(self.layers, torch.split(drawn, sizes, dim=1), strict=True)
                for name, values in zip(buffer_names(layer), pair, strict=True)
            }

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

    def check(self, model: nn.Module) -> None:
        """Check that this posterior fits a network: the same batch-norm layers with as many channels.

        Raises:
            ValueError: it does not; the message names the first difference.
        """
        found = {name: layer.num_features for name, layer in batch_norms(model).items()}
        advice = "it was fitted to another network; fit one to this network, or load the one that belongs to it"
        for name, channels in self.layers.items():
            if name not in found:
                raise ValueError(
                    f"the posterior has a layer {name!r} that {type(model).__name__} has not (its batch-norm "
                    f"layers are {_some(found)}): {advice}"
                )
            if found[name] != channels:
                raise ValueError(
                    f"the posterior has {channels} channels for layer {name!r}, "
                    f"{type(model).__name__} has {found[name]}: {advice}"
                )
        unknown = [name for name in found if name not in self.layers and name not in self.skipped]
        if unknown:
            raise ValueError(
                f"{type(model).__name__} has batch-norm layers that the posterior does not know "
                f"({_some(unknown)}): {advice}"
            )

    def rescale(self, batch_size: float) -> Self:
        """The noise that mini-batches of another size have: more for a smaller one, none for ``math.inf``.

        The variances of the means and of the log-variances are in proportion to 1 / `batch_size`; what is expected of
        means and variances stays. That is exact for means of independent objects. It is an approximation for
        variances, and for layers behind others, whose input depends on the noise too; and the expected variance of
        small mini-batches is a little smaller in truth (by the variance of their means). How far it holds on real
        networks is measured in docs/posteriors.md.

        Args:
            batch_size: the size to have the noise of; it need not be a whole number.

        Raises:
            ValueError: it is not a positive number, or the size that this posterior was fitted at is not known or
                infinite.
        """
        if not batch_size > 0:
            raise ValueError(f"batch_size must be a positive number, got {batch_size}")
        if self.batch_size is None:
            raise ValueError(
                "this posterior was fitted to mini-batches as they came (batch_size=None), so the size whose noise it "
                "has is not known; fit it with a batch_size"
            )
        if math.isinf(self.batch_size):
            raise ValueError("this posterior was rescaled to no noise, which cannot be undone; rescale the one before")
        return replace(self._scaled(self.batch_size / batch_size), batch_size=batch_size)

    def recentre(self, model: nn.Module) -> Self:
        """The same noise about the network's own running statistics.

        Fitting observes statistics afresh, and what is expected of them is near the network's running averages, not
        equal to them. After this it is, and without noise (``rescale(math.inf)``) predictions are the network's, to
        the rounding of float32.

        Raises:
            ValueError: the network has other layers, or its running statistics are not finite or negative.
        """
        self.check(model)
        found = batch_norms(model)
        pairs = [running_statistics(found[layer]) for layer in self.layers]
        mean, variance = (torch.cat(list(part)).detach().cpu().double() for part in zip(*pairs, strict=True))
        if not mean.isfinite().all() or not variance.isfinite().all() or (variance < 0).any():
            raise ValueError(
                f"the running statistics of {type(model).__name__} are not finite, or have negative variances"
            )
        return self._moved(mean, variance)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save as safetensors, whole or not at all, with the format's version and the settings of the fit.

        Raises:
            OSError: the file cannot be written.
        """
        tensors = self._tensors()
        about = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in tensors}
        about |= {"kind": self.kind, "layers": list(self.layers.items()), "skipped": list(self.skipped)}
        about["dtype"] = str(self.dtype).removeprefix("torch.")
        write_tensors(path, FORMAT, {name: getattr(self, name) for name in tensors}, about)

    @classmethod
    def _tensors(cls) -> list[str]:
        return [f.name for f in fields(cls) if f.type == "Tensor"]

    def _check_tensor(self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype, negative: bool) -> None:
        """Refuse a tensor of another shape (None fits every length) or type, or with impossible values."""
        tensor = getattr(self, name)
        fits = tensor.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
        if not fits or tensor.dtype != dtype:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise ValueError(
                f"{name} must be {str(dtype).removeprefix('torch.')} [{wanted}] for {self.channels} channels, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        if not tensor.isfinite().all() or (not negative and (tensor < 0).any()):
            raise ValueError(f"{name} must be finite{'' if negative else ' and not negative'}")


@dataclass(frozen=True, eq=False, kw_only=True)
class Factorized(Posterior):
    r"""The paper's SBN distribution: independent for every channel of every layer.

    .. math:: \mu_c \sim \mathrm{Normal}(m_c, s_c^2), \qquad \sigma_c^2 \sim \mathrm{LogNormal}(m'_c, s'^2_c)

    Normal and LogNormal have the mean and the variance that the statistics of the observed mini-batches have
    (Atanov et al., 2018, section 3). A dead channel (variance 0 in every mini-batch) is drawn as
    exactly 0, and a statistic that never varied as exactly its value.

    Attributes:
        mean_mean: ``[D]``, float64, like all below: mean of the mini-batch means.
        mean_variance: variance of the mini-batch means.
        variance_mean: mean of the mini-batch variances.
        variance_variance: variance of the mini-batch variances.
    """

    kind: ClassVar[str] = "factorized"

    mean_mean: Tensor
    mean_variance: Tensor
    variance_mean: Tensor
    variance_variance: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self._tensors():
            self._check_tensor(name, (self.channels,), torch.float64, negative=name == "mean_mean")

    @classmethod
    def from_moments(cls, moments: Mapping[str, Moments], **about: Any) -> Factorized:
        """The distribution with the given moments of the means and variances, ``[2, C]`` for every layer.

        Args:
            moments: of every layer.
            about: all attributes of `Posterior` but the layers.
        """
        _warn_of_one(about["mini_batches"])
        center = torch.cat([m.mean for m in moments.values()], dim=1)
        spread = torch.cat([m.variance for m in moments.values()], dim=1)
        return cls(
            layers={name: m.mean.shape[1] for name, m in moments.items()},
            mean_mean=center[0].clone(),
            mean_variance=spread[0].clone(),
            variance_mean=center[1].clone(),
            variance_variance=spread[1].clone(),
            **about,
        )

    @property
    def log_variance_variance(self) -> Tensor:
        """``[D]``: the variance of the logarithm of the drawn variances, s'^2 = ln(1 + Var[sigma^2] / E[sigma^2]^2)."""
        alive = self.variance_mean > 0
        ratio = self.variance_variance.sqrt() / self.variance_mean.where(alive, 1)
        return torch.where(alive, ratio.square(), 0).log1p()

    @property
    def expected(self) -> Tensor:
        """``[2, D]``, float64: the expected means and the expected variances."""
        return torch.stack([self.mean_mean, self.variance_mean])

    def _noise(self, generator: torch.Generator | None, device: torch.device, quasi: bool) -> Iterator[Tensor]:
        # sigma^2 = E[sigma^2] exp(s' z - s'^2 / 2) has the wanted mean, and needs no logarithm of a dead channel's 0.
        vectors = (self.mean_mean, self.mean_variance.sqrt(), self.variance_mean, self.log_variance_variance)
        m, s, v, log_s2 = (vector.to(device) for vector in vectors)
        log_s = log_s2.sqrt()
        for z in _normals(2 * len(m), generator, device, quasi):
            first, second = z.view(len(z), 2, -1).unbind(1)
            yield from torch.stack([m + s * first, v * (log_s * second - log_s2 / 2).exp()], 1)

    def _scaled(self, factor: float) -> Self:
        spread = self.variance_mean.square() * (factor * self.log_variance_variance).expm1()
        return replace(self, mean_variance=factor * self.mean_variance, variance_variance=spread)

    def _moved(self, mean: Tensor, variance: Tensor) -> Self:
        spread = variance.square() * self.log_variance_variance.expm1()
        return replace(self, mean_mean=mean, variance_mean=variance, variance_variance=spread)


@dataclass(frozen=True, eq=False, kw_only=True)
class Empirical(Posterior):
    """Replay: the statistics of observed mini-batches themselves, as MC-BN draws them (Teye et al., 2018).

    Draws are without replacement; once all mini-batches have been drawn, they are drawn again in another order.

    Attributes:
        statistics: ``[M, 2, D]``, float32: means and variances in each of M mini-batches.
    """

    kind: ClassVar[str] = "empirical"
    worth: ClassVar[float] = 1.0

    statistics: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_tensor("statistics", (None, 2, self.channels), torch.float32, negative=True)
        if not len(self.statistics):
            raise ValueError("statistics must be of at least one mini-batch")
        if (self.statistics[:, 1] < 0).any():
            raise ValueError("statistics must have no negative variances")

    @classmethod
    def from_statistics(cls, statistics: Tensor, **about: Any) -> Empirical:
        """The mini-batches' own statistics, ``[M, 2, D]``, and all attributes of `Posterior`."""
        _warn_of_one(len(statistics))
        return cls(statistics=statistics.float(), **about)

    @property
    def expected(self) -> Tensor:
        """``[2, D]``, float64: the expected means and the expected variances."""
        return self.statistics.mean(0, dtype=torch.float64)

    def _noise(self, generator: torch.Generator | None, device: torch.device, quasi: bool) -> Iterator[Tensor]:
        while True:
            for i in torch.randperm(len(self.statistics), generator=generator, device=device).tolist():
                yield self.statistics[i].to(device, torch.float64)

    def _scaled(self, factor: float) -> Self:
        (mean, variance), root = self.expected, math.sqrt(factor)
        means = mean + root * (self.statistics[:, 0] - mean)
        # In the logarithm of the variances, without taking it of a dead channel's 0; then to the old expected value.
        ratios = torch.where(variance > 0, self.statistics[:, 1] / variance.where(variance > 0, 1), 1).pow(root)
        return replace(self, statistics=torch.stack([means, ratios * (variance / ratios.mean(0))], 1).float())

    def _moved(self, mean: Tensor, variance: Tensor) -> Self:
        old_mean, old = self.expected
        means = self.statistics[:, 0] + (mean - old_mean)
        variances = torch.where(old > 0, self.statistics[:, 1] * (variance / old.where(old > 0, 1)), variance)
        return replace(self, statistics=torch.stack([means, variances], 1).float())


@dataclass(frozen=True, eq=False, kw_only=True)
class Joint(Posterior):
    r"""One Gaussian over all layers' means and log-variances, with what channels and layers have in common.

    .. math:: (\mu, \ln \sigma^2) = m + \sum_k z_k f_k + \sqrt{r} \, \varepsilon

    with one normal z_k for each direction f_k and one epsilon for each entry. The directions are the principal ones of
    the observed mini-batches' covariance, which is shrunk towards its diagonal by the amount of Ledoit and Wolf, in the
    form of Schaefer and Strimmer (2005); what shrinkage and left-out directions take from the variance of an entry, r
    gives back. So every mean and log-variance has exactly the observed variance, every mean and variance the observed
    expectation, and the covariance is never formed: memory is K + 2 vectors of length 2 D, which are read once for
    each draw, and for every 8 quasi-random ones.

    A channel that was dead in some mini-batches has the LogNormal spread of its variances' moments. One that was dead
    (variance 0) in all of them is drawn with the smallest float32 number as its variance.

    Attributes:
        location: ``[2 D]``, float64: m, the expected means and what makes the expected variances those observed.
        directions: ``[K, 2 D]``, float32: the principal directions f_k, largest first, with the length of their
            standard deviation.
        residual: ``[2 D]``, float64: the variance of each entry that is its own.
        shrinkage: from 0 (the observed correlations) to 1 (none).
    """

    kind: ClassVar[str] = "joint"

    location: Tensor
    directions: Tensor
    residual: Tensor
    shrinkage: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_tensor("location", (2 * self.channels,), torch.float64, negative=True)
        self._check_tensor("directions", (None, 2 * self.channels), torch.float32, negative=True)
        self._check_tensor("residual", (2 * self.channels,), torch.float64, negative=False)
        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"shrinkage must be from 0 to 1, got {self.shrinkage}")

    @classmethod
    def from_statistics(cls, statistics: Tensor, most: int | None = None, **about: Any) -> Joint:
        """The distribution of the means and log-variances of mini-batches.

        Args:
            statistics: ``[M, 2, D]``: means and variances.
            most: how many directions to keep at most; None keeps all, the smaller of M - 1 and 2 D.
            about: all attributes of `Posterior`.
        """
        m = len(statistics)
        _warn_of_one(m)
        rows = statistics.double()
        expected = rows[:, 1].mean(0)
        # A channel that was dead in some mini-batch must not have it count as an infinitely small variance.
        floor = (1e-3 * expected).clamp(min=TINY)
        # Nor must one that is constant in every mini-batch and differs between them outweigh all others.
        scale = expected.maximum(rows[:, 0].var(0, correction=0)).clamp(min=TINY).sqrt()
        rows = torch.cat([rows[:, 0], rows[:, 1].maximum(floor)], 1)
        varies = (rows != rows[0]).any(0)
        rows[:, len(scale) :].log_()
        location = rows.mean(0)
        rows -= location
        rows *= varies  # the rounding of what never varied would be perfectly correlated, and shrinkage none
        # Where the floor was needed, the logarithm's spread is the floor's doing: no more than moments ask for, then.
        part = slice(len(scale), None)
        wanted = (
            statistics[:, 1].double().var(0, correction=min(m - 1, 1)) / expected.clamp(min=TINY).square()
        ).log1p()
        spread = rows[:, part].square().sum(0) / max(m - 1, 1)
        excessive = (statistics[:, 1] < floor).any(0) & (spread > wanted)
        rows[:, part] *= torch.where(excessive, wanted / spread.clamp(min=TINY), 1).sqrt()
        total = rows.square().sum(0) / max(m - 1, 1)
        shrinkage = _shrinkage(rows, total)
        # Directions are ordered by what they do to the normalised activations: a shift, in their standard deviations,
        # or a factor, the root of that of the variance.
        products = _products(rows, torch.cat([1 / scale, torch.full_like(scale, 0.5)]))
        vectors = torch.linalg.eigh(products).eigenvectors.flip(1)
        rank = min(m - 1, rows.shape[1])
        vectors = vectors[:, : rank if most is None else min(most, rank)]
        directions = (vectors.T @ rows).mul_(math.sqrt((1 - shrinkage) / max(m - 1, 1)))
        residual = (total - torch.linalg.vector_norm(directions, dim=0).square()).clamp(min=0)
        location[len(scale) :] = expected.clamp(min=TINY).log() - total[len(scale) :] / 2
        return cls(location=location, directions=directions.float(), residual=residual, shrinkage=shrinkage, **about)

    @property
    def _log_variance_variance(self) -> Tensor:
        tail = slice(self.channels, None)
        return self.directions[:, tail].double().square().sum(0) + self.residual[tail]

    @property
    def expected(self) -> Tensor:
        """``[2, D]``, float64: the expected means and the expected variances."""
        mean, log_variance = self.location.view(2, -1)
        return torch.stack([mean, (log_variance + self._log_variance_variance / 2).exp()])

    def _noise(self, generator: torch.Generator | None, device: torch.device, quasi: bool) -> Iterator[Tensor]:
        location, directions, own = (t.to(device) for t in (self.location, self.directions, self.residual.sqrt()))
        leading = min(len(directions), SOBOL)
        points = _sobol(leading, generator, device) if quasi and leading else None
        for z in _normals(len(directions) + len(own), generator, device, quasi):
            if points is not None:
                z[:, :leading] = next(points)
            drawn = location + (z[:, : len(directions)].float() @ directions).double()
            drawn = drawn.addcmul_(own, z[:, len(directions) :]).view(len(z), 2, -1)
            drawn[:, 1].exp_()
            yield from drawn

    def _scaled(self, factor: float) -> Self:
        shift = torch.cat([torch.zeros(self.channels), (1 - factor) / 2 * self._log_variance_variance])
        return replace(
            self,
            location=self.location + shift,
            directions=math.sqrt(factor) * self.directions,
            residual=factor * self.residual,
        )

    def _moved(self, mean: Tensor, variance: Tensor) -> Self:
        return replace(
            self, location=torch.cat([mean, variance.clamp(min=TINY).log() - self._log_variance_variance / 2])
        )


def _shrinkage(rows: Tensor, variance: Tensor) -> float:
    """How far to shrink the correlations of `rows` ``[M, P]``, of mean 0, for the least expected squared error.

    The formula sums the squared errors of all correlations and the correlations' squares (Schaefer and Strimmer, 2005);
    both are found from the rows' products with each other, without the P^2 correlations.
    """
    m = len(rows)
    if m < 3:
        return 1.0
    varies = variance > 0
    scale = torch.where(varies, 1 / variance.where(varies, 1).sqrt(), 0)
    gram = _products(rows, scale)
    products = gram.square().sum() - varies.sum() * (m - 1) ** 2
    fourth = sum((rows[:, part] * scale[part]).pow(4).sum() for part in _parts(len(scale)))
    squared = gram.diagonal().square().sum() - fourth
    errors = m / (m - 1) ** 3 * (squared - products / m)
    correlations = products / (m - 1) ** 2
    return min(max((errors / correlations).item(), 0.0), 1.0) if correlations > 0 else 1.0


def _products(rows: Tensor, weights: Tensor) -> Tensor:
    """``[M, M]``: the rows' products with each other, their entries times `weights`, without a copy of all of them."""
    total = rows.new_zeros(len(rows), len(rows))
    for part in _parts(len(weights)):
        weighted = rows[:, part] * weights[part]
        total.addmm_(weighted, weighted.T)
    return total


def _parts(length: int) -> list[slice]:
    return [slice(start, start + 4096) for start in range(0, length, 4096)]


def _normals(size: int, generator: torch.Generator | None, device: torch.device, antithetic: bool) -> Iterator[Tensor]:
    """Standard normal ``[1, size]`` in float64, without end, or `TOGETHER` rows of which odd ones negate those before.

    Independent draws take from the generator what they need and no more, so that the next call continues them.
    """
    while True:
        rows = TOGETHER // 2 if antithetic else 1
        z = torch.randn(rows, size, generator=generator, device=device, dtype=torch.float64)
        yield torch.stack([z, -z], 1).view(TOGETHER, size) if antithetic else z


def _sobol(dimensions: int, generator: torch.Generator | None, device: torch.device) -> Iterator[Tensor]:
    """Standard normal points ``[TOGETHER, dimensions]`` in float64, without end, from a scrambled Sobol sequence."""
    seed = int(torch.randint(2**31, (), generator=generator, device=device).item())
    engine = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    while True:
        # Multiples of 2^-30, of which 0 would be infinitely far out: the middle of each interval instead.
        yield torch.special.ndtri(engine.draw(TOGETHER, dtype=torch.float64) + 2.0**-31).to(device)


def _warn_of_one(mini_batches: int) -> None:
    if mini_batches == 1:
        warnings.warn(
            "only one mini-batch was observed, so the statistics have no spread and every draw is the same; "
            "pass more data or a smaller batch_size",
            stacklevel=4,
        )


KINDS: dict[str, type[Posterior]] = {cls.kind: cls for cls in (Factorized, Joint, Empirical)}
"""Every kind of posterior by its name."""


def load(path: str | os.PathLike[str]) -> Posterior:
    """Load a posterior that was saved with its ``save``; nothing in the file is executed.

    Names and shapes are checked against a network where the two first meet, in `Predictive`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, corrupt, not a posterior, or of another format version; the message says which.
    """
    tensors, about = read_tensors(path, FORMAT)
    try:
        if about["kind"] not in KINDS:
            known = ", ".join(map(repr, KINDS))
            raise ValueError(f"its kind is {about['kind']!r}, this release of stochbn knows {known}")
        kind = KINDS[about.pop("kind")]
        about |= {"layers": dict(about["layers"]), "skipped": tuple(about["skipped"])}
        about |= {"dtype": getattr(torch, about["dtype"]), **{name: tensors[name] for name in kind._tensors()}}
        return kind(**about)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is not a usable posterior: {error}") from error


def check_draws(n: int) -> None:
    """Refuse a number of draws that is not a whole number of at least 1."""
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"the number of draws must be a whole number, got {n!r}")
    if n < 1:
        raise ValueError(f"the number of draws must be at least 1, got {n}")


def _some(names: Iterable[str], most: int = 5) -> str:
    names = [repr(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
