"""Commands on a network, weights and data of the user's own."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import stochbn
import stochbn.__main__
from conftest import command_output as stochbn_
from conftest import script
from stochbn.sources import build, load_weights, open_objects
from stochbn.sources.rows import TableRows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of these networks, which have learnt nothing

NUMBER = itertools.count()
CLASSES = "bird", "cat", "dog"

MODULE = """
import torch
from torch import nn

classes = ["bird", "cat", "dog"]

def network(channels=3, width=4, kind="small"):
    return nn.Sequential(
        nn.Conv2d(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, 3),
    )

def tabular(features=4, outputs=3):
    return nn.Sequential(nn.Linear(features, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, outputs))

class Lost(nn.Sequential):
    def forward(self, x):
        return {"scores": super().forward(x)}["logits"]

def lost():
    return Lost(*tabular())

def broken():
    raise RuntimeError("no such size")

ready = tabular()
number = 3

def loader():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(20, 4, generator=generator), torch.arange(20) % 3) for _ in range(4)]

def used_up():
    return iter(loader())

def unlabelled():
    return [x for x, _ in loader()]
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the current folder, under a name of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("STOCHBN_DATA", raising=False)
    name = f"own_module_{next(NUMBER)}"
    Path(f"{name}.py").write_text(MODULE)
    return name


@pytest.fixture
def told(program: Callable[..., tuple[Any, str, str]]) -> Callable[..., str]:
    """The one line by which a command fails."""

    def call(*args: object) -> str:
        code, _, error = program(*args)
        assert code == 1
        assert len(error.strip().splitlines()) == 1, error
        return error

    return call


def images(folder: Path, count: int = 12, size: tuple[int, int] = (10, 12), mode: str = "RGB") -> Path:
    """A folder with a folder of images for each class, whose colour tells the class."""
    generator = np.random.default_rng(0)
    for i, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for j in range(count):
            pixels = generator.integers(0, 120, (*size, 3), dtype=np.uint8)
            pixels[..., i] += 120
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{j:02}.png")
    return folder


def table(rows: int = 60) -> dict[str, Any]:
    x = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)
    return {**{f"f{i}": x[:, i] for i in range(4)}, "label": x[:, :3].argmax(1), "id": [f"r{i}" for i in range(rows)]}


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """The network with the running statistics of these inputs."""
    model.train()
    with torch.no_grad():
        for _ in range(60):
            model(x)
    return model.eval()


@pytest.fixture
def weights(module: str, tmp_path: Path) -> Path:
    """Weights of the network for images, whose statistics are those of `images`."""
    data = open_objects(str(images(tmp_path / "pets")))
    (x, _), *_ = data.batches(36)
    torch.manual_seed(0)
    save_file(settled(build(f"{module}:network", {}).model, x).state_dict(), "w.safetensors")
    return Path("w.safetensors")


@pytest.fixture
def tabular(module: str) -> tuple[object, ...]:
    """The options for the network of tables."""
    x = torch.from_numpy(np.stack([table()[f"f{i}"] for i in range(4)], 1))
    torch.manual_seed(0)
    torch.save(settled(build(f"{module}:tabular", {}).model, x).state_dict(), "t.pt")
    datasets.Dataset.from_dict(table()).to_parquet("t.parquet")
    datasets.Dataset.from_dict(table()).to_csv("t.csv")
    return "--model", f"{module}:tabular", "--weights", "t.pt"


def test_a_network_goes_from_weights_and_a_folder_to_calibrated_predictions(module: str, weights: Path) -> None:
    own = "--model", f"{module}:network", "--weights", weights
    assert "4 channels in 1 layers" in stochbn_("fit", *own, "--data", "pets", "--batch-size", 6)
    fitted = stochbn.load("w.sbn.safetensors")
    assert (fitted.layers, fitted.mini_batches, fitted.batch_size) == ({"1": 4}, 6, 6)
    text = stochbn_("calibrate", *own, "--held-out", "pets", "--out", "c.sbn.safetensors")
    assert "temperature" in text
    assert text.count("\u00b1") >= 5, "the noises that were not chosen, with the errors of their differences"
    assert "NLL of 36 held-out examples" in text
    calibrated = stochbn.load("c.sbn.safetensors")
    assert calibrated.choice
    assert calibrated.choice in " ".join(text.split())
    assert stochbn.load("w.sbn.safetensors").temperature == 1
    text = stochbn_("evaluate", *own, "--posterior", "c.sbn.safetensors", "--data", "pets", "--draws", 8, "--out", "r",
                    "--report", "r/page.html")  # fmt: skip
    assert "SBN" in text
    page = Path("r/page.html").read_text()
    assert page.count("data:image/png;base64") == 48
    assert "bird/00.png" in page
    assert "aleatoric" in page
    results = json.loads(Path("r/results.json").read_text())
    assert [(row["method"], row["sbn"]) for row in results["scores"]] == [("plain", False), ("plain", True)]
    assert (
        "Use --kind" in (text := stochbn_("diagnose", *own, "--data", "pets", "--batch-size", 3))
        or "loses little" in text
    )
    stochbn_("predict", *own, "--data", "pets", "--out", "p.csv", "--draws", 8)
    lines = Path("p.csv").read_text().splitlines()
    assert lines[0] == "file,class,probability,entropy,mutual_information,error"
    assert len(lines) == 37
    assert lines[1].split(",")[0] == "bird/00.png"
    assert lines[1].split(",")[1] in CLASSES


def test_the_scores_are_those_of_the_network_on_the_data(module: str, weights: Path) -> None:
    stochbn_("evaluate", "--model", f"{module}:network", "--weights", weights, "--data", "pets", "--out", "r")
    built = build(f"{module}:network", {})
    load_weights(built.model, weights)
    data = open_objects("pets", classes=built.classes)
    with torch.no_grad():
        probs = torch.cat([built.model(x) for x, _ in data.batches(7)]).softmax(1)
    (row,) = json.loads(Path("r/results.json").read_text())["scores"]
    for key, value in stochbn.metrics.evaluate(probs, data.labels).items():
        assert row[key] == pytest.approx(value, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("data", ["t.parquet", "t.csv", "LOADER", "x.npz"])
def test_all_kinds_of_tables_are_fitted_and_evaluated(data: str, module: str, tabular: tuple[object, ...]) -> None:
    found = table()
    x = np.stack([found[f"f{i}"] for i in range(4)], 1)
    np.savez("x.npz", x=x, y=found["label"])
    data = data.replace("LOADER", f"{module}:loader")
    more = ("--posterior", "p.sbn.safetensors", "--data", data)
    keyed = ("--key", "id") if data.startswith("t.") else ()
    stochbn_("fit", *tabular, "--data", data, *keyed, "--out", "p.sbn.safetensors")
    assert stochbn.load("p.sbn.safetensors").layers == {"1": 6}
    assert "NLL" in stochbn_("evaluate", *tabular, *more, *keyed, "--draws", 4, "--report", "page.html")
    assert ("r1" if keyed else "row 1") in Path("page.html").read_text()
    stochbn_("calibrate", *tabular, "--posterior", "p.sbn.safetensors", "--held-out", data, *keyed, "--no-temperature")
    assert stochbn.load("p.sbn.safetensors").temperature == 1


def test_arrays_alone_are_inputs_without_labels(tabular: tuple[object, ...], told: Callable[..., str]) -> None:
    found = table()
    np.save("x.npy", np.stack([found[f"f{i}"] for i in range(4)], 1))
    stochbn_("fit", *tabular, "--data", "x.npy")
    assert Path("t.sbn.safetensors").exists()
    assert "has no labels" in told("evaluate", *tabular, "--data", "x.npy")


@pytest.mark.parametrize("kind", ["float32", "float64", "int64", "uint8"])
def test_a_column_of_lists_is_read_like_its_values(kind: str) -> None:
    values = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    feature = datasets.Sequence(datasets.Value(kind))
    table = datasets.Dataset.from_dict({"x": values}, features=datasets.Features(x=feature))
    rows = TableRows(table, "the table", ("x",))
    assert [rows.read(i).tolist() for i in range(2)] == values
    assert rows.read(1).dtype == torch.float32


def test_a_hole_in_a_list_of_numbers_is_told() -> None:
    rows = TableRows(datasets.Dataset.from_dict({"x": [[1.0, None], [1.0, 2.0], None]}), "the table", ("x",))
    with pytest.raises(ValueError, match="holds what is no number"):
        rows.read(0)
    assert rows.read(1).tolist() == [1, 2]
    with pytest.raises(ValueError, match="has no number in the column 'x'"):
        rows.read(2)


def test_columns_are_chosen_by_name(module: str, told: Callable[..., str]) -> None:
    datasets.Dataset.from_dict({**table(), "target": [2 - i % 3 for i in range(60)]}).to_parquet("t.parquet")
    own = "--model", f"{module}:tabular", "--model-arg", "features=2"
    given = ("--data", "t.parquet", "--input", "f1", "--input", "f3", "--label", "target")
    opened = open_objects("t.parquet", columns=_columns(("f1", "f3"), "target"))
    (x, labels), *_ = opened.batches(5)
    assert x.equal(torch.from_numpy(np.stack([table()["f1"], table()["f3"]], 1)[:5]))
    assert labels.tolist() == [2, 1, 0, 2, 1]
    assert "NLL" in stochbn_("evaluate", *own, *given)
    assert "no column 'f9'; it has f0" in told("evaluate", *own, "--data", "t.parquet", "--input", "f9")
    assert "holds text" in told("evaluate", *own, "--data", "t.parquet", "--input", "id")


def _columns(inputs: tuple[str, ...], label: str | None = None) -> Any:
    from stochbn.sources import Columns

    return Columns(inputs, () if label is None else (label,))


def test_arguments_are_literals_where_they_are() -> None:
    from stochbn.sources import parse_arguments

    assert parse_arguments(["a=1", "b=x", "c=None", "d=[1]", "e='1'"]) == {
        "a": 1,
        "b": "x",
        "c": None,
        "d": [1],
        "e": "1",
    }


def test_preprocessing_comes_from_options_or_the_module(module: str, weights: Path) -> None:
    own = "--model", f"{module}:network", "--weights", weights, "--data", "pets", "--out"
    stochbn_("fit", *own, "plain.safetensors")
    stochbn_("fit", *own, "sized.safetensors", "--size", "5x6", "--mean", "0.5,0.4,0.3", "--std", 0.25)
    with Path(f"{module}.py").open("a") as file:
        file.write(
            "\ndef preprocess(image):\n"
            "    import numpy as np\n"
            "    small = np.asarray(image.resize((6, 5), 2), dtype=np.float32) / 255\n"
            "    return ((torch.from_numpy(small) - torch.tensor([0.5, 0.4, 0.3])) / 0.25).movedim(-1, 0)\n"
        )
    sys.modules.pop(module)
    stochbn_("fit", *own, "module.safetensors")
    plain, sized, of_module = (stochbn.load(f"{n}.safetensors").draw(1, torch.Generator().manual_seed(0))
                               for n in ("plain", "sized", "module"))  # fmt: skip
    name = "1.running_mean"
    torch.testing.assert_close(sized[name], of_module[name], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(plain[name], sized[name], atol=1e-2)


def test_labels_follow_the_networks_names_of_classes(module: str, weights: Path, told: Callable[..., str]) -> None:
    own = "--model", f"{module}:network", "--weights", weights
    Path("pets/bird").rename("pets/zebra")
    assert "network's classes are bird, cat, dog" in told("evaluate", *own, "--data", "pets")
    opened = open_objects("pets", classes=("x", "dog", "cat", "zebra"))
    assert sorted(set(opened.labels.tolist())) == [1, 2, 3]
    assert opened.labels[0] == 2  # the cats come first, in the order of paths


def test_splits_are_folders_or_named(module: str, weights: Path, told: Callable[..., str], tmp_path: Path) -> None:
    own = "--model", f"{module}:network", "--weights", weights
    for split in ("train", "test"):
        images(tmp_path / "both" / split, 4 if split == "train" else 8)
    assert len(open_objects("both", prefer=("train",))) == 12
    assert len(open_objects("both", "test")) == 24
    assert "say with --split which" in told("calibrate", *own, "--held-out", "both", "--posterior", _fitted(own))
    assert "no split 'dev'" in told("fit", *own, "--data", "both", "--split", "dev")


def _fitted(own: tuple[object, ...]) -> str:
    stochbn_("fit", *own, "--data", "pets", "--out", "f.safetensors")
    return "f.safetensors"


# ---------------------------------------------------------------- networks from libraries


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (75, 100), (224, 224), (33, 500)])
@pytest.mark.parametrize(
    ("crop", "mode", "interpolation"),
    [(0.95, "center", "bicubic"), (0.875, None, "bilinear"), (0.9, "squash", "bicubic")],
)
def test_pictures_are_prepared_as_timm_and_torchvision_do(
    size: tuple[int, int], crop: float, mode: str | None, interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    config = {"input_size": (3, 64, 64), "mean": (0.5, 0.4, 0.3), "std": (0.2,) * 3, "crop_pct": crop,
              "crop_mode": mode, "interpolation": interpolation}  # fmt: skip
    data = SimpleNamespace(resolve_model_data_config=lambda _: config)
    timm = SimpleNamespace(create_model=lambda name, **given: model, data=data, list_models=lambda: ["tiny", "small"])
    monkeypatch.setitem(sys.modules, "timm", timm)
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    scale = int(64 // crop)
    if mode == "squash":
        resized = (scale, scale)
    else:  # torchvision.transforms.Resize(scale): the shorter side, and the other one rounded down
        short = min(size)
        resized = (scale, int(scale * size[1] / short)) if size[0] <= size[1] else (int(scale * size[0] / short), scale)
    wanted = image.resize(resized, getattr(Image.Resampling, interpolation.upper()))
    left, top = int(round((resized[0] - 64) / 2.0)), int(round((resized[1] - 64) / 2.0))  # noqa: RUF046 - as CenterCrop
    cut = torch.from_numpy(np.array(wanted.crop((left, top, left + 64, top + 64)))).movedim(-1, 0) / 255
    mean, std = torch.tensor(config["mean"])[:, None, None], torch.tensor(config["std"])[:, None, None]
    preprocess = build("timm:tiny", {"pretrained": True}).preprocess
    assert preprocess is not None
    torch.testing.assert_close(preprocess(image), (cut - mean) / std)
    with pytest.raises(ValueError, match=r"timm has no network 'smalls'; did you mean small\?"):
        build("timm:smalls", {"pretrained": True})


def test_a_network_of_timm_brings_its_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    config = {"input_size": (3, 8, 6), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0}
    data = SimpleNamespace(resolve_model_data_config=lambda _: config)
    made: dict[str, Any] = {}
    timm = SimpleNamespace(create_model=lambda name, **given: made.update({name: given}) or model, data=data)
    monkeypatch.setitem(sys.modules, "timm", timm)
    built = build("timm:tiny", {"pretrained": True})
    assert built.model is model
    assert made == {"tiny": {"pretrained": True}}
    assert built.preprocess is not None
    x = built.preprocess(Image.new("L", (12, 16), 255))
    assert x.shape == (3, 8, 6)
    assert x.unique().tolist() == [2.0]
    with pytest.raises(ValueError, match=r"random weights: name a file with --weights, or give --model-arg pretrained"):
        build("timm:tiny", {})


def test_a_network_of_transformers_brings_classes_and_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Module):
        config = SimpleNamespace(id2label={1: "dog", 0: "cat"}, architectures=["Net"])

        @classmethod
        def from_pretrained(cls, name: str) -> Net:
            assert name == "folder"
            return cls()

    transformers = ModuleType("transformers")
    transformers.__dict__.update(
        Net=Net,
        AutoConfig=SimpleNamespace(from_pretrained=lambda _: Net.config),
        AutoImageProcessor=SimpleNamespace(
            from_pretrained=lambda _: lambda image, return_tensors: {"pixel_values": torch.ones(1, 3, *image.size)}
        ),
    )
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    built = build("hf:folder", {})
    assert built.classes == ("cat", "dog")
    assert built.preprocess is not None
    assert built.preprocess(Image.new("L", (2, 3))).shape == (3, 2, 3)


# ---------------------------------------------------------------- errors


def test_networks_that_cannot_be_had_are_told(
    module: str, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    Path("failing.py").write_text("1 / 0")
    Path("needing.py").write_text("import a_package_that_is_not_there")
    for model, part in (
        ("nothing", "'nothing' names no network"),
        ("nowhere.at_all:f", "there is no module 'nowhere'"),
        (f"{module}:f", "has no 'f'; it has torch, nn, classes, network"),
        (f"{module}:number", "expected a function or a network"),
        (f"{module}:loader", "returned list, not a torch.nn.Module"),
        (f"{module}:broken", "RuntimeError: no such size; see --model-arg"),
        ("failing:f", "importing 'failing' failed: ZeroDivisionError"),
        ("needing:f", "it needs 'a_package_that_is_not_there', which is not installed"),
        ("timm:resnet18", "needs timm, which is not installed: pip install timm"),
        ("hf:x/y", "needs Transformers, which is not installed: pip install transformers"),
    ):
        assert part in told("fit", "--model", model, "--data", "x.npy", "--out", "p.safetensors")
    for given, part in (
        (["--model-arg", "width"], "'width' is no argument; write it as key=value"),
        (["--model-arg", "width=1", "--model-arg", "width=2"], "given twice"),
        (["--model-arg", "depth=2"], "cannot be built with (depth=2): TypeError"),
    ):
        assert part in told("fit", "--model", f"{module}:network", *given, "--data", "x", "--out", "p.safetensors")
    assert "takes no arguments" in told("fit", "--model", f"{module}:ready", "--model-arg", "a=1", "--out", "p")


def test_weights_that_do_not_fit_are_told(module: str, told: Callable[..., str]) -> None:
    own = "fit", "--model", f"{module}:tabular", "--data", f"{module}:loader", "--weights"
    state = build(f"{module}:tabular", {}).model.state_dict()
    torch.save({key: value for key, value in state.items() if key != "3.bias"} | {"head": torch.ones(1)}, "w.pt")
    error = told(*own, "w.pt")
    assert "missing: 3.bias; unexpected: head; check --model and --model-arg" in error
    torch.save(build(f"{module}:tabular", {"outputs": 5}).model.state_dict(), "w.pth")
    assert "3.weight is [5, 6] in the file and [3, 6] in the network (2 such)" in told(*own, "w.pth")
    torch.save(build(f"{module}:tabular", {}).model, "whole.pt")
    assert "cannot be read as tensors alone" in told(*own, "whole.pt")
    torch.save([1, 2], "list.pt")
    assert "holds no state dict" in told(*own, "list.pt")
    Path("w.safetensors").write_bytes(b"12345")
    assert "no safetensors file that can be read" in told(*own, "w.safetensors")
    Path("w.h5").write_bytes(b"12345")
    assert "expected .safetensors, .pt" in told(*own, "w.h5")
    assert "there is no file 'none.pt' with weights" in told(*own, "none.pt")
    assert "--weights needs --model" in told("fit", "--weights", "w.pt")


def test_wrapped_state_dicts_are_looked_through(module: str) -> None:
    model = build(f"{module}:tabular", {}).model
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 3}, "w.pt")
    other = build(f"{module}:tabular", {}).model
    load_weights(other, "w.pt")
    assert all(value.equal(other.state_dict()[key]) for key, value in model.state_dict().items())


def test_data_that_cannot_be_used_is_told(module: str, tabular: tuple[object, ...], told: Callable[..., str]) -> None:
    Path("empty").mkdir()
    Path("notes.txt").write_text("x")
    Path("bad.parquet").write_text("x")
    Path("bad.npy").write_text("x")
    np.savez("two.npz", a=np.ones(3), b=np.ones(3))
    np.savez("uneven.npz", x=np.ones((3, 4)), y=np.ones(2))
    np.save("words.npy", np.array(["a"]))
    np.savez("torn.npz", x=np.ones((30, 4)))
    torn = bytearray(Path("torn.npz").read_bytes())
    torn[len(torn) // 2] ^= 1
    Path("torn.npz").write_bytes(torn)
    for data, part in (
        ("nowhere", "there is no data 'nowhere'; expected a folder of images"),
        ("notes.txt", "ends in '.txt'; expected"),
        ("bad.parquet", "cannot be read as parquet"),
        ("bad.npy", "cannot be read as arrays"),
        ("two.npz", "say with --input which are the inputs"),
        ("uneven.npz", "there are 3 inputs and 2 labels"),
        ("words.npy", "expected an array of numbers"),
        ("torn.npz", "the array 'x' of 'torn.npz' cannot be read: Bad CRC-32"),
        (f"{module}:nothing", "has no 'nothing'"),
        (f"{module}:broken", "failed: RuntimeError: no such size"),
        (f"{module}:number", "expected an iterable of batches"),
        (f"{module}:used_up", "return a list or a DataLoader"),
    ):
        assert part in told("fit", *tabular, "--data", data), data
    assert "name data with --data: a folder of images" in told("fit", *tabular)
    assert "gives batches without labels" in told("evaluate", *tabular, "--data", f"{module}:unlabelled")
    assert "name one" not in told("fit", *tabular, "--data", "two.npz", "--input", "c")


def test_options_that_make_no_sense_are_told(module: str, weights: Path, told: Callable[..., str]) -> None:
    own = "--model", f"{module}:network", "--weights", weights, "--data", "pets"
    for given, part in (
        (["--size", "big"], "--size is 'big'; write it as 224 or 224x192"),
        (["--size", "0"], "write it as 224"),
        (["--mean", "a,b"], "--mean is 'a,b'; write it as 0.5"),
        (["--mean", "1,2"], "mean has 2 numbers for 3 channels"),
        (["--std", "0"], "std must be positive"),
        (["--size", "2"], "failed on an input of shape [16, 3, 2, 2]"),
    ):
        assert part in told("fit", *own, *given)
    assert "name a file for the posterior with --out" in told("fit", "--model", f"{module}:network", "--data", "pets")
    assert "not both" in told("fit", weights, "--model", f"{module}:network")
    assert "unknown task 'guess'" in told(
        "predict", *own, "--task", "guess", "--posterior", _fitted(own[:4]), "--out", "p.csv"
    )
    assert "expected targets [36, 3], as the network predicts" in told("evaluate", *own, "--task", "regression")
    assert "name data with --held-out" in told("calibrate", *own[:4], "--posterior", "f.safetensors")
    assert "run 'stochbn fit' on the network first" in told("predict", *own, "--out", "p.csv")


def test_an_image_of_another_size_is_told_by_its_name(module: str, weights: Path, told: Callable[..., str]) -> None:
    Image.new("RGB", (50, 40)).save("pets/dog/zz.png")
    error = told("evaluate", "--model", f"{module}:network", "--weights", weights, "--data", "pets")
    assert "dog/zz.png is [3, 40, 50], others are [3, 10, 12]" in error
    assert "--size" in error


def test_draws_over_the_input_are_an_option_of_every_command(module: str, weights: Path) -> None:
    own = "--model", f"{module}:network", "--weights", weights
    shift = "--augment", "flip,shift:2"
    stochbn_("fit", *own, "--data", "pets", "--batch-size", 6, *shift)
    with_shift = stochbn.load("w.sbn.safetensors")
    stochbn_("fit", *own, "--data", "pets", "--batch-size", 6, "--out", "clean.sbn.safetensors")
    without = stochbn.load("clean.sbn.safetensors")
    assert not torch.equal(with_shift.recentre_observed().expected, without.recentre_observed().expected)
    stochbn_("calibrate", *own, "--held-out", "pets", *shift, "--score", "brier", "--out", "c.sbn.safetensors")
    built = build(f"{module}:network", {})
    load_weights(built.model, weights)
    data = open_objects("pets", classes=built.classes).shuffled(0)
    wanted = stochbn.calibrate(
        built.model, with_shift, data.batches(100), temperature=True, score="brier",
        augment=stochbn.augment.named("flip,shift:2"),
    )  # fmt: skip
    assert stochbn.load("c.sbn.safetensors").temperature == pytest.approx(wanted.temperature, rel=1e-4)
    posterior = "--posterior", "c.sbn.safetensors"
    stochbn_("evaluate", *own, *posterior, "--data", "pets", "--draws", 8, *shift, "--out", "r")
    stochbn_("evaluate", *own, *posterior, "--data", "pets", "--draws", 8, "--out", "s")
    shifted, still = (json.loads(Path(f"{name}/results.json").read_text()) for name in "rs")
    assert shifted["augment"] == "flip,shift:2"
    assert shifted["scores"][0]["nll"] == still["scores"][0]["nll"], "the plain network sees its inputs as they are"
    assert shifted["scores"][1]["nll"] != still["scores"][1]["nll"]
    stochbn_("predict", *own, *posterior, "--data", "pets", "--out", "p.csv", "--draws", 8, *shift)
    stochbn_("predict", *own, *posterior, "--data", "pets", "--out", "q.csv", "--draws", 8)
    assert Path("p.csv").read_text() != Path("q.csv").read_text()


def test_augmentations_are_chosen_by_held_out_data(module: str, weights: Path) -> None:
    own = "--model", f"{module}:network", "--weights", weights
    stochbn_("fit", *own, "--data", "pets", "--batch-size", 6)
    among = "--augment", "flip|shift:1|flip,shift:2"
    text = stochbn_("calibrate", *own, "--held-out", "pets", *among, "--choose", 4, "--out", "c.sbn.safetensors")
    built = build(f"{module}:network", {})
    load_weights(built.model, weights)
    data = open_objects("pets", classes=built.classes).shuffled(0)
    several = [stochbn.augment.named(one) for one in among[1].split("|")]
    posterior = stochbn.load("w.sbn.safetensors")
    turns = stochbn.choose_augmentation(built.model, posterior, data.batches(100), several, draws=4)
    assert f"--augment '{turns}'" in " ".join(text.split())
    wanted = stochbn.calibrate(built.model, posterior, data.batches(100), temperature=True, augment=turns)
    assert stochbn.load("c.sbn.safetensors").temperature == pytest.approx(wanted.temperature, rel=1e-4)
    shown = "--augment", str(turns), "--posterior", "c.sbn.safetensors", "--draws", 4
    stochbn_("predict", *own, *shown, "--data", "pets", "--out", "p.csv")


def test_augmentations_and_scores_that_there_are_not_are_told(
    module: str, weights: Path, told: Callable[..., str]
) -> None:
    own = "--model", f"{module}:network", "--weights", weights
    stochbn_("fit", *own, "--data", "pets", "--batch-size", 6)
    for command in (
        ["fit", *own, "--data", "pets"],
        ["calibrate", *own, "--held-out", "pets"],
        ["evaluate", *own, "--data", "pets"],
        ["predict", *own, "--data", "pets", "--out", "p.csv"],
    ):
        assert "unknown augmentation 'rotate:9'" in told(*command, "--augment", "rotate:9")
    one = told("calibrate", *own, "--held-out", "pets", "--augment", "flip", "--choose", 3)
    assert "--choose needs several augmentations" in one
    assert "--score must be nll or brier" in told("calibrate", *own, "--held-out", "pets", "--score", "auroc")


def test_a_network_of_ones_own_is_exported(module: str, weights: Path, told: Callable[..., str]) -> None:
    import onnxruntime

    own = "--model", f"{module}:network", "--weights", weights
    stochbn_("fit", *own, "--data", "pets", "--batch-size", 6)
    assert "4 draws" in stochbn_("export", *own, "--data", "pets", "--out", "x.onnx", "--draws", 4)
    session = onnxruntime.InferenceSession("x.onnx")
    x = np.random.default_rng(0).random((5, 3, 10, 12), np.float32)
    probs, entropy, *_ = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
    assert entropy.shape == (5,)
    assert "name data with --data" in told("export", *own, "--out", "x.onnx")


@pytest.mark.parametrize("size", ["8", "9x6"])
def test_an_exported_file_predicts_pictures_without_this_library(
    module: str, weights: Path, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script in examples/ prepares pictures by the file's metadata as `stochbn predict` does."""
    own = "--model", f"{module}:network", "--weights", weights
    numbers = "--size", size, "--mean", "0.4,0.5,0.6", "--std", "0.2,0.3,0.4"
    stochbn_("fit", *own, "--data", "pets", "--batch-size", 6, *numbers)
    stochbn_("export", *own, "--data", "pets", "--out", "x.onnx", "--draws", 4)
    images(Path("new"), 2, (31, 17), "L")
    paths = sorted(Path("new").rglob("*.png"))
    turned = Image.open(paths[0])
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(paths[0], exif=exif)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "stochbn", None)
        found = script(Path(__file__).parents[1] / "examples" / "onnx_pictures.py").main("x.onnx", *map(str, paths))
    stochbn_("predict", *own, "--data", "new", "--out", "p.csv", "--draws", 4, "--tolerance", 0)
    table = csv.DictReader(Path("p.csv").read_text().splitlines())
    rows = {Path(row["file"]).as_posix(): row for row in table}
    assert len(rows) == len(paths) == len(found)
    for path, (name, probability, entropy) in zip(paths, found, strict=True):
        row = rows[path.relative_to("new").as_posix()]
        assert row["class"] == name
        assert probability == pytest.approx(float(row["probability"]), abs=1e-4)
        assert entropy == pytest.approx(float(row["entropy"]), abs=1e-4)


def test_a_mistyped_cell_of_a_table_is_the_error_of_its_row(
    tabular: tuple[object, ...], told: Callable[..., str]
) -> None:
    stochbn_("fit", *tabular, "--data", "t.csv", "--key", "id")
    lines = Path("t.csv").read_text().splitlines()
    place = lines[0].split(",").index("f2")
    for row, text in ((3, "abc"), (5, "")):
        cells = lines[row + 1].split(",")
        cells[place] = text
        lines[row + 1] = ",".join(cells)
    Path("bad.csv").write_text("\n".join(lines) + "\n")
    stochbn_("predict", *tabular, "--data", "bad.csv", "--key", "id", "--out", "p.csv", "--draws", 8)
    rows = list(csv.DictReader(Path("p.csv").read_text().splitlines()))
    assert [i for i, row in enumerate(rows) if row["error"]] == [3, 5]
    assert rows[3]["error"] == "holds 'abc' in the column 'f2', which is no number"
    assert rows[5]["error"] == "has no number in the column 'f2'"
    assert "holds 'abc' in the column 'f2'" in told("fit", *tabular, "--data", "bad.csv", "--key", "id")


def test_a_row_of_nan_does_not_keep_the_others_from_their_predictions(tabular: tuple[object, ...]) -> None:
    found = table()
    x = np.stack([found[f"f{i}"] for i in range(4)], 1)
    np.save("x.npy", x)
    stochbn_("fit", *tabular, "--data", "x.npy")
    x[[2, 7], 1] = np.nan
    np.save("bad.npy", x)
    for name in ("x", "bad"):
        stochbn_("predict", *tabular, "--data", f"{name}.npy", "--out", f"{name}.csv", "--draws", 8)
    whole, rows = (list(csv.DictReader(Path(f"{name}.csv").read_text().splitlines())) for name in ("x", "bad"))
    assert [i for i, row in enumerate(rows) if row["error"]] == [2, 7]
    assert "holds NaN or infinity" in rows[2]["error"]
    assert rows[0]["class"] == whole[0]["class"]


def test_labels_that_are_names_in_an_array_are_classes(tabular: tuple[object, ...]) -> None:
    found = table()
    x = np.stack([found[f"f{i}"] for i in range(4)], 1)
    np.savez("named.npz", x=x, y=np.array(["eel", "cat", "dog"])[found["label"]])
    opened = open_objects("named.npz")
    assert opened.classes == ("cat", "dog", "eel")
    assert opened.labels.tolist() == [(2, 0, 1)[i] for i in found["label"]]


def test_a_single_column_of_lists_needs_no_name(tabular: tuple[object, ...]) -> None:
    found = table()
    rows = np.stack([found[f"f{i}"] for i in range(4)], 1).tolist()
    datasets.Dataset.from_dict({"x": rows, "label": found["label"]}).to_parquet("list.parquet")
    stochbn_("fit", *tabular, "--data", "list.parquet", "--out", "l.sbn.safetensors")
    assert stochbn.load("l.sbn.safetensors").layers == {"1": 6}


def test_no_input_is_written_over(tabular: tuple[object, ...], told: Callable[..., str]) -> None:
    stochbn_("fit", *tabular, "--data", "t.csv", "--key", "id")
    before = {path: path.read_bytes() for path in map(Path, ("t.pt", "t.csv", "t.sbn.safetensors"))}
    for arguments in (
        ("fit", "--data", "t.csv", "--out", "t.pt"),
        ("fit", "--data", "t.csv", "--out", "t.csv"),
        ("calibrate", "--held-out", "t.csv", "--out", "./t.pt"),
        ("evaluate", "--data", "t.csv", "--report", "t.csv"),
        ("predict", "--data", "t.csv", "--out", "t.csv"),
    ):
        assert "is also an input, which would be lost" in told(arguments[0], *tabular, *arguments[1:])
    for path, content in before.items():
        assert path.read_bytes() == content
    replaced = "--posterior", "t.sbn.safetensors"
    stochbn_("calibrate", *tabular, "--held-out", "t.csv", "--key", "id", *replaced)


def test_a_run_on_data_that_has_changed_is_not_continued(tabular: tuple[object, ...], told: Callable[..., str]) -> None:
    found = table()
    x = np.stack([found[f"f{i}"] for i in range(4)], 1)
    np.save("x.npy", x)
    stochbn_("fit", *tabular, "--data", "x.npy")
    x[-1] = np.nan
    np.save("x.npy", x)
    predict = "predict", *tabular, "--data", "x.npy", "--out", "p.csv", "--batch", 10, "--part", 10
    told(*predict, "--strict")  # of the last part
    assert len(list(Path("p.csv.parts").glob("part-*"))) == 5
    os.utime("x.npy", ns=(0, 0))
    assert "of a run with other options, data or weights" in told(*predict)


def test_pictures_in_parquet_are_known_without_their_type(module: str, weights: Path) -> None:
    files = sorted(Path("pets").rglob("*.png"))
    encoded = [file.read_bytes() for file in files]
    tables = {
        "bytes": pyarrow.array(encoded),
        "struct": pyarrow.array([{"bytes": one, "path": None} for one in encoded]),
    }
    own = "--model", f"{module}:network", "--weights", weights
    stochbn_("fit", *own, "--data", "pets")
    stochbn_("predict", *own, "--data", "pets", "--out", "folder.csv")
    wanted = [row["probability"] for row in csv.DictReader(Path("folder.csv").read_text().splitlines())]
    for name, column in tables.items():
        Path(name, "parquet").mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table({"photo": column}), f"{name}/parquet/0.parquet")
        stochbn_("predict", *own, "--data", f"{name}/parquet", "--out", f"{name}.csv")
        rows = list(csv.DictReader(Path(f"{name}.csv").read_text().splitlines()))
        assert [row["probability"] for row in rows] == wanted
    os.chdir("struct")
    assert len(open_objects("parquet")) == len(files)  # and not the reader of that name


def test_numbers_as_names_of_classes_are_the_networks_where_it_has_such(module: str, weights: Path) -> None:
    for old, new in zip(CLASSES, ("1", "2", "4"), strict=True):
        Path("pets", old).rename(Path("pets", new))
    assert sorted(set(open_objects("pets", classes=("0", "1", "2", "3", "4")).labels.tolist())) == [1, 2, 4]
    assert sorted(set(open_objects("pets", classes=("a", "b", "c")).labels.tolist())) == [0, 1, 2]


def test_fewer_classes_than_the_networks_are_warned_of(module: str, weights: Path) -> None:
    Path(f"{module}_unnamed.py").write_text(MODULE.replace('classes = ["bird", "cat", "dog"]', ""))
    own = "--model", f"{module}_unnamed:network", "--weights", weights
    shutil.rmtree("pets/dog")
    with pytest.warns(
        UserWarning, match="pets has 2 classes, numbered in the order of their names, and the network has 3"
    ):
        stochbn_("evaluate", *own, "--data", "pets")


def test_errors_of_a_users_network_are_one_line(
    module: str, tabular: tuple[object, ...], told: Callable[..., str]
) -> None:
    assert "KeyError: 'logits'" in told("evaluate", "--model", f"{module}:lost", "--weights", "t.pt", "--data", "t.csv")


def test_labels_that_do_not_count_are_for_dense_networks(tabular: tuple[object, ...], told: Callable[..., str]) -> None:
    assert "--ignore is for --dense" in told("evaluate", *tabular, "--data", "t.csv", "--ignore", "1")
