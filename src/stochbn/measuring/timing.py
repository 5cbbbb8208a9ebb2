"""Times of works side by side, and the mean and variance of many tensors, for the measurements of cost."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["machine", "median_seconds", "moments", "seconds"]


def seconds(work: Callable[[], object]) -> float:
    """The time that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def median_seconds(works: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """The median time of each work, all in turn in every repetition, so that a busy spell of the machine meets all.

    Args:
        works: what to call, by name.
        repetitions: calls of each that count; there is one before them, to warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for repetition in range(repetitions + 1):
        for name, work in works.items():
            took = seconds(work)
            if repetition:  # the first warms up
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def moments(values: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean of tensors of one shape and their variance, with one less than their number as the divisor, in float64.

    They are read one after another, at least two of them.

    Source: Welford, Technometrics 4 (1962), 419-420.
    """
    mean = squares = torch.zeros((), dtype=torch.float64)
    count = 0
    for count, value in enumerate(values, start=1):
        change = value.double() - mean
        mean = mean + change / count
        squares = squares + change * (value.double() - mean)
    return mean, squares / (count - 1)


def machine() -> str:
    """The processor, its cores and the version of torch, in words."""
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
