from __future__ import annotations

import itertools
import math
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from conftest import normal, seeded
from stochbn import metrics


def slow_evaluate(probs: list[list[float]], labels: list[int], smallest: float = 0.0) -> dict[str, float]:
    """Loops over examples and classes, as the definitions read."""
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


GOOD = torch.tensor([[0.2, 0.8], [0.5, 0.5]])
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_confidence_of_exactly_1_is_in_the_last_bin_in_every_type(dtype: torch.dtype) -> None:
    """Half of the examples are sure and wrong, half nearly sure and right: one bin, where the errors cancel in part."""
    probs = torch.tensor([[1.0, 0.0, 0.0]] * 30 + [[0.0625, 0.9375, 0.0]] * 10, dtype=dtype)
    labels = [2] * 30 + [1] * 10
    assert metrics.evaluate(probs, labels)["ece"] == pytest.approx((30 + 9.375) / 40 - 10 / 40, abs=1e-12)


@given(
    confidences=st.lists(st.sampled_from([129, 140, 200, 238, 239, 250, 255, 256]), min_size=1, max_size=20),
    seed=st.integers(0, 10**6),
)
def test_numbers_that_every_type_holds_have_the_same_scores_in_all(confidences: list[int], seed: int) -> None:
    top = torch.tensor(confidences).double() / 256
    probs = torch.stack([top, 1 - top], 1)
    labels = torch.randint(2, (len(top),), generator=seeded(seed))
    wanted = slow_evaluate(probs.tolist(), labels.tolist(), 1e-4)
    for dtype in FLOATS:
        found = metrics.evaluate(probs.to(dtype), labels)
        if not (probs.gather(1, labels[:, None]) == 0).any():  # which counts as something else in each
            assert found["nll"] == pytest.approx(wanted["nll"], rel=1e-12, abs=1e-12)
        for key in ("error", "brier", "ece"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1_000_000,), (2, 500, 600)])
def test_scores_of_many_objects_have_the_digits_of_those_of_few(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    few = torch.tensor([[0.875, 0.0625, 0.0625], [0.25, 0.5, 0.25], [0.125, 0.125, 0.75], [0.875, 0.125, 0.0]])
    labels = torch.tensor([0, 2, 2, 1])
    wanted = slow_evaluate(few.tolist(), labels.tolist())
    index = torch.arange(math.prod(shape)).remainder(4).view(shape)
    found = metrics.evaluate(few.to(dtype)[index].movedim(-1, 1), labels[index])
    assert found == pytest.approx(wanted, rel=1e-9)
    tempered = metrics.calibrated_nll(few.to(dtype)[:, :], labels, (few, labels))
    many = index.flatten()[:200_000]
    assert metrics.calibrated_nll(few.to(dtype)[many], labels[many], (few, labels)) == pytest.approx(tempered, rel=1e-9)


def test_evaluating_many_classes_in_parts_leaves_no_object_out(monkeypatch: pytest.MonkeyPatch) -> None:
    probs = (3 * normal(50, 7)).softmax(1)
    labels = torch.randint(7, (50,), generator=seeded())
    whole = metrics.evaluate(probs, labels), metrics.calibrated_nll(probs, labels)
    for block in (1, 7, 20, 7 * 49, 7 * 50):
        monkeypatch.setattr("stochbn.tempering.BLOCK", block)
        found = metrics.evaluate(probs, labels), metrics.calibrated_nll(probs, labels)
        assert found[0] == pytest.approx(whole[0], rel=1e-12)
        assert found[1] == pytest.approx(whole[1], rel=1e-12)


def test_python_numbers_keep_the_digits_that_float32_does_not_hold() -> None:
    near, nearer = 1e3, 1e3 + 1e-9
    assert metrics.ood([near] * 3, [nearer] * 2)["auroc"] == 1
    assert metrics.entropy_cdf([near, nearer])[0].tolist() == [near, nearer]
    assert metrics.risk_coverage([nearer, near], [0.0, 1.0])["risk"].tolist() == [1.0, 0.5]
    assert metrics.evaluate([[0.3, 0.7]], [0])["nll"] == pytest.approx(-math.log(0.3), rel=1e-15)
    assert metrics.deep_ensemble_equivalent(nearer, [nearer, near]) == 1


def test_half_precision_scores_and_losses_of_many_objects_are_not_added_up_in_half_precision() -> None:
    wrong = (torch.arange(300_000) % 3 == 0).half()
    found = metrics.risk_coverage(torch.zeros(300_000, dtype=torch.bfloat16), wrong)
    assert found["aurc"] == pytest.approx(1 / 3, rel=1e-12)
    points, fractions = metrics.entropy_cdf(wrong.bfloat16())
    assert points.tolist() == [0, 1]
    assert fractions.tolist() == pytest.approx([2 / 3, 1], rel=1e-12)
    assert metrics.ood(wrong, 1 - wrong)["auroc"] == pytest.approx(2 / 3, abs=1e-6)


NOT_NUMBERS: list[Any] = [None, "0.5", {}, {"a": 1}, [None], ["0.5", "0.5"], object(), len, np.array(["a", "b"]), 1j]


@pytest.mark.parametrize("given_", NOT_NUMBERS, ids=lambda given: repr(given).partition(" at 0x")[0])
@pytest.mark.parametrize(
    "call",
    [
        lambda value: metrics.evaluate(value, [0, 1]),
        lambda value: metrics.evaluate(GOOD, value),
        lambda value: metrics.ood(value, [1.0]),
        lambda value: metrics.ood([1.0], value),
        lambda value: metrics.calibrated_nll(value, [0, 1], (GOOD, [0, 1])),
        lambda value: metrics.calibrated_nll(GOOD, [0, 1], (GOOD, value)),
        lambda value: metrics.calibrated_nll(GOOD, [0, 1], [value]),  # type: ignore[arg-type]
        lambda value: metrics.deep_ensemble_equivalent(value, [1.0]),
        lambda value: metrics.deep_ensemble_equivalent(1.0, value),
        lambda value: metrics.risk_coverage(value, [1.0]),
        lambda value: metrics.risk_coverage([1.0], value),
        lambda value: metrics.entropy_cdf(value),
    ],
)
def test_what_is_no_number_is_refused_by_the_name_of_the_argument(call: Any, given_: Any) -> None:
    names = "probabilities|labels|entropy|nll|ensembles|uncertainty|losses|held_out"
    with pytest.raises((TypeError, ValueError), match=f"^expected ({names})"):
        call(given_)


@pytest.mark.parametrize("huge", [10**400, -(10**30), 2**64])
def test_whole_numbers_without_bounds_are_refused_as_values(huge: int) -> None:
    calls: list[Any] = [
        lambda: metrics.evaluate([[0.5, 0.5]], [huge]),
        lambda: metrics.evaluate([[0.5, huge]], [0]),
        lambda: metrics.ood([1], [huge]),
        lambda: metrics.deep_ensemble_equivalent(huge, [1.0]),
        lambda: metrics.risk_coverage([huge], [1]),
    ]
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        assert 20 < len(str(caught.value)) < 300


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.eye(2, device="meta")], ids=["sparse", "meta"])
def test_tensors_without_numbers_in_a_grid_are_refused(tensor: Tensor) -> None:
    for call in (lambda: metrics.evaluate(tensor, [0, 1]), lambda: metrics.entropy_cdf(tensor)):
        with pytest.raises(TypeError, match="as a dense tensor of real numbers"):
            call()


def test_tensors_with_gradients_are_evaluated_without_them() -> None:
    logits = normal(12, 3).requires_grad_()
    labels = torch.arange(12) % 3
    assert metrics.evaluate(logits.softmax(1), labels)["error"] >= 0
    assert metrics.calibrated_nll(logits.softmax(1), labels)["nll"] > 0
    assert not metrics.risk_coverage(logits[:, 0], logits[:, 1])["risk"].requires_grad


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


# The calibrated negative log-likelihood


def slow_tempered_nll(probs: Any, labels: Any, temperature: float) -> float:
    """Powers of the probabilities themselves, normalised again."""
    total = 0.0
    for row, label in zip(np.asarray(probs, dtype=np.float64), np.asarray(labels), strict=True):
        powers = (row / row.max()) ** (1 / temperature)
        total -= math.log(powers[label] / powers.sum())
    return total / len(labels)


def slow_temperature(probs: Any, labels: Any, low: float = 0.05, high: float = 20.0) -> float:
    """Not to be trusted near either end, where right or wrong answers alone leave the likelihood flat."""
    found = minimize_scalar(
        lambda log: slow_tempered_nll(probs, labels, math.exp(log)),
        bounds=(math.log(low), math.log(high)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return math.exp(found.x)


def overconfident(n: int, k: int, factor: float, seed: int) -> tuple[Tensor, Tensor]:
    """Probabilities whose logits are `factor` times those of the distribution that the labels are drawn from."""
    logits = 1.5 * normal(n, k, seed=seed, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=seeded(seed + 10**7)).squeeze(1)
    return (factor * logits).softmax(1), labels


@given(
    n=st.integers(1, 40),
    m=st.integers(60, 90),
    k=st.integers(2, 6),
    factor=st.floats(0.2, 8),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=25)
def test_the_temperature_is_the_best_for_the_held_out_objects(n: int, m: int, k: int, factor: float, seed: int) -> None:
    probs, labels = overconfident(n, k, factor, seed)
    held_out = overconfident(m, k, factor, seed + 1)
    wanted = slow_temperature(*held_out)
    assume(0.06 < wanted < 18)
    found = metrics.calibrated_nll(probs, labels, held_out)
    assert list(found) == ["nll", "temperature"]
    assert all(type(value) is float for value in found.values())
    assert found["temperature"] == pytest.approx(wanted, rel=5e-4)
    assert found["nll"] == pytest.approx(slow_tempered_nll(probs, labels, found["temperature"]), rel=1e-9)
    best = slow_tempered_nll(*held_out, found["temperature"])
    assert all(best <= slow_tempered_nll(*held_out, t) + 1e-7 for t in np.geomspace(0.05, 20, 40))


def test_with_many_objects_the_temperature_undoes_the_overconfidence() -> None:
    for factor in (0.5, 1.0, 4.0):
        probs, labels = overconfident(20_000, 5, factor, 3)
        for held_out in (None, overconfident(20_000, 5, factor, 4)):
            found = metrics.calibrated_nll(probs, labels, held_out)
            assert found["temperature"] == pytest.approx(factor, rel=0.03)
            honest = overconfident(20_000, 5, 1.0, 3)
            assert found["nll"] == pytest.approx(metrics.evaluate(*honest)["nll"], rel=1e-3)


def test_a_temperature_that_no_data_bound_stays_between_a_twentieth_and_twenty() -> None:
    probs = torch.tensor([[0.6, 0.4], [0.2, 0.8]], dtype=torch.float64)
    right = metrics.calibrated_nll(probs, [0, 1], (probs, [0, 1]))
    assert right["temperature"] == pytest.approx(0.05, rel=1e-3)
    assert right["nll"] == pytest.approx(slow_tempered_nll(probs, [0, 1], 0.05), rel=0.01)
    wrong = metrics.calibrated_nll(probs, [1, 0], (probs, [1, 0]))
    assert wrong["temperature"] == pytest.approx(20, rel=1e-3)
    assert wrong["nll"] == pytest.approx(slow_tempered_nll(probs, [1, 0], 20), rel=1e-4)


@given(n=st.integers(10, 50), k=st.integers(2, 5), factor=st.floats(0.5, 4), seed=st.integers(0, 10**6))
@settings(max_examples=20)
def test_without_held_out_objects_each_fifth_is_tempered_by_the_other_four(
    n: int, k: int, factor: float, seed: int
) -> None:
    probs, labels = overconfident(n, k, factor, seed)
    total = 0.0
    parts = np.array_split(torch.randperm(n, generator=seeded(0)).numpy(), 5)
    assert [len(part) for part in parts] == [n // 5 + (i < n % 5) for i in range(5)]
    for part in parts:
        rest = np.setdiff1d(np.arange(n), part)
        temperature = slow_temperature(probs[rest], labels[rest])
        assume(0.1 < temperature < 15)
        total += len(part) * slow_tempered_nll(probs[part], labels[part], temperature)
    found = metrics.calibrated_nll(probs, labels)
    assert found["nll"] == pytest.approx(total / n, rel=1e-3)
    assert found["temperature"] == pytest.approx(slow_temperature(probs, labels), rel=5e-4)


@given(n=st.integers(10, 60), k=st.integers(2, 5), factor=st.floats(0.5, 4), seed=st.integers(0, 10**6))
@settings(max_examples=25)
def test_cross_validation_never_beats_the_best_temperature_in_hindsight(
    n: int, k: int, factor: float, seed: int
) -> None:
    """What the other parts choose is no better for a part than what all parts together choose."""
    probs, labels = overconfident(n, k, factor, seed)
    found = metrics.calibrated_nll(probs, labels)
    assert found["nll"] >= slow_tempered_nll(probs, labels, found["temperature"]) - 1e-6


def test_the_parts_do_not_depend_on_torchs_random_state_nor_change_it() -> None:
    probs, labels = overconfident(53, 3, 2.0, 0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = metrics.calibrated_nll(probs, labels)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert metrics.calibrated_nll(probs, labels) == first


@given(factor=st.floats(0.25, 4), held=st.booleans(), seed=st.integers(0, 10**6))
@settings(max_examples=20)
def test_scaled_logits_scale_the_temperature_and_leave_the_calibrated_nll(factor: float, held: bool, seed: int) -> None:
    plain, scaled = (
        metrics.calibrated_nll(
            *overconfident(80, 4, by, seed), held_out=overconfident(100, 4, by, seed + 1) if held else None
        )
        for by in (1.0, factor)
    )
    assume(0.25 < plain["temperature"] < 4)
    assert scaled["temperature"] == pytest.approx(factor * plain["temperature"], rel=5e-4)
    assert scaled["nll"] == pytest.approx(plain["nll"], rel=1e-4)


def test_the_test_labels_have_no_say_in_a_temperature_chosen_on_held_out_objects() -> None:
    (probs, labels), held_out = overconfident(50, 4, 3.0, 0), overconfident(50, 4, 3.0, 1)
    wanted = metrics.calibrated_nll(probs, labels, held_out)["temperature"]
    assert metrics.calibrated_nll(probs, probs.argmin(1), held_out)["temperature"] == wanted
    assert metrics.calibrated_nll(probs, probs.argmax(1), held_out)["temperature"] == wanted
    assert metrics.calibrated_nll(probs, labels, (probs, probs.argmin(1)))["temperature"] == pytest.approx(20, rel=1e-3)


def test_held_out_objects_may_be_few_and_so_may_those_tempered() -> None:
    probs, labels = overconfident(1, 3, 1.0, 0)
    found = metrics.calibrated_nll(probs, labels, overconfident(60, 3, 2.0, 1))
    assert found["nll"] == pytest.approx(slow_tempered_nll(probs, labels, found["temperature"]))


@pytest.mark.parametrize(("dtype", "n"), [(torch.float16, 5), (torch.float32, 100)])
def test_a_probability_of_0_is_tempered_as_the_smallest_normal_number(dtype: torch.dtype, n: int) -> None:
    """Wholly sure answers of which one in n is wrong: the best temperature makes them 1 - 1/n sure."""
    probs = torch.eye(2, dtype=dtype).repeat(n, 1)
    labels = torch.tensor([0, 1] * (n - 1) + [1, 0])
    temperature = -math.log(torch.finfo(dtype).tiny) / math.log(n - 1)
    assert temperature < 19.1
    found = metrics.calibrated_nll(probs, labels, (probs, labels))
    assert found["temperature"] == pytest.approx(temperature, rel=1e-3)
    assert found["nll"] == pytest.approx(-math.log(1 / n) / n - (1 - 1 / n) * math.log(1 - 1 / n), rel=1e-5)
    assert metrics.calibrated_nll(probs, labels)["temperature"] == found["temperature"]


def test_sure_and_wrong_predictions_have_a_finite_calibrated_nll() -> None:
    for dtype in (torch.float32, torch.float64):
        probs, labels = torch.eye(10, dtype=dtype), (torch.arange(10) + 1) % 10
        for held_out in (None, (probs, labels)):
            found = metrics.calibrated_nll(probs, labels, held_out)
            smallest = probs.clamp(min=torch.finfo(dtype).tiny)
            assert found["temperature"] == pytest.approx(20, rel=1e-3)
            assert found["nll"] == pytest.approx(slow_tempered_nll(smallest, labels, 20), rel=1e-3)


def test_probabilities_of_0_for_other_classes_do_no_harm() -> None:
    probs, labels = overconfident(80, 3, 2.0, 0)
    padded = torch.cat([probs, torch.zeros(80, 2, dtype=torch.float64)], 1)
    for held_out, with_zeros in ((None, None), ((probs, labels), (padded, labels))):
        wanted = metrics.calibrated_nll(probs, labels, held_out)
        assert metrics.calibrated_nll(padded, labels, with_zeros) == pytest.approx(wanted, rel=1e-9)


def test_dense_predictions_are_tempered_pixel_by_pixel() -> None:
    flat, labels = overconfident(2 * 4 * 5, 3, 2.0, 0)
    dense, dense_labels = flat.reshape(2, 4, 5, 3).permute(0, 3, 1, 2), labels.reshape(2, 4, 5)
    assert dense.shape == (2, 3, 4, 5)
    assert metrics.calibrated_nll(dense, dense_labels) == metrics.calibrated_nll(flat, labels)
    held_out, held_labels = overconfident(60, 3, 2.0, 1)
    wanted = metrics.calibrated_nll(flat, labels, (held_out, held_labels))
    dense_held_out = held_out.reshape(3, 4, 5, 3).permute(0, 3, 1, 2), held_labels.reshape(3, 4, 5)
    assert metrics.calibrated_nll(dense, dense_labels, dense_held_out) == wanted
    assert metrics.calibrated_nll(flat, labels, dense_held_out) == wanted


def test_calibrating_takes_numpy_and_lists_and_leaves_its_arguments_alone() -> None:
    (probs, labels), (other, other_labels) = overconfident(30, 3, 2.0, 0), overconfident(30, 3, 2.0, 1)
    before = probs.clone(), labels.clone()
    wanted = metrics.calibrated_nll(probs, labels, (other, other_labels))
    assert metrics.calibrated_nll(probs.numpy(), labels.numpy(), (other.numpy(), other_labels.numpy())) == wanted
    lists = metrics.calibrated_nll(probs.tolist(), labels.tolist(), (other.tolist(), other_labels.tolist()))
    assert lists == pytest.approx(wanted, rel=1e-3)
    assert torch.equal(probs, before[0])
    assert torch.equal(labels, before[1])


def test_ten_objects_are_enough_to_cross_validate_and_nine_are_not() -> None:
    probs, labels = overconfident(10, 3, 1.0, 0)
    assert math.isfinite(metrics.calibrated_nll(probs, labels)["nll"])
    with pytest.raises(ValueError, match="at least 10 examples to cross-validate the temperature on, got 9"):
        metrics.calibrated_nll(probs[:9], labels[:9])


LOGITS = torch.tensor([[2.0, -1.0], [0.5, 0.5]])


@pytest.mark.parametrize(
    ("probs", "labels", "error", "message"),
    [
        (LOGITS, [0, 1], ValueError, "must not be negative"),
        (torch.tensor([[0.5, 0.6]]), [0], ValueError, r"must sum to 1.*found a sum of 1\.1"),
        (torch.tensor([[math.nan, 1.0]]), [1], ValueError, "NaN or infinity"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), ValueError, "nothing to evaluate"),
        (GOOD, [0, 2], ValueError, "between 0 and 1 for 2 classes"),
        (GOOD, [0], ValueError, r"labels of shape \[2\]"),
        (GOOD, [0.0, 1.0], TypeError, "whole-number labels"),
        (torch.tensor([0, 1]), GOOD, ValueError, "floating-point probabilities"),
    ],
)
def test_unusable_predictions_are_not_calibrated_nor_calibrated_on(
    probs: Any, labels: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        metrics.calibrated_nll(probs, labels)
    with pytest.raises(error, match=message):
        metrics.calibrated_nll(probs, labels, (GOOD, [0, 1]))
    with pytest.raises(error, match=message):
        metrics.calibrated_nll(GOOD, [0, 1], (probs, labels))


@pytest.mark.parametrize("held_out", [(GOOD,), (GOOD, [0, 1], [0, 1]), (), 5])
def test_held_out_objects_that_are_not_a_pair_are_refused(held_out: Any) -> None:
    with pytest.raises(TypeError):
        metrics.calibrated_nll(GOOD, [0, 1], held_out)


# The deep-ensemble equivalent


def slow_equivalent(nll: float, ensembles: list[float]) -> float:
    """The least size, in hundredths from 1, at which the line through the ensembles is as good."""
    sizes = [Fraction(i, 100) for i in range(100, 100 * len(ensembles) + 1)]
    for size in sizes:
        below = min(int(size), len(ensembles) - 1) or 1
        share = size - below
        low, high = (Fraction(ensembles[min(i, len(ensembles)) - 1]) for i in (below, below + 1))
        if (1 - share) * low + share * high <= Fraction(nll):
            return float(size)
    return 1.0 if nll >= ensembles[0] else math.inf


eighths = st.integers(-4, 24).map(lambda i: i / 8)


@given(nll=eighths, ensembles=st.lists(eighths, min_size=1, max_size=6))
def test_the_equivalent_is_the_first_size_at_which_ensembles_are_as_good(nll: float, ensembles: list[float]) -> None:
    wanted, found = slow_equivalent(nll, ensembles), metrics.deep_ensemble_equivalent(nll, ensembles)
    assert type(found) is float
    assert found == wanted if math.isinf(wanted) else wanted - 0.01 < found <= wanted + 1e-12


@given(
    nll=st.floats(0.1, 1),
    falls=st.lists(st.floats(0.001, 0.2), min_size=1, max_size=8),
)
def test_among_ever_better_ensembles_the_equivalent_is_read_off_the_line(nll: float, falls: list[float]) -> None:
    ensembles: Any = 1 - np.cumsum([0.0, *falls])
    assume(ensembles[-1] <= nll)
    wanted = np.interp(nll, ensembles[::-1], np.arange(len(ensembles), 0, -1))
    assert metrics.deep_ensemble_equivalent(nll, ensembles.tolist()) == pytest.approx(wanted, rel=1e-9)
    assert metrics.deep_ensemble_equivalent(nll, ensembles) == pytest.approx(wanted, rel=1e-9)


@given(nlls=st.sets(st.floats(-3, 3), min_size=1, max_size=10))
def test_an_ensemble_among_those_at_hand_is_worth_exactly_its_size(nlls: set[float]) -> None:
    ensembles = sorted(nlls, reverse=True)
    assert [metrics.deep_ensemble_equivalent(nll, ensembles) for nll in ensembles] == [*range(1, len(ensembles) + 1)]


@pytest.mark.parametrize(
    ("nll", "ensembles", "wanted"),
    [
        (0.75, [1.0, 0.5, 0.25], 1.5),
        (0.3125, [1.0, 0.5, 0.25], 2.75),
        (1.0, [1.0, 0.5], 1.0),
        (7.0, [1.0, 0.5], 1.0),
        (0.5, [1.0, 0.5, 0.5, 0.5], 2.0),
        (0.25, [1.0, 0.5, 0.5, 0.0], 3.5),
        (0.49, [1.0, 0.5], math.inf),
        (0.9, [1.0], math.inf),
        (1.0, [1.0], 1.0),
        (1.1, [1.0, 1.2, 0.8], 1.0),
        (0.875, [1.0, 1.25, 0.75], 2.75),
        (0.5, [1.0, 0.25, 0.75, 0.0], 1 + 2 / 3),
        (0.5, [1.0, 1.25, 1.5], math.inf),
        (-1.5, [-1.0, -2.0], 1.5),
    ],
)
def test_equivalents_of_known_cases(nll: float, ensembles: list[float], wanted: float) -> None:
    assert metrics.deep_ensemble_equivalent(nll, ensembles) == pytest.approx(wanted, rel=1e-12)
    assert metrics.deep_ensemble_equivalent(nll, tuple(ensembles)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("nll", "ensembles"),
    [
        (0.5, []),
        (0.5, np.array([])),
        (math.nan, [1.0, 0.5]),
        (math.inf, [1.0, 0.5]),
        (-math.inf, [1.0, 0.5]),
        (0.5, [math.nan]),
        (0.5, [1.0, 0.4, math.nan]),
        (0.5, [math.inf, 0.4]),
        (2.0, [1.0, -math.inf]),
    ],
)
def test_unusable_ensembles_are_refused(nll: float, ensembles: Any) -> None:
    with pytest.raises(ValueError, match="expected finite NLLs of at least one ensemble, got"):
        metrics.deep_ensemble_equivalent(nll, ensembles)


# Selective prediction


def slow_risks(uncertainty: list[float], losses: list[float]) -> list[float]:
    """Averaged over every order of the examples, each then sorted by uncertainty."""
    orders = list(itertools.permutations(range(len(losses))))
    total = [0.0] * len(losses)
    for order in orders:
        answered = [losses[i] for i in sorted(order, key=lambda i: uncertainty[i])]
        for i in range(len(losses)):
            total[i] += sum(answered[: i + 1]) / (i + 1)
    return [risk / len(orders) for risk in total]


@given(
    objects=st.lists(
        st.tuples(st.integers(0, 2).map(float) | st.floats(-3, 3), st.integers(0, 1).map(float) | st.floats(-10, 10)),
        min_size=1,
        max_size=5,
    )
)
def test_the_risk_is_the_average_over_every_order_of_equally_uncertain_objects(
    objects: list[tuple[float, float]],
) -> None:
    uncertainty, losses = [u for u, _ in objects], [loss for _, loss in objects]
    # As float64, in which Hypothesis finds them: float32 could make two uncertainties equal.
    found = metrics.risk_coverage(np.array(uncertainty), np.array(losses))
    wanted = slow_risks(uncertainty, losses)
    assert list(found) == ["coverage", "risk", "aurc"]
    assert found["coverage"].dtype == found["risk"].dtype == torch.float64
    assert found["coverage"].tolist() == pytest.approx([(i + 1) / len(losses) for i in range(len(losses))])
    assert found["risk"].tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    assert type(found["aurc"]) is float
    assert found["aurc"] == pytest.approx(sum(wanted) / len(wanted), rel=1e-9, abs=1e-9)


@given(n=st.integers(1, 200), seed=st.integers(0, 10**6), wrong=st.booleans())
def test_the_risk_is_that_of_the_most_certain_objects(n: int, seed: int, wrong: bool) -> None:
    uncertainty = torch.randperm(n, generator=seeded(seed)).double() / 7 - 3
    losses = normal(n, seed=seed, dtype=torch.float64)
    if wrong:
        losses = (losses > 0.5).double()
    found = metrics.risk_coverage(uncertainty, losses)
    order = sorted(range(n), key=lambda i: uncertainty[i].item())
    risks = [losses[order[: i + 1]].mean().item() for i in range(n)]
    assert found["risk"].tolist() == pytest.approx(risks, rel=1e-9, abs=1e-9)
    assert found["aurc"] == pytest.approx(sum(risks) / n, rel=1e-9, abs=1e-9)
    assert found["risk"][-1].item() == pytest.approx(losses.mean().item(), abs=1e-9)


def test_many_random_orders_of_ties_average_to_the_risk() -> None:
    uncertainty, losses = torch.randint(3, (40,), generator=seeded(0)).double(), normal(40, dtype=torch.float64)
    found = metrics.risk_coverage(uncertainty, losses)
    noise = [0.5 * torch.rand(40, generator=seeded(seed), dtype=torch.float64) for seed in range(2000)]
    broken = [metrics.risk_coverage(uncertainty + jitter, losses) for jitter in noise]
    risks = torch.stack([curve["risk"] for curve in broken])
    error = risks.std(0) / math.sqrt(len(broken))
    assert ((risks.mean(0) - found["risk"]).abs() < 5 * error + 1e-9).all()
    assert error.max() < 0.03


@pytest.mark.parametrize(("n", "wrong"), [(1, 0), (1, 1), (10, 0), (10, 3), (10, 10), (100, 37)])
def test_the_perfect_and_the_worst_order_have_known_curves(n: int, wrong: int) -> None:
    losses = torch.tensor([0] * (n - wrong) + [1] * wrong)
    certain = torch.arange(n)
    perfect, worst = metrics.risk_coverage(certain, losses), metrics.risk_coverage(-certain, losses)
    answered = range(1, n + 1)
    assert perfect["risk"].tolist() == pytest.approx([max(0, i - (n - wrong)) / i for i in answered])
    assert worst["risk"].tolist() == pytest.approx([min(i, wrong) / i for i in answered])
    shuffled = metrics.risk_coverage(torch.randperm(n, generator=seeded()), losses)["aurc"]
    assert perfect["aurc"] - 1e-12 <= shuffled <= worst["aurc"] + 1e-12
    # The two uncertainties that only tell right from wrong have the same best and worst curves.
    assert metrics.risk_coverage(losses, losses)["risk"].tolist() == pytest.approx(perfect["risk"].tolist())
    assert metrics.risk_coverage(-losses, losses)["risk"].tolist() == pytest.approx(worst["risk"].tolist())


@given(n=st.integers(1, 60), value=st.floats(-5, 5), seed=st.integers(0, 10**6))
def test_uncertainty_that_tells_nothing_has_the_mean_loss_at_every_coverage(n: int, value: float, seed: int) -> None:
    losses = 3 + normal(n, seed=seed, dtype=torch.float64)
    found = metrics.risk_coverage([value] * n, losses)
    assert found["risk"].tolist() == pytest.approx([losses.mean().item()] * n)
    assert found["aurc"] == pytest.approx(losses.mean().item())


@given(n=st.integers(1, 60), a=st.floats(0.1, 10), b=st.floats(-5, 5), seed=st.integers(0, 10**6))
def test_only_the_order_of_uncertainty_matters_and_the_risk_is_linear_in_the_losses(
    n: int, a: float, b: float, seed: int
) -> None:
    uncertainty = torch.randint(20, (n,), generator=seeded(seed)).double()
    losses = normal(n, seed=seed, dtype=torch.float64)
    found = metrics.risk_coverage(uncertainty, losses)
    other = metrics.risk_coverage((uncertainty / 5).exp() - 9, a * losses + b)
    assert torch.allclose(other["risk"], a * found["risk"] + b, atol=1e-9)
    order = torch.randperm(n, generator=seeded(seed + 1))
    permuted = metrics.risk_coverage(uncertainty[order], losses[order])
    assert torch.allclose(permuted["risk"], found["risk"], atol=1e-9)


def test_zeros_of_either_sign_are_the_same_uncertainty() -> None:
    assert metrics.risk_coverage([-0.0, 0.0, 1.0], [1, 0, 0])["risk"].tolist() == pytest.approx([0.5, 0.5, 1 / 3])
    assert metrics.risk_coverage([0.0, -0.0, 1.0], [1, 0, 0])["risk"].tolist() == pytest.approx([0.5, 0.5, 1 / 3])


def test_risk_takes_truth_values_integers_numpy_and_lists() -> None:
    wanted = [0.0, 0.5, 2 / 3]
    for losses in ([0, 1, 1], [False, True, True], np.array([0, 1, 1], dtype=np.uint8), torch.tensor([0, 1, 1]).bool()):
        for uncertainty in ([1, 2, 3], np.array([1, 2, 3], dtype=np.float32), torch.tensor([1, 2, 3])):
            assert metrics.risk_coverage(uncertainty, losses)["risk"].tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("uncertainty", "losses", "message"),
    [
        ([], [], "uncertainty must be a vector of at least one number"),
        ([1.0], [], "losses must be a vector of at least one number"),
        ([[1.0, 2.0]], [0.0, 1.0], r"uncertainty must be a vector.*got shape \[1, 2\]"),
        ([1.0, 2.0], [[0.0, 1.0]], r"losses must be a vector.*got shape \[1, 2\]"),
        ([1.0, math.nan], [0, 1], "uncertainty contains NaN or infinity"),
        ([1.0, 2.0], [0, math.inf], "losses contains NaN or infinity"),
        ([1.0, 2.0], [0], "as many losses as uncertainties, got 1 and 2"),
        ([1.0], [0, 1, 1], "as many losses as uncertainties, got 3 and 1"),
    ],
)
def test_unusable_uncertainty_or_losses_are_refused(uncertainty: Any, losses: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.risk_coverage(uncertainty, losses)


def test_without_torchmetrics_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match=r"pip install 'stochbn\[metrics\]'"):
        metrics.evaluate(GOOD, [0, 1])
    assert metrics.ood([0.0], [1.0])["auroc"] == 1
    assert metrics.entropy_cdf([1.0])[1].tolist() == [1.0]
    assert metrics.risk_coverage([0.0], [1.0])["aurc"] == 1
    assert math.isfinite(metrics.calibrated_nll(GOOD, [0, 1], (GOOD, [0, 1]))["nll"])


# ---------------------------------------------------------------- examples one by one


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_nll_of_each_object_is_the_logarithm_of_its_labels_probability(dtype: torch.dtype) -> None:
    probs = (3 * normal(30, 4)).softmax(1).to(dtype)
    probs[0] = torch.tensor([1.0, 0, 0, 0])
    labels = (torch.arange(30) + 1) % 4
    found = metrics.nll_of_each(probs, labels)
    assert found.dtype == torch.float64
    rows = zip(probs.tolist(), labels.tolist(), strict=True)
    assert found.tolist() == pytest.approx([-math.log(max(p[y], torch.finfo(dtype).tiny)) for p, y in rows])
    assert found.mean().item() == metrics.evaluate(probs, labels)["nll"]


@pytest.mark.parametrize("temperature", [0.5, 1, 3.0])
def test_the_nll_of_each_object_at_a_temperature_is_of_powers_normalised_again(temperature: float) -> None:
    probs = (3 * normal(30, 4)).double().softmax(1)
    labels = torch.arange(30) % 4
    powers = [[p ** (1 / temperature) for p in row] for row in probs.tolist()]
    slow = [-math.log(row[y] / sum(row)) for row, y in zip(powers, labels.tolist(), strict=True)]
    assert metrics.nll_of_each(probs, labels, temperature).tolist() == pytest.approx(slow)
    whole = metrics.calibrated_nll(probs, labels, (probs, labels))
    each = metrics.nll_of_each(probs, labels, whole["temperature"])
    assert each.mean().item() == pytest.approx(whole["nll"])


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan])
def test_an_impossible_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="expected a positive, finite temperature, got"):
        metrics.nll_of_each(torch.tensor([[0.5, 0.5]]), torch.tensor([0]), temperature)
