from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

import stochbn
from stochbn.measuring.memory import _memory_of_this_process, _peak_of_a_process
from stochbn.sources import architectures, checkpoints, named

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is known on Linux alone")


def test_the_peak_of_a_process_is_that_since_the_reset() -> None:
    # In a process of its own: one that has trained a network keeps freed memory, and a tensor in it raises no peak.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with_block, after_reset = pool.apply(_growth_of_the_peak)
    assert with_block > 90_000
    assert after_reset < 50_000


def _growth_of_the_peak() -> tuple[int, int]:
    """Kilobytes above the start: of the peak after 100 MB were used, and of the peak after a reset."""
    before = _memory_of_this_process(reset=True)["VmRSS"]
    block = torch.ones(25_000_000)
    assert block.sum() > 0
    del block
    with_block = _memory_of_this_process()["VmHWM"] - before
    return with_block, _memory_of_this_process(reset=True)["VmHWM"] - before


def test_a_larger_batch_takes_more_memory_and_a_lost_process_is_told(tmp_path: Path) -> None:
    images = named.load("digits:0-4", "train")
    arguments = architectures.arguments_for(images)
    model = architectures.build("lenet5", **arguments)
    file = tmp_path / "network.safetensors"
    checkpoints.save(file, checkpoints.Checkpoint(model, "lenet5", arguments, "digits:0-4", images.classes))
    posterior = stochbn.fit(model, [next(images.batches(64))[0]], 16)
    (x, _), *_ = images.batches(600)
    assert _peak_of_a_process(file, None, x) > 2 * _peak_of_a_process(file, None, x[:60])
    assert _peak_of_a_process(file, posterior, x[:60]) > 0
    with pytest.raises(ValueError, match="the process that does it has ended"):
        _peak_of_a_process(tmp_path / "missing.safetensors", None, x)
