"""The commands of trained networks that stay: store, and claims, which makes the paper's claims again from them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from stochbn.cli.console import STAGES, follow_stages, progress_bars, say, show, side_by_side
from stochbn.cli.options import Jobs

__all__ = ["claims", "store"]


def store(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A finished run made with --held-out.", show_default=False)
    ],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the networks.", show_default=False)],
) -> None:
    """Keep the networks of a run in little space, with the logs of their training, for 'stochbn paper claims'.

    Weights are rounded; the table shows what that does on the images that the run held out.
    """
    from stochbn.paper.storing import store as store_networks

    show([store_networks(run, folder)])
    say(f"Everything is in {folder}: run.json, stored.md and a folder for each network.", folder)


def claims(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER", help="Stored networks of one run, or more.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for claims.md and, for each run, NETWORK-paper.")] = Path("results"),
    runs: Annotated[Path, typer.Option(help="Folder for predictions, to continue from.")] = Path("runs/claims"),
    jobs: Jobs = 1,
) -> None:
    """Put the paper's claims to the test on stored networks, without training.

    Posteriors are fitted, test images predicted and all methods compared. The page in --out has every network whose
    results are there. What was stopped continues where it was.
    """
    from stochbn.paper.storing import read_stored
    from stochbn.paper.verdicts import claim, page

    folders = [folder for folder in folders if not folder.is_file()]  # results/trained/* has a page, too
    for folder, recipe in read_stored(folders).items():  # all are read before the work, not after it
        name = folder.resolve().name
        say(f"{folder}: {len(recipe.all_members())} networks, {recipe.draws} draws.", folder)
        many = jobs or side_by_side(len(recipe.all_members()))
        with progress_bars() as bars:
            claim(folder, runs / name, out, jobs=many, progress=_told(bars, name))
    show([page(out)])
    say(f"Everything is in {out}: claims.md, claims.png, and a folder for each run.", out)


def _told(bars: Progress, run: str) -> Callable[[str, str, int, int], None]:
    """Bars that move, and a line for each part that is done, for those who read a log."""
    move = follow_stages(bars)

    def advance(name: str, stage: str, done: int, total: int) -> None:
        move(name, stage, done, total)
        if done == total:
            say(f"{datetime.now().astimezone():%H:%M:%S} {run}, {name}: {STAGES[stage]} is done")

    return advance
