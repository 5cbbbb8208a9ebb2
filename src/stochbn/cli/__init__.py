"""The command line: commands for your own network, from fit to export, and the paper's experiments."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from stochbn import __version__
from stochbn.cli import project
from stochbn.cli.adapting import adapt
from stochbn.cli.claiming import claims, store
from stochbn.cli.console import complain, err, never_fail_to_encode, out, show_warnings
from stochbn.cli.covering import conformal
from stochbn.cli.evaluating import evaluate
from stochbn.cli.experiments import ablate, augment, compare, demo, redraw, report, reproduce, train
from stochbn.cli.exporting import export
from stochbn.cli.fitting import calibrate, fit
from stochbn.cli.job import check_command, speaks_of
from stochbn.cli.measuring import bench, diagnose
from stochbn.cli.predicting import predict

__all__ = ["app", "main"]


app = typer.Typer(
    help="Calibrated uncertainty for trained, batch-normalised networks: Stochastic Batch Normalization (SBN).\n\n"
    "Try 'stochbn demo' first. For your own network, run 'stochbn fit' on training data, 'stochbn calibrate' on "
    "held-out data, and then 'stochbn evaluate' and 'stochbn predict'. If the data changes, run 'stochbn adapt'.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
paper = typer.Typer(no_args_is_help=True)
for command in (demo, fit, calibrate, conformal, diagnose, evaluate, predict, adapt, export, bench):
    app.command()(command)
app.add_typer(paper, name="paper")
for command in (train, fit, evaluate, predict, reproduce, report, redraw, compare, ablate, augment, store, claims):
    paper.command()(command)
for command in (train, reproduce, report, compare):  # their names from before there was 'paper'
    app.command(hidden=True)(command)


def _version(asked: bool) -> None:
    if asked:
        parts = [f"stochbn {__version__}", f"torch {metadata.version('torch')}", f"Python {platform.python_version()}"]
        typer.echo(", ".join(parts))
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
) -> None:
    """Read defaults of options from stochbn.toml, if this file is in the current folder."""
    check_command(context.invoked_subcommand)
    context.default_map = project.defaults(context.command, Path(project.FILE))


@paper.callback()
def paper_options(context: typer.Context) -> None:
    """Run the paper's experiments: networks and data by name, Deep Ensembles, Dropout, tables and figures."""
    check_command(context.invoked_subcommand)


FRAMED = 100
"""The smallest width of a terminal for help with frames, which cut the names of options in narrower ones."""


def main() -> None:
    """Run the command line; an error that the user can fix is printed in one line, with exit code 1."""
    never_fail_to_encode()
    show_warnings()
    app.rich_markup_mode = "rich" if out.width >= FRAMED else None
    try:
        app()
    except Exception as error:
        if not _mendable(error):
            raise
        if speaks_of(error):
            complain(str(error))
        sys.exit(1)
    except SystemExit as end:
        if end.code == 130:
            resumable = {"predict", "demo", "reproduce", "claims"} & set(sys.argv[1:3])
            again = " Run it again to continue." if resumable else ""
            err.print(f"Stopped.{again}")
        raise


def _mendable(error: Exception) -> bool:
    """Whether the user can fix an error. The classes need torch, so they are imported only after an error."""
    from stochbn.distributed import RanksError
    from stochbn.processes import ProcessError

    return isinstance(error, (OSError, ProcessError, RanksError, ValueError))
