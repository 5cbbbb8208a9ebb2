from __future__ import annotations

import copy
import math
import operator
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import stochbn
from conftest import Untouched, normal, seeded, settled
from stochbn import Predictive
from stochbn.execution.follow import Followed, follow
from stochbn.execution.sizes import ExampleCount, Shape, Sizes, plain
from stochbn.execution.verify import spread
from stochbn.network.calling import network_input
from stochbn.network.replica import Network
from stochbn.tasks import Embedding


class Body(nn.Module):
    """Does something with the hidden units ``[N, 6]`` when it is not being trained."""

    def __init__(self, operation: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.register_buffer("table", normal(64, 6, seed=5))
        self.unregistered = [nn.Linear(6, 6)]
        self.memory: deque[Tensor] = deque()
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.norm(self.first(x)).relu())
        if not self.training:
            hidden = self.operation(self, hidden)
        out: Tensor = self.head(hidden)
        return out


def one_by_one(model: nn.Module, posterior: stochbn.Posterior, draws: int, seed: int, x: Tensor) -> Tensor:
    """Mean probabilities over draws, each of a fresh copy of the network with its buffers set."""
    probs = []
    for draw in posterior.iter_draws(draws, seeded(seed), quasi=True):
        changed = copy.deepcopy(model).eval()
        buffers = dict(changed.named_buffers(remove_duplicate=False))
        for name, values in draw.items():
            buffers[name].copy_(values)
        with torch.no_grad():
            probs.append(changed(x.clone()).double().softmax(1))
    return torch.stack(probs).mean(0)


ATEN = torch.ops.aten


def _thirds(h: Tensor) -> list[tuple[int, Tensor]]:
    return list(enumerate(h.tensor_split([40, 50])))


def _apart(first: Tensor, second: Tensor) -> Tensor:
    """The two parts of a batch, which are not treated alike."""
    return torch.cat([first * 2, second])


def _repeated(model: Any, h: Tensor) -> Tensor:
    for _ in range(len(h)):
        h = h * 0.97
    return h


def _data_replaced(model: Any, h: Tensor) -> Tensor:
    other = h * 1
    other.data = h.mean(0, keepdim=True).expand(len(h), -1).contiguous()
    return h - other


def _written_by_alias(model: Any, h: Tensor) -> Tensor:
    model.second.bias.data.copy_(-h.mean(0))
    found: Tensor = h + model.second.bias
    return found


def _remembered(model: Any, h: Tensor) -> Tensor:
    model.memory.append(h.mean())
    return h * len(model.memory)


def _first_piece(model: Any, h: Tensor) -> Tensor:
    first, *others = torch.split(h, 8)
    return torch.cat([first * 2, *others])


MIXING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the mean of all": lambda m, h: h - h.mean(0),
    "the mean of all, by .data": lambda m, h: h - h.data.mean(0),
    "the mean of a deep copy": lambda m, h: h - copy.deepcopy(h).mean(0),
    "the first eight": lambda m, h: torch.cat([h[:8] * 2, h[8:]]),
    "the last eight": lambda m, h: torch.cat([h[:-8], h[-8:] * 2]),
    "the first of some pieces": _first_piece,
    "norms over objects": lambda m, h: torch.renorm(h, 2, 1, 0.5),
    "places in groups of three": lambda m, h: h * (torch.arange(len(h)) // 3 + 1)[:, None],
    "places in a table": lambda m, h: h + m.table[: h.shape[0]],
    "a length that is the number of objects": lambda m, h: h.view(3, -1, 2).softmax(1).reshape(h.shape),
    "a mean of looked up rows": lambda m, h: h - m.table.index_select(0, h.argmax(1)).mean(0),
    "rows chosen by a mask": lambda m, h: h - m.table[: h.shape[0]][h[:, 0] > 0].sum(0),
    "data replaced": _data_replaced,
    "a parameter written to by an alias": _written_by_alias,
    "another entry for each place": lambda m, h: h + m.table[0].expand(h.shape[0], -1).roll(1, 0) * h.diagonal(0)[0],
    "the diagonal": lambda m, h: h + F.pad(h.diagonal(), (0, 64))[: h.shape[0], None],
    "sorted": lambda m, h: h.sort(0).values,
    "cumulated": lambda m, h: h.cumsum(0),
    "rolled by six": lambda m, h: h + h.roll(6, 0),
    "flipped": lambda m, h: h + h.flip(0),
    "softmax over objects": lambda m, h: h * h.softmax(0),
    "objects attend to objects": lambda m, h: _attended(h[None])[0],
    "by hand": lambda m, h: (h @ h.T).softmax(1) @ h,
    "einsum": lambda m, h: torch.einsum("nc,mc->nm", h, h).softmax(1) @ h,
    "the best of all": lambda m, h: h * (h[:, :1] >= h[:, 0].topk(min(2, len(h))).values[-1]),
    "normalised by the batch": lambda m, h: F.batch_norm(h, None, None, training=True) if len(h) > 1 else h,
    "a branch on values": lambda m, h: h * 2 if h.sum() > 0 else h,
    "a branch on one value": lambda m, h: h * 2 if float(h[0, 0].detach()) > 0 else h,
    "neighbours": lambda m, h: h + F.avg_pool1d(h.T[None], 3, 1, 1)[0].T,
    "the number in a list": lambda m, h: h / torch.FloatTensor([h.shape[0]]),
    "sampled at the places of another": lambda m, h: _sampled(h, h.roll(1, 0)),
    "sampled over objects": lambda m, h: h + F.grid_sample(h.T[None, :, :, None], m.table[None, None, :4, :2]).sum(),
    **{
        f"the first 40 by {name}": taken
        for name, taken in {
            "a slice": lambda m, h: _apart(h[:40], h[40:]),
            "negative bounds": lambda m, h: _apart(h[:-40], h[-40:]),
            "bounds beyond all": lambda m, h: _apart(h[-(2**62) : 40], h[40 : 2**62]),
            "an index with an ellipsis": lambda m, h: _apart(h.T[..., :40].T, h.T[..., 40:].T),
            "aten's slice": lambda m, h: _apart(ATEN.slice.Tensor(h, 0, 0, 40), ATEN.slice.Tensor(h, 0, 40)),
            "aten's slice from below": lambda m, h: _apart(
                ATEN.slice.Tensor(h, 0, -(2**62), 40), ATEN.slice.Tensor(h, 0, 40, 2**62)
            ),
            "aten's slice by name": lambda m, h: _apart(
                ATEN.slice.Tensor(h, dim=0, end=40), ATEN.slice.Tensor(h, dim=0, start=40)
            ),
            "aten's slice of the last axis": lambda m, h: _apart(
                ATEN.slice.Tensor(h.T, -1, 0, 40).T, ATEN.slice.Tensor(h.T, 1, 40).T
            ),
            "tensor_split": lambda m, h: _apart(*h.tensor_split([40])),
            "tensor_split by a tensor": lambda m, h: _apart(*torch.tensor_split(h, torch.tensor([40]))),
            "vsplit": lambda m, h: _apart(*torch.vsplit(h, [40])),
            "tensor_split in three": lambda m, h: torch.cat([part.tanh() if i else part for i, part in _thirds(h)]),
            "chunk": lambda m, h: torch.cat([part * (2.0 - i) for i, part in enumerate(h.chunk(2))]),
            "all folded into one axis": lambda m, h: _apart(h.view(-1)[:240], h.view(-1)[240:]).view(h.shape),
            "rows of a fixed number": lambda m, h: h.reshape(6, -1).softmax(1).reshape(h.shape),
            "columns of a fixed number": lambda m, h: h.view(6, -1).cumsum(1).view(h.shape),
            "a place in a stack": lambda m, h: torch.stack([h, m.table[: h.shape[0]]], 1).sum(1),
            "a view of the memory": lambda m, h: h.as_strided(h.shape, (0, 1)) + h,
        }.items()
    },
    "every second one": lambda m, h: torch.cat([h[::2], h[1::2]]),
    "selected": lambda m, h: h + h.select(0, 0) - h[-1],
    "indexed by a list": lambda m, h: h - h[[0, 0, 0]].sum(0),
    "index_select": lambda m, h: h - h.index_select(0, torch.tensor([0, 0])).sum(0),
    "taken": lambda m, h: h - h.take(torch.tensor([0])),
    "windows": lambda m, h: h - h.unfold(0, 1, 1).amax((0, 2)),
    "scattered into a slice": lambda m, h: torch.slice_scatter(h, 2 * h[:1], 0, 0, 1),
    "scattered into a place": lambda m, h: torch.select_scatter(h, h[0] * 2, 0, 0),
    "filled at a place": lambda m, h: h.clone().index_fill_(0, torch.tensor([0]), 0.0),
    "put at a place": lambda m, h: h.clone().index_put_((torch.tensor([0]),), torch.tensor(1.0)),
    "a triangle": lambda m, h: h.tril() + h,
    "resized": lambda m, h: h - F.interpolate(h.T[None], size=40).amax((0, 2)),
    "pooled to a fixed number": lambda m, h: h - F.adaptive_max_pool1d(h.T[None], 2).amax((0, 2)),
    "padded and cut": lambda m, h: h + F.pad(h, (0, 0, 37, 0))[:1],
    "reflected": lambda m, h: h + (F.pad(h.T[None], (1, 1), "reflect")[0].T[2:] if len(h) > 1 else 0),
    "the third largest": lambda m, h: h - h.kthvalue(min(3, len(h)), 0).values,
    "cumulated maxima": lambda m, h: h.cummax(0).values,
    "repeated": lambda m, h: (h.repeat(2, 1).view(-1, 12) @ torch.ones(12, 6)).repeat_interleave(2, 0)[: h.shape[0]],
    "numbers of examples by aten": lambda m, h: h - h.sum(0) / ATEN.sym_size.int(h, 0),
    "places looked up": lambda m, h: h + F.embedding(torch.arange(64)[: h.shape[0]], m.table),
    "places from a longer list": lambda m, h: h * (torch.arange(64)[: h.shape[0], None] >= 5),
    "convolved": lambda m, h: h + F.conv1d(h.T[None], torch.ones(6, 6, 3) / 3, padding=1)[0].T,
}  # fmt: skip
"""What brings examples together."""
SIZED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a branch on len": lambda m, h: h * 2 if len(h) < 8 else h,
    "a branch on a shape": lambda m, h: h * 2 if h.shape[0] < 8 else h,
    "a branch on size(0)": lambda m, h: h * 2 if h.size(0) >= 8 else h,
    "odd or even": lambda m, h: h * 2 if h.shape[0] % 2 else h,
    "a branch on numel": lambda m, h: h * 2 if h.numel() > 60 else h,
    "a branch on the shape's numel": lambda m, h: h * 2 if h.shape.numel() > 60 else h,
    "a branch on nbytes": lambda m, h: h * 2 if h.nbytes > 240 else h,
    "a branch on aten's size": lambda m, h: h * 2 if ATEN.sym_size.int(h, 0) > 8 else h,
    "a branch on aten's number of entries": lambda m, h: h * 2 if ATEN.sym_numel.default(h) > 60 else h,
    "a branch on the size of another": lambda m, h: h * 2 if h.is_same_size(m.table[:9]) else h,
    "the number of pieces": lambda m, h: h * len(h.chunk(9)),
    "a loop": _repeated,
    "a logarithm": lambda m, h: h * math.log(h.shape[0] + 1),
    "bits": lambda m, h: h * (1.0 if (h.shape[0] ^ 1) > 8 else 2.0) * h.shape[0].bit_length(),
    "rounded": lambda m, h: h * (1.0 if round(h.shape[0]) > 8 else 2.0),
    "signed": lambda m, h: h * (1.0 if +h.shape[0] > 8 else 2.0),
    "written out": lambda m, h: h * len(f"{h.shape[0]}"),
    "an entry of a list": lambda m, h: h * ([1.0] * 9 + [2.0] * 100)[h.shape[0]],
    "a range": lambda m, h: h * (2.0 if len(range(h.shape[0])) > 8 else 1.0),
    "unbound": lambda m, h: h * (2.0 if len(h.unbind()) > 8 else 1.0),
    "a sum of ones": lambda m, h: h / torch.ones(h.shape[0]).sum(),
    "a sum of what is expanded": lambda m, h: h + m.table[:1].expand(h.shape[0], -1).sum(0),
    "a sum of rows": lambda m, h: h + m.table[: h.shape[0]].sum(0),
    "a tensor of the shape": lambda m, h: h / torch.tensor(h.shape).sum(),
    "squeezed": lambda m, h: h.unsqueeze(1).squeeze(),
    "new ones": lambda m, h: h + h.new_ones(h.shape[0]).sum(),
}  # fmt: skip
"""What depends on the number of examples."""
APART: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nothing": lambda m, h: h,
    "folded": lambda m, h: F.relu(h.view(-1, 2)).reshape(h.shape[0], 6),
    "turned": lambda m, h: h.view(h.shape[0], 3, 2).transpose(0, 1).softmax(2).transpose(0, 1).reshape(h.shape),
    "padded": lambda m, h: F.pad(h, (1, 1)).unfold(1, 3, 1).sum(2),
    "attention": lambda m, h: _attended(h.view(h.shape[0], 3, 2)).flatten(1),
    "filled in place": lambda m, h: _filled(h),
    "a token in front": lambda m, h: torch.cat([m.table[0].expand(h.shape[0], -1), h], 1)[:, 3:9],
    "zeros behind": lambda m, h: torch.cat([h, torch.zeros(h.shape[0], 2)], 1)[:, 2:],
    "slices": lambda m, h: torch.cat([h[:, :8], h[:, 6:]], 1),
    "looked up": lambda m, h: h + m.table[h.argmax(1)],
    "gathered": lambda m, h: h.gather(1, h.argsort(1)),
    "einsum": lambda m, h: torch.einsum("nc,kc->nk", h, m.table[:6]),
    "layer norm": lambda m, h: F.layer_norm(h, (6,)),
    "group norm": lambda m, h: F.group_norm(h, 2),
    "instance norm": lambda m, h: F.instance_norm(h.view(h.shape[0], 2, 3)).flatten(1),
    "a hidden layer": lambda m, h: m.unregistered[0](h),
    "remembered": _remembered,
    "unfolded": lambda m, h: F.unfold(h.view(h.shape[0], 1, 2, 3), 2).amax(1).repeat(1, 3),
    "folded back": lambda m, h: F.fold(h[:, :, None], (2, 3), (2, 3)).flatten(1),
    "sampled elsewhere": lambda m, h: _sampled(h, h),
    "a number in a list": lambda m, h: h * torch.FloatTensor([0.5]),
}  # fmt: skip
"""What treats examples one by one."""


def _sampled(h: Tensor, places: Tensor) -> Tensor:
    """An example's numbers as a picture of 2 x 3, at places that are given by others."""
    grid = places.view(places.shape[0], 1, 3, 2).tanh().repeat(1, 2, 1, 1)
    return F.grid_sample(h.view(h.shape[0], 1, 2, 3), grid, align_corners=False).flatten(1)


def _attended(h: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(h, h, h)


def _filled(h: Tensor) -> Tensor:
    out = torch.zeros(h.shape[0], 6)
    out[:, :3] = h[:, 3:]
    out[:, 3:] = h[:, :3]
    return out


def followed(model: nn.Module, x: Tensor, count: int) -> Followed:
    network, inputs = Network.of(model.eval()), network_input(model, x)
    network.look()
    return follow(network, spread(inputs, count), {}, Embedding(), frozenset())


@pytest.mark.parametrize("operation", [*MIXING, *SIZED, *APART])
def test_predictions_are_those_of_slow_passes_whatever_was_predicted_before(operation: str) -> None:
    model = settled(Body({**MIXING, **SIZED, **APART}[operation]), 4)
    posterior = stochbn.fit(model, [normal(256, 4, seed=3)], 8)
    for order in ((1, 40), (9, 7)):
        model = copy.deepcopy(model)
        before, predictive = Untouched(model), Predictive(model, posterior, 9, tolerance=0)
        early = Predictive(model, posterior, 50)
        for n in order:
            x = 2 * normal(n, 4, seed=n)
            try:
                wanted = one_by_one(model, posterior, 9, 0, x)
            except (RuntimeError, IndexError, ValueError):  # as plain PyTorch does for so many examples
                continue
            torch.testing.assert_close(predictive(x, generator=seeded()).probs.double(), wanted, rtol=1e-4, atol=1e-5)
            if n > 1:
                # Bits of the same draws: an example gets 8 of them, or up to 24 and as many as the first where done.
                apart = early(x, generator=seeded()).probs - one_by_one(model, posterior, 24, 0, x)
                assert apart.abs().max() < 0.2
        before.check()


@pytest.mark.parametrize("operation", MIXING)
def test_what_mixes_is_judged_mixed(operation: str) -> None:
    model = settled(Body(MIXING[operation]), 4)
    posterior = stochbn.fit(model, [normal(256, 4, seed=3)], 8)
    for n in (9, 40):
        shown = Predictive(model, posterior, 9).explain(normal(n, 4))
        assert "All examples go through the network together" in shown or n < 8
        if "by the batch" not in operation:
            assert "other outputs beside others" not in shown, "seen by its operations, not by numbers"


@pytest.mark.parametrize("operation", APART)
def test_what_treats_objects_one_by_one_is_judged_so(operation: str) -> None:
    model = settled(Body(APART[operation]), 4)
    found = followed(model, normal(9, 4), 3)
    assert not found.dependent
    assert found.sizes.hold(1000)
    assert followed(model, normal(9, 4), 2).trace == found.trace, "whatever their number is"


@pytest.mark.parametrize("operation", SIZED)
def test_what_depends_on_the_number_of_objects_is_not_said_to_hold_for_all(operation: str) -> None:
    model = settled(Body(SIZED[operation]), 4)
    found = [followed(model, normal(9, 4), n) for n in (3, 2)]
    same = not any(f.dependent for f in found) and found[0].trace == found[1].trace
    assert not (same and all(f.sizes.hold(1) and f.sizes.hold(40) for f in found))


def test_a_buffer_that_decides_is_seen_to_change() -> None:
    model = settled(Body(lambda m, h: h - h.mean(0) if m.table[0, 0] == 100 else h), 4)
    posterior = stochbn.fit(model, [normal(256, 4, seed=3)], 8)
    predictive, x = Predictive(model, posterior, 9, tolerance=0), normal(9, 4)
    predictive(x)
    model.get_buffer("table")[0, 0] = 100
    found = predictive(x, generator=seeded()).probs.double()
    torch.testing.assert_close(found, one_by_one(model, posterior, 9, 0, x), rtol=1e-4, atol=1e-5)


def test_an_unregistered_layer_is_seen_to_change() -> None:
    model = settled(Body(APART["a hidden layer"]), 4)
    posterior = stochbn.fit(model, [normal(256, 4, seed=3)], 8)
    predictive, x = Predictive(model, posterior, 9, tolerance=0), normal(9, 4)
    predictive(x)
    with torch.no_grad():
        model.unregistered[0].weight.mul_(3)  # type: ignore[index, union-attr]
    found = predictive(x, generator=seeded()).probs.double()
    torch.testing.assert_close(found, one_by_one(model, posterior, 9, 0, x), rtol=1e-4, atol=1e-5)


def test_weights_that_are_alike_by_chance_prove_nothing() -> None:
    model = settled(Body(lambda m, h: h + m.places[: h.shape[0]]), 4)
    model.places = nn.Parameter(torch.zeros(64, 6))
    posterior = stochbn.fit(model, [normal(40, 4, seed=3)], 8)
    predictive, x = Predictive(model, posterior, 9, tolerance=0, check="shape"), normal(9, 4)
    predictive(x)
    model.places.data.copy_(3 * normal(64, 6, seed=2))  # which leaves its version as it is
    assert "All examples go through the network together" in predictive.explain(x)
    found = predictive(x, generator=seeded()).probs.double()
    torch.testing.assert_close(found, one_by_one(model, posterior, 9, 0, x), rtol=1e-4, atol=1e-5)


# Numbers of examples

NUMBERS = st.integers(-6, 6)
ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "and_", "or_", "xor")
} | {"divmod": divmod, "power": lambda a, b: pow(a, abs(b) % 4), "turned": lambda a, b: b - a * b}
COMPARISONS = [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne]


@given(
    objects=st.integers(1, 12), steps=st.lists(st.tuples(st.sampled_from(sorted(ARITHMETIC)), NUMBERS), max_size=3),
    compare=st.sampled_from(COMPARISONS), limit=st.integers(-5, 40) | st.floats(-5, 40),
)  # fmt: skip
def test_arithmetic_is_that_of_integers_and_holds_where_it_says(
    objects: int, steps: list[tuple[str, int]], compare: Callable[[Any, Any], Any], limit: float
) -> None:
    def program(n: Any) -> tuple[Any, bool]:
        for name, number in steps:
            n = ARITHMETIC[name](n, number)
            n = n[0] if isinstance(n, tuple) else n
        return n, bool(compare(n, limit))

    sizes = Sizes(objects)
    try:
        wanted = program(objects)
    except (ZeroDivisionError, TypeError) as error:
        with pytest.raises(type(error)):
            program(ExampleCount(sizes, 1))
        return
    number, outcome = program(ExampleCount(sizes, 1))
    assert (plain(number), outcome) == wanted
    assert sizes.hold(objects)
    for n in filter(sizes.hold, range(1, 60)):
        value, there = program(n)
        assert there == outcome
        assert value == (number.at(n) if type(number) is ExampleCount else number)


@pytest.mark.parametrize(
    "use",
    [
        range, float, int, hash, str, round, math.log, math.sqrt, math.floor, operator.index, lambda n: f"{n:>3}",
        lambda n: [1, 2, 3, 4][n], lambda n: n.bit_length(), lambda n: ~n, lambda n: [0] * n, lambda n: 2**n,
        lambda n: 7 // n, lambda n: 7 % n, lambda n: 1 / n, lambda n: 1 << n, lambda n: "abcd"[:n], lambda n: n * 0.5,
    ],
)  # fmt: skip
def test_whatever_else_is_done_with_the_number_depends_on_it(use: Callable[[Any], Any]) -> None:
    sizes = Sizes(3)
    assert use(ExampleCount(sizes, 1)) == use(3)
    assert (sizes.low, sizes.high) == (3, 3)


def test_shapes_are_those_of_tensors() -> None:
    sizes = Sizes(3)
    shape = Shape((ExampleCount(sizes, 2), 5, 4))
    assert plain(shape) == torch.Size([6, 5, 4])
    assert plain(shape.numel()) == 120
    assert shape[1:].numel() == 20
    assert isinstance(shape[:2], Shape)
    assert sizes.hold(1000)
    assert isinstance(copy.deepcopy(shape)[0], int)
