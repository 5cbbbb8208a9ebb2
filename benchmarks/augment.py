"""Augmented draws: what they cost in plain passes, and what it saves to spread them evenly.

For a network of a finished run that held images out, draws over statistics and input are calibrated on these and timed
beside plain passes of the same test images, in one process and interleaved; medians count. Their DEE is by the plain
ensembles of the run's networks on the same images. Then a few images are predicted again and again with draws over the
input that are spread evenly, as `stochbn.augment` does, and with independent ones: the ratio of the variances of their
means, at equal numbers of draws, is what spreading saves. Run it as
``python benchmarks/augment.py RUN --augment flip,shift:4``; it takes minutes a network.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

import stochbn
from stochbn import Posterior, Predictive, augment, metrics
from stochbn.evaluation.fitting import fit_posterior
from stochbn.evaluation.predicting import PREDICT_BATCH
from stochbn.files import read_tensors, write_bytes, write_json
from stochbn.measuring.timing import median_seconds
from stochbn.paper.recipes import Recipe
from stochbn.paper.report import read_recipe
from stochbn.paper.runner import PREDICTIONS, load_parts
from stochbn.report.tables import Table
from stochbn.sources import checkpoints

COUNTS = (2, 4, 8, 16, 32)
CALLS = (8, 16, 48)
REPETITIONS = 7


def variances(predictive: Predictive, x: Tensor, repetitions: int) -> dict[int, float]:
    """The variance of the mean over the first draws, averaged over examples and classes, by the number of draws."""
    generator = torch.Generator().manual_seed(0)
    means: dict[int, list[Tensor]] = {count: [] for count in COUNTS}
    for _ in track(range(repetitions), description="predicting"):
        probs = predictive(x, generator=generator).log_probs.double().exp()
        for count, rows in means.items():
            rows.append(probs[:count].mean(0))
    return {count: torch.stack(rows).var(0).mean().item() for count, rows in means.items()}


def costs(
    model: nn.Module,
    posterior: Posterior,
    changes: augment.Augment,
    x: Tensor,
    labels: Tensor,
    reached: Sequence[float],
) -> Table:
    """What calls cost in units, the time of a plain pass, and the scores of what they predict (in batches of 100)."""
    calls: dict[str, Callable[[Tensor], Tensor]] = {"plain": lambda batch: model(batch).softmax(1)}
    for draws in CALLS:
        for name, tolerance in (("defaults", None), ("all draws", 0.0)):
            predictive = Predictive(model, posterior, draws, augment=changes, tolerance=tolerance)
            calls[f"{draws}, {name}"] = lambda batch, predictive=predictive: predictive(batch, generator=seeded()).probs  # type: ignore[misc]
    batches = torch.split(x, 100)
    print("timing", flush=True)
    with torch.no_grad():
        took = median_seconds({name: partial(call, batches[0]) for name, call in calls.items()}, REPETITIONS)
        probs = {
            name: torch.cat([call(batch) for batch in batches])
            for name, call in track(calls.items(), description="predicting")
        }
    unit = took["plain"]
    body = []
    for name in calls:
        calibrated = metrics.calibrated_nll(probs[name], labels)["nll"]
        scores = metrics.evaluate(probs[name], labels)["nll"], calibrated
        dee = metrics.deep_ensemble_equivalent(calibrated, reached)
        body.append([name, f"{took[name] / unit:.1f}", *(f"{s:.4f}" for s in scores), f"{dee:.2f}"])
    title = f"Cost of a call for 100 images, in plain passes of {1e3 * unit:.1f} ms, and scores on {len(x)} images"
    return Table(title, ["draws", "units", "NLL", "calibrated NLL", "DEE"], body)


def ensembles(run: Path, recipe: Recipe, labels: Tensor) -> list[float]:
    """The calibrated NLL of plain ensembles of 1, 2, ... networks of a run, with each network as the first."""
    files = [run / member.name / "predictions.safetensors" for member in recipe.all_members() if member.kind == "plain"]
    probs = [read_tensors(file, PREDICTIONS)[0]["plain.known"][: len(labels)].exp() for file in files]
    doubled = [*probs, *probs]
    return [
        statistics.mean(
            metrics.calibrated_nll(torch.stack(doubled[first : first + size]).mean(0), labels)["nll"]
            for first in range(len(probs))
        )
        for size in range(1, len(probs) + 1)
    ]


def seeded() -> torch.Generator:
    """The same random numbers for every call."""
    return torch.Generator().manual_seed(0)


def main() -> None:
    """Measure, print, and write augment-NETWORK.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--augment", default="flip,shift:4", help="flip, shift:PIXELS, or both (default: both, by 4)")
    parser.add_argument("--scored", type=int, default=2000, help="test images to score calls on (default: 2000)")
    parser.add_argument("--images", type=int, default=100, help="test images to spread draws on (default: 100)")
    parser.add_argument("--repetitions", type=int, default=50, help="means of each sort (default: 50)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the files")
    options = parser.parse_args()
    recipe = read_recipe(options.run)
    model = checkpoints.load(options.run / "plain-0" / "network.safetensors").model
    parts = load_parts(recipe)
    spread = augment.named(options.augment)
    scored = min(options.scored, len(parts["known"]))
    (every, labels), *_ = parts["known"].take(torch.arange(scored)).batches(scored)
    train = parts["train"].take(torch.arange(min(2048, len(parts["train"]))))
    posterior = fit_posterior(model, train, recipe.statistics_batch, kind="joint", augment=spread)
    held_out = parts["held-out"].take(torch.arange(min(2000, len(parts["held-out"])))).batches(PREDICT_BATCH)
    posterior = stochbn.calibrate(model, posterior, held_out, temperature=True, augment=spread)
    cost = costs(model, posterior, spread, every, labels, ensembles(options.run, recipe, labels))
    x = every[: options.images]

    def independent(images: Tensor, generator: torch.Generator) -> Tensor:
        return spread(images, generator)

    measured = {
        name: variances(
            Predictive(model, draws=COUNTS[-1], augment=fn, clean=False, keep_draws=True), x, options.repetitions
        )
        for name, fn in (("spread", spread), ("independent", independent))
    }
    gains = {count: measured["independent"][count] / measured["spread"][count] for count in COUNTS}
    about = {"recipe": recipe.as_dict(), "augment": options.augment, "images": options.images,
             "repetitions": options.repetitions, "variances": measured, "gains": gains,
             "machine": platform.machine(), "torch": torch.__version__, "cost": cost.rows}  # fmt: skip
    title = (
        f"Variance of mean probabilities, {options.augment}: {recipe.network} on {options.images} images of "
        f"{recipe.data}, {options.repetitions} means of each sort"
    )
    body = [
        [str(count), f"{measured['independent'][count]:.2e}", f"{measured['spread'][count]:.2e}", f"{gains[count]:.2f}"]
        for count in COUNTS
    ]
    table = Table(title, ["draws", "independent", "spread evenly", "ratio"], body)
    write_json(options.out / f"augment-{recipe.network}.json", about)
    write_bytes(options.out / f"augment-{recipe.network}.md", f"{cost.markdown()}\n\n{table.markdown()}\n".encode())
    print(cost.markdown(), table.markdown(), sep="\n\n")


if __name__ == "__main__":
    main()
