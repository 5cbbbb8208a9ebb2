"""Random small networks, put together from parts that are each hard in some way, beside slow passes of copies."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations

import stochbn
from conftest import Untouched, normal, seeded, settled
from stochbn import Predictive
from stochbn.calibration_report import Choice
from stochbn.posteriors import KINDS

C, SIDE = 6, 4
"""Channels and side of the maps that all parts take and give."""


class Part(nn.Module):
    """A module that maps ``[N, C, SIDE, SIDE]`` to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(C)
        self.layer = nn.Conv2d(C, C, 3, padding=1)


class Wrap(Part):
    """A function of a part and its input."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Counting(Part):
    """Counts its calls in a buffer and in an attribute, and multiplies by both."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.count = 0
        self.seen: list[float] = []

    calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.calls += 1
            self.count += 1
            self.seen.append(1.0)
        return torch.tanh(self.norm(self.layer(x))) * (1 + 0.2 * self.calls) * (1 + 0.1 * self.count + len(self.seen))


class Assigning(Part):
    """Writes to a buffer, to an attribute and to the data of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(C))
        self.scale = nn.Parameter(torch.ones(C))
        self.kept: Tensor | None = None

    last: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.last = self.last + 1
            self.scale.data = self.scale.data * 1.1
            self.kept = self.scale + self.last
        out = self.norm(self.layer(x))
        return torch.tanh(out if self.kept is None else out * self.kept.view(-1, 1, 1))


class Bottleneck(Part):
    """Goes through a vector for each example, normalised by a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.flat, self.up = nn.Linear(C, 5), nn.BatchNorm1d(5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.flat(self.down(x.mean((2, 3))))
        gate: Tensor = self.up(self.flat(torch.tanh(hidden))).sigmoid()
        return x * gate[:, :, None, None]


class Places(Part):
    """Treats the places of a map as examples: ``[N * P, C]``, and places first: ``[P, N, C]``."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.line, self.turned = nn.BatchNorm1d(C), nn.Linear(C, C), nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        rows = x.permute(0, 2, 3, 1).reshape(-1, C)
        rows = torch.relu(self.line(self.flat(rows)))
        first = rows.view(n, SIDE * SIDE, C).transpose(0, 1)
        first = first + torch.tanh(first.mean(0, keepdim=True))
        out = self.turned(first.permute(1, 2, 0)).view(n, C, SIDE, SIDE)
        return torch.tanh(out)


class Attention(Part):
    """Places attend to each other, by one layer and by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.after = nn.MultiheadAttention(C, 2, batch_first=True), nn.BatchNorm1d(SIDE * SIDE)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.after(tokens + self.attend(tokens, tokens, tokens, need_weights=False)[0])
        weights = torch.einsum("npc,nqc->npq", tokens, tokens).div(C**0.5).softmax(2)
        out: Tensor = (weights @ tokens).transpose(1, 2).reshape(x.shape)
        return out


class Experts(Part):
    """Routes each example to one of two experts, by its own values or the best of the batch."""

    def __init__(self, *, best: bool) -> None:
        super().__init__()
        self.route, self.other, self.best = nn.Linear(C, 2), nn.Conv2d(C, C, 1), best

    def forward(self, x: Tensor) -> Tensor:
        scores = self.route(x.mean((2, 3)))
        if self.best and not self.training:
            chosen = torch.zeros(len(x)).scatter(0, scores[:, 0].topk(max(1, len(x) // 2)).indices, 1.0)
        else:
            chosen = (scores[:, 0] > scores[:, 1]).to(x.dtype)
        chosen = chosen[:, None, None, None]
        return torch.tanh(self.norm(chosen * self.layer(x) + (1 - chosen) * self.other(x)))


class Compiled(Part):
    """Has a part that is compiled, and one that is compiled in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = torch.compile(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(self.norm(x)).relu()
        return out


class Named(Part):
    """The same layers under several names, and in a list that is not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.alias, self.again = self.norm, nn.ModuleList([self.layer, nn.Sequential(self.norm)])
        self.hidden = [nn.Conv2d(C, C, 1)]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again[1](torch.tanh(self.again[0](self.alias(self.hidden[0](x)))))
        return out


def _by_function(m: Any, x: Tensor) -> Tensor:
    x = m.layer(x)
    if m.training:
        return torch.relu(m.norm(x))
    return torch.relu(F.batch_norm(x, m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias))


def _written(m: Any, x: Tensor) -> Tensor:
    out = m.norm(m.layer(x)).clone()
    out[:, :2] = out[:, 2:4] * 0.5
    out[out > 1] = 1.0
    out += x
    return torch.tanh(out.mul_(0.5))


def _evaluated(change: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A change between examples that is made in evaluation mode alone."""

    def function(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(m.norm(m.layer(x)))
        return x if m.training else change(x)

    return function


PARTS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Wrap(lambda m, x: torch.relu(m.norm(m.layer(x)))),
    "residual": lambda: Wrap(lambda m, x: x + torch.relu(m.layer(m.norm(x)))),
    "branches": lambda: Wrap(lambda m, x: torch.cat([m.norm(m.layer(x))[:, :3], F.max_pool2d(x, 3, 1, 1)[:, 3:]], 1)),
    "shared": lambda: Wrap(lambda m, x: torch.tanh(m.norm(m.layer(torch.tanh(m.norm(m.layer(x))))))),
    "by keyword": lambda: Wrap(lambda m, x: torch.relu(m.norm(input=m.layer(x)))),
    "by function": lambda: Wrap(_by_function),
    "written": lambda: Wrap(_written),
    "grouped": lambda: Wrap(lambda m, x: m.norm(m.other(x)).relu(), other=nn.Conv2d(C, C, 3, padding=1, groups=3)),
    "transposed": lambda: Wrap(
        lambda m, x: m.norm(m.other(F.avg_pool2d(x, 2))).tanh(), other=nn.ConvTranspose2d(C, C, 2, stride=2)
    ),
    "resized": lambda: Wrap(lambda m, x: m.norm(F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:], mode="bilinear"))),
    "padded": lambda: Wrap(lambda m, x: m.norm(F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), m.layer.weight))),
    "shuffled": lambda: Wrap(lambda m, x: m.norm(F.pixel_shuffle(F.pixel_unshuffle(x, 2).flip(1), 2))),
    "unfolded": lambda: Wrap(lambda m, x: m.norm(F.unfold(x, 3, padding=1).view(len(x), C, 9, SIDE, SIDE).amax(2))),
    "recurrent": lambda: Wrap(
        lambda m, x: m.norm(m.other(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).reshape(x.shape)),
        other=nn.GRU(C, C, batch_first=True),
    ),
    "normalised otherwise": lambda: Wrap(
        lambda m, x: m.norm(m.other(F.instance_norm(x)) + F.layer_norm(x, x.shape[1:])), other=nn.GroupNorm(2, C)
    ),
    "old weight norm": lambda: Wrap(
        lambda m, x: m.norm(m.other(x)).tanh(), other=nn.utils.weight_norm(nn.Conv2d(C, C, 1))
    ),
    "weight norm": lambda: Wrap(
        lambda m, x: m.norm(m.other(x)).tanh(), other=parametrizations.weight_norm(nn.Conv2d(C, C, 1))
    ),
    "old spectral norm": lambda: Wrap(
        lambda m, x: m.norm(m.other(x)).tanh(), other=nn.utils.spectral_norm(nn.Conv2d(C, C, 1))
    ),
    "spectral norm": lambda: Wrap(
        lambda m, x: m.norm(m.other(x)).tanh(), other=parametrizations.spectral_norm(nn.Conv2d(C, C, 1))
    ),
    "dropout": lambda: Wrap(lambda m, x: m.other(m.norm(x)), other=nn.Dropout(0.3)),
    "gate": Bottleneck,
    "places": Places,
    "attention": Attention,
    "experts": lambda: Experts(best=False),
    "compiled": Compiled,
    "named": Named,
    "counting": Counting,
    "assigning": Assigning,
    "best experts": lambda: Experts(best=True),
    "mean": lambda: Wrap(_evaluated(lambda x: x - x.mean(0))),
    "sorted": lambda: Wrap(_evaluated(lambda x: x.sort(0).values)),
    "cumulated": lambda: Wrap(_evaluated(lambda x: torch.tanh(x.cumsum(0)))),
    "rolled": lambda: Wrap(_evaluated(lambda x: x + x.roll(1, 0))),
    "flipped": lambda: Wrap(_evaluated(lambda x: x + x.flip(0))),
    "softmax": lambda: Wrap(_evaluated(lambda x: x * x.softmax(0))),
    "by size": lambda: Wrap(_evaluated(lambda x: x * 2 if len(x) > 8 else x)),
    "by shape": lambda: Wrap(_evaluated(lambda x: x * 2 if x.shape[0] >= 5 else x)),
    "odd": lambda: Wrap(_evaluated(lambda x: x * 2 if x.shape[0] % 2 else x)),
    "by values": lambda: Wrap(_evaluated(lambda x: x * 2 if x.sum() > 0 else x)),
    "first": lambda: Wrap(_evaluated(lambda x: torch.cat([x[:1], x[1:] * 2]))),
    "squeezed": lambda: Wrap(_evaluated(lambda x: x.unsqueeze(0).squeeze() if len(x) > 1 else x)),
}  # fmt: skip


class Net(nn.Module):
    """Some parts in a row."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, C, 3, padding=1)
        self.parts = nn.ModuleList(PARTS[name]() for name in names)
        self.head = nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part in self.parts:
            x = part(x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def network(seed: int) -> tuple[nn.Module, str]:
    """A network, in evaluation mode, and the names of its parts."""
    chosen = random.Random(seed)
    names = [*PARTS]
    picked = [names[seed % len(names)], *chosen.sample(names, chosen.randint(1, 3))]
    chosen.shuffle(picked)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return settled(Net(picked), 2, SIDE, SIDE, seed=seed), ", ".join(picked)


def slow(model: nn.Module, draws: list[dict[str, Tensor]], x: Tensor, *, evaluated: bool = True) -> Tensor:
    """``[S, N, K]``: the probabilities of each draw, each of a fresh copy of the network with its buffers set."""
    probs = []
    for draw in draws:
        changed = copy.deepcopy(model)
        if evaluated:
            changed.eval()
        buffers = dict(changed.named_buffers(remove_duplicate=False))
        for name, values in draw.items():
            places = [place for place in buffers if place.replace("_orig_mod.", "") == name]
            buffers[places[0]].copy_(values)
        with torch.no_grad():
            probs.append(changed(x.clone()).double().softmax(1))
    return torch.stack(probs)


def fitted(model: nn.Module, seed: int, kind: str) -> stochbn.Posterior:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # statistics far from the running ones
        return stochbn.fit(model, [normal(96, 2, SIDE, SIDE, seed=seed)], 16, kind)


KIND_OF = [*KINDS]
CASES = [
    pytest.param(seed, kind, marks=() if seed < 30 and kind == KIND_OF[seed % len(KIND_OF)] else pytest.mark.long)
    for seed in range(100)
    for kind in KIND_OF
]
SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 100))]


@pytest.mark.parametrize(("seed", "kind"), CASES)
def test_a_random_network_predicts_what_slow_passes_predict(seed: int, kind: str) -> None:
    model, names = network(seed)
    posterior = fitted(model, seed, kind)
    before = Untouched(model)
    predictive, early = Predictive(model, posterior, 9, tolerance=0), Predictive(model, posterior)
    sizes = [1, 2, 3, 7, 16, 40]
    random.Random(seed).shuffle(sizes)
    for n in sizes[:3]:
        x = normal(n, 2, SIDE, SIDE, seed=seed + n)
        wanted = slow(model, list(posterior.iter_draws(9, seeded(seed), quasi=True)), x).mean(0)
        probs = predictive(x, generator=seeded(seed)).probs.double()
        torch.testing.assert_close(probs, wanted, rtol=1e-4, atol=1e-5, msg=lambda m: f"{names}: {m}")
    # The mean over examples of a random direction in class space: 8 draws or more beside 24 independent ones.
    direction = normal(3, seed=seed, dtype=torch.float64)
    every = slow(model, list(posterior.iter_draws(24, seeded(77))), x) @ direction
    values = early(x, generator=seeded(seed)).probs.double() @ direction
    spread = every.mean(1).std() * (1 / 8 + 1 / 24) ** 0.5
    assert (values.mean() - every.mean()).abs() < 6 * spread + 1e-4, names
    before.check()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_network_with_dropout_predicts_what_slow_passes_predict(seed: int) -> None:
    model, names = network(seed)
    assert isinstance(model, Net)
    model.parts.append(nn.Dropout(0.3))
    posterior = fitted(model, seed, KIND_OF[seed % len(KIND_OF)])
    before, x = Untouched(model), normal(7, 2, SIDE, SIDE, seed=seed)
    prediction = stochbn.MCDropout(model, 60, posterior)(x, generator=seeded(seed), keep_draws=True)
    before.check()
    dropping = copy.deepcopy(model).eval()
    for module in dropping.modules():
        module.training = isinstance(module, nn.Dropout)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        every = slow(dropping, list(posterior.iter_draws(120, seeded(77))), x, evaluated=False)
    direction = normal(3, seed=seed, dtype=torch.float64)
    # Where outputs are saturated, few draws differ at all: the spread is that of the draws of both.
    means = [(draws @ direction).mean(1) for draws in (prediction.log_probs.double().exp(), every)]
    spread = torch.stack([mean.var() / len(mean) for mean in means]).sum().sqrt()
    assert (means[0].mean() - means[1].mean()).abs() < 6 * spread + 1e-4, names


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_network_is_exact_as_slow_passes_are(seed: int) -> None:
    model, names = network(seed)
    data, x = normal(24, 2, SIDE, SIDE, seed=seed), normal(5, 2, SIDE, SIDE, seed=seed + 1)
    exact, before = stochbn.Exact(model, [data], 8, draws=3), Untouched(model)
    probs = exact(x).probs.double()
    before.check()
    every = []
    for others in torch.split(data, 7)[:3]:
        for one in torch.split(x, 1):
            changed = copy.deepcopy(model).eval()
            for module in changed.modules():
                module.training = isinstance(module, _BatchNorm)
            with torch.no_grad():
                every.append(changed(torch.cat([others, one]))[-1:].double().softmax(1))
    wanted = torch.cat(every).view(3, len(x), 3).mean(0)
    torch.testing.assert_close(probs, wanted, rtol=1e-4, atol=1e-5, msg=lambda m: f"{names}: {m}")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_network_is_calibrated_by_what_slow_passes_predict(seed: int) -> None:
    model, names = network(seed)
    posterior = fitted(model, seed, KIND_OF[seed % len(KIND_OF)])
    x = normal(40, 2, SIDE, SIDE, seed=seed + 1)
    labels = torch.randint(3, (len(x),), generator=seeded(seed))
    before, sizes = Untouched(model), [4.0, 16.0, 64.0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the smallest is the best
        choices: list[Choice] = []
        stochbn.calibrate(
            model, posterior, [(x, labels)], batch_sizes=sizes, temperature=False, seed=seed, report=choices.append
        )
    before.check()
    losses = {}
    for size in sizes:
        draws = list(posterior.rescale(size).iter_draws(8, seeded(seed), quasi=True))
        losses[size] = -slow(model, draws, x).mean(0)[torch.arange(len(x)), labels].log().mean().item()
    for one in choices[0].options:
        if one.centre:
            assert one.mean == pytest.approx(losses[one.batch_size], abs=1e-5), names
