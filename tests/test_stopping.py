"""When draws are enough, against slow sums, responses whose error is known, and degenerate ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import stochbn
from conftest import normal, seeded
from stochbn.stopping import Spread, Stopping
from stochbn.summary import Summary
from stochbn.tasks import Classification


class AsTheyAre(Classification):
    """Averages raw values as they are."""

    def values(self, raw: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return raw, raw.sum(2)


def averaged(values: Tensor, stopping: Stopping, together: int = 1) -> tuple[Tensor, Tensor]:
    """The means ``[N, C]`` of the draws ``[S, N, C]`` that each example gets, and how many these are, ``[N]``."""
    summary, made = Summary(AsTheyAre(), stopping=stopping), 0
    waiting, counts = torch.ones(values.shape[1], dtype=torch.bool), torch.zeros(values.shape[1])
    while made < stopping.most:
        count = min(summary.next(together), stopping.most - made)
        examples = summary.objects if made else torch.arange(values.shape[1])
        summary.add(values[made : made + count, examples])
        made += count
        counts[examples] = made
        asked = summary.waiting()
        if asked is None:
            continue
        if not asked.any():
            break
        summary.finish(waiting := asked)
    assert waiting.dtype == torch.bool
    return summary.prediction().probs, counts


@given(
    n=st.integers(1, 5),
    classes=st.integers(2, 4),
    blocks=st.lists(st.sampled_from([2, 4, 6]), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_sums_over_draws_and_over_pairs_are_those_of_all_draws_at_once(
    n: int, classes: int, blocks: list[int], seed: int
) -> None:
    values = normal(sum(blocks), n, classes, seed=seed).double()
    summary = Summary(AsTheyAre(), stopping=Stopping(50))
    for block in torch.split(values, blocks):
        summary.add(block)
    mean, pairs = values.mean(0), values.view(-1, 2, n, classes).mean(1)
    torch.testing.assert_close(summary.spread.draws, (values - mean).square().sum((0, 2)))
    torch.testing.assert_close(summary.spread.pairs, (pairs - mean).square().sum((0, 2)))
    assert summary.spread.count.tolist() == [len(values)] * n


@pytest.mark.parametrize("together", [1, 4, 8])
def test_of_independent_draws_each_batch_gets_about_as_many_as_asked(together: int) -> None:
    values = normal(50, 400, 3)
    _, counts = averaged(values, Stopping(50, even=False), together)
    assert counts.mean() > 40
    _, counts = averaged(values, Stopping(16, even=False), together)
    assert 13 <= counts.mean() <= 16


def opposite(responses: int, examples: int, curved: float, seed: int = 0) -> Tensor:
    """Antithetic pairs: linear responses to noise, and a part `curved` that is even in it."""
    z = normal(responses, examples, 2, seed=seed)
    z = torch.stack([z, -z], 1).flatten(0, 1)
    return z + curved * (z.square() - 1) / math.sqrt(2)


@pytest.mark.parametrize("curved", [0.1, 0.5, 1.0])
def test_a_mean_over_opposite_draws_is_worth_as_many_independent_ones_as_asked(curved: float) -> None:
    variance, errors = 2 * (1 + curved**2), []
    for seed in range(40):
        values = opposite(25, 64, curved, seed)
        means, counts = averaged(values, Stopping(50, even=False))
        errors.append(means.square().sum(1).mean())
        assert counts.mean() <= min(50, 110 * curved**2 / (1 + curved**2) + 6)
    worth = variance / float(torch.stack(errors).mean())
    assert worth >= min(40, 25 * (1 + curved**2) / curved**2 * 0.9)


def test_examples_with_more_noise_get_more_draws_and_those_without_few() -> None:
    scale = torch.tensor([0.0, 0.1, 1.0, 4.0]).repeat(50)
    values = normal(200, 200, 3) * scale[:, None]
    _, counts = averaged(values, Stopping(50, even=False))
    quiet, low, middle, loud = (counts[scale == one].mean() for one in (0.0, 0.1, 1.0, 4.0))
    assert quiet <= low < middle < loud
    assert quiet <= 12


def test_examples_that_stay_together_stop_together() -> None:
    values = normal(50, 20, 3) * torch.linspace(0, 2, 20)[:, None]
    means, counts = averaged(values, Stopping(16, even=False, apart=False))
    assert len(set(counts.tolist())) == 1
    torch.testing.assert_close(means, values[: int(counts[0])].mean(0))


def test_with_a_tolerance_an_example_stops_at_its_own_error_whatever_the_others_are() -> None:
    values = torch.cat([normal(400, 50, 2), 10 * normal(400, 50, 2, seed=1)], 1)
    means, counts = averaged(values, Stopping(400, tolerance=0.2, even=False))
    assert counts[50:].mean() > 300
    assert 35 <= counts[:50].mean() <= 70  # the squared error of 2 classes, 2 / n, is 0.04 at 50
    assert means[:50].square().sum(1).mean().sqrt() < 0.3


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("tolerance", [None, 0.1, 1e100, 1e-200])
def test_draws_that_all_agree_or_are_not_finite_are_enough_at_once(value: float, tolerance: float | None) -> None:
    spread = Spread(*(torch.zeros(3) for _ in range(3)))
    spread.add(torch.arange(3), 4, torch.full((3,), value * 0), torch.full((3,), value * 0))
    assert not Stopping(50, tolerance).waiting(spread).any()


def test_draws_that_differ_by_rounding_alone_are_enough_at_once() -> None:
    _, counts = averaged(0.5 + 1e-8 * normal(50, 10, 3).double(), Stopping(50))
    assert counts.max() == 4


def test_one_linear_response_among_the_quiet_ones_needs_no_more() -> None:
    values = opposite(25, 10, 0.0)
    _, counts = averaged(values, Stopping(50))
    assert counts.max() <= 8


@pytest.mark.parametrize(("name", "value"), [("first", 5), ("first", 2), ("step", 0), ("step", 3)])
def test_questions_come_after_whole_pairs(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be even, as draws come in pairs"):
        replace(stochbn.Settings(), **cast(Any, {name: value}))


def test_equal_draws_give_equal_counts() -> None:
    values = torch.rand(50, 8, 3, generator=seeded(1))
    assert torch.equal(averaged(values, Stopping(50))[1], averaged(values, Stopping(50))[1])
