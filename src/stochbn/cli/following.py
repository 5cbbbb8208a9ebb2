"""What to run next: commands that can be copied, with the options that were given."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stochbn.cli.subject import ANEW, SHARED, Given, task_given
from stochbn.report.words import mend

if TYPE_CHECKING:
    from stochbn.posteriors import Posterior
    from stochbn.posteriors.thresholds import Thresholds
    from stochbn.tasks import Task

__all__ = ["after_adapting", "after_calibrating", "after_evaluating", "after_fitting", "command"]


def command(name: str, given: Given, *, network: Path | None = None, **options: object) -> str:
    """A command about the same network, as it is typed.

    Args:
        name: of the command.
        given: the options about the network.
        network: one of several.
        options: others, with underscores for dashes; None are left out, words in capitals are to be filled in.
    """
    networks = [network] if network is not None else given.networks or []
    words = ["stochbn", name, *map(str, networks)]
    shared = {} if networks else {field: getattr(given, field) for field in SHARED if field not in ANEW}
    if shared.get("label") and shared["label"][0].endswith(".json"):  # a file about other pictures
        shared["label"] = ["BOXES.json"] if name == "evaluate" else None
    for field, value in {**shared, **options}.items():
        option = f"--{field.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is False and field == "exif":
            words.append("--no-exif")
        elif value is not None and value is not False:
            for one in value if isinstance(value, list) else [value]:
                words += [option, str(one)]
    return shlex.join(words)


def after_fitting(given: Given, beside: Path | None, path: Path, augment: str | None) -> str:
    """What to run on a posterior that was fitted.

    Args:
        given: the options about the network.
        beside: where its posterior is looked for if none is named.
        path: where it is.
        augment: the augmentation that it was fitted with.
    """
    again = after_calibrating(given, beside, path, augment)
    if not task_given(given).score_columns:
        posterior = None if path == beside else path
        options: dict[str, Any] = {"out": "predictions.parquet", "posterior": posterior, "augment": augment}
        return f"Next: {command('predict', given, data='NEW-DATA', **options)}"
    if not _has_labels(given):
        return again
    chosen = _calibrate(given, None, None if path == beside else path, augment)
    choose = "choose between the plain network, a temperature and draws on data that it was not trained on"
    if task_given(given).fits_residual:
        choose = "fit the variance of an observation, and choose whether to draw, on data that it was not trained on"
    return f"Next, {choose}: {chosen}\nOr use it as it is. {again}"


def after_calibrating(
    given: Given,
    beside: Path | None,
    path: Path,
    augment: str | None,
    *,
    dense: bool = False,
    ignore: int | None = None,
) -> str:
    """What to run on a posterior with the noise that is wanted.

    Args:
        given: the options about the network.
        beside: where its posterior is looked for if none is named.
        path: where it is.
        augment: the augmentation that it is for.
        dense: whether the network gives a class for each place.
        ignore: a label of what does not count.
    """
    data = None if given.networks else "TEST-DATA"
    posterior = None if path == beside else path
    options: dict[str, Any] = {"data": data, "posterior": posterior, "augment": augment}
    return f"Next: {command('evaluate', given, **options, dense=dense, ignore=ignore)}"


def after_adapting(given: Given, data: str | None, path: Path, sets: Thresholds | None = None) -> str:
    """What to run on a posterior that was adapted.

    Args:
        given: the options about the network.
        data: what it was adapted to, if it was named.
        path: where it is.
        sets: its thresholds of prediction sets from before, if it has any.
    """
    predict = command("predict", given, data=data, split=given.split, out="predictions.parquet", posterior=path)
    evaluate = command("evaluate", given, data="LABELLED-NEW-DATA", posterior=path)
    said = f"Next: {predict}\nOr, if some of the new data has labels: {evaluate}"
    if sets is not None:
        made = _as_asked(sets, task_given(given))
        again = command("conformal", given, held_out="LABELLED-NEW-DATA", posterior=path, **made)
        said += f"\nWith labels, compute the thresholds of prediction sets again: {again}"
    return said


def _as_asked(sets: Thresholds, task: Task) -> dict[str, Any]:
    """The options of 'stochbn conformal' that thresholds were made with; a label to ignore is not kept with them."""
    rule: Any = sets.sets
    dense = rule.kind == "labels" and task.one_class
    methods = {"labels": None, "quantiles": "cqr", "intervals": None if getattr(rule, "scaled", True) else "absolute"}
    asked = {
        "coverage": f"{rule.coverage:g}",
        "by": "class" if getattr(rule, "by_class", False) else sets.by,
        "method": methods.get(rule.kind, getattr(rule, "method", None)),
        "dense": dense,
        "mask": getattr(rule, "mask", None),
        "draws": sets.draws,
        "augment": sets.augment,
    }
    usual = {"coverage": "0.9", "method": "lac", "draws": 50}
    return {name: None if value == usual.get(name) else value for name, value in asked.items()}


def after_evaluating(
    given: Given,
    worse: Sequence[str],
    fitted: Sequence[Posterior | None],
    posteriors: Sequence[Path | None],
    augment: str | None,
    ignore: int | None = None,
    *,
    dense: bool = False,
) -> str:
    """What to run after an evaluation: what mends a posterior that made probabilities worse, where one did.

    Args:
        given: the options about the networks.
        worse: sentences about methods that SBN made worse.
        fitted: the posterior of each network.
        posteriors: their files, where they were named.
        augment: the augmentation that was drawn.
        ignore: a label of what did not count.
        dense: whether the network gives a class for each place.
    """
    networks: list[Path | None] = list(given.networks) if given.networks else [None]
    lines, data = [], None if given.networks else "TRAINING-DATA"
    if None in fitted:
        lines.append("Networks without a posterior were evaluated without SBN only. Next, fit one:")
    for network, posterior in zip(networks, fitted, strict=True):
        if posterior is None:
            out = None if network is not None or given.weights is not None else "POSTERIOR"
            lines.append(f"    {command('fit', given, network=network, data=data, out=out)}")
    if worse:
        scored = _has_labels(given)
        commands = []
        for network, posterior, path in zip(networks, fitted, posteriors, strict=True):
            if posterior is None or posterior.choice:
                continue
            if scored:
                commands.append(_calibrate(given, network, path, augment, ignore))
            elif not posterior.noiseless:
                size = 64 if posterior.batch_size is None else max(64, int(4 * posterior.batch_size))
                options = {"data": data, "batch_size": size, "out": path, "augment": augment}
                commands.append(command("fit", given, network=network, **options))
        advice = mend([one for one in fitted if one is not None], labelled=scored)
        lines.append(" ".join([*worse, advice, *(["Then evaluate again:"] if commands else [])]))
        lines += [f"    {one}" for one in commands]
    if not lines:
        options = {"data": "NEW-DATA", "out": "predictions.csv", "posterior": posteriors[0], "augment": augment}
        options |= {"masks": "MASKS"} if dense else {}
        lines.append(f"Next: {command('predict', given, network=networks[0], **options)}")
    return "\n".join(lines)


def _has_labels(given: Given) -> bool:
    """Whether `calibrate` takes the network's task."""
    return bool(task_given(given).calibrated_by)


def _calibrate(
    given: Given, network: Path | None, posterior: Path | None, augment: str | None, ignore: int | None = None
) -> str:
    """The command that chooses the noise; named data sets have no split that is called held out, so one is named."""
    split = "SPLIT" if given.networks else None
    return command(
        "calibrate",
        given,
        network=network,
        held_out="HELD-OUT-DATA",
        split=split,
        posterior=posterior,
        augment=augment,
        ignore=ignore,
    )
