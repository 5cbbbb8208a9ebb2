from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stochbn
from conftest import Untouched, dropout_net, mlp, normal, seeded, settled
from stochbn import MCDropout, Predictive
from stochbn.execution.masks import Masks

ONES = torch.ones(2, 5, 4)
RANDOM: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(3, 4),
    "randn": lambda: torch.randn(3, 4),
    "randint": lambda: torch.randint(9, (3, 4)),
    "randperm": lambda: torch.randperm(20),
    "rand_like": lambda: torch.rand_like(torch.ones(3, 4)),
    "randn_like": lambda: torch.randn_like(torch.ones(3, 4)),
    "normal": lambda: torch.normal(0.0, 1.0, (3, 4)),
    "normal_": lambda: torch.ones(20).normal_(),
    "uniform_": lambda: torch.ones(20).uniform_(),
    "bernoulli": lambda: torch.full((20,), 0.5).bernoulli(),
    "bernoulli_": lambda: torch.ones(20).bernoulli_(0.3),
    "multinomial": lambda: torch.ones(8).multinomial(5),
    "exponential_": lambda: torch.ones(20).exponential_(),
    "dropout": lambda: F.dropout(torch.ones(50), 0.3),
    "all dropped": lambda: F.dropout(torch.ones(50), 1.0),
    "dropout2d": lambda: F.dropout2d(torch.ones(4, 5, 2, 2), 0.3),
    "alpha dropout": lambda: F.alpha_dropout(torch.ones(50), 0.3, training=True),
    "rrelu": lambda: F.rrelu(-torch.ones(50), training=True),
    "gumbel": lambda: F.gumbel_softmax(torch.ones(5, 4)),
    "attention": lambda: F.scaled_dot_product_attention(ONES, ONES, ONES, dropout_p=0.4),
    "randint between": lambda: torch.randint(3, 9, (20,)),
    "randint_like": lambda: torch.randint_like(torch.ones(20), 9),
    "randint_like between": lambda: torch.randint_like(torch.ones(20), 3, 9),
    "random_ between": lambda: torch.ones(20).random_(3, 9),
    "random_ to": lambda: torch.ones(20).random_(9),
    "randperm of another type": lambda: torch.randperm(20, dtype=torch.int32),
    "normal about tensors": lambda: torch.normal(torch.zeros(20), torch.ones(20)),
    "normal about a tensor": lambda: torch.normal(torch.zeros(20), 2.0),
    "normal of a deviation": lambda: torch.normal(1.0, torch.ones(20)),
    "bernoulli_ of a tensor": lambda: torch.ones(20).bernoulli_(torch.full((20,), 0.4)),
    "bernoulli of a number": lambda: torch.bernoulli(torch.ones(20), 0.4),
    "poisson": lambda: torch.poisson(torch.full((20,), 3.0)),
    "binomial": lambda: torch.binomial(torch.full((20,), 9.0), torch.full((20,), 0.4)),
    "geometric_": lambda: torch.ones(20).geometric_(0.4),
    "log_normal_": lambda: torch.ones(20).log_normal_(),
    "cauchy_": lambda: torch.ones(20).cauchy_(),
    "gamma": lambda: torch.distributions.Gamma(torch.ones(20), 2.0).sample(),
    "dirichlet": lambda: torch.distributions.Dirichlet(torch.ones(3, 5)).rsample(),
    "categorical": lambda: torch.distributions.Categorical(torch.ones(20, 9)).sample(),  # type: ignore[no-untyped-call]
    "into a tensor": lambda: torch.randn(20, out=torch.empty(20)),
    "native dropout": lambda: torch.native_dropout(torch.ones(50), 0.3, True)[0],
    "feature alpha dropout": lambda: F.feature_alpha_dropout(torch.ones(4, 9, 2), 0.3, training=True),
    "rrelu in place": lambda: F.rrelu_(-torch.ones(50), training=True),
    "several": lambda: torch.cat([torch.rand(3), F.dropout(torch.ones(5)), torch.randn(4)]),
}  # fmt: skip


@pytest.mark.parametrize("name", RANDOM)
def test_masks_are_those_of_the_seed_and_leave_the_global_generator(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        start = torch.get_rng_state()
        wanted = [RANDOM[name]() for _ in range(2)]
        before = torch.get_rng_state()
        masks = Masks(5)
        with masks:
            found = [RANDOM[name]() for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), before)
    assert masks.used == (not torch.equal(before, start))
    for first, second in zip(found, wanted, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("rate", [0.0, 1e-4, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(64, 64), (3, 5, 7, 101), (400_000,)])
def test_large_masks_keep_the_share_that_dropout_asks_for_and_are_the_seeds(
    rate: float, shape: tuple[int, ...]
) -> None:
    before, masks = torch.get_rng_state(), []
    for seed in (5, 5, 6):
        with Masks(seed):
            masks.append(F.dropout(torch.ones(shape), rate, training=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(masks[0], masks[1])
    assert not (0.01 < rate < 0.99 and torch.equal(masks[0], masks[2]))
    first = masks[0]
    if rate < 1:
        torch.testing.assert_close(first[first != 0], torch.full_like(first[first != 0], 1 / (1 - rate)))
    kept, count = (first != 0).double().mean().item(), first.numel()
    assert abs(kept - (1 - rate)) <= 5 * (rate * (1 - rate) / count) ** 0.5 + 1e-12


def test_large_masks_are_even_where_16_bits_cannot_tell_the_rate() -> None:
    rate, kept, count = 1 - 1 / 2**18, 0.0, 0
    for seed in range(200):
        with Masks(seed):
            kept += (F.dropout(torch.ones(8192), rate, training=True) != 0).sum().item()
        count += 8192
    expected = count / 2**18
    assert abs(kept - expected) <= 6 * (8192 / 2**16 * expected + expected) ** 0.5


def test_entries_of_large_masks_are_independent_of_their_neighbours() -> None:
    with Masks(1):
        mask = (F.dropout(torch.ones(1000, 1000), 0.3, training=True) != 0).double()
    flat = (mask - 0.7).flatten()
    for lag in (1, 2, 3, 4, 5, 8, 1000):
        assert abs((flat[lag:] * flat[:-lag]).mean().item()) <= 5 * 0.21 / 1000


def test_what_is_not_random_uses_no_masks() -> None:
    masks = Masks(0)
    with masks:
        F.dropout(torch.ones(5), training=False)
        torch.ones(3).softmax(0)
        assert torch.equal(torch.native_dropout(torch.ones(5), 0.5, False)[0], torch.ones(5))
        F.scaled_dot_product_attention(ONES, ONES, ONES)
        own = torch.rand(3, generator=seeded(8))
    assert torch.equal(own, torch.rand(3, generator=seeded(8)))


def test_an_operation_without_a_generator_gets_the_numbers_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stochbn.execution.masks._taking_generator", lambda func: None)
    for name in ("randn", "randint between", "several"):
        test_masks_are_those_of_the_seed_and_leave_the_global_generator(name)


class Noisy(nn.Module):
    """Draws random numbers in all modes."""

    def __init__(self, random: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.dropout, self.random = settled(mlp(), 4), nn.Dropout(0.2), random

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.body(x + 0.5 * self.random(x)))
        return out


@pytest.mark.parametrize(
    "random",
    [
        lambda x: torch.randint(0, 4, (1,)),
        lambda x: torch.randint_like(x, 0, 4),
        lambda x: torch.randperm(4),
        lambda x: torch.normal(torch.zeros_like(x), 1.0),
        lambda x: torch.rand(len(x), 1) if x.sum() > -1e9 else x,
        lambda x: torch.poisson(x.abs()),
    ],
)
def test_a_network_that_is_random_itself_takes_its_numbers_from_the_given_generator(
    random: Callable[[Tensor], Tensor],
) -> None:
    model, x = Noisy(random).eval(), normal(9, 4)
    state = torch.get_rng_state()
    posterior = stochbn.fit(model, [normal(96, 4, seed=3)], 8)
    again = stochbn.fit(model, [normal(96, 4, seed=3)], 8)
    assert torch.equal(posterior.expected, again.expected)
    for call in (
        Predictive(model, posterior), Predictive(model, posterior, 3), Predictive(model),
        MCDropout(model, 9), MCDropout(model, 9, posterior),
    ):  # fmt: skip
        first, second, other = (call(x, generator=seeded(seed)).probs for seed in (1, 1, 2))
        assert torch.equal(first, second)
        assert not torch.equal(first, other)
    drawn = Predictive(model, posterior.rescale(1e12), 9)(x, generator=seeded(), keep_draws=True)
    assert (drawn.log_probs.std(0) > 0).any(), "every draw has numbers of its own"
    exact = stochbn.Exact(model, [normal(96, 4, seed=3)], 8, draws=3)
    assert torch.equal(exact(x).probs, exact(x).probs)
    assert torch.equal(torch.get_rng_state(), state)


class Functional(nn.Module):
    """Calls dropout itself, by the function, by attention or as DropPath does."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.norm, self.head, self.way = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3), way
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x)).relu()
        if self.way == "function":
            hidden = F.dropout(hidden, 0.5, self.training)
        elif self.way == "attention":
            tokens = hidden[:, None].expand(-1, 3, -1)
            hidden = self.attention(tokens, tokens, tokens)[0].mean(1)
        elif self.way == "scaled dot product":
            tokens = hidden.view(-1, 4, 2)
            rate = 0.5 if self.training else 0.0
            hidden = F.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=rate).flatten(1)
        elif self.training:  # drop path: other numbers, not by a function of dropout
            hidden = hidden * torch.rand(hidden.shape[0], 1).gt(0.5) * 2
        out: Tensor = self.head(hidden)
        return out


def slow(model: nn.Module, draws: int, x: Tensor, posterior: stochbn.Posterior | None, drop: Any) -> Tensor:
    """Every draw's probabilities, written out: the order of random numbers is that of the call."""
    source = seeded(3)
    seeds = torch.randint(2**62, (draws,), generator=source).tolist()
    drawn = posterior.iter_draws(draws, source, quasi=True) if posterior is not None else ({} for _ in seeds)
    probs = []
    for seed, draw in zip(seeds, drawn, strict=True):
        changed = copy.deepcopy(model).eval()
        for name, values in draw.items():
            changed.get_buffer(name).copy_(values)
        drop(changed)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            probs.append(changed(x).softmax(1))
    return torch.stack(probs)


def _dropouts(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()


@pytest.mark.parametrize("drawn", [False, True])
def test_dropout_is_that_of_slow_passes(drawn: bool) -> None:
    model, x = settled(dropout_net(), 4), normal(9, 4)
    posterior = stochbn.fit(model, [normal(96, 4, seed=3)], 8) if drawn else None
    before, state = Untouched(model), torch.get_rng_state()
    dropped = MCDropout(model, 10, posterior, keep_draws=True)
    found = [dropped(x, generator=seeded(3)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    wanted = slow(model, 10, x, posterior, _dropouts)
    for prediction in found:
        torch.testing.assert_close(prediction.log_probs.exp(), wanted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(prediction.probs, wanted.mean(0), rtol=1e-4, atol=1e-6)
    before.check()


@pytest.mark.parametrize("way", ["function", "attention", "scaled dot product"])
def test_modules_that_call_dropout_themselves_drop(way: str) -> None:
    model, x = settled(Functional(way), 4), normal(9, 4)
    wanted = slow(model, 10, x, None, lambda m: (m.train(), m.norm.eval()))
    found = MCDropout(model, 10, keep_draws=True)(x, generator=seeded(3))
    torch.testing.assert_close(found.log_probs.exp(), wanted, rtol=1e-4, atol=1e-6)
    assert wanted.std(0).amax() > 0.01


def test_other_randomness_of_training_stays_off() -> None:
    model, x = settled(nn.Sequential(Functional("drop path"), nn.BatchNorm1d(3), nn.Dropout(0.5)), 4), normal(9, 4)
    found = MCDropout(model, 10, keep_draws=True)(x, generator=seeded(3))
    wanted = slow(model, 10, x, None, _dropouts)
    torch.testing.assert_close(found.log_probs.exp(), wanted, rtol=1e-4, atol=1e-6)


def test_a_network_without_dropout_is_refused_and_predictive_drops_nothing() -> None:
    model, x = settled(Functional("drop path"), 4), normal(9, 4)
    with pytest.raises(ValueError, match="has no dropout with a positive rate"):
        MCDropout(model, 10)(x)
    for way in ("function", "attention", "scaled dot product", "drop path"):
        model = settled(Functional(way), 4).train()
        posterior = stochbn.fit(model, [normal(96, 4, seed=3)], 8)
        first, second = (Predictive(model, posterior, 9, tolerance=0)(x, generator=seeded()).probs for _ in range(2))
        assert torch.equal(first, second)
        wanted = torch.stack([_evaluated(model, d, x) for d in posterior.iter_draws(9, seeded(), quasi=True)]).mean(0)
        torch.testing.assert_close(first, wanted, rtol=1e-4, atol=1e-6)


def _evaluated(model: nn.Module, draw: dict[str, Tensor], x: Tensor) -> Tensor:
    changed = copy.deepcopy(model).eval()
    for name, values in draw.items():
        changed.get_buffer(name).copy_(values)
    with torch.no_grad():
        out: Tensor = changed(x).softmax(1)
    return out


class Auxiliary(nn.Module):
    """Gives something else in training mode, and calls dropout itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.dropout = Functional("function"), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Any:
        x = F.dropout(x, 0.2, self.training)
        out = self.dropout(self.body(x))
        return torch.cat([out, out], 1) if self.training else out


def test_training_output_of_another_structure_warns_the_caller() -> None:
    model, x = settled(Auxiliary(), 4), normal(9, 4)
    dropped = MCDropout(model, 10, keep_draws=True)
    with pytest.warns(UserWarning, match="call dropout themselves") as caught:
        found = dropped(x, generator=seeded(3))
    assert [w.filename for w in caught] == [__file__]
    wanted = slow(model, 10, x, None, _dropouts)
    torch.testing.assert_close(found.log_probs.exp(), wanted, rtol=1e-4, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is told once
        dropped(x)


def test_a_rate_that_is_none_is_refused_by_torch_however_large_the_mask() -> None:
    for size in (10, 10_000):
        with Masks(5), pytest.raises(RuntimeError, match="bernoulli_ expects p to be in"):
            torch.native_dropout(torch.ones(size), float("nan"), True)
