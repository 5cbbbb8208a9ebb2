"""What a posterior of a large network costs: memory to fit, time of a draw, size of the file.

The statistics are random, of as many channels and layers as ResNet-50 has in its batch norms. Run it as
``python benchmarks/posteriors.py``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import torch

from stochbn.files import write_bytes, write_json
from stochbn.posteriors import Empirical, Factorized, Joint, Posterior
from stochbn.posteriors.moments import Moments
from stochbn.report.tables import Table

CHANNELS = 26_560
LAYERS = 53
CASES: dict[str, tuple[str, int | None]] = {
    "factorized": ("factorized", None),
    "empirical": ("empirical", None),
    "joint": ("joint", None),
    "joint, 128 directions": ("joint", 128),
    "joint, 32 directions": ("joint", 32),
}


def measure(kind: str, directions: int | None, mini_batches: int) -> dict[str, float]:
    """Megabytes that making it adds to the peak of memory, seconds, milliseconds of a draw, megabytes of the file."""
    torch.manual_seed(0)
    sizes = {f"layer{i}": CHANNELS // LAYERS + (i < CHANNELS % LAYERS) for i in range(LAYERS)}
    shared = torch.randn(mini_batches, 8) @ torch.randn(8, 2 * CHANNELS)
    rows = 0.1 * (shared + torch.randn(mini_batches, 2 * CHANNELS)).view(mini_batches, 2, CHANNELS)
    rows[:, 1].exp_()
    del shared
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    posterior: Posterior
    if kind == "factorized":
        parts = torch.split(rows, list(sizes.values()), dim=2)
        moments = {name: Moments.of(part) for name, part in zip(sizes, parts, strict=True)}
        posterior = Factorized.from_moments(moments, batch_size=16, mini_batches=mini_batches)
    elif kind == "empirical":
        posterior = Empirical.from_statistics(rows, layers=sizes, batch_size=16, mini_batches=mini_batches)
    else:
        posterior = Joint.from_statistics(rows, directions, layers=sizes, batch_size=16, mini_batches=mini_batches)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    times = [time.perf_counter() for _ in posterior.iter_draws(21)]
    draw = statistics.median(later - earlier for earlier, later in pairwise(times))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "posterior.safetensors"
        posterior.save(file)
        size = file.stat().st_size
    return {"memory": peak / 1024, "seconds": seconds, "draw": 1000 * draw, "file": size / 1e6}


def main() -> None:
    """Measure, print, and write benchmarks/posteriors.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mini-batches", type=int, default=512, help="observed (default: 512)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for posteriors.json and .md")
    options = parser.parse_args()
    found = {}
    for name, (kind, directions) in CASES.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # a peak of its own
            found[name] = pool.submit(measure, kind, directions, options.mini_batches).result()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    title = f"{CHANNELS} channels, {options.mini_batches} mini-batches; {machine}"
    columns = ["kind", "making it, MB more", "s", "a draw, ms", "file, MB"]
    rows = [
        [name, f"{v['memory']:.0f}", f"{v['seconds']:.1f}", f"{v['draw']:.1f}", f"{v['file']:.1f}"]
        for name, v in found.items()
    ]
    table = Table(title, columns, rows)
    print(table.markdown())
    write_bytes(options.out / "posteriors.md", table.markdown().encode() + b"\n")
    write_json(options.out / "posteriors.json", {"machine": machine, "found": found})


if __name__ == "__main__":
    main()
