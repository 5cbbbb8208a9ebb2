"""Merge the observations of several processes of a job, over torch.distributed.

Each process (rank) observes its own mini-batches into an accumulator. `Ranks.merged` sends every accumulator to every
rank, one after another, and merges them in the order of the ranks, so that all have the same; nothing is pickled.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from stochbn.network.fingerprint import Fingerprint
from stochbn.posteriors.accumulators import Accumulator

__all__ = ["Ranks", "RanksError", "refuse_sharded"]

TOLD = "stochbn_told_to_ranks"
"""The attribute that marks an exception which has already been broadcast to the other ranks.

It is False if rank 0 has the same error, which is then printed only once.
"""

GOOD, FAILED = b"+", b"-"
"""The first byte of a message between ranks: from a rank that continues, or from one that has failed."""

A = TypeVar("A", bound=Accumulator[Any])


class RanksError(RuntimeError):
    """Raised if another rank of the job failed; the message says which one, and how."""


class Ranks:
    """The ranks of a process group, or this process alone.

    Args:
        group: the process group; None: this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.count = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, done: str = "fitted") -> Ranks:
        """Return the ranks of a group that a user passed.

        In a job of several processes without a group, a warning says that only this process's data is used.

        Raises:
            TypeError: it is not a process group.
            RuntimeError: this process does not belong to it.
        """
        if group is None:
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                warnings.warn(
                    f"this is rank {dist.get_rank()} of {dist.get_world_size()}, and the posterior is {done} to its "
                    "own data alone; pass group=torch.distributed.group.WORLD to use the data of all ranks",
                    stacklevel=3,
                )
            return cls(None)
        if not isinstance(group, dist.ProcessGroup):
            outside = group is dist.GroupMember.NON_GROUP_MEMBER
            if outside:
                raise RuntimeError(
                    "this process does not belong to the group that was passed; let its members alone fit"
                )
            raise TypeError(
                "group must be a process group, such as torch.distributed.group.WORLD after "
                f"torch.distributed.init_process_group, got {type(group).__name__}"
            )
        return cls(group)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """A context that all ranks leave together: if one raises, all raise, and none waits for it.

        Raises:
            RanksError: another rank raised.
        """
        try:
            yield
        except RanksError:  # already broadcast
            raise
        except BaseException as error:
            if self.count > 1 and not hasattr(error, TOLD):
                setattr(error, TOLD, True)
                text = json.dumps(f"{type(error).__name__}: {error}").encode()
                first = self._exchanged(FAILED + text)[0]
                setattr(error, TOLD, self.rank == 0 or first != FAILED + text)
            raise
        if self.count > 1:
            self._gather(b"")

    def merged(self, accumulator: A) -> A:
        """Merge the accumulators of all ranks, with the same result on every rank.

        Raises:
            ValueError: they differ, for example if a layer was called on some ranks only.
        """
        if self.count == 1:
            return accumulator
        tensors, about = accumulator.state()
        texts = self._gather(json.dumps(about).encode())
        merged: A | None = None
        for data, text in zip(self._each(safetensors.torch.save(tensors)), texts, strict=True):
            other = accumulator.with_state(safetensors.torch.load(data), json.loads(text))
            merged = other if merged is None else merged.merge(other)
        assert merged is not None
        return merged

    def total(self, values: Tensor) -> Tensor:
        """Sum a tensor over the ranks, with a bit-identical result on every rank."""
        if self.count == 1:
            return values
        texts = self._gather(safetensors.torch.save({"": values.contiguous()}))
        return torch.stack([safetensors.torch.load(text)[""] for text in texts]).sum(0)

    def joined(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Concatenate tensors ``[n, ...]`` of all ranks, in the order of the ranks."""
        if self.count == 1:
            return tensors
        own = {name: values.contiguous() for name, values in tensors.items()}
        shards = [safetensors.torch.load(text) for text in self._gather(safetensors.torch.save(own))]
        return {name: torch.cat([shard[name] for shard in shards]) for name in tensors}

    def of_first(self, data: bytes) -> bytes:
        """Broadcast the bytes of rank 0."""
        return self._gather(data if self.rank == 0 else b"")[0]

    def union(self, names: Iterable[str]) -> list[str]:
        """The union of the ranks' names."""
        if self.count == 1:
            return sorted(names)
        return sorted({name for text in self._gather(json.dumps(sorted(names)).encode()) for name in json.loads(text)})

    def place(self, number: int) -> int:
        """The global index of this rank's i-th mini-batch, if ranks take mini-batches in turn.

        >>> Ranks(None).place(5)
        5
        """
        return number * self.count + self.rank

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Check that all ranks were called with the same settings; otherwise raise on every rank.

        Args:
            settings: the settings by name; they are compared as text.

        Raises:
            ValueError: they differ.
        """
        if self.count == 1:
            return
        texts = {name: str(value) for name, value in settings.items()}
        every = [json.loads(text) for text in self._gather(json.dumps(texts).encode())]
        for rank, other in enumerate(every):
            for name, value in other.items():
                if value != every[0].get(name):
                    raise ValueError(
                        f"rank {rank} was called with {name} {value:.60} and rank 0 with {every[0].get(name)!s:.60}; "
                        "call every rank alike"
                    )

    def check_weights(self, fingerprint: Fingerprint) -> None:
        """Check that the networks of all ranks have the same weights.

        Raises:
            ValueError: they differ.
        """
        if self.count == 1:
            return
        described = [json.loads(text) for text in self._gather(json.dumps(fingerprint.description()).encode())]
        for rank, description in enumerate(described):
            if difference := Fingerprint.from_description(description).difference(fingerprint):
                raise ValueError(
                    f"rank {rank} has a network with other weights than rank {self.rank} ({difference} differ); load "
                    "the same weights on every rank"
                )

    def _each(self, data: bytes) -> Iterator[bytes]:
        """Yield the bytes of one rank after another, on every rank; memory does not grow with the number of ranks."""
        sizes = [int(size) for size in self._gather(str(len(data)).encode())]
        device = self._device()
        for rank, size in enumerate(sizes):
            mine = rank == self.rank
            shared = (
                torch.frombuffer(bytearray(data), dtype=torch.uint8) if mine else torch.empty(size, dtype=torch.uint8)
            )
            shared = shared.to(device)
            dist.broadcast(shared, group=self.group, group_src=rank)
            yield shared.cpu().numpy().tobytes()

    def _gather(self, data: bytes) -> list[bytes]:
        """Gather the bytes of all ranks, on every rank.

        Raises:
            RanksError: another rank has left its `failing_together` with an error.
        """
        messages = self._exchanged(GOOD + data)
        for rank, message in enumerate(messages):
            if message.startswith(FAILED):
                raise RanksError(f"rank {rank} failed: {json.loads(message[len(FAILED) :])}")
        return [message[len(GOOD) :] for message in messages]

    def _exchanged(self, message: bytes) -> list[bytes]:
        """Exchange messages with all ranks, whatever the others wait for."""
        device = self._device()
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(message)], device=device), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        received = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(self.count)]
        dist.all_gather(received, padded.to(device), group=self.group)
        return [one[: int(size)].cpu().numpy().tobytes() for one, size in zip(received, sizes, strict=True)]

    def _device(self) -> torch.device:
        """The device of tensors for the group's backend."""
        types = {device.type for device in getattr(self.group, "_device_types", [])}
        if "cpu" in types or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a network whose weights are sharded over several ranks.

    Raises:
        TypeError: they are.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):  # a DTensor
            raise TypeError(
                f"the weights of {type(model).__name__} are sharded over ranks ({name!r} is a DTensor), and a pass "
                "needs all of them: gather them with torch.distributed.checkpoint.state_dict.get_model_state_dict and "
                "StateDictOptions(full_state_dict=True), and load them into a plain network on every rank"
            )
