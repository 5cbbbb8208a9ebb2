"""Pictures of dense predictions: the class and the entropy of every place, as PNG files beside a table."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from stochbn.files import write
from stochbn.predictions import MultilabelPrediction, Prediction

__all__ = ["write_masks"]


def write_masks(prediction: Any, keys: Sequence[str | int], folder: Path) -> list[dict[str, Any]]:
    """Write two pictures for each object, and give the columns of its row.

    ``KEY.class.png`` has the number of the most probable class of every place, ``KEY.entropy.png`` its entropy, from 0
    for none to 255 for the logarithm of the number of classes. Each is written whole or not at all.

    Args:
        prediction: of dense outputs of classes, ``[N, K, H, W]``.
        keys: what the objects are called; a slash makes a folder.
        folder: where the pictures go.

    Returns:
        For every object ``entropy`` and ``mutual_information``, means over its places in nats, ``largest_entropy``, and
        ``mask``, where its pictures are in the folder, without the endings.

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
    rows = []
    for key, labels, entropy, mutual in zip(keys, chosen, entropies, information, strict=True):
        name = _name(key)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        scaled = (255 * entropy.float() / math.log(classes)).round().clamp(0, 255)
        for ending, values in (("class", labels), ("entropy", scaled)):
            picture = Image.fromarray(_bytes(values))
            write(folder / f"{name}.{ending}.png", lambda temporary, picture=picture: picture.save(temporary))  # type: ignore[misc]
        rows.append(
            {
                "entropy": entropy.mean().item(),
                "largest_entropy": entropy.max().item(),
                "mutual_information": mutual.mean().item(),
                "mask": name,
            }
        )
    return rows


def _bytes(values: Tensor) -> Any:
    return values.byte().numpy()


def _name(key: str | int) -> str:
    """A path inside the folder, whatever a key is: a stranger's file may call its rows as it likes."""
    parts = [part for part in PurePosixPath(str(key).replace("\\", "/")).parts if part not in ("/", "..", ".")]
    return "/".join(re.sub(r"[^\w.+@=-]", "_", part)[:120] for part in parts) or "_"
