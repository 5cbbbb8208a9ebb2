"""Predictions of data of any length as a table."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import stochbn
from conftest import mlp, normal, seeded, settled
from stochbn.predictions import Estimate, MultilabelPrediction, Prediction
from stochbn.scoring import parts_folder, score
from stochbn.sources import Chunk, Preprocessing, open_objects
from stochbn.sources.objects import ahead


@dataclass
class Numbers:
    """A stream of numbered inputs, of which some cannot be read; it may stop, as a killed process would."""

    inputs: torch.Tensor
    unreadable: tuple[int, ...] = ()
    fail_at: int | None = None
    key_name: str = "row"

    def __len__(self) -> int:
        return len(self.inputs)

    def chunks(self, size: int, start: int = 0) -> Iterator[Chunk]:
        for first in range(start, len(self), size):
            if self.fail_at is not None and first >= self.fail_at:
                raise KeyboardInterrupt
            numbers = range(first, min(first + size, len(self)))
            read = [i for i in numbers if i not in self.unreadable]
            errors = [None if i in read else f"cannot be read ({i})" for i in numbers]
            yield Chunk(list(numbers), errors, self.inputs[read] if read else None)


@pytest.fixture(scope="module")
def predictive() -> stochbn.Predictive:
    model = settled(mlp(), 4)
    return stochbn.Predictive(model, stochbn.fit(model, [normal(200, 4)], 8), draws=10)


def rows_in(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        found: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
        return found
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_row_for_every_object_in_their_order(ending: str, tmp_path: Path, predictive: stochbn.Predictive) -> None:
    x = normal(23, 4)
    path = tmp_path / f"p.{ending}"
    moves: list[tuple[int, int]] = []
    found = score(
        predictive, Numbers(x, (3, 22)), path, settings={}, classes=("a", "b", "c"), top=2, batch=5, part=10, seed=4,
        uncertainty=("entropy",), shown=3, progress=lambda *move: moves.append(move),
    )  # fmt: skip
    rows = rows_in(path)
    assert (found.rows, found.failed) == (23, 2)
    least = sorted((row for row in rows if not row["error"]), key=lambda row: -float(row["entropy"]))[:3]
    assert [row["row"] for row in found.least] == [int(row["row"]) for row in least]
    assert [row["entropy"] for row in found.least] == pytest.approx([float(row["entropy"]) for row in least], rel=1e-4)
    assert [int(row["row"]) for row in rows] == list(range(23))
    assert [i for i, row in enumerate(rows) if row["error"]] == [3, 22]
    assert rows[3]["error"] == "cannot be read (3)"
    assert not rows[3]["class"]
    assert list(rows[0]) == [
        "row", "class", "probability", "class_2", "probability_2", "entropy", "mutual_information", "error",
    ]  # fmt: skip
    expected = predictive(x[[0, 1, 2, 4]], generator=seeded(4))
    best, index = expected.probs.topk(2)
    for row, number in ((rows[0], 0), (rows[4], 3)):
        assert (row["class"], row["class_2"]) == tuple("abc"[i] for i in index[number].tolist())
        assert float(row["probability_2"]) == pytest.approx(best[number, 1].item(), rel=1e-4)
        assert float(row["entropy"]) == pytest.approx(expected.entropy[number].item(), rel=1e-4)
    assert moves[-1] == (23, 23)
    assert not parts_folder(path).exists()


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("fail_at", [0, 10, 15, 20])
def test_what_was_stopped_goes_on_and_gives_the_same_table(
    ending: str, fail_at: int, tmp_path: Path, predictive: stochbn.Predictive
) -> None:
    x = normal(23, 4)
    whole, path = tmp_path / f"whole.{ending}", tmp_path / f"p.{ending}"
    score(predictive, Numbers(x), whole, settings={}, batch=5, part=10)
    with pytest.raises(KeyboardInterrupt):
        score(predictive, Numbers(x, fail_at=fail_at), path, settings={}, batch=5, part=10)
    assert not path.exists()
    assert parts_folder(path).exists() == (fail_at > 5)
    moves: list[tuple[int, int]] = []
    score(predictive, Numbers(x), path, settings={}, batch=5, part=10, progress=lambda *move: moves.append(move))
    assert moves[0] == (fail_at // 10 * 10, 23)
    assert path.read_bytes() == whole.read_bytes()


@dataclass
class Named(Numbers):
    """The same with keys that are texts."""

    keys: tuple[str, ...] = ()

    def chunks(self, size: int, start: int = 0) -> Iterator[Chunk]:
        for chunk in super().chunks(size, start):
            yield Chunk([self.keys[int(i)] for i in chunk.keys], chunk.errors, chunk.inputs)


FORMULAS = (
    "=1+1",
    "'=1+1",
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "'tis",
    "-5",
    "3",
    'a,"b',
    "x" * 200_000,
)


@pytest.mark.parametrize("fail_at", [None, 5])
def test_no_text_of_a_csv_is_run_by_a_spreadsheet(
    fail_at: int | None, tmp_path: Path, predictive: stochbn.Predictive
) -> None:
    csv.field_size_limit(2**31 - 1)
    x, classes = normal(len(FORMULAS), 4), ("=a", "@b", "-c")
    settings: dict[str, Any] = {"settings": {}, "classes": classes, "batch": 1, "part": 2}
    path = tmp_path / "p.csv"
    if fail_at is not None:
        with pytest.raises(KeyboardInterrupt):
            score(predictive, Named(x, (2,), fail_at, "=name", FORMULAS), path, **settings)
    found = score(
        predictive, Named(x, (2,), None, "=name", FORMULAS), path, **settings, uncertainty=("entropy",), shown=99
    )
    rows = rows_in(path)
    assert next(iter(rows[0])) == "'=name"
    for row in rows:
        for name, cell in row.items():
            assert cell[:1] not in ("=", "+", "-", "@", "\t", "\r") or float(cell) == -5, (name, cell)
    assert [row["'=name"] for row in rows][:2] == ["'=1+1", "''=1+1"]
    assert {row["class"] for row in rows} - {""} <= {f"'{name}" for name in classes}
    assert {row["=name"] for row in found.least} == set(FORMULAS) - {FORMULAS[2]}
    assert {row["class"] for row in found.least} <= set(classes)
    other = tmp_path / "p.parquet"
    score(predictive, Named(x, (2,), None, "=name", FORMULAS), other, **settings)
    assert [row["=name"] for row in rows_in(other)] == list(FORMULAS)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_texts_that_are_no_unicode_do_not_lose_a_table(
    ending: str, tmp_path: Path, predictive: stochbn.Predictive
) -> None:
    keys, classes = ("a\ud800", "b\udce9", "c"), ("cat\udcff", "dog", "bird")
    path = tmp_path / f"p.{ending}"
    score(predictive, Named(normal(3, 4), (1,), None, "na\udcffme", keys), path, settings={}, classes=classes, top=3)
    rows = rows_in(path)
    assert [row[r"na\udcffme"] for row in rows] == [r"a\ud800", r"b\udce9", "c"]
    assert r"cat\udcff" in (rows[0]["class"], rows[0]["class_2"], rows[0]["class_3"])


def test_parts_of_other_settings_are_not_mixed(tmp_path: Path, predictive: stochbn.Predictive) -> None:
    x, path = normal(20, 4), tmp_path / "p.csv"
    with pytest.raises(KeyboardInterrupt):
        score(predictive, Numbers(x, fail_at=10), path, settings={"weights": 1}, batch=5, part=5)
    with pytest.raises(ValueError, match="parts of a run with other options, data or weights: run with these"):
        score(predictive, Numbers(x), path, settings={"weights": 2}, batch=5, part=5)
    with pytest.raises(ValueError, match="parts of a run with other options"):
        score(predictive, Numbers(x), path, settings={"weights": 1}, batch=5, part=5, seed=1)
    (parts_folder(path) / "part-00000000.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"rows that an earlier version of stochbn wrote.*delete the folder"):
        score(predictive, Numbers(x), path, settings={"weights": 1}, batch=5, part=5)
    other = tmp_path / "q.csv"
    parts_folder(other).mkdir()
    (parts_folder(other) / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="holds other things; move it"):
        score(predictive, Numbers(x), other, settings={})
    assert (parts_folder(other) / "thesis.tex").exists()


def test_strictness_names_the_object_and_leaves_nothing(tmp_path: Path, predictive: stochbn.Predictive) -> None:
    with pytest.raises(ValueError, match=r"3 cannot be read \(3\); without --strict it becomes a row"):
        score(predictive, Numbers(normal(9, 4), (3,)), tmp_path / "p.csv", settings={}, strict=True)
    assert not list(tmp_path.iterdir())


def test_tables_that_cannot_be_are_told(tmp_path: Path, predictive: stochbn.Predictive) -> None:
    stream = Numbers(normal(9, 4))
    with pytest.raises(ValueError, match=r"ends in '.txt'; name one that ends in .csv or .parquet"):
        score(predictive, stream, tmp_path / "p.txt", settings={})
    with pytest.raises(ValueError, match="there are 2 names of classes, and the network has 3 classes"):
        score(predictive, stream, tmp_path / "p.csv", settings={}, classes=("a", "b"))
    with pytest.raises(ValueError, match="the key's column is called 'entropy'"):
        score(predictive, Numbers(normal(9, 4), key_name="entropy"), tmp_path / "p.csv", settings={})
    with pytest.raises(ValueError, match=r"got \[9, 2, 4, 4\]: dense outputs have no table.* need --masks"):
        score(lambda *_, **__: Prediction(torch.rand(9, 2, 4, 4), torch.rand(9, 4, 4)), stream, tmp_path / "p.csv",
              settings={})  # fmt: skip


@pytest.mark.parametrize("d", [None, 2])
def test_numbers_have_mean_and_standard_deviations(d: int | None, tmp_path: Path) -> None:
    values = torch.arange(9.0) if d is None else torch.arange(18.0).view(9, 2)
    estimate = Estimate(values, values + 1, values + 2, 2 * values + 3)
    score(lambda *_, **__: estimate, Numbers(normal(9, 4)), tmp_path / "p.csv", settings={})
    row = rows_in(tmp_path / "p.csv")[4]
    ending, number = ("", 4) if d is None else ("_1", 9)
    for name, value in (("mean", number), ("std", (number + 1) ** 0.5), ("total_std", (2 * number + 3) ** 0.5)):
        assert float(row[f"{name}{ending}"]) == pytest.approx(value, rel=1e-5)


def test_labels_have_probabilities_of_their_own(tmp_path: Path) -> None:
    prediction = MultilabelPrediction(torch.full((9, 2), 0.5), torch.zeros(9))
    score(lambda *_, **__: prediction, Numbers(normal(9, 4)), tmp_path / "p.csv", settings={}, classes=("a", "b"))
    row = rows_in(tmp_path / "p.csv")[0]
    assert (row["probability_a"], row["probability_b"]) == ("0.5", "0.5")
    assert float(row["entropy"]) == pytest.approx(2 * np.log(2), rel=1e-4)


def test_parts_in_which_nothing_can_be_read_have_the_columns_of_the_others(
    tmp_path: Path, predictive: stochbn.Predictive
) -> None:
    path = tmp_path / "p.parquet"
    for unreadable in ((0, 1, 2, 3), tuple(range(4, 12)), tuple(range(12))):
        found = score(predictive, Numbers(normal(12, 4), unreadable), path, settings={}, batch=2, part=4)
        rows = rows_in(path)
        assert [row["row"] for row in rows if row["error"]] == list(unreadable)
        names = ["class", "probability", "entropy", "mutual_information"] if len(unreadable) < 12 else []
        assert all(list(row) == ["row", *names, "error"] for row in rows)
        assert (found.rows, found.failed, found.least) == (12, len(unreadable), [])


# ---------------------------------------------------------------- reading ahead


def test_reading_ahead_gives_the_same_keeps_few_and_passes_errors_on() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i
            if i == 50:
                raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone"):  # noqa: PT012 - the last of many steps raises
        for item in ahead(items()):
            found.append(item)
            assert len(made) <= len(found) + 4
    assert found == list(range(51))
    made.clear()
    early = ahead(items())
    assert next(early) == 0
    early.close()
    count = len(made)
    time.sleep(0.1)
    assert len(made) == count


# ---------------------------------------------------------------- the command

MODULE = """
import os, time
import torch
from torch import nn

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                 nn.Linear(3, 4))

    def forward(self, x):
        return self.net(x)

def network():
    return Slow()

def preprocess(image):
    time.sleep(float(os.environ.get("SLEEP", 0)))
    return torch.full((1, 6, 6), image.getpixel((0, 0)) / 255) + torch.linspace(0, 1, 36).view(1, 6, 6)
"""


def test_a_folder_is_scored_though_the_process_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("killed_net.py").write_text(MODULE)
    Path("folder").mkdir()
    for i in range(60):
        Image.new("L", (6, 6), 4 * i).save(f"folder/{i:03}.png")
    Path("folder/007.png").write_bytes(b"\x89PNG no more")
    sys.path.insert(0, str(tmp_path))
    try:
        import killed_net  # type: ignore[import-not-found]

        model = killed_net.network().eval()
        stochbn.fit(model, [torch.rand(160, 1, 6, 6)], 8).recentre(model).save("p.sbn.safetensors")
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("killed_net", None)
    command = [sys.executable, "-m", "stochbn", "predict", "--model", "killed_net:network", "--data", "folder",
               "--posterior", "p.sbn.safetensors", "--batch", "4", "--part", "4", "--draws", "8", "--out"]  # fmt: skip
    slow = os.environ | {"SLEEP": "0.05"}
    process = subprocess.Popen([*command, "p.parquet"], env=slow, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.glob("p.parquet.parts/part-*"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not Path("p.parquet").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("p.parquet.parts/part-*")}
    assert 3 <= len(kept) < 15
    for name in ("p.parquet", "whole.parquet"):
        subprocess.run([*command, name], check=True, stdout=subprocess.DEVNULL)
    rows = rows_in(tmp_path / "p.parquet")
    assert [row["file"] for row in rows] == [f"{i:03}.png" for i in range(60)]
    assert [row["file"] for row in rows if row["error"]] == ["007.png"]
    assert "cannot be read as an image" in rows[7]["error"]
    assert rows == rows_in(tmp_path / "whole.parquet")
    told = subprocess.run([*command, "q.csv", "--strict"], capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert "007.png cannot be read as an image" in " ".join(told.stderr.split())


# ---------------------------------------------------------------- images of any kind


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX", "La", "RGBa"]
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_8_bits_are_brought_to_the_networks_channels(mode: str, channels: int) -> None:
    grey = Image.new("L", (5, 4), 255)
    routes = {"La": ("LA", "La"), "RGBa": ("RGBA", "RGBa"), "PA": ("P", "PA"), "HSV": ("RGB", "HSV")}
    image = grey
    for step in routes.get(mode, ("RGB", mode) if mode in ("CMYK", "YCbCr", "RGBX") else (mode,)):
        image = image.convert(step)
    x = Preprocessing(channels=channels)(image)
    assert x.shape == (channels, 4, 5)
    assert x.min() > 0.98


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_16_bits_keep_their_depth(channels: int, tmp_path: Path) -> None:
    values = np.array([[0, 1000], [30000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    (chunk,) = open_objects(str(tmp_path), preprocess=Preprocessing(channels=channels)).chunks(1)
    assert chunk.errors == [None]
    for channel in chunk.inputs[0, :3]:
        np.testing.assert_allclose(channel.numpy(), values / 65535, atol=1e-6)
    larger = Preprocessing((4, 4), channels=channels)(Image.fromarray(values))
    assert larger.shape == (channels, 4, 4)
    assert 0 <= larger.min() < larger.max() <= 1


@pytest.mark.parametrize("mode", ["F", "I"])
def test_images_of_no_known_range_are_refused_by_name(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (3, 3)).save(tmp_path / "x.tiff")
    (chunk,) = open_objects(str(tmp_path)).chunks(1)
    assert chunk.keys == ["x.tiff"]
    assert f"an image of mode '{mode}' has numbers of no known range" in str(chunk.errors[0])


def test_images_are_resized_to_cover_and_cropped_in_the_centre() -> None:
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 255
    x = Preprocessing((10, 10), mean=(1.0,), std=(0.5, 0.25, 0.5))(Image.fromarray(pixels))
    assert x.shape == (3, 10, 10)
    assert x.abs().max() == 0
    assert Preprocessing((4, 4))(Image.new("RGB", (1, 9))).shape == (3, 4, 4)
