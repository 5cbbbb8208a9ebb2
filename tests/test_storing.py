"""Networks of a run in little space, and a run folder made of them again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stochbn import metrics
from stochbn.paper.runner import load_parts, run
from stochbn.paper.storing import restore, store
from stochbn.sources import checkpoints
from test_runner import NAMES, TINY

RECIPE = replace(TINY, train_images=160, held_out=0.1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(RECIPE, folder)
    return folder


def test_stored_networks_are_measured_on_images_that_were_held_out(finished: Path, tmp_path: Path) -> None:
    table = store(finished, tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {*NAMES, "run.json", "stored.json", "stored.md"}
    found = json.loads((tmp_path / "kept" / "stored.json").read_text())
    images = load_parts(RECIPE)["held-out"]
    assert found["images"] == len(images)
    x, labels = next(images.batches(len(images)))
    for name, row in found["networks"].items():
        file = tmp_path / "kept" / name / "network.safetensors"
        assert row["bytes"] == file.stat().st_size
        assert (tmp_path / "kept" / name / "training.csv").read_bytes() == (
            finished / name / "training.csv"
        ).read_bytes()
        for path, key in ((finished / name / "network.safetensors", "trained"), (file, "stored")):
            with torch.no_grad():
                probs = checkpoints.load(path).model(x).softmax(1)
            assert row[key]["nll"] == pytest.approx(metrics.evaluate(probs, labels)["nll"], rel=1e-4)
        assert row["nll_change"] == pytest.approx(row["stored"]["nll"] - row["trained"]["nll"], abs=1e-6)
    assert [row[0] for row in table.rows] == list(NAMES)
    assert table.markdown() in (tmp_path / "kept" / "stored.md").read_text()


def test_a_run_of_stored_networks_trains_nothing(finished: Path, tmp_path: Path) -> None:
    store(finished, tmp_path / "kept")
    assert restore(tmp_path / "kept", tmp_path / "again") == RECIPE
    stages = set()
    run(RECIPE, tmp_path / "again", progress=lambda name, stage, done, total: stages.add(stage))
    assert "train" not in stages
    assert {"fit", "predict"} <= stages
    restore(tmp_path / "kept", tmp_path / "again")  # of the same networks it may be
    for name in NAMES:
        kept, used = (tmp_path / folder / name / "network.safetensors" for folder in ("kept", "again"))
        assert kept.read_bytes() == used.read_bytes()


def test_a_run_of_other_networks_is_refused(finished: Path, tmp_path: Path) -> None:
    store(finished, tmp_path / "kept")
    with pytest.raises(ValueError, match=r"is another one than in .*delete the folder"):
        restore(tmp_path / "kept", finished)


def test_what_cannot_be_stored_is_refused_before_anything_is_written(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        store(tmp_path, tmp_path / "kept")
    run(TINY, tmp_path / "all")
    with pytest.raises(ValueError, match="trained on all images"):
        store(tmp_path / "all", tmp_path / "kept")
    restore(finished, tmp_path / "copy")
    (tmp_path / "copy" / "plain-1" / "network.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="plain-1"):
        store(tmp_path / "copy", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
