"""The commands that measure a network: bench and diagnose."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from stochbn.cli.console import follow, progress_bars, readable, say, show, status
from stochbn.cli.following import command
from stochbn.cli.inputs import check_images, load_images
from stochbn.cli.options import Data, Seed
from stochbn.cli.subject import Given, Subject, about_networks
from stochbn.files import check_folder, write_bytes

__all__ = ["bench", "diagnose"]


@dataclass(frozen=True)
class _Measurement:
    """The options of `bench`: what to measure, and where to write the results."""

    batch: Sequence[int]
    data: str | None
    reference: int
    repetitions: int
    folder: Path | None
    seed: int


@about_networks(several=True)
def bench(
    given: Given,
    batch: Annotated[list[int], typer.Option(min=1, help="Examples in a batch; repeat it for more sizes.")] = [100],  # noqa: B006
    data: Data = None,
    reference: Annotated[
        int, typer.Option(min=2, help="Number of independent draws whose mean is taken as the truth.")
    ] = 4096,
    repetitions: Annotated[int, typer.Option(min=3, help="Repetitions of every timing; medians are reported.")] = 9,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for cost.json, cost.md and cost.png.")] = None,
    seed: Seed = 0,
) -> None:
    """Measure the time and memory of predictions with draws, in forward passes of the plain network.

    Each network is measured at each batch size, with a joint posterior that is fitted for it. Do not use the machine
    meanwhile. Networks of 'stochbn paper train' are also compared with dropout, an ensemble and MC-BN.
    """
    if folder is not None:
        check_folder(folder, "cost.json", "cost.md", "cost.png", "cost.svg")
    asked = _Measurement(batch, data, reference, repetitions, folder, seed)
    if given.networks:
        _bench_trained(given.networks, asked)
    else:
        _bench_own(Subject.one(given), asked)


def _bench_own(subject: Subject, asked: _Measurement) -> None:
    """Measure a user's own network."""
    from stochbn.measuring import cost
    from stochbn.report.tables import write_tables

    if "probs" not in subject.task.outputs:
        raise ValueError("bench measures the accuracy of probabilities: it needs a task with classes or labels")
    objects = subject.load(asked.data, "train").shuffled(asked.seed)
    largest = max(16, *asked.batch)
    if len(objects) < largest:
        raise ValueError(f"{objects.name} has {len(objects)} examples, fewer than a batch of {largest}")
    measured = []
    with status("measuring") as line:
        for size in asked.batch:

            def tell(what: str, size: int = size) -> None:
                line.update(Text(readable(f"batch {size}: {what}")))

            (x, _), *_ = objects.first(size).batches(size)
            measured.append(
                cost.measure(
                    subject.model, objects.first(cost.FITTED), x, name=subject.name, settings=subject.settings,
                    reference=asked.reference, repetitions=asked.repetitions, seed=asked.seed, progress=tell,
                )
            )  # fmt: skip
    table = cost.tabulate(measured)
    show([table])
    if asked.folder is not None:
        asked.folder.mkdir(parents=True, exist_ok=True)
        write_tables(asked.folder / "cost", {"measured": measured}, [table])
        say(f"Saved cost.json and cost.md in {asked.folder}.", asked.folder)


def _bench_trained(networks: Sequence[Path], asked: _Measurement) -> None:
    """Measure networks of the experiments."""
    from stochbn.measuring import cost
    from stochbn.sources import checkpoints

    for network in networks:
        checkpoint = checkpoints.load(network)
        images = load_images(asked.data or checkpoint.data, "test")
        check_images(checkpoint, images)
        cost.check_batch(images, max(asked.batch))
    found = []
    with status("measuring") as line:
        for network, size in itertools.product(networks, asked.batch):

            def tell(what: str, name: str = network.name, size: int = size) -> None:
                line.update(Text(readable(f"{name}, batch {size}: {what}")))

            one = cost.measure_trained(
                network,
                size,
                source=asked.data,
                reference=asked.reference,
                repetitions=asked.repetitions,
                seed=asked.seed,
                progress=tell,
            )
            found.append(one)
            if asked.folder is not None:
                asked.folder.mkdir(parents=True, exist_ok=True)
                cost.write(found, asked.folder)
    show(cost.tables(found))
    if asked.folder is not None:
        say(f"Saved cost.json, cost.md and cost.png in {asked.folder}.", asked.folder)


@about_networks()
def diagnose(
    given: Given,
    data: Data = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Examples in a mini-batch.")] = 16,
    images: Annotated[int, typer.Option("--images", min=1, help="Largest number of training examples to use.")] = 16384,
    rescaled: Annotated[
        list[int] | None,
        typer.Option(
            "--rescaled",
            help="Also compare rescaling to mini-batches of this size with statistics observed at this size.",
        ),
    ] = None,
    seed: Seed = 0,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for diagnosis.md and its figure.", show_default=False)
    ] = None,
) -> None:
    """Test how well the paper's factorised distribution fits a network's batch-norm statistics; recommend a kind.

    It fits if each statistic is Normal or LogNormal, and if those of a mini-batch are independent of each other.
    """
    from stochbn.measuring import drawing, goodness

    if folder is not None:
        check_folder(folder, "diagnosis.md", "diagnosis.png", "diagnosis.svg")
    subject = Subject.one(given)
    found = subject.load(data, "train")
    for size in rescaled or []:
        if not 2 <= size <= min(images, len(found)):
            raise ValueError(f"--rescaled {size} must be at least 2 and at most the number of training images used")
    found = found.shuffled(seed).first(images)
    with progress_bars() as bars:
        observed = goodness.observe(subject.model, found, batch_size, seed, follow(bars, "observing"))
        others = {
            size: goodness.observe(subject.model, found, size, seed, follow(bars, f"observing, {size}"))
            for size in rescaled or []
        }
    diagnosis = goodness.diagnose(observed)
    title = f"{subject.name}: statistics of mini-batches of {batch_size} of {data or subject.data}"
    shown = [drawing.diagnosis(title, diagnosis)]
    for size, other in others.items():
        ratios = goodness.rescaling(observed, batch_size, other, size)
        shown.append(drawing.rescaling(f"Mini-batches of {size}: observed over rescaled from {batch_size}", ratios))
    show(shown)
    advice = [f"- {sentence}" for sentence in diagnosis.advice]
    say("\n".join(advice))
    if folder is not None:
        text = "\n\n".join([*(table.markdown() for table in shown), "\n".join(advice)])
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "diagnosis.md", f"{text}\n".encode())
        drawing.save_diagnosis(folder / "diagnosis", diagnosis, title=title)
        say(f"Tables and figure are in {folder}.", folder)
    say(f"Next: {command('fit', given, kind=diagnosis.kind, data=data, batch_size=batch_size)}")
