"""One network in training: what a step reads and writes, its images as an epoch shows them, its state on disk.

On a GPU a step of a small network on 16 images is a few hundred kernels of some microseconds, so Python cannot start
them as fast as the GPU does them, and one network does not fill it. There the step is recorded once, as a CUDA graph,
and replayed on a stream of its own, beside the steps of other networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stochbn.augment import reflected
from stochbn.files import read_tensors, write_tensors
from stochbn.paper.schedule import Epoch, Schedule, read_log, write_log
from stochbn.sources.named import Images, as_input

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Trainee", "augment", "restore", "store"]

SCORE_BATCH = 250
STATE = "stochbn.training/1"
WARM_UP = 3
"""Steps before one is recorded: libraries choose their kernels in them."""
AUGMENTED_AT_ONCE = 5000


class Trainee:
    """One network in training, and all that its step reads and writes: tensors that stay where they are.

    Args:
        build: makes the network with fresh weights, which come from the schedule's seed.
        schedule: how it is trained.
        state: a file to continue from, and to write to.
        log: a CSV file that gets a line for every epoch.
        images: the training data.
        device: where it is trained.
        fabric: does the arithmetic and the averaging of gradients, where PyTorch alone does not.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        schedule: Schedule,
        state: Path | None,
        log: Path | None,
        images: Images,
        device: torch.device,
        fabric: Fabric | None = None,
    ) -> None:
        self.schedule, self.state, self.log, self.device, self.fabric = schedule, state, log, device, fabric
        self.rank, self.ranks = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)
        self.pixels, self.labels = images.pixels.to(device), images.labels.to(device)
        torch.manual_seed(schedule.seed)
        self.model = build().to(device).train()
        self.network: nn.Module = torch.compile(self.model) if schedule.compile else self.model  # type: ignore[assignment]
        self.rate = torch.tensor(schedule.learning_rate, device=device)
        self.adam = torch.optim.Adam(
            self.model.parameters(), lr=self.rate, fused=True, capturable=device.type == "cuda"
        )
        self.optimizer: Any = self.adam
        if fabric is not None:
            self.network, self.optimizer = fabric.setup(self.network, self.adam)
        self.first = restore(state, self.model, self.adam) if state is not None and state.exists() else 0
        self.adam.param_groups[0]["lr"] = self.rate  # for which loading a state puts a copy
        self.epoch = self.first
        self.log_lines = read_log(log)[: self.first] if self.first and log is not None and log.exists() else []
        self.steps = len(images) // (schedule.batch_size * self.ranks)
        pixels = self.pixels.permute(0, 2, 3, 1)
        self.shown = pixels.clone(memory_format=torch.contiguous_format) if schedule.augment else pixels.contiguous()
        self.order = torch.arange(len(images), device=device)
        self.batch = torch.arange(schedule.batch_size, device=device)
        self.lost, self.told = torch.zeros((), device=device), 0.0
        self.right = torch.zeros((), dtype=torch.int64, device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and fabric is None else None  # type: ignore[no-untyped-call]
        self.graph = None if self.stream is None else self._recorded(self.stream)

    def begin(self, epoch: int) -> None:
        """Choose an epoch's order of images, and show them as training does."""
        self.epoch = epoch
        # A seed of its own for every epoch: an interrupted run needs no generator state to continue alike.
        seed = (self.schedule.seed + 1) * 1_000_003 + epoch
        torch.manual_seed(seed)
        self.order.copy_(torch.randperm(len(self.labels)))
        if self.schedule.augment:
            for start in range(0, len(self.pixels), AUGMENTED_AT_ONCE):
                part = slice(start, start + AUGMENTED_AT_ONCE)
                self.shown[part] = augment(self.pixels[part]).permute(0, 2, 3, 1)
        if self.rank:
            torch.manual_seed(seed + 7919 * self.rank)
        size = self.schedule.batch_size
        self.batch.copy_(torch.arange(self.rank * size, (self.rank + 1) * size, device=self.device))
        self.lost.zero_()
        self.right.zero_()
        self.told = 0.0
        self._decay(0)
        wait(self.device)

    def step(self, i: int) -> None:
        """Train on the epoch's next mini-batch, the `i`-th; on a GPU it is only begun."""
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            if self.schedule.decay == "step":
                self._decay(i)
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()

    def loss(self, steps: int) -> float:
        """The mean loss in nats of the last `steps` steps, those since it was last asked for.

        Raises:
            ValueError: it is not finite.
        """
        total = self.lost.item()
        mean, self.told = (total - self.told) / steps, total
        if not math.isfinite(mean):
            raise ValueError(f"the training loss is {mean} in epoch {self.epoch + 1}; use a lower learning rate")
        return mean

    def finish(self, held_out: Images | None) -> None:
        """End the epoch: its line in the log."""
        if self.log is None or self.rank:
            return
        seen = self.steps * self.schedule.batch_size
        trained = self.schedule.rate(self.epoch), self.lost.item() / self.steps, self.right.item() / seen
        scores = (None, None) if held_out is None else self._score(held_out)
        self.log_lines.append(Epoch(self.epoch + 1, *trained, *scores))
        write_log(self.log, self.log_lines)

    def store(self) -> None:
        """Write the state after the epoch."""
        if self.state is not None and not self.rank:
            store(self.state, self.model, self.adam, self.epoch + 1)

    def trained(self) -> nn.Module:
        """The network, on the CPU in evaluation mode.

        Raises:
            ValueError: weights or statistics are not finite.
        """
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            raise ValueError("the network has weights or statistics that are not finite; use a lower learning rate")
        return self.model.cpu().eval()

    def _decay(self, i: int) -> None:
        self.rate.fill_(self.schedule.rate(self.epoch + i / self.steps))

    def _autocast(self) -> AbstractContextManager[Any]:
        # Casts of the weights must be made again in every replay, so none is kept.
        enabled = self.schedule.precision == "bf16-mixed"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def _step(self) -> None:
        chosen = self.order[self.batch]
        inputs, labels = as_input(self.shown[chosen].permute(0, 3, 1, 2)), self.labels[chosen]
        with self._autocast() if self.fabric is None else nullcontext():
            logits = self.network(inputs)
            loss = cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        if self.fabric is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self.fabric.backward(loss)
        self.optimizer.step()
        self.lost += loss.detach()
        if self.log is not None:
            self.right += (logits.detach().argmax(1) == labels).sum()
        self.batch += self.schedule.batch_size * self.ranks

    def _score(self, images: Images) -> tuple[float, float]:
        """Loss and accuracy of the network as it is, in evaluation mode; it is left in training mode."""
        self.model.eval()
        lost, right = 0.0, 0
        with torch.inference_mode(), self._autocast() if self.fabric is None else self.fabric.autocast():
            for inputs, labels in images.batches(SCORE_BATCH):
                logits = self.model(inputs.to(self.device)).float().cpu()
                lost += cross_entropy(logits, labels, reduction="sum").item()
                right += int((logits.argmax(1) == labels).sum())
        self.model.train()
        return lost / len(images), right / len(images)

    def _recorded(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        """The step as a graph. What was changed by the steps before it was recorded is put back."""
        kept = [*self.model.state_dict().values(), self.batch, self.lost, self.right]
        moments = [value for state in self.adam.state.values() for value in state.values()]
        start = self.batch.clone()
        before = [(value, value.clone()) for value in (*kept, *moments)]
        wait(self.device)
        with torch.cuda.stream(stream), _fastest_kernels():
            for _ in range(WARM_UP):
                self._step()
                self.batch.copy_(start)  # there may be no other mini-batch
        wait(self.device)
        if not moments:  # Adam's moments are made, and begin as zeros, at its first step
            for state in self.adam.state.values():
                for value in state.values():
                    value.zero_()
        for value, old in before:
            value.data.copy_(old)
        self.adam.zero_grad()
        wait(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream), _fastest_kernels():
            self._step()
        return graph


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


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what was begun on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _fastest_kernels() -> Iterator[None]:
    """Have cuDNN time its kernels and take the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
