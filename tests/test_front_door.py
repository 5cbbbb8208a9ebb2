"""From a checkpoint and a folder to scored rows at the command line, with options that are given once."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import stochbn
import stochbn.__main__
from conftest import command_output as run
from stochbn import cli
from stochbn.deploy import Scorer
from stochbn.schema import Schema

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of these networks, which have learnt nothing

NUMBER = itertools.count()
MODULE = """
import torch
from torch import nn

class Lit(nn.Module):  # as a LightningModule: the network is one of its attributes
    def __init__(self, width=8):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(width, 2),
        )
        self.loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))

    def forward(self, x):
        return self.net(x)

def bare():
    return Lit().net

def table():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    net[3].weight.data *= 8
    return net
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    name = f"front_door_{next(NUMBER)}"
    Path(f"{name}.py").write_text(MODULE)
    return name


@pytest.fixture
def told(program: Callable[..., tuple[Any, str, str]]) -> Callable[..., str]:
    """What a command says that fails."""

    def call(*args: object) -> str:
        code, output, error = program(*args)
        assert code == 1
        assert "Traceback" not in error
        return output + error

    return call


def rows(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def photos(folder: Path, count: int = 20) -> None:
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 255, (14, 18, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")


def lightning(module: str) -> dict[str, Any]:
    """A checkpoint as Lightning's, of the network under the name of its attribute."""
    torch.manual_seed(1)
    lit = __import__(module).Lit()
    return {"state_dict": lit.state_dict(), "epoch": 3, "hyper_parameters": {"width": 8}, "optimizer_states": []}


@pytest.mark.parametrize("builder", ["Lit", "bare"])
def test_three_commands_from_a_lightning_checkpoint_to_a_scored_folder(module: str, builder: str) -> None:
    checkpoint = lightning(module)
    torch.save(checkpoint, "last.ckpt")
    photos(Path("photos"))
    for leftover in ("photos/cat/._00.png", "photos/notes.txt"):
        Path(leftover).write_bytes(b"x")
    own = "--model", f"{module}:{builder}", "--weights", "last.ckpt"
    said = run("fit", *own, "--data", "photos", "--size", 12, "--mean", "0.5,0.4,0.4", "--std", 0.25)
    assert "under 'state_dict'" in said
    assert ("without the prefix 'net.' of their names; left out: loss.weight" in said) == (builder == "bare")
    assert "photos: 40 pictures; 2 classes: cat=0, dog=1; prepared by --size 12x12 --mean 0.5,0.4,0.4" in said
    assert "Left out: 1 file by their ending (.txt 1); 1 file hidden." in said
    assert "--size" not in said.split("Next", 1)[1]
    assert "2 classes: cat=0, dog=1; prepared by --size 12x12" in run("evaluate", *own, "--data", "photos")
    run("predict", *own, "--data", "photos", "--out", "p.csv", "--tolerance", 0, "--draws", 16)
    found = rows("p.csv")
    assert [row["file"] for row in found] == [f"{name}/{i:02}.png" for name in ("cat", "dog") for i in range(20)]
    net = __import__(module).bare()
    net.load_state_dict({k[4:]: v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")})
    posterior = stochbn.load("last.ckpt.sbn.safetensors")
    assert posterior.schema is not None
    assert (posterior.schema.size, posterior.schema.classes) == ((12, 12), ("cat", "dog"))
    prepare = stochbn.sources.Preprocessing((12, 12), (0.5, 0.4, 0.4), (0.25,))
    x = torch.stack([prepare(Image.open(Path("photos", row["file"]))) for row in found])
    model = net if builder == "bare" else nn.ModuleDict({"net": net})
    if builder == "bare":
        wanted = stochbn.Predictive(model.eval(), posterior, 16, tolerance=0)(
            x, generator=torch.Generator().manual_seed(0)
        )
        assert [float(row["probability"]) for row in found] == pytest.approx(wanted.probs.amax(1).tolist(), abs=1e-4)
    scorer = Scorer(f"{module}:{builder}", "last.ckpt", "last.ckpt.sbn.safetensors", draws=16)
    (answer,) = scorer.answer([Path("photos/cat/00.png").read_bytes()])
    assert answer["entropy"] == pytest.approx(float(found[0]["entropy"]), abs=0.05)


def test_the_options_are_kept_in_a_project_file_where_that_is_asked_for(module: str, told: Callable[..., str]) -> None:
    torch.save(lightning(module), "last.ckpt")
    photos(Path("photos"))
    own = "--model", f"{module}:Lit", "--model-arg", "width=8", "--weights", "last.ckpt", "--size", 12
    said = run("fit", *own, "--data", "photos", "--save-options")
    assert "Saved the options as stochbn.toml" in said
    assert Path("stochbn.toml").read_text().splitlines() == [
        f'model = "{module}:Lit"', 'model-arg = ["width=8"]', 'weights = "last.ckpt"', 'size = "12"',
    ]  # fmt: skip
    assert "stochbn evaluate --data TEST-DATA" in said
    assert "'stochbn.toml' exists already" in told("fit", *own, "--data", "photos", "--save-options")
    assert "prepared by --size 12x12" in run("predict", "--data", "photos", "--out", "p.csv")
    assert len(rows("p.csv")) == 40


@pytest.fixture
def fitted(module: str) -> tuple[str, ...]:
    """A network that was fitted to a table of named columns."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 3)).astype(np.float32)
    frame = pd.DataFrame(x, columns=["age", "dose", "mass"])
    frame["id"], frame["outcome"] = [f"p{i}" for i in range(400)], np.array(["ill", "so-so", "well"])[x.argmax(1)]
    frame.to_csv("train.csv", index=False)
    torch.save(__import__(module).table().state_dict(), "w.pt")
    own = "--model", f"{module}:table", "--weights", "w.pt"
    said = run("fit", *own, "--data", "train.csv", "--input", "dose", "--input", "age", "--input", "mass",
               "--label", "outcome")  # fmt: skip
    assert "400 rows; inputs dose, age, mass (float64); 3 classes: ill=0, so-so=1, well=2; labels in 'outcome'" in said
    assert "Left out: the column 'id' (text)." in said
    return own


def test_later_commands_take_the_columns_by_name(fitted: tuple[str, ...], told: Callable[..., str]) -> None:
    frame = pd.read_csv("train.csv")[:50]
    frame.to_csv("same.csv", index=False)
    frame[["mass", "outcome", "dose", "age"]].assign(extra=1.0).to_csv("other.csv")
    frame[["age", "mass", "dose"]].to_parquet("bare.parquet")
    for name in ("same.csv", "other.csv", "bare.parquet"):
        run("predict", *fitted, "--data", name, "--out", f"{name}.out.csv")
    same, other, bare = (
        [(row["class"], row["probability"]) for row in rows(f"{name}.out.csv")]
        for name in ("same.csv", "other.csv", "bare.parquet")
    )
    assert same == other == bare
    assert "inputs dose, age, mass" in run("evaluate", *fitted, "--data", "other.csv")
    assert "inputs dose, age, mass" in run("export", *fitted, "--data", "other.csv", "--out", "net.pt2")
    assert "inputs dose, age, mass" in run("calibrate", *fitted, "--held-out", "same.csv")
    assert "inputs age, dose, mass" in run("evaluate", *fitted, "--data", "same.csv", "--input", "age", "--input",
                                           "dose", "--input", "mass")  # fmt: skip
    frame.drop(columns="dose").to_csv("lacking.csv", index=False)
    said = told("predict", *fitted, "--data", "lacking.csv", "--out", "l.csv")
    assert "no column 'dose', which the posterior was fitted with" in said
    assert "age, mass" in said


def test_classes_keep_the_numbers_that_they_had(fitted: tuple[str, ...], told: Callable[..., str]) -> None:
    frame = pd.read_csv("train.csv")
    some = frame[frame["outcome"] != "ill"]
    some.to_csv("some.csv", index=False)
    frame.to_csv("all.csv", index=False)

    def error(name: str) -> float:
        run("evaluate", *fitted, "--data", name, "--out", f"{name}.results")
        found: float = json.loads(Path(f"{name}.results/results.json").read_text())["scores"][0]["error"]
        return found

    model = __import__(fitted[1].split(":")[0]).table().eval()
    x = torch.tensor(some[["dose", "age", "mass"]].to_numpy(), dtype=torch.float32)
    y = torch.tensor([("ill", "so-so", "well").index(name) for name in some["outcome"]])
    with torch.no_grad():
        wanted = 100 * (model(x).argmax(1) != y).double().mean().item()
    assert error("some.csv") == pytest.approx(wanted)
    frame.replace({"outcome": {"well": "fine"}}).to_csv("new.csv", index=False)
    said = told("evaluate", *fitted, "--data", "new.csv")
    assert "fitted to the classes ill, so-so, well" in said
    frame.replace({"outcome": {"ill": "a", "so-so": "b", "well": "c"}}).to_csv("other.csv", index=False)
    assert "3 classes: a=0, b=1, c=2" in run("evaluate", *fitted, "--data", "other.csv")  # names of another kind
    frame.assign(outcome=-1).to_csv("hidden.csv", index=False)
    assert "all are -1 or missing, as in public test sets" in told("evaluate", *fitted, "--data", "hidden.csv")
    run("predict", *fitted, "--data", "hidden.csv", "--out", "h.csv")
    assert len(rows("h.csv")) == 400


def test_a_row_without_a_number_is_named(fitted: tuple[str, ...], told: Callable[..., str]) -> None:
    frame = pd.read_csv("train.csv")
    frame.loc[123, "dose"] = np.nan
    frame.to_csv("hole.csv", index=False)
    assert "hole.csv: 123 has no number in the column 'dose'" in told("evaluate", *fitted, "--data", "hole.csv")
    run("predict", *fitted, "--data", "hole.csv", "--out", "h.csv")
    assert [i for i, row in enumerate(rows("h.csv")) if row["error"]] == [123]


def test_how_pictures_are_read_is_an_option_that_is_kept(module: str, told: Callable[..., str]) -> None:
    torch.save(lightning(module), "last.ckpt")
    Path("stacks").mkdir()
    generator = np.random.default_rng(0)
    for i in range(20):
        pages = [Image.fromarray(generator.integers(0, 255, (9, 9, 3), dtype=np.uint8)) for _ in range(3)]
        pages[0].save(f"stacks/{i:02}.tif", save_all=True, append_images=pages[1:])
    own = "--model", f"{module}:bare", "--weights", "last.ckpt", "--data", "stacks"
    assert ".tif has 3 pages (frames): choose one with --page" in told("fit", *own)
    run("fit", *own, "--page", 2, "--no-exif")
    schema = stochbn.load("last.ckpt.sbn.safetensors").schema
    assert schema is not None
    assert (schema.page, schema.exif) == (2, False)
    run("predict", *own, "--out", "p.csv")
    assert not any(row["error"] for row in rows("p.csv"))
    told("fit", *own, "--mean", "123.675,116.28,103.53", "--std", "58.395,57.12,57.375", "--page", 2)


def test_folders_called_by_numbers_are_told_to_be_in_the_order_of_texts(module: str) -> None:
    torch.save(lightning(module), "last.ckpt")
    for i in (2, 10):
        Path("photos", str(i)).mkdir(parents=True)
        for j in range(10):
            Image.new("RGB", (9, 9), (i, j, 0)).save(f"photos/{i}/{j}.png")
    with pytest.warns(UserWarning, match=r"'10' is class 0.*classes = \['2', '10', \.\.\.\]"):
        run("evaluate", "--model", f"{module}:bare", "--weights", "last.ckpt", "--data", "photos")


def test_a_cache_that_cannot_be_written_is_told_as_that(
    module: str, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("x")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("file/cache"))
    pd.DataFrame({"a": [0.5] * 20, "b": [1.5] * 20, "c": [1.0] * 20}).to_parquet("t.parquet")
    own = "fit", "--model", f"{module}:table", "--data", "t.parquet", "--out", "p.safetensors"
    assert "where copies of data are kept, cannot be written" in told(*own)


def test_a_file_name_cannot_control_the_terminal(module: str) -> None:
    torch.save(lightning(module), "last.ckpt")
    photos(Path("photos\x1b[2J"), 10)
    Path("photos\x1b[2J", "cat", "00.png").rename(Path("photos\x1b[2J", "cat", "\x1b]0;x\x07\u202e.png"))
    Path("photos\x1b[2J", "cat", "n.\x1b[31m").write_text("x")
    own = "--model", f"{module}:Lit", "--weights", "last.ckpt", "--data", "photos\x1b[2J"
    for command in (("fit", *own), ("predict", *own, "--out", "p.csv"), ("evaluate", *own)):
        result = CliRunner().invoke(cli.app, [str(part) for part in command])
        assert result.exit_code == 0, result.output
        assert not {"\x1b", "\x07", "\u202e"} & set(result.output)
    assert len(rows("p.csv")) == 20


def test_a_schema_comes_back_from_a_file(fitted: tuple[str, ...]) -> None:
    posterior = stochbn.load("w.sbn.safetensors")
    assert isinstance(posterior.schema, Schema)
    assert Schema.from_description(json.loads(json.dumps(posterior.schema.description()))) == posterior.schema
    assert posterior.rescale(64).schema == posterior.schema
    wrongs: list[Any] = [[], {"inputs": [1]}, {"size": ["a", 1]}, {"what": 1}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="schema"):
            Schema.from_description(wrong)


# ---------------------------------------------------------------- what networks are given, and what is around them


class TimeFirst(nn.Module):
    """A network of batches [T, N, F]."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.norm, self.head = nn.GRU(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.gru(x)[0][-1]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [(30, 20, 3), (16, 40, 3), (24, 16, 3), (16, 16, 3)])
def test_time_on_the_first_axis_is_refused_with_what_to_pass(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"batch_first=False.*batch_size=None"):
        stochbn.fit(TimeFirst(), [torch.randn(shape)] * 3)
    posterior = stochbn.fit(TimeFirst(), [torch.randn(shape)] * 3, batch_size=None, reference=False)
    assert posterior.mini_batches == 3


def test_sequences_with_the_examples_first_are_not_refused() -> None:
    class ExamplesFirst(TimeFirst):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(0, 1))

    for shape in ((16, 16, 3), (64, 16, 3), (16, 2, 3)):
        stochbn.fit(ExamplesFirst(), [torch.randn(shape)] * 3)


class Trainer(nn.Module):
    """Something around a network whose ``train`` trains, as ultralytics' YOLO."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def train(self, trainer: Any = None, **options: Any) -> Any:  # type: ignore[override]
        raise AssertionError("a training was started")

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]


def test_what_is_around_a_network_is_refused_with_the_network_in_it() -> None:
    with pytest.raises(TypeError, match=r"Trainer\(\.\.\.\)\.model"):
        stochbn.fit(Trainer(), [torch.randn(32, 3)])
    with pytest.raises(TypeError, match=r"Trainer\(\.\.\.\)\.model"):
        stochbn.Predictive(Trainer())

    class Learner:
        model = Trainer().model

    with pytest.raises(TypeError, match=r"got Learner; pass its \.model"):
        stochbn.fit(Learner(), [torch.randn(32, 3)])  # type: ignore[call-overload]


def test_a_train_of_ones_own_that_sets_the_mode_is_taken() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True, freeze: bool = False) -> Frozen:
            super().train(mode)
            return self

    class Named(nn.Sequential):
        def train(self, on: bool = True) -> Named:
            super().train(on)
            return self

    for kind in (Frozen, Named):
        stochbn.fit(kind(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), [torch.randn(64, 3)])


@pytest.mark.parametrize(
    ("problem", "name"), [("multi_label_classification", "multilabel"), ("regression", "regression"), (None, "x")]
)
def test_the_task_is_what_the_config_of_a_network_says(problem: str | None, name: str) -> None:
    class Config:
        problem_type = problem

    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    net.config = Config()  # type: ignore[assignment]
    predictive = stochbn.Predictive(net, stochbn.fit(net, [torch.randn(64, 3)]))
    assert predictive.task.name == (name if problem else "classification")
    assert stochbn.Predictive(net, task="binary").task.name == "binary"


def test_a_variance_that_half_precision_cannot_hold_is_told_as_that() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).half()
    with pytest.raises(ValueError, match=r"activations that fit float16.*model\.float\(\)"):
        stochbn.fit(net, [1000 * torch.randn(64, 3).half()])


def test_scores_do_not_depend_on_the_default_type() -> None:
    generator = np.random.default_rng(0)
    probs, labels = generator.dirichlet([1] * 4, 300), generator.integers(0, 4, 300)
    many = generator.integers(0, 2, (300, 4))
    metrics = stochbn.metrics
    found = []
    for dtype in (torch.float32, torch.float64, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            found.append([metrics.evaluate(probs, labels), metrics.ood(probs[:100, 0], probs[100:, 1]),
                          metrics.multilabel(probs, many), metrics.class_ece(probs, labels).tolist(),
                          metrics.calibrated_nll(probs, labels)])  # fmt: skip
        finally:
            torch.set_default_dtype(torch.float32)
    assert found[0] == found[1] == found[2]


def test_columns_of_pandas_are_taken_by_position() -> None:
    generator = np.random.default_rng(0)
    probs, labels = generator.dirichlet([1] * 3, 60), generator.integers(0, 3, 60)
    index = generator.permutation(60)
    frame, series = pd.DataFrame(probs, index=index), pd.Series(labels, index=index)
    for kind in ("int64", "uint8", "uint32", "Int64"):
        assert stochbn.metrics.evaluate(frame, series.astype(kind)) == stochbn.metrics.evaluate(probs, labels)
    assert stochbn.conformal.aps(frame, series, 0.9).threshold == stochbn.conformal.aps(probs, labels, 0.9).threshold
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    x = torch.tensor(probs, dtype=torch.float32)
    posterior = stochbn.fit(net, [x])
    first, second = (stochbn.calibrate(net, posterior, [(x, y)]).temperature for y in (torch.tensor(labels), series))
    assert first == second
    with pytest.raises(TypeError, match=r"torch\.tensor\(x\.to_numpy\(\)"):
        stochbn.Predictive(net, posterior)(frame)
