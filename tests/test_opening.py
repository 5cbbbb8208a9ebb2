"""Which files are the data, what is left out with its count, and how tables of any storage are the same rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from stochbn.sources import Columns, DataError, Decoding, ParquetObjects, Preprocessing, open_objects

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def picture(path: Path, value: int = 100, size: tuple[int, int] = (6, 4), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path, **options)
    return path


def pictures(folder: Path, *classes: str, count: int = 3) -> Path:
    for name in classes:
        for i in range(count):
            picture(folder / name / f"{i}.png")
    return folder


def chunks(source: Path | str, **options: Any) -> Any:
    (chunk,) = open_objects(str(source), **options).chunks(10_000)
    return chunk


# ---------------------------------------------------------------- which files


@pytest.mark.parametrize(
    "names", [("train", "tram"), ("dev", "ops", "test"), ("valid", "void"), ("Test", "control"), ("training", "rest")]
)
def test_a_class_may_be_called_like_a_split(names: tuple[str, ...], tmp_path: Path) -> None:
    opened = open_objects(str(pictures(tmp_path / "data", *names)), prefer=("test",))
    assert opened.classes == tuple(sorted(names))
    assert len(opened) == 3 * len(names)


def test_folders_that_are_all_splits_are_splits_whatever_lies_beside_them(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("valid", 2)):
        pictures(tmp_path / "data" / split, "a", "b", count=count)
    (tmp_path / "data" / "README.txt").write_text("x")
    (tmp_path / "data" / ".git").mkdir()
    opened = open_objects(str(tmp_path / "data"), prefer=("test", "validation"))
    assert len(opened) == 4
    assert "(valid)" in str(opened.schema)
    assert "10 pictures more, of other splits" in str(opened.schema)
    picture(tmp_path / "data" / "other" / "0.png")
    assert open_objects(str(tmp_path / "data")).classes == ("other", "train", "valid")


def test_tables_are_of_a_split_where_all_of_them_are(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in (("train_a", 4), ("test_a", 3), ("test_b", 2)):
        pd.DataFrame({"a": np.arange(rows) * 0.5}).to_parquet(folder / f"{name}.parquet")
    assert len(open_objects(str(folder), prefer=("test",))) == 5
    assert len(ParquetObjects.open(str(folder), prefer=("test",))) == 5
    pd.DataFrame({"a": [0.5]}).to_parquet(folder / "tested.parquet")
    for opened in (open_objects(str(folder), prefer=("test",)), ParquetObjects.open(str(folder), prefer=("test",))):
        assert len(opened) == 10


def test_links_are_followed_and_circles_are_left_out(tmp_path: Path) -> None:
    store = pictures(tmp_path / "store", "cat", "dog")
    data = pictures(tmp_path / "data", "emu")
    (data / "cat").symlink_to(store / "cat")
    (data / "dog").mkdir()
    (data / "dog" / "one.png").symlink_to(store / "dog" / "1.png")
    (data / "cat" / "round").symlink_to(tmp_path / "data")
    (data / "emu" / "self").symlink_to(data / "emu")
    opened = open_objects(str(data))
    assert opened.classes == ("cat", "dog", "emu")
    assert len(opened) == 7
    assert "2 links to a folder around them" in str(opened.schema)


def test_what_systems_leave_is_left_out_and_counted(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", "a", "b")
    for name in ("a/._0.png", ".DS_Store", "b/.ipynb_checkpoints/0.png", "a/Thumbs.db", "__MACOSX/a/0.png",
                 "a/notes.txt", "list.json", "b/@eaDir/0.png"):  # fmt: skip
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(b"\0\5\x16\7")
    opened = open_objects(str(data))
    assert opened.classes == ("a", "b")
    assert len(opened) == 6
    told = str(opened.schema)
    for part in ("3 files hidden", "3 files left by other systems", "2 files by their ending (.txt 1, .json 1)"):
        assert part in told, told


def test_what_jobs_leave_beside_parquet_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "_temporary" / "0").mkdir(parents=True)
    for name in ("part-0.parquet", "part-1.parquet", "_temporary/0/part-1.parquet", ".part-2.parquet"):
        pd.DataFrame({"a": [0.5, 1.5]}).to_parquet(folder / name)
    (folder / "_SUCCESS").write_text("")
    for opened in (open_objects(str(folder)), ParquetObjects.open(str(folder))):
        assert len(opened) == 4
        assert "2 files left by jobs" in str(opened.schema)
        assert "1 file hidden" in str(opened.schema)


def test_every_file_of_a_hostile_folder_is_a_row_an_error_or_counted(tmp_path: Path) -> None:
    data, wanted = tmp_path / "data", {"fine": 0, "broken": 0, "out": 0}
    generator = np.random.default_rng(0)
    ways = ("fine", "fine", "cut", "empty", "text as png", "tiff stack", "hidden", "mac", "system", "other", "binary",
            "turned", "grey", "float", "huge name")  # fmt: skip
    for i in range(1500):
        way = ways[int(generator.integers(len(ways)))]
        folder = data / f"class {i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        path, kind = folder / f"{i}.png", "fine"
        if way in ("fine", "huge name"):
            picture(folder / (f"{i}" + "\u00e9\n" * (way == "huge name") + ".png"))
        elif way == "cut":
            content = picture(path).read_bytes()
            path.write_bytes(content[: len(content) // 2])
            kind = "broken"
        elif way == "empty":
            path.write_bytes(b"")
            kind = "broken"
        elif way == "text as png":
            path.write_text("not a picture")
            kind = "broken"
        elif way == "tiff stack":
            pages = [Image.new("L", (6, 4), v) for v in (0, 9)]
            pages[0].save(folder / f"{i}.tif", save_all=True, append_images=pages[1:])
            kind = "broken"
        elif way == "hidden":
            (folder / f".{i}.png").write_bytes(b"x")
            kind = "out"
        elif way == "mac":
            (folder / f"._{i}.jpg").write_bytes(b"x")
            kind = "out"
        elif way == "system":
            (folder / f"sub{i}").mkdir()
            (folder / f"sub{i}" / "Thumbs.db").write_bytes(b"x")
            kind = "out"
        elif way in ("other", "binary"):
            (folder / f"{i}.{'txt' if way == 'other' else 'dat'}").write_bytes(bytes(range(256)))
            kind = "out"
        elif way == "turned":
            exif = Image.Exif()
            exif[0x112] = 6
            picture(folder / f"{i}.jpg", size=(4, 6), exif=exif)
        elif way == "grey":
            Image.new("L", (6, 4), 7).save(path)
        elif way == "float":
            Image.new("F", (6, 4), 0.5).save(folder / f"{i}.tiff")
            kind = "broken"
        wanted[kind] += 1
    opened = open_objects(str(data), preprocess=Preprocessing())
    (chunk,) = opened.chunks(10_000)
    failed = sum(error is not None for error in chunk.errors)
    assert (len(chunk.inputs), failed) == (wanted["fine"], wanted["broken"])
    assert len(opened) == wanted["fine"] + wanted["broken"]
    told = [part for part in opened.schema.left_out if part.split()[0].replace(",", "").isdigit()]  # type: ignore[union-attr]
    assert sum(int(part.split()[0].replace(",", "")) for part in told) == wanted["out"]
    assert sum(map(sum, [wanted.values()])) == 1500


def test_a_folder_without_data_says_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".a.png").write_bytes(b"x")
    with pytest.raises(DataError):
        open_objects(str(tmp_path / "data"))


def test_data_of_save_to_disk_opens(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"a": [0.5, 1.5], "b": [1, 2], "label": ["x", "y"]})
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=one, test=one.select([0])).save_to_disk(str(tmp_path / "several"))
    opened = open_objects("one")
    assert len(opened) == 2
    assert opened.classes == ("x", "y")
    assert len(open_objects("several", prefer=("test",))) == 1
    assert len(open_objects("several", "train")) == 2


# ---------------------------------------------------------------- metadata


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_labels_come_from_a_file_of_metadata(ending: str, tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", "hospital_1", "hospital_2")
    rows = [{"file_name": f"hospital_{i}/{j}.png", "diagnosis": ("ill", "well")[j % 2]} for i in (1, 2) for j in (2, 0)]
    rows.append({"file_name": "hospital_1/gone.png", "diagnosis": "well"})
    if ending == "csv":
        pd.DataFrame(rows).to_csv(data / "metadata.csv", index=False)
    else:
        (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = open_objects(str(data), columns=Columns(label=("diagnosis",)))
    assert opened.classes == ("ill", "well")
    assert opened.labels.tolist() == [0, 0, 1, 0, 0]
    (chunk,) = opened.chunks(10)
    assert chunk.keys == [f"hospital_{k}.png" for k in ("1/0", "1/2", "1/gone", "2/0", "2/2")]
    assert [error is not None for error in chunk.errors] == [False, False, True, False, False]
    told = str(opened.schema)
    assert "2 pictures that metadata." in told
    assert "1 picture named there are missing" in told
    plain = open_objects(str(data))
    assert plain.classes == ("hospital_1", "hospital_2")
    assert f"metadata.{ending} has no column of labels (it has file_name, diagnosis)" in str(plain.schema)


def test_metadata_of_a_split_is_that_in_its_folder(tmp_path: Path) -> None:
    for split in ("train", "test"):
        picture(tmp_path / "data" / split / "0.png")
        (tmp_path / "data" / split / "metadata.csv").write_text(f"file_name,label\n0.png,{split}ed\n")
    assert open_objects("data", prefer=("test",)).classes == ("tested",)
    (tmp_path / "data" / "test" / "metadata.csv").write_text("file_name,label\n../train/0.png,x\n")
    with pytest.raises(DataError, match="outside its folder"):
        open_objects("data", prefer=("test",))


def test_an_empty_class_folder_keeps_the_numbers_of_the_others(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", "a", "c")
    (data / "b").mkdir()
    opened = open_objects(str(data))
    assert opened.classes == ("a", "b", "c")
    assert sorted(set(opened.labels.tolist())) == [0, 2]
    assert "Classes without a picture: b." in str(opened.schema)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright_as_pillow_turns_them(orientation: int, tmp_path: Path) -> None:
    pixels = np.arange(8 * 4 * 3, dtype=np.uint8).reshape(4, 8, 3) * 2
    exif = Image.Exif()
    exif[0x112] = orientation
    (tmp_path / "data").mkdir()
    for name in ("a.png", "a.webp"):
        Image.fromarray(pixels).save(tmp_path / "data" / name, exif=exif, lossless=True)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "data" / "a.png")), dtype=np.float32) / 255
    for i in range(2):
        upright = open_objects("data").rows.read(i)  # type: ignore[union-attr]
        assert np.allclose(np.asarray(upright) / 255, wanted)
        stored = open_objects("data", decoding=Decoding(exif=False)).rows.read(i)  # type: ignore[union-attr]
        assert np.asarray(stored).tolist() == pixels.tolist()


def test_an_exif_that_cannot_be_read_leaves_the_picture_as_it_is(tmp_path: Path) -> None:
    picture(tmp_path / "data" / "a.png", exif=b"Exif\0\0nonsense")
    assert chunks("data").errors == [None]


@pytest.mark.parametrize("kind", ["tif", "gif", "png", "webp"])
def test_pictures_with_several_pages_are_refused_or_one_is_chosen(kind: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pages = [Image.new("RGB", (5, 5), (v, v, v)) for v in (0, 100, 200)]
    pages[0].save(tmp_path / "data" / f"a.{kind}", save_all=True, append_images=pages[1:], lossless=True)
    (error,) = chunks("data").errors
    assert "has 3 pages (frames): choose one with --page" in error
    for page, value in enumerate((0, 100, 200)):
        found = chunks("data", decoding=Decoding(page=page)).inputs
        assert found.mean().item() == pytest.approx(value / 255, abs=0.01)
    assert "has no page 3" in chunks("data", decoding=Decoding(page=3)).errors[0]
    picture(tmp_path / "one" / "a.png", 50)
    assert chunks("one", decoding=Decoding(page=0)).errors == [None]


def test_a_mean_of_pixels_from_0_to_255_is_refused_with_what_was_meant(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", "a")
    for options, meant in (
        ({"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}, "--mean 0.485,0.456,0.406 --std 0.229"),
        ({"std": (255.0,)}, "--std 1"),
        ({"mean": (104.0, 117.0, 123.0)}, "--mean 0.4078,0.4588,0.4824"),
    ):
        with pytest.raises(ValueError, match="from 0 to 255") as caught:
            open_objects(str(data), preprocess=Preprocessing(**options))
        assert meant in str(caught.value)
    open_objects(str(data), preprocess=Preprocessing(mean=(0.9,), std=(1.0,)))
    np.save("x.npy", np.full((2, 3), 120.0))
    open_objects("x.npy", preprocess=Preprocessing(mean=(123.0,)))  # of arrays of any range


# ---------------------------------------------------------------- tables


def test_one_cell_that_is_no_number_is_the_error_of_its_row(tmp_path: Path) -> None:
    for name, cell in (("late", "?"), ("fraction", "2.5"), ("empty", ""), ("words", "n/a"), ("e", "1e3")):
        rows = [f"{i},{i % 7}" for i in range(5000)]
        rows[4321] = f"{cell},1"
        (tmp_path / f"{name}.csv").write_text("\n".join(["a,b", *rows]))
        found = chunks(f"{name}.csv")
        bad = [i for i, error in enumerate(found.errors) if error is not None]
        assert bad == ([] if name in ("fraction", "e") else [4321])
        assert found.inputs[10].tolist() == [10, 3]


def test_the_index_of_pandas_is_left_out_by_name(tmp_path: Path) -> None:
    frame = pd.DataFrame({"age": [1.0, 2.0], "dose": [3.0, 4.0]}, index=pd.Index([7, 8], name="patient"))
    frame.to_parquet("named.parquet")
    frame.rename_axis(None).to_parquet("unnamed.parquet")
    frame.rename_axis(None).to_csv("t.csv")
    pd.read_csv("t.csv").to_csv("twice.csv")
    for name, column in (("named.parquet", "patient"), ("unnamed.parquet", "__index_level_0__"), ("t.csv", ""),
                         ("twice.csv", "Unnamed: 0")):  # fmt: skip
        opened = open_objects(name)
        assert opened.schema is not None
        assert opened.schema.inputs == ("age", "dose")
        assert f"{column!r} (the index of a pandas table)" in str(opened.schema)
        if name.endswith("parquet"):
            assert ParquetObjects.open(name).schema.inputs == ("age", "dose")


def test_columns_that_are_no_inputs_are_named(tmp_path: Path) -> None:
    pd.DataFrame({"a": [0.5, 1], "town": ["x", "y"], "day": pd.to_datetime(["2020-01-01", "2020-01-02"]),
                  "target": [0, 1]}).to_csv("t.csv", index=False)  # fmt: skip
    told = str(open_objects("t.csv").schema)
    assert "inputs a (float64)" in told
    assert "labels in 'target'" in told
    assert "'town' (text), 'day' (" in told


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("cells", "labels", "classes"),
    [
        (["10", "9", "0", "1"], [10, 9, 0, 1], ()),
        (["dog", "cat", "dog", "NA"], [2, 1, 2, 0], ("NA", "cat", "dog")),
        ([True, False, True, True], [1, 0, 1, 1], ()),
        (["False", "True", "true", "False"], [0, 1, 1, 0], ()),
        ([3, 0, 2, 1], [3, 0, 2, 1], ()),
        (["1.5", "-2", "0", "3"], [1.5, -2, 0, 3], ()),
        (["0", "1", "", "1"], [0, 1, -1, 1], ()),
        (["no", "yes", "no", "no"], [0, 1, 0, 0], ("no", "yes")),
        ([0, 1, None, 1], [0, 1, -1, 1], ()),
        (["007", "7", "8", "9"], [7, 7, 8, 9], ()),
    ],
)
def test_labels_of_any_storage_are_the_same_numbers(
    kind: str, cells: list[Any], labels: list[float], classes: tuple[str, ...], tmp_path: Path
) -> None:
    frame = pd.DataFrame({"a": [0.5, 1, 2, 3], "label": cells})
    frame.to_csv("t.csv", index=False) if kind == "csv" else frame.to_parquet("t.parquet")
    opened = open_objects(f"t.{kind}")
    assert opened.classes == classes
    assert opened.labels.tolist() == labels


def test_labels_that_are_nearly_all_numbers_are_refused(tmp_path: Path) -> None:
    pd.DataFrame({"a": [0.5, 1, 2, 3], "label": ["0", "1", "unclear", "1"]}).to_csv("t.csv", index=False)
    opened = open_objects("t.csv")
    with pytest.raises(ValueError, match="numbers but for 'unclear'"):
        _ = opened.labels
    assert "Its labels cannot be used" in str(opened.schema)  # which predictions do not need
    assert len(next(opened.chunks(4)).inputs) == 4


def test_files_without_labels_have_missing_ones(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pd.DataFrame({"a": [0.5, 1.5], "label": [1, 0]}).to_csv("data/0.csv", index=False)
    pd.DataFrame({"a": [2.5]}).to_csv("data/1.csv", index=False)
    opened = open_objects("data")
    assert opened.labels.tolist() == [1, 0, -1]
    assert "3 rows of 2 files" in str(opened.schema)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", "int8", "bool", "float64", "<U2", "column"])
def test_labels_in_arrays_are_whole_numbers(kind: str, tmp_path: Path) -> None:
    y = np.array([0, 1, 1, 0, 1])
    stored = y[:, None] if kind == "column" else y.astype(kind)
    np.savez("x.npz", x=np.ones((5, 2), np.float32), y=stored)
    labels = open_objects("x.npz").labels
    assert labels.shape == (5,)
    assert labels.tolist() == y.tolist()


@pytest.mark.parametrize("kind", ["list", "array", "bool", "column", "uint8", "series", "float"])
def test_labels_of_a_loader_are_whole_numbers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    ways = {"list": "[0, 1, 1]", "array": "np.array([0, 1, 1])", "bool": "torch.tensor([False, True, True])",
            "column": "torch.tensor([[0], [1], [1]])", "uint8": "torch.tensor([0, 1, 1], dtype=torch.uint8)",
            "series": "pd.Series([0, 1, 1], index=[2, 0, 1])", "float": "torch.tensor([0.5, 1, 1])"}  # fmt: skip
    Path(f"loader_of_{kind}.py").write_text(
        f"import numpy as np, pandas as pd, torch\nbatches = [(torch.ones(3, 2), {ways[kind]})] * 2\n"
    )
    opened = open_objects(f"loader_of_{kind}:batches")
    assert opened.labels.tolist() == [0.5 if kind == "float" else 0, 1, 1] * 2


def test_categories_and_null_columns_meet_in_several_files(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    pd.DataFrame({"a": [1, 2], "kind": pd.Categorical(["x", "y"]), "label": pd.Categorical(["b", "a"])}).to_parquet(
        folder / "0.parquet"
    )
    pd.DataFrame({"label": ["c", "a"], "kind": [None, None], "a": [0.5, 1.5]}).to_parquet(folder / "1.parquet")
    opened = open_objects(str(folder))
    assert opened.classes == ("a", "b", "c")
    assert opened.labels.tolist() == [1, 0, 2, 0]
    (chunk,) = ParquetObjects.open(str(folder)).chunks(10)
    assert chunk.inputs.tolist() == [[1], [2], [0.5], [1.5]]


def test_files_that_cannot_be_one_table_are_told_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    pd.DataFrame({"a": [1.0], "dose": [2.0]}).to_parquet(folder / "0.parquet")
    pd.DataFrame({"a": [1.0]}).to_parquet(folder / "1.parquet")
    for way in (open_objects, ParquetObjects.open):
        with pytest.raises(DataError, match=r"1\.parquet' has no column 'dose'"):
            way(str(folder))
        assert len(way(str(folder), columns=Columns(("a",)))) == 2
    pd.DataFrame({"a": [[1.0, 2.0]], "dose": [1.0]}).to_parquet(folder / "1.parquet")
    with pytest.raises(DataError, match=r"the column 'a' is double in .*0\.parquet' and list"):
        open_objects(str(folder))
    names = [datasets.Features({"label": datasets.ClassLabel(names=n), "a": datasets.Value("float32")})
             for n in (["x", "y"], ["y", "x"])]  # fmt: skip
    for i, features in enumerate(names):
        table = datasets.Dataset.from_dict({"label": [0], "a": [1.0]}, features=features)
        table.to_parquet(str(folder / f"{i}.parquet"))
    with pytest.raises(DataError, match="number the classes of 'label' differently"):
        open_objects(str(folder))


def test_other_delimiters_and_marks_of_the_beginning_are_read(tmp_path: Path) -> None:
    (tmp_path / "semicolon.csv").write_text("\ufeffa;b;label\n1.5;2;x\n3;4;y\n", encoding="utf-8")
    (tmp_path / "tab.tsv").write_text('a\tb\tlabel\n1.5\t2\t"x"\n3\t4\ty\n')
    for name in ("semicolon.csv", "tab.tsv"):
        opened = open_objects(name)
        assert opened.classes == ("x", "y")
        assert next(iter(opened.batches(2)))[0].tolist() == [[1.5, 2], [3, 4]]
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    with pytest.raises(DataError, match="two columns 'a'"):
        open_objects("twice.csv")


# ---------------------------------------------------------------- the same rows, however they are stored

CELL = st.one_of(st.integers(-1000, 1000), st.floats(-1e6, 1e6, width=32), st.none())
NAMES = ("age", "dose", "mass")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(CELL, CELL, CELL), min_size=2, max_size=30),
    orders=st.lists(st.permutations(NAMES), min_size=3, max_size=3),
    kinds=st.lists(st.sampled_from(["float64", "float32", "text", "mixed"]), min_size=3, max_size=3),
    cut=st.integers(0, 30),
)
def test_a_row_is_the_same_however_it_is_stored(
    rows: list[tuple[Any, ...]], orders: list[tuple[str, ...]], kinds: list[str], cut: int, tmp_path: Path
) -> None:
    wanted = [None if None in row else torch.tensor(row, dtype=torch.float64).float().tolist() for row in rows]
    filled = [sum(row[i] is not None for row in rows) for i in range(3)]
    if min(filled) * 2 <= len(rows):  # a column of which most are missing is no column of numbers
        return
    folder = Path(tmp_path, f"case{len(os.listdir(tmp_path))}")  # noqa: PTH208
    folder.mkdir()
    held = open_held(folder)

    def frame(part: list[tuple[Any, ...]], order: tuple[str, ...], kind: str) -> Any:
        columns = {name: [row[NAMES.index(name)] for row in part] for name in order}
        if kind == "text":
            return pyarrow.table({n: pyarrow.array([None if c is None else repr(c) for c in v], pyarrow.string())
                                  for n, v in columns.items()})  # fmt: skip
        if kind == "mixed" and all(isinstance(c, int) for v in columns.values() for c in v):
            return pyarrow.table({n: pyarrow.array(v, pyarrow.int64()) for n, v in columns.items()})
        dtype = pyarrow.float32() if kind == "float32" else pyarrow.float64()
        return pyarrow.table({n: pyarrow.array([None if c is None else float(c) for c in v], dtype)
                              for n, v in columns.items()})  # fmt: skip

    (folder / "files").mkdir()
    for i, part in enumerate((rows[:cut], rows[cut:])):
        if part:
            pyarrow.parquet.write_table(frame(part, orders[i], kinds[i]), folder / "files" / f"{i}.parquet")
    pyarrow.parquet.write_table(frame(rows, orders[2], kinds[2]), folder / "one.parquet", row_group_size=7)
    lines = [",".join("" if row[NAMES.index(n)] is None else repr(row[NAMES.index(n)]) for n in orders[0])
             for row in rows]  # fmt: skip
    (folder / "t.csv").write_text("\n".join([",".join(orders[0]), *lines]) + "\n")
    columns = Columns(held=held)
    for opened in (
        open_objects(str(folder / "files"), columns=columns),
        ParquetObjects.open(str(folder / "files"), columns=columns),
        open_objects(str(folder / "one.parquet"), columns=columns),
        ParquetObjects.open(str(folder / "one.parquet"), columns=columns),
        open_objects(str(folder / "t.csv"), columns=columns),
    ):
        found: list[Any] = []
        for chunk in opened.chunks(4):
            inputs = iter([] if chunk.inputs is None else chunk.inputs.tolist())
            found += [next(inputs) if error is None else None for error in chunk.errors]
        assert found == wanted, opened


def open_held(folder: Path) -> Any:
    """The schema of a table of these columns."""
    pd.DataFrame({name: [0.5, 1.5] for name in NAMES}).to_csv(folder / "fitted.csv", index=False)
    return open_objects(str(folder / "fitted.csv")).schema
