"""True boxes from files and columns, moved with their pictures, and detectors evaluated by them at the command line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import stochbn
from conftest import command_output as run
from conftest import script, seeded, settled
from stochbn.sources import Columns, DataError, Preprocessing, RowObjects, build, load_weights, open_objects
from stochbn.sources.boxes import boxes_of_cells, read_coco
from stochbn.sources.pictures import Decoding
from stochbn.tasks import Detection
from test_own_network import told  # noqa: F401 - a fixture

NUMBER = itertools.count()
MODULE = """
import torch
from torch import nn

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1))

    def forward(self, x):
        found = self.body(x)
        places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in found.shape[2:]), indexing="ij"))
        centre = 4 * places.flip(0).to(x) + 4 * found[:, :2].sigmoid()
        size = 6 + 10 * found[:, 2:4].sigmoid()
        return torch.cat([centre, size, (2 * found[:, 4:]).sigmoid()], 1).flatten(2)

def head():
    return Head()
"""
GEOMETRIES: list[dict[str, Any]] = [{"pad": 0.0}, {"squash": True}, {"squash": True, "crop": 0.8}, {}, {"crop": 0.8}]
PADDED = Preprocessing((64, 80), pad=0.5)
CATEGORIES = [{"id": 7, "name": "square"}, {"id": 3, "name": "disc"}]  # numbered by their ids: disc is 0


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"own_head_{next(NUMBER)}"
    Path(f"{name}.py").write_text(MODULE)
    return name


def make_pictures(count: int, folder: str = "pictures") -> dict[str, Any]:
    """Pictures of several sizes with one bright rectangle or more, and what COCO's files say of them."""
    generator = np.random.default_rng(0)
    Path(folder).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(count):
        height, width = (32, 48) if i % 2 else (40, 32)
        pixels = generator.integers(0, 60, (height, width, 3), dtype=np.uint8)
        images.append({"id": 10 + i, "file_name": f"{i:03}.png", "height": height, "width": width})
        for _ in range(i % 3):
            side, left, top = 10, int(generator.integers(0, width - 10)), int(generator.integers(0, height - 10))
            kind = CATEGORIES[int(generator.integers(2))]
            pixels[top : top + side, left : left + side] = (220, 40, 40) if kind["name"] == "disc" else (40, 220, 40)
            annotations.append(
                {"id": len(annotations), "image_id": 10 + i, "category_id": kind["id"], "bbox": [left, top, side, side],
                 "iscrowd": int(i == 5)}
            )  # fmt: skip
        Image.fromarray(pixels).save(f"{folder}/{i:03}.png")
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def opened(source: str = "pictures", label: str = "boxes.json", **given: Any) -> Any:
    return open_objects(source, columns=Columns(label=(label,)), **given)


def boxes(objects: Any, size: int = 4) -> list[Tensor]:
    rows = [row for _, labels in objects.batches(size) for row in labels]
    return [row[~row[:, 0].isnan()] for row in rows]


def fitting(coco: Any, size: tuple[int, int]) -> list[list[list[float]]]:
    """Boxes in pictures that are resized to fit into a size, and lie in its middle."""
    found = []
    for image in coco["images"]:
        ratio = min(size[0] / image["height"], size[1] / image["width"])
        tall, wide = round(image["height"] * ratio), round(image["width"] * ratio)
        x, y = wide / image["width"], tall / image["height"]
        left, top = (size[1] - wide) // 2, (size[0] - tall) // 2
        rows = []
        for one in coco["annotations"]:
            if one["image_id"] == image["id"]:
                a, b, w, h = one["bbox"]
                sides = [left + a * x, top + b * y, left + (a + w) * x, top + (b + h) * y]
                rows.append([*sides, float(one["category_id"] == 7), float(one["iscrowd"])])
        found.append(rows)
    return found


def test_boxes_of_a_file_move_with_their_pictures(module: str) -> None:
    coco = make_pictures(9)
    Path("boxes.json").write_text(json.dumps(coco))
    objects = opened(preprocess=PADDED)
    assert objects.classes == ("disc", "square")
    assert "9 boxes in boxes.json" in str(objects.schema)
    for row, wanted in zip(boxes(objects), fitting(coco, (64, 80)), strict=True):
        torch.testing.assert_close(row, torch.tensor(wanted, dtype=torch.float64).view(-1, 6))
    for (x, _), rows in zip(objects.batches(1), boxes(objects), strict=True):
        for left, top, right, bottom, kind, _ in rows.tolist():  # the rectangle is where the box says
            inside = x[0, :, int(top) + 2 : int(bottom) - 2, int(left) + 2 : int(right) - 2]
            assert inside.mean((1, 2)).argmax() == kind
    reordered = opened(preprocess=PADDED).shuffled(1)
    assert [len(one) for one in boxes(reordered)] == [int(i) % 3 for i in reordered.order]
    renamed = boxes(opened(classes=("x", "square", "disc"), preprocess=PADDED))
    for one, other in zip(renamed, boxes(objects), strict=True):
        assert one[:, :4].equal(other[:, :4])
        assert one[:, 4].equal(2 - other[:, 4])


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 40), st.integers(5, 40), st.integers(5, 40), st.integers(5, 40), st.sampled_from(GEOMETRIES))
def test_boxes_lie_where_pixels_go(height: int, width: int, tall: int, wide: int, how: dict[str, Any]) -> None:
    """A picture whose right lower quarter is white: so is that of its box, as far as it is not cropped."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[height // 2 :, width // 2 :] = 255
    change = Preprocessing((tall, wide), interpolation="nearest", **how)
    found = change(Image.fromarray(pixels))
    box = torch.tensor([[width // 2, height // 2, width, height]], dtype=torch.float64)
    placement = change.placement((height, width))
    inside = placement.inward(box)
    if how.keys() & {"pad", "squash"} and "crop" not in how:
        assert change.boxes(box, (height, width)).equal(inside)
    torch.testing.assert_close(placement.outward(inside), box)
    torch.testing.assert_close(placement.outward_std(torch.ones(1, 4)), placement.outward(inside + 1).sub(box).float())
    sides = inside[0].clamp(min=0).minimum(torch.tensor([wide, tall] * 2)).numpy()
    white = (found[0] > 0.5).nonzero()
    if len(white):
        low, high = white.amin(0).tolist(), (white.amax(0) + 1).tolist()
        assert np.abs(sides - [low[1], low[0], high[1], high[0]]).max() <= 1


@pytest.mark.parametrize("pad", [None, 0.25])
def test_pictures_are_prepared_without_the_library_as_with_it(module: str, pad: float | None) -> None:
    """By the script in examples/ that uses what an exported file says of its inputs."""
    make_pictures(2)
    change = Preprocessing((24, 30), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), pad=pad)
    pytest.importorskip("onnxruntime")
    without = script(Path(__file__).parents[1] / "examples" / "onnx_pictures.py")
    for name in ("000", "001"):
        found = without.prepared(f"pictures/{name}.png", **dataclasses.asdict(change), exif=True)
        wanted = change(Image.open(f"pictures/{name}.png"))
        torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-5, rtol=1e-5)


def test_a_preprocessing_that_crops_or_does_not_tell_is_refused(module: str) -> None:
    Path("boxes.json").write_text(json.dumps(make_pictures(3)))
    with pytest.raises(ValueError, match="crops pictures, so boxes would be cut"):
        boxes(opened(preprocess=Preprocessing((32, 32))))

    def shrink(image: Any) -> Tensor:
        return torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1) / 255

    with pytest.raises(ValueError, match="40x32 pixels, the preprocessing makes 16x16 of them, and nothing says where"):
        boxes(opened(preprocess=shrink))
    shrink.boxes = lambda sides, size: sides * torch.tensor([16 / size[1], 16 / size[0]] * 2)  # type: ignore[attr-defined]
    assert boxes(opened(preprocess=shrink))[1][0, 2] <= 16
    for bad in ({"pad": 2.0}, {"pad": 0.5, "squash": True}):
        with pytest.raises(ValueError, match="pad must lie"):
            Preprocessing((8, 8), **bad)  # type: ignore[arg-type]


def test_pictures_and_files_that_do_not_fit_are_told(module: str) -> None:
    coco = make_pictures(6)
    named = {**coco, "images": [{**one, "file_name": f"val/{one['file_name']}"} for one in coco["images"]]}
    Path("boxes.json").write_text(json.dumps(named))
    Path("pictures/005.png").unlink()
    Image.new("RGB", (8, 8)).save("pictures/more.png")
    objects = opened(preprocess=Preprocessing((32, 32), pad=0))
    assert len(objects) == 5
    assert "1 picture that boxes.json does not name" in str(objects.schema)
    assert "Not in the folder: 1 picture that boxes.json names" in str(objects.schema)
    Path("other.json").write_text(json.dumps({**coco, "images": [], "annotations": []}))
    with pytest.raises(DataError, match="names no picture of 'pictures'"):
        opened(label="other.json")
    turned = [{**one, "height": one["width"], "width": one["height"]} for one in coco["images"]]
    Path("other.json").write_text(json.dumps({**coco, "images": turned}))
    with pytest.raises(ValueError, match=r"has 40x32 pixels .*says 32x40; .*take --no-exif"):
        boxes(opened(label="other.json", preprocess=Preprocessing((32, 32), pad=0)))
    for wrong, message in (
        ("{", "cannot be read as JSON"),
        ("[]", "must have the lists images, annotations, categories"),
        ("[" * 100_000, "cannot be read as JSON"),
        (json.dumps({**coco, "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "a"}]}), "of one name: 'a'"),
    ):
        Path("other.json").write_text(wrong)
        with pytest.raises(DataError, match=message):
            read_coco(Path("other.json"))


def test_boxes_of_classes_that_the_network_lacks_are_left_out_and_counted(module: str) -> None:
    coco = make_pictures(9)
    Path("boxes.json").write_text(json.dumps(coco))
    whole = boxes(opened(preprocess=PADDED))
    count = sum(int((one[:, 4] == 1).sum()) for one in whole)
    assert 0 < count < 9
    objects = opened(classes=("x", "disc"), preprocess=PADDED)
    assert objects.classes == ("x", "disc")
    assert f"Left out: {count} boxes of classes that the network does not have: square." in str(objects.schema)
    for one, other in zip(boxes(objects), whole, strict=True):
        kept = other[other[:, 4] == 0]
        assert one[:, [0, 1, 2, 3, 5]].equal(kept[:, [0, 1, 2, 3, 5]])
        assert (one[:, 4] == 1).all()
    assert "Left out" not in str(opened(classes=("square", "y", "disc"), preprocess=PADDED).schema)
    assert "9 boxes of classes that the network does not have: " in str(opened(classes=("x", "y")).schema)
    unused = [*CATEGORIES, {"id": 1, "name": "star"}]  # a category of which there is no box
    Path("boxes.json").write_text(json.dumps({**coco, "categories": unused}))
    assert "Left out" not in str(opened(classes=("disc", "square"), preprocess=PADDED).schema)


def test_ids_that_repeat_are_refused(module: str) -> None:
    coco = make_pictures(6)
    merged = [{**one, "id": one["id"] % 3} for one in coco["images"]]  # two files, each numbered from 0
    for change, message in (
        ({"images": merged}, r"images\[3\] of 'other.json' has the id 1, as '000.png' has: ids must differ"),
        ({"categories": [{"id": 3, "name": "x"}, *CATEGORIES]}, r"categories\[2\] .* has the id 3, as 'x' has"),
        ({"categories": [*CATEGORIES, {"id": 7.0, "name": "x"}]}, r"categories\[2\] .* has the id 7, as 'square' has"),
    ):
        Path("other.json").write_text(json.dumps({**coco, **change}))
        with pytest.raises(DataError, match=message):
            opened(label="other.json")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("category_id", float("inf"), "'category_id': inf; expected a whole number"),
        ("category_id", True, "'category_id': True; expected a whole number"),
        ("category_id", 5, "'category_id': 5; expected an id of categories"),
        ("image_id", "10", "'image_id': '10'; expected an id of images"),
        ("image_id", [10], r"'image_id': \[10\]; expected a whole number or a text"),
        ("image_id", None, "'image_id': None; expected a whole number or a text"),
        ("bbox", None, "'bbox': None; expected a list"),
        ("bbox", "1111", "'bbox': '1111'; expected a list"),
        ("bbox", [1, 1, 2], r"'bbox': \[1, 1, 2\]; expected finite left, top, width and height"),
        ("bbox", [1, 1, -1, 1], r"'bbox': \[1, 1, -1, 1\]; expected finite left, top"),
        ("bbox", [float("nan"), 1, 1, 1], r"'bbox': \[nan, 1, 1, 1\]; expected finite left, top"),
        ("bbox", [10**400, 1, 1, 1], "'bbox': .*; expected finite left, top"),
        ("iscrowd", "0", "'iscrowd': '0'; expected 0, 1, true or false"),
        ("iscrowd", 2, "'iscrowd': 2; expected 0, 1, true or false"),
        ("iscrowd", None, "'iscrowd': None; expected 0, 1, true or false"),
    ],
)
def test_a_wrong_annotation_is_named(module: str, field: str, value: Any, message: str) -> None:
    coco = make_pictures(4)
    wrong = [coco["annotations"][0], {**coco["annotations"][1], field: value}]
    Path("other.json").write_text(json.dumps({**coco, "annotations": wrong}))
    with pytest.raises(DataError, match=r"annotations\[1\] of 'other.json' has " + message):
        read_coco(Path("other.json"))
    del wrong[1][field]
    Path("other.json").write_text(json.dumps({**coco, "annotations": wrong}))
    if field == "iscrowd":
        assert read_coco(Path("other.json")).boxes["001.png"].shape == (1, 6)
    else:
        with pytest.raises(DataError, match=rf"annotations\[1\] of 'other.json' has no '{field}'; it has id"):
            read_coco(Path("other.json"))
    for crowd, number in ((True, 1), (False, 0), (1, 1), (0, 0)):
        Path("other.json").write_text(
            json.dumps({**coco, "annotations": [{**coco["annotations"][0], "iscrowd": crowd}]})
        )
        assert read_coco(Path("other.json")).boxes["001.png"][0, 5] == number


def turned(path: str, orientation: int) -> None:
    """Have a picture say that it is stored in another orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(path).save(path, exif=exif)


@pytest.mark.parametrize("way", ["sizes", "none", "column", "table"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_boxes_of_photos_that_are_turned_upright_need_a_word(module: str, way: str, orientation: int) -> None:
    coco = make_pictures(3)
    turned("pictures/000.png", 3)  # no box, so that nothing is unclear
    turned("pictures/001.png", orientation)  # 32x48 as it is stored
    bare = [{"id": one["id"], "file_name": one["file_name"]} for one in coco["images"]]
    Path("boxes.json").write_text(json.dumps(coco if way == "sizes" else {**coco, "images": bare}))
    cells: list[dict[str, Any]] = [
        {
            "bbox": [one["bbox"] for one in coco["annotations"] if one["image_id"] == 10 + i],
            "category": [one["category_id"] for one in coco["annotations"] if one["image_id"] == 10 + i],
        }
        for i in range(3)
    ]
    if way == "column":
        rows = [{"file_name": f"{i:03}.png", "objects": cell} for i, cell in enumerate(cells)]
        Path("pictures/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if way == "table":
        pictures = [{"bytes": Path(f"pictures/{i:03}.png").read_bytes()} for i in range(3)]
        datasets.Dataset.from_dict({"image": pictures, "objects": cells}).cast_column(
            "image", datasets.Image()
        ).to_parquet("table.parquet")
    source = "table.parquet" if way == "table" else "pictures"
    label = "objects" if way in ("column", "table") else "boxes.json"
    place = Preprocessing((64, 64), pad=0)

    def found(exif: bool | None) -> list[Tensor]:
        return boxes(opened(source, label, preprocess=place, decoding=Decoding(exif)))

    stored = found(False)
    assert [len(one) for one in stored] == [0, 1, 2]
    if orientation == 1:
        assert all(map(torch.equal, found(None), stored))
        return
    by_size = way == "sizes" and orientation == 6
    message = "says 32x48; .*take --no-exif" if by_size else rf"orientation \({orientation}\).*--no-exif.* --exif"
    with pytest.raises(ValueError, match=rf"(1|001\.png) .*{message}"):
        found(None)
    objects = opened(source, label, preprocess=place)
    assert isinstance(objects, RowObjects)
    if way != "sizes":
        assert next(iter(objects.chunks(3))).errors == [None] * 3  # nothing is asked where boxes are not needed
        assert len(found(True)[1]) == 1
    if by_size:
        coco["images"][1] |= {"height": 48, "width": 32}  # of the upright picture alone
        Path("boxes.json").write_text(json.dumps(coco))
        assert all(map(torch.equal, found(None), found(True)))
        with pytest.raises(ValueError, match=r"says 48x32; .*turned upright, take --exif"):
            found(False)


def test_columns_of_boxes_are_read_from_metadata_and_tables(module: str) -> None:
    make_pictures(3)
    rows: list[dict[str, Any]] = [
        {"file_name": "000.png", "objects": {"bbox": [], "category": []}},
        {"file_name": "001.png", "objects": {"bbox": [[1, 2, 10, 20]], "category": ["b"]}},
        {"file_name": "002.png", "objects": {"bbox": [[0, 0, 4, 4], [2, 2, 6, 6]], "category": ["a", "b"]}},
    ]
    Path("pictures/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    wanted = [[], [[1, 2, 11, 22, 1, 0]], [[0, 0, 4, 4, 0, 0], [2, 2, 8, 8, 1, 0]]]
    objects = opened(label="objects", preprocess=Preprocessing())
    assert objects.classes == ("a", "b")
    assert [one.tolist() for one in boxes(objects, 1)] == wanted
    kind = datasets.ClassLabel(names=["z", "a", "b"])
    features = datasets.Features(
        {"image": datasets.Image(), "objects": {"bbox": datasets.List(datasets.List(datasets.Value("float32"))),
         "category": datasets.List(kind)}}
    )  # fmt: skip
    cells = [
        {**row["objects"], "category": [1 + ord(k) - ord("a") for k in row["objects"]["category"]]} for row in rows
    ]
    pictures = [f"pictures/{row['file_name']}" for row in rows]
    datasets.Dataset.from_dict({"image": pictures, "objects": cells}, features).to_parquet("table.parquet")
    table = opened("table.parquet", "objects", preprocess=Preprocessing())
    assert isinstance(table, RowObjects)
    assert table.classes == ("z", "a", "b")
    assert [[[*row[:4], row[4] - 1, row[5]] for row in one.tolist()] for one in boxes(table, 1)] == wanted
    several, names = boxes_of_cells([[{"bbox": [1, 2, 3, 4], "category_id": 5}], None], "it")
    assert several[0, 0].tolist() == [1, 2, 4, 6, 5, 0]
    assert several[1].isnan().all()
    assert names == ()
    for wrong in (
        [{"bbox": [[1, 2, 3, 4]]}],
        [{"bbox": [[1, 2, 3]], "label": [0]}],
        [{"bbox": [], "label": [1]}],
        [{"bbox": [[float("inf"), 2, 3, 4]], "label": [0]}],
        [{"bbox": [[10**400, 2, 3, 4]], "label": [0]}],
        [{"bbox": [[1, 2, 3, 4]], "label": [[0]]}],
    ):
        with pytest.raises(ValueError, match="it has a cell without boxes"):
            boxes_of_cells(wrong, "it")
    for kind in (float("inf"), 10**400, None):
        with pytest.raises(ValueError, match="it has classes that are neither whole numbers nor names"):
            boxes_of_cells([{"bbox": [[1, 2, 3, 4]], "label": [kind]}], "it")
    Path("pictures/metadata.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"metadata\.jsonl' cannot be read"):
        opened(label="objects")


def given_network(module: str) -> tuple[str, ...]:
    torch.manual_seed(0)
    model = settled(build(f"{module}:head", {}).model, 3, 48, 48)
    save_file(model.state_dict(), "w.safetensors")
    given = "--model", f"{module}:head", "--weights", "w.safetensors", "--task", "detection", "--size", "48"
    run("fit", *given, "--data", "pictures", "--batch-size", 4)
    return given


@pytest.mark.filterwarnings("ignore::UserWarning")  # of a network that has learnt nothing
def test_a_detector_is_evaluated_at_the_command_line(module: str) -> None:
    coco = make_pictures(24)
    Path("boxes.json").write_text(json.dumps(coco))
    given = given_network(module)
    labelled = "--data", "pictures", "--label", "boxes.json"
    text = run("evaluate", *given, *labelled, "--draws", 8, "--out", "r", "--report", "p.html")
    found = json.loads(Path("r/results.json").read_text())
    model = build(f"{module}:head", {}).model
    load_weights(model, Path("w.safetensors"))
    objects = opened(preprocess=Preprocessing((48, 48), pad=114 / 255))
    task = Detection()
    posterior = stochbn.load("w.sbn.safetensors")
    predictives = {
        "plain": stochbn.Predictive(model, task=task),
        "SBN": stochbn.Predictive(model, posterior, 8, task=task),
    }
    for name, one in predictives.items():
        scores = task.scores((one(x, generator=seeded()), y) for x, y in objects.batches(100))
        assert found["scores"][name] == pytest.approx(scores.values, rel=1e-3, abs=1e-4)
    assert "What SBN changes in the AP" in text
    assert found["loss"] == "AP"
    assert found["change"] == pytest.approx(found["scores"]["SBN"]["ap"] - found["scores"]["plain"]["ap"])
    page = Path("p.html").read_text()
    assert page.count('role="img"') == 24  # twelve pictures of each kind
    assert "Which detections to take" in page
    assert "disc" in page
    assert 'class="missed"' in page
    assert "--task detection" in text
    Path(f"{module}_more.py").write_text(MODULE.replace("nn.Conv2d(8, 6, 1)", "nn.Conv2d(8, 7, 1)"))
    with pytest.raises(ValueError, match=r"has 2 classes, numbered from 0 .*network has 3"):
        run("evaluate", "--model", f"{module}_more:head", *given[4:], *labelled)
    for names in (["disc", "x"], ["x", "y"]):
        Path(f"{module}_{names[0]}.py").write_text(f"classes = {names}\n{MODULE}")
    words = run("evaluate", "--model", f"{module}_disc:head", *given[2:], *labelled).split()
    assert "boxes of classes that the network does not have: square." in " ".join(words)
    with pytest.raises(ValueError, match="no picture has a box of the network's classes"):
        run("evaluate", "--model", f"{module}_x:head", *given[2:], *labelled)
