"""The paper's tables, as Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from stochbn.paper.goodness import Diagnosis

__all__ = ["PUBLISHED", "PUBLISHED_DATA", "Table", "accuracy", "diagnosis", "out_of_domain", "rescaling"]


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
        table = RichTable(title=escape(self.title), title_justify="left", title_style="bold")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


PUBLISHED: dict[str, dict[str, dict[str, tuple[float | None, float | None]]]] = {
    "lenet5": {
        "SBN": {"error": (None, 0.53), "nll": (None, 0.025)},
        "Deep Ensembles": {"error": (0.40, 0.40), "nll": (0.016, 0.015)},
        "Dropout": {"error": (0.42, 0.42), "nll": (0.014, 0.014)},
    },
    "vgg11": {
        "SBN": {"error": (None, 5.76), "nll": (None, 0.302)},
        "Deep Ensembles": {"error": (4.81, 4.81), "nll": (0.191, 0.162)},
        "Dropout": {"error": (5.32, 5.38), "nll": (0.155, 0.149)},
    },
    "resnet18": {
        "SBN": {"error": (None, 4.35), "nll": (None, 0.255)},
        "Deep Ensembles": {"error": (3.37, 3.34), "nll": (0.138, 0.110)},
    },
}
"""Table 1 of Atanov et al., 2018: for every network and method, error (percent) and NLL (nats) without and with SBN."""

PUBLISHED_DATA = {"lenet5": ("mnist",), "vgg11": ("cifar10", "cifar10:0-4"), "resnet18": ("cifar10", "cifar10:0-4")}
"""What the published numbers are from, or, as the paper does not say which of the two it is, may be from."""


def accuracy(scores: Sequence[dict[str, Any]], data: str, published: str | None = None) -> Table:
    """The paper's table 1: error and negative log-likelihood of every method, without and with SBN.

    Args:
        scores: of every method, each number a value or a pair of mean and standard deviation over seeds.
        data: what they are from.
        published: the network whose published numbers to put in brackets behind the measured ones, if any.
    """
    rows = []
    for plain, sbn in _pairs(scores):
        row = [_label(plain or sbn)]
        for key, digits in (("error", 2), ("nll", 4), ("ece", 2)):
            paper = PUBLISHED.get(published or "", {}).get((plain or sbn)["method"], {}).get(key, (None, None))
            for found, theirs in zip((plain, sbn), paper, strict=True):
                cell = _number(found[key], digits, 100 if key == "ece" else 1) if found else "-"
                row.append(cell if theirs is None else f"{cell} ({theirs:.{2 if key == 'error' else 3}f})")
        rows.append(row)
    columns = ["method", "error %", "+ SBN", "NLL (nats)", "+ SBN", "ECE %", "+ SBN"]
    brackets = ", published in brackets" if published else ""
    return Table(f"{data}: test error and calibration{brackets}", columns, rows)


def out_of_domain(scores: Sequence[dict[str, Any]], unknown: str) -> Table:
    """How well entropy tells unknown objects from known ones, for every method without and with SBN."""
    rows = [
        [
            _method(s),
            _number(s["entropy_known"], 3),
            _number(s["entropy_unknown"], 3),
            _number(s["auroc"], 4),
            _number(s["fpr95"], 1, 100),
        ]
        for s in scores
        if "auroc" in s
    ]
    columns = ["method", "known", "unknown", "AUROC", "FPR95 %"]
    return Table(f"{unknown}: mean entropy (nats), and detection of the unknown by it", columns, rows)


def diagnosis(title: str, found: Diagnosis) -> Table:
    """How well the factorised form fits every layer: marginal fit, and mean absolute correlation within the layer."""
    within = found.correlations.diagonal().tolist()
    rows = [
        [layer, f"{distance['mean']:.3f}", f"{distance['variance']:.3f}", f"{correlation:.3f}"]
        for (layer, distance), correlation in zip(found.distances.items(), within, strict=True)
    ]
    return Table(title, ["layer", "KS of means", "KS of variances", "mean abs. correlation within"], rows)


def rescaling(title: str, ratios: Mapping[str, Mapping[str, float]]) -> Table:
    """Observed statistics over rescaled ones, layer by layer."""
    keys = {"spread of means": "mean", "of log-variances": "log_variance", "expected variance": "variance"}
    rows = [[layer, *(f"{ratio[key]:.3f}" for key in keys.values())] for layer, ratio in ratios.items()]
    return Table(title, ["layer", *keys], rows)


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


def _label(scores: dict[str, Any]) -> str:
    name, count = scores["method"], scores["members"]
    return f"{name} ({count})" if count > 1 else str(name)


def _method(scores: dict[str, Any]) -> str:
    """A method's name that says whether statistics are drawn."""
    if scores["method"] == "SBN":
        return "SBN" if scores["sbn"] else "plain BN"
    return _label(scores) + (" + SBN" if scores["sbn"] else "")
