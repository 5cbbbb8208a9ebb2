"""A network and its posterior as one file, for services without this library: ONNX, or `torch.export`'s .pt2.

::

    stochbn.export.onnx(model, posterior, "network.onnx", example)    # example: a batch, as for a prediction
    stochbn.export.pt2(model, posterior, "network.pt2", example)

The draws are in the file, so that an input always has the same prediction. No file is left that does not give what a
slow loop over the same draws gives.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from stochbn.export.checking import Runner, compare
from stochbn.export.inputs import metadata
from stochbn.export.program import ExportError, Predicting, predicting, quiet, reason
from stochbn.files import check_file, write
from stochbn.interface import Interface, InterfaceOptions, shows_options
from stochbn.network.calling import Batch, NetworkInput, network_input
from stochbn.posteriors import Posterior, check_draws
from stochbn.posteriors.checks import check_posterior
from stochbn.posteriors.thresholds import compare_draws
from stochbn.schema import Schema
from stochbn.sources.pictures import Preprocessing

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Export", "ExportError", "onnx", "pt2"]

LARGEST = 2**31
"""Bytes that an ONNX file holds at most, without files beside it."""


@dataclass(frozen=True)
class Export:
    """What an exported file is.

    Attributes:
        path: the file.
        bytes: its size.
        draws: how many draws it has.
        outputs: the names of its outputs.
        repeated: why each draw has a part of the graph of its own; empty if one pass serves all draws.
        difference: the largest difference from Python that the check has found.
    """

    path: Path
    bytes: int
    draws: int
    outputs: tuple[str, ...]
    repeated: str
    difference: float


@shows_options(Interface.of)
def onnx(
    model: nn.Module,
    posterior: Posterior,
    path: str | os.PathLike[str],
    example: Batch,
    draws: int = 16,
    *,
    seed: int = 0,
    check: Literal["weights", "shape"] = "weights",
    classes: Sequence[str] | None = None,
    preprocess: Preprocessing | None = None,
    **interface: Unpack[InterfaceOptions],
) -> Export:
    """Write a network under S fixed draws as one ONNX file, and check it with onnxruntime.

    Outputs are ``probs`` ``[N, K]``, ``entropy`` ``[N]`` and ``mutual_information`` ``[N]`` (nats), as in
    `stochbn.Prediction`; for other tasks what their predictions have, such as ``mean``, ``std`` and, where it is known,
    ``total_std`` of a regression. A posterior with thresholds of prediction sets (``posterior.with_sets``) adds
    ``set``, truth values ``[N, K]``, or ``low`` and ``high`` of numbers; sets by group are in the file's metadata
    alone, under ``stochbn.sets``.
    Inputs have the names of the arguments of the network's ``forward``. The number of examples N is free.

    The network is exported in evaluation mode, so dropout is off. What comes before the first drawn batch norm is in
    the graph once, and all weights are in the file once. One pass serves all draws: memory while predicting is that of
    S N examples. Where examples of a batch affect each other, what follows the first drawn batch norm is in the graph S
    times instead.

    Args:
        model: the network, on any device; the file is for CPUs and whatever else runs ONNX.
        posterior: what `stochbn.fit` or `stochbn.load` returned. Its temperature is applied in every draw.
        path: the file to write, whole or not at all.
        example: a batch, as for a prediction; its shapes and types are those that the file takes.
        draws: S, the number of quasi-random draws.
        seed: where the draws come from: ``posterior.iter_draws(draws, generator, quasi=True)`` of a generator with
            this seed.
        check: what a posterior must have in common with the network, as for `stochbn.Predictive`.
        classes: the names of the classes, for the file's metadata; None is what the posterior was fitted with.
        preprocess: how a picture becomes an input, for the file's metadata; see docs/export.md.
        interface: `task`, `logits`, `class_axis`, `output` and `inputs`, as for `stochbn.Predictive`.

    Returns:
        What has been written.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ExportError: the network cannot be exported, or the file would give something else than Python does. No file is
            left, and one that was there is as it was.
        OSError: the file cannot be written.
        TypeError, ValueError: a wrong argument, or a posterior of another network.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _require(package)
    given = _predicting(model, posterior, path, example, draws, seed, check, classes, preprocess, **interface)
    return _written(path, given, lambda place: _write_onnx(place, given), _with_onnxruntime)


@shows_options(Interface.of)
def pt2(
    model: nn.Module,
    posterior: Posterior,
    path: str | os.PathLike[str],
    example: Batch,
    draws: int = 16,
    *,
    seed: int = 0,
    check: Literal["weights", "shape"] = "weights",
    classes: Sequence[str] | None = None,
    preprocess: Preprocessing | None = None,
    **interface: Unpack[InterfaceOptions],
) -> Export:
    """Write a network under S fixed draws as `torch.export` writes it, and check it with `torch.export.load`.

    ``torch.export.load(path).module()`` takes what the network takes and gives a dictionary of the outputs.
    Arguments, result and errors are those of `onnx`.
    """
    given = _predicting(model, posterior, path, example, draws, seed, check, classes, preprocess, **interface)
    return _written(path, given, lambda place: _write_pt2(place, given), _with_torch)


def _written(
    path: str | os.PathLike[str], given: Predicting, produce: Callable[[Path], None], run: Callable[[Path], Runner]
) -> Export:
    """Write a file, and check it while it is there under a temporary name only."""
    found: list[float] = []

    def checked(temporary: Path) -> None:
        produce(temporary)
        found.append(compare(run(temporary), given))

    write(path, checked)
    path = Path(path)
    return Export(path, path.stat().st_size, len(given.drawn), given.outputs, given.repeated, found[0])


def _predicting(
    model: nn.Module,
    posterior: Posterior,
    path: str | os.PathLike[str],
    example: Batch,
    draws: int,
    seed: int,
    check: str,
    classes: Sequence[str] | None,
    preprocess: Preprocessing | None,
    **interface: Unpack[InterfaceOptions],
) -> Predicting:
    """The network under its draws, with metadata of inputs and outputs; what cannot be exported is refused first."""
    check_posterior(posterior, model, check)
    check_draws(draws)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"the seed must be a whole number from 0 on, got {seed!r:.40}")
    check_file(path)
    compare_draws(posterior, draws, None)
    task, inputs = Interface.of(model, **interface)
    given = predicting(model, posterior, network_input(model, example, inputs), draws, seed, task)
    held = posterior.schema or Schema()
    classes, count = held.classes if classes is None else classes, 0
    classes = classes if task.has_classes else ()
    if classes:
        with torch.no_grad():
            count = task.raw(given.example.call(given.model)).shape[1]
    return replace(given, about={**given.about, **metadata(classes, count, preprocess, given.example, held.exif)})


def _write_onnx(path: Path, given: Predicting) -> None:
    held = sum(t.numel() * t.element_size() for t in given.program.state_dict.values())
    if held >= LARGEST:
        raise ExportError(f"the network has {held} bytes of weights, and an ONNX file holds {LARGEST} at most; use pt2")
    try:
        with quiet():
            made = torch.onnx.export(given.program, input_names=given.inputs, dynamo=True, verbose=False)
    except Exception as error:
        raise ExportError(f"the network cannot be written as ONNX: {reason(error)}") from error
    assert made is not None
    proto = made.model_proto
    names = dict(zip((value.name for value in proto.graph.output), given.outputs, strict=True))
    for node in proto.graph.node:
        del node.metadata_props[:]  # where in the user's code it comes from
        for place, name in enumerate(node.output):
            node.output[place] = names.get(name, name)
        for place, name in enumerate(node.input):
            node.input[place] = names.get(name, name)
    del proto.graph.value_info[:]
    for value in (*proto.graph.input, *proto.graph.output):
        value.name = names.get(value.name, value.name)
        for length in value.type.tensor_type.shape.dim:
            if length.dim_param:
                length.dim_param = "batch"
    for name, text in given.about.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = f"stochbn.{name}", text
    path.write_bytes(proto.SerializeToString())


def _write_pt2(path: Path, given: Predicting) -> None:
    for node in given.program.graph.nodes:
        node.meta.pop("stack_trace", None)  # where in the user's code it comes from
    try:
        with quiet(), path.open("wb") as file:
            torch.export.save(given.program, file, extra_files={"stochbn.json": json.dumps(given.about)})
    except OSError:
        raise
    except Exception as error:
        raise ExportError(f"the network cannot be written by torch.export: {reason(error)}") from error


def _with_onnxruntime(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"onnxruntime cannot run the network: {reason(error)}") from error
    names = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]

    def run(inputs: NetworkInput) -> dict[str, torch.Tensor]:
        arrays = dict(zip(names, (tensor.numpy() for tensor in inputs.tensors()), strict=True))
        return dict(zip(outputs, map(torch.from_numpy, session.run(None, arrays)), strict=True))

    return run


def _with_torch(path: Path) -> Runner:
    with quiet():
        module = torch.export.load(path).module()

    def run(inputs: NetworkInput) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            found: dict[str, torch.Tensor] = module(*inputs.args, **inputs.kwargs)
        return found

    return run


def _require(package: str) -> None:
    try:
        __import__(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"stochbn.export.onnx needs {package}: pip install 'stochbn[export]'", name=package
        ) from error
