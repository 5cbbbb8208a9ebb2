"""How often prediction sets hold the truth: on every task, in every group, and on a stream that drifts.

A pool of labelled examples is split at random into held-out ones, which make the sets, and others, which check them.
Coverages are means over the splits. Run it as::

    STOCHBN_DATA=... python benchmarks/sets.py

It takes about ten minutes of one core, and goes on with what an earlier run finished. The ResNet-18 is a committed one;
the other networks are trained here, for some seconds each. The segmentation needs MONAI (``pip install .[networks]``).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stochbn
from stochbn import conformal
from stochbn.conformal.cqr import normal_quantiles
from stochbn.files import write_bytes, write_json
from stochbn.report.coverage import held_by
from stochbn.report.tables import Table
from stochbn.sources import checkpoints
from stochbn.sources.named import Images, as_input, load

sys.path.insert(0, str(Path(__file__).parent))
from shift_corruptions import corrupt

ROOT = Path(__file__).parent.parent
NETWORK = ROOT / "results" / "trained" / "resnet18" / "plain-0" / "network.safetensors"
SPLITS = 40
COVERAGE = 0.9
DRAWS = 50
LIMIT = 2.0
"""How many binomial errors a mean coverage may differ from what was asked for."""
RATE = 0.02
"""Of the sets for a stream."""

Rule = Any
Made = Callable[[Tensor, Sequence[str] | None], tuple[Rule, Callable[[Tensor], Tensor]]]


@dataclass(frozen=True)
class Pool:
    """Labelled examples that a network has predicted.

    Attributes:
        name: of the data and network.
        predicted: tensors ``[N, ...]``: probabilities, or means and standard deviations.
        truth: ``[N, ...]``.
        groups: the group of each.
        held_out: how many examples make the sets.
    """

    name: str
    predicted: tuple[Tensor, ...]
    truth: Tensor
    groups: list[str]
    held_out: int

    def splits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions of held-out examples and of others."""
        for seed in range(SPLITS):
            order = torch.randperm(len(self.truth), generator=torch.Generator().manual_seed(seed))
            yield order[: self.held_out], order[self.held_out :]


# Rules: from held-out predictions, truth, groups and a generator to something that makes sets of predictions


def classes(method: str, **options: Any) -> Callable[..., Rule]:
    """Sets of classes; all but lac are randomised."""

    def make(probs: Tensor, truth: Tensor, groups: Any, generator: torch.Generator) -> Rule:
        drawn = {} if method == "lac" else {"generator": generator}
        return getattr(conformal, method)(probs, truth, COVERAGE, groups=groups, **drawn, **options)

    return make


def labels(**options: Any) -> Callable[..., Rule]:
    """Sets of labels, or masks."""
    return lambda probs, truth, groups, generator: conformal.crc(probs, truth, COVERAGE, groups=groups, **options)


def intervals(method: str) -> Callable[..., Rule]:
    """Intervals of numbers."""

    def make(mean: Tensor, std: Tensor, truth: Tensor, groups: Any, generator: torch.Generator) -> Rule:
        if method == "cqr":
            return conformal.cqr(*normal_quantiles(mean, std, COVERAGE), truth, COVERAGE, groups=groups)
        return conformal.intervals(mean, std if method == "normalized" else None, truth, COVERAGE, groups=groups)

    return make


def sets_of(rule: Rule, predicted: Sequence[Tensor], groups: Any) -> Tensor:
    """The sets of predictions."""
    if isinstance(rule, conformal.QuantileIntervals):
        predicted = normal_quantiles(predicted[0], predicted[1], COVERAGE)
    return rule(*predicted, groups=groups) if groups is not None else rule(*predicted)


def measure(pool: Pool, name: str, make: Callable[..., Rule], *, by: str = "", every: str = "") -> list[dict[str, Any]]:
    """Rows of a rule on a pool: of all examples, and of each class or group where the rule is by these.

    Args:
        pool: the examples.
        name: of the rule.
        make: makes it.
        by: ``"class"`` or ``"group"``, of which each gets a row too; empty for none.
        every: ``"class"`` or ``"group"``: rows of each although the rule is not by these.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    tested: dict[str, int] = {}
    spread: dict[str, list[float]] = {}
    for seed, (held, others) in enumerate(pool.splits()):
        groups = [pool.groups[i] for i in held.tolist()] if by == "group" else None
        new = [pool.groups[i] for i in others.tolist()]
        generator = torch.Generator().manual_seed(seed)
        rule = make(*(one[held] for one in pool.predicted), pool.truth[held], groups, generator)
        sets = sets_of(rule, [one[others] for one in pool.predicted], new if by == "group" else None)
        parts = held_by(rule, sets, pool.truth[others])
        chosen = {"all": ~parts["held"].isnan()}
        if "class" in (by, every):
            chosen |= {f"class {k}": pool.truth[others] == k for k in range(int(pool.truth.max()) + 1)}
        if "group" in (by, every):
            chosen |= {group: torch.tensor([one == group for one in new]) for group in sorted(set(pool.groups))}
        for part, which in chosen.items():
            which = which & ~parts["held"].isnan()
            held_share, size = parts["held"][which], parts["size"][which]
            found.setdefault(part, []).append((held_share.mean().item(), size.mean().item()))
            spread.setdefault(part, []).append(held_share.std().item())
            tested[part] = int(which.sum())
    rows = []
    for part, each in found.items():
        coverage, size = (sum(column) / len(each) for column in zip(*each, strict=True))
        # Of sets that hold the truth or not, this is the binomial one.
        error = sum(spread[part]) / len(each) / math.sqrt(tested[part])
        rows.append(
            {
                "data": pool.name,
                "sets": name,
                "of": part,
                "promised": part == "all" or bool(by),
                "held_out": pool.held_out,
                "tested": tested[part],
                "coverage": coverage,
                "error": error,
                "size": size,
            }
        )
    return rows


# Networks and pools


def trained(
    model: nn.Module, x: Tensor, loss: Callable[[Any, slice | Tensor], Tensor], epochs: int, size: int = 64
) -> Any:
    """A network that was trained for some epochs, in evaluation mode."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(size):
            optimizer.zero_grad()
            loss(model(x[index]), index).backward()
            optimizer.step()
    return model.eval()


def posterior_of(model: nn.Module, x: Tensor, size: int = 64, task: Any = None) -> stochbn.Posterior:
    """A posterior of a network, fitted to its training inputs."""
    batches = list(x[torch.randperm(len(x))].split(size))[:100]
    return stochbn.fit(model, batches, reference=False, task=task)


def predict(model: nn.Module, posterior: stochbn.Posterior, x: Tensor, task: Any = None) -> Any:
    """Predictions of inputs; every batch sees the same draws."""
    predictive = stochbn.Predictive(model, posterior, DRAWS, task=task)
    parts = [predictive(part, generator=torch.Generator().manual_seed(0)) for part in x.split(100)]
    return type(parts[0]).cat(parts)


def thirds(values: Tensor, names: Sequence[str]) -> list[str]:
    """Groups of equal size, by values ``[N]``."""
    ranks = values.argsort().argsort()
    return [names[int(rank) * 3 // len(values)] for rank in ranks.tolist()]


def cifar() -> tuple[nn.Module, stochbn.Posterior, Images]:
    """The committed ResNet-18, its posterior, and its test images."""
    model = checkpoints.load(NETWORK).model
    train, _ = load("cifar10:0-4", "train").held_out(0.1, seed=0)
    test = load("cifar10:0-4", "test").shuffled(2).first(5000)
    return model, posterior_of(model, as_input(train.shuffled(1).first(6400).pixels)), test


def cifar_pool() -> Pool:
    """Test images in thirds by their brightness."""
    model, posterior, test = cifar()
    x = as_input(test.pixels)
    probs = predict(model, posterior, x).probs
    groups = thirds(x.mean((1, 2, 3)), ("dark", "middle", "bright"))
    return Pool("CIFAR-10 (5 classes), ResNet-18", (probs,), test.labels, groups, 1500)


def lenet(side: int, outputs: int) -> nn.Module:
    """A small convolutional network for pictures 28 high."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 5), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 5), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.LazyLinear(64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, outputs),
    )  # fmt: skip


def noisy(x: Tensor, noise: Tensor, seed: int) -> Tensor:
    """Pictures with as much noise as each has."""
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return x + noise[:, None, None, None] * drawn


def mnist_pool() -> Pool:
    """MNIST under noise of three strengths, of which the network saw all."""
    train, test = load("mnist", "train").shuffled(0).first(12_000), load("mnist", "test").shuffled(0).first(6000)
    torch.manual_seed(0)
    strength = torch.tensor([0.2, 0.7, 1.2])
    x = noisy(as_input(train.pixels), strength[torch.arange(len(train)) % 3], 1)
    model = lenet(28, 10)
    model(x[:2])
    model = trained(model, x, lambda out, i: nn.functional.cross_entropy(out, train.labels[i]), 2)
    level = torch.arange(len(test)) % 3
    new = noisy(as_input(test.pixels), strength[level], 2)
    probs = predict(model, posterior_of(model, x), new).probs
    return Pool("MNIST with noise, LeNet", (probs,), test.labels, [f"noise {strength[i]:.1f}" for i in level], 3000)


def three_digits(images: Images, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures of three digits side by side, which digits these are ``[N, 10]``, and how many different ones."""
    mixed = images.shuffled(seed)
    count = len(mixed) // 3
    x = as_input(mixed.pixels[: 3 * count]).view(count, 3, 28, 28).movedim(1, 2).reshape(count, 1, 28, 84)
    truth = nn.functional.one_hot(mixed.labels[: 3 * count].view(count, 3), 10).amax(1)
    return noisy(x, torch.full((count,), 0.6), seed), truth, truth.sum(1)


def labels_pool() -> Pool:
    """Labels: which digits a picture of three has; groups are by how many different ones."""
    x, truth, _ = three_digits(load("mnist", "train").first(24_000), 0)
    torch.manual_seed(0)
    model = lenet(84, 10)
    model(x[:2])
    loss = nn.functional.binary_cross_entropy_with_logits
    model = trained(model, x, lambda out, i: loss(out, truth[i].float()), 2)
    new, wanted, different = three_digits(load("mnist", "test"), 1)
    probs = predict(model, posterior_of(model, x), new, "multilabel").probs
    groups = ["3 digits" if one == 3 else "1 or 2 digits" for one in different.tolist()]
    return Pool("MNIST, labels of three digits", (probs,), wanted, groups, 1200)


def segmentation_pool() -> Pool:
    """Discs of MONAI's test pictures under noise, by its BasicUNet; groups are by the share of the discs."""
    import numpy as np
    from monai.data import create_test_image_2d
    from monai.networks.nets import BasicUNet

    def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
        state = np.random.RandomState(seed)
        made = [
            create_test_image_2d(48, 48, num_objs=1 + i % 6, rad_max=9, rad_min=4, noise_max=0.9, num_seg_classes=1,
                                 random_state=state)
            for i in range(count)
        ]  # fmt: skip
        x, y = (np.stack(part).astype("float32") for part in zip(*made, strict=True))
        return torch.from_numpy(x)[:, None], torch.from_numpy(y).long()

    torch.manual_seed(0)
    x, y = pictures(240, 0)
    model = BasicUNet(2, 1, 2, features=(8, 8, 16, 16, 32, 8), norm="batch")
    model = trained(model, x, lambda out, i: nn.functional.cross_entropy(out, y[i]), 3, size=16)
    new, truth = pictures(500, 1)
    probs = predict(model, posterior_of(model, x, 16), new).probs
    groups = thirds(truth.float().mean((1, 2)), ("few places", "some places", "many places"))
    return Pool("Segmentation, MONAI's BasicUNet", (probs,), truth, groups, 250)


class MeanAndVariance(nn.Module):
    """Gives a mean and a log-variance."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both, ``[N]``."""
        mean, log_variance = self.body(x).unbind(1)
        return mean, log_variance


def numbers(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs ``[N, 3]`` and noisy numbers; the noise depends on the inputs, and has heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, generator=generator) * 4 - 2
    heavy = torch.randn(count, generator=generator) / torch.rand(count, generator=generator).clamp(min=0.05).sqrt()
    return x, x[:, 0].sin() * x[:, 1] + (0.1 + 0.3 * x[:, 2].exp()) * heavy


def regression_pool() -> Pool:
    """Made numbers; groups are thirds of the input that the noise grows with."""
    torch.manual_seed(0)
    x, y = numbers(6000, 0)
    model = trained(MeanAndVariance(), x, lambda out, i: nn.functional.gaussian_nll_loss(out[0], y[i], out[1].exp()), 6)
    new, truth = numbers(6000, 1)
    found = predict(model, posterior_of(model, x, task="regression"), new, "regression")
    groups = thirds(new[:, 2], ("little noise", "some noise", "much noise"))
    return Pool("Made numbers, mean and variance", (found.mean, found.total_std), truth, groups, 1500)


def streams() -> list[dict[str, Any]]:
    """Coverage on streams that drift, of fixed sets and of adaptive ones: in all, and in the last fifth."""
    model, posterior, test = cifar()
    held, stream = test.take(torch.arange(1000)), test.take(torch.arange(1000, len(test)))
    known = predict(model, posterior, as_input(held.pixels)).probs
    parts = stream.pixels.chunk(6)
    pixels = torch.cat([corrupt(part, "gaussian_noise", severity) for severity, part in enumerate(parts)])
    x = pixels.contiguous(memory_format=torch.channels_last)
    rows = _stream("CIFAR-10, noise of severity 0 to 5", "lac", conformal.lac, (known,), held.labels,
                   (predict(model, posterior, x).probs,), stream.labels)  # fmt: skip
    numbers_pool = regression_pool()
    mean, std = numbers_pool.predicted
    truth = numbers_pool.truth
    drift = torch.linspace(1, 6, len(truth) - 1000)
    changed = mean[1000:] + drift * (truth - mean)[1000:]
    predicted, earlier = (mean[1000:], std[1000:]), (mean[:1000], std[:1000])
    rows += _stream("Made numbers, noise up to 6 times", "intervals", conformal.intervals, earlier, truth[:1000],
                    predicted, changed)  # fmt: skip
    return rows


def _stream(
    name: str, sets: str, fit: Any, known: Any, known_truth: Tensor, stream: Any, truth: Tensor
) -> list[dict[str, Any]]:
    rule = fit(*known, known_truth, COVERAGE)
    online = conformal.aci(rule, *known, known_truth, rate=RATE)
    fixed = held_by(rule, rule(*stream), truth)["held"]
    sizes: list[Tensor] = []
    held: list[Tensor] = []
    for i in range(len(truth)):  # a label arrives before the next example
        one = [part[i : i + 1] for part in stream]
        shown = held_by(rule, online(*one), truth[i : i + 1])
        sizes.append(shown["size"])
        held.append(online.update(*one, truth[i : i + 1]))
    size, right = torch.cat(sizes), torch.cat(held).double()
    last = len(truth) * 4 // 5
    bound = (1 + RATE) / (RATE * len(truth))
    return [
        {"data": name, "sets": kind, "examples": len(truth), "coverage": one.mean().item(),
         "last": one[last:].mean().item(), "size": own[own.isfinite()].mean().item(), "bound": limit}
        for kind, one, own, limit in (
            (f"{sets}, fixed", fixed, held_by(rule, rule(*stream), truth)["size"], math.nan),
            (f"{sets}, adaptive (aci)", right, size, bound),
        )
    ]  # fmt: skip


# What is measured


def _of_cifar() -> list[dict[str, Any]]:
    pool = cifar_pool()
    rows = measure(pool, "lac", classes("lac"), every="class")
    for method, more in (("aps", {}), ("raps", {"penalty": 0.05, "free": 1}), ("saps", {"penalty": 0.2})):
        rows += measure(pool, f"{method}, randomised", classes(method, **more))
    rows += measure(pool, "lac by class", classes("lac", by_class=True), by="class")
    return rows + measure(pool, "lac by brightness", classes("lac"), by="group")


def _of_mnist() -> list[dict[str, Any]]:
    pool = mnist_pool()
    rows = measure(pool, "lac", classes("lac"), every="group")
    rows += measure(pool, "lac by noise", classes("lac"), by="group")
    return rows + measure(pool, "lac by class", classes("lac", by_class=True), by="class")


def _of_labels() -> list[dict[str, Any]]:
    pool = labels_pool()
    rows = measure(pool, "crc", labels(), every="group")
    return rows + measure(pool, "crc by number of digits", labels(), by="group")


def _of_places() -> list[dict[str, Any]]:
    pool = segmentation_pool()
    rows = measure(pool, "crc, mask of the discs", labels(mask=1), every="group")
    rows += measure(pool, "crc, mask by share", labels(mask=1), by="group")
    return rows + measure(pool, "crc, all classes", labels())


def _of_numbers() -> list[dict[str, Any]]:
    pool, rows = regression_pool(), list[dict[str, Any]]()
    for method in ("normalized", "absolute", "cqr"):
        rows += measure(pool, method, intervals(method), every="group" if method == "normalized" else "")
    return rows + measure(pool, "normalized by noise", intervals("normalized"), by="group")


PARTS = {"cifar": _of_cifar, "mnist": _of_mnist, "labels": _of_labels, "places": _of_places, "numbers": _of_numbers}


def finished(folder: Path, name: str, measured: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a part, which an earlier run may have finished."""
    file = folder / f"{name}.json"
    if not file.exists():
        write_json(file, [{key: None if one != one else one for key, one in row.items()} for row in measured()])
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of splits."""
    whole = {(row["data"], row["sets"]): row["tested"] for row in rows if row["of"] == "all"}
    body = []
    for row in rows:
        held = row["held_out"] * row["tested"] / whole[row["data"], row["sets"]]  # of this class or group
        off, slack = row["coverage"] - COVERAGE, LIMIT * row["error"]
        verdict = ("yes" if -slack <= off <= slack + 2 / (held + 1) else "no") if row["promised"] else "not promised"
        body.append(
            [
                row["data"],
                row["sets"],
                row["of"],
                f"{row['held_out']:,}",
                f"{row['tested']:,}",
                f"{100 * row['coverage']:.1f} ± {100 * row['error']:.1f}",
                f"{row['size']:.2f}",
                verdict,
            ]
        )
    columns = ["data and network", "sets", "of", "held out", "tested", "coverage %", "size", "as promised"]
    return Table(f"Sets for {100 * COVERAGE:g} %, means over {SPLITS} random splits", columns, body)


def stream_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of streams."""
    body = [
        [
            row["data"],
            row["sets"],
            f"{row['examples']:,}",
            f"{100 * row['coverage']:.1f}",
            "-" if row["bound"] is None else f"{100 * row['bound']:.1f}",
            f"{100 * row['last']:.1f}",
            f"{row['size']:.2f}",
        ]
        for row in rows
    ]
    columns = ["stream", "sets", "examples", "coverage %", f"bound on the difference from {100 * COVERAGE:g} %, points"]
    columns += ["in the last fifth %", "mean size"]
    return Table(f"Streams that drift, sets for {100 * COVERAGE:g} %", columns, body)


PAGE = """\
# Prediction sets: how often they hold the truth

`python benchmarks/sets.py` made these tables. A pool of labelled examples is split at random into held-out ones, which
make the sets, and others, which check them. Predictions are stochbn's, with {draws} draws. Behind ± is the error of the
tested part of one split: the binomial one where a set holds the truth or does not, and the standard error of the mean
share where it holds a share of it. "Size" is the number of classes or labels in a set (for a mask: the share of places;
for all classes of places: classes in the set of a place), or the width of an interval. Classes and groups are promised
nothing by sets that are not made for them. "As promised" is no less than what was asked for and no more than the
method's own upper bound, 2 / (n + 1) above it with n held-out examples, each to two errors.

{splits}

A size is a mean over the sets that are finite. On a stream the coverage of adaptive sets differs from what was asked
for by no more than the bound of Gibbs and Candes (2021), whatever happens in the stream.

{streams}

{about}
"""


def main() -> None:
    """Measure, print, and write sets.json and sets.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for sets.json and sets.md")
    parser.add_argument("--runs", type=Path, default=Path("runs/sets"), help="folder for what is finished")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    rows = [row for name, measured in PARTS.items() for row in finished(options.runs, name, measured)]
    moving = finished(options.runs, "streams", streams)
    about = f"Python {sys.version.split()[0]}, torch {torch.__version__}, threads: {torch.get_num_threads()}."
    parts = {"splits": table(rows).markdown(), "streams": stream_table(moving).markdown()}
    text = PAGE.format(draws=DRAWS, about=about, **parts)
    print(text)
    write_json(options.out / "sets.json", {"coverage": COVERAGE, "about": about, "rows": rows, "streams": moving})
    write_bytes(options.out / "sets.md", text.encode())


if __name__ == "__main__":
    main()
