"""The command line under torchrun: what one process writes, by rank 0 alone, and no rank that waits for ever."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import stochbn
from posterior_contract import nearly_same
from stochbn.cli.job import check_command, check_gpus, own_gpu
from stochbn.cli.streams import share
from stochbn.distributed import Ranks
from stochbn.sources import LoaderObjects, build, open_objects
from stochbn.sources.named import Images

MODULE = """
import os, torch
import numpy as np
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

def places():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1))

def uneven():
    with np.load("data.npz") as file:
        x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
    ends = [0, 7, 200, 201, 430, 620]
    return [(x[a:b], y[a:b]) for a, b in zip(ends, ends[1:])]

def one_batch():
    return [(torch.zeros(8, 4), torch.zeros(8, dtype=torch.long))]

class Failing(nn.Sequential):
    def forward(self, x):
        if os.environ.get("RANK") == "1" and len(x) > 1:
            raise RuntimeError("rank one's disk is gone")
        return super().forward(x)

def failing():
    return Failing(*network())

def broken():
    if os.environ.get("RANK") == "1":
        raise OSError("the disk is gone")
    return network()
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TIMEOUT = 200


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("ranked.py").write_text(MODULE)
    sys.modules.pop("ranked", None)
    save_file(build("ranked:network", {}).model.state_dict(), "w.safetensors")
    x = np.random.default_rng(0).normal(size=(620, 4)).astype("float32")
    np.savez("data.npz", x=x, y=(x[:, 0] > 0).astype("int64") + (x[:, 1] > 1))
    return tmp_path


def run(
    *arguments: object, ranks: bool = False, options: tuple[str, ...] = (), fails: bool = False,
    environment: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    start = [*TORCHRUN, *options, "-m", "stochbn"] if ranks else [sys.executable, "-m", "stochbn"]
    done = subprocess.run(
        [*start, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr if fails else done.stdout


def own(model: str = "network", *more: str) -> list[str]:
    return ["--model", f"ranked:{model}", "--weights", "w.safetensors", *more]


def test_shards_have_every_object_once_in_whole_batches() -> None:
    images = Images(torch.arange(23).view(-1, 1, 1, 1).byte(), torch.arange(23), ("a",), "numbers")
    loader = LoaderObjects("loader", [torch.arange(i, i + 3).float()[:, None] for i in range(0, 21, 3)])
    for count in (1, 2, 5):
        shards = [images.shard(rank, count, 4) for rank in range(count)]
        assert sorted(torch.cat([shard.labels for shard in shards]).tolist()) == list(range(23))
        starts = [labels[0].item() for shard in shards for _, labels in shard.batches(4)]
        assert all(start % 4 == 0 for start in starts)
        seen = [inputs[0].item() for r in range(count) for inputs, _ in loader.shard(r, count, 4).batches(4)]
        assert sorted(seen) == list(range(0, 21, 3))
        assert sum(len(loader.shard(rank, count, 4)) for rank in range(count)) == 21


def test_rows_are_sharded_in_their_order(home: Path) -> None:
    rows = open_objects("data.npz").shuffled(1)
    assert not isinstance(rows, LoaderObjects)
    whole = list(rows.batches(16))
    first, second = (list(rows.shard(rank, 2, 16).batches(16)) for rank in (0, 1))
    for i, (inputs, _) in enumerate(whole):
        assert torch.equal((first, second)[i % 2][i // 2][0], inputs)


def test_ranks_share_batches_evenly_and_never_twice() -> None:
    batches = [torch.arange(5.0)[:, None], torch.arange(5.0, 8.0)[:, None], torch.arange(3.0)[:, None, None]]
    assert share(batches, 0, 1) is batches
    shares = [share(batches, rank, 3) for rank in range(3)]
    assert [[one.flatten().tolist() for one in parts] for parts in shares] == [
        [[0, 1], [0]],
        [[2, 3], [1]],
        [[4, 5], [2]],
    ]  # 6 and 7 are left out
    (named,) = share([{"a": torch.arange(4), "b": torch.arange(8).view(4, 2)}], 1, 2)
    assert named["a"].tolist() == [2, 3]
    assert named["b"].tolist() == [[4, 5], [6, 7]]
    with pytest.raises(ValueError, match="fewer examples than the 9 ranks; start fewer"):
        share(batches, 0, 9)
    with pytest.raises(ValueError, match="got list; use one process"):
        share([["text"]], 0, 2)


def test_commands_that_share_no_work_are_refused_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    check_command("predict")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_command("predict")  # of another kind of job
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_command("fit")
    with pytest.raises(ValueError, match="'stochbn predict' under torchrun would do all its work 2 times; predict"):
        check_command("predict")


@pytest.mark.parametrize(
    ("devices", "seen"),
    [(None, ["0", "1", "2"]), ("4,6", ["4", "6", ""]), ("GPU-a,GPU-b,GPU-c", ["GPU-a", "GPU-b", "GPU-c"]), ("", [""])],
)
def test_a_rank_sees_the_gpu_of_its_local_number(devices: str | None, seen: list[str]) -> None:
    assert [own_gpu(local, devices) for local in range(len(seen))] == seen


class Some(Ranks):
    """Four ranks, of which some others see a GPU."""

    def __init__(self, others: int) -> None:
        super().__init__(None)
        self.count, self._others = 4, others

    def total(self, values: torch.Tensor) -> torch.Tensor:
        return values + self._others


def test_a_job_with_fewer_gpus_than_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_gpus(Some(0))
    with pytest.raises(ValueError, match="3 of 4 ranks see a GPU, one each; give --nproc-per-node the number of GPUs"):
        check_gpus(Some(3))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_gpus(Some(3))
    with pytest.raises(ValueError, match="1 of 4 ranks see a GPU"):
        check_gpus(Some(0))


class TestTorchrun:
    pytestmark: ClassVar = [pytest.mark.long, pytest.mark.timeout(2 * TIMEOUT)]

    @pytest.mark.parametrize("kind", ["factorized", "joint"])
    def test_fit_is_that_of_one_process(self, home: Path, kind: str) -> None:
        arguments = ["fit", *own(), "--data", "data.npz", "--kind", kind, "--out"]
        run(*arguments, "one")
        told = run(*arguments, "two", ranks=True)
        assert told.count("Saved the posterior") == 1
        one, two = stochbn.load("one"), stochbn.load("two")
        assert one.mini_batches == two.mini_batches == 620 // 16
        torch.testing.assert_close(one.expected, two.expected, rtol=1e-6, atol=1e-6)
        if kind == "factorized":
            nearly_same(one, two)

    @pytest.mark.parametrize("examples", [512, 300])
    def test_adapt_is_that_of_one_process(self, home: Path, examples: int) -> None:
        with np.load("data.npz") as file:
            x = torch.from_numpy(file["x"])
        model = build("ranked:network", {}).model.train()
        for _ in range(60):
            model(x)
        save_file(model.state_dict(), "w.safetensors")
        run("fit", *own(), "--data", "data.npz")
        np.save("new.npy", 2 * x.numpy() + 1)
        arguments = ["adapt", *own(), "--data", "new.npy", "--examples", examples, "--out"]
        run(*arguments, "one", "--weights-out", "one.safetensors")
        told = run(*arguments, "two", "--weights-out", "two.safetensors", ranks=True)
        assert told.count("Saved the posterior") == 1
        one, two = stochbn.load("one"), stochbn.load("two")
        torch.testing.assert_close(one.expected, two.expected, rtol=1e-4, atol=1e-5)
        assert one.adaptation is not None
        assert two.adaptation is not None
        assert one.adaptation.moved
        assert one.adaptation.examples == two.adaptation.examples == examples
        assert two.adaptation.look == pytest.approx(one.adaptation.look)
        assert two.adaptation.mix == pytest.approx(one.adaptation.mix, abs=1e-4)
        first, second = (load_file(f"{name}.safetensors") for name in ("one", "two"))
        for name, values in first.items():
            torch.testing.assert_close(values, second[name], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("command", ["evaluate", "calibrate", "fit", "adapt"])
    def test_a_network_that_fails_on_one_rank_ends_all_with_its_error(self, home: Path, command: str) -> None:
        stochbn.fit(build("ranked:network", {}).model, [torch.randn(64, 4)]).save("w.sbn.safetensors")
        option = "--held-out" if command == "calibrate" else "--data"
        told = run(command, *own("failing"), option, "data.npz", ranks=True, fails=True)
        assert "rank one's disk is gone" in told
        assert "Connection" not in told

    @pytest.mark.parametrize("data", ["data.npz", "ranked:uneven"])
    def test_objects_are_in_the_order_of_one_process(self, home: Path, data: str) -> None:
        """Which cross-validation of the temperature goes by, and the pictures of a page."""
        run("fit", *own(), "--data", "data.npz")
        arguments = ["evaluate", *own(), "--data", data, "--ood", data, "--draws", "2", "--out"]
        run(*arguments, "results-1")
        run(*arguments, "results-2", ranks=True)
        first, second = (
            _numbers(json.loads(Path(f"results-{n}/results.json").read_text())["scores"][0]) for n in (1, 2)
        )  # the plain network's
        assert second == pytest.approx(first, rel=1e-5)
        assert first[".calibrated_nll"] > 0

    @pytest.mark.parametrize("task", ["regression", "multilabel", "dense"])
    def test_evaluate_of_other_tasks_gives_what_one_process_gives(self, home: Path, task: str) -> None:
        x = np.random.default_rng(1).normal(size=(330, 4)).astype("float32")
        labels = {"regression": x[:, :3], "multilabel": (x[:, :3] > 0).astype("int64")}
        if task == "dense":
            x = np.random.default_rng(1).normal(size=(330, 2, 4, 5)).astype("float32")
            labels["dense"] = np.where(x[:, 0] > 1, 255, (x[:, 1] > 0).astype("int64"))
        np.savez("test.npz", x=x, y=labels[task])
        model = build("ranked:places" if task == "dense" else "ranked:network", {}).model
        save_file(model.state_dict(), "w.safetensors")
        stochbn.fit(model, [torch.from_numpy(x)]).save("w.sbn.safetensors")
        given = own("places", "--dense", "--ignore", "255") if task == "dense" else own("network", "--task", task)
        arguments = ["evaluate", *given, "--data", "test.npz", "--draws", "8", "--out"]
        run(*arguments, "results-1")
        told = run(*arguments, "results-2", ranks=True)
        assert told.count("Results are in") == 1
        first, second = (json.loads(Path(f"results-{n}/results.json").read_text())["scores"] for n in (1, 2))
        assert second["plain"] == pytest.approx(first["plain"], rel=1e-5)
        loss = "rmse" if task == "regression" else "nll"
        assert second["SBN"][loss] == pytest.approx(first["SBN"][loss], rel=0.02)
        assert second["SBN"] != first["plain"]

    def test_fewer_batches_than_ranks_are_calibrated_with(self, home: Path) -> None:
        run("fit", *own(), "--data", "data.npz")
        with np.load("data.npz") as file:
            np.savez("few.npz", x=file["x"][:90], y=file["y"][:90])
        arguments = ["calibrate", *own(), "--held-out", "few.npz", "--out"]
        run(*arguments, "one")
        run(*arguments, "two", ranks=True)
        one, two = stochbn.load("one"), stochbn.load("two")
        assert one.batch_size == two.batch_size
        assert one.temperature == pytest.approx(two.temperature, rel=1e-6)

    def test_a_loader_with_fewer_batches_than_ranks_is_refused(self, home: Path) -> None:
        told = run("evaluate", *own(), "--data", "ranked:one_batch", ranks=True, fails=True)
        assert "ranked:one_batch gives fewer batches than the 2 ranks; start fewer" in told

    def test_calibrate_and_evaluate_give_what_one_process_gives(self, home: Path) -> None:
        run("fit", *own(), "--data", "data.npz")
        arguments = ["calibrate", *own(), "--held-out", "data.npz", "--out"]
        run(*arguments, "one")
        told = run(*arguments, "two", ranks=True)
        assert told.count("Saved the posterior") == 1
        one, two = stochbn.load("one"), stochbn.load("two")
        assert one.batch_size == two.batch_size
        assert one.temperature == pytest.approx(two.temperature, rel=1e-6)
        arguments = ["evaluate", *own(), "--data", "data.npz", "--draws", "8", "--out"]
        run(*arguments, "results-1")
        run(*arguments, "results-2", ranks=True)
        scores = [json.loads(Path(f"results-{n}/results.json").read_text()) for n in (1, 2)]
        first, second = (_numbers(one) for one in scores)
        assert first.keys() == second.keys()
        for name, value in first.items():
            if name.startswith(".scores.0."):  # the plain network's; ranks do not share a generator of draws
                assert second[name] == pytest.approx(value, rel=1e-5), name
            elif name.endswith(".nll"):
                assert second[name] == pytest.approx(value, rel=0.02), name

    @pytest.mark.parametrize("command", ["fit", "evaluate"])
    def test_an_error_of_one_rank_ends_all_with_it(self, home: Path, command: str) -> None:
        started = time.monotonic()
        told = run(command, *own("broken"), "--data", "data.npz", ranks=True, fails=True)
        assert "the disk is gone" in told
        assert told.count("\nError: 'ranked:broken' cannot be built") == 1
        assert time.monotonic() - started < TIMEOUT / 2
        assert not Path("w.sbn.safetensors").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [(["predict", "--out", "p.csv"], "takes --engine ray"), (["fit", "--task", "none"], "unknown task 'none'")],
    )
    def test_what_every_rank_finds_wrong_is_told_once(self, home: Path, arguments: list[str], message: str) -> None:
        command, *more = arguments
        told = run(command, *own(), "--data", "data.npz", *more, ranks=True, fails=True)
        assert f"\n{told}".count("\nError: ") == 1
        assert message in told

    def test_members_are_trained_by_ranks_and_go_on_after_a_kill(self, home: Path) -> None:
        arguments = ["paper", "reproduce", "lenet5", "--preset", "smoke", "--data", "digits:0-4", "--unknown"]
        arguments += ["digits:5-9", "--epochs", "6", "--members", "3", "--dropout", "0", "--draws", "4", "--out"]
        run(*arguments, "one", "--jobs", 1)
        told = _killed(*arguments, "two", waits_for=Path("two/plain-1/training.safetensors"))
        assert told.count("Everything is in") == 1
        one, two = (_numbers(json.loads(Path(f"{name}/results.json").read_text())) for name in ("one", "two"))
        assert one == two

    def test_snapshots_are_taken_by_ranks_and_go_on_after_a_kill(self, home: Path) -> None:
        reproduce = ["paper", "reproduce", "lenet5", "--preset", "smoke", "--data", "digits:0-4", "--unknown", "none"]
        reproduce += ["--epochs", "2", "--members", "2", "--dropout", "0", "--draws", "4", "--held-out", "0.2", "--out"]
        run(*reproduce, "one", "--jobs", 1)
        shutil.copytree("one", "two")
        arguments = ["--augment", "shift:1", "--members", "2", "--count", "2", "--count", "4", "--images", "60"]
        arguments += ["--snapshots", "3", "--cycle", "adam:0.001:4"]
        run("paper", "augment", "one", *arguments)
        place = Path("two/plain-1/snapshots/3x4-adam-0.001")
        told = _killed("paper", "augment", "two", *arguments, waits_for=place / "snapshot-0.safetensors")
        assert told.count("Everything is in") == 1
        assert len(list(place.glob("*.sbn.safetensors"))) == 3
        one, two = (_numbers(json.loads(Path(f"{name}/augmentation.json").read_text())) for name in ("one", "two"))
        assert one == two


def _killed(*arguments: str, waits_for: Path) -> str:
    """What a command says whose rank 1 is killed once a file is there, and started again."""
    command = [*TORCHRUN, "--max-restarts", "3", "-m", "stochbn", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        end = time.monotonic() + TIMEOUT
        while not waits_for.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        if began := waits_for.exists():
            os.kill(_rank_of(process.pid, 1), signal.SIGKILL)
        told, _ = process.communicate(timeout=TIMEOUT)
    assert began, told
    assert process.returncode == 0, told
    return told


def _numbers(value: Any, name: str = "") -> dict[str, float]:
    """All numbers in nested JSON, by where they are, but for times."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _numbers(inner, f"{name}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in _numbers(inner, f"{name}.{i}").items()}
    timed = "seconds" in name
    return {name: float(value)} if isinstance(value, (int, float)) and not timed else {}


def _rank_of(parent: int, rank: int) -> int:
    """The process of a rank that torchrun started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun has no process of rank {rank}")
