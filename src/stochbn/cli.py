"""The command line: train, fit, evaluate, predict and the demonstration."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from stochbn.files import check_file, write_bytes

if TYPE_CHECKING:  # the experiments are imported by the commands that use them
    from stochbn.paper.checkpoints import Checkpoint
    from stochbn.paper.data import Images
    from stochbn.paper.recipes import Recipe
    from stochbn.posteriors import Posterior

__all__ = ["main"]

app = typer.Typer(
    help="Calibrated uncertainty for trained, batch-normalised networks: Stochastic Batch Normalization (SBN).\n\n"
    "Start with 'stochbn demo'. Or step by step: train a network, fit a posterior over its batch-norm statistics, "
    "evaluate both on data of known and unknown classes, predict.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

DATA_HELP = (
    "digits, mnist, notmnist, a data set on the Hugging Face Hub, or a local folder; "
    "NAME:0-4 selects classes. The folder in the environment variable STOCHBN_DATA is searched first."
)
NetworkFile = Annotated[
    Path, typer.Argument(metavar="NETWORK", help="A network that 'stochbn train' saved.", show_default=False)
]
NetworkFiles = Annotated[
    list[Path],
    typer.Argument(
        metavar="NETWORK",
        help="Networks that 'stochbn train' saved; several are a Deep Ensemble.",
        show_default=False,
    ),
]
DataFromNetwork = Annotated[
    str | None,
    typer.Option("--data", help=f"{DATA_HELP} \\[default: what the network was trained on]", show_default=False),
]
Draws = Annotated[int, typer.Option(min=1, help="Draws of the statistics (or dropout passes) to average.")]
Seed = Annotated[int, typer.Option(min=0, help="Where all randomness comes from.")]
Jobs = Annotated[int, typer.Option(min=0, help="Networks to train side by side; 0 is one for each core.")]
Override = functools.partial(typer.Option, show_default=False)
PosteriorFile = Annotated[
    Path | None,
    typer.Option(
        "--posterior",
        help="A posterior that 'stochbn fit' saved. \\[default: NETWORK.sbn.safetensors]",
        show_default=False,
    ),
]


def main() -> None:
    """Run the command line; what a user can mend is told in one line and ends with exit code 1."""
    from stochbn.paper import ExperimentError

    try:
        app()
    except (ExperimentError, OSError, ValueError) as error:
        err.print(f"[bold red]Error:[/] {escape(' '.join(str(error).split()))}", soft_wrap=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code == 130:
            err.print("Stopped.")
        raise


@app.command()
def demo(
    data: Annotated[str, typer.Option(help="digits (ships with scikit-learn) or mnist (against notmnist).")] = "digits",
    folder: Annotated[
        Path | None, typer.Option("--out", help="Run folder. \\[default: demo-DATA]", show_default=False)
    ] = None,
    jobs: Jobs = 0,
) -> None:
    """Train, fit and compare SBN, Deep Ensembles and Dropout, on known and unknown classes.

    Tables, entropy figure, networks and posteriors go to a folder. A run that was stopped continues where it was.
    """
    from stochbn.paper.recipes import DEMOS

    if data not in DEMOS:
        raise ValueError(f"the demonstration runs on {' or '.join(DEMOS)}, not on {data!r}")
    _run(DEMOS[data], folder or Path(f"demo-{data}"), jobs)
    if data == "digits":
        as_module = Path(sys.argv[0]).name == "__main__.py"
        program = [sys.executable, "-m", "stochbn"] if as_module else sys.argv[:1]
        out.print(
            f"\nNext, on real data (some minutes):\n\n    {escape(shlex.join(program))} demo --data mnist\n",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def reproduce(
    network: Annotated[str, typer.Argument(metavar="NETWORK", help="lenet5, vgg11, resnet18, ...", show_default=False)],
    preset: Annotated[
        str,
        typer.Option(help="paper (the published protocol), reduced (an hour or so on two cores) or smoke (a minute)."),
    ] = "reduced",
    folder: Annotated[
        Path | None, typer.Option("--out", help="Run folder. \\[default: runs/NETWORK-PRESET]", show_default=False)
    ] = None,
    jobs: Jobs = 0,
    data: Annotated[str | None, Override("--data", help=f"Known classes: {DATA_HELP}")] = None,
    unknown: Annotated[str | None, Override("--unknown", help="Unknown classes, or 'none'.")] = None,
    epochs: Annotated[int | None, Override("--epochs", help="Passes over the training data.")] = None,
    members: Annotated[int | None, Override("--members", help="Networks in the Deep Ensemble.")] = None,
    batch_size: Annotated[int | None, Override("--batch-size", help="Objects in a training mini-batch.")] = None,
    learning_rate: Annotated[float | None, Override("--learning-rate", help="Adam's, decaying to 0.")] = None,
    decay: Annotated[str | None, Override("--decay", help="Lower the learning rate each epoch or each step.")] = None,
    decrease_from: Annotated[
        int | None, Override("--decrease-from", help="Keep the learning rate for so many epochs first.")
    ] = None,
    uniform_scale: Annotated[
        bool | None, Override("--uniform-scale/--unit-scale", help="Start batch norm's scale from U(0, 1) or from 1.")
    ] = None,
    statistics_batch: Annotated[
        int | None, Override("--statistics-batch", help="Objects in a mini-batch whose statistics are observed.")
    ] = None,
    draws: Annotated[int | None, Override("--draws", help="Draws, or dropout passes, of each network.")] = None,
    seed: Annotated[int | None, Override("--seed", help="Where all randomness comes from.")] = None,
    width: Annotated[float | None, Override("--width", help="Factor on the network's channels.")] = None,
    dropout: Annotated[
        float | None, Override("--dropout", help="Dropout rate after ReLUs; 0: no such network.")
    ] = None,
    classifier_dropout: Annotated[
        float | None, Override("--classifier-dropout", help="Dropout rate before the classifier (vgg11).")
    ] = None,
    bias: Annotated[bool | None, Override("--bias/--no-bias", help="Biases in convolutions (vgg).")] = None,
    augment: Annotated[bool | None, Override("--augment/--no-augment", help="Random crops and flips.")] = None,
    drawn: Annotated[str | None, Override("--drawn", help="Batch norms to draw: all or convolutions'.")] = None,
    augment_fit: Annotated[
        bool | None, Override("--augment-fit/--no-augment-fit", help="Fit posteriors on random crops and flips.")
    ] = None,
    precision: Annotated[str | None, Override("--precision", help="Of training: 32-true or bf16-mixed.")] = None,
    compile: Annotated[bool | None, Override("--compile/--no-compile", help="Compile training steps.")] = None,
    processes: Annotated[int | None, Override("--processes", help="Processes that train one network together.")] = None,
    held_out: Annotated[
        float | None, Override("--held-out", help="Keep this part of the training data out of training, for choices.")
    ] = None,
    evaluate_on: Annotated[str | None, Override("--evaluate-on", help="test, or held-out to choose a setting.")] = None,
    train_images: Annotated[int | None, Override("--train-images", help="Use this many training images.")] = None,
    test_images: Annotated[
        int | None, Override("--test-images", help="Use this many test images of each kind.")
    ] = None,
    keep_draws: Annotated[
        bool | None,
        Override(
            "--keep-draws/--no-keep-draws",
            help="Keep the log-probabilities of every draw. \\[default: up to 256 MiB for a network]",
        ),
    ] = None,
) -> None:
    """Repeat one of the paper's experiments: SBN, Deep Ensembles and Dropout on known and unknown classes.

    A preset can be changed field by field. A run that was stopped continues where it was.
    """
    from dataclasses import replace

    from stochbn.paper.recipes import PRESETS

    if network not in PRESETS:
        raise ValueError(f"there is no experiment with {network!r}; there are {', '.join(PRESETS)}")
    if preset not in PRESETS[network]:
        raise ValueError(f"{network} has no preset {preset!r}; there are {', '.join(PRESETS[network])}")
    recipe = PRESETS[network][preset]
    changes: dict[str, Any] = {
        "data": data, "epochs": epochs, "members": members, "batch_size": batch_size, "learning_rate": learning_rate,
        "statistics_batch": statistics_batch, "draws": draws, "seed": seed, "augment": augment, "precision": precision,
        "compile": compile, "processes": processes, "held_out": held_out, "evaluate_on": evaluate_on,
        "train_images": train_images, "test_images": test_images, "decay": decay, "decrease_from": decrease_from,
        "uniform_scale": uniform_scale, "augment_fit": augment_fit, "drawn": drawn,
    }  # fmt: skip
    changes = {name: value for name, value in changes.items() if value is not None}
    if unknown is not None:
        changes["unknown"] = None if unknown == "none" else unknown
    arguments = {name: value for name, value in (("width", width), ("bias", bias)) if value is not None}
    changes["arguments"] = {**recipe.arguments, **arguments}
    rates = {"dropout": dropout, "classifier_dropout": classifier_dropout}
    rates = {**(recipe.dropout or {}), **{name: rate for name, rate in rates.items() if rate is not None}}
    if dropout == 0 and classifier_dropout is None:
        rates = {}
    changes["dropout"] = rates if any(rates.values()) else None
    _run(replace(recipe, **changes), folder or Path("runs") / f"{network}-{preset}", jobs, keep_draws)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Finished run folders.", show_default=False)],
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the tables of several runs. \\[default: seeds]", show_default=False),
    ] = None,
) -> None:
    """Make a run's tables and figures again, from its stored predictions alone.

    Several runs that differ in their seeds give one table, of means and standard deviations.
    """
    from stochbn.paper.report import write_run, write_seeds

    if len(folders) == 1:
        if folder is not None:
            raise ValueError("the tables of one run go into its own folder; --out is for several runs")
        shown = write_run(folders[0])
    else:
        folder = folder or Path("seeds")
        shown = write_seeds(folders, folder)
    for table in shown:
        out.print(table.rich())


def _run(recipe: Recipe, folder: Path, jobs: int, keep_draws: bool | None = None) -> None:
    """Run a recipe with progress bars, and show what came out."""
    from stochbn.paper import report, runner

    dropout = " and one with dropout" if recipe.dropout else ""
    out.print(
        f"{recipe.network} on {recipe.data}, unknown classes: {recipe.unknown or 'none'}; {recipe.members} plain "
        f"networks{dropout}, {recipe.epochs} epochs, {recipe.draws} draws."
    )
    stages = {
        "load": "loading",
        "train": "training",
        "fit": "fitting SBN",
        "observe": "observing",
        "predict": "predicting",
    }
    with _bars() as bars:
        tasks: dict[tuple[str, str], Any] = {}

        def advance(name: str, stage: str, done: int, total: int) -> None:
            key = name, stage
            if key not in tasks:
                unit = "steps" if stage == "train" else "img"
                tasks[key] = bars.add_task(escape(f"{name}: {stages[stage]}"), total=total, unit=unit)
            bars.update(tasks[key], completed=done)

        side_by_side = 1 if recipe.processes > 1 else _side_by_side(len(recipe.all_members()))
        runner.run(recipe, folder, jobs=jobs or side_by_side, keep_draws=keep_draws, progress=advance)
    for table in report.write_run(folder):
        out.print(table.rich())
    out.print(
        "Lower NLL is better; unknown objects should have more entropy than known ones. "
        f"Everything is in [bold]{escape(str(folder))}[/]: results.json, results.md, entropy-cdf.png, and a folder for "
        "each network with its posterior."
    )


@app.command()
def compare(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A finished run made with --held-out.", show_default=False)
    ],
    members: Annotated[int, typer.Option(min=1, help="How many of its plain networks; each is a seed.")] = 3,
    draws: Draws = 50,
    fit_images: Annotated[int, typer.Option(min=2, help="Training images to fit posteriors to, at most.")] = 8192,
    held_out: Annotated[int, typer.Option(min=1, help="Held-out images to calibrate on, at most.")] = 2000,
    unknown: Annotated[int, typer.Option(min=1, help="Images of unknown classes to predict, at most.")] = 2000,
    exact: Annotated[int, typer.Option(min=10, help="Test images for exact inference.")] = 1000,
    jobs: Jobs = 0,
) -> None:
    """Compare kinds of posteriors with each other, exact inference and ensembles, on the networks of a run.

    Each kind is used as fitted, and with its noise calibrated on the images that the run held out. A comparison that
    was stopped continues where it was.
    """
    from stochbn.paper.comparison import Settings
    from stochbn.paper.comparison import compare as compare_run

    settings = Settings(members, draws, fit_images, held_out, unknown, exact)
    with _bars() as bars:
        task = bars.add_task("predicting", total=None, unit="predictions")
        follow = lambda done, total: bars.update(task, completed=done, total=total)  # noqa: E731
        shown = compare_run(folder, settings, jobs=jobs or _side_by_side(3 * members), progress=follow)
    for table in shown:
        out.print(table.rich())
    out.print(f"Everything is in [bold]{escape(str(folder))}[/]: comparison.json, comparison.md and comparison.png.")


@app.command()
def bench(
    networks: Annotated[
        list[Path], typer.Argument(metavar="NETWORK...", help="Networks that 'train' wrote.", show_default=False)
    ],
    batch: Annotated[list[int], typer.Option(min=1, help="Objects in a batch; give it again for more sizes.")] = [100],  # noqa: B006
    data: DataFromNetwork = None,
    reference: Annotated[int, typer.Option(min=2, help="Independent draws whose mean counts as the truth.")] = 4096,
    repetitions: Annotated[int, typer.Option(min=3, help="Of every timing; medians are reported.")] = 9,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for cost.json, cost.md and cost.png.")] = None,
    seed: Seed = 0,
) -> None:
    """Measure what uncertainty costs with a network: time and memory, in forward passes of the plain network.

    Each network is measured at each batch size, with a joint posterior that is fitted for it. Leave the machine alone
    meanwhile.
    """
    from stochbn.paper import checkpoints, cost

    for network in networks:
        checkpoint = checkpoints.load(network)
        images = _load(data or checkpoint.data, "test")
        _check_images(checkpoint, images)
        cost.check_batch(images, max(batch))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        check_file(folder / "cost.json")
    found = []
    with out.status("measuring") as status:
        for network, size in itertools.product(networks, batch):
            say = lambda what, name=network.name, size=size: status.update(f"{name}, batch {size}: {what}")  # noqa: E731
            one = cost.measure(
                network,
                size,
                source=data,
                reference=reference,
                repetitions=repetitions,
                seed=seed,
                progress=say,
            )
            found.append(one)
            if folder is not None:
                cost.write(found, folder)
    for table in cost.tables(found):
        out.print(table.rich())
    if folder is not None:
        out.print(f"Everything is in [bold]{escape(str(folder))}[/]: cost.json, cost.md and cost.png.")


@app.command()
def train(
    path: Annotated[Path, typer.Option("--out", help="File for the network (safetensors).")],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    network: Annotated[str, typer.Option(help="Name of the network.")] = "lenet5",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data.")] = 5,
    batch_size: Annotated[int, typer.Option(min=2, help="Objects in a mini-batch.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Adam's, decaying linearly to 0.")] = 1e-3,
    decay: Annotated[str, typer.Option(help="Lower the learning rate each epoch or each step.")] = "step",
    decrease_from: Annotated[int, typer.Option(help="Keep the learning rate for so many epochs first.")] = 0,
    uniform_scale: Annotated[
        bool, typer.Option("--uniform-scale/--unit-scale", help="Start batch norm's scale from U(0, 1) or from 1.")
    ] = False,
    width: Annotated[float | None, Override("--width", help="Factor on the network's channels.")] = None,
    dropout: Annotated[float, typer.Option(min=0, max=0.99, help="Dropout rate; above 0 for MC Dropout.")] = 0.0,
    classifier_dropout: Annotated[
        float, typer.Option(min=0, max=0.99, help="Dropout rate before the classifier (vgg).")
    ] = 0.0,
    bias: Annotated[bool | None, Override("--bias/--no-bias", help="Biases in convolutions (vgg).")] = None,
    augment: Annotated[bool, typer.Option("--augment/--no-augment", help="Random crops and flips, for CIFAR.")] = False,
    precision: Annotated[str, typer.Option(help="Of training: 32-true or bf16-mixed.")] = "32-true",
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile training steps.")] = False,
    seed: Seed = 0,
) -> None:
    """Train a network on images as in the paper: Adam, batch size 16, learning rate decaying to 0.

    Loss and accuracy of every epoch are written beside it, as NETWORK.training.csv.
    """
    from stochbn.paper import checkpoints, networks, training

    check_file(path)
    images = _load(data, "train")
    given = {"width": width, "dropout": dropout or None, "classifier_dropout": classifier_dropout or None, "bias": bias}
    arguments = networks.arguments_for(images) | {name: value for name, value in given.items() if value is not None}
    build = networks.build_with_uniform_scale if uniform_scale else networks.build
    schedule = training.Schedule(
        epochs,
        batch_size,
        learning_rate,
        seed,
        augment=augment,
        precision=precision,
        compile=compile,
        decay=decay,
        decrease_from=decrease_from,
    )
    with _bars() as bars:
        task = bars.add_task("training", total=None, unit="img")
        model = training.train(
            functools.partial(build, network, **arguments),
            images,
            schedule,
            log=path.with_name(f"{path.name.removesuffix('.safetensors')}.training.csv"),
            report=lambda step, steps, loss: bars.update(
                task, completed=step * batch_size, total=steps * batch_size, description=f"training, loss {loss:.4f}"
            ),
        )
    checkpoints.save(path, checkpoints.Checkpoint(model, network, arguments, data, images.classes))
    stale = _default_posterior(path)
    if stale.exists():
        stale.unlink()
        out.print(f"Deleted {escape(str(stale))}: it was fitted to the network that this one replaces.", soft_wrap=True)
    name = escape(str(path))
    command = escape(f"stochbn fit {shlex.quote(str(path))}")
    out.print(f"Saved the network as [bold]{name}[/]. Next: {command}", highlight=False, soft_wrap=True)


@app.command()
def fit(
    network: NetworkFile,
    data: DataFromNetwork = None,
    batch_size: Annotated[
        int, typer.Option(min=2, help="Objects in a mini-batch whose statistics are observed: fewer, more noise.")
    ] = 16,
    kind: Annotated[
        str, typer.Option(help="joint (of all layers), empirical (replay), or factorized (the paper's SBN).")
    ] = "joint",
    path: Annotated[
        Path | None, typer.Option("--out", help="File for it. \\[default: NETWORK.sbn.safetensors]", show_default=False)
    ] = None,
    seed: Seed = 0,
) -> None:
    """Fit SBN's distribution over a network's batch-norm statistics to its training data."""
    from stochbn.paper import checkpoints
    from stochbn.paper.runner import fit_posterior

    checkpoint = checkpoints.load(network)
    path = path or _default_posterior(network)
    check_file(path)
    images = _load(data or checkpoint.data, "train")
    _check_images(checkpoint, images)
    with _bars() as bars:
        follow = _follow(bars, "fitting")
        posterior = fit_posterior(checkpoint.model, images, batch_size, seed, follow, kind=kind)
    posterior.save(path)
    out.print(
        f"Saved the posterior as [bold]{escape(str(path))}[/]: {sum(posterior.layers.values())} channels in "
        f"{len(posterior.layers)} layers, from {posterior.mini_batches} mini-batches of {batch_size}.\n"
        f"Next: stochbn evaluate {escape(shlex.quote(str(network)))}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def diagnose(
    network: NetworkFile,
    data: DataFromNetwork = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Objects in a mini-batch.")] = 16,
    images: Annotated[int, typer.Option("--images", min=1, help="Training images to use, at most.")] = 16384,
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
    import torch

    from stochbn.paper import checkpoints, figures, goodness, tables

    checkpoint = checkpoints.load(network)
    data = data or checkpoint.data
    found = _load(data, "train")
    _check_images(checkpoint, found)
    for size in rescaled or []:
        if not 2 <= size <= min(images, len(found)):
            raise ValueError(f"--rescaled {size} must be at least 2 and at most the number of training images used")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    found = found.shuffled(seed).take(torch.arange(min(images, len(found))))
    with _bars() as bars:
        observed = goodness.observe(checkpoint.model, found, batch_size, seed, _follow(bars, "observing"))
        others = {
            size: goodness.observe(checkpoint.model, found, size, seed, _follow(bars, f"observing, {size}"))
            for size in rescaled or []
        }
    diagnosis = goodness.diagnose(observed)
    title = f"{checkpoint.network}: statistics of mini-batches of {batch_size} of {data}"
    shown = [tables.diagnosis(title, diagnosis)]
    for size, other in others.items():
        ratios = goodness.rescaling(observed, batch_size, other, size)
        shown.append(tables.rescaling(f"Mini-batches of {size}: observed over rescaled from {batch_size}", ratios))
    for table in shown:
        out.print(table.rich())
    advice = [f"- {sentence}" for sentence in diagnosis.advice]
    out.print(*map(escape, advice), sep="\n", highlight=False)
    if folder is not None:
        text = "\n\n".join([*(table.markdown() for table in shown), "\n".join(advice)])
        write_bytes(folder / "diagnosis.md", f"{text}\n".encode())
        figures.save_diagnosis(folder / "diagnosis", diagnosis, title=title)
        out.print(f"Tables and figure are in [bold]{escape(str(folder))}[/].")


@app.command()
def evaluate(
    networks: NetworkFiles,
    data: DataFromNetwork = None,
    ood: Annotated[
        str | None, typer.Option(help="Data of unknown classes, named like --data.", show_default=False)
    ] = None,
    posteriors: Annotated[
        list[Path] | None,
        typer.Option(
            "--posterior",
            help="A posterior for each network, in their order. \\[default: NETWORK.sbn.safetensors where it exists]",
            show_default=False,
        ),
    ] = None,
    draws: Draws = 50,
    seed: Seed = 0,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for results.json, results.md and figure.", show_default=False)
    ] = None,
) -> None:
    """Error, NLL and calibration on test data, and detection of unknown classes, without and with SBN.

    Networks trained with dropout keep it on (MC Dropout). Several networks are also evaluated as an ensemble.
    """
    from stochbn.paper import checkpoints, report
    from stochbn.paper.runner import has_dropout, predict_member

    named: list[Path | None] = list(posteriors) if posteriors else [None] * len(networks)
    if len(named) != len(networks):
        raise ValueError(f"got {len(named)} posteriors for {len(networks)} networks; name one for each, or none")
    loaded = [checkpoints.load(path) for path in networks]
    fitted = [_posterior(path, given) for path, given in zip(networks, named, strict=True)]
    known = _load(data or loaded[0].data, "test")
    unknown = _load(ood, "test") if ood else None
    for checkpoint in loaded:
        _check_images(checkpoint, known, labelled=True)
        if unknown is not None:
            _check_images(checkpoint, unknown)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    predictions: dict[bool, list[Any]] = {False: [], True: []}
    with _bars() as bars:
        for path, checkpoint, posterior in zip(networks, loaded, fitted, strict=True):
            follow = _follow(bars, f"predicting, {path.name}")
            predictions[has_dropout(checkpoint.model)].append(
                predict_member(checkpoint.model, posterior, known, unknown, draws, seed, follow)
            )
    found = report.methods(predictions[False], predictions[True])
    names = known.name, unknown.name if unknown is not None else None
    if folder is None:
        shown = report.tabulate(report.score(found), *names)
    else:
        described = [p and {"kind": p.kind, "batch_size": p.batch_size, "temperature": p.temperature} for p in fitted]
        about: dict[str, Any] = {"networks": list(map(str, networks)), "posteriors": described}
        about |= {"data": names[0], "ood": names[1], "draws": draws, "seed": seed}
        shown = report.write(folder, about, found, *names, f"trained on {loaded[0].data}, tested on {ood}")
    for table in shown:
        out.print(table.rich())
    if None in fitted:
        out.print("Networks without a posterior were evaluated without SBN only: run 'stochbn fit' on them first.")
    if folder is not None:
        out.print(f"Results are in [bold]{escape(str(folder))}[/].")


@app.command()
def predict(
    network: NetworkFile,
    path: Annotated[Path, typer.Option("--out", help="CSV file: one line for each image.")],
    data: DataFromNetwork = None,
    split: Annotated[str, typer.Option(help="Which split of the data.")] = "test",
    posterior: PosteriorFile = None,
    draws: Draws = 50,
    seed: Seed = 0,
) -> None:
    """Predict images with SBN: class, probability, entropy and mutual information of each, as CSV."""
    import torch

    from stochbn.paper import checkpoints
    from stochbn.paper.runner import predict_all
    from stochbn.predictive import Predictive

    checkpoint = checkpoints.load(network)
    fitted = _posterior(network, posterior)
    if fitted is None:
        raise FileNotFoundError(
            f"there is no posterior {str(_default_posterior(network))!r}: run 'stochbn fit' on the network first, or "
            "name one with --posterior"
        )
    predictive = Predictive(checkpoint.model, fitted, draws)
    check_file(path)
    images = _load(data or checkpoint.data, split)
    _check_images(checkpoint, images)
    with _bars() as bars:
        generator = torch.Generator().manual_seed(seed)
        prediction = predict_all(predictive, images, generator, _follow(bars, "predicting"))
    probability, label = prediction.probs.max(1)
    rows = list(
        zip(
            [checkpoint.classes[i] for i in label.tolist()],
            probability.tolist(),
            prediction.entropy.tolist(),
            prediction.mutual_information.tolist(),
            strict=True,
        )
    )
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["image", "class", "probability", "entropy", "mutual_information"])
    writer.writerows([i, row[0], *(f"{value:.6g}" for value in row[1:])] for i, row in enumerate(rows))
    write_bytes(path, text.getvalue().encode())
    table = Table("image", "class", "probability", "entropy", "mutual information", title="least certain")
    for i in sorted(range(len(rows)), key=lambda i: -rows[i][2])[:5]:
        table.add_row(str(i), rows[i][0], *(f"{value:.3f}" for value in rows[i][1:]))
    out.print(table)
    out.print(f"Saved {len(rows)} predictions as [bold]{escape(str(path))}[/]; entropies are in nats.")


class _RateColumn(ProgressColumn):
    """Steps per second, in the unit of the bar."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {task.fields['unit']}/s", style="progress.data.speed")


def _bars() -> Progress:
    """Progress bars with rate and time left; their tasks name a unit."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _RateColumn())
    return Progress(*columns, TimeRemainingColumn(), console=out)


def _follow(bars: Progress, description: str) -> Callable[[int, int], None]:
    """A new bar, as the function that moves it."""
    task = bars.add_task(escape(description), total=None, unit="img", visible=False)
    return lambda done, total: bars.update(task, completed=done, total=total, visible=True)


def _side_by_side(tasks: int) -> int:
    """How many tasks to do at once by default: one for each core, or one after another on an accelerator."""
    import torch

    return 1 if torch.accelerator.is_available() else min(tasks, os.cpu_count() or 1)


def _load(source: str, split: str) -> Images:
    """Load data with a progress bar."""
    from stochbn.paper.data import load

    with _bars() as bars:
        return load(source, split, _follow(bars, f"loading {source} ({split})"))


def _default_posterior(network: Path) -> Path:
    return network.with_name(f"{network.name.removesuffix('.safetensors')}.sbn.safetensors")


def _posterior(network: Path, path: Path | None) -> Posterior | None:
    """The posterior in a file or, if none is named, in the default place, if there is one."""
    from stochbn.posteriors import load

    if path is None:
        path = _default_posterior(network)
        if not path.exists():
            return None
    return load(path)


def _check_images(checkpoint: Checkpoint, images: Images, labelled: bool = False) -> None:
    """Refuse images that a network was not built for."""
    arguments = checkpoint.arguments
    expected = (arguments["channels"], arguments["size"], arguments["size"])
    if images.shape != expected:
        raise ValueError(
            f"{images.name} has images of {list(images.shape)} (channels, height, width), the network takes "
            f"{list(expected)}"
        )
    if labelled and images.classes != checkpoint.classes:
        raise ValueError(
            f"{images.name} has the classes {', '.join(images.classes)}, the network was trained on "
            f"{', '.join(checkpoint.classes)}; select its classes as in NAME:0-{arguments['classes'] - 1}"
        )
