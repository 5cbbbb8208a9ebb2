"""Rows a second that ``stochbn predict`` writes with a network that costs nothing.

Run it as ``python benchmarks/predict_rate.py``. The predictor repeats predictions that are ready, so the time is that
of columns, parts and the table. The rates are medians of several repetitions. Writes predict_rate.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stochbn.files import write_bytes
from stochbn.measuring.timing import machine
from stochbn.predictions import Prediction
from stochbn.report.tables import Table
from stochbn.scoring import score
from stochbn.sources import Chunk

BATCH = 250
CLASSES = tuple(f"class {i}" for i in range(10))


@dataclass(frozen=True)
class Ready:
    """A stream of numbered inputs; every 1,000th cannot be read where `errors` says so."""

    count: int
    errors: bool
    key_name: str = "row"

    def __len__(self) -> int:
        return self.count

    def chunks(self, size: int, start: int = 0) -> Iterator[Chunk]:
        """The inputs from a position on."""
        inputs = torch.zeros(size, 1)
        for first in range(start, self.count, size):
            keys: list[str | int] = list(range(first, min(first + size, self.count)))
            errors = ["is broken" if self.errors and not int(key) % 1000 else None for key in keys]
            yield Chunk(keys, errors, inputs[: errors.count(None)])


class Repeated:
    """Predicts what is ready, whatever the input."""

    def __init__(self) -> None:
        probs = torch.rand(BATCH, len(CLASSES)).softmax(1)
        self.probs, self.entropy = probs, torch.rand(BATCH)

    def __call__(self, inputs: Any, **_: Any) -> Prediction:
        """A prediction of as many examples as there are inputs."""
        return Prediction(self.probs[: len(inputs)], self.entropy[: len(inputs)])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of a table (default: 100,000)")
    parser.add_argument("--repetitions", type=int, default=5, help="of each measurement (default: 5)")
    options = parser.parse_args()
    rows = []
    for ending in ("parquet", "csv"):
        for errors in (False, True):
            took = []
            for _ in range(options.repetitions):
                with tempfile.TemporaryDirectory() as folder:
                    started = time.perf_counter()
                    predictor: Any = Repeated()
                    score(
                        predictor, Ready(options.rows, errors), Path(folder) / f"p.{ending}",
                        settings={}, classes=CLASSES, batch=BATCH,
                    )  # fmt: skip
                    took.append(time.perf_counter() - started)
            rate = options.rows / statistics.median(took)
            rows.append([ending, "every 1,000th" if errors else "none", f"{rate:,.0f}"])
    title = f"Rows a second of a table of {options.rows:,} rows, classes, batches of {BATCH}; {machine()}"
    table = Table(title, ["table", "rows that cannot be read", "rows a second"], rows)
    write_bytes(Path(__file__).parent / "predict_rate.md", f"{table.markdown()}\n".encode())
    print(table.markdown())


if __name__ == "__main__":
    main()
