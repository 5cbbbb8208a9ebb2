"""Exported files give what a slow loop over their draws gives, and hold everything once."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import stochbn
from conftest import CASES, Case, Wrapped, convnet, mlp, normal, seeded, settled, slow_entropy, slow_probs
from stochbn import cli
from stochbn.export import Export, ExportError
from stochbn.schema import Schema
from stochbn.sources import architectures, checkpoints
from stochbn.sources.pictures import Preprocessing

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

DRAWS = 3


def run_onnx(path: Path, *inputs: Tensor, **named: Tensor) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]
    given = {**dict(zip(names, inputs, strict=False)), **named}
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    return {value.name: torch.from_numpy(found) for value, found in zip(session.get_outputs(), outputs, strict=True)}


def operations(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def fitted(model: nn.Module, *shape: int) -> stochbn.Posterior:
    batches = [1.5 * normal(16, *shape, seed=seed) + 0.5 for seed in range(5)]
    return stochbn.fit(model, batches, 8, kind="factorized")


class Residual(nn.Module):
    """Adds what a batch norm has seen to what it has not, and shares a batch norm between branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x).relu()
        hidden = stem + self.branch(self.norm(stem).relu())
        hidden = torch.cat([hidden, self.norm(hidden) * stem], 3)
        out: Tensor = self.head(hidden.flatten(2).mean(2))
        return out


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, features: Tensor, kind: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.norm(features).relu() + self.embed(kind))}


class Attending(nn.Module):
    """Objects of a batch look at each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))
        out: Tensor = self.head((hidden @ hidden.T).softmax(1) @ hidden)
        return out


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out if x.sum() > 0 else -out


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.register_buffer("passes", torch.zeros(()))

    passes: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        out: Tensor = self.body(x)
        return out


class Pretending(nn.Module):
    """Is another network where it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out * 2 if torch.compiler.is_exporting() else out


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


KINDS = ["BatchNorm1d [N, C, L]", "BatchNorm3d", "channels last", "called twice, two names", "dense output", "residual"]


@pytest.mark.parametrize("name", KINDS)
def test_onnx_gives_what_a_slow_loop_over_its_draws_gives(name: str, tmp_path: Path) -> None:
    case = {**CASES, "residual": Case(Residual, (2, 6, 5), {})}[name]
    model = case.model()
    posterior = fitted(model, *case.shape)
    found = stochbn.export.onnx(model, posterior, tmp_path / "x.onnx", case.inputs(4), DRAWS, seed=7)
    assert not found.repeated
    x = case.inputs(9, seed=5)
    mean, expected, _ = slow_probs(model, posterior, DRAWS, 7, x)
    entropy = slow_entropy(mean)
    outputs = run_onnx(found.path, x)
    assert list(outputs) == ["probs", "entropy", "mutual_information"] == list(found.outputs)
    torch.testing.assert_close(outputs["probs"].double(), mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs["entropy"].double(), entropy, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs["mutual_information"].double(), entropy - expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["BatchNorm2d", "called twice, two names"])
def test_pt2_gives_what_a_slow_loop_over_its_draws_gives(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.model()
    posterior = fitted(model, *case.shape)
    found = stochbn.export.pt2(model, posterior, tmp_path / "x.pt2", case.inputs(4), DRAWS, seed=7)
    x = case.inputs(9, seed=5)
    mean, *_ = slow_probs(model, posterior, DRAWS, 7, x)
    outputs = torch.export.load(found.path).module()(x)
    assert list(outputs) == ["probs", "entropy", "mutual_information"]
    torch.testing.assert_close(outputs["probs"].double(), mean, rtol=0, atol=1e-5)
    assert found.difference < 1e-4
    assert found.bytes == found.path.stat().st_size


@pytest.mark.parametrize(
    ("name", "arguments", "multiplications"),
    [
        ("lenet5", {"size": 16}, {"Conv": 2, "Gemm": 2}),
        ("vgg11", {"width": 0.05}, {"Conv": 8, "Gemm": 1}),
        ("resnet18", {"width": 0.05}, {"Conv": 20, "Gemm": 1}),
    ],
)
def test_the_networks_of_the_paper_have_every_layer_once(
    name: str, arguments: dict[str, Any], multiplications: dict[str, int], tmp_path: Path
) -> None:
    model = architectures.build(name, **arguments).eval()
    shape = (1, 16, 16) if name == "lenet5" else (3, 32, 32)
    found = stochbn.export.onnx(model, fitted(model, *shape), tmp_path / "x.onnx", normal(2, *shape), DRAWS)
    layers = operations(found.path)
    assert {layer: layers[layer] for layer in multiplications} == multiplications
    assert found.difference < 1e-4


def test_weights_are_in_the_file_once(tmp_path: Path) -> None:
    model = settled(mlp(4, 200), 4)
    posterior = fitted(model, 4)
    held = 4 * sum(parameter.numel() for parameter in model.parameters())
    found = stochbn.export.onnx(model, posterior, tmp_path / "x.onnx", normal(2, 4), 6)
    assert held < found.bytes < held + 6 * 8 * posterior.channels + 20_000
    assert list(tmp_path.iterdir()) == [found.path]


def test_objects_that_affect_each_other_get_a_part_of_the_graph_for_each_draw(tmp_path: Path) -> None:
    model = settled(Attending(), 4)
    posterior = fitted(model, 4)
    found = stochbn.export.onnx(model, posterior, tmp_path / "x.onnx", normal(5, 4), DRAWS)
    assert found.repeated
    assert operations(found.path)["Gemm"] == 1 + DRAWS  # what is before the batch norm, once
    x = normal(7, 4, seed=3)
    mean, *_ = slow_probs(model, posterior, DRAWS, 0, x)
    torch.testing.assert_close(run_onnx(found.path, x)["probs"].double(), mean, rtol=0, atol=1e-5)


def test_the_batch_axis_is_free_and_the_file_says_what_it_is_of(tmp_path: Path) -> None:
    model = settled(convnet(), 2, 6, 5)
    posterior = replace(fitted(model, 2, 6, 5), temperature=1.5)
    stochbn.export.onnx(model, posterior, tmp_path / "x.onnx", normal(1, 2, 6, 5), DRAWS, seed=3)
    file = onnx.load(tmp_path / "x.onnx")
    onnx.checker.check_model(file, full_check=True)
    shapes = {
        value.name: [length.dim_param or length.dim_value for length in value.type.tensor_type.shape.dim]
        for value in (*file.graph.input, *file.graph.output)
    }
    assert shapes == {
        "input": ["batch", 2, 6, 5], "probs": ["batch", 3], "entropy": ["batch"], "mutual_information": ["batch"],
    }  # fmt: skip
    about = {entry.key: entry.value for entry in file.metadata_props}
    assert about["stochbn.draws"] == "3"
    assert about["stochbn.temperature"] == "1.5"
    assert str(Path(__file__).parent).encode() not in (tmp_path / "x.onnx").read_bytes()
    for count in (1, 2, 11):
        assert run_onnx(tmp_path / "x.onnx", normal(count, 2, 6, 5))["probs"].shape == (count, 3)
    assert not {"stochbn.classes", "stochbn.preprocess"} & about.keys(), "what is not known is not said"


def metadata(path: Path) -> dict[str, Any]:
    """What a file says of itself, read from JSON where it is a list or mapping."""
    if path.suffix == ".onnx":
        about = {entry.key.removeprefix("stochbn."): entry.value for entry in onnx.load(path).metadata_props}
    else:
        files = {"stochbn.json": ""}
        torch.export.load(path, extra_files=files)
        about = json.loads(files["stochbn.json"])
    return {key: json.loads(text) if text[0] in "[{" else text for key, text in about.items()}


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_file_says_what_classes_there_are_and_how_pictures_become_inputs(ending: str, tmp_path: Path) -> None:
    model = settled(convnet(), 2, 6, 5)
    posterior, x, path = fitted(model, 2, 6, 5), normal(1, 2, 6, 5), tmp_path / f"x.{ending}"
    pictures = Preprocessing(mean=(0.5,), channels=3)
    write = getattr(stochbn.export, ending)
    with pytest.raises(ValueError, match="pictures are prepared in 3 channels, and the example has 2"):
        write(model, posterior, path, x, 2, preprocess=pictures)
    with pytest.raises(ValueError, match="2 names of classes, and the network has 3"):
        write(model, posterior, path, x, 2, classes=["a", "b"])
    posterior = replace(posterior, schema=Schema(classes=("\u00e4", "b", "c"), exif=False))
    object.__setattr__(pictures, "channels", 2)  # of no picture, but of this network
    write(model, posterior, path, x, 2, preprocess=pictures)
    about = metadata(path)
    assert about["classes"] == ["\u00e4", "b", "c"]
    wanted = {"size": [6, 5], "mean": [0.5], "std": None, "channels": 2, "crop": 1.0, "interpolation": "bilinear"}
    assert about["preprocess"] == {**wanted, "squash": False, "pad": None, "exif": False}


def test_the_temperature_is_applied_in_every_draw(tmp_path: Path) -> None:
    model = settled(mlp(), 4)
    posterior = replace(fitted(model, 4), temperature=2.5)
    stochbn.export.onnx(model, posterior, tmp_path / "x.onnx", normal(4, 4), 8)
    x = normal(6, 4, seed=2)
    prediction = stochbn.Predictive(model, posterior, draws=8, tolerance=0)(x, generator=seeded(0))
    outputs = run_onnx(tmp_path / "x.onnx", x)
    torch.testing.assert_close(outputs["probs"], prediction.probs, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs["mutual_information"], prediction.mutual_information, rtol=0, atol=1e-5)


@pytest.mark.parametrize("export", [stochbn.export.onnx, stochbn.export.pt2])
def test_several_inputs_keep_their_names(export: Callable[..., Export], tmp_path: Path) -> None:
    model = TwoInputs().eval()
    batch = {"features": normal(6, 4), "kind": torch.arange(6) % 5}
    posterior = stochbn.fit(model, [batch], 3, kind="factorized")
    found = export(model, posterior, tmp_path / "x", batch, DRAWS)
    more = {"features": normal(8, 4, seed=2), "kind": torch.arange(8) % 5}
    named = {"kind": more["kind"], "features": more["features"]}
    onnx_file = export is stochbn.export.onnx
    outputs = run_onnx(found.path, **named) if onnx_file else torch.export.load(found.path).module()(**named)
    wanted = stochbn.Predictive(model, posterior, DRAWS, tolerance=0)(more, generator=seeded(0))
    torch.testing.assert_close(outputs["probs"], wanted.probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", ["binary", "multilabel", "regression", "embedding"])
def test_every_task_has_its_outputs(task: Any, tmp_path: Path) -> None:
    model = settled(mlp(classes=1 if task == "binary" else 3), 4)
    if task == "regression":
        model = Wrapped(model, lambda out: (out, -out.square()))
    posterior = fitted(model, 4)
    stochbn.export.onnx(model, posterior, tmp_path / "x.onnx", normal(4, 4), 4, task=task)
    x = normal(6, 4, seed=2)
    wanted = stochbn.Predictive(model, posterior, 4, tolerance=0, task=task)(x, generator=seeded(0))
    outputs = run_onnx(tmp_path / "x.onnx", x)
    of_numbers = {"regression": ["mean", "std", "total_std"], "embedding": ["mean", "std"]}
    assert list(outputs) == of_numbers.get(task, ["probs", "entropy", "mutual_information"])
    for name, found in outputs.items():
        torch.testing.assert_close(found, getattr(wanted, name), rtol=1e-4, atol=1e-5)


def test_dropout_is_off_and_the_network_stays_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    posterior = fitted(model, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stochbn.export.onnx(model, posterior, tmp_path / "x.onnx", normal(4, 4), DRAWS)
    x = normal(3, 4)
    first, again = (run_onnx(tmp_path / "x.onnx", x)["probs"] for _ in range(2))
    assert torch.equal(first, again)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("export", [stochbn.export.onnx, stochbn.export.pt2])
def test_a_file_that_would_differ_from_python_is_not_left(export: Callable[..., Export], tmp_path: Path) -> None:
    model = settled(Pretending(), 4)
    path = tmp_path / "x.onnx"
    path.write_bytes(b"the one before")
    with pytest.raises(ExportError, match=r"differs from Python on the example \(4 examples\): probs by 0"):
        export(model, fitted(model, 4), path, normal(4, 4), DRAWS)
    assert path.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Branching, "Branching cannot be exported: torch.export does not take its forward pass"),
        (Counting, "Counting cannot be exported: a pass writes to its buffers 'passes'"),
        (Locked, "Locked cannot be exported: it cannot be copied"),
    ],
)
def test_what_cannot_be_exported_is_told(build: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    model = build().eval()
    with pytest.raises(ExportError, match=message):
        stochbn.export.onnx(model, fitted(model, 4), tmp_path / "x.onnx", normal(4, 4), DRAWS)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_told(tmp_path: Path) -> None:
    model = settled(mlp(), 4)
    posterior, other = fitted(model, 4), settled(mlp(), 4, seed=9)
    path, x = tmp_path / "x.onnx", normal(4, 4)
    with pytest.raises(TypeError, match="expected a posterior"):
        stochbn.export.onnx(model, None, path, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="other weights"):
        stochbn.export.onnx(other, posterior, path, x)
    with pytest.raises(ValueError, match="at least 1"):
        stochbn.export.onnx(model, posterior, path, x, 0)
    with pytest.raises(ValueError, match="seed must be"):
        stochbn.export.pt2(model, posterior, path, x, seed=-1)
    with pytest.raises(ValueError, match="are empty"):
        stochbn.export.onnx(model, posterior, path, x[:0])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        stochbn.export.onnx(model, posterior, tmp_path / "nowhere" / "x.onnx", x)
    with pytest.raises(ExportError, match="tensors with the examples on their first axis"):
        stochbn.export.onnx(model, posterior, path, x, inputs=lambda batch: (batch, "no tensor"))


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = settled(mlp(), 4)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'stochbn\[export\]'"):
        stochbn.export.onnx(model, fitted(model, 4), tmp_path / "x.onnx", normal(4, 4))
    assert np.isfinite(stochbn.export.pt2(model, fitted(model, 4), tmp_path / "x.pt2", normal(4, 4), 2).difference)


# ---------------------------------------------------------------- the command


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A network as `stochbn paper train` saves it, with its posterior."""
    arguments = {"classes": 3, "channels": 1, "size": 28}
    model = architectures.build("lenet5", **arguments).eval()
    path = tmp_path / "net.safetensors"
    checkpoints.save(path, checkpoints.Checkpoint(model, "lenet5", arguments, "digits:0-2", ("0", "1", "2")))
    fitted(model, 1, 28, 28).save(tmp_path / "net.sbn.safetensors")
    return path


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_the_command_writes_a_file_that_predicts(ending: str, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / f"out.{ending}"
    arguments = ["export", str(saved), "--out", str(path), "--draws", "2", "--seed", "3"]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "2 draws" in result.output
    model, posterior = checkpoints.load(saved).model, stochbn.load(tmp_path / "net.sbn.safetensors")
    x = normal(3, 1, 28, 28)
    mean, *_ = slow_probs(model, posterior, 2, 3, x)
    outputs = run_onnx(path, x) if ending == "onnx" else torch.export.load(path).module()(x)
    torch.testing.assert_close(outputs["probs"].double(), mean, rtol=0, atol=1e-5)


def test_the_command_tells_what_is_wrong(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*arguments: object) -> str:
        with pytest.raises((ValueError, OSError)) as caught:
            CliRunner().invoke(cli.app, ["export", *map(str, arguments)], catch_exceptions=False)
        return str(caught.value)

    assert "--out must end in .onnx or .pt2" in told(saved, "--out", tmp_path / "x.tflite")
    assert "there is no folder" in told(saved, "--out", tmp_path / "nowhere" / "x.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install 'stochbn[export]'" in told(saved, "--out", tmp_path / "x.onnx")
    (tmp_path / "net.sbn.safetensors").unlink()
    assert "run 'stochbn fit'" in told(saved, "--out", tmp_path / "x.onnx")
