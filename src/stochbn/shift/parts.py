"""Examples that are adapted to: in groups that go through a network together, and what was seen of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from stochbn.network.calling import NetworkInput

__all__ = ["Part", "grouped", "total"]

TOGETHER = 512
"""Examples that go through the network together, at most."""
TOGETHER_BYTES = 2**26
"""What their inputs may take."""


@dataclass
class Part:
    """What has been seen of some examples.

    Attributes:
        examples: how many, with less weight on those of long ago.
        rows: ``[2C]`` for every layer, summed.
        mixes: ``[K]``, summed.
    """

    examples: float
    rows: dict[str, Tensor]
    mixes: Tensor

    def plus(self, other: Part | None) -> Part:
        """Both together."""
        if other is None:
            return self
        rows = {name: row + other.rows[name] for name, row in self.rows.items()}
        return Part(self.examples + other.examples, rows, self.mixes + other.mixes)

    def times(self, weight: float) -> Part:
        """The same examples with another weight."""
        rows = {name: weight * row for name, row in self.rows.items()}
        return Part(weight * self.examples, rows, weight * self.mixes)


def grouped(batches: Iterable[NetworkInput]) -> Iterator[NetworkInput]:
    """Batches joined or split to groups that go through the network together, as far as they are alike."""
    group: NetworkInput | None = None
    for inputs in batches:
        if not len(inputs):
            continue
        size = sum(tensor.nbytes for tensor in inputs.tensors())
        most = max(1, min(TOGETHER, TOGETHER_BYTES * len(inputs) // max(size, 1)))
        if group is not None and group.kind() != inputs.kind():
            yield group
            group = None
        group = inputs if group is None else group.join(inputs)
        while len(group) > most:
            yield group.take(slice(0, most))
            group = group.take(slice(most, None))
    if group is not None:
        yield group


def total(parts: Iterable[Part | None]) -> Part | None:
    """All of them together; None where there is none."""
    total: Part | None = None
    for part in parts:
        if part is not None:
            total = part.plus(total)
    return total
