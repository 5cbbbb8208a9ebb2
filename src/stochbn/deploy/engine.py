"""The parts of a table predicted by Ray: each is made by one actor from the rows that it reads itself.

A part is the unit: it is scored batch by batch as in one process, so that the table does not depend on how many actors
there are. Ray starts an actor that dies again, and its part is made anew; a part reaches the table once.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stochbn.deploy.scorer import Scorer
from stochbn.sources import ParquetObjects
from stochbn.table_files import as_table, joined, widest

if TYPE_CHECKING:
    import pyarrow

__all__ = ["PartScorer", "check_ray", "gpus_each", "ray_engine"]


class PartScorer:
    """Scores parts of a stream by their numbers: what actors run.

    Args:
        stream: the examples.
        scorer: arguments of `Scorer`.
        batch: examples in a forward pass.
        part: examples in a part, a multiple of `batch`.
        folder: the current folder of the process that asks, where there is one of that name here.
    """

    def __init__(self, stream: ParquetObjects, scorer: Mapping[str, Any], batch: int, part: int, folder: str) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)
        self.scorer = Scorer(**scorer)
        self.stream = replace(stream, preprocess=self.scorer.preprocess)
        self.batch, self.part = batch, part

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The parts with these numbers, each as an Arrow stream."""
        return {"id": batch["id"], "table": np.array([self._table(int(i)) for i in batch["id"]], dtype=object)}

    def _table(self, number: int) -> bytes:
        import pyarrow

        start = number * self.part
        chunks = self.stream.chunks(self.batch, start, start + self.part)
        tables = [as_table(self.scorer.columns(chunk, self.stream.key_name)) for chunk in chunks]
        table = joined(tables, widest(one.schema for one in tables))
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())


def check_ray() -> None:
    """Refuse to go on without Ray Data.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--engine ray needs Ray ({error}): pip install 'stochbn[ray]'") from error


def gpus_each(gpus: float, workers: int) -> float:
    """How much of a GPU each of some workers asks for, in a cluster of so many: one, or a share where they are more.

    >>> gpus_each(8, 8), gpus_each(2, 5), gpus_each(0, 2)
    (1.0, 0.3333333333333333, 0.0)
    """
    return 1 / math.ceil(workers / gpus) if gpus else 0.0


def ray_engine(
    stream: ParquetObjects, scorer: Mapping[str, Any], batch: int, part: int, workers: int
) -> Callable[[Sequence[int]], Iterator[tuple[int, pyarrow.Table]]]:
    """An engine for `stochbn.scoring.score`: parts are made by `workers` actors of the Ray cluster.

    Without a running cluster (``RAY_ADDRESS``), Ray is started on this machine, and ended with the last part. Where the
    cluster has GPUs, each actor sees one of them; actors share them if there are more.

    Args:
        stream: the examples, which every actor must be able to read under the same names.
        scorer: arguments of `Scorer`, likewise.
        batch: examples in a forward pass.
        part: examples in a part, a multiple of `batch`.
        workers: how many actors.
    """

    def engine(numbers: Sequence[int]) -> Iterator[tuple[int, pyarrow.Table]]:
        import pyarrow
        import ray
        import ray.data

        if not numbers:
            return
        next(stream.chunks(1))  # columns that are not there are told before Ray is started
        started = not ray.is_initialized()
        if started:
            address = os.environ.get("RAY_ADDRESS", "local")  # None would take any cluster that runs on this machine
            local: dict[str, Any] = (
                {"num_cpus": max(workers, 1), "include_dashboard": False} if address == "local" else {}
            )
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
        actors = min(workers, len(numbers))
        resources: Any = ray.cluster_resources  # which has no types
        gpus = resources().get("GPU", 0.0)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        try:
            parts = ray.data.from_items([{"id": number} for number in numbers], override_num_blocks=len(numbers))
            rows = parts.map_batches(
                PartScorer,
                fn_constructor_kwargs={
                    "stream": replace(stream, preprocess=None),
                    "scorer": scorer,
                    "batch": batch,
                    "part": part,
                    "folder": str(Path.cwd()),
                },
                # The next part waits at each actor: Ray gives out parts once in some tenths of a second.
                compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
                batch_size=1,
                num_cpus=1,
                num_gpus=gpus_each(gpus, actors),
            )
            for row in rows.iter_rows():
                yield int(row["id"]), pyarrow.ipc.open_stream(row["table"]).read_all()
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            raise ValueError(f"a worker of Ray failed: {cause}") from error
        finally:
            if started:
                ray.shutdown()

    return engine
