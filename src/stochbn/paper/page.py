"""The page about a run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stochbn.paper.figures import training
from stochbn.paper.recipes import Recipe
from stochbn.paper.schedule import Epoch
from stochbn.report.facts import made_with
from stochbn.report.objects import Source, source_of
from stochbn.report.page import Curve, Page, page_of
from stochbn.report.style import inline
from stochbn.report.tables import Table
from stochbn.sources import named
from stochbn.sources.named import DataError, Images

if TYPE_CHECKING:
    from stochbn.evaluation.methods import Method

__all__ = ["page_of_run"]


def page_of_run(
    folder: Path,
    about: Mapping[str, Any],
    found: Sequence[Method],
    scores: Sequence[Mapping[str, Any]],
    tables: Sequence[Table],
    logs: Mapping[str, Sequence[Epoch]],
) -> Page:
    """Put the page about a run together.

    Args:
        folder: the run folder.
        about: its description, as `stochbn.paper.report.read_run` gives it.
        found: what its methods predict.
        scores: their scores.
        tables: its tables.
        logs: the logs of its trainings, by the names of the networks.
    """
    recipe = Recipe.from_dict(about["recipe"])
    known, unknown = about["data"]["known"]["name"], about["data"].get("unknown", {}).get("name")
    images = _images(recipe, about["data"]["known"])
    source = source_of(images) if images is not None else Source(lambda i: f"image {i}", lambda i: None)
    settings: dict[str, Any] = recipe.as_dict() | recipe.arguments | (recipe.dropout or {})
    shown = {
        name.replace("_", " "): value for name, value in settings.items() if value is not None and value is not False
    }
    recipe_text = ", ".join(f"{name} {value}" for name, value in shown.items() if name != "arguments")
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in about["seconds"].items())
    facts = {
        "Known classes": f"{known}: {about['data']['known']['images']:,}",
        "Unknown classes": f"{unknown}: {about['data']['unknown']['images']:,}" if unknown else "none",
        "Recipe": recipe_text,
        "Cost": f"training, fitting and predicting: {seconds}. Predicting takes one pass of a network as it is, and "
        f"{recipe.draws} with SBN.",
        **made_with(about),
        "Command": f"stochbn paper report {shlex.quote(str(folder))}",
    }
    title = f"{recipe.network} on {recipe.data}: uncertainty without and with SBN"
    classes = images.classes if images is not None else ()
    curves = []
    if logs:
        caption = "Loss and accuracy in every epoch: of training images while weights change, of held-out ones if any."
        curves = [Curve("How were the networks trained?", caption, inline(training(logs, stacked=True), "training"))]
    return page_of(title, found, scores, tables, (known, unknown), source, classes, facts, curves)


def _images(recipe: Recipe, described: Mapping[str, Any]) -> Images | None:
    """The known test images of a run; None where they cannot be had, or are others by now."""
    try:
        if recipe.evaluate_on == "held-out":
            images = named.load(recipe.data, "train").held_out(recipe.held_out, seed=0)[1]
        else:
            images = named.load(recipe.data, "test")
    except DataError:
        return None
    if recipe.test_images is not None and recipe.test_images < len(images):
        images = images.shuffled(0).first(recipe.test_images)
    return images if images.fingerprint == described["sha256"] else None
