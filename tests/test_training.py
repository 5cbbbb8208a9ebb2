from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import seeded
from stochbn.paper.schedule import Schedule, read_log
from stochbn.paper.trainee import augment
from stochbn.paper.training import augmented, train
from stochbn.sources.architectures import build
from stochbn.sources.named import Images, load


class StopHereError(Exception):
    """What stops a run that is to be continued."""


def few(n: int, classes: int = 3, seed: int = 0) -> Images:
    """Noise on a different background for every class."""
    labels = torch.arange(n) % classes
    noise = torch.randint(60, (n, 1, 6, 6), generator=seeded(seed))
    pixels = (noise + 60 * labels[:, None, None, None]).to(torch.uint8)
    return Images(pixels, labels, tuple("abcdefgh"[:classes]), "few")


def small(dropout: float = 0.0) -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(64, 3)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def lenet(dropout: float = 0.0) -> Callable[[], nn.Module]:
    return functools.partial(build, "lenet5", dropout=dropout)


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    return all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("augment", [False, True])
def test_the_same_seed_gives_the_same_network_bit_for_bit_and_another_seed_another(
    dropout: float, augment: bool
) -> None:
    build_small = functools.partial(small, dropout)
    networks = [train(build_small, few(20), Schedule(2, 4, seed=seed, augment=augment)) for seed in (1, 1, 2)]
    assert same(networks[0], networks[1])
    assert not same(networks[0], networks[2])
    for name, value in networks[0].state_dict().items():
        if value.is_floating_point():
            assert not value.equal(networks[2].state_dict()[name]), name


def test_other_settings_give_other_networks() -> None:
    reference = train(small, few(20), Schedule(2, 4))
    for schedule in (Schedule(3, 4), Schedule(2, 5), Schedule(2, 4, 2e-3), Schedule(2, 4, augment=True)):
        assert not same(train(small, few(20), schedule), reference)


def test_the_global_generator_is_left_as_it_was_and_does_not_matter() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = train(lambda: small(0.5), few(12), Schedule(2, 4))
    assert torch.random.get_rng_state().equal(state)
    torch.manual_seed(2)
    assert same(train(lambda: small(0.5), few(12), Schedule(2, 4)), first)


def test_the_network_is_in_evaluation_mode_on_the_cpu_and_the_images_are_untouched() -> None:
    images = few(12)
    before = images.fingerprint
    model = train(lambda: small(0.5), images, Schedule(1, 4, augment=True))
    assert not any(module.training for module in model.modules())
    assert all(value.device.type == "cpu" for value in model.state_dict().values())
    assert images.fingerprint == before
    assert type(model) is nn.Sequential


class Double(nn.Module):
    """A network in float64 that takes float32 images, and writes down what it is trained on, and from which weights."""

    def __init__(self, seen: list[Tensor], fresh: list[nn.Module] | None = None) -> None:
        super().__init__()
        self.body = small().double()
        self.seen = seen
        self.fresh = [] if fresh is None else fresh

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if not self.seen:
                self.fresh.append(copy.deepcopy(self.body))
            self.seen.append(x.detach().clone())
        out: Tensor = self.body(x.double())
        return out


def slow_adam(model: nn.Module, images: Images, steps: int, learning_rate: float) -> nn.Module:
    """Training on all images at once, with Adam and the decay of its rate written out."""
    x, y = images.pixels / 255, images.labels
    first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    second = copy.deepcopy(first)
    for step in range(steps):
        log_probs = model.train()(x.double()).log_softmax(1)
        loss = -log_probs[torch.arange(len(y)), y].mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rate = learning_rate * (steps - step) / steps
        with torch.no_grad():
            for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g**2
                m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                p.sub_(rate * m / (v.sqrt() + 1e-8))
    return model.eval()


def test_training_is_adam_with_a_rate_that_decays_linearly_to_zero() -> None:
    images, fresh = few(9), list[nn.Module]()
    model = train(functools.partial(Double, [], fresh), images, Schedule(7, 9, 0.01, seed=4))
    reference = slow_adam(fresh[0], images, 7, 0.01).state_dict()
    for name, value in model.get_submodule("body").state_dict().items():
        if name != "0.bias":  # a normalisation follows, so its gradient is rounding, which Adam scales up
            tolerance = 1e-2 if "running_mean" in name else 1e-6
            torch.testing.assert_close(value, reference[name], rtol=tolerance, atol=tolerance)


def test_an_epoch_sees_every_image_at_most_once_in_full_mini_batches_in_an_order_of_its_own() -> None:
    pixels = torch.arange(11, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 6, 6)
    images = Images(pixels, torch.arange(11) % 3, ("a", "b", "c"), "numbered")
    seen: list[Tensor] = []
    train(lambda: Double(seen), images, Schedule(6, 4))
    batches = [(255 * x[:, 0, 0, 0]).round().int().tolist() for x in seen]
    assert [len(batch) for batch in batches] == [4] * 12
    epochs = [batches[2 * i] + batches[2 * i + 1] for i in range(6)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert {number for epoch in epochs for number in epoch} == set(range(11))


def test_images_are_shown_as_they_are_or_augmented() -> None:
    images = few(8)
    shown = {tuple(p.flatten().tolist()) for p in images.pixels}
    for changed in (False, True):
        seen: list[Tensor] = []
        train(functools.partial(Double, seen), images, Schedule(4, 8, augment=changed))
        assert len(seen) == 4
        found = {tuple((255 * p).round().int().flatten().tolist()) for x in seen for p in x}
        assert (found == shown) == (not changed)


def test_the_report_ends_at_the_last_step_and_the_loss_falls() -> None:
    calls: list[tuple[int, int, float]] = []
    images = few(64)
    model = train(small, images, Schedule(15, 8, 0.01), report=lambda *call: calls.append(call))
    steps = [step for step, _, _ in calls]
    assert steps == sorted(set(steps))
    assert steps[-1] == 120
    assert {total for _, total, _ in calls} == {120}
    losses = [loss for _, _, loss in calls]
    assert losses[-1] < 0.5 * losses[0]
    assert (model(images.pixels / 255).argmax(1) == images.labels).double().mean() > 0.95


def test_long_epochs_are_reported_in_between() -> None:
    calls: list[tuple[int, int, float]] = []
    train(small, few(240), Schedule(1, 2), report=lambda *call: calls.append(call))
    assert len(calls) > 1
    assert calls[-1][:2] == (120, 120)


def test_reported_losses_are_means_since_the_last_report() -> None:
    images, calls, fresh = few(9), list[float](), list[nn.Module]()
    build_double = functools.partial(Double, [], fresh)
    train(build_double, images, Schedule(1, 9), report=lambda step, steps, loss: calls.append(loss))
    probs = fresh[0].train()((images.pixels / 255).double()).softmax(1)
    expected = -probs[torch.arange(9), images.labels].log().mean()
    assert calls == [pytest.approx(expected.item(), rel=1e-5)]


def test_two_processes_train_one_network_together() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    images = few(70)
    model = train(small, images, Schedule(15, 4, 0.01, processes=2))
    assert torch.random.get_rng_state().equal(state)
    assert model.get_buffer("1.num_batches_tracked") == 15 * 8, "each step takes a mini-batch in each process"
    assert (model(images.pixels / 255).argmax(1) == images.labels).double().mean() > 0.95


def test_lenet5_learns_digits() -> None:
    known = load("digits:0-4", "test")
    model = train(lenet_for_five, load("digits:0-4", "train"), Schedule(1))
    with torch.no_grad():
        wrong = model(known.pixels / 255).argmax(1) != known.labels
    assert wrong.double().mean() < 0.06


def lenet_for_five() -> nn.Module:
    return build("lenet5", classes=5)


def test_all_images_are_augmented_once_by_the_seed_alone() -> None:
    pixels = torch.randint(256, (1200, 3, 12, 12), generator=seeded(3)).to(torch.uint8)
    images = Images(pixels, torch.arange(1200) % 5, tuple("abcde"), "noise")
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, again, other = (augmented(images, seed) for seed in (4, 4, 5))
    assert torch.random.get_rng_state().equal(state)
    assert first.pixels.equal(again.pixels)
    assert not first.pixels.equal(other.pixels)
    assert first.labels.equal(images.labels)
    assert first.shape == images.shape
    changed = (first.pixels != pixels).flatten(1).any(1)
    assert changed.double().mean() > 0.95
    torch.manual_seed(4)
    assert first.pixels[:1000].equal(augment(pixels[:1000]))


# ---------------------------------------------------------------- the learning rate


def test_the_learning_rate_falls_linearly_to_zero_once_an_epoch_or_at_each_step() -> None:
    by_epoch, by_step = (Schedule(4, learning_rate=0.5, decay=decay) for decay in ("epoch", "step"))
    assert [by_epoch.rate(e) for e in (0, 0.75, 1, 2, 3, 3.99)] == [0.5, 0.5, 0.375, 0.25, 0.125, 0.125]
    assert [by_step.rate(e) for e in (0, 0.5, 1, 2, 3, 3.5)] == [0.5, 0.4375, 0.375, 0.25, 0.125, 0.0625]


def test_the_learning_rate_stays_until_the_epoch_it_decreases_from() -> None:
    schedule = Schedule(6, learning_rate=0.5, decay="epoch", decrease_from=2)
    assert [schedule.rate(e) for e in range(6)] == [0.5, 0.5, 0.5, 0.375, 0.25, 0.125]
    assert Schedule(6, learning_rate=0.5, decrease_from=2).rate(2.5) == pytest.approx(0.5 * 3.5 / 4)


def test_training_uses_the_learning_rate_of_each_epoch() -> None:
    images = few(8)
    whole = train(small, images, Schedule(3, 4, decay="epoch"))
    assert not same(whole, train(small, images, Schedule(3, 4, decay="step")))
    assert not same(whole, train(small, images, Schedule(3, 4, decay="epoch", decrease_from=2)))
    one = [train(small, images, Schedule(1, 4, decay=decay, learning_rate=0.01)) for decay in ("epoch", "step")]
    assert not same(*one), "within the first epoch the rate by step has fallen already"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay": "year"}, "each 'epoch' or each 'step', not each 'year'"),
        ({"decrease_from": 3}, "decrease_from must be from 0 to 2 for 3 epochs, got 3"),
        ({"decrease_from": -1}, "decrease_from must be from 0 to 2 for 3 epochs, got -1"),
    ],
)
def test_impossible_decays_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(3, **changes)


# ---------------------------------------------------------------- the log


def test_the_log_has_a_line_of_loss_and_accuracy_for_every_epoch(tmp_path: Path) -> None:
    images, log, fresh = few(9), tmp_path / "training.csv", list[nn.Module]()
    held_out = few(30, seed=5)
    schedule = Schedule(4, 9, 0.02, decay="epoch")
    model = train(functools.partial(Double, [], fresh), images, schedule, held_out=held_out, log=log)
    epochs = read_log(log)
    assert [one.epoch for one in epochs] == [1, 2, 3, 4]
    assert [one.learning_rate for one in epochs] == pytest.approx([0.02, 0.015, 0.01, 0.005])
    log_probs = fresh[0].train()((images.pixels / 255).double()).log_softmax(1)  # the first step sees fresh weights
    assert epochs[0].loss == pytest.approx(-log_probs[range(9), images.labels].mean().item(), rel=1e-4)
    assert epochs[0].accuracy == pytest.approx((log_probs.argmax(1) == images.labels).double().mean().item(), rel=1e-4)
    with torch.no_grad():
        log_probs = model(held_out.pixels / 255).log_softmax(1)  # the last line is of the network that comes back
    assert epochs[-1].held_out_loss == pytest.approx(-log_probs[range(30), held_out.labels].mean().item(), rel=1e-4)
    right = (log_probs.argmax(1) == held_out.labels).double().mean().item()
    assert epochs[-1].held_out_accuracy == pytest.approx(right, rel=1e-4)


def test_the_loss_in_the_log_is_the_mean_over_all_steps_of_an_epoch(tmp_path: Path) -> None:
    reported: list[tuple[int, float]] = []
    log = tmp_path / "training.csv"
    follow = lambda step, steps, loss: reported.append((step, loss))  # noqa: E731
    train(small, few(240), Schedule(1, 2, 1e-2), log=log, report=follow)
    (first, a), (second, b), (third, c) = reported
    mean = (first * a + (second - first) * b + (third - second) * c) / third
    assert read_log(log)[0].loss == pytest.approx(mean, rel=1e-4)


def test_a_log_without_held_out_images_leaves_their_columns_empty(tmp_path: Path) -> None:
    log = tmp_path / "training.csv"
    train(small, few(12), Schedule(2, 4), log=log)
    assert [(one.held_out_loss, one.held_out_accuracy) for one in read_log(log)] == [(None, None)] * 2
    assert all(0 <= one.accuracy <= 1 and one.loss > 0 for one in read_log(log))


def test_the_log_and_held_out_images_do_not_change_the_network(tmp_path: Path) -> None:
    build_small, schedule = functools.partial(small, 0.3), Schedule(3, 4)
    plain = train(build_small, few(12), schedule)
    logged = train(build_small, few(12), schedule, held_out=few(20, seed=3), log=tmp_path / "training.csv")
    assert same(plain, logged)


def test_the_log_of_an_interrupted_run_is_that_of_a_whole_one(tmp_path: Path) -> None:
    schedule, held_out = Schedule(4, 4), few(9, seed=2)
    train(small, few(12), schedule, held_out=held_out, log=tmp_path / "whole.csv")
    state, log = tmp_path / "state.safetensors", tmp_path / "training.csv"
    for end in (6, 9):
        with pytest.raises(StopHereError):
            train(small, few(12), schedule, held_out=held_out, state=state, log=log, report=stopping_at(end))
    train(small, few(12), schedule, held_out=held_out, state=state, log=log)
    assert log.read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "epoch,learning_rate,loss,accuracy,held_out_loss\n1,2\n"])
def test_a_damaged_log_is_refused_or_empty(text: str, tmp_path: Path) -> None:
    log = tmp_path / "training.csv"
    log.write_text(text)
    if not text:
        assert read_log(log) == []
        return
    with pytest.raises(ValueError, match=r"training\.csv' is damaged or not a log of training"):
        read_log(log)


# ---------------------------------------------------------------- interrupted runs


def stopping_at(step: int) -> Callable[[int, int, float], None]:
    def report(now: int, steps: int, loss: float) -> None:
        if now >= step:
            raise StopHereError

    return report


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("augment", [False, True])
def test_an_interrupted_run_continues_as_if_nothing_had_happened(dropout: float, augment: bool, tmp_path: Path) -> None:
    images = load("digits", "train").take(torch.arange(48))
    schedule, state = Schedule(3, 16, seed=3, augment=augment), tmp_path / "state.safetensors"
    whole = train(lenet(dropout), images, schedule)
    with pytest.raises(StopHereError):
        train(lenet(dropout), images, schedule, state=state, report=stopping_at(6))  # at the end of the second epoch
    assert state.exists()
    continued_from = []
    again = train(
        lenet(dropout), images, schedule, state=state, report=lambda step, steps, loss: continued_from.append(step)
    )
    assert continued_from[0] > 3, "the first epoch was repeated"
    assert same(again, whole)


def test_a_run_that_is_interrupted_after_every_epoch_ends_alike(tmp_path: Path) -> None:
    images, state, stops = few(12), tmp_path / "state.safetensors", 0
    schedule = Schedule(5, 4)
    whole = train(lambda: small(0.3), images, schedule)
    for end in (6, 9, 12, 15):
        with pytest.raises(StopHereError):
            train(lambda: small(0.3), images, schedule, state=state, report=stopping_at(end))
        stops += 1
        assert state.exists()
    assert stops == 4
    assert same(train(lambda: small(0.3), images, schedule, state=state), whole)


def test_a_run_that_is_interrupted_within_its_first_epoch_begins_again(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    with pytest.raises(StopHereError):
        train(small, few(12), Schedule(2, 4), state=state, report=stopping_at(1))
    assert not state.exists()
    assert same(train(small, few(12), Schedule(2, 4), state=state), train(small, few(12), Schedule(2, 4)))


def test_keeping_a_state_changes_nothing_and_leaves_no_other_file(tmp_path: Path) -> None:
    without = train(small, few(12), Schedule(3, 4))
    assert same(train(small, few(12), Schedule(3, 4), state=tmp_path / "state.safetensors"), without)
    assert {file.name for file in tmp_path.iterdir()} <= {"state.safetensors"}


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    with pytest.raises(StopHereError):
        train(small, few(12), Schedule(3, 4), state=state, report=stopping_at(6))
    state.write_bytes(state.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"state\.safetensors' is truncated"):
        train(small, few(12), Schedule(3, 4), state=state)


# ---------------------------------------------------------------- what cannot be trained


@pytest.mark.parametrize(
    ("epochs", "batch_size", "learning_rate"),
    [(0, 16, 1e-3), (-1, 16, 1e-3), (1, 1, 1e-3), (1, 0, 1e-3), (1, 16, 0.0), (1, 16, -1e-3), (1, 16, float("inf")),
     (1, 16, float("nan"))],
)  # fmt: skip
def test_bad_schedules_are_refused(epochs: int, batch_size: int, learning_rate: float) -> None:
    with pytest.raises(ValueError, match="at least 1 epoch, a batch size of at least 2"):
        Schedule(epochs, batch_size, learning_rate)


def test_fewer_images_than_a_mini_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="few has 15 images, fewer than one batch of 16"):
        train(small, few(15), Schedule(1))


def test_exactly_one_mini_batch_is_enough() -> None:
    calls: list[tuple[int, int]] = []
    train(small, few(16), Schedule(1), report=lambda step, steps, loss: calls.append((step, steps)))
    assert calls == [(1, 1)]


@pytest.mark.parametrize(("learning_rate", "images"), [(1e30, 160), (1e30, 32), (1e9, 16)])
def test_a_learning_rate_so_high_that_numbers_overflow_is_refused(learning_rate: float, images: int) -> None:
    digits = load("digits", "train").take(torch.arange(images))
    with pytest.raises(ValueError, match="use a lower learning rate"):
        train(lenet(), digits, Schedule(2, 16, learning_rate))
