"""Conformal risk control: the share of true labels, or of a mask's places, that is missed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import normal, seeded
from stochbn import conformal


def labelled(count: int, labels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Probabilities of labels, and which are true; examples differ in how many these are."""
    logits = normal(count, labels, seed=seed) + 1.5 * normal(count, 1, seed=seed + 1)
    truth = torch.rand(count, labels, generator=seeded(seed)) < logits.sigmoid()
    return (1.7 * logits).sigmoid(), truth.long()


def pictures(count: int, seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Probabilities of two classes of places, of which those of a picture go together, and the classes."""
    easy = normal(count, 1, 1, seed=seed).exp()
    truth = (normal(count, size, size, seed=seed + 1) + normal(count, 1, 1, seed=seed + 2) > 1).long()
    logits = (2 * truth - 1) * easy + 0.8 * normal(count, size, size, seed=seed + 3)
    return torch.stack([-logits, logits], 1).softmax(1), truth


def missed(sets: Tensor, truth: Tensor) -> float:
    """The mean share of what is true of each example that is not in its set, counted one by one."""
    shares = []
    for one, true in zip(sets, truth, strict=True):
        wanted = [bool(held) for held, is_true in zip(one.flatten(), true.flatten(), strict=True) if is_true]
        if wanted:
            shares.append(1 - sum(wanted) / len(wanted))
    return sum(shares) / len(shares)


@given(n=st.integers(6, 30), labels=st.integers(1, 5), seed=st.integers(0, 99), coverage=st.sampled_from([0.4, 0.8]))
def test_the_threshold_is_the_highest_that_keeps_the_risk(n: int, labels: int, seed: int, coverage: float) -> None:
    probs, truth = labelled(n, labels, seed)
    count = int(truth.any(1).sum())
    if (count + 1) * coverage > count:
        with pytest.raises(ValueError, match="needs at least"):
            conformal.crc(probs, truth, coverage)
        return
    found = conformal.crc(probs, truth, coverage)
    allowed = ((count + 1) * (1 - coverage) - 1) / count
    candidates = [p for p in probs[truth > 0].tolist() if missed(probs >= p, truth) <= allowed + 1e-9]
    assert isinstance(found.threshold, float)
    assert max(candidates) * (1 - 2**-11) <= found.threshold <= max(candidates)
    assert missed(found(probs), truth) <= allowed + 1e-9


@pytest.mark.parametrize("kind", ["labels", "mask", "all classes", "labels of places"])
def test_new_examples_miss_no_more_than_asked_for(kind: str) -> None:
    """The mean over many splits lies within two errors of the risk, and not far below: sets are no larger."""
    n, coverage, repetitions, found = 30, 0.8, 100, []
    for seed in range(repetitions):
        if kind == "labels":
            probs, truth = labelled(2 * n, 6, seed=7 * seed)
            shown: Any = truth
        elif kind == "labels of places":
            probs, truth = labelled(2 * n * 9, 3, seed=7 * seed)
            probs, truth = (x.view(2 * n, 9, 3).movedim(2, 1) for x in (probs, truth))
            shown = truth
        else:
            probs, truth = pictures(2 * n, seed=7 * seed)
            shown = truth if kind == "mask" else torch.nn.functional.one_hot(truth, 2).movedim(-1, 1)
        mask = 1 if kind == "mask" else None
        sets = conformal.crc(probs[:n], truth[:n], coverage, mask=mask)
        found.append(missed(sets(probs[n:]), shown[n:]))
    risk, error = sum(found) / repetitions, torch.tensor(found).std().item() / math.sqrt(repetitions)
    assert risk < 1 - coverage + 2 * error
    assert risk > 1 - coverage - 1 / n - 2 * error


def test_for_one_class_an_example_the_sets_are_the_least_ambiguous_ones() -> None:
    probs = (2 * normal(200, 4, seed=3)).softmax(1)
    labels = torch.multinomial(probs, 1, generator=seeded())[:, 0]
    one, other = conformal.lac(probs, labels, 0.85), conformal.crc(probs, labels, 0.85)
    assert isinstance(one.threshold, float)
    assert isinstance(other.threshold, float)
    assert 1 - one.threshold == pytest.approx(other.threshold, rel=5e-4)


def test_the_threshold_is_that_of_mapie_on_its_grid() -> None:
    risk_control = pytest.importorskip("mapie.risk_control")
    probs, truth = labelled(80, 4, 3)
    truth[truth.sum(1) == 0, 0] = 1
    grid = np.arange(0, 1, 0.001)

    def predicted(x: Any) -> Any:
        return [np.stack([1 - x[:, k], x[:, k]], 1) for k in range(4)]

    theirs = risk_control.MultiLabelClassificationController(
        predicted, risk="recall", method="crc", target_level=0.8, predict_params=grid
    )
    theirs.calibrate(probs.numpy(), truth.numpy())
    own = conformal.crc(probs, truth, 0.8)
    assert isinstance(own.threshold, float)
    assert theirs.best_predict_param[0] <= own.threshold < theirs.best_predict_param[0] + 0.001 + 1e-9


def test_memory_does_not_grow_and_parts_give_the_same() -> None:
    probs, truth = pictures(20, 1)
    tally = conformal.Tally(2, mask=1)
    for part in torch.split(torch.arange(20), 6):
        tally.add(probs[part], truth[part])
    assert tally.sets(0.8) == conformal.crc(probs, truth, 0.8, mask=1)
    assert tally.examples + tally.empty == 20


def test_what_is_ignored_does_not_count() -> None:
    probs, truth = pictures(20, 4)
    hidden = truth.clone()
    hidden[:, :4] = 255
    found = conformal.crc(probs, hidden, 0.7, ignore_index=255)
    assert found == conformal.crc(probs[:, :, 4:], truth[:, 4:], 0.7)
    with pytest.raises(ValueError, match=r"between 0 and 1, found 0 to 255; leave others out with ignore_index"):
        conformal.crc(probs, hidden, 0.7)


def test_by_group_each_group_has_the_threshold_of_its_examples() -> None:
    probs, truth = labelled(120, 4, 5)
    groups = ["a", "b", "b"] * 40
    found = conformal.crc(probs, truth, 0.8, groups=groups)
    assert found.groups == ("a", "b")
    alone = conformal.crc(probs[0::3], truth[0::3], 0.8)
    sets = found(probs[:3], ["a", "a", "elsewhere"])
    assert torch.equal(sets[:2], alone(probs[:2]))
    assert sets[2].all()
    few = torch.arange(120) < 9
    with pytest.raises(ValueError, match="of the group 'a', got"):
        conformal.crc(probs[few], truth[few], 0.9, groups=groups[:9])


PROBS, TRUTH = labelled(20, 3, 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: conformal.crc(PROBS.logit(), TRUTH), ValueError, "pass probabilities, not logits"),
        (lambda: conformal.crc(PROBS * math.nan, TRUTH), ValueError, "found NaN"),
        (lambda: conformal.crc(PROBS[:, 0], TRUTH), ValueError, r"\[N, K, ...\]"),
        (lambda: conformal.crc(PROBS, TRUTH[:9]), ValueError, r"expected labels \[20\], or 0 and 1 \[20, 3\], got"),
        (lambda: conformal.crc(PROBS, TRUTH + 0.5), TypeError, "whole numbers as labels"),
        (lambda: conformal.crc(PROBS, 2 * TRUTH), ValueError, "labels must lie between 0 and 1"),
        (lambda: conformal.crc(PROBS, TRUTH, 1.0), ValueError, "coverage must lie between 0 and 1"),
        (lambda: conformal.crc(PROBS, TRUTH * 0), ValueError, "held-out examples in which anything is true, got 0"),
        (lambda: conformal.crc(PROBS, TRUTH, mask=3), ValueError, "one of the classes 0 to 2, got 3"),
        (lambda: conformal.crc(PROBS, TRUTH, 0.7)(PROBS[:, :2]), ValueError, "of 3 labels"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
