"""Choosing augmentations greedily: as a slow loop chooses, and never what does harm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import stochbn
from conftest import Untouched, Wrapped, convnet, dense_net, normal, seeded, settled
from stochbn import Predictive, augment, choose_augmentation, metrics

FLIP, SHIFT = augment.flip(), augment.shift(2)


def ruined(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator)


def noisy(size: float) -> Any:
    def add(x: Tensor, generator: torch.Generator) -> Tensor:
        return x + size * torch.randn(x.shape, generator=generator)

    add.inverse = lambda values, generator: values  # type: ignore[attr-defined]  # it moves nothing
    return add


def slow(pools: list[Tensor], first: Tensor | None, labels: Tensor, count: int) -> list[int]:
    """The pools that a loop over all sets of draws takes, one after another."""
    chosen: list[int] = []
    for _ in range(count):
        scores = []
        for place in range(len(pools)):
            picked = [*chosen, place]
            probs = [pools[p][picked[:i].count(p) % len(pools[p])] for i, p in enumerate(picked)]
            mean = torch.stack(probs if first is None else [first, *probs]).mean(0)
            best = metrics.calibrated_nll(mean, labels, held_out=(mean, labels))
            scores.append(best["nll"])
        chosen.append(min(range(len(pools)), key=scores.__getitem__))
    return chosen


@pytest.mark.parametrize("clean", [True, False])
def test_the_choice_is_that_of_a_slow_loop(clean: bool) -> None:
    model = settled(convnet(), 2, 8, 8)
    posterior = stochbn.fit(model, [normal(96, 2, 8, 8, seed=7)], 8)
    x, labels = normal(60, 2, 8, 8, seed=5), torch.randint(3, (60,), generator=seeded(2))
    before, done = Untouched(model), list[int]()
    held_out = [(x[:40], labels[:40]), (x[40:], labels[40:])]
    turns = choose_augmentation(
        model, posterior, held_out, [FLIP, ruined, SHIFT], draws=6, passes=10, clean=clean, seed=3, progress=done.append
    )
    before.check()
    assert done == [40, 60]
    pools: list[Tensor] = []
    options: dict[str, Any] = {"keep_draws": True, "clean": False}
    for fn in (None, FLIP, ruined, SHIFT):
        predictive = Predictive(model, posterior, 1 if fn is None else 3, augment=fn, **options)
        rows = [predictive(b, generator=seeded(3 + 7919 * i)).log_probs.exp() for i, (b, _) in enumerate(held_out)]
        pools.append(torch.cat(rows, 1).double())
    wanted = slow(pools[1:], pools[0][0] if clean else None, labels, 5 if clean else 6)
    assert [(FLIP, ruined, SHIFT).index(one) for one in turns.augmentations] == wanted


def test_what_ruins_the_input_is_left_out_and_what_is_chosen_can_be_calibrated_and_predicted_with() -> None:
    model = settled(convnet(), 2, 8, 8)
    posterior = stochbn.fit(model, [normal(96, 2, 8, 8, seed=7)], 8)
    x = normal(200, 2, 8, 8, seed=5)
    labels = Predictive(model)(x).probs.argmax(1)  # of which the network is right
    held_out = {"image": x, "labels": labels}
    turns = choose_augmentation(
        model, None, [held_out], [ruined, SHIFT], draws=1, clean=False, inputs=lambda batch: batch["image"]
    )
    assert turns.augmentations == (SHIFT,)
    calibrated = stochbn.calibrate(model, posterior, [(x, labels)], augment=turns, temperature=True)
    assert Predictive(model, calibrated, 8, augment=turns)(x).probs.shape == (200, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": []}, "there are no candidates"),
        ({"candidates": [FLIP] * 5, "passes": 5}, "5 passes are too few for 5 candidates and the clean input"),
        ({"candidates": [FLIP] * 6, "passes": 5, "clean": False}, "5 passes are too few for 6 candidates;"),
        ({"held_out": []}, "there are no held-out examples"),
        ({"draws": 0}, "draws"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(arguments: dict[str, Any], message: str) -> None:
    model = settled(convnet(), 2, 8, 8)
    given: dict[str, Any] = {"held_out": [(normal(20, 2, 8, 8), torch.zeros(20).long())], "candidates": [FLIP]}
    with pytest.raises(ValueError, match=message):
        choose_augmentation(model, None, **{**given, **arguments})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.arange(20) % 3, r"expected labels \[40\] for .* got \[20\]"),
        (torch.arange(40)[:, None] % 3, r"expected labels \[40\] for .* got \[40, 1\]"),
        (torch.arange(40) % 4, "labels must lie between 0 and 2 for 3 classes"),
    ],
)
def test_labels_that_do_not_fit_the_output_are_refused(labels: Tensor, message: str) -> None:
    model = settled(convnet(), 2, 8, 8)
    with pytest.raises(ValueError, match=message):
        choose_augmentation(model, None, [(normal(40, 2, 8, 8), labels)], [FLIP, SHIFT])


def test_the_classes_of_a_dense_output_may_be_on_another_axis() -> None:
    model = settled(dense_net(), 2, 3, 3)
    x, labels = normal(40, 2, 3, 3), torch.randint(3, (40, 3, 3), generator=seeded(2))
    candidates = [noisy(3.0), FLIP, noisy(0.1)]
    wanted = choose_augmentation(model, None, [(x, labels)], candidates, class_axis=1)
    last = Wrapped(model, lambda out: out.movedim(1, -1))
    found = choose_augmentation(last, None, [(x, labels)], candidates, class_axis=-1)
    assert found.augmentations == wanted.augmentations
