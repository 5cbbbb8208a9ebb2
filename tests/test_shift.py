"""Adapting to changed data, the guard, the reference and the alarm, with a real network and by the closed form."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import stochbn
from conftest import ChannelsLast, FusedActivation, normal, seeded
from stochbn.network.calling import NetworkInput
from stochbn.network.replica import Network
from stochbn.posteriors.reference import Layer, Reference
from stochbn.shift.estimate import make_reference
from stochbn.shift.guard import Guard
from stochbn.shift.looking import looking
from stochbn.shift.mixes import binned, edges_of, mixes_of
from stochbn.shift.monitor import _e_value
from stochbn.tasks import make_task

CLASSES = 6


def pictures(n: int, seed: int, classes: tuple[int, ...] = tuple(range(CLASSES))) -> tuple[Tensor, Tensor]:
    """Noisy gratings of six orientations, ``[n, 1, 12, 12]``."""
    generator = seeded(seed)
    labels = torch.tensor(classes)[torch.randint(len(classes), (n,), generator=generator)]
    angle = labels * (math.pi / CLASSES) + 0.12 * torch.randn(n, generator=generator)
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    along = angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y
    waves = (1.1 * along + 6.28 * torch.rand(n, 1, 1, generator=generator)).sin()
    return (waves + 0.5 * torch.randn(n, 12, 12, generator=generator))[:, None], labels


def parts(x: Tensor, size: int) -> list[Tensor]:
    return list(torch.split(x, size))


def foggy(x: Tensor) -> Tensor:
    """Little contrast on a bright ground."""
    return 0.35 * x + 1.2


@functools.cache
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(24, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, CLASSES),
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
        x, labels = pictures(4000, 1)
        for _ in range(4):
            for part in parts(torch.randperm(len(x)), 50):
                optimizer.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(model(x[part]), labels[part]))
                optimizer.step()
    return model.eval()


@functools.cache
def fitted() -> stochbn.Posterior:
    return stochbn.fit(network(), parts(pictures(4000, 1)[0], 100))


def settled(model: nn.Module, features: int) -> nn.Module:
    """The network with running statistics of normal inputs."""
    model.train()
    for seed in range(60):
        model(normal(50, features, seed=seed))
    return model.eval()


def error(posterior: stochbn.Posterior, x: Tensor, labels: Tensor) -> float:
    probs: Tensor = stochbn.Predictive(network(), posterior.rescale(math.inf))(x).probs
    return 100 * (probs.argmax(1) != labels).double().mean().item()


def adapted(*batches: Tensor, **options: Any) -> stochbn.Posterior:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stochbn.adapt(network(), options.pop("posterior", fitted()), batches, **options)


# What adapting gives


def test_a_fit_takes_no_random_numbers_of_others() -> None:
    model = network()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with mock.patch("torch.manual_seed") as seeds:
        stochbn.fit(model, parts(pictures(640, 1)[0], 64))
    assert not seeds.called
    assert torch.equal(torch.get_rng_state(), before)


def test_float64_and_autocast_change_nothing_but_rounding() -> None:
    x = pictures(640, 1)[0]
    single = stochbn.fit(network(), parts(x, 64)).reference
    double = copy.deepcopy(network()).double()
    torch.set_default_dtype(torch.float64)
    try:
        found = stochbn.fit(double, parts(x.double(), 64))
    finally:
        torch.set_default_dtype(torch.float32)
    assert single is not None
    assert found.reference is not None
    torch.testing.assert_close(found.reference.centre, single.centre, rtol=1e-3, atol=1e-4)
    posterior = stochbn.adapt(double, found, [pictures(64, 5)[0].double()])
    assert torch.equal(posterior.expected, found.expected), "nothing was moved, to the last bit"
    monitor = stochbn.shift.Monitor(found)
    plain = monitor.look(double, foggy(x[:16]).double())
    with torch.autocast("cpu", torch.bfloat16):
        assert monitor.look(double, foggy(x[:16]).double()).look == plain.look


def test_a_network_that_was_trained_or_adapted_since_is_refused() -> None:
    written = adapted(foggy(pictures(64, 3)[0])).write_to(network())
    for use in (
        lambda: stochbn.shift.Monitor(fitted()).look(written, pictures(16, 3)[0]),
        lambda: stochbn.adapt(written, fitted(), [pictures(16, 3)[0]]),
    ):
        with pytest.raises(ValueError, match="running statistics of the layer '1' are not those"):
            use()


@pytest.mark.parametrize("count", [1, 2, 4, 8, 64])
def test_chance_moves_nothing(count: int) -> None:
    """Of 40 sets of examples as in training, at most a tenth, and few more by chance, have any evidence."""
    moved = sum(bool(adapted(pictures(count, 100 + seed)[0]).adaptation.moved) for seed in range(40))  # type: ignore[union-attr]
    assert moved <= (9 if count >= 8 else 3)


def test_a_task_without_a_mix_has_the_same_p_value_as_the_monitor() -> None:
    model = settled(nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)), 6)
    posterior = stochbn.fit(model, [normal(640, 6)], task="embedding")
    x = 1.5 * normal(32, 6, seed=3) + 0.5
    about = adapted_of(model, posterior, x).adaptation
    assert about is not None
    assert about.look == pytest.approx(stochbn.shift.Monitor(posterior).look(model, x).look, abs=1e-3)


def test_what_is_constant_but_for_rounding_is_not_unusual() -> None:
    class Saturated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.other, self.head = (
                nn.Linear(6, 8),
                nn.BatchNorm1d(8),
                nn.BatchNorm1d(6),
                nn.Linear(14, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.norm(torch.sigmoid(self.first(x) + 30)), self.other(x)], 1))  # type: ignore[no-any-return]

    model = settled(Saturated(), 6)
    monitor = stochbn.shift.Monitor(stochbn.fit(model, [normal(640, 6)]))
    unusual = [monitor.look(model, normal(2, 6, seed=seed)).look <= 0.01 for seed in range(40)]
    assert sum(unusual) <= 3


def test_another_look_is_adapted_to() -> None:
    x, labels = pictures(1000, 2)
    plain = error(fitted(), foggy(x), labels)
    assert error(fitted(), x, labels) < 10
    assert plain > 40
    for count in (8, 128):
        posterior = adapted(foggy(pictures(count, 3)[0]))
        assert error(posterior, foggy(x), labels) < 0.6 * plain
    assert posterior.centre == "adapted"
    assert posterior.adaptation is not None
    assert posterior.adaptation.look < 0.01
    assert "The look of the inputs has changed" in str(posterior.adaptation)


@pytest.mark.parametrize("count", [1, 8, 128])
def test_data_as_in_training_loses_next_to_nothing(count: int) -> None:
    x, labels = pictures(1000, 2)
    posterior = adapted(pictures(count, 5)[0])
    assert error(posterior, x, labels) <= error(fitted(), x, labels) + 0.5


@pytest.mark.parametrize("classes", [(0, 1), (2, 5), (3,)])
def test_another_mix_of_classes_is_no_other_look(classes: tuple[int, ...]) -> None:
    x, labels = pictures(500, 2, classes)
    few = pictures(128, 3, classes)[0]
    unguarded = dataclasses.replace(fitted(), reference=None)
    lost = error(adapted(few, posterior=unguarded, prior=0), x, labels)
    kept = error(adapted(few), x, labels)
    assert lost > 20
    assert kept <= error(fitted(), x, labels) + 1
    about = adapted(few).adaptation
    assert about is not None
    assert about.mixed < 0.01
    assert sum(about.mix[k] for k in classes) > 0.6, "which is what the sentence tells of"
    assert about.distance > 0.3
    assert "The mix of classes has changed" in str(about)


def test_both_at_once_are_told_apart_and_warned_of() -> None:
    x, labels = pictures(500, 2, (1, 4))
    with pytest.warns(UserWarning, match="cannot be told apart with certainty"):
        posterior = stochbn.adapt(network(), fitted(), [foggy(pictures(128, 3, (1, 4))[0])])
    assert error(posterior, foggy(x), labels) < 0.5 * error(fitted(), foggy(x), labels)


def test_batches_are_as_good_as_one() -> None:
    more = foggy(pictures(128, 3)[0])
    torch.testing.assert_close(adapted(*parts(more, 32)).expected, adapted(more).expected)


def test_groups_that_are_too_many_for_one_pass_are_about_as_good() -> None:
    x, labels = pictures(1000, 2)
    more = foggy(pictures(1500, 3)[0])
    found = error(adapted(more), foggy(x), labels)
    assert error(adapted(*parts(more, 500)), foggy(x), labels) < found + 5
    assert found < 0.6 * error(fitted(), foggy(x), labels)


def test_the_order_of_the_examples_does_not_count() -> None:
    more = foggy(pictures(64, 3)[0])
    first, second = adapted(more), adapted(more.flip(0))
    torch.testing.assert_close(first.expected, second.expected, rtol=1e-4, atol=1e-5)


def test_a_stream_is_folded_in_and_forgotten() -> None:
    x, labels = pictures(600, 2)
    adapter = stochbn.shift.Adapter(network(), fitted(), half_life=64)
    assert adapter.posterior.centre == "running"
    for part in parts(foggy(pictures(256, 3)[0]), 32):
        posterior = adapter.update(part)
    assert error(posterior, foggy(x), labels) < 0.6 * error(fitted(), foggy(x), labels)
    for part in parts(pictures(640, 4)[0], 32):
        posterior = adapter.update(part)
    assert error(posterior, x, labels) < error(fitted(), x, labels) + 2


def test_the_network_and_the_posterior_stay_as_they_were() -> None:
    before = {name: value.clone() for name, value in network().state_dict().items()}
    expected = fitted().expected.clone()
    adapted(foggy(pictures(32, 3)[0]))
    assert all(torch.equal(before[name], value) for name, value in network().state_dict().items())
    assert torch.equal(fitted().expected, expected)


def test_calibrating_an_adapted_posterior_may_choose_its_centre() -> None:
    posterior = adapted(foggy(pictures(128, 3)[0]))
    held_out, labels = pictures(400, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibrated = stochbn.calibrate(network(), posterior, [(foggy(held_out), labels)])
        unchanged = stochbn.calibrate(network(), posterior, [(held_out, labels)])
    assert calibrated.centre == "adapted"
    assert calibrated.adaptation == posterior.adaptation
    assert unchanged.centre != "adapted"
    assert "adapted" in repr(calibrated)
    again = stochbn.Predictive(network(), calibrated.rescale(math.inf))(foggy(held_out))
    assert again.note != ""


# Without a reference, by the closed form


def test_without_a_reference_it_is_the_published_blend() -> None:
    """Schneider et al. (2020): n / (n + N) of the batch, and the rest of the source."""
    first, norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
    model = nn.Sequential(first, norm, nn.Flatten(), nn.LazyLinear(2))
    model(normal(4, 1, 6, 6))
    for x in (normal(40, 1, 6, 6, seed=seed) for seed in range(20)):
        model(x)
    model.eval()
    posterior = stochbn.fit(model, [normal(32, 1, 6, 6, seed=9)], reference=False)
    x = 2 * normal(24, 1, 6, 6, seed=5) + 1
    with pytest.warns(UserWarning, match="no reference"):
        found = stochbn.adapt(model, posterior, [x], prior=8).expected
    with torch.no_grad():
        seen = first(x)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight = 24 / (24 + 8)
        mean, second = seen.mean((0, 2, 3)), seen.square().mean((0, 2, 3))
        blended = (1 - weight) * norm.running_mean + weight * mean
        squares = (1 - weight) * (norm.running_var + norm.running_mean.square()) + weight * second
    torch.testing.assert_close(found[0], blended.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], (squares - blended.square()).double(), rtol=1e-4, atol=1e-4)


def test_without_evidence_the_centre_is_the_networks_own_exactly() -> None:
    quiet = dataclasses.replace(
        fitted().reference,
        own=torch.full_like(fitted().reference.own, 1e6),  # type: ignore[union-attr,type-var]
    )
    posterior = adapted(pictures(64, 3)[0], posterior=dataclasses.replace(fitted(), reference=quiet))
    torch.testing.assert_close(posterior.expected, fitted().expected, rtol=1e-6, atol=1e-7)


# The guard of a layer


def layer_of(width: int, mixes: int, rank: int, seed: int) -> Layer:
    directions = torch.linalg.qr(normal(width, rank, seed=seed))[0].T
    return Layer(
        normal(width, seed=seed + 1),
        normal(width, seed=seed + 2).abs() + 0.1,
        normal(mixes, width, seed=seed + 3),
        directions,
        10 * torch.rand(rank, generator=seeded(seed)),
    )


@given(st.integers(3, 40), st.integers(0, 6), st.integers(1, 8), st.integers(0, 99))
def test_white_rows_have_the_covariance_that_was_taken(width: int, mixes: int, rank: int, seed: int) -> None:
    layer = layer_of(2 * width, mixes, min(rank, width), seed)
    guard = Guard(layer)
    own = layer.own.diag()
    inner = torch.eye(2 * width) + layer.directions.T @ layer.strengths.diag() @ layer.directions
    root = torch.linalg.cholesky((own @ inner @ own).double()).float()
    rows = normal(5, 2 * width, seed=seed)
    white = guard.white(rows)
    wanted = torch.linalg.solve_triangular(root, rows.T, upper=False).square().sum(0)
    torch.testing.assert_close(white.square().sum(1), wanted, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(guard.coloured(white), rows, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(guard.explained @ guard.explained.T, torch.eye(len(guard.explained)), atol=1e-4, rtol=0)
    assert len(guard.explained) <= min(mixes, 2 * width // 3)
    torch.testing.assert_close(
        guard.apart(white) @ guard.explained.T, torch.zeros(5, len(guard.explained)), atol=1e-2, rtol=0
    )


@given(st.integers(4, 30), st.integers(1, 5), st.integers(0, 99))
def test_the_mix_is_taken_out_and_the_rest_is_found(width: int, mixes: int, seed: int) -> None:
    layer = layer_of(2 * width, mixes, 2, seed)
    guard = Guard(layer)
    change = normal(mixes, seed=seed)
    mean = layer.centre + change @ layer.mixing
    none = guard.shifted(mean, change, 100, 0.01)
    assert none.evidence < 1e-3
    assert not none.shift.any()
    look = guard.coloured(guard.apart(normal(2 * width, seed=seed + 7)))
    found = guard.shifted(mean + 3 * look, change, 10_000, 0.01)
    assert found.evidence > 10
    torch.testing.assert_close(found.shift, 3 * look, rtol=0.05, atol=0.05 * float(look.abs().max()))


def test_the_reference_recovers_a_factor_model() -> None:
    generator = seeded(3)
    width, count = 20, 4096
    mixing, factor = torch.randn(3, width, generator=generator), torch.randn(2, width, generator=generator)
    mixes = torch.softmax(3 * torch.randn(count, 3, generator=generator), 1)
    noise = 0.5 * torch.randn(count, width, generator=generator)
    rows = 1 + mixes @ mixing + torch.randn(count, 2, generator=generator) @ factor + noise
    running = {"bn": torch.stack([torch.zeros(width // 2), torch.ones(width // 2)])}
    reference = make_reference({"bn": rows}, mixes, make_task("classification"), running)
    ((name, layer),) = reference.of_layers()
    inner = torch.eye(width) + layer.directions.T @ layer.strengths.diag() @ layer.directions
    covariance = layer.own[:, None] * inner * layer.own
    wanted = factor.T @ factor + 0.25 * torch.eye(width)
    assert name == "bn"
    assert (covariance - wanted).norm() < 0.1 * wanted.norm()
    torch.testing.assert_close(layer.centre, rows.mean(0))


# Rows


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, FusedActivation, ChannelsLast])
def test_rows_are_standardised_means_of_each_example(kind: Callable[[int], nn.BatchNorm2d]) -> None:
    norm = kind(3)
    norm.running_mean.copy_(normal(3))  # type: ignore[union-attr]
    norm.running_var.copy_(normal(3, seed=1).square() + 0.5)  # type: ignore[union-attr]
    norm.eval()
    x = normal(5, 3, 3, 3, seed=2)
    with looking(Network.of(norm)) as look:
        rows, _ = look(NetworkInput((x,)))
    channels = x.permute(0, 3, 1, 2) if kind is ChannelsLast else x
    scaled = (channels - norm.running_mean.view(-1, 1, 1)) / (norm.running_var + norm.eps).sqrt().view(-1, 1, 1)  # type: ignore[union-attr,operator]
    wanted = torch.cat([scaled.mean((2, 3)), scaled.square().mean((2, 3))], 1)
    torch.testing.assert_close(rows[""], wanted)


def test_layers_without_rows_are_named_and_left_as_they_are() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.once, self.head = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.once(self.twice(self.twice(x) + 1)))  # type: ignore[no-any-return]

    model = settled(Shared(), 4)
    posterior = stochbn.fit(model, [normal(320, 4)])
    assert posterior.reference is not None
    assert list(posterior.reference.layers) == ["once"]
    found = adapted_of(model, posterior, normal(64, 4, seed=1) + 3)
    with torch.no_grad():
        assert torch.equal(
            found.rescale(math.inf).draw(1)["twice.running_mean"][0], model.get_buffer("twice.running_mean")
        )
        assert found.rescale(math.inf).draw(1)["once.running_mean"][0].abs().max() > 0.1


def adapted_of(model: nn.Module, posterior: stochbn.Posterior, *batches: Tensor) -> stochbn.Posterior:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stochbn.adapt(model, posterior, batches)


# What the mix is of


def test_every_task_has_its_mix() -> None:
    logits = normal(8, 3, 4, 4)
    torch.testing.assert_close(mixes_of(make_task("classification"), logits), logits.softmax(1).mean((2, 3)))
    torch.testing.assert_close(mixes_of(make_task("multilabel"), logits[:, :, 0, 0]), logits[:, :, 0, 0].sigmoid())
    both = mixes_of(make_task("binary"), logits[:, 0, 0, 0])
    torch.testing.assert_close(both.sum(1), torch.ones(8))
    numbers = normal(400, 2)
    task = make_task("regression")
    edges = edges_of(mixes_of(task, numbers))
    bins = binned(numbers, edges)
    assert bins.shape == (400, 20)
    torch.testing.assert_close(bins.mean(0), torch.full((20,), 0.1), atol=0.01, rtol=0)
    assert not len(edges_of(mixes_of(make_task("embedding"), normal(8, 32))))


def test_a_regression_has_a_mix_of_bins_and_is_adapted() -> None:
    model = settled(nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1)), 3)
    posterior = stochbn.fit(model, [normal(640, 3)], task="regression")
    assert posterior.reference is not None
    assert len(posterior.reference.usual) == 10
    found = adapted_of(model, posterior, normal(64, 3, seed=1) + 2)
    assert found.centre == "adapted"
    assert "tenths of the predicted numbers" in str(found.adaptation)


def test_an_output_that_the_task_cannot_read_gives_no_mix() -> None:
    model = settled(nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1)), 3)
    posterior = stochbn.fit(model, [normal(640, 3)])
    assert posterior.reference is not None
    assert not len(posterior.reference.usual)
    found = adapted_of(model, posterior, normal(64, 3, seed=1) + 2)
    assert "no mix" in str(found.adaptation)


# What the reference is made of


def test_a_reference_of_examples_as_they_are_at_test_time() -> None:
    data = [foggy(part) for part in parts(pictures(640, 1)[0], 64)]
    clean = pictures(640, 8)[0]
    posterior = stochbn.fit(network(), data, reference=parts(clean, 64))
    assert posterior.reference is not None
    assert posterior.reference.examples == 640
    assert stochbn.shift.Monitor(posterior).look(network(), pictures(32, 9)[0]).look > 0.01
    changed = stochbn.fit(network(), parts(clean, 64), augment=lambda x, generator: foggy(x)).reference
    assert changed is not None
    torch.testing.assert_close(changed.centre, posterior.reference.centre)
    with pytest.raises(TypeError, match="reference must be"):
        stochbn.fit(network(), data, reference="all")


def test_examples_that_can_be_no_reference_are_refused_before_the_fit() -> None:
    data = parts(pictures(640, 1)[0], 64)
    done: list[int] = []
    for wrong, match in (
        ([], "no batches to observe"),
        ([1, 2], "tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            stochbn.fit(network(), data, reference=wrong, progress=lambda *_: done.append(1))
    assert not done
    with pytest.raises(ValueError, match="there are 100 usable examples of 100; it needs 256"):
        stochbn.fit(network(), data, reference=[pictures(100, 2)[0]])
    with pytest.raises(ValueError, match="there are 0 usable examples of 300"):
        stochbn.fit(network(), data, reference=[torch.full((300, 1, 12, 12), math.nan)])
    holed = pictures(400, 2)[0]
    holed[7] = math.nan
    reference = stochbn.fit(network(), data, reference=[holed]).reference
    assert reference is not None
    assert reference.examples == 399


def test_a_layer_that_only_some_examples_reach_is_left_out_of_the_reference() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rare, self.always, self.head = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.always(self.rare(x) if bool(x[0, 0] > 0) else x))  # type: ignore[no-any-return]

    data = [normal(256, 4, seed=seed).abs() * sign for seed, sign in enumerate((1, -1))]
    model = settled(Sometimes(), 4)
    reference = stochbn.fit(model, data, 16, kind="factorized", reference=data).reference
    assert reference is not None
    assert list(reference.layers) == ["always"]
    assert reference.running.shape == (2, 4)


def test_few_examples_give_no_reference() -> None:
    assert stochbn.fit(network(), [pictures(48, 1)[0]]).reference is None


# Files


def test_files_hold_reference_and_adaptation(tmp_path: Path) -> None:
    posterior = adapted(foggy(pictures(32, 3)[0]))
    posterior.save(tmp_path / "p.safetensors")
    loaded = stochbn.load(tmp_path / "p.safetensors")
    assert loaded.adaptation == posterior.adaptation
    assert loaded.centre == "adapted"
    assert isinstance(loaded.reference, Reference)
    assert posterior.reference is not None
    for name, tensor in posterior.reference.tensors().items():
        assert torch.equal(getattr(loaded.reference, name), tensor)
    torch.testing.assert_close(loaded.expected, posterior.expected)
    bare = stochbn.fit(network(), [pictures(320, 1)[0]], reference=False)
    bare.save(tmp_path / "p.safetensors")
    assert stochbn.load(tmp_path / "p.safetensors").reference is None
    assert loaded.recentre(network()).adaptation is None


@pytest.mark.parametrize("name", ["centre", "own", "mixing", "quantiles", "levels", "strengths"])
def test_a_reference_that_cannot_be_is_refused(name: str) -> None:
    reference = fitted().reference
    assert reference is not None
    tensor = getattr(reference, name)
    for wrong in (tensor[..., :-1], tensor.double(), torch.full_like(tensor, math.nan)):
        if name == "quantiles" and wrong.shape[-1] != tensor.shape[-1]:
            continue
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(reference, **{name: wrong})  # type: ignore[arg-type]


# The alarm


def test_the_alarm_sounds_for_what_has_changed_and_tells_look_from_mix() -> None:
    monitor = stochbn.shift.Monitor(fitted())
    readings = [monitor.update(network(), part) for part in parts(pictures(1600, 6)[0], 16)]
    assert not any(reading.alarm for reading in readings)
    assert sum(reading.p <= 0.05 for reading in readings) / len(readings) < 0.12
    monitor.reset()
    changed = [monitor.update(network(), part) for part in parts(foggy(pictures(160, 6)[0]), 16)]
    assert changed[3].alarm
    assert "look of the inputs" in str(changed[3])
    assert changed[0].each.shape == (16,)
    assert (changed[0].each < 0.05).double().mean() > 0.8
    mixed = monitor.look(network(), pictures(32, 6, (2,))[0])
    assert mixed.look > 0.01 >= mixed.mixed
    assert "mix of classes" in str(mixed)


def test_evidence_is_fair_where_nothing_has_changed() -> None:
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    assert 0.9 < sum(map(_e_value, grid.tolist())) / len(grid) <= 1
    assert all(
        a >= b for a, b in zip(map(_e_value, [1e-6, 1e-3, 0.1, 0.5]), map(_e_value, [1e-3, 0.1, 0.5, 1.0]), strict=True)
    )


# Wrong use


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "no examples"),
        ([torch.empty(0, 1, 12, 12)], "at least one example"),
        ([torch.full((4, 1, 12, 12), math.nan)], "not finite"),
        (torch.zeros(4, 1, 12, 12), "iterable of batches"),
        ([torch.zeros(4, 3, 12, 12)], "failed on an input"),
    ],
)
def test_batches_that_cannot_be_are_refused(batches: Any, match: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=match):
        stochbn.adapt(network(), fitted(), batches)


def test_a_batch_that_fails_does_not_count() -> None:
    adapter = stochbn.shift.Adapter(network(), fitted())
    before = adapter.update(foggy(pictures(32, 3)[0])).expected
    bad = foggy(pictures(32, 4)[0])
    bad[3, 0, 2, 2] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        adapter.update(bad)
    assert torch.equal(adapter.posterior.expected, before)


def test_other_wrong_arguments_are_refused() -> None:
    x = pictures(8, 3)[0]
    with pytest.raises(TypeError, match="posterior"):
        stochbn.adapt(network(), network(), [x])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prior"):
        stochbn.adapt(network(), fitted(), [x], prior=-1)
    with pytest.raises(TypeError, match="prior"):
        stochbn.adapt(network(), fitted(), [x], prior="64")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="half_life"):
        stochbn.shift.Adapter(network(), fitted(), half_life=0)
    with pytest.raises(ValueError, match="no reference"):
        stochbn.shift.Monitor(dataclasses.replace(fitted(), reference=None))
    with pytest.raises(ValueError, match="every"):
        stochbn.shift.Monitor(fitted(), every=0.5)
    other = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="fitted to another network"):
        stochbn.adapt(other, fitted(), [normal(8, 2)])
    with pytest.raises(ValueError, match="not finite"):
        stochbn.shift.Monitor(fitted()).look(network(), torch.full((4, 1, 12, 12), math.nan))


# Written back


def test_the_network_that_is_written_predicts_as_the_posterior_without_noise() -> None:
    posterior = adapted(foggy(pictures(64, 3)[0]))
    x = foggy(pictures(50, 2)[0])
    written = posterior.write_to(network())
    assert not any(
        parameter is own for parameter, own in zip(written.parameters(), network().parameters(), strict=True)
    )
    with torch.no_grad():
        wanted = stochbn.Predictive(network(), posterior.rescale(math.inf))(x).probs
        torch.testing.assert_close(written(x).softmax(1), wanted, rtol=1e-5, atol=1e-6)
        unchanged = fitted().write_to(network())
        torch.testing.assert_close(unchanged(x), network()(x))
    with pytest.warns(UserWarning, match=r"divide the logits of this copy by 1\.5"):
        dataclasses.replace(posterior, temperature=1.5).write_to(network())


def test_threads_share_a_monitor() -> None:
    x = pictures(16, 9)[0]
    alone, shared = stochbn.shift.Monitor(fitted()), stochbn.shift.Monitor(fitted())
    for _ in range(40):
        alone.update(network(), x)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: shared.update(network(), x), range(40)))
    assert (shared.seen, shared.evidence) == (40, alone.evidence)
    assert pickle.loads(pickle.dumps(shared)).seen == 40


def test_evidence_stays_finite_however_long_the_alarm_sounds() -> None:
    monitor, x = stochbn.shift.Monitor(fitted()), foggy(pictures(16, 9)[0])
    monitor.evidence = 1e299
    readings = [monitor.update(network(), x) for _ in range(4)]
    assert readings[-1].alarm
    assert math.isfinite(monitor.evidence)


def test_a_reading_is_described_in_json() -> None:
    reading = stochbn.shift.Monitor(fitted()).look(network(), pictures(16, 9)[0])
    far = dataclasses.replace(reading, layers={"1": math.inf})
    for one in (reading, far):
        found = one.description()
        assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["p"] == reading.p
