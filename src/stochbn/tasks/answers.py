"""The base class of predictions: how they are joined, mixed, shown in a line and turned into a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochbn.tasks.boxes import Placement

if TYPE_CHECKING:
    from pandas import DataFrame
    from typing_extensions import Self

__all__ = ["Answer", "frame", "table_columns"]


@dataclass(frozen=True, eq=False, repr=False)
class Answer(ABC):
    """Prediction for N examples: averages over draws, with the examples on the first axis.

    Each task has its own subclass, whose fields are the averages, the draws that were kept, and `note`.
    """

    @property
    @abstractmethod
    def averages(self) -> tuple[Tensor, ...]:
        """The tensors that are averages over draws; the first is the prediction."""

    @property
    @abstractmethod
    def draws_kept(self) -> Tensor | None:
        """The values that were kept of every draw, ``[S, N, ...]``."""

    @abstractmethod
    def of(self, averages: Sequence[Tensor], kept: Tensor | None) -> Self:
        """Return a prediction like this one, with other averages and draws."""

    @abstractmethod
    def columns(self, classes: Sequence[str] = (), top: int = 1) -> dict[str, list[Any]]:
        """Return the prediction as columns of a table, with a row for each example, as ``stochbn predict`` writes them.

        Args:
            classes: the names of the classes or labels, if there are any; without them, their numbers are used.
            top: the number of most probable classes to name.

        Raises:
            ValueError: the output is dense, or the number of names is wrong.
        """

    def picture_columns(
        self, placements: Sequence[Placement | None], classes: Sequence[str] = (), top: int = 1
    ) -> dict[str, list[Any]]:
        """Return `columns`, with positions in pixels of the pictures.

        Args:
            placements: where the picture of each example lies in its input; None leaves its positions as they are, in
                pixels of the input.
            classes: as for `columns`.
            top: as for `columns`.

        Raises:
            ValueError: as `columns`.
        """
        return self.columns(classes, top)

    @property
    def measures(self) -> Mapping[str, Tensor]:
        """The measures whose means over examples `repr` shows, by name."""
        return {}

    def mixed(self, other: Self, share: float) -> Self:
        """Return the mixture of this prediction and another one of the same examples, which has the weight `share`."""
        averages = [a.lerp(b.to(a), share) for a, b in zip(self.averages, other.averages, strict=True)]
        return replace(self.of(averages, None), note="")  # type: ignore[call-arg]  # every subclass has one

    def to_pandas(self, classes: Sequence[str] = ()) -> DataFrame:
        """Return `columns` as a data frame, with a row for each example.

        Args:
            classes: the names of the classes or labels, if there are any; without them, their numbers are used.

        Raises:
            ModuleNotFoundError: pandas is not installed.
            ValueError: as `columns`.
        """
        return frame(self.columns(classes))

    def __repr__(self) -> str:
        """The shape of the prediction, and means of the measures over examples, in one line."""
        name = next(name for name, value in vars(self).items() if value is self.averages[0])
        shape = f"{name} {list(self.averages[0].shape)}"
        means = [f"mean {key.replace('_', ' ')} {float(values.mean()):.3g}" for key, values in self.measures.items()]
        parts = [shape, *means, *([f"{len(self.draws_kept)} draws kept"] if self.draws_kept is not None else [])]
        note = getattr(self, "note", "")
        return f"<{type(self).__name__}: {', '.join(parts)}{f'; {note}' if note else ''}>"

    @staticmethod
    def cat(predictions: Sequence[Any]) -> Any:
        """Join predictions of one type, in order.

        Raises:
            ValueError: there are none, or they differ in their classes, draws or types.
        """
        if not predictions:
            raise ValueError("there are no predictions to join; expected at least one")
        kept = [p.draws_kept for p in predictions if p.draws_kept is not None]
        if len(kept) not in (0, len(predictions)):
            raise ValueError("some of the predictions to join kept their draws and others did not")
        if len({type(p) for p in predictions}) > 1:
            raise ValueError("the predictions to join are of different tasks")
        try:
            columns = [torch.cat(column) for column in zip(*(p.averages for p in predictions), strict=True)]
            joined = predictions[0].of(columns, torch.cat(kept, dim=1) if kept else None)
            return joined if len({p.note for p in predictions}) == 1 else replace(joined, note="")
        except RuntimeError as error:
            raise ValueError(f"the predictions differ in their classes or draws: {error}") from error


def table_columns(values: Mapping[str, Tensor], what: str = "numbers [N] or [N, D]") -> dict[str, list[Any]]:
    """Turn tensors ``[N]`` or ``[N, D]`` into columns of a table: ``name``, or ``name_0``, ``name_1``, ... for several.

    Raises:
        ValueError: they are dense.

    >>> table_columns({"mean": torch.tensor([[1.0, 2.0]])})
    {'mean_0': [1.0], 'mean_1': [2.0]}
    """
    found: dict[str, list[Any]] = {}
    for name, one in values.items():
        if one.ndim > 2:
            raise ValueError(f"expected {what} for each example, got {list(one.shape)}: no table")
        columns = one.reshape(len(one), -1).T
        for i, column in enumerate(columns):
            found[f"{name}_{i}" if len(columns) > 1 else name] = column.tolist()
    return found


def frame(columns: Mapping[str, list[Any]]) -> DataFrame:
    """Columns as a data frame.

    Raises:
        ModuleNotFoundError: pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to_pandas needs pandas: pip install pandas", name="pandas") from error
    return pandas.DataFrame(columns)
