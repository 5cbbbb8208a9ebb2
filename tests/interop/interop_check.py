"""What is checked with a network of another library, and what comes out: one row of docs/networks.md."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import stochbn

__all__ = ["Case", "Row", "check"]

WARM_UP = 30
"""Passes in training mode, by which running statistics become those of the inputs."""
DRAWS, INDEPENDENT = 9, 24
Z = 6.0


@dataclass(frozen=True)
class Case:
    """A network of another library, randomly initialised.

    Attributes:
        library: the package that it is of.
        name: what is shown, and the test's name.
        build: makes the network.
        inputs: a batch for a seed and a number of examples, as the network's users would have it.
        options: how `stochbn.Predictive` is to call and read it.
        read: the logits, or numbers, with classes on axis 1, from the network's output; the slow loop's own way.
        fit: further arguments of `stochbn.fit`.
        examples: in a batch to predict.
        refusal: part of the message of the error that is right here, as the network cannot be drawn; empty for none.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[Any], Tensor] = lambda output: output
    fit: Mapping[str, Any] = field(default_factory=dict)
    objects: int = 6
    refusal: str = ""

    @property
    def id(self) -> str:
        """The name of its test."""
        return f"{self.library}-{self.name}".replace(" ", "-")


@dataclass
class Row:
    """What came out.

    Attributes:
        library, name: of the network.
        layers: batch norms that are drawn.
        right: whether everything is as it should be.
        error: what is not; or the message of an error, right or not.
        apart: the largest difference of a probability (or number) from the slow loop's, with ``tolerance=0``.
        z: how far predictions with the defaults are from many independent draws, in standard errors.
        first, later: the cost of the first call with the defaults and of later ones, in plain passes.
        ways: the faster ways that were taken.
    """

    library: str
    name: str
    layers: int = 0
    right: bool = False
    error: str = ""
    apart: float | None = None
    z: float | None = None
    first: float | None = None
    later: float | None = None
    ways: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def check(case: Case) -> Row:
    """Fit, predict and compare with slow passes; what is wrong is told in the row, and nothing is raised."""
    row = Row(case.library, case.name)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = case.build().eval()
        _warm_up(model, case)
        try:
            _checked(model, case, row)
        except Exception as error:
            row.error = " ".join(f"{type(error).__name__}: {error}".split())
            row.right = bool(case.refusal) and case.refusal in row.error
            return row
    row.right = not row.error and not case.refusal
    return row


def _warm_up(model: nn.Module, case: Case) -> None:
    model.train()
    with torch.no_grad():
        for seed in range(WARM_UP):
            _call(model, case.inputs(1000 + seed, 8), case)
    model.eval()


def _call(model: nn.Module, batch: Any, case: Case) -> Any:
    """The network's output for a batch, as a user calls it."""
    inputs = case.options.get("inputs")
    if callable(inputs):
        batch = inputs(batch)
    elif isinstance(inputs, int):
        batch = tuple(batch[:inputs])
    if isinstance(batch, Mapping):
        return model(**{name: _cloned(value) for name, value in batch.items()})
    if isinstance(batch, tuple):
        return model(*map(_cloned, batch))
    return model(_cloned(batch))


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _checked(model: nn.Module, case: Case, row: Row) -> None:
    before = _state(model)
    fit = {"batch_size": 8, **case.fit}
    if "inputs" in case.options:
        fit["inputs"] = case.options["inputs"]
    posterior = stochbn.fit(model, [case.inputs(seed, 8) for seed in range(6)], **fit)
    row.layers = len(posterior.layers)
    x = case.inputs(77, case.objects)
    plain, still = (
        _classes_first(stochbn.Predictive(model, one, **case.options)(x), case)
        for one in (None, dataclasses.replace(posterior, batch_size=math.inf))
    )
    if not torch.allclose(still, plain, rtol=1e-5, atol=1e-5):
        row.error = f"without noise differs from the plain network by {(still - plain).abs().max().item():.2g}"
        return
    predictive = stochbn.Predictive(model, posterior, DRAWS, tolerance=0, **case.options)
    prediction = predictive(x, generator=torch.Generator().manual_seed(1))
    draws = posterior.iter_draws(DRAWS, torch.Generator().manual_seed(1), quasi=True)
    every = _slow(model, list(draws), x, case)
    wanted = every.mean(0)
    found = _classes_first(prediction, case).reshape(wanted.shape)
    row.apart = (found - wanted).abs().max().item()
    # Small beside what draws change, as outputs of networks that nobody trained differ little at all.
    if not torch.allclose(found, wanted, rtol=1e-3, atol=0.02 * every.std(0).max().item() + 1e-6):
        row.error = f"differs from slow passes by {row.apart:.2g}"
        return
    _with_defaults(model, posterior, x, case, row)
    if row.error:
        return
    after = _state(model)
    changed = [name for name, value in before.items() if not _same(value, after.get(name))]
    if changed or before.keys() != after.keys():
        row.error = f"the network was changed: {changed[:3]}"


def _with_defaults(model: nn.Module, posterior: stochbn.Posterior, x: Any, case: Case, row: Row) -> None:
    predictive = stochbn.Predictive(model, posterior, **case.options)
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        prediction = predictive(x, generator=torch.Generator().manual_seed(3))
        times.append(time.perf_counter() - begun)
    plain = []
    with torch.no_grad():
        for _ in range(7):
            begun = time.perf_counter()
            _call(model, x, case)
            plain.append(time.perf_counter() - begun)
    unit = statistics.median(plain)
    row.first, row.later = times[0] / unit, statistics.median(times[1:]) / unit
    explained = predictive.explain(x)
    row.ways = ", ".join(line.partition(":")[0] for line in explained.splitlines() if ": taken" in line)
    together = next((line for line in explained.splitlines() if line.startswith("All examples go")), "")
    row.ways = row.ways or together.partition(": ")[2].rstrip(".")
    every = _slow(model, list(posterior.iter_draws(INDEPENDENT, torch.Generator().manual_seed(5))), x, case)
    generator = torch.Generator().manual_seed(9)
    direction = torch.randn(every.shape[2:], generator=generator, dtype=torch.float64)
    axes = tuple(range(1, every.ndim))
    means = (every * direction).mean(axes)
    found = _classes_first(prediction, case).reshape(every.shape[1:])
    spread = means.std() * (1 / 8 + 1 / INDEPENDENT) ** 0.5
    apart = ((found * direction).mean() - means.mean()).abs()
    small = 1e-4 * max(1.0, every.abs().max().item())
    row.z = (apart / spread).item() if spread > small / 100 else 0.0
    if apart > Z * spread + small:
        row.error = f"predictions with the defaults are {row.z:.1f} standard errors from independent draws"


def _slow(model: nn.Module, draws: list[Mapping[str, Tensor]], x: Any, case: Case) -> Tensor:
    """``[S, N, ...]``: the probabilities, or numbers, of each draw, each of a fresh copy with its buffers set."""
    task, results = case.options.get("task", "classification"), []
    for draw in draws:
        changed = copy.deepcopy(model).eval()
        buffers = dict(changed.named_buffers(remove_duplicate=False))
        for name, values in draw.items():
            buffers[name].copy_(values)
        with torch.no_grad():
            values = case.read(_call(changed, x, case)).double()
        results.append({"classification": lambda v: v.softmax(1), "multilabel": lambda v: v.sigmoid()}.get(
            task, lambda v: v)(values))  # fmt: skip
    return torch.stack(results)


def _classes_first(prediction: Any, case: Case) -> Tensor:
    """What was predicted, with classes on axis 1 as in the slow loop."""
    values: Tensor = prediction.probs if hasattr(prediction, "probs") else prediction.mean
    axis = case.options.get("class_axis")
    return (values if axis is None else values.movedim(axis, 1)).double()


def _state(model: nn.Module) -> dict[str, Any]:
    tensors = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    flags = {f"{name}.training": module.training for name, module in model.named_modules()}
    hooks = {f"{name}.hooks": len(module._forward_hooks) for name, module in model.named_modules()}
    return {**tensors, **flags, **hooks}


def _same(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, Tensor) else bool(first == second)
