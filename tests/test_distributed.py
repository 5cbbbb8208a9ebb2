"""Fitting in a job of several processes: equal to one process's fit, and no rank waits for one that failed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import stochbn
from conftest import dropout_net, mlp, normal, seeded, settled
from posterior_contract import nearly_same, same
from stochbn.distributed import Ranks
from stochbn.posteriors import KINDS

TIMEOUT = 60


def network() -> nn.Module:
    return settled(mlp(), 4)


def data(count: int = 96) -> Tensor:
    return normal(count, 4, seed=3)


def shard(rank: int, sizes: tuple[int, ...]) -> Tensor:
    start = sum(sizes[:rank])
    return data(sum(sizes))[start : start + sizes[rank]]


def _rank(rank: int, count: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=timedelta(seconds=TIMEOUT)
    )
    try:
        work(rank, Path(folder), *arguments)
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
    dist.destroy_process_group()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def run(count: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[str]:
    """Run work in ranks of their own; what each raised, with its trace, or nothing."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_rank, args=(rank, count, str(folder), work, arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + 2 * TIMEOUT
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, "a rank waits for ever"
    files = [folder / f"error-{rank}" for rank in range(count)]
    return [file.read_text() if file.exists() else "" for file in files]


def fit_shards(rank: int, folder: Path, sizes: tuple[int, ...], kind: str) -> None:
    posterior = stochbn.fit(network(), [shard(rank, sizes)], 6, kind, group=dist.group.WORLD)
    posterior.save(folder / f"posterior-{rank}")


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("joint", (60, 36)),
        *(pytest.param(kind, (60, 6, 30), marks=pytest.mark.long) for kind in KINDS),
        pytest.param("joint", (0, 96), marks=pytest.mark.long),
        pytest.param("factorized", (96, 0), marks=pytest.mark.long),
    ],
)
def test_every_rank_gets_what_one_process_fits_to_all_mini_batches(
    kind: str, sizes: tuple[int, ...], folder: Path
) -> None:
    assert not any(run(len(sizes), folder, fit_shards, sizes, kind))
    first = stochbn.load(folder / "posterior-0")
    for rank in range(1, len(sizes)):
        same(stochbn.load(folder / f"posterior-{rank}"), first)
    alone = stochbn.fit(network(), [data()], 6, kind)
    if kind == "joint":  # of mini-batches in another order, so to rounding, and with directions of other signs
        torch.testing.assert_close(first.expected, alone.expected, rtol=1e-6, atol=1e-6)
        assert isinstance(first, stochbn.Joint)
        assert isinstance(alone, stochbn.Joint)
        signs = (first.directions * alone.directions).sum(1, keepdim=True).sign()
        torch.testing.assert_close(signs * first.directions, alone.directions, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(first.residual, alone.residual, rtol=1e-4, atol=1e-6)
    elif kind == "empirical":
        assert isinstance(first, stochbn.Empirical)
        assert isinstance(alone, stochbn.Empirical)
        rows = [sorted(posterior.statistics.flatten(1).tolist()) for posterior in (first, alone)]
        torch.testing.assert_close(torch.tensor(rows[0]), torch.tensor(rows[1]), rtol=1e-6, atol=1e-6)
    else:
        nearly_same(first, alone)
    assert first.mini_batches == alone.mini_batches == 16


def fit_in_turn(rank: int, folder: Path, kind: str) -> None:
    mine = [data()[start : start + 6] for start in range(6 * rank, 96, 12)]
    stochbn.fit(network(), mine, 6, kind, group=dist.group.WORLD).save(folder / f"posterior-{rank}")


@pytest.mark.parametrize("kind", ["joint", "empirical"])
def test_ranks_that_take_turns_draw_what_one_process_draws(kind: str, folder: Path) -> None:
    assert not any(run(2, folder, fit_in_turn, kind))
    drawn = stochbn.load(folder / "posterior-0").draw(9, torch.Generator().manual_seed(0))
    alone = stochbn.fit(network(), [data()], 6, kind).draw(9, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, alone, rtol=1e-5, atol=1e-6)


def drop_and_change() -> dict[str, Any]:
    model = settled(nn.Sequential(nn.Dropout(0.5), *dropout_net()), 4)
    return {"model": model, "augment": lambda x, generator: x + torch.randn(x.shape, generator=generator)}


def fit_with_chance(rank: int, folder: Path) -> None:
    mine = [torch.ones(6, 4) for _ in range(rank, 16, 2)]
    stochbn.fit(**drop_and_change(), batches=mine, batch_size=6, group=dist.group.WORLD).save(folder / f"{rank}")


def test_what_is_drawn_at_random_is_drawn_as_in_one_process(folder: Path) -> None:
    """Equal mini-batches, so that those with the same masks and changes would be equal."""
    assert not any(run(2, folder, fit_with_chance))
    alone = stochbn.fit(**drop_and_change(), batches=[torch.ones(6, 4) for _ in range(16)], batch_size=6)
    found = stochbn.load(folder / "0")
    torch.testing.assert_close(found.draw(5, seeded()), alone.draw(5, seeded()), rtol=1e-5, atol=1e-6)


def fit_unlike(rank: int, folder: Path, unlike: dict[str, Any]) -> None:
    stochbn.fit(network(), [data(48)], **{"batch_size": 6, **(unlike if rank else {})}, group=dist.group.WORLD)


@pytest.mark.parametrize(
    ("unlike", "message"),
    [
        ({"kind": "factorized"}, "rank 1 was called with kind factorized and rank 0 with joint"),
        pytest.param(
            {"batch_size": 8}, "rank 1 was called with batch_size 8 and rank 0 with 6", marks=pytest.mark.long
        ),
        pytest.param({"deterministic": ["1"]}, "rank 1 was called with deterministic ['1']", marks=pytest.mark.long),
        ({"max_batches": 1}, "max_batches must be at least 2, got 1"),
    ],
)
def test_ranks_that_are_called_unlike_are_told_and_none_waits(
    unlike: dict[str, Any], message: str, folder: Path
) -> None:
    for error in run(2, folder, fit_unlike, unlike):
        assert message in error


def calibrate_unlike(rank: int, folder: Path, failing: str) -> None:
    model, posterior = network(), _without_ranks(data())
    if failing == "other weights" and rank:
        with torch.no_grad():
            model.get_parameter("0.weight").mul_(2)
    sizes = [4, 8] if failing == "other sizes" and rank else [8, 16]
    held_out = [(data(24), torch.arange(24) % 3)]
    stochbn.calibrate(model, posterior, held_out, batch_sizes=sizes, group=dist.group.WORLD)


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("other sizes", "rank 1 was called with batch_sizes [4, 8] and rank 0 with [8, 16]"),
        pytest.param("other weights", "rank 1 failed", marks=pytest.mark.long),
    ],
)
def test_ranks_calibrate_alike_or_not_at_all(failing: str, message: str, folder: Path) -> None:
    first, second = run(2, folder, calibrate_unlike, failing)
    assert message in first
    assert second


def fit_or_fail(rank: int, folder: Path, failing: str) -> None:
    def batches() -> Iterator[Tensor]:
        yield data(24)
        if rank == 1 and failing == "raises":
            raise OSError("the disk is gone")
        if rank == 1 and failing == "is interrupted":
            raise KeyboardInterrupt
        if rank == 1 and failing == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        yield data(24)

    model = network()
    if rank == 1 and failing == "has other weights":
        with torch.no_grad():
            next(model.parameters()).mul_(2)
    stochbn.fit(model, batches(), 6, group=dist.group.WORLD)


@pytest.mark.parametrize(
    "failing",
    [
        "raises",
        *(pytest.param(how, marks=pytest.mark.long) for how in ("is interrupted", "is killed", "has other weights")),
    ],
)
def test_no_rank_waits_for_one_that(failing: str, folder: Path) -> None:
    first, second = run(2, folder, fit_or_fail, failing)
    wanted = {
        "raises": ("rank 1 failed: OSError: the disk is gone", "OSError: the disk is gone"),
        "is interrupted": ("rank 1 failed: KeyboardInterrupt", "KeyboardInterrupt"),
        "is killed": ("Error", ""),
        "has other weights": ("rank 1 has a network with other weights", "rank 0 has a network with other weights"),
    }[failing]
    assert wanted[0] in first
    assert wanted[1] in second


def calibrate_shards(rank: int, folder: Path) -> None:
    x = data(96)
    batches = [(x[i : i + 24], torch.arange(24) % 3) for i in range(0, 96, 24)]
    posterior = _without_ranks(data())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine = batches[rank::2]
        stochbn.calibrate(network(), posterior, mine, temperature=True, group=dist.group.WORLD).save(folder / f"{rank}")


def test_ranks_calibrate_to_what_one_process_does(folder: Path) -> None:
    assert not any(run(2, folder, calibrate_shards))
    x = data(96)
    batches = [(x[i : i + 24], torch.arange(24) % 3) for i in range(0, 96, 24)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = stochbn.calibrate(network(), _without_ranks(data()), batches, temperature=True)
    first, second = stochbn.load(folder / "0"), stochbn.load(folder / "1")
    assert first.temperature == second.temperature == pytest.approx(alone.temperature, rel=1e-9)
    assert first.batch_size == second.batch_size == alone.batch_size


def fit_nothing(rank: int, folder: Path) -> None:
    stochbn.fit(network(), [data(0)], 6, group=dist.group.WORLD)


@pytest.mark.long
def test_ranks_without_any_data_are_told(folder: Path) -> None:
    for error in run(2, folder, fit_nothing):
        assert "NoBatchesError: there were no batches to observe" in error


def fit_wrapped(rank: int, folder: Path) -> None:
    model = nn.parallel.DistributedDataParallel(network())
    posterior = stochbn.fit(model, [shard(rank, (48, 48))], 6, "factorized", group=dist.group.WORLD)
    posterior.save(folder / f"posterior-{rank}")


@pytest.mark.long
def test_a_network_in_ddp_is_fitted_as_itself(folder: Path) -> None:
    assert not any(run(2, folder, fit_wrapped))
    nearly_same(stochbn.load(folder / "posterior-1"), stochbn.fit(network(), [data()], 6, "factorized"))


def adapt_shards(rank: int, folder: Path, sizes: tuple[int, ...]) -> None:
    model = network()
    posterior = stochbn.load(folder / "fitted.safetensors")
    group = dist.group.WORLD
    found = stochbn.adapt(model, posterior, [shard(rank, sizes) + 2], group=group)
    found.save(folder / f"adapted-{rank}.safetensors")


def test_ranks_adapt_to_what_one_process_does(folder: Path) -> None:
    model = network()
    posterior = stochbn.fit(model, [normal(320, 4, seed=8)])
    posterior.save(folder / "fitted.safetensors")
    alone = stochbn.adapt(model, posterior, [data(80) + 2])
    assert not any(run(2, folder, adapt_shards, (48, 32)))
    for rank in range(2):
        found = stochbn.load(folder / f"adapted-{rank}.safetensors")
        torch.testing.assert_close(found.expected, alone.expected, rtol=1e-4, atol=1e-5)
        assert found.adaptation is not None
        assert alone.adaptation is not None
        assert found.adaptation.examples == 80
        assert found.adaptation.look == pytest.approx(alone.adaptation.look)


def test_a_rank_that_cannot_adapt_is_told_of_everywhere(folder: Path) -> None:
    stochbn.fit(network(), [normal(320, 4, seed=8)]).save(folder / "fitted.safetensors")
    errors = run(2, folder, adapt_shards, (48, 0))
    assert all("at least one example" in error for error in errors)


def fit_with_reference(rank: int, folder: Path) -> None:
    posterior = stochbn.fit(network(), [normal(320, 4, seed=rank)], group=dist.group.WORLD)
    posterior.save(folder / f"fitted-{rank}.safetensors")


def test_every_rank_gets_the_reference_of_the_first(folder: Path) -> None:
    assert not any(run(2, folder, fit_with_reference))
    first, second = (stochbn.load(folder / f"fitted-{rank}.safetensors").reference for rank in range(2))
    assert first is not None
    assert second is not None
    assert first.description() == second.description()
    assert first.examples == 320
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name])


def fit_alone(rank: int, folder: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = stochbn.fit(network(), [shard(rank, (48, 48))], 6, "factorized")
    (warning,) = [str(one.message) for one in caught]
    assert f"rank {rank} of 2" in warning
    assert "group=torch.distributed.group.WORLD" in warning
    nearly_same(posterior, _without_ranks(shard(rank, (48, 48))))


def _without_ranks(inputs: Tensor) -> stochbn.Factorized:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stochbn.fit(network(), [inputs], 6, kind="factorized")


def test_without_a_group_a_rank_fits_to_its_own_data_and_says_so(folder: Path) -> None:
    assert not any(run(2, folder, fit_alone))


def fit_synchronised(rank: int, folder: Path) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())  # type: ignore[no-untyped-call]
    posterior = stochbn.fit(model, [shard(rank, (60, 36))], 6, kind="factorized", group=dist.group.WORLD)
    posterior.save(folder / f"posterior-{rank}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stochbn.fit(model, torch.split(shard(rank, (60, 36)), 6), None, kind="factorized", group=dist.group.WORLD)
    told = [str(one.message) for one in caught if "all 2 ranks together that SyncBatchNorm" in str(one.message)]
    assert len(told) == (1 if rank == 0 else 0)


@pytest.mark.long
def test_synchronised_batch_norms_observe_mini_batches_of_one_rank(folder: Path) -> None:
    """Which need no GPU then, and no rank has to wait for another at each of them."""
    assert not any(run(2, folder, fit_synchronised))
    nearly_same(stochbn.load(folder / "posterior-0"), stochbn.fit(network(), [data()], 6, "factorized"))


def test_what_is_no_group_is_refused() -> None:
    with pytest.raises(TypeError, match="group must be a process group"):
        stochbn.fit(network(), [data()], 6, group="world")


CHANNELS, MINI_BATCHES = 8192, 128


def memory(name: str) -> int:
    """A field of what Linux says of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def merge_and_measure(rank: int, folder: Path) -> None:
    """Write what merging takes of a rank's memory at its peak, in samples of one rank."""
    accumulator = KINDS["joint"].accumulator(max_batches=MINI_BATCHES)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(MINI_BATCHES):
        accumulator.update({"bn": torch.rand(1, 2, CHANNELS, generator=generator).double()})
    size = sum(values.nbytes for values in accumulator.state()[0].values())
    ranks = Ranks(dist.group.WORLD)
    ranks.total(torch.ones(1))  # what the backend itself needs
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    merged = ranks.merged(accumulator)
    (folder / f"peak-{rank}").write_text(str((memory("VmHWM") - before) / size))
    assert merged.seen == dist.get_world_size() * MINI_BATCHES


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is known on Linux only")
def test_memory_of_merging_does_not_grow_with_the_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that the allocator gives back at once what is freed, and the peak is that of what is held.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "32768")
    peaks = []
    for count in (3, 10):
        place = tmp_path / str(count)
        place.mkdir()
        assert not any(run(count, place, merge_and_measure))
        peaks.append(max(float((place / f"peak-{rank}").read_text()) for rank in range(count)))
    assert peaks[1] < peaks[0] + 1, f"{peaks} samples of a rank"  # a sample of each rank that is held would be 7 more
