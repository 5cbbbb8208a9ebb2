"""Images of any mode and depth as inputs of a network."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stochbn.sources.inside import open_inside
from stochbn.tasks.boxes import Placement

__all__ = [
    "SWAPPED",
    "TURNED",
    "Decoding",
    "Preprocessing",
    "channels_of",
    "check_not_turned",
    "check_range",
    "decode",
    "endings",
    "stored_picture",
]

PROGRAMS = ("EPS",)
"""Formats that Pillow starts another program for. They are not read."""

OF_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's modes for the numbers of channels that a network may take."""

ORIENTATION = 0x0112
"""EXIF's tag of the orientation."""
TURNED = "turned_by_orientation"
"""In the ``info`` of an image: the orientation by which it was turned upright, where `Decoding` did not ask for it."""
SWAPPED = range(5, 9)
"""Orientations that swap height and width."""

OF_8_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
OF_16_BITS = ("I;16", "I;16B", "I;16L", "I;16N")


OF_OTHERS = {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".ps", ".eps", ".grib", ".bufr"}
"""Endings that Pillow knows, of files that are no pictures or that it cannot read by itself."""

MOST_STD = 2.0
"""The largest standard deviation that may be of pixels from 0 to 1."""


@dataclass(frozen=True)
class Preprocessing:
    """From an image to a network's input: resize and crop, scale to [0, 1], subtract `mean` and divide by `std`.

    Attributes:
        size: height and width: the image is resized to cover it, and the centre is cropped, with the roundings of
            torchvision; None leaves images at their own size.
        mean: for each channel; None is 0.
        std: for each channel; None is 1.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA): what images are brought to. One of 16 bits is grey, and its grey is
            repeated for 3 channels.
        crop: the share of the resized image that the crop leaves, of each side.
        interpolation: how the image is resized: ``"nearest"``, ``"bilinear"``, ``"bicubic"`` or ``"lanczos"``.
        squash: whether the image is resized to the shape of `size`, whatever its own, and nothing but the share is cut.
        pad: the image is resized to fit into `size`, and lies in the middle of this grey (0 to 1), so that nothing is
            cut, as detectors of the YOLO family have it with 114 / 255; None is none of this.

    Raises:
        ValueError: numbers that fit no image.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int = 3
    crop: float = 1.0
    interpolation: str = "bilinear"
    squash: bool = False
    pad: float | None = None

    def __post_init__(self) -> None:
        if self.channels not in OF_CHANNELS:
            raise ValueError(f"images have 1, 3 or 4 channels, not {self.channels}; give the network a preprocess")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"the size of images must be at least 1, got {self.size}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, self.channels):
                raise ValueError(f"{name} has {len(values)} numbers for {self.channels} channels; give 1 for each")
            if values is not None and not all(map(math.isfinite, values)):
                raise ValueError(f"{name} must be finite, got {values}")
        if self.interpolation not in ("nearest", "bilinear", "bicubic", "lanczos", "hamming", "box"):
            raise ValueError(f"there is no interpolation {self.interpolation!r}; expected bilinear or bicubic")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if self.pad is not None and (not 0 <= self.pad <= 1 or self.squash or self.crop != 1):
            raise ValueError(f"pad must lie from 0 to 1, without squash and crop, got {self.pad}")

    def __call__(self, given: Any) -> Tensor:
        """``[C, H, W]`` from an image, or from a tensor of that shape, which is only normalised.

        Raises:
            ValueError: an image of a mode that has no one meaning, such as floats of any range.
        """
        pixels = given if isinstance(given, Tensor) else self._pixels(given)
        for values, change in ((self.mean, torch.sub), (self.std, torch.div)):
            if values is not None:
                pixels = change(pixels, torch.tensor(values).view(-1, *[1] * (pixels.ndim - 1)))
        return pixels

    def _pixels(self, image: Any) -> Tensor:
        depth = 65535.0 if image.mode in OF_16_BITS else 255.0
        if image.mode in OF_16_BITS:
            array = np.asarray(image).astype(np.float32)
            image = _from_array(array)
        elif image.mode in OF_8_BITS:
            image = image.convert("LA") if image.mode == "La" else image  # it converts to nothing else
            image = image.convert(OF_CHANNELS[self.channels])
        else:
            raise ValueError(
                f"an image of mode {image.mode!r} has numbers of no known range; expected 8 or 16 bits: convert it, or "
                "give the network's module a function preprocess(image)"
            )
        if self.size is not None:
            image = self._fitted(image, self.size)
        values = torch.from_numpy(np.array(image, dtype=np.float32)) / depth
        values = values[None] if values.ndim == 2 else values.movedim(-1, 0)
        if self.pad is not None and self.size is not None:
            values = self._padded(values, self.size)
        if len(values) == self.channels:
            return values
        if self.channels == 4:  # grey of 16 bits, opaque
            return torch.cat([values.expand(3, -1, -1), torch.ones_like(values)])
        return values.expand(self.channels, -1, -1)

    def _fitted(self, image: Any, size: tuple[int, int]) -> Any:
        from PIL.Image import Resampling

        tall, wide, top, left = self._fit((image.height, image.width), size)
        if (wide, tall) != image.size:
            image = image.resize((wide, tall), Resampling[self.interpolation.upper()])
        return image if self.pad is not None else image.crop((-left, -top, size[1] - left, size[0] - top))

    def _fit(self, size: tuple[int, int], whole: tuple[int, int]) -> tuple[int, int, int, int]:
        """The height and width that an image of a size is resized to, and its top and left in the network's input."""
        if self.pad is not None:
            ratio = min(whole[0] / size[0], whole[1] / size[1])
            tall, wide = max(round(size[0] * ratio), 1), max(round(size[1] * ratio), 1)
            return tall, wide, (whole[0] - tall) // 2, (whole[1] - wide) // 2
        cover = math.floor(whole[0] / self.crop), math.floor(whole[1] / self.crop)
        if self.squash:
            tall, wide = cover
        elif cover[0] == cover[1]:
            longer = int(cover[0] * max(size) / min(size))
            tall, wide = (longer, cover[0]) if size[1] <= size[0] else (cover[0], longer)
        else:
            ratio = min(size[0] / cover[0], size[1] / cover[1])
            tall, wide = round(size[0] / ratio), round(size[1] / ratio)
        return tall, wide, -round((tall - whole[0]) / 2), -round((wide - whole[1]) / 2)

    def placement(self, size: tuple[int, int]) -> Placement:
        """Where an image of a height and width lies in the network's input.

        >>> Preprocessing((64, 64), pad=0.5).placement((16, 32))
        Placement(scale=(2.0, 2.0), shift=(0, 16))
        """
        if self.size is None:
            return Placement((1.0, 1.0), (0, 0))
        tall, wide, top, left = self._fit(size, self.size)
        return Placement((wide / size[1], tall / size[0]), (left, top))

    def boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Where boxes ``[M, 4]`` (left, top, right, bottom) of an image lie in what becomes of it.

        Args:
            boxes: in pixels of the image.
            size: its height and width.

        Raises:
            ValueError: the image is cropped, so that boxes would be cut.
        """
        if (
            self.size is not None
            and self.pad is None
            and (self.crop != 1 or not (self.squash or size[0] * self.size[1] == size[1] * self.size[0]))
        ):
            raise ValueError(
                "the preprocessing crops pictures, so boxes would be cut: give Preprocessing a pad or squash"
            )
        return self.placement(size).inward(boxes)

    def _padded(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        found = values.new_full((len(values), *size), self.pad or 0.0)
        tall, wide, top, left = self._fit((values.shape[1], values.shape[2]), size)
        found[:, top : top + tall, left : left + wide] = values
        return found


def channels_of(model: nn.Module) -> int:
    """The channels of images that a network takes, by its first convolution: 1, 3 or 4; otherwise 3."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return first.in_channels if first is not None and first.in_channels in OF_CHANNELS else 3


@dataclass(frozen=True)
class Decoding:
    """How an image is read from its file.

    Attributes:
        exif: turn it upright by its EXIF orientation, as browsers and `datasets` do. None does so too, and marks the
            image, as its true boxes may be of the image as it is stored; see `check_not_turned`.
        page: which page to read of an image with several, from 0; None refuses such images.
    """

    exif: bool | None = None
    page: int | None = None

    @property
    def upright(self) -> bool:
        """Whether images are turned upright."""
        return self.exif is not False


def decode(source: Any, most: int | None = None, decoding: Decoding | None = None) -> Any:
    """An image, decoded whole, from its encoded bytes or from a file that is open; a name is never opened.

    Args:
        source: the bytes or the file.
        most: the largest number of pixels. It is never more than ``PIL.Image.MAX_IMAGE_PIXELS``.
        decoding: how; None is `Decoding` with its defaults.

    Raises:
        ValueError: it cannot be read, has more pixels, or several pages of which none is chosen.
    """
    from PIL import Image, UnidentifiedImageError

    decoding = decoding or Decoding()

    if isinstance(source, (bytes, bytearray, memoryview)):
        source = io.BytesIO(source)
    if not hasattr(source, "read"):
        raise ValueError(f"is of type {type(source).__name__}; expected an image as bytes")
    limits = [limit for limit in (most, Image.MAX_IMAGE_PIXELS) if limit is not None]
    try:
        with Image.open(source, formats=_formats()) as image:
            pixels = image.width * image.height
            if not limits or pixels <= min(limits):
                _turn_to(image, decoding.page)
                image.load()
                pixels = image.width * image.height  # of some formats, known only now
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(_too_large("more", min(limits))) from error
    except _PagesError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError("cannot be read as an image: it has no format that is known") from error
    except Exception as error:  # Pillow raises errors of many kinds for damaged files
        raise ValueError(f"cannot be read as an image: {error}") from error
    if limits and pixels > min(limits):
        raise ValueError(_too_large(str(pixels), min(limits)))
    return _upright(image, mark=decoding.exif is None) if decoding.upright else image


class _PagesError(ValueError):
    """An image with several pages."""


def _turn_to(image: Any, page: int | None) -> None:
    """Turn to a page; refuse several where none is chosen. Previews (MPO) and layers (PSD) are no pages."""
    pages = 1 if image.format in ("MPO", "PSD") or not getattr(image, "is_animated", False) else image.n_frames
    if page is None and pages > 1:
        raise _PagesError(f"has {pages} pages (frames): choose one with --page, from 0, or store each as a file")
    if page is not None and page >= pages:
        raise _PagesError(f"has no page {page}, from 0: it has {pages}")
    if page and pages > 1:
        image.seek(page)


def _upright(image: Any, *, mark: bool) -> Any:
    """An image turned by its EXIF orientation; one whose EXIF cannot be read stays as it is."""
    from PIL import ImageOps

    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow raises errors of many kinds for damaged EXIF
        return image
    if orientation not in range(2, 9):  # 1 is upright, and others mean nothing
        return image
    turned = ImageOps.exif_transpose(image)
    if mark:
        turned.info[TURNED] = orientation
    return turned


def check_not_turned(image: Any) -> None:
    """Refuse true boxes of an image that was turned upright where nobody asked for it.

    Raises:
        ValueError: it was turned, so that its boxes may be of other pixels.
    """
    if orientation := image.info.get(TURNED):
        raise ValueError(
            f"was turned upright by its EXIF orientation ({orientation}), and its boxes may be of the picture before "
            "or after: give --no-exif where boxes are in pixels of pictures as they are stored, and --exif where they "
            "are in pixels of upright pictures"
        )


def _too_large(pixels: str, most: int) -> str:
    return f"is an image of {pixels} pixels, where at most {most} are decoded; reduce it, or allow more"


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that are read."""
    from PIL import Image

    Image.preinit()  # the usual ones first
    Image.init()
    return tuple(name for name in Image.ID if name not in PROGRAMS)


def stored_picture(cell: Any, folders: Sequence[Path], decoding: Decoding | None = None) -> Any:
    """The image in a cell of a table: bytes, or bytes and a path as `datasets` stores them.

    Args:
        cell: what the table holds.
        folders: where a file may lie that is named in place of bytes; see `stochbn.sources.inside.open_inside`.
        decoding: how it is read.

    Raises:
        ValueError: there is no image, or it cannot be read.
    """
    if isinstance(cell, Mapping):
        if cell.get("bytes") is None and cell.get("path") is not None:
            with open_inside(cell["path"], folders) as file:
                return decode(file, decoding=decoding)
        cell = cell.get("bytes")
    if cell is None:
        raise ValueError("is empty")
    return decode(cell, decoding=decoding)


def endings() -> set[str]:
    """How names of images end, in small letters."""
    from PIL import Image

    return {ending.lower() for ending in Image.registered_extensions()} - OF_OTHERS


def check_range(preprocess: Any) -> None:
    """Refuse a mean and standard deviation that are of pixels from 0 to 255, for pictures, which are from 0 to 1.

    Raises:
        ValueError: they are.
    """
    if not isinstance(preprocess, Preprocessing):
        return
    mean, std = preprocess.mean or (0.0,), preprocess.std or (1.0,)
    if max(mean) <= 1 and max(std) <= MOST_STD:
        return
    meant = [
        f"{option} {','.join(f'{value / 255:.4g}' for value in values)}"
        for option, values in (("--mean", preprocess.mean), ("--std", preprocess.std))
        if values is not None and max(values) > 1
    ]
    raise ValueError(
        "pixels of pictures are scaled to [0, 1] before --mean is subtracted, and these are numbers of pixels from 0 "
        f"to 255: give {' '.join(meant)}"
    )


def _from_array(array: np.ndarray[Any, Any]) -> Any:
    from PIL import Image

    return Image.fromarray(array)
