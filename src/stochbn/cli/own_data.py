"""Opens data for the user's own network, by the options and the posterior's schema, and prints what it read."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from stochbn.cli.console import say

if TYPE_CHECKING:
    from torch import Tensor

    from stochbn.cli.subject import Given
    from stochbn.schema import Schema
    from stochbn.sources import Built, LoaderObjects, ParquetObjects, RowObjects

__all__ = ["OwnData", "numbers_of", "size_of"]

PREFERRED = {
    "train": ("train",),
    "reference": ("train",),
    "test": ("test", "validation", "valid", "val"),
    "held-out": ("validation", "valid", "val"),
}
"""The splits that a command looks for, by what it needs."""


class OwnData:
    """Opens data for a network, and prints its schema once.

    Args:
        given: the options.
        built: the network.
        held: the schema that the posterior was fitted with; options override it.
        whole: resized images are padded and not cropped, so that no box is cut.

    Raises:
        ValueError: an option is invalid.
    """

    def __init__(self, given: Given, built: Built, held: Schema | None, *, whole: bool = False) -> None:
        from stochbn.schema import Schema
        from stochbn.sources import Columns, Decoding, prepared

        held = held or Schema()
        size = size_of(given.size) or held.size
        mean = held.mean if given.mean is None else numbers_of("--mean", given.mean)
        std = held.std if given.std is None else numbers_of("--std", given.std)
        self.built = prepared(built, size, mean, std, whole=whole)
        self.columns = Columns(tuple(given.input or ()), tuple(given.label or ()), given.key, held)
        exif = False if given.exif is None and not held.exif else given.exif
        page = held.page if given.page is None else given.page
        self.decoding = Decoding(exif, page)
        own = any(value is not None for value in (size, mean, std))
        own_told = [f"--size {size[0]}x{size[1]}{' (padded)' if whole else ''}"] if size else []
        own_told += [
            f"{option} {','.join(map(str, values))}" for option, values in (("--mean", mean), ("--std", std)) if values
        ]
        by = " ".join(own_told) if own else built.prepared_by
        self.prepared = {"size": size, "mean": mean, "std": std, "prepared_by": by}
        self.split, self.held = given.split, held
        self.told: set[str] = set()

    def open(
        self, source: str, need: str, labelled: bool = False, group: str | None = None, ignore: int | None = None
    ) -> RowObjects | LoaderObjects:
        """Open data for what a command needs.

        Args:
            source: the data.
            need: what for, among the keys of `PREFERRED`.
            labelled: whether labels are classes: they get the numbers of the posterior's classes, and are checked.
            group: the column with the groups of prediction sets.
            ignore: a label to ignore; labels are not checked then.

        Raises:
            ValueError: it cannot be opened, or has labels that are not classes where it needs them.
        """
        from stochbn.sources import RowObjects, open_objects, renumbered

        built = self.built
        train = need == "train" and built.train_preprocess is not None
        found = open_objects(
            source,
            self.split,
            PREFERRED[need],
            replace(self.columns, group=group),
            built.train_preprocess if train else built.preprocess,
            built.classes,
            self.decoding,
        )
        if isinstance(found, RowObjects) and labelled and not built.classes and {*found.classes} & {*self.held.classes}:
            found = renumbered(found, self.held.classes)
        if isinstance(found, RowObjects) and found.schema is not None:
            by = {**self.prepared, **({"prepared_by": "train_preprocess of the module"} if train else {})}
            found = replace(found, schema=found.schema.described(**by))
        self._tell(found.schema)
        if labelled and ignore is None:
            self._check_labels(found.labels, source, found.classes)
        return found

    def open_parquet(self, source: str, need: str, group: str | None = None) -> ParquetObjects:
        """Open Parquet files as a stream that other processes can share."""
        from stochbn.sources import ParquetObjects

        columns = replace(self.columns, group=group)
        found = ParquetObjects.open(source, self.split, PREFERRED[need], columns, self.built.preprocess, self.decoding)
        found = replace(found, schema=found.schema.described(**self.prepared))
        self._tell(found.schema)
        return found

    def _tell(self, schema: Schema | None) -> None:
        told = str(schema)
        if schema is not None and told not in self.told:
            self.told.add(told)
            say(told)

    def _check_labels(self, labels: Tensor, source: str, classes: tuple[str, ...]) -> None:
        """Check that labels are classes.

        Raises:
            ValueError: some are not.
        """
        if not self.built.classes and all(name.isdigit() for name in classes):
            by_value = sorted(classes, key=int)
            if list(classes) != by_value:
                first = next(i for i, (name, other) in enumerate(zip(classes, by_value, strict=True)) if name != other)
                warnings.warn(
                    f"the classes of {source} have numbers as names, and are numbered in alphabetical order, as in "
                    f"torchvision: {classes[first]!r} is class {first}. If the network numbers them by value, list its "
                    f"classes in its module, as classes = [{', '.join(map(repr, by_value[:3]))}, ...]",
                    stacklevel=2,
                )
        several = labels.ndim == 2 and labels.shape[1] > 1
        if several and bool(((labels == 0) | (labels == 1)).all()) and bool((labels.sum(1) == 1).all()):
            raise ValueError(
                f"{source} has one-hot labels {list(labels.shape)}; store the number of the class of each row, as by "
                "labels.argmax(1)"
            )
        if labels.is_floating_point():
            raise ValueError(f"{source} has labels that are fractions, not classes of the network; see --label")
        missing = int((labels < 0).flatten(1).any(1).sum() if labels.ndim > 1 else (labels < 0).sum())
        if not missing:
            return
        if self.built.classes and classes:
            known = f"the network's classes are {', '.join(self.built.classes)}"
        elif missing == len(labels):
            known = "all are -1 or missing, as in public test sets: 'stochbn predict' takes such data"
        elif self.held.classes and classes:
            known = f"the posterior was fitted to the classes {', '.join(self.held.classes)}; see --label"
        else:
            known = "these are -1 or missing; leave them out, or see --label"
        raise ValueError(
            f"{source} has labels that are not classes of the network, in {missing:,} of {len(labels):,} rows; {known}"
        )


def size_of(text: str | None) -> tuple[int, int] | None:
    """Height and width.

    Raises:
        ValueError: the text is invalid.
    """
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
        raise ValueError(f"--size is {text!r}; write it as 224 or 224x192 (height x width)")
    return int(sides[0]), int(sides[-1])


def numbers_of(option: str, text: str | None) -> tuple[float, ...] | None:
    """The numbers that are given with an option.

    Raises:
        ValueError: the text is invalid.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} is {text!r}; write it as 0.5, or as one for each channel: 0.5,0.4,0.4") from error
