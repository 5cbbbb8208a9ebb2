from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import stochbn
from conftest import normal, seeded
from posterior_contract import DRAWS, PosteriorContract, about, drawn_entries, drawn_rows, entries, same, statistics
from stochbn.posteriors.joint import _shrinkage
from stochbn.posteriors.noise import sobol


class TestJoint(PosteriorContract):
    kind = "joint"


def joint(observed: Tensor, most: int | None = None, layers: Mapping[str, int] | None = None) -> stochbn.Joint:
    return stochbn.Joint.from_statistics(observed, most, **about(layers or observed.shape[2]))


def covariance(posterior: stochbn.Joint) -> Tensor:
    directions = posterior.directions.double()
    return directions.T @ directions + posterior.residual.diag()


def slow_covariance(rows: Tensor, shrinkage: float) -> Tensor:
    """``[P, P]``: the unbiased covariance of rows ``[M, P]``, shrunk towards its diagonal."""
    deviations = rows - rows.mean(0)
    found = deviations.T @ deviations / (len(rows) - 1)
    return (1 - shrinkage) * found + shrinkage * found.diag().diag()


def slow_shrinkage(rows: Tensor) -> float:
    """Schaefer and Strimmer (2005), equations 8 and 10 for correlations, pair by pair."""
    n = len(rows)
    z = [(column - column.mean()) / column.std(correction=1) for column in rows.T if column.std(correction=1) > 0]
    errors = squares = 0.0
    for i, j in itertools.permutations(range(len(z)), 2):
        w = z[i] * z[j]
        errors += (n / (n - 1) ** 3 * (w - w.mean()).square().sum()).item()
        squares += (n / (n - 1) * w.mean()).square().item()
    return min(max(errors / squares, 0.0), 1.0) if squares else 1.0


@given(m=st.integers(3, 25), size=st.integers(2, 7), common=st.floats(0, 3), seed=st.integers(0, 10**6))
def test_the_shrinkage_is_that_of_the_formula_pair_by_pair(m: int, size: int, common: float, seed: int) -> None:
    rows = normal(m, size, seed=seed, dtype=torch.float64)
    rows += common * normal(m, 1, seed=seed + 1, dtype=torch.float64)
    rows *= normal(size, seed=seed + 2, dtype=torch.float64).exp()
    rows -= rows.mean(0)
    found = _shrinkage(rows, rows.var(0, correction=1))
    assert found == pytest.approx(slow_shrinkage(rows), rel=1e-9, abs=1e-12)


def test_correlated_statistics_are_shrunk_little_and_independent_ones_a_lot() -> None:
    little, much = joint(statistics(40, 10, common=5)), joint(statistics(40, 10, common=0))
    assert 0 < little.shrinkage < 0.2
    assert 0.7 < much.shrinkage <= 1


@pytest.mark.parametrize("m", [1, 2])
def test_one_or_two_mini_batches_say_nothing_about_correlations(m: int) -> None:
    posterior = joint(statistics(m, 3))
    assert posterior.shrinkage == 1
    assert not posterior.directions.any()


@given(m=st.integers(2, 20), channels=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_the_covariance_of_a_joint_posterior_is_the_observed_one_shrunk(m: int, channels: int, seed: int) -> None:
    """Also where there are more mini-batches than entries, and the other way round."""
    observed = statistics(m, channels, seed)
    posterior = joint(observed)
    assert posterior.directions.shape == (min(m - 1, 2 * channels), 2 * channels)
    rows = entries(observed)
    assert posterior.shrinkage == pytest.approx(slow_shrinkage(rows) if m > 2 else 1, abs=1e-9)
    torch.testing.assert_close(posterior.location[:channels], rows.mean(0)[:channels], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(posterior.expected, observed.double().mean(0), rtol=1e-6, atol=1e-6)
    wanted = slow_covariance(rows, posterior.shrinkage)
    size = wanted.diag().sqrt()
    torch.testing.assert_close(covariance(posterior) / size / size[:, None], wanted / size / size[:, None],
                               rtol=1e-5, atol=1e-5)  # fmt: skip


@pytest.fixture(scope="module")
def observed() -> Tensor:
    return statistics(12, 5, seed=4, common=1.5)


def test_joint_draws_have_the_mean_and_covariance_of_the_posterior(observed: Tensor) -> None:
    posterior = joint(observed)
    assert 0.1 < posterior.shrinkage < 0.9, "both parts of the covariance should matter"
    rows = entries(observed)
    wanted = slow_covariance(rows, posterior.shrinkage)
    found = drawn_entries(posterior, DRAWS)
    size = wanted.diag().sqrt()
    assert ((found.mean(0) - posterior.location).abs() < 5 * size / DRAWS**0.5).all()
    correlation = wanted / size / size[:, None]
    errors = ((found.T.cov() - wanted) / size / size[:, None]).abs()
    assert (errors < 5 * ((1 + correlation.square()) / DRAWS).sqrt()).all()
    strongest = (correlation - torch.eye(10, dtype=torch.float64)).abs().max()
    assert strongest > 20 / DRAWS**0.5, "independent draws should not pass"


def test_joint_draws_are_normal_and_independent_of_each_other(observed: Tensor) -> None:
    """Kolmogorov's distance to the normal distribution function, at a level of about 1e-4 for each entry."""
    posterior = joint(observed)
    found = drawn_entries(posterior, DRAWS, seed=1)
    cdf = torch.special.ndtr(((found - posterior.location) / entries(observed).std(0)).sort(0).values)
    steps = torch.arange(DRAWS, dtype=torch.float64)[:, None] / DRAWS
    assert torch.maximum((cdf - steps).abs(), (cdf - steps - 1 / DRAWS).abs()).max() < 2.2 / DRAWS**0.5
    successive = torch.corrcoef(torch.cat([found[:-1], found[1:]], 1).T)[:10, 10:]
    assert successive.abs().max() < 5 / DRAWS**0.5


def test_layers_of_a_joint_draw_share_their_noise(observed: Tensor) -> None:
    layers = {"first": 2, "second": 3}
    found = joint(observed, layers=layers).draw(DRAWS, seeded())
    posterior = joint(observed)
    wanted = slow_covariance(entries(observed), posterior.shrinkage)
    size = wanted.diag().sqrt()
    wanted = (wanted / size / size[:, None])[:2, 2:5]
    assert wanted.abs().max() > 0.2
    both = torch.cat([found["first.running_mean"], found["second.running_mean"]], 1)
    assert (torch.corrcoef(both.T)[:2, 2:] - wanted).abs().max() < 5 / DRAWS**0.5


@given(
    m=st.integers(2, 20),
    channels=st.integers(1, 8),
    most=st.none() | st.integers(1, 25),
    seed=st.integers(0, 10**6),
)
def test_every_entry_keeps_its_observed_variance_whatever_is_left_out(
    m: int, channels: int, most: int | None, seed: int
) -> None:
    observed = statistics(m, channels, seed)
    posterior = joint(observed, most)
    assert len(posterior.directions) == min(m - 1, 2 * channels, m if most is None else most)
    found = posterior.directions.double().square().sum(0) + posterior.residual
    torch.testing.assert_close(found, entries(observed).var(0), rtol=1e-6, atol=1e-14)


def test_the_directions_that_are_kept_are_those_that_matter_most_to_normalised_activations() -> None:
    observed = statistics(15, 6, seed=2)
    every = joint(observed)
    deviations = entries(observed) - entries(observed).mean(0)
    weights = torch.cat([observed[:, 1].double().mean(0).rsqrt(), torch.full((6,), 0.5, dtype=torch.float64)])
    left, sizes, _ = torch.linalg.svd(deviations * weights, full_matrices=False)
    for k in (1, 3, 9):
        few = joint(observed, k)
        assert torch.equal(few.directions, every.directions[:k])
        found = (few.directions * weights).double()
        torch.testing.assert_close(
            found.square().sum(1), (1 - few.shrinkage) * sizes[:k].square() / 14, rtol=1e-5, atol=1e-9
        )
        wanted = left[:, :k].T @ deviations * ((1 - few.shrinkage) / 14) ** 0.5
        torch.testing.assert_close(few.directions.double().T @ few.directions.double(), wanted.T @ wanted,
                                   rtol=1e-4, atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("m", [7, 23, 50, 100])
@pytest.mark.parametrize("constant", [(0.0, 0.0), (0.3, 0.1), (-1.0, 1e-20)])
def test_channels_that_never_vary_change_nothing_for_the_others(m: int, constant: tuple[float, float]) -> None:
    """Not the shrinkage either: the rounding of their means is no correlation."""
    observed = statistics(m, 5, seed=m, common=2)
    rest = torch.tensor(constant)[:, None].expand(m, 2, 40)
    alone, beside = joint(observed), joint(torch.cat([observed, rest], 2))
    assert 0 < alone.shrinkage < 1
    assert beside.shrinkage == pytest.approx(alone.shrinkage, rel=1e-9)
    live = torch.cat([torch.arange(5), torch.arange(45, 50)])
    torch.testing.assert_close(covariance(beside)[live][:, live], covariance(alone), rtol=1e-5, atol=1e-7)
    found = drawn_rows(beside, 5)[:, :, 5:]
    assert torch.equal(found[0], found[4]), "what never varied is not noise"
    torch.testing.assert_close(found[0, 0], torch.full((40,), constant[0], dtype=torch.float64))
    torch.testing.assert_close(found[0, 1], torch.full((40,), constant[1], dtype=torch.float64), rtol=1e-6, atol=1e-37)


def test_a_channel_that_is_dead_in_some_mini_batches_has_a_finite_spread() -> None:
    observed = statistics(30, 4)
    observed[::3, 1, 2] = 0
    posterior = joint(observed)
    rows = observed[:, 1, 2].double()
    assert posterior.expected[1, 2].item() == pytest.approx(rows.mean().item())
    found = posterior.directions.double().square().sum(0) + posterior.residual
    assert found[6].item() == pytest.approx(math.log1p(rows.var().item() / rows.mean().item() ** 2), rel=1e-6)
    others = [0, 1, 2, 3, 4, 5, 7]
    torch.testing.assert_close(found[others], entries(observed).var(0)[others], rtol=1e-6, atol=1e-14)
    drawn = posterior.draw(50, seeded())
    assert all(values.isfinite().all() for values in drawn.values())
    assert (drawn["norm.running_var"] > 0).all()


def test_a_channel_that_is_constant_in_mini_batches_and_differs_between_them_spoils_no_other() -> None:
    """Its mean varies and its variance is 0, so in its own standard deviations it varies without bound."""
    observed = statistics(20, 5, seed=8)
    odd = torch.zeros(20, 2, 1)
    odd[:, 0, 0] = normal(20, seed=9)
    posterior = joint(torch.cat([observed, odd], 2))
    rows = torch.cat([observed[:, 0], odd[:, 0], observed[:, 1].log()], 1).double()
    varying = torch.arange(11)
    wanted = slow_covariance(rows, posterior.shrinkage)
    torch.testing.assert_close(covariance(posterior)[varying][:, varying], wanted, rtol=1e-5, atol=1e-6)


def test_dead_channels_of_a_real_network_do_not_break_a_joint_posterior() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3))
    model.get_parameter("0.weight").data[1] = 0
    model.get_parameter("0.bias").data[1] = -1
    posterior = stochbn.fit(model, [normal(96, 4)], 8, centre="observed")
    assert posterior.expected[1, 1] < 1e-37
    drawn = posterior.draw(9, seeded())
    assert not drawn["2.running_mean"][:, 1].any()
    assert (drawn["2.running_var"][:, 1] < 1e-37).all()
    assert len(set(drawn["2.running_var"][:, 0].tolist())) == 9


def test_a_joint_posterior_without_directions_comes_back_from_a_file(tmp_path: Path) -> None:
    posterior = joint(statistics(1, 3))
    assert len(posterior.directions) == 0
    posterior.save(tmp_path / "p")
    same(stochbn.load(tmp_path / "p"), posterior)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", torch.zeros(5, dtype=torch.float64), r"location must be float64 \[10\] for 5 channels"),
        ("location", torch.zeros(10), r"location must be float64"),
        ("location", torch.full((10,), math.nan, dtype=torch.float64), "location must be finite"),
        ("directions", torch.zeros(3, 9), r"directions must be float32 \[any, 10\] for 5 channels"),
        ("directions", torch.zeros(10), r"directions must be float32 \[any, 10\]"),
        ("directions", torch.zeros(3, 10, dtype=torch.float64), "directions must be float32"),
        ("directions", torch.full((3, 10), math.inf), "directions must be finite"),
        ("residual", torch.full((10,), -1.0, dtype=torch.float64), "residual must be finite and not negative"),
        ("residual", torch.zeros(11, dtype=torch.float64), r"residual must be float64 \[10\]"),
    ],
)
def test_tensors_that_no_posterior_has_are_refused(key: str, value: Tensor, message: str) -> None:
    changes: dict[str, Any] = {key: value}
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(joint(statistics(12, 5)), **changes)


@pytest.mark.parametrize("dimensions", [1, 2, 17, 64])
def test_sobol_points_are_scrambled_as_pytorch_scrambles_them(dimensions: int) -> None:
    for seed in (0, 5, 2**31 - 1):
        generator = seeded(seed)
        points = [next(sobol(dimensions, generator, torch.device("cpu"))) for _ in range(2)][1]
        again = seeded(seed)
        torch.randint(2**31, (), generator=again)
        inner = int(torch.randint(2**31, (), generator=again))
        engine = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=inner)  # type: ignore[no-untyped-call]
        assert torch.equal(points, torch.special.ndtri(engine.draw(8, dtype=torch.float64) + 2.0**-31))
