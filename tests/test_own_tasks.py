"""Commands on networks of the user's own that give numbers, labels or a class for each place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import stochbn
from conftest import command_output as stochbn_
from stochbn import Predictive, metrics
from stochbn.dense_masks import mask_name
from stochbn.sources import build
from test_own_network import NUMBER, settled, told  # noqa: F401 - a fixture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of these networks, which have learnt nothing

MODULE = """
from dataclasses import dataclass

import torch
from stochbn.tasks import Classification
from stochbn.tasks.base import Panel, Scores, standard_error
from stochbn.tasks.draw_scores import DrawScore
from torch import nn

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.mean, self.spread = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x):
        hidden = self.body(x)
        return self.mean(hidden), self.spread(hidden)

def one():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

def labels():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

def places():
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1))

@dataclass(frozen=True)
class Ordinal(Classification):
    name = "ordinal"
    score_columns = {"steps": ("steps", 3, 1)}
    calibrated_by = ("rps",)

    def scores(self, predictions, join=dict, ignore=None):
        rows = [(p.probs.argmax(1).cpu() - y).abs().double() for p, y in predictions]
        steps = join({"steps": torch.cat(rows).flatten(1).mean(1) if rows[0].ndim > 1 else torch.cat(rows)})["steps"]
        error = {"steps": standard_error(steps)}
        return Scores({"steps": steps.mean().item()}, error, {"steps": steps})

    def panels(self, scores):
        return [Panel("How many steps off?", "Of each method.", lambda axes, colors: axes.bar(list(scores), 1))]

    def draw_score(self, name, temperatures):
        return RankedProbability(temperatures)

class RankedProbability(DrawScore):
    def add(self, logits, labels):
        each = torch.stack([(logits / t).softmax(1) for t in self.temperatures.tolist()]).double()
        self.total = each if self.total is None else self.total + each
        self.draws += 1

    def of_each(self, labels):
        truth = torch.nn.functional.one_hot(labels, self.total.shape[2])
        return ((self.total / self.draws - truth).cumsum(2) ** 2).sum(2)

def ordered():
    network = labels()
    network.task = Ordinal()
    return network

def ordered_places():
    network = places()
    network.task = Ordinal()
    return network

class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = labels()

    def forward(self, x):
        return {"hidden": x, "scores": self.body(x.flatten(0, 1)).view(*x.shape[:2], 3).softmax(-1)}
"""
X = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
PLACES = np.random.default_rng(1).normal(size=(12, 2, 8, 10)).astype(np.float32)
TRUTH = np.random.default_rng(2).integers(0, 3, (12, 8, 10))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"own_tasks_{next(NUMBER)}"
    Path(f"{name}.py").write_text(MODULE)
    return name


def options(module: str, function: str, x: Any) -> tuple[str, ...]:
    """A network with weights, and its posterior beside it."""
    torch.manual_seed(0)
    model = settled(build(f"{module}:{function}", {}).model, torch.from_numpy(x))
    save_file(model.state_dict(), "w.safetensors")
    given = "--model", f"{module}:{function}", "--weights", "w.safetensors"
    np.savez("data.npz", inputs=x)
    stochbn_("fit", *given, "--data", "data.npz", "--batch-size", 4)
    return given


def network(given: tuple[str, ...]) -> Any:
    from stochbn.sources import load_weights

    model = build(given[1], {}).model
    load_weights(model, Path(given[3]))
    return model.eval()


def scores(name: str = "r") -> Any:
    return json.loads(Path(name, "results.json").read_text())


@pytest.mark.parametrize("function", ["one", "Pair"])
def test_a_regression_is_evaluated(module: str, function: str) -> None:
    given = options(module, function, X)
    targets = X[:, :1] * 2
    np.savez("test.npz", inputs=X, labels=targets if function == "Pair" else targets[:, 0])
    text = stochbn_("evaluate", *given, "--task", "regression", "--data", "test.npz", "--draws", 8, "--out", "r")
    model, posterior = network(given), stochbn.load("w.sbn.safetensors")
    predictive = Predictive(model, posterior, 8, task="regression")
    prediction = predictive(torch.from_numpy(X), generator=torch.Generator().manual_seed(0))
    plain = Predictive(model, task="regression")(torch.from_numpy(X))
    truth = torch.from_numpy(targets)
    found = scores()["scores"]["SBN"]
    if function == "Pair":
        wanted = metrics.regression(prediction.mean.view(-1, 1), prediction.total_std.view(-1, 1), truth)
        wanted["coverage_90"] = wanted.pop("coverage")
        assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    else:
        assert set(found) == {"rmse", "mae"}
        assert "total_std is None" in " ".join(text.split())
    assert scores()["scores"]["plain"]["rmse"] == pytest.approx((plain.mean.view(-1, 1) - truth).square().mean() ** 0.5)
    assert ("nll" in scores()["scores"]["plain"]) == (function == "Pair")
    loss = "NLL" if function == "Pair" else "squared error"
    assert f"What SBN changes in the mean {loss}" in text
    if function == "one":
        change = ((prediction.mean.view(-1, 1) - truth) ** 2 - (plain.mean.view(-1, 1) - truth) ** 2)[:, 0]
        assert scores()["change"] == pytest.approx(change.mean().item(), rel=1e-3, abs=1e-6)
        assert scores()["change_se"] == pytest.approx((change.var() / 60).sqrt().item(), rel=1e-3)


def test_labels_are_evaluated(module: str) -> None:
    given = options(module, "labels", X)
    truth = (X[:, :3] > 0).astype(np.int64)
    np.savez("test.npz", inputs=X, labels=truth)
    stochbn_("evaluate", *given, "--task", "multilabel", "--data", "test.npz", "--draws", 8, "--out", "r")
    plain = Predictive(network(given), task="multilabel")(torch.from_numpy(X)).probs
    assert scores()["scores"]["plain"] == pytest.approx(metrics.multilabel(plain, truth), rel=1e-4)
    assert scores()["scores"]["SBN"].keys() == scores()["scores"]["plain"].keys()


def test_places_are_evaluated_without_those_that_do_not_count(module: str) -> None:
    given = options(module, "places", PLACES)
    truth = np.where(np.random.default_rng(3).random(TRUTH.shape) < 0.2, 255, TRUTH)
    truth[0] = 255
    np.savez("test.npz", inputs=PLACES, labels=truth)
    common = *given, "--dense", "--data", "test.npz", "--draws", 8, "--out", "r"
    stochbn_("evaluate", *common, "--ignore", 255)
    plain = Predictive(network(given))(torch.from_numpy(PLACES)).probs
    wanted = metrics.evaluate(plain, truth, ignore_index=255)
    assert scores()["scores"]["plain"] == pytest.approx(wanted, rel=1e-4)
    each = [
        metrics.evaluate(p[None], t[None], ignore_index=255)["nll"] for p, t in zip(plain[1:], truth[1:], strict=True)
    ]
    drawn = Predictive(network(given), stochbn.load("w.sbn.safetensors"), 8)(
        torch.from_numpy(PLACES), generator=torch.Generator().manual_seed(0)
    ).probs
    others = [
        metrics.evaluate(p[None], t[None], ignore_index=255)["nll"] for p, t in zip(drawn[1:], truth[1:], strict=True)
    ]
    places, differences = (truth[1:] != 255).sum((1, 2)), np.subtract(others, each)
    change = (places * differences).sum() / places.sum()
    assert scores()["change"] == pytest.approx(change, rel=1e-2, abs=1e-6)
    assert scores()["change"] == pytest.approx(scores()["scores"]["SBN"]["nll"] - wanted["nll"], rel=1e-2, abs=1e-6)
    error = (places * (differences - change)).std(ddof=1) / np.sqrt(len(places)) / places.mean()
    assert scores()["change_se"] == pytest.approx(error, rel=1e-2)


def test_what_cannot_be_known_is_null_in_the_results(module: str) -> None:
    given = options(module, "labels", X)
    np.savez("test.npz", inputs=X[:1], labels=np.array([[1, 0, 1]]))
    text = stochbn_("evaluate", *given, "--task", "multilabel", "--data", "test.npz", "--draws", 8, "--out", "r")
    assert "nan" not in text.lower()
    assert scores()["change_se"] is None
    assert scores()["scores"]["plain"]["auroc"] is None
    assert scores()["scores"]["plain"]["nll"] > 0


def test_what_does_not_fit_is_told(module: str, told: Any) -> None:  # noqa: F811
    given = options(module, "one", X)
    np.savez("test.npz", inputs=X, labels=X[:, :2])
    regression = *given, "--task", "regression", "--data", "test.npz"
    assert "expected targets [60, 1], as the network predicts, got [60, 2]" in told("evaluate", *regression)
    assert "need networks that predict one class" in told("evaluate", *regression, "--ood", "test.npz")
    assert "--task embedding has no scores" in told("evaluate", *given, "--task", "embedding", "--data", "test.npz")


def test_the_noise_of_labels_is_chosen(module: str) -> None:
    given = *options(module, "labels", X), "--task", "multilabel"
    truth = (X[:, :3] > 0).astype(np.int64)
    np.savez("test.npz", inputs=X, labels=truth)
    text = stochbn_("calibrate", *given, "--held-out", "test.npz", "--out", "c.sbn.safetensors")
    assert f"NLL of {truth.size} held-out labels" in text
    wanted = stochbn.calibrate(
        network(given), stochbn.load("w.sbn.safetensors"), [(torch.from_numpy(X), torch.from_numpy(truth))],
        task="multilabel", temperature=True,
    )  # fmt: skip
    found = stochbn.load("c.sbn.safetensors")
    assert found.batch_size == wanted.batch_size
    assert found.temperature == pytest.approx(wanted.temperature, rel=0.1)


def test_the_noise_of_places_is_chosen_without_those_that_do_not_count(module: str) -> None:
    given = options(module, "places", PLACES)
    truth = np.where(np.random.default_rng(3).random(TRUTH.shape) < 0.2, 255, TRUTH)
    np.savez("test.npz", inputs=PLACES, labels=truth)
    text = stochbn_("calibrate", *given, "--held-out", "test.npz", "--ignore", 255, "--out", "c.sbn.safetensors")
    assert f"NLL of {(truth != 255).sum():,} held-out places" in text


def test_where_there_are_no_labels_calibrate_says_what_else_to_do(module: str, told: Any) -> None:  # noqa: F811
    given = *options(module, "one", X), "--task", "embedding"
    np.savez("test.npz", inputs=X, labels=X[:, :1])
    said = told("calibrate", *given, "--held-out", "test.npz")
    assert "--batch-size" in said


def test_what_evaluate_ends_with_can_be_run(module: str) -> None:
    """A network of random weights: noise makes what it says of labels at random no better, and says so."""
    given = *options(module, "labels", X), "--task", "multilabel"
    np.savez("test.npz", inputs=X, labels=(X[:, :3] > 0).astype(np.int64))
    text = stochbn_("evaluate", *given, "--data", "test.npz", "--draws", 8)
    assert ("stochbn calibrate" in text) == ("SBN made the mean NLL worse" in text)
    assert "stochbn calibrate" in text or "Next: stochbn predict" in text


def test_outputs_are_read_where_the_options_say(module: str) -> None:
    """Classes on the last axis of a mapping's entry, which has been through a softmax."""
    x = np.random.default_rng(4).normal(size=(12, 5, 4)).astype(np.float32)
    given = options(module, "Last", x)
    np.savez("test.npz", inputs=x)
    read = "--logits", "scores", "--class-axis", "-1", "--probs"
    truth = np.random.default_rng(5).integers(0, 3, (12, 5))
    np.savez("test.npz", inputs=x, labels=truth)
    stochbn_("evaluate", *given, *read, "--dense", "--data", "test.npz", "--draws", 8, "--out", "r")
    with torch.no_grad():
        probs: Tensor = network(given)(torch.from_numpy(x))["scores"]
    wanted = metrics.evaluate(probs.movedim(-1, 1), truth)
    assert scores()["scores"]["plain"] == pytest.approx(wanted, rel=1e-4)


def test_masks_of_class_and_entropy_are_written(module: str, told: Any) -> None:  # noqa: F811
    given = options(module, "places", PLACES)
    keys = np.array(["a/one", "../../outside", "/abs", *(f"k{i}" for i in range(9))])
    np.savez("test.npz", inputs=PLACES, keys=keys)
    where = "--data", "test.npz", "--key", "keys", "--draws", 8, "--batch", 5, "--part", 5
    stochbn_("predict", *given, *where, "--out", "p.parquet", "--masks", "masks")
    prediction = Predictive(network(given), stochbn.load("w.sbn.safetensors"), 8)
    generator = torch.Generator().manual_seed(0)
    first = prediction(torch.from_numpy(PLACES[:5]), generator=generator)
    classes, entropies = (np.asarray(Image.open(f"masks/a/one.{kind}.png")) for kind in ("class", "entropy"))
    assert (classes == first.probs[0].argmax(0).numpy()).all()
    wanted = 255 * first.entropy[0].numpy() / np.log(3)
    assert np.abs(entropies - wanted).max() <= 0.51
    outside, absolute = mask_name("../../outside"), mask_name("/abs")
    assert outside.startswith("outside~")
    assert {path.name for path in Path("masks").iterdir()} == {
        "a", *(f"{name}.{kind}.png" for name in (outside, absolute, *(f"k{i}" for i in range(9)))
               for kind in ("class", "entropy")),
    }  # fmt: skip
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table("p.parquet").to_pylist()
    assert rows[1]["mask"] == outside
    assert rows[0]["entropy"] == pytest.approx(first.entropy[0].mean().item(), rel=1e-4)
    assert not list(Path("..").glob("outside*"))
    assert "they need --masks FOLDER" in told("predict", *given, *where, "--out", "q.csv")


def test_the_cost_of_an_own_network_is_measured(module: str, told: Any) -> None:  # noqa: F811
    given = options(module, "labels", X)
    np.savez("test.npz", inputs=X, labels=X[:, :3].argmax(1))
    sizes = "--batch", 8, "--batch", 20, "--reference", 20, "--repetitions", 3
    text = stochbn_("bench", *given, "--data", "test.npz", *sizes, "--out", "cost")
    assert "batch 20" in text
    first, second = json.loads(Path("cost/cost.json").read_text())["measured"]
    assert (first["batch"], second["batch"]) == (8, 20)
    for one in (first, second):
        assert min(one["call"], one["textbook"], one["every"], one["first"]) > 0
        assert one["worth"] > 1
    assert "fewer than a batch of 500" in told("bench", *given, "--data", "test.npz", "--batch", 500)
    regression = *given, "--task", "regression", "--data", "test.npz"
    assert "bench measures the accuracy of probabilities" in told("bench", *regression)


def test_unknown_objects_and_some_of_the_held_out_ones_are_options(module: str) -> None:
    given = options(module, "labels", X)
    np.savez("test.npz", inputs=X, labels=X[:, :3].argmax(1))
    np.savez("unknown.npz", inputs=4 * X[:20])
    text = stochbn_("evaluate", *given, "--data", "test.npz", "--ood", "unknown.npz", "--draws", 8, "--out", "r")
    assert "detection of the unknown by it" in text
    model = network(given)
    entropies = [Predictive(model)(torch.from_numpy(x)).entropy for x in (X, 4 * X[:20])]
    assert scores()["scores"][0]["auroc"] == pytest.approx(metrics.ood(*entropies)["auroc"], abs=1e-6)
    held_out = "--held-out", "test.npz", "--seed", 0
    stochbn_("calibrate", *given, *held_out, "--objects", 30, "--out", "some.sbn.safetensors")
    stochbn_("calibrate", *given, *held_out, "--out", "all.sbn.safetensors")
    some, every = stochbn.load("some.sbn.safetensors"), stochbn.load("all.sbn.safetensors")
    assert some.choice != every.choice


def test_a_single_object_has_scores_without_errors(module: str) -> None:
    given = options(module, "one", X)
    Path("w.sbn.safetensors").unlink()
    np.savez("test.npz", inputs=X[:1], labels=X[:1, :1])
    stochbn_("evaluate", *given, "--task", "regression", "--data", "test.npz", "--out", "r")
    assert scores()["scores"]["plain"]["rmse"] >= 0
    assert set(scores()["errors"]["plain"].values()) == {None}


def test_labels_have_the_numbers_of_the_fits_classes_in_every_command(module: str) -> None:
    """Of held-out data with the second of two classes alone, which is still the second."""
    given = *options(module, "one", X), "--task", "binary"
    columns = {f"f{i}": X[:, i] for i in range(4)}
    names = np.where(X[:, 0] > 0, "yes", "no")
    every = pd.DataFrame({**columns, "label": names})
    every.to_csv("train.csv", index=False)
    every[names == "yes"].to_csv("yes.csv", index=False)
    np.savez("yes.npz", inputs=X[names == "yes"], labels=np.ones((names == "yes").sum(), dtype=int))
    stochbn_("fit", *given, "--data", "train.csv", "--label", "label", "--batch-size", 4)
    found = {}
    for name in ("yes.csv", "yes.npz"):
        columns_of = ("--label", "labels", "--input", "inputs") if name == "yes.npz" else ()
        stochbn_("calibrate", *given, "--held-out", name, *columns_of, "--out", "c.sbn.safetensors")
        stochbn_("conformal", *given, "--held-out", name, *columns_of, "--draws", 8, "--out", "s.sbn.safetensors")
        stochbn_("evaluate", *given, "--data", name, *columns_of, "--draws", 8, "--out", "r")
        sets = stochbn.load("s.sbn.safetensors").thresholds
        assert sets is not None
        rule: Any = sets.sets
        found[name] = stochbn.load("c.sbn.safetensors").choice, rule.threshold, scores()["scores"][0]["nll"]
    assert found["yes.csv"] == found["yes.npz"]


def test_a_task_of_ones_own_is_evaluated_by_its_own_scores_and_figures(module: str, told: Any) -> None:  # noqa: F811
    given = options(module, "ordered", X)
    truth = X[:, :3].argmax(1)
    np.savez("test.npz", inputs=X, labels=truth)
    data = "--data", "test.npz", "--draws", 8
    text = stochbn_("evaluate", *given, *data, "--out", "r", "--report", "r.html")
    plain = Predictive(network(given))(torch.from_numpy(X)).probs
    steps = np.abs(plain.argmax(1).numpy() - truth)
    assert scores()["scores"]["plain"] == {"steps": pytest.approx(steps.mean())}
    assert scores()["errors"]["plain"]["steps"] == pytest.approx(steps.std(ddof=1) / np.sqrt(len(X)))
    assert "What SBN changes in the mean steps" in text
    page = Path("r.html").read_text()
    assert "How many steps off?" in page
    assert "places" not in page
    assert "without scores of their task's own" in told("evaluate", *given, *data, "--ood", "test.npz")


def test_a_score_of_ones_own_is_in_what_calibrate_prints(module: str, told: Any) -> None:  # noqa: F811
    given = options(module, "ordered", X)
    np.savez("test.npz", inputs=X, labels=X[:, :3].argmax(1))
    text = stochbn_("calibrate", *given, "--held-out", "test.npz", "--out", "c.sbn.safetensors")
    assert "rps of 60 held-out examples" in text
    choice = stochbn.load("c.sbn.safetensors").choice
    assert choice in text.replace("\n", " ")
    assert " rps " in choice
    assert "--score must be rps, got 'nll'" in told("calibrate", *given, "--held-out", "test.npz", "--score", "nll")


def test_the_figures_of_a_task_of_ones_own_are_in_the_report_about_places(module: str) -> None:
    given = options(module, "ordered_places", PLACES)
    np.savez("test.npz", inputs=PLACES, labels=TRUTH)
    stochbn_("evaluate", *given, "--dense", "--data", "test.npz", "--draws", 8, "--report", "r.html")
    page = Path("r.html").read_text()
    assert "How many steps off?" in page
    assert "places" in page
