"""How networks are trained, and the log of a training."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from stochbn.files import write_bytes

__all__ = ["PRECISIONS", "Epoch", "Schedule", "read_log", "write_log"]

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")


@dataclass(frozen=True)
class Schedule:
    """How a network is trained, with Adam. As published: from 1e-3 linearly to 0, changed each epoch, batch size 16.

    Attributes:
        epochs: passes over the training data; what is left of it after the last full mini-batch is dropped.
        batch_size: examples in a mini-batch.
        learning_rate: Adam's at the first step.
        seed: what weights, order, augmentation and dropout come from.
        augment: whether images are cropped and flipped at random, as the paper does for CIFAR.
        precision: Lightning Fabric's name of the arithmetic, such as ``32-true`` or ``bf16-mixed``.
        compile: whether the training step's forward and backward passes are compiled.
        processes: how many processes train one network together, each on its own accelerator if there are any. Every
            one takes mini-batches of `batch_size`, whose statistics are its own, and their gradients are averaged.
        decay: when the learning rate changes: each ``epoch``, as published, or each ``step``.
        decrease_from: how many epochs the learning rate stays as it is, before it falls linearly to 0.
    """

    epochs: int
    batch_size: int = 16
    learning_rate: float = 1e-3
    seed: int = 0
    augment: bool = False
    precision: str = "32-true"
    compile: bool = False
    processes: int = 1
    decay: str = "step"
    decrease_from: int = 0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; there are {', '.join(PRECISIONS)}")
        if self.epochs < 1 or self.batch_size < 2 or not 0 < self.learning_rate < float("inf") or self.processes < 1:
            raise ValueError(
                "expected at least 1 epoch, a batch size of at least 2, a positive learning rate and at least 1 "
                f"process, got {self.epochs}, {self.batch_size}, {self.learning_rate} and {self.processes}"
            )
        if self.decay not in ("epoch", "step"):
            raise ValueError(f"the learning rate decays each 'epoch' or each 'step', not each {self.decay!r}")
        if not 0 <= self.decrease_from < self.epochs:
            raise ValueError(
                f"decrease_from must be from 0 to {self.epochs - 1} for {self.epochs} epochs, got {self.decrease_from}"
            )

    def rate(self, epochs: float) -> float:
        """The learning rate after so many epochs; a fraction is what of the epoch is done."""
        passed = math.floor(epochs) if self.decay == "epoch" else epochs
        return self.learning_rate * (1 - max(0.0, passed - self.decrease_from) / (self.epochs - self.decrease_from))


@dataclass(frozen=True)
class Epoch:
    """One line of the log of a training.

    Attributes:
        epoch: its number, from 1.
        learning_rate: Adam's at its first step.
        loss: the mean loss of its mini-batches in nats, in training mode and while the weights change.
        accuracy: likewise, the fraction of its training images that were classified correctly.
        held_out_loss: after the epoch, the mean loss of the held-out images in nats, with running statistics; None
            without such images.
        held_out_accuracy: likewise, the fraction of them that is classified correctly.
    """

    epoch: int
    learning_rate: float
    loss: float
    accuracy: float
    held_out_loss: float | None = None
    held_out_accuracy: float | None = None


def read_log(path: Path) -> list[Epoch]:
    """The epochs in a log that `train` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or no such log.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [
            Epoch(
                int(row["epoch"]),
                *(float(row[name]) for name in ("learning_rate", "loss", "accuracy")),
                *(float(row[name]) if row[name] else None for name in ("held_out_loss", "held_out_accuracy")),
            )
            for row in rows
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged or not a log of training: {error}") from error


def write_log(path: Path, epochs: list[Epoch]) -> None:
    """Write the log of a training, which `read_log` reads."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Epoch)])
    writer.writerows(["" if value is None else f"{value:.6g}" for value in astuple(one)] for one in epochs)
    write_bytes(path, text.getvalue().encode())
