"""Convert array-like objects, such as columns and tables of pandas and polars, for numpy and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_array", "as_tensor"]

UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def as_array(values: Any) -> Any:
    """Convert a Series or DataFrame to an array, by position; other objects are returned unchanged."""
    convert = getattr(values, "to_numpy", None)
    if convert is None or isinstance(values, Tensor):
        return values
    found = np.array(convert())  # a copy: that of pandas must not be written to
    if found.dtype == object and all(isinstance(value, (bool, np.bool_)) for value in found.flat):
        return found.astype(bool)
    if found.dtype == object and all(isinstance(value, (int, np.integer)) for value in found.flat):
        return found.astype(np.int64)
    if found.dtype == object:  # numbers of several types, or of those that may be missing
        try:
            return found.astype(np.float64)
        except (TypeError, ValueError):
            return found
    return found


def as_tensor(values: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Convert what ``torch.as_tensor`` or `as_array` takes to a tensor; unsigned integers become int64.

    >>> as_tensor(np.array([1, 2], np.uint32)).dtype
    torch.int64
    """
    found = torch.as_tensor(as_array(values), dtype=dtype)
    return found.long() if found.dtype in UNSIGNED else found
