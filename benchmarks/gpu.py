"""What predictions cost on a GPU, in plain passes of the same network there, and whether they are those of the CPU.

Networks have random weights, fitted statistics and random images. Everything is timed in one process, interleaved, with
the GPU waited for, and medians count. "Beside the CPU" is the largest difference between the mean probabilities of 50
draws on the GPU, in float32 without TF32, and those of the same draws on the CPU; "four threads" the largest one
between calls from four threads at once and the same calls one after another. Run it as ``python benchmarks/gpu.py``.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from plain import plain_passes, settle
from torch import Tensor

import stochbn
from stochbn.files import write_bytes, write_json
from stochbn.measuring.timing import median_seconds, seconds
from stochbn.report.tables import Table
from stochbn.sources.architectures import build

CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], int]] = {
    "LeNet-5, 100": ("lenet5", {}, (1, 28, 28), 100),
    "LeNet-5, 1000": ("lenet5", {}, (1, 28, 28), 1000),
    "VGG-11, 100": ("vgg11", {"classes": 5}, (3, 32, 32), 100),
    "VGG-11, 1000": ("vgg11", {"classes": 5}, (3, 32, 32), 1000),
    "ResNet-18, 100": ("resnet18", {"classes": 5}, (3, 32, 32), 100),
    "ResNet-18, 1000": ("resnet18", {"classes": 5}, (3, 32, 32), 1000),
}
"""For each case the network of full width, its arguments, the shape of an example and the number of examples."""
REPETITIONS = 9


def measure(case: str, device: torch.device) -> dict[str, float]:
    """A case's figures: costs in units, the unit in ms, and differences of probabilities."""
    torch.manual_seed(0)
    name, arguments, shape, batch = CASES[case]
    model = build(name, **arguments)
    data = [torch.randn(64, *shape) for _ in range(16)]
    settle(model, data)
    posterior = stochbn.fit(model, data, 16)
    x = torch.randn(batch, *shape)
    few = x[:100]
    on_cpu = stochbn.Predictive(model, posterior, tolerance=0)(few, generator=seeded(0)).probs
    model, x, few = model.to(device), x.to(device), few.to(device)
    small = [piece.to(device) for images in data for piece in images.split(16)]
    predictive, every = stochbn.Predictive(model, posterior), stochbn.Predictive(model, posterior, tolerance=0)

    plain = plain_passes(model, x)
    calls: dict[str, Callable[[], object]] = {
        "plain": plain,
        "a call": lambda: predictive(x),
        "50 draws": lambda: every(x),
        "fit": lambda: stochbn.fit(model, small, 16),
        "plain small": plain_passes(model, *small),
    }
    plain()
    first = seconds(waited(lambda: predictive(x), device))
    beside = (every(few, generator=seeded(0)).probs.cpu() - on_cpu).abs().max().item()
    took = median_seconds({name: waited(call, device) for name, call in calls.items()}, REPETITIONS)
    unit = took["plain"]
    return {
        "unit, ms": 1e3 * unit, "a call": took["a call"] / unit, "50 draws": took["50 draws"] / unit,
        "fit": took["fit"] / took["plain small"], "first call": first / unit,
        "beside the CPU": beside, "four threads": threads(predictive, x),
    }  # fmt: skip


def threads(predictive: stochbn.Predictive, x: Tensor) -> float:
    """How far calls from four threads at once are from the same calls one after another."""
    alone = [predictive(x, generator=seeded(number)).probs for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda number: predictive(x, generator=seeded(number)).probs, range(8)))
    return max((a - b).abs().max().item() for a, b in zip(alone, together, strict=True))


def seeded(number: int) -> torch.Generator:
    """A generator with a seed."""
    return torch.Generator().manual_seed(number)


def waited(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """A call that ends when what it began on the device is done."""

    def made() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return made


def main() -> None:
    """Measure, and write gpu.json and gpu.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: this one)")
    given = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        parser.error("this machine has no GPU that PyTorch can use")
    torch.backends.cudnn.allow_tf32 = False
    found = {}
    for case in given.cases:
        found[case] = measure(case, device)
        print(case, found[case], flush=True)
    machine = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "system": platform.platform()}
    write_json(given.out / "gpu.json", {**machine, "cases": found})
    columns = list(next(iter(found.values())))
    body = [
        [case, *(f"{v:.1e}" if name in ("beside the CPU", "four threads") else f"{v:.2f}" for name, v in row.items())]
        for case, row in found.items()
    ]
    table = Table(f"Predictions on a GPU, in plain passes there; {machine['gpu']}", ["network", *columns], body)
    write_bytes(given.out / "gpu.md", f"{table.markdown()}\n".encode())


if __name__ == "__main__":
    main()
