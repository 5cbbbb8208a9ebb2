"""The command that scores a network and its posterior on labelled data: evaluate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stochbn.cli.console import follow, progress_bars, say, show
from stochbn.cli.job import job
from stochbn.cli.options import Augmentation, Data, Draws, Seed
from stochbn.cli.subject import Given, Subject, about_networks
from stochbn.files import check_folder

if TYPE_CHECKING:
    from stochbn.distributed import Ranks
    from stochbn.posteriors import Posterior

__all__ = ["evaluate"]


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
            help="A posterior for each network, in their order. (default: those beside the weights, where they exist)",
            show_default=False,
        ),
    ] = None,
    draws: Draws = 50,
    augment: Augmentation = None,
    seed: Seed = 0,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for results.json, results.md and figure.", show_default=False)
    ] = None,
) -> None:
    """Error, NLL and calibration on test data, and detection of unknown classes, without and with SBN.

    Of networks that 'stochbn train' saved, those with dropout keep it on (MC Dropout), and several are also evaluated
    as an ensemble. With --augment, draws of SBN change their inputs too; choose noise and temperature for that with
    'stochbn calibrate --augment'.
    """
    from stochbn import augment as augmentations
    from stochbn.paper import report
    from stochbn.paper.folders import RESULTS
    from stochbn.paper.predicting import has_dropout, predict_member

    changes = augmentations.named(augment) if augment is not None else None
    if folder is not None:
        check_folder(folder, *RESULTS)
    paths: list[Path | None] = list(given.networks) if given.networks else [None]
    named: list[Path | None] = list(posteriors) if posteriors else [None] * len(paths)
    if len(named) != len(paths):
        raise ValueError(f"got {len(named)} posteriors for {len(paths)} networks; name one for each, or none")
    with job() as ranks, ranks.failing_together():
        subjects = Subject.all_of(given)
        if any(
            subject.settings.get("task", "classification") not in ("classification", "binary") for subject in subjects
        ):
            raise ValueError(
                "evaluate scores classes: it takes --task classification or binary; use predict for others"
            )
        fitted = [subject.find_posterior(path) for subject, path in zip(subjects, named, strict=True)]
        data = data or subjects[0].data
        known, *_ = [subject.load(data, "test", labelled=True) for subject in subjects]  # each checks that it fits
        unknown, *_ = [subject.load(ood, "test", "--ood") if ood else None for subject in subjects]
        if ranks.count > 1:
            known, unknown = (objects and _shard(objects, ranks) for objects in (known, unknown))
        predictions: dict[bool, list[Any]] = {False: [], True: []}
        with progress_bars() as bars:
            for subject, path, posterior in zip(subjects, paths, fitted, strict=True):
                move = follow(bars, f"predicting, {path.name if path is not None else subject.name}")
                dropout = has_dropout(subject.model) if subject.dropout is None else subject.dropout
                predictions[dropout].append(
                    ranks.joined(
                        predict_member(
                            subject.model,
                            posterior,
                            known,
                            unknown,
                            draws,
                            seed,
                            move,
                            dropout=dropout,
                            augment=changes,
                            **subject.settings,
                        )
                    )
                )
    if ranks.rank:
        return
    found = report.methods(predictions[False], predictions[True])
    names = known.name, unknown.name if unknown is not None else None
    if folder is None:
        shown = report.tabulate(report.score(found), *names)
    else:
        described = [p and _described(p) for p in fitted]
        networks = list(map(str, given.networks)) if given.networks else [given.model]
        about: dict[str, Any] = {"networks": networks, "posteriors": described}
        about |= {"data": names[0], "ood": names[1], "draws": draws, "seed": seed}
        about |= {"augment": augment}
        folder.mkdir(parents=True, exist_ok=True)
        title = f"trained on {subjects[0].data}, tested on {ood}" if subjects[0].data else f"tested on {ood}"
        shown = report.write(folder, about, found, *names, title)
    show(shown)
    if None in fitted:
        say("Networks without a posterior were evaluated without SBN only: run 'stochbn fit' on them first.")
    if folder is not None:
        say(f"Results are in {folder}.", folder)


def _shard(objects: Any, ranks: Ranks) -> Any:
    """The share of objects that is this rank's.

    Raises:
        ValueError: there is not one for each rank.
    """
    from stochbn.paper.predicting import PREDICT_BATCH

    if len(objects) < ranks.count:
        raise ValueError(f"{objects.name} has {len(objects)} objects for {ranks.count} ranks; start fewer")
    return objects.shard(ranks.rank, ranks.count, min(PREDICT_BATCH, len(objects) // ranks.count))


def _described(posterior: Posterior) -> dict[str, Any]:
    """A posterior's settings as JSON, which has no infinity."""
    size = "inf" if posterior.batch_size == math.inf else posterior.batch_size
    return {"kind": posterior.kind, "batch_size": size, "temperature": posterior.temperature}
