from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import stochbn
from conftest import CASES, Case, fit_factorized, make_posterior, normal, seeded
from posterior_contract import PosteriorContract, running

VECTORS = ("mean_mean", "mean_variance", "variance_mean", "variance_variance")


class TestFactorized(PosteriorContract):
    kind = "factorized"


def fitted(case: Case) -> stochbn.Factorized:
    return fit_factorized(case.model(), [case.inputs(48)], 8)


DRAWS = 20_000


@pytest.fixture(scope="module")
def drawn() -> dict[str, Tensor]:
    return make_posterior().draw(DRAWS, seeded(3))


def test_drawn_means_have_the_mean_and_variance_of_the_posterior(drawn: dict[str, Tensor]) -> None:
    posterior, means = make_posterior(), drawn["norm.running_mean"]
    sigma = posterior.mean_variance.sqrt()
    assert ((means.mean(0) - posterior.mean_mean).abs() < 5 * sigma / DRAWS**0.5).all()
    error = posterior.mean_variance * (2 / DRAWS) ** 0.5
    assert ((means.var(0) - posterior.mean_variance).abs() < 5 * error).all()


def test_drawn_variances_have_the_mean_and_variance_of_the_posterior(drawn: dict[str, Tensor]) -> None:
    posterior, variances = make_posterior(), drawn["norm.running_var"]
    error = (posterior.variance_variance / DRAWS).sqrt()
    assert ((variances.mean(0) - posterior.variance_mean).abs() < 5 * error).all()
    w = 1 + posterior.variance_variance / posterior.variance_mean.square()
    excess = w**4 + 2 * w**3 + 3 * w**2 - 6  # of a LogNormal's kurtosis
    error = posterior.variance_variance * ((2 + excess) / DRAWS).sqrt()
    assert ((variances.var(0) - posterior.variance_variance).abs() < 5 * error).all()


def test_means_are_normal_and_variances_lognormal(drawn: dict[str, Tensor]) -> None:
    """Kolmogorov's distance to the closed-form distribution function, at a level of about 1e-4."""
    posterior = make_posterior()
    s2 = torch.log1p(posterior.variance_variance / posterior.variance_mean.square())
    for values, center, spread in (
        (drawn["norm.running_mean"], posterior.mean_mean, posterior.mean_variance.sqrt()),
        (drawn["norm.running_var"].log(), posterior.variance_mean.log() - s2 / 2, s2.sqrt()),
    ):
        cdf = torch.special.ndtr(((values - center) / spread).sort(0).values)
        steps = torch.arange(DRAWS, dtype=torch.float64)[:, None] / DRAWS
        distance = torch.maximum((cdf - steps).abs(), (cdf - steps - 1 / DRAWS).abs()).max()
        assert distance < 2.2 / DRAWS**0.5


def test_all_channels_means_and_variances_are_independent_of_each_other(drawn: dict[str, Tensor]) -> None:
    columns = torch.cat([drawn["norm.running_mean"], drawn["norm.running_var"].log()], dim=1)
    correlation = torch.corrcoef(columns.T) - torch.eye(6, dtype=torch.float64)
    assert correlation.abs().max() < 5 / DRAWS**0.5
    successive = torch.corrcoef(torch.cat([columns[:-1], columns[1:]], dim=1).T)[:6, 6:]
    assert successive.abs().max() < 5 / DRAWS**0.5


def test_draws_have_the_names_shapes_and_type_of_the_networks_buffers(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        model = case.model().to(dtype)
        state = model.state_dict()
        drawn = fit_factorized(model, [case.inputs(24, dtype=dtype)], 8).draw(5, seeded())
        assert drawn
        for name, values in drawn.items():
            assert name.endswith(("running_mean", "running_var"))
            assert values.shape == (5, *state[name].shape)
            assert values.dtype == dtype
            assert values.isfinite().all()


def test_every_observed_layer_is_drawn_and_no_skipped_one() -> None:
    drawn = fitted(CASES["never called"]).draw(2)
    assert sorted(drawn) == ["norm.running_mean", "norm.running_var"]


def test_every_layer_is_drawn_around_its_own_moments() -> None:
    posterior = make_posterior(
        {"a": 1, "b": 2}, mean_mean=[1, 10, 100], mean_variance=[1e-6] * 3, variance_mean=[2, 20, 200],
        variance_variance=[1e-6] * 3,
    )  # fmt: skip
    drawn = posterior.draw(3, seeded())
    wanted = {"a.running_mean": [1.0], "a.running_var": [2.0], "b.running_mean": [10.0, 100.0]}
    for name, values in {**wanted, "b.running_var": [20.0, 200.0]}.items():
        assert (drawn[name] - torch.tensor(values)).abs().max() < 0.01


@given(n=st.integers(1, 6), m=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_draws_are_reproducible_and_a_prefix_of_more_draws(n: int, m: int, seed: int) -> None:
    posterior = make_posterior()
    few, more = posterior.draw(n, seeded(seed)), posterior.draw(n + m, seeded(seed))
    source = seeded(seed)
    first, rest = posterior.draw(n, source), posterior.draw(m, source)
    one_by_one = list(posterior.iter_draws(n, seeded(seed)))
    assert len(one_by_one) == n
    for name, values in more.items():
        assert torch.equal(few[name], values[:n])
        assert torch.equal(torch.cat([first[name], rest[name]]), values)
        assert torch.equal(torch.stack([row[name] for row in one_by_one]), values[:n])
        assert not torch.equal(values[0], values[1])


def test_another_seed_draws_something_else() -> None:
    posterior = make_posterior()
    assert not torch.equal(
        posterior.draw(1, seeded(1))["norm.running_mean"], posterior.draw(1, seeded(2))["norm.running_mean"]
    )


def test_the_global_generator_is_left_alone_when_one_is_given_and_used_when_none_is() -> None:
    posterior = make_posterior()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        state = torch.get_rng_state()
        posterior.draw(3, seeded())
        assert torch.equal(torch.get_rng_state(), state)
        first = posterior.draw(3)["norm.running_var"]
        assert not torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(5)
        assert torch.equal(posterior.draw(3)["norm.running_var"], first)


@given(
    mean=st.floats(0, 1e6),
    ratio=st.floats(0, 1e6),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_variances_are_never_negative_and_always_finite(
    mean: float, ratio: float, seed: int, dtype: torch.dtype
) -> None:
    """n values that are not negative have a variance of at most n times the square of their mean."""
    posterior = make_posterior(
        {"n": 1},
        mean_mean=[0],
        mean_variance=[0],
        variance_mean=[mean],
        variance_variance=[ratio * mean * mean],
        dtype=dtype,
    )
    values = posterior.draw(20, seeded(seed))["n.running_var"]
    assert (values >= 0).all()
    assert values.isfinite().all()
    if mean == 0:
        assert not values.any()


@pytest.mark.parametrize("mean", [1e-30, 1e-100, 1e-170, 1e-300])
def test_tiny_variances_are_drawn_in_their_own_scale(mean: float) -> None:
    """Their square is no longer a number of float64."""
    spread = (0.1 * mean) * (0.1 * mean)
    posterior = make_posterior(
        {"n": 1}, mean_mean=[0], mean_variance=[0], variance_mean=[mean], variance_variance=[spread]
    )
    values = posterior.draw(20, seeded())["n.running_var"] / mean
    assert ((values > 0.5) & (values < 2)).all()


def test_dead_channels_are_drawn_as_exactly_zero_and_others_are_not() -> None:
    posterior = make_posterior(
        mean_mean=[0, 0, 1], mean_variance=[0, 0, 1], variance_mean=[0, 2, 2], variance_variance=[0, 1, 0]
    )
    drawn = posterior.draw(50, seeded())
    assert torch.equal(drawn["norm.running_var"][:, 0], torch.zeros(50, dtype=torch.float64))
    assert torch.equal(drawn["norm.running_mean"][:, :2], torch.zeros(50, 2, dtype=torch.float64))
    assert len(set(drawn["norm.running_var"][:, 1].tolist())) == 50
    assert torch.equal(drawn["norm.running_var"][:, 2], torch.full((50,), 2.0, dtype=torch.float64))
    assert len(set(drawn["norm.running_mean"][:, 2].tolist())) == 50


def test_dead_channels_of_a_real_network_are_drawn_as_zero() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3))
    model.get_parameter("0.weight").data[1] = 0
    model.get_parameter("0.bias").data[1] = -1
    drawn = fit_factorized(model, [normal(64, 4)], 8).draw(9, seeded())
    for values in drawn.values():
        assert not values[:, 1].any()
        assert len(set(values[:, 0].tolist())) == 9


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, "at least 1, got 0"),
        (-1, ValueError, "at least 1, got -1"),
        (2.0, TypeError, r"whole number, got 2\.0"),
        ("3", TypeError, "whole number"),
        (True, TypeError, "whole number"),
        (None, TypeError, "whole number"),
    ],
)
def test_a_number_of_draws_that_is_none_is_refused(n: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_posterior().draw(n)
    with pytest.raises(error, match=message):
        next(make_posterior().iter_draws(n))


@pytest.mark.parametrize("key", VECTORS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_moments_that_no_distribution_has_are_refused(key: str, bad: float) -> None:
    values = {key: [0.5, bad, 0.5]}
    if key == "mean_mean" and bad == -1:
        assert make_posterior(mean_mean=values[key]).mean_mean[1] == -1
        return
    with pytest.raises(ValueError, match=f"{key} must be finite"):
        make_posterior(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", VECTORS)
def test_moments_of_the_wrong_length_are_refused(key: str) -> None:
    values = {key: [0.5, 0.5]}
    with pytest.raises(ValueError, match=f"{key} must be float64 \\[3\\] for 3 channels"):
        make_posterior(**values)  # type: ignore[arg-type]


def test_a_posterior_of_skipped_layers_is_recentred_on_the_others() -> None:
    case = CASES["never called"]
    model = case.model()
    moved = fit_factorized(model, [case.inputs(24)], 6).recentre(model)
    assert list(moved.layers) == ["norm"]
    torch.testing.assert_close(moved.expected, running(model, ["norm"]))
