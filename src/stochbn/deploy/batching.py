"""Requests that wait at the same time go through the network together."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stochbn.tasks.boxes import Placement

__all__ = ["Batcher", "FullError", "Row"]

Row = dict[str, Any]
"""What is predicted of one example, by name."""


class FullError(Exception):
    """Too many examples wait for the network."""


@dataclass(eq=False)
class _Waiting:
    inputs: Tensor
    placements: Sequence[Placement | None]
    rows: Future[Sequence[Row]] = field(default_factory=Future)


class Batcher:
    """Brings requests together while a batch is being predicted; no request waits for others to come.

    One thread predicts one batch after another. A batch is the longest waiting request and, of those behind it, all
    whose examples have the same shape and still fit. If a batch raises an error, its requests are predicted one by
    one, so that a request fails by its own fault alone.

    Args:
        predict: from inputs ``[N, ...]`` and the placements of their pictures to N rows; only ever called by the
            batcher's thread.
        size: examples in a batch, unless one request has more.
        waiting: examples that may wait.
        together: whether several requests may share a batch.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, Sequence[Placement | None]], Sequence[Row]],
        size: int,
        waiting: int,
        together: bool = True,
    ) -> None:
        self._predict, self._size, self._most, self._together = predict, size, waiting, together
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._work, name="stochbn-batches", daemon=True)
        self._thread.start()

    async def __call__(self, inputs: Tensor, placements: Sequence[Placement | None] | None = None) -> Sequence[Row]:
        """The rows of one request. A caller that is cancelled gives up its place.

        Args:
            inputs: ``[N, ...]``.
            placements: where the picture of each lies in its input, where that is known.

        Raises:
            FullError: too many examples wait, or the batcher is closed.
            Exception: whatever predicting this request alone raises.
        """
        one = _Waiting(inputs, [None] * len(inputs) if placements is None else placements)
        with self._changed:
            ahead = sum(len(other.inputs) for other in self._queue if not other.rows.cancelled())
            if not self._open or (ahead and ahead + len(inputs) > self._most):
                raise FullError(f"{ahead} examples wait already, of at most {self._most}")
            self._queue.append(one)
            self._changed.notify()
        return await asyncio.wrap_future(one.rows)

    def close(self) -> None:
        """Predict what waits, and take no more."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            self._answer(batch)

    def _next(self) -> list[_Waiting]:
        """The requests of the next batch; none once the batcher is closed and nothing waits."""
        with self._changed:
            while True:
                batch = self._taken()
                if batch or not self._open:
                    return batch
                self._changed.wait()

    def _taken(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        others: deque[_Waiting] = deque()
        count = 0
        while self._queue:
            one = self._queue.popleft()
            fits = not batch or (
                self._together and count + len(one.inputs) <= self._size and _alike(one.inputs, batch[0].inputs)
            )
            if not fits:
                others.append(one)
            elif one.rows.set_running_or_notify_cancel():
                batch.append(one)
                count += len(one.inputs)
        self._queue = others
        return batch

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        try:
            placements = [placement for one in batch for placement in one.placements]
            rows = self._predict(torch.cat([one.inputs for one in batch]), placements)
            if len(rows) != sum(len(one.inputs) for one in batch):
                raise ValueError(f"there are {len(rows)} predictions")
        except BaseException as error:  # the callers get it
            if len(batch) == 1:
                batch[0].rows.set_exception(error)
                return
            for one in batch:
                self._answer([one])
            return
        start = 0
        for one in batch:
            one.rows.set_result(rows[start : start + len(one.inputs)])
            start += len(one.inputs)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape[1:], a.dtype) == (b.shape[1:], b.dtype)
