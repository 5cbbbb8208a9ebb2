"""Open files that data names, only if they are regular files in the folder of the data."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

__all__ = ["open_inside", "open_regular"]

OUTSIDE = "names a file outside the folder of the data, which is not opened; store the image as bytes"
MISSING = "names a file that cannot be read in the folder of the data"

FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
"""How files are opened: without waiting for the other end of a pipe."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Pipes and devices could keep a process waiting for ever.

    Raises:
        ValueError: it is not a regular file.
        OSError: it cannot be opened.
    """
    if stat.S_ISREG(path.stat().st_mode):  # opening a device may already do something
        descriptor = os.open(path, FLAGS)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    raise ValueError("is no regular file: a folder, a pipe or a device")


def open_inside(name: object, folders: Sequence[Path]) -> BinaryIO:
    """Open a file that a cell of a table names.

    Outside the folders nothing is looked up, so that errors do not tell what is there.

    Args:
        name: the path. A relative one is in the first folder.
        folders: where the file may lie, once ``..`` and symbolic links are resolved.

    Raises:
        ValueError: it names no regular file in the folders.
    """
    if not isinstance(name, str) or not folders or "://" in name:
        raise ValueError(OUTSIDE)
    # Without ".." first: on the way to a file inside, no folder outside is looked up.
    path = os.path.normpath(os.path.join(os.path.abspath(folders[0]), name))  # noqa: PTH100, PTH118 - no links yet
    for folder in folders:
        try:
            root = folder.resolve()
            if not Path(path).is_relative_to(os.path.abspath(folder)) and not Path(path).is_relative_to(root):  # noqa: PTH100
                continue
            found = Path(path).resolve()
            if not found.is_relative_to(root):
                continue
        except (OSError, RuntimeError, ValueError) as error:  # such as links in a circle, or a name with a zero byte
            raise ValueError(MISSING) from error
        try:
            return open_regular(found)
        except OSError as error:
            raise ValueError(MISSING) from error
    raise ValueError(OUTSIDE)
