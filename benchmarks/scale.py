"""Efficiency from 1 to 2 processes with one thread each: `stochbn fit` and `evaluate` under torchrun, `predict` by Ray.

The work is that of ResNet-18 of this project, quarter width, with random weights, on random images. It is timed within
the commands, from the first object that a process reads until the result is written: their start, which does not grow
with the data, does not count. In each round every command runs with 1 process, with 2, and as two commands of 1 process
side by side that share nothing, each with half of the objects: what the machine itself gives a second process.
Efficiency is the time of 1 over twice that of 2, the median over rounds. Leave the machine alone meanwhile. Run it as
``python benchmarks/scale.py``, which takes some five minutes on 2 cores; it needs the extra ``ray``.
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
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file

import stochbn
from stochbn.files import write_bytes, write_json
from stochbn.paper import networks
from stochbn.paper.tables import Table

MODULE = """
import os
import time
from pathlib import Path

from stochbn.paper import networks

begun = []


def network():
    return networks.build("resnet18", width=0.25, classes=5)


def preprocess(given):
    if not begun:
        begun.append(time.time())
        Path(os.environ["SCALE_BEGUN"], str(os.getpid())).write_text(str(begun[0]))
    return given.reshape(3, 32, 32)
"""
OWN = ["--model", "scaled:network", "--weights", "w.safetensors", "--input", "x"]
RESULTS = {"fit": "fitted", "evaluate": "results.json", "ray": "p.parquet"}
"""The tasks, and the file that each ends with."""
RUNS = count()


@dataclass(frozen=True)
class Round:
    """Seconds that a task takes.

    Attributes:
        one: the work of 1 process.
        two: that of 2 processes.
        apart: that of two commands of 1 process side by side, half of the objects each; the mean of both.
        one_whole: the command of 1 process, with its start.
        two_whole: that of 2 processes.
        load: of the machine before, by others: the average over a minute.
    """

    one: float
    two: float
    apart: float
    one_whole: float
    two_whole: float
    load: float

    @property
    def efficiency(self) -> float:
        """The time of 1 process over twice that of 2."""
        return self.one / (2 * self.two)

    @property
    def ideal(self) -> float:
        """The same of commands that share nothing but the machine."""
        return self.one / (2 * self.apart)


def prepare(objects: dict[str, int]) -> None:
    """The network, its posterior, and for each task all of its objects and half of them."""
    Path("scaled.py").write_text(MODULE)
    torch.manual_seed(0)
    model = networks.build("resnet18", width=0.25, classes=5).eval()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, "w.safetensors")
    stochbn.fit(model, [torch.randn(64, 3, 32, 32)], 16, deterministic=()).save("w.sbn.safetensors")
    for task, number in objects.items():
        for name, size in ((task, number), (f"{task}-half", number // 2)):
            pixels = torch.randn(size, 3 * 32 * 32)
            column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(pixels.flatten().numpy()), 3 * 32 * 32)
            table = pyarrow.table({"x": column, "label": (torch.arange(size) % 5).numpy()})
            Path(name).mkdir()
            pyarrow.parquet.write_table(table, f"{name}/0.parquet", row_group_size=250)


def command(task: str, data: str, processes: int, folder: str) -> list[str]:
    """A command line of one thread a process, whose result goes to a folder."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = [*torchrun, "-m", "stochbn"] if task != "ray" else [sys.executable, "-m", "stochbn"]
    given = [*OWN, "--data", data, "--out", folder if task == "evaluate" else f"{folder}/{RESULTS[task]}"]
    if task == "fit":
        return [*start, "fit", *given]
    if task == "evaluate":
        return [*start, "evaluate", *given, "--draws", "8"]
    options = ["--tolerance", "0", "--draws", "8", "--part", "250", "--engine", "ray", "--workers", str(processes)]
    return [*start, "predict", *given, *options]


def seconds(task: str, data: str, processes: int, copies: int = 1) -> tuple[float, float]:
    """The work of a command, the mean of `copies` that run side by side, and the time until the last has ended."""
    started, running = time.time(), []
    for _ in range(copies):
        folder = Path(f"run{next(RUNS)}")
        begun = folder / "begun"
        begun.mkdir(parents=True)
        line = command(task, data, processes, str(folder))
        environment = {**os.environ, "SCALE_BEGUN": str(begun.absolute())}
        with (folder / "log").open("w") as log:
            running.append((folder, subprocess.Popen(line, env=environment, stdout=log, stderr=log)))
    for folder, process in running:
        if process.wait():
            raise RuntimeError(f"{task} with {processes} processes failed:\n{(folder / 'log').read_text()}")
    whole = time.time() - started
    times = []
    for folder, process in running:
        stamps = [path for path in (folder / "begun").iterdir() if path.name != str(process.pid)]
        first = min(float(path.read_text()) for path in stamps)
        times.append((folder / RESULTS[task]).stat().st_mtime - first)
    what = f"{task}, processes: {processes}" + (f", commands: {copies}" if copies > 1 else "")
    print(f"{what}: {statistics.mean(times):.1f} s of {whole:.1f}", flush=True)
    return statistics.mean(times), whole


def measured(task: str) -> Round:
    """One round of a task."""
    load = os.getloadavg()[0]
    one, one_whole = seconds(task, task, 1)
    two, two_whole = seconds(task, task, 2)
    apart, _ = seconds(task, f"{task}-half", 1, copies=2)
    return Round(one, two, apart, one_whole, two_whole, load)


def row(task: str, objects: int, rounds: list[Round]) -> list[str]:
    """A task in the table."""
    found = [one.efficiency for one in rounds]
    ideal = statistics.median(one.ideal for one in rounds)
    beside = statistics.median(one.efficiency / one.ideal for one in rounds)
    whole = statistics.median(one.one_whole / (2 * one.two_whole) for one in rounds)
    numbers = [f"{statistics.median(found):.2f}", f"{min(found):.2f} to {max(found):.2f}"]
    work = f"{statistics.median(one.one for one in rounds):.0f}"
    return [task, f"{objects}", work, *numbers, f"{ideal:.2f}", f"{beside:.2f}", f"{whole:.2f}"]


def save(out: Path, objects: dict[str, int], found: dict[str, list[Round]]) -> None:
    """Write scale.json and scale.md."""
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__}
    seconds_of = {task: [asdict(one) for one in rounds] for task, rounds in found.items()}
    write_json(out / "scale.json", {"objects": objects, **machine, "seconds": seconds_of})
    rows = [row(task, objects[task], rounds) for task, rounds in found.items() if rounds]
    columns = ["task", "objects", "work of 1, s", "efficiency", "rounds", "side by side", "beside it", "whole command"]
    title = f"Efficiency from 1 to 2 processes of one thread, {os.cpu_count()} cores, torch {torch.__version__}"
    write_bytes(out / "scale.md", f"{Table(title, columns, rows).markdown()}\n".encode())


def main() -> None:
    """Measure, and write scale.json and scale.md after each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=int, default=10000, help="objects to fit to")
    parser.add_argument("--predict", type=int, default=1500, help="objects to evaluate and to score")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", choices=RESULTS, default=list(RESULTS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    out = given.out.absolute()
    objects = {task: given.fit if task == "fit" else given.predict for task in given.tasks}
    found: dict[str, list[Round]] = {task: [] for task in given.tasks}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": f"{folder}/cache"}
        os.chdir(folder)
        prepare(objects)
        for _ in range(given.rounds):
            for task in given.tasks:
                found[task].append(measured(task))
            save(out, objects, found)
        os.chdir(out)
    print((out / "scale.md").read_text())


if __name__ == "__main__":
    main()
