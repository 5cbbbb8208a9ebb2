"""The constants of scale_model.py that this machine can tell: ``python benchmarks/scale_model.py --measure``."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from posteriors import measure as measure_posterior
from safetensors.torch import save_file

from stochbn.sources.pictures import Preprocessing, decode

SIZE = (224, 224)
ROWS = 200_000
RANK = """
import json, sys, time
from datetime import timedelta
import stochbn.cli
import torch
import torch.distributed as dist
from safetensors.torch import load_file

dist.init_process_group("gloo", timeout=timedelta(minutes=2))
load_file("w.safetensors")
dist.barrier()
ready, times = time.time(), []
data = torch.zeros(int(sys.argv[1]), dtype=torch.uint8)
for _ in range(5):
    dist.barrier()
    started = time.perf_counter()
    dist.broadcast(data, 0)
    dist.barrier()
    times.append(time.perf_counter() - started)
if dist.get_rank() == 0:
    print(json.dumps([ready, sorted(times)[2]]))
dist.destroy_process_group()
"""


def jpeg(size: int) -> bytes:
    """A JPEG of 500 x 375 whose details fall off with frequency as a photograph's do, of about so many bytes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    across, down = np.meshgrid(np.fft.fftfreq(500), np.fft.fftfreq(375))
    falling = 1 / np.maximum(np.hypot(across, down), 1 / 500)
    noise = rng.normal(size=(3, 375, 500)) + 3 * rng.normal(size=(375, 500))
    waves = np.fft.ifft2(np.fft.fft2(noise) * falling).real
    pixels = np.clip(128 + 45 * waves / waves.std(), 0, 255).astype(np.uint8)
    found = []
    for quality in range(60, 100):
        file = io.BytesIO()
        Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
        found.append(file.getvalue())
    return min(found, key=lambda data: abs(len(data) - size))


def decode_rate(size: int, count: int = 1000) -> float:
    """JPEGs that a second of one core makes a network's inputs of, by what ``stochbn predict`` does to each."""
    data, preprocess = jpeg(size), Preprocessing(size=SIZE, mean=(0.5,), std=(0.25,))
    started = time.process_time()
    for _ in range(count):
        preprocess(decode(io.BytesIO(data)))
    return count / (time.process_time() - started)


def row_bytes() -> float:
    """Bytes of a Parquet row of ``stochbn predict``, with random numbers."""
    rng = np.random.default_rng(0)
    columns = {"row": np.arange(ROWS), "class": rng.integers(0, 1000, ROWS).astype(str)}
    columns |= {name: rng.random(ROWS, np.float32) for name in ("probability", "entropy", "mutual_information")}
    table = pyarrow.table({**columns, "error": pyarrow.nulls(ROWS, pyarrow.string())})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return len(file.getvalue()) / ROWS


def ranks(parameters: int, sent: int) -> tuple[float, float]:
    """Seconds until 2 ranks have started and loaded so many numbers; bytes a second that gloo brings to one."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "rank.py").write_text(RANK)
        save_file({"weights": torch.zeros(parameters)}, Path(folder, "w.safetensors"))
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "rank.py"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started = time.time()
        done = subprocess.run([*line, str(sent)], cwd=folder, env=environment, check=True, capture_output=True)
        ready, seconds = json.loads(done.stdout)
    return ready - started, sent / seconds


def measured(image_bytes: int, parameters: int, channels: int, kept: int) -> dict[str, float | str]:
    """The constants, and the machine that they are of."""
    torch.set_num_threads(1)
    start, link = ranks(parameters, 2 * 8 * channels * kept)
    return {
        "decode_per_core": decode_rate(image_bytes),
        "start": start,
        "ranks_link": link,
        "joint": measure_posterior("joint", None, kept)["seconds"],
        "row_bytes": row_bytes(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "load": os.getloadavg()[0],
    }
