"""The command that scores a network and its posterior on labelled data: evaluate."""

from __future__ import annotations

import functools
import math
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stochbn.cli.console import follow, progress_bars, say, show
from stochbn.cli.drift import about_data, about_sets, alarm, compared, group_of
from stochbn.cli.following import after_evaluating
from stochbn.cli.job import job
from stochbn.cli.options import Augmentation, Data, Draws, Ignored, Override, Seed
from stochbn.cli.streams import stream_of
from stochbn.cli.subject import Given, Subject, about_networks, held_by
from stochbn.files import check_file, check_folder

if TYPE_CHECKING:
    from torch import Tensor

    from stochbn.distributed import Ranks
    from stochbn.evaluation.methods import Method
    from stochbn.posteriors import Posterior
    from stochbn.posteriors.thresholds import Thresholds
    from stochbn.report.tables import Table

__all__ = ["evaluate"]

COSTED = 64
"""Examples in a prediction whose time is measured."""


@about_networks(several=True)
def evaluate(
    given: Given,
    data: Data = None,
    ood: Annotated[
        str | None, typer.Option(help="Data of unknown classes, named like --data.", show_default=False)
    ] = None,
    posteriors: Annotated[
        list[Path] | None,
        typer.Option(
            "--posterior",
            help="A posterior for each network, in the same order. (default: those beside the weights, if they exist)",
            show_default=False,
        ),
    ] = None,
    draws: Draws = 50,
    augment: Augmentation = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="The network predicts a class for each pixel, and labels are [N, H, W].")
    ] = False,
    ignore: Ignored = None,
    seed: Seed = 0,
    folder: Annotated[
        Path | None,
        Override("--out", help="Folder for results.json, results.md and, with --ood, a figure of entropies."),
    ] = None,
    report_file: Annotated[
        Path | None,
        typer.Option(
            "--report", help="HTML file for a report with all results; it needs no other file.", show_default=False
        ),
    ] = None,
) -> None:
    """Score test data without and with SBN: error, NLL, calibration, and detection of unknown classes.

    Regression, survival, several labels and dense outputs have their own scores. If a label consists of several
    numbers, use several columns, or an array 'labels' of a .npz file.

    With --augment, draws of SBN change their inputs too. Calibrate for this with 'stochbn calibrate --augment'.

    Several networks of 'stochbn paper train' are also evaluated as an ensemble. Networks with dropout keep it on (MC
    Dropout).
    """
    from stochbn import augment as augmentations
    from stochbn.evaluation.methods import methods, score
    from stochbn.evaluation.predicting import has_dropout, predict_member
    from stochbn.metrics.classification import torchmetrics_classification
    from stochbn.posteriors.thresholds import compare_draws
    from stochbn.report.chosen import chosen
    from stochbn.report.facts import facts
    from stochbn.report.objects import source_of
    from stochbn.report.page import page_of, write_page
    from stochbn.report.results import FILES, tabulate, write
    from stochbn.report.words import made_worse

    torchmetrics_classification()  # if it is missing, raises before the work, and on every rank
    changes = augmentations.named(augment) if augment is not None else None
    if folder is not None:
        check_folder(folder, *FILES)
    if report_file is not None and report_file.parent == folder:  # which may not exist yet
        check_folder(folder, report_file.name)
    elif report_file is not None:
        check_file(report_file, [*given.files, data, ood, *(posteriors or ())])
    paths: list[Path | None] = list(given.networks) if given.networks else [None]
    named: list[Path | None] = list(posteriors) if posteriors else [None] * len(paths)
    if len(named) != len(paths):
        raise ValueError(f"got {len(named)} posteriors for {len(paths)} networks; name one for each, or none")
    with job() as ranks, ranks.failing_together():
        subjects = Subject.all_of(given, held_by(given, named[0]))
        if dense or not all(one.task.one_class for one in subjects):
            if len(subjects) > 1 or ood is not None:
                raise ValueError("several networks, and --ood, need networks that predict one class for each example")
            fitted_one = subjects[0].find_posterior(named[0])
            asked = {"draws": draws, "seed": seed, "augment": augment, "ignore": ignore}
            worse = _evaluate_task(subjects[0], fitted_one, data, ranks, changes, asked, folder, report_file)
            say(after_evaluating(given, worse, [fitted_one], named, augment, ignore, dense=dense))
            return
        if ignore is not None:
            raise ValueError(
                "--ignore is for --dense; with one class for each example, leave the examples to ignore out of the data"
            )
        started = time.perf_counter()
        fitted = [subject.find_posterior(path) for subject, path in zip(subjects, named, strict=True)]
        data = data or subjects[0].data
        group = group_of(fitted[0]) if len(fitted) == 1 else None
        # Each subject checks that the data fits.
        known, *_ = [subject.load(data, "test", labelled=True, group=group) for subject in subjects]
        unknown, *_ = [subject.load(ood, "test", "--ood") if ood else None for subject in subjects]
        shown_objects = source_of(known)
        known_share = _Share(known, ranks)
        unknown_share = None if unknown is None else _Share(unknown, ranks)
        predictions: dict[bool, list[Any]] = {False: [], True: []}
        with progress_bars() as bars:
            for subject, path, posterior in zip(subjects, paths, fitted, strict=True):
                move = follow(bars, f"predicting, {path.name if path is not None else subject.name}")
                dropout = has_dropout(subject.model) if subject.dropout is None else subject.dropout
                member = predict_member(
                    subject.model,
                    posterior,
                    known_share.objects,
                    None if unknown_share is None else unknown_share.objects,
                    draws,
                    seed,
                    move,
                    dropout=dropout,
                    augment=changes,
                    **subject.settings,
                )
                of_unknown = {name: values for name, values in member.items() if ".unknown" in name}
                of_known = {name: values for name, values in member.items() if name not in of_unknown}
                joined = known_share.joined(of_known)
                if unknown_share is not None:
                    joined |= unknown_share.joined(of_unknown)
                predictions[dropout].append(joined)
    if ranks.rank:
        return
    found = methods(predictions[False], predictions[True])
    outputs = (predictions[False] + predictions[True])[0]["plain.known"].shape[1]
    if 0 < len(known.classes) < outputs and not subjects[0].classes:
        warnings.warn(
            f"{known.name} has {len(known.classes)} classes, numbered in the order of their names, and the network has "
            f"{outputs}: if some classes are missing, the others are numbered wrongly; list all of them in the "
            "network's module, as classes = [...]",
            stacklevel=2,
        )
    names = known.name, unknown.name if unknown is not None else None
    seconds = time.perf_counter() - started
    networks = list(map(str, given.networks)) if given.networks else [given.model]
    about: dict[str, Any] = {"networks": networks, "posteriors": [p and _described(p) for p in fitted]}
    about |= {"data": names[0], "ood": names[1], "draws": draws, "seed": seed, "augment": augment}
    scores = score(found)
    names_of = subjects[0].classes or known.classes
    covered = None
    if len(subjects) == 1 and fitted[0] is not None and fitted[0].thresholds is not None:
        compare_draws(fitted[0], draws, augment)
        groups = known.groups if group is not None else None
        about["sets"], covered = _covered(fitted[0].thresholds, found, names_of, groups)
    if folder is None:
        shown = tabulate(scores, *names)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        title = f"trained on {subjects[0].data}, tested on {ood}" if subjects[0].data else f"tested on {ood}"
        shown = write(folder, about, found, *names, title, scores=scores)
    if covered is not None:
        shown = [*shown, covered]
    show(shown)
    reading = None if fitted[0] is None else compared(subjects[0], fitted[0], stream_of(subjects[0], data), seed=seed)
    if report_file is not None:
        title = f"{', '.join(dict.fromkeys(subject.name for subject in subjects))} on {names[0]}"
        described = facts(about, seconds, shlex.join(["stochbn", *sys.argv[1:]]), about_data(fitted[0], reading))
        drawn = [one for one in fitted if one is not None]
        cost = _cost(subjects[0], fitted[0], known, draws, changes)
        head = chosen(fitted, draws, augment, cost)
        made = page_of(
            title, found, scores, shown, names, shown_objects, names_of, described, posteriors=drawn, head=head
        )
        write_page(report_file, made)
        say(f"The report is {report_file}; open it in a browser.", report_file)
    if folder is not None:
        say(f"Results are in {folder}.", folder)
    if reading is not None and (warned := alarm(given, reading, data, named[0])):
        warnings.warn(warned, stacklevel=2)
    if fitted[0] is not None and (about_them := about_sets(fitted[0])):
        say(about_them)
    say(after_evaluating(given, made_worse(scores), fitted, named, augment))


def _cost(subject: Subject, posterior: Posterior | None, data: Any, draws: int, changes: Any) -> str:
    """What a prediction costs, as 'stochbn predict' makes it, in words."""
    import torch

    from stochbn import Predictive
    from stochbn.measuring.timing import median_seconds
    from stochbn.report.chosen import cost_words

    inputs, labels = next(iter(data.batches(COSTED)))
    inputs, count = (
        (inputs[:COSTED], min(COSTED, len(labels))) if isinstance(inputs, torch.Tensor) else (inputs, len(labels))
    )
    works: dict[str, Any] = {"plain": Predictive(subject.model, **subject.settings)}
    if posterior is not None:
        works["SBN"] = Predictive(subject.model, posterior, draws, augment=changes, **subject.settings)
    seconds = median_seconds({name: functools.partial(one, inputs) for name, one in works.items()}, 3)
    device = next(subject.model.parameters()).device.type
    place = device if device != "cpu" else f"{torch.get_num_threads()} threads of a CPU"
    return cost_words({name: 1000 * one / count for name, one in seconds.items()}, count, place)


def _covered(
    thresholds: Thresholds, found: Sequence[Method], names: Sequence[str], groups: Sequence[str] | None
) -> tuple[list[Any], Table | None]:
    """How often the prediction sets of SBN hold the truth: as rows, and as a table; with dropout there are none."""
    from stochbn.predictions import Prediction
    from stochbn.report.coverage import Coverage, coverage_table, coverages

    method = next((one for one in found if one.sbn and one.name == "plain"), None)
    if method is None:
        return [], None
    coverage = Coverage(thresholds)
    coverage.add(Prediction(method.known, method.known), method.labels, groups)
    rows = coverages(coverage.joined(), thresholds.sets, names, thresholds.by)
    return rows, coverage_table(rows, thresholds)


def _evaluate_task(
    subject: Subject,
    posterior: Posterior | None,
    data: str | None,
    ranks: Ranks,
    changes: Any,
    asked: dict[str, Any],
    folder: Path | None,
    report_file: Path | None,
) -> list[str]:
    """Evaluate a network that gives more or less than one class for each example.

    Returns:
        A sentence about SBN if that made it worse.
    """
    from stochbn.cli.comparing import compare, tabulate
    from stochbn.files import write_bytes, write_json
    from stochbn.posteriors.thresholds import compare_draws
    from stochbn.report.chosen import chosen
    from stochbn.report.coverage import Coverage, coverage_table, coverages
    from stochbn.report.facts import facts
    from stochbn.report.labels import SeenLabels
    from stochbn.report.page import Page, curves_of, write_page
    from stochbn.report.places import SeenPlaces
    from stochbn.report.words import mend, worsened
    from stochbn.tasks import TASKS, Classification, Multilabel

    task = subject.task
    if not task.score_columns:
        takes = ", ".join(name for name, one in TASKS.items() if one.score_columns)
        raise ValueError(f"--task {task.name} has no scores: evaluate takes --task {takes}")
    started = time.perf_counter()
    thresholds = None if posterior is None else posterior.thresholds
    data, ignore = data or subject.data, asked["ignore"]
    known = subject.load(data, "test", group=group_of(posterior))
    names = subject.classes or known.classes
    collected: SeenLabels | SeenPlaces | None = None
    if report_file is not None and isinstance(task, Multilabel):
        collected = SeenLabels(names)
    elif report_file is not None and isinstance(task, Classification):
        collected = SeenPlaces(names, ignore)
    share = _Share(known, ranks).objects
    coverage = None if thresholds is None else Coverage(thresholds, ignore)
    seen = 0

    def watch(method: str, prediction: Any, labels: Tensor) -> None:
        nonlocal seen
        if collected is not None:
            collected.add(method, prediction.probs.movedim(prediction.class_axis, 1), labels)
        if method == "SBN" and coverage is not None and thresholds is not None:
            groups = None if thresholds.by is None else share.groups[seen : seen + len(labels)]
            coverage.add(prediction, labels, groups)
            seen += len(labels)

    with progress_bars() as bars:
        found = compare(
            subject, posterior, share, ranks, draws=asked["draws"], seed=asked["seed"], augment=changes, ignore=ignore,
            progress=follow(bars, "predicting"), watch=watch,
        )  # fmt: skip
    shown, rows = tabulate(found, known.name), list[Any]()
    if coverage is not None and thresholds is not None:
        compare_draws(posterior, asked["draws"], asked["augment"])
        rows = coverages(coverage.joined(ranks.joined), thresholds.sets, names, thresholds.by)
        shown = [*shown, coverage_table(rows, thresholds)]
    show(shown)
    worse = []
    caveat = task.caveat(posterior, [name for one in found.scores.values() for name in one.values])
    if caveat:
        say(caveat)
    change, error = found.change, found.change_se
    if change is not None and error is not None and change > 2 * error:
        worse.append(worsened(f"the mean {found.loss}", change, error))
    parts = None if collected is None else collected.finish(ranks.joined)
    if ranks.rank:
        return worse
    described = posterior and _described(posterior)
    if report_file is not None:
        reading = (
            None if posterior is None else compared(subject, posterior, stream_of(subject, data), seed=asked["seed"])
        )
        made = {"networks": [subject.name], "posteriors": [described], "data": known.name, "ood": None, **asked}
        told = facts(
            made, time.perf_counter() - started, shlex.join(["stochbn", *sys.argv[1:]]), about_data(posterior, reading)
        )
        head = chosen(
            [posterior], asked["draws"], asked["augment"], _cost(subject, posterior, known, asked["draws"], changes)
        )
        sections, curves, said = parts or ([], curves_of(task.panels(found.scores)), [found.summary()])
        said = [*said, *filter(None, [caveat]), *worse, *([mend([posterior])] if worse and posterior else [])]
        title = f"{subject.name} on {known.name}"
        write_page(report_file, Page(title, said, shown, curves, "", (), (), told, head, sections))
        say(f"The report is {report_file}; open it in a browser.", report_file)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        about = {"network": subject.name, "posterior": described, "data": known.name, "task": task.name, **asked}
        about |= {"sets": rows} if rows else {}
        write_json(folder / "results.json", {**about, **found.description()})
        write_bytes(folder / "results.md", "\n\n".join(table.markdown() for table in shown).encode() + b"\n")
        say(f"Results are in {folder}.", folder)
    return worse


class _Share:
    """The share of the examples of a data set that is this rank's.

    Args:
        whole: all of them.
        ranks: the ranks that share them.

    Attributes:
        objects: those of this rank.

    Raises:
        ValueError: there is not one batch for each rank.
    """

    def __init__(self, whole: Any, ranks: Ranks) -> None:
        from stochbn.evaluation.predicting import PREDICT_BATCH

        self.objects, self._ranks = whole, ranks
        if ranks.count == 1:
            return
        if len(whole) < ranks.count:
            raise ValueError(f"{whole.name} has {len(whole)} examples for {ranks.count} ranks; start fewer")
        shard = ranks.rank, ranks.count, min(PREDICT_BATCH, len(whole) // ranks.count)
        self.objects, self._positions = whole.shard(*shard), whole.shard_positions(*shard)
        if not len(self._positions):  # of a user's own loader
            raise ValueError(f"{whole.name} gives fewer batches than the {ranks.count} ranks; start fewer")

    def joined(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the ranks have of their examples, ``[n, ...]``, as one process has it: in the order of all examples."""
        if self._ranks.count == 1:
            return tensors
        joined = self._ranks.joined({**tensors, "positions": self._positions})
        order = joined.pop("positions").argsort()
        return {name: values[order] for name, values in joined.items()}


def _described(posterior: Posterior) -> dict[str, Any]:
    """A posterior's settings as JSON, which has no infinity."""
    size = "inf" if posterior.batch_size == math.inf else posterior.batch_size
    about = {"kind": posterior.kind, "batch_size": size, "temperature": posterior.temperature}
    return {**about, "centre": posterior.centre, "choice": posterior.choice}
