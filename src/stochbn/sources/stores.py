"""Files by URL: what fsspec opens, such as ``s3://bucket/folder`` with the package s3fs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stochbn.sources.hub import DataError

__all__ = ["filesystem", "is_url", "stored"]


def is_url(name: str) -> bool:
    """Whether a name is a URL rather than a path.

    >>> is_url("s3://bucket/new"), is_url("photos/new"), is_url("module:loader")
    (True, False, False)
    """
    return re.match(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://", name) is not None


def filesystem(name: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path there.

    Raises:
        DataError: fsspec does not know such URLs, or needs a package that is not installed.
    """
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(name)
    except (ImportError, ValueError) as error:
        raise DataError(f"{name!r} cannot be opened: {error}") from error
    return fs, str(path)


@contextmanager
def stored(name: str) -> Iterator[Path]:
    """A file to write: the path itself, or one here that goes to the URL when the block ends.

    That one has a name of the URL's own, so that it is no other file's. It stays here if it could not be stored.

    Raises:
        DataError: as `filesystem`, or there is no such bucket.
        OSError: it cannot be stored.
    """
    if not is_url(name):
        yield Path(name)
        return
    fs, path = filesystem(name)
    bucket, slash, _ = path.partition("/")
    try:
        missing = bucket and slash and not fs.exists(bucket)
    except Exception as error:  # each store has errors of its own
        raise DataError(f"{name!r} cannot be reached: {error}") from error
    if missing:
        raise DataError(f"there is no {bucket!r} to write {name!r} to; make it first")
    here = Path(path.rsplit("/", 1)[-1])
    local = here.with_stem(f"{here.stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}")
    yield local
    try:
        fs.put_file(str(local), path)
    except Exception as error:  # each store has errors of its own
        raise OSError(f"{name!r} cannot be stored, and {str(local)!r} is kept here: {error}") from error
    local.unlink()
