"""The paper's experiments end to end, in their smallest preset, and what becomes of them when the disk is full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from stochbn.cli import app

ROOT = Path(__file__).parent.parent
TINY = ["--train-images", "64", "--test-images", "16", "--draws", "2", "--jobs", "1"]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of 32x32 colour images with the column names of CIFAR-10."""
    folder = tmp_path_factory.mktemp("data") / "objects"
    folder.mkdir()
    rng = np.random.default_rng(0)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list("abcdefghij"))})
    for split, count in (("train", 200), ("test", 80)):
        labels = [i % 10 for i in range(count)]
        images = [np.clip(rng.normal(20 * k + 30, 30, (32, 32, 3)), 0, 255).astype(np.uint8) for k in labels]
        table = datasets.Dataset.from_dict({"img": images, "label": labels}, features=features)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def reproduce(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["reproduce", *arguments, *TINY])


@pytest.fixture(scope="module")
def runs(objects: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished smoke run of each network."""
    folders = {}
    for network in ("lenet5", "vgg11", "resnet18"):
        folders[network] = tmp_path_factory.mktemp("runs") / network
        data = [] if network == "lenet5" else ["--data", f"{objects}:0-4", "--unknown", f"{objects}:5-9"]
        done = reproduce(network, "--preset", "smoke", "--out", str(folders[network]), *data)
        assert done.exit_code == 0, done.output
    return folders


@pytest.mark.parametrize("network", ["lenet5", "vgg11", "resnet18"])
def test_the_smoke_preset_of_every_network_leaves_tables_and_figures(network: str, runs: dict[str, Path]) -> None:
    folder = runs[network]
    results = json.loads((folder / "results.json").read_text())
    methods = ["plain", "Deep Ensembles"] + (["Dropout"] if network != "resnet18" else [])
    assert [(s["method"], s["sbn"]) for s in results["scores"]] == [(m, sbn) for m in methods for sbn in (False, True)]
    assert results["recipe"]["network"] == network
    assert all(0 < d["mean"] < 1 and 0 < d["variance"] < 1 for d in results["kolmogorov_smirnov"].values())
    for name in ("entropy-cdf.png", "entropy-cdf.svg", "statistics.png", "statistics.svg", "results.md"):
        assert (folder / name).stat().st_size > 500


def read_notebook() -> Any:
    import nbformat

    return nbformat.read(ROOT / "notebooks" / "results.ipynb", as_version=4)  # type: ignore[no-untyped-call]


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def tables_in(notebook: Any) -> str:
    found = (output.get("data", {}) for output in outputs_of(notebook))
    return "\n\n".join(data["text/markdown"] for data in found if "text/markdown" in data)


def executed(run: Path | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook run on a run folder, or on the one that it names itself."""
    from nbclient import NotebookClient

    if run is not None:
        monkeypatch.setenv("STOCHBN_RUN", str(run))
    monkeypatch.setenv("STOCHBN_NOTEBOOK_OUT", str(folder))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")  # of tqdm, where there is no ipywidgets
    notebook = read_notebook()
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    return notebook


def test_the_notebook_runs_on_a_run(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed(runs["vgg11"], tmp_path, monkeypatch)
    assert tables_in(notebook) + "\n" == (runs["vgg11"] / "results.md").read_text()
    assert sum("image/png" in output.get("data", {}) for output in outputs_of(notebook)) == 2


def test_the_notebook_shows_what_comes_of_the_run_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, made = read_notebook(), executed(None, tmp_path, monkeypatch)
    assert tables_in(kept) == tables_in(made)
    assert tables_in(kept) + "\n" == (ROOT / "results" / "demo-digits" / "results.md").read_text()
    texts = [[output.get("data", {}).get("text/plain") for output in outputs_of(n)] for n in (kept, made)]
    assert texts[0] == texts[1]
    assert sum("image/png" in output.get("data", {}) for output in outputs_of(kept)) == 2


def test_a_full_disk_is_told_and_loses_nothing_that_is_finished(runs: dict[str, Path], tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the write fails midway."""
    folder = tmp_path / "run"
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from stochbn.__main__ import main; main()"
    )
    arguments = ["reproduce", "lenet5", "--preset", "smoke", "--out", str(folder), *TINY]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    full = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        env=environment,
        check=False,
    )
    assert full.returncode == 1
    assert "File too large" in full.stderr
    assert "Traceback" not in full.stderr
    left = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in left} == {"run.json", "training.csv"}, "a file was left half written"

    again = reproduce("lenet5", "--preset", "smoke", "--out", str(folder))
    assert again.exit_code == 0, again.output
    scores = [json.loads((path / "results.json").read_text())["scores"] for path in (folder, runs["lenet5"])]
    assert scores[0] == scores[1]


def test_a_run_folder_of_other_settings_is_refused_and_kept(runs: dict[str, Path]) -> None:
    folder = runs["lenet5"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    refused = reproduce("lenet5", "--preset", "smoke", "--out", str(folder), "--epochs", "3")
    assert isinstance(refused.exception, ValueError)
    assert "epochs is 1 there and 3 here" in str(refused.exception)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
