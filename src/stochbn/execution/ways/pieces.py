"""Run large batches in pieces whose activations stay in the processor's cache.

Applies to: networks whose examples are proven not to affect each other. Error: rounding, because matrix products with
another number of rows may be summed in another order.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["pieces"]


def pieces(examples: int, size: int) -> Iterator[tuple[int, int]]:
    """The begin and end of each piece of at most `size` examples; an empty batch is one piece.

    >>> list(pieces(5, 2)), list(pieces(0, 2))
    ([(0, 2), (2, 4), (4, 5)], [(0, 0)])
    """
    for start in range(0, max(examples, 1), size):
        yield start, min(start + size, examples)
