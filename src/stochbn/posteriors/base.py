"""What all kinds of posteriors have in common: their layers, draws, noise of another size, and files."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from stochbn.files import write_tensors
from stochbn.network.fingerprint import Fingerprint
from stochbn.network.layers import batch_norms, buffer_names, listed, running_statistics, unwrap
from stochbn.posteriors.accumulators import Accumulator

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FORMAT", "TINY", "Posterior", "check_draws"]

FORMAT = "stochbn.posterior/2"
TINY = torch.finfo(torch.float32).tiny
LARGEST = 2**31 - 1
"""What numbers of channels, mini-batches and draws may be at most; anything near it is a mistake."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
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
        skipped: layers of the network that are not drawn, by their names, and why: "not called", "does not update its
            running statistics while training", "deterministic", "stays in evaluation mode", "FrozenBatchNorm" or
            "scripted". Predictions use their running averages.
        temperature: what the logits are divided by in every draw; 1 unless `stochbn.calibrate` chose another.
        fingerprint: of the weights that it was fitted with; None if they are not known.
    """

    kind: ClassVar[str]
    quasi_gain: ClassVar[float]
    """Variance of a mean over n independent draws, over that of n quasi-random ones; see benchmarks/quasi.py."""

    layers: Mapping[str, int]
    batch_size: float | None
    mini_batches: int
    dtype: torch.dtype = torch.float32
    skipped: Mapping[str, str] = field(default_factory=dict)
    temperature: float = 1.0
    fingerprint: Fingerprint | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point torch.dtype, got {self.dtype!r:.100}")
        if self.dtype.itemsize < 2:
            raise ValueError(f"dtype must have at least 16 bits, got {self.dtype}")
        if not isinstance(self.layers, Mapping) or not self.layers or not all(isinstance(n, str) for n in self.layers):
            raise ValueError(f"layers must be a mapping of names to numbers of channels, got {self.layers!r:.100}")
        for name, channels in self.layers.items():
            if not _whole(channels):
                raise ValueError(
                    f"layers must have whole numbers of channels of at least 1, got {channels!r:.40} for {name!r:.60}"
                )
        if not isinstance(self.skipped, Mapping) or not all(
            isinstance(text, str) for pair in self.skipped.items() for text in pair
        ):
            raise ValueError(f"skipped must be a mapping of layers' names to reasons, got {self.skipped!r:.100}")
        if both := self.layers.keys() & self.skipped.keys():
            raise ValueError(f"skipped must have no layer that is drawn, got {min(both)!r:.60}")
        if not _whole(self.mini_batches):
            raise ValueError(f"mini_batches must be a whole number of at least 1, got {self.mini_batches!r:.40}")
        if self.batch_size is not None and not _positive(self.batch_size) and self.batch_size != math.inf:
            raise ValueError(f"batch_size must be positive or None, got {self.batch_size!r:.40}")
        if not _positive(self.temperature):
            raise ValueError(f"temperature must be a positive number, got {self.temperature!r:.40}")
        object.__setattr__(self, "temperature", float(self.temperature))  # tensors take no int of 64 bits or more
        if not isinstance(self.fingerprint, Fingerprint | None):
            raise ValueError(f"fingerprint must be a Fingerprint or None, got {type(self.fingerprint).__name__}")

    def __repr__(self) -> str:
        size = f"of {self.batch_size:g}" if self.batch_size is not None else "as they came"
        noise = "no noise" if self.batch_size == math.inf else f"the noise of mini-batches {size}"
        return (
            f"<{type(self).__name__}: {self.channels} channels in {len(self.layers)} layers, from {self.mini_batches} "
            f"mini-batches; {noise}, temperature {self.temperature:.4g}>"
        )

    @property
    def channels(self) -> int:
        """D: the number of channels of all layers together."""
        return sum(self.layers.values())

    @classmethod
    @abstractmethod
    def accumulator(cls, *args: Any, **options: Any) -> Accumulator[Any]:
        """What `fit` adds mini-batches to, and makes a posterior of this kind from.

        Args:
            args: none; a kind has keyword arguments of its own.
            options: what this kind can be told; `fit` passes those of its arguments that are among them.
        """

    @property
    @abstractmethod
    def expected(self) -> Tensor:
        """``[2, D]``, float64: the expected means and the expected variances."""

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
        for noise in self._noise(generator, device, quasi):
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

    def check(self, model: nn.Module, weights: bool = True) -> None:
        """Check that this posterior belongs to a network: the same batch-norm layers and weights.

        Args:
            model: the network, wrapped or not.
            weights: also compare the weights' fingerprint, if this posterior has one; otherwise names and sizes alone.

        Raises:
            ValueError: it does not; the message names the first difference.
        """
        found = {name: layer.num_features for name, layer in batch_norms(model).items()}
        network = type(unwrap(model)).__name__
        advice = "it was fitted to another network; fit one to this network, or load the one that belongs to it"
        for name, channels in self.layers.items():
            if name not in found:
                raise ValueError(
                    f"the posterior has a layer {name!r} that {network} has not (its batch-norm "
                    f"layers are {listed(found)}): {advice}"
                )
            if found[name] != channels:
                raise ValueError(
                    f"the posterior has {channels} channels for layer {name!r}, {network} has {found[name]}: {advice}"
                )
        unknown = [name for name in found if name not in self.layers and name not in self.skipped]
        if unknown:
            raise ValueError(
                f"{network} has batch-norm layers that the posterior does not know ({listed(unknown)}): {advice}"
            )
        if not weights or self.fingerprint is None:
            return
        if difference := self.fingerprint.difference(Fingerprint.of(model)):
            raise ValueError(
                f"the posterior was fitted to a {network} with other weights ({difference} differ), so its statistics "
                "are not those of this network; fit again, load the posterior that belongs to these weights, or pass "
                'check="shape" to Predictive or calibrate to use it nevertheless'
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
            TypeError: it is not a number.
            ValueError: it is not a positive number, or the size that this posterior was fitted at is not known or
                infinite.
        """
        if not isinstance(batch_size, Real) or isinstance(batch_size, bool):
            raise TypeError(f"batch_size must be a positive number, got {batch_size!r:.40}")
        if not _positive(batch_size) and batch_size != math.inf:
            raise ValueError(f"batch_size must be a positive number, got {batch_size!r:.40}")
        if type(batch_size) not in (int, float):
            batch_size = float(batch_size)
        if self.batch_size is None:
            raise ValueError(
                "this posterior was fitted to mini-batches as they came (batch_size=None), so the size whose noise it "
                "has is not known; fit it with a batch_size"
            )
        if math.isinf(self.batch_size):
            raise ValueError(
                "this posterior was rescaled to no noise, which cannot be undone; rescale the one before, or fit again"
            )
        return replace(self._scaled(self.batch_size / batch_size), batch_size=batch_size)

    def recentre(self, model: nn.Module, *, weights: bool = True) -> Self:
        """The same noise about the network's own running statistics.

        Fitting observes statistics afresh, and what is expected of them is near the network's running averages, not
        equal to them. After this it is, and without noise (``rescale(math.inf)``) predictions are the network's, to
        the rounding of float32.

        Args:
            model: the network.
            weights: refuse a network with other weights, as `check` does.

        Raises:
            ValueError: the network has other layers or weights, or its running statistics are not finite or negative.
        """
        self.check(model, weights)
        found = batch_norms(model)
        pairs = [running_statistics(found[layer]) for layer in self.layers]
        mean, variance = (torch.cat(list(part)).detach().cpu().double() for part in zip(*pairs, strict=True))
        if not mean.isfinite().all() or not variance.isfinite().all() or (variance < 0).any():
            raise ValueError(
                f"the running statistics of {type(unwrap(model)).__name__} are not finite, or have negative variances"
            )
        return self._moved(mean, variance)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save as safetensors, whole or not at all, with the format's version and the settings of the fit.

        Raises:
            OSError: the file cannot be written.
        """
        tensors = self._tensors()
        about = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in tensors}
        about |= {"kind": self.kind, "layers": list(self.layers.items()), "skipped": dict(self.skipped)}
        about["dtype"] = str(self.dtype).removeprefix("torch.")
        about["fingerprint"] = self.fingerprint and self.fingerprint.description()
        write_tensors(path, FORMAT, {name: getattr(self, name) for name in tensors}, about)

    def push_to_hub(
        self,
        repository: str,
        *,
        network: str = "",
        before: Mapping[str, float] | None = None,
        after: Mapping[str, float] | None = None,
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Share this posterior on the Hugging Face Hub, with a model card; `stochbn.from_pretrained` loads it.

        Args:
            repository: ``owner/name``, which is made if there is none.
            network: what it is a posterior of: the name of a repository on the Hub, or words.
            before: scores of the network alone for the card: any of ``error`` (percent), ``nll`` (nats), ``ece`` and
                ``auroc``, as `stochbn.metrics` gives them.
            after: the same scores with this posterior.
            private: whether a repository that is made is private; None is what its owner has set.
            token: of the Hub; None takes the one that ``hf auth login`` has stored.

        Returns:
            The address of the upload.

        Raises:
            ImportError: huggingface_hub is not installed.
            ValueError: scores that are not numbers, have unknown names or are there before or after only.
            Exception: as huggingface_hub raises it where the Hub refuses, or there is no connection.
        """
        from stochbn.sharing import push_to_hub

        return push_to_hub(self, repository, network=network, before=before, after=after, private=private, token=token)

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


def check_draws(n: int) -> None:
    """Refuse a number of draws that is not a whole number of at least 1, or is out of all bounds.

    Raises:
        TypeError, ValueError: it is.
    """
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"the number of draws must be a whole number, got {n!r}")
    if n < 1:
        raise ValueError(f"the number of draws must be at least 1, got {n}")
    if n > LARGEST:
        raise ValueError(f"the number of draws must be at most {LARGEST}, got one of {n.bit_length()} bits")


def _whole(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST


def _positive(value: Any) -> bool:
    """Whether it is a number above 0 that calculations can go on with."""
    return isinstance(value, Real) and not isinstance(value, bool) and bool(0 < value < 1e300)  # type: ignore[operator]
