"""The command line: commands about a network of one's own, from fit to export; the paper's experiments."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from stochbn.cli import project
from stochbn.cli.adapting import adapt
from stochbn.cli.console import complain, err, never_fail_to_encode, out, show_warnings
from stochbn.cli.covering import conformal
from stochbn.cli.evaluating import evaluate
from stochbn.cli.experiments import ablate, augment, compare, demo, redraw, report, reproduce
from stochbn.cli.exporting import export
from stochbn.cli.fitting import calibrate, fit
from stochbn.cli.job import check_command, speaks_of
from stochbn.cli.measuring import bench, diagnose
from stochbn.cli.predicting import predict
from stochbn.cli.training import train

__all__ = ["app", "main"]


app = typer.Typer(
    help="Calibrated uncertainty for trained, batch-normalised networks: Stochastic Batch Normalization (SBN).\n\n"
    "Start with 'stochbn demo'. With a network of your own: fit a posterior over its batch-norm statistics to training "
    "data, calibrate it on held-out data, evaluate both, predict. If the data changes, adapt.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
paper = typer.Typer(no_args_is_help=True)
for command in (demo, fit, calibrate, conformal, diagnose, evaluate, predict, adapt, export, bench):
    app.command()(command)
app.add_typer(paper, name="paper")
for command in (train, fit, evaluate, predict, reproduce, report, redraw, compare, ablate, augment):
    paper.command()(command)
for command in (train, reproduce, report, compare):  # their names from before there was 'paper'
    app.command(hidden=True)(command)


@app.callback()
def options(context: typer.Context) -> None:
    """Take what options are not given from stochbn.toml, if there is such a file in the current folder."""
    check_command(context.invoked_subcommand)
    context.default_map = project.defaults(context.command, Path(project.FILE))


@paper.callback()
def paper_options(context: typer.Context) -> None:
    """The paper's experiments: networks and data by name, Deep Ensembles, Dropout, tables and figures."""
    check_command(context.invoked_subcommand)


FRAMED = 100
"""Columns of a terminal from which on the help is framed: frames cut the names of options where there are fewer."""


def main() -> None:
    """Run the command line; what a user can mend is told in one line and ends with exit code 1."""
    from stochbn.distributed import RanksError
    from stochbn.paper import ExperimentError

    never_fail_to_encode()
    show_warnings()
    app.rich_markup_mode = "rich" if out.width >= FRAMED else None
    try:
        app()
    except (ExperimentError, OSError, RanksError, ValueError) as error:
        if speaks_of(error):
            complain(str(error))
        sys.exit(1)
    except SystemExit as end:
        if end.code == 130:
            again = " Run it again to go on." if {"predict", "demo", "reproduce"} & set(sys.argv[1:3]) else ""
            err.print(f"Stopped.{again}")
        raise
