"""The page of `rivals.py`: scores, differences with paired standard errors, and where stochbn loses."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rivals_measure import REPETITIONS
from rivals_methods import DEFAULT, PLAIN
from torch import Tensor

from stochbn import metrics
from stochbn.metrics.differences import paired
from stochbn.predictions import entropy
from stochbn.report.tables import Table

TITLES = {"resnet18": "ResNet-18", "vgg11": "VGG-11"}
TRAINED = 3
"""Networks of the ensemble."""
BATCH = 100
"""Test images in a call."""
LIMIT = 2.0
"""By how many standard errors a method must be better than another to count as better."""
SCORES = {"error": 2, "nll": 4, "calibrated_nll": 4, "ece": 2, "auroc": 4}
"""The scores of a method and their digits. Lower is better, but for the AUROC."""
NAMES = {"error": "error", "nll": "NLL", "calibrated_nll": "calibrated NLL", "auroc": "AUROC"}
"""The scores that are compared in pairs."""
ABOUT = f"""\
Three networks ([{{title}}](../results/trained/README.md), trained on nine tenths of `cifar10:0-4` with flips and
shifts), and all test images: those of the five known classes, and those of `cifar10:5-9`, which they do not know. Each
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
  standard deviation over the networks. A method that uses other networks, such as the ensemble, is compared with each.
"""
LEFT_OUT = """\
Not in the table:

{without}- **ABNN** (`ABNN` in TorchUncertainty). It trains several copies of each network further, and its
  learning rate, prior and numbers of models have no defaults.

Augmented draws are test-time augmentation, by the flips and shifts of training; it could be combined with every other
method. MCBatchNorm, Laplace and the ensemble are as they come, without a temperature: compare them by the calibrated
NLL, too.

The grid search of laplace-torch 0.3 gets the NLL as a function: its default loss is a running mean that is not reset
from one value of the grid to the next. netcal gets probabilities in float64: with float32 its optimiser stops at once.
"""


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


def scores_table(found: Mapping[str, Any]) -> Table:
    """The means over networks, and what they cost."""
    rows, body = found["methods"], []
    for name, row in rows.items():
        each = row["networks"]
        cells = [f"{statistics.mean(one[key] for one in each):.{digits}f}" for key, digits in SCORES.items()]
        passes = f"{statistics.mean(one['passes'] for one in each):.1f}"
        body.append([name, *cells, passes, _fitting(row, found["epochs"])])
    columns = ["method", "error %", "NLL", "calibrated NLL", "ECE %", "AUROC", "plain passes", "fitting"]
    number = max(len(row["networks"]) for row in rows.values())
    title = f"{TITLES[found['network']]} on five classes of CIFAR-10: means over {number} network{'s' * (number > 1)}"
    return Table(title, columns, body)


def _fitting(row: Mapping[str, Any], epochs: int) -> str:
    if row["uses"] == "ensemble":
        return f"{TRAINED - 1} trainings of {epochs} epochs"
    if row["uses"] == "dropout":
        return f"a training of {epochs} epochs"
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
            mean = mean if key == "passes" or row["uses"] == "each" else float("inf")
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
        scores_table(found).markdown(),
        changes_table(rows, "from_plain", "the plain network", PLAIN).markdown(),
        verdicts(rows),
        changes_table(rows, "from_default", f"`{DEFAULT}`", DEFAULT).markdown(),
    ]
    run = f"    STOCHBN_DATA=... python benchmarks/rivals.py --network {found['network']} --threads 1"
    about = ABOUT.format(title=TITLES[found["network"]]).strip()
    without = "" if "MC dropout" in rows else "- **MC dropout**. No network of this kind with dropout is committed.\n"
    left_out = LEFT_OUT.format(without=without).strip()
    return "\n\n".join([about, run, f"{found['about']}.", *tables, methods_list(rows), left_out]) + "\n"
