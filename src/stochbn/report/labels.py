"""The part of a page about several labels for each example: which labels are right, and from which probability on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stochbn.predictions import entropy
from stochbn.report import curves
from stochbn.report.answering import thresholds_table
from stochbn.report.page import Curve, Section
from stochbn.report.style import inline, line_of
from stochbn.report.tables import Table

__all__ = ["SeenLabels"]

PROBABILITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""From which a label is given, in the table of these."""

Join = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass
class SeenLabels:
    """Predictions of labels, and which are true, as they come.

    Attributes:
        names: of the labels; none are numbers.
    """

    names: Sequence[str] = ()
    _seen: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def add(self, method: str, probs: Tensor, labels: Tensor) -> None:
        """Keep some examples: probabilities and 0 or 1, ``[n, K]`` each, of ``plain`` or ``SBN``."""
        self._seen.setdefault(method, []).append((probs.cpu(), labels.reshape(probs.shape).cpu() > 0))

    def finish(self, join: Join = dict) -> tuple[list[Section], list[Curve], list[str]]:
        """Sections, figures and sentences of all examples of all processes."""
        found = {}
        for method, batches in self._seen.items():
            probs, labels = (torch.cat(part) for part in zip(*batches, strict=True))
            joined = join({"probs": probs, "labels": labels})
            found[method] = joined["probs"], joined["labels"]
        last = list(found)[-1]
        probs, labels = found[last]
        names = list(self.names) if len(self.names) == probs.shape[1] else list(map(str, range(probs.shape[1])))
        sure, wrong = _uncertain(probs, labels)
        label = line_of("plain", last == "SBN").label
        answering = Section(
            "answering",
            "When to answer",
            "An answer is right if all its labels are, where those of a probability of at least 0.5 are given. Answer "
            "examples whose entropy, a column of 'stochbn predict', is no higher than in the row that you choose. The "
            "second table is what other probabilities would give: precision is the share of given labels that are "
            "true, recall the share of true labels that are given.",
            [thresholds_table(sure, wrong, label), probability_table(probs, labels)],
        )
        classes = Section(
            "classes",
            "Labels",
            f"By {label}, giving labels of a probability of at least 0.5.",
            [label_table(probs, labels, names)],
        )
        return [answering, classes], _curves(found), [_sentence(sure, wrong)]


def _uncertain(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each example the sum of its labels' entropies, and whether one of its labels is wrong."""
    return entropy(probs) + entropy(1 - probs), ((probs >= 0.5) != labels).any(1)


def _sentence(sure: Tensor, wrong: Tensor) -> str:
    from stochbn.report.answering import answered

    (one,) = answered(sure, wrong, [0.8])
    return (
        f"Of all examples {100 * wrong.double().mean().item():.2f} % have a wrong label; of the surest "
        f"{100 * one.share:.0f} %, of an entropy of at most {one.entropy:.3f} nats, {100 * one.wrong:.2f} % (95 % "
        f"interval {100 * one.low:.2f} to {100 * one.high:.2f} %)."
    )


def probability_table(probs: Tensor, labels: Tensor) -> Table:
    """Precision and recall of the labels of at least some probabilities, all labels together."""
    body = []
    for least in PROBABILITIES:
        given = probs >= least
        right = int((given & labels).sum())
        body.append(
            [
                f"{least:g}",
                _percent(right, int(given.sum())),
                _percent(right, int(labels.sum())),
                f"{given.sum(1).double().mean().item():.2f}",
            ]
        )
    columns = ["probability at least", "precision %", "recall %", "labels of an example"]
    return Table("If labels of at least a probability are given", columns, body)


def label_table(probs: Tensor, labels: Tensor, names: Sequence[str]) -> Table:
    """A row for each label: how often it is true and given, precision, recall, and mean probabilities."""
    body = []
    for name, p, true in zip(names, probs.T, labels.T, strict=True):
        given = p >= 0.5
        right = int((given & true).sum())
        means = [f"{100 * p[which].mean().item():.1f}" if which.any() else "-" for which in (true, ~true)]
        counts = f"{int(true.sum()):,}", f"{int(given.sum()):,}"
        body.append([name, *counts, _percent(right, int(given.sum())), _percent(right, int(true.sum())), *means])
    columns = ["label", "true", "given", "precision %", "recall %", "mean probability where true %", "where not %"]
    return Table("By label", columns, body)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"


def _curves(found: Mapping[str, tuple[Tensor, Tensor]]) -> list[Curve]:
    sure, uncertain = {}, {}
    for method, (probs, labels) in found.items():
        key = "plain", method == "SBN"
        sure[key] = probs.flatten(), labels.flatten()
        uncertain[key] = _uncertain(probs, labels)
    shown = [
        (
            "Are labels as frequent as it says?",
            "Reliability of all labels together: on the dotted line, of the labels that get a probability of 80 % four "
            "fifths are true. Bars are 95 % intervals.",
            curves.reliability(sure, what="probability of a label", share="share that is true"),
        ),
        (
            "Is it wrong where it is unsure?",
            "Selective prediction: how many examples have a wrong label if only the most certain ones are answered.",
            curves.risk_coverage(uncertain),
        ),
    ]
    return [Curve(title, caption, inline(figure, f"f{i}")) for i, (title, caption, figure) in enumerate(shown)]
