"""A run's folder: whose it is, and the description in its ``run.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stochbn.files import check_folder, write_json
from stochbn.paper.recipes import Recipe
from stochbn.report.facts import surroundings
from stochbn.report.results import FILES
from stochbn.sources.named import Images

__all__ = ["RESULTS", "check", "claim"]

RESULTS = (*FILES, "report.html", *(f"{name}.{kind}" for name in ("statistics", "training") for kind in ("png", "svg")))
"""The files that `stochbn.paper.report` writes into a folder."""


def check(recipe: Recipe, folder: Path) -> None:
    """Refuse a folder that is neither a run's nor can become one, before any data is loaded.

    Raises:
        ValueError: the folder holds something else than a run.
        OSError: the folder cannot be made, or a file of the run cannot be written there.
    """
    check_folder(folder, "run.json", *RESULTS)
    if not folder.exists():
        return
    if not (folder / "run.json").exists() and any(not path.name.startswith(".run-") for path in folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty and not a run folder; name another folder")
    for member in recipe.all_members():
        check_folder(folder / member.name)


def claim(recipe: Recipe, folder: Path, parts: dict[str, Images]) -> None:
    """Make the folder of a run, or check that it belongs to this recipe and this data.

    A run grows: of a recipe that differs in more plain members only, or in a network with dropout where there was none,
    the new members are trained and what is there is kept.

    Raises:
        ValueError: the folder holds another run, or something else.
        OSError: the folder cannot be made or written.
    """
    check(recipe, folder)
    ours = {
        "recipe": recipe.as_dict(),
        "data": {
            part: {"name": images.name, "images": len(images), "sha256": images.fingerprint}
            for part, images in parts.items()
        },
    }
    file = folder / "run.json"
    if file.exists():
        try:
            about = json.loads(file.read_text())
            theirs = {"recipe": Recipe.from_dict(about["recipe"]).as_dict(), "data": dict(about["data"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(file)!r} is damaged or not of a run; name another folder") from error
        grown = _growth(theirs["recipe"], ours["recipe"])
        differing = [
            f"{field} is {theirs[part].get(field)!r} there and {value!r} here"
            for part in ("recipe", "data")
            for field, value in ours[part].items()
            if theirs[part].get(field) != value and not (part == "recipe" and field in grown)
        ]
        if differing:
            raise ValueError(f"{str(folder)!r} holds another run: {'; '.join(differing)}. Name another folder")
        if grown:
            write_json(file, {**about, **ours})
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, {**ours, **surroundings()})


def _growth(theirs: dict[str, Any], ours: dict[str, Any]) -> set[str]:
    """The fields in which our recipe only adds members to theirs."""
    grown = set()
    if ours["members"] > theirs["members"]:
        grown.add("members")
    if theirs["dropout"] is None and ours["dropout"] is not None:
        grown.add("dropout")
    return grown
