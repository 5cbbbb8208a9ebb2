from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from conftest import normal
from stochbn import metrics
from stochbn.metrics.differences import paired, standard_errors
from stochbn.predictions import entropy


def predictions(n: int, seed: int, like: Tensor | None = None, classes: int = 4) -> Tensor:
    """Random probabilities or, like others, these a little changed."""
    logits = 2 * normal(n, classes, seed=seed)
    return logits.softmax(1) if like is None else (like.log() + 0.1 * logits).softmax(1)


def test_changes_are_differences_of_the_metrics() -> None:
    labels = torch.arange(60) % 4
    known = predictions(60, 0), predictions(60, 1)
    unknown = predictions(50, 2), predictions(50, 3)
    calibrated = metrics.calibrated_nll_of_each(known[0], labels), metrics.calibrated_nll_of_each(known[1], labels)
    found = paired(known, labels, unknown, calibrated)
    scores = [
        metrics.evaluate(k, labels)
        | metrics.ood(entropy(k), entropy(u))
        | {"calibrated_nll": metrics.calibrated_nll(k, labels)["nll"], "entropy_unknown": entropy(u).mean().item()}
        for k, u in zip(known, unknown, strict=True)
    ]
    for key in ("error", "nll", "calibrated_nll", "entropy_unknown", "auroc"):
        assert found[f"{key}_change"] == pytest.approx(scores[1][key] - scores[0][key], abs=1e-5), key


def test_errors_are_those_of_the_mean_over_objects() -> None:
    labels = torch.arange(40) % 4
    first, second = predictions(40, 0), predictions(40, 1)
    rows = range(40)
    differences = [math.log(first[i, labels[i]]) - math.log(second[i, labels[i]]) for i in rows]
    mean = sum(differences) / 40
    slow = math.sqrt(sum((d - mean) ** 2 for d in differences) / 39 / 40)
    found = paired((first, second), labels)
    assert found["nll_change"] == pytest.approx(mean, rel=1e-5)
    assert found["nll_change_se"] == pytest.approx(slow, rel=1e-5)


def test_errors_are_as_large_as_changes_vary_over_samples_of_objects() -> None:
    """The bootstrap of a sample of examples, in which known and unknown ones are drawn again."""
    n, m = 300, 250
    labels = torch.arange(n) % 4
    first, unknown = predictions(n, 0), predictions(m, 2)
    second, unknown_second = predictions(n, 1, first), 0.5 * predictions(m, 3, unknown) + 0.5 / 4

    def tempered(i: Tensor) -> tuple[Tensor, Tensor]:
        return metrics.calibrated_nll_of_each(first[i], labels[i]), metrics.calibrated_nll_of_each(second[i], labels[i])

    found = paired((first, second), labels, (unknown, unknown_second), tempered(torch.arange(n)))
    again: dict[str, list[float]] = {}
    source = torch.Generator().manual_seed(0)
    for _ in range(200):
        i, j = (torch.randint(size, (size,), generator=source) for size in (n, m))
        for key, value in paired(
            (first[i], second[i]), labels[i], (unknown[j], unknown_second[j]), tempered(i)
        ).items():
            again.setdefault(key, []).append(value)
    for key in ("error", "nll", "calibrated_nll", "entropy_unknown", "auroc"):
        spread = torch.tensor(again[f"{key}_change"]).std().item()
        assert found[f"{key}_change_se"] == pytest.approx(spread, rel=0.2), key


def test_predictions_that_move_together_have_small_errors() -> None:
    labels = torch.arange(200) % 4
    first = predictions(200, 0)
    near, far = paired((first, predictions(200, 1, first)), labels), paired((first, predictions(200, 1)), labels)
    assert near["nll_change_se"] < 0.2 * far["nll_change_se"]
    same = paired((first, first), labels, (first, first))
    assert 0 < same.pop("error_change_se") < 1
    assert set(same.values()) == {0.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_differences_are_those_of_the_scores_where_a_probability_is_0(dtype: torch.dtype) -> None:
    """Of which the logarithm is that of the smallest number of its type."""
    labels = torch.arange(40) % 4
    sure = torch.nn.functional.one_hot(labels, 4).to(dtype)
    wrong = sure.clone()
    wrong[3] = wrong[0]
    calibrated = metrics.calibrated_nll_of_each(sure, labels), metrics.calibrated_nll_of_each(wrong, labels)
    found = paired((sure, wrong), labels, calibrated=calibrated)
    nll = [metrics.evaluate(probs, labels)["nll"] for probs in (sure, wrong)]
    assert found["nll_change"] == pytest.approx(nll[1] - nll[0], rel=1e-12)
    assert found["nll_change"] == pytest.approx(-math.log(torch.finfo(dtype).tiny) / 40)
    assert found["nll_change_se"] == pytest.approx(found["nll_change"])
    assert found["calibrated_nll_change"] == pytest.approx((calibrated[1] - calibrated[0]).mean().item())
    assert found["calibrated_nll_change_se"] > 0


def test_too_few_objects_leave_changes_out() -> None:
    probs = predictions(9, 0), predictions(9, 1)
    labels = torch.arange(9) % 4
    assert "calibrated_nll_change" not in paired(probs, labels)
    assert "auroc_change" not in paired(probs, labels)
    assert "auroc_change" not in paired(probs, labels, (probs[0][:1], probs[1][:1]))
    assert paired((probs[0][:1], probs[1][:1]), labels[:1]) == {}


def test_standard_errors_are_the_spread_of_scores_over_samples_of_objects() -> None:
    labels = torch.arange(4000) % 4
    known = (predictions(4000, 0).log() + 1.5 * torch.eye(4)[labels]).softmax(1)
    unknown = predictions(3000, 2)
    spread: dict[str, list[float]] = {"error": [], "nll": [], "ece": [], "auroc": []}
    for i in range(40):
        part, others = slice(100 * i, 100 * i + 100), slice(75 * i, 75 * i + 75)
        scores = metrics.evaluate(known[part], labels[part])
        scores |= metrics.ood(entropy(known[part]), entropy(unknown[others]))
        for name, values in spread.items():
            values.append(scores[name])
    found = standard_errors(known[:100], labels[:100], unknown[:75])
    for name, values in spread.items():
        assert found[f"{name}_se"] == pytest.approx(torch.tensor(values).std().item(), rel=0.4), name


def test_the_order_of_objects_does_not_change_the_error_of_the_calibration_error() -> None:
    labels = torch.arange(300) % 4
    known = (predictions(300, 0).log() + 1.5 * torch.eye(4)[labels]).softmax(1)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    found = standard_errors(known[order], labels[order])
    assert found["ece_se"] == standard_errors(known, labels)["ece_se"]
    rounded = known[order] * (1 + 1e-7 * torch.randn(300, 1, generator=torch.Generator().manual_seed(2)))
    assert standard_errors(rounded, labels[order])["ece_se"] == pytest.approx(found["ece_se"], rel=1e-5)


def test_an_error_of_none_has_a_standard_error_and_a_single_object_has_none() -> None:
    labels = torch.arange(271) % 4
    found = standard_errors(torch.eye(4)[labels], labels)
    assert found["error_se"] == pytest.approx(0.51, abs=0.01)
    assert found["nll_se"] == found["ece_se"] == 0
    assert "auroc_se" not in found
    assert standard_errors(torch.eye(4)[labels[:1]], labels[:1]) == {}


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (3, 5)])
def test_the_error_of_a_change_is_that_of_one_more_object_each_way(better: int, worse: int) -> None:
    n, labels = 50, torch.zeros(50, dtype=torch.int64)
    right, wrong = torch.tensor([0.9, 0.1]), torch.tensor([0.2, 0.8])
    first, second = right.repeat(n, 1), right.repeat(n, 1)
    first[:better], second[better : better + worse] = wrong, wrong
    found = paired((first, second), labels)
    one, other = (better + 1) / (n + 2), (worse + 1) / (n + 2)
    wanted = 100 * math.sqrt((one + other - (one - other) ** 2) / (n + 2))
    assert found["error_change"] == pytest.approx(100 * (worse - better) / n, abs=1e-9)
    assert found["error_change_se"] == pytest.approx(wanted, rel=0.02)  # which divides by one example more
