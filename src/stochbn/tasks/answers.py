"""What all predictions have in common: how they are joined, mixed, shown in a line and turned into a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pandas import DataFrame
    from typing_extensions import Self

__all__ = ["Answer", "frame", "table_columns"]


@dataclass(frozen=True, eq=False, repr=False)
class Answer(ABC):
    """What a predictive says of N examples: averages over draws, with the examples on their first axis.

    A task has a subclass of its own, whose fields are these averages, the draws that were kept, and `note`.
    """

    @property
    @abstractmethod
    def averages(self) -> tuple[Tensor, ...]:
        """The tensors that are averages over draws; the first is what is predicted."""

    @property
    @abstractmethod
    def draws_kept(self) -> Tensor | None:
        """What was kept of every draw, ``[S, N, ...]``."""

    @abstractmethod
    def of(self, averages: Sequence[Tensor], kept: Tensor | None) -> Self:
        """A prediction like this one, of other averages and draws."""

    @abstractmethod
    def columns(self, classes: Sequence[str] = (), top: int = 1) -> dict[str, list[Any]]:
        """The prediction as columns of a table, a row for each example: as ``stochbn predict`` writes them.

        Args:
            classes: the names of the classes or labels, if there are any; none are their numbers.
            top: how many of the most probable classes to name.

        Raises:
            ValueError: the output is dense, with more than one row an example, or the names do not fit.
        """

    @property
    def measures(self) -> Mapping[str, Tensor]:
        """What `repr` shows the mean over examples of, by its name."""
        return {}

    def mixed(self, other: Self, share: float) -> Self:
        """The mixture of this prediction and another one of the same examples, which has a share of it."""
        averages = [a.lerp(b.to(a), share) for a, b in zip(self.averages, other.averages, strict=True)]
        return replace(self.of(averages, None), note="")  # type: ignore[call-arg]  # every subclass has one

    def to_pandas(self, classes: Sequence[str] = ()) -> DataFrame:
        """A data frame with a row for each example: `columns`.

        Args:
            classes: the names of the classes or labels, if there are any; none are their numbers.

        Raises:
            ModuleNotFoundError: pandas is not installed.
            ValueError: as `columns`.
        """
        return frame(self.columns(classes))

    def __repr__(self) -> str:
        """The shape of what is predicted, and measures in the mean over examples, in one line."""
        name = next(name for name, value in vars(self).items() if value is self.averages[0])
        shape = f"{name} {list(self.averages[0].shape)}"
        means = [f"mean {key.replace('_', ' ')} {float(values.mean()):.3g}" for key, values in self.measures.items()]
        parts = [shape, *means, *([f"{len(self.draws_kept)} draws kept"] if self.draws_kept is not None else [])]
        note = getattr(self, "note", "")
        return f"<{type(self).__name__}: {', '.join(parts)}{f'; {note}' if note else ''}>"

    @staticmethod
    def cat(predictions: Sequence[Any]) -> Any:
        """One prediction for the examples of several of one type, in their order.

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
    """Tensors ``[N]`` or ``[N, D]`` as columns of a table: ``name``, or ``name_0``, ``name_1``, ... of several.

    Raises:
        ValueError: they are dense, with more than one row an example.

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
