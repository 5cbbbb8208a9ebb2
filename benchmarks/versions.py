"""Two versions of stochbn side by side: what calls, fits and first calls cost, in plain passes, interleaved.

Each version runs in processes of its own, which take turns: ``python benchmarks/versions.py OLD/src NEW/src``, where
each is the ``src`` folder of a checkout. Networks have random weights and random images, so the figures compare the two
versions and are no measure of what predictions cost on trained networks. With ``--trained FILE``, a network that both
versions can read (such as those of ``results/trained``), the case is that network with its own data, or local
copies of it in the folder that ``STOCHBN_DATA`` names, in batches of 100 and 1,000.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from plain import plain_passes, settle
from torch import Tensor, nn

CASES: dict[str, tuple[str, dict[str, object], tuple[int, ...], int]] = {
    "LeNet-5, 100": ("lenet5", {}, (1, 28, 28), 100),
    "LeNet-5, 1000": ("lenet5", {}, (1, 28, 28), 1000),
    "VGG-11, 100": ("vgg11", {"width": 0.5, "classes": 5, "bias": False}, (3, 32, 32), 100),
    "ResNet-18, 32": ("resnet18", {"width": 0.25, "classes": 5}, (3, 32, 32), 32),
    "tabular 30-256-256-4, 32": ("", {}, (30,), 32),
    "1,000 sizes of pictures": ("resnet18", {"width": 0.25, "classes": 5}, (3, 32, 32), 1),
}  # fmt: skip
"""For each case the network, its arguments, the shape of an example and the number of examples.

Where a version does not know an argument, the network is what the argument asks for: convolutions had no biases once.
"""


def measure(case: str, threads: int) -> dict[str, float]:
    """One process's figures, in units of a plain pass."""
    try:
        from stochbn.sources.architectures import NETWORKS, build
    except ImportError:  # older versions
        from stochbn.paper.networks import NETWORKS, build

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    name, wanted, shape, batch = CASES[case]
    known = inspect.signature(NETWORKS[name]).parameters if name else {}
    arguments = {argument: value for argument, value in wanted.items() if argument in known}
    model: nn.Module = (
        build(name, **arguments).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        if name
        else nn.Sequential(
            nn.Linear(30, 256), nn.BatchNorm1d(256), nn.ReLU(),
            nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 4),
        )
    )  # fmt: skip
    data = [torch.randn(64, *shape) for _ in range(8)]
    x = torch.randn(batch, *shape)
    settle(model, data)
    return _measured(model, data, x) if batch > 1 else _of_sizes(model, data)


def _of_sizes(model: nn.Module, data: Sequence[Tensor]) -> dict[str, float]:
    """What the first call for each of 1,000 sizes of pictures costs, all in all: no size comes twice."""
    import stochbn

    predictive = stochbn.Predictive(model, stochbn.fit(model, data, 16))
    pictures = [torch.randn(1, 3, height, width) for height in range(24, 64) for width in range(24, 49)]
    order = torch.randperm(len(pictures)).tolist()
    calls = plain = 0.0
    for at in order:
        with torch.no_grad():
            plain += _median(lambda at=at: model(pictures[at]))  # type: ignore[misc]
        calls += _seconds(lambda at=at: predictive(pictures[at]))  # type: ignore[misc]
    return {"a call": calls / plain}


def measure_trained(file: Path, batch: int, threads: int) -> dict[str, float]:
    """The same of a trained network with test images that it was made for."""
    from stochbn.sources import checkpoints, named

    torch.set_num_threads(threads)
    checkpoint = checkpoints.load(file)
    model = checkpoint.model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    train, test = (named.load(checkpoint.data, split).shuffled(0) for split in ("train", "test"))
    batches = [inputs.contiguous() for inputs, _ in train.take(torch.arange(4096)).batches(512)]
    return _measured(model, batches, next(test.batches(batch))[0].contiguous())


def _measured(model: nn.Module, data: Sequence[Tensor], x: Tensor) -> dict[str, float]:
    """Figures of predictions of a batch, with a posterior that is fitted to data."""
    import stochbn

    posterior = stochbn.fit(model, data, 16)
    small = [piece for images in data for piece in images.split(16)]
    plain, plain_small = plain_passes(model, x), plain_passes(model, *small)
    for _ in range(3):
        plain()
    predictive = stochbn.Predictive(model, posterior)
    exact = stochbn.Predictive(model, posterior, tolerance=0)
    first = _seconds(lambda: predictive(x))
    exact(x)
    took: dict[str, list[float]] = {"a call": [], "50 draws of all": [], "fit": []}
    for _ in range(5):
        unit = _median(plain)
        took["a call"].append(_median(lambda: predictive(x)) / unit)
        took["50 draws of all"].append(_median(lambda: exact(x)) / unit)
        took["fit"].append(_median(lambda: stochbn.fit(model, small, 16)) / _median(plain_small))
    return {"first call": first / unit, **{name: statistics.median(values) for name, values in took.items()}}


def _median(call: Callable[[], object]) -> float:
    """Of several calls in a row: the first one finds the processor's caches full of something else."""
    return statistics.median(_seconds(call) for _ in range(5))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print; one process measures one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, help="src folders of the old and the new version")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each version and case (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which (default: all)")
    parser.add_argument("--trained", type=Path, help="a network's file, in place of the cases")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        if options.trained:
            print(json.dumps(measure_trained(options.trained, int(options.case), options.threads)))
        else:
            print(json.dumps(measure(options.case, options.threads)))
        return
    if len(options.sources) != 2:
        parser.error("name two src folders, of the old and of the new version")
    print("| case | figure | old | new | new / old |\n| --- | --- | ---: | ---: | ---: |")
    trained = [] if options.trained is None else ["--trained", str(options.trained)]
    for case in ("100", "1000") if trained else options.cases:
        found: list[dict[str, list[float]]] = [{}, {}]
        for _ in range(options.rounds):
            for source, figures in zip(options.sources, found, strict=True):
                command = [sys.executable, __file__, "--case", case, "--threads", str(options.threads), *trained]
                environment = os.environ | {"PYTHONPATH": str(source.resolve()), "PYTHONWARNINGS": "ignore"}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                for name, value in json.loads(done.stdout).items():
                    figures.setdefault(name, []).append(value)
        for name in found[0]:
            old, new = (statistics.median(figures[name]) for figures in found)
            print(f"| {case} | {name} | {old:.1f} | {new:.1f} | {new / old:.2f} |", flush=True)


if __name__ == "__main__":
    main()
