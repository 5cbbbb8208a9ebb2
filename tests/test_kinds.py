"""The kinds of posterior beside the paper's, joint and empirical, and what all kinds can: rescale and recentre."""

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
from conftest import CASES, Case, fit_factorized, make_posterior, mlp, normal, seeded, settled
from stochbn.posteriors import _shrinkage

KINDS = ("factorized", "joint", "empirical")
DRAWS = 6_000


def statistics(m: int, channels: int, seed: int = 0, common: float = 0.7) -> Tensor:
    """``[M, 2, C]``, float32: correlated means and log-variances, as mini-batches of about 16 objects have them."""
    shared = common * normal(m, 1, 1, seed=seed + 1) * normal(1, 2, channels, seed=seed + 2)
    noise = shared + normal(m, 2, channels, seed=seed)
    scale = normal(channels, seed=seed + 3).exp()
    return torch.stack([noise[:, 0] * scale + 1, (0.3 * noise[:, 1]).exp() * 20 * scale**2], 1)


def about(layers: Mapping[str, int] | int, **changes: Any) -> dict[str, Any]:
    layers = {"norm": layers} if isinstance(layers, int) else layers
    return {"layers": layers, "batch_size": 16, "mini_batches": 9, "dtype": torch.float64, **changes}


def joint(observed: Tensor, most: int | None = None, layers: Mapping[str, int] | None = None) -> stochbn.Joint:
    return stochbn.Joint.from_statistics(observed, most, **about(layers or observed.shape[2]))


def empirical(observed: Tensor, layers: Mapping[str, int] | None = None) -> stochbn.Empirical:
    return stochbn.Empirical.from_statistics(observed, **about(layers or observed.shape[2]))


def entries(observed: Tensor) -> Tensor:
    """``[M, 2 C]``, float64: means and log-variances."""
    return torch.cat([observed[:, 0].double(), observed[:, 1].double().log()], 1)


def drawn_entries(posterior: stochbn.Posterior, n: int, seed: int = 0) -> Tensor:
    """``[n, 2 D]``: what is drawn, means and log-variances, of all layers one after another."""
    drawn = posterior.draw(n, seeded(seed))
    means = [drawn[f"{layer}.running_mean"] for layer in posterior.layers]
    variances = [drawn[f"{layer}.running_var"].log() for layer in posterior.layers]
    return torch.cat([*means, *variances], 1)


def drawn_rows(posterior: stochbn.Posterior, n: int, seed: int = 0) -> Tensor:
    """``[n, 2, D]``: what is drawn, as the statistics of an empirical posterior are stored."""
    drawn = posterior.draw(n, seeded(seed))
    means = torch.cat([drawn[f"{layer}.running_mean"] for layer in posterior.layers], 1)
    return torch.stack([means, torch.cat([drawn[f"{layer}.running_var"] for layer in posterior.layers], 1)], 1)


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


# Joint


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
@pytest.mark.filterwarnings("ignore:only one mini-batch")
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
    posterior = stochbn.fit(model, [normal(96, 4)], 8)
    assert posterior.expected[1, 1] < 1e-37
    drawn = posterior.draw(9, seeded())
    assert not drawn["2.running_mean"][:, 1].any()
    assert (drawn["2.running_var"][:, 1] < 1e-37).all()
    assert len(set(drawn["2.running_var"][:, 0].tolist())) == 9


# Empirical


@given(m=st.integers(1, 9), n=st.integers(1, 25), seed=st.integers(0, 10**6))
@pytest.mark.filterwarnings("ignore:only one mini-batch")
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


# All kinds


def of_kind(kind: str, observed: Tensor, layers: Mapping[str, int] | None = None) -> stochbn.Posterior:
    if kind == "joint":
        return joint(observed, layers=layers)
    if kind == "empirical":
        return empirical(observed, layers=layers)
    rows = observed.double()
    mean, spread = rows.mean(0), rows.var(0)
    return make_posterior(
        layers or {"norm": observed.shape[2]}, mean_mean=mean[0].tolist(), mean_variance=spread[0].tolist(),
        variance_mean=mean[1].tolist(), variance_variance=spread[1].tolist(),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_draws_average_to_what_is_expected(kind: str, observed: Tensor) -> None:
    posterior = of_kind(kind, observed)
    n = 12 * 400
    drawn = drawn_rows(posterior, n)
    errors = 1e-9 if kind == "empirical" else 5 * drawn.std(0) / n**0.5
    assert ((drawn.mean(0) - posterior.expected).abs() < errors).all()


@pytest.mark.parametrize("kind", KINDS)
@given(n=st.integers(1, 6), m=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_draws_of_every_kind_are_a_prefix_of_more_draws(kind: str, n: int, m: int, seed: int) -> None:
    posterior = of_kind(kind, statistics(12, 3))
    few, more = posterior.draw(n, seeded(seed)), posterior.draw(n + m, seeded(seed))
    for name, values in more.items():
        assert torch.equal(few[name], values[:n])
        assert not torch.equal(values[0], values[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_global_generator_is_left_alone_when_one_is_given_and_used_when_none_is(kind: str) -> None:
    posterior = of_kind(kind, statistics(12, 3))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        state = torch.get_rng_state()
        posterior.draw(3, seeded())
        assert torch.equal(torch.get_rng_state(), state)
        first = posterior.draw(3)["norm.running_var"]
        assert not torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(5)
        assert torch.equal(posterior.draw(3)["norm.running_var"], first)


def same(one: stochbn.Posterior, other: stochbn.Posterior) -> None:
    assert type(one) is type(other)
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, Tensor):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs), field.name
        else:
            assert mine == theirs, field.name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [4, 2.5, math.inf])
def test_a_rescaled_posterior_with_a_temperature_comes_back_from_a_file(
    kind: str, size: float, observed: Tensor, tmp_path: Path
) -> None:
    posterior = of_kind(kind, observed, {"b": 3, "a": 2}).rescale(size)
    posterior = dataclasses.replace(posterior, temperature=1.7, skipped=("c",))
    posterior.save(tmp_path / "p")
    loaded = stochbn.load(tmp_path / "p")
    same(loaded, posterior)
    assert loaded.temperature == 1.7
    assert loaded.batch_size == size
    assert list(loaded.layers) == ["b", "a"]


@pytest.mark.filterwarnings("ignore:only one mini-batch")
def test_a_joint_posterior_without_directions_comes_back_from_a_file(tmp_path: Path) -> None:
    posterior = joint(statistics(1, 3))
    assert len(posterior.directions) == 0
    posterior.save(tmp_path / "p")
    same(stochbn.load(tmp_path / "p"), posterior)


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("joint", "location", torch.zeros(5, dtype=torch.float64), r"location must be float64 \[10\] for 5 channels"),
        ("joint", "location", torch.zeros(10), r"location must be float64"),
        ("joint", "location", torch.full((10,), math.nan, dtype=torch.float64), "location must be finite"),
        ("joint", "directions", torch.zeros(3, 9), r"directions must be float32 \[any, 10\] for 5 channels"),
        ("joint", "directions", torch.zeros(10), r"directions must be float32 \[any, 10\]"),
        ("joint", "directions", torch.zeros(3, 10, dtype=torch.float64), "directions must be float32"),
        ("joint", "directions", torch.full((3, 10), math.inf), "directions must be finite"),
        ("joint", "residual", torch.full((10,), -1.0, dtype=torch.float64), "residual must be finite and not negative"),
        ("joint", "residual", torch.zeros(11, dtype=torch.float64), r"residual must be float64 \[10\]"),
        ("empirical", "statistics", torch.zeros(3, 2, 6), r"statistics must be float32 \[any, 2, 5\] for 5 channels"),
        ("empirical", "statistics", torch.zeros(3, 1, 5), r"statistics must be float32 \[any, 2, 5\]"),
        ("empirical", "statistics", torch.zeros(2, 5), r"statistics must be float32 \[any, 2, 5\]"),
        ("empirical", "statistics", torch.zeros(3, 2, 5, dtype=torch.float64), "statistics must be float32"),
        ("empirical", "statistics", torch.zeros(0, 2, 5), "at least one mini-batch"),
        ("empirical", "statistics", torch.full((3, 2, 5), math.nan), "statistics must be finite"),
        ("empirical", "statistics", torch.full((3, 2, 5), -1.0), "no negative variances"),
    ],
)
def test_tensors_that_no_posterior_has_are_refused(
    kind: str, key: str, value: Tensor, message: str, observed: Tensor
) -> None:
    changes: dict[str, Any] = {key: value}
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(of_kind(kind, observed), **changes)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_a_temperature_that_is_none_is_refused(kind: str, temperature: float, observed: Tensor) -> None:
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        dataclasses.replace(of_kind(kind, observed), temperature=temperature)


# Rescaling


def spread(posterior: stochbn.Posterior) -> Tensor:
    """``[2, D]``: the variances of the means and of the log-variances, from the posterior's own tensors."""
    if isinstance(posterior, stochbn.Joint):
        return (posterior.directions.double().square().sum(0) + posterior.residual).view(2, -1)
    if isinstance(posterior, stochbn.Empirical):
        rows = entries(posterior.statistics)
        return rows.var(0, correction=0).view(2, -1)
    assert isinstance(posterior, stochbn.Factorized)
    log_variance = torch.log1p(posterior.variance_variance / posterior.variance_mean.square())
    return torch.stack([posterior.mean_variance, log_variance])


@pytest.mark.parametrize("kind", KINDS)
@given(size=st.floats(0.5, 1000), seed=st.integers(0, 1000))
def test_the_variances_of_means_and_log_variances_are_in_proportion_to_one_over_the_size(
    kind: str, size: float, seed: int
) -> None:
    posterior = of_kind(kind, statistics(12, 4, seed))
    other = posterior.rescale(size)
    assert other.batch_size == size
    assert posterior.batch_size == 16
    torch.testing.assert_close(spread(other), 16 / size * spread(posterior), rtol=1e-3, atol=1e-10)
    scale = posterior.expected.abs() + spread(other)[0].sqrt()
    torch.testing.assert_close(other.expected / scale, posterior.expected / scale, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [4, 16, 100])
def test_the_draws_of_a_rescaled_posterior_have_its_spread_and_its_centre(
    kind: str, size: int, observed: Tensor
) -> None:
    posterior = of_kind(kind, observed)
    n = 12 * 400
    rows, wanted = drawn_rows(posterior.rescale(size), n), 16 / size * spread(posterior).flatten()
    found = torch.cat([rows[:, 0], rows[:, 1].log()], 1)
    tolerance = 1e-3 if kind == "empirical" else 5 * (2 / n) ** 0.5
    assert (found.var(0) / wanted - 1).abs().max() < tolerance
    errors = 1e-5 if kind == "empirical" else 5 * rows.std(0) / n**0.5
    assert ((rows.mean(0) - posterior.expected).abs() < errors).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_keeps_correlations(kind: str, observed: Tensor) -> None:
    posterior = of_kind(kind, observed)
    few, many = (torch.corrcoef(drawn_entries(p, 2400, seed=2).T) for p in (posterior, posterior.rescale(3)))
    torch.testing.assert_close(few, many, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_without_limit_to_the_mini_batches_there_is_no_noise(kind: str, observed: Tensor) -> None:
    posterior = of_kind(kind, observed)
    still = posterior.rescale(math.inf)
    assert still.batch_size == math.inf
    drawn = drawn_rows(still, 20)
    assert torch.equal(drawn, drawn[:1].expand_as(drawn))
    torch.testing.assert_close(drawn[0], posterior.expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_twice_is_rescaling_once_to_the_last_size(kind: str, observed: Tensor) -> None:
    posterior = of_kind(kind, observed)
    once, twice = posterior.rescale(40), posterior.rescale(3).rescale(40)
    assert twice.batch_size == 40
    torch.testing.assert_close(drawn_rows(twice, 20), drawn_rows(once, 20), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(drawn_rows(posterior, 20), drawn_rows(once, 20), rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_to_its_own_size_changes_nothing(kind: str, observed: Tensor) -> None:
    posterior = of_kind(kind, observed)
    torch.testing.assert_close(drawn_rows(posterior.rescale(16), 20), drawn_rows(posterior, 20), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_keeps_all_else(kind: str, observed: Tensor) -> None:
    posterior = dataclasses.replace(of_kind(kind, observed, {"a": 4, "b": 1}), temperature=2.0, skipped=("c",))
    other = posterior.rescale(8)
    assert type(other) is type(posterior)
    for name in ("layers", "mini_batches", "dtype", "skipped", "temperature"):
        assert getattr(other, name) == getattr(posterior, name)


@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_and_recentring_take_dead_channels(kind: str) -> None:
    """Channels that were dead in all mini-batches, and for the kinds that have rows, in some."""
    observed = statistics(12, 3)
    observed[:, :, 0] = 0
    observed[::4, 1, 2] = 0
    posterior = of_kind(kind, observed, {"0": 3})
    model = settled(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), 3)
    for size in (1, 4, 64, math.inf):
        other = posterior.rescale(size)
        drawn = drawn_rows(other, 20)
        assert drawn.isfinite().all()
        assert not drawn[:, 0, 0].any()
        assert (drawn[:, 1, 0] < 1e-37).all()
        torch.testing.assert_close(other.expected, posterior.expected, rtol=1e-5, atol=1e-6)
        moved = other.recentre(model)
        torch.testing.assert_close(moved.expected, running(model, ["0"]), rtol=1e-6, atol=1e-6)
        assert drawn_rows(moved, 20).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, -1, -math.inf, math.nan])
def test_a_size_that_is_not_positive_is_refused(kind: str, size: float, observed: Tensor) -> None:
    with pytest.raises(ValueError, match="batch_size must be a positive number"):
        of_kind(kind, observed).rescale(size)


@pytest.mark.parametrize("kind", KINDS)
def test_a_posterior_of_unknown_or_infinite_size_cannot_be_rescaled(kind: str, observed: Tensor) -> None:
    posterior = of_kind(kind, observed)
    with pytest.raises(ValueError, match="the size whose noise it has is not known"):
        dataclasses.replace(posterior, batch_size=None).rescale(4)
    for size in (4, math.inf):
        with pytest.raises(ValueError, match="rescaled to no noise, which cannot be undone"):
            posterior.rescale(math.inf).rescale(size)


# Recentring


def running(model: nn.Module, layers: Any) -> Tensor:
    """``[2, D]``, float64: the running means and variances of layers."""
    means = [model.get_buffer(f"{layer}.running_mean") for layer in layers]
    variances = [model.get_buffer(f"{layer}.running_var") for layer in layers]
    return torch.stack([torch.cat(means), torch.cat(variances)]).double()


def fitted(kind: str, model: nn.Module, case: Case) -> stochbn.Posterior:
    return stochbn.fit(model, [1.3 * case.inputs(48, seed=9) + 0.2], 6, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_recentred_without_noise_predictions_are_the_plain_networks(case: Case, kind: str) -> None:
    model, x = case.model(), case.inputs(6, seed=5)
    posterior = fitted(kind, model, case)
    moved = posterior.recentre(model)
    wanted = running(model, posterior.layers)
    assert not torch.allclose(posterior.expected, wanted, rtol=1e-2)
    torch.testing.assert_close(moved.expected, wanted, rtol=1e-5, atol=1e-6)
    for still in (moved.rescale(math.inf), posterior.rescale(math.inf).recentre(model)):
        found = stochbn.Predictive(model, still, 3)(x)
        torch.testing.assert_close(found.probs, stochbn.Predictive(model)(x).probs, rtol=1e-5, atol=1e-6)
    off = stochbn.Predictive(model, posterior.rescale(math.inf), 1)(x).probs
    assert not torch.allclose(off, stochbn.Predictive(model)(x).probs, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_recentring_keeps_the_spread_and_all_else(kind: str) -> None:
    case = CASES["BatchNorm2d"]
    model = case.model()
    posterior = dataclasses.replace(fitted(kind, model, case), temperature=1.5)
    moved = posterior.recentre(model)
    torch.testing.assert_close(spread(moved), spread(posterior), rtol=1e-4, atol=1e-9)
    for name in ("layers", "mini_batches", "dtype", "skipped", "temperature", "batch_size"):
        assert getattr(moved, name) == getattr(posterior, name)
    before, after = drawn_entries(posterior, 16, seed=3), drawn_entries(moved, 16, seed=3)
    shift = after - before
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=1e-4, atol=1e-4)
    assert shift[0].abs().min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_recentring_leaves_the_posterior_as_it_was(kind: str) -> None:
    case = CASES["BatchNorm2d"]
    model = case.model()
    posterior = fitted(kind, model, case)
    before = posterior.expected.clone()
    moved = posterior.recentre(model)
    wanted = moved.expected.clone()
    for buffer in model.buffers():
        buffer.zero_()
    assert torch.equal(posterior.expected, before)
    assert torch.equal(moved.expected, wanted), "it does not share memory with the network"


@pytest.mark.parametrize("kind", KINDS)
def test_a_posterior_is_not_recentred_on_another_network(kind: str) -> None:
    case = CASES["BatchNorm1d [N, C]"]
    with pytest.raises(ValueError, match="6 channels for layer '1', Sequential has 7"):
        fitted(kind, case.model(), case).recentre(mlp(hidden=7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("buffer", "bad"), [("1.running_mean", math.nan), ("4.running_var", math.inf), ("4.running_var", -0.1)]
)
def test_broken_running_statistics_are_refused(kind: str, buffer: str, bad: float) -> None:
    case = CASES["BatchNorm1d [N, C]"]
    model = case.model()
    posterior = fitted(kind, model, case)
    model.get_buffer(buffer)[2] = bad
    with pytest.raises(ValueError, match="running statistics of Sequential are not finite, or have negative variances"):
        posterior.recentre(model)


def test_a_posterior_of_skipped_layers_is_recentred_on_the_others() -> None:
    case = CASES["never called"]
    model = case.model()
    moved = fit_factorized(model, [case.inputs(24)], 6).recentre(model)
    assert list(moved.layers) == ["norm"]
    torch.testing.assert_close(moved.expected, running(model, ["norm"]))
