from __future__ import annotations

import json
import math
import os
import socket
import stat
import struct
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
from stochbn.files import (
    LONGEST_HEADER,
    _checksum,
    check_file,
    check_folder,
    read_tensors,
    write,
    write_bytes,
    write_json,
    write_tensors,
)

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


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444, 0o755])
def test_a_file_that_is_replaced_keeps_its_mode_and_is_never_more_open(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    path.chmod(mode)

    def produce(temporary: Path) -> None:
        temporary.write_bytes(b"new")
        assert stat.S_IMODE(temporary.stat().st_mode) & ~mode & 0o077 == 0

    write(path, produce)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == mode


needs_links = pytest.mark.skipif(os.name != "posix", reason="links and pipes are POSIX's")


@needs_links
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("exists", [True, False])
def test_links_are_followed_and_stay_links(tmp_path: Path, relative: bool, exists: bool) -> None:
    there = tmp_path / "elsewhere"
    there.mkdir()
    target, middle, link = there / "real.bin", there / "middle.bin", tmp_path / "link.bin"
    middle.symlink_to("real.bin" if relative else target)
    link.symlink_to(Path("elsewhere") / "middle.bin" if relative else middle)
    if exists:
        target.write_bytes(b"old")
        target.chmod(0o640)
    check_file(link)
    write_bytes(link, b"new")
    assert link.is_symlink()
    assert middle.is_symlink()
    assert not target.is_symlink()
    assert target.read_bytes() == link.read_bytes() == b"new"
    assert not exists or stat.S_IMODE(target.stat().st_mode) == 0o640
    assert sorted(tmp_path.rglob("*")) == sorted([there, target, middle, link])


@needs_links
def test_the_target_of_a_link_is_whole_until_the_new_one_is(tmp_path: Path) -> None:
    target, link = tmp_path / "real", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write(link, fail)
    assert target.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == [link, target]


@needs_links
def test_links_that_lead_nowhere_or_in_a_circle_are_refused(tmp_path: Path) -> None:
    lost, first, second = tmp_path / "lost", tmp_path / "first", tmp_path / "second"
    lost.symlink_to(tmp_path / "missing" / "file")
    first.symlink_to(second)
    second.symlink_to(first)
    for check in (check_file, lambda path: write_bytes(path, b"")):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            check(lost)
        with pytest.raises(OSError, match="first"):
            check(first)
    assert first.is_symlink()
    assert lost.is_symlink()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))


@needs_links
@pytest.mark.parametrize("make", [make_pipe, make_socket])
@pytest.mark.parametrize("linked", [True, False])
def test_what_is_no_regular_file_is_refused_and_stays(
    tmp_path: Path, make: Callable[[Path], None], linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    special = path = tmp_path / "special"
    make(special)
    before = special.stat()
    if linked:
        path = tmp_path / "link"
        path.symlink_to(special)
    with pytest.raises(OSError, match=f"{path.name}' is a pipe, a device or another special file"):
        check_file(path)
    with pytest.raises(OSError, match=f"{path.name}' is a pipe, a device or another special file"):
        write(path, lambda _: pytest.fail("something was produced"))
    with pytest.raises(FileNotFoundError, match="there is a folder, a pipe or a device"):
        read_tensors(path, FORMAT)
    assert (special.stat().st_mode, special.stat().st_ino) == (before.st_mode, before.st_ino)


@needs_links
def test_devices_are_refused() -> None:
    for path in ("/dev/null", "/dev/zero"):
        with pytest.raises(OSError, match="a device"):
            write_bytes(path, b"data")
        assert stat.S_ISCHR(os.stat(path).st_mode)  # noqa: PTH116 (not through a path that tests may change)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files have names on Linux")
def test_an_open_file_is_not_replaced_under_its_owners_hands(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        file.write(b"first lines")
        file.flush()
        link = tmp_path / "link"
        link.symlink_to(f"/proc/self/fd/{file.fileno()}")
        for name in (link, f"/proc/self/fd/{file.fileno()}"):
            with pytest.raises(OSError, match="special file"):
                write_bytes(name, b"data")
    assert path.read_bytes() == b"first lines"


def test_a_folder_in_the_place_of_a_file_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder; name a file"):
        check_file(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        check_file(tmp_path / "missing" / "file")
    check_file(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_can_be_made_or_filled_is_left_as_it_is(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b" / "c", "file")
    check_folder(tmp_path, "file", "other")
    assert not list(tmp_path.iterdir())
    (tmp_path / "any").mkdir()
    check_folder(tmp_path)
    check_folder(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["any"]


def test_a_folder_that_cannot_be_made_or_filled_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "results" / "table.md").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="exists and is no folder; name another folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="file' is no folder; name another folder"):
        check_folder(tmp_path / "file" / "deeper" / "still", "table.md")
    with pytest.raises(IsADirectoryError, match=r"table\.md' is a folder"):
        check_folder(tmp_path / "results", "other.md", "table.md")
    assert (tmp_path / "file").read_bytes() == b"precious"


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    for check, path in ((check_file, closed / "file"), (check_folder, closed), (check_folder, closed / "new")):
        with pytest.raises(PermissionError, match=r"closed' is not writable"):
            check(path)


def test_long_names_are_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250 + ".bin")
    write_bytes(path, b"data")
    assert path.read_bytes() == b"data"


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


def described(path: Path, about: str | None) -> None:
    """Another description, with the checksum that belongs to it."""
    tensors = {"a": normal(3)}
    metadata = {"format": FORMAT, "sha256": _checksum(tensors, about or "")}
    path.write_bytes(safetensors.torch.save(tensors, metadata | ({} if about is None else {"about": about})))


def with_header(path: Path, length: int) -> None:
    """A header that is said to have so many bytes, in a file that seems long enough but takes no space on the disk."""
    path.write_bytes(struct.pack("<Q", length) + b'{"a')
    with path.open("r+b") as file:
        file.truncate(min(length + 8, 2**30))


def headed(path: Path, header: bytes, data: bytes = bytes(8)) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(**changes: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}).encode()


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
        (lambda path: described(path, None), "no description that can be read: there is none"),
        (lambda path: described(path, ""), "no description that can be read"),
        (lambda path: described(path, "{'a': 1}"), "no description that can be read"),
        (lambda path: described(path, '{"a": ' * 50_000), "no description that can be read"),
        (lambda path: described(path, "[" + "1" * 10_000 + "]"), "no description that can be read"),
        (lambda path: with_header(path, 2**63), "truncated, corrupt or not a safetensors file: a header of"),
        (lambda path: with_header(path, LONGEST_HEADER + 1), "more than"),
        (lambda path: headed(path, b"[" * 100_000), "truncated, corrupt or not a safetensors file"),
        (lambda path: headed(path, b"[]"), "truncated, corrupt or not a safetensors file"),
        (lambda path: headed(path, b'{"a": 3}'), "truncated, corrupt or not a safetensors file"),
        (lambda path: headed(path, entry(dtype="F33")), "truncated, corrupt or not a safetensors file"),
        (lambda path: headed(path, entry(dtype=[])), "truncated, corrupt or not a safetensors file"),
        (lambda path: headed(path, entry(shape=[10**30])), "truncated, corrupt or not a safetensors file"),
        (lambda path: headed(path, entry(shape=[-2])), "truncated, corrupt or not a safetensors file"),
        (lambda path: headed(path, entry(shape=math.nan)), "truncated, corrupt or not a safetensors file"),
        (lambda path: headed(path, entry(data_offsets=[0, 10**400])), "truncated, corrupt or not a safetensors"),
        (lambda path: headed(path, entry(data_offsets=["0", "8"])), "truncated, corrupt or not a safetensors"),
        (lambda path: headed(path, entry(data_offsets=[8])), "truncated, corrupt or not a safetensors file"),
        (lambda path: headed(path, entry(data_offsets=[4, 8])), "truncated, corrupt or not a safetensors file"),
        (lambda path: headed(path, b'{"__metadata__": {"format": 3}}', b""), "truncated, corrupt or not a safetensors"),
        (lambda path: headed(path, b'{"__metadata__": []}', b""), "truncated, corrupt or not a safetensors file"),
        (lambda path: path.write_bytes(b"<html><body>Sign in</body></html>"), "truncated, corrupt or not"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "truncated, corrupt or not a safetensors file"),
        (without_checksum, "corrupt: its checksum"),
    ],
)
def test_a_file_that_is_not_as_written_is_refused(saved: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(saved)
    with pytest.raises(ValueError, match=message) as caught:
        read_tensors(saved, FORMAT)
    assert str(saved) in str(caught.value)
    assert len(str(caught.value)) < len(str(saved)) + 400


@given(content=st.binary(max_size=60), position=st.integers(0, 400), data=st.data())
def test_no_file_whatsoever_raises_anything_but_a_value_error(
    content: bytes, position: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.safetensors"
        write_tensors(path, FORMAT, {"a": normal(3), "b": normal(2, 2)}, {"settings": 1})
        whole = path.read_bytes()
        before, after = whole[:position], whole[position:]
        path.write_bytes(data.draw(st.sampled_from([content, before + content, before + content + after,
                                                    before + content + after[len(content) :]])))  # fmt: skip
        try:
            found, about = read_tensors(path, FORMAT)
        except ValueError as error:
            assert "t.safetensors" in str(error)  # noqa: PT017 (what changes nothing, such as a blank, may be read)
        else:
            assert about == {"settings": 1}
            assert torch.equal(found["a"], normal(3))


def test_a_description_too_long_to_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="take more than 16777216 bytes"):
        write_tensors(tmp_path / "t", FORMAT, {}, "x" * LONGEST_HEADER)
    assert not list(tmp_path.iterdir())


def test_what_was_read_stays_when_the_file_is_overwritten_or_cut(saved: Path) -> None:
    found, _ = read_tensors(saved, FORMAT)
    before = {name: tensor.clone() for name, tensor in found.items()}
    with saved.open("r+b") as file:
        file.write(b"\xff" * saved.stat().st_size)
        file.flush()
        assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
        file.truncate(0)
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    for tensor in found.values():
        tensor.zero_()
    assert saved.stat().st_size == 0


def test_tensors_without_elements_and_of_every_usual_type_are_read(tmp_path: Path) -> None:
    types = [torch.float32, torch.int32, torch.uint8, torch.float8_e4m3fn]
    types += {torch.complex64} & safetensors.torch._SIZE.keys()  # which older versions of safetensors lack
    tensors = {str(dtype): torch.zeros(0, 3).to(dtype) for dtype in types}
    tensors |= {f"{dtype} 1": torch.ones(()).to(dtype) for dtype in types}
    write_tensors(tmp_path / "t", FORMAT, tensors, {})
    found, _ = read_tensors(tmp_path / "t", FORMAT)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()
    }


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_tensors(tmp_path / "none", FORMAT)
