"""Figures of stored results, drawn again from their numbers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stochbn.files import check_folder
from stochbn.measuring import cost
from stochbn.paper import augmentation, comparison

__all__ = ["redraw"]

DRAWN: dict[str, Callable[[Path, Any], list[Path]]] = {
    "cost.json": cost.draw,
    "augmentation.json": augmentation.draw,
    "comparison.json": lambda folder, about: comparison.draw(folder, "comparison", about),
    "comparison-augmented.json": lambda folder, about: comparison.draw(folder, "comparison-augmented", about),
}
"""What draws the figure of each file of numbers."""


def redraw(folder: Path) -> list[Path]:
    """Draw the figures of the files of numbers in a folder again.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: the folder has none of these files.
        ValueError: one is damaged or lacks a number.
        OSError: the folder cannot be written.
    """
    check_folder(folder)
    written = []
    for name, draw in DRAWN.items():
        file = folder / name
        if not file.exists():
            continue
        try:
            written += draw(folder, json.loads(file.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(file)!r} is damaged or of another version: {error!r}") from error
    if not written:
        raise FileNotFoundError(f"{str(folder)!r} has none of {', '.join(DRAWN)}")
    return written
