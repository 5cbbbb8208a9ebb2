"""Other libraries beside stochbn, on the same networks and data, each used as its own documentation says.

Every method takes the three trained networks of ``results/trained/resnet18`` or ``vgg11`` and predicts all test images
of the five classes that they know, and of the five that they do not. What a method fits sees the nine tenths of the
training images that the networks were trained on, augmented as they were then. What it chooses, such as a temperature,
is chosen on the other tenth. No choice sees test data. Run it as::

    STOCHBN_DATA=... python benchmarks/rivals.py --network resnet18 --threads 1

It takes less than an hour of one core. The libraries are optional: the script names those that are missing, and the
rows of an earlier run stay in the table, with their differences from stochbn as it was then. This installs them::

    pip install 'torch-uncertainty==0.13.0' 'lightning<2.7' 'laplace-torch==0.3' 'netcal==1.4.0'

TorchUncertainty and laplace-torch need a torchvision that was built for the installed torch. Predictions are kept in
``runs/rivals`` for each version of a library, so an interrupted run continues where it stopped. Times are of the
processor that this process uses, so other work on the machine changes them little.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rivals_measure import loaders, measure
from rivals_methods import DEFAULT, METHODS, PLAIN, Subject, missing, version_of
from rivals_report import BATCH, TITLES, TRAINED, change, merged, page, score
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stochbn.files import read_tensors, write_bytes, write_json, write_tensors
from stochbn.measuring.timing import machine
from stochbn.paper.report import read_recipe
from stochbn.paper.runner import load_parts
from stochbn.sources import checkpoints
from stochbn.sources.named import Images

STORED = Path(__file__).parent.parent / "results" / "trained"
FORMAT = "stochbn.rivals/1"


def predictions(
    name: str,
    number: int,
    models: Mapping[str, Sequence[nn.Module]],
    data: Mapping[str, Images],
    batches: Mapping[str, DataLoader[Any]],
    folder: Path,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A method's predictions with the network of a number, and its costs; made, or read where they were made before."""
    method = METHODS[name]
    used = [models["each"][number]] if method.uses == "each" else models[method.uses]
    key = re.sub(r"[^a-z0-9]+", "-", f"{name} {version_of(method)} {number} {weights(used)}".lower())
    file = folder / f"{key}.safetensors"
    if not file.exists():
        known, unknown = ([x.contiguous() for x, _ in data[part].batches(BATCH)] for part in ("known", "unknown"))
        torch.manual_seed(number)
        for loader in batches.values():
            loader.generator.manual_seed(number)
        made = measure(method, Subject(used, **batches), known, unknown)
        tensors = {part: made.pop(part) for part in ("known", "unknown")}
        write_tensors(file, FORMAT, tensors, made)
        print(f"{name}, network {number}: {made}", flush=True)
    return read_tensors(file, FORMAT)


def weights(models: Sequence[nn.Module]) -> str:
    """A checksum of the networks' tensors: predictions of other weights must not be read for these."""
    digest = hashlib.sha256()
    for tensor in itertools.chain(*(model.state_dict().values() for model in models)):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def summarised(
    name: str,
    found: Sequence[tuple[dict[str, Tensor], dict[str, Any]]],
    bases: Mapping[str, Sequence[dict[str, Tensor]]],
    labels: Tensor,
) -> dict[str, Any]:
    """The row of a method: its scores with every network, and its differences from the bases."""
    method = METHODS[name]
    probs = [tensors for tensors, _ in found]
    networks = [{**score(tensors, labels), **about} for tensors, about in found]
    each = probs if method.uses == "each" else probs * len(bases["from_plain"])
    return {
        "about": method.about,
        "version": version_of(method),
        "uses": method.uses,
        "free": name == PLAIN,
        "networks": networks,
        **{
            key: [change(base, one, labels) for base, one in zip(base_probs, each, strict=True)]
            for key, base_probs in bases.items()
        },
    }


def main() -> None:
    """Measure, print, and write the numbers and the page of the networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=TITLES, default="resnet18", help="which networks (default: resnet18)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads (default: all processors)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="which to measure (default: all)")
    parser.add_argument(
        "--networks", type=int, choices=(1, 2, 3), default=3, help="how many (default: 3); fewer write no files"
    )
    parser.add_argument("--few", type=int, help="use so many images of each part, for a quick look without files")
    parser.add_argument("--runs", type=Path, default=Path("runs/rivals"), help="folder for finished predictions")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder for rivals-NETWORK.json and .md"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stored = STORED / options.network
    recipe = read_recipe(stored)
    models: dict[str, list[nn.Module]] = {
        "ensemble": [_network(stored / f"plain-{i}") for i in range(TRAINED)],
        "dropout": [_network(stored / "dropout-0")] if recipe.dropout else [],
    }
    models["each"] = models["ensemble"]
    data = {part.replace("-", "_"): images for part, images in load_parts(recipe).items()}
    if options.few is not None:
        data = {part: images.shuffled(0).first(options.few) for part, images in data.items()}
    folder = options.runs / options.network / (f"few-{options.few}" if options.few else "all")
    folder.mkdir(parents=True, exist_ok=True)
    labels = data["known"].labels
    batches = loaders(data["train"], data["held_out"])
    possible = {name: method for name, method in METHODS.items() if models[method.uses]}
    absent = {name: reason for name, method in possible.items() if (reason := missing(method))}
    wanted = [
        name for name in possible if name in (PLAIN, DEFAULT, *(options.methods or METHODS)) and name not in absent
    ]
    made: dict[str, list[tuple[dict[str, Tensor], dict[str, Any]]]] = {name: [] for name in wanted}
    for number in range(options.networks):
        for name in wanted:
            if number == 0 or METHODS[name].uses == "each":
                made[name].append(predictions(name, number, models, data, batches, folder))
    bases = {
        key: [tensors for tensors, _ in made[name]] for key, name in (("from_plain", PLAIN), ("from_default", DEFAULT))
    }
    new = {name: summarised(name, found, bases, labels) for name, found in made.items()}
    out = options.out / f"rivals-{options.network}.json"
    earlier: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        earlier = json.loads(out.read_text())["methods"]
    for name, reason in absent.items():
        kept = "its row of an earlier run stays" if name in earlier else "it is left out"
        print(f"{name} needs {', '.join(METHODS[name].packages)}, see --help; {kept} ({reason})")
    rows = merged({} if options.few else earlier, new, list(METHODS))
    sizes = ", ".join(f"{len(images):,} {part.replace('_', '-')}" for part, images in data.items())
    about = f"{machine()}, threads: {options.threads}, Python {platform.python_version()}. Images: {sizes}"
    found = {"about": about, "network": options.network, "epochs": recipe.epochs, "methods": rows}
    text = page(found)
    print(text)
    if options.few is None and options.networks == TRAINED:
        write_json(out, found)
        write_bytes(out.with_suffix(".md"), text.encode())


def _network(home: Path) -> nn.Module:
    """A trained network in PyTorch's default layout, which laplace-torch needs."""
    model = checkpoints.load(home / "network.safetensors").model
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    return model


if __name__ == "__main__":
    main()
