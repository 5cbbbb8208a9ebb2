"""What uncertainty costs: the time and memory of draws, in forward passes of the plain network."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stochbn
import stochbn.metrics as metrics
from stochbn.files import write_bytes, write_json
from stochbn.measuring.drawing import save_costs
from stochbn.measuring.memory import peak_of_draws, plain_prediction
from stochbn.measuring.timing import machine, median_seconds, moments, seconds
from stochbn.network.layers import batch_norms
from stochbn.posteriors import Posterior
from stochbn.report.tables import Table
from stochbn.sources import checkpoints, named
from stochbn.sources.architectures import build

__all__ = ["check_batch", "draw", "measure", "tables", "write"]

BUDGETS = (8, 16, 25, 35, 50, 100, 200)
"""The values of ``draws`` whose error and time are measured."""
QUASI = (4, 8, 16, 32)
UNREACHED = 1e-12
"""A tolerance at which every object gets all draws, half as many as ``draws`` says, made in the fastest way."""
LABELLED = 1000
"""Objects, at most, whose negative log-likelihood is compared."""


def measure(
    network: Path,
    batch: int,
    *,
    source: str | None = None,
    reference: int = 4096,
    repetitions: int = 9,
    seed: int = 0,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure one network at one batch size, everything in this process and interleaved but for memory.

    The network is brought to PyTorch's default memory layout, as users have it. The unit is the median time of one
    plain eager forward pass in evaluation mode; times are multiples of it.

    Args:
        network: a checkpoint, as ``stochbn paper train`` writes them.
        batch: objects in a batch.
        source: the data; None is what the network was trained on.
        reference: independent draws whose mean counts as the truth.
        repetitions: of every timing, and of every estimate of an error.
        seed: chooses the objects, the training images and the draws.
        progress: called with what is measured next.

    Raises:
        ValueError, FileNotFoundError: the network or the data cannot be used.
    """
    checkpoint = checkpoints.load(network)
    model = checkpoint.model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    train = named.load(source or checkpoint.data, "train").shuffled(seed)
    train = train.take(torch.arange(min(4096, len(train))))
    known = named.load(source or checkpoint.data, "test").shuffled(seed)
    check_batch(known, batch)
    x = next(known.batches(batch))[0].contiguous()
    progress("fitting")
    batches = [inputs.contiguous() for inputs, _ in train.batches(512)]
    posterior = stochbn.fit(model, batches, 16)

    progress("first calls")
    default = stochbn.Predictive(model, posterior)
    every = stochbn.Predictive(model, posterior, 32, tolerance=UNREACHED)
    first = seconds(lambda: default(x))
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    floor = torch.compile(last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    first_compiled = seconds(lambda: plain_prediction(floor, x_last))
    others = next(train.batches(16))[0].contiguous()
    textbook = copy.deepcopy(model)
    drawn = posterior.draw(1)
    dropout = _with_dropout(checkpoint)
    ensemble = [copy.deepcopy(model) for _ in range(5)]
    small = [piece for inputs in batches for piece in torch.split(inputs, 16) if len(piece) == 16]

    progress("times")
    ways: dict[str, Callable[[], object]] = {
        "unit": lambda: plain_prediction(model, x),
        "floor": lambda: plain_prediction(floor, x_last),
        "channels-last": lambda: plain_prediction(last, x_last),
        "textbook": lambda: _textbook(textbook, drawn, x),
        "every": lambda: every(x),
        "literal": lambda: _literal(textbook, others, x),
        "dropout": lambda: _dropped(dropout, x),
        "ensemble": lambda: sum(plain_prediction(member, x) for member in ensemble),
        "fit": lambda: stochbn.fit(model, small, 16),
        "plain pass over what is fitted": lambda: [plain_prediction(model, piece) for piece in small],
    }
    predictives = {n: stochbn.Predictive(model, posterior, n) for n in BUDGETS}
    quasi = {n: stochbn.Predictive(model, posterior, n, tolerance=0) for n in QUASI}
    ways |= {f"draws {n}": lambda n=n: predictives[n](x) for n in BUDGETS}  # type: ignore[misc]
    ways |= {f"quasi {n}": lambda n=n: quasi[n](x) for n in QUASI}  # type: ignore[misc]
    took = median_seconds(ways, repetitions)
    unit = took["unit"]

    progress(f"{reference} reference draws")
    truth, variance = _reference(last, posterior, x_last, reference, seed)
    progress("errors")
    own = variance / reference  # the truth's own error: independent of the others, and the least that can be told
    error = {
        name: max(
            own,
            statistics.mean(
                _squared_error(predictive(x, generator=torch.Generator().manual_seed(seed + 1 + i)).probs, truth)
                for i in range(repetitions)
            )
            - own,
        )
        for name, predictive in {**_named("draws", predictives), **_named("quasi", quasi)}.items()
    }
    progress("likelihoods")
    labelled = known.take(torch.arange(min(LABELLED, len(known))))
    nll = {
        name: _nll(predictor, labelled, batch, seed)
        for name, predictor in (
            ("plain", stochbn.Predictive(model)),
            ("default", default),
            ("every draw", stochbn.Predictive(model, posterior, tolerance=0)),
        )
    }
    progress("memory")
    memory = peak_of_draws(network, posterior, x)
    units = {name: value / unit for name, value in took.items()}
    curve = [(units[f"draws {n}"], variance / error[f"draws {n}"]) for n in BUDGETS]
    return {
        "network": checkpoint.network,
        "data": known.name,
        "batch": batch,
        "machine": machine(),
        "repetitions": repetitions,
        "reference": reference,
        "unit_ms": 1000 * unit,
        "units": units,
        "floor": units["floor"],
        "per_draw": units["every"] / 16,
        "variance": variance,
        "worth": {name: variance / value for name, value in error.items()},
        "to_50": _reached(curve, 50.0),
        "textbook_50": 50 * units["textbook"],
        "literal_50": 50 * units["literal"],
        "dropout_50": 50 * units["dropout"],
        "ensemble_5": units["ensemble"],
        "default": {"units": units["draws 50"], "worth": variance / error["draws 50"]},
        "fit": took["fit"] / took["plain pass over what is fitted"],
        "nll": nll,
        "first": first / unit,
        "floor_compile_s": first_compiled,
        "memory": memory,
    }


def check_batch(images: named.Images, batch: int) -> None:
    """Refuse a batch of more images than there are.

    Raises:
        ValueError: there are fewer.
    """
    if len(images) < batch:
        raise ValueError(f"{images.name} has {len(images)} test images, fewer than a batch of {batch}")


def tables(found: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What `measure` found, as the headline and what a prediction and a draw cost."""
    where = found[0]["machine"]
    names = [_title(one) for one in found]
    headline = Table(
        f"Units (plain eager forward passes) to mean probabilities as accurate as of 50 independent draws; {where}",
        [
            "network",
            "unit, ms",
            "stochbn",
            "textbook",
            "MC-BN literally",
            "50 dropout passes",
            "ensemble of 5",
        ],
        [
            [
                name,
                f"{f['unit_ms']:.1f}",
                *(_number(f[key]) for key in ("to_50", "textbook_50", "literal_50", "dropout_50", "ensemble_5")),
            ]
            for name, f in zip(names, found, strict=True)
        ],
    )
    default = Table(
        "Predictive(model, posterior), and what a draw costs, in units",
        ["network", "a call", "worth draws", "a draw", "floor", "memory", "fit", "first call"],
        [
            [
                name,
                f"{f['default']['units']:.2f}",
                f"{f['default']['worth']:.0f}",
                *(f"{f[key]:.2f}" for key in ("per_draw", "floor", "memory", "fit")),
                f"{f['first']:.1f}",
            ]
            for name, f in zip(names, found, strict=True)
        ],
    )
    likelihood = Table(
        f"Negative log-likelihood in nats of at most {LABELLED} test images",
        ["network", "plain", "stochbn", "all 50 draws"],
        [
            [name, *(f"{f['nll'][key]:.4f}" for key in ("plain", "default", "every draw"))]
            for name, f in zip(names, found, strict=True)
        ],
    )
    return [headline, default, likelihood]


def write(found: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write ``cost.json``, ``cost.md``, ``cost.png`` and ``cost.svg``.

    Raises:
        OSError: the folder cannot be written.
    """
    write_json(folder / "cost.json", {"found": list(found)})
    write_bytes(folder / "cost.md", "\n\n".join(table.markdown() for table in tables(found)).encode() + b"\n")
    draw(folder, {"found": found})


def draw(folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """Draw the figure of what ``cost.json`` holds into a folder."""
    return save_costs(folder / "cost", {_title(one): one for one in about["found"]})


def _title(one: Mapping[str, Any]) -> str:
    return f"{one['network']}, batch {one['batch']}"


def _number(value: float) -> str:
    return "more" if math.isinf(value) else f"{value:.1f}"


def _named(word: str, predictives: Mapping[int, stochbn.Predictive]) -> dict[str, stochbn.Predictive]:
    return {f"{word} {n}": predictive for n, predictive in predictives.items()}


def _textbook(model: nn.Module, drawn: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """One draw as a tutorial would make it: copied into the buffers, then an eager pass."""
    buffers = dict(model.named_buffers())
    for name, values in drawn.items():
        buffers[name].copy_(values[0])
    return plain_prediction(model, x)


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


def _reference(model: nn.Module, posterior: Posterior, x: Tensor, draws: int, seed: int) -> tuple[Tensor, float]:
    """The mean probabilities of independent draws, and the variance of one: over draws, summed over classes."""
    generator = torch.Generator().manual_seed(seed + 10_000)
    mean, variance = moments(
        _textbook(model, {name: values[None] for name, values in drawn.items()}, x)
        for drawn in posterior.iter_draws(draws, generator)
    )
    return mean, variance.sum(1).mean().item()


def _nll(predictor: stochbn.Predictive, images: named.Images, batch: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.cat(
        [predictor(inputs.contiguous(), generator=generator).probs for inputs, _ in images.batches(batch)]
    )
    return metrics.evaluate(probs, images.labels)["nll"]


def _squared_error(probs: Tensor, truth: Tensor) -> float:
    return (probs.double() - truth).square().sum(1).mean().item()


def _reached(curve: Sequence[tuple[float, float]], worth: float) -> float:
    """The cost at which so many independent draws' worth is reached: log-log between the points; inf if never."""
    for (cost, before), (more, after) in itertools.pairwise(curve):
        if before < worth <= after:
            part = math.log(worth / before) / math.log(after / before)
            return cost * math.pow(more / cost, part)
    return curve[0][0] if curve[0][1] >= worth else math.inf
