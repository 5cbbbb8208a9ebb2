from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import stochbn
from conftest import Case, Untouched, convnet, mlp, normal, seeded, settled
from stochbn import MCDropout, Predictive
from stochbn.execution import WAYS, Call, Passes, Plan, Settings, passes
from stochbn.network.calling import network_input
from stochbn.network.replica import Network
from stochbn.posteriors import KINDS
from stochbn.tasks import Classification


@contextmanager
def made(
    model: nn.Module, posterior: stochbn.Posterior, x: Tensor, settings: Settings | None = None, **call: Any
) -> Iterator[Passes]:
    """The passes of a call."""
    network = Network.of(model)
    network.look()

    def sample(count: int) -> list[dict[str, Tensor]]:
        return list(posterior.iter_draws(count, seeded()))

    asked = Call(Classification(), settings=settings or Settings(), posterior=posterior, sample=sample, **call)
    with torch.no_grad(), passes(network, network_input(model, x), asked) as found:
        yield found


def plan_of(
    model: nn.Module, posterior: stochbn.Posterior, x: Tensor, settings: Settings | None = None, **call: Any
) -> Plan:
    with made(model, posterior, x, settings, **call) as found:
        return found.plan


def slow(model: nn.Module, draws: list[dict[str, Tensor]], x: Tensor) -> list[Tensor]:
    """Each draw's logits, from a copy of the network with its buffers set."""
    found = []
    for draw in draws:
        changed = copy.deepcopy(model).eval()
        for name, values in draw.items():
            dict(changed.named_buffers(remove_duplicate=False))[name].copy_(values)
        with torch.no_grad():
            found.append(changed(x.clone()))
    return found


class Mixing(nn.Module):
    """The examples of a batch affect each other."""

    def __init__(self) -> None:
        super().__init__()
        self.body = settled(mlp(), 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x - x.mean(0))
        return out


class Viewing(nn.Module):
    """Cannot take channels-last activations."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.convolution(x)).view(len(x), -1))
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_making_a_pass_gives_the_logits_of_the_slow_one(kind: str, case: Case) -> None:
    model = case.model().eval()
    posterior = stochbn.fit(model, [case.inputs(48, seed=9)], 6, kind)
    x = case.inputs(9, seed=4)
    draws = list(posterior.iter_draws(4, seeded(1), quasi=True))
    wanted = torch.stack(slow(model, draws, x))
    for ways in (WAYS, (), ("pieces",), ("prefix",), ("stacked",), ("channels_last",)):
        for first in (1, 4):
            settings = Settings(ways=frozenset(ways), piece=2000, rows=64)  # so that batches go through in pieces
            with made(model, posterior, x, settings) as some:
                assert not some.plan.together
                torch.testing.assert_close(some(draws[:first]), wanted[:first], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(some(draws[:1]), wanted[:1], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(some(draws), wanted, rtol=1e-4, atol=1e-5)
                rest = torch.arange(9) % 3 > 0
                some.keep(rest)
                torch.testing.assert_close(some(draws), wanted[:, rest], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(some(draws[:1]), wanted[:1, rest], rtol=1e-4, atol=1e-5)


SEEN: dict[str, Any] = {}
"""What layers were called with: outside of them, so that it is no state of theirs."""


class Counting(nn.Conv2d):
    """Counts the examples that it and its copies are called with."""

    key = ""

    def forward(self, x: Tensor) -> Tensor:
        SEEN.setdefault(self.key, []).append(x)
        return super().forward(x)


class Early2d(nn.Module):
    """A convolution before the first batch norm, used in one of several ways, and one behind."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.norm, self.second = Counting(2, 2, 3, padding=1), nn.BatchNorm2d(2), Counting(2, 4, 3)
        self.other, self.head, self.way = nn.BatchNorm2d(4), nn.Linear(4, 3), way
        self.first.key, self.second.key = "first", "second"

    def forward(self, x: Tensor) -> Tensor:
        early = self.first(x)
        if self.way == "written to":
            early = early.clamp_(-1, 1)
        elif self.way == "called again":
            early = self.first(early)
        out = self.other(self.second(self.norm(early)))
        if self.way == "called behind":
            out = out + self.first(self.norm(x)).mean((1, 2, 3), keepdim=True)
        logits: Tensor = self.head(out.mean((2, 3)))
        return logits


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", ["once", "written to", "called again", "called behind"])
def test_what_comes_before_the_first_batch_norm_runs_once_if_it_can(way: str, mode: Any) -> None:
    model = Early2d(way)
    settled(model, 2, 6, 6)
    posterior = stochbn.fit(model, [normal(64, 2, 6, 6, seed=3)], 8)
    x = normal(20, 2, 6, 6)
    draws = list(posterior.iter_draws(9, seeded(), quasi=True))
    settings = Settings(ways=frozenset(WAYS) - {"stacked"})
    predictive = Predictive(model, posterior, 9, tolerance=0, settings=settings)
    with mode():
        predictive(x)  # plans
        SEEN.clear()  # which the network's code reads: it is looked at once more, and then known to be a log
        predictive(x)
        SEEN.clear()
        found = predictive(x, generator=seeded())
    probed = 4  # examples of which a draw is made again in the slow way
    assert sum(map(len, SEEN["second"])) == 9 * 20 + probed
    times = {"once": 1, "written to": 9, "called again": 2, "called behind": 1 + 9}[way]
    assert sum(map(len, SEEN["first"])) == 20 * times + probed * (2 if way.startswith("called") else 1)
    torch.testing.assert_close(found.probs, torch.stack(slow(model, draws, x)).softmax(2).mean(0))


def test_a_layers_own_hook_and_forward_are_called_as_ever_and_stay() -> None:
    model = Early2d("once")
    settled(model, 2, 6, 6)
    posterior = stochbn.fit(model, [normal(64, 2, 6, 6, seed=3)], 8)
    x, plain = normal(20, 2, 6, 6), model.first.forward
    model.first.register_forward_hook(lambda module, args, out: 2 * out)
    own = vars(model.first)["forward"] = lambda x: plain(x) + 1
    draws = list(posterior.iter_draws(9, seeded(), quasi=True))
    found = Predictive(model, posterior, 9, tolerance=0)(x, generator=seeded()).probs
    assert vars(model.first)["forward"] is own
    wanted = slow(model, draws, x)
    torch.testing.assert_close(found, torch.stack(wanted).softmax(2).mean(0))


def test_plans_of_a_convolutional_network() -> None:
    model = settled(convnet(), 2, 6, 5)
    posterior = stochbn.fit(model, [normal(64, 2, 6, 5, seed=3)], 8)
    before = Untouched(model)
    plan = plan_of(model, posterior, normal(8, 2, 6, 5))
    assert plan.ways == {"prefix", "stacked", "channels_last"}
    assert plan.rows >= 8
    assert [unit.name for unit in plan.units] == ["0"]
    before.check()


def test_objects_that_affect_each_other_stay_together_and_get_as_many_draws() -> None:
    model, x, settings = Mixing(), normal(40, 4), Settings(piece=1)
    posterior = stochbn.fit(model, [normal(64, 4, seed=3)], 8)
    plan = plan_of(model, posterior, x, settings)
    assert "over examples" in plan.together
    assert not plan.ways
    draws = list(posterior.iter_draws(50, seeded(), quasi=True))
    every = torch.stack(slow(model, draws, x)).softmax(2)
    for tolerance, counts in ((0, [50]), (0.5, [4]), (None, range(4, 51, 2))):
        found = Predictive(model, posterior, generator=seeded(), tolerance=tolerance, settings=settings)(x)
        assert any(torch.allclose(found.probs, every[:count].mean(0), atol=1e-6) for count in counts)


class Odd(nn.Module):
    """Does one thing that passes must not be made cheaper for."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.other, self.head, self.what = nn.BatchNorm1d(8), nn.Linear(8, 3), what

    def forward(self, x: Tensor) -> Tensor:
        x, what = self.first(x), self.what
        if what == "writes to large batches" and len(x) > 8:
            x = x.mul_(1.5)
        elif what == "writes to large values" and (x > 4).any():
            x[x > 4] *= 1.5
        if what == "the function of a norm" and not self.training:
            x = F.batch_norm(x, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias)
        elif what == "a norm by keyword":
            x = self.norm(input=x)
        else:
            x = self.norm(x)
        if what == "some come to the second norm":
            chosen = x[:, 0] > 0.3
            if chosen.any():
                x[chosen] = self.other(self.second(x[chosen]))
        else:
            x = self.other(self.second(x.relu()))
        if what in ("the mean of all", "the mean of all, a class masked", "the mean of all, a class impossible"):
            x = x - x.mean(0)
        elif what == "the first of all":
            x = x - x[:1]
        elif what == "the one before":
            x = torch.cat([x[:1], x[1:] + x[:-1]])
        elif what == "groups of four":
            x = x.view(-1, 4, 8).cumsum(1).view(-1, 8)
        out: Tensor = self.head(x.relu()) * 2
        masks = {"the mean of all, a class masked": -1e9, "the mean of all, a class impossible": -float("inf")}
        if what in masks:
            out = torch.cat([out, out.new_full((len(out), 1), masks[what])], 1)
        return out


@pytest.mark.parametrize("before", ["nothing", "equal objects", "not a number", "small objects"])
@pytest.mark.parametrize(
    "what",
    [
        "nothing", "writes to large batches", "writes to large values", "the function of a norm", "a norm by keyword",
        "some come to the second norm", "the mean of all", "the mean of all, a class masked",
        "the mean of all, a class impossible", "the first of all", "the one before", "groups of four",
    ],
)  # fmt: skip
def test_odd_networks_get_the_results_of_slow_passes(what: str, before: str) -> None:
    model = Odd(what)
    settled(model, 4)
    posterior = stochbn.fit(model, [normal(256, 4, seed=3)], 8 if what != "some come to the second norm" else 64)
    predictive = Predictive(model, posterior, 9, tolerance=0, settings=Settings(piece=256))
    for objects in (64, 8):
        x = normal(objects, 4)
        x[-3] *= 20
        if before == "equal objects":
            predictive(torch.zeros_like(x))
        elif before == "small objects":
            predictive(0.01 * x)
        elif before == "not a number":
            with pytest.raises(ValueError, match="not finite"):
                predictive(torch.where(torch.arange(objects)[:, None] == 0, float("nan"), x))
        draws = list(posterior.iter_draws(9, seeded(), quasi=True))
        for _ in range(2):
            found = predictive(x, generator=seeded())
            wanted = torch.stack(slow(model, draws, x)).softmax(2).mean(0)
            torch.testing.assert_close(found.probs, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner", [False, True])
def test_a_network_that_is_compiled_already_is_run_without(inner: bool) -> None:
    model, x = settled(mlp(), 4), normal(8, 4)
    posterior = stochbn.fit(model, [normal(64, 4, seed=3)], 8)
    compiled: Any = torch.compile(model, backend="eager")
    other = nn.Sequential(compiled) if inner else compiled
    own = stochbn.fit(other, [normal(64, 4, seed=3)], 8)
    found = Predictive(other, own, 9, tolerance=0)(x, generator=seeded())
    wanted = Predictive(model, posterior, 9, tolerance=0)(x, generator=seeded())
    torch.testing.assert_close(found.probs, wanted.probs)


def test_a_network_that_needs_its_own_layout_keeps_it() -> None:
    model, x = Viewing(), normal(12, 2, 6, 6)
    posterior = stochbn.fit(model, [normal(64, 2, 6, 6, seed=3)], 8)
    plan = plan_of(model.eval(), posterior, x)
    assert "channels_last" not in plan.ways
    assert not plan.together
    draws = list(posterior.iter_draws(9, seeded(), quasi=True))
    found = Predictive(model, posterior, 9, generator=seeded(), tolerance=0)(x)
    torch.testing.assert_close(found.probs, torch.stack(slow(model, draws, x)).softmax(2).mean(0))


@given(rows=st.integers(0, 300), objects=st.integers(1, 100))
def test_draws_in_a_pass_fit_its_rows_and_the_checks(rows: int, objects: int) -> None:
    draws = Plan(rows=rows).draws(objects)
    assert draws in (1, 2) or draws % 4 == 0
    assert draws == 1 or draws * objects <= rows


# Quasi-random draws and early stops


@pytest.mark.parametrize("kind", KINDS)
def test_quasi_random_draws_have_the_moments_of_independent_ones(kind: str) -> None:
    model = settled(convnet(), 2, 6, 5)
    posterior = stochbn.fit(model, [normal(1024, 2, 6, 5, seed=5)], 8, kind)
    quasi = list(posterior.iter_draws(512, seeded(1), quasi=True))
    plain = posterior.draw(4096, seeded(2))
    for name, values in plain.items():
        found = torch.stack([draw[name] for draw in quasi])
        spread = values.std(0)
        assert ((found.mean(0) - values.mean(0)).abs() < 0.15 * spread + 1e-6).all()
        assert ((found.std(0) / spread - 1).abs() < 0.2).all()


@pytest.mark.parametrize("kind", ["factorized", "joint"])
def test_quasi_random_draws_are_worth_more_than_is_claimed(kind: str) -> None:
    model = settled(mlp(), 4)
    posterior = stochbn.fit(model, [normal(2048, 4, seed=9)], 16, kind)
    x = normal(64, 4, seed=1)

    def mean(n: int, seed: int, quasi: bool) -> Tensor:
        draws = list(posterior.iter_draws(n, seeded(seed), quasi=quasi))
        with made(model, posterior, x) as some:
            return some(draws).softmax(2).mean(0)

    model.eval()
    truth = mean(2000, 99, False)
    error = {q: sum((mean(12, seed, q) - truth).square().mean() for seed in range(20)) for q in (False, True)}
    assert error[False] > posterior.quasi_gain * error[True]


def test_pairs_of_quasi_random_draws_are_opposite() -> None:
    model = settled(mlp(), 4)
    posterior = stochbn.fit(model, [normal(480, 4, seed=9)], 6, "factorized")
    first, second = posterior.iter_draws(2, seeded(), quasi=True)
    centre = stochbn.fit(model, [normal(480, 4, seed=9)], 6, "factorized").expected[0].float()
    means = [torch.cat([v for name, v in draw.items() if name.endswith("mean")]) for draw in (first, second)]
    torch.testing.assert_close(means[0] + means[1], 2 * centre, rtol=1e-5, atol=1e-5)


ROUNDED = Settings(bfloat16=True, weights=0)
"""As on a processor that multiplies bfloat16 numbers, for small networks too."""


def rounding_net() -> tuple[nn.Module, stochbn.Posterior]:
    model = settled(convnet(), 2, 6, 5).eval()
    return model, stochbn.fit(model, [normal(64, 2, 6, 5, seed=9)], 8)


def test_passes_in_bfloat16_differ_by_less_than_the_noise() -> None:
    model, posterior = rounding_net()
    x, draws = normal(40, 2, 6, 5, seed=4), list(posterior.iter_draws(8, seeded(1)))
    before = Untouched(model)
    wanted = torch.stack(slow(model, draws, x)).softmax(2)
    with made(model, posterior, x, ROUNDED, exact=False) as some:
        assert some.plan.head == "8"
        assert some.draws == 4
        probs = some(draws)
        assert some.plan.head == "8", "rounding is small here"
    assert probs.dtype == torch.float32
    error = (probs.softmax(2) - wanted).square().mean()
    assert 0 < error < 0.5 * wanted.var(0).mean() / 50
    before.check()


@pytest.mark.parametrize("why", ["many draws", "next to no noise", "few objects"])
def test_where_bfloat16_matters_the_call_goes_on_without(why: str) -> None:
    model, posterior = rounding_net()
    x = normal(3 if why == "few objects" else 40, 2, 6, 5, seed=4)
    posterior = posterior.rescale(1e9) if why == "next to no noise" else posterior
    averaged = 10**7 if why == "many draws" else 50
    draws = list(posterior.iter_draws(8, seeded(1)))
    wanted = torch.stack(slow(model, draws, x))
    for _ in range(2):
        with made(model, posterior, x, ROUNDED, exact=False, averaged=averaged) as some:
            assert some.plan.head == "8", "every call asks anew"
            torch.testing.assert_close(some(draws), wanted, rtol=1e-4, atol=1e-5)
            assert some.plan.head == ""


def test_rounding_that_matters_to_many_draws_does_not_matter_to_few() -> None:
    model, posterior = rounding_net()
    x, draws = normal(40, 2, 6, 5, seed=4), list(posterior.iter_draws(8, seeded(1)))
    for averaged, ended in ((10**7, ""), (50, "8"), (10**7, "")):
        with made(model, posterior, x, ROUNDED, exact=False, averaged=averaged) as some:
            some(draws)
            assert some.plan.head == ended


def test_two_draws_tell_that_rounding_matters_by_far() -> None:
    model, posterior = rounding_net()
    x, rounded = normal(40, 2, 6, 5, seed=4), []
    model.get_submodule("3").register_forward_hook(lambda layer, args, out: rounded.append(out.dtype == torch.bfloat16))
    draws = list(posterior.iter_draws(8, seeded(1)))
    alone = replace(ROUNDED, ways=ROUNDED.ways - {"stacked"})
    for averaged, count in ((10**7, 2), (50, 8)):
        network = copy.deepcopy(model)
        with made(network, posterior, x, alone, exact=False, averaged=averaged) as some:
            rounded.clear()
            some(draws)
        assert sum(rounded) == count


def test_no_bfloat16_where_it_is_not_wanted() -> None:
    model, posterior = rounding_net()
    x = normal(40, 2, 6, 5, seed=4)
    assert not plan_of(model, posterior, x, ROUNDED).head
    assert not plan_of(model, posterior, x, replace(ROUNDED, bfloat16=False), exact=False).head
    assert not plan_of(model, posterior, x, replace(ROUNDED, weights=10**6), exact=False).head
    double = copy.deepcopy(model).double()
    assert not plan_of(double, posterior, x.double(), ROUNDED, exact=False).head
    exact = Predictive(model, posterior, 8, tolerance=0, settings=ROUNDED)(x, generator=seeded(3))
    wanted = torch.stack(slow(model, list(posterior.iter_draws(8, seeded(3), quasi=True)), x)).softmax(2).mean(0)
    torch.testing.assert_close(exact.probs, wanted, rtol=1e-4, atol=1e-6)


def test_rounding_is_checked_on_the_objects_of_each_call() -> None:
    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = convnet()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x - x.mean((1, 2, 3), keepdim=True))
            return out

    model, x = Offset(), normal(40, 2, 6, 5, seed=4)
    settled(model, 2, 6, 5).eval()
    posterior = stochbn.fit(model, [normal(64, 2, 6, 5, seed=9)], 8)
    draws = list(posterior.iter_draws(8, seeded(1)))
    with made(model, posterior, x, ROUNDED, exact=False) as some:
        some(draws)
        assert some.plan.head == "body.8"
    wanted = torch.stack(slow(model, draws, x + 300))
    with made(model, posterior, x + 300, ROUNDED, exact=False) as some:
        torch.testing.assert_close(some(draws), wanted, rtol=1e-3, atol=1e-3)
        assert not some.plan.head


def test_equal_generators_give_equal_predictions_in_bfloat16() -> None:
    model, posterior = rounding_net()
    x = normal(40, 2, 6, 5, seed=4)
    predictive = Predictive(model, posterior, settings=ROUNDED)
    first, second = (predictive(x, generator=seeded(3)).probs for _ in range(2))
    assert torch.equal(first, second)


class Sharp(nn.Module):
    """Amplifies the rounding of large inputs, and rounds in bfloat16 by more than the noise for some."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convnet()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x) + (x.amax((1, 2, 3)) * 30).sin()[:, None]
        return out


@pytest.mark.parametrize("settings", [ROUNDED, Settings(), Settings(piece=256)])
@pytest.mark.parametrize("tolerance", [None, 0])
@pytest.mark.parametrize("kind", ["smooth", "sharp"])
def test_a_call_gives_the_same_whatever_calls_came_before(
    kind: str, tolerance: float | None, settings: Settings
) -> None:
    model = Sharp() if kind == "sharp" else convnet()
    settled(model, 2, 6, 5).eval()
    posterior = stochbn.fit(model, [normal(64, 2, 6, 5, seed=9)], 8)
    batches = {n: normal(n, 2, 6, 5, seed=n) for n in (1, 12, 40)}
    batches |= {n + 50: 1e3 * normal(n, 2, 6, 5, seed=n) for n in (12, 40)}
    batches |= {n + 100: torch.zeros(n, 2, 6, 5) for n in (12, 40)}
    found: dict[int, list[Tensor]] = {}
    for order in (list(batches), list(batches)[::-1], [40, 90, 140, 40, 12, 62, 12, 90, 1, 140]):
        predictive = Predictive(copy.deepcopy(model), posterior, settings=settings, tolerance=tolerance)
        for n in order:
            found.setdefault(n, []).append(predictive(batches[n], generator=seeded(3)).probs)
    for each in found.values():
        for one in each[1:]:
            torch.testing.assert_close(one, each[0], rtol=0, atol=2e-6)


def test_an_input_that_fails_says_nothing_of_those_after_it() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body = nn.Embedding(9, 4), mlp()

        def forward(self, places: Tensor) -> Tensor:
            out: Tensor = self.body(F.dropout(self.table(places), 0.3, self.training))
            return out

    model, places = Strict(), torch.arange(40) % 9
    settled(model.body, 4)
    posterior = stochbn.fit(model, [places], 8)
    for kind in (Predictive, MCDropout):
        wanted = kind(copy.deepcopy(model), posterior=posterior)(places, generator=seeded())
        predictive = kind(model, posterior=posterior)
        with pytest.raises(IndexError):
            predictive(places + 9)
        assert torch.equal(predictive(places, generator=seeded()).probs, wanted.probs)


def test_prediction_again_after_a_change_is_that_of_the_same_global_numbers() -> None:
    model = settled(nn.Sequential(mlp(), Counts()), 4).eval()
    posterior, x = stochbn.fit(model, [normal(64, 4, seed=9)], 8), normal(12, 4)
    predictive, found = Predictive(model, posterior), []
    with torch.random.fork_rng():
        for _ in range(2):
            torch.manual_seed(4)
            found.append(predictive(x).probs)
    assert torch.equal(*found)


class Counts(nn.Module):
    """Changes a number in each pass, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return x


@given(tolerance=st.floats(0.01, 0.3) | st.none(), n=st.integers(1, 30), seed=st.integers(0, 1000))
def test_every_example_has_the_mean_of_its_first_draws_whole_pairs_of_them(
    tolerance: float | None, n: int, seed: int
) -> None:
    model = settled(mlp(), 4)
    posterior = stochbn.fit(model, [normal(48, 4, seed=9)], 6)
    x = 3 * normal(n, 4, seed=seed)
    found = Predictive(model, posterior, 50, tolerance=tolerance)(x, generator=seeded(seed))
    draws = list(posterior.iter_draws(50, seeded(seed), quasi=True))
    every = torch.stack(slow(model, draws, x)).softmax(2).double()
    means = torch.stack([every[:count].mean(0) for count in range(4, 51, 2)])
    assert ((means - found.probs).abs().amax(2) <= 1e-5).any(0).all()


@pytest.mark.parametrize("kind", ["joint", "factorized", "empirical"])
@pytest.mark.parametrize(("draws", "made"), [(3, 3), (4, 4), (7, 6), (50, 50)])
def test_an_example_that_is_never_done_gets_all_draws_in_pairs(kind: str, draws: int, made: int) -> None:
    model, x = settled(mlp(), 4), normal(5, 4)
    posterior = stochbn.fit(model, [normal(480, 4, seed=9)], 6, kind)
    found = Predictive(model, posterior, draws, tolerance=1e-9)(x, generator=seeded(2))
    every = slow(model, list(posterior.iter_draws(made, seeded(2), quasi=True)), x)
    torch.testing.assert_close(found.probs, torch.stack(every).softmax(2).mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tolerance", [-1, float("nan"), float("inf")])
def test_a_tolerance_that_is_none_is_refused(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance must be a finite number from 0"):
        Predictive(settled(mlp(), 4), tolerance=tolerance)
    with pytest.raises(TypeError, match="tolerance must be a number"):
        Predictive(settled(mlp(), 4), tolerance="small")  # type: ignore[arg-type]


def test_an_interrupt_leaves_the_network_as_it_was() -> None:
    SEEN["calls"] = -1000

    class Interrupting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            SEEN["calls"] = SEEN.get("calls", 0) + 1
            if SEEN["calls"] > 2:
                raise KeyboardInterrupt
            return x

    model = settled(nn.Sequential(*mlp(), Interrupting()), 4)
    posterior = stochbn.fit(model, [normal(48, 4, seed=9)], 16)
    model.train()
    before = Untouched(model)
    SEEN["calls"] = 0
    with pytest.raises(KeyboardInterrupt):
        Predictive(model, posterior, 50, tolerance=0)(normal(40, 4))
    before.check()


class Caching(nn.Module):
    """Keeps something in its first pass, which later ones use."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        self.bias = nn.Parameter(torch.tensor([0.5, -0.5, 1.0]))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        if "kept" not in self.cache:
            mean = next(iter(self.body[1].buffers()))
            self.cache["kept"] = {
                "parameters": lambda: self.bias * 2,
                "the draw": lambda: mean[:3] * 2,
                "the input": lambda: x[0, :3] * 2,
                "the number of examples": lambda: torch.full((3,), float(len(x))),
            }[self.what]()
        return out + self.cache["kept"]


@pytest.mark.parametrize("what", ["parameters", "the draw", "the input", "the number of examples"])
def test_what_a_first_pass_keeps_is_as_in_a_network_of_every_draws_own(what: str) -> None:
    model = Caching(what)
    settled(model, 4).eval()
    model.cache.clear()
    posterior = stochbn.fit(model, [normal(64, 4, seed=9)], 8)
    x = normal(9, 4, seed=4)
    for _ in range(2):
        draws = list(posterior.iter_draws(6, seeded(1), quasi=True))
        wanted = torch.stack(slow(model, draws, x)).softmax(2).mean(0)
        found = Predictive(model, posterior, 6, tolerance=0, check="shape")(x, generator=seeded(1)).probs
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        model.bias.data += 1  # of which no version tells


@pytest.mark.parametrize(("what", "most"), [("parameters", 3), ("the draw", 100)])
def test_a_cache_of_what_parameters_give_costs_a_copy_for_each_call(
    what: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Caching(what)
    settled(model, 4).eval()
    model.cache.clear()
    predictive = Predictive(model, stochbn.fit(model, [normal(64, 4, seed=9)], 8), 20, tolerance=0)
    predictive(normal(9, 4))
    copies: list[int] = []
    fresh = Network.fresh

    def counted(*args: Any, **kwargs: Any) -> Any:
        copies.append(1)
        return fresh(*args, **kwargs)

    monkeypatch.setattr(Network, "fresh", counted)
    predictive(normal(9, 4, seed=4))
    assert 1 <= len(copies) <= most
    assert (len(copies) > 20) == (what == "the draw")
