"""Detected boxes in pixels of the pictures, however the library brought them to the network's size."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from safetensors.torch import save_file

import stochbn
from conftest import command_output as run
from conftest import seeded, settled
from stochbn.deploy import Limits, Scorer, application
from stochbn.sources import Preprocessing, build, load_weights

NUMBER = itertools.count()
MODULE = """
import torch
from torch import nn
from stochbn.sources import Preprocessing

class Finder(nn.Module):
    # Its first anchor is the bright rectangle in the input; draws move its left and its top.
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))

    def forward(self, x):
        jitter = 0.3 * self.body(x).mean((2, 3))
        bright = x[:, 0] > 0.75
        sides = []
        for axis in (1, 2):  # of columns, then of rows
            there = bright.any(axis).float()
            sides.append((there.argmax(1), there.shape[1] - there.flip(1).argmax(1)))
        corners = [torch.stack([side[i] for side in sides], 1).to(x) for i in (0, 1)]
        low, high = corners[0] + jitter, corners[1]
        found = torch.cat([(low + high) / 2, high - low, torch.full_like(low, 0.9)], 1)
        nothing = torch.zeros(len(x), found.shape[1], 7).to(x)
        return torch.cat([found[:, :, None], nothing], 2)

def finder():
    return Finder()
"""
TRUE = {"a.png": (60, 80, (20, 10, 60, 40)), "c.png": (90, 50, (10, 30, 30, 80)), "d.png": (64, 64, (16, 16, 48, 40)),
        "e.jpg": (50, 100, (40, 10, 90, 30))}  # fmt: skip
"""Height and width of pictures, upright, and their box."""
NAMES = ["a.png", "b.png", "c.png", "d.png", "e.jpg"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of several shapes with one bright rectangle each; one cannot be read, and one is turned by its EXIF."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("pictures").mkdir()
    for name, (height, width, (left, top, right, bottom)) in TRUE.items():
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[top:bottom, left:right] = 255
        picture, exif = Image.fromarray(pixels), Image.Exif()
        if name == "e.jpg":  # stored as lying on its side
            exif[0x0112], picture = 6, picture.transpose(Image.Transpose.ROTATE_90)
        picture.save(f"pictures/{name}", exif=exif, quality=100)
    Path("pictures/b.png").write_bytes(b"no picture")


def fitted(more: str, size: Sequence[str]) -> list[str]:
    name = f"finder_{next(NUMBER)}"
    Path(f"{name}.py").write_text(MODULE + more)
    torch.manual_seed(0)
    model = settled(build(f"{name}:finder", {}).model, 3, 40, 40)
    save_file(model.state_dict(), "w.safetensors")
    stochbn.fit(model, [torch.rand(16, 3, 40, 40, generator=seeded(i)) for i in range(8)], task="detection",
                reference=False).save("w.sbn.safetensors")  # fmt: skip
    return ["--model", f"{name}:finder", "--weights", "w.safetensors", "--task", "detection", *size]


def rows_of(path: str) -> list[dict[str, Any]]:
    with Path(path).open(newline="", encoding="utf-8") as file:
        return [
            {"error": row["error"], **dict(*json.loads(row["detections"] or "[{}]"))} for row in csv.DictReader(file)
        ]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("more", "size", "change"),
    [
        ("", "48", Preprocessing((48, 48), pad=114 / 255)),
        ("", "40x72", Preprocessing((40, 72), pad=114 / 255)),
        ("", "200", Preprocessing((200, 200), pad=114 / 255)),
        ("preprocess = Preprocessing((40, 56), squash=True)", "", Preprocessing((40, 56), squash=True)),
        ("preprocess = Preprocessing((96, 96), crop=0.9)", "", Preprocessing((96, 96), crop=0.9)),
    ],
)
def test_boxes_are_written_in_pixels_of_the_picture(more: str, size: str, change: Preprocessing) -> None:
    given = fitted(more, ["--size", size] if size else [])
    run("predict", *given, "--data", "pictures", "--draws", 8, "--out", "p.csv")
    rows = rows_of("p.csv")
    assert [bool(row["error"]) for row in rows] == [name == "b.png" for name in NAMES]
    model = build(given[1], {}).model
    load_weights(model, Path("w.safetensors"))
    predictive = stochbn.Predictive(model, stochbn.load("w.sbn.safetensors"), 8, task="detection")
    for name, row in zip(NAMES, rows, strict=True):
        if row["error"]:
            continue
        height, width, box = TRUE[name]
        placement = change.placement((height, width))
        with Image.open(f"pictures/{name}") as stored:
            upright = stored.transpose(Image.Transpose.ROTATE_270) if name == "e.jpg" else stored
            x = change(upright.copy())
        assert (upright.height, upright.width) == (height, width)
        seen = placement.outward(torch.tensor([[0.0, 0, x.shape[2], x.shape[1]]]))[0]  # what is not cropped
        wanted = torch.tensor(box).maximum(seen[[0, 1, 0, 1]]).minimum(seen[[2, 3, 2, 3]])
        scale = np.array(placement.scale * 2)
        assert np.abs((row["box"] - wanted.numpy()) * scale).max() < 1.6  # pixels of the input
        inside = predictive(x[None], generator=seeded()).objects[0]
        assert row["box_std"] == pytest.approx(inside.box_std[0].numpy() / scale, abs=2e-4)
        assert row["box_std"][0] > 0
        torch.testing.assert_close(placement.inward(torch.tensor([row["box"]])), inside.boxes, atol=0.01, rtol=0)
        assert inside.in_picture(placement).boxes[0].tolist() == pytest.approx(row["box"], abs=0.01)


def test_boxes_stay_in_pixels_of_the_input_where_a_function_or_arrays_made_it() -> None:
    function = """
import numpy as np
def preprocess(image):
    pixels = np.asarray(image.convert("RGB").resize((30, 20), 0), "float32") / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)
"""
    given = fitted(function, [])
    run("predict", *given, "--data", "pictures", "--draws", 8, "--out", "p.csv")
    for name, row in zip(NAMES, rows_of("p.csv"), strict=True):
        if name in TRUE:
            height, width, box = TRUE[name]
            scaled = np.array(box) * np.array([30 / width, 20 / height] * 2)
            assert np.abs(np.array(row["box"]) - scaled).max() < 1.6
    scorer = Scorer(given[1], "w.safetensors", "w.sbn.safetensors", size=(40, 40), settings={"task": "detection"})
    array = torch.zeros(3, 40, 40)
    array[:, 8:20, 12:30] = 1
    (row,) = scorer.answer([array.tolist()])
    assert np.abs(np.array(json.loads(row["detections"])[0]["box"]) - [12, 8, 30, 20]).max() < 1.6


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_exif_gives_pixels_of_the_picture_as_it_lies_in_its_file() -> None:
    given = fitted("", ["--size", "48"])
    run("predict", *given, "--no-exif", "--data", "pictures", "--draws", 8, "--out", "p.csv")
    height, width, (left, top, right, bottom) = TRUE["e.jpg"]
    turned = [top, width - right, bottom, width - left]
    assert np.abs(np.array(rows_of("p.csv")[-1]["box"]) - turned).max() < 1.6 * height * 2 / 48


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_service_scorer_and_command_write_the_same_boxes() -> None:
    given = fitted("", ["--size", "48x64"])
    run("predict", *given, "--data", "pictures", "--draws", 8, "--out", "p.csv")
    wanted = {name: row for name, row in zip(NAMES, rows_of("p.csv"), strict=True) if name in TRUE}
    settings: dict[str, Any] = {
        "model": given[1], "weights": "w.safetensors", "posterior": "w.sbn.safetensors", "size": (48, 64), "draws": 8,
        "settings": {"task": "detection"},
    }  # fmt: skip
    contents = {name: Path(f"pictures/{name}").read_bytes() for name in wanted}
    with TestClient(application(settings, Limits())) as client:
        answer = client.post("/predict", files=[("file", (name, content)) for name, content in contents.items()])
        assert answer.status_code == 200, answer.text
        served = answer.json()["predictions"]
        one = client.post("/predict", content=contents["c.png"], headers={"content-type": "image/png"}).json()
    table = Scorer(**settings)({"image": np.array([*contents.values(), b""], dtype=object)})
    assert table["error"][-1] is not None
    for i, row in enumerate(wanted.values()):
        for text in (served[i]["detections"], table["detections"][i]):
            (found,) = json.loads(text)
            assert found["box"] == pytest.approx(row["box"], abs=0.01)
            assert found["box_std"] == pytest.approx(row["box_std"], abs=1e-3)
    assert one["predictions"][0]["detections"] == served[1]["detections"]
