"""What training several networks at once on one GPU saves: milliseconds a round, in which each makes one step.

    python benchmarks/together.py --data cifar10:0-4

Every line is a number of networks of one kind, trained side by side at batch 16; beside it stands the time of as many
single ones, one after another. On a machine without a GPU there is nothing to measure.
"""

from __future__ import annotations

import argparse
import functools
import time

import torch

from stochbn.paper.schedule import Schedule
from stochbn.paper.trainee import Trainee
from stochbn.sources import architectures, named
from stochbn.sources.named import Images

STEPS = 400


def milliseconds(name: str, images: Images, count: int, precision: str, **arguments: float) -> float:
    """The time of a round of `count` networks."""
    device = torch.device("cuda")
    shape = architectures.arguments_for(images)
    build = functools.partial(architectures.build_with_uniform_scale, name, **shape, **arguments)
    trainees = [
        Trainee(build, Schedule(epochs=1, seed=seed, augment=True, precision=precision), None, None, images, device)
        for seed in range(count)
    ]
    for trainee in trainees:
        trainee.begin(0)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for i in range(STEPS):
        for trainee in trainees:
            trainee.step(i)
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started) / STEPS


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10:0-4", help="training images, as for stochbn train")
    source = parser.parse_args().data
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here")
    images = named.load(source, "train").shuffled(0).take(torch.arange(16 * STEPS))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {source}, batch 16")
    print("| network | precision | networks | ms a round | one after another |")
    print("| --- | --- | ---: | ---: | ---: |")
    for name, arguments, counts in (
        ("vgg11", {}, (4, 7)),
        ("vgg11", {"width": 0.5}, (4, 13)),
        ("resnet18", {}, (4,)),
        ("resnet18", {"width": 0.25}, (4,)),
    ):
        for precision in ("32-true", "bf16-mixed"):
            single = milliseconds(name, images, 1, precision, **arguments)
            for count in counts:
                found = milliseconds(name, images, count, precision, **arguments)
                title = ", ".join([name, *(f"{key} {value}" for key, value in arguments.items())])
                print(f"| {title} | {precision} | {count} | {found:.2f} | {count * single:.2f} |", flush=True)


if __name__ == "__main__":
    main()
