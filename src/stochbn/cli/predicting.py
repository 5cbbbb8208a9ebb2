"""The command that scores data of any length with a network and its posterior: predict."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stochbn.cli.console import follow, progress_bars, say, show, status
from stochbn.cli.drift import about_sets, adapted_to, alarm, compared, group_of, recorded
from stochbn.cli.options import Augmentation, Data, Draws, Override, PosteriorFile, Seed
from stochbn.cli.own_data import numbers_of, size_of
from stochbn.cli.streams import stream_of
from stochbn.cli.subject import Given, Subject, about_networks, settings_of

if TYPE_CHECKING:
    from torch import nn


__all__ = ["predict"]

SHOWN = 5
"""Rows that are shown: those with the largest uncertainty."""


@about_networks()
def predict(
    given: Given,
    path: Annotated[
        str,
        typer.Option(
            "--out",
            help="CSV or Parquet file (by its ending) for a row for each example, or a URL such as s3://bucket/p.csv.",
        ),
    ],
    data: Data = None,
    posterior: PosteriorFile = None,
    draws: Draws = 50,
    tolerance: Annotated[
        float | None,
        Override(
            "--tolerance",
            help="Sampling stops for an example when the standard error of its probabilities is below this; 0 makes "
            "all draws. (default: each batch is as accurate as --draws independent draws)",
        ),
    ] = None,
    augment: Augmentation = None,
    adapt: Annotated[
        int | None,
        Override(
            "--adapt",
            min=1,
            help="First adapt to at most this many of the examples, such as 512; see 'stochbn adapt'.",
        ),
    ] = None,
    seed: Seed = 0,
    top: Annotated[
        int, typer.Option("--top", min=1, help="Number of most probable classes to write for each example.")
    ] = 1,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Examples in a forward pass.")] = 250,
    part: Annotated[int, typer.Option("--part", min=1, help="Rows to write at a time, in whole batches.")] = 4000,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Stop at an example that cannot be read, instead of writing a row with an error."
        ),
    ] = False,
    masks: Annotated[
        Path | None,
        typer.Option("--masks", help="Folder for PNG images of class and entropy, for dense outputs."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="local, or ray: predict Parquet files on the workers of a Ray cluster, or of this machine."),
    ] = "local",
    workers: Annotated[int, typer.Option("--workers", min=1, help="Number of workers of --engine ray.")] = 1,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the network first, which takes 5 to 100 seconds; for jobs of many minutes. On a CPU this "
            "needs a C++ compiler, and applies only to passes that are not in bfloat16, which is as fast.",
        ),
    ] = False,
) -> None:
    """Predict data of any length with SBN; write class, probability, entropy and mutual information of each example.

    Regression writes mean and standard deviation. Detection writes boxes in pixels of the pictures or, if the network
    has a preprocess function of its own, of its input. If the posterior has thresholds of 'stochbn conformal', there is
    also a column 'set' of classes or labels, or columns 'low' and 'high' of numbers, and with --masks images of the
    sets.

    If it is stopped or killed, run it again to continue. Rows are kept in OUT.parts until all are written. Data (of
    Parquet) and OUT may be URLs, such as s3:// with the package s3fs; OUT.parts is then in the current folder.

    If the posterior has a reference (the default of 'stochbn fit'), one additional pass over at most 256 examples
    checks whether the data is like the training data. A warning at the end says if it is not.
    """
    from stochbn.augment import named
    from stochbn.deploy.engine import check_ray, ray_engine
    from stochbn.files import check_folder
    from stochbn.posteriors.thresholds import compare_draws
    from stochbn.predictive import Predictive
    from stochbn.report.tables import Table
    from stochbn.scoring import check_table, part_size, score
    from stochbn.sources import ParquetObjects, stored

    if engine not in ("local", "ray"):
        raise ValueError(f"--engine must be local or ray, got {engine!r}")
    if adapt is not None and engine == "ray":
        raise ValueError(
            "--adapt is for --engine local, as each worker of Ray loads the posterior from its file: run 'stochbn "
            "adapt' first, and name its file with --posterior"
        )
    if compiled and engine == "ray":
        raise ValueError("--compile is for --engine local; leave one of them out")
    if workers > 1 and engine != "ray":
        raise ValueError(f"--workers {workers} needs --engine ray")
    changes = named(augment) if augment is not None else None
    with stored(path) as table:
        check_table(table, [*given.files, data, posterior])
        if masks is not None:
            check_folder(masks)
            if engine == "ray":
                raise ValueError("--masks needs --engine local")
        if engine == "ray":
            check_ray()
        subject = Subject.held(given, posterior)
        fitted = subject.need_posterior(posterior)
        stream = stream_of(subject, data, engine, group_of(fitted))
        reading = None
        if adapt is not None:
            with status("adapting"):
                fitted = adapted_to(subject, fitted, stream, adapt, seed)
        elif engine == "local":
            reading = compared(subject, fitted, stream, batch, seed)
        compare_draws(fitted, draws, augment)
        predictive = Predictive(
            subject.model, fitted, draws, tolerance=tolerance, augment=changes, compile=compiled, **subject.settings
        )
        chosen: dict[str, Any] = {"draws": draws, "tolerance": tolerance, "augment": augment}
        read = {field.name: str(getattr(given, field.name)) for field in fields(given)}
        read |= {"masks": str(masks), "adapt": str(adapt)}
        fitted_in = posterior or subject.posterior
        files = {"weights": _digest(subject.model), "posterior": _digest(fitted_in)}
        elsewhere = None
        if engine == "ray":
            assert isinstance(stream, ParquetObjects)
            assert fitted_in is not None
            scorer = {**_scorer(given, fitted_in), **chosen, "top": top, "seed": seed}
            elsewhere = ray_engine(stream, scorer, batch, part_size(part, batch), workers)
        with progress_bars() as bars:
            found = score(
                predictive,
                stream,
                table,
                settings={**read, **files, **chosen, "data": getattr(stream, "name", data), "files": _state(data)},
                about={**chosen, "seed": seed, **recorded(fitted, reading)},
                classes=subject.classes,
                top=top,
                batch=batch,
                part=part,
                seed=seed,
                strict=strict,
                masks=masks,
                progress=follow(bars, "predicting"),
                engine=elsewhere,
                uncertainty=subject.task.uncertainty,
                shown=SHOWN,
            )
    least = found.least
    if least:
        columns = [column for column in least[0] if column != "error"]
        cells = [[_shown(row[column]) for column in columns] for row in least]
        title = f"least certain, by {str(found.ranked_by).replace('_', ' ')}"
        show([Table(title, [column.replace("_", " ") for column in columns], cells)])
    if fitted.noiseless and fitted.choice and changes is None:
        nothing = ", so mutual information is 0" if least and "mutual_information" in least[0] else ""
        say(f"One pass without draws{nothing}. {fitted.choice}")
    if adapt is not None:
        say(f"The posterior was adapted to this data first. {fitted.adaptation}")
    if about_them := about_sets(fitted):
        say(about_them)
    if least and (caveat := subject.task.caveat(fitted, least[0])):
        say(caveat)
    units = "; entropies are in nats" if least and any("entropy" in column for column in least[0]) else ""
    say(f"Saved {found.rows} predictions as {path}{units}.", path)
    if found.failed:
        say(f"{found.failed} examples could not be read: the column 'error' says why.")
    told = alarm(given, reading, data, posterior) if reading is not None else None
    if told is not None:
        warnings.warn(told, stacklevel=2)


def _scorer(given: Given, posterior: Path) -> dict[str, Any]:
    """The arguments of a `stochbn.deploy.Scorer` for the network that is given."""
    from stochbn.sources import parse_arguments

    return {
        "model": given.model,
        "weights": None if given.weights is None else str(given.weights.absolute()),
        "weights_key": given.weights_key,
        "posterior": str(posterior.absolute()),
        "arguments": parse_arguments(given.model_arg or ()),
        "size": size_of(given.size),
        "mean": numbers_of("--mean", given.mean),
        "std": numbers_of("--std", given.std),
        "settings": settings_of(given),
    }


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _state(data: str | None) -> str | None:
    """A checksum of names, sizes and times of the files of a path; None for data of another kind."""
    path = Path(data or "")
    if data is None or not path.exists():
        return None
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    found = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(found).encode(errors="surrogateescape")).hexdigest()


def _digest(what: nn.Module | Path | None) -> str:
    """A checksum of a network's state, or of a file."""
    import safetensors.torch

    digest = hashlib.sha256()
    if isinstance(what, Path):
        digest.update(what.read_bytes())
    elif what is not None:
        for name, tensor in what.state_dict().items():
            digest.update(name.encode())
            digest.update(safetensors.torch.save({"": tensor.detach().cpu().contiguous().clone()}))
    return digest.hexdigest()
