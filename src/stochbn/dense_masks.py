"""Images of dense predictions: the class and the entropy of every pixel, as PNG files beside a table."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from stochbn.files import write
from stochbn.predictions import MultilabelPrediction, Prediction

__all__ = ["Masks", "mask_name", "write_masks"]

PLAIN = re.compile(
    r"(?!.*\.png/)[a-z0-9_+=@-]([a-z0-9_.+=@-]*[a-z0-9_+=@-])?(/[a-z0-9_+=@-]([a-z0-9_.+=@-]*[a-z0-9_+=@-])?)*"
)
"""Keys that are names of files as they are: on every file system they are as many files as there are keys."""
NUMBERED = re.compile("~[0-9]{1,15}$")
"""The number of an example among those of equal keys, at the end of its name. A digest is longer."""
LONGEST = 100
"""Bytes of a part of a name, at most, so that a digest and an ending still fit."""
DEEPEST = 8
"""Folders of a name, at most."""


@dataclass
class Masks:
    """Where the masks of a table go, and how many of its examples had each name so far.

    Attributes:
        folder: the folder.
        seen: counts of names. Memory grows with the number of different names.
    """

    folder: Path
    seen: Counter[str] = field(default_factory=Counter)

    def add(self, masks: Iterable[str]) -> None:
        """Count masks that were written before, by the column ``mask`` of their rows."""
        self.seen.update(NUMBERED.sub("", mask) for mask in masks)


def write_masks(
    prediction: Any,
    keys: Sequence[str | int],
    folder: Path,
    seen: Counter[str] | None = None,
    sets: Tensor | None = None,
) -> list[dict[str, Any]]:
    """Write two images for each example, or three with sets, and return the columns of its row.

    ``NAME.class.png`` has the number of the most probable class of every pixel, ``NAME.entropy.png`` its entropy, from
    0 for none to 255 for the logarithm of the number of classes. ``NAME.set.png`` has 255 where the class of the sets'
    mask is in the set and 0 elsewhere or, for sets of all classes, their number. Each is written whole or not at all.
    NAME is `mask_name` of the key. Examples with equal keys are numbered: from the second on, NAME ends in ``~2``,
    ``~3`` and so on.

    Args:
        prediction: of dense outputs of classes, ``[N, K, H, W]``.
        keys: what the examples are called; a slash makes a folder.
        folder: where the pictures go.
        seen: how many examples before had each name, to which these are added; None if there are none before.
        sets: of `stochbn.conformal.crc`, ``[N, H, W]`` of one class or ``[N, K, H, W]``; None for none.

    Returns:
        For every example ``entropy`` and ``mutual_information``, means over its places in nats, ``largest_entropy``,
        and ``mask``, where its pictures are in the folder, without the endings; with sets ``set_size``, the mean number
        of classes in the set of a place, or the share of places in the mask.

    Raises:
        ValueError: the prediction is not of two-dimensional places with at most 256 classes.
        OSError: the folder cannot be written.
    """
    from PIL import Image

    shape = list(prediction.probs.shape) if isinstance(prediction, Prediction) else type(prediction).__name__
    if not isinstance(prediction, Prediction) or isinstance(prediction, MultilabelPrediction) or len(shape) != 4:
        raise ValueError(f"masks are of the classes of two-dimensional places [N, K, H, W], got {shape}")
    classes = prediction.probs.shape[prediction.class_axis]
    if classes > 256:
        raise ValueError(f"masks have a byte for a class, so at most 256 of them, got {classes}")
    chosen = prediction.probs.argmax(prediction.class_axis).cpu()
    entropies, information = prediction.entropy.cpu(), prediction.mutual_information.cpu()
    rows, seen = [], Counter() if seen is None else seen
    sizes = None if sets is None else sets.sum(1).cpu() if sets.ndim == 4 else sets.int().cpu()
    for i, (key, labels, entropy, mutual) in enumerate(zip(keys, chosen, entropies, information, strict=True)):
        name = mask_name(key)
        seen[name] += 1
        name += f"~{seen[name]}" if seen[name] > 1 else ""
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        scaled = (255 * entropy.float() / math.log(classes)).round().clamp(0, 255)
        pictures = {"class": labels, "entropy": scaled}
        if sets is not None and sizes is not None:
            pictures["set"] = sizes[i] if sets.ndim == 4 else 255 * sizes[i]
        for ending, values in pictures.items():
            picture = Image.fromarray(_bytes(values))
            write(folder / f"{name}.{ending}.png", lambda temporary, picture=picture: picture.save(temporary))  # type: ignore[misc]
        rows.append(
            {
                "entropy": entropy.mean().item(),
                "largest_entropy": entropy.max().item(),
                "mutual_information": mutual.mean().item(),
                **({} if sizes is None else {"set_size": sizes[i].double().mean().item()}),
                "mask": name,
            }
        )
    return rows


def _bytes(values: Tensor) -> Any:
    return values.byte().numpy()


def mask_name(key: str | int) -> str:
    """A path inside the folder, whatever a key is: a stranger's file may call its rows as it likes.

    Keys of small letters, digits and ``_.+@=-`` are names as they are. Of others, what is no letter or digit is
    replaced, long ones are cut, and a digest of the key is added. So different keys do not share a file, on file
    systems where capitals do not count either. The name depends on the key alone.

    >>> mask_name("street/0001.png"), mask_name(7)
    ('street/0001.png', '7')
    >>> mask_name("A street.png")
    'A_street.png~8f523163c3a958d7'
    """
    text = str(key)
    parts = text.split("/")
    if PLAIN.fullmatch(text) and len(parts) <= DEEPEST and max(map(len, parts)) <= LONGEST:
        return text
    parts = [_cut(re.sub(r"[^\w.+@=-]", "_", part)) for part in parts if part not in ("", ".", "..")]
    # The name of a folder must not be that of a picture.
    *folders, last = [re.sub(r"(\.png|\.)$", r"\1_", part) for part in parts[-DEEPEST - 1 : -1]] + (parts[-1:] or ["_"])
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
    return "/".join([*folders, f"{last}~{digest}"])


def _cut(part: str) -> str:
    return part.encode()[:LONGEST].decode(errors="ignore")
