"""The command line: train, fit, evaluate, predict, export, and the paper's experiments."""

from __future__ import annotations

import sys

import typer

from stochbn.cli.console import complain, err, never_fail_to_encode, out
from stochbn.cli.experiments import ablate, compare, demo, report, reproduce
from stochbn.cli.exporting import export
from stochbn.cli.measuring import bench, diagnose
from stochbn.cli.predicting import evaluate, predict
from stochbn.cli.training import fit, train

__all__ = ["app", "main"]


app = typer.Typer(
    help="Calibrated uncertainty for trained, batch-normalised networks: Stochastic Batch Normalization (SBN).\n\n"
    "Start with 'stochbn demo'. Or step by step: train a network, fit a posterior over its batch-norm statistics, "
    "evaluate both on data of known and unknown classes, predict.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (demo, reproduce, report, compare, ablate, bench, train, fit, diagnose, evaluate, predict, export):
    app.command()(command)

FRAMED = 100
"""Columns of a terminal from which on the help is framed: frames cut the names of options where there are fewer."""


def main() -> None:
    """Run the command line; what a user can mend is told in one line and ends with exit code 1."""
    from stochbn.paper import ExperimentError

    never_fail_to_encode()
    app.rich_markup_mode = "rich" if out.width >= FRAMED else None
    try:
        app()
    except (ExperimentError, OSError, ValueError) as error:
        complain(str(error))
        sys.exit(1)
    except SystemExit as end:
        if end.code == 130:
            err.print("Stopped.")
        raise
