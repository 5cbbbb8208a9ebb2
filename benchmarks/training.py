"""Training throughput: the experiments' own loop against a plain DataLoader loop with per-image transforms.

Both train the same network from the same images in memory with Adam in mini-batches of 16, in turns, each in a process
of its own; the numbers are medians. Run it as ``python benchmarks/training.py`` on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import platform
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stochbn.files import write_bytes, write_json
from stochbn.paper.schedule import Schedule
from stochbn.paper.training import train
from stochbn.report.tables import Table
from stochbn.sources import architectures
from stochbn.sources.named import Images

BATCH = 16
CASES: dict[str, tuple[str, dict[str, float], tuple[int, int], bool, int]] = {
    "LeNet-5, 28x28 grey": ("lenet5", {}, (1, 28), False, 150),
    "VGG-11 (width 0.5), 32x32 colour": ("vgg11", {"width": 0.5}, (3, 32), True, 60),
    "ResNet-18 (width 0.25), 32x32 colour": ("resnet18", {"width": 0.25}, (3, 32), True, 60),
}
"""Network, its arguments, channels and size of the images, whether they are augmented, and steps in a repetition."""


class PerImage(Dataset[tuple[Tensor, int]]):
    """Pictures with the usual transforms, one picture at a time: pad, crop, flip, to a tensor."""

    def __init__(self, pixels: Tensor, labels: Tensor, augment: bool) -> None:
        arrays = pixels.permute(0, 2, 3, 1).squeeze(-1).numpy()
        self.pictures = [Image.fromarray(array) for array in arrays]
        self.labels = labels.tolist()
        self.augment = augment

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = self.pictures[index]
        if self.augment:
            width, height = picture.size
            padded = Image.fromarray(np.pad(np.asarray(picture), ((4, 4), (4, 4), (0, 0)), mode="reflect"))
            left, top = random.randrange(9), random.randrange(9)
            picture = padded.crop((left, top, left + width, top + height))
            if random.random() < 0.5:
                picture = ImageOps.mirror(picture)
        array = np.array(picture)
        tensor = torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
        return tensor.float() / 255, self.labels[index]


def textbook(network: nn.Module) -> nn.Module:
    """The network as it is usually written: ReLU before max-pooling, where ours pools first, for the same result."""
    layers = list(network.children())
    for i in range(1, len(layers)):
        if isinstance(layers[i - 1], nn.MaxPool2d) and isinstance(layers[i], nn.ReLU):
            layers[i - 1], layers[i] = layers[i], layers[i - 1]
    return nn.Sequential(*layers)


def plain_loop(model: nn.Module, data: PerImage) -> float:
    """Images per second of the textbook loop, after its first 20 steps."""
    optimizer = torch.optim.Adam(model.parameters())
    model.train()
    started, seen = 0.0, 0
    for step, (inputs, labels) in enumerate(DataLoader(data, BATCH, shuffle=True, drop_last=True)):
        if step == 20:
            started, seen = time.perf_counter(), 0
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seen += len(labels)
    return seen / (time.perf_counter() - started)


def our_loop(name: str, arguments: dict[str, float], images: Images, augment: bool, compile: bool) -> float:
    """Images per second of `stochbn.paper.training.train`, in its second epoch."""
    times: list[tuple[int, float]] = []
    schedule = Schedule(2, BATCH, augment=augment, compile=compile)
    train(
        lambda: architectures.build(name, classes=10, **arguments),
        images,
        schedule,
        report=lambda step, steps, loss: times.append((step, time.perf_counter())),
    )
    start, end = next(entry for entry in times if entry[0] * 2 >= times[-1][0]), times[-1]
    return (end[0] - start[0]) * BATCH / (end[1] - start[1])


def rate(loop: str, case: str) -> float:
    """Images per second of one loop, ``plain``, ``ours`` or ``compiled``, on random images."""
    name, arguments, (channels, size), augment, steps = CASES[case]
    torch.manual_seed(0)
    pixels = torch.randint(256, (steps * BATCH, channels, size, size), dtype=torch.uint8)
    labels = torch.randint(10, (steps * BATCH,))
    if loop == "plain":
        network = textbook(architectures.NETWORKS[name](classes=10, **arguments))
        return plain_loop(network, PerImage(pixels, labels, augment))
    images = Images(pixels, labels, tuple(map(str, range(10))), "random")
    return our_loop(name, arguments, images, augment, compile=loop == "compiled")


def main() -> None:
    """Measure, print, and write benchmarks/training.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="of every measurement (default: 5)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for training.json and .md")
    options = parser.parse_args()
    loops = "plain", "ours", "compiled"
    found: dict[str, dict[str, list[float]]] = {case: {loop: [] for loop in loops} for case in CASES}
    rounds = [(case, loop) for _ in range(options.repetitions) for case in CASES for loop in loops]
    with ExitStack() as stack:
        # A process for each loop, one working at a time: ours sets how its process keeps memory.
        pool = functools.partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"))
        processes = {loop: stack.enter_context(pool()) for loop in loops}
        for case, loop in track(rounds, description="measuring"):
            found[case][loop].append(processes[loop].submit(rate, loop, case).result())
    rows = []
    for case, rates in found.items():
        plain, ours, compiled = (statistics.median(rates[key]) for key in ("plain", "ours", "compiled"))
        ratios = [f"{ours / plain:.2f}", f"{compiled / plain:.2f}"]
        rows.append([case, f"{plain:.0f}", f"{ours:.0f}", f"{compiled:.0f}", *ratios])
    columns = ["network", "DataLoader loop, img/s", "stochbn, img/s", "compiled, img/s", "ratio", "ratio, compiled"]
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    table = Table(f"Training in mini-batches of {BATCH}, {machine}, median of {options.repetitions}", columns, rows)
    print(table.markdown())
    write_bytes(options.out / "training.md", table.markdown().encode() + b"\n")
    write_json(options.out / "training.json", {"machine": machine, "images_per_second": found})


if __name__ == "__main__":
    main()
