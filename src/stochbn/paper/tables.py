"""The paper's tables, as Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table as RichTable

__all__ = ["Table", "accuracy", "out_of_domain"]


@dataclass(frozen=True)
class Table:
    """A table of text: a title, the names of its columns (the first one's cells are words), and rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table with its title as a GitHub table."""
        head = f"| {' | '.join(self.columns)} |\n|{' --- |' + ' ---: |' * (len(self.columns) - 1)}"
        return "\n".join([f"**{self.title}**", "", head, *(f"| {' | '.join(row)} |" for row in self.rows)])

    def rich(self) -> RichTable:
        """The table for a terminal."""
        table = RichTable(title=self.title, title_justify="left", title_style="bold")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def accuracy(scores: Sequence[dict[str, Any]], data: str) -> Table:
    """The paper's table 1: error and negative log-likelihood of every method, without and with SBN."""
    rows = []
    for plain, sbn in _pairs(scores):
        cells = [
            [f"{100 * s['ece']:.2f}" if key == "ece" else f"{s[key]:.{digits}f}" if s else "-" for s in (plain, sbn)]
            for key, digits in (("error", 2), ("nll", 4), ("ece", 2))
        ]
        rows.append([_label(plain or sbn), *(cell for pair in cells for cell in pair)])
    columns = ["method", "error %", "+ SBN", "NLL (nats)", "+ SBN", "ECE %", "+ SBN"]
    return Table(f"{data}: test error and calibration", columns, rows)


def out_of_domain(scores: Sequence[dict[str, Any]], unknown: str) -> Table:
    """How well entropy tells unknown objects from known ones, for every method without and with SBN."""
    rows = [
        [
            _label(s) + (" + SBN" if s["sbn"] else ", no SBN"),
            f"{s['entropy_known']:.3f}",
            f"{s['entropy_unknown']:.3f}",
            f"{s['auroc']:.4f}",
            f"{100 * s['fpr95']:.1f}",
        ]
        for s in scores
        if "auroc" in s
    ]
    columns = ["method", "entropy, known", "entropy, unknown", "AUROC", "FPR95 %"]
    return Table(f"{unknown}: out of domain, by entropy (nats)", columns, rows)


def _pairs(scores: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For each method in order, its scores without and with SBN."""
    names = dict.fromkeys(s["method"] for s in scores)
    found = {(s["method"], s["sbn"]): s for s in scores}
    return [(found.get((name, False), {}), found.get((name, True), {})) for name in names]


def _label(scores: dict[str, Any]) -> str:
    count = scores["members"]
    name: str = "Single network" if scores["method"] == "SBN" else scores["method"]
    return f"{name} ({count})" if count > 1 else name
