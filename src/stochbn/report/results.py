"""The results of an evaluation as files: every number, the tables, and the figure of entropies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stochbn.evaluation.methods import Method, score
from stochbn.predictions import entropy
from stochbn.report import tables
from stochbn.report.curves import entropies_of_unknown
from stochbn.report.style import save
from stochbn.report.tables import Published, Table, write_tables

__all__ = ["FILES", "tabulate", "write"]

FILES = ("results.json", "results.md", "entropy-cdf.png", "entropy-cdf.svg")
"""The files that `write` writes."""


def tabulate(
    scores: Sequence[dict[str, Any]], known: str, unknown: str | None, published: Published | None = None
) -> list[Table]:
    """The table of errors and calibration, with unknown data the out-of-domain table, and what SBN changes.

    Args:
        scores: of every method, from `score`. Those that earlier versions wrote have no differences: the table of what
            SBN changes is left out.
        known: name of the data of known classes.
        unknown: name of the data of unknown classes, if any.
        published: numbers to show beside the measured ones, if any.
    """
    shown = [tables.accuracy(scores, known, published)]
    if unknown:
        shown.append(tables.out_of_domain(scores, unknown))
    if any("nll_change" in row for row in scores):
        shown.append(tables.changes(scores, known))
    if any("noise_nll_change" in row for row in scores):
        shown.append(tables.noise(scores, known))
    return shown


def write(
    folder: Path,
    about: Mapping[str, Any],
    found: Sequence[Method],
    known: str,
    unknown: str | None,
    title: str,
    published: Published | None = None,
    scores: Sequence[dict[str, Any]] | None = None,
) -> list[Table]:
    """Write tables and entropy figure into a folder, and return the tables.

    ``results.json`` has every number with the settings, ``results.md`` the tables, ``entropy-cdf.png`` and ``.svg``
    the figure, where there is unknown data.

    Args:
        folder: an existing folder.
        about: the settings to record.
        found: the methods.
        known: name of the data of known classes.
        unknown: name of the data of unknown classes, if any.
        title: the figure's title.
        published: as for `tabulate`.
        scores: of the methods, where they are known already.

    Raises:
        OSError: the folder cannot be written.
    """
    scores = score(found) if scores is None else scores
    shown = tabulate(scores, known, unknown, published)
    write_tables(folder / "results", {**about, "scores": scores}, shown)
    entropies = {(m.name, m.sbn): entropy(m.unknown) for m in found if m.unknown is not None}
    if entropies:
        classes = found[0].known.shape[1]
        of_known = {(m.name, m.sbn): entropy(m.known) for m in found}
        figure = entropies_of_unknown(entropies, classes=classes, title=title, known=of_known)
        save(figure, folder / "entropy-cdf")
    return shown
