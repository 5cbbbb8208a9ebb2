"""The data of a fit: the number of mini-batches, their accumulator, and their augmentation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from stochbn.augment import Augment, Views
from stochbn.distributed import Ranks
from stochbn.network.calling import NetworkInput
from stochbn.posteriors.accumulators import Accumulator

__all__ = ["augmented", "expected_batches", "most_batches"]


def most_batches(accumulator: Accumulator[Any], batches: float | None) -> float:
    """How many mini-batches to observe; None is as many as are enough.

    Raises:
        TypeError, ValueError: `batches` is no whole number of at least 1, nor infinite.
    """
    if batches is None:
        return accumulator.enough
    if batches == math.inf:
        return math.inf
    if not isinstance(batches, int) or isinstance(batches, bool):
        raise TypeError(f"batches must be a whole number of mini-batches, or math.inf, got {batches!r:.60}")
    if batches < 1:
        raise ValueError(f"batches must be at least 1, got {batches}")
    return batches


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


def augmented(mini_batches: Iterable[NetworkInput], augment: Augment, ranks: Ranks) -> Iterator[NetworkInput]:
    """Yield mini-batches with their first tensor augmented."""
    for number, mini_batch in enumerate(mini_batches):
        view = Views(augment, len(mini_batch.first), 7919 * ranks.place(number), clean=False)
        yield mini_batch.with_first(lambda x, view=view: view(x, 0))  # type: ignore[misc]
