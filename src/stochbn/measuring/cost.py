"""What uncertainty costs: the time and memory of draws, in forward passes of the plain network, and what they buy."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stochbn
import stochbn.metrics as metrics
from stochbn.measuring.drawing import save_costs
from stochbn.measuring.memory import peak_of_draws, plain_prediction
from stochbn.measuring.timing import machine, median_seconds, moments, seconds
from stochbn.network.calling import network_input
from stochbn.network.layers import batch_norms
from stochbn.report.tables import Table, write_tables
from stochbn.sources import checkpoints, named
from stochbn.sources.architectures import build

__all__ = ["FITTED", "Meter", "check_batch", "draw", "measure", "measure_trained", "tables", "tabulate", "write"]

FITTED = 2048
"""Training examples that posteriors are fitted to; twice as many for networks of the experiments."""
BUDGETS = (8, 16, 25, 35, 50, 100, 200)
"""The values of ``draws`` whose error and time are measured."""
QUASI = (4, 8, 16, 32)
UNREACHED = 1e-12
"""A tolerance at which every example gets all draws, half as many as ``draws`` says, made in the fastest way."""
LABELLED = 1000
"""Examples, at most, whose negative log-likelihood is compared."""


class Meter:
    """Times calls with a network side by side, and tells how accurate their probabilities are.

    The unit is the median time of one plain eager forward pass in evaluation mode; times are multiples of it.

    Args:
        model: a network of classes or labels, in evaluation mode.
        train: batches of training data, to fit a joint posterior to.
        x: a batch of inputs.
        settings: how a `stochbn.Predictive` reads the network.
        seed: where draws come from.
    """

    def __init__(self, model: nn.Module, train: Sequence[Any], x: Any, settings: Mapping[str, Any], seed: int) -> None:
        self.model, self.x, self.settings, self.seed = model, x, settings, seed
        self.posterior = stochbn.fit(model, train, 16)
        self.train = train
        self.inputs = network_input(model, x)
        self.pieces = [piece for batch in train for piece in network_input(model, batch).split(16) if len(piece) == 16]
        self.twin = copy.deepcopy(model)
        self.drawn = next(self.posterior.iter_draws(1))

    def predictive(self, draws: int = 50, **options: Any) -> stochbn.Predictive:
        """A predictive of so many draws."""
        return stochbn.Predictive(self.model, self.posterior, draws, **self.settings, **options)

    def ways(self) -> dict[str, Callable[[], object]]:
        """What to time of any network: a plain pass, a draw as a tutorial makes it, and a fit, by their names."""
        return {
            "unit": lambda: _passes(self.model, [self.inputs]),
            "textbook": self._textbook,
            "fit": lambda: stochbn.fit(self.model, self.train, 16),
            "plain pass over what is fitted": lambda: _passes(self.model, self.pieces),
        }

    def _textbook(self) -> object:
        _into(self.twin, self.drawn)
        return _passes(self.twin, [self.inputs])

    def errors(
        self, predictives: Mapping[str, stochbn.Predictive], reference: int, repetitions: int
    ) -> tuple[dict[str, float], float]:
        """How many independent draws each call is worth, and the variance of one draw, summed over classes.

        Args:
            predictives: by name.
            reference: independent draws whose mean counts as the truth.
            repetitions: of each estimate.
        """
        one = stochbn.Predictive(self.twin, **self.settings)
        generator = torch.Generator().manual_seed(self.seed + 10_000)

        def probs() -> Iterator[Tensor]:
            for drawn in self.posterior.iter_draws(reference, generator):
                _into(self.twin, drawn)
                yield one(self.x).probs

        truth, each = moments(probs())
        variance = _summed(each)
        own = variance / reference  # the truth's own error: independent of the others, and the least that can be told
        worth = {}
        for name, predictive in predictives.items():
            generators = (torch.Generator().manual_seed(self.seed + 1 + i) for i in range(repetitions))
            found = [_summed((predictive(self.x, generator=g).probs.double() - truth).square()) for g in generators]
            worth[name] = variance / max(own, statistics.mean(found) - own)
        return worth, variance


def measure(
    model: nn.Module,
    train: Any,
    x: Any,
    *,
    name: str,
    settings: Mapping[str, Any],
    reference: int,
    repetitions: int,
    seed: int,
    progress: Callable[[str], object] = lambda what: None,
) -> dict[str, Any]:
    """Measure any network at one batch size.

    Args:
        model: a network of classes or labels, in evaluation mode.
        train: training data, to fit a joint posterior to.
        x: a batch of inputs.
        name: of the network.
        settings: how a `stochbn.Predictive` reads it.
        reference: independent draws whose mean counts as the truth.
        repetitions: of every timing, and of the estimate of an error.
        seed: where draws come from.
        progress: called with what is measured next.

    Returns:
        ``unit_ms``, the time of a plain pass; ``call``, ``every``, ``textbook`` and ``first`` in units: a call with the
        defaults, one with all quasi-random draws, 50 draws as a tutorial makes them, and the first call; ``fit`` over
        plain passes over the same mini-batches; ``worth``, how many independent draws a call's probabilities are worth.
    """
    progress("fitting")
    meter = Meter(model, [inputs for inputs, _ in train.batches(512)], x, settings, seed)
    progress("times")
    default, every = meter.predictive(), meter.predictive(tolerance=0)
    first = seconds(lambda: default(x))
    took = median_seconds({**meter.ways(), "call": lambda: default(x), "every": lambda: every(x)}, repetitions)
    progress(f"{reference} reference draws")
    worth, _ = meter.errors({"call": default}, reference, repetitions)
    unit = took["unit"]
    return {
        "network": name, "batch": len(meter.inputs), "reference": reference, "repetitions": repetitions,
        "machine": machine(), "unit_ms": 1000 * unit, "call": took["call"] / unit, "every": took["every"] / unit,
        "textbook": 50 * took["textbook"] / unit, "first": first / unit,
        "fit": took["fit"] / took["plain pass over what is fitted"], "worth": worth["call"],
    }  # fmt: skip


def tabulate(measured: Sequence[Mapping[str, Any]]) -> Table:
    """What `measure` gave, a row for each batch size."""
    columns = {"unit, ms": ("unit_ms", 1), "a call": ("call", 1), "worth draws": ("worth", 0),
               "all draws": ("every", 1), "50 textbook draws": ("textbook", 1), "first call": ("first", 1),
               "fit": ("fit", 2)}  # fmt: skip
    rows = [
        [f"{one['network']}, batch {one['batch']}", *(f"{one[key]:.{digits}f}" for key, digits in columns.values())]
        for one in measured
    ]
    return Table(f"Costs in units, plain passes of the same examples; {measured[0]['machine']}",
                 ["network", *columns], rows)  # fmt: skip


def measure_trained(
    network: Path,
    batch: int,
    *,
    source: str | None = None,
    reference: int = 4096,
    repetitions: int = 9,
    seed: int = 0,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure a network of the experiments at one batch size, beside dropout, an ensemble and MC-BN.

    The network is brought to PyTorch's default memory layout, as users have it. All is timed in this process and
    interleaved; memory is measured in others.

    Args:
        network: a checkpoint, as ``stochbn paper train`` writes them.
        batch: examples in a batch.
        source: the data; None is what the network was trained on.
        reference: independent draws whose mean counts as the truth.
        repetitions: of every timing, and of every estimate of an error.
        seed: chooses the examples, the training images and the draws.
        progress: called with what is measured next.

    Raises:
        ValueError, FileNotFoundError: the network or the data cannot be used.
    """
    checkpoint = checkpoints.load(network)
    model = checkpoint.model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    train = named.load(source or checkpoint.data, "train").shuffled(seed).first(2 * FITTED)
    known = named.load(source or checkpoint.data, "test").shuffled(seed)
    check_batch(known, batch)
    x = next(known.batches(batch))[0].contiguous()
    progress("fitting")
    meter = Meter(model, [inputs.contiguous() for inputs, _ in train.batches(512)], x, {}, seed)
    posterior = meter.posterior

    progress("first calls")
    default = meter.predictive()
    every = meter.predictive(32, tolerance=UNREACHED)
    first = seconds(lambda: default(x))
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    floor = torch.compile(last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    first_compiled = seconds(lambda: plain_prediction(floor, x_last))
    others = next(train.batches(16))[0].contiguous()
    dropout = _with_dropout(checkpoint)
    literal, ensemble = copy.deepcopy(model), [copy.deepcopy(model) for _ in range(5)]
    predictives = {f"draws {n}": meter.predictive(n) for n in BUDGETS}
    predictives |= {f"quasi {n}": meter.predictive(n, tolerance=0) for n in QUASI}

    progress("times")
    ways: dict[str, Callable[[], object]] = meter.ways() | {
        "floor": lambda: plain_prediction(floor, x_last),
        "channels-last": lambda: plain_prediction(last, x_last),
        "every": lambda: every(x),
        "literal": lambda: _literal(literal, others, x),
        "dropout": lambda: _dropped(dropout, x),
        "ensemble": lambda: sum(plain_prediction(member, x) for member in ensemble),
    }
    ways |= {name: lambda predictive=predictive: predictive(x) for name, predictive in predictives.items()}  # type: ignore[misc]
    took = median_seconds(ways, repetitions)
    unit = took["unit"]
    progress(f"{reference} reference draws, and errors")
    worth, variance = meter.errors(predictives, reference, repetitions)
    progress("likelihoods")
    labelled = known.first(LABELLED)
    plain, all_draws = stochbn.Predictive(model), stochbn.Predictive(model, posterior, tolerance=0)
    nll = {
        name: _nll(predictor, labelled, batch, seed)
        for name, predictor in (("plain", plain), ("default", default), ("every draw", all_draws))
    }
    progress("memory")
    memory = peak_of_draws(network, posterior, x)
    units = {name: value / unit for name, value in took.items()}
    curve = [(units[f"draws {n}"], worth[f"draws {n}"]) for n in BUDGETS]
    return {
        "network": checkpoint.network, "data": known.name, "batch": batch, "machine": machine(),
        "repetitions": repetitions, "reference": reference, "unit_ms": 1000 * unit, "units": units,
        "floor": units["floor"], "per_draw": units["every"] / 16, "variance": variance, "worth": worth,
        "to_50": _reached(curve, 50.0), "textbook_50": 50 * units["textbook"], "literal_50": 50 * units["literal"],
        "dropout_50": 50 * units["dropout"], "ensemble_5": units["ensemble"],
        "default": {"units": units["draws 50"], "worth": worth["draws 50"]},
        "fit": took["fit"] / took["plain pass over what is fitted"], "nll": nll, "first": first / unit,
        "floor_compile_s": first_compiled, "memory": memory,
    }  # fmt: skip


def check_batch(images: named.Images, batch: int) -> None:
    """Refuse a batch of more images than there are.

    Raises:
        ValueError: there are fewer.
    """
    if len(images) < batch:
        raise ValueError(f"{images.name} has {len(images)} test images, fewer than a batch of {batch}")


def tables(found: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What `measure_trained` found: the headline, what a prediction and a draw cost, and likelihoods."""

    def table(title: str, columns: Mapping[str, Callable[[Any], str]]) -> Table:
        rows = [[_title(one), *(show(one) for show in columns.values())] for one in found]
        return Table(title, ["network", *columns], rows)

    def number(key: str, digits: int = 1) -> Callable[[Any], str]:
        return lambda one: "more" if math.isinf(one[key]) else f"{one[key]:.{digits}f}"

    return [
        table(
            f"Units (plain eager forward passes) to mean probabilities as accurate as of 50 independent draws; "
            f"{found[0]['machine']}",
            {"unit, ms": number("unit_ms"), "stochbn": number("to_50"), "textbook": number("textbook_50"),
             "MC-BN literally": number("literal_50"), "50 dropout passes": number("dropout_50"),
             "ensemble of 5": number("ensemble_5")},
        ),
        table(
            "Predictive(model, posterior), and what a draw costs, in units",
            {"a call": lambda one: f"{one['default']['units']:.2f}",
             "worth draws": lambda one: f"{one['default']['worth']:.0f}", "a draw": number("per_draw", 2),
             "floor": number("floor", 2), "memory": number("memory", 2), "fit": number("fit", 2),
             "first call": number("first")},
        ),
        table(
            f"Negative log-likelihood in nats of at most {LABELLED} test images",
            {"plain": lambda one: f"{one['nll']['plain']:.4f}", "stochbn": lambda one: f"{one['nll']['default']:.4f}",
             "all 50 draws": lambda one: f"{one['nll']['every draw']:.4f}"},
        ),
    ]  # fmt: skip


def write(found: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write ``cost.json``, ``cost.md``, ``cost.png`` and ``cost.svg``.

    Raises:
        OSError: the folder cannot be written.
    """
    write_tables(folder / "cost", {"found": list(found)}, tables(found))
    draw(folder, {"found": found})


def draw(folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """Draw the figure of what ``cost.json`` holds into a folder."""
    return save_costs(folder / "cost", {_title(one): one for one in about["found"]})


def _title(one: Mapping[str, Any]) -> str:
    return f"{one['network']}, batch {one['batch']}"


@torch.no_grad()
def _passes(model: nn.Module, inputs: Sequence[Any]) -> list[object]:
    return [one.call(model) for one in inputs]


def _into(model: nn.Module, drawn: Mapping[str, Tensor]) -> None:
    """Copy drawn statistics into a network's buffers, as a tutorial would."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, values in drawn.items():
        buffers[name].copy_(values)


def _literal(model: nn.Module, others: Tensor, x: Tensor) -> Tensor:
    """One draw of MC-BN as it is described: a training mini-batch sets the statistics, then a pass."""
    layers = batch_norms(model).values()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    model.train()
    plain_prediction(model, others)
    model.eval()
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return plain_prediction(model, x)


def _with_dropout(checkpoint: checkpoints.Checkpoint) -> nn.Module:
    """The same network with dropout; its weights do not matter to its speed."""
    arguments = {**checkpoint.arguments, "dropout": 0.5}
    return build(checkpoint.network, **arguments).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,no-any-return]


def _dropped(model: nn.Module, x: Tensor) -> Tensor:
    for module in model.modules():
        module.training = isinstance(module, nn.Dropout)
    return plain_prediction(model, x)


def _nll(predictor: stochbn.Predictive, images: named.Images, batch: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.cat(
        [predictor(inputs.contiguous(), generator=generator).probs for inputs, _ in images.batches(batch)]
    )
    return metrics.evaluate(probs, images.labels)["nll"]


def _summed(values: Tensor) -> float:
    """Over all that an example has, and the mean over examples."""
    return values.flatten(1).sum(1).mean().item()


def _reached(curve: Sequence[tuple[float, float]], worth: float) -> float:
    """The cost at which so many independent draws' worth is reached: log-log between the points; inf if never."""
    for (cost, before), (more, after) in itertools.pairwise(curve):
        if before < worth <= after:
            part = math.log(worth / before) / math.log(after / before)
            return cost * math.pow(more / cost, part)
    return curve[0][0] if curve[0][1] >= worth else math.inf
