"""A network and its posterior as a callable class that loads both once: for actors of Ray Data, and for services."""

from __future__ import annotations

import base64
import binascii
import numbers
import os
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochbn.arrays import as_array
from stochbn.conformal.base import group_names
from stochbn.execution import Draw, Passes
from stochbn.interface import Interface
from stochbn.posteriors import load
from stochbn.posteriors.thresholds import compare_draws
from stochbn.predictive import Predictive
from stochbn.schema import Schema
from stochbn.scoring import scored, without_nan
from stochbn.shift import Monitor, Reading
from stochbn.sources import Chunk, Decoding, RowObjects, build, load_weights, prepared
from stochbn.sources.pictures import decode
from stochbn.table_files import Columns
from stochbn.tasks import Detection
from stochbn.tasks.boxes import Placement

__all__ = ["Scorer"]

Batch = Mapping[str, np.ndarray[Any, Any]]
"""Columns of numpy arrays, as Ray Data passes them."""


class Scorer:
    """Adds to batches of rows the columns that ``stochbn predict`` writes.

    All arguments are texts, numbers and lists and mappings of them, so that they travel to other machines; network and
    posterior are loaded by each process from files that it can read, once::

        dataset.map_batches(
            stochbn.deploy.Scorer,
            fn_constructor_kwargs={"model": "mynet:build", "weights": "w.pt", "posterior": "w.sbn.safetensors"},
            compute=ray.data.ActorPoolStrategy(size=8),
            num_gpus=1,  # where there are GPUs: each actor then sees its own
            batch_size=250,
        )

    Every batch sees the draws of the seed: with ``tolerance=0`` a row's prediction depends, to rounding, on the row and
    the seed alone, however rows are put into batches, unless examples of a batch affect each other. With `augment` an
    example's changes depend on its place in the batch too.

    A posterior whose prediction sets are by group needs the column of the groups in every batch.

    What it is given may come from strangers: it takes numbers, arrays, and images as bytes, as base64 in a mapping
    ``{"base64": TEXT}``, or as numbers from 0 to 255 in a mapping ``{"pixels": [H][W][C]}``. A text, a path or a URL is
    never opened, and becomes the error of its row.

    Args:
        model: where the network is built: ``package.module:function``, ``timm:NAME`` or ``hf:PATH``.
        weights: a file with its state dict; None takes the weights that it is built with.
        weights_key: which weights of a checkpoint, see `stochbn.sources.load_weights`.
        posterior: a file that ``stochbn fit`` or ``Posterior.save`` wrote; None predicts without SBN.
        arguments: arguments of the function that builds it.
        inputs: the column of images (encoded, or arrays) or arrays, or the columns of numbers, that the network takes.
            None is the only column that there is or, of several, those that the posterior was fitted with.
        size: images are resized and cropped to this height and width; with `mean` and `std`, in place of the
            preprocessing of the network's module. None is what ``stochbn fit`` was given; so for `mean` and `std`.
        mean: subtracted from images in [0, 1].
        std: what they are then divided by.
        settings: arguments of `stochbn.Predictive`: ``task``, ``logits``, ``class_axis``, ``output``.
        draws: as for `stochbn.Predictive`.
        tolerance: likewise.
        augment: changes of images in every draw, as text: ``"flip,shift:4"``.
        top: how many of the most probable classes to add.
        seed: where draws come from.
        threads: threads of this process's PyTorch; None leaves them as they are.
        pixels: the largest number of pixels of an image; None is the limit of Pillow, ``PIL.Image.MAX_IMAGE_PIXELS``.
        monitor: whether to watch what is predicted with a `stochbn.shift.Monitor`, for one more pass over each batch;
            `shift` then tells what it found. It needs a posterior with a reference. A posterior that was adapted is
            still compared with the training data, so the alarm goes on.

    Raises:
        ValueError, OSError: the network or a file cannot be had; the message says what to do.
    """

    def __init__(
        self,
        model: str,
        weights: str | os.PathLike[str] | None = None,
        posterior: str | os.PathLike[str] | None = None,
        *,
        weights_key: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        inputs: Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        settings: Mapping[str, Any] | None = None,
        draws: int = 50,
        tolerance: float | None = None,
        augment: str | None = None,
        top: int = 1,
        seed: int = 0,
        threads: int | None = None,
        pixels: int | None = None,
        monitor: bool = False,
    ) -> None:
        from stochbn.augment import named

        if not isinstance(model, str):
            raise TypeError(
                f"name the network by where it is built, as 'package.module:function', got {type(model).__name__}: "
                "an object would have to be pickled"
            )
        if isinstance(inputs, str):
            raise TypeError(f"inputs must be a list of columns, such as [{inputs!r}], got {inputs!r}")
        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        if threads is not None:
            torch.set_num_threads(threads)
        built = build(model, dict(arguments or {}), weights_follow=weights is not None)
        if weights is not None:
            load_weights(built.model, weights, weights_key)
        fitted = None if posterior is None else load(Path(posterior))
        held = (None if fitted is None else fitted.schema) or Schema()
        whole = isinstance(Interface.among(built.model, settings or {}).task, Detection)
        built = prepared(built, size or held.size, mean or held.mean, std or held.std, whole=whole)
        self.preprocess, self.prepared_by, self.classes = built.preprocess, built.prepared_by, built.classes or ()
        self.inputs, self.top, self.seed, self.pixels = inputs, top, seed, pixels
        self.schema, self._decoding = held, Decoding(held.exif, held.page)
        self.by = None if fitted is None or fitted.thresholds is None else fitted.thresholds.by
        if monitor and fitted is None:
            raise ValueError("monitor=True compares with the posterior's reference: name a posterior")
        self.monitor = Monitor(fitted) if monitor and fitted is not None else None
        self._not_compared, self._why = 0, ""
        self._reading: Reading | None = None
        compare_draws(fitted, draws, augment)
        device = torch.accelerator.current_accelerator(check_available=True)
        self.predictive = _Counted(
            built.model if device is None else built.model.to(device),
            fitted,
            draws,
            tolerance=tolerance,
            augment=None if augment is None else named(augment),
            **(settings or {}),
        )

    def columns(self, chunk: Chunk, key_name: str) -> Columns:
        """The columns of the table of ``stochbn predict`` for the examples of a chunk.

        Raises:
            ValueError: the prediction is none of so many examples.
        """
        columns = scored(self.predictive, chunk, key_name, self.classes, self.top, self.seed)
        if self.monitor is not None:
            self._watch(self.monitor, chunk)
        return columns

    def shift(self) -> dict[str, Any]:
        """Whether what was predicted is like the training data, for a service to tell; any thread may ask.

        Returns:
            ``alarm``, ``evidence`` and ``batches``, as `stochbn.shift.Monitor` has them, and ``latest``: how unusual
            the latest batch is, with ``examples``, ``p``, ``look``, ``mixed`` and ``layers``, and a sentence under
            ``says``; None before the first batch. ``not_compared`` counts batches that could not be compared, such as
            of numbers that overflow, and ``why`` says what was wrong with the last of them.

        Raises:
            ValueError: it was made without ``monitor=True``.
        """
        if self.monitor is None:
            raise ValueError("nothing is watched: make the Scorer with monitor=True")
        reading = self._reading
        latest = None if reading is None else {**reading.description(), "says": str(reading)}
        told = {"alarm": reading is not None and reading.alarm, "evidence": self.monitor.evidence}
        missed = {"not_compared": self._not_compared, "why": self._why}
        return {**told, "batches": self.monitor.seen, "latest": latest, **missed}

    def _watch(self, monitor: Monitor, chunk: Chunk) -> None:
        """Have the monitor see a chunk, as far as it can."""
        inputs = without_nan(chunk).inputs
        if inputs is None:
            return
        try:
            self._reading = monitor.update(self.predictive.model, inputs)
        except (RuntimeError, TypeError, ValueError) as error:  # what is predicted need not be what can be compared
            self._not_compared, self._why = self._not_compared + 1, str(error)

    def read(self, objects: Sequence[Any]) -> Chunk:
        """The examples of a request as the network takes them, after `preprocess`; any thread may ask.

        Args:
            objects: numbers, lists of numbers, or images: as bytes, ``{"base64": TEXT}`` or ``{"pixels": [H][W][C]}``.
                Anything else has an error, which does not tell whether there is a file of that name.

        Raises:
            TypeError: it is no sequence of examples.
        """
        if isinstance(objects, (str, bytes, bytearray, Mapping)) or not isinstance(objects, (Sequence, np.ndarray)):
            raise TypeError(f"expected a list of examples, got {type(objects).__name__}")
        columns = _Columns({"input": objects}, None, self.pixels, self._decoding)
        if not len(columns):
            return Chunk([], [], None)
        (chunk,) = RowObjects("the request", columns, self.preprocess).chunks(len(columns))
        return chunk

    def answer(self, objects: Sequence[Any]) -> list[dict[str, Any]]:
        """A row of predictions for each example of a request to a service.

        Args:
            objects: as for `read`; an example with an error becomes a row with it.

        Raises:
            RuntimeError, ValueError: the network does not take them.
            TypeError: it is no sequence of examples.
        """
        return self._rows(self.read(objects))

    def predict(self, inputs: Tensor, placements: Sequence[Placement | None] | None = None) -> list[dict[str, Any]]:
        """A row of predictions for each of the inputs that `read` gave.

        Args:
            inputs: ``[N, ...]``.
            placements: those of the chunk; without them, detected boxes are in pixels of the inputs.

        Raises:
            RuntimeError, ValueError: the network does not take them.
        """
        return self._rows(Chunk(list(range(len(inputs))), [None] * len(inputs), inputs, placements=placements))

    def _rows(self, chunk: Chunk) -> list[dict[str, Any]]:
        _, *names = found = self.columns(chunk, _Columns.key_name)
        told = zip(*(found[name] for name in names), strict=True)
        return [
            {name: value for name, value in zip(names, row, strict=True) if row[-1] is None or name == "error"}
            for row in told
        ]

    @property
    def drawn(self) -> int:
        """How many draws all examples have had so far, together."""
        return self.predictive.drawn

    def __call__(self, batch: Batch) -> dict[str, np.ndarray[Any, Any]]:
        """The batch with the columns of predictions, and ``error``: why a row could not be read, or None.

        Texts that are missing are None, numbers NaN.

        Raises:
            ValueError: the batch lacks a column, or has one that is called like a prediction's.
        """
        held = self.schema.inputs
        held = held if len(batch) > 1 and all(name in batch for name in held) else ()
        columns = _Columns(batch, self.inputs or held or None, self.pixels, self._decoding, self.by)
        if not len(columns):
            return dict(batch)
        (chunk,) = RowObjects("the batch", columns, self.preprocess).chunks(len(columns))
        _, *names = found = self.columns(chunk, _Columns.key_name)
        if taken := [name for name in names if name in batch]:
            raise ValueError(f"the batch has a column {taken[0]!r}, as one of the predictions is called; rename it")
        return {**batch, **{name: _column(found[name]) for name in names}}


class _Counted(Predictive):
    """A predictive that counts draws, over all examples."""

    drawn = 0

    def _pass(self, made: Passes, block: Sequence[Draw]) -> Tensor:
        raw = super()._pass(made, block)
        self.drawn += raw.shape[0] * raw.shape[1]
        return raw


class _Columns:
    """The rows of a batch of columns, as examples."""

    key_name = " row"  # no column's name
    classes: tuple[str, ...] = ()
    has_boxes = False

    def __init__(
        self,
        batch: Mapping[str, Any],
        inputs: Sequence[str] | None,
        pixels: int | None,
        decoding: Decoding,
        by: str | None = None,
    ) -> None:
        self.decoding = decoding
        names = list(inputs or (name for name in batch if name != by))
        missing = [name for name in names if name not in batch]
        if missing or (inputs is None and len(names) != 1):
            told = f"has no column {missing[0]!r}" if missing else f"has {len(names)} columns"
            raise ValueError(f"the batch {told}; name those of the network's inputs, among {', '.join(batch)}")
        self.columns, self.pixels = [as_array(batch[name]) for name in names], pixels
        self.groups = group_names(batch[by], len(self)) if by is not None and by in batch else None

    def __len__(self) -> int:
        return len(self.columns[0])

    def key(self, position: int) -> int:
        """The position."""
        return position

    def read(self, position: int) -> Any:
        """An image, or a tensor.

        Raises:
            ValueError: it is neither.
        """
        values = [column[position] for column in self.columns]
        if len(values) > 1:
            return _numbers(values)
        value = values[0]
        if isinstance(value, Mapping):
            value = _pixels_of(value["pixels"], self.pixels) if "pixels" in value else _bytes_of(value)
        if value is None:
            raise ValueError("is empty")
        if isinstance(value, (bytes, bytearray, memoryview)):
            return decode(value, self.pixels, self.decoding)
        from PIL import Image

        if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3:
            return Image.fromarray(value[..., 0] if value.shape[-1] == 1 else value)
        return value if isinstance(value, Image.Image) else _numbers(value)

    def labels(self) -> Tensor | None:
        """None: a batch to predict has none that count."""
        return None


def _bytes_of(image: Mapping[str, Any]) -> Any:
    """The bytes of an image in base64, or as `datasets` stores images; None if it is empty.

    Raises:
        ValueError: there are none. A path in their place is never opened.
    """
    if isinstance(text := image.get("base64"), str):
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"holds what is no base64: {error}") from error
    content = image.get("bytes")
    if isinstance(content, (bytes, bytearray, memoryview)) or (content is None and image.get("path") is None):
        return content
    raise ValueError("holds no bytes of an image, and no file is opened; send its bytes")


def _pixels_of(values: Any, most: int | None) -> np.ndarray[Any, Any]:
    """An image in numbers from 0 to 255, ``[H, W, C]`` in uint8.

    Raises:
        ValueError: it is none, or too large.
    """
    pixels = _numbers(values)
    shape, channels = list(pixels.shape), pixels.shape[-1]
    if pixels.ndim != 3 or channels not in (1, 3, 4) or not pixels.numel():
        raise ValueError(f"has pixels of shape {shape}; expected [H, W, C] with C = 1, 3 or 4")
    if most is not None and pixels.numel() > most * channels:
        raise ValueError(f"is an image of {pixels.numel() // channels} pixels, where at most {most} are taken")
    if bool(((pixels < 0) | (pixels > 255) | (pixels != pixels.floor())).any()):
        raise ValueError("has pixels that are no whole numbers from 0 to 255")
    return pixels.numpy().astype(np.uint8)


def _numbers(values: Any) -> Tensor:
    """A tensor of numbers alone: no text is read as one, and none as the name of a file.

    Raises:
        ValueError: there is something else.
    """
    try:
        found = np.asarray(values)
        if found.dtype.kind == "O" and all(isinstance(value, (numbers.Real, Decimal)) for value in found.flat):
            found = found.astype(np.float64)  # of any size, or decimal
        if found.dtype.kind not in "fiub":
            raise TypeError("expected numbers, or an image as bytes; no text is opened as a file")
        with np.errstate(over="ignore"):  # infinity has an error of its own
            tensor = torch.from_numpy(found.astype(np.float32))
    except (OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"holds what is no number: {error}") from error
    return tensor if tensor.ndim else tensor[None]


def _column(values: list[Any]) -> np.ndarray[Any, Any]:
    """Values as a column: numbers as float32 with NaN where there is none, all others as they are."""
    if all(value is None or isinstance(value, (int, float)) for value in values) and any(
        value is not None for value in values
    ):
        return np.array([np.nan if value is None else value for value in values], dtype=np.float32)
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column
