"""Choose the columns of a table, or the arrays of a file: inputs, labels, key and groups, by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from stochbn.schema import Schema, listing
from stochbn.sources.labels import usual_label

__all__ = ["Columns", "Roles", "choose", "is_numeric", "is_text"]


@dataclass(frozen=True)
class Columns:
    """The columns of a table, or arrays of a file, that the user named; for those not named, see `choose`.

    Attributes:
        inputs: the columns of inputs.
        label: the columns of labels, in the order of the task.
        key: the column that names the rows.
        group: the column of groups, for prediction sets by group.
        held: the schema that the posterior was fitted with, whose columns are taken if none are named.
    """

    inputs: tuple[str, ...] = ()
    label: tuple[str, ...] = ()
    key: str | None = None
    held: Schema | None = None
    group: str | None = None

    def named(self, kinds: Collection[str], there: Collection[str], name: str) -> Columns:
        """With the names that were held to, once it is known which there are.

        Args:
            kinds: of schemas that name such things.
            there: the columns or arrays that there are.
            name: what the data is called in messages.

        Raises:
            ValueError: one that was asked for, or held to, is missing.
        """
        held = self.held if self.held is not None and self.held.kind in kinds else Schema()
        inputs = self.inputs or held.inputs
        label = self.label or (held.label if set(held.label) <= set(there) else ())
        why = "" if self.inputs else ", which the posterior was fitted with; name others with --input"
        for wanted in (*inputs, *label, *filter(None, (self.key, self.group))):
            if wanted not in there:
                raise ValueError(
                    f"{name} has no column {wanted!r}{why if wanted in inputs else ''}; it has {listing(there)}"
                )
        return Columns(tuple(inputs), label, self.key, group=self.group)


@dataclass(frozen=True)
class Roles:
    """The roles of the columns of a table.

    Attributes:
        inputs: the columns of inputs, in the network's order.
        types: their types.
        label: the columns of labels, if there are any.
        key: the column that names the rows; None numbers them.
        pictures: whether the input is a column of images.
        left_out: the other columns, and the reasons why they are left out.
        group: the column of groups, if one was named.
    """

    inputs: tuple[str, ...]
    types: tuple[str, ...]
    label: tuple[str, ...]
    key: str | None
    pictures: bool
    left_out: tuple[str, ...]
    group: str | None = None


def choose(
    features: Mapping[str, Any],
    name: str,
    asked: Columns,
    written: Callable[[str], bool],
    index: Mapping[str, str],
) -> Roles:
    """Choose the columns of a table.

    Inputs are the columns that the user named. Otherwise they are the first column of images; or all numeric columns,
    and columns of texts that are mostly numbers, except key and label; or the first column of lists. The label is the
    column that the user named, the first of type ClassLabel, or one with a usual name of labels.

    Args:
        features: the columns' types, in the form of `datasets`.
        name: the name of the table in messages.
        asked: the columns that the user named.
        written: whether most of the texts in a column are numbers.
        index: columns that hold the index of a pandas table, and how that is known.

    Raises:
        ValueError: there are no such columns.
    """
    import datasets

    asked = asked.named(("rows", "pictures"), features, name)
    label = asked.label
    if not label:
        of_classes = (c for c, f in features.items() if isinstance(f, datasets.ClassLabel) and c not in asked.inputs)
        usual = next(of_classes, None) or usual_label([c for c in features if c not in (*asked.inputs, asked.key)])
        label = () if usual is None else (usual,)
    rest = {c: f for c, f in features.items() if c not in (*label, asked.key) and (c not in index or c in asked.inputs)}
    pictures = [c for c, f in features.items() if isinstance(f, datasets.Image) or is_encoded(f)]
    texts = [c for c in (asked.inputs or (() if pictures else rest)) if is_text(features[c])]
    numbers = {c for c in texts if written(c)}
    numeric = [c for c, f in rest.items() if is_numeric(f) or c in numbers]
    lists = [c for c, f in features.items() if is_numeric(getattr(f, "feature", None))]
    inputs = asked.inputs or tuple(pictures[:1]) or tuple(numeric) or tuple(lists[:1])
    if not inputs:
        raise ValueError(f"{name} has no column of images or numbers; it has {', '.join(features)}: see --input")
    if no_numbers := [c for c in inputs if c in texts and c not in numbers]:
        raise ValueError(f"the column {no_numbers[0]!r} of {name} holds text; name columns of images or numbers")
    for column in (*inputs, *label, *filter(None, (asked.key,))):
        if opens(features[column]) and (column not in inputs[:1] or column not in pictures):
            raise ValueError(f"the column {column!r} of {name} is of files; name columns of images or numbers")
    used = (*inputs, *label, asked.key, asked.group)
    others = {c: index.get(c, type_of(f)) for c, f in features.items() if c not in used}
    told = [f"{c!r} ({why})" for c, why in others.items()]
    return Roles(
        tuple(inputs),
        tuple(type_of(features[c]) for c in inputs),
        label,
        asked.key,
        inputs[0] in pictures,
        (f"the columns {listing(told)}" if len(told) > 1 else f"the column {told[0]}",) if told else (),
        asked.group,
    )


def type_of(feature: Any) -> str:
    """A type of `datasets`, in a word."""
    if isinstance(feature, Mapping):
        return "mapping"
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return f"lists of {type_of(inner)}"
    return "text" if is_text(feature) else str(getattr(feature, "dtype", None) or type(feature).__name__)


def opens(feature: Any) -> bool:
    """Whether a column holds images, sound or the like, at any depth, which `datasets` reads from files."""
    if isinstance(feature, Mapping):
        return any(map(opens, feature.values()))
    if isinstance(feature, (list, tuple)):
        return any(map(opens, feature))
    inner = getattr(feature, "feature", None)
    is_file = hasattr(feature, "decode") and type(feature).__name__ != "Json"
    return is_file or (inner is not None and opens(inner))


def is_encoded(feature: Any) -> bool:
    """Whether a column holds bytes, or bytes and a path as `datasets` stores images: pictures without their type."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"} and is_encoded(feature["bytes"])
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def is_text(feature: Any) -> bool:
    """Whether a column holds texts."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def is_numeric(feature: Any) -> bool:
    """Whether a column holds numbers, or truth values."""
    dtype = str(getattr(feature, "dtype", ""))
    return dtype.startswith(("int", "uint", "float", "bool", "decimal"))
