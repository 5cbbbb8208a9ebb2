"""What a method of `rivals.py` predicts, and what that and its fit cost in processor time."""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rivals_methods import Method, Predict, Subject, plain
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from stochbn.paper.trainee import augment
from stochbn.sources.named import Images, as_input

LOADED = 128
"""Training images in a batch of the data loaders."""
REPETITIONS = 15


def loaders(train: Images, held_out: Images) -> dict[str, DataLoader[Any]]:
    """Data loaders of the training images, of augmented ones, and of those held out: see `Subject`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        augmented = augment(train.pixels)

    def loader(pixels: Tensor, labels: Tensor, shuffle: bool) -> DataLoader[Any]:
        examples = TensorDataset(as_input(pixels).contiguous(), labels)
        return DataLoader(examples, LOADED, shuffle=shuffle, generator=torch.Generator())

    return {
        "train": loader(train.pixels, train.labels, True),
        "augmented": loader(augmented, train.labels, True),
        "held_out": loader(held_out.pixels, held_out.labels, False),
    }


def measure(method: Method, subject: Subject, known: Sequence[Tensor], unknown: Sequence[Tensor]) -> dict[str, Any]:
    """Fit a method and predict all test images, given in batches.

    Returns:
        ``known`` and ``unknown``: probabilities ``[N, K]``; ``passes`` and ``fitting``: its costs, as the table says;
        ``chosen``: in words.
    """
    found: list[tuple[Predict, str]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unit = _plain_seconds(subject, known)
        took = processor_seconds(lambda: found.append(method.fit(subject)))
        predict, chosen = found[0]
        with torch.no_grad():
            works = (_in_turn(plain(subject)[0], known), _in_turn(predict, known))
            times = medians(works, REPETITIONS)
            parts = {"known": known, "unknown": unknown}
            probs = {part: torch.cat([predict(x) for x in batches]).float() for part, batches in parts.items()}
    images = len(subject.train.dataset)  # type: ignore[arg-type]
    return {**probs, "passes": times[1] / times[0], "fitting": took / (unit * images), "chosen": chosen}


def _plain_seconds(subject: Subject, batches: Sequence[Tensor]) -> float:
    """The time of a plain pass, for one image."""
    with torch.no_grad():
        return medians([_in_turn(subject.model, batches)], REPETITIONS)[0] / len(batches[0])


def processor_seconds(work: Callable[[], object]) -> float:
    """The processor time that a call takes in all threads of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def medians(works: Sequence[Callable[[], object]], repetitions: int) -> list[float]:
    """The median processor time of each work, all in turn in every repetition, after one call to warm up."""
    for work in works:
        work()
    times = [[processor_seconds(work) for work in works] for _ in range(repetitions)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def _in_turn(work: Callable[[Tensor], object], batches: Sequence[Tensor]) -> Callable[[], object]:
    """A call of the work with the next batch."""
    coming: Iterator[Tensor] = itertools.cycle(batches)
    return lambda: work(next(coming))
