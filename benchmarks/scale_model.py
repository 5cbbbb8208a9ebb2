"""Time, memory, bytes and cost of ResNet-50 on 1 to 1,000 GPUs, on paper: a fit on ImageNet, and scoring 10^9 images.

A model, not a measurement: every constant has its source. Time is that of the slowest of the GPU, the processors that
decode images and the link that they come over, plus what does not shrink with the number of GPUs. Run it as
``python benchmarks/scale_model.py``; it writes scale_model.json and scale_model.md.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from stochbn.files import write_bytes, write_json
from stochbn.paper.tables import Table


@dataclass(frozen=True)
class Constants:
    """What the model is computed from; the comment at each says where it comes from."""

    train_images: int = 1_281_167  # ILSVRC 2012 (Russakovsky et al., 2015)
    image_bytes: int = 110_000  # 138 GB of JPEG over 1,281,167 images (ILSVRC 2012's training archive)
    forward_flop: float = 8.2e9  # 4.1e9 multiply-adds at 224 x 224 (He et al., 2016; torchvision's figure)
    peak_flops: float = 989e12  # H100 SXM, dense bfloat16 (NVIDIA's data sheet)
    utilisation: float = 0.2  # ASSUMED: of the peak; convolutions reach less than matrix products
    decode_per_core: float = 150.0  # ASSUMED: images a second, JPEG of 500 x 375 to 224 x 224, by Pillow
    cores_per_gpu: int = 24  # 192 virtual cores for 8 GPUs (AWS p5.48xlarge)
    link_per_gpu: float = 12.5e9 / 8  # bytes a second: 100 Gbit/s of object storage for a machine of 8 GPUs
    store_total: float = 125e9  # ASSUMED: bytes a second that one bucket's store gives all machines: 1 Tbit/s
    passes: int = 24  # quasi-random draws worth 50 (benchmarks/README.md, ResNet-18)
    channels: int = 26_560  # of ResNet-50's batch norms: the sum of their sizes
    kept: int = 512  # mini-batches of a joint posterior (fit's default)
    parameters: int = 25_557_032  # ResNet-50
    start: float = 120.0  # ASSUMED: seconds until all processes run and have loaded the network
    ranks_link: float = 1.25e9  # ASSUMED: bytes a second between ranks by gloo over TCP
    joint: float = 30.0  # ASSUMED: seconds to make the joint posterior of 512 mini-batches on one rank
    price: float = 3.0  # ASSUMED: dollars for a GPU and its share of the machine for an hour
    images: int = 10**9
    row_bytes: int = 60  # of a Parquet row: key, class, probability, two entropies


@dataclass(frozen=True)
class Job:
    """A job on some GPUs.

    Attributes:
        gpus: how many.
        hours: until it ends.
        bound: what its time goes to.
        efficiency: the time of one GPU over that of these, times their number.
        dollars: what they cost.
        read: bytes that are read in all.
        sent: bytes that each rank gets from the others.
        memory: bytes of a process on the processor, at most.
    """

    gpus: int
    hours: float
    bound: str
    efficiency: float
    dollars: float
    read: float
    sent: float
    memory: float


def seconds(c: Constants, gpus: int, images: int, passes: float, fixed: float) -> tuple[float, str]:
    """The time of a job, and what bounds it."""
    each = math.ceil(images / gpus)
    ways = {
        "GPU": each * passes * c.forward_flop / (c.peak_flops * c.utilisation),
        "decoding": each / (c.decode_per_core * c.cores_per_gpu),
        "machine's link": each * c.image_bytes / c.link_per_gpu,
        "store": images * c.image_bytes / c.store_total,
    }
    bound = max(ways, key=lambda way: ways[way])
    return ways[bound] + fixed, bound if ways[bound] > fixed else "what does not shrink"


def jobs(c: Constants, images: int, passes: float, merges: bool) -> list[Job]:
    """A job on 1, 8, 64, 256 and 1,000 GPUs."""
    found: list[Job] = []
    for gpus in (1, 8, 64, 256, 1000):
        state = 2 * 8 * c.channels * min(c.kept, math.ceil(images / gpus / 16)) if merges else 0
        sent = state * (gpus - 1)  # broadcasts: every rank gets the sample of every other
        fixed = c.start + (c.joint + sent / c.ranks_link if merges else 0)
        time, bound = seconds(c, gpus, images, passes, fixed)
        alone = found[0].hours if found else time / 3600
        memory = 4 * c.parameters + 4 * state  # own, received, merged before and after
        cost = gpus * time / 3600 * c.price
        read = images * c.image_bytes
        found.append(Job(gpus, time / 3600, bound, alone * 3600 / (gpus * time), cost, read, sent, memory))
    return found


def table(title: str, found: list[Job]) -> Table:
    """Jobs as a table."""
    columns = ["GPUs", "hours", "bound by", "efficiency", "dollars", "read, TB", "received, GB", "memory, GB"]
    rows = [
        [f"{j.gpus:,}", f"{j.hours:.3g}", j.bound, f"{j.efficiency:.2f}", f"{j.dollars:,.2f}", f"{j.read / 1e12:.3g}",
         f"{j.sent / 1e9:.3g}", f"{j.memory / 1e9:.3g}"]
        for j in found
    ]  # fmt: skip
    return Table(title, columns, rows)


def main() -> None:
    """Compute both jobs, and write scale_model.json and scale_model.md."""
    c = Constants()
    fit, score = jobs(c, c.train_images, 1, merges=True), jobs(c, c.images, c.passes, merges=False)
    tables = [
        table("Fitting ResNet-50 to ImageNet, joint, on paper", fit),
        table(f"Scoring 10^9 images with ResNet-50, {c.passes} passes, on paper", score),
    ]
    out = Path(__file__).parent
    write_json(
        out / "scale_model.json",
        {"constants": asdict(c), "fit": list(map(asdict, fit)), "score": list(map(asdict, score))},
    )
    rows = "\n\n".join(one.markdown() for one in tables)
    table_bytes = f"Results of scoring: {c.images * c.row_bytes / 1e9:.0f} GB of Parquet."
    write_bytes(out / "scale_model.md", f"{rows}\n\n{table_bytes}\n".encode())


if __name__ == "__main__":
    main()
