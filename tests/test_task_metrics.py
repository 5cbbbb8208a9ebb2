"""Scores of regressions and labels, against their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from conftest import normal, seeded
from stochbn import metrics


def test_regression_scores_are_those_of_a_normal_distribution() -> None:
    mean, std = normal(4000, 2), normal(4000, 2, seed=1).exp()
    targets = mean + std * normal(4000, 2, seed=2)
    found = metrics.regression(mean, std, targets, coverage=0.8)
    assert found["rmse"] == pytest.approx((targets - mean).square().mean().sqrt().item(), rel=1e-5)
    assert found["mae"] == pytest.approx((targets - mean).abs().mean().item(), rel=1e-5)
    logs = stats.norm(mean.double(), std.double()).logpdf(targets.double())
    assert found["nll"] == pytest.approx(-logs.mean())
    assert found["coverage"] == pytest.approx(0.8, abs=0.02)
    assert found["width"] == pytest.approx(2 * 1.281552 * std.mean().item(), rel=1e-5)
    each = metrics.gaussian_nll_of_each(mean, std, targets)
    np.testing.assert_allclose(each, -logs, rtol=1e-5, atol=1e-6)


def test_crps_is_the_integral_of_the_squared_difference_of_distribution_functions() -> None:
    for mean, std, target in ((0.3, 0.7, 1.0), (0.0, 2.0, -3.0)):
        x = np.linspace(-30, 30, 200_001)
        difference = stats.norm(mean, std).cdf(x) - (x >= target)
        wanted = integrate.trapezoid(difference**2, x)
        assert metrics.regression([mean], [std], [target])["crps"] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9])
def test_the_pinball_loss_is_lowest_for_the_true_quantile(level: float) -> None:
    targets = normal(20_000).double()
    true = torch.full_like(targets, stats.norm.ppf(level))
    losses = {shift: metrics.pinball(true + shift, targets, level) for shift in (-0.3, 0.0, 0.3)}
    assert min(losses, key=losses.__getitem__) == 0.0


def test_multilabel_scores_are_counted_by_hand() -> None:
    probs = torch.tensor([[0.9, 0.2, 0.5], [0.6, 0.4, 0.1], [0.2, 0.3, 0.3]])
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 0]])
    found = metrics.multilabel(probs, labels)
    assert found["error"] == pytest.approx(100 * 3 / 9)  # 0.5, 0.6 and 0.4
    right = torch.where(labels > 0, probs, 1 - probs).double()
    assert found["nll"] == pytest.approx(-right.log().mean().item())
    assert found["brier"] == pytest.approx((probs - labels).square().mean().item())
    assert found["auroc"] == 1.0  # the third label is never there
    assert math.isnan(metrics.multilabel(probs, labels * 0)["auroc"])


def test_calibrated_labels_have_a_calibration_error_near_none() -> None:
    probs = torch.rand(40_000, 2, generator=seeded())
    labels = (torch.rand(40_000, 2, generator=seeded(1)) < probs).long()
    assert metrics.multilabel(probs, labels)["ece"] < 0.01
    assert metrics.multilabel(probs.square(), labels)["ece"] > 0.1


def test_the_calibration_error_of_a_class_is_that_of_its_probability_alone() -> None:
    probs = normal(3000, 4).softmax(1)
    labels = torch.multinomial(probs, 1, generator=seeded())[:, 0]
    found = metrics.class_ece(probs, labels)
    for k in range(4):
        wanted = 0.0
        for low in range(15):
            within = (probs[:, k] > low / 15) & (probs[:, k] <= (low + 1) / 15)
            if within.any():
                gap = probs[within, k].double().mean() - (labels[within] == k).double().mean()
                wanted += abs(gap.item()) * within.double().mean().item()
        assert found[k].item() == pytest.approx(wanted, abs=1e-5)


def test_labels_that_do_not_count_are_left_out() -> None:
    probs = normal(2, 3, 4, 5).softmax(1)
    labels = torch.randint(3, (2, 4, 5), generator=seeded())
    ignored = torch.rand(2, 4, 5, generator=seeded(1)) < 0.3
    found = metrics.evaluate(probs, labels.masked_fill(ignored, 255), ignore_index=255)
    flat = probs.movedim(1, -1)[~ignored]
    assert found == pytest.approx(metrics.evaluate(flat, labels[~ignored]))
    with pytest.raises(ValueError, match="all labels are 255"):
        metrics.evaluate(probs, torch.full_like(labels, 255), ignore_index=255)
    with pytest.raises(ValueError, match="labels must lie between 0 and 2"):
        metrics.evaluate(probs, labels.masked_fill(ignored, 255))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.regression([0.0], [1.0], [0.0, 1.0]), "of one shape"),
        (lambda: metrics.regression([0.0], [0.0], [0.0]), "must be positive, found 0"),
        (lambda: metrics.regression([math.nan], [1.0], [0.0]), "mean has NaN"),
        (lambda: metrics.regression([0.0], [1.0], [0.0], coverage=1), "coverage must lie between"),
        (lambda: metrics.regression([], [], []), "of one shape"),
        (lambda: metrics.pinball([0.0], [0.0, 1.0], 0.5), "of one shape"),
        (lambda: metrics.pinball([0.0], [0.0], 1.5), "level must lie"),
        (lambda: metrics.multilabel([[0.5, 0.5]], [[1, 2]]), "labels must be 0 or 1"),
        (lambda: metrics.multilabel([[0.5, 1.5]], [[1, 0]]), "must lie between 0 and 1"),
        (lambda: metrics.multilabel([[0.5, 0.5]], [1, 0]), r"of one shape \[N, K\]"),
    ],
)
def test_what_cannot_be_scored_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
