"""From a network and its posterior to a program of `torch.export` that predicts."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from stochbn.conformal import Rule
from stochbn.execution import Call, Draw
from stochbn.execution.verify import examine
from stochbn.export.graph import OutOfReachError, UnderDraws, with_names
from stochbn.network.calling import NetworkInput
from stochbn.network.layers import batch_norms, buffer_names, listed, unwrap
from stochbn.network.replica import Network
from stochbn.posteriors import Posterior
from stochbn.tasks import Task

__all__ = ["ExportError", "Predicting", "predicting", "quiet", "reason"]


class ExportError(ValueError):
    """A network that cannot be exported, or whose file does not give what Python gives; the message says why."""


@dataclass(frozen=True, eq=False)
class Predicting:
    """A program that predicts, and what it takes to check it.

    Attributes:
        program: the program; it gives a dictionary of the outputs.
        model: a copy of the network, on the CPU.
        example: a batch, on the CPU.
        drawn: the draws.
        task: what the output means.
        temperature: what logits are divided by.
        inputs: names of the inputs.
        repeated: why each draw has a part of the graph of its own; empty if one pass serves all draws.
        about: what the file says of itself.
        sets: makes the prediction sets that are outputs too; None for none.
    """

    program: ExportedProgram
    model: nn.Module
    example: NetworkInput
    drawn: tuple[Draw, ...]
    task: Task
    temperature: float
    inputs: tuple[str, ...]
    repeated: str
    about: Mapping[str, str]
    sets: Rule | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs: of those that the task may have, what is known with this network and posterior."""
        return tuple(self.program.call_spec.out_spec.context)

    @property
    def set_outputs(self) -> tuple[str, ...]:
        """The names of those that are prediction sets."""
        return tuple(name for name in self.outputs if name in SET_OUTPUTS)


SET_OUTPUTS = ("set", "low", "high")
"""The outputs that are prediction sets."""


class _WithSets(nn.Module):
    """A network that also gives the prediction sets of its outputs."""

    def __init__(self, predictive: nn.Module, rule: Rule) -> None:
        super().__init__()
        if isinstance(rule.threshold, Tensor):  # a buffer, so that it is in the program
            self.register_buffer("threshold", rule.threshold)
        self.predictive, self._rule = predictive, rule

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The outputs of the network, and the sets."""
        found: dict[str, Tensor] = self.predictive(*inputs)
        rule: Any = self._rule
        rule = replace(rule, threshold=self.threshold) if isinstance(rule.threshold, Tensor) else rule
        return {**found, **rule.within(found)}


def predicting(
    model: nn.Module, posterior: Posterior, example: NetworkInput, draws: int, seed: int, task: Task
) -> Predicting:
    """The program of a network under draws from its posterior.

    Raises:
        ExportError: the network cannot be copied or exported.
    """
    name, task = type(unwrap(model)).__name__, task.calibrated(posterior)
    example = _checked(example, name)
    network = Network.of(model)
    network.look()
    replica = network.fresh(own_parameters=True)
    if replica is None:
        raise ExportError(f"{name} cannot be exported: {network.known.in_place}")
    replica.modes(frozenset())
    copy = replica.model.cpu()
    generator = torch.Generator().manual_seed(seed)
    drawn = tuple(posterior.iter_draws(draws, generator, quasi=True))
    base = _exported(copy, example, name)
    with quiet(), torch.no_grad():
        base = base.run_decompositions({})
        if writes := list(base.graph_signature.buffers_to_mutate.values()):
            raise ExportError(
                f"{name} cannot be exported: a pass writes to its buffers {listed(writes)}, which a file cannot keep"
            )
        tables, inputs = _tables(copy, drawn), tuple(base.graph_signature.user_inputs)
        repeated = _together(copy, example, task, posterior, drawn)
        if not repeated:
            try:
                predictor = UnderDraws(base, tables, task, posterior.temperature, stacked=True)
            except OutOfReachError as error:
                repeated = str(error)
        if repeated:
            predictor = UnderDraws(base, tables, task, posterior.temperature, stacked=False)
    about = {
        "version": _version(),
        "network": name,
        "posterior": posterior.kind,
        "batch_size": str(posterior.batch_size),
        "temperature": str(posterior.temperature),
        "draws": str(draws),
        "seed": str(seed),
        "task": task.name,
    }
    sets = None
    if posterior.thresholds is not None:
        about["sets"] = json.dumps(posterior.thresholds.told())
        rule = posterior.thresholds.sets
        if not rule.groups and task.class_axis in (None, 1):
            sets = rule
    whole = predictor if sets is None else _WithSets(predictor, sets)
    program = _exported(with_names(whole, inputs), example, name)
    return Predicting(
        program,
        copy,
        example,
        drawn,
        task,
        posterior.temperature,
        inputs,
        repeated,
        about,
        sets,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters say to their own developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def reason(error: BaseException) -> str:
    """What an exporter complains of, in one line: the cause, without the colours of terminals."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return f"{type(error).__name__}: {text.partition(chr(10))[0]:.300}"


def _checked(example: NetworkInput, name: str) -> NetworkInput:
    """The example on the CPU, if it has examples and nothing but tensors."""
    leaves = pytree.tree_leaves((example.args, dict(example.kwargs)))
    if not example.divisible or len(leaves) != len(example.tensors()):
        raise ExportError(
            f"{name} cannot be exported with this example: expected tensors with the examples on their first axis as "
            "the only arguments; wrap the network in a module that sets the others"
        )
    if not len(example):
        raise ValueError("the tensors of example= are empty: pass at least one example")
    return example.map(Tensor.cpu)


def _exported(module: nn.Module, example: NetworkInput, name: str) -> ExportedProgram:
    """The program of a module for any number of examples.

    It is traced with zeros, as a program keeps what it was traced with, and with two examples, as one is special.
    """
    zeros = example.map(lambda tensor: tensor.new_zeros(2, *tensor.shape[1:]))
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in zeros.tensors():
        shapes[tensor] = {0: Dim("batch")}
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(module, zeros.args, dict(zeros.kwargs), dynamic_shapes=shapes)
    except Exception as error:
        raise ExportError(
            f"{name} cannot be exported: torch.export does not take its forward pass, as where Python code depends on "
            f"the values of tensors or on the number of examples ({reason(error)})"
        ) from error


def _tables(model: nn.Module, drawn: tuple[Draw, ...]) -> dict[str, Tensor]:
    """The draws ``[S, C]`` of every buffer, by all names that it has in the network."""
    found = batch_norms(model)
    tables: dict[int, Tensor] = {}
    for layer, norm in found.items():
        for name, buffer in zip(buffer_names(layer), (norm.running_mean, norm.running_var), strict=True):
            if name in drawn[0]:
                assert buffer is not None
                tables[id(buffer)] = torch.stack([draw[name] for draw in drawn]).to(buffer)
    named = model.named_buffers(remove_duplicate=False)
    return {name: tables[id(buffer)] for name, buffer in named if id(buffer) in tables}


def _together(
    model: nn.Module, example: NetworkInput, task: Task, posterior: Posterior, drawn: tuple[Draw, ...]
) -> str:
    """Why examples under different draws must not share a pass; empty if they may."""
    network = Network.of(model)
    network.look()
    call = Call(task, posterior=posterior, sample=lambda count: [drawn[i % len(drawn)] for i in range(count)])
    verdict, _ = examine(network, example, call)
    return verdict.followed.dependent or verdict.followed.in_place


def _version() -> str:
    from stochbn import __version__

    return __version__
