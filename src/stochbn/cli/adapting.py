"""The command that adapts a posterior to unlabelled examples of data that has changed: adapt."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stochbn.cli.console import say, status
from stochbn.cli.drift import about_sets, adapted_to
from stochbn.cli.following import after_adapting
from stochbn.cli.inputs import default_posterior
from stochbn.cli.job import job
from stochbn.cli.options import Data, Override, PosteriorFile, Seed
from stochbn.cli.streams import stream_of
from stochbn.cli.subject import Given, Subject, about_networks, needs
from stochbn.files import check_file

if TYPE_CHECKING:
    from torch import nn

__all__ = ["adapt"]

ENDING = ".safetensors"


@about_networks()
def adapt(
    given: Given,
    data: Data = None,
    posterior: PosteriorFile = None,
    path: Annotated[
        Path | None,
        Override(
            "--out", help="File for the new posterior. (default: beside the weights, WEIGHTS.adapted.sbn.safetensors)"
        ),
    ] = None,
    weights_out: Annotated[
        Path | None,
        Override(
            "--weights-out",
            help="Also write the network with the adapted statistics, as a .safetensors file for --weights. It needs "
            "no stochbn.",
        ),
    ] = None,
    examples: Annotated[
        int, typer.Option("--examples", min=1, help="Largest number of examples to adapt to. They stay in memory.")
    ] = 512,
    seed: Seed = 0,
) -> None:
    """Adapt a posterior to unlabelled examples of new data, if they look different; write the new posterior.

    Labels are not used. A random sample of the examples is taken, or the first ones of Parquet files and loaders. The
    reference of 'stochbn fit' separates a change of the look of inputs from a change of the mix of classes. The command
    prints which it found. Under torchrun each rank takes a share of the examples.
    """
    beside = given.networks[0] if given.networks else given.weights
    if path is None and beside is None:
        raise ValueError(needs("--out"))
    target = path or default_posterior(beside or Path()).with_suffix("").with_suffix(f".adapted.sbn{ENDING}")
    fitted_in = posterior or (default_posterior(beside) if beside is not None else None)
    inputs = [*given.files, data, fitted_in]
    if path is not None or (beside is not None and beside.exists()):  # a missing network raises below
        check_file(target, inputs)
    if weights_out is not None:
        if weights_out.suffix != ENDING:
            raise ValueError(f"--weights-out must end in {ENDING}, got {str(weights_out)!r}")
        check_file(weights_out, inputs)
        if weights_out.resolve() == target.resolve():
            raise ValueError(f"--out and --weights-out are both {str(target)!r}; name two files")
    with job() as ranks, ranks.failing_together():
        subject = Subject.held(given, posterior)
        fitted = subject.need_posterior(posterior)
        stream = stream_of(subject, data)
        with status(f"adapting {subject.name}"):
            adapted = adapted_to(subject, fitted, stream, examples, seed, ranks)
        if ranks.rank:
            return
        if weights_out is not None:
            _write_network(given, adapted.write_to(subject.model), weights_out)
        adapted.save(target)
    if about := about_sets(adapted):
        warnings.warn(about, stacklevel=2)
    say(f"{adapted.adaptation}\nSaved the posterior as {target}.", target)
    if weights_out is not None:
        what = "network" if given.networks else "weights"
        say(f"Saved the network with these statistics as {weights_out}; use it in place of the {what}.", weights_out)
    say(after_adapting(given, data, target, adapted.thresholds))


def _write_network(given: Given, model: nn.Module, path: Path) -> None:
    """Write a network as the command line reads it again: its state dict, or a file like that of 'paper train'."""
    from stochbn.files import write_bytes

    if given.networks:
        from stochbn.sources import checkpoints

        checkpoints.save(path, replace(checkpoints.load(given.networks[0]), model=model))
        return
    import safetensors.torch

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_bytes(path, safetensors.torch.save(tensors))
