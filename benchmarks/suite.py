"""What a prediction costs on networks that nobody tuned for, and how accurate it is: ``python benchmarks/suite.py``.

The networks are those of docs/networks.md, with random weights after passes in training mode, as far as their
libraries are installed, and the ResNet-18 of results/trained/. A row takes some seconds to a minute, and finished rows
are kept in `--runs`, so a run that was stopped goes on. Everything is timed with one thread, plain passes and calls in
turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import stochbn
from stochbn.execution.run import Passes
from stochbn.files import write, write_bytes, write_json
from stochbn.measuring.timing import machine, seconds
from stochbn.report.style import COLORS, SEQUENCE
from stochbn.report.tables import Table
from stochbn.sources import checkpoints
from stochbn.sources.named import load
from stochbn.stopping import Spread

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "interop"))
from interop_check import Case, _call, _warm_up  # noqa: E402
from test_other_networks import cases  # noqa: E402

TRAINED = ROOT / "results" / "trained" / "resnet18" / "plain-0" / "network.safetensors"
BATCHES = (1, 8, 32)
REFERENCE, BLOCK, CALLS = 512, 64, 12
"""Quasi-random draws that the truth is the mean of, how many of them a call makes, and calls to average errors over."""
TRAINED_BATCHES = 8
"""Batches of the trained network that accuracy is measured on: a few hard examples make most of the error of one."""
REPLAYED = 50
"""Mini-batches whose statistics a home-made loop goes through."""
ENOUGH = 45
"""Independent draws that a call is to be worth."""
SLOW = 0.12
"""Networks whose plain pass of 32 examples takes longer, in seconds, are left out: their reference takes too long."""


def network(case: Case) -> tuple[nn.Module, stochbn.Posterior]:
    """A network of the suite and a joint posterior, as for docs/networks.md."""
    torch.manual_seed(0)
    model = case.build().eval()
    _warm_up(model, case)
    fit = {"batch_size": 8, "reference": False, **case.fit}
    if "inputs" in case.options:
        fit["inputs"] = case.options["inputs"]
    return model, stochbn.fit(model, [case.inputs(seed, 8) for seed in range(6)], **fit)


def trained() -> Case:
    """The committed ResNet-18, on test images of its classes."""
    images = load("cifar10:0-4", "test").pixels.float() / 255
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Case(
        "stochbn", "ResNet-18, trained", lambda: checkpoints.load(TRAINED).model,
        lambda seed, count: images[order[seed * 40 % 4000 :][:count]], fit={"batch_size": 16},
    )  # fmt: skip


def of_trained(case: Case) -> tuple[nn.Module, stochbn.Posterior]:
    """The committed ResNet-18 and a joint posterior of 64 mini-batches of training images."""
    model = case.build().eval()
    images = load("cifar10:0-4", "train").pixels.float() / 255
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[:1024]
    return model, stochbn.fit(model, [images[order]], 16, reference=False)


def measured(case: Case, model: nn.Module, posterior: stochbn.Posterior) -> dict[str, Any]:
    """Costs in plain passes for each number of examples, and what a call is worth."""
    geometric = case.library == "torch_geometric"
    counts = (8,) if geometric else BATCHES
    with torch.no_grad():
        if min(seconds(lambda: _call(model, case.inputs(77, counts[-1]), case)) for _ in range(3)) > SLOW:
            return {"name": case.name, "library": case.library, "slow": True}
    row: dict[str, Any] = {"name": case.name, "library": case.library, "layers": len(posterior.layers), "calls": {}}
    for count in counts:
        x = case.inputs(77, count)
        predictive = stochbn.Predictive(model, posterior, **case.options)
        first = seconds(lambda x=x, predictive=predictive: predictive(x))  # type: ignore[misc]
        unit, call, passes = interleaved(model, predictive, x, case)
        costs = {"call": call, "passes": passes, "first": first}
        row["calls"][str(count)] = {"unit_ms": 1000 * unit, **{name: cost / unit for name, cost in costs.items()}}
        row["explained"] = predictive.explain(x)
    seeds = range(77, 77 + (TRAINED_BATCHES if case.library == "stochbn" else 1))
    row |= accuracy(model, posterior, case, [case.inputs(seed, counts[-1]) for seed in seeds])
    return row | {"replay": statistics.median(replayed(model, posterior, x, case) for _ in range(3)) / unit}


def replayed(model: nn.Module, posterior: stochbn.Posterior, x: Any, case: Case) -> float:
    """The seconds of passes under the statistics of `REPLAYED` mini-batches, put into the layers one after another.

    That is how TorchUncertainty's MCBatchNorm predicts, without what it computes from the outputs.
    """
    buffers = dict(model.named_buffers())
    draws = list(posterior.iter_draws(REPLAYED, torch.Generator().manual_seed(0)))
    begun = time.perf_counter()
    with torch.no_grad():
        for draw in draws:
            for name, value in draw.items():
                buffers[name].copy_(value)
            _call(model, x, case)
    return time.perf_counter() - begun


def interleaved(model: nn.Module, predictive: stochbn.Predictive, x: Any, case: Case) -> tuple[float, float, float]:
    """The medians of plain passes, of calls, and of the passes under draws in a call, in seconds, made in turns."""
    plain, calls, within, seed, begun = [], [], [], 0, time.perf_counter()
    while seed < 5 or (seed < 25 and time.perf_counter() - begun < 3):
        with torch.no_grad():
            plain.append(seconds(lambda: _call(model, x, case)))
        generator = torch.Generator().manual_seed(seed)
        with timed_passes() as passes:
            calls.append(seconds(lambda generator=generator: predictive(x, generator=generator)))  # type: ignore[misc]
        within.append(sum(passes))
        seed += 1
    return statistics.median(plain), statistics.median(calls), statistics.median(within)


@contextmanager
def timed_passes() -> Iterator[list[float]]:
    """Within it, the seconds of each block of passes under draws are added to the list that it gives."""
    took: list[float] = []
    attempt = Passes.attempt

    def timed(passes: Passes, *args: Any, **kwargs: Any) -> Tensor:
        begun = time.perf_counter()
        values = attempt(passes, *args, **kwargs)
        took.append(time.perf_counter() - begun)
        return values

    with patch.object(Passes, "attempt", timed):
        yield took


def accuracy(model: nn.Module, posterior: stochbn.Posterior, case: Case, batches: Sequence[Any]) -> dict[str, Any]:
    """How many independent draws a call with the defaults is worth, over all batches, and how many an example gets."""
    every = stochbn.Predictive(model, posterior, BLOCK, tolerance=0, keep_draws=True, **case.options)
    default = stochbn.Predictive(model, posterior, **case.options)
    variance = error = size = 0.0
    made: list[float] = []
    for x in batches:
        total = square = torch.zeros(())
        for seed in range(REFERENCE // BLOCK):
            prediction = every(x, generator=torch.Generator().manual_seed(1000 + seed))
            values = prediction.draws_kept.double()
            values = values.exp() if hasattr(prediction, "probs") else values
            total, square = total + values.sum(0), square + values.square().sum(0)
        truth = total / REFERENCE
        variance += float((square / REFERENCE - truth.square()).clamp(min=0).sum())
        size += float(truth.square().sum())
        for seed in range(CALLS):
            with counted(made):
                prediction = default(x, generator=torch.Generator().manual_seed(seed))
            found: Tensor = prediction.probs if hasattr(prediction, "probs") else prediction.mean
            error += float((found.double() - truth).square().sum()) / CALLS
    worth = None if variance < 1e-12 * size else variance / max(error, 1e-300)  # rounding, as draws change nothing
    return {"worth": worth, "draws": sum(made) / CALLS / len(batches) or default.draws}


@contextmanager
def counted(made: list[float]) -> Iterator[None]:
    """Within it, how many draws an example gets in the mean over a batch is added to a list, block by block."""
    add = Spread.add

    def counting(spread: Spread, examples: Tensor, count: int, draws: Tensor, pairs: Tensor) -> None:
        made.append(count * len(examples) / len(spread.count))
        add(spread, examples, count, draws, pairs)

    with patch.object(Spread, "add", counting):
        yield


def at_most(rows: Sequence[Mapping[str, Any]]) -> str:
    """The median, the ninth tenth and the worst of what calls cost, and how many calls are worth enough."""
    costs = sorted(largest(row)["call"] for row in rows)
    worth = [row["worth"] for row in rows if row["worth"] is not None]
    return (
        f"On {len(costs)} networks, a call costs {statistics.median(costs):.1f} plain passes in the median, at most "
        f"{costs[math.ceil(0.9 * len(costs)) - 1]:.1f} on nine tenths of them, and {costs[-1]:.1f} on the worst. Calls "
        f"are worth {ENOUGH} independent draws or more on {sum(one >= ENOUGH for one in worth)} of {len(worth)}, and "
        f"{statistics.median(worth):.0f} in the median."
    )


def largest(row: Mapping[str, Any]) -> Mapping[str, float]:
    """What was measured with the most examples."""
    found: Mapping[str, float] = list(row["calls"].values())[-1]
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each network, the cheapest first."""
    columns = ["network", "library", "unit, ms", *(f"a call, {n}" for n in BATCHES), "first call", "draws", "a draw",
               "beside", "worth", "replay"]  # fmt: skip
    body = []
    for row in sorted(rows, key=lambda row: largest(row)["call"]):
        costs = [f"{row['calls'][str(n)]['call']:.1f}" if str(n) in row["calls"] else "-" for n in BATCHES]
        worth = "-" if row["worth"] is None else f"{row['worth']:.0f}"
        last = largest(row)
        body.append([row["name"], row["library"].replace("_", " "), f"{last['unit_ms']:.2f}", *costs,
                     f"{last['first']:.0f}", f"{row['draws']:.1f}", f"{last['passes'] / row['draws']:.2f}",
                     f"{last['call'] - last['passes']:.1f}", worth, f"{row['replay']:.0f}"])  # fmt: skip
    title = f"Calls with the defaults, in plain passes of as many examples; {machine()}, one thread"
    return Table(title, columns, body)


def figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Cost against worth, a dot for each network."""
    drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = drawn.subplots()
    dots = [(largest(row)["call"], row["worth"], row["library"] == "stochbn") for row in rows if row["worth"]]
    for own, label, color in ((False, "random weights", SEQUENCE[1]), (True, "trained", COLORS["SBN"])):
        some = [(x, min(y, 1000)) for x, y, mine in dots if mine == own]
        axes.plot(*zip(*some, strict=True), "o", ms=5, color=color, alpha=0.8, label=label)
    axes.plot([1, 200], [1, 200], "-", lw=1, color=COLORS["plain"], label="a loop over independent draws")
    axes.axhline(50, color="black", lw=0.8, ls=":")
    axes.annotate("what draws=50 asks for", (1.05, 53), fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="cost of a call, plain passes", xlim=(1, 200), ylim=(5, 1200),
             ylabel="worth, independent draws (at most 1,000 shown)")  # fmt: skip
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100, 200], ["1", "2", "5", "10", "20", "50", "100", "200"])
    axes.set_yticks([10, 50, 100, 1000], ["10", "50", "100", "1,000"])
    axes.minorticks_off()
    axes.legend(loc="lower right", fontsize=8)
    write(path, functools.partial(drawn.savefig, dpi=110))


def main() -> None:
    """Measure what is missing, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "suite", help="where finished rows are kept")
    runs = parser.parse_args().runs
    runs.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    makers = [(case, network) for case in cases() if not case.refusal]
    for case, make in [(trained(), of_trained), *makers]:
        path = runs / f"{re.sub('[^A-Za-z0-9_]+', '-', case.id)}.json"
        if not path.exists():
            write_json(path, measured(case, *make(case)))
            print(path.stem, flush=True)
    every = [json.loads(path.read_text()) for path in sorted(runs.glob("*.json"))]
    rows = [row for row in every if "slow" not in row]
    slow = f"{len(every) - len(rows)} networks were left out, as a pass takes more than {SLOW:g} s."
    write_json(ROOT / "benchmarks" / "suite.json", {"machine": machine(), "rows": rows})
    write_bytes(ROOT / "benchmarks" / "suite.md", f"{table(rows).markdown()}\n\n{at_most(rows)} {slow}\n".encode())
    figure(rows, ROOT / "benchmarks" / "figures" / "suite.png")
    print(at_most(rows), slow)


if __name__ == "__main__":
    main()
