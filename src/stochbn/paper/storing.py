"""Trained networks of a run in little space, and a run folder made of them again without training."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

import stochbn.metrics as metrics
from stochbn.evaluation.predicting import has_dropout, predict_all
from stochbn.files import check_folder, write_bytes
from stochbn.metrics.differences import paired
from stochbn.paper.recipes import Recipe
from stochbn.paper.report import read_recipe
from stochbn.paper.runner import load_parts
from stochbn.predictive import MCDropout, Predictive, Predictor
from stochbn.report.tables import Table, write_tables
from stochbn.sources import checkpoints
from stochbn.sources.named import Images

__all__ = ["read_stored", "restore", "store"]

NETWORK, RUN, LOG = "network.safetensors", "run.json", "training.csv"
STORED = "stored.json", "stored.md"
OF_IMAGES = ("classes", "channels", "size")
"""Arguments of networks that the images say and no recipe."""


def store(run: Path, folder: Path) -> Table:
    """Keep the networks of a finished run in little space, with the logs of their training.

    Weights are rounded, see `stochbn.sources.checkpoints.save`. What that does to the networks is measured on the
    images that the run held out, with dropout on where there is any. The table is also written to ``stored.json`` and
    ``stored.md``. The folder appears when all of it is written; what was stored of the same recipe before stays until
    then.

    Args:
        run: the folder of a run that held images out.
        folder: where to; it is made, or holds what was stored of the same recipe.

    Raises:
        FileNotFoundError: this is no run folder, or a network is missing.
        ValueError: a file is damaged, the run held no images out, or the folder is the run or holds something else.
        OSError: the folder cannot be written.
    """
    recipe = read_recipe(run)
    if not recipe.held_out:
        raise ValueError(f"{str(run)!r} is a run that trained on all images; what rounding does is measured on others")
    _check_replaceable(folder, run, recipe)
    networks = _networks(run, recipe)
    images = load_parts(recipe)["held-out"]
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name[:40]}-", dir=folder.parent) as beside:
        new, old = Path(beside) / "new", Path(beside) / "old"
        new.mkdir()
        table = _write(recipe, run, networks, images, new)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
    return table


def _check_replaceable(folder: Path, run: Path, recipe: Recipe) -> None:
    """Refuse a folder that is not empty, unless it holds what was stored of this recipe, and nothing else."""
    check_folder(folder)
    check_folder(folder.resolve().parent)
    if folder.is_mount():
        raise ValueError(f"{str(folder)!r} is where a disk is mounted, so it cannot be replaced; name a folder in it")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if folder.samefile(run):
        raise ValueError(
            f"{str(folder)!r} is the run itself, whose trained networks would be lost; name another folder"
        )
    if not (folder / STORED[0]).exists():
        raise ValueError(f"{str(folder)!r} is not empty and holds no stored networks; name another folder")
    if read_recipe(folder) != recipe:
        raise ValueError(f"{str(folder)!r} holds stored networks of another recipe; name another folder, or delete it")
    members = [member.name for member in recipe.all_members()]
    ours = {Path(RUN), *map(Path, STORED), *(Path(name, file) for name in members for file in (NETWORK, LOG))}
    for file in sorted(path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()):
        if file not in ours:
            raise ValueError(f"{str(folder)!r} also holds {str(file)!r}, which would be lost; name another folder")


def _networks(folder: Path, recipe: Recipe) -> dict[str, checkpoints.Checkpoint]:
    """The networks of a run or of what is stored, by member.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: one is damaged, or is not what the recipe says.
    """
    found = {}
    for member in recipe.all_members():
        file = folder / member.name / NETWORK
        if not file.exists():
            raise FileNotFoundError(f"{str(folder)!r} lacks the network of {member.name}: there is no {str(file)!r}")
        network = found[member.name] = checkpoints.load(file)
        chosen = recipe.arguments | (recipe.dropout or {} if member.kind == "dropout" else {})
        arguments = {key: value for key, value in network.arguments.items() if key in chosen or key not in OF_IMAGES}
        wanted = {"network": recipe.network, "data": recipe.data, "arguments": chosen}
        there = {"network": network.network, "data": network.data, "arguments": arguments}
        for key, value in wanted.items():
            if there[key] != value:
                raise ValueError(
                    f"{str(file)!r} is of {key} {there[key]!r}, and {str(folder / RUN)!r} says {value!r}; copy it again"
                )
    return found


def _write(
    recipe: Recipe, run: Path, networks: dict[str, checkpoints.Checkpoint], images: Images, folder: Path
) -> Table:
    """Write stored networks into an empty folder."""
    about, rows = {}, []
    for name, network in networks.items():
        home, log = folder / name, run / name / LOG
        home.mkdir()
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
    write_bytes(folder / RUN, (run / RUN).read_bytes())
    columns = ["network", "MB", "error %", "stored", "NLL", "stored", "difference ± s.e."]
    table = Table(f"{recipe.network} on {len(images)} held-out images: as trained, and as stored", columns, rows)
    write_tables(folder / "stored", {"images": len(images), "networks": about}, [table])
    return table


def _probs(network: checkpoints.Checkpoint, images: Images) -> Tensor:
    """What a network predicts as it is, or with its dropout on, by the same masks every time."""
    predictor: Predictor = MCDropout(network.model) if has_dropout(network.model) else Predictive(network.model)
    probs: Tensor = predict_all(predictor, images, torch.Generator().manual_seed(0)).probs
    return probs


def read_stored(folders: Iterable[Path]) -> dict[Path, Recipe]:
    """The recipes of stored networks, each of a network of its own, whose files are all there and sound.

    Args:
        folders: what `store` wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of another recipe, or two folders are of one network or have one name.
    """
    recipes = {folder: read_recipe(folder) for folder in folders}
    seen: dict[str, Path] = {}
    for folder, recipe in recipes.items():
        for what in (f"the network {recipe.network!r}", f"the name {folder.resolve().name!r}"):
            if what in seen:
                raise ValueError(
                    f"{str(seen[what])!r} and {str(folder)!r} have {what}, so results of one would replace the "
                    "other's; give one of them, and another --out and --runs to the other"
                )
            seen[what] = folder
    for folder, recipe in recipes.items():
        _networks(folder, recipe)
    return recipes


def restore(folder: Path, run: Path) -> Recipe:
    """Make a run folder of stored networks, or check that it is one of the same networks.

    Nothing is written unless all that is stored can be read and the run folder has no other networks.

    Args:
        folder: what `store` wrote.
        run: the run folder; it is made.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a stored file is damaged or of another recipe, or the run folder is of other networks.
        OSError: it cannot be written.
    """
    recipe = read_stored([folder])[folder]
    members = [member.name for member in recipe.all_members()]
    logs = [f"{name}/{LOG}" for name in members if (folder / name / LOG).exists()]
    contents = {name: (folder / name).read_bytes() for name in (RUN, *(f"{name}/{NETWORK}" for name in members), *logs)}
    missing = [name for name in contents if not (run / name).exists()]
    for name, content in contents.items():
        file = run / name
        if name not in missing and file.read_bytes() != content:
            raise ValueError(f"{str(file)!r} is another one than in {str(folder)!r}; delete the folder {str(run)!r}")
    for name in missing:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(run / name, contents[name])
    return recipe
