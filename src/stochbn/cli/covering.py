"""The command that computes the thresholds of prediction sets on held-out data: conformal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stochbn.cli.asked_sets import METHODS, Asked
from stochbn.cli.console import follow, progress_bars, say
from stochbn.cli.following import command
from stochbn.cli.inputs import default_posterior
from stochbn.cli.options import Augmentation, Draws, Ignored, Override, PosteriorFile, Seed
from stochbn.cli.subject import Given, Subject, about_networks, needs
from stochbn.files import check_file

if TYPE_CHECKING:
    from torch import Tensor

    from stochbn.posteriors import Posterior
    from stochbn.tasks import Task

__all__ = ["conformal"]

BATCH = 250


@about_networks()
def conformal(
    given: Given,
    held_out: Annotated[
        str | None,
        Override(
            "--held-out",
            help="Labelled data, named like --data, used neither for training nor for 'stochbn calibrate'.",
        ),
    ] = None,
    coverage: Annotated[
        float,
        typer.Option(
            help="Share of examples whose set or interval contains the truth. For several labels and dense outputs: "
            "share of the true labels or pixels."
        ),
    ] = 0.9,
    by: Annotated[
        str | None,
        Override(
            "--by",
            help="A threshold, and so the coverage, for each class ('class') or for each group in a column (or array), "
            "such as hospital.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        Override(
            "--method",
            help="Classification: lac (the smallest sets), aps, raps or saps (larger sets for difficult examples). "
            "Several labels and dense outputs: crc. Regression: normalized, absolute or cqr. (default: the first)",
        ),
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="The network predicts a class for each pixel, and labels are [N, H, W].")
    ] = False,
    mask: Annotated[
        int | None, Override("--mask", min=0, help="With --dense: the only class whose pixels count, such as 1.")
    ] = None,
    ignore: Ignored = None,
    new_mix: Annotated[
        bool,
        typer.Option(
            "--new-mix",
            help="Weight classes by the mix that 'stochbn adapt' found. Only if the look of the inputs has not "
            "changed.",
        ),
    ] = False,
    posterior: PosteriorFile = None,
    draws: Draws = 50,
    augment: Augmentation = None,
    path: Annotated[
        Path | None, Override("--out", help="File for the new posterior. (default: replaces the old one)")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Compute prediction sets or intervals on held-out data; write their thresholds into the posterior's file.

    'stochbn predict' then adds a column 'set' of classes or labels, or the columns 'low' and 'high' of numbers.
    'stochbn evaluate' shows how often they contain the truth. For several labels and dense outputs, the share of missed
    labels or pixels of an example is controlled.

    Predict with the same --draws and --augment. The thresholds hold for data like the held-out data, and for this
    posterior: 'stochbn calibrate' drops them.
    """
    from stochbn.augment import named
    from stochbn.predictive import Predictive

    if not 0 < coverage < 1:
        raise ValueError(f"--coverage must lie between 0 and 1, such as 0.9, got {coverage:g}")
    if new_mix and by is not None:
        raise ValueError("--new-mix and --by cannot be given together: sets by class hold for every mix")
    if not dense and (mask is not None or ignore is not None):
        raise ValueError("--mask and --ignore are for --dense")
    changes = named(augment) if augment is not None else None
    beside = given.networks[0] if given.networks else given.weights
    target = path or posterior or (default_posterior(beside) if beside is not None else None)
    if target is None:
        raise ValueError(needs("--out"))
    check_file(target, [*given.files, held_out])
    subject = Subject.held(given, posterior)
    sort = _sort(subject.task, dense=dense, asked=method, classes_only=by == "class" or new_mix)
    fitted = subject.need_posterior(posterior)
    weights = _weights(fitted) if new_mix else None
    column = None if by == "class" else by
    objects = subject.load(held_out, "held-out", "--held-out", labelled=not dense, group=column)
    schema = getattr(objects, "schema", None)
    if column is not None and schema is not None and column in schema.label:
        raise ValueError(f"--by {column} is the column of labels, which new data does not have: take --by class")
    groups = None if column is None else objects.groups
    asked = Asked(sort, coverage, method or METHODS[sort][0], by == "class", weights, mask, ignore)
    asked.check(objects, len(subject.classes), groups)
    predictive = Predictive(subject.model, fitted, draws, augment=changes, **subject.settings)
    sets, told = asked.made(_predicted(predictive, objects, seed), groups)
    new = fitted.with_sets(sets, examples=len(objects), draws=draws, augment=augment, by=column)
    new.save(target)
    named_file = None if beside is not None and target == default_posterior(beside) else target
    say(f"{told}\nSaved the posterior with them as {target}.", target)
    options: dict[str, Any] = {"posterior": named_file, "augment": augment, "draws": None if draws == 50 else draws}
    data = None if given.networks else "TEST-DATA"
    evaluate = command("evaluate", given, data=data, dense=dense, ignore=ignore, **options)
    masks = "MASKS" if dense else None
    predict = command("predict", given, data="NEW-DATA", out="predictions.csv", masks=masks, **options)
    say(f"Next: {predict}\nOr: {evaluate}")


def _sort(task: Task, *, dense: bool, asked: str | None, classes_only: bool) -> str:
    """What the network's predictions are: ``classes``, ``labels`` or ``numbers``.

    Raises:
        ValueError: they are nothing that sets are for, or the method is for others.
    """
    from stochbn.tasks import TASKS

    if not task.sets_hold:
        known = ", ".join(name for name, one in TASKS.items() if one.sets_hold)
        raise ValueError(f"prediction sets are for --task {known}, got --task {task.name}")
    sort = "labels" if dense and task.one_class else task.sets_hold
    if asked is not None and asked not in METHODS[sort]:
        raise ValueError(f"--method for such predictions must be {' or '.join(METHODS[sort])}, got {asked!r}")
    if classes_only and sort != "classes":
        raise ValueError("--by class and --new-mix are for networks that give one class for each example")
    return sort


def _predicted(predictive: Any, objects: Any, seed: int) -> Iterator[tuple[Any, Tensor]]:
    """Predictions and labels of held-out data, batch by batch; every batch sees the draws of the seed.

    Raises:
        ValueError: there are none.
    """
    import torch

    done = 0
    with progress_bars() as bars:
        move = follow(bars, "predicting")
        for inputs, labels in objects.batches(BATCH):
            yield predictive(inputs, generator=torch.Generator().manual_seed(seed)), labels.cpu()
            done += len(labels)
            move(done, len(objects))
    if not done:
        raise ValueError("there are no held-out examples to make sets by")


def _weights(posterior: Posterior) -> Tensor:
    """How many times as frequent each class is in what a posterior was adapted to, ``[K]``.

    Raises:
        ValueError: it was not adapted, the look of the inputs has changed too, or the mix is not known.
    """
    import torch

    about = posterior.adaptation
    if about is None:
        raise ValueError("--new-mix is for a posterior of 'stochbn adapt': name its file with --posterior")
    if about.moved or not about.guarded or not about.mix:
        raise ValueError(
            "--new-mix is for data of which the mix of classes alone has changed, and 'stochbn adapt' did not find "
            f"that ({about}); label some of the new data, and name it with --held-out"
        )
    if not all(about.usual):
        raise ValueError("--new-mix needs every class in the reference: fit with a --reference of all classes")
    return torch.tensor(about.mix, dtype=torch.float64) / torch.tensor(about.usual, dtype=torch.float64)
