"""Efficiency from 1 to 2 processes with one thread each: `stochbn fit` and `evaluate` under torchrun, `predict` by Ray.

The work is that of ResNet-18 of this project, quarter width, with random weights, on random images. It is timed within
the commands, from the first example that a process reads until the result is written: their start, which does not grow
with the data, does not count. In each round every command runs with 1 process and with 2; those of torchrun also as two
commands of 1 process side by side that share nothing, each with half of the examples: what the machine itself gives.
Efficiency is the time of 1 over twice that of 2, the median over rounds. Leave the machine alone meanwhile; where that
cannot be, the processor time with 1 process over that with 2, of all that the commands start, tells what sharing the
work costs. Run it as ``python benchmarks/scale.py``, which takes a quarter of an hour on 2 cores; it needs the extra
``ray``, and psutil.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file

import stochbn
from stochbn.files import write_bytes, write_json
from stochbn.report.tables import Table
from stochbn.sources import architectures

MODULE = """
import os
import time
from pathlib import Path

from stochbn.paper import networks

begun = []


def network():
    return architectures.build("resnet18", width=0.25, classes=5)


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
        apart: that of two commands of 1 process side by side, half of the examples each: the mean of both; None for
            Ray, whose work is that of `evaluate`.
        one_cpu: processor time of the work with 1 process, of its command and all that this started.
        two_cpu: the same with 2 processes.
        one_whole: the command of 1 process, with its start.
        two_whole: that of 2 processes.
        others: processors that other work used meanwhile, on average, the most of the three.
    """

    one: float
    two: float
    apart: float | None
    one_cpu: float
    two_cpu: float
    one_whole: float
    two_whole: float
    others: float

    @property
    def efficiency(self) -> float:
        """The time of 1 process over twice that of 2."""
        return self.one / (2 * self.two)

    @property
    def ideal(self) -> float | None:
        """The same of commands that share nothing but the machine."""
        return None if self.apart is None else self.one / (2 * self.apart)


def prepare(objects: dict[str, int]) -> None:
    """The network, its posterior, and for each task all of its examples and half of them."""
    Path("scaled.py").write_text(MODULE)
    torch.manual_seed(0)
    model = architectures.build("resnet18", width=0.25, classes=5).eval()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, "w.safetensors")
    stochbn.fit(model, [torch.randn(64, 3, 32, 32)], 16, deterministic=()).save("w.sbn.safetensors")
    for task, number in objects.items():
        for name, size in ((task, number), *([(f"{task}-half", number // 2)] if task != "ray" else [])):
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
    options = [
        "--tolerance",
        "0",
        "--draws",
        "8",
        "--batch",
        "125",
        "--part",
        "125",
        "--engine",
        "ray",
        "--workers",
        str(processes),
    ]
    return [*start, "predict", *given, *options]


class Run:
    """A command that runs in a folder of its own.

    Args:
        task: what it does.
        data: the folder of its examples.
        processes: how many it starts.
    """

    def __init__(self, task: str, data: str, processes: int) -> None:
        self.folder = Path(f"run{next(RUNS)}")
        self.begun, self.result = self.folder / "begun", self.folder / RESULTS[task]
        self.begun.mkdir(parents=True)
        line = command(task, data, processes, str(self.folder))
        environment = {**os.environ, "SCALE_BEGUN": str(self.begun.absolute())}
        with (self.folder / "log").open("w") as log:
            self.process = psutil.Popen(line, env=environment, stdout=log, stderr=log)
        self.cpu: dict[int, float] = {}
        self.at_first: dict[int, float] = {}
        self.at_own: dict[int, float] = {}

    def watch(self) -> bool:
        """Note the processor time of all its processes; whether it still runs."""
        if not self.result.exists():
            with suppress(psutil.Error):
                for one in (self.process, *self.process.children(recursive=True)):
                    with suppress(psutil.Error):
                        self.cpu[one.pid] = one.cpu_times().user + one.cpu_times().system
            stamps = self._stamps()
            if stamps and not self.at_first:
                self.at_first = dict(self.cpu)
            for pid in (int(path.name) for path in stamps):
                self.at_own.setdefault(pid, self.cpu.get(pid, 0.0))
        return self.process.poll() is None

    def work(self) -> tuple[float, float]:
        """Seconds from the first example to the result, and processor time.

        Raises:
            RuntimeError: it failed.
        """
        if self.process.returncode or not self.at_own:
            raise RuntimeError(f"the command failed:\n{(self.folder / 'log').read_text()}")
        first = min(float(path.read_text()) for path in self._stamps())
        before = {**self.at_first, **self.at_own}
        return self.result.stat().st_mtime - first, sum(self.cpu.values()) - sum(before.values())

    def _stamps(self) -> list[Path]:
        """When its workers began; with Ray, the command itself looks at an example before."""
        return [path for path in self.begun.iterdir() if path.name != str(self.process.pid) and path.stat().st_size]


@dataclass(frozen=True)
class Times:
    """Of a command, the mean of those side by side: its work, processor time, the whole, and others' processors."""

    work: float
    cpu: float
    whole: float
    others: float


def timed(task: str, data: str, processes: int, copies: int = 1) -> Times:
    """A command, or `copies` of it side by side."""
    started, busy = time.time(), _busy()
    runs = [Run(task, data, processes) for _ in range(copies)]
    while sum(run.watch() for run in runs):
        time.sleep(0.5)  # to look more often would cost a tenth of a processor
    whole = time.time() - started
    others = (_busy() - busy - sum(sum(run.cpu.values()) for run in runs)) / whole
    work, cpu = (statistics.mean(values) for values in zip(*(run.work() for run in runs), strict=True))
    what = f"{task}, processes: {processes}" + (f", commands: {copies}" if copies > 1 else "")
    print(f"{what}: {work:.1f} s of {whole:.1f}, processor {cpu:.1f} s, others' processors {others:.2f}", flush=True)
    return Times(work, cpu, whole, others)


def measured(task: str) -> Round:
    """One round of a task."""
    one, two = timed(task, task, 1), timed(task, task, 2)
    apart = None if task == "ray" else timed(task, f"{task}-half", 1, copies=2)
    others = max(times.others for times in (one, two, apart) if times is not None)
    half = None if apart is None else apart.work
    return Round(one.work, two.work, half, one.cpu, two.cpu, one.whole, two.whole, others)


def _busy() -> float:
    """Seconds that the machine's processors have worked."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0)


def row(task: str, objects: int, rounds: list[Round]) -> list[str]:
    """A task in the table."""
    found = [one.efficiency for one in rounds]
    ideal = [one.ideal for one in rounds if one.ideal is not None]
    beside = [one.efficiency / one.ideal for one in rounds if one.ideal is not None]
    cpu = statistics.median(one.one_cpu / one.two_cpu for one in rounds)
    whole = statistics.median(one.one_whole / (2 * one.two_whole) for one in rounds)
    numbers = [f"{statistics.median(found):.2f}", f"{min(found):.2f} to {max(found):.2f}"]
    work = f"{statistics.median(one.one for one in rounds):.0f}"
    return [
        task,
        f"{objects}",
        work,
        *numbers,
        *(_median(ideal), _median(beside)),
        f"{cpu:.2f}",
        f"{whole:.2f}",
        f"{max(one.others for one in rounds):.2f}",
    ]


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.2f}" if values else "-"


def save(out: Path, objects: dict[str, int], found: dict[str, list[Round]]) -> None:
    """Write scale.json and scale.md."""
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__}
    seconds_of = {task: [asdict(one) for one in rounds] for task, rounds in found.items()}
    write_json(out / "scale.json", {"objects": objects, **machine, "seconds": seconds_of})
    rows = [row(task, objects[task], rounds) for task, rounds in found.items() if rounds]
    columns = ["task", "objects", "work of 1, s", "efficiency", "rounds", "side by side", "beside it"]
    columns += ["by processor time", "whole command", "others' processors"]
    title = f"Efficiency from 1 to 2 processes of one thread, {os.cpu_count()} cores, torch {torch.__version__}"
    write_bytes(out / "scale.md", f"{Table(title, columns, rows).markdown()}\n".encode())


def main() -> None:
    """Measure, and write scale.json and scale.md after each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=int, default=40000, help="objects to fit to")
    parser.add_argument("--predict", type=int, default=12000, help="objects to evaluate and to score")
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
