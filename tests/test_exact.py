"""Exact inference: every example takes part in training mini-batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import stochbn
from conftest import (
    CASES,
    ByName,
    Case,
    Failing,
    Untouched,
    Wrapped,
    dense_net,
    dropout_net,
    mixed_up,
    mlp,
    normal,
    settled,
    slow_entropy,
)
from stochbn import Exact


def slow_exact(model: nn.Module, others: list[Tensor], x: Tensor) -> Tensor:
    """``[S, N, K, ...]``, float64: a fresh copy for every draw and example, in which only batch norm is in training."""
    every = []
    for other in others:
        row = []
        for one in x:
            fresh = copy.deepcopy(model).eval()
            for module in fresh.modules():
                if isinstance(module, _BatchNorm):
                    module.train()
            with torch.no_grad():
                row.append(fresh(torch.cat([other, one[None]])).double().softmax(1)[-1])
        every.append(torch.stack(row))
    return torch.stack(every)


def test_it_agrees_with_a_slow_loop_over_copies(case: Case) -> None:
    model, x = case.model(), case.inputs(4, seed=4)
    incoming = [case.inputs(8, seed=1), case.inputs(7, seed=2), case.inputs(4, seed=3)]
    others = [part[i : i + 3] for part in incoming for i in range(0, len(part) - 2, 3)]
    assert len(others) == 5
    every = slow_exact(model, others, x)
    found = Exact(model, incoming, batch_size=4, draws=5)(x, keep_draws=True)
    torch.testing.assert_close(found.probs.double(), every.mean(0), rtol=1e-4, atol=1e-6)
    wanted = slow_entropy(every, axis=2).mean(0)
    torch.testing.assert_close(found.expected_entropy.double(), wanted, rtol=1e-4, atol=1e-5)
    assert found.log_probs is not None
    torch.testing.assert_close(found.log_probs.double().exp(), every, rtol=1e-3, atol=1e-6)
    assert (every[0] - every[1]).abs().max() > 1e-3, "the draws should differ"


@given(size=st.integers(2, 7), draws=st.integers(1, 4), n=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_it_agrees_with_the_slow_loop_for_all_sizes(size: int, draws: int, n: int, seed: int) -> None:
    model = settled(mlp(), 4).double()
    x, data = (normal(k, 4, seed=seed + k, dtype=torch.float64) for k in (n, draws * (size - 1) + 2))
    every = slow_exact(model, list(torch.split(data, size - 1))[:draws], x)
    found = Exact(model, [data], size, draws)(x)
    torch.testing.assert_close(found.probs, every.mean(0), rtol=1e-9, atol=1e-12)


def test_each_object_is_predicted_as_if_it_were_alone() -> None:
    model, x = settled(mlp(), 4), normal(5, 4, seed=1)
    exact = Exact(model, [normal(60, 4)], 8, 6)
    alone = stochbn.Prediction.cat([exact(one) for one in torch.split(x, 1)])
    torch.testing.assert_close(exact(x).probs, alone.probs, rtol=1e-5, atol=1e-7)


def test_the_object_itself_counts_in_its_mini_batch() -> None:
    """With one other example batch norm maps the two to about -1 and 1, whatever their distance."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Flatten())
    found = Exact(model, [torch.zeros(3, 2)], 2, 3)(torch.tensor([[100.0, -100.0], [-1000.0, 1000.0]]))
    wanted = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).softmax(1)
    torch.testing.assert_close(found.probs, wanted, rtol=1e-4, atol=1e-5)


def test_large_mini_batches_of_data_like_that_of_training_give_the_plain_network_nearly() -> None:
    model = settled(mlp(), 4)
    data = [1.5 * normal(24, 4, seed=500 + step) + 0.5 for step in range(5)] * 40
    big, small = (Exact(model, [torch.cat(data)], size, 3)(normal(5, 4)).probs for size in (1500, 4))
    model.train()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = 1.0
    model(torch.cat(data))
    plain = stochbn.Predictive(model.eval())(normal(5, 4)).probs
    assert (big - plain).abs().max() < 0.02 < (small - plain).abs().max()


def test_it_is_deterministic_and_uses_no_generator() -> None:
    model = settled(dropout_net(), 4)
    state = torch.get_rng_state()
    exact = Exact(model, [normal(60, 4)], 8, 6)
    first = exact(normal(5, 4, seed=1)).probs
    assert torch.equal(exact(normal(5, 4, seed=1), generator=torch.Generator().manual_seed(3)).probs, first)
    assert torch.equal(Exact(model, [normal(60, 4)], 8, 6)(normal(5, 4, seed=1)).probs, first)
    assert torch.equal(torch.get_rng_state(), state), "dropout is off"


def test_only_as_much_training_data_is_read_as_is_needed() -> None:
    read = []

    def stream() -> Iterator[tuple[Tensor, str]]:
        for number in range(9):
            read.append(number)
            yield normal(12, 4, seed=number), "labels"

    Exact(settled(mlp(), 4), stream(), 5, 4)  # mini-batches of 4 others, 3 in each incoming batch
    assert read == [0, 1]


def test_16_objects_and_50_draws_are_the_default() -> None:
    exact = Exact(settled(mlp(), 4), [normal(15 * 50, 4)])
    assert [tuple(other.args[0].shape) for other in exact.others] == [(15, 4)] * 50


def test_draws_are_kept_only_where_asked_for() -> None:
    model, x, data = settled(mlp(), 4), normal(5, 4, seed=1), [normal(60, 4)]
    assert Exact(model, data, 8, 6)(x).log_probs is None
    exact = Exact(model, data, 8, 6, keep_draws=True)
    kept = exact(x).log_probs
    assert kept is not None
    assert kept.shape == (6, 5, 3)
    torch.testing.assert_close(kept.exp().mean(0), exact(x).probs)
    assert exact(x, keep_draws=False).log_probs is None


def test_the_network_is_left_exactly_as_it_was(case: Case) -> None:
    model = mixed_up(case.model())
    before = Untouched(model)
    exact = Exact(model, [case.inputs(20)], 5, 3)
    before.check()
    exact(case.inputs(3, seed=1))
    before.check()


@pytest.mark.parametrize("after", [0, 4])
def test_it_is_left_as_it_was_when_it_raises_midway(case: Case, after: int) -> None:
    model = Failing(case.model(), after)
    mixed_up(model)
    before = Untouched(model)
    with pytest.raises(KeyError, match="the network's own error"):
        Exact(model, [case.inputs(20)], 5, 3)(case.inputs(3, seed=1))
    before.check()


def test_data_is_left_as_it_was_by_a_network_that_writes_to_its_input() -> None:
    model = settled(nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(4), nn.Linear(4, 3)), 4)
    x, data = normal(3, 4), normal(20, 4, seed=1)
    before = x.clone(), data.clone()
    exact = Exact(model, [data], 5, 3)
    assert torch.equal(exact(x).probs, exact(x).probs)
    assert torch.equal(x, before[0])
    assert torch.equal(data, before[1])


def test_no_gradients_are_made() -> None:
    assert not Exact(settled(mlp(), 4), [normal(20, 4)], 5, 3)(normal(2, 4)).probs.requires_grad


def test_a_network_with_named_inputs_takes_mappings() -> None:
    model = ByName()
    settled(model.body, 4)
    data, x, scale = normal(40, 4), normal(3, 4, seed=1), 1 + normal(43, 1, seed=2).square()
    batch = {"features": data, "scale": scale[3:], "labels": torch.zeros(40), "name": "train"}
    exact = Exact(model, [batch], 6, 4)
    found = exact({"features": x, "scale": scale[:3], "labels": torch.zeros(3)}).probs
    wanted = Exact(model.body, [data * scale[3:]], 6, 4)(x * scale[:3]).probs
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="expected inputs with the same arguments"):
        exact({"features": x})
    with pytest.raises(ValueError, match="expected inputs with the same arguments"):
        exact(x)


def test_logits_are_looked_for_where_they_are_said_to_be() -> None:
    model = settled(mlp(), 4)
    wrapped = Wrapped(model, lambda out: {"hidden": out * 0, "scores": out})
    x, data = normal(3, 4), [normal(20, 4, seed=1)]
    assert torch.equal(Exact(wrapped, data, 5, 3, logits="scores")(x).probs, Exact(model, data, 5, 3)(x).probs)
    with pytest.raises(ValueError, match="has nothing at 'logits'"):
        Exact(wrapped, data, 5, 3)(x)


def test_dense_outputs_keep_their_spatial_axes() -> None:
    model = settled(dense_net(), 2, 6, 5)
    found = Exact(model, [normal(20, 2, 6, 5)], 5, 3)(normal(2, 2, 6, 5, seed=1))
    assert found.probs.shape == (2, 3, 6, 5)
    assert found.entropy.shape == (2, 6, 5)


def test_it_can_be_a_member_of_an_ensemble() -> None:
    model, x = settled(mlp(), 4), normal(3, 4)
    exact, plain = Exact(model, [normal(20, 4, seed=1)], 5, 3), stochbn.Predictive(model)
    torch.testing.assert_close(stochbn.Ensemble([exact, plain])(x).probs, (exact(x).probs + plain(x).probs) / 2)


DATA = [normal(20, 4)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Linear(4, 3), DATA), ValueError, "Linear has no batch-norm layers"),
        (("model.pt", DATA), TypeError, r"expected a torch\.nn\.Module"),
        ((mlp(), DATA, 1), ValueError, "batch_size must be at least 2, an example and another one, got 1"),
        ((mlp(), DATA, 0), ValueError, "batch_size must be at least 2"),
        ((mlp(), DATA, 5.0), TypeError, r"batch_size must be a whole number, got 5\.0"),
        ((mlp(), DATA, True), TypeError, "batch_size must be a whole number, got True"),
        ((mlp(), DATA, None), TypeError, "batch_size must be a whole number, got None"),
        ((mlp(), DATA, 5, 0), ValueError, "draws must be at least 1"),
        ((mlp(), DATA, 5, 2.0), TypeError, "draws must be a whole number"),
        ((mlp(), DATA, 5, True), TypeError, "draws must be a whole number"),
        ((mlp(), DATA, 5, 6), ValueError, "6 draws need as many mini-batches of 4 training examples, there were 5"),
        ((mlp(), [normal(3, 4)] * 9, 5, 2), ValueError, "every incoming batch was smaller"),
        ((mlp(), [], 5, 2), ValueError, "no batches to observe"),
        ((mlp(), DATA[0], 5, 2), TypeError, "expected an iterable of batches"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Exact(*arguments)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (torch.zeros(0, 4), ValueError, "no examples in this batch"),
        (torch.zeros(2, 5), ValueError, "do not fit into a mini-batch of the others"),
        (torch.zeros(2, 4, 1), ValueError, "do not fit into a mini-batch of the others"),
        (torch.full((2, 4), float("nan")), ValueError, "output is not finite"),
        ("a.png", TypeError, "batch of type str"),
        ((), ValueError, "empty tuple"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(batch: Any, error: type[Exception], message: str) -> None:
    model = mixed_up(settled(mlp(), 4))
    before = Untouched(model)
    with pytest.raises(error, match=message):
        Exact(model, DATA, 5, 2)(batch)
    before.check()


def test_the_posteriors_come_nearer_to_it_than_the_plain_network_does() -> None:
    """It is what they approximate: on a fresh network the mean of many draws of either kind is about the same."""
    case = CASES["BatchNorm1d [N, C]"]
    model = case.model()
    data = [case.inputs(3200, seed=1)]
    x = case.inputs(20, seed=2)
    exact = Exact(model, data, 16, 200)(x).probs
    plain = stochbn.Predictive(model)(x).probs
    for kind in ("factorized", "joint", "empirical"):
        posterior = stochbn.fit(model, data, 16, kind, centre="observed")
        found = stochbn.Predictive(model, posterior, 200, generator=torch.Generator().manual_seed(0))(x).probs
        assert (found - exact).abs().mean() < 0.5 * (plain - exact).abs().mean(), kind
