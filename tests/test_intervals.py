"""Intervals by normalised residuals and by conformalised quantiles."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import normal
from stochbn import conformal
from stochbn.conformal.cqr import normal_quantiles
from stochbn.predictions import Estimate


def fit(method: str, mean: Tensor, std: Tensor, truth: Tensor, coverage: float, **options: Any) -> Any:
    if method == "cqr":
        return conformal.cqr(mean - std, mean + 2 * std, truth, coverage, **options)
    return conformal.intervals(mean, std if method == "normalized" else None, truth, coverage, **options)


def made(method: str, rule: Any, mean: Tensor, std: Tensor, groups: Any = None) -> Tensor:
    given = (mean - std, mean + 2 * std) if method == "cqr" else (mean, std)
    found: Tensor = rule(*given, groups)
    return found


METHODS = ("normalized", "absolute", "cqr")


@pytest.mark.parametrize("method", METHODS)
def test_intervals_cover_as_often_as_asked_for(method: str) -> None:
    held, repetitions, n = 0.0, 2000, 9
    for seed in range(repetitions):
        mean, std = normal(n + 1, seed=seed), normal(n + 1, seed=seed + 1).exp()
        truth = mean + 3 * std * normal(n + 1, seed=seed + 2)
        found = fit(method, mean[:n], std[:n], truth[:n], 0.9)
        low, high = made(method, found, mean[n:], std[n:])
        held += bool((low <= truth[n:]) & (truth[n:] <= high))
    assert abs(held / repetitions - 0.9) < 4 * math.sqrt(0.09 / repetitions)


@pytest.mark.parametrize("method", METHODS)
def test_thresholds_are_those_of_a_slow_loop(method: str) -> None:
    mean, std = normal(40).double(), normal(40, seed=1).double().exp()
    truth = mean + std * normal(40, seed=2).double()
    scores = []
    for m, s, y in zip(mean.tolist(), std.tolist(), truth.tolist(), strict=True):
        scores.append(
            {"normalized": abs(y - m) / s, "absolute": abs(y - m), "cqr": max(m - s - y, y - m - 2 * s)}[method]
        )
    expected = sorted(scores)[math.ceil(41 * 0.7) - 1]
    assert fit(method, mean, std, truth, 0.7).threshold == pytest.approx(expected, abs=1e-12)


class Column:
    """What MAPIE takes for a regressor of scikit-learn: it predicts a column of its inputs."""

    def __init__(self, column: int) -> None:
        self.column = column

    def fit(self, x: Any, y: Any) -> Any:
        return self

    def predict(self, x: Any) -> Any:
        return x[:, self.column]

    def get_params(self, deep: bool = True) -> dict[str, int]:
        return {"column": self.column}

    def __sklearn_is_fitted__(self) -> bool:
        return True


@pytest.mark.filterwarnings("ignore:WARNING. The predictions", "ignore::UserWarning")
def test_conformalised_quantiles_are_those_of_mapie() -> None:
    regression = pytest.importorskip("mapie.regression")
    mean, std = normal(200).double(), normal(200, seed=1).double().exp()
    truth = mean + std * normal(200, seed=2).double()
    x = torch.stack([mean - std, mean + 2 * std, mean], 1).numpy()
    theirs = regression.ConformalizedQuantileRegressor([Column(i) for i in range(3)], 0.8, prefit=True)
    theirs.conformalize(x, truth.numpy())
    _, ends = theirs.predict_interval(x, symmetric_correction=True)
    own = fit("cqr", mean, std, truth, 0.8)
    assert np.allclose(made("cqr", own, mean, std), ends[:, :, 0].T)


def test_quantiles_that_are_too_wide_are_narrowed_and_never_cross() -> None:
    truth = normal(200).double()
    found = conformal.cqr(torch.full_like(truth, -50), torch.full_like(truth, 50), truth, 0.9)
    low, high = found([-50.0, -1.0], [50.0, 1.0])
    assert isinstance(found.threshold, float)
    assert found.threshold < -45
    assert high[0] - low[0] < 5
    assert low[1] == high[1] == 0


@pytest.mark.parametrize("method", METHODS)
def test_by_group_intervals_are_those_of_the_group_alone(method: str) -> None:
    mean, std = torch.zeros(200), torch.ones(200)
    groups = ["loud", "quiet"] * 100
    truth = normal(200) * torch.tensor([9.0, 1.0]).repeat(100)
    rule = fit(method, mean, std, truth, 0.8, groups=groups)
    found = made(method, rule, mean[:3], std[:3], ["quiet", "loud", "new"])
    for place, first in ((0, 1), (1, 0)):
        alone = fit(method, mean[first::2], std[first::2], truth[first::2], 0.8)
        assert torch.equal(found[:, place], made(method, alone, mean[:1], std[:1])[:, 0])
    assert found[:, 2].tolist() == [-math.inf, math.inf]


@pytest.mark.parametrize("method", METHODS)
def test_of_several_numbers_a_share_of_each_example_is_held(method: str) -> None:
    """Numbers of an example go together, so that as many as examples count, and not as many as numbers."""
    shares, repetitions, n = [], 600, 12
    for seed in range(repetitions):
        scale = normal(n + 1, 1, seed=seed).exp()
        truth = scale * normal(n + 1, 30, seed=seed + 1)
        mean, std = torch.zeros_like(truth), torch.ones_like(truth)
        low, high = made(method, fit(method, mean[:n], std[:n], truth[:n], 0.8), mean[n:], std[n:])
        shares.append(((low <= truth[n:]) & (truth[n:] <= high)).double().mean())
    found = torch.stack(shares)
    error = (found.std() / math.sqrt(repetitions)).item()
    assert found.mean() > 0.8 - 2 * error
    assert found.mean() < 0.8 + 1 / (n + 1) + 2 * error


def test_a_prediction_gives_its_own_intervals() -> None:
    mean, spread, noise = normal(20), normal(20, seed=1).exp(), normal(20, seed=2).exp()
    prediction, truth = Estimate(mean, spread, noise, spread + noise), normal(20, seed=3)
    std = prediction.total_std
    assert std is not None
    rule = conformal.intervals(mean, std, truth, 0.8)
    assert torch.equal(rule.of(prediction), rule(mean, std))
    quantiles = normal_quantiles(mean, std, 0.8)
    expected = mean.double() - NormalDist().inv_cdf(0.9) * std.double()
    assert torch.allclose(quantiles[0], expected)
    wide = conformal.cqr(*quantiles, truth, 0.8)
    assert torch.equal(wide.of(prediction), wide(*quantiles))


ZERO = torch.zeros(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conformal.intervals([0.0], [1.0, 2.0], [0.0]), "of one shape"),
        (lambda: conformal.intervals([0.0] * 9, [0.0] * 9, [0.0] * 9), "must be positive"),
        (lambda: conformal.intervals([math.nan] * 9, [1.0] * 9, [0.0] * 9), "mean has NaN"),
        (lambda: conformal.intervals([0.0] * 9, [1.0] * 9, [0.0] * 9)(ZERO, ZERO - 1), "at least 0"),
        (lambda: conformal.intervals([0.0] * 9, [1.0] * 9, [0.0] * 9)(ZERO), "pass std, or fit without it"),
        (lambda: conformal.intervals([[0.0] * 9] * 3, None, [[0.0] * 9] * 3), "at least 9 held-out examples, got 3"),
        (lambda: conformal.cqr([0.0] * 9, [1.0] * 9, [0.0] * 8), "lower, upper, targets of one shape"),
        (lambda: normal_quantiles(ZERO, None, 0.9), "need standard deviations"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_groups_are_the_same_whatever_their_type() -> None:
    assert conformal.base.group_names([1.0, math.nan, 2], 3) == ["1", "", "2"]
    rule = conformal.intervals(normal(40), None, normal(40, seed=1), 0.8, groups=[1, 2] * 20)
    whole, broken = rule(normal(3), groups=[1, 2, 1]), rule(normal(3), groups=[1.0, 2.0, 1.0])
    assert torch.equal(whole, broken)
    with pytest.warns(UserWarning, match="not among the held-out examples hold everything: '', '3'"):
        assert rule(normal(3), groups=[1.0, math.nan, 3]).isinf().sum() == 4


def test_no_examples_have_no_sets_and_are_too_few_to_make_some() -> None:
    sets = conformal.lac(torch.full((20, 2), 0.5), torch.zeros(20).long())
    assert sets(torch.ones(0, 2)).shape == (0, 2)
    with pytest.raises(ValueError, match="probabilities and labels are empty"):
        conformal.lac(torch.ones(0, 3), torch.zeros(0).long())
    with pytest.raises(ValueError, match="needs at least 9 held-out examples, got 0"):
        conformal.intervals(torch.ones(0), None, torch.ones(0))
