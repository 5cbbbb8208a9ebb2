"""The command that trains a network of the paper's: train."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path
from typing import Annotated

import typer

from stochbn.cli.console import progress_bars, say
from stochbn.cli.inputs import default_posterior, load_images
from stochbn.cli.options import DATA_HELP, Override, Seed
from stochbn.files import check_file

__all__ = ["train"]


def train(
    path: Annotated[Path, typer.Option("--out", help="File for the network (safetensors).")],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    network: Annotated[str, typer.Option(help="Name of the network.")] = "lenet5",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data.")] = 5,
    batch_size: Annotated[int, typer.Option(min=2, help="Objects in a mini-batch.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Adam's, decaying linearly to 0.")] = 1e-3,
    decay: Annotated[str, typer.Option(help="Lower the learning rate each epoch or each step.")] = "step",
    decrease_from: Annotated[int, typer.Option(help="Keep the learning rate for so many epochs first.")] = 0,
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
    precision: Annotated[str, typer.Option(help="Of training: 32-true or bf16-mixed.")] = "32-true",
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile training steps.")] = False,
    seed: Seed = 0,
) -> None:
    """Train a network on images as in the paper: Adam, batch size 16, learning rate decaying to 0.

    Loss and accuracy of every epoch are written beside it, as NETWORK.training.csv.
    """
    from stochbn.paper import checkpoints, networks, training

    log = path.with_name(f"{path.name.removesuffix('.safetensors')}.training.csv")
    check_file(path)
    check_file(log)
    images = load_images(data, "train")
    given = {"width": width, "dropout": dropout or None, "classifier_dropout": classifier_dropout or None, "bias": bias}
    arguments = networks.arguments_for(images) | {name: value for name, value in given.items() if value is not None}
    build = networks.build_with_uniform_scale if uniform_scale else networks.build
    schedule = training.Schedule(
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
        model = training.train(
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
