"""Prediction sets at the command line: conformal, and what predict, evaluate, adapt and calibrate do with them."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from scipy.stats import beta
from typer.testing import CliRunner

import stochbn
from conftest import command_output as run
from stochbn import cli
from stochbn.cli import drift
from stochbn.conformal import Sets
from stochbn.evaluation.predicting import PREDICT_BATCH
from stochbn.posteriors.thresholds import Thresholds
from stochbn.report.coverage import coverage_table, coverages, held_by
from test_cli_adapt import fitted, network, own, pictures  # noqa: F401 - fixtures

CLASSES = ["bird", "cat", "dog"]
FILE = "w.sbn.safetensors"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def held(fitted: tuple[str, ...]) -> tuple[str, ...]:  # noqa: F811
    pixels, labels = pictures(150, 7)
    labels = np.where(np.arange(150) % 9 == 0, (labels + 1) % 3, labels)  # some of which are wrong
    np.savez("held.npz", inputs=pixels.transpose(0, 3, 1, 2), labels=labels)
    return fitted


def refused(*args: object) -> str:
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    assert result.exit_code != 0
    return str(result.exception) + result.output


def sets_in_python(
    own: tuple[str, ...],  # noqa: F811
    data: str,
    *,
    by_class: bool = False,
    tolerance: float | None = None,
) -> torch.Tensor:
    """The sets of some data, with thresholds from held-out data, made without the command line.

    The tolerance is that of the data's predictions: evaluate makes all draws, in batches of its own.
    """
    model, posterior = network(own), stochbn.load(FILE)

    def probs(name: str, tolerance: float | None = None) -> Any:
        inputs = torch.from_numpy(np.load(name)["inputs"]).float() / 255
        predictive = stochbn.Predictive(model, posterior, 20, tolerance=tolerance)
        generator = torch.Generator().manual_seed(0)
        parts = torch.split(inputs, len(inputs) if tolerance is None else PREDICT_BATCH)
        return torch.cat([predictive(part, generator=generator).probs for part in parts])

    labels = torch.from_numpy(np.load("held.npz")["labels"])
    sets = stochbn.conformal.lac(probs("held.npz"), labels, 0.8, by_class=by_class)
    return sets(probs(data, tolerance))


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_predict_has_the_sets_that_python_makes(by_class: bool, ending: str, held: tuple[str, ...]) -> None:
    by = ("--by", "class") if by_class else ()
    said = run("conformal", *held, "--held-out", "held.npz", "--coverage", 0.8, "--draws", 20, *by)
    assert "Saved the posterior with them as w.sbn.safetensors" in said
    assert ("for each of 3 classes" in said) == by_class
    run("predict", *held, "--data", "like.npz", "--draws", 20, "--out", f"p.{ending}")
    if ending == "csv":
        with Path("p.csv").open(newline="") as file:
            found = [json.loads(row["set"]) for row in csv.DictReader(file)]
    else:
        found = [row["set"] for row in pyarrow.parquet.read_table("p.parquet").to_pylist()]
    expected = sets_in_python(held, "like.npz", by_class=by_class)
    assert found == [[CLASSES[k] for k in range(3) if row[k]] for row in expected.tolist()]


def test_a_scorer_gives_the_same_column(held: tuple[str, ...]) -> None:
    run("conformal", *held, "--held-out", "held.npz", "--coverage", 0.8)
    run("predict", *held, "--data", "like.npz", "--out", "p.parquet")
    expected = [row["set"] for row in pyarrow.parquet.read_table("p.parquet").to_pylist()][:4]
    scorer = stochbn.deploy.Scorer(held[1], "w.safetensors", FILE)
    images = np.empty(4, dtype=object)
    images[:] = list(np.load("like.npz")["inputs"][:4].transpose(0, 2, 3, 1))
    found = scorer({"image": images})["set"]
    assert found.shape == (4,)
    assert found.tolist() == expected


def test_the_file_has_what_was_asked_for_and_another_file_leaves_the_first_alone(held: tuple[str, ...]) -> None:
    before = Path(FILE).read_bytes()
    run("conformal", *held, "--held-out", "held.npz", "--coverage", 0.75, "--method", "raps", "--out", "c.safetensors")
    assert Path(FILE).read_bytes() == before
    found = stochbn.load("c.safetensors").thresholds
    assert found is not None
    assert isinstance(found.sets, stochbn.conformal.Sets)
    assert (found.sets.method, found.sets.coverage, found.sets.classes) == ("raps", 0.75, 3)
    assert (found.examples, found.draws, found.augment) == (150, 50, None)


def test_it_says_between_what_the_coverage_lies(held: tuple[str, ...]) -> None:
    said = run("conformal", *held, "--held-out", "held.npz", "--coverage", 0.8)
    low, high = beta.ppf([0.025, 0.975], 121, 30)  # ceil(151 * 0.8) = 121
    assert f"95 % of such thresholds cover {100 * low:.1f} to {100 * high:.1f} %" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--coverage", "1.2"), "--coverage must lie between 0 and 1"),
        (("--by", "color"), "has no column 'color'"),
        (("--method", "other"), "--method for such predictions must be lac or aps or raps or saps, got 'other'"),
        (("--mask", "1"), "--mask and --ignore are for --dense"),
        (("--dense", "--by", "class"), "--by class and --new-mix are for networks that give one class"),
        (("--new-mix", "--by", "class"), "cannot be given together"),
        (("--new-mix",), "--new-mix is for a posterior of 'stochbn adapt'"),
        (("--coverage", "0.999"), "needs at least 999 held-out"),
        (("--coverage", "0.99", "--by", "class"), "examples of class 0, got"),
        (("--task", "embedding"), "prediction sets are for --task classification, binary"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    options: tuple[str, ...], message: str, held: tuple[str, ...]
) -> None:
    before = Path(FILE).read_bytes()
    assert message in " ".join(refused("conformal", *held, "--held-out", "held.npz", *options).split())
    assert Path(FILE).read_bytes() == before


def test_evaluate_shows_coverage_overall_and_by_class(held: tuple[str, ...]) -> None:
    run("conformal", *held, "--held-out", "held.npz", "--coverage", 0.8, "--draws", 20)
    said = run("evaluate", *held, "--data", "like.npz", "--draws", 20, "--out", "r", "--report", "page.html")
    sets, labels = sets_in_python(held, "like.npz", tolerance=0), torch.from_numpy(np.load("like.npz")["labels"])
    rows = json.loads(Path("r/results.json").read_text())["sets"]
    rule = Sets("lac", 0.5, 3, 0.8)
    for row, one in zip(rows, coverages(held_by(rule, sets, labels), rule, CLASSES), strict=True):
        assert row == pytest.approx(one)
    assert "Prediction sets for 80 %, by lac" in said
    assert f"{100 * rows[0]['low']:.1f} to {100 * rows[0]['high']:.1f}" in said
    page = Path("page.html").read_text()
    assert "Prediction sets for 80 %, by lac" in page
    assert "no coverage" not in page


def test_the_intervals_of_a_coverage_are_exact() -> None:
    """Of none and of all in closed form; otherwise quantiles of beta distributions."""
    sets = torch.tensor([[1, 0, 0]] * 6 + [[0, 1, 1]] * 4 + [[0, 0, 0]] * 2).bool()
    labels = torch.tensor([0] * 6 + [0] * 4 + [2] * 2)
    rule = Sets("lac", 0.5, 3, 0.9)
    everything, first, second = coverages(held_by(rule, sets, labels), rule)
    assert (first["of"], first["examples"], first["coverage"], first["size"]) == ("0", 10, 0.6, 1.4)
    assert (first["low"], first["high"]) == pytest.approx((beta.ppf(0.025, 6, 5), beta.ppf(0.975, 7, 4)))
    assert (second["of"], second["low"], second["empty"]) == ("2", 0.0, 1.0)
    assert second["high"] == pytest.approx(1 - 0.025 ** (1 / 2))
    assert (everything["of"], everything["coverage"]) == ("all", 0.5)
    by_class = replace(rule, by_class=True, threshold=torch.ones(3).double())
    table = coverage_table([everything, first], Thresholds(by_class, 12, 50, None, 1.0, None, (0.0, 0.0)))
    assert table.title == "Prediction sets for 90 % of each class, by lac"
    assert table.rows[1] == ["0", "10", "60.0", "26.2 to 87.8", "1.40", "0.0"]


@pytest.mark.filterwarnings("ignore:both the look")
def test_after_adapting_no_coverage_is_promised(held: tuple[str, ...]) -> None:
    run("conformal", *held, "--held-out", "held.npz", "--coverage", 0.8)
    with pytest.warns(UserWarning, match="no coverage can be promised without labels"):
        said = run("adapt", *held, "--data", "dim.npy")
    assert "compute the thresholds of prediction sets again: stochbn conformal" in said
    adapted = "w.adapted.sbn.safetensors"
    said = run("predict", *held, "--data", "dim.npy", "--out", "p.csv", "--posterior", adapted)
    assert "no coverage can be promised without labels. On corrupted images" in said
    with Path("p.csv").open(newline="") as file:
        assert "set" in next(csv.reader(file))
    run("evaluate", *held, "--data", "dim.npz", "--posterior", adapted, "--report", "page.html")
    page = Path("page.html").read_text()
    assert "no coverage can be promised without labels" in page
    assert "docs/shift.md" in page
    again = "conformal", *held, "--held-out", "held.npz", "--new-mix", "--posterior", adapted
    assert "label some of the new data" in refused(*again)


def test_a_new_mix_alone_weights_the_classes(held: tuple[str, ...]) -> None:
    pixels, labels = pictures(300, 8)
    chosen = np.concatenate([np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)[:20]])
    np.save("mix.npy", pixels[chosen].transpose(0, 3, 1, 2))
    run("adapt", *held, "--data", "mix.npy", "--out", "a.safetensors")
    about = stochbn.load("a.safetensors").adaptation
    assert about is not None
    if about.moved:
        pytest.skip("chance moved the statistics")
    run("conformal", *held, "--held-out", "held.npz", "--coverage", 0.8, "--new-mix", "--posterior", "a.safetensors")
    found = stochbn.load("a.safetensors").thresholds
    assert found is not None
    assert isinstance(found.sets.threshold, torch.Tensor)
    assert not found.adapted


def test_predictions_unlike_those_of_the_thresholds_are_told(held: tuple[str, ...]) -> None:
    run("conformal", *held, "--held-out", "held.npz", "--coverage", 0.8, "--draws", 20)
    with pytest.warns(UserWarning, match="--draws 20 and no --augment: predict with these"):
        run("predict", *held, "--data", "like.npz", "--out", "p.csv", "--draws", 30)


def test_calibrating_again_drops_them(held: tuple[str, ...]) -> None:
    run("conformal", *held, "--held-out", "held.npz", "--coverage", 0.8)
    with pytest.warns(UserWarning, match="make them again with 'stochbn conformal --held-out DATA'"):
        run("calibrate", *held, "--held-out", "held.npz")
    assert stochbn.load(FILE).thresholds is None
    run("predict", *held, "--data", "like.npz", "--out", "p.csv")
    with Path("p.csv").open(newline="") as file:
        assert "set" not in next(csv.reader(file))


def test_what_is_said_of_shifted_data_was_measured() -> None:
    """The figures in the sentence are those of the page's table, rounded outwards."""
    page = (ROOT / drift.PAGE).read_text()
    (row,) = re.findall(r"^\| all severities: coverage at least 85 %.*", page, re.MULTILINE)
    after = [float(one) for one in re.findall(r"to (\d+\.\d) %", row)]
    low, high = map(int, re.findall(r"was (\d+) to (\d+) %", drift.MEASURED)[0])
    assert (low, high) == (round(min(after)), round(max(after)))
