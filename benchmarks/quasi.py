"""What quasi-random draws gain: the variance of a mean over independent draws, over that of as many quasi-random ones.

LeNet-5 on the digits that ship with scikit-learn; the means are those of test images' probabilities. For every kind of
posterior the gain is given with its standard deviation over networks, beside the careful value that predictions count
on. Run it as ``python benchmarks/quasi.py``; it takes minutes.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.func import functional_call

from stochbn.evaluation.fitting import fit_posterior
from stochbn.files import write_bytes, write_json
from stochbn.paper.schedule import Schedule
from stochbn.paper.training import train
from stochbn.posteriors import KINDS, Posterior
from stochbn.report.tables import Table
from stochbn.sources import architectures
from stochbn.sources.named import Images, as_input, load


def network(images: Images, epochs: int, seed: int) -> nn.Module:
    """A LeNet-5, trained on images."""
    channels, size, _ = images.shape
    build = functools.partial(architectures.build, "lenet5", classes=len(images.classes), channels=channels, size=size)
    return train(build, images, Schedule(epochs=epochs, seed=seed))


def variance(
    model: nn.Module, posterior: Posterior, x: Tensor, draws: int, repetitions: int, seed: int, *, quasi: bool
) -> float:
    """The variance of mean probabilities over `draws` draws, averaged over examples and classes of `x`."""
    generator = torch.Generator().manual_seed(seed)
    means = []
    with torch.no_grad():
        for _ in range(repetitions):
            made = posterior.iter_draws(draws, generator, quasi=quasi)
            means.append(torch.stack([functional_call(model, draw, (x,)).softmax(1) for draw in made]).mean(0))
    return torch.stack(means).double().var(0).mean().item()


def main() -> None:
    """Measure, print, and write benchmarks/quasi.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=3, help="how many networks (default: 3)")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of training (default: 8)")
    parser.add_argument("--draws", type=int, default=8, help="draws in a mean (default: 8)")
    parser.add_argument("--repetitions", type=int, default=100, help="means of each sort (default: 100)")
    parser.add_argument("--images", type=int, default=100, help="test images (default: 100)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for quasi.json and .md")
    options = parser.parse_args()
    images = load("digits", "train")
    x = as_input(load("digits", "test").pixels[: options.images])
    gains: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for seed in track(range(options.networks), "networks"):
        model = network(images, options.epochs, seed)
        for kind in KINDS:
            posterior = fit_posterior(model, images, 16, seed, kind=kind)
            independent, quasi = (
                variance(model, posterior, x, options.draws, options.repetitions, seed, quasi=sort)
                for sort in (False, True)
            )
            gains[kind].append(independent / quasi)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    about = f"means over {options.draws}, LeNet-5 on digits, {options.networks} networks"
    title = f"Gain of quasi-random draws: {about}; {machine}"
    rows = [
        [kind, f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f}", f"{KINDS[kind].quasi_gain:g}"]
        for kind, found in gains.items()
    ]
    table = Table(title, ["kind", "measured", "counted on"], rows)
    print(table.markdown())
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    write_bytes(options.out / "quasi.md", table.markdown().encode() + b"\n")
    write_json(options.out / "quasi.json", {"machine": machine, "settings": settings, "gains": gains})


if __name__ == "__main__":
    main()
