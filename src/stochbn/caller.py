"""Warnings that name the line of the caller, outside of this package."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn"]


def warn(message: str) -> None:
    """Issue a ``UserWarning`` at the innermost line outside of this package, PyTorch and ``dataclasses.replace``."""
    level, frame = 1, sys._getframe(0)
    inner = "stochbn", "torch", "dataclasses"
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inner:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
