"""Distributions over the statistics of all batch-norm layers of a network."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from stochbn.files import read_tensors, write_tensors
from stochbn.layers import batch_norms, buffer_names
from stochbn.statistics import Moments

__all__ = ["Factorized", "load"]

FORMAT = "stochbn.posterior/1"


@dataclass(frozen=True, eq=False)
class Factorized:
    r"""The paper's SBN distribution: independent for every channel of every layer.

    .. math:: \mu_c \sim \mathrm{Normal}(m_c, s_c^2), \qquad \sigma_c^2 \sim \mathrm{LogNormal}(m'_c, s'^2_c)

    Normal and LogNormal have the mean and the variance that the statistics of the observed mini-batches have
    (Atanov et al., 2018, section 3). A dead channel (variance 0 in every mini-batch) is drawn as
    exactly 0, and a statistic that never varied as exactly its value.

    Attributes:
        layers: the number of channels of every layer, by its qualified name; the vectors below
            hold all layers' channels one after another, ``[D]`` in float64.
        mean_mean: mean of the mini-batch means.
        mean_variance: variance of the mini-batch means.
        variance_mean: mean of the mini-batch variances.
        variance_variance: variance of the mini-batch variances.
        batch_size: the size of the observed mini-batches; None if they were taken as they came.
        mini_batches: how many were observed.
        dtype: what `draw` returns, the type of the network's own running statistics.
        skipped: batch-norm layers of the network without mini-batch statistics (never called, or frozen); predictions
            use their running averages.
    """

    layers: Mapping[str, int]
    mean_mean: Tensor
    mean_variance: Tensor
    variance_mean: Tensor
    variance_variance: Tensor
    batch_size: int | None
    mini_batches: int
    dtype: torch.dtype = torch.float32
    skipped: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point torch.dtype, got {self.dtype}")
        if not all(isinstance(channels, int) and channels > 0 for channels in self.layers.values()):
            raise ValueError(f"layers must have whole numbers of channels of at least 1, got {dict(self.layers)}")
        size = sum(self.layers.values())
        for name in _VECTORS:
            vector = getattr(self, name)
            if vector.shape != (size,) or vector.dtype != torch.float64:
                raise ValueError(
                    f"{name} must be a float64 vector of {size} channels, got {vector.dtype} {list(vector.shape)}"
                )
            if not vector.isfinite().all() or (name != "mean_mean" and (vector < 0).any()):
                raise ValueError(f"{name} must be finite{'' if name == 'mean_mean' else ' and not negative'}")

    @classmethod
    def from_moments(
        cls,
        moments: Mapping[str, Moments],
        *,
        batch_size: int | None,
        mini_batches: int,
        dtype: torch.dtype = torch.float32,
        skipped: Iterable[str] = (),
    ) -> Factorized:
        """The distribution with the given moments of the means and variances, ``[2, C]`` for every layer."""
        if mini_batches == 1:
            warnings.warn(
                "only one mini-batch was observed, so the statistics have no spread and every draw is the same; "
                "pass more data or a smaller batch_size",
                stacklevel=3,
            )
        center = torch.cat([m.mean for m in moments.values()], dim=1)
        spread = torch.cat([m.variance for m in moments.values()], dim=1)
        return cls(
            layers={name: m.mean.shape[1] for name, m in moments.items()},
            mean_mean=center[0].clone(),
            mean_variance=spread[0].clone(),
            variance_mean=center[1].clone(),
            variance_variance=spread[1].clone(),
            batch_size=batch_size,
            mini_batches=mini_batches,
            dtype=dtype,
            skipped=tuple(skipped),
        )

    @property
    def log_variance_variance(self) -> Tensor:
        """``[D]``: the variance of the logarithm of the drawn variances, s'^2 = ln(1 + Var[sigma^2] / E[sigma^2]^2)."""
        alive = self.variance_mean > 0
        ratio = self.variance_variance.sqrt() / self.variance_mean.where(alive, 1)
        return torch.where(alive, ratio.square(), 0).log1p()

    def iter_draws(self, n: int, generator: torch.Generator | None = None) -> Iterator[dict[str, Tensor]]:
        """Draw one at a time: `n` mappings of buffer names to ``[C]``, the same that `draw` stacks.

        Memory does not grow with `n`. The stream is consumed draw by draw, so ``n`` draws and then ``m``
        more are the same as ``n + m`` at once.

        Raises:
            TypeError, ValueError: `n` is not a whole number of at least 1.
            ValueError: a draw is too large for `dtype`.
        """
        check_draws(n)
        source = generator.device if generator is not None else "cpu"
        # sigma^2 = E[sigma^2] exp(s' z - s'^2 / 2) has the wanted mean, and needs no logarithm of a dead channel's 0.
        m, s, v, log_s2 = (
            t.to(source)
            for t in (self.mean_mean, self.mean_variance.sqrt(), self.variance_mean, self.log_variance_variance)
        )
        log_s = log_s2.sqrt()
        sizes = list(self.layers.values())
        for _ in range(n):
            z = torch.randn(2, len(m), generator=generator, device=source, dtype=torch.float64)
            drawn = torch.stack([m + s * z[0], v * (log_s * z[1] - log_s2 / 2).exp()]).to(self.dtype)
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save as safetensors, whole or not at all, with the format's version and the settings of the fit.

        Raises:
            OSError: the file cannot be written.
        """
        about = {
            "kind": "factorized",
            "layers": list(self.layers.items()),
            "batch_size": self.batch_size,
            "mini_batches": self.mini_batches,
            "dtype": str(self.dtype).removeprefix("torch."),
            "skipped": list(self.skipped),
        }
        write_tensors(path, FORMAT, {name: getattr(self, name) for name in _VECTORS}, about)


_VECTORS = tuple(f.name for f in fields(Factorized) if f.type == "Tensor")


def load(path: str | os.PathLike[str]) -> Factorized:
    """Load a posterior that was saved with its ``save``; nothing in the file is executed.

    Names and shapes are checked against a network where the two first meet, in `Predictive`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, corrupt, not a posterior, or of another format version; the message says which.
    """
    tensors, about = read_tensors(path, FORMAT)
    try:
        if about["kind"] != "factorized":
            raise ValueError(f"its kind is {about['kind']!r}, this release of stochbn knows 'factorized'")
        return Factorized(
            layers=dict(about["layers"]),
            batch_size=about["batch_size"],
            mini_batches=about["mini_batches"],
            dtype=getattr(torch, about["dtype"]),
            skipped=tuple(about["skipped"]),
            **{name: tensors[name] for name in _VECTORS},
        )
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
