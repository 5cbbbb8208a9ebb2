from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import normal
from stochbn.files import read_tensors, write, write_bytes, write_json, write_tensors

FORMAT = "stochbn.test/3"


def test_bytes_are_written_and_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    write_bytes(path, b"first and longer")
    write_bytes(str(path), b"second")
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_bare_file_name_is_written_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_bytes("file.bin", b"here")
    assert (tmp_path / "file.bin").read_bytes() == b"here"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, "ü"]}, [], 3])
def test_json_comes_back(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "file.json"
    write_json(path, value)
    assert json.loads(path.read_text()) == value
    assert path.read_text().endswith("\n")


def test_what_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {"tensor": torch.zeros(1)})
    assert json.loads(path.read_text()) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")

    def produce(temporary: Path) -> None:
        assert temporary.parent == tmp_path, "a rename is atomic only within one file system"
        assert temporary.suffix == ".bin"
        temporary.write_bytes(b"half of the n")
        assert path.read_bytes() == b"old"

    write(path, produce)
    assert path.read_bytes() == b"half of the n"


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), ValueError("v")])
@pytest.mark.parametrize("existed", [True, False])
def test_a_producer_that_fails_leaves_no_trace(tmp_path: Path, error: BaseException, existed: bool) -> None:
    path = tmp_path / "file.bin"
    if existed:
        path.write_bytes(b"old")

    def produce(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        write(path, produce)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([b"old"] if existed else [])


def test_a_rename_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "inside").write_bytes(b"kept")
    with pytest.raises(OSError, match="folder"):
        write_bytes(folder, b"data")
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "inside").read_bytes() == b"kept"


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder '.*missing' to write 'file\.bin' to"):
        write_bytes(tmp_path / "missing" / "file.bin", b"data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_mode_that_the_umask_says_and_the_umask_stays(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "file.bin", b"data")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.bin").stat().st_mode) == mode


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    shapes=st.dictionaries(st.text(min_size=1, max_size=5), st.lists(st.integers(0, 3), max_size=3), max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]),
    about=json_values,
)
def test_tensors_and_their_description_come_back(shapes: dict[str, list[int]], dtype: torch.dtype, about: Any) -> None:
    shapes.pop("__metadata__", None)
    tensors = {name: normal(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(shapes.items())}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.safetensors"
        write_tensors(path, FORMAT, tensors, about)
        found, description = read_tensors(path, FORMAT)
    assert description == about
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_views_and_tensors_that_need_gradients_are_written_as_they_look(tmp_path: Path) -> None:
    path, base = tmp_path / "t.safetensors", normal(4, 3)
    tensors = {"transposed": base.T, "row": base[1], "expanded": base[:, :1].expand(4, 5)}
    write_tensors(path, FORMAT, {**tensors, "gradient": base.clone().requires_grad_()}, None)
    found, about = read_tensors(path, FORMAT)
    assert about is None
    for name, tensor in {**tensors, "gradient": base}.items():
        assert torch.equal(found[name], tensor)
        assert not found[name].requires_grad


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "t.safetensors"
    write_tensors(path, FORMAT, {"a": normal(3), "b": normal(2, 2)}, {"settings": 1})
    return path


def renamed(path: Path) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {{"a": "a", "b": "c"}[name]: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        path.write_bytes(safetensors.torch.save(tensors, file.metadata()))


def reshaped(path: Path) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).reshape(1, -1) for name in file.keys()}  # noqa: SIM118
        path.write_bytes(safetensors.torch.save(tensors, file.metadata()))


def without_one(path: Path) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        path.write_bytes(safetensors.torch.save({"a": file.get_tensor("a")}, file.metadata()))


def without_checksum(path: Path) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "sha256"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        path.write_bytes(safetensors.torch.save(tensors, metadata))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "truncated, corrupt or not a safetensors file"),
        (lambda path: path.write_bytes(b"\xff" * 100), "truncated, corrupt or not a safetensors file"),
        (lambda path: path.write_bytes(b"PK\x03\x04" * 50), "truncated, corrupt or not a safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated, corrupt or not a safetensors file"),
        (lambda path: path.write_bytes(b"\0" + path.read_bytes()), "truncated, corrupt or not a safetensors file"),
        (lambda path: safetensors.torch.save_file({}, path), r"but not a stochbn\.test file"),
        (lambda path: safetensors.torch.save_file({}, path, {"format": "pt"}), "its format is 'pt'"),
        (lambda path: write_tensors(path, "stochbn.other/3", {}, 1), r"its format is 'stochbn\.other'"),
        (lambda path: write_tensors(path, "stochbn.test/4", {}, 1), "version '4'.*reads version '3'"),
        (lambda path: write_tensors(path, "stochbn.test", {}, 1), "version ''.*reads version '3'"),
        (renamed, "corrupt: its checksum"),
        (reshaped, "corrupt: its checksum"),
        (without_one, "corrupt: its checksum"),
        (without_checksum, "corrupt: its checksum"),
    ],
)
def test_a_file_that_is_not_as_written_is_refused(saved: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(saved)
    with pytest.raises(ValueError, match=message) as caught:
        read_tensors(saved, FORMAT)
    assert str(saved) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_tensors(tmp_path / "none", FORMAT)
