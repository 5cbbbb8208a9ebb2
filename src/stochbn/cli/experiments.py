"""The commands of the paper's experiments: train, demo, reproduce, report, compare, ablate and augment."""

from __future__ import annotations

import functools
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stochbn.cli.console import follow, follow_stages, progress_bars, say, show, side_by_side
from stochbn.cli.inputs import default_posterior, load_images
from stochbn.cli.job import job
from stochbn.cli.options import DATA_HELP, Draws, Jobs, Override, Seed
from stochbn.files import check_file

if TYPE_CHECKING:  # the experiments are imported by the commands that use them
    from stochbn.paper.recipes import Recipe

__all__ = ["ablate", "augment", "compare", "demo", "redraw", "report", "reproduce", "train"]


def train(
    path: Annotated[Path, typer.Option("--out", help="File for the network (safetensors).")],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    network: Annotated[str, typer.Option(help="Name of the network.")] = "lenet5",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data.")] = 5,
    batch_size: Annotated[int, typer.Option(min=2, help="Examples in a mini-batch.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of Adam, decaying linearly to 0.")] = 1e-3,
    decay: Annotated[str, typer.Option(help="Lower the learning rate each epoch or each step.")] = "step",
    decrease_from: Annotated[int, typer.Option(help="Keep the learning rate for this many epochs first.")] = 0,
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
    precision: Annotated[str, typer.Option(help="Precision of training: 32-true or bf16-mixed.")] = "32-true",
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile training steps.")] = False,
    seed: Seed = 0,
) -> None:
    """Train a network on images as in the paper: Adam, batch size 16, learning rate decaying to 0.

    Writes loss and accuracy of every epoch to NETWORK.training.csv.
    """
    from stochbn.paper.schedule import Schedule
    from stochbn.paper.training import train as train_network
    from stochbn.sources import architectures, checkpoints

    log = path.with_name(f"{path.name.removesuffix('.safetensors')}.training.csv")
    check_file(path)
    check_file(log)
    images = load_images(data, "train")
    given = {"width": width, "dropout": dropout or None, "classifier_dropout": classifier_dropout or None, "bias": bias}
    arguments = architectures.arguments_for(images) | {
        name: value for name, value in given.items() if value is not None
    }
    build = architectures.build_with_uniform_scale if uniform_scale else architectures.build
    schedule = Schedule(
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
    with progress_bars() as bars:
        task = bars.add_task("training", total=None, unit="img")
        model = train_network(
            functools.partial(build, network, **arguments),
            images,
            schedule,
            log=log,
            report=lambda step, steps, loss: bars.update(
                task, completed=step * batch_size, total=steps * batch_size, description=f"training, loss {loss:.4f}"
            ),
        )
    checkpoints.save(path, checkpoints.Checkpoint(model, network, arguments, data, images.classes))
    stale = default_posterior(path)
    if stale.exists():
        stale.unlink()
        say(f"Deleted {stale}: it was fitted to the network that this one replaces.")
    say(f"Saved the network as {path}. Next: stochbn fit {shlex.quote(str(path))}", path)


def demo(
    data: Annotated[str, typer.Option(help="digits (ships with scikit-learn) or mnist (against notmnist).")] = "digits",
    folder: Annotated[
        Path | None, typer.Option("--out", help="Run folder. (default: demo-DATA)", show_default=False)
    ] = None,
    jobs: Jobs = 0,
) -> None:
    """Train, fit and compare SBN, Deep Ensembles and Dropout, on known and unknown classes.

    Writes tables, a figure of entropies, networks and posteriors to a folder. If it was stopped, it continues.
    """
    from stochbn.paper.recipes import DEMOS

    if data not in DEMOS:
        raise ValueError(f"the demonstration runs on {' or '.join(DEMOS)}, not on {data!r}")
    _run(DEMOS[data], folder or Path(f"demo-{data}"), jobs)
    if data == "digits":
        as_module = Path(sys.argv[0]).name == "__main__.py"
        program = [sys.executable, "-m", "stochbn"] if as_module else sys.argv[:1]
        say(f"\nNext, on real data (some minutes):\n\n    {shlex.join(program)} demo --data mnist\n")


def reproduce(
    network: Annotated[str, typer.Argument(metavar="NETWORK", help="lenet5, vgg11, resnet18, ...", show_default=False)],
    preset: Annotated[
        str,
        typer.Option(help="paper (the published protocol), reduced (an hour or so on two cores) or smoke (a minute)."),
    ] = "reduced",
    folder: Annotated[
        Path | None, typer.Option("--out", help="Run folder. (default: runs/NETWORK-PRESET)", show_default=False)
    ] = None,
    jobs: Jobs = 0,
    data: Annotated[str | None, Override("--data", help=f"Known classes: {DATA_HELP}")] = None,
    unknown: Annotated[str | None, Override("--unknown", help="Unknown classes, or 'none'.")] = None,
    epochs: Annotated[int | None, Override("--epochs", help="Passes over the training data.")] = None,
    members: Annotated[int | None, Override("--members", help="Networks in the Deep Ensemble.")] = None,
    batch_size: Annotated[int | None, Override("--batch-size", help="Examples in a training mini-batch.")] = None,
    learning_rate: Annotated[
        float | None, Override("--learning-rate", help="Learning rate of Adam, decaying to 0.")
    ] = None,
    decay: Annotated[str | None, Override("--decay", help="Lower the learning rate each epoch or each step.")] = None,
    decrease_from: Annotated[
        int | None, Override("--decrease-from", help="Keep the learning rate for this many epochs first.")
    ] = None,
    uniform_scale: Annotated[
        bool | None, Override("--uniform-scale/--unit-scale", help="Start batch norm's scale from U(0, 1) or from 1.")
    ] = None,
    statistics_batch: Annotated[
        int | None, Override("--statistics-batch", help="Examples in a mini-batch whose statistics are observed.")
    ] = None,
    draws: Annotated[int | None, Override("--draws", help="Draws, or dropout passes, of each network.")] = None,
    seed: Annotated[int | None, Override("--seed", help="Seed of all random numbers.")] = None,
    width: Annotated[float | None, Override("--width", help="Factor on the network's channels.")] = None,
    dropout: Annotated[
        float | None, Override("--dropout", help="Dropout rate after ReLUs; 0: no network with dropout.")
    ] = None,
    classifier_dropout: Annotated[
        float | None, Override("--classifier-dropout", help="Dropout rate before the classifier (vgg11).")
    ] = None,
    bias: Annotated[bool | None, Override("--bias/--no-bias", help="Biases in convolutions (vgg).")] = None,
    augment: Annotated[bool | None, Override("--augment/--no-augment", help="Random crops and flips.")] = None,
    posterior: Annotated[
        str | None, Override("--posterior", help="Fit by moments of sigma^2 (factorized) or its log (factorized-log).")
    ] = None,
    drawn: Annotated[str | None, Override("--drawn", help="Batch norms to draw: all or convolutions'.")] = None,
    augment_fit: Annotated[
        bool | None, Override("--augment-fit/--no-augment-fit", help="Fit posteriors on random crops and flips.")
    ] = None,
    precision: Annotated[
        str | None, Override("--precision", help="Precision of training: 32-true or bf16-mixed.")
    ] = None,
    compile: Annotated[bool | None, Override("--compile/--no-compile", help="Compile training steps.")] = None,
    processes: Annotated[int | None, Override("--processes", help="Processes that train one network together.")] = None,
    held_out: Annotated[
        float | None, Override("--held-out", help="Share of the training data to hold out, for choices.")
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
            help="Keep the log-probabilities of every draw. (default: up to 256 MiB for a network)",
        ),
    ] = None,
) -> None:
    """Repeat one of the paper's experiments: SBN, Deep Ensembles and Dropout on known and unknown classes.

    Options change single settings of a preset. If it was stopped, it continues.
    """
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
        "posterior": posterior,
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


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Finished run folders.", show_default=False)],
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the tables of several runs. (default: seeds)", show_default=False),
    ] = None,
) -> None:
    """Make a run's tables, figures and report.html again, from its stored predictions.

    Several runs that differ only in their seeds give one table, of means and standard deviations.
    """
    from stochbn.paper.report import write_run, write_seeds

    if len(folders) == 1:
        if folder is not None:
            raise ValueError("the tables of one run go into its own folder; --out is for several runs")
        shown = write_run(folders[0])
    else:
        folder = folder or Path("seeds")
        shown = write_seeds(folders, folder)
    show(shown)


def redraw(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER", help="Folders with cost.json, comparison.json, ...", show_default=False),
    ],
) -> None:
    """Draw the figures of stored results of bench, compare and augment again."""
    from stochbn.paper.redrawing import redraw as redraw_folder

    for folder in folders:
        for path in redraw_folder(folder):
            say(str(path), path)


def compare(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A finished run made with --held-out.", show_default=False)
    ],
    members: Annotated[int, typer.Option(min=1, help="Number of its plain networks to use; each is a seed.")] = 3,
    draws: Draws = 50,
    fit_images: Annotated[
        int, typer.Option(min=2, help="Largest number of training images to fit posteriors to.")
    ] = 8192,
    held_out: Annotated[int, typer.Option(min=1, help="Largest number of held-out images to calibrate on.")] = 2000,
    unknown: Annotated[int, typer.Option(min=1, help="Largest number of images of unknown classes to predict.")] = 2000,
    exact: Annotated[int, typer.Option(min=10, help="Number of test images for exact inference.")] = 1000,
    augment: Annotated[
        str,
        typer.Option(
            help="Also augment the input: flip, shift:PIXELS, or both; without exact inference.", show_default=False
        ),
    ] = "",
    jobs: Jobs = 0,
) -> None:
    """Compare kinds of posteriors, exact inference and ensembles, on the networks of a run.

    Each kind is used as fitted, and with its noise calibrated on the images that the run held out. If it was stopped,
    it continues.
    """
    from stochbn.paper.comparison import Settings
    from stochbn.paper.comparison import compare as compare_run

    settings = Settings(members, draws, fit_images, held_out, unknown, exact, augment)
    with progress_bars() as bars:
        move = follow(bars, "predicting", "predictions")
        shown = compare_run(folder, settings, jobs=jobs or side_by_side(members), progress=move)
    show(shown)
    name = settings.name
    say(f"Everything is in {folder}: {name}.json, {name}.md and {name}.png.", folder)


def ablate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A finished run.", show_default=False)],
    members: Annotated[
        int | None, typer.Option(min=1, help="Number of its plain networks to use. (default: all)", show_default=False)
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=10, help="Largest number of test images of each kind. (default: all)", show_default=False),
    ] = None,
) -> None:
    """Measure the effect of each part of SBN on the networks of a run: the centre of the statistics, and their noise.

    Each method is compared with the plain network on the run's test images. If it was stopped, it continues.
    """
    from stochbn.paper.ablation import ablate as ablate_run

    with progress_bars() as bars:
        shown = ablate_run(folder, members=members, images=images, progress=follow(bars, "predicting", "predictions"))
    show(shown)
    say(f"Everything is in {folder}: ablation.json and ablation.md.", folder)


def augment(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A finished run made with --held-out.", show_default=False)
    ],
    augmentation: Annotated[
        str, typer.Option("--augment", help="flip, shift:PIXELS, crop:SMALLEST, colour:STRENGTH, or several.")
    ] = "flip,shift:4",
    members: Annotated[int, typer.Option(min=1, help="Number of its plain networks to use.")] = 3,
    count: Annotated[list[int], typer.Option(min=1, help="Numbers of draws, from few to many.")] = [4, 8, 16, 48],  # noqa: B006
    fit_images: Annotated[
        int, typer.Option(min=2, help="Largest number of training images to fit posteriors to.")
    ] = 8192,
    held_out: Annotated[int, typer.Option(min=1, help="Largest number of held-out images to calibrate on.")] = 2000,
    images: Annotated[int, typer.Option(min=10, help="Largest number of test images of each kind.")] = 5000,
    candidates: Annotated[
        str,
        typer.Option(
            help="Also choose greedily among these augmentations, with bars between: 'flip|shift:2|flip,shift:4'.",
            show_default=False,
        ),
    ] = "",
    snapshots: Annotated[int, typer.Option(min=0, help="Also take this many snapshots of each network.")] = 0,
    cycle: Annotated[
        str, typer.Option(help="How a snapshot is taken: OPTIMIZER:RATE:EPOCHS, with adam or sgd.")
    ] = "adam:0.001:2",
) -> None:
    """Measure what test-time augmentation adds to draws of the statistics, on the networks of a run, and its cost.

    Each network predicts with its statistics drawn, with its input augmented in every pass, and with both. They are
    compared with ensembles of the run's networks. If it was stopped, it continues. Under torchrun, ranks share the
    networks.
    """
    from stochbn.paper.augmentation import Settings, draw_over_inputs
    from stochbn.paper.snapshotting import Cycles

    cycles = Cycles.of(snapshots, cycle) if snapshots else None
    settings = Settings(augmentation, members, tuple(count), fit_images, held_out, images, candidates, cycles)
    with job() as ranks, progress_bars() as bars:
        shown = draw_over_inputs(folder, settings, progress=follow(bars, "predicting", "predictions"), ranks=ranks)
    if ranks.rank:
        return
    show(shown)
    say(f"Everything is in {folder}: augmentation.json, augmentation.md and augmentation.png.", folder)


def _run(recipe: Recipe, folder: Path, jobs: int, keep_draws: bool | None = None) -> None:
    """Run a recipe with progress bars, and show what came out."""
    from stochbn.paper import report, runner

    with job() as ranks, progress_bars() as bars:
        dropout = " and one with dropout" if recipe.dropout else ""
        say(
            f"{recipe.network} on {recipe.data}, unknown classes: {recipe.unknown or 'none'}; {recipe.members} plain "
            f"networks{dropout}, {recipe.epochs} epochs, {recipe.draws} draws."
        )
        alone = recipe.processes > 1 or ranks.count > 1
        jobs = jobs or (1 if alone else side_by_side(len(recipe.all_members())))
        runner.run(recipe, folder, jobs=jobs, keep_draws=keep_draws, progress=follow_stages(bars), ranks=ranks)
    if ranks.rank:
        return
    show(report.write_run(folder))
    say(
        f"Lower NLL is better; unknown examples should have more entropy than known ones. Everything is in {folder}: "
        "report.html (for a browser), results.json, results.md, entropy-cdf.png, and a folder for each network with "
        "its posterior.",
        folder,
    )
