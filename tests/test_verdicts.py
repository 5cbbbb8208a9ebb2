"""Verdicts on the paper's claims, and the committed page of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import command_output
from stochbn.evaluation.predicting import predict_all
from stochbn.metrics import evaluate, ood
from stochbn.paper.recipes import Member
from stochbn.paper.report import read_recipe
from stochbn.paper.runner import fit_images, fit_member, load_parts, run
from stochbn.paper.verdicts import KEPT, NAMES, page, verdict
from stochbn.posteriors import FactorizedLog
from stochbn.predictions import entropy
from stochbn.predictive import Predictive
from stochbn.sources import checkpoints
from test_claims import RECIPE

RESULTS = Path(__file__).parent.parent / "results"
STORED = sorted(path.parent for path in RESULTS.glob("trained/*/run.json"))


@pytest.mark.parametrize(
    ("change", "sign", "nats", "wanted"),
    [
        (-0.021, -1, True, "holds"),
        (-0.019, -1, True, "open"),
        (-0.0019, -1, True, "no difference"),
        (-0.019, -1, False, "no difference"),
        (0.021, -1, True, "opposite"),
        (0.021, 1, False, "holds"),
        (-0.021, 1, False, "opposite"),
        (0.019, -2, False, "holds"),
        (0.021, -2, False, "opposite"),
    ],
)
def test_a_verdict_takes_two_standard_errors(change: float, sign: int, nats: bool, wanted: str) -> None:
    assert verdict(change, 0.01, sign, nats=nats) == wanted


@pytest.fixture(scope="module")
def claimed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two commands leave of a small run."""
    folder = tmp_path_factory.mktemp("claims")
    run(RECIPE, folder / "run")
    assert "run.json, stored.md" in command_output("paper", "store", folder / "run", "--out", folder / "trained")
    made = command_output(
        "paper", "claims", folder / "trained", "--out", folder / "results", "--runs", folder / "runs", "--jobs", 1
    )
    for name in ("plain-0", "plain-1", "dropout-0", "claims"):
        assert f" trained, {name}: predicting is done" in made
    assert "training" not in made
    return folder


def test_one_command_makes_the_page_of_stored_networks(claimed: Path) -> None:
    results = claimed / "results"
    assert {path.name for path in results.iterdir()} == {"claims.md", "claims.png", "lenet5-paper"}
    assert {path.name for path in (results / "lenet5-paper").iterdir()} == set(KEPT)
    text = (results / "claims.md").read_text()
    assert "| claim | of | LeNet-5 | in short |" in text
    change = json.loads((results / "lenet5-paper" / "claims.json").read_text())["changes"]["Dropout"]["SBN - plain"]
    shown = f"{change['nll_change']:+.4f} ± {change['nll_change_se']:.4f}"
    (row,) = (line for line in text.splitlines() if line.startswith("| SBN lowers the NLL | Dropout |"))
    assert shown in row
    assert (results / "lenet5-paper" / "claims.md").read_text().strip() in text


def test_what_is_done_is_not_done_again(claimed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    shutil.copytree(claimed, folder)
    files = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    command_output("paper", "claims", folder / "trained", "--out", folder / "results", "--runs", folder / "runs")
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == files
    assert (folder / "results" / "claims.md").read_bytes() == (claimed / "results" / "claims.md").read_bytes()


def test_every_network_has_a_column_and_what_it_lacks_a_dash(claimed: Path, tmp_path: Path) -> None:
    for name in NAMES:
        shutil.copytree(claimed / "results" / "lenet5-paper", tmp_path / f"{name}-paper")
    file = tmp_path / "resnet18-paper" / "claims.json"
    about: dict[str, Any] = json.loads(file.read_text())
    for key in ("scores", "changes"):
        del about[key]["Dropout"]
    about["changes"]["one network"]["SBN - plain"] |= {"nll_change": -1.0, "nll_change_se": 0.1}
    file.write_text(json.dumps(about))
    file = tmp_path / "vgg11-paper" / "claims.json"
    about["changes"]["one network"]["SBN - plain"] |= {"nll_change": 1.0}
    file.write_text(json.dumps(about))
    table = page(tmp_path)
    assert list(table.columns) == ["claim", "of", "LeNet-5", "VGG-11", "ResNet-18", "in short"]
    rows = {(row[0], row[1]): row[2:] for row in table.rows}
    one = rows["SBN lowers the NLL", "one network"]
    assert one[1:3] == ["opposite: +1.0000 ± 0.1000", "holds: -1.0000 ± 0.1000"]
    assert one[3].startswith("**holds** on")
    assert "ResNet-18" in one[3]
    assert "VGG-11" not in one[3]
    assert rows["SBN lowers the NLL", "Dropout"][1:3] == ["-", "-"]


def test_folders_without_networks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        command_output("paper", "claims", tmp_path / "nowhere", "--out", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_two_runs_of_one_network_are_refused_before_any_work(claimed: Path, tmp_path: Path) -> None:
    shutil.copytree(claimed / "trained", tmp_path / "other")
    out, runs = tmp_path / "results", tmp_path / "runs"
    with pytest.raises(ValueError, match="have the network 'lenet5', so results of one would replace the other's"):
        command_output("paper", "claims", claimed / "trained", tmp_path / "other", "--out", out, "--runs", runs)
    assert not out.exists()
    assert not runs.exists()


def test_no_results_make_no_page(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no results of claims"):
        page(tmp_path)


def test_the_committed_page_is_that_of_the_committed_numbers(tmp_path: Path) -> None:
    made = [path.parent for path in RESULTS.glob("*-paper/claims.json")]
    assert {path.name for path in made} == {f"{path.name}-paper" for path in STORED}
    for folder in made:
        shutil.copytree(folder, tmp_path / folder.name)
    page(tmp_path)
    assert (tmp_path / "claims.md").read_text() == (RESULTS / "claims.md").read_text()


def test_stored_networks_are_small() -> None:
    sizes = [path.stat().st_size for path in (RESULTS / "trained").rglob("*.safetensors")]
    assert sizes
    assert max(sizes) < 3e6
    assert sum(sizes) < 12 * 2**20


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.skipif("STOCHBN_DATA" not in os.environ, reason="set STOCHBN_DATA to a folder with the data")
@pytest.mark.parametrize("folder", STORED, ids=lambda path: path.name)
def test_stored_networks_give_the_committed_numbers_again(folder: Path) -> None:
    recipe = read_recipe(folder)
    parts = load_parts(recipe)
    about = json.loads((RESULTS / f"{recipe.network}-paper" / "results.json").read_text())
    committed = {row["sbn"]: row for row in about["scores"] if row["method"] == "plain"}
    model = checkpoints.load(folder / "plain-0" / "network.safetensors").model
    member = Member("plain", 0)
    posterior = fit_member(recipe, member, model, fit_images(recipe, member, parts["train"]))
    assert isinstance(posterior, FactorizedLog)
    for wanted, predictive, prefix in (
        (committed[False], Predictive(model), ""),
        (committed[True], Predictive(model, posterior.median(), 1), "median_"),
    ):
        known, unknown = (predict_all(predictive, parts[part]).probs for part in ("known", "unknown"))
        found = evaluate(known, parts["known"].labels) | ood(entropy(known), entropy(unknown))
        for key, digits in (("error", 2), ("nll", 4), ("ece", 4), ("auroc", 4)):
            assert found[key] == pytest.approx(wanted[f"{prefix}{key}"], abs=0.6 * 10**-digits), f"{prefix}{key}"
