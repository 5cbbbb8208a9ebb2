"""What a data set is: made once when data is opened, shown, kept in the posterior's file, and held to from then on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

__all__ = ["Schema", "counted", "listing"]

SHOWN = 6
"""How many names a line shows, of more."""


@dataclass(frozen=True)
class Schema:
    """What a data set is.

    Attributes:
        name: what was opened, with the split in brackets.
        kind: "pictures", "rows" of tables or arrays, or "batches" of a loader.
        count: how many examples there are; None of a loader, which would have to be gone through.
        files: how many files they come from; 0 where that is not known.
        left_out: files and columns that are not taken: why, and how many, or which columns.
        notes: what else a reader has to know, in sentences.
        inputs: the columns or arrays that are inputs, in the network's order; none where they have no names.
        types: their types.
        label: the columns or arrays of labels, several for a task that has several.
        classes: the names of the classes, in the order of their numbers; none where labels are numbers.
        key: the column or array that names the examples.
        size: height and width that pictures are brought to.
        mean: what is subtracted from pictures in [0, 1].
        std: what they are then divided by.
        exif: whether pictures are turned upright by their EXIF orientation.
        page: which page is read of pictures with several.
        prepared_by: where the preprocessing comes from; empty where there is none.
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
        """One line about the examples, and one about what is left out, where something is."""
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
        """The same with some fields changed."""
        return replace(self, **changes)

    def description(self) -> dict[str, Any]:
        """What a file holds of it, as JSON."""
        return asdict(self)

    @classmethod
    def from_description(cls, about: Any) -> Schema:
        """The schema that a file holds.

        Raises:
            ValueError: it is none.
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
