"""Several networks trained at once: each as if it were alone."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from stochbn.paper.schedule import Schedule, read_log
from stochbn.paper.trainee import store
from stochbn.paper.training import train, train_together
from stochbn.sources import architectures
from stochbn.sources.named import Images

CPU = torch.device("cpu")


def images(count: int = 70) -> Images:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    pixels = torch.randint(0, 100, (count, 1, 16, 16), generator=generator, dtype=torch.uint8)
    pixels[labels == 1, :, :8] += 100
    return Images(pixels, labels, ("dark", "bright"), "bars")


def builds(count: int) -> list[functools.partial[nn.Module]]:
    return [functools.partial(architectures.build, "lenet5", classes=2, size=16)] * count


SCHEDULES = [Schedule(epochs=3, seed=seed, decay=decay) for seed, decay in ((0, "epoch"), (1, "step"))]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_each_is_trained_as_if_alone(precision: str) -> None:
    schedules = [replace(schedule, precision=precision) for schedule in SCHEDULES]
    trained = train_together(builds(2), images(), schedules, CPU)
    for model, schedule in zip(trained, schedules, strict=True):
        alone = train(builds(1)[0], images(), schedule)
        # Not the weights: biases before batch norms have gradients of rounding alone, which Adam makes steps of.
        inputs = images().pixels.float() / 255
        torch.testing.assert_close(model(inputs), alone(inputs), rtol=0.02, atol=0.02)
        assert not model.training


def test_augmented_images_are_learnt_too() -> None:
    schedule = Schedule(epochs=12, augment=True)
    (model,) = train_together(builds(1), images(), [schedule], CPU)
    pixels = images().pixels.float() / 255
    assert (model(pixels).argmax(1) == images().labels).float().mean() > 0.9


def test_the_log_has_a_line_for_every_epoch(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    logs = [tmp_path / "a.csv", tmp_path / "b.csv"]
    train_together(
        builds(2),
        images(),
        SCHEDULES,
        CPU,
        held_out=images(20),
        logs=logs,
        report=lambda step, steps, loss: seen.append((step, steps)),
    )
    train(builds(1)[0], images(), SCHEDULES[1], held_out=images(20), log=tmp_path / "alone.csv")
    for ours, alone in zip(read_log(logs[1]), read_log(tmp_path / "alone.csv"), strict=True):
        assert ours.loss == pytest.approx(alone.loss, rel=1e-3)
        assert ours.held_out_accuracy == alone.held_out_accuracy
    assert seen[-1] == (12, 12)


def test_a_stopped_training_continues(tmp_path: Path) -> None:
    whole = train_together(builds(2), images(), SCHEDULES, CPU)
    states = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]

    def stop(step: int, steps: int, loss: float) -> None:
        if step >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_together(builds(2), images(), SCHEDULES, CPU, states=states, report=stop)
    continued = train_together(builds(2), images(), SCHEDULES, CPU, states=states)
    for one, other in zip(whole, continued, strict=True):
        for name, value in one.state_dict().items():
            assert other.state_dict()[name].equal(value), name


def test_states_after_different_epochs_continue_too(tmp_path: Path) -> None:
    model = builds(1)[0]()
    states = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    store(states[0], model.train(), torch.optim.Adam(model.parameters()), 2)
    first, second = train_together(builds(2), images(), SCHEDULES, CPU, states=states)
    (alone,) = train_together(builds(1), images(), SCHEDULES[1:], CPU)
    for name, value in alone.state_dict().items():
        assert second.state_dict()[name].equal(value), name
    assert first[1].num_batches_tracked == 4  # type: ignore[index]  # the last epoch alone


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="as many epochs"):
        train_together(builds(2), images(), [SCHEDULES[0], replace(SCHEDULES[1], epochs=4)], CPU)
    with pytest.raises(ValueError, match="16-mixed"):
        train_together(builds(1), images(), [replace(SCHEDULES[0], precision="16-mixed")], CPU)
    with pytest.raises(ValueError, match="fewer than one batch"):
        train_together(builds(1), images(10), SCHEDULES[:1], CPU)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    broken = replace(images(), pixels=images().pixels)
    with pytest.raises(ValueError, match="lower learning rate"):
        train_together(builds(1), broken, [replace(SCHEDULES[0], learning_rate=1e30)], CPU)
