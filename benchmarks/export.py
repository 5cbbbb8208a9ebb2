"""Size and latency of exported networks in units of the plain exported network: onnxruntime, one thread.

LeNet-5, VGG-11 and ResNet-18 of this project with random weights, each exported alone and with 4 and 16 draws. Latency
is the median over repetitions of interleaved calls. Run it as ``python benchmarks/export.py``; it takes a minute or
two.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch

import stochbn
from stochbn.export.program import quiet
from stochbn.files import write_bytes, write_json
from stochbn.report.tables import Table
from stochbn.sources import architectures

NETWORKS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "LeNet-5": ("lenet5", {}, (1, 28, 28)),
    "VGG-11, half width": ("vgg11", {"width": 0.5, "classes": 5}, (3, 32, 32)),
    "ResNet-18, quarter width": ("resnet18", {"width": 0.25, "classes": 5}, (3, 32, 32)),
}
"""For each network its name, its arguments, and the shape of an example."""

DRAWS = (4, 16)
BATCHES = (1, 32)


def measure(name: str, repetitions: int) -> dict[str, Any]:
    """Bytes of the plain file, and for each number of draws its size and its latency at each batch size, in units."""
    network, arguments, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = architectures.build(network, **arguments)
    data = [torch.randn(32, *shape) for _ in range(8)]
    with torch.no_grad():
        for images in data:
            model(images)
    posterior = stochbn.fit(model.eval(), data, 16)
    with tempfile.TemporaryDirectory() as folder:
        paths = {draws: Path(folder, f"{draws}.onnx") for draws in (0, *DRAWS)}
        with quiet():
            shapes = ({0: torch.export.Dim("batch")},)
            torch.onnx.export(
                model, (data[0],), paths[0], dynamic_shapes=shapes, external_data=False, dynamo=True, verbose=False
            )
        for draws in DRAWS:
            stochbn.export.onnx(model, posterior, paths[draws], data[0], draws)
        sizes = {draws: path.stat().st_size for draws, path in paths.items()}
        sessions = {draws: session(path) for draws, path in paths.items()}
    found: dict[str, Any] = {"bytes": sizes[0], "size": {d: sizes[d] / sizes[0] for d in DRAWS}, "latency": {}}
    for batch in BATCHES:
        x = torch.randn(batch, *shape).numpy()
        units: dict[int, list[float]] = {draws: [] for draws in DRAWS}
        for _ in range(repetitions):
            unit = min(seconds(sessions[0], x) for _ in range(5))
            for draws in DRAWS:
                units[draws].append(min(seconds(sessions[draws], x) for _ in range(2)) / unit)
        found["latency"][batch] = {draws: statistics.median(each) for draws, each in units.items()}
    return found


def session(path: Path) -> onnxruntime.InferenceSession:
    """A file, ready to run on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def seconds(network: onnxruntime.InferenceSession, x: Any) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    network.run(None, {network.get_inputs()[0].name: x})
    return time.perf_counter() - start


def main() -> None:
    """Measure, print, and write benchmarks/export.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7, help="repetitions of every call (default: 7)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for export.json and .md")
    options = parser.parse_args()
    found = {name: measure(name, options.repetitions) for name in NETWORKS}
    machine = f"{platform.processor() or platform.machine()}, one of {os.cpu_count()} cores, not alone on the machine"
    machine = f"{machine}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    title = f"Size and latency with S draws, in units of the plain exported network; {machine}"
    columns = ["network", "plain, KiB"]
    columns += [f"size, S={draws}" for draws in DRAWS]
    columns += [f"latency, S={draws}, batch {batch}" for draws in DRAWS for batch in BATCHES]
    rows = [
        [
            name,
            f"{one['bytes'] / 1024:.1f}",
            *(f"{one['size'][draws]:.2f}" for draws in DRAWS),
            *(f"{one['latency'][batch][draws]:.1f}" for draws in DRAWS for batch in BATCHES),
        ]
        for name, one in found.items()
    ]
    table = Table(title, columns, rows)
    print(table.markdown())
    write_bytes(options.out / "export.md", table.markdown().encode() + b"\n")
    write_json(options.out / "export.json", {"machine": machine, "networks": found})


if __name__ == "__main__":
    main()
