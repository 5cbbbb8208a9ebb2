"""Find the files of a folder that are data, those to leave out, with the reasons, and the splits."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stochbn.schema import counted, listing
from stochbn.sources.hub import DataError
from stochbn.texts import unambiguous

__all__ = ["Listing", "from_names", "listed", "of_split", "reason_to_leave"]

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test",
          "evaluation": "test", "val": "validation", "valid": "validation", "validation": "validation",
          "dev": "validation"}  # fmt: skip
"""Names of splits, and which split it is."""
OF_SYSTEMS = {"thumbs.db", "desktop.ini", "icon\r", "__macosx", "$recycle.bin", "lost+found", "@eadir",
              "system volume information", "__pycache__"}  # fmt: skip
"""Files and folders that file managers and systems leave, in small letters."""
OF_JOBS = {"_temporary", "_success", "_metadata", "_common_metadata", "_delta_log", "_spark_metadata", "_started",
           "_committed"}  # fmt: skip
"""What jobs that write tables leave beside them."""


CIRCLES = "to a folder around them"


def reason_to_leave(parts: Iterable[str]) -> str | None:
    """Why a file is not data, by the names in its path; None if it may be data.

    >>> reason_to_leave(["cat", "._0.png"]), reason_to_leave(["cat", "0.png"])
    ('hidden', None)
    """
    for name in parts:
        if name.startswith("."):
            return "hidden"
        if name.lower() in OF_SYSTEMS:
            return "left by other systems"
        if name.lower() in OF_JOBS or name.startswith("_temporary"):
            return "left by jobs that write tables"
    return None


@dataclass
class Listing:
    """The files under a folder.

    Attributes:
        root: the folder.
        files: paths in it of those that may be data, in their order.
        left_out: how many files are not, by the reason.
        folders: the names of the folders in it, empty ones too.
        endings: how many files have another ending than the data, by the ending.
    """

    root: Path
    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    folders: list[str] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)

    def only(self, endings: Iterable[str], but: Iterable[Path] = ()) -> Listing:
        """Those with some endings; others are left out by theirs, but for some that are no data and are read."""
        wanted, read = set(endings), set(but)
        kept = [file for file in self.files if file.suffix.lower() in wanted and file not in read]
        rest = [file.suffix.lower() for file in self.files if file not in read]
        others = Counter(ending or "none" for ending in rest if ending not in wanted)
        return Listing(self.root, kept, self.left_out, self.folders, self.endings + others)

    @property
    def reasons(self) -> tuple[str, ...]:
        """What is left out, in words."""
        told = []
        if self.endings:
            which = listing(f"{unambiguous(ending)} {count}" for ending, count in self.endings.most_common())
            told.append(f"{counted(self.endings.total(), 'files')} by their ending ({which})")
        for reason, count in sorted(self.left_out.items()):
            told.append(f"{counted(count, 'links' if reason == CIRCLES else 'files')} {reason}")
        return tuple(told)


def listed(folder: Path) -> Listing:
    """All files under a folder; links are followed, but for those to a folder that they lie in."""
    found = Listing(folder)
    seen: dict[str, set[str]] = {str(folder): {os.path.realpath(folder)}}

    def unreadable(error: OSError) -> None:
        found.left_out["or more in a folder that cannot be read"] += 1

    for place, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        inside = Path(place).relative_to(folder)
        hidden = reason_to_leave(inside.parts)
        above = seen.pop(place)
        for name in list(folders):
            path = os.path.join(place, name)  # noqa: PTH118 - as os.walk makes it
            real = os.path.realpath(path)
            if os.path.islink(path) and (hidden or real in above or reason_to_leave([name])):  # noqa: PTH114
                found.left_out[CIRCLES if real in above else "hidden"] += 1
                folders.remove(name)
                continue
            seen[path] = above | {real}
            if not inside.parts and reason_to_leave([name]) is None:
                found.folders.append(name)
        for name in files:
            why = hidden or reason_to_leave([name])
            if why is None:
                found.files.append(inside / name)
            else:
                found.left_out[why] += 1
    found.files.sort()
    found.folders.sort()
    return found


def from_names(root: str, names: Iterable[str]) -> Listing:
    """The files of a folder that is listed already, as that of a store."""
    found = Listing(Path(root))
    for name in sorted(names):
        inside = Path(name[len(root) :].lstrip("/"))
        if (why := reason_to_leave(inside.parts)) is None:
            found.files.append(inside)
        else:
            found.left_out[why] += 1
    return found


def _split_name(path: Path, by_file: bool) -> str | None:
    """The name of the split that a file is of, by its folders or the beginning of its own name."""
    *folders, file = path.parts
    if not by_file:
        return folders[0] if folders and folders[0].lower() in SPLITS else None
    for folder in folders:
        if folder.lower() in SPLITS:
            return folder
    begins = re.match(r"[A-Za-z]+(?=[-_.])", file)
    return begins[0] if begins and begins[0].lower() in SPLITS else None


def of_split(
    names: Sequence[Path],
    split: str | None,
    prefer: Sequence[str],
    source: str,
    *,
    by_file: bool = True,
) -> tuple[list[int], str | None]:
    """The positions of the files of one split, and its name; all where they are not all of some split.

    A file or folder that is called ``train``, ``test`` or ``valid`` is a split only where all the others are too.

    Args:
        names: the files' paths in their folder.
        split: the split that is asked for.
        prefer: otherwise, which are looked for first.
        source: what the folder is called in messages.
        by_file: whether names of files tell of splits; otherwise the first folders alone do.

    Raises:
        DataError: there is no such split, or there are several of which none is preferred.
    """
    every = list(range(len(names)))
    own = [_split_name(name, by_file) for name in names]
    if split is not None and split not in own:
        chosen = [
            i for i, name in enumerate(names)
            if split in name.parts[:-1] or name.name.startswith((f"{split}-", f"{split}.", f"{split}_"))
        ]  # fmt: skip
        if not chosen:
            known = dict.fromkeys([*filter(None, own), *(name.parts[0] for name in names if len(name.parts) > 1)])
            raise DataError(f"{source!r} has no split {split!r}; it has {', '.join(known) or 'none'}")
        return chosen, split
    if split is not None:
        return [i for i in every if own[i] == split], split
    if not own or None in own:
        return every, None
    there = list(dict.fromkeys(filter(None, own)))
    kinds = {name: SPLITS[name.lower()] for name in there}
    wanted = [name for want in prefer for name in there if want in (name, kinds[name])] or there
    if wanted is there and len(there) > 1:
        raise DataError(f"{source!r} has the splits {', '.join(map(repr, there))}; say with --split which")
    return [i for i in every if own[i] == wanted[0]], wanted[0]
