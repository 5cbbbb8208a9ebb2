from __future__ import annotations

import io
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from conftest import seeded
from stochbn.paper.trainee import augment
from stochbn.sources import hub as hub_module
from stochbn.sources.named import HUB, DataError, Images, as_input, load

REACHABLE = hub_module._reachable
Array = np.ndarray[Any, np.dtype[np.uint8]]


def no_connection(location: str, *_: Any, **__: Any) -> Any:
    raise ConnectionError(f"Couldn't reach {location!r} on the Hub (LocalEntryNotFoundError)")


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the Hub was asked for, which never answers; caches stay in the test's own folder, the current one."""
    locations: list[str] = []
    load_dataset = datasets.load_dataset

    def local_only(location: str, *args: Any, **kwargs: Any) -> Any:
        if Path(location).is_dir():
            return load_dataset(location, *args, **kwargs)
        locations.append(location)
        return no_connection(location)

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(datasets, "load_dataset", local_only)
    monkeypatch.setattr(hub_module, "_reachable", lambda address: True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("STOCHBN_DATA", raising=False)
    return locations


def pictures(n: int, *shape: int, seed: int = 0) -> list[Array]:
    return list(np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8))


def write_parquet(folder: Path, split: str, columns: Mapping[str, Any], features: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{split}-00000-of-00001.parquet"
    datasets.Dataset.from_dict(dict(columns), features=datasets.Features(features)).to_parquet(str(file))
    return file


def labelled(classes: Sequence[str] = ("cat", "dog", "fox"), image: str = "image") -> dict[str, Any]:
    return {image: datasets.Image(), "label": datasets.ClassLabel(names=list(classes))}


def write_small(folder: Path, seed: int = 0) -> list[Array]:
    """Seven grey 20x20 images of the classes cat, dog and fox for training and four for testing."""
    images = pictures(11, 20, 20, seed=seed)
    write_parquet(folder, "train", {"image": images[:7], "label": [2, 0, 1, 1, 0, 2, 2]}, labelled())
    write_parquet(folder, "test", {"image": images[7:], "label": [1, 2, 0, 1]}, labelled())
    return images


def png(picture: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return file.getvalue()


# ---------------------------------------------------------------- digits


def test_digits_are_1257_and_540_grey_images_of_28_by_28() -> None:
    train, test = load("digits", "train"), load("digits", "test")
    assert (len(train), len(test)) == (1257, 540)
    for images in (train, test):
        assert images.pixels.dtype == torch.uint8
        assert images.shape == (1, 28, 28)
        assert images.labels.dtype == torch.int64
        assert images.classes == tuple("0123456789")
        assert images.pixels.min() == 0
        assert images.pixels.max() == 255
    assert (train.name, test.name) == ("digits (train)", "digits (test)")


def test_digits_are_split_the_same_way_every_time() -> None:
    assert load("digits", "train").fingerprint == load("digits", "train").fingerprint
    assert load("digits", "train").labels[:12].tolist() == [6, 4, 4, 3, 2, 7, 2, 2, 7, 0, 2, 1]
    assert load("digits", "test").labels[:12].tolist() == [1, 4, 5, 6, 9, 1, 2, 2, 2, 0, 7, 5]


def enlarged(small: Any) -> Any:
    """An 8x8 image with values from 0 to 16 as 28x28 with values from 0 to 255: bilinear, written out."""
    out = np.zeros((28, 28))
    for row in range(28):
        for column in range(28):
            y, x = (min(max((i + 0.5) * 8 / 28 - 0.5, 0), 7) for i in (row, column))
            top, left = int(y), int(x)
            for i, wi in ((top, 1 - (y - top)), (min(top + 1, 7), y - top)):
                for j, wj in ((left, 1 - (x - left)), (min(left + 1, 7), x - left)):
                    out[row, column] += wi * wj * small[i][j]
    return (out * 255 / 16).round().astype(np.uint8)


def test_digits_train_and_test_are_all_of_scikit_learns_each_once_with_its_label() -> None:
    images, labels = load_digits(return_X_y=True)
    all_small = torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8)
    large = (torch.nn.functional.interpolate(all_small, (28, 28), mode="bilinear") * 255).round().to(torch.uint8)
    everything = Images(large, torch.from_numpy(labels), tuple("0123456789"), "all")
    assert pairs(load("digits", "train")) + pairs(load("digits", "test")) == pairs(everything)
    for number in range(3):
        difference = large[number, 0].int() - torch.from_numpy(enlarged(images[number].reshape(8, 8))).int()
        assert difference.abs().max() <= 1


def test_digits_are_split_by_class() -> None:
    train, test = (load("digits", split).labels.bincount() for split in ("train", "test"))
    for of_class, share in zip(train + test, test, strict=True):
        assert abs(share - 0.3 * of_class) < 1


def test_a_range_of_classes_is_selected_and_renumbered_from_0() -> None:
    whole, high = load("digits", "test"), load("digits:5-9", "test")
    keep = [i for i, label in enumerate(whole.labels.tolist()) if label >= 5]
    assert high.pixels.equal(whole.pixels[keep])
    assert high.labels.tolist() == [whole.labels[i].item() - 5 for i in keep]
    assert high.classes == ("5", "6", "7", "8", "9")
    assert high.name == "digits:5-9 (test)"


def test_a_single_class_and_all_classes_can_be_selected() -> None:
    one = load("digits:3", "train")
    assert one.classes == ("3",)
    assert one.labels.tolist() == [0] * int((load("digits", "train").labels == 3).sum())
    assert load("digits:0-9", "train").fingerprint == load("digits", "train").fingerprint


@pytest.mark.parametrize("classes", ["5-10", "10", "7-3"])
def test_classes_that_are_not_there_are_refused(classes: str) -> None:
    with pytest.raises(DataError, match="digits has the classes 0 to 9, not"):
        load(f"digits:{classes}", "train")


def test_a_split_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(DataError, match="digits has the splits train and test, not 'validation'"):
        load("digits", "validation")


# ---------------------------------------------------------------- images in memory


def some_images(n: int = 10, seed: int = 0) -> Images:
    pixels = torch.randint(256, (n, 2, 4, 3), generator=seeded(seed), dtype=torch.uint8)
    return Images(pixels, torch.arange(n) % 4, tuple("abcd"), "some")


def pairs(images: Images) -> Counter[tuple[bytes, int]]:
    return Counter((p.numpy().tobytes(), int(y)) for p, y in zip(images.pixels, images.labels, strict=True))


@given(n=st.integers(1, 20), size=st.integers(1, 25))
def test_batches_are_consecutive_and_hold_everything_as_fractions_of_255(n: int, size: int) -> None:
    images = some_images(n)
    batches = list(images.batches(size))
    assert [len(labels) for _, labels in batches] == [size] * (n // size) + ([n % size] if n % size else [])
    assert torch.cat([labels for _, labels in batches]).equal(images.labels)
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert inputs.dtype == torch.float32
    np.testing.assert_allclose(inputs.numpy(), images.pixels.numpy() / 255.0, rtol=1e-6)


def test_inputs_lie_in_memory_with_channels_last_and_pixels_are_left_alone() -> None:
    images = some_images()
    before = images.pixels.clone()
    inputs = as_input(images.pixels)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert images.pixels.equal(before)


@given(seed=st.integers(0, 1000))
def test_shuffling_depends_on_the_seed_alone_and_keeps_images_with_their_labels(seed: int) -> None:
    images = some_images(12)
    torch.manual_seed(seed + 1)
    state = torch.random.get_rng_state()
    first, second = images.shuffled(seed), images.shuffled(seed)
    assert torch.random.get_rng_state().equal(state)
    assert first.fingerprint == second.fingerprint
    assert pairs(first) == pairs(images)


def test_other_seeds_give_other_orders() -> None:
    images = some_images(12)
    assert len({images.shuffled(seed).fingerprint for seed in range(5)}) == 5


def test_the_fingerprint_tells_pixels_labels_and_order_apart() -> None:
    images = some_images()
    pixels, labels = images.pixels.clone(), images.labels.clone()
    assert Images(pixels, labels, tuple("wxyz"), "other").fingerprint == images.fingerprint
    pixels[3, 1, 2, 0] ^= 1
    labels[3] += 1
    assert Images(pixels, images.labels, images.classes, "some").fingerprint != images.fingerprint
    assert Images(images.pixels, labels, images.classes, "some").fingerprint != images.fingerprint
    assert images.take(torch.arange(10).flip(0)).fingerprint != images.fingerprint
    assert images.take(torch.arange(9)).fingerprint != images.fingerprint


@given(n=st.integers(1, 30), fraction=st.floats(0, 0.99), seed=st.integers(0, 100))
def test_a_held_out_part_and_the_rest_are_all_images_each_once(n: int, fraction: float, seed: int) -> None:
    images = some_images(n)
    rest, held_out = images.held_out(fraction, seed)
    assert len(held_out) == round(fraction * n)
    assert pairs(rest) + pairs(held_out) == pairs(images)
    assert [part.fingerprint for part in images.held_out(fraction, seed)] == [rest.fingerprint, held_out.fingerprint]


def crops(picture: Array) -> dict[bytes, tuple[int, int, bool]]:
    """Every crop of an image [C, H, W] that is padded by 4 pixels, plain and flipped, written out."""
    _, height, width = picture.shape
    padded = np.pad(picture, ((0, 0), (4, 4), (4, 4)), mode="reflect")
    found = {}
    for top in range(9):
        for left in range(9):
            crop = padded[:, top : top + height, left : left + width]
            found[np.ascontiguousarray(crop).tobytes()] = top, left, False
            found[np.ascontiguousarray(crop[:, :, ::-1]).tobytes()] = top, left, True
    return found


@pytest.mark.parametrize("shape", [(3, 20, 17), (1, 16, 24)])
def test_augmentation_crops_and_flips_each_image_at_random(shape: tuple[int, int, int]) -> None:
    originals = np.stack(pictures(2, *shape))
    torch.manual_seed(3)
    times = 1500
    found = augment(torch.from_numpy(originals).repeat(times, 1, 1, 1))
    assert found.dtype == torch.uint8
    assert found.shape == (2 * times, *shape)
    for number in range(2):
        known = crops(originals[number])
        assert len(known) == 162
        drawn = [known[np.ascontiguousarray(p.numpy()).tobytes()] for p in found[number::2]]
        assert len(set(drawn)) > 155
        for values in ([top for top, _, _ in drawn], [left for _, left, _ in drawn]):
            assert np.abs(np.bincount(values) / times - 1 / 9).max() < 0.04
        assert abs(np.mean([flipped for _, _, flipped in drawn]) - 0.5) < 0.05


def test_augmentation_depends_on_the_seed_and_leaves_the_pixels_alone() -> None:
    pixels = torch.randint(256, (6, 3, 8, 8), generator=seeded(), dtype=torch.uint8)
    before = pixels.clone()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(augment(pixels))
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])
    assert pixels.equal(before)


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("image", ["image", "img"])
@pytest.mark.parametrize("label", ["class label", "integer"])
def test_a_folder_of_parquet_files_keeps_order_pixels_and_labels(tmp_path: Path, image: str, label: str) -> None:
    images, labels = pictures(9, 17, 19), [2, 0, 1, 1, 0, 2, 2, 1, 0]
    features = labelled(image=image) | ({"label": datasets.Value("int64")} if label == "integer" else {})
    write_parquet(tmp_path / "pets", "train", {image: images[:5], "label": labels[:5]}, features)
    write_parquet(tmp_path / "pets", "test", {image: images[5:], "label": labels[5:]}, features)
    train, test = (load(str(tmp_path / "pets"), split) for split in ("train", "test"))
    assert train.pixels.dtype == torch.uint8
    np.testing.assert_array_equal(train.pixels.numpy(), np.stack(images[:5])[:, None])
    np.testing.assert_array_equal(test.pixels.numpy(), np.stack(images[5:])[:, None])
    assert train.labels.tolist() + test.labels.tolist() == labels
    assert train.classes == (("cat", "dog", "fox") if label == "class label" else ("0", "1", "2"))
    assert test.name == f"{tmp_path / 'pets'} (test)"
    assert train.shape == (1, 17, 19)


def test_colour_images_have_three_channels(tmp_path: Path) -> None:
    images = pictures(4, 16, 18, 3)
    write_parquet(tmp_path / "c", "test", {"img": images, "label": [0, 1, 2, 0]}, labelled(image="img"))
    found = load(str(tmp_path / "c"), "test")
    assert found.shape == (3, 16, 18)
    for n, picture in enumerate(images):
        for channel in range(3):
            np.testing.assert_array_equal(found.pixels[n, channel].numpy(), picture[:, :, channel])


def test_classes_of_a_folder_can_be_selected(tmp_path: Path) -> None:
    images = write_small(tmp_path / "small")
    chosen = load(f"{tmp_path / 'small'}:1-2", "train")
    assert chosen.labels.tolist() == [1, 0, 0, 1, 1]
    assert chosen.classes == ("dog", "fox")
    np.testing.assert_array_equal(chosen.pixels[:, 0].numpy(), np.stack([images[i] for i in (0, 2, 3, 5, 6)]))


def test_one_folder_of_images_for_each_class(tmp_path: Path) -> None:
    images = pictures(12, 20, 20)
    expected: dict[str, Counter[tuple[bytes, str]]] = {"train": Counter(), "test": Counter()}
    for number, picture in enumerate(images):
        split, name = ("train", "test")[number % 2], ("ant", "bee", "cow")[number % 3]
        folder = tmp_path / "farm" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(picture))
        expected[split][picture.tobytes(), name] += 1
    for split, wanted in expected.items():
        found = load(str(tmp_path / "farm"), split)
        assert found.classes == ("ant", "bee", "cow")
        assert wanted == Counter(
            (p.numpy().tobytes(), found.classes[y]) for p, y in zip(found.pixels, found.labels.tolist(), strict=True)
        )


def test_images_with_a_palette_are_not_taken_for_its_indices(tmp_path: Path) -> None:
    palette = Image.fromarray(np.full((20, 20), 7, np.uint8)).convert("P")
    palette.putpalette([255 - i // 3 for i in range(768)])  # index 7 is the grey 248
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "p" / split / name
            folder.mkdir(parents=True)
            palette.save(folder / "0.png")
    try:
        found = load(str(tmp_path / "p"), "train")
    except DataError as error:
        assert "palette" in str(error)  # noqa: PT017 (to refuse them is as right as to convert them)
    else:
        assert (found.pixels == 248).all()


def test_the_folder_in_the_environment_variable_comes_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    images = write_small(tmp_path / "copies" / "mnist")
    write_small(tmp_path / "copies" / "someone" / "thing", seed=1)
    monkeypatch.setenv("STOCHBN_DATA", str(tmp_path / "copies"))
    found = load("mnist", "train")
    np.testing.assert_array_equal(found.pixels[:, 0].numpy(), np.stack(images[:7]))
    assert found.name == "mnist (train)"
    assert load("ylecun/mnist", "train").fingerprint == found.fingerprint
    assert load("someone/thing:0-1", "test").labels.tolist() == [1, 0, 1]
    assert asked == []
    for name in ("notmnist", "someone-else/mnist"):
        with pytest.raises(DataError, match="cannot reach"):
            load(name, "test")
    assert asked == [HUB["notmnist"], "someone-else/mnist"], "another owner's data set is not the one of the copy"


def test_the_same_data_has_the_same_fingerprint_however_it_was_loaded(tmp_path: Path) -> None:
    digits = load("digits:0-2", "test").take(torch.arange(6))
    features = labelled(["0", "1", "2"])
    columns = {"image": list(digits.pixels[:, 0].numpy()), "label": digits.labels.tolist()}
    write_parquet(tmp_path / "digits", "test", columns, features)
    assert load(str(tmp_path / "digits"), "test").fingerprint == digits.fingerprint


def test_a_folder_here_called_like_a_short_name_does_not_hide_the_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    here = write_small(Path("mnist"), seed=5)
    Path("digits").mkdir()
    with pytest.raises(DataError, match="cannot reach the Hugging Face Hub to fetch 'ylecun/mnist'"):
        load("mnist", "train")
    assert asked == ["ylecun/mnist"]
    there = write_small(tmp_path / "copies" / "mnist", seed=6)
    monkeypatch.setenv("STOCHBN_DATA", str(tmp_path / "copies"))
    np.testing.assert_array_equal(load("mnist", "train").pixels[0, 0].numpy(), there[0])
    np.testing.assert_array_equal(load("./mnist", "train").pixels[0, 0].numpy(), here[0])
    assert len(load("digits", "test")) == 540


def test_a_folder_here_of_another_name_is_found(asked: list[str]) -> None:
    write_small(Path("pets"))
    assert len(load("pets", "train")) == 7
    assert asked == []


# ---------------------------------------------------------------- what cannot be had


def test_an_unknown_name_is_refused_with_the_known_ones(asked: list[str]) -> None:
    with pytest.raises(DataError, match=r"unknown data set 'minst'.*digits, mnist, notmnist.*owner/name"):
        load("minst", "train")
    with pytest.raises(DataError, match="unknown data set 'minst'"):
        load("minst:0-4", "train")
    assert asked == []


@pytest.mark.parametrize("path", ["./missing", "../missing", "~/missing", "/missing/folder", "a/b/c"])
def test_a_path_to_nothing_is_not_looked_for_on_the_hub(path: str, asked: list[str]) -> None:
    with pytest.raises(DataError, match="neither a folder here nor"):
        load(path, "train")
    assert asked == []


def test_a_variable_that_names_no_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCHBN_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"STOCHBN_DATA is set to .*nowhere', which is not a folder"):
        load("mnist", "train")
    assert len(load("digits", "test")) == 540


@pytest.mark.parametrize(("name", "hub"), [("mnist", "ylecun/mnist"), ("someone/thing", "someone/thing")])
def test_without_a_connection_the_message_says_what_to_do(name: str, hub: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(f"{name}:0-4", "train")
    message = str(caught.value)
    assert f"cannot reach the Hugging Face Hub to fetch {hub!r}" in message
    assert f"hf download {hub} --repo-type dataset --local-dir FOLDER/{name}`" in message
    assert "set STOCHBN_DATA=FOLDER" in message
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_what_the_message_without_a_connection_advises_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError) as caught:
        load("notmnist", "test")
    words = str(caught.value).split()
    folder = words[words.index("--local-dir") + 1].rstrip("`,").replace("FOLDER", str(tmp_path / "F"))
    write_small(Path(folder))
    monkeypatch.setenv("STOCHBN_DATA", str(tmp_path / "F"))
    assert len(load("notmnist", "test")) == 4


def test_a_connection_that_breaks_during_the_download_is_not_called_a_damaged_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class ReadError(Exception):
        """As that of httpx, which is no OSError."""

    def broken(*_: Any, **__: Any) -> Any:
        raise ReadError("Connection reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(DataError, match="set STOCHBN_DATA=FOLDER"):
        load("mnist", "train")


def test_a_data_set_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(location: str, *_: Any, **__: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{location}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    with pytest.raises(DataError, match=r"no data set 'someone/thing' on the Hugging Face Hub"):
        load("someone/thing", "train")


@pytest.mark.parametrize("enabled", [True, False])
def test_the_progress_bars_of_datasets_are_left_as_they_were(tmp_path: Path, enabled: bool) -> None:
    write_small(tmp_path / "small")
    logging = datasets.utils.logging
    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
        load(str(tmp_path / "small"), "test")
        with pytest.raises(DataError):
            load("mnist", "test")
        assert logging.is_progress_bar_enabled() == enabled
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def test_a_missing_split_is_refused_with_those_that_are_there(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x", "train", {"image": pictures(2, 20, 20), "label": [0, 1]}, labelled())
    with pytest.raises(DataError, match=r"has no split 'test'; it has 'train'"):
        load(str(tmp_path / "x"), "test")


def write_labels(*labels: Any, kind: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        images = pictures(len(labels), 20, 20)
        write_parquet(folder, "test", {"image": images, "label": labels}, {"image": datasets.Image(), "label": kind})

    return make


def write_folder(folder: Path, images: Sequence[Any], ending: str = "png") -> Path:
    """One folder of images for each of two classes, which take turns."""
    for number, image in enumerate(images):
        home = folder / "test" / "ab"[number % 2]
        home.mkdir(parents=True, exist_ok=True)
        image.save(home / f"{number:02}.{ending}")
    return folder


def grey(size: int = 20, value: int = 255) -> Any:
    return Image.new("L", (size, size), value)


def deep(mode: str = "I;16", value: int = 65535) -> Any:
    """An image of 16 bits or more."""
    if mode == "I;16":
        return Image.fromarray(np.full((20, 20), value, np.uint16))
    return Image.new(mode, (20, 20), value)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0, 0, 1), (1, 1)])
@pytest.mark.parametrize(("mode", "ending"), [("I;16", "png"), ("I;16", "tiff"), ("I", "tiff"), ("F", "tiff")])
def test_images_of_more_than_8_bits_are_refused_wherever_they_are(
    order: tuple[int, ...], mode: str, ending: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "x", [deep(mode) if i else grey() for i in order], ending)
    with pytest.raises(DataError, match=rf"an image of mode '{mode}.*expected 8-bit images"):
        load(str(folder), "test")


@pytest.mark.parametrize(
    ("image", "channels"),
    [
        (grey(), [255]),
        (Image.new("1", (20, 20), 1), [255]),
        (Image.new("1", (20, 20), 0), [0]),
        (Image.new("LA", (20, 20), (200, 7)), [200, 7]),
        (Image.new("RGB", (20, 20), (1, 2, 255)), [1, 2, 255]),
        (Image.new("RGBA", (20, 20), (1, 2, 255, 0)), [1, 2, 255, 0]),
        (Image.new("RGB", (20, 20), (255, 0, 0)).convert("P"), [255, 0, 0]),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_every_mode_of_8_bits_or_fewer_gives_inputs_from_0_to_1(
    image: Any, channels: list[int], tmp_path: Path
) -> None:
    found = load(str(write_folder(tmp_path / "x", [image] * 3)), "test")
    assert found.pixels.dtype == torch.uint8
    assert found.shape == (len(channels), 20, 20)
    assert found.pixels[1, :, 3, 4].tolist() == channels
    (inputs, _), *_ = found.batches(3)
    torch.testing.assert_close(inputs[2, :, 0, 0], torch.tensor(channels) / 255)


def test_images_for_printing_are_brought_to_colour(tmp_path: Path) -> None:
    red, plain = Image.new("CMYK", (20, 20), (0, 255, 255, 0)), Image.new("RGB", (20, 20), (0, 0, 255))
    found = load(str(write_folder(tmp_path / "x", [red, plain, red], "jpg")), "test")
    assert found.shape == (3, 20, 20)
    colours = {tuple((pixels[:, 0, 0] > 128).tolist()) for pixels in found.pixels}
    assert colours == {(True, False, False), (False, False, True)}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([grey(), grey(), Image.new("RGB", (20, 20))], "2 L of 20x20, 1 RGB of 20x20"),
        ([Image.new("RGB", (20, 20)), Image.new("RGBA", (20, 20))], "1 RGB of 20x20, 1 RGBA of 20x20"),
        ([grey(), Image.new("LA", (20, 20)), grey(21), grey(22)], r"different sizes or depths \(.*, \.\.\.\)"),
    ],
)
def test_modes_and_sizes_that_are_mixed_are_named(images: Sequence[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(str(write_folder(tmp_path / "x", images)), "test")


def test_black_and_white_images_among_grey_ones_and_palettes_among_colours_are_brought_to_these(tmp_path: Path) -> None:
    mixed = load(str(write_folder(tmp_path / "grey", [grey(), Image.new("1", (20, 20), 1)])), "test")
    assert (mixed.pixels == 255).all()
    colour = Image.new("RGB", (20, 20), (255, 0, 0))
    mixed = load(str(write_folder(tmp_path / "colour", [colour, colour.convert("P")])), "test")
    assert (mixed.pixels == torch.tensor([255, 0, 0])[:, None, None]).all()


@pytest.mark.parametrize("label", [10**6, 2**40, 2**63 - 1])
def test_labels_too_large_to_be_classes_are_refused(label: int, tmp_path: Path) -> None:
    write_labels(0, label, kind=datasets.Value("int64"))(tmp_path / "x")
    with pytest.raises(DataError, match="not whole numbers of at least 0 and below 1,000,000"):
        load(str(tmp_path / "x"), "test")


def test_a_range_of_classes_of_thousands_of_digits_is_refused(asked: list[str]) -> None:
    with pytest.raises(DataError, match="unknown data set 'digits:0-999"):
        load("digits:0-" + "9" * 5000, "train")
    assert asked == []


def images_of_two_sizes(folder: Path) -> None:
    images = [*pictures(2, 20, 20), *pictures(1, 20, 21)]
    write_parquet(folder, "test", {"image": images, "label": [0, 1, 2]}, labelled())


def grey_and_colour(folder: Path) -> None:
    images = [*pictures(2, 20, 20), *pictures(1, 20, 20, 3)]
    write_parquet(folder, "test", {"image": images, "label": [0, 1, 2]}, labelled())


def sixteen_bits(folder: Path) -> None:
    images = [np.full((20, 20), 40_000, np.uint16)] * 2
    write_parquet(folder, "test", {"image": images, "label": [0, 1]}, labelled())


def a_missing_image(folder: Path) -> None:
    write_parquet(folder, "test", {"image": [*pictures(2, 20, 20), None], "label": [0, 1, 2]}, labelled())


def numbers_for_images(folder: Path) -> None:
    columns = {"image": [[1, 2], [3, 4]], "label": [0, 1]}
    features = {"image": datasets.Sequence(datasets.Value("int64")), "label": datasets.Value("int64")}
    write_parquet(folder, "test", columns, features)


def no_images(folder: Path) -> None:
    write_parquet(folder, "test", {"x": [1.0], "label": [0]}, {"x": datasets.Value("float64")} | labels_only())


def labels_only() -> dict[str, Any]:
    return {"label": datasets.ClassLabel(names=["a", "b"])}


def no_labels(folder: Path) -> None:
    columns = {"image": pictures(2, 20, 20), "y": [0.5, 1.5]}
    write_parquet(folder, "test", columns, {"image": datasets.Image(), "y": datasets.Value("float64")})


def truncated(folder: Path) -> None:
    file = write_parquet(folder, "test", {"image": pictures(3, 20, 20), "label": [0, 1, 2]}, labelled())
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damaged_pages(folder: Path) -> None:
    file = write_parquet(folder, "test", {"image": pictures(30, 20, 20), "label": [0] * 30}, labelled())
    content = bytearray(file.read_bytes())
    content[4:400] = bytes(396)
    file.write_bytes(content)


def damaged_image(folder: Path) -> None:
    whole = [{"bytes": png(picture), "path": None} for picture in pictures(3, 20, 20)]
    half = {"bytes": png(pictures(1, 20, 20, seed=1)[0])[:200], "path": None}
    write_parquet(folder, "test", {"image": [*whole, half], "label": [0, 1, 2, 0]}, labelled())


def not_an_image(folder: Path) -> None:
    write_parquet(folder, "test", {"image": [{"bytes": b"rubbish", "path": None}], "label": [0]}, labelled())


def empty(folder: Path) -> None:
    write_parquet(folder, "test", {"image": [], "label": []}, labelled())


def empty_beside_training_data(folder: Path) -> None:
    write_parquet(folder, "train", {"image": pictures(3, 20, 20), "label": [0, 1, 2]}, labelled())
    empty(folder)


def empty_beside_training_data_without_names(folder: Path) -> None:
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    write_parquet(folder, "train", {"image": pictures(3, 20, 20), "label": [0, 1, 2]}, features)
    write_parquet(folder, "test", {"image": [], "label": []}, features)


def nothing(folder: Path) -> None:
    folder.mkdir()


def only_text(folder: Path) -> None:
    folder.mkdir()
    (folder / "test.txt").write_text("hello\n")


CLASS_LABEL = datasets.ClassLabel(names=["a", "b"])
UNUSABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "images of two sizes": (images_of_two_sizes, "different sizes or depths"),
    "grey and colour images": (grey_and_colour, "different sizes or depths"),
    "16 bits": (sixteen_bits, "expected 8-bit images"),
    "a missing image": (a_missing_image, "image"),
    "numbers for images": (numbers_for_images, "expected 8-bit images"),
    "no image column": (no_images, "has no image column; its columns are x, label"),
    "no label column": (no_labels, "has no label column; its columns are image, y"),
    "text labels": (write_labels("cat", "dog", kind=datasets.Value("string")), "label"),
    "fractions for labels": (write_labels(0.0, 0.5, 1.0, kind=datasets.Value("float64")), "label"),
    "a missing label": (write_labels(0, None, 1, kind=CLASS_LABEL), "label"),
    "images without a label, -1": (write_labels(0, -1, 1, kind=CLASS_LABEL), "label"),
    "negative whole numbers": (write_labels(0, -1, 1, kind=datasets.Value("int64")), "label"),
    "a truncated file": (truncated, "cannot be read as a data set; a file may be damaged"),
    "damaged pages": (damaged_pages, "cannot be read as a data set; a file may be damaged"),
    "a damaged image": (damaged_image, "an image that cannot be decoded"),
    "not an image": (not_an_image, "an image that cannot be decoded"),
    "no rows": (empty, "no data|no images"),
    "no rows for testing": (empty_beside_training_data, "no data|no images"),
    "no rows for testing, labels without names": (empty_beside_training_data_without_names, "no data|no images"),
    "an empty folder": (nothing, "holds no data set that can be read"),
    "text files": (only_text, "has no image column; its columns are text"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_data_that_cannot_be_used_is_refused_with_its_place_and_reason(what: str, tmp_path: Path) -> None:
    make, message = UNUSABLE[what]
    make(tmp_path / "data")
    with pytest.raises(DataError, match=message) as caught:
        load(str(tmp_path / "data"), "test")
    assert str(tmp_path / "data") in str(caught.value)


def test_a_selection_without_images_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x", "test", {"image": pictures(2, 20, 20), "label": [0, 1]}, labelled())
    with pytest.raises(DataError, match=r":2 \(test\) holds no images"):
        load(f"{tmp_path / 'x'}:2", "test")


# ---------------------------------------------------------------- whether there is a connection


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port at which something answers; there is no proxy."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def test_what_answers_is_reachable_and_what_does_not_is_not(server: int) -> None:

    assert REACHABLE(f"http://127.0.0.1:{server}/api")
    with socket.create_server(("127.0.0.1", 0)) as other:
        closed = other.getsockname()[1]
    assert not REACHABLE(f"http://127.0.0.1:{closed}")
    assert not REACHABLE("https://no-such-host.invalid")


def test_through_a_proxy_it_is_the_proxy_that_must_answer(server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server}")
    assert REACHABLE("https://no-such-host.invalid")
    monkeypatch.setenv("https_proxy", "127.0.0.1:1")
    assert not REACHABLE("https://no-such-host.invalid")


def test_without_a_connection_only_what_is_here_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    seen: list[tuple[bool, bool]] = []

    def look(location: str, *_: Any, **__: Any) -> Any:
        seen.append((datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE))
        return no_connection(location)

    monkeypatch.setattr(datasets, "load_dataset", look)
    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    for answers in (False, True):
        monkeypatch.setattr(hub_module, "_reachable", lambda address, answers=answers: answers)
        with pytest.raises(DataError, match="cannot reach"):
            load("mnist", "train")
    assert seen == [(True, True), before]
    assert before == (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)
