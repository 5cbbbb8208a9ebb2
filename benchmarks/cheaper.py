"""What fewer draws, and draws of less, cost in accuracy: on held-out images of one network of a finished run.

Stopping rules, noise in the later layers only, and points without chance in the place of draws, each with its cost in
forward passes, its accuracy in independent draws, NLL, best temperature and the detection of the unknown. Run it as
``python benchmarks/cheaper.py runs/lenet5-held-out`` on a run made with ``--held-out``; no known image of it is a test
image. It writes cheaper.md, cheaper.json and the figure cheaper.png.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from noise import in_layers
from rich.progress import Progress
from torch import Tensor, nn

import stochbn
from stochbn import metrics
from stochbn.execution import Settings
from stochbn.files import write, write_bytes, write_json
from stochbn.network.layers import batch_norms
from stochbn.paper.report import read_recipe
from stochbn.paper.runner import fit_posterior, load_parts, predict_all
from stochbn.posteriors import Empirical, Joint
from stochbn.predictions import entropy
from stochbn.predictive import TOLERANCE
from stochbn.report.tables import Table
from stochbn.sources import checkpoints
from stochbn.sources.named import Images

FIRST, STEP = Settings.first, Settings.step
MOST = 24
"""Quasi-random draws of the joint posterior that ``draws=50`` asks for."""


@dataclass(frozen=True)
class Way:
    """A way to predict: some estimates ``[N, K]`` of the mean probabilities, each at a cost in forward passes."""

    group: str
    name: str
    cost: float
    estimates: list[Tensor]


class Study:
    """The held-out images, the unknown ones, and what a network predicts of both.

    Args:
        model: the network.
        known: the held-out images.
        unknown: images of no class of the network; None for no detection.
        repetitions: how many times every estimate is made.
    """

    def __init__(self, model: nn.Module, known: Images, unknown: Images | None, repetitions: int) -> None:
        self.model, self.known, self.unknown, self.repetitions = model, known, unknown, repetitions

    def draws(self, posterior: stochbn.Posterior, count: int, seed: int) -> Tensor:
        """The probabilities ``[S, N, K]`` of quasi-random draws, first of known and then of unknown images."""
        predictive = stochbn.Predictive(self.model, posterior, count, keep_draws=True)
        generator = torch.Generator().manual_seed(seed)
        found = []
        for images in (self.known, self.unknown):
            if images is not None:
                log_probs = predict_all(predictive, images, generator).log_probs
                assert log_probs is not None
                found.append(log_probs.exp())
        return torch.cat(found, 1)

    def repeated(self, posterior: stochbn.Posterior, count: int) -> list[Tensor]:
        """Several estimates from as many draws, with other random numbers each."""
        return [self.draws(posterior, count, seed=1 + i) for i in range(self.repetitions)]

    def scores(self, way: Way, truth: Tensor, variance: float) -> dict[str, float]:
        """What a way costs and gives, averaged over its estimates."""
        found = []
        for probs in way.estimates:
            known = probs[: len(self.known)]
            error = (known - truth[: len(known)]).double().square().sum(1).mean().item()
            one = {"worth": error and variance / error, **metrics.evaluate(known, self.known.labels)}
            one["temperature"] = metrics.calibrated_nll(known, self.known.labels)["temperature"]
            if self.unknown is not None:
                one["auroc"] = metrics.ood(entropy(known), entropy(probs[len(known) :]))["auroc"]
            found.append(one)
        wanted = ("worth", "nll", "temperature", "auroc")
        return {"cost": way.cost} | {k: sum(one[k] for one in found) / len(found) for k in wanted if k in found[0]}


def stopped(draws: Tensor, tolerance: float, first: int) -> tuple[Tensor, float]:
    """What the library's rule predicts ``[N, K]`` from these draws ``[S, N, K]``, and the draws it asks for."""
    most, objects, _ = draws.shape
    done = torch.zeros(objects, dtype=torch.bool)
    probs, used = torch.empty_like(draws[0]), torch.zeros(objects)
    for count in sorted({*range(first, most, STEP), most}):
        mean = draws[:count].mean(0)
        error = (draws[:count] - mean).square().sum((0, 2)).sqrt() / count
        new = ~done & ((error <= tolerance) | (count == most))
        probs[new], used[new] = mean[new], count
        done |= new
    return probs, used.mean().item()


def stopping(study: Study, joint: Joint) -> Iterator[Way]:
    """All objects get as many draws, or each until its error is small."""
    every = study.repeated(joint, MOST)
    for count in (4, 8, 12, 16, MOST):
        yield Way("all objects, all draws", f"{count} draws", count, [draws[:count].mean(0) for draws in every])
    own = TOLERANCE / math.sqrt(50)
    for first, tolerance in itertools.product((2, FIRST), (own / 2, own, 2 * own)):
        means, used = zip(*(stopped(draws, tolerance, first) for draws in every), strict=True)
        name = f"error {tolerance:.2f}, asked after {first}"
        if (first, tolerance) == (FIRST, own):
            name += " (default)"
        yield Way(f"done early, asked after {first}", name, sum(used) / len(used), list(means))


def later(study: Study, joint: Joint) -> Iterator[Way]:
    """Noise in the later layers only, about the same expected statistics; what is before runs once."""
    count, draws = len(joint.layers), 16
    before = shares(study.model, next(study.known.batches(100))[0])
    for dropped in sorted({count // 4, count // 2, 3 * count // 4, count - 1} - {0}):
        share = before[list(joint.layers)[dropped]]
        for noise in (1.0, 1.5, 2.0):
            factors = [0.0] * dropped + [noise**2] * (count - dropped)
            means = [found.mean(0) for found in study.repeated(in_layers(joint, factors), draws)]
            name = f"last {count - dropped} of {count} layers, noise x {noise:g}"
            yield Way(f"later layers, noise x {noise:g}", name, share + draws * (1 - share), means)


def shares(model: nn.Module, x: Tensor, repetitions: int = 9) -> dict[str, float]:
    """The share of a pass's time that is over when each batch norm is reached."""
    reached: dict[str, float] = {}
    found: dict[str, list[float]] = {}

    def note(name: str, *_: Any) -> None:
        reached.setdefault(name, time.perf_counter())

    with torch.no_grad(), ExitStack() as stack:
        for name, layer in batch_norms(model).items():
            stack.callback(layer.register_forward_pre_hook(functools.partial(note, name)).remove)
        for repetition in range(repetitions + 1):
            reached.clear()
            started = time.perf_counter()
            model(x)
            total = time.perf_counter() - started
            if repetition:  # the first warms up
                for name, at in reached.items():
                    found.setdefault(name, []).append((at - started) / total)
    return {name: sorted(times)[len(times) // 2] for name, times in found.items()}


def without_draws(study: Study, joint: Joint) -> Iterator[Way]:
    """The network itself, and the cubature rule of degree 3 on the leading directions: two points for each."""
    yield Way("the network", "the network", 1.0, [predictions(study, stochbn.Predictive(study.model))])
    for directions in (1, 2, 4, 8):
        if directions > len(joint.directions):
            break
        moved = math.sqrt(directions) * joint.directions[:directions].double()
        rows = joint.location + torch.cat([moved, -moved])
        mean, log_variance = rows.view(len(rows), 2, -1).unbind(1)
        about = {name: getattr(joint, name) for name in ("layers", "dtype", "mini_batches", "batch_size", "skipped")}
        points = Empirical(statistics=torch.stack([mean, log_variance.exp()], 1).float(), **about)
        means = [study.draws(points, len(rows), seed=0).mean(0)]
        yield Way("points", f"2 points for each of {directions} directions", len(rows), means)


def predictions(study: Study, predictor: stochbn.Predictive) -> Tensor:
    """Mean probabilities of all images."""
    parts = [images for images in (study.known, study.unknown) if images is not None]
    return torch.cat([predict_all(predictor, images).probs for images in parts])


def save_figure(found: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """NLL, temperature and the detection of the unknown against cost, a colour for each group of ways.

    Twice the noise is in the table alone: it is so far off that the others could not be told apart beside it.
    """
    found = {name: one for name, one in found.items() if one["group"] != "later layers, noise x 2"}
    shown = [key for key in _FIGURE if all(key in one for one in found.values())]
    figure = Figure(figsize=(4 * len(shown) + 2.4, 3.8), layout="constrained")
    groups = list(dict.fromkeys(one["group"] for one in found.values()))
    for axes, key in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for group, marker in zip(groups, itertools.cycle("*osD^v<"), strict=False):
            points = sorted((one["cost"], one[key]) for one in found.values() if one["group"] == group)
            axes.plot(*zip(*points, strict=True), f"-{marker}", markersize=5, linewidth=0.8, label=group, alpha=0.8)
        axes.set(xscale="log", xlabel="cost, forward passes", title=_FIGURE[key])
        axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    write(path, functools.partial(figure.savefig, dpi=130))


def main() -> None:
    """Measure, print, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a finished run, made with --held-out")
    parser.add_argument("--out", type=Path, help="where to write (default: the run's folder)")
    parser.add_argument("--objects", type=int, default=1500, help="held-out images, and a third as many unknown ones")
    parser.add_argument("--reference", type=int, default=512, help="draws whose mean is the truth (default: 512)")
    parser.add_argument("--repetitions", type=int, default=4, help="of every estimate (default: 4)")
    options = parser.parse_args()
    recipe = read_recipe(options.folder)
    parts = load_parts(recipe)
    if "held-out" not in parts:
        parser.error(f"{options.folder} held no images out; make it with stochbn reproduce --held-out 0.1")
    known = parts["held-out"].take(torch.arange(min(options.objects, len(parts["held-out"]))))
    unknown = parts.get("unknown")
    if unknown is not None:
        unknown = unknown.take(torch.arange(min(options.objects // 3, len(unknown))))
    model = checkpoints.load(options.folder / "plain-0" / "network.safetensors").model.eval()
    train = parts["train"].shuffled(0).take(torch.arange(min(8192, len(parts["train"]))))
    joint = fit_posterior(model, train, 16, kind="joint")
    assert isinstance(joint, Joint)
    study = Study(model, known, unknown, options.repetitions)
    found: dict[str, dict[str, Any]] = {}
    with Progress() as progress:
        task = progress.add_task("the truth", total=None)
        reference = study.draws(joint, options.reference, seed=0)
        truth = reference.mean(0)
        variance = reference[:, : len(known)].double().var(0).sum(1).mean().item()
        del reference
        kinds: tuple[Callable[[Study, Joint], Iterator[Way]], ...] = (without_draws, stopping, later)
        for way in itertools.chain.from_iterable(kind(study, joint) for kind in kinds):
            progress.update(task, description=way.name)
            found[way.name] = {"group": way.group} | study.scores(way, truth, variance)
        many = Way("all objects, all draws", f"{options.reference} draws", options.reference, [truth])
        found[many.name] = {"group": many.group} | study.scores(many, truth, variance)
    columns = {title: column for title, column in _COLUMNS.items() if column[0] in found[many.name]}
    rows = []
    for name, one in found.items():
        cells = [f"{one[key]:.{digits}f}" if one[key] else "" for key, digits in columns.values()]
        rows.append([name, *cells])
    title = f"{recipe.network} on {recipe.data}: {len(known)} held-out images"
    title += f", {len(unknown)} of {unknown.name}" if unknown is not None else ""
    table = Table(f"{title}, one network, {options.repetitions} repetitions", ["way", *columns], rows)
    print(table.markdown())
    folder = options.out or options.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "cheaper.md", table.markdown().encode() + b"\n")
    about = {"recipe": recipe.as_dict(), "objects": len(known), "reference": options.reference, "variance": variance}
    write_json(folder / "cheaper.json", about | {"found": found})
    del found[many.name]
    save_figure(found, title, folder / "cheaper.png")


_COLUMNS = {"cost, passes": ("cost", 1), "worth, draws": ("worth", 0), "NLL": ("nll", 4), "best T": ("temperature", 2)}
_COLUMNS |= {"AUROC": ("auroc", 4)}
_FIGURE = {"nll": "NLL, nats", "temperature": "best temperature", "auroc": "AUROC of the unknown"}

if __name__ == "__main__":
    main()
