"""What a service has to know of inputs and outputs, as the metadata of an exported file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from stochbn.network.calling import NetworkInput
from stochbn.sources.pictures import Preprocessing

__all__ = ["metadata"]


def metadata(
    classes: Sequence[str], count: int, preprocess: Any, inputs: NetworkInput, exif: bool = True
) -> dict[str, str]:
    """``classes``, a list of names in JSON, and ``preprocess``, how a picture becomes an input, if they are known.

    Args:
        classes: the names of the classes; none are left out.
        count: K, how many there are.
        preprocess: a `stochbn.sources.pictures.Preprocessing`; another function cannot be written down.
        inputs: the example that is exported.
        exif: whether pictures are turned upright by their EXIF orientation before.

    Raises:
        ValueError: there are other numbers of names and of classes, or of channels of pictures and of inputs.
    """
    about: dict[str, str] = {}
    if classes:
        if len(classes) != count:
            raise ValueError(f"there are {len(classes)} names of classes, and the network has {count} classes")
        about["classes"] = json.dumps(list(classes))
    shape = list(next(iter(inputs.tensors())).shape)
    if isinstance(preprocess, Preprocessing) and len(shape) == 4:
        if preprocess.channels != shape[1]:
            raise ValueError(f"pictures are prepared in {preprocess.channels} channels, and the example has {shape[1]}")
        about["preprocess"] = json.dumps({**asdict(preprocess), "size": preprocess.size or shape[2:], "exif": exif})
    return about
