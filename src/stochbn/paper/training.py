"""Training a classifier on images that lie in memory as one tensor."""

from __future__ import annotations

import csv
import ctypes
import functools
import io
import math
import platform
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stochbn.augment import reflected
from stochbn.files import read_tensors, write_bytes, write_tensors
from stochbn.sources.named import Images, as_input

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = [
    "Epoch",
    "Schedule",
    "augment",
    "augmented",
    "keep_freed_memory",
    "read_log",
    "restore",
    "score",
    "store",
    "train",
    "write_log",
]

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
SCORE_BATCH = 250
STATE = "stochbn.training/1"
WEIGHTS = "stochbn.weights/1"


@dataclass(frozen=True)
class Schedule:
    """How a network is trained, with Adam. As published: from 1e-3 linearly to 0, changed each epoch, batch size 16.

    Attributes:
        epochs: passes over the training data; what is left of it after the last full mini-batch is dropped.
        batch_size: objects in a mini-batch.
        learning_rate: Adam's at the first step.
        seed: what weights, order, augmentation and dropout come from.
        augment: whether images are cropped and flipped at random, as the paper does for CIFAR.
        precision: Lightning Fabric's name of the arithmetic, such as ``32-true`` or ``bf16-mixed``.
        compile: whether the training step's forward and backward passes are compiled.
        processes: how many processes train one network together, each on its own accelerator if there are any. Every
            one takes mini-batches of `batch_size`, whose statistics are its own, and their gradients are averaged.
        decay: when the learning rate changes: each ``epoch``, as published, or each ``step``.
        decrease_from: how many epochs the learning rate stays as it is, before it falls linearly to 0.
    """

    epochs: int
    batch_size: int = 16
    learning_rate: float = 1e-3
    seed: int = 0
    augment: bool = False
    precision: str = "32-true"
    compile: bool = False
    processes: int = 1
    decay: str = "step"
    decrease_from: int = 0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; there are {', '.join(PRECISIONS)}")
        if self.epochs < 1 or self.batch_size < 2 or not 0 < self.learning_rate < float("inf") or self.processes < 1:
            raise ValueError(
                "expected at least 1 epoch, a batch size of at least 2, a positive learning rate and at least 1 "
                f"process, got {self.epochs}, {self.batch_size}, {self.learning_rate} and {self.processes}"
            )
        if self.decay not in ("epoch", "step"):
            raise ValueError(f"the learning rate decays each 'epoch' or each 'step', not each {self.decay!r}")
        if not 0 <= self.decrease_from < self.epochs:
            raise ValueError(
                f"decrease_from must be from 0 to {self.epochs - 1} for {self.epochs} epochs, got {self.decrease_from}"
            )

    def rate(self, epochs: float) -> float:
        """The learning rate after so many epochs; a fraction is what of the epoch is done."""
        passed = math.floor(epochs) if self.decay == "epoch" else epochs
        return self.learning_rate * (1 - max(0.0, passed - self.decrease_from) / (self.epochs - self.decrease_from))


@dataclass(frozen=True)
class Epoch:
    """One line of the log of a training.

    Attributes:
        epoch: its number, from 1.
        learning_rate: Adam's at its first step.
        loss: the mean loss of its mini-batches in nats, in training mode and while the weights change.
        accuracy: likewise, the fraction of its training images that were classified correctly.
        held_out_loss: after the epoch, the mean loss of the held-out images in nats, with running statistics; None
            without such images.
        held_out_accuracy: likewise, the fraction of them that is classified correctly.
    """

    epoch: int
    learning_rate: float
    loss: float
    accuracy: float
    held_out_loss: float | None = None
    held_out_accuracy: float | None = None


def train(
    build: Callable[[], nn.Module],
    images: Images,
    schedule: Schedule,
    *,
    held_out: Images | None = None,
    state: Path | None = None,
    log: Path | None = None,
    report: Callable[[int, int, float], None] | None = None,
) -> nn.Module:
    """Train a network and return it on the CPU in evaluation mode.

    It trains on the accelerator that Lightning Fabric finds, with all images there as one tensor. Everything random
    depends on the seed alone: two runs on a CPU with the same number of threads give the same network. PyTorch's
    global generator is left as it was.

    Args:
        build: makes the network with fresh weights, which come from the seed.
        images: the training data.
        schedule: how long, in which batches and at which rate.
        held_out: images to predict after every epoch, for the log; training does not depend on them.
        state: a file that holds the state after the last finished epoch but the last; a run that was stopped
            continues from there and gives what an uninterrupted one would. The caller deletes it once the network
            is saved.
        log: a CSV file that gets a line for every epoch, see `Epoch`.
        report: called about every 50 steps with the step, the number of steps and the mean loss in nats since the
            last call; with several processes it must be picklable.

    Raises:
        ValueError: fewer objects than one batch, or the loss is not finite.
    """
    at_once = schedule.batch_size * schedule.processes
    if len(images) < at_once:
        raise ValueError(
            f"{images.name} has {len(images)} images, fewer than one batch of {at_once}; "
            "use more data or a smaller batch size"
        )
    strategy = "auto" if schedule.processes == 1 else "ddp_spawn"
    # They take seconds to import: not for those who only read what was trained.
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment

    # Of its own processes: in those that torchrun started, each trains a network of its own.
    fabric = Fabric(
        devices=schedule.processes,
        strategy=strategy,
        precision=schedule.precision,  # type: ignore[arg-type]
        plugins=[LightningEnvironment()] if schedule.processes == 1 else None,
    )
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        model = build()
        result = Path(folder) / "weights.safetensors"  # several processes cannot return as much through a pipe
        loop = functools.partial(
            _train,
            build=build,
            images=images,
            schedule=schedule,
            held_out=held_out,
            state=state,
            log=log,
            report=report,
            result=result,
        )
        fabric.launch(loop)
        model.load_state_dict(read_tensors(result, WEIGHTS)[0])
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise ValueError("the network has weights or statistics that are not finite; use a lower learning rate")
    return model.eval()


def _train(
    fabric: Fabric,
    build: Callable[[], nn.Module],
    images: Images,
    schedule: Schedule,
    held_out: Images | None,
    state: Path | None,
    log: Path | None,
    report: Callable[[int, int, float], None] | None,
    result: Path,
) -> None:
    """The training loop, in every process; the first one writes the weights to `result`."""
    keep_freed_memory()
    size, rank = schedule.batch_size, fabric.global_rank
    per_epoch = len(images) // (size * fabric.world_size)
    steps = per_epoch * schedule.epochs
    epochs: list[Epoch] = []
    with torch.random.fork_rng():
        torch.manual_seed(schedule.seed)
        model = build().train()
        adam = torch.optim.Adam(model.parameters(), fused=True)
        compiled: nn.Module = torch.compile(model) if schedule.compile else model  # type: ignore[assignment]
        network, optimizer = fabric.setup(compiled, adam)
        if fabric.world_size == 1 and schedule.precision == "32-true":
            network, optimizer = compiled, adam  # as they are on the device: the wrappers only take a tenth of the time
        pixels, labels = images.pixels.to(fabric.device), images.labels.to(fabric.device)
        first = restore(state, model, adam) if state is not None and state.exists() else 0
        if first and log is not None and log.exists():
            epochs = read_log(log)[:first]
        for epoch in range(first, schedule.epochs):
            # A seed of its own for every epoch: an interrupted run needs no generator state to continue alike.
            seed = (schedule.seed + 1) * 1_000_003 + epoch
            torch.manual_seed(seed)
            order = torch.randperm(len(images)).to(fabric.device)
            if rank:
                torch.manual_seed(seed + 7919 * rank)
            total, count = torch.zeros((), device=fabric.device), 0
            lost, right = 0.0, torch.zeros((), dtype=torch.int64, device=fabric.device)
            for i in range(per_epoch):
                step = epoch * per_epoch + i
                for group in optimizer.param_groups:
                    group["lr"] = schedule.rate(step / per_epoch)
                start = (i * fabric.world_size + rank) * size
                chosen = order[start : start + size]
                batch = pixels[chosen]
                optimizer.zero_grad()
                logits = network(as_input(augment(batch) if schedule.augment else batch))
                loss = cross_entropy(logits, labels[chosen])
                fabric.backward(loss)
                optimizer.step()
                total += loss.detach()
                if log is not None:
                    right += (logits.detach().argmax(1) == labels[chosen]).sum()
                count += 1
                if count == 50 or i == per_epoch - 1:
                    mean = total.item() / count
                    if not math.isfinite(mean):
                        raise ValueError(f"the training loss is {mean} at step {step}; use a lower learning rate")
                    if report is not None and rank == 0:
                        report(step + 1, steps, mean)
                    lost += mean * count
                    total, count = torch.zeros_like(total), 0
            if log is not None and rank == 0:
                trained = schedule.rate(epoch), lost / per_epoch, right.item() / (per_epoch * size)
                scores = (None, None) if held_out is None else score(model, held_out, fabric.autocast)
                epochs.append(Epoch(epoch + 1, *trained, *scores))
                write_log(log, epochs)
            if state is not None and rank == 0 and epoch + 1 < schedule.epochs:
                store(state, model, adam, epoch + 1)
        if rank == 0:
            write_tensors(result, WEIGHTS, model.state_dict(), {})
        if fabric.world_size > 1:
            # Left to the end of the process, the communication threads of one process may abort it.
            fabric.barrier()
            torch.distributed.destroy_process_group()


def augment(pixels: Tensor) -> Tensor:
    """The paper's augmentation for CIFAR: reflect-pad by 4, random crop to the old size, random horizontal flip.

    One gather for the whole batch; noise from PyTorch's global generator of the pixels' device.

    Args:
        pixels: ``[N, C, H, W]``, uint8.

    Returns:
        ``[N, C, H, W]``, uint8, in channels-last layout.
    """
    count, _, height, width = pixels.shape
    device = pixels.device
    top, left = torch.randint(9, (2, count, 1), device=device)
    flipped = torch.rand(count, 1, device=device) < 0.5
    across = torch.arange(width, device=device)
    rows = reflected(torch.arange(height, device=device) + top - 4, height)
    columns = reflected(torch.where(flipped, width - 1 - across, across) + left - 4, width)
    index = torch.arange(count, device=device)
    return pixels[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def augmented(images: Images, seed: int) -> Images:
    """Every image once as training with augmentation shows it, by chance that depends on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pixels = [augment(images.pixels[start : start + 1000]) for start in range(0, len(images), 1000)]
    return replace(images, pixels=torch.cat(pixels).contiguous())


def read_log(path: Path) -> list[Epoch]:
    """The epochs in a log that `train` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or no such log.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [
            Epoch(
                int(row["epoch"]),
                *(float(row[name]) for name in ("learning_rate", "loss", "accuracy")),
                *(float(row[name]) if row[name] else None for name in ("held_out_loss", "held_out_accuracy")),
            )
            for row in rows
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged or not a log of training: {error}") from error


def write_log(path: Path, epochs: list[Epoch]) -> None:
    """Write the log of a training, which `read_log` reads."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Epoch)])
    writer.writerows(["" if value is None else f"{value:.6g}" for value in astuple(one)] for one in epochs)
    write_bytes(path, text.getvalue().encode())


def score(model: nn.Module, images: Images, autocast: Callable[[], AbstractContextManager[Any]]) -> tuple[float, float]:
    """Loss and accuracy of the network as it is, in evaluation mode; it is left in training mode."""
    model.eval()
    device = next(model.parameters()).device
    lost, right = 0.0, 0
    with torch.inference_mode(), autocast():
        for inputs, labels in images.batches(SCORE_BATCH):
            logits = model(inputs.to(device)).float().cpu()
            lost += cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum())
    model.train()
    return lost / len(images), right / len(images)


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


def store(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Write what a training continues from after an epoch."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    write_tensors(path, STATE, tensors, {"epoch": epoch})


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Continue from what `store` wrote; the number of epochs that are done."""
    tensors, about = read_tensors(path, STATE)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, position, name = key.split(".")
            moments.setdefault(int(position), {})[name] = value
    # Fused Adam walks over parameters and moments as flat memory, so both must have the same (channels-last) layout.
    for index, parameter in enumerate(model.parameters()):
        for name, value in moments.get(index, {}).items():
            if value.shape == parameter.shape:
                moments[index][name] = torch.empty_like(parameter, requires_grad=False).copy_(value)
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(about["epoch"])
