"""Answering the surest examples alone: how many of the answers are wrong, and from which entropy on to ask somebody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stochbn.metrics import risk_coverage
from stochbn.predictions import entropy
from stochbn.report.style import line_of
from stochbn.report.tables import Table

if TYPE_CHECKING:
    from torch import Tensor

    from stochbn.evaluation.methods import Method

__all__ = ["Answered", "answered", "answering_table", "compared_table", "surest", "thresholds_table"]

SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Of the examples, the surest first, in the table of thresholds."""
CHOSEN = 0.8
"""The share in the summary."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Answered:
    """What happens if only the surest examples are answered.

    Attributes:
        share: of the examples that are answered.
        count: how many these are.
        entropy: the highest one among them, nats: the threshold.
        wrong: the share of wrong answers.
        low: the lower end of its 95 % interval, of Clopper and Pearson (1934).
        high: the upper end.
    """

    share: float
    count: int
    entropy: float
    wrong: float
    low: float
    high: float


def answered(entropies: Tensor, wrong: Tensor, shares: Sequence[float] = SHARES) -> list[Answered]:
    """What happens if only the surest examples are answered, for some shares of them.

    Examples as sure as the last one are answered too, so that shares may be larger than those asked for.

    Args:
        entropies: ``[N]``, nats.
        wrong: ``[N]``, whether the most probable class is wrong.
        shares: of the examples.

    Raises:
        ValueError: there are no examples.

    >>> import torch
    >>> one, two = answered(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([False, False, False, True]), [1, 0.5])
    >>> one.wrong, two.wrong, two.share, round(two.entropy, 1)
    (0.25, 0.0, 0.5, 0.2)
    """
    from scipy.stats import binomtest

    if not len(entropies):
        raise ValueError("there are no examples to answer")
    ordered = entropies.double().sort().values
    found = []
    for share in shares:
        threshold = ordered[max(round(share * len(ordered)), 1) - 1].item()
        chosen = entropies.double() <= threshold
        count, errors = int(chosen.sum()), int(wrong[chosen].sum())
        ends = binomtest(errors, count).proportion_ci(CONFIDENCE, "exact")
        found.append(
            Answered(count / len(ordered), count, threshold, errors / count, float(ends.low), float(ends.high))
        )
    return found


def answering_table(method: Method) -> Table:
    """The thresholds of a method."""
    return thresholds_table(*_uncertain(method), line_of(method.name, method.sbn).label)


def thresholds_table(entropies: Tensor, wrong: Tensor, name: str) -> Table:
    """The thresholds of entropies ``[N]`` of a method of a name, from which answers are ``wrong``, ``[N]``."""
    body = [
        [
            f"{100 * one.share:.1f}",
            f"{one.count:,}",
            f"{one.entropy:.4f}",
            f"{100 * one.wrong:.2f}",
            f"{100 * one.low:.2f} to {100 * one.high:.2f}",
            f"{len(wrong) - one.count:,}",
        ]
        for one in answered(entropies, wrong)
    ]
    columns = ["answered %", "examples", "entropy at most", "wrong %", "95 % interval", "not answered"]
    return Table(f"If only the surest examples are answered, by the entropy of {name}", columns, body)


def compared_table(found: Sequence[Method]) -> Table:
    """Of every method the errors among its surest examples, and the area under the curve of these (AURC)."""
    shares = (1.0, 0.9, CHOSEN, 0.5)
    body = []
    for method in found:
        entropies, wrong = _uncertain(method)
        cells = [f"{100 * one.wrong:.2f}" for one in answered(entropies, wrong, shares)]
        aurc = 100 * risk_coverage(entropies, wrong)["aurc"]
        body.append([line_of(method.name, method.sbn).label, *cells, f"{aurc:.3f}"])
    named = [f"wrong of the surest {100 * share:g} %" for share in shares[1:]]
    return Table("Errors among the surest examples, in %", ["method", "wrong of all", *named, "AURC"], body)


def surest(method: Method) -> str:
    """What answering the surest examples alone does, in a sentence."""
    (one,) = answered(*_uncertain(method), [CHOSEN])
    everything = _uncertain(method)[1].double().mean().item()
    return (
        f"Answer the surest {100 * one.share:.0f} %, of an entropy of at most {one.entropy:.3f} nats: "
        f"{100 * one.wrong:.2f} % of these answers are wrong (95 % interval {100 * one.low:.2f} to "
        f"{100 * one.high:.2f} %), where {100 * everything:.2f} % of all are."
    )


def _uncertain(method: Method) -> tuple[Tensor, Tensor]:
    """The entropies of a method's predictions, and whether they are wrong."""
    return entropy(method.known), method.known.argmax(1) != method.labels
