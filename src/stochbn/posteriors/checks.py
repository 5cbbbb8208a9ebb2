"""What the fields of every posterior must be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from stochbn.network.fingerprint import Fingerprint

if TYPE_CHECKING:
    from stochbn.posteriors.base import Posterior

__all__ = ["check_draws", "check_fields", "positive"]

CENTRES = ("running", "observed")
"""What draws can be centred on."""
LARGEST = 2**31 - 1
"""What numbers of channels, mini-batches and draws may be at most; anything near it is a mistake."""


def check_fields(posterior: Posterior) -> None:
    """Refuse fields that no posterior can have, but for tensors.

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
        raise ValueError(f"centre must be 'running' or 'observed', got {posterior.centre!r:.40}")


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


def whole(value: Any) -> bool:
    """Whether it is a whole number from 1 to the largest one."""
    return type(value) is int and 1 <= value <= LARGEST


def positive(value: Any) -> bool:
    """Whether it is a number above 0 that calculations can go on with."""
    return isinstance(value, Real) and not isinstance(value, bool) and bool(0 < value < 1e300)  # type: ignore[operator]
