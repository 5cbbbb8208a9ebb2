"""The commands that use a network and its posterior on data: evaluate and predict."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, Any

import typer

from stochbn.cli.console import follow, progress_bars, say, show
from stochbn.cli.inputs import check_images, default_posterior, find_posterior, load_images
from stochbn.cli.options import DataFromNetwork, Draws, NetworkFile, NetworkFiles, PosteriorFile, Seed
from stochbn.files import check_file, check_folder, write_bytes

__all__ = ["evaluate", "predict"]


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
            help="A posterior for each network, in their order. (default: NETWORK.sbn.safetensors where it exists)",
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
    from stochbn.paper.folders import RESULTS
    from stochbn.paper.runner import has_dropout, predict_member

    if folder is not None:
        check_folder(folder, *RESULTS)
    named: list[Path | None] = list(posteriors) if posteriors else [None] * len(networks)
    if len(named) != len(networks):
        raise ValueError(f"got {len(named)} posteriors for {len(networks)} networks; name one for each, or none")
    loaded = [checkpoints.load(path) for path in networks]
    fitted = [find_posterior(path, given) for path, given in zip(networks, named, strict=True)]
    known = load_images(data or loaded[0].data, "test")
    unknown = load_images(ood, "test") if ood else None
    for checkpoint in loaded:
        check_images(checkpoint, known, labelled=True)
        if unknown is not None:
            check_images(checkpoint, unknown)
    predictions: dict[bool, list[Any]] = {False: [], True: []}
    with progress_bars() as bars:
        for path, checkpoint, posterior in zip(networks, loaded, fitted, strict=True):
            move = follow(bars, f"predicting, {path.name}")
            predictions[has_dropout(checkpoint.model)].append(
                predict_member(checkpoint.model, posterior, known, unknown, draws, seed, move)
            )
    found = report.methods(predictions[False], predictions[True])
    names = known.name, unknown.name if unknown is not None else None
    if folder is None:
        shown = report.tabulate(report.score(found), *names)
    else:
        described = [p and {"kind": p.kind, "batch_size": p.batch_size, "temperature": p.temperature} for p in fitted]
        about: dict[str, Any] = {"networks": list(map(str, networks)), "posteriors": described}
        about |= {"data": names[0], "ood": names[1], "draws": draws, "seed": seed}
        folder.mkdir(parents=True, exist_ok=True)
        shown = report.write(folder, about, found, *names, f"trained on {loaded[0].data}, tested on {ood}")
    show(shown)
    if None in fitted:
        say("Networks without a posterior were evaluated without SBN only: run 'stochbn fit' on them first.")
    if folder is not None:
        say(f"Results are in {folder}.", folder)


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
    from stochbn.paper.tables import Table
    from stochbn.predictive import Predictive

    check_file(path)
    checkpoint = checkpoints.load(network)
    fitted = find_posterior(network, posterior)
    if fitted is None:
        raise FileNotFoundError(
            f"there is no posterior {str(default_posterior(network))!r}: run 'stochbn fit' on the network first, or "
            "name one with --posterior"
        )
    predictive = Predictive(checkpoint.model, fitted, draws)
    images = load_images(data or checkpoint.data, split)
    check_images(checkpoint, images)
    with progress_bars() as bars:
        generator = torch.Generator().manual_seed(seed)
        prediction = predict_all(predictive, images, generator, follow(bars, "predicting"))
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
    least = sorted(range(len(rows)), key=lambda i: -rows[i][2])[:5]
    table = Table(
        "least certain",
        ["image", "class", "probability", "entropy", "mutual information"],
        [[str(i), rows[i][0], *(f"{value:.3f}" for value in rows[i][1:])] for i in least],
    )
    show([table])
    say(f"Saved {len(rows)} predictions as {path}; entropies are in nats.", path)
