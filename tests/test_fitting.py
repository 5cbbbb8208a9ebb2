from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stochbn
from conftest import (
    CASES,
    ByName,
    Case,
    Failing,
    Frozen,
    Twice,
    Untouched,
    Unused,
    fit_factorized,
    mixed_up,
    mlp,
    normal,
    per_layer,
    settled,
    slow_statistics,
)


def fit(*args: Any, **options: Any) -> Any:
    """A posterior about what it observed, as the paper's."""
    return stochbn.fit(*args, **{"centre": "observed", **options})


def assert_moments(
    posterior: stochbn.Factorized, rows: dict[str, Tensor], rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """The posterior has the mean and unbiased variance over the observations ``[n, 2, C]`` of every layer."""
    assert dict(posterior.layers) == {name: found.shape[2] for name, found in rows.items()}
    for name, found in per_layer(posterior).items():
        n = len(rows[name])
        mean = rows[name].sum(0) / n
        var = (rows[name] - mean).square().sum(0) / max(n - 1, 1)
        torch.testing.assert_close(found["mean_mean"], mean[0], rtol=rtol, atol=atol)
        torch.testing.assert_close(found["variance_mean"], mean[1], rtol=rtol, atol=atol)
        torch.testing.assert_close(found["mean_variance"], var[0], rtol=rtol, atol=atol)
        torch.testing.assert_close(found["variance_variance"], var[1], rtol=rtol, atol=atol)


def same(one: stochbn.Factorized, other: stochbn.Factorized) -> None:
    assert one.layers == other.layers
    assert one.skipped == other.skipped
    assert one.mini_batches == other.mini_batches
    for key in ("mean_mean", "mean_variance", "variance_mean", "variance_variance"):
        assert torch.equal(getattr(one, key), getattr(other, key)), key


def test_the_moments_are_those_of_the_statistics_of_a_slow_loop(case: Case) -> None:
    model = case.model()
    incoming = [case.inputs(20, seed=1), case.inputs(17, seed=2), case.inputs(5, seed=3)]
    pieces = [x[i : i + 6] for x in incoming for i in range(0, len(x) - 5, 6)]
    posterior = fit_factorized(model, incoming, batch_size=6)
    assert posterior.mini_batches == len(pieces) == 5
    assert posterior.batch_size == 6
    assert posterior.dtype == torch.float32
    assert_moments(posterior, slow_statistics(model, pieces, case.channel_axis))


@given(
    inputs=st.integers(1, 4),
    hidden=st.integers(1, 6),
    sizes=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    batch_size=st.integers(2, 8),
    scale=st.floats(0.1, 10),
    seed=st.integers(0, 10**6),
)
def test_it_agrees_with_two_passes_for_all_sizes(
    inputs: int, hidden: int, sizes: list[int], batch_size: int, scale: float, seed: int
) -> None:
    model = settled(mlp(inputs, hidden), inputs, seed=seed).double()
    batches = [scale * normal(n, inputs, seed=seed + i, dtype=torch.float64) for i, n in enumerate(sizes)]
    pieces = [x[i : i + batch_size] for x in batches for i in range(0, len(x) - batch_size + 1, batch_size)]
    if not pieces:
        with pytest.raises(ValueError, match="smaller than batch_size"):
            fit_factorized(model, batches, batch_size)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "only one mini-batch")
        posterior = fit_factorized(model, batches, batch_size)
    assert posterior.dtype == torch.float64
    assert_moments(posterior, slow_statistics(model, pieces), rtol=1e-9, atol=1e-11 * (1 + scale**4))


def test_normal_activations_give_the_moments_of_sampling_theory() -> None:
    """Means of n normal values have variance v/n; biased variances have mean v(n-1)/n and variance 2v^2(n-1)/n^2."""
    n, count, location, v = 8, 4000, 1.5, 4.0
    x = location + v**0.5 * normal(n * count, 3, seed=8)
    found = per_layer(fit_factorized(nn.BatchNorm1d(3), [x], batch_size=n))[""]
    wanted = {
        "mean_mean": location,
        "mean_variance": v / n,
        "variance_mean": v * (n - 1) / n,
        "variance_variance": 2 * v**2 * (n - 1) / n**2,
    }
    errors = {  # five standard errors
        "mean_mean": 5 * (v / n / count) ** 0.5,
        "mean_variance": 5 * (v / n) * (2 / count) ** 0.5,
        "variance_mean": 5 * (wanted["variance_variance"] / count) ** 0.5,
        "variance_variance": 5 * wanted["variance_variance"] * ((2 + 12 / (n - 1)) / count) ** 0.5,
    }
    for key, value in wanted.items():
        assert (found[key] - value).abs().max().item() < errors[key], key


def test_the_paper_batch_size_of_16_is_the_default() -> None:
    posterior = fit_factorized(settled(mlp(), 4), [normal(40, 4)])
    assert (posterior.batch_size, posterior.mini_batches) == (16, 2)


def test_incoming_batches_are_taken_whole_without_a_batch_size() -> None:
    model = settled(mlp(), 4)
    batches = [normal(n, 4, seed=n) for n in (5, 9, 2)]
    posterior = fit_factorized(model, batches, batch_size=None)
    assert (posterior.batch_size, posterior.mini_batches) == (None, 3)
    assert_moments(posterior, slow_statistics(model, batches))


def test_every_form_of_batches_gives_the_same_posterior() -> None:
    model = ByName()
    settled(model.body, 4)
    tensors = [normal(16, 4, seed=i) for i in range(3)]
    wanted = fit_factorized(model, [{"features": x} for x in tensors], 8)
    label = torch.zeros(16)

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for x in tensors:
            yield x, label

    for form in (
        tensors,
        tuple(tensors),
        iter(tensors),
        stream(),
        [(x, label) for x in tensors],
        [[x, label] for x in tensors],
        [({"features": x, "extra": 1}, label) for x in tensors],
        [{"labels": label, "features": x, "idx": "a"} for x in tensors],
        DataLoader(TensorDataset(torch.cat(tensors), torch.zeros(48)), batch_size=16),
        DataLoader(TensorDataset(torch.cat(tensors)), batch_size=48),
    ):
        same(fit_factorized(model, form, 8), wanted)


def test_a_used_up_generator_is_refused() -> None:
    model = settled(mlp(), 4)
    stream = (normal(16, 4, seed=i) for i in range(2))
    fit_factorized(model, stream, 8)
    with pytest.raises(ValueError, match="already used up"):
        fit_factorized(model, stream, 8)


def test_a_layer_called_twice_has_one_observation_per_call() -> None:
    model = settled(Twice(), 4)
    batches = [normal(8, 4, seed=i) for i in range(3)]
    rows = slow_statistics(model, batches)
    assert rows["norm"].shape[0] == 6
    posterior = fit_factorized(model, batches, 8)
    assert posterior.mini_batches == 3
    assert not posterior.skipped
    assert_moments(posterior, rows)


def test_a_layer_that_is_never_called_is_skipped() -> None:
    posterior = fit_factorized(settled(Unused(), 4), [normal(32, 4)], 8)
    assert dict(posterior.skipped) == {"auxiliary": "not called"}
    assert list(posterior.layers) == ["norm"]
    posterior.check(Unused(), weights=False)


def test_a_frozen_layer_is_skipped_with_a_warning() -> None:
    model = settled(nn.Sequential(nn.Conv2d(2, 5, 3), Frozen(5), nn.Conv2d(5, 4, 2), nn.BatchNorm2d(4)), 2, 6, 5)
    batches = [normal(8, 2, 6, 5, seed=i) for i in range(3)]
    with pytest.warns(UserWarning, match="'1' does not update its running statistics in training mode"):
        posterior = fit_factorized(model, batches, 8)
    assert dict(posterior.skipped) == {"1": "does not update its running statistics while training"}
    assert_moments(posterior, {"3": slow_statistics(model, batches)["3"]})


def test_a_network_with_only_frozen_layers_is_refused() -> None:
    model = settled(nn.Sequential(nn.Conv2d(2, 5, 3), Frozen(5)), 2, 6, 5)
    with (
        pytest.warns(UserWarning, match="does not update"),
        pytest.raises(ValueError, match="none was called, or all are frozen"),
    ):
        fit_factorized(model, [normal(8, 2, 6, 5)], 4)


def test_a_network_whose_layers_are_never_called_is_refused() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match="none was called"):
        fit_factorized(Idle(), [normal(32, 4)], 4)


def test_recalibrated_running_averages_can_be_fitted_on_the_same_data() -> None:
    """Statistics estimated anew from one batch equal what is then observed; the layer is not frozen."""
    layer = nn.BatchNorm1d(4, momentum=None)
    x = normal(16, 4)
    layer.train()(x)
    layer.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = fit_factorized(layer, [x, normal(16, 4, seed=1)], 16)
    assert not posterior.skipped


@pytest.mark.parametrize("kind", ["factorized", "joint", "empirical"])
def test_a_single_mini_batch_warns_and_has_no_spread(kind: str) -> None:
    model = settled(mlp(), 4)
    with pytest.warns(UserWarning, match="only one mini-batch was observed") as caught:
        posterior = fit(model, [normal(31, 4)], kind=kind)
    assert [str(w.filename) for w in caught] == [__file__], "the warning should point at the caller"
    drawn = posterior.draw(3)
    assert all(torch.equal(values[0], values[2]) for values in drawn.values())


def test_two_mini_batches_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_factorized(settled(mlp(), 4), [normal(32, 4)])


def test_the_network_ends_exactly_as_it_began(case: Case) -> None:
    model = mixed_up(case.model())
    before = Untouched(model)
    fit_factorized(model, [case.inputs(24), case.inputs(11, seed=1)], 8)
    before.check()


def test_the_network_ends_as_it_began_when_the_data_raises_midway(case: Case) -> None:
    model = mixed_up(case.model())
    before = Untouched(model)

    def stream() -> Iterator[Tensor]:
        yield case.inputs(16)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        fit_factorized(model, stream(), 8)
    before.check()


def test_the_network_ends_as_it_began_when_it_raises_midway(case: Case) -> None:
    model = Failing(case.model(), after=2)
    mixed_up(model)
    before = Untouched(model)
    with pytest.raises(KeyError, match="the network's own error"):
        fit_factorized(model, [case.inputs(32)], 8)
    before.check()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_activations_are_refused_and_leave_the_network_as_it_was(bad: float) -> None:
    model = mixed_up(settled(mlp(), 4))
    before = Untouched(model)
    x = normal(32, 4)
    x[20, 1] = bad
    with pytest.raises(ValueError, match="layer '1' saw non-finite activations"):
        fit_factorized(model, [x], 8)
    before.check()


def test_fitting_twice_gives_the_same_posterior() -> None:
    for case in CASES.values():
        model, batches = case.model(), [case.inputs(24)]
        same(fit_factorized(model, batches, 8), fit_factorized(model, batches, 8))


def test_the_train_flags_of_the_network_do_not_matter() -> None:
    model = settled(mlp(), 4)
    wanted = fit_factorized(model.eval(), [normal(32, 4)], 8)
    same(fit_factorized(model.train(), [normal(32, 4)], 8), wanted)
    same(fit_factorized(mixed_up(model), [normal(32, 4)], 8), wanted)


def test_dead_channels_have_no_variance() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3))
    model.get_parameter("0.weight").data[1] = 0
    model.get_parameter("0.bias").data[1] = -1
    found = per_layer(fit_factorized(model, [normal(64, 4)], 8))["2"]
    for key, values in found.items():
        assert values[1] == 0, key
        assert values[0] != 0, key


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Linear(4, 3), [normal(16, 4)]), ValueError, "Linear has no batch-norm layers"),
        ((nn.BatchNorm1d(4, track_running_stats=False), [normal(16, 4)]), ValueError, "keeps no running statistics"),
        (("model.pt", [normal(16, 4)]), TypeError, r"expected a torch\.nn\.Module"),
        ((mlp(), []), ValueError, "no batches to observe"),
        ((mlp(), [normal(15, 4), normal(3, 4)]), ValueError, r"batch_size=16 \(the largest has 15 examples\)"),
        ((mlp(), normal(32, 4)), TypeError, "expected an iterable of batches"),
        ((mlp(), [normal(32, 4)], 0), ValueError, "batch_size must be at least 1"),
        ((mlp(), [normal(32, 4)], 8.0), TypeError, "batch_size must be a whole number"),
        (
            (mlp(), [normal(32, 4)], 8, "gaussian"),
            ValueError,
            "unknown kind 'gaussian'.*'joint', 'empirical'",
        ),
        ((mlp(), [normal(32, 5)], 8), RuntimeError, r"Sequential failed on an input of shape \[8, 5\]"),
        ((mlp(), [normal(32, 4)], 1), ValueError, r"shape \[1, 4\].*more than 1 value per channel"),
        ((nn.BatchNorm2d(4), [normal(32, 4)], 8), ValueError, r"shape \[8, 4\].*expected 4D input"),
        ((mlp(), [{"image": normal(32, 4)}]), TypeError, "none of which is a tensor argument"),
        ((mlp(), ["a.png"]), TypeError, "batch of type str"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit(*arguments)


def test_data_that_comes_from_the_network_itself_leaves_it_as_it_was() -> None:
    """The iterable may call the network between mini-batches, in the modes and with the buffers it was given in."""
    model = settled(mlp(), 4).eval()
    x = normal(48, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def sure() -> Iterator[Tensor]:
        for part in torch.split(x, 16):
            assert not any(module.training for module in model.modules())
            assert model(part).requires_grad
            yield part

    posterior = fit_factorized(model, sure(), batch_size=16)
    assert posterior.mini_batches == 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class OwnDecay(nn.BatchNorm1d):
    """Moves its averages by a rate of its own, and leaves its momentum out of it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean, var = x.mean(0), x.var(0, correction=0)
        assert self.running_mean is not None
        assert self.running_var is not None
        self.running_mean.lerp_(mean, 0.3)
        self.running_var.lerp_(var, 0.3)
        return (x - mean) / (var + self.eps).sqrt()


def test_a_layer_that_does_not_follow_its_momentum_has_the_statistics_of_its_input_observed() -> None:
    x = 3 * normal(64, 5) + 1
    posterior = fit_factorized(nn.Sequential(OwnDecay(5), nn.Linear(5, 2)), [x], batch_size=16)
    parts = torch.stack(torch.split(x.double(), 16))
    torch.testing.assert_close(posterior.mean_mean, parts.mean(1).mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(posterior.variance_mean, parts.var(1, correction=0).mean(0), rtol=1e-5, atol=1e-6)


def test_a_layer_with_averages_of_its_own_and_channels_elsewhere_is_refused() -> None:
    class Last(OwnDecay):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(0, -2)).view_as(x)

    with pytest.raises(ValueError, match=r"'0' \(Last\) updates its running averages in a way of its own"):
        fit_factorized(nn.Sequential(Last(5), nn.Linear(5, 2)), [normal(16, 3, 5)], batch_size=16)


def test_data_is_left_as_it_was_by_a_network_that_writes_to_its_input() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(4), nn.Linear(4, 3))
    x = normal(32, 4)
    before = x.clone()
    fit_factorized(model, [x], batch_size=16)
    assert torch.equal(x, before)


# Layers that are not drawn


def three_norms() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5),
        nn.BatchNorm1d(5), nn.Linear(5, 3),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["factorized", "joint", "empirical"])
@pytest.mark.parametrize(
    "deterministic",
    [["4"], iter(["4"]), {"4"}, ["[4-5]"], lambda name, layer: layer.num_features == 5 and name < "7"],
)
def test_deterministic_layers_keep_their_running_statistics_while_fitting_too(kind: str, deterministic: Any) -> None:
    model: Any = settled(three_norms(), 4)
    batches = [normal(32, 4, seed=i) for i in range(3)]
    if not isinstance(deterministic, (list, set)) and not callable(deterministic):
        deterministic = ["4"]  # an iterator is used up by the first kind
    posterior = fit(model, batches, 8, kind, deterministic=deterministic)
    assert dict(posterior.skipped) == {"4": "deterministic"}
    assert list(posterior.layers) == ["1", "7"]
    # The slow loop, with a layer that is frozen by its running averages in place of the deterministic one.
    parts = list(model)
    norm = parts[4]
    frozen = nn.Linear(5, 5)
    with torch.no_grad():
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        frozen.weight.copy_(scale.diag())
        frozen.bias.copy_(norm.bias - norm.running_mean * scale)
    slow = nn.Sequential(*parts[:4], frozen, *parts[5:])
    rows = slow_statistics(slow, [piece for batch in batches for piece in torch.split(batch, 8)])
    wanted = torch.cat([found.mean(0) for found in rows.values()], 1)
    tolerance = 0.3 if kind == "joint" else 1e-4  # its variances are lognormal
    torch.testing.assert_close(posterior.expected[0], wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(posterior.expected[1], wanted[1], rtol=tolerance, atol=1e-5)
    every = fit(model, batches, 8, kind)
    assert not torch.allclose(every.expected[0, -5:], posterior.expected[0, -5:], rtol=1e-2)


@pytest.mark.parametrize(
    ("deterministic", "error", "message"),
    [
        ("1", TypeError, r"names or patterns of layers, such as \['head\.\*'\].*got '1'"),
        (5, TypeError, "names or patterns of layers"),
        (None, TypeError, "names or patterns of layers"),
        ([1], TypeError, "names or patterns of layers, got 1 among them"),
        (["1", "2"], ValueError, "has '2', which fits no batch-norm layer; they are '1', '4', '7'"),
        (["head.*"], ValueError, r"has 'head\.\*', which fits no batch-norm layer"),
        (["*"], ValueError, "every batch-norm layer of Sequential is deterministic"),
        (lambda name, layer: True, ValueError, "every batch-norm layer of Sequential is deterministic"),
    ],
)
def test_deterministic_layers_that_cannot_be_are_refused_before_any_data_is_read(
    deterministic: Any, error: type[Exception], message: str
) -> None:
    def stream() -> Iterator[Tensor]:
        raise AssertionError("data was read")
        yield

    with pytest.raises(error, match=message):
        fit(settled(three_norms(), 4), stream(), 8, deterministic=deterministic)


def test_a_name_with_brackets_is_taken_as_it_is() -> None:
    model = nn.ModuleDict({"a[0]": nn.BatchNorm1d(4), "a0": nn.BatchNorm1d(4)})
    model.forward = lambda x: model["a0"](model["a[0]"](x))
    posterior = fit(model, [normal(64, 4)], deterministic=["a[0]"])
    assert (list(posterior.layers), list(posterior.skipped)) == (["a0"], ["a[0]"])


class NormEval(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> NormEval:
        return super().train(False)


def test_a_layer_that_train_leaves_in_evaluation_mode_is_skipped_and_works_as_in_training() -> None:
    model = settled(three_norms(), 4)
    frozen = three_norms()
    frozen[4] = NormEval(5)
    frozen.load_state_dict(model.state_dict())
    batches = [normal(32, 4, seed=i) for i in range(3)]
    found = fit_factorized(frozen, batches, 8)
    assert dict(found.skipped) == {"4": "stays in evaluation mode"}
    wanted = fit(model, batches, 8, kind="factorized", deterministic=["4"])
    assert torch.equal(found.expected, wanted.expected)
    named = fit(frozen, batches, 8, deterministic=["4"])
    assert dict(named.skipped) == {"4": "deterministic"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_part_keeps_its_statistics_and_is_listed() -> None:
    model = settled(three_norms(), 4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    scripted = nn.Sequential(torch.jit.script(model[:3]), *model[3:]).eval()  # type: ignore[index]
    batches = [normal(32, 4, seed=i) for i in range(3)]
    found = fit_factorized(scripted, batches, 8)
    assert dict(found.skipped) == {"0.1": "scripted"}
    wanted = fit(model, batches, 8, kind="factorized", deterministic=["1"])
    named = fit(scripted, batches, 8, kind="factorized", deterministic=["0.*"])
    assert named.skipped == found.skipped, "it is no mistake to name what is not drawn anyway"
    torch.testing.assert_close(found.expected, wanted.expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in scripted.modules())


def test_a_network_that_was_compiled_in_place_is_observed() -> None:
    model, compiled = settled(three_norms(), 4), settled(three_norms(), 4)
    compiled.load_state_dict(model.state_dict())
    compiled.compile(backend="eager")
    batches = [normal(32, 4, seed=i) for i in range(3)]
    compiled(batches[0])
    same(fit_factorized(compiled, batches, 8), fit_factorized(model, batches, 8))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapped_network_has_the_posterior_of_the_bare_one(wrap: Any) -> None:
    model = ByName()
    settled(model.body, 4)
    wrapped: Any = wrap(model, backend="eager") if wrap is torch.compile else wrap(model)
    batches = [{"features": normal(16, 4, seed=i), "labels": torch.zeros(16)} for i in range(3)]
    found, wanted = fit_factorized(wrapped, batches, 8), fit_factorized(model, batches, 8)
    same(found, wanted)
    found.check(model)
    wanted.check(wrapped)
    assert torch.equal(found.recentre(model).expected, wanted.recentre(wrapped).expected)


# Statistics far from the running ones


def trained(steps: int, momentum: float = 0.1) -> nn.Sequential:
    """A network whose running statistics are those of `steps` mini-batches."""
    model = three_norms()
    for module in model:
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = momentum
    with torch.no_grad():
        for step in range(steps):
            model.train()(3 * normal(32, 4, seed=1000 + step) + 1)
    return model.eval()


DATA = [3 * normal(64, 4, seed=i) + 1 for i in range(4)]


def far(model: nn.Module, **options: Any) -> str:
    """The warning of a fit, if there is one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, DATA, **options)
    assert len(caught) <= 1
    assert all(str(w.filename) == __file__ for w in caught), "the warning should point at the caller"
    return str(caught[0].message) if caught else ""


@pytest.mark.parametrize("steps", [0, 1, 5, 20, 100])
@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
def test_statistics_of_a_network_that_was_trained_as_usual_are_not_far(steps: int, momentum: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not far(trained(steps, momentum))


@pytest.mark.parametrize(("shift", "factor"), [(1.0, 1.0), (-0.8, 1.0), (0.0, 4.0), (0.0, 0.2)])
def test_statistics_far_from_the_running_ones_are_told_by_layer_with_what_to_do(shift: float, factor: float) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = trained(100)
    variance = model.get_buffer("4.running_var")
    model.get_buffer("4.running_mean").add_(shift * variance.sqrt())
    variance *= factor
    told = far(model)
    assert told.startswith("these mini-batches have other statistics than training, most in '4'")
    assert 'centre="running" keeps the network\'s own' in told
    fit(model, DATA, deterministic=["4"])


def test_data_of_another_kind_is_told() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = trained(100)
    with pytest.warns(UserWarning, match="most in '1'.*outputs differ by.*the data is of another domain"):
        fit(model, [batch * 5 for batch in DATA])


def test_running_statistics_that_are_not_finite_are_fitted_afresh_about_the_observed_centre() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = trained(100)
    wanted = fit(model, DATA)
    model.get_buffer("4.running_var")[2] = float("nan")
    found = fit(model, DATA)
    assert torch.equal(found.expected, wanted.expected)
    assert not far(model), "the observed centre was asked for"
    with pytest.raises(ValueError, match="not finite, or have negative variances: '4'"):
        found.recentre(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.5])
@pytest.mark.parametrize("layers", [["4"], ["1", "4"], ["1", "4", "7"]])
def test_layers_that_cannot_have_the_running_centre_are_named_once(bad: float, layers: list[str]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = trained(100)
    usual = stochbn.fit(model, DATA)
    for layer in layers:
        model.get_buffer(f"{layer}.running_var").fill_(bad)
    told = far(model, centre="running")
    names = ", ".join(map(repr, layers))
    assert told.startswith(f"the running statistics of {names} are not finite, or have negative variances, so draws of")
    assert "centred on what was observed" in told
    assert "its predictions are NaN or wrong" in told
    with pytest.warns(UserWarning, match="centred on what was observed"):
        found = stochbn.fit(model, DATA)
    sizes = list(found.layers.values())
    parts = (torch.split(one.expected, sizes, dim=1) for one in (found, usual.recentre_observed(), usual))
    for name, own, observed, running in zip(found.layers, *parts, strict=True):
        assert torch.allclose(own, observed if name in layers else running, rtol=1e-12)


def test_layers_that_were_never_trained_are_named_unless_none_was() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = trained(100)
        assert not far(trained(0), centre="running")
    assert not far(model, centre="running")
    layer = model.get_submodule("4")
    assert isinstance(layer, nn.BatchNorm1d)
    layer.reset_running_stats()
    told = far(model, centre="running")
    assert told.startswith("the running statistics of '4' are still the 0 and 1 that they began as, so draws of")


def test_the_global_generator_is_never_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who draws from it in another thread would draw the same numbers twice."""
    model = CASES["BatchNorm2d"].model()

    def refuse(*args: Any) -> None:
        raise AssertionError("the state of the generator was set")

    monkeypatch.setattr(torch, "set_rng_state", refuse)
    monkeypatch.setattr(torch.random, "set_rng_state", refuse)
    fit(model, [CASES["BatchNorm2d"].inputs(32)], 8)
    fit(nn.Sequential(nn.Dropout(0.5), model), [CASES["BatchNorm2d"].inputs(32)], 8)


# All kinds


@pytest.mark.parametrize("kind", ["joint", "empirical"])
def test_every_kind_is_of_the_statistics_of_a_slow_loop(case: Case, kind: str) -> None:
    model = case.model()
    incoming = [case.inputs(20, seed=1), case.inputs(17, seed=2), case.inputs(5, seed=3)]
    pieces = [x[i : i + 6] for x in incoming for i in range(0, len(x) - 5, 6)]
    found = fit(model, incoming, 6, kind)
    rows = slow_statistics(model, pieces, case.channel_axis)
    assert found.kind == kind
    assert found.layers == {name: r.shape[2] for name, r in rows.items()}
    assert (found.mini_batches, found.batch_size, found.dtype) == (5, 6, torch.float32)
    assert found.skipped == fit_factorized(model, incoming, 6).skipped
    every = torch.cat([r.view(5, -1, 2, r.shape[2]) for r in rows.values()], 3)  # mini-batches, calls
    replayed = found if isinstance(found, stochbn.Empirical) else fit(model, incoming, 6, kind="empirical")
    calls = (every - replayed.statistics.double()[:, None]).abs().sum((2, 3)).argmin(1)
    taken = every[torch.arange(5), calls]
    if isinstance(found, stochbn.Empirical):
        torch.testing.assert_close(found.statistics.double(), taken, rtol=1e-4, atol=1e-5)
    assert isinstance(found, (stochbn.Joint, stochbn.Empirical))
    wanted = type(found).from_statistics(
        taken, layers=found.layers, batch_size=6, mini_batches=5, dtype=torch.float32, skipped=found.skipped
    )
    torch.testing.assert_close(found.expected, wanted.expected, rtol=1e-3, atol=1e-5)
    if isinstance(found, stochbn.Joint) and isinstance(wanted, stochbn.Joint):
        assert found.shrinkage == pytest.approx(wanted.shrinkage, rel=0.01, abs=1e-4)
        torch.testing.assert_close(
            found.directions.square().sum(0) + found.residual, wanted.directions.square().sum(0) + wanted.residual,
            rtol=0.01, atol=1e-6,
        )  # fmt: skip


def test_the_joint_kind_is_the_default_and_keeps_all_directions() -> None:
    model = settled(mlp(), 4)
    posterior = fit(model, [normal(160, 4)])
    assert isinstance(posterior, stochbn.Joint)
    assert posterior.batch_size == 16
    assert posterior.directions.shape == (9, 2 * 13)


@pytest.mark.parametrize("kind", ["joint", "empirical"])
def test_every_kind_expects_what_the_paper_does(case: Case, kind: str) -> None:
    """Exactly the empirical; the joint, whose variances are lognormal with other parameters, nearly."""
    model = case.model()
    if "twice" in case.build.__name__.lower():
        pytest.skip("it takes one call of each mini-batch")
    data = [case.inputs(400, seed=1)]
    found, wanted = fit(model, data, 8, kind).expected, fit_factorized(model, data, 8).expected
    tolerance = 0.15 if kind == "joint" else 1e-5
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], wanted[1], rtol=tolerance, atol=1e-5)


def test_a_joint_posterior_has_the_spread_of_the_paper_for_means() -> None:
    model = settled(mlp(), 4)
    data = [normal(400, 4, seed=1)]
    joint, paper = fit(model, data, 8), fit_factorized(model, data, 8)
    found = (joint.directions.double().square().sum(0) + joint.residual)[:13]
    torch.testing.assert_close(found, paper.mean_variance, rtol=1e-5, atol=1e-9)


def test_statistics_that_layers_have_in_common_stay_so_only_in_the_joint_kinds() -> None:
    """Two layers that see the same input: whoever draws them apart loses their perfect correlation."""

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.left(x), self.right(x)], 1)

    model, data = Fork(), [normal(960, 2)]
    for kind, least, most in (("factorized", -0.2, 0.2), ("empirical", 0.999, 1.001), ("joint", 0.7, 1.001)):
        drawn = fit(model, data, 16, kind).draw(600, torch.Generator().manual_seed(0))
        for statistic in ("running_mean", "running_var"):
            for channel in range(2):
                pair = torch.stack([drawn[f"{side}.{statistic}"][:, channel] for side in ("left", "right")])
                assert least < torch.corrcoef(pair)[0, 1] < most, (kind, statistic)


def test_a_layer_that_is_called_twice_has_one_call_of_each_mini_batch_taken_whatever_their_order() -> None:
    model = settled(Twice(), 4)
    batches = [normal(8, 4, seed=i) for i in range(12)]
    rows = slow_statistics(model, batches)["norm"].view(12, 2, 2, 4)
    posterior = fit(model, batches, 8, kind="empirical")
    near = (rows - posterior.statistics[:, None]).abs().amax((2, 3)) < 1e-4
    assert near.sum(1).tolist() == [1] * 12
    assert near.any(0).all(), "now the first and now the second call"
    other = fit(model, batches[::-1], 8, kind="empirical")
    assert torch.equal(other.statistics.flip(0), posterior.statistics)
    torch.testing.assert_close(fit(model, batches, 8).expected[0], posterior.expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["joint", "empirical"])
def test_layers_without_statistics_are_skipped_by_every_kind(kind: str) -> None:
    posterior = fit(settled(Unused(), 4), [normal(32, 4)], 8, kind)
    assert list(posterior.skipped) == ["auxiliary"]
    assert list(posterior.layers) == ["norm"]
    model = settled(nn.Sequential(nn.Conv2d(2, 5, 3), Frozen(5), nn.Conv2d(5, 4, 2), nn.BatchNorm2d(4)), 2, 6, 5)
    with pytest.warns(UserWarning, match="'1' does not update its running statistics in training mode"):
        posterior = fit(model, [normal(32, 2, 6, 5)], 8, kind)
    assert list(posterior.skipped) == ["1"]
    assert list(posterior.layers) == ["3"]


@pytest.mark.parametrize("kind", ["joint", "empirical"])
def test_a_network_with_only_frozen_layers_is_refused_by_every_kind(kind: str) -> None:
    model = settled(nn.Sequential(nn.Conv2d(2, 5, 3), Frozen(5)), 2, 6, 5)
    with (
        pytest.warns(UserWarning, match="does not update"),
        pytest.raises(ValueError, match="none was called, or all are frozen"),
    ):
        fit(model, [normal(8, 2, 6, 5)], 4, kind)


class Sometimes(nn.Module):
    """Calls one of its batch norms only for mini-batches of a positive mean."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.always(x)
        return self.sometimes(out) if x.mean() > 0 else out


@pytest.mark.parametrize("kind", ["joint", "empirical"])
@pytest.mark.parametrize("signs", [[1, -1], [-1, 1], [1, 1, 1, -1]])
def test_a_layer_that_is_called_for_some_mini_batches_has_no_joint_statistics(kind: str, signs: list[int]) -> None:
    model = mixed_up(Sometimes())
    before = Untouched(model)
    batches = [normal(8, 4, seed=i).abs() * sign for i, sign in enumerate(signs)]
    with pytest.raises(ValueError, match=r"'sometimes' was called for some mini-batches.*factorized"):
        fit(model, batches, 8, kind, max_batches=2)
    before.check()
    assert list(fit_factorized(model, [*batches, batches[0].abs()], 8).layers) == ["always", "sometimes"]


@pytest.mark.parametrize("kind", ["joint", "empirical"])
def test_max_batches_bounds_what_is_kept_and_not_what_is_seen(kind: str) -> None:
    model = settled(mlp(), 4)
    x = normal(240, 4)
    posterior = fit(model, [x], 8, kind, max_batches=12)
    assert posterior.mini_batches == 30
    every = fit(model, [x], 8, kind="empirical").statistics
    assert len(every) == 30
    if isinstance(posterior, stochbn.Empirical):
        assert len(posterior.statistics) == 12
        places = [int((every == row).flatten(1).all(1).nonzero()) for row in posterior.statistics]
        assert len(set(places)) == 12
        assert max(places) >= 12, "it is not of the first ones only"
    else:
        assert isinstance(posterior, stochbn.Joint)
        assert len(posterior.directions) == 11
    other = fit(model, [x], 8, kind, max_batches=30)
    assert torch.allclose(other.expected, fit(model, [x], 8, kind).expected)
    assert not torch.allclose(other.expected, posterior.expected)


def test_directions_bounds_the_directions_and_keeps_the_variances() -> None:
    model, data = settled(mlp(), 4), [normal(240, 4)]
    every, few = fit(model, data, 8), fit(model, data, 8, directions=3)
    assert (len(every.directions), len(few.directions)) == (26, 3), "26 entries, from 30 mini-batches"
    assert torch.equal(few.directions, every.directions[:3])
    assert few.shrinkage == every.shrinkage
    assert torch.equal(few.location, every.location)
    torch.testing.assert_close(
        few.directions.double().square().sum(0) + few.residual,
        every.directions.double().square().sum(0) + every.residual, rtol=1e-6, atol=1e-14,
    )  # fmt: skip
    assert len(fit(model, data, 8, directions=1000).directions) == 26


@pytest.mark.parametrize("kind", ["joint", "empirical"])
def test_every_kind_leaves_the_network_exactly_as_it_was_and_is_deterministic(case: Case, kind: str) -> None:
    model = mixed_up(case.model())
    before = Untouched(model)
    data = [case.inputs(24), case.inputs(11, seed=1)]
    first, second = (fit(model, data, 8, kind, max_batches=3) for _ in range(2))
    before.check()
    drawn, again = (p.draw(3, torch.Generator().manual_seed(1)) for p in (first, second))
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)


def test_the_global_generator_is_not_used_to_sample_mini_batches() -> None:
    model = settled(mlp(), 4)
    state = torch.get_rng_state()
    fit(model, [normal(240, 4)], 8, max_batches=5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_batches": 1}, ValueError, "max_batches must be at least 2, got 1"),
        ({"max_batches": -3}, ValueError, "max_batches must be at least 2, got -3"),
        ({"max_batches": 8.0}, TypeError, r"max_batches must be a whole number, got 8\.0"),
        ({"max_batches": True}, TypeError, "max_batches must be a whole number, got True"),
        ({"max_batches": None}, TypeError, "max_batches must be a whole number, got None"),
        ({"directions": 0}, ValueError, "directions must be at least 1, got 0"),
        ({"directions": "all"}, TypeError, "directions must be a whole number, got 'all'"),
        ({"directions": True}, TypeError, "directions must be a whole number, got True"),
        ({"directions": 2.0}, TypeError, "directions must be a whole number"),
    ],
)
def test_bad_bounds_are_refused_before_any_data_is_read(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    def stream() -> Iterator[Tensor]:
        raise AssertionError("data was read")
        yield

    with pytest.raises(error, match=message):
        fit(settled(mlp(), 4), stream(), 8, **options)
