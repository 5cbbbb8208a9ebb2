"""Names of mask files: as many files as examples, whatever their keys are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import stochbn
from conftest import normal, seeded
from stochbn.dense_masks import Masks, mask_name, write_masks
from stochbn.predictions import Prediction
from stochbn.scoring import score
from stochbn.sources import Chunk

KEYS = st.lists(st.text(st.one_of(st.characters(), st.sampled_from("aAbB./\\ ~_\u0301")), max_size=12), unique=True)
ALIKE = [
    "a b.png", "a_b.png", "a?b.png", "A_b.png", "a_b.PNG", "a_b.png~2", "x.png", "../x.png", "/x.png", "./x.png",
    "d//x.png", "d/x.png", "d\\x.png", "D/x.png", "k" * 100, "k" * 101, "k" * 300, "é" * 200, "é" * 201, "e\u0301",
    "\u00e9", "", ".", "..", "/", "a.", "a", "a.class.png", "a.class.png/b", "a/b", "con", "\udce9", "\udcea",
    "x/" * 400, "x/" * 401, "a\nb", "a\tb", "a\0b", "*", "|", mask_name("a b.png"),
]  # fmt: skip


def on_a_file_system_without_capitals(name: str) -> str:
    return name.casefold()


def prediction(count: int) -> Prediction:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)).eval()
    posterior = stochbn.fit(model, [torch.rand(16, 3, 8, 8)] * 2, 8)
    found: Prediction = stochbn.Predictive(model, posterior, 8)(torch.rand(count, 3, 5, 5, generator=seeded()))
    return found


def test_different_keys_have_files_of_their_own(tmp_path: Path) -> None:
    found = prediction(len(ALIKE))
    rows = write_masks(found, ALIKE, tmp_path / "masks")
    assert len({on_a_file_system_without_capitals(row["mask"]) for row in rows}) == len(ALIKE)
    for row, labels in zip(rows, found.probs.argmax(1), strict=True):
        assert (np.asarray(Image.open(tmp_path / "masks" / f"{row['mask']}.class.png")) == labels.numpy()).all()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 2 * len(ALIKE)
    assert all(path.is_relative_to(tmp_path / "masks") for path in written)


@given(KEYS)
def test_no_two_keys_share_a_name(keys: list[str]) -> None:
    names = list(map(mask_name, keys))
    assert len({on_a_file_system_without_capitals(name) for name in names}) == len(keys)
    for name in names:
        assert ".." not in name.split("/")
        assert not name.startswith("/")
        assert all(len(part.encode()) < 200 for part in name.split("/"))
        assert mask_name(name) == name or "~" in name


@pytest.mark.parametrize("key", ["a/one", "0001.png", "street_3/left-7.png", "k=3+x@2", 17])
def test_plain_keys_are_names(key: str | int) -> None:
    assert mask_name(key) == str(key)


@pytest.mark.parametrize(("key", "start"), [("A street.png", "A_street.png~"), ("città/Ö.png", "città/Ö.png~")])
def test_other_names_can_be_read(key: str, start: str) -> None:
    assert mask_name(key).startswith(start)
    assert mask_name(key) == mask_name(key)


def test_equal_keys_are_numbered(tmp_path: Path) -> None:
    seen = Masks(tmp_path)
    found = prediction(3)
    rows = [row["mask"] for _ in range(2) for row in write_masks(found, ["a", "a", "b c"], tmp_path, seen.seen)]
    assert rows == ["a", "a~2", mask_name("b c"), "a~3", "a~4", f"{mask_name('b c')}~2"]
    again = Masks(tmp_path)
    again.add(rows)
    assert again.seen == seen.seen


@dataclass
class Places:
    """A stream of images of which the keys repeat; it may stop, as a killed process would."""

    inputs: Tensor
    keys: list[str | int]
    fail_at: int | None = None
    key_name: str = "name"

    def __len__(self) -> int:
        return len(self.inputs)

    def chunks(self, size: int, start: int = 0) -> Iterator[Chunk]:
        for first in range(start, len(self), size):
            if self.fail_at is not None and first >= self.fail_at:
                raise KeyboardInterrupt
            keys = self.keys[first : first + size]
            errors = ["is empty" if key == "bad" else None for key in keys]
            read = [first + i for i, error in enumerate(errors) if error is None]
            yield Chunk(keys, errors, self.inputs[read])


def test_a_run_that_goes_on_finds_the_same_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)).eval()
    predictive = stochbn.Predictive(model, stochbn.fit(model, [normal(32, 3, 6, 6)], 8), 8)
    keys: list[str | int] = list(itertools.islice(itertools.cycle(["a", "bad", "B", "a", "b", "a~2"]), 24))
    x = normal(24, 3, 6, 6)
    tables = []
    for name in ("whole", "stopped"):
        path, masks = tmp_path / f"{name}.parquet", tmp_path / name
        if name == "stopped":
            with pytest.raises(KeyboardInterrupt):
                score(predictive, Places(x, keys, 15), path, settings={}, batch=3, part=6, masks=masks)
        score(predictive, Places(x, keys), path, settings={}, batch=3, part=6, masks=masks)
        tables.append(pyarrow.parquet.read_table(path).to_pylist())
    whole, stopped = tables
    assert [row["mask"] for row in whole] == [row["mask"] for row in stopped]
    names = [row["mask"] for row in whole if row["error"] is None]
    assert len({name.casefold() for name in names}) == len(names) == 20
    pictures = [
        sorted((p.name, p.read_bytes()) for p in (tmp_path / name).rglob("*.png")) for name in ("whole", "stopped")
    ]
    assert pictures[0] == pictures[1]
