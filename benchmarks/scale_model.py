"""Time, memory, bytes and cost of ResNet-50 on 1 to 1,000 GPUs, on paper: a fit on ImageNet, and scoring 10^9 images.

A model, not a measurement: every constant has its source, or is measured on one machine (``--measure``). Time is that
of the slowest of the GPU, the processors that decode images and the link that they come over, plus what does not shrink
with the number of GPUs. Run it as ``python benchmarks/scale_model.py``; it writes scale_model.json and scale_model.md.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stochbn.files import write_bytes, write_json
from stochbn.report.tables import Table

MEASURED = Path(__file__).with_name("scale_measured.json")
TRAINED = 2470 * 3 * 8.2e9 / 312e12
"""Of an A100's peak, by PyTorch: 2,470 images a second trained in mixed precision, of three passes' arithmetic each, of
312 Tflop/s: https://github.com/NVIDIA/DeepLearningExamples/tree/master/PyTorch/Classification/ConvNets/resnet50v1.5
The same page has 3,382 images a second predicted on a V100, 0.22 of its 125 Tflop/s."""
TUNED = 707_695 / 8 * 8.2e9 / 1979e12
"""Of an H100's peak, by TensorRT in INT8, of 1,979 Tops: 707,695 samples a second on 8 of them, ResNet-50, offline.
https://github.com/mlcommons/inference_results_v4.1, closed/HPE/results/HPE_Cray_XD670_H100_SXM_80GBx8_TRT/README.md"""


@dataclass(frozen=True)
class Constants:
    """What the model is computed from; the comment at each says where it comes from.

    Those without a value are measured on one machine by ``--measure``, which writes scale_measured.json.
    """

    decode_per_core: float  # measured: images a second, a JPEG of 500 x 375 to 224 x 224, by Pillow
    start: float  # measured: seconds until 2 ranks on one machine have loaded the network; without queue and machines
    ranks_link: float  # measured: bytes a second between 2 ranks by gloo, over loopback: no network
    joint: float  # measured: seconds to make the joint posterior of 512 mini-batches on one core
    row_bytes: float  # measured: of a Parquet row: key, class, probability, two entropies
    train_images: int = 1_281_167  # ILSVRC 2012 (Russakovsky et al., 2015)
    image_bytes: int = 110_000  # 138 GB of JPEG over 1,281,167 images (ILSVRC 2012's training archive)
    forward_flop: float = 8.2e9  # 4.1e9 multiply-adds at 224 x 224 (He et al., 2016; torchvision's figure)
    peak_flops: float = 989e12  # H100 SXM, dense bfloat16: https://www.nvidia.com/en-us/data-center/h100/
    utilisation: float = TRAINED  # by PyTorch, on an A100: no figure by PyTorch for an H100 was found
    cores_per_gpu: int = 24  # 192 virtual cores for 8 GPUs: https://aws.amazon.com/ec2/capacityblocks/pricing/
    # Up to 100 Gbit/s of object storage for one machine, here of 8 GPUs, and "multiple terabits per second" for many,
    # here 2: https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html
    link_per_gpu: float = 12.5e9 / 8  # bytes a second
    store_total: float = 250e9  # bytes a second
    passes: int = 24  # quasi-random draws worth 50 (benchmarks/README.md, ResNet-18)
    channels: int = 26_560  # of ResNet-50's batch norms: the sum of their sizes
    kept: int = 512  # mini-batches of a joint posterior (fit's default)
    parameters: int = 25_557_032  # ResNet-50
    # Dollars for a GPU and its share of a p5.48xlarge for an hour, reserved, at the end of 2024; prices change:
    price: float = 4.916  # https://aws.amazon.com/ec2/capacityblocks/pricing/
    images: int = 10**9

    @classmethod
    def here(cls) -> Constants:
        """The constants, with what was measured."""
        found = json.loads(MEASURED.read_text())
        return cls(**{name: found[name] for name in ("decode_per_core", "start", "ranks_link", "joint", "row_bytes")})


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


def limits(c: Constants) -> str:
    """What bounds scoring beside the GPU, and from where on."""
    rate = c.peak_flops * c.utilisation / c.forward_flop  # passes a second of a GPU
    decoded = c.decode_per_core * c.cores_per_gpu
    half = c.images * c.passes / rate / c.start
    return (
        f"Scoring is bound by decoding with fewer than {rate / decoded:.1f} passes an image, by the store beyond "
        f"{c.store_total / c.image_bytes / (rate / c.passes):,.0f} GPUs, and half of the time goes to the start at "
        f"{half:,.0f} GPUs (at {half * c.start / 300:,.0f} if the start takes 5 minutes)."
    )


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
    """Measure if asked; compute both jobs, and write scale_model.json and scale_model.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="first measure what this machine can tell")
    if parser.parse_args().measure:
        from scale_measure import measured

        write_json(MEASURED, measured(Constants.image_bytes, Constants.parameters, Constants.channels, Constants.kept))
    c = Constants.here()
    fit = jobs(c, c.train_images, 1, merges=True)
    score, tuned = (jobs(one, c.images, c.passes, merges=False) for one in (c, replace(c, utilisation=TUNED)))
    title = f"Scoring 10^9 images with ResNet-50, {c.passes} passes, on paper"
    tables = [
        table("Fitting ResNet-50 to ImageNet, joint, on paper", fit),
        table(f"{title}; {c.utilisation:.2f} of the GPU's peak, as PyTorch reaches", score),
        table(f"{title}; {TUNED:.2f} of the peak, as TensorRT reaches", tuned),
    ]
    out = Path(__file__).parent
    found = {"fit": fit, "score": score, "score_tuned": tuned}
    write_json(
        out / "scale_model.json",
        {"constants": asdict(c)} | {name: list(map(asdict, one)) for name, one in found.items()},
    )
    parts = [one.markdown() for one in tables]
    parts.append(limits(c))
    parts.append(f"Results of scoring: {c.images * c.row_bytes / 1e9:.0f} GB of Parquet.")
    parts.append(
        f"Measured on one machine: {c.decode_per_core:.0f} images a second decoded by a core, {c.start:.0f} s until 2 "
        f"ranks are ready, {c.ranks_link / 1e9:.2f} GB/s between them over loopback, {c.joint:.1f} s for the joint "
        f"posterior, {c.row_bytes:.0f} bytes a row."
    )
    write_bytes(out / "scale_model.md", ("\n\n".join(parts) + "\n").encode())


if __name__ == "__main__":
    main()
