"""Training classifiers on images that lie in memory as one tensor: one network, or several side by side."""

from __future__ import annotations

import ctypes
import functools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from stochbn.files import read_tensors, write_tensors
from stochbn.paper.schedule import Schedule
from stochbn.paper.trainee import Trainee, augment, wait
from stochbn.sources.named import Images

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["TOGETHER", "augmented", "keep_freed_memory", "train", "train_together"]

WEIGHTS = "stochbn.weights/1"
TOGETHER = ("32-true", "bf16-mixed")
"""The arithmetic that PyTorch does alone, and several networks side by side; Lightning Fabric does the rest."""
REPORT_EVERY = 50
REPORT_EVERY_ON_A_GPU = 200
"""Steps: the processor waits for a GPU at each report."""

Report = Callable[[int, int, float], None]
"""Called with the step, the number of steps and the mean loss in nats since the last call."""


def _silent(step: int, steps: int, loss: float) -> None:
    """A report that says nothing; other processes can have it."""


def train(
    build: Callable[[], nn.Module],
    images: Images,
    schedule: Schedule,
    *,
    held_out: Images | None = None,
    state: Path | None = None,
    log: Path | None = None,
    report: Report = _silent,
) -> nn.Module:
    """Train a network and return it on the CPU in evaluation mode.

    It trains on the accelerator if there is one, with all images there as one tensor. Everything random depends on the
    seed alone: two runs on a CPU with the same number of threads give the same network. PyTorch's global generator is
    left as it was.

    Args:
        build: makes the network with fresh weights, which come from the seed.
        images: the training data.
        schedule: how long, in which batches and at which rate.
        held_out: images to predict after every epoch, for the log; training does not depend on them.
        state: a file that holds the state after the last finished epoch but the last; a run that was stopped
            continues from there and gives what an uninterrupted one would. The caller deletes it once the network
            is saved.
        log: a CSV file that gets a line for every epoch, see `Epoch`.
        report: called about every 50 steps, 200 on a GPU; with several processes it must be picklable.

    Raises:
        ValueError: fewer images than one batch, or the loss is not finite.
    """
    if schedule.processes == 1 and schedule.precision in TOGETHER:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        (model,) = train_together(
            [build], images, [schedule], device, held_out=held_out, states=[state], logs=[log], report=report
        )
        return model
    _per_epoch(images, schedule)
    # They take seconds to import, and few need them.
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment

    # Of its own processes: in those that torchrun started, each trains a network of its own.
    fabric = Fabric(
        devices=schedule.processes,
        strategy="auto" if schedule.processes == 1 else "ddp_spawn",
        precision=schedule.precision,  # type: ignore[arg-type]
        plugins=[LightningEnvironment()] if schedule.processes == 1 else None,
    )
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        model = build()
        result = Path(folder) / "weights.safetensors"  # several processes cannot return as much through a pipe
        given = build, schedule, state, log, images
        fabric.launch(functools.partial(_train, given=given, held_out=held_out, report=report, result=result))
        model.load_state_dict(read_tensors(result, WEIGHTS)[0])
    return model.eval()


def _train(
    fabric: Fabric,
    given: tuple[Callable[[], nn.Module], Schedule, Path | None, Path | None, Images],
    held_out: Images | None,
    report: Report,
    result: Path,
) -> None:
    """Train with Lightning Fabric, in every process; the first one writes the weights to `result`."""
    keep_freed_memory()
    with torch.random.fork_rng():
        trainee = Trainee(*given, fabric.device, fabric)
        _loop([trainee], held_out, report, fabric.device, 0.0)
        if not trainee.rank:
            write_tensors(result, WEIGHTS, trainee.trained().state_dict(), {})
    if trainee.ranks > 1:
        # Left to the end of the process, the communication threads of one process may abort it.
        fabric.barrier()
        torch.distributed.destroy_process_group()


def train_together(
    builds: Sequence[Callable[[], nn.Module]],
    images: Images,
    schedules: Sequence[Schedule],
    device: torch.device,
    *,
    held_out: Images | None = None,
    states: Sequence[Path | None] | None = None,
    logs: Sequence[Path | None] | None = None,
    report: Report = _silent,
    store_every: float = 0.0,
) -> list[nn.Module]:
    """Train networks side by side, as `train` would each, and return them on the CPU in evaluation mode.

    Args:
        builds: each makes a network with fresh weights, which come from its schedule's seed.
        images: the training data of all.
        schedules: of each; they agree in epochs and batch size.
        device: a GPU, whose generator crops, flips and dropout come from; a CPU makes one step after another.
        held_out: images to predict after every epoch, for the logs.
        states: for each, a file that holds its state; a run that was stopped continues from there.
        logs: for each, a CSV file that gets a line for every epoch, see `Epoch`.
        report: called now and then, with the mean loss of all.
        store_every: seconds between two states, which are written after an epoch.

    Raises:
        ValueError: schedules that do not go together, fewer images than one batch, or a loss or weights that are not
            finite.
    """
    if len({(schedule.epochs, schedule.batch_size) for schedule in schedules}) != 1:
        raise ValueError("networks that are trained together must have as many epochs and one batch size")
    for schedule in schedules:
        _per_epoch(images, schedule)
        if schedule.precision not in TOGETHER or schedule.processes > 1:
            raise ValueError(
                f"networks are trained together in {' or '.join(TOGETHER)} and in one process, not in "
                f"{schedule.precision} and {schedule.processes}"
            )
    keep_freed_memory()
    nothing = [None] * len(builds)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trainees = [
            Trainee(*given, images, device)
            for given in zip(builds, schedules, states or nothing, logs or nothing, strict=True)
        ]
        _loop(trainees, held_out, report, device, store_every)
        return [trainee.trained() for trainee in trainees]


def _per_epoch(images: Images, schedule: Schedule) -> int:
    """The steps of an epoch.

    Raises:
        ValueError: there are none.
    """
    at_once = schedule.batch_size * schedule.processes
    if len(images) < at_once:
        raise ValueError(
            f"{images.name} has {len(images)} images, fewer than one batch of {at_once}; "
            "use more data or a smaller batch size"
        )
    return len(images) // at_once


def _loop(
    trainees: Sequence[Trainee], held_out: Images | None, report: Report, device: torch.device, store_every: float
) -> None:
    """Train to the end."""
    epochs, per_epoch = trainees[0].schedule.epochs, trainees[0].steps
    every = REPORT_EVERY if device.type == "cpu" else REPORT_EVERY_ON_A_GPU
    stored = time.monotonic()
    for epoch in range(min(trainee.first for trainee in trainees), epochs):
        training = [trainee for trainee in trainees if trainee.first <= epoch]
        for trainee in training:
            trainee.begin(epoch)
        reported = 0
        for i in range(per_epoch):
            for trainee in training:
                trainee.step(i)
            if i + 1 - reported == every or i + 1 == per_epoch:
                wait(device)
                loss = statistics.mean(trainee.loss(i + 1 - reported) for trainee in training)
                reported = i + 1
                if not trainees[0].rank:
                    report(epoch * per_epoch + i + 1, epochs * per_epoch, loss)
        for trainee in training:
            trainee.finish(held_out)
        if time.monotonic() - stored >= store_every and epoch + 1 < epochs:
            for trainee in training:
                trainee.store()
            stored = time.monotonic()


def augmented(images: Images, seed: int) -> Images:
    """Every image once as training with augmentation shows it, by chance that depends on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pixels = [augment(images.pixels[start : start + 1000]) for start in range(0, len(images), 1000)]
    return replace(images, pixels=torch.cat(pixels).contiguous())


def keep_freed_memory() -> None:
    """Have this process keep the memory that each step frees, for the next step to use again.

    By default the C library of Linux returns large blocks to the system and gets them back page by page, which takes
    a quarter of a LeNet-5's step. What the two parameters are is in the manual page mallopt(3).
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, 2**30)
        library.mallopt(mmap_threshold, 2**30)
