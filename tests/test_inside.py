"""Files that data names are opened in the folder of the data, and nowhere else."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from stochbn.sources import Chunk, Columns, DataError, ParquetObjects, Preprocessing, open_objects
from stochbn.sources.inside import open_inside
from stochbn.sources.named import load
from stochbn.sources.pictures import decode
from stochbn.sources.rows import TableRows

OUTSIDE = "names a file outside the folder of the data, which is not opened; store the image as bytes"
STORED = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def encoded(size: tuple[int, int] = (6, 5), kind: str = "PNG", color: int = 200) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (color, 10, 10)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data with an image, beside a folder with an image and links that lead there and nowhere."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, other = tmp_path / "data", tmp_path / "database"  # of which the name begins alike
    for one in (folder, other):
        (one / "in").mkdir(parents=True)
        (one / "in" / "a.png").write_bytes(encoded())
    (folder / "link.png").symlink_to(other / "in" / "a.png")
    (folder / "out").symlink_to(other)
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "again.png").symlink_to("in/a.png")
    os.mkfifo(folder / "pipe.png")
    monkeypatch.chdir(tmp_path)
    return folder


WITHIN = ["in/a.png", "./in/../in/a.png", "again.png", "{data}/in/a.png", "in//a.png"]
WITHOUT = [
    "../database/in/a.png", "{other}/in/a.png", "link.png", "out/in/a.png", "out/nothing.png", "/etc/passwd",
    "/etc/no-such-file", "/dev/zero", "/dev/stdin", "/proc/self/environ", "in/../../database/in/a.png", "..", "/",
    "file://{data}/in/a.png", "http://127.0.0.1:9/a.png", "https://example.org/a.png", "s3://bucket/a.png",
    "zip://a.png::{data}/in/a.zip", "/nowhere/../{data}/in/a.png/../../../x.png", "{other}",
]  # fmt: skip
UNREADABLE = ["nothing.png", "in", "", "pipe.png", "circle.png", "a\0.png", "x" * 5000, "~/a.png"]


def named(text: str, data: Path) -> str:
    return text.replace("{data}", str(data)).replace("{other}", str(data.parent / "database"))


@pytest.mark.parametrize("name", WITHIN)
def test_a_file_in_the_folder_is_opened(name: str, data: Path) -> None:
    with open_inside(named(name, data), (data,)) as file:
        assert file.read() == encoded()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", WITHOUT)
def test_no_file_elsewhere_is_opened_and_it_is_not_told_whether_it_is_there(name: str, data: Path) -> None:
    with pytest.raises(ValueError) as caught:
        open_inside(named(name, data), (data,))
    assert str(caught.value) == OUTSIDE


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_file_in_the_folder_is_an_error(name: str, data: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read in the folder|is no regular file|outside the folder"):
        open_inside(name, (data,))


@pytest.mark.parametrize("name", [None, 3, b"in/a.png", Path("in/a.png")])
def test_a_name_is_a_text(name: Any, data: Path) -> None:
    with pytest.raises(ValueError, match="outside the folder"):
        open_inside(name, (data,))


def test_without_a_folder_nothing_is_opened(data: Path) -> None:
    with pytest.raises(ValueError, match="outside the folder"):
        open_inside(str(data / "in" / "a.png"), ())


def test_a_folder_behind_a_link_is_the_folder(data: Path) -> None:
    link = data.parent / "linked"
    link.symlink_to(data)
    for name in ("in/a.png", str(link / "in" / "a.png"), str(data / "in" / "a.png")):
        with open_inside(name, (link,)) as file:
            assert file.read() == encoded()


def test_a_path_is_no_image() -> None:
    for source in ("/etc/passwd", Path("/etc/passwd"), 0):
        with pytest.raises(ValueError, match="expected an image as bytes"):
            decode(source)
    with pytest.raises(ValueError, match="no format that is known"):
        decode(b"/etc/passwd")


def table(path: Path, cells: list[Any], kind: Any = STORED, features: Any = None) -> None:
    column = pyarrow.table({"image": pyarrow.array(cells, kind), "label": list(range(len(cells)))})
    if features is not None:
        column = datasets.Dataset(column).cast(features).data.table
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(column, path)


def all_of(stream: Any) -> Chunk:
    (chunk,) = stream.chunks(100)
    found: Chunk = chunk
    return found


def as_file(data: Path) -> Any:
    return open_objects(str(data / "x.parquet"))


def as_stream(data: Path) -> Any:
    return ParquetObjects.open(str(data / "x.parquet"))


def as_folder(data: Path) -> Any:
    return ParquetObjects.open(str(data))


def as_relative(data: Path) -> Any:
    return ParquetObjects.open("data/x.parquet")


TYPES = {
    "without a type": None,
    "with the type of datasets": datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("opened", [as_file, as_stream, as_folder, as_relative])
@pytest.mark.parametrize("features", TYPES)
def test_images_in_parquet_are_bytes_or_files_of_the_folder(
    features: str, opened: Callable[[Path], Any], data: Path
) -> None:
    within, without = [named(name, data) for name in WITHIN], [named(name, data) for name in WITHOUT]
    unreadable = [name for name in UNREADABLE if "\0" not in name]
    names = [*within, *without, *unreadable]
    cells = [{"bytes": encoded(), "path": "/etc/passwd"}, *({"bytes": None, "path": name} for name in names), None]
    table(data / "x.parquet", cells, features=TYPES[features])
    chunk = all_of(opened(data))
    read, rest = chunk.errors[: len(within) + 1], chunk.errors[len(within) + 1 :]
    assert read == [None] * len(read)
    assert len(chunk.inputs) == len(read)
    assert rest[: len(without)] == [OUTSIDE] * len(without)
    assert all(rest)
    assert rest[-1] == "is empty"


def test_a_description_in_a_folder_of_csv_does_not_make_paths_images_of_anywhere(data: Path) -> None:
    folder = data.parent / "described"
    folder.mkdir()
    (folder / "train.csv").write_text(f"image,label\n{data}/in/a.png,0\n/etc/passwd,1\nown.png,1\n")
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype: int64\n---\n"
    )
    rows = open_objects(str(folder)).rows  # type: ignore[union-attr]
    for position in range(2):
        with pytest.raises(ValueError, match=r"outside the folder of the data, which is not opened"):
            rows.read(position)
    with pytest.raises(ValueError, match="cannot be read in the folder of the data"):
        rows.read(2)
    with pytest.raises(DataError, match="outside the folder of the data"):
        load(str(folder), "train")


@pytest.mark.parametrize(
    "text",
    ["data_files: ../data/x.csv", "data_files: [{split: train, path: /etc/passwd}]", "data_dir: ../data",
     "data_files: [{split: train, path: ['a.csv', 'http://127.0.0.1:9/a.csv']}]"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_description_that_names_data_elsewhere_is_refused(text: str, name: str, data: Path) -> None:
    (data / "x.csv").write_text("a,label\n1,0\n")
    folder = data.parent / "described"
    folder.mkdir()
    (folder / "a.csv").write_text("a,label\n1,0\n")
    config = f"configs:\n- config_name: default\n  {text}\n"
    (folder / name).write_text(f"---\n{config}---\n" if name == "README.md" else config)
    with pytest.raises(DataError, match="names data outside the folder"):
        open_objects(str(folder))


def test_a_description_may_name_the_files_of_its_folder(data: Path) -> None:
    folder = data.parent / "described"
    folder.mkdir()
    (folder / "a.csv").write_text("a,label\n1,0\n2,1\n")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.csv\n---\n")
    assert len(open_objects(str(folder))) == 2


@pytest.mark.parametrize("column", ["key", "label", "second input", "list"])
def test_columns_of_files_are_not_opened_for_anything_else(column: str, data: Path) -> None:
    stored: dict[str, Any] = {"bytes": None, "path": "/etc/passwd"}
    cells: dict[str, Any] = {"x": [1.0], "other": [stored], "many": [[stored]]}
    kinds: dict[str, Any] = {
        "x": datasets.Value("float32"), "other": datasets.Image(), "many": datasets.List(datasets.Image()),
    }  # fmt: skip
    loaded = datasets.Dataset.from_dict(cells).cast(datasets.Features(kinds))
    ways: dict[str, dict[str, Any]] = {
        "key": {"inputs": ("x",), "key": "other"},
        "label": {"inputs": ("x",), "label": ("other",)},
        "second input": {"inputs": ("x", "other")},
        "list": {"inputs": ("many",)},
    }
    with pytest.raises(ValueError, match="is of files; name columns of images or numbers"):
        TableRows(loaded, "data", folders=(data,), **ways[column])


def test_sound_is_not_opened(data: Path) -> None:
    loaded = datasets.Dataset.from_dict({"sound": ["/etc/passwd"], "x": [1.0]})
    loaded = loaded.cast_column("sound", datasets.Audio())
    with pytest.raises(ValueError, match="the column 'sound' of data is of files"):
        TableRows(loaded, "data", ("sound",), folders=(data,))
    assert TableRows(loaded, "data", folders=(data,)).read(0).tolist() == [1.0]


def test_a_text_that_names_a_file_is_no_input(data: Path) -> None:
    (data / "x.csv").write_text("image,label\nin/a.png,0\n")
    with pytest.raises(ValueError, match=r"no column of images or numbers|holds text"):
        open_objects(str(data / "x.csv"))


def test_nothing_of_a_file_that_cannot_be_read_goes_to_the_terminal(
    data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (data / "x.csv").write_text('a,label\n1,0\n"\x1b[2J,3,4,5\n')
    with pytest.raises(DataError, match="cannot be read as csv"):
        open_objects(str(data / "x.csv"))
    assert capfd.readouterr().err == ""


@pytest.mark.timeout(20)
def test_a_pipe_among_the_images_of_a_folder_is_an_error_of_its_row(data: Path) -> None:
    (data / "circle.png").unlink()
    (data / "folder.png").mkdir()
    (data / "folder.png" / "b.png").write_bytes(encoded())
    opened = open_objects(str(data))
    found = dict(zip(*(lambda c: (c.keys, c.errors))(all_of(opened)), strict=True))
    assert found["in/a.png"] is None
    assert "is no regular file" in str(found["pipe.png"])
    assert found["folder.png/b.png"] is None
    assert "folder.png" not in found


@pytest.mark.timeout(20)
def test_a_pipe_among_parquet_files_is_told(data: Path) -> None:
    table(data / "x.parquet", [{"bytes": encoded(), "path": None}])
    os.mkfifo(data / "y.parquet")
    with pytest.raises(DataError, match=r"y.parquet' is no regular file"):
        ParquetObjects.open(str(data))


@pytest.mark.parametrize("most", [3000, None])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_too_many_pixels_is_an_error(most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if most is None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    assert decode(encoded((60, 50)), most).size == (60, 50)
    for size in ((61, 50), (200, 100)):  # Pillow itself warns of the first, and refuses the second
        for kind in ("PNG", "BMP", "JPEG"):
            with pytest.raises(ValueError, match=r"is an image of \w+ pixels, where at most 3000 are decoded"):
                decode(encoded(size, kind), most)


def test_no_program_is_started_for_an_image() -> None:
    with pytest.raises(ValueError, match="no format that is known"):
        decode(encoded(kind="EPS"))


def test_a_folder_of_names_that_are_no_unicode_is_read(data: Path) -> None:
    folder = data.parent / "names"
    folder.mkdir()
    for name in (b"a.png", b"no\xe9.png", rb"no\xe9.png", b"\xff\xfe.png", b"\x1b[2J\n.png"):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:  # noqa: PTH123
            file.write(encoded())
    chunk = all_of(open_objects(str(folder), preprocess=Preprocessing()))
    assert set(chunk.keys) == {"a.png", r"no\xe9.png", r"no\\xe9.png", r"\xff\xfe.png", r"\x1b[2J\x0a.png"}
    assert chunk.errors == [None] * 5


def test_keys_of_arrays_may_be_no_unicode(data: Path) -> None:
    np.savez(data / "x.npz", x=np.ones((2, 3), np.float32), keys=np.array(["a\udce9", r"a\xe9"]))
    chunk = all_of(open_objects(str(data / "x.npz"), columns=Columns(("x",), key="keys")))
    assert chunk.keys == [r"a\xe9", r"a\\xe9"]
