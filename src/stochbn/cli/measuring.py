"""The commands that measure a network: bench and diagnose."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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


@about_networks(several=True)
def bench(
    given: Given,
    batch: Annotated[list[int], typer.Option(min=1, help="Objects in a batch; give it again for more sizes.")] = [100],  # noqa: B006
    data: Data = None,
    reference: Annotated[int, typer.Option(min=2, help="Independent draws whose mean counts as the truth.")] = 4096,
    repetitions: Annotated[int, typer.Option(min=3, help="Of every timing; medians are reported.")] = 9,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for cost.json, cost.md and cost.png.")] = None,
    seed: Seed = 0,
) -> None:
    """Measure what uncertainty costs with a network: time and memory, in forward passes of the plain network.

    Each network is measured at each batch size, with a joint posterior that is fitted for it. Leave the machine alone
    meanwhile. Networks that 'stochbn paper train' wrote are also compared with dropout, an ensemble and MC-BN.
    """
    if folder is not None:
        check_folder(folder, "cost.json", "cost.md", "cost.png", "cost.svg")
    if given.networks:
        _bench_trained(given.networks, batch, data, reference, repetitions, folder, seed)
    else:
        _bench_own(Subject.one(given), batch, data, reference, repetitions, folder, seed)


def _bench_own(
    subject: Subject,
    batch: Sequence[int],
    data: str | None,
    reference: int,
    repetitions: int,
    folder: Path | None,
    seed: int,
) -> None:
    """Measure a user's own network."""
    from stochbn.files import write_json
    from stochbn.paper import own_cost

    if subject.settings.get("task", "classification") not in ("classification", "binary", "multilabel"):
        raise ValueError("bench measures how accurate probabilities are: it takes --task classification, binary or "
                         "multilabel")  # fmt: skip
    objects = subject.load(data, "train").shuffled(seed)
    if len(objects) < max(16, *batch):
        raise ValueError(f"{objects.name} has {len(objects)} objects, fewer than a batch of {max(16, *batch)}")
    measured = []
    with status("measuring") as line:
        for size in batch:

            def tell(what: str, size: int = size) -> None:
                line.update(Text(readable(f"batch {size}: {what}")))

            (x, _), *_ = objects.first(size).batches(size)
            measured.append(
                own_cost.measure(
                    subject.model, objects.first(own_cost.FITTED), x, name=subject.name, settings=subject.settings,
                    reference=reference, repetitions=repetitions, seed=seed, progress=tell,
                )
            )  # fmt: skip
    table = own_cost.tabulate(measured)
    show([table])
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "cost.json", {"measured": measured})
        write_bytes(folder / "cost.md", f"{table.markdown()}\n".encode())
        say(f"Everything is in {folder}: cost.json and cost.md.", folder)


def _bench_trained(
    networks: Sequence[Path],
    batch: Sequence[int],
    data: str | None,
    reference: int,
    repetitions: int,
    folder: Path | None,
    seed: int,
) -> None:
    """Measure networks of the experiments."""
    from stochbn.paper import checkpoints, cost

    for network in networks:
        checkpoint = checkpoints.load(network)
        images = load_images(data or checkpoint.data, "test")
        check_images(checkpoint, images)
        cost.check_batch(images, max(batch))
    found = []
    with status("measuring") as line:
        for network, size in itertools.product(networks, batch):

            def tell(what: str, name: str = network.name, size: int = size) -> None:
                line.update(Text(readable(f"{name}, batch {size}: {what}")))

            one = cost.measure(
                network,
                size,
                source=data,
                reference=reference,
                repetitions=repetitions,
                seed=seed,
                progress=tell,
            )
            found.append(one)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                cost.write(found, folder)
    show(cost.tables(found))
    if folder is not None:
        say(f"Everything is in {folder}: cost.json, cost.md and cost.png.", folder)


@about_networks()
def diagnose(
    given: Given,
    data: Data = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Objects in a mini-batch.")] = 16,
    images: Annotated[int, typer.Option("--images", min=1, help="Training objects to use, at most.")] = 16384,
    rescaled: Annotated[
        list[int] | None,
        typer.Option(
            "--rescaled", help="Also compare rescaling to mini-batches of this size with what is observed there."
        ),
    ] = None,
    seed: Seed = 0,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for diagnosis.md and its figure.", show_default=False)
    ] = None,
) -> None:
    """Say how well the paper's factorised distribution fits a network's batch-norm statistics, and what to use.

    It fits if each statistic is Normal or LogNormal, and if those of one mini-batch are independent of each other.
    """
    from stochbn.paper import figures, goodness, tables

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
    shown = [tables.diagnosis(title, diagnosis)]
    for size, other in others.items():
        ratios = goodness.rescaling(observed, batch_size, other, size)
        shown.append(tables.rescaling(f"Mini-batches of {size}: observed over rescaled from {batch_size}", ratios))
    show(shown)
    advice = [f"- {sentence}" for sentence in diagnosis.advice]
    say("\n".join(advice))
    if folder is not None:
        text = "\n\n".join([*(table.markdown() for table in shown), "\n".join(advice)])
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "diagnosis.md", f"{text}\n".encode())
        figures.save_diagnosis(folder / "diagnosis", diagnosis, title=title)
        say(f"Tables and figure are in {folder}.", folder)
    say(f"Next: {command('fit', given, kind=diagnosis.kind, data=data, batch_size=batch_size)}")
