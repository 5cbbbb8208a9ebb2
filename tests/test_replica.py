from __future__ import annotations

import contextlib
import copy
import functools
import gc
import random
import threading
import types
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stochbn
from conftest import Untouched, count_lines, mixed_up, mlp, normal, seeded, settled
from stochbn import Predictive, Settings
from stochbn.network.replica import Network


def fitted(model: nn.Module) -> stochbn.Posterior:
    return stochbn.fit(model, [normal(96, 4, seed=3)], 8)


def slow(model: nn.Module, posterior: stochbn.Posterior, x: Tensor, draws: int = 9) -> Tensor:
    """Mean probabilities from copies of the network, whose buffers are set."""
    probs = []
    for draw in posterior.iter_draws(draws, seeded(), quasi=True):
        changed = copy.deepcopy(model).eval()
        for name, values in draw.items():
            changed.get_buffer(name).copy_(values)
        with torch.no_grad():
            probs.append(changed(x.clone()).softmax(1))
    return torch.stack(probs).mean(0)


def found(predictive: Predictive, x: Tensor) -> Tensor:
    probs: Tensor = predictive(x, generator=seeded()).probs
    return probs


def check(model: nn.Module, predictive: Predictive, x: Tensor) -> None:
    assert predictive.posterior is not None
    torch.testing.assert_close(found(predictive, x), slow(model, predictive.posterior, x), rtol=1e-4, atol=1e-5)


def test_a_replica_shares_the_memory_of_parameters_and_nothing_else() -> None:
    model = settled(mlp(), 4)
    replica = Network.of(model).fresh()
    assert replica is not None
    for (name, own), theirs in zip(model.named_parameters(), replica.model.parameters(), strict=True):
        assert own is not theirs
        assert own.data_ptr() == theirs.data_ptr(), name
    for (name, buffer), copied in zip(model.named_buffers(), replica.model.buffers(), strict=True):
        assert buffer.data_ptr() != copied.data_ptr(), name
    whole = Network.of(model).fresh(own_parameters=True)
    assert whole is not None
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in whole.model.parameters()}


def test_training_further_and_new_buffers_are_seen() -> None:
    model: Any = settled(mlp(), 4)
    x, predictive = normal(9, 4), Predictive(model, fitted(model), 9, tolerance=0, check="shape")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        check(model, predictive, x)
        model.train()
        model(normal(16, 4, seed=step)).square().mean().backward()
        optimizer.step()
        model.eval()
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)
    check(model, predictive, x)
    model[0].weight.data.mul_(0.5)
    check(model, predictive, x)
    model[3] = nn.Linear(6, 7)
    check(model, predictive, x)


class Scaled(nn.Module):
    """Has numbers of its own, as a buffer, as a plain tensor and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.register_buffer("scale", torch.ones(4))
        self.plain = torch.ones(4)
        self.listed = [1.0]

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x * self.scale * self.plain * self.listed[0])
        return out


def _doubling(body: Any, x: Tensor) -> Tensor:
    out: Tensor = type(body).forward(body, 2 * x)
    return out


@pytest.mark.parametrize("what", ["buffer", "buffer replaced", "plain", "plain replaced", "listed", "hook", "forward"])
def test_whatever_is_changed_between_calls_is_seen(what: str) -> None:
    model, x = Scaled(), normal(9, 4)
    settled(model, 4)
    predictive = Predictive(model, fitted(model), 9, tolerance=0)
    check(model, predictive, x)
    before = found(predictive, x)
    if what == "buffer":
        model.scale.mul_(2)
    elif what == "buffer replaced":
        model.scale = torch.full((4,), 2.0)
    elif what == "plain":
        model.plain.mul_(2)
    elif what == "plain replaced":
        model.plain = torch.full((4,), 2.0)
    elif what == "listed":
        model.listed[0] = 2.0
    elif what == "hook":
        model.body.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    else:
        vars(model.body)["forward"] = types.MethodType(_doubling, model.body)
    check(model, predictive, x)
    assert not torch.allclose(found(predictive, x), before, atol=1e-3)


def test_hooks_flags_and_gradients_stay_as_they_are() -> None:
    model, x = settled(mlp(), 4), normal(9, 4)
    predictive = Predictive(mixed_up(model), fitted(model), 9)
    before = Untouched(model)
    predictive(x)
    predictive(x, keep_draws=True)
    before.check()


class Closure(nn.Module):
    """Calls a layer of the network that it was made for by a function that keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        body = self.body
        self.call: Callable[[Tensor], Tensor] = lambda x: body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def patched() -> nn.Module:
    """A network whose forward is replaced by a function that calls the original's."""
    model = mlp()
    original: Any = model.forward
    vars(model)["forward"] = lambda x: original(2 * x)
    return model


def locked() -> nn.Module:
    """A network that cannot be copied."""
    model = mlp()
    model.lock = threading.Lock()  # type: ignore[assignment]
    return model


def slow_in_place(model: nn.Module, posterior: stochbn.Posterior, x: Tensor) -> Tensor:
    own = {name: b.clone() for name, b in model.named_buffers()}
    probs = []
    for draw in posterior.iter_draws(9, seeded(), quasi=True):
        for name, values in draw.items():
            model.get_buffer(name).copy_(values)
        with torch.no_grad():
            probs.append(model(x.clone()).softmax(1))
    for name, values in own.items():
        model.get_buffer(name).copy_(values)
    return torch.stack(probs).mean(0)


@pytest.mark.parametrize("build", [Closure, patched, locked])
def test_threads_take_turns_with_a_network_that_must_run_in_place(build: Callable[[], nn.Module]) -> None:
    model = settled(build(), 4)
    posterior = stochbn.fit(model, [normal(96, 4, seed=1)], 8)
    x = normal(20, 4, seed=2)
    wanted = slow_in_place(model, posterior, x)
    predictive = stochbn.Predictive(model, posterior, 9, tolerance=0)
    begin = threading.Barrier(6)

    def work(_: int) -> list[Tensor]:
        begin.wait()
        return [predictive(x, generator=seeded()).probs for _ in range(12)]

    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(work, range(6)):
            for probs in found:
                torch.testing.assert_close(probs, wanted, rtol=1e-4, atol=1e-5)
    assert "passes change it" not in str(predictive.explain(x))


@pytest.mark.parametrize("build", [Closure, patched, locked])
def test_a_network_that_must_run_in_place_is_right_and_stays(build: Callable[[], nn.Module]) -> None:
    model, x = settled(build(), 4), normal(9, 4)
    posterior = stochbn.fit(model, [normal(96, 4, seed=3)], 8, deterministic=())
    wanted = slow_in_place(model, posterior, x)
    model.train()
    before = Untouched(model)
    predictive = Predictive(model, posterior, 9, tolerance=0)
    for _ in range(2):
        torch.testing.assert_close(found(predictive, x), wanted, rtol=1e-4, atol=1e-5)
    assert "on the network itself" in predictive.explain(x)
    before.check()


def test_threads_that_share_a_predictive_get_what_each_alone_gets() -> None:
    model = settled(mlp(), 4)
    posterior = fitted(model)
    predictive = Predictive(model, posterior, 9, tolerance=0)
    batches = [normal(n, 4, seed=n) for n in (1, 2, 3, 7, 16, 40)]
    wanted = [slow(model, posterior, x) for x in batches]
    with torch.no_grad():
        plain = [model(x) for x in batches]

    def work(seed: int) -> None:
        order = random.Random(seed).choices(range(len(batches)), k=12)
        for i in order:
            torch.testing.assert_close(found(predictive, batches[i]), wanted[i], rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                torch.testing.assert_close(model(batches[i]), plain[i])

    before = Untouched(model)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    before.check()


@pytest.mark.parametrize("build", [mlp, locked, patched])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_at_any_line_leaves_all_as_it_was(
    build: Callable[[], nn.Module], error: type[BaseException]
) -> None:
    model, x = settled(build(), 4), normal(9, 4)
    posterior = fitted(model)
    predictive = Predictive(model, posterior, 9, tolerance=0)
    wanted = found(predictive, x)
    model.train()
    before = Untouched(model)
    lines = count_lines(lambda: found(predictive, x), None, error)
    for stop in sorted(random.Random(0).sample(range(1, lines), 60)):
        with contextlib.suppress(error):
            count_lines(lambda: found(predictive, x), stop, error)
        before.check()
        torch.testing.assert_close(found(predictive, x), wanted, rtol=1e-4, atol=1e-5)


def test_what_is_kept_of_a_dead_network_and_of_a_dead_thread_is_freed() -> None:
    model = settled(mlp(), 4)
    predictive: Predictive | None = Predictive(model, fitted(model), 9)
    assert predictive is not None
    predictive(normal(9, 4))
    network = weakref.ref(Network.of(model))
    replicas: list[weakref.ref[Any]] = []

    def work() -> None:
        assert predictive is not None
        predictive(normal(9, 4))
        replicas.append(weakref.ref(vars(predictive._network._local)["kept"][1]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    del thread
    gc.collect()
    assert replicas[0]() is None
    dead = weakref.ref(model)
    predictive = None
    del model
    gc.collect()
    assert network() is None
    assert dead() is None


def test_a_copy_of_a_predictive_is_of_a_copy_of_the_network() -> None:
    model, x = settled(mlp(), 4), normal(9, 4)
    predictive = Predictive(model, fitted(model), 9, tolerance=0)
    predictive(x)
    other = copy.deepcopy(predictive)
    assert other.model is not model
    wanted = found(predictive, x)
    with torch.no_grad():
        next(other.model.parameters()).mul_(0)
    torch.testing.assert_close(found(predictive, x), wanted)
    other.check = "shape"
    check(other.model, other, x)
    assert Network.of(other.model) is not Network.of(model)


def test_two_predictives_of_one_network_share_what_is_known_of_it() -> None:
    model = settled(mlp(), 4)
    posterior = fitted(model)
    first, second = Predictive(model, posterior, 9), Predictive(torch.compile(model, backend="eager"), posterior, 9)  # type: ignore[arg-type]
    assert first._network is second._network


def test_a_parameter_that_is_written_to_for_some_values_alone_is_the_replicas_own() -> None:
    class Adapting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.scale = settled(mlp(), 4), nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            if x.max() > 5:
                self.scale.data.mul_(1.1)
            out: Tensor = self.body(x) * self.scale
            return out

    model = Adapting()
    posterior = stochbn.fit(model, [normal(48, 4, seed=9)], 6)
    before = Untouched(model)
    x = normal(40, 4)
    large = x.clone()
    large[-1] = 9
    predictive = Predictive(model, posterior, 9, tolerance=0)
    for batch in (x[:3], large, x, large):
        found = predictive(batch, generator=seeded())
        torch.testing.assert_close(found.probs, slow(model, posterior, batch), rtol=1e-4, atol=1e-5)
    before.check()


class Convolutional(nn.Module):
    """Cannot be copied: it holds a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1, self.c2 = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 2)
        self.b2, self.head, self.lock = nn.BatchNorm2d(4), nn.Linear(4, 3), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.b2(self.c2(self.b1(self.c1(x)).relu())).mean((2, 3)))
        return out


def test_a_fit_in_place_leaves_the_weights_where_they_were() -> None:
    model = settled(Convolutional(), 2, 6, 5)
    before = Untouched(model)
    parameters = list(map(id, model.parameters()))
    posterior = stochbn.fit(model, [normal(64, 2, 6, 5, seed=3)], 8)
    Predictive(model, posterior, 9)(normal(20, 2, 6, 5))
    before.check()
    assert list(map(id, model.parameters())) == parameters
    assert all(type(p) is nn.Parameter for m in model.modules() for p in m._parameters.values() if p is not None)


def test_a_part_that_gives_itself_for_a_copy_is_not_changed() -> None:
    class Itself(nn.Sequential):
        def __deepcopy__(self, memo: dict[int, Any]) -> Itself:
            return self

    model = settled(nn.Sequential(nn.Linear(4, 4), Itself(nn.BatchNorm1d(4)), nn.Linear(4, 3)), 4)
    before, x = Untouched(model), normal(20, 4)
    posterior = fitted(model)
    found = Predictive(model, posterior, 9, tolerance=0)(x, generator=seeded())
    before.check()
    torch.testing.assert_close(found.probs, slow_in_place(model, posterior, x), rtol=1e-4, atol=1e-5)


class Holding(nn.Module):
    """Scales its outputs by what it holds."""

    def __init__(self, held: Any, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.body, self.held, self.read = settled(mlp(), 4), held, read

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x) * self.read(self.held)
        return out


@pytest.mark.parametrize(
    ("make", "change", "read"),
    [
        (lambda: np.ones(1, np.float32), lambda held: held.fill(3), lambda held: float(held[0])),
        (lambda: torch.ones(1), lambda held: held.data.fill_(3), lambda held: held),
        (
            lambda: functools.partial(torch.mul, torch.ones(1)),
            lambda held: held.args[0].fill_(3),
            lambda held: held(1.0),
        ),
    ],
)
def test_what_the_user_changes_between_calls_is_seen(
    make: Callable[[], Any], change: Callable[[Any], Any], read: Callable[[Any], Any]
) -> None:
    model, x = Holding(make(), read), normal(12, 4)
    posterior = fitted(model)
    predictive = Predictive(model, posterior, 9, tolerance=0)
    predictive(x)
    change(model.held)
    found = predictive(x, generator=seeded())
    torch.testing.assert_close(found.probs, slow(model, posterior, x), rtol=1e-4, atol=1e-5)


def test_a_buffer_may_get_another_shape_between_calls() -> None:
    model, x = settled(mlp(), 4), normal(12, 4)
    model.register_buffer("table", torch.zeros(10))
    predictive = Predictive(model, fitted(model), 9)
    predictive(x)
    model.get_buffer("table").data = torch.ones(20)
    predictive(x)


def test_a_network_may_hold_its_own_predictive() -> None:
    model, x = settled(mlp(), 4), normal(12, 4)
    posterior = fitted(model)
    predictive = Predictive(model, posterior, 9, tolerance=0)
    vars(model)["predictive"] = predictive
    found = [predictive(x, generator=seeded()).probs for _ in range(3)]
    del vars(model)["predictive"]
    for probs in found:
        torch.testing.assert_close(probs, slow(model, posterior, x), rtol=1e-4, atol=1e-5)


def test_posteriors_that_are_no_longer_used_are_freed() -> None:
    model, x = settled(mlp(), 4), normal(12, 4)
    keeper = Predictive(model, fitted(model), 9)
    posterior = fitted(model)
    Predictive(model, posterior, 9)(x)
    alive = weakref.ref(posterior)
    del posterior
    gc.collect()
    assert alive() is None
    assert keeper.model is model


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    if x.size(0) > 40:
        return x / x.max()
    return x


def by_stride(x: Tensor) -> Tensor:
    return x / x.max() if x.t().contiguous().stride(0) > 20 else x


def mapped(x: Tensor) -> Tensor:
    result: Tensor = torch.vmap(lambda r: r / (r.max() + 1) if len(r) > 30 else r, in_dims=1, out_dims=1)(x)
    return result


class Hiding(nn.Module):
    """What it does to objects depends on their number, or on a buffer, in a way that is hard to see."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.norm, self.head, self.way = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3), way
        self.register_buffer("gate", torch.zeros(()))

    gate: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu() * 3
        if self.way == "scripted":
            x = scripted(x)
        elif self.way == "gate":
            x = x / x.max() if self.gate > 0 else x
        else:
            x = by_stride(x) if self.way == "stride" else mapped(x)
        out: Tensor = self.head(x)
        return out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["scripted", "stride", "mapped", "gate"])
def test_what_hides_the_number_of_objects_gets_whole_batches(way: str) -> None:
    model = settled(Hiding(way), 4)
    posterior = fitted(model)
    predictive = Predictive(model, posterior, 9, tolerance=0)
    for objects in (4, 16, 60):
        if objects == 60:
            model.get_buffer("gate").data.fill_(1)
        x = normal(objects, 4, seed=objects)
        found = predictive(x, generator=seeded())
        torch.testing.assert_close(found.probs, slow(model, posterior, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.data[5].mul_(5),
        lambda w: w.data.copy_(w.data.flip(0)),
        lambda w: setattr(w, "data", w.data.flip(0)),
        lambda w: setattr(w, "data", w.data[:, torch.randperm(w.shape[1], generator=seeded())].contiguous()),
        lambda w: w.data.view(-1)[7:8].add_(9),
        lambda w: w.detach().numpy().__setitem__(3, 1.5),
        lambda w: setattr(w, "data", w.data.contiguous(memory_format=torch.channels_last) * 2),
    ],
)
@pytest.mark.parametrize("settings", [Settings(), Settings(bfloat16=True, weights=0)])
def test_weights_that_are_written_to_without_a_sign_are_those_of_the_call(
    change: Callable[[Tensor], Any], settings: Settings
) -> None:
    model, x = settled(wide(), 2, 6, 5), normal(40, 2, 6, 5)
    posterior = stochbn.fit(model, [normal(96, 2, 6, 5, seed=3)], 8)
    predictive = Predictive(model, posterior, 9, tolerance=None, settings=settings, check="shape")
    exact = Predictive(model, posterior, 9, tolerance=0, check="shape")
    for each in (predictive, exact):
        each(x)
    change(model.get_parameter("3.weight"))
    for each in (predictive, exact):
        anew = Predictive(
            copy.deepcopy(model), posterior, 9, tolerance=each.tolerance, settings=settings, check="shape"
        )
        torch.testing.assert_close(found(each, x), found(anew, x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found(exact, x), slow(model, posterior, x), rtol=1e-4, atol=1e-5)


def wide() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 40, 3, padding=1), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 48, 3), nn.BatchNorm2d(48),
        nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(48, 3),
    )  # fmt: skip


def test_writes_by_data_to_a_layer_that_is_not_registered_are_seen() -> None:
    model = Listing()
    settled(model, 4)
    predictive, x = Predictive(model, fitted(model), 9, tolerance=0), normal(12, 4)
    predictive(x)
    model.others[0].weight.data[2:4].mul_(4)
    check(model, predictive, x)


class Listing(nn.Module):
    """Keeps a layer in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.others = mlp(), [nn.Linear(4, 4)]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(self.others[0](x))
        return out


def test_a_write_by_data_has_the_posterior_compared_with_the_weights() -> None:
    model, x = settled(mlp(), 4), normal(12, 4)
    predictive = Predictive(model, fitted(model), 9)
    predictive(x)
    model.get_parameter("0.weight").data.mul_(2)
    with pytest.warns(UserWarning, match="has changed since this predictive was made"):
        predictive(x)
    predictive(x)  # it is told once
