"""Samples of mini-batches, and moments of layers that are not always called; every kind's are in the contract."""

from __future__ import annotations

import math
import pickle
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import normal
from stochbn.posteriors.empirical import Replayed
from stochbn.posteriors.factorized import VarianceMomentsOfLayers
from stochbn.posteriors.joint import Directions


def marked(number: float, layers: dict[str, int] | None = None, calls: int = 1) -> dict[str, Tensor]:
    """The observation of a mini-batch, with its number in all places, plus a tenth for each call."""
    layers = layers or {"a": 1, "b": 2}
    values = torch.arange(calls, dtype=torch.float64) / 10 + number
    return {name: values.view(-1, 1, 1).expand(-1, 2, channels).clone() for name, channels in layers.items()}


def sample(most: int, numbers: Any, layers: dict[str, int] | None = None) -> Replayed:
    found = Replayed(most)
    for number in numbers:
        found.update(marked(number, layers))
    return found


def kept(found: Replayed) -> list[int]:
    rows = found.statistics()
    assert rows.dtype == torch.float32
    assert (rows == rows[:, :1, :1]).all(), "all of a row is of one mini-batch"
    return [int(row[0, 0]) for row in rows]


@given(most=st.integers(2, 12), count=st.integers(1, 40))
def test_a_sample_has_different_mini_batches_and_all_in_order_of_arrival_if_they_fit(most: int, count: int) -> None:
    found = sample(most, range(count))
    assert found.layers == {"a": 1, "b": 2}
    assert found.seen == count
    assert found.statistics().shape == (min(most, count), 2, 3)
    numbers = kept(found)
    assert len(set(numbers)) == len(numbers)
    assert set(numbers) <= set(range(count))
    if count <= most:
        assert numbers == list(range(count))
    assert kept(sample(most, range(count))) == numbers, "the same mini-batches give the same sample"


@given(most=st.integers(2, 12), count=st.integers(1, 40), seed=st.integers(0, 1000), parts=st.integers(1, 4))
def test_a_sample_depends_neither_on_the_order_nor_on_the_accumulator_that_mini_batches_come_to(
    most: int, count: int, seed: int, parts: int
) -> None:
    shuffled = list(range(count))
    random.Random(seed).shuffle(shuffled)
    merged = sample(most, shuffled[::parts])
    for part in range(1, parts):
        merged = sample(most, shuffled[part::parts]).merge(merged)
    assert merged.seen == count
    whole = kept(sample(most, range(count)))
    assert sorted(kept(merged)) == sorted(whole)
    if count > most:
        assert kept(merged) == whole, "also in the same order"


def test_every_mini_batch_is_as_likely_to_be_in_a_sample_and_every_pair_too() -> None:
    """Chi squared over samples of different mini-batches, at a level of about 1e-4."""
    most, count, times = 3, 8, 3000
    singles, pairs = torch.zeros(count), torch.zeros(count, count)
    for time in range(times):
        chosen = torch.zeros(count)
        chosen[torch.tensor(kept(sample(most, range(count * time, count * time + count), {"a": 1}))) % count] = 1
        singles += chosen
        pairs += chosen[:, None] * chosen
    p = most / count
    statistic = ((singles - times * p).square() / (times * p * (1 - p))).sum() * (count - 1) / count
    assert statistic < 29.9, "7 degrees of freedom"
    p = most * (most - 1) / count / (count - 1)
    upper = pairs[torch.triu(torch.ones(count, count), 1) > 0]
    assert ((upper - times * p).abs() < 4.5 * (times * p * (1 - p)) ** 0.5).all()


def test_a_long_stream_is_sampled_from_all_its_parts() -> None:
    found = torch.tensor(kept(sample(200, range(2000))), dtype=torch.float64)
    counts = torch.histc(found, 4, 0, 2000)
    assert (((counts - 50).square()) / 50).sum() < 22, "chi squared with 3 degrees of freedom, at 1e-4"


def test_equal_mini_batches_are_several() -> None:
    assert kept(sample(5, [3, 3, 1])) == [3, 3, 1]
    assert sorted(kept(sample(5, [3, 1]).merge(sample(5, [3])))) == [1, 3, 3]
    most = kept(sample(4, [3] * 3 + [1] * 3))
    assert len(most) == 4
    assert set(most) == {1, 3}


def test_the_call_of_a_layer_that_is_taken_does_not_depend_on_the_order() -> None:
    """Layers with as many calls have the same one taken: it is of one forward pass."""
    observations = [{**marked(n, {"once": 1}), **marked(n, {"thrice": 2, "again": 1}, calls=3)} for n in range(300)]
    forwards, backwards = Replayed(300), Replayed(300)
    for one, other in zip(observations, reversed(observations), strict=True):
        forwards.update(one)
        backwards.update(other)
    rows = forwards.statistics()
    assert torch.equal(rows, backwards.statistics().flip(0))
    assert torch.equal(rows[:, 0, 0], torch.arange(300.0))
    assert torch.equal(rows[:, 0, 1], rows[:, 0, 3])
    calls = (10 * (rows[:, 0, 1] - rows[:, 0, 0])).round().long().bincount()
    assert len(calls) == 3
    assert calls.min() > 70, "each of the calls about as often as the others"


@pytest.mark.parametrize("second", [{"a": 1}, {"a": 1, "b": 2, "c": 1}, {}])
def test_a_sample_refuses_mini_batches_of_other_layers(second: dict[str, int]) -> None:
    found = sample(10, [0])
    with pytest.raises(ValueError, match=r"layer '[abc]' was called for some mini-batches and not for others"):
        found.update(marked(1, second) if second else {})
    other = Replayed(10)
    other.update(marked(1, second) if second else {})
    for one, two in ((found, other), (other, found)):
        with pytest.raises(ValueError, match=r"layer '[abc]' was called for some mini-batches and not for others"):
            one.merge(two)


def test_accumulators_of_other_settings_are_not_merged() -> None:
    with pytest.raises(ValueError, match=r"equal settings, got \{'max_batches': 3\} and \{'max_batches': 4\}"):
        Replayed(3).merge(Replayed(4))
    with pytest.raises(ValueError, match="'directions': 2"):
        Directions(3, 2).merge(Directions(3))


@pytest.mark.parametrize("most", [1, 0, -1, 2.0, True, None, "3"])
def test_a_number_of_mini_batches_that_is_none_is_refused(most: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"max_batches must be (a whole number|at least 2), got"):
        Replayed(most)


def test_accumulators_go_to_other_processes() -> None:
    """Torch's collectives send objects as pickles, between processes of one program."""
    found = sample(3, range(9))
    other = pickle.loads(pickle.dumps(sample(3, range(9, 15))))
    assert kept(found.merge(other)) == kept(sample(3, range(15)))
    moments = VarianceMomentsOfLayers()
    moments.update(marked(3))
    copy = pickle.loads(pickle.dumps(moments))
    assert torch.equal(copy.posterior(batch_size=1).expected, moments.posterior(batch_size=1).expected)


@pytest.mark.parametrize("cls", [Replayed, VarianceMomentsOfLayers])
def test_another_number_of_channels_is_refused(cls: Any) -> None:
    found, other = (cls(10), cls(10)) if cls is Replayed else (cls(), cls())
    found.update(marked(0))
    other.update(marked(0, {"a": 1, "b": 3}))
    with pytest.raises(ValueError, match="layer 'b' has 3 channels here and had 2 before"):
        found.merge(other)
    with pytest.raises(ValueError, match="layer 'b' has 3 channels here and had 2 before"):
        found.update(marked(0, {"a": 1, "b": 3}))


def test_layers_that_are_called_for_some_mini_batches_keep_the_networks_order() -> None:
    uncalled = {"first": torch.empty(0, 2, 2), "second": torch.empty(0, 2, 1)}
    one, other = VarianceMomentsOfLayers(), VarianceMomentsOfLayers()
    for number in range(3):
        one.update({**uncalled, **marked(number, {"second": 1})})
        other.update({**uncalled, **marked(number, {"first": 2})})
    assert one.layers == {"second": 1}
    for merged in (one.merge(other), other.merge(one)):
        assert list(merged.layers.items()) == [("first", 2), ("second", 1)]
        posterior = merged.posterior(batch_size=16)
        assert posterior.mini_batches == 6
        assert posterior.mean_mean.tolist() == [1.0, 1.0, 1.0]
        assert posterior.mean_variance.tolist() == [1.0, 1.0, 1.0]


def test_moments_are_of_all_calls() -> None:
    found = VarianceMomentsOfLayers()
    rows = normal(7, 3, 2, 4, dtype=torch.float64).abs()
    for calls in rows:
        found.update({"a": calls})
    posterior = found.posterior(batch_size=None)
    every = rows.flatten(0, 1)
    torch.testing.assert_close(posterior.expected, every.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(posterior.mean_variance, every[:, 0].var(0), rtol=1e-12, atol=1e-12)
    assert math.isclose(posterior.variance_variance[0].item(), every[:, 1, 0].var().item(), rel_tol=1e-12)
