"""The memory that a prediction takes at its peak, measured in a process of its own."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stochbn
from stochbn.posteriors import Posterior
from stochbn.processes import interrupts_held
from stochbn.sources import checkpoints

__all__ = ["peak_of_draws", "plain_prediction"]


def peak_of_draws(network: Path, posterior: Posterior, x: Tensor) -> float:
    """The peak of 200 draws over that of one plain pass, each in a process of its own, above what it starts with.

    The medians of three processes each, as memory may be handed out in other blocks from one to the next. It is known
    on Linux only; elsewhere it is NaN.

    Args:
        network: a checkpoint.
        posterior: where the draws come from.
        x: a batch of inputs.

    Raises:
        ValueError: a process ended without an answer, as when memory runs out.
    """
    if not Path("/proc/self/clear_refs").exists():
        return math.nan
    draws, plain = (
        statistics.median(_peak_of_a_process(network, predicted, x) for _ in range(3))
        for predicted in (posterior, None)
    )
    return draws / plain


def _peak_of_a_process(network: Path, posterior: Posterior | None, x: Tensor) -> int:
    """The kilobytes that a prediction takes at its peak, in a new process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(theirs, network, posterior, x.numpy()), daemon=True)
    try:
        with interrupts_held():
            process.start()
        theirs.close()
        peak: int = ours.recv()
    except EOFError:
        raise ValueError("the memory could not be measured: the process that does it has ended") from None
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
    return peak


def _peak(pipe: Connection, network: Path, posterior: Posterior | None, x: Any) -> None:
    warnings.simplefilter("ignore")
    model = checkpoints.load(network).model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    inputs = torch.from_numpy(x)
    plain_prediction(model, inputs[:1])  # libraries' own memory
    if posterior is not None:
        stochbn.Predictive(model, posterior, 8)(inputs[:1])
    before = _memory_of_this_process(reset=True)["VmRSS"]
    if posterior is None:
        plain_prediction(model, inputs)
    else:
        stochbn.Predictive(model, posterior, 200)(inputs)
    pipe.send(max(1, _memory_of_this_process()["VmHWM"] - before))


@torch.no_grad()
def plain_prediction(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Probabilities ``[N, K]`` by one plain pass: what draws are measured in."""
    probs: Tensor = model(x).softmax(1)
    return probs


def _memory_of_this_process(reset: bool = False) -> dict[str, int]:
    """What Linux says of this process in kilobytes: ``VmRSS`` now, ``VmHWM`` at its peak since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) for line in lines if line[2:] == ["kB"]}
