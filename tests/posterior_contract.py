"""What every kind of posterior can; the test class of each kind inherits it."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import stochbn
from conftest import CASES, Case, mlp, normal, seeded, settled
from stochbn.posteriors import KINDS, Accumulator

for_every_kind = settings(suppress_health_check=[HealthCheck.differing_executors])
DRAWS = 6_000


def statistics(m: int, channels: int, seed: int = 0, common: float = 0.7) -> Tensor:
    """``[M, 2, C]``, float32: correlated means and log-variances, as mini-batches of about 16 examples have them."""
    shared = common * normal(m, 1, 1, seed=seed + 1) * normal(1, 2, channels, seed=seed + 2)
    noise = shared + normal(m, 2, channels, seed=seed)
    scale = normal(channels, seed=seed + 3).exp()
    return torch.stack([noise[:, 0] * scale + 1, (0.3 * noise[:, 1]).exp() * 20 * scale**2], 1)


def about(layers: Mapping[str, int] | int, **changes: Any) -> dict[str, Any]:
    layers = {"norm": layers} if isinstance(layers, int) else layers
    return {"layers": layers, "batch_size": 16, "mini_batches": 9, "dtype": torch.float64, **changes}


def observations(observed: Tensor, layers: Mapping[str, int] | None = None) -> list[dict[str, Tensor]]:
    """Statistics ``[M, 2, D]`` as an accumulator takes them: a call of every layer in every mini-batch."""
    layers = {"norm": observed.shape[2]} if layers is None else layers
    parts = torch.split(observed.double()[:, None], list(layers.values()), dim=3)
    return [{name: part[i] for name, part in zip(layers, parts, strict=True)} for i in range(len(observed))]


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


def same(one: stochbn.Posterior, other: stochbn.Posterior) -> None:
    assert type(one) is type(other)
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, Tensor):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs), field.name
        else:
            assert mine == theirs, field.name


def nearly_same(one: stochbn.Posterior, other: stochbn.Posterior) -> None:
    """Equal, but for the rounding of moments that were added up in another order."""
    if isinstance(one, stochbn.Factorized | stochbn.FactorizedLog):
        for name in one._tensors():
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-12, atol=1e-12)
        names = one._tensors()
        if one.observed is not None:
            torch.testing.assert_close(one.observed, other.observed, rtol=1e-12, atol=1e-12)
            names = [*names, "observed"]
        other = dataclasses.replace(other, **{name: getattr(one, name) for name in names})
    same(one, other)


def spread(posterior: stochbn.Posterior) -> Tensor:
    """``[2, D]``: the variances of the means and of the log-variances, from the posterior's own tensors."""
    if isinstance(posterior, stochbn.Joint):
        return (posterior.directions.double().square().sum(0) + posterior.residual).view(2, -1)
    if isinstance(posterior, stochbn.Empirical):
        rows = entries(posterior.statistics)
        return rows.var(0, correction=0).view(2, -1)
    if isinstance(posterior, stochbn.FactorizedLog):
        return torch.stack([posterior.mean_variance, posterior.log_variance])
    assert isinstance(posterior, stochbn.Factorized)
    log_variance = torch.log1p(posterior.variance_variance / posterior.variance_mean.square())
    return torch.stack([posterior.mean_variance, log_variance])


def running(model: nn.Module, layers: Any) -> Tensor:
    """``[2, D]``, float64: the running means and variances of layers."""
    means = [model.get_buffer(f"{layer}.running_mean") for layer in layers]
    variances = [model.get_buffer(f"{layer}.running_var") for layer in layers]
    return torch.stack([torch.cat(means), torch.cat(variances)]).double()


class PosteriorContract:
    """What every kind can. A kind's test class names it."""

    kind: str
    dead = 1e-37
    """At most what a channel's variance is drawn as that was 0 in every mini-batch."""
    replays = False
    """Whether draws are observed mini-batches without replacement, so that full cycles average exactly."""

    def accumulator(self, most: int = 512) -> Accumulator[Any]:
        kind = KINDS[self.kind]
        bounded = "max_batches" in inspect.signature(kind.accumulator).parameters
        return kind.accumulator(**({"max_batches": most} if bounded else {}))

    def make(self, observed: Tensor, layers: Mapping[str, int] | None = None) -> Any:
        """The posterior of statistics ``[M, 2, D]``."""
        accumulator = self.accumulator()
        for observation in observations(observed, layers):
            accumulator.update(observation)
        return accumulator.posterior(batch_size=16, dtype=torch.float64)

    def fitted(self, model: nn.Module, case: Case) -> Any:
        return stochbn.fit(model, [1.3 * case.inputs(48, seed=9) + 0.2], 6, self.kind, centre="observed")

    @pytest.fixture
    def observed(self) -> Tensor:
        return statistics(12, 5, seed=4, common=1.5)

    def test_draws_average_to_what_is_expected(self, observed: Tensor) -> None:
        posterior = self.make(observed)
        n = 12 * 400
        drawn = drawn_rows(posterior, n)
        errors = 1e-9 if self.replays else 5 * drawn.std(0) / n**0.5
        assert ((drawn.mean(0) - posterior.expected).abs() < errors).all()

    @for_every_kind
    @given(n=st.integers(1, 6), m=st.integers(1, 20), seed=st.integers(0, 2**31))
    def test_draws_of_every_kind_are_a_prefix_of_more_draws(self, n: int, m: int, seed: int) -> None:
        posterior = self.make(statistics(12, 3))
        few, more = posterior.draw(n, seeded(seed)), posterior.draw(n + m, seeded(seed))
        for name, values in more.items():
            assert torch.equal(few[name], values[:n])
            assert not torch.equal(values[0], values[1])

    def test_the_global_generator_is_left_alone_when_one_is_given_and_used_when_none_is(self) -> None:
        posterior = self.make(statistics(12, 3))
        with torch.random.fork_rng():
            torch.manual_seed(5)
            state = torch.get_rng_state()
            posterior.draw(3, seeded())
            assert torch.equal(torch.get_rng_state(), state)
            first = posterior.draw(3)["norm.running_var"]
            assert not torch.equal(torch.get_rng_state(), state)
            torch.manual_seed(5)
            assert torch.equal(posterior.draw(3)["norm.running_var"], first)

    @pytest.mark.parametrize("size", [4, 2.5, math.inf])
    def test_a_rescaled_posterior_with_a_temperature_comes_back_from_a_file(
        self, size: float, observed: Tensor, tmp_path: Path
    ) -> None:
        posterior = self.make(observed, {"b": 3, "a": 2}).rescale(size)
        posterior = dataclasses.replace(posterior, temperature=1.7, skipped={"c": "not called"})
        posterior.save(tmp_path / "p")
        loaded = stochbn.load(tmp_path / "p")
        same(loaded, posterior)
        assert loaded.temperature == 1.7
        assert loaded.batch_size == size
        assert list(loaded.layers) == ["b", "a"]

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
    def test_a_temperature_that_is_none_is_refused(self, temperature: float, observed: Tensor) -> None:
        with pytest.raises(ValueError, match="temperature must be a positive number"):
            dataclasses.replace(self.make(observed), temperature=temperature)

    # Rescaling

    @for_every_kind
    @given(size=st.floats(0.5, 1000), seed=st.integers(0, 1000))
    def test_the_variances_of_means_and_log_variances_are_in_proportion_to_one_over_the_size(
        self, size: float, seed: int
    ) -> None:
        posterior = self.make(statistics(12, 4, seed))
        other = posterior.rescale(size)
        assert other.batch_size == size
        assert posterior.batch_size == 16
        torch.testing.assert_close(spread(other), 16 / size * spread(posterior), rtol=1e-3, atol=1e-10)
        scale = posterior.expected.abs() + spread(other)[0].sqrt()
        torch.testing.assert_close(other.expected / scale, posterior.expected / scale, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("size", [4, 16, 100])
    def test_the_draws_of_a_rescaled_posterior_have_its_spread_and_its_centre(
        self, size: int, observed: Tensor
    ) -> None:
        posterior = self.make(observed)
        n = 12 * 400
        rows, wanted = drawn_rows(posterior.rescale(size), n), 16 / size * spread(posterior).flatten()
        found = torch.cat([rows[:, 0], rows[:, 1].log()], 1)
        tolerance = 1e-3 if self.replays else 5 * (2 / n) ** 0.5
        assert (found.var(0) / wanted - 1).abs().max() < tolerance
        errors = 1e-5 if self.replays else 5 * rows.std(0) / n**0.5
        assert ((rows.mean(0) - posterior.expected).abs() < errors).all()

    def test_rescaling_keeps_correlations(self, observed: Tensor) -> None:
        posterior = self.make(observed)
        few, many = (torch.corrcoef(drawn_entries(p, 2400, seed=2).T) for p in (posterior, posterior.rescale(3)))
        torch.testing.assert_close(few, many, rtol=0, atol=1e-4)

    def test_without_limit_to_the_mini_batches_there_is_no_noise(self, observed: Tensor) -> None:
        posterior = self.make(observed)
        still = posterior.rescale(math.inf)
        assert still.batch_size == math.inf
        drawn = drawn_rows(still, 20)
        assert torch.equal(drawn, drawn[:1].expand_as(drawn))
        torch.testing.assert_close(drawn[0], posterior.expected, rtol=1e-6, atol=1e-6)

    def test_rescaling_twice_is_rescaling_once_to_the_last_size(self, observed: Tensor) -> None:
        posterior = self.make(observed)
        once, twice = posterior.rescale(40), posterior.rescale(3).rescale(40)
        assert twice.batch_size == 40
        torch.testing.assert_close(drawn_rows(twice, 20), drawn_rows(once, 20), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(drawn_rows(posterior, 20), drawn_rows(once, 20), rtol=1e-2)

    def test_rescaling_to_its_own_size_changes_nothing(self, observed: Tensor) -> None:
        posterior = self.make(observed)
        torch.testing.assert_close(
            drawn_rows(posterior.rescale(16), 20), drawn_rows(posterior, 20), rtol=1e-6, atol=1e-6
        )

    def test_rescaling_keeps_all_else(self, observed: Tensor) -> None:
        posterior = dataclasses.replace(
            self.make(observed, {"a": 4, "b": 1}), temperature=2.0, skipped={"c": "not called"}
        )
        other = posterior.rescale(8)
        assert type(other) is type(posterior)
        for name in ("layers", "mini_batches", "dtype", "skipped", "temperature"):
            assert getattr(other, name) == getattr(posterior, name)

    def test_rescaling_and_recentring_take_dead_channels(self) -> None:
        """Channels that were dead in all mini-batches, and for the kinds that have rows, in some."""
        observed = statistics(12, 3)
        observed[:, :, 0] = 0
        observed[::4, 1, 2] = 0
        posterior = self.make(observed, {"0": 3})
        model = settled(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), 3)
        for size in (1, 4, 64, math.inf):
            other = posterior.rescale(size)
            drawn = drawn_rows(other, 20)
            assert drawn.isfinite().all()
            assert not drawn[:, 0, 0].any()
            assert (drawn[:, 1, 0] <= self.dead).all()
            torch.testing.assert_close(other.expected, posterior.expected, rtol=1e-5, atol=1e-6)
            moved = other.recentre(model)
            torch.testing.assert_close(moved.expected, running(model, ["0"]), rtol=1e-6, atol=1e-6)
            assert drawn_rows(moved, 20).isfinite().all()

    @pytest.mark.parametrize("size", [0, -1, -math.inf, math.nan])
    def test_a_size_that_is_not_positive_is_refused(self, size: float, observed: Tensor) -> None:
        with pytest.raises(ValueError, match="batch_size must be a positive number"):
            self.make(observed).rescale(size)

    def test_a_posterior_of_unknown_size_cannot_be_rescaled(self, observed: Tensor) -> None:
        posterior = self.make(observed)
        with pytest.raises(ValueError, match="the size of mini-batches whose noise it had is not known"):
            dataclasses.replace(posterior, batch_size=None).rescale(4)
        still = dataclasses.replace(posterior, batch_size=math.inf, fitted_size=None)  # of an earlier release
        with pytest.raises(ValueError, match="has no noise, and the size of mini-batches whose noise it had"):
            still.rescale(4)

    @pytest.mark.parametrize("first", [4, 100])
    def test_no_noise_remembers_the_noise_that_there_was(self, first: float, observed: Tensor, tmp_path: Path) -> None:
        posterior = self.make(observed)
        still = posterior.rescale(first).rescale(math.inf)
        still.save(tmp_path / "p")
        for none in (still, still.rescale(math.inf), stochbn.load(tmp_path / "p")):
            torch.testing.assert_close(
                drawn_rows(none.rescale(8), 20), drawn_rows(posterior.rescale(8), 20), rtol=1e-4, atol=1e-5
            )

    def test_what_was_fitted_comes_back_after_a_choice(self, observed: Tensor) -> None:
        posterior = self.make(observed)
        for size in (2, 16, math.inf):
            chosen = dataclasses.replace(posterior.rescale(size), temperature=2.0, choice="it is the best")
            again = chosen.fitted()
            assert (again.batch_size, again.temperature, again.choice) == (16, 1.0, "")
            torch.testing.assert_close(drawn_rows(again, 20), drawn_rows(posterior, 20), rtol=1e-4, atol=1e-5)
            assert repr(again) == repr(posterior)

    # Recentring

    def test_recentred_without_noise_predictions_are_the_plain_networks(self, case: Case) -> None:
        model, x = case.model(), case.inputs(6, seed=5)
        posterior = self.fitted(model, case)
        moved = posterior.recentre(model)
        wanted = running(model, posterior.layers)
        assert not torch.allclose(posterior.expected, wanted, rtol=1e-2)
        torch.testing.assert_close(moved.expected, wanted, rtol=1e-5, atol=1e-6)
        for still in (moved.rescale(math.inf), posterior.rescale(math.inf).recentre(model)):
            found = stochbn.Predictive(model, still, 3)(x)
            torch.testing.assert_close(found.probs, stochbn.Predictive(model)(x).probs, rtol=1e-5, atol=1e-6)
        off = stochbn.Predictive(model, posterior.rescale(math.inf), 1)(x).probs
        assert not torch.allclose(off, stochbn.Predictive(model)(x).probs, rtol=1e-3)

    def test_the_centre_goes_there_and_back(self, tmp_path: Path) -> None:
        case = CASES["BatchNorm2d"]
        model = case.model()
        posterior = self.fitted(model, case)
        moved = posterior.recentre(model)
        moved.save(tmp_path / "p")
        assert (posterior.centre, moved.centre) == ("observed", "running")
        for one in (moved, stochbn.load(tmp_path / "p"), moved.rescale(4).recentre(model).rescale(math.inf)):
            back = one.recentre_observed()
            assert back.centre == "observed"
            torch.testing.assert_close(back.expected, posterior.expected, rtol=1e-5, atol=1e-6)
        assert posterior.recentre_observed() is posterior
        same(stochbn.load(tmp_path / "p"), moved)

    def test_fit_has_the_running_statistics_as_its_centre(self, case: Case) -> None:
        """So without noise a prediction is the plain network's."""
        model, x = case.model(), case.inputs(6, seed=5)
        posterior = stochbn.fit(model, [1.3 * case.inputs(48, seed=9) + 0.2], 6, self.kind)
        assert posterior.centre == "running"
        torch.testing.assert_close(posterior.expected, running(model, posterior.layers), rtol=1e-5, atol=1e-6)
        wanted = self.fitted(model, case)
        torch.testing.assert_close(posterior.recentre_observed().expected, wanted.expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(spread(posterior), spread(wanted), rtol=1e-4, atol=1e-9)
        found = stochbn.Predictive(model, posterior.rescale(math.inf), 50)(x)
        torch.testing.assert_close(found.probs, stochbn.Predictive(model)(x).probs, rtol=1e-5, atol=1e-6)

    def test_a_layer_without_usable_running_statistics_has_the_observed_ones(self) -> None:
        case = CASES["BatchNorm2d"]
        model = case.model()
        wanted = self.fitted(model, case)
        first, second, *others = wanted.layers
        model.get_buffer(f"{first}.running_mean")[0] = math.nan
        model.get_buffer(f"{second}.running_var")[0] = -1
        found = stochbn.fit(model, [1.3 * case.inputs(48, seed=9) + 0.2], 6, self.kind)
        assert found.centre == ("running" if others else "observed")
        sizes = list(found.layers.values())
        parts, observed = (torch.split(p.expected, sizes, dim=1) for p in (found, wanted))
        for name, part, own in zip(found.layers, parts, observed, strict=True):
            centre = own if name in (first, second) else running(model, [name])
            torch.testing.assert_close(part, centre, rtol=1e-5, atol=1e-6)

    def test_recentring_keeps_the_spread_and_all_else(self) -> None:
        case = CASES["BatchNorm2d"]
        model = case.model()
        posterior = dataclasses.replace(self.fitted(model, case), temperature=1.5)
        moved = posterior.recentre(model)
        torch.testing.assert_close(spread(moved), spread(posterior), rtol=1e-4, atol=1e-9)
        for name in ("layers", "mini_batches", "dtype", "skipped", "temperature", "batch_size"):
            assert getattr(moved, name) == getattr(posterior, name)
        before, after = drawn_entries(posterior, 16, seed=3), drawn_entries(moved, 16, seed=3)
        shift = after - before
        torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=1e-4, atol=1e-4)
        assert shift[0].abs().min() > 1e-3

    def test_recentring_leaves_the_posterior_as_it_was(self) -> None:
        case = CASES["BatchNorm2d"]
        model = case.model()
        posterior = self.fitted(model, case)
        before = posterior.expected.clone()
        moved = posterior.recentre(model)
        wanted = moved.expected.clone()
        for buffer in model.buffers():
            buffer.zero_()
        assert torch.equal(posterior.expected, before)
        assert torch.equal(moved.expected, wanted), "it does not share memory with the network"

    def test_a_posterior_is_not_recentred_on_another_network(self) -> None:
        case = CASES["BatchNorm1d [N, C]"]
        with pytest.raises(ValueError, match="6 channels for layer '1', Sequential has 7"):
            self.fitted(case.model(), case).recentre(mlp(hidden=7))

    @pytest.mark.parametrize(
        ("buffer", "bad"), [("1.running_mean", math.nan), ("4.running_var", math.inf), ("4.running_var", -0.1)]
    )
    def test_broken_running_statistics_are_refused(self, buffer: str, bad: float) -> None:
        case = CASES["BatchNorm1d [N, C]"]
        model = case.model()
        posterior = self.fitted(model, case)
        model.get_buffer(buffer)[2] = bad
        with pytest.raises(
            ValueError, match="running statistics of Sequential are not finite, or have negative variances"
        ):
            posterior.recentre(model)

    # Quasi-random draws

    def test_each_quasi_random_draw_has_the_distribution_of_an_independent_one(self, observed: Tensor) -> None:
        """Kolmogorov's distance between the two, entry by entry, at a level of about 1e-4 for each."""
        posterior, n, source = self.make(observed), 1600, seeded(4)
        independent = drawn_entries(posterior, n)
        quasi = []
        for _ in range(n // 16):
            rows = list(posterior.iter_draws(16, source, quasi=True))
            quasi += [torch.cat([row["norm.running_mean"], row["norm.running_var"].log()]) for row in rows]
        for one, other in zip(independent.T, torch.stack(quasi).T, strict=True):
            values = torch.cat([one, other]).sort().values
            below = [torch.searchsorted(part.sort().values, values, right=True) / n for part in (one, other)]
            assert (below[0] - below[1]).abs().max() < 2.2 * (2 / n) ** 0.5

    def test_means_over_quasi_random_draws_vary_as_little_as_the_kind_says(self, observed: Tensor) -> None:
        posterior, source, n, times = self.make(observed), seeded(1), 8, 400

        def means(quasi: bool) -> Tensor:
            """``[times, D]``: of a function of the drawn means that is neither even nor linear."""
            found = []
            for _ in range(times):
                rows = [row["norm.running_mean"] for row in posterior.iter_draws(n, source, quasi=quasi)]
                found.append(((torch.stack(rows) - center) / scale + 1).sigmoid().mean(0))
            return torch.stack(found)

        center, scale = posterior.expected[0], spread(posterior)[0].sqrt()
        gain = means(False).var(0).mean() / means(True).var(0).mean()
        assert gain > 0.8 * posterior.quasi_gain

    # Accumulators

    def settings(self) -> dict[str, Any]:
        return {"batch_size": 16, "dtype": torch.float64, "skipped": {"c": "not called"}}

    def accumulated(self, rows: list[dict[str, Tensor]], most: int = 512, rank: int = 0) -> Accumulator[Any]:
        found = self.accumulator(most)
        found.process = rank
        for row in rows:
            found.update(row)
        return found

    @for_every_kind
    @given(m=st.integers(2, 24), most=st.sampled_from([6, 512]), seed=st.integers(0, 10**6), mix=st.randoms())
    def test_accumulators_of_several_processes_give_the_posterior_of_one_in_any_order(
        self, m: int, most: int, seed: int, mix: Any
    ) -> None:
        rows = observations(statistics(m, 4, seed), {"a": 1, "b": 3})

        def joined(rows: list[Any]) -> Any:
            parts = [self.accumulated(rows[rank::3], most, rank) for rank in range(3)]
            while len(parts) > 1:
                mix.shuffle(parts)
                parts.append(parts.pop().merge(parts.pop()))
            assert parts[0].seen == m
            assert parts[0].layers == {"a": 1, "b": 3}
            return parts[0].posterior(**self.settings())

        one, whole = joined(rows), self.accumulated(rows, most).posterior(**self.settings())
        nearly_same(one, whole)
        assert one.mini_batches == m
        shuffled = list(rows)
        mix.shuffle(shuffled)
        other = joined(shuffled)
        torch.testing.assert_close(other.expected, whole.expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(spread(other), spread(whole), rtol=1e-6, atol=1e-12)

    def test_merging_with_an_empty_accumulator_changes_nothing(self) -> None:
        rows = observations(statistics(9, 4), {"a": 1, "b": 3})
        whole = self.accumulated(rows)
        wanted = whole.posterior(**self.settings())
        for merged in (whole.merge(self.accumulator()), self.accumulator().merge(whole)):
            same(merged.posterior(**self.settings()), wanted)

    def test_it_is_shown_in_one_line(self) -> None:
        posterior = self.accumulated(observations(statistics(9, 4), {"a": 1, "b": 3})).posterior(**self.settings())
        name = type(posterior).__name__
        of = "4 channels in 2 layers, from 9 mini-batches"
        noise = "the noise of mini-batches of 16 about the observed statistics"
        assert repr(posterior) == f"<{name}: {of}; {noise}, temperature 1>"
        still = posterior.rescale(math.inf)
        assert repr(still) == f"<{name}: {of}; no noise, the observed statistics, temperature 1>"
        plain = dataclasses.replace(still, centre="running")
        assert repr(plain) == f"<{name}: {of}; no noise: the plain network, temperature 1>"

    def test_merging_leaves_both_as_they_were(self) -> None:
        rows = observations(statistics(9, 4))
        one, other = self.accumulated(rows[:5]), self.accumulated(rows[5:])
        wanted = [part.posterior(**self.settings()) for part in (one, other)]
        one.merge(other).update(rows[0])
        for part, before in zip((one, other), wanted, strict=True):
            same(part.posterior(**self.settings()), before)
        assert (one.seen, other.seen) == (5, 4)

    def test_what_was_never_added_to_has_no_posterior(self) -> None:
        for empty in (self.accumulator(), self.accumulator().merge(self.accumulator())):
            assert not empty.layers
            with pytest.raises(ValueError, match="no mini-batch was added in which a layer was called"):
                empty.posterior(**self.settings())

    def test_a_posterior_knows_what_it_is_of(self) -> None:
        rows = observations(statistics(9, 4), {"b": 1, "a": 3})
        found = self.accumulated(rows, 4).posterior(**self.settings())
        assert found.kind == self.kind
        assert list(found.layers.items()) == [("b", 1), ("a", 3)]
        assert found.mini_batches == 9
        assert list(found.skipped) == ["c"]
