"""Does stochbn ever make a working network worse? Seven small networks, each fitted on five kinds of data.

Every network of `harm_networks.py` is fitted on data as in training, on data with another augmentation, on data that is
sorted by class, on 500 examples, and on data of another domain: what the README says, and the usual mistakes. Four
methods then predict the same test data: the plain network, the plain network with a temperature, ``stochbn.fit`` alone
with its defaults, and ``stochbn.fit`` followed by ``stochbn.calibrate``. Temperature, noise and centre are chosen on
held-out data, which is a part of the training data. No choice sees test data. Run it as::

    STOCHBN_DATA=... python benchmarks/harm.py --threads 1

It reads MNIST, notMNIST and CIFAR-10 from the folder that STOCHBN_DATA names, or from the Hugging Face Hub. Networks
are trained first, in less than 25 minutes on one core (``--train-only`` stops there), and kept in ``runs/harm``. Rows
are kept there too, for each version of the library. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harm_networks import RECIPES, Data, Examples, Recipe, trained
from torch import Tensor, nn

import stochbn
from stochbn import Posterior, Predictive, metrics
from stochbn.augment import Augment
from stochbn.files import write_bytes, write_json
from stochbn.measuring.timing import machine, seconds
from stochbn.report.tables import Table

FEW = 500
BATCH = 250
"""Examples in a batch of predictions; pictures with dense labels come in a fifth of it."""
MOST_ERRORS = 2.0
"""By how many paired standard errors the NLL after `calibrate` may exceed the plain network's with its temperature."""
EQUAL = 1e-4
"""By how many nats it may always: temperatures that are found by different searches differ a little."""
MOST_POINTS = 0.3
"""By how many percentage points the error after `calibrate` may exceed the plain network's."""
MOST_NATS = 0.01
"""By how many nats the NLL after `fit` alone may exceed the plain network's."""
ABOUT = f"""\
`stochbn.fit` sees the data that the second column names. Then the same test data is predicted in four ways: by the
plain network, by the plain network with a temperature, after `fit` alone with its defaults, and after `fit` and
`calibrate`. The temperature is chosen on held-out data, a part of the training data that `calibrate` sees too. Changes
are relative to the plain network with its temperature, with paired standard errors over test examples (over pictures
for the U-Net). Passes are the mean over test examples.

A fit meets its criteria (✓) if, without `calibrate`, the NLL is at most {MOST_NATS} nats above the plain network's;
and with it, if the NLL is at most {MOST_ERRORS:g} standard errors (or {EQUAL} nats) above that of the plain network
with its temperature, and the error at most {MOST_POINTS} points above the plain network's. Where it does not (✗), the
mark says whether `fit` warned. "Warned" is about the method's own call.

"Other augmentation" is none for networks that were trained with flips and crops. Those that were trained without get
shifts of 3 pixels (LeNet-5), flips and shifts of 4 pixels (VGG-11), flips (U-Net) or normal noise of 0.5 (MLP).

    STOCHBN_DATA=... python benchmarks/harm.py --threads 1
"""


class Counted(Predictive):
    """A `Predictive` that counts how many passes its examples take altogether."""

    passes = 0

    def _pass(self, made: Any, block: Sequence[Any]) -> Tensor:
        values = super()._pass(made, block)
        self.passes += values.shape[0] * values.shape[1]
        return values


@dataclass(frozen=True)
class Fitted:
    """What `stochbn.fit` or `stochbn.calibrate` returned, with what it said.

    Attributes:
        posterior: the posterior.
        warned: the texts of its warnings.
        chosen: what `calibrate` chose, in short; empty for `fit`.
        report: what `calibrate` reported, in words; empty for `fit`.
        seconds: how long it took.
    """

    posterior: Posterior
    warned: tuple[str, ...]
    chosen: str
    report: str
    seconds: float


def fit(model: nn.Module, data: Iterable[Any], augment: Augment | None) -> Fitted:
    """Fit a posterior with the defaults: the only place that calls `stochbn.fit`."""
    posterior, warned, took = _listened(lambda: stochbn.fit(model, data, augment=augment))
    return Fitted(posterior, warned, "", "", took)


def calibrate(model: nn.Module, posterior: Posterior, held_out: Examples) -> Fitted:
    """Choose by held-out data: the only place that calls `stochbn.calibrate`."""
    choices: list[Any] = []
    batches = held_out.batches(_batch(held_out))
    found, warned, took = _listened(
        lambda: stochbn.calibrate(model, posterior, batches, temperature=True, report=choices.append)
    )
    chosen = choices[0].chosen
    name = chosen.name if "temperature" in chosen.name else f"{chosen.name}, temperature {chosen.temperature:.2f}"
    return Fitted(found, warned, name, str(choices[0]), took)


def _listened(work: Callable[[], Posterior]) -> tuple[Posterior, tuple[str, ...], float]:
    """What a call returns, its warnings, and its time."""
    found: list[Posterior] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        took = seconds(lambda: found.append(work()))
    return found[0], tuple(str(one.message) for one in caught), took


@dataclass(frozen=True, eq=False)
class Scores:
    """How one method predicts the test data.

    Attributes:
        summary: ``error`` (%), ``nll`` (nats), ``ece`` (%) and ``passes`` of an example.
        nll: of each example ``[N]``, the mean over places for dense predictions.
        wrong: likewise, the share of its places whose most probable class is wrong.
    """

    summary: dict[str, float]
    nll: Tensor
    wrong: Tensor


def predict(model: nn.Module, posterior: Posterior | None, examples: Examples) -> tuple[Tensor, float]:
    """Mean probabilities ``[N, K, ...]`` with the defaults of `Predictive`, and the passes of an example."""
    predictive = Counted(model, posterior)
    generator = torch.Generator().manual_seed(0)
    batches = examples.batches(_batch(examples))
    probs = torch.cat([predictive(batch, generator=generator).probs for batch in batches])
    return probs, predictive.passes / len(examples)


def score(probs: Tensor, labels: Tensor, passes: float) -> Scores:
    """The scores of mean probabilities ``[N, K, ...]``."""
    found = metrics.evaluate(probs, labels)
    count = len(labels)
    nll = metrics.nll_of_each(probs, labels).view(count, -1).mean(1)
    wrong = (probs.argmax(1) != labels).double().view(count, -1).mean(1)
    summary = {"error": found["error"], "nll": found["nll"], "ece": 100 * found["ece"], "passes": passes}
    return Scores(summary, nll, wrong)


def change(method: Scores, base: Scores) -> dict[str, float]:
    """What a method changes, with paired standard errors over examples: of the NLL, and of the error in points.

    The standard error of the error counts one more example that becomes right and one more that becomes wrong, so that
    it is not 0 where none does (Bonett and Price, 2012).
    """
    nll, wrong = method.nll - base.nll, 100 * (method.wrong - base.wrong)
    more = torch.cat([wrong, wrong.new_tensor([-100.0, 100.0]) if (base.wrong % 1 == 0).all() else wrong[:0]])
    root = math.sqrt(len(nll))
    return {
        "nll_change": nll.mean().item(),
        "nll_change_se": nll.std().item() / root,
        "error_change": wrong.mean().item(),
        "error_change_se": more.std().item() / root,
    }


def _batch(examples: Examples) -> int:
    return BATCH if examples.y.ndim == 1 else BATCH // 5


def kinds(recipe: Recipe, data: Data) -> dict[str, tuple[Callable[[], Iterable[Any]], Augment | None]]:
    """The kinds of data to fit on: what gives the batches, and how `fit` is to augment them."""
    train, usual = data.train, recipe.augment
    return {
        "as in training": (lambda: train.loader(True), usual),
        "other augmentation": (lambda: train.loader(True), recipe.swapped),
        "sorted by class": (lambda: train.by_class().loader(False), usual),
        f"{FEW} examples": (lambda: train.first(FEW).loader(True), usual),
        recipe.other: (lambda: data.other.loader(True), usual),
    }


def plain(model: nn.Module, data: Data) -> tuple[Scores, Scores, float]:
    """The scores of the plain network, and with the temperature that is best on held-out data; that temperature."""
    probs, _ = predict(model, None, data.test)
    held_out, _ = predict(model, None, data.held_out)
    temperature = metrics.calibrated_nll(probs, data.test.y, (held_out, data.held_out.y))["temperature"]
    tempered = (probs.clamp(min=torch.finfo(probs.dtype).tiny).log() / temperature).softmax(1)
    return score(probs, data.test.y, 1), score(tempered, data.test.y, 1), temperature


def measure(name: str, folder: Path, rows: Path, few: int | None) -> dict[str, Any]:
    """All rows of a network; each is written to the folder `rows` once it is finished, and read from there again.

    Args:
        name: the network's.
        folder: where trained networks are.
        rows: where finished rows are.
        few: how many held-out and test examples to use; None is all.
    """
    recipe, model = RECIPES[name], trained(name, folder)
    state = "".join(f"{key} {value.double().sum().item()!r}" for key, value in model.state_dict().items())
    key = f"{name} {state}{few or ''}"
    file = rows / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    data = recipe.data()
    if few is not None:
        parts = {part: getattr(data, part).first(few) for part in ("held_out", "test")}
        data = data._replace(**parts)
    ways = kinds(recipe, data)
    if found["rows"].keys() == ways.keys():
        return found
    alone, tempered, temperature = plain(model, data)
    training, _ = predict(model, None, data.train.first(2000))
    found |= {
        "name": name,
        "about": recipe.about,
        "examples": {part: len(examples) for part, examples in data._asdict().items()},
        "training_error": metrics.evaluate(training, data.train.y[: len(training)])["error"],
        "plain": alone.summary | change(alone, tempered),
        "tempered": tempered.summary | {"temperature": temperature},
    }
    for kind, (batches, augment) in ways.items():
        if kind in found["rows"]:
            continue
        first = fit(model, batches(), augment)
        second = calibrate(model, first.posterior, data.held_out)
        row: dict[str, Any] = {}
        for method, fitted in (("fit", first), ("calibrate", second)):
            scores = score(*_scored(model, fitted.posterior, data.test))
            said = {key: value for key, value in vars(fitted).items() if key != "posterior"}
            row[method] = scores.summary | change(scores, tempered) | said
        row["calibrate"]["noise"] = getattr(second.posterior, "batch_size", None)
        row["calibrate"]["centre"] = getattr(second.posterior, "centre", "observed")
        row["calibrate"]["temperature"] = second.posterior.temperature
        found["rows"][kind] = row
        write_json(file, found)
        print(f"{name}, {kind}: {row['fit']['nll']:.4f} {row['calibrate']['nll']:.4f}", flush=True)
    return found


def _scored(model: nn.Module, posterior: Posterior, test: Examples) -> tuple[Tensor, Tensor, float]:
    probs, passes = predict(model, posterior, test)
    return probs, test.y, passes


def criteria(row: dict[str, Any], alone: dict[str, float]) -> dict[str, dict[str, bool]]:
    """Which criteria a cell, one network and one kind of data, meets: after `fit` alone, and after `calibrate`."""
    default, chosen = row["fit"], row["calibrate"]
    return {
        "fit": {"NLL": default["nll"] - alone["nll"] <= MOST_NATS},
        "calibrate": {
            "NLL": chosen["nll_change"] <= max(EQUAL, MOST_ERRORS * chosen["nll_change_se"]),
            "error": chosen["error"] - alone["error"] <= MOST_POINTS,
        },
    }


def summary(found: dict[str, Any]) -> str:
    """How many cells meet the criteria, and of how many of the others `fit` warned.

    What `calibrate` warns of, noise or a temperature at the end of its range, is not about harm.
    """
    cells = [row for network in found.values() for row in network["rows"].values()]
    missed = [[method for method, met in cell["criteria"].items() if not all(met.values())] for cell in cells]
    right = missed.count([])
    told = sum(bool(methods and cell["fit"]["warned"]) for cell, methods in zip(cells, missed, strict=True))
    lines = [f"**{right} of {len(cells)} cells meet all criteria.** Of the other {len(cells) - right}, `fit` warned "
             f"of {told}. One by one:"]  # fmt: skip
    words = {
        ("calibrate", "NLL"): f"fit + calibrate, NLL at most {MOST_ERRORS:g} s.e. above plain + temperature",
        ("calibrate", "error"): f"fit + calibrate, error at most {MOST_POINTS} points above plain",
        ("fit", "NLL"): f"fit alone, NLL at most {MOST_NATS} nats above plain",
    }
    for (method, what), name in words.items():
        lines.append(f"- {name}: {sum(cell['criteria'][method][what] for cell in cells)} of {len(cells)};")
    worse = [c["fit"]["error"] - n["plain"]["error"] > MOST_POINTS for n in found.values() for c in n["rows"].values()]
    fine = f"{worse.count(False)} of {len(cells)}"
    lines.append(f"- not a criterion: fit alone, error at most {MOST_POINTS} points above plain: {fine}.")
    return "\n".join([lines[0], "", *lines[1:]])


def table(found: dict[str, Any]) -> Table:
    """All scores, with a mark for every fit."""
    body = []
    for name, network in found.items():
        alone, tempered = network["plain"], network["tempered"]
        at = f"temperature {tempered['temperature']:.2f}"
        about = f"{name}: {network['about']}; training error {network['training_error']:.1f} %"
        body.append([about, "", "plain", *_cells(alone), "", "", "1", ""])
        body.append([name, "", "plain + temperature", *_cells(tempered), "", at, "1", ""])
        for kind, row in network["rows"].items():
            for method, words in (("fit", "fit"), ("calibrate", "fit + calibrate")):
                one = row[method]
                said = "yes" if one["warned"] else ""
                missed = [what for what, met in row["criteria"][method].items() if not met]
                told = "warned" if row["fit"]["warned"] else "not warned"
                mark = f"✗ {', '.join(missed)}; {told}" if missed else "✓"
                body.append([name, kind, words, *_cells(one), said, one["chosen"], f"{one['passes']:.1f}", mark])
    columns = ["network", "fitted on", "method", "error %", "NLL", "ECE %", "change of NLL", "of error"]
    title = "Test scores of networks that are fitted on different data"
    return Table(title, [*columns, "warned", "chosen", "passes", "met"], body)


def _cells(one: dict[str, Any]) -> list[str]:
    scores = [f"{one['error']:.2f}", f"{one['nll']:.4f}", f"{one['ece']:.2f}"]
    if "nll_change" not in one:
        return [*scores, "", ""]
    return [
        *scores,
        f"{one['nll_change']:+.4f} ± {one['nll_change_se']:.4f}",
        f"{one['error_change']:+.2f} ± {one['error_change_se']:.2f}",
    ]


def version() -> str:
    """A checksum of the installed library's code, so that rows of different versions are not mixed."""
    digest = hashlib.sha256()
    for file in sorted(Path(stochbn.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def main() -> None:
    """Train, measure, print, and write harm.json and harm.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=RECIPES, default=list(RECIPES), help="which (default: all)")
    parser.add_argument("--train-only", action="store_true", help="train the networks that are not there yet, and stop")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads (default: all processors)")
    parser.add_argument(
        "--few", type=int, help="use so many held-out and test examples, for a quick look (default: all)"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/harm"), help="folder for networks and finished rows")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for harm.json and .md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.networks:
        trained(name, options.runs / "networks")
    if options.train_only:
        return
    code = version()
    (options.runs / code).mkdir(parents=True, exist_ok=True)
    found = {
        name: measure(name, options.runs / "networks", options.runs / code, options.few) for name in options.networks
    }
    for network in found.values():
        for row in network["rows"].values():
            row["criteria"] = criteria(row, network["plain"])
    library = f"stochbn {stochbn.__version__} ({code}), Python {platform.python_version()}"
    about = f"{machine()}, threads: {options.threads}, {library}"
    limits = {
        "nll_standard_errors": MOST_ERRORS,
        "equal_nats": EQUAL,
        "error_points": MOST_POINTS,
        "fit_nats": MOST_NATS,
    }
    hidden = ("data", "build")
    recipes = {
        name: {k: getattr(v, "__name__", str(v)) for k, v in vars(RECIPES[name]).items() if k not in hidden}
        for name in found
    }
    sizes = [f"{name} {' / '.join(map('{:,}'.format, one['examples'].values()))}" for name, one in found.items()]
    settings = f"{about}. Examples (training / held-out / test / other domain): {'; '.join(sizes)}."
    text = "\n\n".join([ABOUT.strip(), settings, summary(found), table(found).markdown()])
    print(text)
    write_json(options.out / "harm.json", {"machine": about, "limits": limits, "recipes": recipes, "networks": found})
    write_bytes(options.out / "harm.md", f"{text}\n".encode())


if __name__ == "__main__":
    main()
