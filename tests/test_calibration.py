"""Choosing the noise of a posterior and a temperature by held-out data."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stochbn
from conftest import (
    ByName,
    Case,
    Failing,
    Untouched,
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
)
from stochbn import Predictive, calibrate
from stochbn.calibration import TEMPERATURES
from stochbn.calibration_report import Choice, Option, Totals, Tried

KINDS = ("factorized", "joint", "empirical")
Batches = list[tuple[Tensor, Tensor]]


class Scaled(nn.Module):
    """A network with its logits times a number."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network = network
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.factor * self.network(x)
        return out


def labelled(model: nn.Module, x: Tensor, temperature: float = 1.0, seed: int = 0) -> Tensor:
    """Labels drawn from the plain network's probabilities at a temperature, which is the best one therefore."""
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(x.clone()) / temperature
    flat = logits.movedim(1, -1).flatten(0, -2).softmax(1)
    drawn = torch.multinomial(flat, 1, generator=seeded(seed))
    return drawn.view(len(x), *logits.shape[2:])


@pytest.fixture
def model() -> nn.Module:
    return settled(mlp(), 4)


def held_out(model: nn.Module, sizes: tuple[int, ...] = (40, 25, 7), temperature: float = 1.0) -> Batches:
    parts = [1.5 * normal(n, 4, seed=50 + n) + 0.5 for n in sizes]
    return [(x, labelled(model, x, temperature, seed=len(x))) for x in parts]


def fitted(model: nn.Module, kind: str = "joint") -> stochbn.Posterior:
    """About the running averages, from which labels are drawn."""
    return stochbn.fit(model, [1.5 * normal(160, 4, seed=9) + 0.5], 8, kind).recentre(model)


def slow_loss(
    model: nn.Module,
    posterior: stochbn.Posterior,
    batches: Batches,
    draws: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> float:
    """The mean NLL in float64 from kept draws: batch i is predicted with a generator of seed + i."""
    losses = []
    for number, (x, y) in enumerate(batches):
        found = Predictive(model, posterior, draws)(x, generator=seeded(seed + number), keep_draws=True)
        assert found.log_probs is not None
        logits = found.log_probs.double() / temperature  # log-probabilities are logits, up to a constant
        probs = logits.softmax(2).mean(0)
        losses.append(-probs.gather(1, y[:, None]).log().flatten())
    return torch.cat(losses).mean().item()


class Way(NamedTuple):
    """A way to predict, by the slow search: the losses of all examples at each temperature, ``[T, N]``."""

    centre: str
    size: float
    passes: int
    losses: Tensor

    @property
    def best(self) -> Tensor:
        return self.losses[int(self.losses.mean(1).argmin())]


def slow_ways(
    model: nn.Module,
    posterior: stochbn.Posterior,
    batches: Batches,
    draws: int,
    temperatures: list[float],
    seed: int = 0,
    sizes: list[float] | None = None,
) -> list[Way]:
    """Every way that `calibrate` may choose, simplest first, from kept draws in float64."""
    plain = posterior.recentre(model).rescale(math.inf)
    ways: list[tuple[str, stochbn.Posterior, int]] = [("", plain, 1)]
    centres = [posterior] if sizes is not None else [posterior.recentre(model), posterior.recentre_observed()]
    for centre in centres:
        kept = [size for size in sizes or [2, 4, 8, 16, 32, math.inf] if size != math.inf or centre is not centres[0]]
        ways += [(centre.centre, centre.rescale(size), 1 if size == math.inf else draws) for size in kept]
    found = []
    for name, noise, passes in ways:
        rows = []
        for number, (x, y) in enumerate(batches):
            drawn = Predictive(model, noise, passes)(x, generator=seeded(seed + number), keep_draws=True).log_probs
            assert drawn is not None
            probs = torch.stack([(drawn.double() / t).softmax(2).mean(0) for t in temperatures])
            rows.append(-probs.gather(2, y[None, :, None].expand(len(temperatures), -1, 1)).log()[..., 0])
        assert noise.batch_size is not None
        found.append(Way(name, noise.batch_size, passes, torch.cat(rows, 1)))
    unscaled = found[0].losses[temperatures.index(1.0)][None]
    return [found[0]._replace(losses=unscaled), *(found if len(temperatures) > 1 else found[1:])]


def slow_choice(ways: list[Way]) -> Way:
    """The simplest of those within one standard error of the best; with a temperature before those without."""
    best = min(ways, key=lambda way: way.best.mean().item())
    simple = [way for way in ways if way.passes == 1]
    if not simple[1].centre:  # it has a temperature
        simple[:2] = simple[1::-1]
    for centre in ("running", "observed"):
        drawing = [way for way in ways if way.passes > 1 and way.centre == centre]
        simple += [min(drawing, key=lambda way: way.best.mean().item())] if drawing else []
    for way in simple:
        more = way.best - best.best
        margin = more.mean().item() - (more.std() / len(more) ** 0.5).item()
        assert abs(margin) > 1e-6 or way is best, "the choice should be clear, or rounding decides the test"
        if margin < 0 or way is best:
            return way
    raise AssertionError("the best is as good as itself")


# The choice


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("true_temperature", "examples"), [(0.5, 70), (1.0, 70), (4.0, 70), (4.0, 1000)])
@pytest.mark.parametrize("temperature", [False, True])
def test_the_choice_is_that_of_a_slow_search(
    kind: str, true_temperature: float, examples: int, temperature: bool, model: nn.Module
) -> None:
    posterior = stochbn.fit(model, [1.7 * normal(160, 4, seed=9) + 0.2], 8, kind)
    batches = held_out(model, (examples - 25, 25), true_temperature)
    temperatures = TEMPERATURES.tolist() if temperature else [1.0]
    ways = slow_ways(model, posterior, batches, 5, temperatures, seed=7)
    wanted = slow_choice(ways)
    choice = reported(model, posterior, batches, draws=5, seed=7, temperature=temperature)
    chosen = choice.chosen
    assert (chosen.centre, chosen.batch_size, chosen.passes) == (wanted.centre, wanted.size, wanted.passes)
    assert chosen.mean == pytest.approx(wanted.best.mean().item(), rel=1e-5)
    options = [one for one in choice.options if one.selectable]
    assert len(options) == len(ways) == 12 + temperature
    for one, way in zip(options, ways, strict=True):
        assert (one.centre, one.batch_size) == (way.centre, way.size)
        assert one.mean == pytest.approx(way.best.mean().item(), rel=1e-5)
    found = calibrate(model, posterior, batches, draws=5, seed=7, temperature=temperature)
    assert found.batch_size == wanted.size
    assert found.centre == (wanted.centre or "running")
    assert found.choice == str(choice)
    centred = posterior.recentre_observed() if wanted.centre == "observed" else posterior
    same_draws(found, centred.rescale(wanted.size))


def test_where_labels_follow_the_plain_network_a_temperature_is_enough(model: nn.Module) -> None:
    """So the posterior becomes the plain network with it, and says why."""
    scaled = Scaled(model, 3)
    batches = held_out(model, (2000,))
    found = calibrate(scaled, fitted(scaled), batches)
    assert found.noiseless
    assert found.centre == "running"
    assert found.temperature == pytest.approx(3, rel=0.1)
    assert "does as well as drawing, at one pass" in found.choice
    x = normal(5, 4)
    prediction = Predictive(scaled, found, 50)(x)
    torch.testing.assert_close(prediction.probs, (scaled(x) / found.temperature).softmax(1).detach())
    assert not prediction.mutual_information.any()
    assert found.choice in prediction.note


def test_where_the_plain_network_is_right_it_is_left_alone(model: nn.Module) -> None:
    found = calibrate(model, fitted(model), held_out(model, (500,)))
    assert (found.batch_size, found.centre) == (math.inf, "running")
    assert found.temperature == pytest.approx(1, rel=0.1)
    assert found.choice.startswith("The plain network at temperature")


def test_labels_that_follow_the_draws_ask_for_them(model: nn.Module) -> None:
    """Where the network itself is one draw of what its labels come from, drawing is worth its passes."""
    posterior = fitted(model).rescale(1)
    x = 1.5 * normal(4000, 4, seed=3) + 0.5
    probs = Predictive(model, posterior, 200)(x, generator=seeded(9), keep_draws=True).probs
    labels = torch.multinomial(probs, 1, generator=seeded(4))[:, 0]
    found = calibrate(model, posterior.rescale(8), [(x, labels)], draws=16)
    assert found.batch_size is not None
    assert found.batch_size <= 4
    assert "beyond a temperature on 4,000 held-out examples: worth its passes" in found.choice


def test_calibrating_again_begins_from_what_was_fitted(model: nn.Module, tmp_path: Path) -> None:
    posterior = stochbn.fit(model, [1.7 * normal(160, 4, seed=9) + 0.2], 8)
    sure, unsure = held_out(model, (1500,), temperature=0.5), held_out(model, (1500,), temperature=30.0)
    wanted = calibrate(model, posterior, unsure)
    first = calibrate(model, posterior, sure)
    assert first.noiseless
    first.save(tmp_path / "p")
    again = calibrate(model, stochbn.load(tmp_path / "p"), unsure)
    assert (again.batch_size, again.centre) == (wanted.batch_size, wanted.centre)
    assert again.temperature == pytest.approx(wanted.temperature)
    assert again.choice == wanted.choice


def test_a_fit_to_mini_batches_as_they_came_is_calibrated_again_and_again(model: nn.Module) -> None:
    unknown = stochbn.fit(model, [normal(8, 4, seed=n) for n in range(3)], None)
    first = calibrate(model, unknown, held_out(model, (800,)))
    assert first.noiseless
    again = reported(model, first, held_out(model, (800,)))
    assert [one.centre for one in again.options] == ["", "", "running", "observed"]
    assert "the noise that was fitted" in again.options[2].name
    assert calibrate(model, unknown, [(X, Y)], batch_sizes=[math.inf]).noiseless


def test_one_example_among_ignored_ones_tells_nothing(model: nn.Module) -> None:
    x, y = held_out(model, (60,))[0]
    ignored = torch.full_like(y, 255)
    ignored[5] = y[5]
    choice = reported(model, fitted(model), [(x, ignored)], ignore_index=255)
    assert all(one.error == math.inf for one in choice.options if one.centre)


def test_what_was_chosen_is_forgotten_with_another_noise_or_centre(model: nn.Module) -> None:
    found = calibrate(model, fitted(model), held_out(model, (500,)))
    assert found.choice
    for other in (found.rescale(8), found.recentre(model), found.recentre_observed(), found.fitted()):
        assert not other.choice
    still = dataclasses.replace(found.rescale(8), choice="Drawing is worth its passes.").rescale(math.inf)
    note = Predictive(model, still)(normal(5, 4)).note
    assert note == "one pass without draws, so nothing is due to them: the posterior has no noise"


@pytest.mark.parametrize("change", [None, lambda x, generator: x + 1])
def test_every_option_takes_as_many_draws_as_it_is_told_to_have_passes(
    change: Any, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    own = stochbn.Joint.iter_draws

    def counted(self: stochbn.Joint, n: int, *args: Any, **options: Any) -> Iterator[dict[str, Tensor]]:
        if options.get("quasi"):
            drawn.append(n)
        return own(self, n, *args, **options)

    monkeypatch.setattr(stochbn.Joint, "iter_draws", counted)
    choice = reported(model, fitted(model), [(X, Y)], draws=3, augment=change)
    assert drawn == [one.passes for one in choice.options[1:]]
    assert sum(drawn) == (1 + 5 * 3 + 5 * 3 + 1 if change is None else 1 + 6 * 3 + 6 * 3)


def test_a_single_draw_is_drawing_too(model: nn.Module) -> None:
    choice = reported(model, fitted(model), held_out(model, (300,)), draws=1)
    assert [one.drawing for one in choice.options] == [False, False, *[True] * 10, False]


def test_dropout_over_a_posterior_without_noise_draws_its_masks() -> None:
    model = settled(dropout_net(), 4)
    posterior = fitted(model).rescale(math.inf)
    found = stochbn.MCDropout(model, 9, posterior, generator=seeded())(normal(6, 4))
    assert (found.mutual_information > 0).any()
    assert not found.note


def test_an_augmented_average_is_compared_with_the_plain_network_but_does_not_become_it(model: nn.Module) -> None:
    def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
        return x + 2 * torch.randn(x.shape, generator=generator)

    choice = reported(model, fitted(model), held_out(model, (400,)), augment=jitter, draws=4)
    plain, tempered, *others = choice.options
    assert not plain.selectable
    assert not tempered.selectable
    assert tempered.mean < choice.chosen.mean
    assert all(one.passes == 4 and one.selectable for one in others)
    assert "not worth its passes, but the best of what could be chosen" in str(choice)


def same_draws(one: stochbn.Posterior, other: stochbn.Posterior) -> None:
    assert type(one) is type(other)
    first, second = one.draw(4, seeded(3)), other.draw(4, seeded(3))
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_surer_labels_ask_for_less_noise_than_random_ones(model: nn.Module) -> None:
    posterior = fitted(model)
    settings: dict[str, Any] = {"temperature": False}
    sure = calibrate(model, posterior, held_out(model, (300,), temperature=0.1), **settings)
    unsure = calibrate(model, posterior, held_out(model, (300,), temperature=50.0), **settings)
    assert sure.batch_size == math.inf
    assert unsure.batch_size == 2


def test_the_temperature_is_refined_to_the_minimum_of_the_loss(model: nn.Module) -> None:
    """Against a fine search, far finer than the 10 % of the grid."""
    posterior, batches = fitted(model), held_out(model, (200,), temperature=1.9)
    found = calibrate(model, posterior, batches, batch_sizes=[math.inf], temperature=True)
    fine = torch.linspace(0.5, 3.9, 681, dtype=torch.float64).tolist()
    losses = [slow_loss(model, posterior.rescale(math.inf), batches, 1, temperature) for temperature in fine]
    assert found.temperature == pytest.approx(fine[losses.index(min(losses))], rel=0.01)


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_the_labels_is_found(true_temperature: float, model: nn.Module) -> None:
    posterior = fitted(model)
    batches = held_out(model, (4000,), temperature=true_temperature)
    found = calibrate(model, posterior, batches, batch_sizes=[math.inf], temperature=True)
    assert found.temperature == pytest.approx(true_temperature, rel=0.15)


@pytest.mark.parametrize("sizes", [[8], [math.inf], [4, 16]])
def test_logits_three_times_as_large_need_a_temperature_three_times_as_large(
    sizes: list[float], model: nn.Module
) -> None:
    batches = held_out(model, (200,), temperature=0.6)
    one, three = Scaled(model, 1), Scaled(model, 3)
    plain = calibrate(one, fitted(one), batches, batch_sizes=sizes, temperature=True)
    large = calibrate(three, fitted(three), batches, batch_sizes=sizes, temperature=True)
    assert 0.3 < plain.temperature < 1.3
    assert large.temperature == pytest.approx(3 * plain.temperature, rel=0.01)
    assert large.batch_size == plain.batch_size
    x = batches[0][0]
    torch.testing.assert_close(
        Predictive(three, large, 9, generator=seeded())(x).probs,
        Predictive(one, plain, 9, generator=seeded())(x).probs, rtol=0, atol=0.01,
    )  # fmt: skip


@pytest.mark.parametrize(("factor", "wanted"), [(100, 4), (0.001, 0.25)])
def test_a_temperature_beyond_the_grid_is_its_end(factor: float, wanted: float, model: nn.Module) -> None:
    scaled = Scaled(model, factor)
    found = calibrate(scaled, fitted(scaled), held_out(model), batch_sizes=[math.inf], temperature=True)
    assert found.temperature == pytest.approx(wanted, rel=1e-12)


def test_a_grid_of_one_is_what_is_chosen(model: nn.Module) -> None:
    posterior = fitted(model)
    found = calibrate(model, posterior, held_out(model), batch_sizes=(12.5,))
    assert found.batch_size == 12.5
    same_draws(found, posterior.rescale(12.5))


@pytest.mark.parametrize(
    "sizes",
    [
        (4, 16, math.inf), torch.tensor([4, 16, math.inf]), np.array([4, 16, math.inf], "float32"),
        (size for size in (4, 16, math.inf)), dict.fromkeys([4, 16, math.inf]).keys(), [4, 16, 4.0, math.inf, 16],
        map(Fraction, (4, 16)), {16, 4}, torch.tensor([4, 16]), np.array([4, 16]),
    ],
    ids=lambda sizes: type(sizes).__name__,
)  # fmt: skip
def test_sizes_to_try_may_come_from_any_iterable_and_each_is_tried_once(sizes: Any, model: nn.Module) -> None:
    choice = reported(model, fitted(model), [(X, Y)], batch_sizes=sizes, draws=2)
    assert sorted(one.batch_size for one in choice.options[2:]) == [4, 16]
    assert all(type(one.batch_size) in (int, float) for one in choice.options)


def test_no_noise_can_be_chosen_and_is_then_the_plain_network(model: nn.Module) -> None:
    posterior = fitted(model)
    found = calibrate(model, posterior, held_out(model, (300,), temperature=0.1), batch_sizes=[2, math.inf])
    assert found.batch_size == math.inf
    x = normal(5, 4)
    wanted = (copy.deepcopy(model).eval()(x) / found.temperature).softmax(1).detach()
    torch.testing.assert_close(Predictive(model, found, 3)(x).probs, wanted)


def test_the_grid_is_about_the_posteriors_own_size_and_both_centres(model: nn.Module) -> None:
    choice = reported(model, fitted(model).rescale(20), held_out(model), draws=2)
    sizes: list[float] = [5, 10, 20, 40, 80]
    wanted = [*(("running", size) for size in sizes), *(("observed", size) for size in (*sizes, math.inf))]
    assert [(one.centre, one.batch_size) for one in choice.options] == [("", math.inf), ("", math.inf), *wanted]


def test_a_temperature_that_the_posterior_has_already_does_not_count_for_the_choice_of_another(
    model: nn.Module,
) -> None:
    posterior, batches = fitted(model), held_out(model)
    hot = dataclasses.replace(posterior, temperature=3.0)
    wanted = calibrate(model, posterior, batches, temperature=True, draws=3)
    found = calibrate(model, hot, batches, temperature=True, draws=3)
    assert (found.batch_size, found.temperature) == (wanted.batch_size, wanted.temperature)
    assert hot.temperature == 3, "the one given stays as it is"
    assert posterior.batch_size == 8


def test_all_else_of_the_posterior_is_kept(model: nn.Module) -> None:
    posterior = dataclasses.replace(fitted(model), skipped={"c": "not called"})
    found = calibrate(model, posterior, held_out(model), draws=2)
    for name in ("layers", "mini_batches", "dtype", "skipped"):
        assert getattr(found, name) == getattr(posterior, name)


def test_calibrating_twice_gives_the_same_and_the_seed_matters(model: nn.Module) -> None:
    posterior, batches = fitted(model), held_out(model)
    found = [
        calibrate(model, posterior, batches, batch_sizes=[4], temperature=True, draws=2, seed=seed).temperature
        for seed in (5, 5, 6)
    ]
    assert found[0] == found[1] != found[2]


def test_held_out_data_is_read_once_and_may_be_a_stream(model: nn.Module) -> None:
    posterior, batches = fitted(model), held_out(model)
    wanted = calibrate(model, posterior, batches, temperature=True, draws=2)
    found = calibrate(model, posterior, iter(batches), temperature=True, draws=2)
    assert (found.batch_size, found.temperature) == (wanted.batch_size, wanted.temperature)


def test_every_object_weighs_the_same_however_they_are_batched(model: nn.Module) -> None:
    """Without noise, where no generator is involved."""
    x, y = held_out(model, (100,), temperature=2.0)[0]
    found = []
    for sizes in ([100], [99, 1], [1, 0, 60, 39]):
        batches = list(zip(torch.split(x, sizes), torch.split(y, sizes), strict=True))
        chosen = calibrate(model, fitted(model), batches, batch_sizes=[math.inf], temperature=True)
        found.append(chosen.temperature)
    assert max(found) == pytest.approx(min(found), rel=1e-5)
    one = calibrate(model, fitted(model), [(x[:1], y[:1])], batch_sizes=[math.inf], temperature=True).temperature
    assert one != pytest.approx(min(found), rel=0.05)


# What comes of it


@pytest.mark.parametrize("kind", KINDS)
def test_the_calibrated_posterior_comes_back_from_a_file_with_its_noise_and_temperature(
    kind: str, model: nn.Module, tmp_path: Path
) -> None:
    scaled = Scaled(model, 2.5)
    found = calibrate(scaled, fitted(scaled, kind), held_out(model), temperature=True, draws=3)
    assert found.temperature > 1.3
    found.save(tmp_path / "p")
    loaded = stochbn.load(tmp_path / "p")
    assert (loaded.batch_size, loaded.temperature) == (found.batch_size, found.temperature)
    same_draws(loaded, found)
    x = normal(6, 4, seed=3)
    assert torch.equal(
        Predictive(scaled, loaded, 5, generator=seeded())(x).probs,
        Predictive(scaled, found, 5, generator=seeded())(x).probs,
    )


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.7])
def test_predictions_divide_the_logits_of_every_draw_by_the_temperature(temperature: float, model: nn.Module) -> None:
    posterior, x = fitted(model), normal(6, 4, seed=3)
    hot = dataclasses.replace(posterior, temperature=temperature)
    found = Predictive(model, hot, 5, generator=seeded())(x, keep_draws=True)
    scaled = Scaled(model, 1 / temperature)
    layers = {f"network.{name}": n for name, n in posterior.layers.items()}
    other = dataclasses.replace(posterior, layers=layers, reference=None)
    wanted = Predictive(scaled, other, 5, generator=seeded())(x, keep_draws=True)
    torch.testing.assert_close(found.probs, wanted.probs)
    torch.testing.assert_close(found.expected_entropy, wanted.expected_entropy)
    torch.testing.assert_close(found.log_probs, wanted.log_probs)
    if temperature != 1:
        assert not torch.allclose(found.probs, Predictive(model, posterior, 5, generator=seeded())(x).probs, rtol=1e-2)


def test_dropout_with_a_posterior_uses_its_temperature_too() -> None:
    model = settled(dropout_net(), 4)
    posterior = dataclasses.replace(fitted(model), temperature=2.0)
    scaled = Scaled(model, 0.5)
    layers = {f"network.{name}": n for name, n in posterior.layers.items()}
    other = dataclasses.replace(posterior, temperature=1.0, layers=layers, reference=None)
    x = normal(6, 4, seed=3)
    found = stochbn.MCDropout(model, 5, posterior, generator=seeded())(x).probs
    torch.testing.assert_close(found, stochbn.MCDropout(scaled, 5, other, generator=seeded())(x).probs)


# Forms of data and of outputs


def test_mappings_carry_their_labels() -> None:
    model = ByName()
    settled(model.body, 4)
    batches = held_out(model.body)
    posterior = stochbn.fit(model, [{"features": 1.5 * normal(160, 4, seed=9) + 0.5}], 8).recentre(model)
    for forms in (
        [{"features": x, "labels": y, "index": 3} for x, y in batches],
        [({"features": x}, y) for x, y in batches],
        [[{"features": x}, y, "name"] for x, y in batches],
    ):
        found = calibrate(model, posterior, forms, temperature=True, draws=3)
        wanted = calibrate(model.body, fitted(model.body), batches, temperature=True, draws=3)
        assert found.batch_size == wanted.batch_size
        assert found.temperature == pytest.approx(wanted.temperature, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_whole_type_are_taken(dtype: torch.dtype, model: nn.Module) -> None:
    batches = held_out(model)
    wanted = calibrate(model, fitted(model), batches, temperature=True, draws=2)
    found = calibrate(model, fitted(model), [(x, y.to(dtype)) for x, y in batches], temperature=True, draws=2)
    assert (found.batch_size, found.temperature) == (wanted.batch_size, wanted.temperature)


def test_logits_are_looked_for_where_they_are_said_to_be(model: nn.Module) -> None:
    wrapped = Wrapped(model, lambda out: {"hidden": out * 0, "scores": out})
    batches = held_out(model)
    found = calibrate(wrapped, fitted(wrapped), batches, temperature=True, draws=2, logits="scores")
    assert found.temperature == calibrate(model, fitted(model), batches, temperature=True, draws=2).temperature
    with pytest.raises(ValueError, match="has nothing at 'logits'"):
        calibrate(wrapped, fitted(wrapped), batches)


def test_every_pixel_of_a_dense_output_has_a_label() -> None:
    model = settled(dense_net(), 2, 6, 5)
    posterior = stochbn.fit(model, [1.5 * normal(80, 2, 6, 5, seed=9) + 0.5], 4)
    x = 1.5 * normal(9, 2, 6, 5, seed=3) + 0.5
    y = labelled(model, x, 2.0)
    assert y.shape == (9, 6, 5)
    grid = [1, 4, 16, math.inf]
    losses = []
    for size in grid:
        probs = Predictive(model, posterior.rescale(size), 3, generator=seeded())(x).probs
        losses.append(nn.functional.nll_loss(probs.log(), y).item())
    found = calibrate(model, posterior, [(x, y)], batch_sizes=grid, draws=3, temperature=False)
    assert found.batch_size == grid[losses.index(min(losses))]
    still = posterior.recentre(model)
    found = calibrate(model, still, [(x, y)], batch_sizes=[math.inf], temperature=True)
    assert found.temperature == pytest.approx(2, rel=0.25)
    for labels in (y[:, 0, 0], y.flatten(), y[:, None]):
        with pytest.raises(ValueError, match=r"expected labels \[9, 6, 5\] for"):
            calibrate(model, posterior, [(x, labels)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_another_precision_work_too(dtype: torch.dtype, model: nn.Module) -> None:
    batches = [(x.to(dtype), y) for x, y in held_out(model, (200,), temperature=2.0)]
    wanted = calibrate(model, fitted(model), held_out(model, (200,), 2.0), batch_sizes=[math.inf], temperature=True)
    model = model.to(dtype)
    posterior = stochbn.fit(model, [(1.5 * normal(160, 4, seed=9) + 0.5).to(dtype)], 8).recentre(model)
    found = calibrate(model, posterior, batches, batch_sizes=[math.inf], temperature=True)
    assert found.temperature == pytest.approx(wanted.temperature, rel=1e-5 if dtype == torch.float64 else 0.05)


# The network is left alone


def test_the_network_and_the_global_generator_are_left_exactly_as_they_were(case: Case) -> None:
    model = case.model()
    posterior = stochbn.fit(model, [case.inputs(24)], 8)
    x = case.inputs(5, seed=1)
    batches = [(x, labelled(model, x))]
    mixed_up(model)
    before, state, data = Untouched(model), torch.get_rng_state(), x.clone()
    calibrate(model, posterior, batches, temperature=True, draws=2)
    before.check()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, data)


def test_the_train_flags_of_the_network_do_not_matter_and_dropout_is_off() -> None:
    model = settled(dropout_net(), 4)
    posterior, batches = fitted_quietly(model), held_out(model)
    wanted = calibrate(model, posterior, batches, temperature=True, draws=2).temperature
    state = torch.get_rng_state()
    assert calibrate(model.train(), posterior, batches, temperature=True, draws=2).temperature == wanted
    assert torch.equal(torch.get_rng_state(), state)


def fitted_quietly(model: nn.Module) -> stochbn.Posterior:
    with torch.random.fork_rng():
        return fitted(model)


@pytest.mark.parametrize("after", [0, 5])
def test_the_network_is_left_as_it_was_when_it_raises_midway(after: int) -> None:
    inner = settled(mlp(), 4)
    model = Failing(inner, 10**6)
    posterior, batches = fitted(model), held_out(inner)
    mixed_up(model)
    before = Untouched(model)
    model.after = model.passes.value + after
    with pytest.raises(KeyError, match="the network's own error"):
        calibrate(model, posterior, batches, draws=2)
    before.check()


def test_no_gradients_are_made(model: nn.Module) -> None:
    found = calibrate(model, fitted(model), held_out(model), draws=2)
    assert isinstance(found, stochbn.Joint)
    assert not any(values.requires_grad for values in (found.location, found.directions, found.residual))


# Refusals


X, Y = normal(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((X, Y[:5]), ValueError, r"expected labels \[6\] for .* got \[5\]"),
        ((X, Y[:, None]), ValueError, r"got \[6, 1\]"),
        ((X, Y + 1), ValueError, "between 0 and 2 for 3 classes, found 1 to 3"),
        ((X, Y - 1), ValueError, "between 0 and 2 for 3 classes, found -1 to 1"),
        ((X, Y.float()), TypeError, r"torch\.float32 labels"),
        ((X, Y == 1), TypeError, r"torch\.bool labels"),
        ((X, Y.tolist()), TypeError, "a tuple without them"),
        (X, TypeError, "expected held-out batches as .*a Tensor without them"),
        ((X,), TypeError, "a tuple without them"),
        ((X, None), TypeError, "a tuple without them"),
        ({"input": X}, TypeError, "a dict without them"),
        ({"input": X, "label": Y}, TypeError, "a dict without them"),
        ((torch.full((6, 4), math.nan), Y), ValueError, "output is not finite for some held-out examples"),
        ((normal(6, 5), Y), RuntimeError, r"failed on an input of shape \[6, 5\]"),
        (("a.png", Y), TypeError, "batch of type str"),
    ],
)
def test_held_out_batches_that_are_none_are_refused_and_leave_the_network_as_it_was(
    batch: Any, error: type[Exception], message: str, model: nn.Module
) -> None:
    posterior = fitted(model)
    mixed_up(model)
    before = Untouched(model)
    with pytest.raises(error, match=message):
        calibrate(model, posterior, [(X, Y), batch], temperature=True, draws=2)
    before.check()


def test_a_single_object_that_is_not_finite_is_noticed_among_others(model: nn.Module) -> None:
    broken = X.clone()
    broken[3, 2] = math.inf
    with pytest.raises(ValueError, match="output is not finite"):
        calibrate(model, fitted(model), [(X, Y), (broken, Y), (X, Y)], draws=2)


def test_no_held_out_objects_are_refused(model: nn.Module) -> None:
    posterior = fitted(model)
    used: Iterator[Any] = iter([])
    for data in ([], used, [(X[:0], Y[:0])]):
        with pytest.raises(ValueError, match="no held-out examples"):
            calibrate(model, posterior, data)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_sizes": []}, ValueError, "batch_sizes is empty"),
        ({"batch_sizes": iter(())}, ValueError, "batch_sizes is empty"),
        ({"batch_sizes": [4, 0]}, ValueError, "batch_sizes must be positive numbers, got 0 among them"),
        ({"batch_sizes": (-2.5,)}, ValueError, r"batch_sizes must be positive numbers, got -2\.5 among them"),
        ({"batch_sizes": [math.nan]}, ValueError, "batch_sizes must be positive numbers, got nan among them"),
        ({"batch_sizes": torch.tensor([8.0, math.nan])}, ValueError, "got nan among them"),
        ({"batch_sizes": [10**400]}, ValueError, "batch_sizes must be positive numbers, got 10000"),
        ({"batch_sizes": [True]}, TypeError, "got True among them"),
        ({"batch_sizes": [8, "16"]}, TypeError, "got '16' among them"),
        ({"batch_sizes": torch.ones(2, 2)}, TypeError, r"got \[1\.0, 1\.0\] among them"),
        ({"batch_sizes": 8}, TypeError, r"batch_sizes must be positive numbers, such as \[8, .*, got 8"),
        ({"batch_sizes": torch.tensor(8)}, TypeError, r"got tensor\(8\)"),
        ({"batch_sizes": np.array(8)}, TypeError, r"got array\(8\)"),
        ({"batch_sizes": "8"}, TypeError, "got '8'"),
        ({"batch_sizes": ""}, TypeError, "got ''"),
        ({"batch_sizes": b"8"}, TypeError, "got b'8'"),
        ({"batch_sizes": {8: 1}}, TypeError, "got {8: 1}"),
        ({"draws": 0}, ValueError, "draws must be at least 1"),
        ({"draws": 2.0}, TypeError, "draws must be a whole number"),
        ({"draws": True}, TypeError, "draws must be a whole number"),
        ({"posterior": None}, TypeError, "expected a posterior from stochbn.fit or stochbn.load, got NoneType"),
        ({"posterior": "p.safetensors"}, TypeError, "expected a posterior from stochbn.fit or stochbn.load, got str"),
        ({"posterior": make_posterior()}, ValueError, "has a layer 'norm' that Sequential has not"),
        ({"model": convnet()}, ValueError, "has 6 channels for layer '1', Sequential has 5"),
        ({"model": "model.pt"}, TypeError, r"expected a torch\.nn\.Module"),
    ],
)
def test_bad_arguments_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str, model: nn.Module
) -> None:
    def unread() -> Iterator[Any]:
        raise AssertionError("it was read")
        yield

    arguments: dict[str, Any] = {"model": model, "posterior": fitted(model), "held_out": unread()}
    with pytest.raises(error, match=message):
        calibrate(**{**arguments, **changes})


def test_a_posterior_whose_size_is_not_known_is_taken_as_it_is(model: nn.Module) -> None:
    unknown = stochbn.fit(model, [normal(8, 4, seed=n) for n in range(3)], None)
    choice = reported(model, unknown, [(X, Y)])
    assert [one.centre for one in choice.options] == ["", "", "running", "observed"]
    with pytest.raises(ValueError, match="the size of mini-batches whose noise it had is not known"):
        calibrate(model, unknown, [(X, Y)], batch_sizes=[4])


def test_a_posterior_without_noise_has_that_of_its_fit_tried(model: nn.Module) -> None:
    found, wanted = (reported(model, one, [(X, Y)]) for one in (fitted(model).rescale(math.inf), fitted(model)))
    assert found == wanted


def test_without_a_choice_of_temperature_the_posteriors_own_stays(model: nn.Module) -> None:
    posterior = dataclasses.replace(stochbn.fit(model, [X], 2), temperature=1.7)
    options: dict[str, Any] = {"draws": 2, "temperature": False}
    assert calibrate(model, posterior, [(X, Y)], batch_sizes=[16], **options).temperature == 1.7
    choice = reported(model, posterior, [(X, Y)], **options)
    assert {one.temperature for one in choice.options if one.selectable} == {1.7}


def test_an_optimum_at_the_end_of_the_range_is_told(model: nn.Module) -> None:
    """Where the network is always wrong, more noise and a higher temperature are always better."""
    posterior = stochbn.fit(model, [X], 2)
    with torch.no_grad():
        wrong = copy.deepcopy(model).eval()(X).argmin(1)
    with pytest.warns(UserWarning, match=r"the smallest mini-batches that were tried, 0\.5, is the best"):
        calibrate(model, posterior, [(X, wrong)], batch_sizes=[0.5, 1e9], draws=50, temperature=False)
    with pytest.warns(UserWarning, match="at or beyond the end of the range, 4"):
        calibrate(model, posterior, [(X, wrong)], batch_sizes=[1e9], draws=1, temperature=True)


# ---------------------------------------------------------------- other tasks, and what is not to be counted


def grid(model: nn.Module, posterior: stochbn.Posterior, x: Tensor, sizes: list[float]) -> dict[float, list[Tensor]]:
    """The outputs of eight draws under each noise, by a loop over state dicts."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    found: dict[float, list[Tensor]] = {}
    for size in sizes:
        found[size] = []
        for draw in posterior.rescale(size).iter_draws(8, torch.Generator().manual_seed(0), quasi=True):
            model.load_state_dict({**kept, **draw})
            with torch.no_grad():
                found[size].append(model(x).double())
    model.load_state_dict(kept)
    return found


@pytest.mark.parametrize("task", ["binary", "multilabel"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_noise_is_chosen_for_labels_of_their_own(task: str, dtype: torch.dtype) -> None:
    model = settled(mlp(classes=1 if task == "binary" else 3), 4)
    posterior = stochbn.fit(model, [normal(96, 4, seed=1)], 8)
    x, sizes = normal(80, 4, seed=2), [2.0, 8.0, 64.0, math.inf]
    labels = (torch.rand(80, 3, generator=seeded()) < model(x).detach().mul(0.6).sigmoid()).to(dtype)
    if task == "binary":
        labels = labels[:, 0]
    losses = {}
    for size, outputs in grid(model, posterior, x, sizes).items():
        probs = torch.stack(outputs).sigmoid().mean(0).view(labels.shape)
        losses[size] = torch.nn.functional.binary_cross_entropy(probs, labels.double()).item()
    choices: list[Choice] = []
    settings: dict[str, Any] = {"task": task, "temperature": False, "report": choices.append}
    stochbn.calibrate(model, posterior, [(x, labels)], batch_sizes=sizes, **settings)
    for one in choices[0].options:
        if one.selectable:
            assert one.mean == pytest.approx(losses[one.batch_size], rel=1e-4)
    with pytest.raises(ValueError, match="labels must lie between 0 and 1"):
        stochbn.calibrate(model, posterior, [(x, labels + 1)], task=task)


class Shaped(nn.Module):
    """A network with one logit, whose output is brought into a shape."""

    def __init__(self, network: nn.Module, *shape: int) -> None:
        super().__init__()
        self.network, self.shape = network, shape

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x).reshape(len(x), *self.shape)
        return out


@pytest.mark.parametrize("score", ["nll", "brier"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
@pytest.mark.parametrize("examples", [1, 30])
def test_binary_labels_may_have_the_axis_of_the_logit(score: str, dtype: torch.dtype, examples: int) -> None:
    """30 examples at 30 temperatures, which must not be taken for each other."""
    assert len(TEMPERATURES) + 1 == 30
    inner = settled(mlp(classes=1), 4)
    x, labels = normal(examples, 4, seed=2), torch.arange(examples) % 3 % 2
    for shape, axis in (((1,), None), ((), None), ((1, 1), -1)):
        model = Shaped(inner, *shape)
        posterior = stochbn.fit(model, [normal(96, 4, seed=1)], 8)
        settings: dict[str, Any] = {"task": "binary", "score": score, "class_axis": axis, "draws": 3}
        settings["ignore_index"] = 0 if examples > 1 else None
        places = labels[:, None] if len(shape) == 2 else labels
        wanted = reported(model, posterior, [(x, places)], **settings)
        found = reported(model, posterior, [(x, places[..., None].to(dtype))], **settings)
        assert found == wanted
        assert found.units == "examples"
        with pytest.raises(ValueError, match="expected labels"):
            reported(model, posterior, [(x, places[..., None, None])], **settings)
        with pytest.raises(ValueError, match="expected labels"):
            reported(model, posterior, [(x, places[..., None].expand(*places.shape, 2))], **settings)


def test_dense_binary_labels_may_have_the_axis_of_the_logit() -> None:
    model = settled(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)), 2, 1, 4)
    x = normal(9, 2, 1, 4, seed=2)
    posterior, labels = stochbn.fit(model, [x], 4), (x[:, :1] > 0).long()
    wanted = reported(model, posterior, [(x, labels[:, 0])], task="binary", draws=2)
    assert reported(model, posterior, [(x, labels)], task="binary", draws=2) == wanted
    assert (wanted.objects, wanted.units) == (36, "places")


@pytest.mark.parametrize("score", ["nll", "brier"])
def test_ignored_labels_do_not_count(score: str) -> None:
    model = settled(mlp(), 4)
    posterior = stochbn.fit(model, [normal(96, 4, seed=1)], 8)
    x, labels = normal(90, 4, seed=2), torch.arange(90) % 3
    some = torch.arange(90) % 2 == 0
    settings: dict[str, Any] = {"temperature": True, "score": score}
    wanted = stochbn.calibrate(model, posterior, [(x[some], labels[some])], **settings)
    done: list[int] = []
    found = stochbn.calibrate(
        model, posterior, [(x, labels.where(some, 255))], ignore_index=255, progress=done.append, **settings
    )
    assert done == [45]
    assert found.batch_size == wanted.batch_size
    assert found.temperature == pytest.approx(wanted.temperature, rel=1e-4)
    with pytest.raises(ValueError, match="there are no held-out examples: all 90 have the label 255"):
        stochbn.calibrate(model, posterior, [(x, torch.full((90,), 255))], ignore_index=255)
    with pytest.raises(ValueError, match="labels must lie between"):
        stochbn.calibrate(model, posterior, [(x, labels.where(some, 255))])


@pytest.mark.parametrize("task", ["embedding"])
def test_tasks_without_labels_are_refused(task: str) -> None:
    model = settled(mlp(), 4)
    posterior = stochbn.fit(model, [normal(96, 4, seed=1)], 8)
    with pytest.raises(ValueError, match="noise is chosen by labels"):
        stochbn.calibrate(model, posterior, [(normal(9, 4), torch.arange(9) % 3)], task=task)


# What is said of the choice


def reported(model: nn.Module, posterior: stochbn.Posterior, batches: Batches, **options: Any) -> Choice:
    choices: list[Choice] = []
    calibrate(model, posterior, batches, report=choices.append, **options)
    assert len(choices) == 1
    return choices[0]


@pytest.mark.parametrize("temperature", [False, True])
def test_options_are_compared_with_the_plain_network_at_its_best_temperature(
    model: nn.Module, temperature: bool
) -> None:
    posterior, batches = fitted(model), held_out(model, temperature=2.0)
    choice = reported(model, posterior, batches, batch_sizes=[4, 16, math.inf], draws=5, temperature=temperature)
    assert (choice.objects, choice.units) == (72, "examples")
    assert [(one.centre, one.batch_size) for one in choice.options[2:]] == [("running", 4), ("running", 16)]
    sizes: list[float] = [4, 16]
    reference = slow_ways(model, posterior, batches, 5, TEMPERATURES.tolist(), sizes=sizes)[1].best
    temperatures = TEMPERATURES.tolist() if temperature else [1.0]
    ways = slow_ways(model, posterior, batches, 5, temperatures, sizes=sizes)
    options = [one for one in choice.options if one.selectable]
    assert len(options) == len(ways)
    for one, way in zip(options, ways, strict=True):
        more = way.best - reference
        assert one.more == pytest.approx(more.mean().item(), abs=1e-5)
        assert one.error == pytest.approx(more.std().item() / 72**0.5, rel=1e-3, abs=1e-6)
    assert (choice.options[1].more, choice.options[1].error) == (0, 0)


PLAIN = Option("", math.inf, 1, 1.0, 0.4, 0.1, 0.02)
TEMPERED = Option("", math.inf, 1, 1.3, 0.3, 0.0, 0.0)
DRAWN = Option("running", 16, 8, 1.1, 0.28, -0.02, 0.004)


@pytest.mark.parametrize(
    ("options", "chosen", "said"),
    [
        (
            (PLAIN, TEMPERED, DRAWN),
            2,
            "Drawing (the noise of mini-batches of 16 about the running statistics, 8 passes) lowers the NLL by 0.0200 "
            "\u00b1 0.0040 nats beyond a temperature on 4,000 held-out examples: worth its passes.",
        ),
        (
            (PLAIN, TEMPERED, DRAWN._replace(more=-0.001, mean=0.299)),
            1,
            "The plain network at temperature 1.30 does as well as drawing, at one pass: drawing changes the NLL by "
            "-0.0010 \u00b1 0.0040 nats beyond a temperature on 4,000 held-out examples, the temperature alone by "
            "-0.1000 \u00b1 0.0200 nats.",
        ),
        (
            (PLAIN._replace(more=0.001), TEMPERED, DRAWN._replace(more=0.01, mean=0.31)),
            0,
            "The plain network does as well as drawing, at one pass: drawing changes the NLL by +0.0100 \u00b1 0.0040 "
            "nats beyond a temperature on 4,000 held-out examples.",
        ),
    ],
)
def test_a_choice_is_one_sentence_that_decides(options: tuple[Option, ...], chosen: int, said: str) -> None:
    assert str(Choice("nll", "NLL", "nats", 4000, "examples", options, options[chosen])) == said


def test_one_example_tells_nothing_apart(model: nn.Module) -> None:
    x, y = held_out(model, (3,))[0]
    choice = reported(model, fitted(model), [(x[:1], y[:1])])
    assert choice.chosen is choice.options[0]
    assert all(one.error == math.inf for one in choice.options if one.centre)


def test_places_of_an_image_count_as_one_object_in_the_error() -> None:
    model = settled(dense_net(), 2, 8, 8)
    x = normal(12, 2, 8, 8)
    posterior = stochbn.fit(model, [x], 4)
    labels = labelled(model, x)
    choice = reported(model, posterior, [(x, labels)], batch_sizes=[4, math.inf], temperature=False)
    rows = []
    for size in (math.inf, 4):
        kept = Predictive(model, posterior.rescale(size), 8)(x, generator=seeded(0), keep_draws=True)
        assert kept.log_probs is not None
        probs = kept.log_probs.double().softmax(2).mean(0)
        rows.append(-probs.gather(1, labels[:, None]).log().flatten(1).mean(1))
    assert (choice.objects, choice.units) == (labels.numel(), "places")
    plain, tempered, drawn = choice.options
    tempered_losses = slow_dense_losses(model, x, labels)
    assert drawn.error == pytest.approx((rows[1] - tempered_losses).std().item() / 12**0.5, rel=1e-3)
    assert plain.error == pytest.approx((rows[0] - tempered_losses).std().item() / 12**0.5, rel=1e-3, abs=1e-8)
    assert tempered.error == 0


def slow_dense_losses(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """``[N]``: the mean losses of the plain network's images at its best temperature."""
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(x).double()
    losses = [torch.nn.functional.cross_entropy(logits / t, labels, reduction="none") for t in TEMPERATURES.tolist()]
    return min(losses, key=lambda loss: loss.mean().item()).flatten(1).mean(1)


def test_the_error_of_a_difference_is_that_of_a_ratio_where_objects_have_different_numbers_of_places() -> None:
    """Against the spread over many samples of examples, of which some have many places and a larger difference."""
    generator = seeded(3)
    mean, errors = [], []
    for _ in range(300):
        units = torch.randint(1, 20, (60,), generator=generator)
        first = units * (0.5 + 0.01 * torch.randn(60, generator=generator, dtype=torch.float64))
        second = units * (0.6 + 0.01 * torch.randn(60, generator=generator, dtype=torch.float64))
        totals = Totals(2, 1)
        for part in (slice(0, 25), slice(25, 60)):
            totals.add(torch.stack([first[part], second[part]])[:, None], units[part])
        ways = ("", 4, 1), ("", 8, 0), ("running", math.inf, 1)
        tried = [Tried(centre, size, 8, row, (0,)) for centre, size, row in ways]
        _, one, other = totals.options(tried, torch.ones(1, dtype=torch.float64))
        assert one.more == one.error == 0
        assert other.more == pytest.approx(((second - first).sum() / units.sum()).item())
        mean.append(other.more)
        errors.append(other.error)
    spread = torch.tensor(mean).std().item()
    assert sum(errors) / 300 == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("score", ["nll", "brier"])
def test_probabilities_of_0_and_1_can_be_scored(score: Any) -> None:
    model = nn.Sequential(settled(mlp(), 4), Scaled(nn.Identity(), 1e6), nn.Softmax(1))
    posterior = stochbn.fit(model, [normal(96, 4, seed=1)], 8)
    x = normal(40, 4, seed=2)
    labels = torch.arange(40) % 3
    choices: list[Choice] = []
    stochbn.calibrate(model, posterior, [(x, labels)], output="probs", score=score, report=choices.append)
    assert all(math.isfinite(one.mean) for one in choices[0].options)
    if score == "nll":
        plain = choices[0].options[0]
        probs = Predictive(model, posterior.rescale(math.inf), output="probs")(x).probs
        assert plain.mean == pytest.approx(stochbn.metrics.evaluate(probs, labels)["nll"], rel=1e-5)
