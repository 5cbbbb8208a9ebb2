"""Networks of a run in little space, and a run folder made of them again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stochbn import MCDropout, metrics
from stochbn.paper.runner import load_parts, predict_all, run
from stochbn.paper.storing import read_stored, restore, store
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
            model = checkpoints.load(path).model
            with torch.no_grad():
                probs = model(x).softmax(1)
            if name == "dropout-0":  # which is made for passes with dropout
                probs = predict_all(MCDropout(model), images, torch.Generator().manual_seed(0)).probs
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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def kept(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "kept"
    store(finished, folder)
    return folder


def edit_recipe(folder: Path, **changes: object) -> None:
    about = json.loads((folder / "run.json").read_text())
    about["recipe"] |= changes
    (folder / "run.json").write_text(json.dumps(about))


def test_networks_are_not_stored_over_a_run(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    before = contents(tmp_path / "run")
    for folder in (tmp_path / "run", tmp_path / "link", tmp_path / "run" / "plain-0" / ".."):
        with pytest.raises(ValueError, match="is the run itself, whose trained networks would be lost"):
            store(tmp_path / "run", folder)
    with pytest.raises(ValueError, match="is not empty and holds no stored networks"):
        store(finished, tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_what_else_is_in_a_folder_is_not_lost(finished: Path, kept: Path, tmp_path: Path) -> None:
    for name in ("note.md", "plain-0/predictions.safetensors", "plain-7/network.safetensors"):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(kept, folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"mine")
        before = contents(folder)
        with pytest.raises(ValueError, match=rf"also holds '{name}', which would be lost"):
            store(finished, folder)
        assert contents(folder) == before


def test_networks_of_another_recipe_are_not_replaced(finished: Path, kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "kept")
    edit_recipe(tmp_path / "kept", seed=7)
    before = contents(tmp_path / "kept")
    with pytest.raises(ValueError, match="holds stored networks of another recipe"):
        store(finished, tmp_path / "kept")
    assert contents(tmp_path / "kept") == before


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_store_leaves_what_was_there(
    there: bool, finished: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there:
        shutil.copytree(kept, tmp_path / "kept")
    before, save, saved = contents(tmp_path), checkpoints.save, list[Path]()

    def interrupted(path: Path, *args: Any, **kwargs: Any) -> None:
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, *args, **kwargs)

    monkeypatch.setattr(checkpoints, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store(finished, tmp_path / "kept")
    assert len(saved) == 2
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] * there


def test_networks_may_be_stored_again(finished: Path, kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "kept")
    (tmp_path / "kept" / "plain-0" / "network.safetensors").write_bytes(b"old")
    store(finished, tmp_path / "kept")
    assert contents(tmp_path / "kept").keys() == contents(kept).keys()
    assert (tmp_path / "kept" / "stored.md").read_bytes() == (kept / "stored.md").read_bytes()
    ours, theirs = (
        checkpoints.load(folder / "plain-0" / "network.safetensors").model.state_dict()
        for folder in (tmp_path / "kept", kept)
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def cut(folder: Path) -> None:
    file = folder / "plain-1" / "network.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def mix(folder: Path) -> None:
    shutil.copyfile(folder / "dropout-0" / "network.safetensors", folder / "plain-1" / "network.safetensors")


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (cut, ValueError, r"kept/plain-1/network\.safetensors' is truncated"),
        (mix, ValueError, r"kept/plain-1/network\.safetensors' is of arguments .*'dropout'"),
        (lambda folder: (folder / "plain-1" / "network.safetensors").unlink(), FileNotFoundError,
         "kept' lacks the network of plain-1"),
        (lambda folder: edit_recipe(folder, members=3), FileNotFoundError, "kept' lacks the network of plain-2"),
        (lambda folder: edit_recipe(folder, network="vgg11"), ValueError, "is of network 'lenet5', .* says 'vgg11'"),
        (lambda folder: edit_recipe(folder, data="mnist"), ValueError, "is of data 'digits:0-4', .* says 'mnist'"),
    ],
    ids=["cut", "of another kind", "missing", "too few", "of another network", "of other data"],
)  # fmt: skip
def test_damaged_networks_are_refused_before_any_is_copied(
    damage: Callable[[Path], None], error: type[Exception], match: str, kept: Path, tmp_path: Path
) -> None:
    shutil.copytree(kept, tmp_path / "kept")
    damage(tmp_path / "kept")
    with pytest.raises(error, match=match):
        restore(tmp_path / "kept", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    restore(kept, tmp_path / "run")  # so that sound ones can be used


def test_a_run_of_other_networks_gets_no_file(kept: Path, tmp_path: Path) -> None:
    restore(kept, tmp_path / "run")
    (tmp_path / "run" / "dropout-0" / "network.safetensors").unlink()
    (tmp_path / "run" / "plain-1" / "network.safetensors").write_bytes(b"other")
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match="is another one than in"):
        restore(kept, tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_folders_that_share_a_network_or_a_name_are_refused(kept: Path, tmp_path: Path) -> None:
    for name in ("a/x", "b"):
        shutil.copytree(kept, tmp_path / name)
    with pytest.raises(ValueError, match=r"a/x' and .*b' have the network 'lenet5'"):
        read_stored([tmp_path / "a" / "x", tmp_path / "b"])
    shutil.copytree(kept, tmp_path / "b" / "x")
    edit_recipe(tmp_path / "b" / "x", network="vgg11")
    with pytest.raises(ValueError, match=r"a/x' and .*b/x' have the name 'x'"):
        read_stored([tmp_path / "a" / "x", tmp_path / "b" / "x"])
    assert read_stored([kept, kept]) == {kept: RECIPE}
