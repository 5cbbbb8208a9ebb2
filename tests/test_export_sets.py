"""Exported files carry the thresholds of prediction sets, and give the sets."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stochbn
from conftest import mlp, normal, settled
from stochbn import conformal
from stochbn.posteriors.thresholds import compare_draws, sums_of_centre
from stochbn.predictions import MultilabelPrediction, Prediction
from stochbn.tasks import Classification
from stochbn.tasks.residual import Residual
from test_export import fitted, run_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

X, NEW = normal(60, 4, seed=1), normal(7, 4, seed=2)
LABELS = X[:, :3].argmax(1)
CLASSES: dict[str, dict[str, Any]] = {
    "lac": {}, "raps": {"penalty": 0.05, "free": 1}, "saps": {"penalty": 0.2}, "by class": {"by_class": True},
}  # fmt: skip


def network() -> Any:
    return settled(mlp(), 4)


def with_sets(model: nn.Module, task: Any, make: Any, *shape: int) -> stochbn.Posterior:
    """A posterior with sets that are made of a prediction of some inputs."""
    posterior = fitted(model, *shape)
    if task == "regression":
        about = 60, posterior.batch_size, sums_of_centre(posterior)
        posterior = replace(posterior, residual_variance=Residual(torch.ones(3, 3, dtype=torch.float64), *about))
    x = normal(60, *shape, seed=1)
    prediction = stochbn.Predictive(model, posterior, 3, task=task)(x)
    return posterior.with_sets(make(prediction), draws=3)


def exported(kind: str, model: nn.Module, posterior: stochbn.Posterior, path: Path, x: Tensor, task: Any) -> Any:
    """What the file gives of new inputs, and what it says of its sets."""
    if kind == "onnx":
        found = stochbn.export.onnx(model, posterior, path, x, 3, task=task)
        told = {entry.key: entry.value for entry in onnx.load(path).metadata_props}["stochbn.sets"]
        return run_onnx(path, x), json.loads(told), found.outputs
    found = stochbn.export.pt2(model, posterior, path, x, 3, task=task)
    extra = {"stochbn.json": ""}
    program = torch.export.load(path, extra_files=extra)
    return program.module()(x), json.loads(json.loads(extra["stochbn.json"])["sets"]), found.outputs


@pytest.mark.parametrize(("method", "kind"), [*((method, "onnx") for method in CLASSES), ("raps", "pt2")])
def test_sets_of_classes_are_an_output(method: str, kind: str, tmp_path: Path) -> None:
    def make(prediction: Any) -> Any:
        of = getattr(conformal, method if method in ("raps", "saps") else "lac")
        return of(prediction.probs, LABELS[: len(prediction.probs)], 0.7, **CLASSES[method])

    model = network()
    posterior = with_sets(model, "classification", make, 4)
    found, told, outputs = exported(kind, model, posterior, tmp_path / "n", NEW, "classification")
    assert outputs == ("probs", "entropy", "mutual_information", "set")
    assert posterior.thresholds is not None
    rule: Any = posterior.thresholds.sets
    assert torch.equal(found["set"], rule(found["probs"]))
    assert (told["kind"], told["method"], told["coverage"]) == ("sets", rule.method, 0.7)
    threshold = torch.as_tensor(rule.threshold)
    assert np.allclose(np.array(told["threshold"], dtype=float), threshold)


class Graded(Prediction):
    """A prediction of a task of the user's own."""


class Grades(Classification):
    name = "grades"

    def prediction(self, mean: Tensor, second: Tensor, variance: Tensor | None, kept: Tensor | None) -> Graded:
        return Graded(mean, second, kept)


def test_sets_of_classes_are_also_of_predictions_of_ones_own(tmp_path: Path) -> None:
    def make(prediction: Any) -> Any:
        return conformal.lac(prediction.probs, LABELS, 0.7)

    model, task = network(), Grades()
    posterior = with_sets(model, task, make, 4)
    prediction = stochbn.Predictive(model, posterior, 3, task=task)(NEW)
    assert isinstance(prediction, Graded)
    assert posterior.thresholds is not None
    rule: Any = posterior.thresholds.sets
    assert torch.equal(rule.of(prediction), rule(prediction.probs))
    found, *_ = exported("pt2", model, posterior, tmp_path / "n", NEW, task)
    assert torch.equal(found["set"], rule(found["probs"]))
    several = MultilabelPrediction(prediction.probs, prediction.expected_entropy)
    with pytest.raises(TypeError, match="one class for each example, got a MultilabelPrediction"):
        rule.of(several)


def places() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))


@pytest.mark.parametrize(
    ("task", "kind"), [("multilabel", "pt2"), ("mask", "onnx"), ("intervals", "onnx"), ("cqr", "pt2")]
)
def test_sets_of_other_tasks_are_outputs(task: str, kind: str, tmp_path: Path) -> None:
    dense = task == "mask"
    name = "multilabel" if task == "multilabel" else "classification" if dense else "regression"

    def make(prediction: Any) -> Any:
        if name == "regression":
            truth = prediction.mean + normal(*prediction.mean.shape, seed=5)
            if task == "cqr":
                return conformal.cqr(prediction.mean - 1, prediction.mean + 1, truth, 0.8)
            return conformal.intervals(
                prediction.mean, None if task == "absolute" else prediction.total_std, truth, 0.8
            )
        return conformal.crc(prediction.probs, (prediction.probs > 0.3).long(), 0.8, mask=1 if dense else None)

    shape = (2, 6, 5) if dense else (4,)
    torch.manual_seed(0)
    model = settled(places() if dense else network(), *shape)
    posterior = with_sets(model, name, make, *shape)
    found, told, outputs = exported(kind, model, posterior, tmp_path / "n", normal(5, *shape, seed=7), name)
    assert posterior.thresholds is not None
    rule: Any = posterior.thresholds.sets
    assert told["kind"] == rule.kind
    if name == "regression":
        assert outputs == ("mean", "std", "total_std", "low", "high")
        if task == "cqr":
            from stochbn.conformal.cqr import normal_quantiles

            expected = rule(*normal_quantiles(found["mean"], found["total_std"], 0.8))
        else:
            expected = rule(found["mean"], found["total_std"])
        assert torch.allclose(torch.stack([found["low"], found["high"]]).double(), expected, atol=1e-4)
    else:
        kind_of = MultilabelPrediction if name == "multilabel" else Prediction
        assert torch.equal(found["set"], rule.of(kind_of(found["probs"], found["entropy"])))
        assert 0 < found["set"].double().mean() < 1


def test_sets_by_group_are_in_the_metadata_alone(tmp_path: Path) -> None:
    model = network()
    posterior = fitted(model, 4)
    probs = stochbn.Predictive(model, posterior, 3)(X).probs
    groups = ["a", "b"] * 30
    by_group = posterior.with_sets(conformal.lac(probs, LABELS, 0.7, groups=groups), draws=3, by="site")
    found, told, outputs = exported("onnx", model, by_group, tmp_path / "n", NEW, "classification")
    assert "set" not in found
    assert outputs == ("probs", "entropy", "mutual_information")
    assert (told["groups"], told["by"], len(told["threshold"])) == (["a", "b"], "site", 2)


def test_metadata_is_strict_json_and_other_draws_are_told(tmp_path: Path) -> None:
    model = network()
    posterior = fitted(model, 4).rescale(math.inf)
    sets = replace(conformal.lac(normal(60, 3).softmax(1), LABELS, 0.7), threshold=math.inf)
    thresholds = posterior.with_sets(sets, draws=50).thresholds
    assert thresholds is not None
    told = json.loads(json.dumps(thresholds.told(), allow_nan=False))
    assert (told["threshold"], told["batch_size"]) == ("inf", "inf")
    with pytest.warns(UserWarning, match="are from predictions with --draws 50"):
        stochbn.export.onnx(model, fitted(model, 4).with_sets(sets, draws=50), tmp_path / "n", NEW, 3)
    with warnings.catch_warnings():  # without noise all draws are equal, so their number does not matter
        warnings.simplefilter("error", UserWarning)
        compare_draws(posterior.with_sets(sets, draws=50), 3, None)
