"""Images and labels as tensors, from scikit-learn's digits, the Hugging Face Hub or a local folder."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochbn.sources.hub import HUB, DataError, folders_of, load_splits
from stochbn.sources.objects import shard_index
from stochbn.sources.pictures import stored_picture
from stochbn.sources.rows import undecoded

__all__ = ["HUB", "DataError", "Images", "as_input", "load"]

MODES = {"1": "L", "L": "L", "LA": "LA", "RGB": "RGB", "RGBA": "RGBA", "P": "RGB", "CMYK": "RGB"}
"""Pillow's modes of images of 8 bits or fewer, and what they are brought to: grey, colour, or these with an alpha."""

MOST_CLASSES = 1_000_000
"""Labels are less than this: a larger number is no label, and a name for each class would fill the memory."""


@dataclass(frozen=True, eq=False)
class Images:
    """A data set in memory.

    Attributes:
        pixels: ``[N, C, H, W]``, uint8.
        labels: ``[N]``, int64, from 0 to K - 1.
        classes: the names of the K classes.
        name: what was loaded, as given to `load`, with the split.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    @property
    def fingerprint(self) -> str:
        """A checksum of pixels and labels: the same data has the same one, however it was loaded."""
        digest = hashlib.sha256(str(list(self.pixels.shape)).encode())
        digest.update(self.pixels.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:16]

    def take(self, index: Tensor) -> Images:
        """The examples at these positions."""
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    def only(self, first: int, last: int) -> Images:
        """The examples of the classes `first` to `last`, renumbered from 0.

        Raises:
            DataError: there are no such classes.
        """
        if not 0 <= first <= last < len(self.classes):
            raise DataError(f"{self.name} has the classes 0 to {len(self.classes) - 1}, not {first} to {last}")
        chosen = self.take(((self.labels >= first) & (self.labels <= last)).nonzero()[:, 0])
        return replace(chosen, labels=chosen.labels - first, classes=self.classes[first : last + 1])

    def shuffled(self, seed: int) -> Images:
        """The same examples in a random order that depends on the seed alone."""
        return self.take(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)))

    def first(self, count: int) -> Images:
        """The first of the examples, at most so many."""
        return self.take(torch.arange(min(count, len(self))))

    def shard(self, rank: int, count: int, size: int) -> Images:
        """Every `count`-th batch of `size` consecutive examples, from number `rank` on."""
        return self.take(self.shard_positions(rank, count, size))

    def shard_positions(self, rank: int, count: int, size: int) -> Tensor:
        """Where each example of a shard is among all, ``[n]``."""
        return shard_index(len(self), rank, count, size)

    def held_out(self, fraction: float, seed: int) -> tuple[Images, Images]:
        """Two random parts, the second with this fraction of the examples: to train on, and to make choices on."""
        mixed = self.shuffled(seed)
        cut = len(self) - round(fraction * len(self))
        return mixed.take(torch.arange(cut)), mixed.take(torch.arange(cut, len(self)))

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Consecutive batches of inputs in [0, 1], ``[n, C, H, W]`` float32, and labels; the last may be smaller."""
        for start in range(0, len(self), size):
            yield as_input(self.pixels[start : start + size]), self.labels[start : start + size]


def as_input(pixels: Tensor) -> Tensor:
    """Pixels from 0 to 255 as a network's input from 0 to 1, in channels-last layout (faster convolutions)."""
    return pixels.float().div_(255).contiguous(memory_format=torch.channels_last)


def load(source: str, split: str, report: Callable[[int, int], None] = lambda done, total: None) -> Images:
    """Load one split of a data set.

    Args:
        source: ``digits`` (scikit-learn's, enlarged to 28x28), ``mnist``, ``notmnist``, ``cifar10``, any other data
            set on the Hugging Face Hub, or a local folder in a layout that ``datasets.load_dataset`` reads (Parquet
            files, or one folder of images for each class). A range of classes after a colon selects them:
            ``digits:0-4``. The folder that the environment variable ``STOCHBN_DATA`` names is searched before the Hub.
            Images of 8 bits are read: grey, colour, black and white, with a palette, CMYK (brought to RGB), or with
            transparency as a channel of its own (LA, RGBA).
        split: ``train`` or ``test``.
        report: called now and then with the number of images decoded and of all.

    Raises:
        DataError: the data set cannot be had, or holds no usable images and labels: images of 16 bits, or of different
            sizes or modes, are refused by name.
    """
    match = re.fullmatch(r"(.+):(\d{1,9})(?:-(\d{1,9}))?", source)
    name = match[1] if match else source
    images = _digits(split) if name == "digits" else _dataset(name, split, report)
    if match:
        images = images.only(int(match[2]), int(match[3] or match[2]))
    if not len(images):
        raise DataError(f"{source} ({split}) holds no images")
    return replace(images, name=f"{source} ({split})")


def _digits(split: str) -> Images:
    """scikit-learn's 1,797 handwritten digits, 8x8 enlarged to 28x28: a fixed, stratified 70 % for training."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(labels)), test_size=0.3, stratify=labels, random_state=0)
    if split not in ("train", "test"):
        raise DataError(f"digits has the splits train and test, not {split!r}")
    index = torch.from_numpy(parts[("train", "test").index(split)])
    small = torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8)[index]
    large = torch.nn.functional.interpolate(small, size=(28, 28), mode="bilinear")
    return Images(
        (large * 255).round().to(torch.uint8),
        torch.from_numpy(labels).long()[index],
        tuple(map(str, range(10))),
        "digits",
    )


def _dataset(name: str, split: str, report: Callable[[int, int], None]) -> Images:
    loaded, location = load_splits(name)
    if split not in loaded:
        raise DataError(f"{location!r} has no split {split!r}; it has {', '.join(map(repr, loaded))}")
    return _decode(loaded[split], location, report)


def _decode(table: Any, location: str, report: Callable[[int, int], None]) -> Images:
    import datasets

    def column(kind: type, fallback: str) -> str:
        found: list[str] = [name for name, feature in table.features.items() if isinstance(feature, kind)]
        found = found or [name for name in table.features if name == fallback]
        if not found:
            raise DataError(
                f"{location!r} has no {fallback} column; its columns are {', '.join(table.features)}. "
                "Expected images in a column of type Image and labels in one of type ClassLabel"
            )
        return found[0]

    image, label = column(datasets.Image, "image"), column(datasets.ClassLabel, "label")
    table, folders = undecoded(table), folders_of(location)
    arrays = []
    kinds: Counter[str] = Counter()
    try:
        for cell in table[image]:
            array, kind = _array(stored_picture(cell, folders) if isinstance(cell, (bytes, Mapping)) else cell)
            arrays.append(array)
            kinds[kind] += 1
            if len(arrays) % 500 == 0 or len(arrays) == len(table):
                report(len(arrays), len(table))
    except DataError as error:
        raise DataError(f"{location!r} holds as number {len(arrays)} {error}; expected 8-bit images") from error
    except Exception as error:  # Pillow and pyarrow raise errors of many kinds for damaged images
        raise DataError(f"{location!r} holds an image that cannot be decoded: {error}") from error
    if len(kinds) > 1:
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(3))
        raise DataError(
            f"{location!r} holds images of different sizes or depths ({found}{', ...' if len(kinds) > 3 else ''}); "
            "expected 8-bit images of one size and mode"
        )
    pixels = torch.from_numpy(np.stack(arrays)) if arrays else torch.empty(0, 0, 0, dtype=torch.uint8)
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.movedim(-1, 1)
    values, feature = table[label][:], table.features[label]
    if not all(isinstance(value, int) and 0 <= value < MOST_CLASSES for value in values):
        raise DataError(
            f"{location!r} has labels that are not whole numbers of at least 0 and below {MOST_CLASSES:,} in its "
            f"column {label!r}"
        )
    labels = torch.tensor(values, dtype=torch.int64)
    names = feature.names if isinstance(feature, datasets.ClassLabel) else map(str, range(int(labels.max()) + 1))
    return Images(pixels.contiguous(), labels, tuple(names), location)


def _array(picture: Any) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], str]:
    """An image as ``[H, W]`` or ``[H, W, C]``, uint8, and what kind of image that is: mode and size.

    Raises:
        DataError: it is no image, or not of 8 bits.
    """
    mode = getattr(picture, "mode", None)
    if mode is None:
        raise DataError(f"what is no image ({type(picture).__name__})")
    if mode not in MODES:
        raise DataError(f"an image of mode {mode!r} (not one of {', '.join(MODES)})")
    brought = picture if mode == MODES[mode] else picture.convert(MODES[mode])
    return np.asarray(brought), f"{brought.mode} of {picture.width}x{picture.height}"
