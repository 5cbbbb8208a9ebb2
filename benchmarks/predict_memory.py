"""The peak memory of ``stochbn predict`` for 500 and for 8,000 images: ``python benchmarks/predict_memory.py``.

Each is predicted by a process of its own; the peak is what Linux says of it when it ends. Writes predict_memory.md.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stochbn.files import write_bytes
from stochbn.report.tables import Table

MODULE = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(16, 10))
"""


def run(*arguments: str) -> int:
    """Run a command of stochbn, and return its peak memory in KiB."""
    pid = os.posix_spawn(sys.executable, [sys.executable, "-m", "stochbn", *arguments], os.environ)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{arguments[0]} failed")
    return usage.ru_maxrss


def main() -> None:
    """Measure, print and write."""
    out = Path(__file__).parent.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("net.py").write_text(MODULE)
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
        sys.path.insert(0, folder)
        import net

        torch.save(net.build().state_dict(), "w.pt")
        generator, rows = np.random.default_rng(0), []
        for count in (500, 8000):
            Path(f"images{count}").mkdir()
            for i in range(count):
                pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(f"images{count}/{i:05}.png")
            given = "--model", "net:build", "--weights", "w.pt", "--data", f"images{count}"
            run("fit", *given)
            peak = run("predict", *given, "--out", f"{count}.parquet", "--part", "250")
            rows.append([str(count), f"{peak / 1024:.0f}"])
    table = Table("Peak memory of stochbn predict, images of 64 x 64", ["images", "MiB"], rows)
    write_bytes(out / "predict_memory.md", f"{table.markdown()}\n".encode())
    print(table.markdown())


if __name__ == "__main__":
    main()
