"""The services in examples/, asked by real requests; and object stores."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

import stochbn
from conftest import normal
from stochbn.sources import build

EXAMPLES = Path(__file__).parents[1] / "examples"
TIMEOUT = 120
LIMITS = {"STOCHBN_MAX_BODY": "65536", "STOCHBN_MAX_ITEMS": "40"}
MODULE = """
import torch
from torch import nn

classes = ["bird", "cat", "dog"]

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
"""


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}: pip install 'stochbn[scale]'")


pytestmark = [pytest.mark.long, pytest.mark.timeout(3 * TIMEOUT)]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("served.py").write_text(MODULE)
    sys.modules.pop("served", None)
    model = build("served:network", {}).model.train()
    for seed in range(60):
        model(normal(96, 4, seed=seed))
    model.eval()
    save_file(model.state_dict(), "w.safetensors")
    stochbn.fit(model, [normal(96, 4)], 16, reference=[normal(512, 4, seed=99)]).save("w.sbn.safetensors")
    return tmp_path


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def running(command: list[str], health: str, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A service, until the block ends; entered when it answers."""
    log = Path("service.log")
    with log.open("wb") as file, subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stdout=file, stderr=file
    ) as process:  # fmt: skip
        try:
            end = time.monotonic() + TIMEOUT
            while True:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                try:
                    with urllib.request.urlopen(health, timeout=5):
                        break
                except OSError:
                    time.sleep(0.2)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def ask(url: str, inputs: Any) -> Any:
    content = json.dumps({"inputs": inputs}).encode()
    request = urllib.request.Request(url, content, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def refused(url: str, inputs: Any) -> tuple[int, dict[str, Any]]:
    """The status and the error of a request that is wrong."""
    with pytest.raises(urllib.error.HTTPError) as found:
        ask(f"{url}/predict", inputs)
    return found.value.code, json.loads(found.value.read())["error"]


def scorer_of() -> stochbn.deploy.Scorer:
    return stochbn.deploy.Scorer(
        "served:network", "w.safetensors", "w.sbn.safetensors", draws=16, settings={}, tolerance=0
    )


def check_rows(answer: Any, expected: list[dict[str, Any]]) -> None:
    assert len(answer["predictions"]) == len(expected)
    for row, other in zip(answer["predictions"], expected, strict=True):
        assert row["class"] == other["class"]
        assert row["entropy"] == pytest.approx(other["entropy"], abs=1e-5)


def check_service(url: str) -> None:
    """Requests side by side get what a scorer gives for each, also beside those that are wrong or slow."""
    x, scorer = normal(40, 4), scorer_of()
    requests = [x[i % 37 : i % 37 + 1 + i % 3] for i in range(200)]
    with ThreadPoolExecutor(200) as pool, contextlib.ExitStack() as slow:
        for _ in range(20):
            slow.enter_context(half_a_request(url))
        wrong = [pool.submit(refused, url, [[1.0, 2.0]]) for _ in range(10)]
        answers = list(pool.map(lambda inputs: ask(f"{url}/predict", inputs.tolist()), requests))
        assert [one.result()[0] for one in wrong] == [422] * 10
    for inputs, answer in zip(requests, answers, strict=True):
        check_rows(answer, scorer.answer(inputs.tolist()))
    assert ask(f"{url}/predict", []) == {"predictions": []}
    check_limits(url)
    with urllib.request.urlopen(f"{url}/healthz", timeout=5) as answer:
        assert json.loads(answer.read()) == {"status": "ok"}


@contextmanager
def half_a_request(url: str) -> Iterator[socket.socket]:
    """A client that sends half of a request, and then nothing."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n" + b'{"inputs"')
        yield client


def check_limits(url: str) -> None:
    """A request that is too large, or of texts that name files, harms no other; the limits are those of `LIMITS`."""
    for name in ("/etc/passwd", "/no/such/file", "http://127.0.0.1:9/"):
        status, error = refused(url, [name])
        assert status == 422
        assert error["examples"] == [{**refused(url, [{"path": "/no"}, name])[1]["examples"][1], "index": 0}]
    for inputs in ([[0.0] * 4] * 41, [[0.123456789] * 10_000]):
        status, error = refused(url, inputs)
        assert (status, error["code"]) == (413, "too_large")
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 2**20:  # the answer comes before the end, which is never sent
                client.sendall(b"1000\r\n" + 4096 * b" " + b"\r\n")
                sent += 4096
        assert b" 413 " in client.recv(200)


def arguments(home: Path) -> dict[str, Any]:
    files = {"weights": str(home / "w.safetensors"), "posterior": str(home / "w.sbn.safetensors")}
    return {"model": "served:network", **files, "draws": 16, "tolerance": 0}


@contextmanager
def fastapi(home: Path, *options: str, **variables: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The example by uvicorn: its address and process."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "fastapi_service:web", "--port", str(port), *options]
    environment = {
        "PYTHONPATH": f"{EXAMPLES}:{home}:{os.environ.get('PYTHONPATH', '')}",
        "STOCHBN_SCORER": json.dumps(arguments(home) | {"monitor": True}),
        **LIMITS,
        **variables,
    }
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/healthz", environment) as process:
        yield url, process


def metrics_of(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        lines = [line.rpartition(" ") for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


@needs("fastapi", "uvicorn")
def test_fastapi(home: Path) -> None:
    with fastapi(home) as (url, _):
        check_service(url)
        for _ in range(12):
            ask(f"{url}/predict", (3 * normal(16, 4) + 2).tolist())
        with urllib.request.urlopen(f"{url}/shift", timeout=5) as answer:
            assert json.loads(answer.read())["alarm"]
        assert metrics_of(url)["stochbn_shift_alarm"] == 1


@needs("fastapi", "uvicorn")
def test_clients_that_send_half_a_request_are_told_and_keep_no_other_waiting(home: Path) -> None:
    with fastapi(home, STOCHBN_MAX_SECONDS="2") as (url, _), contextlib.ExitStack() as stack:
        slow = [stack.enter_context(half_a_request(url)) for _ in range(50)]
        assert len(ask(f"{url}/predict", [[0.0] * 4])["predictions"]) == 1
        assert all(b" 408 " in client.recv(200) for client in slow)
        assert metrics_of(url)['stochbn_requests_total{status="408"}'] == 50


@needs("fastapi", "uvicorn")
def test_five_thousand_requests_leave_nothing_behind(home: Path) -> None:
    """Memory, threads and open files of the service, after right and wrong requests and clients that go."""
    import httpx

    psutil = pytest.importorskip("psutil")
    x, scorer = normal(40, 4), scorer_of()
    expected = scorer.answer(x.tolist())

    def client(number: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as http:
            for i in range(number, number + 125):
                at = i % 40
                answer = http.post("/predict", json={"inputs": [x[at].tolist()]})
                assert answer.status_code == 200
                check_rows(answer.json(), expected[at : at + 1])
                if i % 10 == 0:
                    assert http.post("/predict", json={"inputs": [["text"] * 100]}).status_code == 422
                    with half_a_request(url):
                        pass

    with fastapi(home) as (url, process):
        service = psutil.Process(process.pid)
        taken = []
        for _ in range(5):
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(client, range(0, 1000, 125)))
            memory = service.memory_info().rss / 2**20
            taken.append((memory, service.num_threads(), len(service.net_connections())))
        assert metrics_of(url)['stochbn_requests_total{status="200"}'] == 5000
    assert taken[-1][0] - taken[0][0] < 10, "MiB, of 4,000 requests"
    assert taken[-1][1] <= taken[0][1]
    assert taken[-1][2] <= taken[0][2] + 8


@needs("fastapi", "uvicorn")
def test_several_processes_have_one_page_of_metrics(home: Path) -> None:
    (home / "metrics").mkdir()
    with fastapi(home, "--workers", "2", PROMETHEUS_MULTIPROC_DIR=str(home / "metrics")) as (url, _):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: ask(f"{url}/predict", [[0.0] * 4]), range(100)))
        assert metrics_of(url)['stochbn_requests_total{status="200"}'] == 100
        assert metrics_of(url)["stochbn_examples_total"] == 100


@needs("fastapi", "uvicorn")
def test_a_service_that_is_ended_answers_what_it_has_taken(home: Path) -> None:
    with fastapi(home) as (url, process), ThreadPoolExecutor(40) as pool:
        before = metrics_of(url).get('stochbn_requests_total{status="200"}', 0)
        asked = [pool.submit(ask, f"{url}/predict", normal(20, 4).tolist()) for _ in range(40)]
        while metrics_of(url).get('stochbn_requests_total{status="200"}', 0) == before:
            time.sleep(0.005)
        process.terminate()
    failed = [error for one in asked if (error := one.exception()) is not None]
    assert len(failed) < 40
    for error in failed:  # these came too late to be taken
        assert isinstance(error, (urllib.error.URLError, ConnectionError))
        assert not isinstance(error, urllib.error.HTTPError)
    assert all(len(one.result()["predictions"]) == 20 for one in asked if one.exception() is None)


@needs("ray", "fastapi")
def test_ray_serve(home: Path) -> None:
    port = free_port()
    script = f"""
import time, ray
from ray import serve
from ray_serve import app
ray.init(num_cpus=2, include_dashboard=False)
serve.start(http_options={{"host": "127.0.0.1", "port": {port}}})
serve.run(app({arguments(home)!r}))
while True:
    time.sleep(1)
"""
    environment = {"PYTHONPATH": f"{EXAMPLES}:{home}:{os.environ.get('PYTHONPATH', '')}", **LIMITS}
    url = f"http://127.0.0.1:{port}"
    with running([sys.executable, "-c", script], f"{url}/healthz", environment):
        check_service(url)


@needs("moto", "s3fs", "flask")
class TestStore:
    @pytest.fixture
    def store(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        """An object store with a bucket, and files in it."""
        import s3fs

        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-c", f"import moto.server; moto.server.main(['-H', '127.0.0.1', '-p', '{port}'])"]
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        with running(command, f"{url}/moto-api/", {}):
            s3fs.S3FileSystem.clear_instance_cache()
            fs = s3fs.S3FileSystem()
            fs.mkdir("bucket")
            x = torch.randn(90, 4, generator=torch.Generator().manual_seed(1))
            table = pyarrow.table({f"x{i}": x[:, i].numpy() for i in range(4)})
            Path("data").mkdir()
            for number, start in enumerate((0, 50)):
                pyarrow.parquet.write_table(table.slice(start, 50 - 10 * number), f"data/{number}.parquet")
            fs.put("data", "bucket/data", recursive=True)
            yield fs

    def predict(self, data: str, out: str, *options: str, fails: bool = False) -> str:
        command = ["predict", "--model", "served:network", "--weights", "w.safetensors", "--data", data, "--out", out]
        done = subprocess.run(
            [sys.executable, "-m", "stochbn", *command, "--draws", "8", "--part", "20", "--batch", "20", *options],
            capture_output=True, text=True, timeout=2 * TIMEOUT, check=False,
        )  # fmt: skip
        assert done.returncode == fails, done.stderr
        return " ".join((done.stderr if fails else done.stdout).split())

    @pytest.mark.parametrize("ending", ["csv", "parquet"])
    def test_from_a_store_to_a_store(self, store: Any, ending: str) -> None:
        self.predict("data", f"local.{ending}")
        Path(f"out.{ending}").write_text("another file")
        told = self.predict("s3://bucket/data", f"s3://bucket/out.{ending}")
        assert f"Saved 90 predictions as s3://bucket/out.{ending}" in told
        assert store.cat(f"bucket/out.{ending}") == Path(f"local.{ending}").read_bytes()
        assert Path(f"out.{ending}").read_text() == "another file"
        assert [path.name for path in Path().glob("out*")] == [f"out.{ending}"]

    @needs("ray")
    def test_rays_workers_read_from_it_too(self, store: Any) -> None:
        self.predict("data", "local.csv")
        self.predict("s3://bucket/data/", "s3://bucket/out.csv", "--engine", "ray", "--workers", "2")
        assert store.cat("bucket/out.csv") == Path("local.csv").read_bytes()

    def test_a_bucket_that_is_not_there_is_told_before_the_work(self, store: Any) -> None:
        told = self.predict("data", "s3://elsewhere/p.csv", fails=True)
        assert "there is no 'elsewhere' to write 's3://elsewhere/p.csv' to" in told
        assert not list(Path().glob("p*"))

    def test_what_is_not_there_is_told(self, store: Any) -> None:
        told = self.predict("s3://bucket/nothing", "p.csv", fails=True)
        assert "'s3://bucket/nothing' is no Parquet file and no folder that holds any" in told
