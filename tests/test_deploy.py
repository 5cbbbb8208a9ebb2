"""`stochbn.deploy`: the columns of predictions by a callable class, and the parts of a table by Ray."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import stochbn
from stochbn.deploy import Scorer
from stochbn.deploy.engine import PartScorer
from stochbn.sources import ParquetObjects, build

MODULE = """
import os, time
import torch
from torch import nn

classes = ["bird", "cat", "dog"]

def network(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, outputs))

def images():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

class Watched(nn.Sequential):
    # leaves the most memory that its process has taken so far, in KiB
    def forward(self, x):
        import resource
        with open(f"peak-{os.getpid()}", "w") as file:
            file.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
        return super().forward(x)

def wide():
    torch.manual_seed(0)
    return Watched(nn.Linear(WIDTH, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

class Slow(nn.Sequential):
    # leaves its process's number where the test finds it
    def forward(self, x):
        open(f"actor-{os.getpid()}", "w").close()
        time.sleep(0.1)
        return super().forward(x)

def slow():
    return Slow(*network())

class Seen(Slow):
    # leaves what GPUs its actor may use
    def forward(self, x):
        with open(f"gpu-{os.getpid()}", "w") as file:
            file.write(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
        return super().forward(x)

def seen():
    return Seen(*network())
"""
WIDTH = 12_288
"""Numbers of an example of `wide`: 48 KiB."""
MODULE = f"WIDTH = {WIDTH}\n{MODULE}"
SCORED = ["class", "probability", "entropy", "mutual_information", "error"]

ROWS = 230


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A folder with a network, its weights and posterior, and a folder of Parquet files: the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = f"deployed_{abs(hash(request.node.name))}"
    Path("name").write_text(module)
    Path(f"{module}.py").write_text(MODULE)
    model = build(f"{module}:network", {}).model
    save_file(model.state_dict(), "w.safetensors")
    x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1))
    stochbn.fit(model, [x], 16).save("w.sbn.safetensors")
    Path("data").mkdir()
    columns: dict[str, Any] = {f"x{i}": x[:, i].numpy() for i in range(4)}
    table = pyarrow.table({**columns, "name": [f"object {i}" for i in range(ROWS)]})
    for number, (start, length) in enumerate(((0, 40), (40, 1), (41, ROWS - 41))):
        piece = table.slice(start, length)
        pyarrow.parquet.write_table(piece, f"data/{number:02d}.parquet", row_group_size=33)
    return tmp_path


def network(name: str = "network") -> str:
    return f"{Path('name').read_text()}:{name}"


def table_rows(path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return found


def command(out: str, *options: object, model: str = "network", data: str = "data") -> list[str]:
    given = ["--model", network(model), "--weights", "w.safetensors", "--data", data, "--out", out]
    arguments = [*given, "--batch", 10, "--part", 20, "--draws", 16, "--seed", 3, *options]
    inputs = [word for i in range(4) for word in ("--input", f"x{i}")]
    return [sys.executable, "-m", "stochbn", "predict", *map(str, arguments), *inputs]


def predict(out: str, *options: object, model: str = "network", data: str = "data", timeout: int = 200) -> str:
    done = subprocess.run(
        command(out, *options, model=model, data=data), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def columns_of(start: int = 0, stop: int = ROWS) -> dict[str, np.ndarray[Any, Any]]:
    table = pyarrow.concat_tables([pyarrow.parquet.read_table(path) for path in sorted(Path("data").iterdir())])
    return {name: table[name].to_numpy()[start:stop] for name in table.column_names}


def scorer(**changes: Any) -> Scorer:
    given: dict[str, Any] = {"weights": "w.safetensors", "posterior": "w.sbn.safetensors", "draws": 16, "seed": 3}
    given |= {"inputs": [f"x{i}" for i in range(4)], "tolerance": 0}
    return Scorer(network(), **{**given, **changes})


def test_a_scorer_adds_the_columns_of_the_command_however_rows_are_batched(home: Path) -> None:
    predict("p.parquet", "--tolerance", 0, "--key", "name")
    expected = table_rows("p.parquet")
    one = scorer()
    for size in (7, 100):
        start = 0
        for start in range(0, ROWS, size):
            batch = columns_of(start, start + size)
            scored = one(batch)
            assert list(scored) == [*batch, *SCORED]
            for i, row in enumerate(expected[start : start + size]):
                assert scored["name"][i] == row["name"]
                assert scored["class"][i] == row["class"]
                assert scored["error"][i] is None
                for name in ("probability", "entropy", "mutual_information"):
                    assert scored[name][i] == pytest.approx(row[name], rel=1e-4, abs=1e-6)


def test_a_scorer_keeps_nothing_of_the_batches_it_has_seen(home: Path) -> None:
    psutil = pytest.importorskip("psutil")
    save_file(build(network("wide"), {}).model.state_dict(), "wide.safetensors")
    score = Scorer(network("wide"), "wide.safetensors", inputs=["x"])
    process, taken = psutil.Process(), []
    for number in range(60):
        score({"x": np.full((100, WIDTH), number, "float32")})
        taken.append(process.memory_info().rss / 2**20)
    assert taken[-1] - taken[9] < 60, "50 batches of 4.7 MiB each"


def test_images_as_bytes_as_datasets_has_them_and_as_arrays(home: Path) -> None:
    model = build(network("images"), {}).model
    stochbn.fit(model, [torch.rand(64, 3, 8, 8)], 16).save("i.sbn.safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    encoded = []
    for one in pixels:
        file = io.BytesIO()
        Image.fromarray(one).save(file, "PNG")
        encoded.append(file.getvalue())
    score = Scorer(network("images"), posterior="i.sbn.safetensors", draws=8, inputs=["image"], top=2)
    plain = score({"image": np.array(encoded, dtype=object)})
    stored = score({"image": np.array([{"bytes": data, "path": None} for data in encoded], dtype=object)})
    arrays = score({"image": pixels})
    for name in ("class", "class_2", "probability", "probability_2", "entropy"):
        assert list(plain[name]) == list(stored[name]) == list(arrays[name])


def test_a_row_that_cannot_be_read_has_an_error_and_no_numbers(home: Path) -> None:
    model = build(network("images"), {}).model
    stochbn.fit(model, [torch.rand(64, 3, 8, 8)], 16).save("i.sbn.safetensors")
    good = io.BytesIO()
    Image.new("RGB", (8, 8)).save(good, "PNG")
    score = Scorer(network("images"), posterior="i.sbn.safetensors", draws=8)
    scored = score({"image": np.array([b"no image", good.getvalue(), None], dtype=object)})
    assert scored["class"][0] is None
    assert np.isnan(scored["entropy"][0])
    assert "cannot be read as an image" in scored["error"][0]
    assert scored["error"][1] is None
    assert scored["error"][2] == "is empty"


@pytest.fixture
def of_images(home: Path) -> Scorer:
    """A scorer of images, beside files that no request may reach."""
    model = build(network("images"), {}).model
    stochbn.fit(model, [torch.rand(64, 3, 8, 8)], 16).save("i.sbn.safetensors")
    Path("private.png").write_bytes(encoded())
    os.mkfifo("pipe.png")
    return Scorer(network("images"), posterior="i.sbn.safetensors", draws=8, pixels=100)


def encoded(size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


FILES = [
    "private.png",
    "missing.png",
    "pipe.png",
    "/etc/passwd",
    "/no/such",
    "file:///etc/passwd",
    "http://127.0.0.1:9/",
]
WAYS: dict[str, Any] = {
    "a text": str,
    "a text of NumPy": np.str_,
    "a path": Path,
    "bytes": str.encode,
    "an array of bytes": lambda name: np.array([name.encode()]),
    "a path beside no bytes": lambda name: {"bytes": None, "path": name},
    "a path alone": lambda name: {"path": name},
    "a path as bytes": lambda name: {"bytes": name, "path": None},
    "a URL": lambda name: {"url": name},
    "an address of a chat": lambda name: {"image_url": {"url": name}},
    "a list": lambda name: [name],
    "a nested list": lambda name: [[[name, 1.0]]],
    "an array": lambda name: np.array([name]),
    "an array of objects": lambda name: np.array([Path(name), 1], dtype=object),
    "base64": lambda name: {"base64": base64.b64encode(name.encode()).decode()},
    "no base64": lambda name: {"base64": name},
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("way", WAYS)
def test_a_request_opens_no_file_and_does_not_tell_whether_there_is_one(way: str, of_images: Scorer) -> None:
    requests = [WAYS[way](name) for name in FILES]
    rows = of_images.answer([encoded(), *requests])
    assert rows[0]["error"] is None
    assert all(row["error"] and "class" not in row for row in rows[1:])
    if way != "no base64":  # of which the decoder tells the characters
        assert len({row["error"] for row in rows[1:]}) == 1
    for name, row in zip(FILES, rows[1:], strict=True):
        assert name not in row["error"]
        assert "0x" not in row["error"], "no addresses of memory"
    column = np.empty(len(FILES), dtype=object)
    column[:] = requests
    scored = of_images({"image": column})
    assert all(scored["error"])
    assert "class" not in scored


def test_a_request_takes_images_as_bytes_and_as_base64(of_images: Scorer) -> None:
    content = encoded()
    text = base64.b64encode(content).decode()
    given = [content, bytearray(content), memoryview(content), {"bytes": content}, {"base64": text},
             {"bytes": content, "path": "/etc/passwd"}, Image.open(io.BytesIO(content))]  # fmt: skip
    rows = of_images.answer(given)
    assert [row["error"] for row in rows] == [None] * len(given)
    assert len({row["entropy"] for row in rows}) == 1


def test_an_image_of_more_pixels_than_are_allowed_is_an_error(of_images: Scorer) -> None:
    rows = of_images.answer([encoded((10, 10)), encoded((10, 11))])
    assert rows[0]["error"] is None
    assert "is an image of 110 pixels, where at most 100 are decoded" in rows[1]["error"]


@pytest.mark.parametrize(
    "item", ["1.5", ["1", "2", "3", "4"], None, {}, [None] * 4, [1, 2, 3, "4"], True, [[1, 2], [3]], [1, 2, 3, 10**400],
             [1.0, 2.0, 3.0, 1e300], 1 + 2j, [np.datetime64("2020-01-01")] * 4, [[]], object()]
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_what_is_no_list_of_numbers_is_an_error_of_its_row(item: Any, home: Path) -> None:
    good = [0.1, 0.2, 0.3, 0.4]
    rows = scorer(inputs=None).answer([good, item, [Decimal("0.1"), 0.2, 0.3, 0.4]])
    assert rows[1]["error"]
    assert "class" not in rows[1]
    assert rows[0]["error"] is None
    assert rows[2]["error"] is None
    assert rows[2]["entropy"] == pytest.approx(rows[0]["entropy"], rel=1e-5)


@pytest.mark.parametrize("request_", ["/etc/passwd", b"/etc/passwd", {"inputs": []}, None, Path("x")])
def test_a_request_is_a_list(request_: Any, home: Path) -> None:
    with pytest.raises(TypeError, match="expected a list of examples"):
        scorer(inputs=None).answer(request_)


def test_bad_arguments_are_told(home: Path) -> None:
    with pytest.raises(TypeError, match="name the network by where it is built"):
        Scorer(build(network(), {}).model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"inputs must be a list of columns, such as \['x0'\]"):
        scorer(inputs="x0")
    with pytest.raises(ValueError, match="no column 'y'; name those of the network's inputs, among x0"):
        scorer(inputs=["y"])(columns_of())
    with pytest.raises(ValueError, match="has a column 'entropy', as one of the predictions is called"):
        scorer()({**columns_of(), "entropy": columns_of()["x0"]})
    with pytest.raises(FileNotFoundError):
        scorer(posterior="missing")


def settle() -> None:
    """Have the network's running statistics be those of its data, as after training, and fit it again."""
    inputs = torch.from_numpy(np.stack([columns_of()[f"x{i}"] for i in range(4)], 1))
    model = build(network(), {}).model.train()
    for _ in range(60):
        model(inputs)
    save_file(model.eval().state_dict(), "w.safetensors")
    stochbn.fit(model, [inputs], 16, reference=[inputs.repeat(3, 1)]).save("w.sbn.safetensors")


def test_a_scorer_watches_what_it_predicts(home: Path) -> None:
    settle()
    watched, plain = scorer(inputs=None, monitor=True), scorer(inputs=None)
    nothing = {"alarm": False, "evidence": 0, "batches": 0, "latest": None, "not_compared": 0, "why": ""}
    assert watched.shift() == nothing
    x = columns_of()
    inputs = np.stack([x[f"x{i}"] for i in range(4)], 1)
    for rows in (inputs[:16], inputs[16:17], inputs[20:60]):
        assert watched.answer(rows.tolist()) == plain.answer(rows.tolist())
    found = watched.shift()
    assert (found["batches"], found["latest"]["examples"]) == (3, 40)
    assert not found["alarm"]
    assert "is unusual" in found["latest"]["says"]
    assert json.loads(json.dumps(found)) == found
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: watched.answer((3 * inputs[i : i + 16] + 2).tolist()), range(12)))
    found = watched.shift()
    assert found["batches"] == 15
    assert found["alarm"]
    assert "the look of the inputs is unusual" in found["latest"]["says"]


def test_what_a_scorer_cannot_watch_is_predicted_all_the_same(home: Path) -> None:
    settle()
    watched = scorer(inputs=None, monitor=True)
    rows = watched.answer([[1.0, float("nan"), 0.0, 0.0], [0.0, 1.0, 2.0, 3.0], "no number"])
    assert [row["error"] is None for row in rows] == [False, True, False]
    assert watched.shift()["latest"]["examples"] == 1
    watched.answer([["none of these", 1.0]])
    watched.answer([[3e38, -3e38, 3e38, 0.0]])
    found = watched.shift()
    assert found["batches"] == 1
    assert found["not_compared"] == 1
    assert "not finite" in found["why"]
    with pytest.raises(ValueError, match="make the Scorer with monitor=True"):
        scorer().shift()
    with pytest.raises(ValueError, match="name a posterior"):
        scorer(posterior=None, monitor=True)
    stochbn.fit(build(network(), {}).model, [torch.randn(40, 4)], 16).save("few.sbn.safetensors")
    with pytest.raises(ValueError, match="no reference to compare"):
        scorer(posterior="few.sbn.safetensors", monitor=True)


def test_export_is_under_deploy_too() -> None:
    assert stochbn.deploy.export is stochbn.export


def test_parts_are_those_of_one_pass_over_all_rows(home: Path) -> None:
    stream = ParquetObjects.open("data")
    assert len(stream) == ROWS
    keys = [key for chunk in stream.chunks(10) for key in chunk.keys]
    assert keys == list(range(ROWS))
    whole = torch.cat([chunk.inputs for chunk in stream.chunks(10)])
    for start, stop in ((0, 20), (20, 60), (39, 42), (220, 400)):
        chunks = list(stream.chunks(10, start, stop))
        assert torch.equal(torch.cat([chunk.inputs for chunk in chunks]), whole[start:stop])
        assert chunks[0].keys[0] == start


def test_a_part_is_scored_from_its_number_alone(home: Path) -> None:
    arguments = {"model": network(), "weights": "w.safetensors", "posterior": "w.sbn.safetensors", "draws": 16}
    parts = PartScorer(ParquetObjects.open("data"), arguments, batch=10, part=20, folder=str(home))
    last, again = parts({"id": np.array([11])}), parts({"id": np.array([11])})
    assert last["table"][0] == again["table"][0]
    assert pyarrow.ipc.open_stream(last["table"][0]).read_all()["row"][0].as_py() == 220


def test_engines_and_files_that_do_not_go_together_are_told(home: Path) -> None:
    def told(*options: object) -> str:
        done = subprocess.run(command("p.csv", *options), capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 1
        return done.stderr

    assert "--engine must be local or ray, got 'dask'" in told("--engine", "dask")
    assert "--workers 2 needs --engine ray" in told("--workers", 2)


needs_ray = [
    pytest.mark.long,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs Ray: pip install 'stochbn[ray]'"),
]


class TestRay:
    pytestmark: ClassVar = needs_ray

    @pytest.mark.parametrize("options", [("--tolerance", 0), ("--key", "name"), ()])
    def test_rays_table_is_the_local_one(self, home: Path, options: tuple[object, ...]) -> None:
        predict("local.parquet", *options)
        for workers in (1, 2):
            predict("ray.parquet", *options, "--engine", "ray", "--workers", workers)
            assert table_rows("ray.parquet") == table_rows("local.parquet")
        assert not Path("ray.parquet.parts").exists()

    def test_a_worker_that_is_killed_loses_and_doubles_nothing(self, home: Path) -> None:
        killed: list[int] = []

        def kill() -> None:
            end = time.monotonic() + 120
            while time.monotonic() < end:
                if len(list(Path("p.parquet.parts").glob("part-*"))) >= 2:
                    number = int(next(home.glob("actor-*")).name.removeprefix("actor-"))
                    os.kill(number, signal.SIGKILL)
                    killed.append(number)
                    return
                time.sleep(0.01)

        thread = threading.Thread(target=kill)
        for actor in home.glob("actor-*"):
            actor.unlink()
        thread.start()
        predict("p.parquet", "--engine", "ray", "--workers", 2, model="slow")
        thread.join()
        assert killed
        predict("local.parquet")
        assert table_rows("p.parquet") == table_rows("local.parquet")

    def test_what_was_killed_goes_on_with_either_engine(self, home: Path) -> None:
        with subprocess.Popen(
            command("p.parquet", "--engine", "ray", model="slow"), start_new_session=True, stdout=subprocess.DEVNULL
        ) as process:
            end = time.monotonic() + 120
            while len(list(Path("p.parquet.parts").glob("part-*"))) < 2 and time.monotonic() < end:
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
        before = {path.name: path.stat().st_mtime_ns for path in Path("p.parquet.parts").glob("part-*")}
        assert 2 <= len(before) < 12
        predict("p.parquet", model="slow")
        predict("local.parquet")
        assert table_rows("p.parquet") == table_rows("local.parquet")

    def test_memory_does_not_grow_with_the_number_of_rows(self, home: Path) -> None:
        """Of the process that asks and of its actor, in MiB; the larger data has 188 MiB more."""
        model = build(network("wide"), {}).model
        save_file(model.state_dict(), "wide.safetensors")
        stochbn.fit(model, [torch.randn(64, WIDTH)]).save("wide.sbn.safetensors")
        Path(f"peak-{os.getpid()}").unlink()
        script = """
import os, resource
from stochbn.cli import app
app(standalone_mode=False)
open(f"peak-{os.getpid()}", "w").write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
"""
        peaks: list[list[float]] = []
        for count in (1000, 5000):
            column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(np.zeros(count * WIDTH, "float32")), WIDTH)
            Path(f"wide-{count}").mkdir()
            pyarrow.parquet.write_table(
                pyarrow.table({"x": column}), f"wide-{count}/0.parquet", row_group_size=100, compression="zstd"
            )
            given = ["--model", network("wide"), "--weights", "wide.safetensors", "--data", f"wide-{count}"]
            given += ["--out", f"{count}.parquet", "--input", "x", "--batch", "50", "--part", "250"]
            subprocess.run([sys.executable, "-c", script, "predict", *given, "--engine", "ray"], check=True)
            assert len(table_rows(f"{count}.parquet")) == count
            files = list(home.glob("peak-*"))
            peaks.append(sorted(int(file.read_text()) / 1024 for file in files))
            for file in files:
                file.unlink()
        few, many = peaks
        assert len(few) == len(many) == 2
        for less, more in zip(few, many, strict=True):
            assert more - less < 60

    def test_a_scorer_in_map_batches(self, home: Path) -> None:
        script = f"""
import ray, stochbn
ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)  # two for actors, one to read
scored = ray.data.read_parquet("data").repartition(5).map_batches(
    stochbn.deploy.Scorer,
    fn_constructor_kwargs=dict(model={network()!r}, weights={str(home / "w.safetensors")!r}, draws=16, seed=3,
        posterior={str(home / "w.sbn.safetensors")!r}, inputs=["x0", "x1", "x2", "x3"], tolerance=0),
    compute=ray.data.ActorPoolStrategy(size=2), batch_size=13,
)
scored.to_pandas().to_parquet("scored.parquet")
"""
        environment = {**os.environ, "PYTHONPATH": f"{home}:{os.environ.get('PYTHONPATH', '')}"}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, timeout=250, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        predict("local.parquet", "--tolerance", 0, "--key", "name")
        scored = {row["name"]: row for row in table_rows("scored.parquet")}
        expected = table_rows("local.parquet")
        assert len(scored) == len(expected) == ROWS
        for row in expected:
            assert scored[row["name"]]["class"] == row["class"]
            assert scored[row["name"]]["probability"] == pytest.approx(row["probability"], rel=1e-5)
            assert scored[row["name"]]["mutual_information"] == pytest.approx(row["mutual_information"], abs=1e-6)

    @pytest.mark.parametrize(("gpus", "workers", "seen"), [(2, 2, {"0", "1"}), (1, 2, {"0"}), (0, 2, {"none"})])
    def test_an_actor_sees_one_gpu_of_those_there_are(
        self, home: Path, gpus: int, workers: int, seen: set[str]
    ) -> None:
        """Ray is only told of GPUs: what it shows each actor is what a network in it would take."""
        script = f"""
import ray, sys
ray.init(num_cpus=2, num_gpus={gpus}, include_dashboard=False, log_to_driver=False)
from stochbn.cli import app
app(sys.argv[1:])
"""
        arguments = command("p.parquet", "--engine", "ray", "--workers", workers, model="seen")[3:]
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        environment["PYTHONPATH"] = f"{home}:{os.environ.get('PYTHONPATH', '')}"
        subprocess.run([sys.executable, "-c", script, *arguments], env=environment, timeout=200, check=True)
        assert len(table_rows("p.parquet")) == ROWS
        assert {path.read_text() for path in home.glob("gpu-*")} == seen

    def test_errors_of_workers_are_told_in_one_line(self, home: Path) -> None:
        options = ("--engine", "ray", "--input", "name")
        done = subprocess.run(command("p.csv", *options), capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 1
        assert "holds text" in done.stderr
