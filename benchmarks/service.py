"""A load test of examples/fastapi_service.py: with draws beside the plain network in the same service.

The network is the first trained ResNet-18 of ``results/trained/resnet18``, with a posterior of 64 augmented
mini-batches of its training images. Two services run by uvicorn, one process each: one draws (the defaults), the other
has no posterior, so it makes one pass. Clients send test images one by one, each the next as soon as it has its answer;
the services are asked in turns. The clients share the machine with the service. What a request takes beside its passes
is told in processor time, which other work on the machine changes little. Run it as::

    STOCHBN_DATA=... python benchmarks/service.py

It takes a few minutes, and writes service.json and service.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import stochbn
from stochbn.deploy import Scorer
from stochbn.files import write_bytes, write_json
from stochbn.measuring.timing import machine
from stochbn.paper.training import augment
from stochbn.report.tables import Table
from stochbn.sources import checkpoints
from stochbn.sources.named import as_input, load

ROOT = Path(__file__).parent.parent
NETWORK = ROOT / "results" / "trained" / "resnet18" / "plain-0" / "network.safetensors"
DATA = "cifar10:0-4"
SERVICES = ("plain", "stochbn")
CLIENTS = (1, 8, 32)
ROUNDS = 4
IMAGES = 200
WARM_UP = 100
METRICS = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"

classes = ["airplane", "automobile", "bird", "cat", "deer"]


def network() -> nn.Module:
    """The trained network, as the services load it."""
    return checkpoints.load(NETWORK).model


def preprocess(image: Any) -> Tensor:
    """A picture as the network's input, ``[3, 32, 32]``."""
    pixels = np.asarray(image.convert("RGB").resize((32, 32)))
    return as_input(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])[0]


def fitted(path: Path) -> None:
    """Fit a posterior to augmented training images."""
    train, _ = load(DATA, "train").held_out(0.1, seed=0)
    torch.manual_seed(0)
    pixels = train.shuffled(0).first(1024).pixels
    stochbn.fit(network(), [as_input(augment(pixels))], 16).save(path)


def encoded(kind: str) -> list[bytes]:
    """Requests with one test image each."""
    size = {"PNG": (32, 32), "JPEG": (640, 480)}[kind]
    requests = []
    for pixels in load(DATA, "test").shuffled(0).first(IMAGES).pixels:
        file = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(size).save(file, kind)
        body = file.getvalue()
        head = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: image/{kind.lower()}\r\ncontent-length: {len(body)}"
        requests.append(f"{head}\r\n\r\n".encode() + body)
    return requests


@contextlib.contextmanager
def service(scorer: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """A service, ready: its port, and the number of its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = f"{ROOT / 'examples'}:{ROOT / 'benchmarks'}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": paths, "STOCHBN_SCORER": json.dumps(scorer)}
    command = [sys.executable, "-m", "uvicorn", "fastapi_service:web", "--port", str(port), "--no-access-log"]
    with subprocess.Popen([*command, "--log-level", "warning"], env=environment) as process:
        try:
            while True:
                if process.poll() is not None:
                    raise SystemExit("the service did not start")
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz"):
                    break
                time.sleep(0.2)
            yield port, process.pid
        finally:
            process.terminate()


def parsed(page: bytes) -> dict[str, float]:
    """What a service tells of itself."""
    lines = [line.rpartition(" ") for line in page.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[float, bytes]:
    """The latency of a request in ms, and the body of its answer."""
    start = time.perf_counter()
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line)
    body = await reader.readexactly(length)
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise SystemExit(f"the service answered {head!r} {body!r}")
    return 1000 * (time.perf_counter() - start), body


async def _client(port: int, requests: Sequence[bytes]) -> list[float]:
    """The latency of each request, sent one after another over one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    found = [(await _ask(reader, writer, request))[0] for request in requests]
    writer.close()
    await writer.wait_closed()
    return found


async def _clients(port: int, requests: Sequence[bytes], count: int) -> list[float]:
    each = await asyncio.gather(*(_client(port, requests[i::count]) for i in range(count)))
    return [latency for one in each for latency in one]


async def _metrics(port: int) -> dict[str, float]:
    connection = await asyncio.open_connection("127.0.0.1", port)
    _, page = await _ask(*connection, METRICS)
    connection[1].close()
    return parsed(page)


def used(process: int) -> float:
    """Seconds of a processor that a process has used."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def processor(port: int, process: int, requests: Sequence[bytes], scorer: Scorer) -> dict[str, float]:
    """Processor time in ms of a request, one client, in the service, and that of its passes in this process."""
    inputs = [scorer.read([request.partition(b"\r\n\r\n")[2]]).inputs for request in requests]
    for x in inputs[:10]:
        scorer.predict(x)
    start, before = time.process_time(), used(process)
    for x in inputs:
        scorer.predict(x)
    passes = (time.process_time() - start) / len(requests)
    asyncio.run(_client(port, requests))
    whole = (used(process) - before) / len(requests)
    return {"request": 1000 * whole, "passes": 1000 * passes, "beside": 1000 * (whole - passes)}


def loaded(port: int, requests: Sequence[bytes], count: int) -> dict[str, Any]:
    """Latencies in ms and totals of so many clients at a time."""
    before, start = asyncio.run(_metrics(port)), time.perf_counter()
    latencies = asyncio.run(_clients(port, requests, count))
    seconds, after = time.perf_counter() - start, asyncio.run(_metrics(port))
    change = {
        name: after[f"stochbn_{name}"] - before[f"stochbn_{name}"] for name in ("batch_seconds_count", "draws_sum")
    }
    batches = change["batch_seconds_count"]
    return {"latencies": latencies, "seconds": seconds, "batches": batches, "draws": change["draws_sum"]}


def summarised(parts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Percentiles in ms and rates of the fastest round, in which other work on the machine disturbed least."""
    part = min(parts, key=lambda part: part["seconds"])
    cuts = statistics.quantiles(part["latencies"], n=100, method="inclusive")
    return {
        "p50": cuts[49],
        "p95": cuts[94],
        "p99": cuts[98],
        "rate": len(part["latencies"]) / part["seconds"],
        "batch": len(part["latencies"]) / part["batches"],
        "draws": part["draws"] / part["batches"],
    }


def page(found: dict[str, Any]) -> str:
    """The tables."""
    load_rows = [
        [f"{clients}, {name}", *(f"{row[key]:.1f}" for key in ("p50", "p95", "p99", "rate", "batch", "draws"))]
        for clients in map(str, CLIENTS)
        for name, row in found["load"][clients].items()
    ]
    titles = ("clients, network", "p50, ms", "p95, ms", "p99, ms", "requests a second", "examples in a batch", "draws")
    beside_rows = [
        [f"{kind}, {name}", *(f"{row[key]:.1f}" for key in ("request", "passes", "beside"))]
        for kind, each in found["beside"].items()
        for name, row in each.items()
    ]
    about = "Processor time of a request: HTTP, decoding and preprocessing are beside the passes"
    columns = ("picture, network", "request, ms", "its passes, ms", "beside them, ms")
    tables = (
        Table(f"Latency of requests with one picture of 32x32; {found['about']}", titles, load_rows),
        Table(about, columns, beside_rows),
    )
    return "\n\n".join(table.markdown() for table in tables)


def main() -> None:
    """Measure, print, and write service.json and service.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds of {IMAGES} requests (default: {ROUNDS})")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for service.json and .md")
    options = parser.parse_args()
    requests = {kind: encoded(kind) for kind in ("PNG", "JPEG")}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        posterior = Path(folder, "network.sbn.safetensors")
        fitted(posterior)
        scorers: dict[str, dict[str, Any]] = {name: {"model": "service:network", "threads": 1} for name in SERVICES}
        scorers["stochbn"]["posterior"] = str(posterior)
        running = {name: stack.enter_context(service(scorer)) for name, scorer in scorers.items()}
        ports = {name: port for name, (port, _) in running.items()}
        for port in ports.values():
            loaded(port, requests["PNG"][:WARM_UP], 8)
        parts: dict[str, dict[str, list[dict[str, Any]]]] = {str(n): {name: [] for name in SERVICES} for n in CLIENTS}
        for _ in range(options.rounds):
            for clients in CLIENTS:
                for name, port in ports.items():
                    parts[str(clients)][name].append(loaded(port, requests["PNG"], clients))
        alone: dict[str, Any] = {}
        for kind, what in (("PNG", "PNG of 32x32"), ("JPEG", "JPEG of 640x480")):
            alone[what] = {
                name: processor(*running[name], requests[kind], Scorer(**scorer)) for name, scorer in scorers.items()
            }
    measured = {
        "about": f"{machine()}, one thread, Python {platform.python_version()}, beside "
        f"other work, clients on the same machine, the fastest of {options.rounds} rounds of {IMAGES} requests",
        "load": {n: {name: summarised(rounds) for name, rounds in each.items()} for n, each in parts.items()},
        "beside": alone,
    }
    text = page(measured) + "\n"
    print(text)
    write_json(options.out / "service.json", measured)
    write_bytes(options.out / "service.md", text.encode())


if __name__ == "__main__":
    main()
