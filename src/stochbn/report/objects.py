"""The examples that a method is least and most certain of, with their pictures where they are images."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochbn.predictions import entropy
from stochbn.sources.pictures import Preprocessing

__all__ = ["Shown", "Source", "address", "extremes", "source_of"]

TOP = 3
"""Classes that are shown of an example."""

LONGEST_SIDE = 160
"""Pixels of a picture that is shown; larger ones are reduced."""

SMALL = 64
"""Pixels of a side up to which a picture is kept without loss."""


@dataclass(frozen=True)
class Shown:
    """One example on a page.

    Attributes:
        name: what it is called.
        label: its class.
        top: its most probable classes with their probabilities.
        right: whether the first of these is its class.
        entropy: nats.
        aleatoric: the part of the entropy that remains when the statistics are known; None where it is not known.
        picture: an address that holds all of it; None for what is no image.
    """

    name: str
    label: str
    top: Sequence[tuple[str, float]]
    right: bool
    entropy: float
    aleatoric: float | None
    picture: str | None

    @property
    def epistemic(self) -> float | None:
        """The part of the entropy that comes from the draws; None where it is not known."""
        return None if self.aleatoric is None else max(self.entropy - self.aleatoric, 0.0)


@dataclass(frozen=True)
class Source:
    """How examples are called, and what they look like.

    Attributes:
        name: of the example at a position.
        picture: a Pillow image of it, or a tensor; None if it cannot be had.
    """

    name: Callable[[int], str]
    picture: Callable[[int], Any]


def source_of(objects: Any) -> Source:
    """The source of data sets of images in memory and of rows; other data has numbers and no pictures."""
    if hasattr(objects, "pixels"):
        return Source(lambda i: f"image {i}", lambda i: objects.pixels[i].float() / 255)
    if hasattr(objects, "rows"):
        order = torch.arange(len(objects)) if objects.order is None else objects.order

        def read(position: int) -> Any:
            try:
                return objects.rows.read(int(order[position]))
            except (ValueError, OSError):
                return None

        word = "" if objects.key_name == "file" else f"{objects.key_name} "
        return Source(lambda i: f"{word}{objects.rows.key(int(order[i]))}", read)
    return Source(lambda i: f"row {i}", lambda i: None)


def extremes(
    probs: Tensor,
    labels: Tensor,
    expected_entropy: Tensor | None,
    source: Source,
    classes: Sequence[str],
    count: int = 24,
) -> tuple[list[Shown], list[Shown]]:
    """The least certain examples, the least certain first, and the most certain ones, the most certain first.

    Args:
        probs: ``[N, K]``.
        labels: ``[N]``.
        expected_entropy: ``[N]``, nats, as of `stochbn.predictions.Prediction`; None where it is not known.
        source: names and pictures.
        classes: the names of the K classes; none are numbers.
        count: so many of each, at most.
    """
    names = list(classes) if len(classes) == probs.shape[1] else list(map(str, range(probs.shape[1])))
    total = entropy(probs)
    order = total.argsort(descending=True, stable=True).tolist()

    def show(position: int) -> Shown:
        best, index = probs[position].topk(min(TOP, probs.shape[1]))
        label = int(labels[position])
        return Shown(
            source.name(position),
            names[label],
            [(names[i], p) for i, p in zip(index.tolist(), best.tolist(), strict=True)],
            int(index[0]) == label,
            total[position].item(),
            None if expected_entropy is None else min(expected_entropy[position].item(), total[position].item()),
            address(source.picture(position)),
        )

    return [show(i) for i in order[:count]], [show(i) for i in order[::-1][:count]]


def address(picture: Any, side: int = LONGEST_SIDE) -> str | None:
    """A picture as an address that holds all of it, with a longer side of at most so many pixels; None for others."""
    if not isinstance(picture, Tensor) and getattr(picture, "mode", "L") not in ("L", "RGB", "RGBA"):
        try:
            picture = Preprocessing()(picture)
        except ValueError:  # numbers of no known range
            return None
    image = _of_tensor(picture) if isinstance(picture, Tensor) else picture
    if image is None:
        return None
    small = max(image.size) <= SMALL
    image.thumbnail((side, side))
    kind = "png" if small or image.mode == "RGBA" else "jpeg"
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _of_tensor(values: Tensor) -> Any:
    """A Pillow image of ``[C, H, W]``, grey or of colours, brought to [0, 1]; None for others."""
    from PIL import Image

    if values.ndim != 3 or values.shape[0] not in (1, 2, 3, 4) or min(values.shape[1:]) < 2:
        return None
    values = values.float()
    low, high = values.min(), values.max()
    if low < 0 or high > 1:
        values = (values - low) / (high - low).clamp(min=1e-12)
    pixels = (255 * values).round().clamp(0, 255).to(torch.uint8)
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.movedim(0, -1).contiguous().numpy()
    return Image.fromarray(array, {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[len(pixels)])
