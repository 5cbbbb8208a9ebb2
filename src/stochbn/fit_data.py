"""The data of a fit: the number of mini-batches, their accumulator, and their augmentation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from stochbn.augment import Augment, Views
from stochbn.distributed import Ranks
from stochbn.network.calling import NetworkInput
from stochbn.posteriors import KINDS
from stochbn.posteriors.accumulators import Accumulator

__all__ = ["KEPT", "accumulator_of", "augmented", "expected_batches", "most_batches"]

KEPT = 512
"""The number of mini-batches for kinds that keep them."""
MOMENTS = 5000
"""This many mini-batches give standard deviations to 1 %, whose relative standard error is 1 / sqrt(2 n)."""


def most_batches(kind: str, max_batches: int = KEPT, batches: float | None = None) -> float:
    """The number of mini-batches to observe.

    Raises:
        TypeError, ValueError: there is no such kind, or `batches` is not a whole number of at least 1, and not
        infinite.
    """
    _check_kind(kind)
    if batches is None:
        keeps = "max_batches" in inspect.signature(KINDS[kind].accumulator).parameters
        return max(KEPT, max_batches) if keeps else MOMENTS
    if batches == math.inf:
        return math.inf
    if not isinstance(batches, int) or isinstance(batches, bool):
        raise TypeError(f"batches must be a whole number of mini-batches, or math.inf, got {batches!r:.60}")
    if batches < 1:
        raise ValueError(f"batches must be at least 1, got {batches}")
    return batches


def _check_kind(kind: str) -> None:
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; there are {', '.join(map(repr, KINDS))}")


def expected_batches(data: Any, batch_size: int | None, limit: float) -> int | None:
    """The number of mini-batches that will be observed, if the data has a length."""
    if not isinstance(data, Sized):
        return None
    if batch_size is None:
        return math.ceil(min(limit, len(data)))
    size, examples = getattr(data, "batch_size", None), getattr(data, "dataset", None)
    if not isinstance(size, int):
        return None
    full, rest = divmod(len(examples), size) if isinstance(examples, Sized) else (len(data), 0)
    last = 0 if getattr(data, "drop_last", False) else rest // batch_size
    return math.ceil(min(limit, full * (size // batch_size) + last))


def accumulator_of(kind: str, max_batches: int, directions: int | None) -> Accumulator[Any]:
    """Make the accumulator for mini-batches.

    Raises:
        TypeError, ValueError: there is no such kind, or it does not take these settings.
    """
    _check_kind(kind)
    options = {"max_batches": (max_batches, 2), "directions": (directions, 1)}
    for name, (value, least) in options.items():
        if value is None and name == "directions":
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    own = inspect.signature(KINDS[kind].accumulator).parameters
    return KINDS[kind].accumulator(**{name: value for name, (value, _) in options.items() if name in own})


def augmented(mini_batches: Iterable[NetworkInput], augment: Augment, ranks: Ranks) -> Iterator[NetworkInput]:
    """Yield mini-batches with their first tensor augmented."""
    for number, mini_batch in enumerate(mini_batches):
        view = Views(augment, len(mini_batch.first), 7919 * ranks.place(number), clean=False)
        yield mini_batch.with_first(lambda x, view=view: view(x, 0))  # type: ignore[misc]
