from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import stochbn
from conftest import Untouched, mlp, normal, settled
from stochbn import Predictive


def batches(count: int = 6, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    x = normal(32 * count, 4, seed=seed)
    return list(zip(torch.split(x, 32), torch.split((x[:, 0] > 0).long() + (x[:, 1] > 0.5).long(), 32), strict=True))


def weights(ensemble: stochbn.Ensemble) -> list[Tensor]:
    members: list[Any] = ensemble.members
    return [torch.cat([p.detach().flatten() for p in member.model.parameters()]) for member in members]


def test_each_cycle_is_adam_along_a_cosine_from_where_the_one_before_ended() -> None:
    model, data = settled(mlp(), 4), batches()
    before = Untouched(model)
    seen: list[tuple[int, int]] = []
    ensemble = stochbn.snapshots(model, data, cross_entropy, count=2, epochs=2, progress=lambda *at: seen.append(at))
    before.check()
    slow, found = copy.deepcopy(model), []
    for _ in range(2):
        slow.train()
        optimiser = torch.optim.Adam(slow.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 12, 1e-5)
        for x, labels in data * 2:
            optimiser.zero_grad()
            cross_entropy(slow(x), labels).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        found.append(torch.cat([p.detach().flatten().clone() for p in slow.parameters()]))
    for own, wanted in zip(weights(ensemble), found, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-6)
    assert seen == [(step, 24) for step in range(1, 25)]
    last: Any = ensemble.members[-1]
    torch.testing.assert_close(dict(last.model.named_buffers())["1.running_mean"], slow.get_buffer("1.running_mean"))
    torch.testing.assert_close(last.posterior.expected, stochbn.fit(slow, data).expected)
    assert not last.model.training


def test_within_autocast_every_step_goes_by_the_weights_as_they_are() -> None:
    model, data = settled(mlp(), 4), batches()
    with torch.autocast("cpu", torch.bfloat16):
        ensemble = stochbn.snapshots(model, data, cross_entropy, count=1, epochs=1)
    slow = copy.deepcopy(model).train()
    optimiser = torch.optim.Adam(slow.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 6, 1e-5)
    for x, labels in data:
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(slow(x), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    wanted = torch.cat([p.detach().flatten() for p in slow.parameters()])
    torch.testing.assert_close(weights(ensemble)[0], wanted, rtol=1e-5, atol=1e-7)


def test_the_optimizer_and_the_predictives_can_be_chosen() -> None:
    model, data = settled(mlp(), 4), batches()
    sgd = functools.partial(torch.optim.SGD, lr=0.0)
    ensemble = stochbn.snapshots(
        model, data, cross_entropy, count=2, epochs=1, optimizer=sgd, kind="factorized", batch_size=8,
        member=functools.partial(Predictive, draws=3, keep_draws=True),
    )  # fmt: skip
    plain = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert all(torch.equal(own, plain) for own in weights(ensemble))
    assert ensemble(normal(5, 4)).log_probs.shape == (6, 5, 3)
    members: list[Any] = ensemble.members
    assert all(isinstance(member.posterior, stochbn.Factorized) for member in members)


def test_snapshots_of_a_network_for_digits_know_more_than_it_does() -> None:
    digits = load_digits()
    x = torch.from_numpy(digits.images).float()[:, None] / 16
    labels = torch.from_numpy(digits.target).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 64), nn.BatchNorm1d(64),
            nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
        train = DataLoader(TensorDataset(x[:300], labels[:300]), 50, shuffle=True)
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(12):
            for inputs, truth in train:
                optimiser.zero_grad()
                cross_entropy(model(inputs), truth).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        model.eval()
        sgd = functools.partial(torch.optim.SGD, lr=0.2, momentum=0.9)
        ensemble = stochbn.snapshots(model, train, cross_entropy, optimizer=sgd, epochs=8)
    test, truth = x[300:], labels[300:]
    # Without draws, whose noise is as large as what three snapshots are better by.
    members: list[Any] = ensemble.members
    snapshots = stochbn.Ensemble([Predictive(member.model) for member in members])
    one, three = (stochbn.metrics.calibrated_nll(m(test).probs, truth)["nll"] for m in (Predictive(model), snapshots))
    assert three < one


def test_a_folder_is_gone_on_with_and_holds_the_same_snapshots(tmp_path: Path) -> None:
    model, data, made = settled(mlp(), 4), batches(), []
    take = functools.partial(stochbn.snapshots, model, data, cross_entropy, epochs=1, seed=4)

    def stopped(done: int, total: int) -> None:
        made.append(done)
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(count=3, folder=tmp_path / "new" / "run", progress=stopped)
    assert sorted(file.name for file in (tmp_path / "new" / "run").iterdir()) == [
        "snapshot-0.safetensors",
        "snapshot-0.sbn.safetensors",
    ]
    made.clear()
    ensemble = take(count=3, folder=tmp_path / "new" / "run", progress=lambda done, total: made.append(done))
    assert made == list(range(7, 19))
    for own, wanted in zip(weights(ensemble), weights(take(count=3)), strict=True):
        assert torch.equal(own, wanted)
    again = take(count=3, folder=tmp_path / "new" / "run", progress=lambda done, total: pytest.fail("trained again"))
    x = normal(5, 4)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(again(x, generator=generators[0]).probs, ensemble(x, generator=generators[1]).probs)
    with pytest.raises(ValueError, match="another network, or was made with other epochs"):
        stochbn.snapshots(model, data, cross_entropy, epochs=2, seed=4, folder=tmp_path / "new" / "run")
    other = settled(mlp(), 4, seed=9)
    with pytest.raises(ValueError, match="another network"):
        stochbn.snapshots(other, data, cross_entropy, epochs=1, seed=4, folder=tmp_path / "new" / "run")


class Turned:
    """Batches in an order that the number of the pass decides."""

    def __init__(self) -> None:
        self.passes: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.passes.append(epoch)

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data, first = batches(), self.passes[-1] % 6
        return iter(data[first:] + data[:first])


def test_one_that_goes_on_goes_through_the_data_as_one_that_was_not_stopped(tmp_path: Path) -> None:
    model, whole, rest = settled(mlp(), 4), Turned(), Turned()
    wanted = stochbn.snapshots(model, whole, cross_entropy, count=2, epochs=2)
    stochbn.snapshots(model, Turned(), cross_entropy, count=1, epochs=2, folder=tmp_path)
    found = stochbn.snapshots(model, rest, cross_entropy, count=2, epochs=2, folder=tmp_path)
    assert whole.passes == [0, 1, 2, 3, 4, 5]
    assert rest.passes == [3, 4, 5]
    assert all(torch.equal(*pair) for pair in zip(weights(found), weights(wanted), strict=True))


class Frozen(nn.Sequential):
    """Leaves its batch norm in evaluation mode."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self[1].train(False)
        return self


def test_what_the_network_keeps_frozen_stays_frozen() -> None:
    model: Any = Frozen(*settled(mlp(), 4).children(), nn.BatchNorm1d(3))
    model.eval()
    model[0].weight.requires_grad_(False)
    ensemble = stochbn.snapshots(model, batches(), cross_entropy, count=1, epochs=1)
    members: list[Any] = ensemble.members
    snapshot = members[0].model
    assert torch.equal(snapshot[0].weight, model[0].weight)
    assert torch.equal(snapshot[1].running_mean, model[1].running_mean)
    assert not torch.equal(snapshot[1].weight, model[1].weight)


def test_the_global_generator_is_left_alone_and_dropout_is_on() -> None:
    model: Any = settled(mlp(), 4)
    model.append(nn.Dropout(0.5))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (stochbn.snapshots(model, batches(), cross_entropy, count=1, epochs=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*weights(first), *weights(second))
    model[-1].p = 0.0
    without = stochbn.snapshots(model, batches(), cross_entropy, count=1, epochs=1)
    assert not torch.equal(*weights(first), *weights(without))


def test_mini_batches_are_augmented_anew_in_every_step() -> None:
    seen: list[Tensor] = []

    def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(x + torch.randn(x.shape, generator=generator))
        return seen[-1]

    data = batches(1)
    stochbn.snapshots(settled(mlp(), 4), data, cross_entropy, count=1, epochs=3, augment=noisy)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert len(seen) == 3 + 2  # three steps, and a fit to two mini-batches of 16


class Locked(nn.Sequential):
    def __deepcopy__(self, memo: dict[int, Any]) -> Locked:
        raise TypeError("there is but one")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"count": 0}, ValueError, "count must be at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be a whole number, got 1.5"),
        ({"batches": iter(batches())}, ValueError, "gone through only once"),
        ({"batches": []}, ValueError, "there are no batches"),
        ({"batches": torch.zeros(4, 4)}, TypeError, "an iterable of batches"),
        ({"batches": [x for x, _ in batches()]}, TypeError, "mappings with 'labels', got a Tensor"),
        ({"loss": lambda output, labels: output}, TypeError, r"without axes, got a tensor of shape \[32, 3\]"),
        ({"loss": lambda output, labels: 1.0}, TypeError, "without axes, got float"),
        ({"loss": lambda output, labels: output.sum() * float("nan")}, ValueError, "the loss is nan in step 1"),
        ({"model": Locked(*mlp())}, ValueError, "snapshots are copies of the network, and it cannot be copied"),
        ({"kind": "none"}, ValueError, "unknown kind 'none'"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    defaults: dict[str, Any] = {"model": settled(mlp(), 4), "batches": batches(), "loss": cross_entropy}
    with pytest.raises(error, match=message):
        stochbn.snapshots(**{**defaults, **arguments})
