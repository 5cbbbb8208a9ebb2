"""What a network's code reads that is no part of the network, and arguments that are no tensors: both may change."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stochbn
from conftest import Untouched, mlp, normal, seeded, settled
from stochbn import Predictive

SORTED = False
CONFIGURATION = {"sorted": False}


def between(x: Tensor, mixes: bool) -> Tensor:
    """The objects, in an order that depends on all of them where they mix."""
    return x.sort(0).values if mixes else x


def as_configured(x: Tensor) -> Tensor:
    return between(x, CONFIGURATION["sorted"])


class ByClass(nn.Module):
    """Goes by an attribute of its class."""

    mixes = False

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(between(x, self.mixes))
        return out


class ByGlobal(ByClass):
    """Goes by a global variable."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(between(x, SORTED))
        return out


class ByHelper(ByClass):
    """Goes by an entry of a global mapping, which another function reads."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(as_configured(x))
        return out


def by_closure() -> tuple[nn.Module, Callable[[], None]]:
    """A network whose forward goes by a variable of the function that made it, and what changes that."""
    mixes = False

    class Inner(ByClass):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(between(x, mixes))
            return out

    def switch() -> None:
        nonlocal mixes
        mixes = True

    return Inner(), switch


def all_together(model: nn.Module, posterior: stochbn.Posterior, x: Tensor, *others: Any) -> Tensor:
    """Mean probabilities of passes with all objects, on a network with its buffers set."""
    probs = []
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for draw in posterior.iter_draws(9, seeded(), quasi=True):
        for name, values in draw.items():
            model.get_buffer(name).copy_(values)
        with torch.no_grad():
            probs.append(model(x.clone(), *others).softmax(1))
    for name, values in kept.items():
        model.get_buffer(name).copy_(values)
    return torch.stack(probs).mean(0)


@pytest.mark.parametrize("place", ["class", "global", "helper", "closure"])
def test_code_that_reads_something_else_than_before_is_looked_at_anew(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    switches: dict[str, Callable[[], None]] = {
        "class": lambda: monkeypatch.setattr(ByClass, "mixes", True),
        "global": lambda: monkeypatch.setitem(globals(), "SORTED", True),
        "helper": lambda: monkeypatch.setitem(CONFIGURATION, "sorted", True),
    }
    inner, switch = by_closure()
    model = {"class": ByClass, "global": ByGlobal, "helper": ByHelper}.get(place, lambda: inner)()
    settled(model, 4)
    posterior = stochbn.fit(model, [normal(96, 4, seed=3)], 8)
    predictive, x = Predictive(model, posterior, 9, tolerance=0), normal(40, 4, seed=8)
    predictive(x)
    assert "All examples go" not in predictive.explain(x)
    switches.get(place, switch)()
    wanted = all_together(model, posterior, x)
    torch.testing.assert_close(predictive(x, generator=seeded()).probs, wanted, rtol=1e-4, atol=1e-5)
    assert "All examples go" in predictive.explain(x)


LOG: dict[str, int] = {"calls": 0}


class Logging(ByClass):
    """Counts its calls in a global mapping."""

    def forward(self, x: Tensor) -> Tensor:
        LOG["calls"] += 1
        return super().forward(x)


def test_what_passes_write_to_outside_of_the_network_does_not_have_it_looked_at_anew() -> None:
    model = Logging()
    settled(model, 4)
    posterior = stochbn.fit(model, [normal(96, 4, seed=3)], 8)
    predictive, x = Predictive(model, posterior, 9, tolerance=0), normal(40, 4, seed=8)
    calls = []
    for _ in range(4):
        before = LOG["calls"]
        predictive(x)
        calls.append(LOG["calls"] - before)
        LOG["calls"] = 0
    assert calls[0] > calls[2] == calls[3]


class ByArgument(nn.Module):
    """Takes what it does from an argument that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor, how: Any) -> Tensor:
        mixes = how["mixes"] if isinstance(how, dict) else how.mixes[0] if hasattr(how, "mixes") else "mixes" in how
        out: Tensor = self.body(between(x, mixes))
        return out


@pytest.mark.parametrize(
    ("how", "change"),
    [
        ({"mixes": False}, lambda how: how.update(mixes=True)),
        (SimpleNamespace(mixes=[False]), lambda how: how.mixes.insert(0, True)),
        (set(), lambda how: how.add("mixes")),
    ],
)
def test_an_argument_that_was_changed_in_place_is_looked_at_anew(how: Any, change: Callable[[Any], None]) -> None:
    model = ByArgument()
    model.body.load_state_dict(settled(mlp(), 4).state_dict())
    model.eval()
    posterior = stochbn.fit(model, [(normal(96, 4, seed=3), how)], 8, inputs=2)
    predictive, x = Predictive(model, posterior, 9, tolerance=0, inputs=2), normal(40, 4, seed=8)
    predictive((x, how))
    change(how)
    wanted = all_together(model, posterior, x, how)
    torch.testing.assert_close(predictive((x, how), generator=seeded()).probs, wanted, rtol=1e-4, atol=1e-5)


def test_an_argument_that_holds_itself_is_taken() -> None:
    model, how = ByArgument(), SimpleNamespace(mixes=[False])
    how.itself = how
    settled(model.body, 4)
    posterior = stochbn.fit(model, [(normal(96, 4, seed=3), how)], 8, inputs=2)
    assert Predictive(model, posterior, 9, inputs=2)((normal(5, 4), how)).probs.shape == (5, 3)


class Scaled(nn.Module):
    """Takes a number as a tensor without axes beside its objects."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, scale: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.body(scale * x)
        return out


def test_tensors_without_axes_are_for_all_objects() -> None:
    model, x, scale = Scaled(), normal(96, 4, seed=3), torch.tensor(2.0)
    settled(model.body, 4)
    posterior = stochbn.fit(model, [(scale, x)], 8, inputs=2)
    of_body = stochbn.fit(model.body, [2 * x], 8)
    torch.testing.assert_close(posterior.expected, of_body.expected)
    few = x[:6]
    predictive, plain = Predictive(model, posterior, 9, tolerance=0, inputs=2), Predictive(model.body, of_body, 9)
    torch.testing.assert_close(
        predictive((scale, few), generator=seeded()).probs,
        plain(2 * few, generator=seeded(), keep_draws=True).probs,
        rtol=1e-4,
        atol=1e-5,
    )
    doubled = predictive((2 * scale, few), generator=seeded()).probs
    assert not torch.allclose(doubled, predictive((scale, few), generator=seeded()).probs)
    exact = stochbn.Exact(model, [(scale, x)], draws=3, inputs=2)
    torch.testing.assert_close(exact((scale, few)).probs, stochbn.Exact(model.body, [2 * x], draws=3)(2 * few).probs)


class Graph(nn.Module):
    """Sends messages along edges ``[2, E]`` between nodes ``[V, F]``, and sums over the nodes of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        hidden = self.first(nodes)
        hidden = self.norm(hidden.index_add(0, edges[1], hidden[edges[0]])).relu()
        sums = hidden.new_zeros(int(graph.max()) + 1, 6).index_add(0, graph, hidden)
        out: Tensor = self.head(sums)
        return out


def graphs(seed: int, count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    nodes, edges = 4 * count, 9 * count
    ends = torch.randint(nodes, (2, edges), generator=seeded(seed))
    return normal(nodes, 4, seed=seed), ends, torch.arange(count).repeat_interleave(4)


def test_batches_of_graphs_are_taken_as_they_come() -> None:
    model = Graph()
    model.train()
    for seed in range(20):
        model(*graphs(seed))
    model.eval()
    batches = [graphs(seed, 4 + seed % 3) for seed in range(30)]
    with pytest.raises(ValueError, match=r"share a first.*batch_size=None"):
        stochbn.fit(model, batches, inputs=3)
    before = Untouched(model)
    posterior = stochbn.fit(model, batches, batch_size=None, inputs=3, centre="observed")
    hidden = []
    for nodes, edges, _ in batches:
        with torch.no_grad():
            h = model.first(nodes)
            hidden.append(h.index_add(0, edges[1], h[edges[0]]))
    means = torch.stack([h.mean(0) for h in hidden]).double()
    torch.testing.assert_close(posterior.expected[0], means.mean(0), rtol=1e-5, atol=1e-5)
    predictive = Predictive(model, posterior, 9, tolerance=0, inputs=3)
    x = graphs(77)
    assert "All examples go through the network together" in predictive.explain(x)
    wanted = all_together(model, posterior, *x)
    torch.testing.assert_close(predictive(x, generator=seeded()).probs, wanted, rtol=1e-4, atol=1e-5)
    before.check()


class OwnRandom(nn.Module):
    """Draws random numbers from a generator of its own, and counts its calls."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.body, self.random, self.calls = mlp(), generator, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if isinstance(self.random, torch.Generator):
            number = float(torch.rand((), generator=self.random))
        else:
            number = self.random.random()
        out: Tensor = self.body(x) * number
        return out


@pytest.mark.parametrize("make", [random.Random, np.random.default_rng, seeded], ids=["python", "numpy", "torch"])
def test_a_networks_own_random_numbers_are_others_in_every_draw_and_leave_its_generator(
    make: Callable[[int], Any],
) -> None:
    model = OwnRandom(make(5))
    settled(model.body, 4)
    model.eval()
    posterior = stochbn.fit(model, [normal(96, 4, seed=3)], 8)
    predictive = Predictive(model, posterior.rescale(float("inf")), 9)
    kept = predictive(normal(2, 4), keep_draws=True).log_probs.exp()
    assert len({round(value, 5) for value in kept[:, 0, 0].tolist()}) == len(kept)
    own, fresh = model.random, make(5)
    draws = [float(torch.rand((), generator=g)) if isinstance(g, torch.Generator) else g.random() for g in (own, fresh)]
    assert draws[0] == draws[1]
    assert model.calls == 0


class Dropping(nn.Module):
    """Calls dropout itself, and cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(F.dropout(x, 0.4, self.training))
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Dropping:
        raise TypeError("there is but one")


def test_functional_dropout_of_a_network_that_cannot_be_copied_is_on() -> None:
    model = Dropping()
    settled(model.body, 4)
    model.eval()
    x, before = normal(7, 4), Untouched(model)
    prediction = stochbn.MCDropout(model, 400)(x, generator=seeded())
    before.check()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        masks = torch.bernoulli(torch.full((4000, *x.shape), 0.6), generator=seeded(3))
        wanted = model.body((masks * x / 0.6).flatten(0, 1)).softmax(1).view(4000, 7, 3)
    error = wanted.std(0) * (1 / 400 + 1 / 4000) ** 0.5
    assert ((prediction.probs - wanted.mean(0)).abs() < 5 * error + 1e-4).all()
