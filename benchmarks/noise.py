"""Which noise is useful: variations of the joint posterior, by the held-out NLL of one network of a finished run.

Noise in some layers only, more or less of it, as much in each layer as other held-out images like best, heavier tails,
and examples that count in their own mini-batch as in exact inference. Run it as ``python benchmarks/noise.py
runs/lenet5-held-out`` on a run made with ``--held-out``; nothing here sees test data.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import stochbn
from stochbn import metrics
from stochbn.files import write_bytes, write_json
from stochbn.network.layers import batch_norms, running_statistics
from stochbn.paper.report import read_recipe
from stochbn.paper.runner import fit_posterior, load_parts, predict_all
from stochbn.posteriors import Joint
from stochbn.predictive import Predictor
from stochbn.report.tables import Table
from stochbn.sources import checkpoints
from stochbn.sources.named import Images


def in_layers(posterior: Joint, factors: list[float]) -> Joint:
    """The posterior with the variance of each layer's noise times a factor, about the same expected statistics."""
    sizes = posterior.layers.values()
    factor = torch.cat([torch.full((n,), f, dtype=torch.float64) for n, f in zip(sizes, factors, strict=True)])
    both = torch.cat([factor, factor])
    changed = replace(
        posterior,
        directions=posterior.directions * both.sqrt().float(),
        residual=posterior.residual * both,
    )
    return changed._moved(*posterior.expected)


@contextmanager
def counting_themselves(model: nn.Module, batch_size: int) -> Iterator[None]:
    """Have every example count as one of the `batch_size` whose statistics normalise it, as in exact inference.

    What it changes for the other examples of its mini-batch is neglected, so it costs no more than replay.
    """
    weight = 1 / batch_size

    def include(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert isinstance(layer, _BatchNorm)
        (x,) = args
        mean, variance = running_statistics(layer)
        variance_x, mean_x = torch.var_mean(x.flatten(2) if x.ndim > 2 else x[:, :, None], 2, correction=0)
        shift = mean_x - mean
        together = (1 - weight) * variance + weight * variance_x + weight * (1 - weight) * shift.square()
        scale = ((variance + layer.eps) / (together + layer.eps)).sqrt()
        shape = [len(x), -1] + [1] * (x.ndim - 2)
        return (mean.view(shape[1:]) + (x - (mean + weight * shift).view(shape)) * scale.view(shape),)

    with ExitStack() as stack:
        for layer in batch_norms(model).values():
            stack.callback(layer.register_forward_pre_hook(include).remove)
        yield


def chosen_by_layer(model: nn.Module, joint: Joint, images: Images, draws: int) -> list[float]:
    """For every layer in turn, from the last to the first, the factor on its noise with the lowest NLL."""
    factors = [1.0] * len(joint.layers)

    def loss(factors: list[float]) -> float:
        predictor = stochbn.Predictive(model, in_layers(joint, factors), draws, tolerance=0)
        probs = predict_all(predictor, images, torch.Generator().manual_seed(1)).probs
        return metrics.evaluate(probs, images.labels)["nll"]

    best = loss(factors)
    for i in track(range(len(factors) - 1, -1, -1), description="choosing"):
        for factor in (0.0, 0.25, 4.0):
            changed = [*factors[:i], factor, *factors[i + 1 :]]
            found = loss(changed)
            if found < best:
                best, factors = found, changed
    return factors


def variations(model: nn.Module, joint: Joint, draws: int) -> dict[str, Predictor]:
    """The predictives to compare, by what they are."""
    predictive = functools.partial(stochbn.Predictive, model, draws=draws, tolerance=0)
    found: dict[str, Predictor] = {"plain": stochbn.Predictive(model)}
    for size in (8, 16, 32, 64):
        found[f"joint, noise of {size}"] = predictive(joint.rescale(size))
        found[f"joint, recentred, noise of {size}"] = predictive(joint.recentre(model).rescale(size))
    layers = list(joint.layers)
    count, half = len(layers), len(layers) // 2
    for i, layer in enumerate(layers):
        found[f"only layer {layer}"] = predictive(in_layers(joint, [float(j == i) for j in range(count)]))
    for factor in (1.0, 2.25):
        name = f"noise x {math.sqrt(factor):g}"
        first = [factor] * half + [0.0] * (count - half)
        found[f"first {half} layers, {name}"] = predictive(in_layers(joint, first))
        found[f"last {count - half} layers, {name}"] = predictive(in_layers(joint, [factor - f for f in first]))
    source = torch.Generator().manual_seed(0)
    scales = torch._standard_gamma(torch.full((draws,), 2.5), generator=source) / 2.5  # chi-squared of 5, over 5
    found["heavier tails (Student's t, 5 degrees)"] = stochbn.Ensemble(
        [stochbn.Predictive(model, joint.rescale(16 * scale), 1) for scale in scales.tolist()]
    )
    return found


def main() -> None:
    """Measure, print, and write noise.md and noise.json into the run folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a finished run, made with --held-out")
    parser.add_argument("--objects", type=int, default=2000, help="held-out images, and as many others to choose by")
    parser.add_argument("--draws", type=int, default=24, help="of each variation (default: 24)")
    options = parser.parse_args()
    recipe = read_recipe(options.folder)
    parts = load_parts(recipe)
    held_out = parts["held-out"].take(torch.arange(min(options.objects, len(parts["held-out"]) // 2)))
    others = parts["held-out"].take(torch.arange(len(held_out), 2 * len(held_out)))
    model = checkpoints.load(options.folder / "plain-0" / "network.safetensors").model
    train = parts["train"].shuffled(0).take(torch.arange(min(8192, len(parts["train"]))))
    joint = fit_posterior(model, train, 16, kind="joint")
    assert isinstance(joint, Joint)
    found: dict[str, Any] = {}

    def measure(name: str, predictor: Predictor) -> None:
        prediction = predict_all(predictor, held_out, torch.Generator().manual_seed(0))
        calibrated = metrics.calibrated_nll(prediction.probs, held_out.labels)
        found[name] = metrics.evaluate(prediction.probs, held_out.labels)
        found[name] |= {"calibrated_nll": calibrated["nll"], "temperature": calibrated["temperature"]}

    for name, predictor in track(variations(model, joint, options.draws).items(), description="measuring"):
        measure(name, predictor)
    with counting_themselves(model, 16):
        measure("objects count in their mini-batch", stochbn.Predictive(model, joint, options.draws, tolerance=0))
    factors = chosen_by_layer(model, joint, others, options.draws)
    name = f"each layer's noise chosen: x {', '.join(f'{math.sqrt(factor):g}' for factor in factors)}"
    measure(name, stochbn.Predictive(model, in_layers(joint, factors), options.draws, tolerance=0))
    rows = [
        [name, *(f"{s[key]:.{digits}f}" for key, digits in _COLUMNS.values())]
        for name, s in found.items()
    ]  # fmt: skip
    title = f"{recipe.network} on {recipe.data}: {len(held_out)} held-out images, {options.draws} draws, one network"
    table = Table(title, ["noise", *_COLUMNS], rows)
    print(table.markdown())
    write_bytes(options.folder / "noise.md", table.markdown().encode() + b"\n")
    write_json(options.folder / "noise.json", {"recipe": recipe.as_dict(), "objects": len(held_out), "found": found})


_COLUMNS = {"error %": ("error", 2), "NLL": ("nll", 4), "calibrated NLL": ("calibrated_nll", 4)}
_COLUMNS |= {"best T": ("temperature", 2)}

if __name__ == "__main__":
    main()
