"""`stochbn.deploy.batching`: requests that wait at the same time share a batch, and nothing else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stochbn.deploy.batching import Batcher, FullError
from stochbn.tasks.boxes import Placement


class Network:
    """Gives each example the sum of its numbers, and keeps which batches it saw; it waits while `gate` is closed."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate, self.began = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, inputs: Tensor, placements: Sequence[Placement | None]) -> list[dict[str, Any]]:
        self.began.set()
        assert self.gate.wait(20)
        self.batches.append(list(inputs.shape))
        if bool((inputs < 0).any()):
            raise ValueError("there is a negative number")
        assert len(placements) == len(inputs)
        return sums(inputs)


def sums(inputs: Tensor) -> list[dict[str, Any]]:
    return [{"sum": float(one.sum())} for one in inputs]


def asked(
    network: Callable[[Tensor, Sequence[Any]], Sequence[Any]], requests: Sequence[Tensor], size: int = 8, **options: Any
) -> list[Any]:
    """What each request gets, rows or an exception, where all come while the first is being predicted."""

    async def ask() -> list[Any]:
        batcher = Batcher(network, size, options.pop("waiting", 1000), **options)
        if isinstance(network, Network):
            network.gate.clear()
        first = asyncio.ensure_future(batcher(requests[0]))
        await asyncio.sleep(0)
        if isinstance(network, Network):
            await asyncio.to_thread(network.began.wait, 20)
        others = [asyncio.ensure_future(batcher(one)) for one in requests[1:]]
        await asyncio.sleep(0)
        if isinstance(network, Network):
            network.gate.set()
        try:
            return list(await asyncio.gather(first, *others, return_exceptions=True))
        finally:
            await asyncio.to_thread(batcher.close)

    return asyncio.run(ask())


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from([2, 3])), min_size=1, max_size=12),
    st.integers(1, 12),
    st.booleans(),
)
def test_every_request_gets_its_own_rows(shapes: list[tuple[int, int]], size: int, together: bool) -> None:
    network = Network()
    requests = [torch.arange(float(n * width)).view(n, width) + i for i, (n, width) in enumerate(shapes)]
    assert asked(network, requests, size, together=together) == [sums(one) for one in requests]
    assert sum(shape[0] for shape in network.batches) == sum(n for n, _ in shapes)
    assert all(shape[0] <= size or shape[0] in [n for n, _ in shapes] for shape in network.batches)
    if not together:
        assert len(network.batches) == len(requests)


def test_requests_that_wait_share_a_batch() -> None:
    network = Network()
    asked(network, [torch.ones(1, 2)] * 7, size=4)
    assert network.batches == [[1, 2], [4, 2], [2, 2]]


def test_placements_go_with_their_request_where_requests_share_a_batch() -> None:
    def told(inputs: Tensor, placements: Sequence[Placement | None]) -> list[dict[str, Any]]:
        assert began.wait(20)
        batches.append(len(inputs))
        return [{"left": None if one is None else one.shift[0]} for one in placements]

    async def ask() -> list[Any]:
        batcher = Batcher(told, 8, 100)
        requests = [asyncio.ensure_future(batcher(torch.ones(1, 2), [Placement((1, 1), (9, 0))]))]
        await asyncio.sleep(0.05)
        for lefts in ([1, 2], [3], None):
            placements = None if lefts is None else [Placement((1, 1), (left, 0)) for left in lefts]
            requests.append(asyncio.ensure_future(batcher(torch.ones(len(lefts or [0]), 2), placements)))
        await asyncio.sleep(0.05)
        began.set()
        try:
            return [[row["left"] for row in rows] for rows in await asyncio.gather(*requests)]
        finally:
            await asyncio.to_thread(batcher.close)

    began, batches = threading.Event(), list[int]()
    assert asyncio.run(ask()) == [[9], [1, 2], [3], [None]]
    assert sum(batches) == 5


def test_a_request_fails_by_its_own_fault_alone() -> None:
    network = Network()
    requests = [torch.ones(1, 2), torch.ones(2, 2), -torch.ones(1, 2), 2 * torch.ones(1, 2)]
    *_, wrong, _ = found = asked(network, requests)
    assert isinstance(wrong, ValueError)
    assert [one for one in found if one is not wrong] == [sums(requests[i]) for i in (0, 1, 3)]


def test_predictions_of_another_number_are_an_error() -> None:
    (found,) = asked(lambda inputs, placements: [{}], [torch.ones(2, 2)])
    assert "there are 1 predictions" in str(found)


def test_what_would_wait_too_long_is_refused_at_once() -> None:
    found = asked(Network(), [torch.ones(2, 2)] * 6, waiting=5)
    assert [isinstance(one, FullError) for one in found] == [False, False, False, True, True, True]
    (large,) = asked(Network(), [torch.ones(20, 2)], waiting=5)
    assert len(large) == 20, "where nothing waits, a request of any size is taken"


def test_a_request_that_is_given_up_is_not_predicted() -> None:
    async def ask() -> list[list[int]]:
        network = Network()
        batcher = Batcher(network, 8, 4)
        network.gate.clear()
        first = asyncio.ensure_future(batcher(torch.ones(1, 2)))
        await asyncio.sleep(0)
        await asyncio.to_thread(network.began.wait, 20)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(batcher(torch.ones(4, 2)), 0.01)
        last = asyncio.ensure_future(batcher(torch.ones(4, 2)))  # there is room again
        await asyncio.sleep(0)
        network.gate.set()
        assert await first == sums(torch.ones(1, 2))
        assert await last == sums(torch.ones(4, 2))
        batcher.close()
        return network.batches

    assert asyncio.run(ask()) == [[1, 2], [4, 2]]


def test_closing_answers_what_waits_and_takes_no_more() -> None:
    async def ask() -> None:
        network = Network()
        batcher = Batcher(network, 1, 100)
        network.gate.clear()
        waiting = [asyncio.ensure_future(batcher(torch.ones(1, 2))) for _ in range(5)]
        await asyncio.sleep(0)
        network.gate.set()
        await asyncio.to_thread(batcher.close)
        assert await asyncio.gather(*waiting) == [sums(torch.ones(1, 2))] * 5
        with pytest.raises(FullError):
            await batcher(torch.ones(1, 2))

    asyncio.run(ask())
