"""The part of a page about a class for each place: which places are right, and how sure one has to be of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stochbn.predictions import entropy
from stochbn.report import curves
from stochbn.report.answering import SHARES
from stochbn.report.confusion import confusion_table, matrix_of
from stochbn.report.page import Curve, Section
from stochbn.report.style import inline, line_of
from stochbn.report.tables import Table

__all__ = ["SeenPlaces"]

SAMPLED = 200
"""Places of an example that figures are drawn from, at most."""
CELLS = 4096
"""Of equal width, in which entropies are counted."""

Join = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass
class SeenPlaces:
    """Predictions of places, and their classes, as they come; memory does not grow with the places.

    Attributes:
        names: of the classes; none are numbers.
        ignore: a label of what does not count.
    """

    names: Sequence[str] = ()
    ignore: int | None = None
    _seen: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict)
    _totals: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def add(self, method: str, probs: Tensor, labels: Tensor) -> None:
        """Count some examples: probabilities ``[n, K, ...]`` and classes ``[n, ...]``, of ``plain`` or ``SBN``."""
        classes = probs.shape[1]
        for one, truth in zip(probs.cpu(), labels.cpu(), strict=True):
            counted = torch.ones_like(truth, dtype=torch.bool) if self.ignore is None else truth != self.ignore
            if not counted.any():
                continue
            p, true = one[:, counted], truth[counted]
            unsure, (confidence, predicted) = entropy(p, 0), p.max(0)
            wrong = predicted != true
            cells = (unsure.double() / torch.tensor(classes).log() * CELLS).long().clamp(0, CELLS - 1)
            chosen = torch.randperm(len(true), generator=torch.Generator().manual_seed(0))[:SAMPLED]
            sample = torch.stack([unsure[chosen], confidence[chosen].float(), wrong[chosen].float()], 1)
            each = torch.stack([unsure.mean(), wrong.float().mean()])[None]
            self._seen.setdefault(method, []).append({"sample": sample, "each": each})
            totals = {
                "counts": torch.bincount(true * classes + predicted, minlength=classes**2).view(1, classes, classes),
                "cells": torch.stack([torch.bincount(part, minlength=CELLS) for part in (cells, cells[wrong])])[None],
            }
            before = self._totals.setdefault(method, {})
            for name, values in totals.items():
                before[name] = before.get(name, 0) + values

    def finish(self, join: Join = dict) -> tuple[list[Section], list[Curve], list[str]]:
        """Sections, figures and sentences of all examples of all processes."""
        found = {}
        for method, parts in self._seen.items():
            kept = {name: torch.cat([part[name] for part in parts]) for name in ("sample", "each")}
            joined = join({**self._totals[method], **kept})
            found[method] = {**joined, **{name: joined[name].sum(0) for name in self._totals[method]}}
        if not found:
            raise ValueError("there is nothing to show: no place has a label that counts")
        last = list(found)[-1]
        counts = found[last]["counts"]
        names = list(self.names) if len(self.names) == len(counts) else list(map(str, range(len(counts))))
        label = line_of("plain", last == "SBN").label
        thresholds = place_rows(found[last]["cells"], len(counts))
        answering = Section(
            "answering",
            "When to answer",
            f"By the entropy of {label}, to {CELLS} steps. Places of a picture are not independent of each other, so "
            "there are no exact intervals; masks that hold a share of each example's places are made by 'stochbn "
            "conformal --dense'.",
            [_place_table(thresholds, label), _example_table(found[last]["each"], label)],
        )
        most = confusion_table(counts, names, "places")
        classes = Section(
            "classes",
            "Classes",
            f"Of the most probable classes by {label}, in places. IoU: the places of a class that are predicted as it, "
            "over those that are of the class or predicted as it.",
            [_class_table(counts, names), *([most] if most is not None and len(counts) > 2 else [])],
            matrix_of(counts, names),
        )
        share, least, wrong = next(row for row in thresholds if row[0] >= 0.8 - 1e-9)
        everything = 1 - counts.diagonal().sum().item() / counts.sum().item()
        said = (
            f"Of all places {100 * everything:.2f} % are wrong; of the surest {100 * share:.0f} %, of an entropy of at "
            f"most {least:.3f} nats, {100 * wrong:.2f} %."
        )
        return [answering, classes], _curves({name: one["sample"] for name, one in found.items()}), [said]


def place_rows(cells: Tensor, classes: int) -> list[tuple[float, float, float]]:
    """The share of places that are answered, the highest entropy among them, and the share of wrong ones.

    Args:
        cells: ``[2, CELLS]``, how many places, and how many wrong ones, have an entropy of each step.
        classes: K: entropies end at ln K.
    """
    total, wrong = cells.double().cumsum(1)
    rows = []
    for share in sorted(SHARES):
        place = int(torch.searchsorted(total, share * total[-1] * (1 - 1e-12)))
        highest = (place + 1) / CELLS * torch.tensor(classes).log().item()
        rows.append(((total[place] / total[-1]).item(), highest, (wrong[place] / total[place]).item()))
    return rows


def _place_table(rows: Sequence[tuple[float, float, float]], label: str) -> Table:
    body = [[f"{100 * share:.1f}", f"{least:.4f}", f"{100 * wrong:.2f}"] for share, least, wrong in reversed(rows)]
    title = f"If only the surest places are answered, by the entropy of {label}"
    return Table(title, ["answered %", "entropy at most", "wrong %"], body)


def _example_table(each: Tensor, label: str) -> Table:
    """The mean share of wrong places among the examples whose places are surest on average."""
    ordered = each[each[:, 0].argsort()].double()
    body = []
    for count in dict.fromkeys(max(round(share * len(ordered)), 1) for share in SHARES):
        error = (ordered[:count, 1].std() / count**0.5).item() if count > 1 else float("nan")
        body.append(
            [
                f"{100 * count / len(ordered):.1f}",
                f"{count:,}",
                f"{ordered[count - 1, 0].item():.4f}",
                f"{100 * ordered[:count, 1].mean().item():.2f} ± {100 * error:.2f}",
            ]
        )
    title = f"If only the surest examples are answered, by the mean entropy of their places by {label}"
    return Table(title, ["answered %", "examples", "mean entropy at most", "wrong places %, mean over examples"], body)


def _class_table(counts: Tensor, names: Sequence[str]) -> Table:
    of_class, predicted, right = counts.sum(1), counts.sum(0), counts.diagonal()
    body = []
    for k, name in enumerate(names):
        either = int(of_class[k] + predicted[k] - right[k])
        if either:
            cells = [
                f"{100 * int(part) / int(whole):.1f}" if int(whole) else "-"
                for part, whole in (
                    (right[k], either),
                    (2 * right[k], of_class[k] + predicted[k]),
                    (of_class[k] - right[k], of_class[k]),
                    (right[k], predicted[k]),
                )
            ]
            body.append([name, f"{int(of_class[k]):,}", *cells])
    columns = ["class", "places", "IoU %", "Dice %", "wrong %", "right when predicted %"]
    return Table("By class", columns, body)


def _curves(samples: dict[str, Tensor]) -> list[Curve]:
    sure, uncertain = {}, {}
    for method, sample in samples.items():
        key = "plain", method == "SBN"
        unsure, confidence, wrong = sample.unbind(1)
        sure[key], uncertain[key] = (confidence, wrong == 0), (unsure, wrong > 0)
    sampled = f"From at most {SAMPLED} places of each example, chosen at random."
    shown = [
        (
            "Is it as often right as it says?",
            "Reliability: on the dotted line, of the places that get a probability of 80 % four fifths are right. "
            f"{sampled} Bars would be right for independent places.",
            curves.reliability(sure),
        ),
        (
            "Is it wrong where it is unsure?",
            f"Selective prediction: how many places are wrong if only the most certain ones are answered. {sampled}",
            curves.risk_coverage(uncertain),
        ),
    ]
    return [Curve(title, caption, inline(figure, f"f{i}")) for i, (title, caption, figure) in enumerate(shown)]
