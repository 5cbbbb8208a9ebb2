"""Tables, as text and as Markdown: of any kind, and of the scores of methods without and with SBN."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stochbn.files import write_bytes, write_json

__all__ = ["FEW_OBJECTS", "Pair", "Published", "Table", "accuracy", "changes", "noise", "out_of_domain", "write_tables"]

Pair = tuple[float | None, float | None]
"""A number without and with SBN, as far as they are known."""


@dataclass(frozen=True)
class Table:
    """A table of text: a title, the names of its columns (the first one's cells are words), and rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table with its title as a GitHub table; a bar in a cell does not end it, and all of it is UTF-8."""
        head, *body = (f"| {' | '.join(map(_in_cell, row))} |" for row in (self.columns, *self.rows))
        line = f"|{' --- |' + ' ---: |' * (len(self.columns) - 1)}"
        text = "\n".join([f"**{self.title}**", "", head, line, *body])
        return text.encode(errors="backslashreplace").decode()  # names of files may be any bytes


def write_tables(path: Path, about: Any, tables: Sequence[Table]) -> None:
    """Write numbers as JSON and their tables as Markdown, as files with the endings ``.json`` and ``.md``.

    Raises:
        OSError: they cannot be written.
    """
    write_json(path.with_name(f"{path.name}.json"), about)
    text = "\n\n".join(table.markdown() for table in tables)
    write_bytes(path.with_name(f"{path.name}.md"), f"{text}\n".encode())


@dataclass(frozen=True)
class Published:
    """Published numbers to show beside measured ones.

    Attributes:
        scores: by method: ``error`` (percent) and ``nll`` (nats).
        notebook: the NLL of each method that the published notebook printed, where that is known.
    """

    scores: Mapping[str, Mapping[str, Pair]]
    notebook: Mapping[str, Pair] = field(default_factory=dict)


FEW_OBJECTS = 1000
"""So many test examples or fewer, and scores are shown with their standard errors."""


def accuracy(scores: Sequence[dict[str, Any]], data: str, published: Published | None = None) -> Table:
    """The paper's table 1: error and negative log-likelihood of every method, without and with SBN.

    Args:
        scores: of every method, each number a value or a pair of mean and standard deviation over seeds.
        data: what they are from.
        published: numbers to put in brackets behind the measured ones, if any.
    """
    changed = any("nll_change" in row for row in scores)
    rows = []
    for plain, sbn in _pairs(scores):
        method = (plain or sbn)["method"]
        row = [_label(plain or sbn)]
        for key, digits in (("error", 2), ("nll", 4), ("ece", 2)):
            paper = published.scores.get(method, {}).get(key, (None, None)) if published else (None, None)
            notebook = published.notebook if published and key == "nll" else {}
            printed = notebook.get(method, (None, None))
            for found, theirs, also in zip((plain, sbn), paper, printed, strict=True):
                cell = _score(found, key, digits, 100 if key == "ece" else 1) if found else "-"
                brackets = [] if theirs is None else [f"{theirs:.{2 if key == 'error' else 3}f}"]
                brackets += [] if also is None else [f"{also:.4f}"]
                row.append(f"{cell} ({'; '.join(brackets)})" if brackets else cell)
            if key == "nll" and changed:
                row.append(_change(sbn, "nll", 4))
        rows.append(row)
    columns = ["method", "error %", "+ SBN", "NLL (nats)", "+ SBN"]
    columns += ["difference ± s.e."] * changed + ["ECE %", "+ SBN"]
    words = ", published in brackets" if published else ""
    if published and published.notebook:
        words += " (table 1; notebook)"
    words += _objects(scores)
    return Table(f"{data}: test error and calibration{words}", columns, rows)


def changes(scores: Sequence[dict[str, Any]], data: str) -> Table:
    """What SBN changes in every method beside its NLL: differences with their standard errors, where any has them.

    Args:
        scores: of every method, as for `accuracy`.
        data: the known data.
    """
    rows = []
    for plain, sbn in _pairs(scores):
        if "nll_change" not in sbn:
            continue
        calibrated = [_number(s["calibrated_nll"], 4) if "calibrated_nll" in s else "-" for s in (plain, sbn)]
        rows.append(
            [
                _label(sbn),
                *calibrated,
                _change(sbn, "calibrated_nll", 4),
                _change(sbn, "error", 2),
                _change(sbn, "entropy_unknown", 4),
                _change(sbn, "auroc", 4),
            ]
        )
    columns = ["method", "calibrated NLL", "+ SBN", "difference", "error, points", "entropy, unknown", "AUROC"]
    filled = [i for i in range(len(columns)) if any(row[i] != "-" for row in rows)]
    title = f"{data}: what SBN changes, with paired standard errors"
    return Table(title, [columns[i] for i in filled], [[row[i] for i in filled] for row in rows])


def noise(scores: Sequence[dict[str, Any]], data: str) -> Table:
    """What the noise of SBN changes: against the same distribution with every statistic at its median.

    The published experiments call that "no SBN". Against the plain network, the centre of the statistics differs too.

    Args:
        scores: of every method, as for `accuracy`.
        data: the known data.
    """
    rows = [
        [
            _label(row),
            _number(row["median_error"], 2),
            _change(row, "noise_error", 2),
            _number(row["median_nll"], 4),
            _change(row, "noise_nll", 4),
            _change(row, "noise_calibrated_nll", 4),
            _change(row, "noise_auroc", 4),
        ]
        for row in scores
        if "noise_nll_change" in row
    ]
    columns = ["method", "error %", "noise, points", "NLL", "noise", "calibrated NLL, noise", "AUROC, noise"]
    return Table(
        f"{data}: at the medians of the statistics (published as no SBN), and what noise changes", columns, rows
    )


def out_of_domain(scores: Sequence[dict[str, Any]], unknown: str) -> Table:
    """How well entropy tells unknown examples from known ones, for every method without and with SBN."""
    rows = [
        [
            _method(s),
            _number(s["entropy_known"], 3),
            _number(s["entropy_unknown"], 3),
            _score(s, "auroc", 4),
            _number(s["fpr95"], 1, 100),
        ]
        for s in scores
        if "auroc" in s
    ]
    columns = ["method", "known", "unknown", "AUROC", "FPR95 %"]
    return Table(f"{unknown}: mean entropy (nats), and detection of the unknown by it", columns, rows)


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _pairs(scores: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For each method in order, its scores without and with SBN."""
    names = dict.fromkeys(s["method"] for s in scores)
    found = {(s["method"], s["sbn"]): s for s in scores}
    return [(found.get((name, False), {}), found.get((name, True), {})) for name in names]


def _number(value: float | tuple[float, float], digits: int, factor: float = 1) -> str:
    """A number or, from several seeds, mean ± standard deviation."""
    if isinstance(value, tuple):
        return f"{factor * value[0]:.{digits}f} ± {factor * value[1]:.{digits}f}"
    return f"{factor * value:.{digits}f}"


def _score(scores: Mapping[str, Any], key: str, digits: int, factor: float = 1) -> str:
    """A score; where it is of few examples, ± its standard error."""
    error = scores.get(f"{key}_se")
    if isinstance(error, float) and scores["objects"] <= FEW_OBJECTS:
        return f"{_number(scores[key], digits, factor)} ± {_number(error, digits, factor)}"
    return _number(scores[key], digits, factor)


def _objects(scores: Sequence[Mapping[str, Any]]) -> str:
    """How many examples scores are of, where these are few."""
    count = scores[0].get("objects", math.inf)
    few = count <= FEW_OBJECTS and isinstance(scores[0].get("error_se"), float)
    return f"; {count} examples, ± standard error" if few else ""


def _change(scores: Mapping[str, Any], key: str, digits: int) -> str:
    """What SBN changes ± its standard error."""
    if f"{key}_change" not in scores:
        return "-"
    return f"{scores[f'{key}_change']:+.{digits}f} ± {scores[f'{key}_change_se']:.{digits}f}"


def _label(scores: dict[str, Any]) -> str:
    name, count = scores["method"], scores["members"]
    return f"{name} ({count})" if count > 1 else str(name)


def _method(scores: dict[str, Any]) -> str:
    """A method's name that says whether statistics are drawn."""
    if scores["method"] == "plain":
        return "SBN" if scores["sbn"] else "plain"
    return _label(scores) + (" + SBN" if scores["sbn"] else "")
