from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from conftest import normal, seeded
from stochbn import metrics


def slow_evaluate(probs: list[list[float]], labels: list[int], smallest: float = 0.0) -> dict[str, float]:
    """Loops over objects and classes, as the definitions read."""
    n = len(probs)
    wrong, nll, brier = 0, 0.0, 0.0
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for row, label in zip(probs, labels, strict=True):
        confidence = max(row)
        right = row.index(confidence) == label
        wrong += not right
        nll -= math.log(max(row[label], smallest))
        brier += sum((p - (k == label)) ** 2 for k, p in enumerate(row))
        bins[min(int(confidence * 15), 14)].append((confidence, right))
    ece = 0.0
    for members in bins:
        if members:
            confidence = sum(c for c, _ in members) / len(members)
            accuracy = sum(r for _, r in members) / len(members)
            ece += len(members) / n * abs(confidence - accuracy)
    return {"error": 100 * wrong / n, "nll": nll / n, "brier": brier / n, "ece": ece}


def unambiguous(probs: Tensor, gap: float = 1e-4) -> bool:
    """No tie for the most probable class, and no confidence at the edge of two bins."""
    top = probs.double().topk(2, dim=1).values
    position = top[:, 0] * 15
    at_edge = ((position - position.round()).abs() < gap * 15) & (position.round() < 15)
    return not bool(at_edge.any()) and bool((top[:, 0] - top[:, 1] > gap).all())


@given(
    n=st.integers(1, 40),
    k=st.integers(2, 6),
    scale=st.floats(0.1, 60),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_evaluate_is_what_slow_loops_find(n: int, k: int, scale: float, seed: int, dtype: torch.dtype) -> None:
    probs = (scale * normal(n, k, seed=seed, dtype=torch.float64)).softmax(1).to(dtype)
    assume(unambiguous(probs))
    labels = torch.randint(k, (n,), generator=seeded(seed))
    wanted = slow_evaluate(probs.tolist(), labels.tolist(), torch.finfo(dtype).tiny)
    found = metrics.evaluate(probs, labels)
    assert list(found) == ["error", "nll", "brier", "ece"]
    assert all(type(value) is float for value in found.values())
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_saturated_probabilities_fall_into_the_last_of_15_bins() -> None:
    """A confidence of exactly 1 shares its bin with those above 14/15: |(1 + 0.95)/2 - 1/2| and no more."""
    probs, labels = torch.tensor([[1.0, 0.0], [0.95, 0.05]]), torch.tensor([1, 0])
    wanted = slow_evaluate(probs.tolist(), labels.tolist(), torch.finfo(torch.float32).tiny)
    assert wanted["ece"] == pytest.approx(0.475)
    assert metrics.evaluate(probs, labels)["ece"] == pytest.approx(0.475, abs=1e-5)


@pytest.mark.parametrize("saturated", [0.1, 0.5, 0.9])
def test_a_mixture_of_saturated_and_unsure_predictions_is_binned_right(saturated: float) -> None:
    source = seeded(2)
    confidence = 0.5 + 0.4999 * torch.rand(300, generator=source)
    confidence[torch.rand(300, generator=source) < saturated] = 1.0
    probs = torch.stack([confidence, 1 - confidence], 1)
    assert unambiguous(probs, 1e-7)
    labels = (torch.rand(300, generator=source) < 0.3).long()
    wanted = slow_evaluate(probs.tolist(), labels.tolist(), torch.finfo(torch.float32).tiny)
    assert metrics.evaluate(probs, labels) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_half_precision_probabilities_are_counted_right(dtype: torch.dtype) -> None:
    confidence = (0.51 + 0.45 * torch.rand(6000, generator=seeded(1))).to(dtype)
    probs = torch.stack([confidence, 1 - confidence], 1)
    position = confidence.double() * 15
    keep = (position - position.round()).abs() > 0.01
    probs, labels = probs[keep], (torch.rand(6000, generator=seeded(2)) < 0.3).long()[keep]
    assert len(probs) > 4000
    wanted = slow_evaluate(probs.tolist(), labels.tolist(), torch.finfo(dtype).tiny)
    assert metrics.evaluate(probs, labels) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_known_values() -> None:
    probs = [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]
    found = metrics.evaluate(probs, [0, 2])
    assert found["error"] == 50
    assert found["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.3)) / 2)
    assert found["brier"] == pytest.approx((0.09 + 0.04 + 0.01 + 0.01 + 0.36 + 0.49) / 2)
    assert found["ece"] == pytest.approx((0.3 + 0.6) / 2)


def test_perfect_predictions_have_no_error_at_all() -> None:
    found = metrics.evaluate(torch.eye(4), torch.arange(4))
    assert found == pytest.approx({"error": 0, "nll": 0, "brier": 0, "ece": 0}, abs=1e-6)


def test_a_probability_of_0_for_the_label_gives_a_finite_nll() -> None:
    for dtype in (torch.float32, torch.float64):
        found = metrics.evaluate(torch.eye(2, dtype=dtype), [1, 0])
        assert found["nll"] == pytest.approx(-math.log(torch.finfo(dtype).tiny))
        assert (found["error"], found["brier"]) == (100, 2)
        assert found["ece"] == pytest.approx(1, abs=1e-6)


def test_dense_predictions_are_evaluated_pixel_by_pixel() -> None:
    probs = (3 * normal(2, 3, 4, 5)).softmax(1)
    labels = torch.randint(3, (2, 4, 5), generator=seeded())
    rows = [probs[n, :, i, j].tolist() for n in range(2) for i in range(4) for j in range(5)]
    flat = [int(labels[n, i, j]) for n in range(2) for i in range(4) for j in range(5)]
    assert metrics.evaluate(probs, labels) == pytest.approx(slow_evaluate(rows, flat), rel=1e-5, abs=1e-6)
    assert metrics.evaluate(probs[..., 0], labels[..., 0]) == pytest.approx(
        slow_evaluate([r for m, r in enumerate(rows) if m % 5 == 0], [r for m, r in enumerate(flat) if m % 5 == 0]),
        rel=1e-5,
        abs=1e-6,
    )


@pytest.mark.parametrize("label_type", [np.int64, np.int32, np.uint8, np.int16])
@pytest.mark.parametrize("probs_type", [np.float64, np.float32])
def test_numpy_arrays_and_lists_are_taken(probs_type: Any, label_type: Any) -> None:
    probs = (2 * normal(12, 4)).softmax(1)
    labels = torch.randint(4, (12,), generator=seeded())
    wanted = metrics.evaluate(probs, labels)
    found = metrics.evaluate(probs.numpy().astype(probs_type), labels.numpy().astype(label_type))
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert metrics.evaluate(probs.tolist(), labels.tolist()) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_a_probability_that_rounds_to_just_above_1_is_not_taken_for_a_logit() -> None:
    above = float(np.nextafter(np.float32(1), np.float32(2)))
    probs = torch.tensor([[above, 0.0], [0.2, 0.8], [0.9, 0.1]])
    assert probs.max() > 1
    found = metrics.evaluate(probs, [0, 0, 0])
    assert found == pytest.approx(metrics.evaluate(probs.clamp(max=1), [0, 0, 0]), abs=1e-6)
    assert found["ece"] == pytest.approx((0 + 0.8 + 0.1) / 3, abs=0.04)


def test_evaluating_leaves_its_arguments_alone() -> None:
    probs, labels = torch.tensor([[1.0000001, 0.0], [0.3, 0.7]]), torch.tensor([0, 1])
    before = probs.clone(), labels.clone()
    metrics.evaluate(probs, labels)
    assert torch.equal(probs, before[0])
    assert torch.equal(labels, before[1])


GOOD = torch.tensor([[0.2, 0.8], [0.5, 0.5]])


@pytest.mark.parametrize(
    ("probs", "labels", "error", "message"),
    [
        (GOOD, [0.0, 1.0], TypeError, "whole-number labels, got torch.float32"),
        (GOOD, np.array([0.0, 1.0]), TypeError, "whole-number labels, got torch.float64"),
        (GOOD, [True, False], TypeError, "whole-number labels, got torch.bool"),
        (GOOD, [0, 2], ValueError, "between 0 and 1 for 2 classes, found 0 to 2"),
        (GOOD, [-1, 0], ValueError, "between 0 and 1 for 2 classes, found -1 to 0"),
        (GOOD, [-100, 0], ValueError, "found -100 to 0"),
        (GOOD, [0], ValueError, r"labels of shape \[2\].*got \[1\]"),
        (GOOD, [[0, 1]], ValueError, r"labels of shape \[2\].*got \[1, 2\]"),
        (GOOD.T.reshape(1, 2, 2), [0, 1], ValueError, r"labels of shape \[1, 2\]"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), ValueError, "nothing to evaluate"),
        (torch.tensor([[0.5, 0.6]]), [0], ValueError, r"must sum to 1.*found a sum of 1\.1"),
        (torch.tensor([[0.5, 0.5], [0.5, 0.49]]), [0, 0], ValueError, r"found a sum of 0\.99"),
        (torch.tensor([[2.0, 0.3]]), [0], ValueError, "not logits or log-probabilities"),
        (torch.tensor([[-0.1, 1.1]]), [0], ValueError, "must not be negative, found -0.1"),
        (torch.tensor([[0.5, 0.5]]).log(), [0], ValueError, "must not be negative"),
        (torch.tensor([[math.nan, 1.0]]), [1], ValueError, "NaN or infinity"),
        (torch.tensor([[math.inf, 0.0]]), [1], ValueError, "NaN or infinity"),
        (torch.tensor([0.2, 0.8]), [0, 1], ValueError, r"\[N, K, \.\.\.\] with at least 2 classes"),
        (torch.tensor([[1.0], [1.0]]), [0, 0], ValueError, "at least 2 classes"),
        (torch.tensor([[1, 0]]), [0], ValueError, "floating-point probabilities.*int64"),
    ],
)
def test_unusable_probabilities_and_labels_are_refused(
    probs: Any, labels: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        metrics.evaluate(probs, labels)


# Out-of-distribution detection


def slow_fpr95(known: list[float], unknown: list[float]) -> float:
    best = 1.0
    for threshold in {*known, *unknown}:
        if 20 * sum(score >= threshold for score in unknown) >= 19 * len(unknown):
            best = min(best, sum(score >= threshold for score in known) / len(known))
    return best


def slow_auroc(known: list[float], unknown: list[float]) -> float:
    pairs = [(u > k) + (u == k) / 2 for u in unknown for k in known]
    return sum(pairs) / len(pairs)


def wanted_ood(known: list[float], unknown: list[float]) -> dict[str, float]:
    target, score = [0] * len(known) + [1] * len(unknown), [*known, *unknown]
    assert roc_auc_score(target, score) == pytest.approx(slow_auroc(known, unknown))
    return {
        "auroc": roc_auc_score(target, score),
        "aupr": average_precision_score(target, score),
        "fpr95": slow_fpr95(known, unknown),
    }


scores = st.lists(st.floats(-5, 5), min_size=1, max_size=30) | st.lists(
    st.integers(-2, 3).map(float), min_size=1, max_size=60
)


@given(known=scores, unknown=scores)
def test_ood_agrees_with_sklearn_and_a_slow_loop(known: list[float], unknown: list[float]) -> None:
    found = metrics.ood(torch.tensor(known, dtype=torch.float64), torch.tensor(unknown, dtype=torch.float64))
    assert list(found) == ["auroc", "aupr", "fpr95"]
    assert all(type(value) is float for value in found.values())
    assert found == pytest.approx(wanted_ood(known, unknown), rel=1e-5, abs=1e-6)


@given(
    n=st.integers(1, 60),
    m=st.integers(1, 60),
    shift=st.floats(-3, 3),
    digits=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_ood_agrees_for_overlapping_samples(n: int, m: int, shift: float, digits: int, seed: int) -> None:
    known = normal(n, seed=seed, dtype=torch.float64).round(decimals=digits)
    unknown = (normal(m, seed=seed + 1, dtype=torch.float64) + shift).round(decimals=digits)
    assert metrics.ood(known, unknown) == pytest.approx(
        wanted_ood(known.tolist(), unknown.tolist()), rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize("m", [20, 40, 60, 100, 200])
def test_exactly_95_percent_of_the_unknown_is_enough(m: int) -> None:
    unknown = [1.0] * (m // 20) + [2.0] * (m - m // 20)
    found = metrics.ood([0.0, 1.5, 1.7, 3.0], unknown)
    assert found["fpr95"] == pytest.approx(0.25, abs=1e-6)
    one_less = [1.0] * (m // 20 + 1) + [2.0] * (m - m // 20 - 1)
    assert metrics.ood([0.0, 1.5, 1.7, 3.0], one_less)["fpr95"] == pytest.approx(0.75, abs=1e-6)


@pytest.mark.parametrize(
    ("known", "unknown", "wanted"),
    [
        ([0.0, 1.0], [2.0, 3.0], (1.0, 1.0, 0.0)),
        ([2.0, 3.0], [0.0, 1.0], (0.0, (1 / 3 + 2 / 4) / 2, 1.0)),
        ([1.0, 1.0, 1.0], [1.0], (0.5, 0.25, 1.0)),
        ([5.0], [5.0, 7.0], (0.75, 0.5 * 1 + 0.5 * 2 / 3, 1.0)),
    ],
)
def test_ood_of_known_cases(known: list[float], unknown: list[float], wanted: tuple[float, ...]) -> None:
    assert tuple(metrics.ood(known, unknown).values()) == pytest.approx(wanted, abs=1e-6)


def test_scores_that_differ_only_in_float64_are_told_apart() -> None:
    known, unknown = 1e6 + np.arange(5) * 1e-9, 1e6 + np.arange(5, 10) * 1e-9
    assert len({*known, *unknown}) == 10
    assert metrics.ood(known, unknown) == {"auroc": 1, "aupr": 1, "fpr95": 0}


def test_ood_takes_integers_numpy_and_lists_and_only_their_order_matters() -> None:
    known, unknown = [3, 1, 2], [2, 5, 4]
    wanted = metrics.ood(known, unknown)
    assert metrics.ood(np.array(known), torch.tensor(unknown)) == wanted
    assert metrics.ood(np.exp(np.array(known)), np.exp(np.array(unknown))) == wanted


@pytest.mark.parametrize(
    ("known", "unknown", "message"),
    [
        ([], [1.0], "entropy_known must be a vector of at least one number"),
        ([1.0], [], "entropy_unknown must be a vector of at least one number"),
        ([[1.0, 2.0]], [1.0], r"entropy_known must be a vector.*got shape \[1, 2\]"),
        (1.0, [1.0], r"entropy_known must be a vector.*got shape \[\]"),
        ([1.0], [math.nan], "entropy_unknown contains NaN or infinity"),
        ([math.inf], [1.0], "entropy_known contains NaN or infinity"),
    ],
)
def test_unusable_scores_are_refused(known: Any, unknown: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.ood(known, unknown)


# The empirical distribution function


@given(values=st.lists(st.integers(0, 5).map(lambda i: i / 4) | st.floats(0, 3), min_size=1, max_size=40))
def test_the_distribution_function_is_the_share_at_or_below(values: list[float]) -> None:
    points, fractions = metrics.entropy_cdf(torch.tensor(values, dtype=torch.float64))
    assert points.dtype == fractions.dtype == torch.float64
    assert points.tolist() == sorted(set(values))
    wanted = [sum(v <= point for v in values) / len(values) for point in sorted(set(values))]
    assert fractions.tolist() == pytest.approx(wanted, rel=1e-12)
    assert fractions[-1] == 1


def test_the_distribution_function_takes_numpy_and_float32() -> None:
    for values in (np.array([0.5, 0.25, 0.5], dtype=np.float32), [0.5, 0.25, 0.5], torch.tensor([0.5, 0.25, 0.5])):
        points, fractions = metrics.entropy_cdf(values)
        assert points.tolist() == [0.25, 0.5]
        assert fractions.tolist() == pytest.approx([1 / 3, 1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "at least one number"),
        ([[0.1]], r"got shape \[1, 1\]"),
        ([0.1, math.nan], "entropy contains NaN"),
        ([math.inf], "infinity"),
    ],
)
def test_unusable_entropies_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.entropy_cdf(values)


def test_without_torchmetrics_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match=r"pip install 'stochbn\[metrics\]'"):
        metrics.evaluate(GOOD, [0, 1])
    with pytest.raises(ImportError, match=r"pip install 'stochbn\[metrics\]'"):
        metrics.ood([0.0], [1.0])
    assert metrics.entropy_cdf([1.0])[1].tolist() == [1.0]
