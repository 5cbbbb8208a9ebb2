"""Checks of the fields of posteriors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stochbn.network.fingerprint import Fingerprint
from stochbn.network.layers import batch_norms, listed, unwrap

if TYPE_CHECKING:
    from stochbn.posteriors.base import Posterior

__all__ = ["check_draws", "check_fields", "check_network", "check_posterior", "check_tensor", "check_whole", "positive"]

CENTRES = ("running", "observed", "adapted")
"""The possible centres of draws."""
LARGEST = 2**31 - 1
"""The largest number of channels, mini-batches and draws; anything near it is a mistake."""


def check_fields(posterior: Posterior) -> None:
    """Check all fields of a posterior, except tensors.

    Raises:
        ValueError: the message names the first one.
    """
    if not isinstance(posterior.dtype, torch.dtype) or not posterior.dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {posterior.dtype!r:.100}")
    if posterior.dtype.itemsize < 2:
        raise ValueError(f"dtype must have at least 16 bits, got {posterior.dtype}")
    if (
        not isinstance(posterior.layers, Mapping)
        or not posterior.layers
        or not all(isinstance(n, str) for n in posterior.layers)
    ):
        raise ValueError(f"layers must be a mapping of names to numbers of channels, got {posterior.layers!r:.100}")
    for name, channels in posterior.layers.items():
        if not whole(channels):
            raise ValueError(
                f"layers must have whole numbers of channels of at least 1, got {channels!r:.40} for {name!r:.60}"
            )
    if not isinstance(posterior.skipped, Mapping) or not all(
        isinstance(text, str) for pair in posterior.skipped.items() for text in pair
    ):
        raise ValueError(f"skipped must be a mapping of layers' names to reasons, got {posterior.skipped!r:.100}")
    if both := posterior.layers.keys() & posterior.skipped.keys():
        raise ValueError(f"skipped must have no layer that is drawn, got {min(both)!r:.60}")
    if not whole(posterior.mini_batches):
        raise ValueError(f"mini_batches must be a whole number of at least 1, got {posterior.mini_batches!r:.40}")
    if posterior.batch_size is not None and not positive(posterior.batch_size) and posterior.batch_size != math.inf:
        raise ValueError(f"batch_size must be positive or None, got {posterior.batch_size!r:.40}")
    if not positive(posterior.temperature):
        raise ValueError(f"temperature must be a positive number, got {posterior.temperature!r:.40}")
    if not isinstance(posterior.fingerprint, Fingerprint | None):
        raise ValueError(f"fingerprint must be a Fingerprint or None, got {type(posterior.fingerprint).__name__}")
    if posterior.centre not in CENTRES:
        raise ValueError(f"centre must be 'running', 'observed' or 'adapted', got {posterior.centre!r:.40}")
    if (posterior.centre == "adapted") != (posterior.adaptation is not None):
        raise ValueError("a posterior has an adaptation where its centre is 'adapted', and only there")
    if posterior.observed is not None:
        check_tensor(posterior, "observed", (2, posterior.channels), torch.float64, negative=True)
        if (posterior.observed[1] < 0).any():
            raise ValueError("observed must have no negative variances")
    if posterior.fitted_size is not None and not positive(posterior.fitted_size):
        raise ValueError(f"fitted_size must be positive and finite, or None, got {posterior.fitted_size!r:.40}")
    if posterior.reference is not None and posterior.reference.layers.items() - posterior.layers.items():
        raise ValueError("the reference must be of layers that are drawn, with their channels")
    if not isinstance(posterior.choice, str):
        raise ValueError(f"choice must be a sentence, got {posterior.choice!r:.40}")


def check_tensor(
    posterior: Posterior, name: str, shape: tuple[int | None, ...], dtype: torch.dtype, negative: bool
) -> None:
    """Check the shape (None is any length), type and values of a tensor.

    Raises:
        ValueError: the message names the tensor.
    """
    tensor = getattr(posterior, name)
    fits = tensor.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype != dtype:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(
            f"{name} must be {str(dtype).removeprefix('torch.')} [{wanted}] for {posterior.channels} channels, "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )
    if not tensor.isfinite().all() or (not negative and (tensor < 0).any()):
        raise ValueError(f"{name} must be finite{'' if negative else ' and not negative'}")


def check_network(posterior: Posterior, model: nn.Module, weights: bool = True) -> None:
    """Check that a posterior belongs to a network: the same batch-norm layers and weights.

    Args:
        posterior: the posterior.
        model: the network, wrapped or not.
        weights: also compare the weights' fingerprint, if the posterior has one; otherwise names and sizes alone.

    Raises:
        ValueError: it does not; the message names the first difference.
    """
    found = {name: layer.num_features for name, layer in batch_norms(model).items()}
    network = type(unwrap(model)).__name__
    advice = "it was fitted to another network; fit one to this network, or load the one that belongs to it"
    for name, channels in posterior.layers.items():
        if name not in found:
            raise ValueError(
                f"the posterior has a layer {name!r} that {network} has not (its batch-norm "
                f"layers are {listed(found)}): {advice}"
            )
        if found[name] != channels:
            raise ValueError(
                f"the posterior has {channels} channels for layer {name!r}, {network} has {found[name]}: {advice}"
            )
    unknown = [name for name in found if name not in posterior.layers and name not in posterior.skipped]
    if unknown:
        raise ValueError(
            f"{network} has batch-norm layers that the posterior does not know ({listed(unknown)}): {advice}"
        )
    if not weights or posterior.fingerprint is None:
        return
    if difference := posterior.fingerprint.difference(Fingerprint.of(model)):
        raise ValueError(
            f"the posterior was fitted to a {network} with other weights ({difference} differ), so its statistics "
            "are not those of this network; fit again, load the posterior that belongs to these weights, or pass "
            'check="shape" to Predictive or calibrate to use it nevertheless'
        )


def check_draws(n: int) -> None:
    """Check that a number of draws is a whole number from 1 to `LARGEST`.

    Raises:
        TypeError, ValueError: it is not.
    """
    check_whole("the number of draws", n, 1)
    if n > LARGEST:
        raise ValueError(f"the number of draws must be at most {LARGEST}, got one of {n.bit_length()} bits")


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuse an argument that is not a whole number of at least `least`.

    Raises:
        TypeError, ValueError: it is not; the message has its name.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def whole(value: Any) -> bool:
    """Whether it is a whole number from 1 to the largest one."""
    return type(value) is int and 1 <= value <= LARGEST


def positive(value: Any) -> bool:
    """Whether it is a finite number above 0, large enough for calculations."""
    return isinstance(value, Real) and not isinstance(value, bool) and bool(0 < value < 1e300)  # type: ignore[operator]


def check_posterior(posterior: Any, model: nn.Module, check: str) -> None:
    """Refuse what is no posterior of a network.

    Args:
        posterior: the posterior.
        model: the network.
        check: what they must have in common: ``"weights"``, or ``"shape"``, names and sizes of layers.

    Raises:
        TypeError, ValueError: it is none, or `check` is neither.
    """
    from stochbn.posteriors.base import Posterior

    if not isinstance(posterior, Posterior):
        raise TypeError(f"expected a posterior from stochbn.fit or stochbn.load, got {type(posterior).__name__}")
    if check not in ("weights", "shape"):
        raise ValueError(f'check must be "weights" or "shape", got {check!r}')
    posterior.check(model, weights=check == "weights")
