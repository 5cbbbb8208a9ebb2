"""Other libraries beside stochbn, on the same networks and data, each used as its own documentation says.

Every method takes the three trained ResNet-18 of ``results/trained/resnet18`` and predicts all test images of the five
classes that they know, and of the five that they do not. What a method fits sees the nine tenths of the training images
that the networks were trained on, augmented as they were then. What it chooses, such as a temperature, is chosen on the
other tenth. No choice sees test data. Run it as::

    STOCHBN_DATA=... python benchmarks/rivals.py --threads 1

It takes less than an hour of one core. The libraries are optional: the script names those that are missing, and the
rows of an earlier run stay in the table, with their differences from stochbn as it was then. This installs them::

    pip install 'torch-uncertainty==0.13.0' 'lightning<2.7' 'laplace-torch==0.3' 'netcal==1.4.0'

TorchUncertainty and laplace-torch need a torchvision that was built for the installed torch. Predictions are kept in
``runs/rivals`` for each version of a library, so an interrupted run continues where it stopped. Times are of the
processor that this process uses, so other work on the machine changes them little.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stochbn
from stochbn import Posterior, Predictive, metrics
from stochbn.files import read_tensors, write_bytes, write_json, write_tensors
from stochbn.measuring.timing import machine
from stochbn.metrics.differences import paired
from stochbn.paper.trainee import augment
from stochbn.predictions import entropy
from stochbn.report.tables import Table
from stochbn.sources import checkpoints
from stochbn.sources.named import Images, as_input, load

ROOT = Path(__file__).parent.parent
NETWORKS = tuple(ROOT / "results" / "trained" / "resnet18" / f"plain-{i}" / "network.safetensors" for i in range(3))
KNOWN, UNKNOWN = "cifar10:0-4", "cifar10:5-9"
EPOCHS = 60
"""For how long each of the networks was trained."""
FORMAT = "stochbn.rivals/1"
BATCH = 100
"""Test images in a call."""
LOADED = 128
"""Training images in a batch of the data loaders."""
REPETITIONS = 15
GRID = 9
"""Prior precisions in the grid search of laplace-torch, powers of ten; its own default is 100 in the same range."""
AUGMENTED = 8
"""Draws over the input."""
LIMIT = 2.0
"""By how many standard errors a method must be better than another to count as better."""
PLAIN, DEFAULT = "plain network", "stochbn: fit, calibrate"
SCORES = {"error": 2, "nll": 4, "calibrated_nll": 4, "ece": 2, "auroc": 4}
"""The scores of a method and their digits. Lower is better, but for the AUROC."""
NAMES = {"error": "error", "nll": "NLL", "calibrated_nll": "calibrated NLL", "auroc": "AUROC"}
"""The scores that are compared in pairs."""

Predict = Callable[[Tensor], Tensor]
"""From inputs ``[N, C, H, W]`` to probabilities ``[N, K]``."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What a method is given.

    Attributes:
        models: the trained networks, in evaluation mode; all methods but the ensemble use one.
        train: the images that they were trained on.
        augmented: the same images, each augmented once as in training.
        held_out: images that they were not trained on.
    """

    models: Sequence[nn.Module]
    train: DataLoader[Any]
    augmented: DataLoader[Any]
    held_out: DataLoader[Any]

    @property
    def model(self) -> nn.Module:
        """The network of a method that uses one."""
        return self.models[0]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        about: how the method is used, in words.
        fit: from a subject to a function that predicts, and what was chosen in words.
        modules: what must be importable beside stochbn.
        packages: whose versions are named.
        ensemble: whether it uses all networks at once.
    """

    about: str
    fit: Callable[[Subject], tuple[Predict, str]]
    modules: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    ensemble: bool = False


def plain(subject: Subject) -> tuple[Predict, str]:
    """The network as it is."""
    return lambda x: subject.model(x).softmax(1), ""


def temperature(subject: Subject) -> tuple[Predict, str]:
    """`stochbn.calibrate` without draws."""
    posterior = stochbn.fit(subject.model, subject.augmented)
    posterior = stochbn.calibrate(subject.model, posterior, subject.held_out, batch_sizes=[math.inf])
    return _predictive(subject.model, posterior), f"temperature {posterior.temperature:.2f}"


def netcal_temperature(subject: Subject) -> tuple[Predict, str]:
    """Temperature scaling of netcal, of the probabilities of the held-out images.

    They are float64: with float32 its optimiser stops where it starts, at a temperature of 1.
    """
    from netcal.scaling import TemperatureScaling

    probs, labels = [], []
    with torch.no_grad():
        for x, y in subject.held_out:
            probs.append(subject.model(x).softmax(1))
            labels.append(y)
    scaling = TemperatureScaling()
    scaling.fit(torch.cat(probs).double().numpy(), torch.cat(labels).numpy())

    def predict(x: Tensor) -> Tensor:
        return torch.from_numpy(scaling.transform(subject.model(x).softmax(1).double().numpy()))

    return predict, f"temperature {1 / float(scaling.temperature[0]):.2f}"


def calibrated(subject: Subject) -> tuple[Predict, str]:
    """`stochbn.fit` and `stochbn.calibrate` with their defaults."""
    posterior = stochbn.fit(subject.model, subject.augmented)
    posterior = stochbn.calibrate(subject.model, posterior, subject.held_out)
    return _predictive(subject.model, posterior), posterior.choice


def fitted(subject: Subject) -> tuple[Predict, str]:
    """`stochbn.fit` alone with its defaults."""
    return _predictive(subject.model, stochbn.fit(subject.model, subject.augmented)), ""


def over_inputs(subject: Subject) -> tuple[Predict, str]:
    """Draws over the input alone, which flip and shift it, with the temperature that is best for them."""
    changes = stochbn.augment.chain(stochbn.augment.flip(), stochbn.augment.shift(4))
    posterior = stochbn.fit(subject.model, subject.train, augment=changes)
    posterior = stochbn.calibrate(
        subject.model, posterior, subject.held_out, batch_sizes=[math.inf], augment=changes, draws=AUGMENTED
    )
    predict = _predictive(subject.model, posterior, draws=AUGMENTED, augment=changes)
    return predict, f"temperature {posterior.temperature:.2f}"


def _predictive(model: nn.Module, posterior: Posterior, **settings: Any) -> Predict:
    predictive = Predictive(model, posterior, **settings)
    generator = torch.Generator().manual_seed(0)
    return lambda x: predictive(x, generator=generator).probs


def mc_batch_norm(subject: Subject) -> tuple[Predict, str]:
    """`MCBatchNorm` of TorchUncertainty with its defaults."""
    from torch_uncertainty.post_processing import MCBatchNorm

    MCBatchNorm.mc_batch_norm_layers = []  # of the class: the layers of an earlier network would stay in it
    wrapped = MCBatchNorm(subject.model)
    wrapped.fit(subject.augmented)
    wrapped.eval()

    def predict(x: Tensor) -> Tensor:
        logits = wrapped(x).view(wrapped.num_estimators, len(x), -1)
        return logits.softmax(2).mean(0)

    return predict, f"{wrapped.num_estimators} mini-batches of {wrapped.mc_batch_size}"


def laplace(subject: Subject, *, method: str, link: str) -> tuple[Predict, str]:
    """A Laplace approximation of the last layer, whose prior precision is optimised in the way that is named.

    The grid search gets a function as its loss. The default loss of laplace-torch 0.3 is a running mean, which is not
    reset from one value of the grid to the next, so that the search ends at the last one.
    """
    from laplace import Laplace

    approximation = Laplace(
        copy.deepcopy(subject.model), "classification", subset_of_weights="last_layer", hessian_structure="kron"
    )
    approximation.fit(subject.augmented)
    options: dict[str, Any] = {"method": method, "pred_type": "glm", "link_approx": link}
    if method == "gridsearch":
        options |= {"val_loader": subject.held_out, "grid_size": GRID, "loss": _nll}
    approximation.optimize_prior_precision(**options)
    precision = approximation.prior_precision.mean().item()
    return lambda x: approximation(x, pred_type="glm", link_approx=link), f"prior precision {precision:.3g}"


def _nll(probs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.nll_loss(probs.log(), labels)


def ensemble(subject: Subject) -> tuple[Predict, str]:
    """The mean probabilities of all networks."""
    return lambda x: torch.stack([model(x).softmax(1) for model in subject.models]).mean(0), ""


METHODS: dict[str, Method] = {
    PLAIN: Method("as it is", plain),
    "temperature (stochbn)": Method("`fit`, then `calibrate(..., batch_sizes=[math.inf])`: no draws", temperature),
    "temperature (netcal)": Method("`TemperatureScaling()`", netcal_temperature, ("netcal",), ("netcal",)),
    DEFAULT: Method("`fit`, `calibrate` and `Predictive` with their defaults", calibrated),
    "stochbn: fit alone": Method("`fit` and `Predictive` with their defaults: draws at the fitted noise", fitted),
    f"stochbn: {AUGMENTED} augmented draws": Method(
        f"`augment=chain(flip(), shift(4))` in `fit`, `calibrate(..., batch_sizes=[math.inf], draws={AUGMENTED})` and "
        f"`Predictive(..., draws={AUGMENTED})`: draws over the input alone",
        over_inputs,
    ),
    "MCBatchNorm (TorchUncertainty)": Method(
        "`MCBatchNorm(model)`, then `fit(train_loader)`",
        mc_batch_norm,
        ("torch_uncertainty", "lightning"),
        ("torch-uncertainty",),
    ),
    **{
        f"Laplace, {words}": Method(
            "`Laplace(model, 'classification', subset_of_weights='last_layer', hessian_structure='kron')`, `fit`, then "
            f"`optimize_prior_precision(method={method!r}{more})` and predictions with `link_approx={link!r}`",
            functools.partial(laplace, method=method, link=link),
            ("laplace",),
            ("laplace-torch",),
        )
        for words, method, link, more in (
            ("grid search, probit", "gridsearch", "probit", f", grid_size={GRID}, loss=..."),
            ("marginal likelihood, probit", "marglik", "probit", ""),
        )
    },
    "deep ensemble of 3": Method("the mean probabilities of the three networks", ensemble, ensemble=True),
}

ABOUT = f"""\
Three networks ([ResNet-18](../results/trained/README.md), trained on nine tenths of `{KNOWN}` with flips and shifts),
and all test images: those of the five known classes, and those of `{UNKNOWN}`, which the networks do not know. Each
method is used as its own documentation says. What it fits sees the training images, each augmented once as in training;
what it chooses is chosen on the held-out tenth. Nothing is chosen on test data. All methods see the same batches.

- **NLL** and **calibrated NLL** are in nats. The second is after the temperature that is best in cross-validation on
  the test images (`stochbn.metrics.calibrated_nll`). The **AUROC** is of known against unknown images, by the entropy.
- **Plain passes**: the processor time to predict {BATCH} images over that of a plain pass of the same images, in
  PyTorch's default layout: medians of {REPETITIONS} interleaved repetitions.
- **Fitting**: the processor time of everything before the first prediction, over that of plain passes over all training
  images. Reading batches from memory counts.
- Scores are means over the three networks. Differences are from the plain network on the same images. Behind ± is the
  paired standard error of one network, the mean of three, which is at least that of their mean. In brackets is the
  standard deviation over the networks. The ensemble is compared with each network.
"""
LEFT_OUT = """\
Not in the table: **MC dropout**, as no network with dropout is committed; **ABNN** (`ABNN` in TorchUncertainty), which
trains several copies of each network further, and whose learning rate, prior and numbers of models have no defaults.

Augmented draws are test-time augmentation, by the flips and shifts of training; it could be combined with every other
method. MCBatchNorm, Laplace and the ensemble are as they come, without a temperature: compare them by the calibrated
NLL, too.

The grid search of laplace-torch 0.3 gets the NLL as a function: its default loss is a running mean that is not reset
from one value of the grid to the next. netcal gets probabilities in float64: with float32 its optimiser stops at once.
"""


def version_of(method: Method) -> str:
    """The version of what a method runs with: its packages, or a checksum of stochbn's code."""
    if method.packages:
        return ", ".join(f"{package} {version(package)}" for package in method.packages)
    digest = hashlib.sha256()
    for file in sorted(Path(stochbn.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return f"stochbn {stochbn.__version__} ({digest.hexdigest()[:12]})"


def missing(method: Method) -> str:
    """Why a method cannot be run here; empty if it can."""
    try:
        for module in method.modules:
            importlib.import_module(module)
        version_of(method)
    except (ImportError, PackageNotFoundError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
        return f"{type(error).__name__}: {error}"
    return ""


def measure(method: Method, subject: Subject, known: Sequence[Tensor], unknown: Sequence[Tensor]) -> dict[str, Any]:
    """Fit a method and predict all test images, given in batches.

    Returns:
        ``known`` and ``unknown``: probabilities ``[N, K]``; ``passes`` and ``fitting``: its costs, as the table says;
        ``chosen``: in words.
    """
    found: list[tuple[Predict, str]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unit = _plain_seconds(subject, known)
        took = processor_seconds(lambda: found.append(method.fit(subject)))
        predict, chosen = found[0]
        with torch.no_grad():
            works = (_in_turn(plain(subject)[0], known), _in_turn(predict, known))
            times = medians(works, REPETITIONS)
            parts = {"known": known, "unknown": unknown}
            probs = {part: torch.cat([predict(x) for x in batches]).float() for part, batches in parts.items()}
    images = len(subject.train.dataset)  # type: ignore[arg-type]
    return {**probs, "passes": times[1] / times[0], "fitting": took / (unit * images), "chosen": chosen}


def _plain_seconds(subject: Subject, batches: Sequence[Tensor]) -> float:
    """The time of a plain pass, for one image."""
    with torch.no_grad():
        return medians([_in_turn(subject.model, batches)], REPETITIONS)[0] / len(batches[0])


def processor_seconds(work: Callable[[], object]) -> float:
    """The processor time that a call takes in all threads of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def medians(works: Sequence[Callable[[], object]], repetitions: int) -> list[float]:
    """The median processor time of each work, all in turn in every repetition, after one call to warm up."""
    for work in works:
        work()
    times = [[processor_seconds(work) for work in works] for _ in range(repetitions)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def _in_turn(work: Callable[[Tensor], object], batches: Sequence[Tensor]) -> Callable[[], object]:
    """A call of the work with the next batch."""
    coming: Iterator[Tensor] = itertools.cycle(batches)
    return lambda: work(next(coming))


def score(probs: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
    """The scores of the table, errors and calibration errors in percent."""
    found = metrics.evaluate(probs["known"], labels)
    best = metrics.calibrated_nll(probs["known"], labels)
    return {
        "error": found["error"],
        "nll": found["nll"],
        "calibrated_nll": best["nll"],
        "ece": 100 * found["ece"],
        "auroc": metrics.ood(entropy(probs["known"]), entropy(probs["unknown"]))["auroc"],
        "best_temperature": best["temperature"],
    }


def change(base: Mapping[str, Tensor], method: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
    """What a method changes, with paired standard errors: `stochbn.metrics.differences.paired`."""
    known, unknown = (base["known"], method["known"]), (base["unknown"], method["unknown"])
    each = metrics.calibrated_nll_of_each(known[0], labels), metrics.calibrated_nll_of_each(known[1], labels)
    return paired(known, labels, unknown, each)


def mean_change(changes: Sequence[Mapping[str, float]], key: str) -> tuple[float, float, float]:
    """Of several networks, the mean change, the mean standard error, and the standard deviation of the changes.

    The standard error of the mean change is at most the mean standard error, however the networks' errors correlate.
    """
    each = [one[f"{key}_change"] for one in changes]
    error = statistics.mean(one[f"{key}_change_se"] for one in changes)
    return statistics.mean(each), error, statistics.stdev(each) if len(each) > 1 else 0.0


def compared(changes: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """For every score, whether a method is better (1), worse (-1) or neither (0), by `LIMIT` standard errors."""
    verdicts = {}
    for key in NAMES:
        mean, error, _ = mean_change(changes, key)
        gain = mean if key == "auroc" else -mean
        verdicts[key] = 0 if abs(gain) <= LIMIT * error else (1 if gain > 0 else -1)
    return verdicts


def merged(earlier: Mapping[str, Any], new: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """The rows of this run and, of methods that it has none of, those of an earlier one, in the order of the table."""
    return {name: new.get(name, earlier.get(name)) for name in order if name in new or name in earlier}


def scores_table(rows: Mapping[str, Any]) -> Table:
    """The means over networks, and what they cost."""
    body = []
    for name, row in rows.items():
        each = row["networks"]
        cells = [f"{statistics.mean(one[key] for one in each):.{digits}f}" for key, digits in SCORES.items()]
        passes = f"{statistics.mean(one['passes'] for one in each):.1f}"
        body.append([name, *cells, passes, _fitting(row)])
    columns = ["method", "error %", "NLL", "calibrated NLL", "ECE %", "AUROC", "plain passes", "fitting"]
    number = max(len(row["networks"]) for row in rows.values())
    title = f"ResNet-18 on five classes of CIFAR-10: means over {number} network{'s' if number > 1 else ''}"
    return Table(title, columns, body)


def _fitting(row: Mapping[str, Any]) -> str:
    if row["ensemble"]:
        return f"{len(NETWORKS) - 1} trainings of {EPOCHS} epochs"
    mean = statistics.mean(one["fitting"] for one in row["networks"])
    return "0" if row["free"] else f"{mean:.1f}"


def changes_table(rows: Mapping[str, Any], key: str, words: str, base: str) -> Table:
    """Differences from another method, with paired standard errors and their standard deviation over networks."""
    body = []
    for name, row in rows.items():
        if name == base:
            continue
        cells = []
        for score_name in NAMES:
            mean, error, spread = mean_change(row[key], score_name)
            digits = SCORES[score_name]
            cells.append(f"{mean:+.{digits}f} ± {error:.{digits}f} ({spread:.{digits}f})")
        body.append([name, *cells])
    return Table(f"Differences from {words}", ["method", "error, points", "NLL", "calibrated NLL", "AUROC"], body)


def verdicts(rows: Mapping[str, Any]) -> str:
    """Where `DEFAULT` loses and wins, a line for each method: by scores, and by cost."""
    own = {key: statistics.mean(one[key] for one in rows[DEFAULT]["networks"]) for key in ("passes", "fitting")}
    lines = [
        f"**Where stochbn loses.** Each method against `{DEFAULT}`, by more than {LIMIT:g} paired standard errors "
        "(costs: by more than a tenth):",
        "",
    ]
    for name, row in rows.items():
        if name == DEFAULT:
            continue
        found = compared(row["from_default"])
        better = [NAMES[key] for key, verdict in found.items() if verdict > 0]
        worse = [NAMES[key] for key, verdict in found.items() if verdict < 0]
        for key, words in (("passes", "passes"), ("fitting", "fitting")):
            mean = statistics.mean(one[key] for one in row["networks"])
            mean = mean if key == "passes" or not row["ensemble"] else float("inf")
            if mean < own[key] / 1.1:
                better.append(words)
            elif mean > own[key] * 1.1:
                worse.append(words)
        lines.append(f"- {name}: better in {_listed(better)}; worse in {_listed(worse)}.")
    return "\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "nothing"


def methods_list(rows: Mapping[str, Any]) -> str:
    """How each method was used, with its version and what was chosen for each network."""
    lines = []
    for name, row in rows.items():
        chosen = "; ".join(dict.fromkeys(one["chosen"].rstrip(".") for one in row["networks"] if one["chosen"]))
        lines.append(f"- {name}, {row['version']}: {row['about']}{f'. Chosen: {chosen}' if chosen else ''}")
    return "\n".join(lines)


def page(found: Mapping[str, Any]) -> str:
    """The whole of rivals.md."""
    rows = found["methods"]
    tables = [
        scores_table(rows).markdown(),
        changes_table(rows, "from_plain", "the plain network", PLAIN).markdown(),
        verdicts(rows),
        changes_table(rows, "from_default", f"`{DEFAULT}`", DEFAULT).markdown(),
    ]
    run = "    STOCHBN_DATA=... python benchmarks/rivals.py --threads 1"
    return "\n\n".join([ABOUT.strip(), run, f"{found['about']}.", *tables, methods_list(rows), LEFT_OUT.strip()]) + "\n"


def loaders(train: Images, held_out: Images) -> dict[str, DataLoader[Any]]:
    """Data loaders of the training images, of augmented ones, and of those held out: see `Subject`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        augmented = augment(train.pixels)

    def loader(pixels: Tensor, labels: Tensor, shuffle: bool) -> DataLoader[Any]:
        examples = TensorDataset(as_input(pixels).contiguous(), labels)
        return DataLoader(examples, LOADED, shuffle=shuffle, generator=torch.Generator())

    return {
        "train": loader(train.pixels, train.labels, True),
        "augmented": loader(augmented, train.labels, True),
        "held_out": loader(held_out.pixels, held_out.labels, False),
    }


def predictions(
    name: str,
    number: int,
    models: Sequence[nn.Module],
    data: Mapping[str, Images],
    batches: Mapping[str, DataLoader[Any]],
    folder: Path,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A method's predictions with the network of a number, and its costs; made, or read where they were made before."""
    method = METHODS[name]
    key = re.sub(r"[^a-z0-9]+", "-", f"{name} {version_of(method)} {number}".lower())
    file = folder / f"{key}.safetensors"
    if not file.exists():
        known, unknown = ([x.contiguous() for x, _ in data[part].batches(BATCH)] for part in ("known", "unknown"))
        torch.manual_seed(number)
        for loader in batches.values():
            loader.generator.manual_seed(number)
        used = models if method.ensemble else [models[number]]
        made = measure(method, Subject(used, **batches), known, unknown)
        tensors = {part: made.pop(part) for part in ("known", "unknown")}
        write_tensors(file, FORMAT, tensors, made)
        print(f"{name}, network {number}: {made}", flush=True)
    return read_tensors(file, FORMAT)


def summarised(
    name: str,
    found: Sequence[tuple[dict[str, Tensor], dict[str, Any]]],
    bases: Mapping[str, Sequence[dict[str, Tensor]]],
    labels: Tensor,
) -> dict[str, Any]:
    """The row of a method: its scores with every network, and its differences from the bases."""
    method = METHODS[name]
    probs = [tensors for tensors, _ in found]
    networks = [{**score(tensors, labels), **about} for tensors, about in found]
    each = probs * len(bases["from_plain"]) if method.ensemble else probs
    return {
        "about": method.about,
        "version": version_of(method),
        "ensemble": method.ensemble,
        "free": name == PLAIN,
        "networks": networks,
        **{
            key: [change(base, one, labels) for base, one in zip(base_probs, each, strict=True)]
            for key, base_probs in bases.items()
        },
    }


def main() -> None:
    """Measure, print, and write rivals.json and rivals.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads (default: all processors)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="which to measure (default: all)")
    parser.add_argument(
        "--networks", type=int, choices=(1, 2, 3), default=3, help="how many (default: 3); fewer write no files"
    )
    parser.add_argument("--few", type=int, help="use so many images of each part, for a quick look without files")
    parser.add_argument("--runs", type=Path, default=Path("runs/rivals"), help="folder for finished predictions")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for rivals.json and .md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = [checkpoints.load(file).model for file in NETWORKS]
    for parameter in itertools.chain(*(model.parameters() for model in models)):
        parameter.data = parameter.data.contiguous()  # PyTorch's default layout, which laplace-torch needs
    train, held_out = load(KNOWN, "train").held_out(0.1, seed=0)
    data = {"train": train, "held_out": held_out, "known": load(KNOWN, "test"), "unknown": load(UNKNOWN, "test")}
    if options.few is not None:
        data = {part: images.shuffled(0).first(options.few) for part, images in data.items()}
    folder = options.runs / (f"few-{options.few}" if options.few else "all")
    folder.mkdir(parents=True, exist_ok=True)
    labels = data["known"].labels
    batches = loaders(data["train"], data["held_out"])
    absent = {name: reason for name, method in METHODS.items() if (reason := missing(method))}
    wanted = [
        name for name in METHODS if name in (PLAIN, DEFAULT, *(options.methods or METHODS)) and name not in absent
    ]
    made: dict[str, list[tuple[dict[str, Tensor], dict[str, Any]]]] = {name: [] for name in wanted}
    for number in range(options.networks):
        for name in wanted:
            if number == 0 or not METHODS[name].ensemble:
                made[name].append(predictions(name, number, models, data, batches, folder))
    bases = {
        key: [tensors for tensors, _ in made[name]] for key, name in (("from_plain", PLAIN), ("from_default", DEFAULT))
    }
    new = {name: summarised(name, found, bases, labels) for name, found in made.items()}
    earlier: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        earlier = _read_json(options.out / "rivals.json")["methods"]
    for name, reason in absent.items():
        kept = "its row of an earlier run stays" if name in earlier else "it is left out"
        print(f"{name} needs {', '.join(METHODS[name].packages)}, see --help; {kept} ({reason})")
    rows = merged({} if options.few else earlier, new, list(METHODS))
    sizes = ", ".join(f"{len(images):,} {part.replace('_', '-')}" for part, images in data.items())
    about = f"{machine()}, threads: {options.threads}, Python {platform.python_version()}. Images: {sizes}"
    found = {"about": about, "methods": rows}
    text = page(found)
    print(text)
    if options.few is None and options.networks == len(NETWORKS):
        write_json(options.out / "rivals.json", found)
        write_bytes(options.out / "rivals.md", text.encode())


def _read_json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


if __name__ == "__main__":
    main()
