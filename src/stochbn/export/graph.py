"""A network under S fixed draws of its statistics, as one module that `torch.export` can take.

The network itself is exported first. In its graph, what does not depend on a drawn statistic runs once. The rest runs
once as well, for S N examples, each normalised by the statistics of its draw; or, where examples affect each other, S
times one after another. Weights are there once in both forms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from stochbn.tasks import Task

__all__ = ["OutOfReachError", "UnderDraws", "with_names"]

NORMALISES = torch.ops.aten._native_batch_norm_legit_no_training.default
"""What a batch norm in evaluation mode is in an exported graph: input, weight, bias, mean, variance, momentum, eps."""

Value = Callable[[fx.Node], Any]
"""What gives the value of a node."""


class OutOfReachError(ValueError):
    """Draws cannot share a pass through a graph; the message says why."""


def with_names(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """The module, its inputs by position called by these names."""
    graph = fx.Graph()
    inputs = tuple(map(graph.placeholder, names))
    graph.output(graph.call_module("predictive", inputs))
    return fx.GraphModule({"predictive": module}, graph)


class UnderDraws(nn.Module):
    """A network that predicts as the average over a table of draws.

    Args:
        program: the exported network, its number of examples dynamic.
        tables: the draws ``[S, C]`` of every drawn buffer, by its qualified name in the network.
        task: what the output means.
        temperature: what logits are divided by in every draw.
        stacked: whether all draws go through the network in one pass.

    Raises:
        OutOfReachError: `stacked` is asked for, and the graph does not allow it.
    """

    def __init__(
        self, program: ExportedProgram, tables: Mapping[str, Tensor], task: Task, temperature: float, stacked: bool
    ) -> None:
        super().__init__()
        network = program.module(check_guards=False)
        assert isinstance(network, fx.GraphModule)
        self.network, self.draws = network, len(next(iter(tables.values())))
        self._task, self._temperature, self._stacked = task, temperature, stacked
        self._structure = program.call_spec.out_spec
        self._nodes = list(network.graph.nodes)
        self._names = {n: str(n.target) for n in self._nodes if n.op == "get_attr" and n.target in tables}
        self.tables = nn.Module()
        for name in self._names.values():
            self.tables.register_buffer(name.replace(".", "_"), tables[name])
        self._drawn = set(self._names)
        for node in self._nodes:
            if node.op == "call_function" and not self._drawn.isdisjoint(node.all_input_nodes):
                self._drawn.add(node)
        self._axes = dict(self._object_axes()) if stacked else {}

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """What is said of N examples, by the names of the outputs."""
        given = iter(inputs)
        plain: dict[fx.Node, Any] = {}
        for node in self._nodes:
            if node.op == "placeholder":
                plain[node] = next(given)
            elif node.op == "get_attr" and node not in self._drawn:
                plain[node] = _attribute(self.network, str(node.target))
            elif node.op == "call_function" and node not in self._drawn:
                plain[node] = _call(node, plain.__getitem__)
        raw = self._together(plain) if self._stacked else self._one_by_one(plain)
        values, second = self._task.values(raw, self._temperature)
        mean = values.mean(0)
        variance = (values - mean).square().sum(0) / max(self.draws - 1, 1)
        prediction = self._task.prediction(mean, second.mean(0), variance, None)
        found = {name: getattr(prediction, name) for name in self._task.outputs}
        return {name: value for name, value in found.items() if value is not None}

    def _one_by_one(self, plain: Mapping[fx.Node, Any]) -> Tensor:
        """The raw values ``[S, N, C, ...]``, from a pass for each draw."""
        raw = []
        for draw in range(self.draws):
            values = {**plain, **{node: self._table(node)[draw] for node in self._names}}
            for node in self._nodes:
                if node in self._drawn and node.op == "call_function":
                    values[node] = _call(node, values.__getitem__)
            raw.append(self._read(values.__getitem__))
        return torch.stack(raw)

    def _together(self, plain: Mapping[fx.Node, Any]) -> Tensor:
        """The raw values ``[S, N, C, ...]``, from one pass: all examples under the first draw, then the second, ..."""
        values: dict[fx.Node, Any] = {}

        def stacked(node: fx.Node) -> Any:
            if node not in values:
                leaves, structure = pytree.tree_flatten(plain[node])
                pairs = zip(leaves, self._axes[node], strict=True)
                values[node] = pytree.tree_unflatten([self._repeat(leaf, axis) for leaf, axis in pairs], structure)
            return values[node]

        for node in self._nodes:
            if node.op != "call_function" or node not in self._drawn:
                continue
            if node.target is NORMALISES and not self._names.keys().isdisjoint(node.all_input_nodes):
                source = node.all_input_nodes[0]
                rows = values[source] if source in self._drawn else plain[source]
                values[node] = (self._normalised(node, rows, 1 if source not in self._drawn else self.draws, plain),)
            else:
                values[node] = _call(node, stacked)
        raw = self._read(stacked)
        return raw.reshape(self.draws, -1, *raw.shape[1:])

    def _normalised(self, node: fx.Node, x: Tensor, draws: int, plain: Mapping[fx.Node, Any]) -> Tensor:
        """``[S N, C, ...]``, what a batch norm makes of its input: a scale and a shift for each draw and channel.

        Args:
            node: the batch norm.
            x: its input ``[S N, C, ...]``, or ``[N, C, ...]`` where that is the same for all draws.
            draws: how many times it has the examples.
            plain: the values of nodes that do not depend on the draw.
        """

        def value(argument: Any) -> Any:
            return self._table(argument) if argument in self._names else argument and plain[argument]

        arguments: tuple[Any, ...] = node.args
        weight, bias, mean, variance = map(value, arguments[1:5])
        eps = arguments[6]
        scale = (variance + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        places = [x.shape[2:].numel()] if x.ndim > 2 else []
        rows = x.reshape(draws, -1, x.shape[1], *places)
        shape = (-1, 1, x.shape[1], *(1 for _ in places))
        normalised: Tensor = rows * scale.reshape(shape) + shift.reshape(shape)
        return normalised.reshape(-1, *x.shape[1:])

    def _read(self, value: Value) -> Tensor:
        """The raw values ``[N, C, ...]`` that the task reads from the network's output."""
        leaves = fx.map_arg(self._nodes[-1].args[0], value)
        return self._task.raw(pytree.tree_unflatten(leaves, self._structure))

    def _table(self, node: fx.Node) -> Tensor:
        table: Tensor = getattr(self.tables, self._names[node].replace(".", "_"))
        return table

    def _repeat(self, value: Any, axis: int | None) -> Any:
        """A value that does not depend on the draw, for S N examples."""
        if axis is None:
            return value
        if not isinstance(value, Tensor):
            return value * self.draws
        return value.repeat(*(self.draws if i == axis else 1 for i in range(value.ndim)))

    def _object_axes(self) -> Iterator[tuple[fx.Node, Sequence[int | None]]]:
        """For the values of every node the axis of the examples; None where there is none.

        Raises:
            OutOfReachError: the number of examples is elsewhere than in one axis, as a factor of its length.
        """
        used = {source for node in self._drawn for source in node.all_input_nodes} | {*self._nodes[-1].all_input_nodes}
        for node in self._nodes:
            if node in self._names:
                if any(user.target is not NORMALISES or node not in user.args[3:5] for user in node.users):
                    raise OutOfReachError(f"the network reads {self._names[node]!r} outside of its batch norm")
            elif node.op != "output" and (node in used or node in self._drawn):
                yield node, [_object_axis(leaf) for leaf in pytree.tree_leaves(node.meta.get("val"))]
                if node.target is NORMALISES and any(a in self._drawn - self._names.keys() for a in node.args[1:5]):
                    raise OutOfReachError("the weights or statistics of a batch norm depend on the draw")
                if node.target is NORMALISES and _object_axis(node.meta["val"][0]) != 0:
                    raise OutOfReachError("a batch norm has the examples elsewhere than on its first axis")


def _object_axis(value: Any) -> int | None:
    """The axis of a value that has the examples; 0 for a number that is proportional to theirs."""
    lengths: list[Any] = list(value.shape) if isinstance(value, Tensor) else [value]
    if any(isinstance(length, (torch.SymFloat, torch.SymBool)) for length in lengths):
        raise OutOfReachError("the network calculates with the number of examples")
    symbolic = [axis for axis, length in enumerate(lengths) if isinstance(length, torch.SymInt)]
    if not symbolic:
        return None
    expression = lengths[symbolic[0]].node.expr
    if len(symbolic) > 1 or len(expression.free_symbols) != 1:
        raise OutOfReachError("the number of examples is in several axes of a tensor")
    (symbol,) = expression.free_symbols
    if not (expression / symbol).is_Integer:
        raise OutOfReachError(f"an axis has the length {expression}, which is not a multiple of the number of examples")
    return symbolic[0]


def _attribute(module: nn.Module, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _call(node: fx.Node, value: Value) -> Any:
    assert callable(node.target)
    return node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
