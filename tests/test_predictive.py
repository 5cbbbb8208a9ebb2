from __future__ import annotations

import copy
import itertools
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import stochbn
from conftest import (
    CASES,
    ByName,
    Case,
    Failing,
    Untouched,
    Unused,
    Wrapped,
    convnet,
    dense_net,
    dropout_net,
    make_posterior,
    mixed_up,
    mlp,
    normal,
    seeded,
    settled,
    slow_entropy,
    slow_probs,
    spreadless,
)
from stochbn import Ensemble, Exact, MCDropout, Prediction, Predictive
from stochbn.execution import Settings


def fitted(model: nn.Module, case: Case = CASES["BatchNorm1d [N, C]"]) -> stochbn.Posterior:
    return stochbn.fit(model, [case.inputs(48, seed=9)], 6)


@pytest.fixture
def model() -> nn.Module:
    return settled(mlp(), 4)


@pytest.fixture
def posterior(model: nn.Module) -> stochbn.Posterior:
    return fitted(model)


X = normal(7, 4, seed=77)


# Draws of the statistics


def test_the_probabilities_are_those_of_a_slow_loop_over_copies(case: Case) -> None:
    model = case.model()
    posterior, x = fitted(model, case), case.inputs(5, seed=4)
    probs, expected, every = slow_probs(model, posterior, 11, 3, x)
    found = Predictive(model, posterior, draws=11)(x, generator=seeded(3), keep_draws=True)
    torch.testing.assert_close(found.probs.double(), probs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.expected_entropy.double(), expected, rtol=1e-5, atol=1e-6)
    assert found.log_probs is not None
    torch.testing.assert_close(found.log_probs.double().exp(), every, rtol=1e-4, atol=1e-6)
    assert (every[0] - every[1]).abs().max() > 1e-3, "the draws should differ"


@given(draws=st.integers(1, 9), n=st.integers(1, 6), seed=st.integers(0, 10**6), scale=st.floats(0.1, 5))
def test_it_agrees_with_the_slow_loop_for_any_number_of_draws_and_objects(
    draws: int, n: int, seed: int, scale: float
) -> None:
    model = settled(mlp(), 4).double()
    posterior = make_posterior(
        {"1": 6, "4": 7},
        mean_mean=normal(13, seed=seed).tolist(),
        mean_variance=(scale * normal(13, seed=seed + 1).square()).tolist(),
        variance_mean=normal(13, seed=seed + 2).exp().tolist(),
        variance_variance=(scale * normal(13, seed=seed + 3).square()).tolist(),
    )
    x = normal(n, 4, seed=seed, dtype=torch.float64)
    probs, expected, _ = slow_probs(model, posterior, draws, seed, x)
    found = Predictive(model, posterior, draws, generator=seeded(seed), tolerance=0)(x)
    assert found.probs.dtype == torch.float64
    torch.testing.assert_close(found.probs, probs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.expected_entropy, expected, rtol=1e-10, atol=1e-12)


def test_without_a_posterior_it_is_the_plain_network_exactly(case: Case) -> None:
    model, x = case.model(), case.inputs(6, seed=5)
    wanted = model(x).softmax(1)
    found = Predictive(model)(x)
    assert torch.equal(found.probs, wanted)
    assert not found.mutual_information.any()
    assert found.log_probs is None


@pytest.mark.parametrize("draws", [1, 2, 50])
def test_without_spread_it_is_the_plain_network(case: Case, draws: int) -> None:
    model, x = case.model(), case.inputs(6, seed=5)
    wanted = model(x).softmax(1)
    found = Predictive(model, spreadless(model), draws)(x)
    # To rounding, as convolutions may run in another memory layout.
    torch.testing.assert_close(found.probs, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.entropy, found.expected_entropy, rtol=1e-5, atol=1e-6)
    assert (found.mutual_information < 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_another_precision_work_too(dtype: torch.dtype) -> None:
    model = settled(mlp(), 4).to(dtype)
    x = X.to(dtype)
    posterior = stochbn.fit(model, [normal(48, 4, seed=9, dtype=dtype)], 6)
    assert posterior.dtype == dtype
    assert all(values.dtype == dtype for values in posterior.draw(1).values())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = Predictive(model, posterior, 20, generator=seeded(3), tolerance=0)(x)
    assert found.probs.dtype == found.entropy.dtype == wide, "half precision is averaged in float32"
    probs, expected, _ = slow_probs(model, posterior, 20, 3, x)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found.probs.double(), probs, rtol=10 * tolerance, atol=tolerance)
    torch.testing.assert_close(found.expected_entropy.double(), expected, rtol=10 * tolerance, atol=tolerance)
    exact = Predictive(model, spreadless(model), 20)(x)
    torch.testing.assert_close(exact.probs, model(x).to(wide).softmax(1), rtol=1e-5, atol=1e-6)
    assert torch.equal(Predictive(model)(x).probs, model(x).to(wide).softmax(1))
    assert exact.mutual_information.max() < 1e-6


def test_a_posterior_of_another_precision_is_brought_to_that_of_the_network(
    model: nn.Module, posterior: stochbn.Posterior
) -> None:
    wide = Predictive(copy.deepcopy(model).double(), posterior, 10)(X.double(), generator=seeded(1))
    narrow = Predictive(model, posterior, 10)(X, generator=seeded(1))
    assert wide.probs.dtype == torch.float64
    torch.testing.assert_close(wide.probs.float(), narrow.probs, rtol=1e-4, atol=1e-6)


def test_skipped_layers_use_their_running_averages() -> None:
    class TwoWays(Unused):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.norm(x)
            if not self.training:
                hidden = hidden + self.auxiliary(torch.cat([x, x[:, :1]], 1))[:, :4]
            out: Tensor = self.head(hidden)
            return out

    model = settled(TwoWays(), 4)
    model.get_buffer("auxiliary.running_mean").fill_(0.7)
    posterior = fitted(model)
    assert list(posterior.skipped) == ["auxiliary"]
    probs, _, _ = slow_probs(model, posterior, 5, 2, X)
    found = Predictive(model, posterior, 5, generator=seeded(2), tolerance=0)(X)
    torch.testing.assert_close(found.probs.double(), probs)


def test_50_draws_are_the_default(model: nn.Module, posterior: stochbn.Posterior) -> None:
    found = Predictive(model, posterior)(X, keep_draws=True).log_probs
    assert found is not None
    assert len(found) == 50


# What a prediction says


@given(
    s=st.integers(1, 5), n=st.integers(1, 4), k=st.integers(2, 5), scale=st.floats(0, 30), seed=st.integers(0, 10**6)
)
def test_entropy_and_mutual_information_are_their_formulas(s: int, n: int, k: int, scale: float, seed: int) -> None:
    every = (scale * normal(s, n, k, seed=seed, dtype=torch.float64)).softmax(2)
    prediction = Prediction(every.mean(0), slow_entropy(every, axis=2).mean(0))
    total = [-sum(p * torch.tensor(p).log().item() for p in row if p > 0) for row in every.mean(0).tolist()]
    each = [
        sum(-sum(p * torch.tensor(p).log().item() for p in row if p > 0) for row in rows) / s
        for rows in every.transpose(0, 1).tolist()
    ]
    assert prediction.entropy.tolist() == pytest.approx(total, rel=1e-6, abs=1e-6)
    assert prediction.mutual_information.tolist() == pytest.approx(
        [t - e for t, e in zip(total, each, strict=True)], rel=1e-6, abs=1e-6
    )
    assert (prediction.mutual_information >= 0).all()


def test_entropy_is_in_nats_and_a_probability_of_0_counts_nothing() -> None:
    prediction = Prediction(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([0.0, 0.0]))
    torch.testing.assert_close(prediction.entropy, torch.tensor([2.0, 1.0]).log())
    torch.testing.assert_close(prediction.mutual_information, torch.tensor([2.0, 1.0]).log())


def test_mutual_information_that_rounding_made_negative_is_0() -> None:
    assert Prediction(torch.tensor([[1.0, 0.0]]), torch.tensor([1e-8])).mutual_information.item() == 0


def test_kept_draws_are_consistent_with_what_is_averaged(model: nn.Module, posterior: stochbn.Posterior) -> None:
    found = Predictive(model, posterior, 9, keep_draws=True)(X)
    assert found.log_probs is not None
    assert found.log_probs.shape == (9, 7, 3)
    every = found.log_probs.double().exp()
    torch.testing.assert_close(every.sum(2), torch.ones(9, 7, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(every.mean(0), found.probs.double(), rtol=1e-5, atol=1e-6)
    expected = slow_entropy(every, axis=2).mean(0)
    torch.testing.assert_close(found.expected_entropy.double(), expected, rtol=1e-4, atol=1e-5)
    information = slow_entropy(every.mean(0)) - expected
    torch.testing.assert_close(found.mutual_information.double(), information, rtol=1e-3, atol=1e-5)
    assert (information > 1e-4).all()


def test_draws_are_kept_only_where_asked_for(model: nn.Module, posterior: stochbn.Posterior) -> None:
    assert Predictive(model, posterior, 3)(X).log_probs is None
    assert Predictive(model, posterior, 3)(X, keep_draws=True).log_probs is not None
    assert Predictive(model, posterior, 3, keep_draws=True)(X, keep_draws=False).log_probs is None
    plain = Predictive(model, keep_draws=True)(X).log_probs
    assert plain is not None
    assert torch.equal(plain, model(X).log_softmax(1)[None])


def test_keeping_draws_does_not_change_the_prediction(model: nn.Module, posterior: stochbn.Posterior) -> None:
    one = Predictive(model, posterior, 6, tolerance=0)(X, generator=seeded())
    other = Predictive(model, posterior, 6, keep_draws=True)(X, generator=seeded())
    assert torch.equal(one.probs, other.probs)
    assert torch.equal(one.expected_entropy, other.expected_entropy)


def test_predictions_of_parts_join_to_that_of_the_whole(model: nn.Module) -> None:
    predictive = Predictive(model, keep_draws=True)
    whole = predictive(X)
    joined = Prediction.cat([predictive(X[:3]), predictive(X[3:4]), predictive(X[4:])])
    torch.testing.assert_close(joined.probs, whole.probs)
    torch.testing.assert_close(joined.expected_entropy, whole.expected_entropy)
    torch.testing.assert_close(joined.log_probs, whole.log_probs)
    assert Prediction.cat([Predictive(model)(X)]).log_probs is None


def test_predictions_that_do_not_belong_together_are_not_joined(model: nn.Module, posterior: stochbn.Posterior) -> None:
    plain, kept = Predictive(model)(X), Predictive(model)(X, keep_draws=True)
    with pytest.raises(ValueError, match="no predictions to join"):
        Prediction.cat([])
    with pytest.raises(ValueError, match="some of the predictions to join kept their draws"):
        Prediction.cat([plain, kept])
    with pytest.raises(ValueError, match="differ in their classes or draws"):
        Prediction.cat([plain, Predictive(settled(mlp(classes=4), 4))(X)])
    with pytest.raises(ValueError, match="differ in their classes or draws"):
        Prediction.cat([kept, Predictive(model, posterior, 2)(X, keep_draws=True)])


# Forms of input and output

Scores = namedtuple("Scores", ["features", "scores"])
Logits = namedtuple("Logits", ["features", "logits"])


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda y: y, None),
        (lambda y: (y, -y), None),
        (lambda y: [y], None),
        (lambda y: (-y, y), 1),
        (lambda y: {"loss": -y, "logits": y}, None),
        (lambda y: {"aux": -y, "out": y}, None),
        (lambda y: {"logits": -y, "scores": y}, "scores"),
        (lambda y: Output(y), None),
        (lambda y: Output(-y, y), "loss"),
        (lambda y: Logits(-y, y), None),
        (lambda y: Scores(-y, y), "scores"),
        (lambda y: Scores(y, -y), None),
    ],
)
def test_every_form_of_output_gives_the_same_prediction(
    wrap: Callable[[Tensor], Any], place: str | int | None, model: nn.Module
) -> None:
    wrapped = Wrapped(model, wrap)
    posterior = fitted(wrapped)
    wanted = Predictive(Wrapped(model, lambda y: y), posterior, 4, generator=seeded())(X)
    found = Predictive(wrapped, posterior, 4, generator=seeded(), logits=place)(X)
    assert torch.equal(found.probs, wanted.probs)
    assert torch.equal(found.expected_entropy, wanted.expected_entropy)


@pytest.mark.parametrize("batch", [(X, torch.zeros(7)), [X], (X, "label", 3)])
def test_a_batch_may_carry_labels(batch: Any, model: nn.Module) -> None:
    assert torch.equal(Predictive(model)(batch).probs, Predictive(model)(X).probs)


def test_a_network_with_named_inputs_takes_a_mapping() -> None:
    model = ByName()
    settled(model.body, 4)
    posterior = stochbn.fit(model, [{"features": normal(32, 4)}], 8)
    batch = {"features": X, "scale": torch.full((7, 1), 2.0), "labels": torch.zeros(7)}
    found = Predictive(model, posterior, 5, generator=seeded())(batch)
    wanted = Predictive(model, posterior, 5, generator=seeded())({"features": 2 * X})
    torch.testing.assert_close(found.probs, wanted.probs)


def test_dense_outputs_keep_their_spatial_axes() -> None:
    model = settled(dense_net(), 2, 6, 5)
    posterior = fitted(model, CASES["dense output"])
    x = normal(3, 2, 4, 7, seed=2)
    found = Predictive(model, posterior, 6, generator=seeded(1), keep_draws=True)(x)
    assert found.probs.shape == (3, 3, 4, 7)
    assert found.entropy.shape == found.mutual_information.shape == found.expected_entropy.shape == (3, 4, 7)
    assert found.log_probs is not None
    assert found.log_probs.shape == (6, 3, 3, 4, 7)
    _, _, every = slow_probs(model, posterior, 6, 1, x)
    torch.testing.assert_close(found.probs.double(), every.mean(0), rtol=1e-5, atol=1e-6)
    pixel = every[:, 1, :, 2, 3]  # one pixel by hand
    assert found.entropy[1, 2, 3].item() == pytest.approx(slow_entropy(pixel.mean(0)[None]).item(), rel=1e-4)
    assert found.expected_entropy[1, 2, 3].item() == pytest.approx(slow_entropy(pixel).mean().item(), rel=1e-4)


def test_torch_functions_of_the_result_need_no_detaching(model: nn.Module, posterior: stochbn.Posterior) -> None:
    found = Predictive(model, posterior, 3)(X.clone().requires_grad_())
    assert not found.probs.requires_grad
    found.probs.numpy()


# Random numbers


def test_a_generator_makes_it_reproducible(model: nn.Module, posterior: stochbn.Posterior) -> None:
    predictive = Predictive(model, posterior, 5, generator=seeded(1))
    first, second = predictive(X), predictive(X)
    assert not torch.equal(first.probs, second.probs), "the generator should go on"
    again = Predictive(model, posterior, 5, generator=seeded(1))
    assert torch.equal(again(X).probs, first.probs)
    assert torch.equal(again(X).probs, second.probs)
    assert torch.equal(predictive(X, generator=seeded(1)).probs, first.probs), "that of the call comes first"


@pytest.mark.parametrize("kind", [Predictive, MCDropout])
def test_the_global_generator_is_left_alone_when_one_is_given(kind: Any) -> None:
    model = settled(dropout_net(), 4)
    state = torch.get_rng_state()
    kind(model, posterior=fitted_quietly(model), draws=3, generator=seeded())(X)
    kind(model, posterior=fitted_quietly(model), draws=3)(X, generator=seeded())
    if kind is MCDropout:
        MCDropout(model, 3, generator=seeded())(X)
    assert torch.equal(torch.get_rng_state(), state)


def fitted_quietly(model: nn.Module) -> stochbn.Posterior:
    """Fitted without a trace in the global generator, which dropout would leave."""
    with torch.random.fork_rng():
        return fitted(model)


@pytest.mark.parametrize("kind", [Predictive, MCDropout])
def test_the_global_generator_is_used_when_none_is_given(kind: Any) -> None:
    model = settled(dropout_net(), 4)
    predictive = kind(model, posterior=fitted_quietly(model), draws=3)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        first = predictive(X).probs
        assert not torch.equal(predictive(X).probs, first)
        torch.manual_seed(4)
        assert torch.equal(predictive(X).probs, first)


def test_the_plain_network_consumes_no_random_numbers(model: nn.Module) -> None:
    state = torch.get_rng_state()
    Predictive(model)(X)
    assert torch.equal(torch.get_rng_state(), state)


# The network is left alone


def test_the_network_is_left_exactly_as_it_was(case: Case) -> None:
    model = case.model()
    posterior = fitted(model, case)
    mixed_up(model)
    before = Untouched(model)
    Predictive(model, posterior, 4)(case.inputs(5))
    before.check()
    Predictive(model)(case.inputs(5))
    before.check()


@pytest.mark.parametrize("breaks_at", [1, 3])
@pytest.mark.parametrize("way", ["posterior", "plain", "dropout", "both"])
def test_the_network_and_the_generator_are_left_as_they_were_when_it_raises(way: str, breaks_at: int) -> None:
    model = Failing(settled(dropout_net(), 4), 10**6)
    posterior = fitted_quietly(model)
    mixed_up(model)
    before, state = Untouched(model), torch.get_rng_state()
    predictive = {
        "posterior": Predictive(model, posterior, 5),
        "plain": Predictive(model),
        "dropout": MCDropout(model, 5),
        "both": MCDropout(model, 5, posterior),
    }[way]
    grad = torch.is_grad_enabled()
    if breaks_at > 1:
        predictive(X, generator=seeded())
    model.passes.value = 10**6
    with pytest.raises(KeyError, match="the network's own error") as caught:
        predictive(X, generator=seeded())
    assert caught.value.__traceback__ is not None, "it keeps what the passes hold alive"
    before.check()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() == grad


def test_no_gradients_are_made(model: nn.Module, posterior: stochbn.Posterior) -> None:
    enabled = []
    model.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    Predictive(model, posterior, 2)(X)
    assert len(enabled) > 1
    assert not any(enabled)
    assert torch.is_grad_enabled()


# Dropout left on


def exact_dropout_net(rate: float = 0.5) -> nn.Sequential:
    """Two features after dropout: every pass is one of four closed-form outcomes."""
    model = nn.Sequential(nn.BatchNorm1d(2, eps=0.0, affine=False), nn.Dropout(rate), nn.Linear(2, 3))
    model.get_parameter("2.weight").data.copy_(torch.tensor([[1.0, 0.3], [-0.5, 1.2], [0.1, -0.8]]))
    model.get_buffer("0.running_mean").copy_(torch.tensor([0.5, -1.0]))
    model.get_buffer("0.running_var").copy_(torch.tensor([4.0, 0.25]))
    return model


def outcomes(model: nn.Sequential, x: Tensor, mean: Tensor, var: Tensor, rate: float) -> dict[tuple[int, ...], Tensor]:
    """The log-probabilities of one example under each mask."""
    hidden = (x - mean) / var.sqrt()
    head = model.get_submodule("2")
    return {
        mask: head(hidden * torch.tensor(mask) / (1 - rate)).log_softmax(0).detach()
        for mask in itertools.product((0, 1), repeat=2)
    }


@pytest.mark.parametrize("with_posterior", [False, True])
@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_every_pass_drops_features_and_normalises_by_running_averages(rate: float, with_posterior: bool) -> None:
    model = exact_dropout_net(rate)
    mean, var, posterior = model.get_buffer("0.running_mean"), model.get_buffer("0.running_var"), None
    if with_posterior:  # without spread, elsewhere than the running averages
        mean, var = torch.tensor([2.0, 0.25]), torch.tensor([1.0, 2.25])
        posterior = make_posterior(
            {"0": 2}, mean_mean=mean.tolist(), mean_variance=[0, 0], variance_mean=var.tolist(),
            variance_variance=[0, 0],
        )  # fmt: skip
    x = torch.tensor([[1.5, -0.5]])
    draws = 600
    found = MCDropout(model, draws, posterior, generator=seeded(5), keep_draws=True)(x).log_probs
    assert found is not None
    assert found.shape == (draws, 1, 3)
    counts = {}
    for mask, wanted in outcomes(model, x[0], mean, var, rate).items():
        counts[mask] = int(((found[:, 0] - wanted).abs().max(1).values < 1e-5).sum())
    assert sum(counts.values()) == draws, "every pass is one of the four outcomes"
    for mask, count in counts.items():
        share = (1 - rate) ** sum(mask) * rate ** (2 - sum(mask))
        assert abs(count / draws - share) < 5 * (share * (1 - share) / draws) ** 0.5


def test_with_a_posterior_every_pass_also_draws_the_statistics() -> None:
    model = exact_dropout_net()
    x = torch.tensor([[1.5, -0.5]])
    posterior = make_posterior(
        {"0": 2}, mean_mean=[0.5, -1], mean_variance=[0.04, 0.04], variance_mean=[4, 0.25],
        variance_variance=[0.5, 0.01],
    )  # fmt: skip
    draws = 400
    kept = MCDropout(model, draws, posterior, generator=seeded(5), keep_draws=True)(x).log_probs
    assert kept is not None
    full = outcomes(model, x[0], torch.tensor([0.5, -1]), torch.tensor([4, 0.25]), 0.5)
    empty = ((kept[:, 0] - full[0, 0]).abs().max(1).values < 1e-5).sum().item()
    assert abs(empty / draws - 0.25) < 0.11, "both features dropped: the statistics do not matter"
    alive = {tuple(row) for row in kept[:, 0].tolist()}
    assert len(alive) > 0.7 * draws, "otherwise every pass is another"
    for mask in ((0, 1), (1, 0), (1, 1)):
        assert all((row - full[mask]).abs().max() > 1e-6 for row in kept[:20, 0])


def test_only_dropout_layers_are_in_training_mode() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = settled(
        nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), Other(), nn.AlphaDropout(0.1), nn.Linear(8, 3)
        ),
        4,
    )
    seen: dict[str, set[bool]] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, a, o, name=name: seen.setdefault(name, set()).add(m.training))
    predictive = MCDropout(model, 3)
    predictive(X)  # finds out which modules call dropout
    seen.clear()
    predictive(X)
    assert seen == {"": {False}, **{str(i): {i in (2, 4)} for i in range(6)}}
    seen.clear()
    Predictive(model.train())(X)
    assert seen == {name: {False} for name in ["", *map(str, range(6))]}


def test_predictive_has_everything_in_evaluation_mode_even_of_a_network_in_training_mode() -> None:
    model = settled(dropout_net(), 4)
    wanted = Predictive(model)(X)
    assert torch.equal(Predictive(model.train())(X).probs, wanted.probs)


@pytest.mark.parametrize(
    ("layer", "space"),
    [(nn.Dropout, 0), (nn.AlphaDropout, 0), (nn.Dropout1d, 1), (nn.Dropout2d, 2), (nn.Dropout3d, 3),
     (nn.FeatureAlphaDropout, 3)],
)  # fmt: skip
def test_every_kind_of_dropout_layer_is_left_on(layer: Callable[[float], nn.Module], space: int) -> None:
    model = nn.Sequential(nn.Unflatten(1, (4, *[1] * space)), layer(0.5), nn.Flatten(), nn.Linear(4, 3)).eval()
    found = MCDropout(model, 12, generator=seeded(), keep_draws=True)(X).log_probs
    assert found is not None
    assert (found[0] - found).abs().amax((1, 2)).max() > 1e-3


@pytest.mark.parametrize("with_posterior", [False, True])
def test_dropout_is_reproducible_with_a_generator(with_posterior: bool) -> None:
    model = settled(dropout_net(), 4)
    posterior = fitted_quietly(model) if with_posterior else None
    first = MCDropout(model, 6, posterior, generator=seeded(2), keep_draws=True)
    second = MCDropout(model, 6, posterior, keep_draws=True)
    one, two = first(X), second(X, generator=seeded(2))
    assert torch.equal(one.probs, two.probs)
    assert one.log_probs is not None
    assert two.log_probs is not None
    assert torch.equal(one.log_probs, two.log_probs)
    assert len({tuple(row) for row in one.log_probs[:, 0].tolist()}) == 6, "every pass has a mask of its own"
    assert not torch.equal(first(X).probs, one.probs), "and so has every call"


def test_dropout_on_the_cpu_leaves_the_generators_of_other_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seeded_with = settled(dropout_net(), 4), list[int]()
    for device in (torch.cuda, torch.mps, torch.xpu):
        for name in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(device, name, seeded_with.append, raising=False)
    MCDropout(model, 3, generator=seeded())(X)
    assert seeded_with == []


def test_dropout_leaves_the_network_exactly_as_it_was() -> None:
    model = settled(dropout_net(), 4)
    posterior = fitted_quietly(model)
    mixed_up(model)
    before = Untouched(model)
    for predictive in (MCDropout(model, 3), MCDropout(model, 3, posterior, generator=seeded())):
        predictive(X)
        before.check()


@pytest.mark.parametrize("build", [mlp, lambda: dropout_net(0.0)])
def test_a_network_without_dropout_is_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="no dropout with a positive rate"):
        MCDropout(build(), 5)(X)


# Ensembles


def test_an_ensemble_is_the_mean_of_its_members() -> None:
    models = [settled(mlp(), 4, seed=seed) for seed in range(3)]
    members = [m(X).double().softmax(1) for m in models]
    found = Ensemble([Predictive(m) for m in models])(X)
    every = torch.stack(members)
    torch.testing.assert_close(found.probs.double(), every.mean(0), rtol=1e-5, atol=1e-6)
    expected = slow_entropy(every, axis=2).mean(0)
    torch.testing.assert_close(found.expected_entropy.double(), expected, rtol=1e-5, atol=1e-6)
    information = slow_entropy(every.mean(0)) - expected
    torch.testing.assert_close(found.mutual_information.double(), information, rtol=1e-4, atol=1e-6)
    assert information.max() > 0.01


def test_an_ensemble_of_one_is_its_member() -> None:
    model = settled(mlp(), 4)
    found, wanted = Ensemble([Predictive(model)])(X), Predictive(model)(X)
    assert torch.equal(found.probs, wanted.probs)
    assert torch.equal(found.expected_entropy, wanted.expected_entropy)


@pytest.mark.parametrize("nested", [False, True])
def test_ensembles_of_any_predictives_mix_all_their_draws(nested: bool) -> None:
    models = [settled(dropout_net(), 4, seed=seed) for seed in range(4)]
    members: list[Any] = [
        Predictive(models[0], fitted_quietly(models[0]), 5),
        MCDropout(models[1], 5),
        MCDropout(models[2], 5, fitted_quietly(models[2])),
        Predictive(models[3], fitted_quietly(models[3]), 5),
    ]
    ensemble = Ensemble([Ensemble(members[:2]), Ensemble(members[2:])]) if nested else Ensemble(members)
    source = seeded(6)
    alone = [member(X, generator=source, keep_draws=True).log_probs for member in members]
    found = ensemble(X, generator=seeded(6), keep_draws=True)
    assert found.log_probs is not None
    assert torch.equal(found.log_probs, torch.cat(alone))
    every = found.log_probs.double().exp()
    torch.testing.assert_close(found.probs.double(), every.mean(0), rtol=1e-5, atol=1e-6)
    expected = slow_entropy(every, axis=2).mean(0)
    torch.testing.assert_close(found.expected_entropy.double(), expected, rtol=1e-4, atol=1e-5)
    information = slow_entropy(every.mean(0)) - expected
    torch.testing.assert_close(found.mutual_information.double(), information, rtol=1e-3, atol=1e-5)
    assert ensemble(X).log_probs is None


def test_members_weigh_the_same_whatever_their_number_of_draws() -> None:
    one, two = settled(mlp(), 4, seed=1), settled(mlp(), 4, seed=2)
    posterior = fitted(two)
    many = Predictive(two, posterior, 30)(X, generator=seeded())
    found = Ensemble([Predictive(one), Predictive(two, posterior, 30)])(X, generator=seeded())
    torch.testing.assert_close(found.probs, (one(X).softmax(1) + many.probs) / 2)


def test_an_ensemble_never_passes_off_the_draws_of_some_members_as_those_of_all() -> None:
    one, two = settled(mlp(), 4, seed=1), settled(mlp(), 4, seed=2)
    found = Ensemble([Predictive(one, keep_draws=True), Predictive(two)])(X)
    assert found.log_probs is None or len(found.log_probs) == 2


def test_a_function_can_be_a_member() -> None:
    def uniform(x: Any, *, generator: torch.Generator | None = None, keep_draws: bool | None = None) -> Prediction:
        return Prediction(torch.full((len(x), 2), 0.5), torch.full((len(x),), 2.0).log())

    sure = settled(mlp(classes=2), 4)
    found = Ensemble([Predictive(sure), uniform])(X)
    torch.testing.assert_close(found.probs, (sure(X).softmax(1) + 0.5) / 2)


def test_an_ensemble_of_different_classes_is_refused() -> None:
    ensemble = Ensemble([Predictive(settled(mlp(), 4)), Predictive(settled(mlp(classes=4), 4))])
    with pytest.raises(ValueError, match=r"member 2 predicts \[7, 4\], those before it \[7, 3\]"):
        ensemble(X)


def test_an_empty_ensemble_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one member"):
        Ensemble([])


@pytest.mark.parametrize("member", [settled(mlp(), 4), None, torch.zeros(2, 3)])
def test_a_member_that_is_no_predictive_is_refused(member: Any) -> None:
    with pytest.raises(TypeError, match=r"expected predictives as members.*stochbn\.Predictive\(network\)"):
        Ensemble([Predictive(settled(mlp(), 4)), member])


# Refusals


@pytest.mark.parametrize("kind", [Predictive, MCDropout])
@pytest.mark.parametrize(
    ("draws", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError), ("3", TypeError)]
)
def test_a_number_of_draws_that_is_none_is_refused(kind: Any, draws: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="number of draws must be"):
        kind(settled(dropout_net(), 4), draws=draws)


@pytest.mark.parametrize("kind", [Predictive, MCDropout])
@pytest.mark.parametrize("generator", [0, "seed", torch.default_generator.get_state()])
def test_what_is_not_a_generator_is_refused(kind: Any, generator: Any) -> None:
    model = settled(dropout_net(), 4)
    with pytest.raises(TypeError, match=r"expected a torch\.Generator or None"):
        kind(model, posterior=fitted_quietly(model), draws=2)(X, generator=generator)
    with pytest.raises(TypeError, match=r"expected a torch\.Generator or None"):
        kind(model, posterior=fitted_quietly(model), draws=2, generator=generator)(X)


@pytest.mark.parametrize("network", [None, "model.pt", lambda x: x, mlp])
def test_what_is_not_a_network_is_refused(network: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        Predictive(network)


@pytest.mark.parametrize("posterior", ["posterior.safetensors", {}, 5, mlp()])
def test_what_is_not_a_posterior_is_refused(posterior: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a posterior from stochbn\.fit or stochbn\.load, got"):
        Predictive(settled(mlp(), 4), posterior)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (convnet(), "fitted to another network"),
        (mlp(hidden=5), "6 channels for layer '1', Sequential has 5"),
        (mlp().append(nn.BatchNorm1d(3)), "does not know"),
        (nn.Linear(4, 3), "no batch-norm layers"),
    ],
)
def test_the_posterior_of_another_network_is_refused(
    network: nn.Module, message: str, posterior: stochbn.Posterior
) -> None:
    with pytest.raises(ValueError, match=message):
        Predictive(network, posterior)
    with pytest.raises(ValueError, match=message):
        MCDropout(network.append(nn.Dropout()) if isinstance(network, nn.Sequential) else network, 5, posterior)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_network_output_that_is_not_finite_is_refused(bad: float, model: nn.Module) -> None:
    posterior = fitted(model)
    x = X.clone()
    x[2, 1] = float("nan")
    for predictive in (Predictive(model), Predictive(model, posterior, 3), Ensemble([Predictive(model)])):
        with pytest.raises(ValueError, match="not finite"):
            predictive(x)
    model.get_parameter("6.bias").data[0] = bad
    with pytest.raises(ValueError, match="not finite"):
        Predictive(model)(X)


def test_a_class_that_is_ruled_out_has_probability_0(model: nn.Module) -> None:
    model.get_parameter("6.bias").data[0] = -float("inf")
    found = Predictive(model, fitted(model), 4)(X)
    assert not found.probs[:, 0].any()
    torch.testing.assert_close(found.probs.sum(1), torch.ones(7))
    assert found.entropy.isfinite().all()
    assert found.mutual_information.isfinite().all()


@pytest.mark.parametrize(
    ("wrap", "place", "error", "message"),
    [
        (lambda y: y[:, :1], None, ValueError, r"K >= 2 classes.*\[7, 1\].*task=.binary. for one logit"),
        (lambda y: y[:, 0], None, ValueError, r"K >= 2 classes.*\[7\]"),
        (lambda y: y.argmax(1), None, TypeError, "floating-point tensor of logits.*int64"),
        (lambda y: {"scores": y}, None, ValueError, r"entries \['scores'\].*logits=<key, field or position>"),
        (lambda y: {"logits": y}, "scores", ValueError, "nothing at 'scores'"),
        (lambda y: (y,), 1, ValueError, "nothing at 1"),
        (lambda y: None, None, ValueError, "NoneType"),
    ],
)
def test_an_output_without_logits_is_refused(
    wrap: Callable[[Tensor], Any], place: Any, error: type[Exception], message: str, model: nn.Module
) -> None:
    wrapped = Wrapped(model, wrap)
    before = Untouched(wrapped)
    with pytest.raises(error, match=message):
        Predictive(wrapped, logits=place)(X)
    before.check()


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (normal(3, 5), RuntimeError, r"Sequential failed on an input of shape \[3, 5\]"),
        (normal(4), (RuntimeError, ValueError), r"Sequential failed on an input of shape \[4\]"),
        ((), ValueError, "empty tuple"),
        ("image.png", TypeError, "batch of type str"),
        ({"image": normal(3, 4)}, TypeError, "none of which is a tensor argument"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(
    batch: Any, error: Any, message: str, model: nn.Module, posterior: stochbn.Posterior
) -> None:
    before = Untouched(model)
    for predictive in (Predictive(model), Predictive(model, posterior, 3)):
        with pytest.raises(error, match=message):
            predictive(batch)
        before.check()


class Doubling(nn.Module):
    """Writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.bn(x.mul_(2)))
        return logits


def test_every_draw_sees_the_input_as_it_was_also_if_the_network_writes_to_it() -> None:
    model, x = Doubling(), normal(6, 4)
    posterior = stochbn.fit(model, [normal(64, 4)], batch_size=16)
    before = x.clone()
    predicted = Predictive(model, posterior, draws=5, generator=seeded(), tolerance=0)(x)
    assert torch.equal(x, before)
    slow, _, _ = slow_probs(model, posterior, 5, 0, before)
    torch.testing.assert_close(predicted.probs.double(), slow, rtol=1e-5, atol=1e-6)


# Weights that change, and what passes say of themselves


def test_a_posterior_of_other_weights_is_refused_unless_only_shapes_are_to_agree(posterior: stochbn.Posterior) -> None:
    other = settled(mlp(), 4, seed=5)
    with pytest.raises(ValueError, match=r"other weights.*check=\"shape\""):
        Predictive(other, posterior)
    with pytest.raises(ValueError, match="other weights"):
        MCDropout(other, 5, posterior)
    shaped = Predictive(other, posterior, 8, tolerance=0, check="shape")(X, generator=seeded())
    torch.testing.assert_close(shaped.probs.double(), slow_probs(other, posterior, 8, 0, X)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='check must be "weights" or "shape"'):
        Predictive(other, posterior, check="name")  # type: ignore[arg-type]


def test_weights_that_change_after_construction_are_used_with_one_warning(
    model: nn.Module, posterior: stochbn.Posterior
) -> None:
    predictive = Predictive(model, posterior, 8, tolerance=0)
    predictive(X)
    with torch.no_grad():
        model.get_parameter("3.weight").mul_(1.5)
    with pytest.warns(UserWarning, match="has changed since this predictive was made.*other weights") as caught:
        found = predictive(X, generator=seeded())
    assert caught[0].filename == __file__
    torch.testing.assert_close(found.probs.double(), slow_probs(model, posterior, 8, 0, X)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(predictive(X, generator=seeded()).probs, found.probs)  # warnings are errors


def test_buffers_that_the_user_changes_are_used(model: nn.Module) -> None:
    predictive = Predictive(model)
    before = predictive(X).probs
    model.get_buffer("1.running_mean").add_(1.0)
    torch.testing.assert_close(predictive(X).probs, model(X).softmax(1))
    assert not torch.allclose(predictive(X).probs, before)


def test_an_explanation_says_which_ways_are_taken_and_why_not_the_others(
    model: nn.Module, posterior: stochbn.Posterior
) -> None:
    lines = Predictive(model, posterior).explain(X).splitlines()
    assert lines[0] == "Passes run on a copy of the network that shares its parameters."
    assert "stacked: taken" in lines
    assert "channels_last: not taken: there are no two-dimensional convolutions in another layout" in lines
    exact = Predictive(model, posterior, tolerance=0, settings=Settings(bfloat16=True, weights=0))
    assert "bfloat16: not taken: it would round more" in exact.explain(X)
    mixing = Wrapped(model, lambda y: y - y.mean(0))
    fitted_mixing = stochbn.fit(mixing, [normal(48, 4, seed=9)], 6)
    assert "All examples go through the network together: a sum" in Predictive(mixing, fitted_mixing).explain(X)
    assert "too few draws" in Predictive(model, posterior, 3).explain(X)
    assert "there is one pass" in Predictive(model).explain(X)


def test_a_network_with_several_arguments_is_called_with_them() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = settled(mlp(), 4)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            out: Tensor = self.body(x + shift)
            return out

    model = Two()
    batches = [(normal(24, 4, seed=i), normal(24, 4, seed=i + 9), torch.zeros(24)) for i in range(2)]
    posterior = stochbn.fit(model, batches, 6, inputs=2)
    summed = stochbn.fit(model.body, [x + shift for x, shift, _ in batches], 6)
    torch.testing.assert_close(posterior.expected, summed.expected)
    shift = normal(len(X), 4, seed=7)
    found = Predictive(model, posterior, 8, inputs=2, tolerance=0)((X, shift), generator=seeded())
    wanted = Predictive(model.body, summed, 8, tolerance=0)(X + shift, generator=seeded())
    torch.testing.assert_close(found.probs, wanted.probs, rtol=1e-4, atol=1e-5)
    exact = Exact(model, batches, 4, 3, inputs=2)((X, shift))
    torch.testing.assert_close(exact.probs, Exact(model.body, [x + s for x, s, _ in batches], 4, 3)(X + shift).probs)


def test_a_predictive_can_be_copied_with_its_network(model: nn.Module, posterior: stochbn.Posterior) -> None:
    predictive = Predictive(model, posterior, 8)
    predictive(X)
    twin = copy.deepcopy(predictive)
    assert twin.model is not model
    assert torch.equal(twin(X, generator=seeded()).probs, predictive(X, generator=seeded()).probs)


def test_the_network_of_a_predictive_cannot_be_exchanged() -> None:
    model = settled(mlp(), 4)
    for predictive in (Predictive(model), stochbn.MCDropout(nn.Sequential(model, nn.Dropout(0.1)))):
        with pytest.raises(AttributeError, match="model"):
            predictive.model = mlp()  # type: ignore[misc]
    other = stochbn.fit(model, [normal(64, 4)], 8, kind="factorized")
    predictive = Predictive(model, None, 8)
    predictive.posterior = other
    assert not predictive(normal(3, 4)).probs.allclose(Predictive(model)(normal(3, 4)).probs)


@pytest.mark.parametrize("call", [lambda m: stochbn.fit(m, [normal(32, 4)], 8), Predictive])
def test_lazy_layers_without_a_shape_are_told(call: Any) -> None:
    model = nn.Sequential(nn.LazyLinear(5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"'0\.weight' of Sequential has no shape yet.*call the network once"):
        call(model)


def test_ways_that_are_not_taken_for_one_reason_are_told_together() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = settled(mlp(), 4)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(x)
            return logits - logits.mean(0)

    model = Centred().eval()
    lines = Predictive(model, stochbn.fit(model, [normal(64, 4)], 8)).explain(normal(20, 4)).splitlines()
    assert sum("not taken" in line for line in lines) == 1
    assert lines[-1].startswith("pieces, prefix, stacked, channels_last, bfloat16, compiled: not taken: examples stay")


# ---------------------------------------------------------------- loaders


@pytest.mark.parametrize("keep", [False, True])
def test_the_predictions_of_a_loader_are_those_of_its_batches(keep: bool) -> None:
    model = CASES["BatchNorm2d"].model()
    posterior = stochbn.fit(model, [CASES["BatchNorm2d"].inputs(48)], 8)
    x = CASES["BatchNorm2d"].inputs(7, seed=3)
    batches = [(x[:3], torch.zeros(3)), (x[3:6], torch.zeros(3)), (x[6:], torch.zeros(1))]
    predictive = stochbn.Predictive(model, posterior, draws=10)
    moves: list[tuple[int, int | None]] = []
    joined = predictive.predict(
        batches, generator=seeded(1), keep_draws=keep, progress=lambda *move: moves.append(move)
    )
    generator = seeded(1)
    expected = stochbn.Prediction.cat([predictive(batch, generator=generator, keep_draws=keep) for batch in batches])
    assert joined.probs.equal(expected.probs)
    assert joined.mutual_information.equal(expected.mutual_information)
    assert (joined.log_probs is not None) == keep
    assert moves == [(1, 3), (2, 3), (3, 3)]
    predictive.predict(iter(batches), progress=lambda *move: moves.append(move))
    assert moves[3:] == [(1, None), (2, None), (3, None)]


def test_a_loader_of_nothing_and_a_tensor_in_its_place_are_told() -> None:
    predictive = stochbn.Predictive(CASES["BatchNorm2d"].model())
    with pytest.raises(ValueError, match="there are no batches"):
        predictive.predict([])
    with pytest.raises(TypeError, match="expected an iterable of batches, such as a DataLoader, got Tensor"):
        predictive.predict(CASES["BatchNorm2d"].inputs(2))


def test_estimates_of_a_loader_are_joined() -> None:
    model = CASES["BatchNorm2d"].model()
    predictive = stochbn.Predictive(model, task="regression")
    x = CASES["BatchNorm2d"].inputs(5)
    assert torch.allclose(predictive.predict([x[:2], x[2:]]).mean, predictive(x).mean, atol=1e-6)


def test_settings_switch_ways_off(model: nn.Module, posterior: stochbn.Posterior) -> None:
    off = Predictive(model, posterior, settings=stochbn.Settings(ways=frozenset()))
    assert "it is switched off" in off.explain(X)
    assert ": taken" not in off.explain(X)
    with pytest.raises(TypeError, match=r"settings must be a stochbn\.Settings or None, got dict"):
        Predictive(model, posterior, settings={"ways": ()})  # type: ignore[arg-type]
