"""Training several networks at once on one GPU.

A step of a small network on 16 images is a few hundred kernels of some microseconds, so Python cannot start them as
fast as a GPU does them, and one network does not fill it. Here every network's step is recorded once, as a CUDA graph,
and replayed on a stream of its own, beside the steps of the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from stochbn.paper.training import Epoch, Schedule, augment, read_log, restore, score, store, write_log
from stochbn.sources.named import Images, as_input

__all__ = ["PRECISIONS", "Trainee", "train_together"]

PRECISIONS = ("32-true", "bf16-mixed")
"""What networks can be trained together in."""

WARM_UP = 3
"""Steps before one is recorded: libraries choose their kernels in them."""
REPORT_EVERY = 200
STORE_EVERY = 60.0
"""Seconds between two states on disk."""
AUGMENTED_AT_ONCE = 5000

Report = Callable[[int, int], None]


def train_together(
    builds: Sequence[Callable[[], nn.Module]],
    images: Images,
    schedules: Sequence[Schedule],
    device: torch.device,
    *,
    held_out: Images | None = None,
    states: Sequence[Path | None] | None = None,
    logs: Sequence[Path | None] | None = None,
    report: Report = lambda step, steps: None,
) -> list[nn.Module]:
    """Train networks side by side on one GPU, and return them on the CPU in evaluation mode.

    Each is trained as `train` would, by its own schedule; crops, flips and dropout come from the GPU's generator, so
    they are others than on a CPU. PyTorch's global generators are left as they were.

    Args:
        builds: each makes a network with fresh weights, which come from its schedule's seed.
        images: the training data of all.
        schedules: of each; they agree in epochs and batch size.
        device: the GPU; on a CPU the steps are made one after another.
        held_out: images to predict after every epoch, for the logs.
        states: for each, a file that holds its state, written about once a minute; a run that was stopped continues
            from there.
        logs: for each, a CSV file that gets a line for every epoch, see `Epoch`.
        report: called now and then with the step and the number of steps.

    Raises:
        ValueError: schedules that do not go together, fewer images than one batch, or a loss or weights that are not
            finite.
    """
    if len({(schedule.epochs, schedule.batch_size) for schedule in schedules}) != 1:
        raise ValueError("networks that are trained together must have as many epochs and one batch size")
    for schedule in schedules:
        if schedule.precision not in PRECISIONS or schedule.processes > 1:
            raise ValueError(
                f"networks are trained together in {' or '.join(PRECISIONS)} and in one process, not in "
                f"{schedule.precision} and {schedule.processes}"
            )
    epochs, size = schedules[0].epochs, schedules[0].batch_size
    per_epoch = len(images) // size
    if not per_epoch:
        raise ValueError(
            f"{images.name} has {len(images)} images, fewer than one batch of {size}; "
            "use more data or a smaller batch size"
        )
    nothing = [None] * len(builds)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        trainees = [
            Trainee(*given, images, device)
            for given in zip(builds, schedules, states or nothing, logs or nothing, strict=True)
        ]
        stored = time.monotonic()
        for epoch in range(min(trainee.first for trainee in trainees), epochs):
            training = [trainee for trainee in trainees if trainee.first <= epoch]
            for trainee in training:
                trainee.begin(epoch)
            for i in range(per_epoch):
                for trainee in training:
                    trainee.step(i)
                if i % REPORT_EVERY == 0:
                    _wait(device)
                    report(epoch * per_epoch + i, epochs * per_epoch)
            _wait(device)
            for trainee in training:
                trainee.finish(held_out)
            if time.monotonic() - stored > STORE_EVERY and epoch + 1 < epochs:
                for trainee in training:
                    trainee.store()
                stored = time.monotonic()
        report(epochs * per_epoch, epochs * per_epoch)
        return [trainee.trained() for trainee in trainees]


class Trainee:
    """One network in training, and all that its step reads and writes: tensors that stay where they are."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        schedule: Schedule,
        state: Path | None,
        log: Path | None,
        images: Images,
        device: torch.device,
    ) -> None:
        self.schedule, self.state, self.log, self.device = schedule, state, log, device
        self.pixels, self.labels = images.pixels.to(device), images.labels.to(device)
        torch.manual_seed(schedule.seed)
        self.model = build().to(device).train()
        self.network: nn.Module = torch.compile(self.model) if schedule.compile else self.model  # type: ignore[assignment]
        self.rate = torch.tensor(schedule.learning_rate, device=device)
        self.adam = torch.optim.Adam(
            self.model.parameters(), lr=self.rate, fused=True, capturable=device.type == "cuda"
        )
        self.first = restore(state, self.model, self.adam) if state is not None and state.exists() else 0
        self.adam.param_groups[0]["lr"] = self.rate  # for which loading a state puts a copy
        self.epoch = self.first
        self.log_lines = read_log(log)[: self.first] if self.first and log is not None and log.exists() else []
        self.inputs = torch.empty(*self.pixels.permute(0, 2, 3, 1).shape, device=device)
        self.targets = torch.zeros_like(self.labels)
        self.batch = torch.arange(schedule.batch_size, device=device)
        self.lost = torch.zeros((), dtype=torch.float64, device=device)
        self.right = torch.zeros((), dtype=torch.int64, device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.graph = None if self.stream is None else self._recorded(self.stream)

    def begin(self, epoch: int) -> None:
        """Lay out an epoch's images in their order, as training shows them."""
        self.epoch = epoch
        torch.manual_seed((self.schedule.seed + 1) * 1_000_003 + epoch)
        order = torch.randperm(len(self.labels)).to(self.device)
        for start in range(0, len(order), AUGMENTED_AT_ONCE):
            chosen = order[start : start + AUGMENTED_AT_ONCE]
            pixels = augment(self.pixels[chosen]) if self.schedule.augment else self.pixels[chosen]
            self.inputs[start : start + len(chosen)] = as_input(pixels).permute(0, 2, 3, 1)
        self.targets.copy_(self.labels[order])
        self.batch.copy_(torch.arange(self.schedule.batch_size, device=self.device))
        self.lost.zero_()
        self.right.zero_()
        self._decay(epoch)
        _wait(self.device)

    def step(self, i: int) -> None:
        """Train on the epoch's next mini-batch, the `i`-th; on a GPU it is only begun."""
        if self.stream is None or self.graph is None:
            if self.schedule.decay == "step":
                self._decay(self.epoch + i / (len(self.labels) // self.schedule.batch_size))
            self._step()
            return
        with torch.cuda.stream(self.stream):
            if self.schedule.decay == "step":
                self._decay(self.epoch + i / (len(self.labels) // self.schedule.batch_size))
            self.graph.replay()

    def finish(self, held_out: Images | None) -> None:
        """End the epoch: its line in the log."""
        steps = len(self.labels) // self.schedule.batch_size
        loss = self.lost.item() / steps
        if not math.isfinite(loss):
            raise ValueError(f"the training loss is {loss} in epoch {self.epoch + 1}; use a lower learning rate")
        if self.log is not None:
            trained = self.schedule.rate(self.epoch), loss, self.right.item() / (steps * self.schedule.batch_size)
            scores = (None, None) if held_out is None else score(self.model, held_out, self._autocast)
            self.log_lines.append(Epoch(self.epoch + 1, *trained, *scores))
            write_log(self.log, self.log_lines)

    def store(self) -> None:
        """Write the state after the epoch."""
        if self.state is not None:
            store(self.state, self.model, self.adam, self.epoch + 1)

    def trained(self) -> nn.Module:
        """The network, on the CPU in evaluation mode."""
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            raise ValueError("the network has weights or statistics that are not finite; use a lower learning rate")
        return self.model.cpu().eval()

    def _decay(self, epochs: float) -> None:
        self.rate.fill_(self.schedule.rate(epochs))

    def _autocast(self) -> torch.autocast:
        # Casts of the weights must be made again in every replay, so none is kept.
        enabled = self.schedule.precision == "bf16-mixed"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def _step(self) -> None:
        inputs, labels = self.inputs[self.batch].permute(0, 3, 1, 2), self.targets[self.batch]
        with self._autocast():
            logits = self.network(inputs)
            loss = cross_entropy(logits, labels)
        self.adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        self.lost += loss.detach()
        self.right += (logits.detach().argmax(1) == labels).sum()
        self.batch += self.schedule.batch_size

    def _recorded(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        """The step as a graph. What was changed by the steps before it was recorded is put back."""
        self.inputs.zero_()
        kept = [*self.model.state_dict().values(), self.batch, self.lost, self.right]
        moments = [value for state in self.adam.state.values() for value in state.values()]
        before = [(value, value.clone()) for value in (*kept, *moments)]
        _wait(self.device)
        with torch.cuda.stream(stream), _fastest_kernels():
            for _ in range(WARM_UP):
                self._step()
        _wait(self.device)
        if not moments:  # Adam's moments are made, and begin as zeros, at its first step
            for state in self.adam.state.values():
                for value in state.values():
                    value.zero_()
        for value, old in before:
            value.data.copy_(old)
        self.adam.zero_grad()
        _wait(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream), _fastest_kernels():
            self._step()
        return graph


@contextmanager
def _fastest_kernels() -> Iterator[None]:
    """Have cuDNN time its kernels and take the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
