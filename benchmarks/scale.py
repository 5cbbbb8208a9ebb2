"""Efficiency from 1 to 2 processes with one thread each: `stochbn fit` and `evaluate` under torchrun, `predict` by Ray.

The work is that of ResNet-18 of this project, quarter width, with random weights, on random images. Each command is run
with 1 and with 2 processes in turn. Its start is measured alike, with a tenth of the objects, and taken off, since it
does not grow with the data. Efficiency is the time of 1 over twice the time of 2, the median over rounds. Leave the
machine alone meanwhile. Run it as ``python benchmarks/scale.py``; it needs the extra ``ray``.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file

import stochbn
from stochbn.files import write_bytes, write_json
from stochbn.paper import networks
from stochbn.paper.tables import Table

MODULE = """
from stochbn.paper import networks

def network():
    return networks.build("resnet18", width=0.25, classes=5)

def preprocess(given):
    return given.reshape(3, 32, 32)
"""
OWN = ["--model", "scaled:network", "--weights", "w.safetensors"]


def prepare(objects: int) -> None:
    """The network, its posterior, and two sets of data, the second of a tenth of the objects."""
    Path("scaled.py").write_text(MODULE)
    torch.manual_seed(0)
    model = networks.build("resnet18", width=0.25, classes=5).eval()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, "w.safetensors")
    stochbn.fit(model, [torch.randn(64, 3, 32, 32)], 16, deterministic=()).save("w.sbn.safetensors")
    for name, count in (("large", objects), ("small", objects // 10)):
        pixels = torch.randn(count, 3 * 32 * 32)
        column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(pixels.flatten().numpy()), 3 * 32 * 32)
        table = pyarrow.table({"x": column, "label": (torch.arange(count) % 5).numpy()})
        Path(name).mkdir()
        pyarrow.parquet.write_table(table, f"{name}/0.parquet", row_group_size=250)


def command(task: str, data: str, processes: int) -> list[str]:
    """A command line of one thread a process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = [*torchrun, "-m", "stochbn"] if task != "ray" else [sys.executable, "-m", "stochbn"]
    source = ["--data", data, "--input", "x"]
    if task == "fit":
        return [*start, "fit", *OWN, *source, "--out", "fitted"]
    if task == "predict":  # evaluate shares predictions among ranks
        return [*start, "evaluate", *OWN, *source, "--draws", "8"]
    options = ["--tolerance", "0", "--draws", "8", "--part", "250", "--engine", "ray", "--workers", str(processes)]
    return [*start, "predict", *OWN, *source, "--out", "p.parquet", *options]


def seconds(task: str, data: str, processes: int) -> float:
    """The time of a command."""
    started = time.perf_counter()
    subprocess.run(command(task, data, processes), check=True, capture_output=True)
    return time.perf_counter() - started


def efficiency(task: str, rounds: int) -> dict[str, Any]:
    """The time of 1 process over twice that of 2, in each round."""
    ratios, whole = [], []
    for _ in range(rounds):
        times = {(data, n): seconds(task, data, n) for data in ("small", "large") for n in (1, 2)}
        one, two = (times["large", n] - times["small", n] for n in (1, 2))
        ratios.append(one / (2 * two))
        whole.append(times["large", 1] / (2 * times["large", 2]))
    return {"efficiency": statistics.median(ratios), "rounds": ratios, "with_start": statistics.median(whole)}


def main() -> None:
    """Measure, and write scale.json and scale.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    out = given.out.absolute()
    os.environ |= {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare(given.objects)
        found = {task: efficiency(task, given.rounds) for task in ("fit", "predict", "ray")}
        os.chdir(out)
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__}
    about = {"objects": given.objects, "rounds": given.rounds, **machine}
    write_json(out / "scale.json", {**about, "efficiency": found})
    rows = [
        [
            task,
            f"{one['efficiency']:.2f}",
            f"{min(one['rounds']):.2f} to {max(one['rounds']):.2f}",
            f"{one['with_start']:.2f}",
        ]
        for task, one in found.items()
    ]
    title = f"Efficiency from 1 to 2 processes of one thread, {given.objects} objects, median of {given.rounds} rounds"
    table = Table(title, ["task", "without start", "rounds", "with start"], rows)
    write_bytes(out / "scale.md", f"{table.markdown()}\n".encode())


if __name__ == "__main__":
    main()
