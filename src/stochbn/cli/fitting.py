"""The commands that make a posterior: fit and calibrate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stochbn.cli import project
from stochbn.cli.console import follow, progress_bars, say, show
from stochbn.cli.following import after_calibrating, after_fitting
from stochbn.cli.inputs import default_posterior
from stochbn.cli.job import job
from stochbn.cli.options import Augmentation, Data, Ignored, Override, PosteriorFile, Seed
from stochbn.cli.subject import ANEW, HELD, SHARED, Given, Subject, about_networks, needs
from stochbn.files import check_file

if TYPE_CHECKING:
    from stochbn.calibration_report import Choice
    from stochbn.posteriors import Posterior
    from stochbn.report.tables import Table

__all__ = ["calibrate", "fit"]

CALIBRATE_BATCH = 100


@about_networks()
def fit(
    given: Given,
    data: Data = None,
    batch_size: Annotated[
        int,
        typer.Option(min=2, help="Examples in a mini-batch whose statistics are observed. Fewer examples, more noise."),
    ] = 16,
    kind: Annotated[
        str,
        typer.Option(
            help="Kind of posterior: joint (all layers together), empirical (replays mini-batches), factorized or "
            "factorized-log (the paper's)."
        ),
    ] = "joint",
    centre: Annotated[
        str,
        typer.Option(help="Centre of the draws: running (the network's own statistics) or observed (as in the paper)."),
    ] = "running",
    batches: Annotated[
        int | None,
        Override("--batches", min=1, help="Mini-batches to observe. (default: 512, or 5,000 for factorized kinds)"),
    ] = None,
    path: Annotated[
        Path | None,
        Override("--out", help="File for the posterior. (default: beside the weights, WEIGHTS.sbn.safetensors)"),
    ] = None,
    augment: Augmentation = None,
    reference: Annotated[
        str | None,
        Override(
            "--reference",
            help="Unlabelled examples that the network was not trained on, named like --data. 'stochbn adapt' and the "
            "alarm of 'stochbn predict' compare new data with them. (default: examples of --data, not augmented)",
        ),
    ] = None,
    no_reference: Annotated[
        bool,
        typer.Option(
            "--no-reference",
            help="Keep no reference. There is no alarm then, and adapt cannot see a change of the mix.",
        ),
    ] = False,
    seed: Seed = 0,
    save_options: Annotated[
        bool,
        typer.Option("--save-options", help="Also write the options about the network into stochbn.toml."),
    ] = False,
) -> None:
    """Fit a posterior over a network's batch-norm statistics to its training data.

    The data must look as in training. If training changed images at random, put a function train_preprocess into the
    module of --model, or use --augment.

    The posterior's file keeps --input, --label, --size, --mean, --std, --exif and --page, and later commands use them.
    They read the same columns, by name and in the same order.
    """
    from stochbn.augment import named
    from stochbn.evaluation.fitting import fit_posterior

    changes = named(augment) if augment is not None else None
    beside = given.networks[0] if given.networks else given.weights
    if path is None and beside is None:
        raise ValueError(needs("--out"))
    if reference is not None and no_reference:
        raise ValueError("--reference and --no-reference cannot be given together")
    target = path or default_posterior(beside or Path())
    if save_options:
        project.check_new(Path(project.FILE))
    if path is not None or (beside is not None and beside.exists()):  # a missing network raises below
        check_file(target, [*given.files, data, reference])
    with job() as ranks, ranks.failing_together():
        subject = Subject.one(given)
        objects = subject.load(data, "train")
        compared: Any = not no_reference
        if reference is not None:
            compared = subject.load(reference, "held-out", "--reference")
        elif compared and subject.augments:  # new data is not augmented, so its reference is not either
            compared = subject.load(data, "reference")
        with progress_bars() as bars:
            move = follow(bars, "fitting")
            posterior = fit_posterior(
                subject.model, objects, batch_size, seed, move, kind=kind, augment=changes, ranks=ranks,
                centre=centre,  # type: ignore[arg-type]
                batches=batches, reference=compared, settings=subject.settings,
            )  # fmt: skip
        if ranks.rank:
            return
        posterior = replace(posterior, schema=getattr(objects, "schema", None))
        posterior.save(target)
    if save_options:
        project.write(Path(project.FILE), {name: getattr(given, name) for name in SHARED if name not in ANEW})
        say(f"Saved the options as {project.FILE}: commands in this folder take them from there.")
        given = Given(networks=given.networks)
    elif posterior.schema is not None:  # later commands find them in the file
        without: dict[str, Any] = dict.fromkeys(HELD)
        given = replace(given, **without)
    say(
        f"Saved the posterior as {target}: {sum(posterior.layers.values())} channels in "
        f"{len(posterior.layers)} layers, from {posterior.mini_batches} mini-batches of {batch_size}"
        f"{_shown(subject, augment)}.{_compared(posterior, not no_reference)}\n"
        f"{after_fitting(given, beside and default_posterior(beside), target, augment)}",
        target,
    )


@about_networks()
def calibrate(
    given: Given,
    held_out: Annotated[
        str | None, Override("--held-out", help="Labelled data that the network was not trained on, named like --data.")
    ] = None,
    posterior: PosteriorFile = None,
    temperature: Annotated[
        bool, typer.Option("--temperature/--no-temperature", help="Also choose a temperature, or only the noise.")
    ] = True,
    objects: Annotated[
        int, typer.Option("--objects", min=1, help="Largest number of held-out examples to use.")
    ] = 4096,
    path: Annotated[
        Path | None, Override("--out", help="File for the new posterior. (default: replaces the old one)")
    ] = None,
    augment: Augmentation = None,
    choose: Annotated[
        int,
        typer.Option(
            "--choose",
            min=0,
            help="First choose the augmentation of each of this many draws, among those of --augment, separated by "
            "bars.",
        ),
    ] = 0,
    ignore: Ignored = None,
    score: Annotated[
        str | None,
        Override(
            "--score", help="Score to minimise: nll, brier, or one of your own task. (default: the task's first, nll)"
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Choose between the plain network, a temperature and draws on held-out data; write the new posterior.

    The simplest option that is about as good as the best is chosen. You can run calibrate on its own posterior again.

    With --augment, the posterior is for predictions with the same --augment. With --choose 8 --augment
    'flip|shift:2|flip,shift:4' each of 8 draws gets the augmentation that lowers the calibrated NLL most, and the
    command prints the --augment to predict with.
    """
    import stochbn
    from stochbn.augment import named, turns
    from stochbn.tasks import Classification

    changes = named(augment) if augment is not None else None
    if choose and not isinstance(changes, turns):
        raise ValueError(
            "--choose needs several augmentations, separated by bars: --augment 'flip|shift:2|flip,shift:4'"
        )
    beside = given.networks[0] if given.networks else given.weights
    target = path or posterior or (default_posterior(beside) if beside is not None else None)
    if target is None:
        raise ValueError(needs("--out"))
    check_file(target, [*given.files, held_out])
    with job() as ranks, ranks.failing_together():
        subject = Subject.held(given, posterior)
        task = subject.task
        if not task.calibrated_by:
            raise ValueError(
                f"calibrate needs labels, and --task {task.name} has none: set the noise with 'stochbn fit "
                "--batch-size' (more examples, less noise)"
            )
        if score is not None and score not in task.calibrated_by:
            raise ValueError(f"--score must be {' or '.join(task.calibrated_by)}, got {score!r}")
        if choose and type(task) is not Classification:
            raise ValueError(f"--choose is for --task {Classification.name}, got --task {task.name}")
        old = subject.need_posterior(posterior)
        data = subject.load(held_out, "held-out", "--held-out", labelled=True, ignore=ignore)
        data = data.shuffled(seed).first(objects)
        if choose and isinstance(changes, turns):
            if ranks.count > 1:
                raise ValueError("--choose needs all data in one process: run it without torchrun")
            several = list(dict.fromkeys(changes.augmentations))
            with progress_bars() as bars:
                move = follow(bars, "choosing")
                held = itertools.starmap(_held_out, data.batches(CALIBRATE_BATCH))
                changes = stochbn.choose_augmentation(
                    subject.model, old, held, several, draws=choose, passes=max(48, len(several) + 1),
                    progress=lambda done: move(done, len(data)), seed=seed, **subject.settings,
                )  # fmt: skip
            say(f"Chosen for the draws, in order: --augment '{changes}'")
        data = data.shard(ranks.rank, ranks.count, CALIBRATE_BATCH) if ranks.count > 1 else data
        choices: list[Choice] = []
        with progress_bars() as bars:
            move, done = follow(bars, "calibrating"), 0

            def batches() -> Iterator[Any]:
                nonlocal done
                for inputs, labels in data.batches(CALIBRATE_BATCH):
                    yield _held_out(inputs, labels)
                    done += len(labels)
                    move(done, len(data))

            new = stochbn.calibrate(
                subject.model, old, batches(), temperature=temperature, augment=changes, seed=seed,
                score=score,
                ignore_index=ignore,
                report=choices.append,
                group=ranks.group, **subject.settings,
            )  # fmt: skip
        if ranks.rank:
            return
        new.save(target)
    show([_table(choices[0], ends=temperature and choices[0].tempered)])
    dense = choices[0].units == "places"
    shown = ignore if dense else None  # evaluate takes it for dense outputs alone
    augment = str(changes) if choose else augment
    again = after_calibrating(given, beside and default_posterior(beside), target, augment, dense=dense, ignore=shown)
    say(
        f"{choices[0]}\nSaved the posterior as {target}: {choices[0].chosen.name}, {_fitted(new)}. "
        f"The held-out data was preprocessed as at test time{f', with --augment {augment}' if augment else ''}.",
        target,
    )
    say(again)


def _fitted(posterior: Posterior) -> str:
    """The temperature or residual variance that was fitted, in words."""
    found = posterior.residual_variance
    if found is None:
        return f"temperature {posterior.temperature:.3f}"
    rows = found.parts[2].sqrt(), found.parts[0]
    stds, factors = (", ".join(f"{one:.4g}" for one in row.tolist()[:4]) for row in rows)
    told = f"residual standard deviation {stds}"
    return told if posterior.noiseless else f"{told}, beside {factors} times the variance over draws"


def _compared(posterior: Posterior, asked: bool) -> str:
    """A sentence if a reference was asked for and could not be made."""
    if not asked or posterior.reference is not None:
        return ""
    return (
        " It has no reference for new data: that needs 256 examples, trained running statistics, and a batch norm that "
        "is called once in a pass."
    )


def _shown(subject: Subject, augment: str | None) -> str:
    """How the examples for the user's own network were preprocessed, in words."""
    if subject.data is not None and augment is None:
        return ""
    ways = ["train_preprocess of its module"] if subject.augments else []
    ways += [f"--augment {augment}"] if augment is not None else []
    return (
        f", preprocessed by {' and '.join(ways)}" if ways else ", preprocessed as at test time, without random changes"
    )


def _table(choice: Choice, ends: bool) -> Table:
    """The options of the choice, a row each; `ends` marks temperatures at an end of their range."""
    from stochbn.calibration import TEMPERATURES
    from stochbn.report.tables import Table

    lowest, highest = TEMPERATURES[0].item(), TEMPERATURES[-1].item()
    signs = {lowest: "\u2264 ", highest: "\u2265 "} if ends else {}
    rows = []
    for one in choice.options:
        sizes = {math.inf: "none"}
        noise = "as fitted" if math.isnan(one.batch_size) else sizes.get(one.batch_size, f"{one.batch_size:g}")
        rows.append(
            [
                f"draws about {one.centre}" if one.centre else "plain network",
                noise,
                str(one.passes),
                *([f"{signs.get(one.temperature, '')}{one.temperature:.3f}"] if choice.tempered else []),
                f"{one.mean:.4f}",
                "0" if one.error == 0 else f"{one.more:+.4f} \u00b1 {one.error:.4f}",
                "chosen" if one is choice.chosen else "" if one.selectable else "for comparison",
            ]
        )
    title = (
        f"{choice.score_name} of {choice.objects:,} held-out {choice.units}, differences with paired standard errors"
    )
    columns = ["predictions", "noise of", "passes", *(["temperature"] if choice.tempered else [])]
    columns += [choice.score_name, f"beyond {choice.beyond.partition(',')[0]}", "choice"]
    return Table(title, columns, rows)


def _held_out(inputs: object, labels: object) -> object:
    """A batch as `stochbn.calibrate` reads it."""
    return {**inputs, "labels": labels} if isinstance(inputs, dict) else (inputs, labels)
