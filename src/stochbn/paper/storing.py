"""Trained networks of a run in little space, and a run folder made of them again without training."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

import stochbn.metrics as metrics
from stochbn.evaluation.predicting import predict_all
from stochbn.files import check_folder, write_bytes
from stochbn.metrics.differences import paired
from stochbn.paper.recipes import Recipe
from stochbn.paper.report import read_recipe
from stochbn.paper.runner import load_parts
from stochbn.predictive import Predictive
from stochbn.report.tables import Table, write_tables
from stochbn.sources import checkpoints
from stochbn.sources.named import Images

__all__ = ["restore", "store"]

NETWORK, RUN, LOG = "network.safetensors", "run.json", "training.csv"


def store(run: Path, folder: Path) -> Table:
    """Keep the networks of a finished run in little space, with the logs of their training.

    Weights are rounded, see `stochbn.sources.checkpoints.save`. What that does to the networks is measured on the
    images that the run held out; the table is also written to ``stored.json`` and ``stored.md``.

    Args:
        run: the folder of a run that held images out.
        folder: where to; it is made.

    Raises:
        FileNotFoundError: this is no run folder, or a network is missing.
        ValueError: a file is damaged, or the run held no images out.
        OSError: the folder cannot be written.
    """
    recipe = read_recipe(run)
    if not recipe.held_out:
        raise ValueError(f"{str(run)!r} is a run that trained on all images; what rounding does is measured on others")
    check_folder(folder, RUN, "stored.json", "stored.md")
    names = [member.name for member in recipe.all_members()]
    networks = {name: checkpoints.load(run / name / NETWORK) for name in names}
    images = load_parts(recipe)["held-out"]
    folder.mkdir(parents=True, exist_ok=True)
    about, rows = {}, []
    for name, network in networks.items():
        home, log = folder / name, run / name / LOG
        home.mkdir(exist_ok=True)
        checkpoints.save(home / NETWORK, network, small=True)
        if log.exists():
            write_bytes(home / LOG, log.read_bytes())
        before, after = (_probs(one, images) for one in (network, checkpoints.load(home / NETWORK)))
        size = (home / NETWORK).stat().st_size
        scores = [metrics.evaluate(probs, images.labels) for probs in (before, after)]
        changes = paired((before, after), images.labels)
        about[name] = {"bytes": size, "trained": scores[0], "stored": scores[1], **changes}
        numbers = [f"{one[key]:.{digits}f}" for key, digits in (("error", 2), ("nll", 4)) for one in scores]
        change = f"{changes['nll_change']:+.4f} ± {changes['nll_change_se']:.4f}"
        rows.append([name, f"{size / 1e6:.2f}", *numbers, change])
    write_bytes(folder / RUN, (run / RUN).read_bytes())  # the last one: what it lacks is not stored yet
    columns = ["network", "MB", "error %", "stored", "NLL", "stored", "difference ± s.e."]
    table = Table(f"{recipe.network} on {len(images)} held-out images: as trained, and as stored", columns, rows)
    write_tables(folder / "stored", {"images": len(images), "networks": about}, [table])
    return table


def _probs(network: checkpoints.Checkpoint, images: Images) -> Tensor:
    probs: Tensor = predict_all(Predictive(network.model), images).probs
    return probs


def restore(folder: Path, run: Path) -> Recipe:
    """Make a run folder of stored networks, or check that it is one of the same networks.

    Args:
        folder: what `store` wrote.
        run: the run folder; it is made.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the run folder is of other networks.
        OSError: it cannot be written.
    """
    recipe = read_recipe(folder)
    members = [member.name for member in recipe.all_members()]
    logs = [f"{name}/{LOG}" for name in members if (folder / name / LOG).exists()]
    contents = {name: (folder / name).read_bytes() for name in (RUN, *(f"{name}/{NETWORK}" for name in members), *logs)}
    for name, content in contents.items():
        file = run / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(file, content)
        elif file.read_bytes() != content:
            raise ValueError(f"{str(file)!r} is another one than in {str(folder)!r}; delete the folder {str(run)!r}")
    return recipe
