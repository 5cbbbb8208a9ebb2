"""The command line in a job of several processes, as ``torchrun`` starts them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from stochbn.cli.console import out

if TYPE_CHECKING:
    from stochbn.distributed import Ranks

__all__ = ["SHARED", "check_command", "check_gpus", "job", "own_gpu", "speaks_of"]

SHARED = ("fit", "calibrate", "adapt", "evaluate", "reproduce", "augment")
"""The commands that share their work among ranks."""
PATIENCE = timedelta(days=30)
"""How long a rank waits for another that still works; a rank that died is noticed at once."""


def _count() -> int:
    """The number of ranks, from torchrun's environment variables."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def check_command(name: str | None) -> None:
    """Check that a command can share its work among ranks.

    Raises:
        ValueError: this is a job of several ranks, and the command shares no work.
    """
    if _count() > 1 and name not in (*SHARED, "paper", None):
        advice = "; predict takes --engine ray" if name == "predict" else ""
        raise ValueError(f"'stochbn {name}' under torchrun would do all its work {_count()} times{advice}")


def speaks_of(error: BaseException) -> bool:
    """Whether this process prints an error: rank 0 of a machine does, and the rank that raised it."""
    from stochbn.distributed import TOLD

    return _count() == 1 or os.environ["LOCAL_RANK"] == "0" or getattr(error, TOLD, False)


def own_gpu(local: int, devices: str | None) -> str:
    """The GPU that a rank sees, as ``CUDA_VISIBLE_DEVICES`` names it; empty if there is none for it.

    Args:
        local: the rank's number on its machine.
        devices: what ``CUDA_VISIBLE_DEVICES`` is for all ranks of the machine; None if it is not set.
    """
    return str(local) if devices is None else ",".join(devices.split(",")[local : local + 1])


def check_gpus(ranks: Ranks) -> None:
    """Check that all ranks see a GPU, or none; ranks without one would slow down the job.

    Raises:
        ValueError: only some do; on every rank.
    """
    import torch

    seeing = int(ranks.total(torch.tensor([min(1, torch.cuda.device_count())])))
    if 0 < seeing < ranks.count:
        raise ValueError(
            f"{seeing} of {ranks.count} ranks see a GPU, one each; give --nproc-per-node the number of GPUs of a "
            "machine, or set CUDA_VISIBLE_DEVICES to nothing to use processors alone"
        )


@contextmanager
def job() -> Iterator[Ranks]:
    """The ranks of the job that this process belongs to, or this process alone; only rank 0 prints.

    Each rank sees the GPU of its local number alone, if there are any.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    from stochbn.distributed import Ranks

    if _count() == 1:
        yield Ranks(None)
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = own_gpu(int(os.environ["LOCAL_RANK"]), os.environ.get("CUDA_VISIBLE_DEVICES"))
    store, rank, count = next(rendezvous("env://"))
    # torchrun keeps the store when it starts the ranks again, with the addresses of those that are gone.
    store = PrefixStore(f"stochbn/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE)
    out.quiet = dist.get_rank() > 0
    try:
        ranks = Ranks(dist.group.WORLD)
        check_gpus(ranks)
        with warnings.catch_warnings():
            # Commands that share networks among ranks fit each to the data of one, on purpose.
            warnings.filterwarnings("ignore", message=r"this is rank \d+ of")
            yield ranks
    finally:
        out.quiet = False
        dist.destroy_process_group()
