"""Data sets from the Hugging Face Hub, from local copies of them and from local folders."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["HUB", "DataError", "cached", "described", "folders_of", "load_splits", "saved_splits"]

HUB = {"mnist": "ylecun/mnist", "notmnist": "anubhavmaity/notMNIST", "cifar10": "uoft-cs/cifar10"}
"""Short names of data sets on the Hugging Face Hub."""

FOLDER_VARIABLE = "STOCHBN_DATA"
"""The environment variable that names a folder with local copies, one subfolder for each data set."""

PATIENCE = 2.0
"""Seconds in which the Hub must answer."""


class DataError(ValueError):
    """Raised if a data set cannot be fetched or used; the message says what to do."""


def load_splits(name: str) -> tuple[Any, str]:
    """Load the splits of a data set by name; also return where it was found.

    Args:
        name: a short name in `HUB`, ``owner/name`` on the Hub, or a local folder that ``datasets.load_dataset`` reads.
            The folder that the environment variable ``STOCHBN_DATA`` names is searched before the Hub.

    Raises:
        DataError: it cannot be had.
    """
    import datasets

    location = _local_copy(name) or HUB.get(name, name)
    local = _is_folder(location)
    # A name alone would also be that of a reader, such as parquet.
    source = os.path.abspath(location) if local else location  # noqa: PTH100 - links stay as they are
    place = _place(name)
    advice = (
        f"on a machine with a connection run `hf download {location} --repo-type dataset --local-dir FOLDER/{place}`, "
        f"bring the folder here and set {FOLDER_VARIABLE}=FOLDER; or name a local folder in place of the data set"
    )
    if not local and name not in HUB and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise DataError(
            f"unknown data set {name!r:.200}: it is neither a folder here nor one of digits, {', '.join(HUB)}, "
            "nor a Hub name of the form owner/name"
        )
    if local:
        _check_description(Path(source))
    try:
        with _quiet(local), _connected(local):
            loaded = datasets.load_dataset(source)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(f"there is no data set {location!r} on the Hugging Face Hub ({error})") from error
    except (ConnectionError, OSError) as error:
        if (told := _cache_told(error)) is not None:
            raise DataError(told) from error
        if local:
            raise DataError(f"the folder {location!r} holds no data set that can be read: {error}") from error
        absent = "" if name in HUB else f"there is no folder {name!r} here, and "
        raise DataError(f"{absent}cannot reach the Hugging Face Hub to fetch {location!r}: {advice}") from error
    except Exception as error:  # the readers of each format raise errors of their own kinds
        if not local:
            raise DataError(f"cannot fetch {location!r} from the Hugging Face Hub ({error}): {advice}") from error
        raise DataError(f"{location!r} cannot be read as a data set; a file may be damaged: {error}") from error
    return loaded, location


def saved_splits(folder: Path) -> dict[str, Any] | None:
    """The splits of a data set that ``save_to_disk`` wrote into a folder; None where there is none.

    Raises:
        DataError: it cannot be read.
    """
    import datasets

    whole, several = (folder / "state.json").is_file(), (folder / "dataset_dict.json").is_file()
    if not whole and not several:
        return None
    with cached(str(folder), "a data set of save_to_disk"):
        found = datasets.load_from_disk(str(folder))
    return dict(found) if isinstance(found, dict) else {"": found}


@contextlib.contextmanager
def cached(name: str, kind: str) -> Iterator[None]:
    """Have `datasets` read local files without a word, with errors that say what is wrong.

    Args:
        name: what is read.
        kind: what it is.

    Raises:
        DataError: it cannot be read, or not be stored in the cache.
    """
    try:
        with _quiet(local=True):
            yield
    except DataError:
        raise
    except Exception as error:  # the readers of each format raise errors of their own kinds
        told = _cache_told(error) if isinstance(error, OSError) else None
        raise DataError(told or f"{name} cannot be read as {kind}: {error.__cause__ or error}") from error


def _cache_told(error: OSError) -> str | None:
    """What to do where `datasets` cannot write its copies; None where that is not the cause."""
    import datasets

    place = Path(datasets.config.HF_DATASETS_CACHE)
    there = next((folder for folder in (place, *place.parents) if folder.exists()), place)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and os.access(there, os.W_OK | os.X_OK) and there.is_dir() and not isinstance(error, PermissionError):
        return None
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST) and not full:
        return None
    return (
        f"the folder {str(place)!r}, where copies of data are kept, cannot be written ({error.strerror or error}): set "
        "HF_HOME to a folder that can"
    )


@contextlib.contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """Nothing of what `datasets` logs, which may hold what is in a file; no progress where nothing is fetched."""
    import datasets
    import huggingface_hub

    shown, verbosity = datasets.utils.logging.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    hub_verbosity = huggingface_hub.logging.get_verbosity()
    try:
        datasets.logging.set_verbosity(logging.CRITICAL)
        if local:
            datasets.disable_progress_bars()
        huggingface_hub.logging.set_verbosity(logging.ERROR)  # not a line for every try to connect
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        huggingface_hub.logging.set_verbosity(hub_verbosity)
        if shown:
            datasets.enable_progress_bars()


def _connected(local: bool) -> contextlib.AbstractContextManager[None]:
    """Look for a connection where one is needed, and go without if there is none."""
    import huggingface_hub

    return contextlib.nullcontext() if local or _reachable(huggingface_hub.constants.ENDPOINT) else _offline()


def folders_of(location: str) -> tuple[Path, ...]:
    """Where the files of a data set lie that its table may name: its folder, or its copy here if it is on the Hub.

    Files of archives are where `datasets` unpacks them.
    """
    import datasets
    import huggingface_hub

    copies = Path(huggingface_hub.constants.HF_HUB_CACHE)
    own = Path(location) if _is_folder(location) else copies / f"datasets--{location.replace('/', '--')}"
    return own, Path(datasets.config.EXTRACTED_DATASETS_PATH)


def described(folder: Path) -> list[Any]:
    """What a folder's own description (README.md) says of its data.

    Raises:
        DataError: it cannot be read.
    """
    import huggingface_hub
    import yaml

    readme, bare = folder / "README.md", folder / ".huggingface.yaml"
    try:
        told = [huggingface_hub.DatasetCard.load(readme).data.to_dict()] if readme.is_file() else []
        told += [yaml.safe_load(bare.read_text(encoding="utf-8"))] if bare.is_file() else []
    except Exception as error:  # the readers of YAML raise errors of many kinds
        raise DataError(f"the description of {str(folder)!r} cannot be read: {error}") from error
    return [one for one in told if isinstance(one, dict) and {"configs", "dataset_info"} & one.keys()]


def _check_description(folder: Path) -> None:
    """Refuse a folder whose own description names other data than what is in it.

    Raises:
        DataError: it does, or cannot be read.
    """
    for name in _named_files(described(folder)):
        if "://" in name or name.startswith(("~", "/")) or Path(name).is_absolute() or ".." in re.split(r"[/\\]", name):
            raise DataError(
                f"the description of {str(folder)!r} names data outside the folder, {name!r:.200}: only what is in the "
                "folder is read; change README.md, or remove it"
            )


def _named_files(told: Any, below: bool = False) -> Iterator[str]:
    """All texts under ``data_files`` and ``data_dir``."""
    if isinstance(told, dict):
        for name, value in told.items():
            yield from _named_files(value, below or name in ("data_files", "data_dir"))
    elif isinstance(told, list):
        for value in told:
            yield from _named_files(value, below)
    elif below and isinstance(told, str):
        yield told


def _reachable(address: str) -> bool:
    """Whether something answers at an address, or at the proxy for it, within `PATIENCE` seconds.

    Without a connection `datasets` tries again for half a minute before it says so.
    """
    target = urllib.parse.urlsplit(address)
    if not urllib.request.proxy_bypass(target.hostname or ""):
        proxies = urllib.request.getproxies()
        proxy = proxies.get(target.scheme) or proxies.get("all")
        target = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}") if proxy else target
    place = target.hostname or "", target.port or (80 if target.scheme == "http" else 443)
    answered: list[bool] = []

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection(place, timeout=PATIENCE):
            answered.append(True)

    thread = threading.Thread(target=connect, daemon=True)  # asking for the address of a name has no time limit
    thread.start()
    thread.join(PATIENCE)
    return bool(answered)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Have `datasets` use what it downloaded before, and not look for a connection."""
    import datasets
    import huggingface_hub

    places: tuple[Any, ...] = datasets.config, huggingface_hub.constants
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _local_copy(name: str) -> str | None:
    """The folder of a data set that is on disk; a folder here that is called like a short name needs a ./ before it."""
    if name not in HUB and _is_folder(name):
        return name
    root = os.environ.get(FOLDER_VARIABLE)
    if not root:
        return None
    if not Path(root).is_dir():
        raise DataError(f"{FOLDER_VARIABLE} is set to {root!r}, which is not a folder")
    copy = Path(root) / _place(name)
    return str(copy) if _is_folder(copy) else None


def _is_folder(name: str | Path) -> bool:
    return os.path.isdir(name)  # noqa: PTH112 (False, and no error, for what cannot be a path)


def _place(name: str) -> str:
    """Where a data set is expected in the folder with local copies: those with short names under these."""
    return next((short for short, hub in HUB.items() if hub == name), name)
