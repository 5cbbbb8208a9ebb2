"""The command line in a job of several processes, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from stochbn.cli.console import out

if TYPE_CHECKING:
    from stochbn.distributed import Ranks

__all__ = ["SHARED", "check_command", "job"]

SHARED = ("fit", "calibrate", "evaluate", "reproduce")
"""The commands that share their work among ranks."""
PATIENCE = timedelta(days=30)
"""How long a rank waits for one that still works; one that has died is noticed at once."""


def _count() -> int:
    """The number of ranks that torchrun says there are."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def check_command(name: str | None) -> None:
    """Refuse a command that every rank would do alone.

    Raises:
        ValueError: this is a job of several ranks, and the command shares no work.
    """
    if _count() > 1 and name not in (*SHARED, "paper", None):
        advice = "; predict takes --engine ray" if name == "predict" else ""
        raise ValueError(f"'stochbn {name}' under torchrun would do all its work {_count()} times{advice}")


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
    local = int(os.environ["LOCAL_RANK"])
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(local)] if devices is None else devices.split(",")[local : local + 1]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    store, rank, count = next(rendezvous("env://"))
    # torchrun keeps the store when it starts the ranks again, with the addresses of those that are gone.
    store = PrefixStore(f"stochbn/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE)
    out.quiet = dist.get_rank() > 0
    try:
        yield Ranks(dist.group.WORLD)
    finally:
        out.quiet = False
        dist.destroy_process_group()
