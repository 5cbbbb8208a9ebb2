"""The evaluation by the scores of a task, and not by those of one class for each example."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stochbn.cli.console import follow, progress_bars, say, show
from stochbn.cli.drift import about_data, compared, group_of
from stochbn.cli.evaluated import Share, cost, described
from stochbn.cli.streams import stream_of
from stochbn.cli.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor

    from stochbn.distributed import Ranks
    from stochbn.posteriors import Posterior
    from stochbn.report.page import Curve, Section
    from stochbn.tasks import Detection, Task

__all__ = ["evaluate_task", "scored_by_task"]


def scored_by_task(task: Task) -> bool:
    """Whether a task has scores or figures of its own, beside those of one class for each example."""
    from stochbn.tasks import Classification

    own = ("scores", "score_columns", "panels")
    return not task.one_class or any(getattr(type(task), name) is not getattr(Classification, name) for name in own)


def evaluate_task(
    subject: Subject,
    posterior: Posterior | None,
    data: str | None,
    ranks: Ranks,
    changes: Any,
    asked: dict[str, Any],
    folder: Path | None,
    report_file: Path | None,
    *,
    dense: bool,
) -> list[str]:
    """Evaluate a network by the scores of its task.

    Returns:
        A sentence about SBN if that made it worse.
    """
    from stochbn.cli.comparing import compare, tabulate
    from stochbn.files import write_bytes, write_json
    from stochbn.posteriors.thresholds import compare_draws
    from stochbn.report.chosen import chosen
    from stochbn.report.coverage import Coverage, coverage_table, coverages
    from stochbn.report.detections import SeenPictures, detection_parts
    from stochbn.report.facts import facts
    from stochbn.report.labels import SeenLabels
    from stochbn.report.objects import source_of
    from stochbn.report.page import Page, curves_of, write_page
    from stochbn.report.places import SeenPlaces
    from stochbn.report.words import mend, worsened
    from stochbn.tasks import TASKS, Detection, Multilabel

    task = subject.task
    if not task.score_columns:
        takes = ", ".join(name for name, one in TASKS.items() if one.score_columns)
        raise ValueError(f"--task {task.name} has no scores: evaluate takes --task {takes}")
    started = time.perf_counter()
    thresholds = None if posterior is None else posterior.thresholds
    data, ignore = data or subject.data, asked["ignore"]
    known = subject.load(data, "test", labelled=not dense, group=group_of(posterior))
    names = subject.classes or known.classes
    share = Share(known, ranks).objects
    collected: SeenLabels | SeenPlaces | SeenPictures | None = None
    if report_file is not None and isinstance(task, Multilabel):
        collected = SeenLabels(names)
    elif report_file is not None and dense and task.one_class:
        collected = SeenPlaces(names, ignore)
    elif report_file is not None and isinstance(task, Detection):
        collected = SeenPictures(source_of(share), names)
    coverage = None if thresholds is None else Coverage(thresholds, ignore)
    seen = 0

    def watch(method: str, inputs: Any, prediction: Any, labels: Tensor) -> None:
        nonlocal seen
        if isinstance(task, Detection) and not subject.classes:
            _check_numbering(task, prediction.anchors.shape[1] - 4, known.classes, known.name)
        if isinstance(collected, SeenPictures):
            collected.add(method, inputs, prediction, labels)
        elif collected is not None:
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
    if (one := found.changed) is not None and one.worse:
        worse.append(worsened(f"the {one.what}", abs(one.change), one.error))
    parts: tuple[list[Section], list[Curve], list[str]] = [], [], []
    if isinstance(collected, (SeenLabels, SeenPlaces)):
        parts = collected.finish(ranks.joined)
    if ranks.rank:
        return worse
    settings = posterior and described(posterior)
    if report_file is not None:
        reading = (
            None if posterior is None else compared(subject, posterior, stream_of(subject, data), seed=asked["seed"])
        )
        made = {"networks": [subject.name], "posteriors": [settings], "data": known.name, "ood": None, **asked}
        told = facts(
            made, time.perf_counter() - started, shlex.join(["stochbn", *sys.argv[1:]]), about_data(posterior, reading)
        )
        head = chosen(
            [posterior], asked["draws"], asked["augment"], cost(subject, posterior, known, asked["draws"], changes)
        )
        if isinstance(collected, SeenPictures):
            parts = detection_parts(found.scores, names, collected)
        sections, curves, said = parts
        curves = [*curves, *curves_of(task.panels(found.scores))]
        said = [
            found.summary(),
            *said,
            *filter(None, [caveat]),
            *worse,
            *([mend([posterior])] if worse and posterior else []),
        ]
        title = f"{subject.name} on {known.name}"
        write_page(report_file, Page(title, said, shown, curves, "", (), (), told, head, sections))
        say(f"The report is {report_file}; open it in a browser.", report_file)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        about = {"network": subject.name, "posterior": settings, "data": known.name, "task": task.name, **asked}
        about |= {"sets": rows} if rows else {}
        write_json(folder / "results.json", {**about, **found.description()})
        write_bytes(folder / "results.md", "\n\n".join(table.markdown() for table in shown).encode() + b"\n")
        say(f"Results are in {folder}.", folder)
    return worse


def _check_numbering(task: Detection, count: int, known: tuple[str, ...], name: str) -> None:
    """Refuse named classes of data that may be numbered otherwise than those of a network whose classes have no names.

    Args:
        task: the task.
        count: K, of the network.
        known: the names in the data.
        name: of the data.

    Raises:
        ValueError: there are not as many, the one for no object aside.
    """
    fits = {count, count - 1} if task.background is not None and task.background % count == count - 1 else {count}
    if known and len(known) not in fits:
        raise ValueError(
            f"{name} has {len(known)} classes, numbered from 0 in the order of their ids, and the network has {count}: "
            "name the network's classes in its module, with classes = [...], so that each is found by its name"
        )
