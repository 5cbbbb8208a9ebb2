"""Folders of images, with a subfolder for each class, or with labels in a metadata file as on the Hub."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from stochbn.conformal.base import group_names
from stochbn.schema import counted, listing
from stochbn.sources.boxes import are_boxes, read_coco
from stochbn.sources.files import Listing
from stochbn.sources.hub import DataError
from stochbn.sources.inside import open_regular
from stochbn.sources.labels import as_labels, labels_of_columns, usual_label
from stochbn.sources.pictures import SWAPPED, TURNED, Decoding, decode
from stochbn.tasks.boxes import padded
from stochbn.texts import unambiguous

__all__ = ["METADATA", "FolderRows"]

METADATA = ("metadata.csv", "metadata.jsonl")
"""Files that say more about pictures, each about those in its folder and the folders in it."""
FILE = "file_name"


class FolderRows:
    """The pictures of a folder, in the order of their paths.

    Where the label is a file of COCO's form, its boxes are the labels. Where a file of metadata has a column of labels,
    these are. Otherwise, where all pictures lie in folders
    of their own, these are the classes, in alphabetical order.

    Args:
        found: the pictures, and what is left out.
        metadata: files of metadata that are about some of them.
        label: the column of labels in the metadata, or a file that ends in ``.json``; none is the column that is called
            as labels usually are.
        group: the column of groups in the metadata; None where none was asked for.
        decoding: how pictures are read.

    Attributes:
        has_boxes: whether labels are true boxes.
        notes: what is to be told of the labels.
        left_out: pictures that are not taken, and why.

    Raises:
        DataError: the metadata cannot be used.
    """

    key_name = "file"

    def __init__(
        self,
        found: Listing,
        metadata: tuple[Path, ...] = (),
        label: tuple[str, ...] = (),
        decoding: Decoding | None = None,
        group: str | None = None,
    ) -> None:
        self.folder, self.decoding = found.root, decoding or Decoding()
        self.files = list(found.files)
        self.notes: list[str] = []
        self.left_out: list[str] = []
        self.label: tuple[str, ...] = ()
        self.classes: tuple[str, ...] = ()
        self._labels: Tensor | None = None
        self._missing: set[Path] = set()
        self.groups: list[str] | None = None
        if group is not None and not metadata:
            raise DataError(
                f"{str(self.folder)!r} has no column {group!r}: groups of pictures are in a file metadata.csv or "
                "metadata.jsonl"
            )
        self._sizes: dict[Path, tuple[int, int]] = {}
        self.has_boxes = False
        if len(label) == 1 and label[0].lower().endswith(".json"):
            self._read_boxes(Path(label[0]))
            label = ()
        elif metadata:
            self._read_metadata(metadata, label, group)
        if self._labels is None and self.files and all(len(file.parts) > 1 for file in self.files):
            empty = [name for name in found.folders if not any(file.parts[0] == name for file in self.files)]
            empty = [name for name in empty if not any((found.root / name).iterdir())]
            names = [file.parts[0] for file in self.files]
            self.classes = tuple(sorted({*names, *empty}))
            number = {name: i for i, name in enumerate(self.classes)}
            self._labels, _ = as_labels([number[name] for name in names], "the folder")
            if empty:
                self.notes.append(f"Classes without a picture: {listing(map(unambiguous, empty))}.")

    def __len__(self) -> int:
        return len(self.files)

    def key(self, position: int) -> str:
        """The path within the folder; bytes in it that are not UTF-8 are escaped."""
        return unambiguous(self.files[position].as_posix())

    def read(self, position: int) -> Any:
        """The image."""
        file = self.files[position]
        if file in self._missing:
            raise ValueError("is named by a file of metadata, and is not in the folder")
        with open_regular(self.folder / file) as stream:
            found = decode(stream, decoding=self.decoding)
        size = self._sizes.get(file)
        if size is None:
            return found
        if size != (found.height, found.width):
            other = ("--no-exif", "as they are stored") if self.decoding.upright else ("--exif", "turned upright")
            advice = f"; if its boxes are of photos {other[1]}, take {other[0]}" if size[0] == found.width else ""
            raise ValueError(
                f"has {found.height}x{found.width} pixels (height x width), and {self.label[0]} says "
                f"{size[0]}x{size[1]}{advice}"
            )
        if found.info.get(TURNED, 0) in SWAPPED and size[0] != size[1]:  # so the file is about the upright picture
            del found.info[TURNED]
        return found

    def labels(self) -> Tensor | None:
        """The numbers of the classes."""
        return self._labels

    def _read_boxes(self, path: Path) -> None:
        """Take boxes from a file of COCO's form, and the pictures that it names and that are there."""
        coco = read_coco(path)
        by_name = {file.as_posix(): file for file in self.files}
        if not coco.boxes.keys() & by_name.keys():  # as where the file names pictures with their folder
            by_name = {file.name: file for file in self.files}
            short = {name.rsplit("/", 1)[-1] for name in coco.boxes}
            if len(by_name) < len(self.files) or len(short) < len(coco.boxes):
                raise DataError(
                    f"{str(path)!r} names pictures by other folders than {str(self.folder)!r} has, and several are "
                    "called alike: name the folder that its names begin in"
                )
            coco = replace(
                coco,
                boxes={name.rsplit("/", 1)[-1]: one for name, one in coco.boxes.items()},
                sizes={name.rsplit("/", 1)[-1]: one for name, one in coco.sizes.items()},
            )
        there = {file: name for name, file in by_name.items() if name in coco.boxes}
        if not there:
            raise DataError(
                f"{str(path)!r} names no picture of {str(self.folder)!r}: it names {listing(coco.boxes, 2)}, and there "
                f"are {listing((file.as_posix() for file in self.files), 2)}"
            )
        if unnamed := len(self.files) - len(there):
            self.left_out.append(f"{counted(unnamed, 'pictures')} that {path.name} does not name")
        if absent := len(coco.boxes) - len(there):
            self.notes.append(f"Not in the folder: {counted(absent, 'pictures')} that {path.name} names.")
        self.files = sorted(there)
        self._sizes = {file: coco.sizes[name] for file, name in there.items() if name in coco.sizes}
        boxes = [coco.boxes[there[file]] for file in self.files]
        self.has_boxes = True
        self._labels, self.classes, self.label = padded(boxes), coco.classes, (str(path),)
        self.notes.append(f"{counted(sum(map(len, boxes)), 'boxes')} in {path.name}.")

    def _read_metadata(self, metadata: tuple[Path, ...], label: tuple[str, ...], group: str | None) -> None:
        """Take labels from files of metadata, and the pictures that they name."""
        about: dict[Path, Any] = {}
        columns: list[str] = []
        for file in sorted(metadata, key=lambda path: len(path.parts)):  # those in folders inside have the last word
            for row in _rows(self.folder / file):
                if not isinstance(row.get(FILE), str):
                    raise DataError(f"{str(self.folder / file)!r} has a row without {FILE!r}, which names the picture")
                columns += [name for name in row if name not in columns]
                path = file.parent / row[FILE].replace("\\", "/")
                if path.is_absolute() or ".." in path.parts:
                    raise DataError(f"{str(self.folder / file)!r} names {row[FILE]!r}, outside its folder")
                about[path] = row
        names = " and ".join(sorted({file.name for file in metadata}))
        if group is not None and group not in columns:
            raise DataError(f"{names} of {str(self.folder)!r} has no column {group!r}; it has {listing(columns)}")
        label = label or tuple(filter(None, (usual_label([name for name in columns if name not in (FILE, group)]),)))
        if not label:
            self.notes.append(f"{names} has no column of labels (it has {listing(columns)}): see --label.")
            self._take_groups(about, group)
            return
        if missing := [name for name in label if name not in columns]:
            raise DataError(f"{names} of {str(self.folder)!r} has no column {missing[0]!r}; it has {listing(columns)}")
        there = set(self.files)
        self._missing = {path for path in about if path not in there}
        if unnamed := there - about.keys():
            self.left_out.append(f"{counted(len(unnamed), 'pictures')} that {names} does not name")
        self.files = sorted(about)
        self._take_groups(about, group)
        values = {name: [about[file].get(name) for file in self.files] for name in label}
        self._labels, self.classes = labels_of_columns(values, f"{names} of {str(self.folder)!r}")
        self.has_boxes = len(label) == 1 and are_boxes(values[label[0]])
        self.label = label
        self.notes.append(f"Labels are those of {names}; folders are no classes.")
        if self._missing:
            self.notes.append(f"{counted(len(self._missing), 'pictures')} named there are missing, and become errors.")

    def _take_groups(self, about: dict[Path, Any], group: str | None) -> None:
        """The group of each picture; of one that the metadata does not name, the empty text."""
        if group is not None:
            self.groups = group_names([about.get(file, {}).get(group) for file in self.files], len(self.files))


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of metadata."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            if path.suffix == ".csv":
                return list(csv.DictReader(lines))
            found = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}") from error
    if not all(isinstance(row, dict) for row in found):
        raise DataError(f"{str(path)!r} has a line that is no mapping of names to values")
    return found
