"""Write files as a whole or not at all, and read untrusted safetensors files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "check_file",
    "check_folder",
    "read_tensors",
    "read_versions",
    "write",
    "write_bytes",
    "write_json",
    "write_tensors",
]

LONGEST_HEADER = 2**24
"""Bytes of a safetensors header that are read, at most: that of 100,000 tensors is shorter."""


def write(path: str | os.PathLike[str], producer: Callable[[Path], object]) -> None:
    """Let `producer` write a temporary file beside `path`, then rename it, so that `path` is never half written.

    A file that is replaced keeps its permissions, and a symbolic link stays one: the file that it leads to is replaced.

    Raises:
        OSError: the folder does not exist, is not writable or is full, or `path` is a folder, a pipe or a device;
            `path` is then as it was.
    """
    target = _target(Path(path))
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    temporary = target.with_name(f".{target.stem[:40]}-{secrets.token_hex(8)}{target.suffix}")
    try:
        if mode is not None:  # what was private is so from the first byte
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        producer(temporary)
        if mode is not None:
            temporary.chmod(mode)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_file(path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str] | None] = ()) -> None:
    """Check, before the work begins, that `write` can write a file.

    Args:
        path: the file.
        inputs: files that must not be overwritten; None, and names that are not files, are ignored.

    Raises:
        OSError: its folder does not exist or is not writable, it is a folder, a pipe or a device, or one of `inputs`.
    """
    target = _target(Path(path))
    _check_writable(target.parent)
    for given in inputs:
        if given is not None and target.exists() and os.path.exists(given) and target.samefile(given):  # noqa: PTH110
            raise FileExistsError(f"{str(path)!r} is also an input, which would be lost; name another file to write")


def check_folder(path: str | os.PathLike[str], *names: str) -> None:
    """Check that a folder can be made, and that files of these names can be written in it, without making anything.

    Raises:
        OSError: it, or what it would be made in, is no folder or not writable, or a name is taken by a folder, a pipe
            or a device.
    """
    path = Path(path)
    if path.is_dir():
        _check_writable(path)
        for name in names:
            _target(path / name)
        return
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{str(path)!r} exists and is no folder; name another folder")
    ancestor = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not ancestor.is_dir():
        raise NotADirectoryError(
            f"the folder {str(path)!r} cannot be made, as {str(ancestor)!r} is no folder; name another folder"
        )
    _check_writable(ancestor)


def _check_writable(folder: Path) -> None:
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise PermissionError(
            f"the folder {str(folder)!r} is not writable ({error.strerror}); name a place elsewhere"
        ) from error


def _target(path: Path) -> Path:
    """The file that a path stands for, behind symbolic links: a regular one, or none yet in a folder that exists."""
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        kind = stat.S_IFREG
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(f"{str(path)!r} is a folder; name a file")
    target = path
    while target.is_symlink():  # a circle of links has no kind: stat refused it
        folder = os.path.realpath(target.parent)
        if re.fullmatch(r"/proc/[^/]+(/task/\d+)?/fd", folder):  # such as /dev/stdout: whatever is open there
            kind = stat.S_IFCHR
            break
        target = Path(folder, target.readlink())
    if not stat.S_ISREG(kind):
        raise OSError(
            f"{str(path)!r} is a pipe, a device or another special file, which cannot be written whole or not at all; "
            "name a file, and copy it there",
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(target.parent)!r} to write {target.name!r} to; make it first")
    return target


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file as a whole or not at all."""
    write(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as indented JSON, as a whole or not at all.

    NaN (not known) and infinity become null, because JSON has neither.
    """
    write_bytes(path, (json.dumps(finite(value), indent=2, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """Convert a value for JSON: floats that are not finite become None."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tensors(path: str | os.PathLike[str], format: str, tensors: Mapping[str, Tensor], about: Any) -> None:
    """Write tensors and a JSON-able description as safetensors, with a format name, its version and a checksum.

    Args:
        path: the file to write, whole or not at all.
        format: name and version of what the file holds, such as ``stochbn.posterior/1``.
        tensors: its tensors.
        about: its description.

    Raises:
        OSError: as `write`.
        ValueError: names and description are longer than `read_tensors` reads.
    """
    from safetensors.torch import save

    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(about)
    metadata = {"format": format, "about": text, "sha256": _checksum(stored, text)}
    content = save(stored, metadata)
    if int.from_bytes(content[:8], "little") > LONGEST_HEADER:
        raise ValueError(f"the names of tensors and their description take more than {LONGEST_HEADER} bytes")
    write_bytes(path, content)


def read_tensors(path: str | os.PathLike[str], format: str) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the description in a file written by `write_tensors`.

    The tensors are copies: they stay as they are when the file is overwritten. Nothing in the file is executed, and
    what its header promises is compared with the file's size before anything is read.

    Raises:
        FileNotFoundError: there is no such file, or it is none: a folder, a pipe or a device.
        ValueError: it is truncated or corrupt, of another kind, or of a version that this release does not read.
    """
    tensors, about, _ = read_versions(path, format)
    return tensors, about


def read_versions(path: str | os.PathLike[str], *formats: str) -> tuple[dict[str, Tensor], Any, str]:
    """As `read_tensors`, of a file in any of some versions of a format, the newest first; and which one it is.

    Raises:
        FileNotFoundError, ValueError: as `read_tensors`.
    """
    from safetensors.torch import load

    path = Path(path)
    if not path.is_file():
        other = "; there is a folder, a pipe or a device" if path.exists() else ""
        raise FileNotFoundError(f"there is no file {str(path)!r}{other}")
    content, header = _read(path)
    try:
        tensors = load(content)
        metadata: dict[str, str] = header.get("__metadata__") or {}
    except Exception as error:  # the reader raises errors of many kinds for types and shapes that it does not know
        raise _broken(path, error) from error
    format = metadata.get("format", "")
    name, (found, _, version) = formats[0].partition("/")[0], format.partition("/")
    if found != name:
        raise ValueError(f"{str(path)!r} is a safetensors file, but not a {name} file (its format is {found!r:.60})")
    if format not in formats:
        known = " or ".join(repr(one.partition("/")[2]) for one in formats)
        raise ValueError(
            f"{str(path)!r} is a {name} file of version {version!r:.60}, this release of stochbn reads version "
            f"{known}; install the release that wrote it, or write it again"
        )
    if _checksum(tensors, metadata.get("about", "")) != metadata.get("sha256"):
        raise ValueError(f"{str(path)!r} is corrupt: its checksum does not match its contents; get a fresh copy")
    try:
        return tensors, json.loads(metadata["about"]), format
    except (KeyError, ValueError, RecursionError) as error:
        reason = "there is none" if isinstance(error, KeyError) else f"{error!s:.200}"
        raise ValueError(f"{str(path)!r} has no description that can be read: {reason}") from error


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    """A file's bytes and its header, once its first ones say that it may be a safetensors file."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _broken(path, f"a header of {length} bytes in a file of {size}")
        if length > LONGEST_HEADER:
            raise _broken(path, f"a header of {length} bytes, more than {LONGEST_HEADER}")
        file.seek(0)
        first = file.read(8 + length)
        try:
            header = json.loads(first[8:])
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name[:2] != "__"]
            wanted = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise _broken(path, error) from error
        if wanted != size:
            raise _broken(path, f"{size} bytes where its header says {wanted}")
        try:
            return first + file.read(), header
        except MemoryError as error:
            raise _broken(path, f"{size} bytes do not fit into memory") from error


def _broken(path: Path, reason: object) -> ValueError:
    return ValueError(f"{str(path)!r} is truncated, corrupt or not a safetensors file: {reason!s:.200}")


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(safetensors.torch.save({"": tensor}))
    return digest.hexdigest()
