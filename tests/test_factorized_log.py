from __future__ import annotations

import math

import pytest
import torch

import stochbn
from conftest import CASES, seeded
from posterior_contract import PosteriorContract, drawn_entries, observations, statistics
from stochbn.posteriors import KINDS
from stochbn.posteriors.factorized_log import FLOOR


class TestFactorizedLog(PosteriorContract):
    kind = "factorized-log"
    dead = FLOOR * (1 + 1e-9)


def posterior_of(observed: torch.Tensor) -> stochbn.FactorizedLog:
    accumulator = KINDS["factorized-log"].accumulator()
    for observation in observations(observed):
        accumulator.update(observation)
    posterior = accumulator.posterior(batch_size=16, dtype=torch.float64)
    assert isinstance(posterior, stochbn.FactorizedLog)
    return posterior


def test_its_moments_are_those_of_means_and_of_logarithms_of_variances() -> None:
    observed = statistics(12, 5).double()
    posterior = posterior_of(observed)
    logarithms = (observed[:, 1] + FLOOR).log()
    torch.testing.assert_close(posterior.mean_mean, observed[:, 0].mean(0))
    torch.testing.assert_close(posterior.mean_variance, observed[:, 0].var(0))
    torch.testing.assert_close(posterior.log_mean, logarithms.mean(0))
    torch.testing.assert_close(posterior.log_variance, logarithms.var(0))


def test_draws_are_independent_normal_means_and_log_variances() -> None:
    posterior = posterior_of(statistics(12, 3).double())
    n = 20_000
    rows = drawn_entries(posterior, n)
    center = torch.cat([posterior.mean_mean, posterior.log_mean])
    spread = torch.cat([posterior.mean_variance, posterior.log_variance]).sqrt()
    standard = (rows - center) / spread
    assert (standard.mean(0).abs() < 5 / n**0.5).all()
    assert ((standard.var(0) - 1).abs() < 5 * (2 / n) ** 0.5).all()
    assert (torch.corrcoef(standard.T) - torch.eye(6)).abs().max() < 5 / n**0.5
    cdf = torch.special.ndtr(standard.sort(0).values)
    steps = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    assert (cdf - steps).abs().max() < 2.2 / n**0.5


def test_the_median_has_no_noise_and_geometric_means_of_the_variances() -> None:
    observed = statistics(12, 4).double()
    posterior = posterior_of(observed)
    for drawn in posterior.median().iter_draws(3, seeded()):
        torch.testing.assert_close(drawn["norm.running_mean"], observed[:, 0].mean(0))
        torch.testing.assert_close(drawn["norm.running_var"], (observed[:, 1] + FLOOR).log().mean(0).exp())
    assert posterior.median().batch_size == math.inf
    assert (posterior.median().expected[1] < posterior.expected[1]).all()


def test_a_channel_that_is_always_dead_is_drawn_as_what_is_added_to_every_variance() -> None:
    observed = statistics(9, 2).double()
    observed[:, 1, 0] = 0
    drawn = posterior_of(observed).draw(5, seeded())["norm.running_var"]
    torch.testing.assert_close(drawn[:, 0], torch.full((5,), FLOOR, dtype=torch.float64))


def test_it_differs_from_moments_of_the_variance_where_variances_are_not_lognormal() -> None:
    observed = statistics(400, 1).double()
    observed[:, 1, 0] = torch.where(torch.arange(400) % 100 == 0, 50.0, 1.0)
    logarithmic = posterior_of(observed)
    assert logarithmic.expected[1, 0] == pytest.approx(1.04 * math.exp(logarithmic.log_variance[0] / 2), rel=0.01)
    assert observed[:, 1, 0].mean() == pytest.approx(1.49)


def test_fit_makes_one() -> None:
    case = CASES["never called"]
    posterior = stochbn.fit(case.model(), [case.inputs(48)], 8, kind="factorized-log")
    assert isinstance(posterior, stochbn.FactorizedLog)
    assert stochbn.Predictive(case.model(), posterior, 4, check="shape")(case.inputs(3)).probs.isfinite().all()
