"""Writing files whole or not at all, and reading safetensors files from strangers."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

__all__ = ["read_tensors", "write", "write_bytes", "write_json", "write_tensors"]


def write(path: str | os.PathLike[str], producer: Callable[[Path], object]) -> None:
    """Let `producer` write a temporary file beside `path`, then rename it, so that `path` is never half written.

    Raises:
        OSError: the folder does not exist, is not writable or is full; `path` is then as it was.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} to write {path.name!r} to; make it first")
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(8)}{path.suffix}")
    try:
        producer(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file whole or not at all."""
    write(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_tensors(path: str | os.PathLike[str], format: str, tensors: Mapping[str, Tensor], about: Any) -> None:
    """Write tensors and a JSON-able description as safetensors, with a format name, its version and a checksum.

    Args:
        path: the file to write, whole or not at all.
        format: name and version of what the file holds, such as ``stochbn.posterior/1``.
        tensors: its tensors.
        about: its description.
    """
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(about)
    metadata = {"format": format, "about": text, "sha256": _checksum(stored, text)}
    write_bytes(path, safetensors.torch.save(stored, metadata))


def read_tensors(path: str | os.PathLike[str], format: str) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the description in a file written by `write_tensors`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or corrupt, of another kind, or of a version that this release does not read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{str(path)!r} is truncated, corrupt or not a safetensors file: {error}") from error
    name, _, version = format.partition("/")
    found, _, found_version = metadata.get("format", "").partition("/")
    if found != name:
        raise ValueError(f"{str(path)!r} is a safetensors file, but not a {name} file (its format is {found!r})")
    if found_version != version:
        raise ValueError(
            f"{str(path)!r} is a {name} file of version {found_version!r}, this release of stochbn reads version "
            f"{version!r}; install the release that wrote it, or write it again"
        )
    if _checksum(tensors, metadata.get("about", "")) != metadata.get("sha256"):
        raise ValueError(f"{str(path)!r} is corrupt: its checksum does not match its contents; get a fresh copy")
    return tensors, json.loads(metadata["about"])


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(safetensors.torch.save({"": tensor}))
    return digest.hexdigest()
