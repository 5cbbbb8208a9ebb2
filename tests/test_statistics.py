from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import (
    CASES,
    Case,
    Failing,
    Frozen,
    Twice,
    Untouched,
    convnet,
    dropout_net,
    mixed_up,
    mlp,
    normal,
    seeded,
    settled,
    slow_statistics,
)
from stochbn.network.calling import NetworkInput, network_input
from stochbn.network.replica import Network
from stochbn.posteriors.moments import Moments
from stochbn.statistics import Observer, mini_batches


def observer(model: nn.Module, evaluation: str | None = None) -> Observer:
    """An observer of a copy of the network."""
    network = Network.of(model)
    replica = network.fresh(own_parameters=True)
    assert replica is not None
    return Observer(replica, network.trained() - {evaluation})


def observed(model: nn.Module, batches: list[Any]) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {}
    observe = observer(model)
    for number, batch in enumerate(batches):
        for name, found in observe(network_input(model, batch), number).items():
            rows.setdefault(name, []).append(found)
    return {name: torch.cat(found) for name, found in rows.items()}


# Moments


@given(
    shape=st.lists(st.integers(1, 4), max_size=2),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=7),
    location=st.floats(-1e4, 1e4),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**31),
)
def test_merged_moments_are_those_of_two_passes_over_everything(
    shape: list[int], sizes: list[int], location: float, scale: float, seed: int
) -> None:
    parts = [location + scale * normal(n, *shape, seed=seed + i, dtype=torch.float64) for i, n in enumerate(sizes)]
    merged = Moments.of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(Moments.of(part))
    everything = torch.cat(parts)
    n = len(everything)
    mean = everything.sum(0) / n
    squares = (everything - mean).square().sum(0)
    rounding = 1e-12 * (abs(location) + scale)
    assert merged.count == n
    torch.testing.assert_close(merged.mean, mean, rtol=1e-12, atol=rounding)
    torch.testing.assert_close(merged.squares, squares, rtol=1e-9, atol=n * rounding * (scale + rounding))
    torch.testing.assert_close(
        merged.variance, squares / max(n - 1, 1), rtol=1e-9, atol=n * rounding * (scale + rounding)
    )


@given(sizes=st.lists(st.integers(1, 5), min_size=3, max_size=6), order=st.randoms(use_true_random=False))
def test_the_order_of_merging_does_not_matter(sizes: list[int], order: Any) -> None:
    parts = [Moments.of(3 + normal(n, 2, 3, seed=i, dtype=torch.float64)) for i, n in enumerate(sizes)]
    left = parts[0]
    for part in parts[1:]:
        left = left.merge(part)
    shuffled = list(parts)
    while len(shuffled) > 1:  # a random tree in a random order, as processes would join theirs
        order.shuffle(shuffled)
        shuffled.append(shuffled.pop().merge(shuffled.pop()))
    right = shuffled[0]
    assert left.count == right.count == sum(sizes)
    torch.testing.assert_close(left.mean, right.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left.squares, right.squares, rtol=1e-10, atol=1e-12)


def test_one_observation_has_no_variance() -> None:
    single = Moments.of(torch.tensor([[1.0, 1e6]]))
    assert (single.count, single.mean.tolist(), single.variance.tolist()) == (1, [1.0, 1e6], [0.0, 0.0])


def test_moments_are_float64_and_survive_a_large_common_offset() -> None:
    values = 1e6 + torch.tensor([[0.0], [1.0], [2.0]])
    merged = Moments.of(values[:1]).merge(Moments.of(values[1:]))
    assert merged.mean.dtype == merged.squares.dtype == torch.float64
    assert merged.variance.item() == pytest.approx(1.0, rel=1e-9)


# Mini-batches


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), batch_size=st.integers(1, 5))
def test_every_batch_is_split_alone_and_its_remainder_dropped(sizes: list[int], batch_size: int) -> None:
    numbers = iter(range(1000))
    batches = [torch.tensor([[float(next(numbers))] for _ in range(n)]).reshape(n, 1) for n in sizes]
    wanted = [
        batch[start : start + batch_size].flatten().tolist()
        for batch in batches
        for start in range(0, len(batch), batch_size)
        if start + batch_size <= len(batch)
    ]
    if max(sizes) >= batch_size:
        found = mini_batches(mlp(1), batches, batch_size)
        assert [piece.args[0].flatten().tolist() for piece in found] == wanted
    else:
        with pytest.raises(ValueError, match=r"smaller than batch_size|no batches"):
            list(mini_batches(mlp(1), batches, batch_size))


def test_without_a_batch_size_batches_are_taken_as_they_come() -> None:
    batches = [normal(3, 4), normal(0, 4), normal(7, 4), normal(1, 4)]
    assert [len(piece) for piece in mini_batches(mlp(), batches, None)] == [3, 7, 1]


def test_a_generator_is_read_lazily_and_once() -> None:
    read = []

    def stream() -> Iterator[tuple[Tensor, str]]:
        for i in range(3):
            read.append(i)
            yield normal(4, 4, seed=i), "label"

    pieces = mini_batches(mlp(), stream(), 2)
    assert read == []
    next(pieces)
    next(pieces)
    assert read == [0]
    assert len(list(pieces)) == 4
    assert read == [0, 1, 2]


@pytest.mark.parametrize(
    ("batches", "batch_size", "error", "message"),
    [
        ([], 16, ValueError, "no batches to observe.*empty or already used up"),
        (iter(()), None, ValueError, "no batches to observe"),
        ([normal(0, 4)], 16, ValueError, "no batches to observe"),
        ([normal(7, 4), normal(3, 4)], 8, ValueError, r"smaller than batch_size=8 \(the largest has 7 examples\)"),
        (normal(16, 4), 4, TypeError, r"expected an iterable of batches.*pass \[tensor\]"),
        (5, 4, TypeError, "expected an iterable of batches.*got int"),
        (None, None, TypeError, "expected an iterable of batches.*got NoneType"),
        ([normal(16, 4)], 0, ValueError, "batch_size must be at least 1, got 0"),
        ([normal(16, 4)], -3, ValueError, "batch_size must be at least 1, got -3"),
        ([normal(16, 4)], 4.0, TypeError, r"whole number or None, got 4\.0"),
        ([normal(16, 4)], "16", TypeError, "whole number or None, got '16'"),
        ([normal(16, 4)], True, TypeError, "whole number or None, got True"),
        (["a.png"], 4, TypeError, "batch of type str"),
        ({"features": normal(16, 4)}, 4, TypeError, "batch of type str"),
        ([()], 4, ValueError, "empty tuple"),
    ],
)
def test_unusable_batches_are_refused(batches: Any, batch_size: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list(mini_batches(mlp(), batches, batch_size))


# Observing


def test_the_observations_are_the_mean_and_biased_variance_of_every_call(case: Case) -> None:
    model = case.model()
    batches = [case.inputs(n, seed=n) for n in (16, 7, 16, 2)]
    found = observed(model, batches)
    wanted = slow_statistics(model, batches, case.channel_axis)
    assert list(found) == list(wanted)
    for name, rows in wanted.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], rows, rtol=2e-5, atol=2e-6)


def test_in_float64_they_agree_to_rounding(case: Case) -> None:
    model = copy.deepcopy(case.model()).double()
    batches = [case.inputs(9, seed=n, dtype=torch.float64) for n in range(3)]
    wanted = slow_statistics(model, batches, case.channel_axis)
    for name, rows in observed(model, batches).items():
        torch.testing.assert_close(rows, wanted[name], rtol=1e-10, atol=1e-12)


@given(
    channels=st.integers(1, 5),
    space=st.lists(st.integers(1, 4), max_size=3),
    n=st.integers(2, 9),
    scale=st.floats(1e-2, 1e2),
    offset=st.floats(-10, 10),
    seed=st.integers(0, 2**31),
)
def test_one_layer_sees_the_statistics_of_its_input(
    channels: int, space: list[int], n: int, scale: float, offset: float, seed: int
) -> None:
    kind = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][len(space)]
    x = offset + scale * normal(n, channels, *space, seed=seed)
    found = observed(kind(channels), [x])[""]
    values = x.double().transpose(0, 1).reshape(channels, -1)
    mean = values.sum(1) / values.shape[1]
    var = (values - mean[:, None]).square().sum(1) / values.shape[1]
    assert found.shape == (1, 2, channels)
    torch.testing.assert_close(found[0, 0], mean, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(found[0, 1], var, rtol=1e-3, atol=1e-5 * (scale + abs(offset)) ** 2)


def test_a_layer_called_twice_gives_its_calls_in_order() -> None:
    model = settled(Twice(), 4)
    assert isinstance(model, Twice)
    x = normal(12, 4, seed=3) * 2 + 1
    rows = observed(model, [x])["norm"]
    assert rows.shape == (2, 2, 4)
    torch.testing.assert_close(rows[0, 0], x.double().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows[0, 1], x.double().var(0, unbiased=False), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(rows[0], rows[1], rtol=0.05)


def test_a_layer_that_is_never_called_gives_nothing() -> None:
    case = CASES["never called"]
    assert list(observed(case.model(), [case.inputs(8)])) == ["norm"]


def test_a_frozen_layer_is_left_out_with_a_warning_and_still_uses_its_running_averages() -> None:
    model = settled(nn.Sequential(nn.Conv2d(2, 5, 3), Frozen(5), nn.Conv2d(5, 4, 2), nn.BatchNorm2d(4)), 2, 6, 5)
    batches = [normal(8, 2, 6, 5, seed=i) for i in range(3)]
    with pytest.warns(UserWarning, match="'1' does not update its running statistics") as caught:
        found = observed(model, batches)
    assert len(caught) == 1
    assert list(found) == ["3"]
    torch.testing.assert_close(found["3"], slow_statistics(model, batches)["3"], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("momentum", [None, 1.0])
def test_a_layer_whose_running_averages_are_those_of_the_first_mini_batch_is_not_taken_for_frozen(
    momentum: float | None,
) -> None:
    model = settled(convnet(lambda c: nn.BatchNorm2d(c, momentum=momentum)), 2, 6, 5)
    batches = [normal(8, 2, 6, 5, seed=i) for i in range(2)]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    model.train()(batches[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = observed(model, batches)
    assert list(found) == ["1", "4"]


def test_a_dead_layer_is_observed_with_zero_variance() -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2))
    rows = observed(model, [-normal(6, 3).abs(), -normal(6, 3, seed=1).abs()])["1"]
    assert torch.equal(rows, torch.zeros(2, 2, 3, dtype=torch.float64))


def test_dropout_is_on_while_observing_as_in_training() -> None:
    model = settled(nn.Sequential(nn.Dropout(0.5), *dropout_net()), 4)
    x = normal(32, 4, seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        state = torch.get_rng_state()
        found = observed(model, [x])
        assert torch.equal(torch.get_rng_state(), state), "masks are from a generator of the mini-batch's own"
        torch.manual_seed(0)
        wanted = slow_statistics(model, [x])
    torch.testing.assert_close(found["2"], wanted["2"], rtol=2e-5, atol=2e-6)
    with torch.random.fork_rng():
        torch.manual_seed(12)
        assert not torch.allclose(found["2"], slow_statistics(model, [x])["2"], rtol=1e-3)


def test_mappings_and_their_order_do_not_matter_to_a_layer_with_named_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, other: Tensor, features: Tensor) -> Tensor:
            out: Tensor = self.norm(input=features)  # as a keyword of the layer
            return out + other

    x = normal(8, 4)
    rows = observed(Named(), [{"features": x, "other": 5 * x}])["norm"]
    torch.testing.assert_close(rows[0, 0], x.double().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows[0, 1], x.double().var(0, unbiased=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_activations_name_the_first_layer_that_saw_them(bad: float) -> None:
    model = settled(mlp(), 4)
    x = normal(8, 4)
    x[3, 2] = bad
    with pytest.raises(ValueError, match="'1' saw non-finite activations"):
        observed(model, [normal(8, 4), x])
    model.get_parameter("3.weight").data[0, 0] = bad
    with pytest.raises(ValueError, match="'4' saw non-finite activations"):
        observed(model, [normal(8, 4)])


def test_the_network_is_left_exactly_as_it_was(case: Case) -> None:
    model = mixed_up(case.model())
    before = Untouched(model)
    grad = torch.is_grad_enabled()
    observed(model, [case.inputs(8, seed=i) for i in range(3)])
    before.check()
    assert torch.is_grad_enabled() == grad


@pytest.mark.parametrize("after", [0, 2])
def test_it_is_left_as_it_was_when_it_raises_midway(case: Case, after: int) -> None:
    model = Failing(case.model(), after)
    mixed_up(model)
    before = Untouched(model)
    with pytest.raises(KeyError, match="the network's own error"):
        observed(model, [case.inputs(8, seed=i) for i in range(4)])
    before.check()


def test_the_networks_own_hooks_still_run() -> None:
    model = settled(mlp(), 4)
    seen = []
    model.get_submodule("1").register_forward_hook(lambda layer, args, out: seen.append(layer.training))
    observed(model, [normal(8, 4), normal(8, 4, seed=1)])
    assert seen == [True, True]
    model(normal(8, 4))
    assert seen == [True, True, False]


def test_a_second_round_of_observations_is_the_same_as_the_first() -> None:
    for case in CASES.values():
        model, batches = case.model(), [case.inputs(8, seed=i) for i in range(2)]
        first, second = observed(model, batches), observed(model, batches)
        for name, rows in first.items():
            assert torch.equal(rows, second[name])


def test_the_stream_of_observations_does_not_alias_the_next_one() -> None:
    model = settled(mlp(), 4)
    observe = observer(model)
    first = observe(NetworkInput((normal(8, 4),)), 0)
    kept = {name: rows.clone() for name, rows in first.items()}
    observe(NetworkInput((normal(8, 4, seed=1) * 3,)), 1)
    for name, rows in first.items():
        assert torch.equal(rows, kept[name])


def test_half_precision_networks_are_observed_to_their_precision() -> None:
    for dtype, tolerance in ((torch.bfloat16, 5e-2), (torch.float16, 1e-2)):
        model = copy.deepcopy(CASES["BatchNorm1d [N, C]"].model()).to(dtype)
        batches = [normal(16, 4, seed=i, dtype=dtype) for i in range(2)]
        wanted = slow_statistics(copy.deepcopy(model).double(), [b.double() for b in batches])
        for name, rows in observed(model, batches).items():
            torch.testing.assert_close(rows, wanted[name], rtol=tolerance, atol=tolerance)


def test_random_numbers_are_not_consumed_without_dropout() -> None:
    model, state = settled(mlp(), 4), torch.get_rng_state()
    observed(model, [torch.randn(8, 4, generator=seeded())])
    assert torch.equal(torch.get_rng_state(), state)


class Shared(list[bool]):
    """What a network and its copies note together."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self


class Layouts(nn.Module):
    """Notes the layout of a convolution's weights at every call; `view` cannot take channels-last activations."""

    def __init__(self, view: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.dropout, self.after = nn.Dropout(dropout), nn.BatchNorm1d(4 * 16)
        self.head, self.view = nn.Linear(4 * 16, 3), view
        self.seen = Shared()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.convolution.weight.stride(1) == 1)
        x = self.dropout(self.norm(self.convolution(x)))
        out: Tensor = self.head(self.after(x.view(len(x), -1) if self.view else x.flatten(1)))
        return out


@pytest.mark.parametrize(("view", "last"), [(False, True), (True, False)])
def test_convolutions_are_observed_in_channels_last_layout_where_that_gives_the_same(view: bool, last: bool) -> None:
    model, batches = Layouts(view), [normal(12, 2, 6, 6, seed=i) for i in range(3)]
    found, seen = observed(model, batches), list(model.seen)
    assert seen == [False, True, last, last]
    for name, rows in slow_statistics(model, batches).items():
        torch.testing.assert_close(found[name], rows, rtol=2e-5, atol=2e-6)


def test_another_layout_is_not_tried_where_it_would_take_other_random_numbers() -> None:
    model, batches = Layouts(view=False, dropout=0.5), [normal(12, 2, 6, 6, seed=i) for i in range(3)]
    found = observed(model, batches)
    each = []
    for number, batch in enumerate(batches):  # each with masks of its own
        with torch.random.fork_rng():
            torch.manual_seed(number)
            each.append(slow_statistics(model, [batch]))
    wanted = {name: torch.cat([one[name] for one in each]) for name in each[0]}
    assert not any(model.seen), "masks are laid out like the activations, so the other layout gives other statistics"
    for name, rows in wanted.items():
        torch.testing.assert_close(found[name], rows, rtol=2e-5, atol=2e-6)


# Layers that normalise a part of their input


class Split(nn.BatchNorm2d):
    """As timm's SplitBatchNorm2d: in training a layer of its own for every part of the mini-batch."""

    def __init__(self, channels: int, parts: int = 2) -> None:
        super().__init__(channels)
        self.others = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(parts - 1))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        first, *rest = x.chunk(1 + len(self.others))
        return torch.cat([super().forward(first), *(norm(part) for norm, part in zip(self.others, rest, strict=True))])


class Masked(nn.BatchNorm1d):
    """Normalises only examples with a first feature above 0: of another number in every mini-batch."""

    def forward(self, x: Tensor) -> Tensor:
        out = x.clone()
        out[x[:, 0] > 0] = super().forward(x[x[:, 0] > 0])
        return out


class Ghost(nn.BatchNorm1d):
    """Normalises groups of four examples, one after another; its averages follow the last."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(Ghost, self).forward(part) for part in torch.split(x, 4)]) if self.training else x


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_layer_that_normalises_a_part_of_the_mini_batch_has_the_variance_of_that_part(parts: int) -> None:
    model = nn.Sequential(Split(2, parts), nn.Conv2d(2, 3, 1))
    batches = [2 * normal(12, 2, 1, 2, seed=i) + 1 for i in range(3)]
    found = observed(model, batches)
    names = ["0", *(f"0.others.{i}" for i in range(parts - 1))]
    assert found.keys() == set(names)
    for place, name in enumerate(names):
        part = torch.stack([torch.chunk(b, parts)[place].double().transpose(0, 1).flatten(1) for b in batches])
        wanted = torch.stack([part.mean(2), part.var(2, correction=0)], 1)
        assert found[name].shape == (3, 2, 2), "one observation for each mini-batch, also of the first"
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [Masked, Ghost])
def test_the_part_that_is_normalised_may_be_another_each_time(cls: type[nn.BatchNorm1d]) -> None:
    batches = [2 * normal(n, 3, seed=n) + 1 for n in (8, 14, 23)]
    found = observed(nn.Sequential(cls(3), nn.Linear(3, 2)), batches)["0"]
    for rows, batch in zip(found, batches, strict=True):
        part = (batch[batch[:, 0] > 0] if cls is Masked else torch.split(batch, 4)[-1]).double()
        torch.testing.assert_close(rows[0], part.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rows[1], part.var(0, correction=0), rtol=1e-5, atol=1e-5)


# Layers in evaluation mode


def test_modules_in_evaluation_mode_are_not_observed_and_work_with_their_running_statistics() -> None:
    model = settled(convnet(), 2, 6, 5)
    batches = [normal(8, 2, 6, 5, seed=i) for i in range(3)]
    observe = observer(model, evaluation="1")
    found = [observe(NetworkInput((batch,)), number) for number, batch in enumerate(batches)]
    assert [list(one) for one in found] == [["4"]] * 3
    assert observe.frozen == []
    hidden = [model[3](model[2](model[1](model[0](batch)))) for batch in batches]  # type: ignore[index]
    for one, out in zip(found, hidden, strict=True):
        rows = out.detach().double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(one["4"][0], torch.stack([rows.mean(1), rows.var(1, correction=0)]), rtol=1e-4,
                                   atol=1e-5)  # fmt: skip


def test_frozen_layers_are_named() -> None:
    model = settled(nn.Sequential(nn.Conv2d(2, 5, 3), Frozen(5), nn.Conv2d(5, 4, 2), nn.BatchNorm2d(4)), 2, 6, 5)
    observe = observer(model)
    with pytest.warns(UserWarning, match="'1' does not update"):
        observe(NetworkInput((normal(8, 2, 6, 5),)), 0)
    assert observe.frozen == ["1"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_running_statistics_that_are_not_finite_do_not_matter(bad: float) -> None:
    model = settled(mlp(), 4)
    batches = [normal(8, 4, seed=i) for i in range(2)]
    wanted = observed(model, batches)
    model.get_buffer("1.running_mean")[2] = bad
    model.get_buffer("4.running_var")[:] = bad
    found = observed(model, batches)
    assert all(torch.equal(rows, wanted[name]) for name, rows in found.items())
    assert not model.get_buffer("1.running_mean")[2].isfinite()


def test_compiled_parts_are_observed() -> None:
    model = settled(mlp(), 4)
    batches = [normal(8, 4, seed=i) for i in range(2)]
    wanted = observed(model, batches)
    assert isinstance(model, nn.Sequential)
    first: Any = torch.compile(model[:3], backend="eager")
    parts = nn.Sequential(first, *list(model)[3:])
    parts(batches[0])  # compiled before there were hooks
    found = observed(parts, batches)
    assert [rows.shape for rows in found.values()] == [rows.shape for rows in wanted.values()]
    for rows, other in zip(found.values(), wanted.values(), strict=True):
        torch.testing.assert_close(rows, other)
