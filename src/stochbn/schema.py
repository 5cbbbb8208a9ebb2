"""The schema of a data set: made when data is opened, printed, saved with the posterior, and used by later commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

__all__ = ["Schema", "counted", "listing"]

SHOWN = 6
"""The largest number of names in a line."""


@dataclass(frozen=True)
class Schema:
    """The schema of a data set.

    Attributes:
        name: the name of the data, with the split in brackets.
        kind: "pictures", "rows" of tables or arrays, or "batches" of a loader.
        count: the number of examples; None for a loader, which would have to be read.
        files: the number of files; 0 if it is not known.
        left_out: files and columns that are left out: the reason, and their number or names.
        notes: further remarks, in sentences.
        inputs: the columns or arrays of inputs, in the network's order; empty if they have no names.
        types: their types.
        label: the columns or arrays of labels, several for some tasks.
        classes: the names of the classes, in the order of their numbers; empty if labels are numbers.
        key: the column or array that names the examples.
        size: height and width of resized images.
        mean: the mean that is subtracted from images in [0, 1].
        std: the standard deviation that they are then divided by.
        exif: whether images are turned upright by their EXIF orientation.
        page: the page to read of images with several.
        prepared_by: the source of the preprocessing; empty if there is none.
    """

    name: str = ""
    kind: str = "rows"
    count: int | None = None
    files: int = 0
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    label: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    key: str | None = None
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    exif: bool = True
    page: int | None = None
    prepared_by: str = ""

    def __str__(self) -> str:
        """One line about the examples, and one about what is left out, if anything is."""
        what = self.kind if self.count is None else counted(self.count, self.kind)
        parts = [what + (f" of {counted(self.files, 'files')}" if self.files > 1 and self.kind != "pictures" else "")]
        if self.inputs and self.kind != "pictures":
            kinds = "" if not self.types else f" ({listing(dict.fromkeys(self.types))})"
            parts.append(f"inputs {listing(self.inputs)}{kinds}")
        elif self.inputs:
            parts[0] += f" of the column {self.inputs[0]!r}"
        if self.classes:
            numbered = [f"{name}={i}" for i, name in enumerate(self.classes)]
            parts.append(f"{counted(len(self.classes), 'classes')}: {listing(numbered)}")
        if self.label:
            parts.append(f"labels in {', '.join(map(repr, self.label))}")
        if self.key is not None:
            parts.append(f"named by {self.key!r}")
        if self.kind == "pictures":
            parts.append(f"prepared by {self.prepared_by}" if self.prepared_by else "pixels scaled to [0, 1]")
        lines = [f"{self.name}: {'; '.join(parts)}."]
        if self.left_out or self.notes:
            told = [f"Left out: {'; '.join(self.left_out)}."] if self.left_out else []
            lines.append(" ".join([*told, *self.notes]))
        return "\n".join(lines)

    def described(self, **changes: Any) -> Schema:
        """Return the schema with some fields changed."""
        return replace(self, **changes)

    def description(self) -> dict[str, Any]:
        """The schema as JSON, for a file."""
        return asdict(self)

    @classmethod
    def from_description(cls, about: Any) -> Schema:
        """Read a schema from a file.

        Raises:
            ValueError: it is not a schema.
        """
        if not isinstance(about, Mapping):
            raise ValueError(f"its schema is no mapping, but {about!r:.60}")
        known = {field.name: field.default for field in fields(cls)}
        found: dict[str, Any] = {}
        for name, value in about.items():
            if name not in known:
                raise ValueError(f"its schema has {name!r:.60}, which this release of stochbn does not know")
            found[name] = tuple(value) if isinstance(value, list) else value
        label = found.get("label")  # files of earlier releases have one name, or none
        found["label"] = (label,) if isinstance(label, str) else label or ()
        for name in ("inputs", "label", "types", "classes", "left_out", "notes"):
            if not all(isinstance(one, str) for one in found.get(name, ())):
                raise ValueError(f"the schema's {name} must be texts, got {about[name]!r:.60}")
        for name in ("size", "mean", "std"):
            numbers = found.get(name)
            if numbers is not None and not all(isinstance(one, (int, float)) for one in numbers):
                raise ValueError(f"the schema's {name} must be numbers, got {about[name]!r:.60}")
        return cls(**found)


def counted(count: int, what: str) -> str:
    """A number of things, in words.

    >>> counted(2000, "pictures"), counted(1, "classes"), counted(1, "files")
    ('2,000 pictures', '1 class', '1 file')
    """
    one = {"classes": "class", "batches": "batch", "boxes": "box"}.get(what, what.removesuffix("s"))
    return f"{count:,} {one if count == 1 else what}"


def listing(names: Iterable[str], most: int = SHOWN) -> str:
    """Names with commas, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
