from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import stochbn
from conftest import seeded
from posterior_contract import PosteriorContract, about, drawn_rows, statistics


class TestEmpirical(PosteriorContract):
    kind = "empirical"
    replays = True


def empirical(observed: Tensor, layers: Mapping[str, int] | None = None) -> stochbn.Empirical:
    return stochbn.Empirical.from_statistics(observed, **about(layers or observed.shape[2]))


@given(m=st.integers(1, 9), n=st.integers(1, 25), seed=st.integers(0, 10**6))
def test_empirical_draws_are_observed_rows_without_replacement_and_then_again(m: int, n: int, seed: int) -> None:
    observed = statistics(m, 3, seed)
    found = drawn_rows(empirical(observed, {"a": 1, "b": 2}), n, seed)
    places = [[i for i in range(m) if torch.equal(observed[i].double(), row)] for row in found]
    assert all(len(place) == 1 for place in places), "all layers of a draw are of one observed mini-batch"
    order = [place[0] for place in places]
    for start in range(0, n, m):
        cycle = order[start : start + m]
        assert len(set(cycle)) == len(cycle)


def test_every_cycle_of_empirical_draws_has_an_order_of_its_own() -> None:
    observed = statistics(30, 2)
    found = drawn_rows(empirical(observed), 90)
    cycles = torch.split(found, 30)
    assert not torch.equal(cycles[0], observed.double())
    assert not torch.equal(cycles[0], cycles[1])
    assert not torch.equal(cycles[1], cycles[2])


def test_every_mini_batch_is_as_likely_to_be_the_first_drawn() -> None:
    observed = statistics(5, 1)
    posterior, source = empirical(observed), seeded(1)
    counts = [0] * 5
    for _ in range(1500):
        value = posterior.draw(1, source)["norm.running_mean"][0, 0]
        counts[int((observed[:, 0, 0].double() == value).nonzero())] += 1
    assert sum((count - 300) ** 2 / 300 for count in counts) < 25, "chi squared with 4 degrees of freedom, at 5e-5"


def test_what_is_expected_of_an_empirical_posterior_is_the_mean_of_its_rows() -> None:
    observed = statistics(11, 4)
    torch.testing.assert_close(empirical(observed).expected, observed.double().sum(0) / 11, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("statistics", torch.zeros(3, 2, 6), r"statistics must be float32 \[any, 2, 5\] for 5 channels"),
        ("statistics", torch.zeros(3, 1, 5), r"statistics must be float32 \[any, 2, 5\]"),
        ("statistics", torch.zeros(2, 5), r"statistics must be float32 \[any, 2, 5\]"),
        ("statistics", torch.zeros(3, 2, 5, dtype=torch.float64), "statistics must be float32"),
        ("statistics", torch.zeros(0, 2, 5), "at least one mini-batch"),
        ("statistics", torch.full((3, 2, 5), math.nan), "statistics must be finite"),
        ("statistics", torch.full((3, 2, 5), -1.0), "no negative variances"),
    ],
)
def test_tensors_that_no_posterior_has_are_refused(key: str, value: Tensor, message: str) -> None:
    changes: dict[str, Any] = {key: value}
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(empirical(statistics(12, 5)), **changes)
