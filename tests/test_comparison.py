from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import stochbn
from stochbn import augment, metrics
from stochbn.files import read_tensors
from stochbn.paper.comparison import METHODS, Settings, compare, tabulate
from stochbn.paper.redrawing import redraw
from stochbn.paper.runner import PREDICTIONS, fit_posterior, load_parts, predict_all, run
from stochbn.sources import checkpoints
from test_runner import TINY, contents, interrupted

FORMAT = "stochbn.comparison/1"
RECIPE = replace(TINY, dropout=None, train_images=160, held_out=0.2, unknown="digits:5-9")
pytestmark = pytest.mark.filterwarnings("ignore:the noise of the smallest")
SETTINGS = Settings(members=2, draws=3, fit_images=128, held_out=30, unknown=20, exact=10)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its comparison."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(RECIPE, folder)
    seen: list[tuple[int, int]] = []
    compare(folder, SETTINGS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 18) for done in range(19)]
    return folder


def test_predictions_are_those_of_the_posterior_fitted_and_calibrated_by_hand(finished: Path) -> None:
    parts = load_parts(RECIPE)
    model = checkpoints.load(finished / "plain-1" / "network.safetensors").model
    seed = next(RECIPE.schedule(member).seed for member in RECIPE.all_members() if member.name == "plain-1")
    train = parts["train"].shuffled(seed).take(torch.arange(128))
    posterior = fit_posterior(model, train, 16, seed, kind="joint")
    held_out = parts["held-out"].take(torch.arange(30))
    for method, wanted in {
        "joint": posterior,
        "joint, calibrated": stochbn.calibrate(model, posterior, held_out.batches(250), seed=seed, **NOISES),
        "joint, recentred": posterior.recentre(model),
    }.items():
        file = finished / "plain-1" / "comparison" / f"{method.replace(', ', '-')}.safetensors"
        tensors, about = read_tensors(file, FORMAT)
        assert about["batch_size"] == wanted.batch_size
        generator = torch.Generator().manual_seed(seed)
        predictive = stochbn.Predictive(model, wanted, 3)
        torch.testing.assert_close(tensors["known"].exp(), predict_all(predictive, parts["known"], generator).probs)
        assert len(tensors["unknown"]) == 20


NOISES: Any = {"batch_sizes": [4, 8, 16, 32, 64, math.inf], "temperature": False}
"""What the comparison's methods "calibrated" choose among."""


def test_with_an_augmentation_every_draw_changes_its_input(finished: Path) -> None:
    settings = replace(SETTINGS, augment="shift:1")
    tables = compare(finished, settings)
    parts = load_parts(RECIPE)
    model = checkpoints.load(finished / "plain-0" / "network.safetensors").model
    seed = next(RECIPE.schedule(member).seed for member in RECIPE.all_members() if member.name == "plain-0")
    shift = augment.shift(1)
    train = parts["train"].shuffled(seed).take(torch.arange(128))
    posterior = fit_posterior(model, train, 16, seed, kind="joint", augment=shift)
    held_out = parts["held-out"].take(torch.arange(30)).batches(250)
    posterior = stochbn.calibrate(model, posterior, held_out, augment=shift, seed=seed, **NOISES)
    file = finished / "plain-0" / "comparison-augmented" / "joint-calibrated.safetensors"
    tensors, about = read_tensors(file, FORMAT)
    assert about["batch_size"] == posterior.batch_size
    predictive = stochbn.Predictive(model, posterior, 3, tolerance=0, augment=shift)
    probs = predict_all(predictive, parts["known"], torch.Generator().manual_seed(seed)).probs
    torch.testing.assert_close(tensors["known"].exp(), probs)
    assert not (finished / "plain-0" / "comparison-augmented" / "exact.safetensors").exists()
    assert "input drawn too (shift:1)" in tables[0].title
    assert (finished / "comparison-augmented.md").exists()
    with pytest.raises(ValueError, match="unknown augmentation"):
        replace(SETTINGS, augment="turn")


def test_tables_are_of_the_stored_predictions(finished: Path) -> None:
    found = json.loads((finished / "comparison.json").read_text())
    assert list(found["methods"]) == ["plain", *METHODS, "ensemble of 1", "ensemble of 2"]
    stored = [read_tensors(finished / f"plain-{i}" / "predictions.safetensors", PREDICTIONS)[0] for i in (0, 1)]
    labels = stored[0]["labels"]
    ensemble = (stored[0]["plain.known"].exp() + stored[1]["plain.known"].exp()) / 2
    row, same = found["methods"]["ensemble of 2"]
    assert row == same, "both networks, whichever comes first"
    assert row["nll"] == pytest.approx(metrics.evaluate(ensemble, labels)["nll"])
    assert row["calibrated_nll"] == pytest.approx(metrics.calibrated_nll(ensemble, labels)["nll"])
    singles = [metrics.calibrated_nll(tensors["plain.known"].exp(), labels)["nll"] for tensors in stored]
    assert [r["calibrated_nll"] for r in found["methods"]["plain"]] == pytest.approx(singles)
    reached = [sum(singles) / 2, row["calibrated_nll"]]
    joint = found["methods"]["joint"]
    mean = sum(r["calibrated_nll"] for r in joint) / 2
    equivalent = metrics.deep_ensemble_equivalent(mean, reached)
    assert joint[0]["dee"] == (None if math.isinf(equivalent) else pytest.approx(equivalent))
    assert found["methods"]["plain"][0]["dee"] == 1


def test_the_figure_is_drawn_again_from_its_numbers(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "comparison.json", tmp_path)
    png, _ = redraw(tmp_path)
    assert png.read_bytes() == (finished / "comparison.png").read_bytes()


def test_the_distance_of_exact_inference_to_itself_is_zero_and_that_of_others_is_not(finished: Path) -> None:
    found = json.loads((finished / "comparison.json").read_text())["beside_exact"]
    assert found["exact"][0]["auroc"] > 0.5
    assert [row["kl"] for row in found["exact"]] == pytest.approx([0, 0], abs=1e-6)
    assert all(row["kl"] > 1e-4 for method in ("plain", *METHODS) for row in found[method])
    exact = read_tensors(finished / "plain-0" / "comparison" / "exact.safetensors", FORMAT)[0]["known"].double()
    joint = read_tensors(finished / "plain-0" / "comparison" / "joint.safetensors", FORMAT)[0]["known"].double()
    slow = sum(
        (e.exp() * (e - j)).sum().item() for e, j in zip(exact, joint[:10], strict=True)
    ) / 10  # fmt: skip
    assert found["joint"][0]["kl"] == pytest.approx(slow, rel=1e-3)


def test_what_is_there_is_not_made_again(finished: Path) -> None:
    before = contents(finished)
    again = finished / "plain-0" / "comparison" / "empirical.safetensors"
    wanted, _ = read_tensors(again, FORMAT)
    again.unlink()
    seen: list[tuple[int, int]] = []
    compare(finished, SETTINGS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(17, 18), (18, 18)]
    after = contents(finished)
    assert after.keys() == before.keys()
    for part, logs in read_tensors(again, FORMAT)[0].items():
        torch.testing.assert_close(logs.exp(), wanted[part].exp())
    changed = {name for name in before if after[name] != before[name]}
    assert {name for name in changed if name.endswith(".safetensors")} == {"plain-0/comparison/empirical.safetensors"}


def test_fewer_networks_of_the_same_comparison_need_no_new_predictions(finished: Path) -> None:
    seen: list[tuple[int, int]] = []
    compare(finished, replace(SETTINGS, members=1), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(9, 9)]
    assert len(json.loads((finished / "comparison.json").read_text())["methods"]["joint"]) == 1
    tabulate(finished, SETTINGS)


def test_other_settings_are_refused_and_missing_predictions_are_told(finished: Path) -> None:
    with pytest.raises(ValueError, match="made with other settings"):
        compare(finished, replace(SETTINGS, draws=4))
    file = finished / "plain-0" / "comparison" / "exact.safetensors"
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(FileNotFoundError, match="lacks 'exact' of plain-0"):
        tabulate(finished, SETTINGS)
    file.write_bytes(content)


def test_runs_that_cannot_be_compared_are_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run folder"):
        compare(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="has 2 plain networks, 3 were asked for"):
        compare(finished, replace(SETTINGS, members=3))
    about = json.loads((finished / "run.json").read_text())
    about["recipe"]["held_out"] = 0.0
    (tmp_path / "run.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="--held-out"):
        compare(tmp_path, SETTINGS)
    about["recipe"] |= {"held_out": 0.2, "evaluate_on": "held-out"}
    (tmp_path / "run.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="none left to calibrate on"):
        compare(tmp_path, SETTINGS)
    about["recipe"]["evaluate_on"] = "test"
    (tmp_path / "run.json").write_text(json.dumps(about))
    with pytest.raises(FileNotFoundError, match="predictions"):
        compare(tmp_path, SETTINGS)
    for damaged in ("{}", "[", '{"recipe": {"colour": 1}}'):
        (tmp_path / "run.json").write_text(damaged)
        with pytest.raises(ValueError, match="damaged or not of a run"):
            compare(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        Settings(draws=0)


def test_a_method_that_no_ensemble_reaches_is_said_to_be_more(finished: Path) -> None:
    found = json.loads((finished / "comparison.json").read_text())["methods"]
    text = (finished / "comparison.md").read_text()
    for method, rows in found.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {method} |"))
        value = rows[0]["dee"]
        assert line.split("|")[-2].strip() == ("more" if value is None else f"{value:.2f}")


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups, which this system does not have")
def test_processes_that_are_interrupted_as_they_start_say_nothing(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    for stored in folder.glob("*/comparison"):
        shutil.rmtree(stored)
    call = "from stochbn.paper.comparison import Settings, compare\n"
    call += f"    compare(Path({str(folder)!r}), Settings(2, 3, 128, 30, 20, 10), jobs=2)"
    error = interrupted(call, tmp_path)
    assert error.count("Traceback") == 1, error
    assert error.splitlines()[-1] == "KeyboardInterrupt"
    assert len(list(folder.glob("*/comparison/*"))) < 18
