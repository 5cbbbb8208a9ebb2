"""Three commands from a network of a library to a scored folder, and pictures prepared as the library does."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from stochbn import cli
from stochbn.sources import build

pytestmark = [pytest.mark.networks, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        Path("photos", name).mkdir(parents=True)
        for i in range(16):
            pixels = generator.integers(0, 255, (45, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"photos/{name}/{i:02}.png")


def scored(*own: str) -> list[dict[str, str]]:
    """The rows that predict writes after fit and evaluate; options are given once."""
    fit = "fit", *own, "--data", "photos", "--out", "p.safetensors"
    later = *own, "--data", "photos", "--posterior", "p.safetensors"
    for command in (fit, ("evaluate", *later), ("predict", *later, "--out", "p.csv")):
        result = CliRunner().invoke(cli.app, list(command), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert "photos: 32 pictures; 2 classes: cat=0, dog=1" in " ".join(result.output.split())
    return list(csv.DictReader(Path("p.csv").read_text().splitlines()))


def test_a_network_of_transformers_is_scored_by_its_own_processor() -> None:
    transformers: Any = pytest.importorskip("transformers")
    labels = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], **labels)
    transformers.ResNetForImageClassification(config).save_pretrained("saved")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained("saved")
    found = scored("--model", "hf:saved")
    assert {row["class"] for row in found} <= {"cat", "dog"}
    assert len(found) == 32
    preprocess = build("hf:saved", {}).preprocess
    assert preprocess is not None
    image = Image.open("photos/cat/00.png")
    wanted = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(preprocess(image), wanted)


@pytest.mark.parametrize("name", ["resnet18", "resnet26d", "mobilenetv3_small_050"])
def test_a_network_of_timm_is_scored_by_its_own_transform(name: str) -> None:
    timm: Any = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=2)
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": model.state_dict()}, "last.pth.tar")
    assert len(scored("--model", f"timm:{name}", "--weights", "last.pth.tar", "--model-arg", "num_classes=2")) == 32
    preprocess = build(f"timm:{name}", {}, weights_follow=True).preprocess
    assert preprocess is not None
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    for size in ((60, 45), (301, 777)):
        image = Image.open("photos/dog/00.png").resize(size, Image.Resampling.BICUBIC)
        torch.testing.assert_close(preprocess(image), transform(image), atol=1e-5, rtol=1e-5)
