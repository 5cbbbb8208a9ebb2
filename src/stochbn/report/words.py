"""What scores say, in sentences; a difference counts as one from twice its standard error on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stochbn.posteriors import Posterior

__all__ = ["made_worse", "mend", "summary", "worsened"]

Scores = Mapping[str, Any]
"""Of one method, from `stochbn.evaluation.methods.score`."""


def summary(
    scores: Sequence[Scores], known: str, unknown: str | None, posteriors: Sequence[Posterior] = ()
) -> list[str]:
    """What an evaluation found, in sentences.

    Args:
        scores: of every method; those with SBN have their differences from the same one without.
        known: name of the data of known classes.
        unknown: name of the data of unknown classes, if any.
        posteriors: that were drawn from, as far as they are known.
    """
    first = scores[0]
    count = f"{first['objects']:,} examples of {known}" if "objects" in first else known
    said = [
        f"{_capital(_name(first))} classifies {first['error']:.2f} % of {count} wrongly; "
        f"its NLL is {first['nll']:.4f} nats."
    ]
    if unknown and "auroc" in first:
        said.append(
            f"Its mean entropy is {first['entropy_known']:.3f} nats on these examples and "
            f"{first['entropy_unknown']:.3f} on those of {unknown}, whose classes it does not know."
        )
    said += [_changed(row, unknown) for row in scores if "nll_change" in row]
    if made_worse(scores):
        said.append(mend(posteriors))
    if not any(row["sbn"] for row in scores):
        said.append("There was no posterior, so nothing is said of SBN.")
    return said


def made_worse(scores: Sequence[Scores]) -> list[str]:
    """In which methods SBN made the NLL worse, by how much: sentences; none where it did in none."""
    return [
        worsened(f"the NLL of {_name(row)}", row["nll_change"], row["nll_change_se"], " nats")
        for row in scores
        if _told(row, "nll") > 0
    ]


def mend(posteriors: Sequence[Posterior], *, labelled: bool = True) -> str:
    """What to do where draws from posteriors made predictions worse.

    Args:
        posteriors: what was drawn from.
        labelled: whether `calibrate` takes the network's task.
    """
    if posteriors and all(one.choice for one in posteriors):
        return (
            "The posterior was chosen by held-out data already, so this data differs from that: calibrate on data like "
            "this, or use the plain network."
        )
    if labelled:
        return (
            "Calibrate it on labelled data that the network was not trained on, which chooses between the plain "
            "network, a temperature and draws."
        )
    if posteriors and all(one.noiseless for one in posteriors):
        return "The posterior has no noise, so its centre is what differs: fit with the centre 'running'."
    return "Fit with a larger batch size, which has less noise."


def worsened(what: str, change: float, error: float, unit: str = "") -> str:
    """That SBN made something worse."""
    return f"SBN made {what} worse on this data, by {change:.4f} ± {error:.4f}{unit}."


def _changed(row: Scores, unknown: str | None) -> str:
    """What SBN changes in one method: first what can be told, then what cannot."""
    numbers = {
        "nll": ("the NLL", 4, " nats"),
        "calibrated_nll": ("the NLL after the best temperature for each", 4, " nats"),
        "error": ("the error", 2, " points"),
    }
    if unknown:
        numbers["auroc"] = ("the AUROC by which entropy tells unknown examples from known ones", 4, "")
    moved, level = [], []
    for key, (name, digits, unit) in numbers.items():
        if f"{key}_change" in row:
            told = _told(row, key)
            change = f"({row[f'{key}_change']:+.{digits}f} ± {row[f'{key}_change_se']:.{digits}f}{unit})"
            if told:
                moved.append(f"{name} is {'higher' if told > 0 else 'lower'} {change}")
            else:
                level.append(f"{name} {change}")
    no_more = f"no difference can be told in {', in '.join(level)}" if level else ""
    return f"With SBN in {_name(row)}, {'; '.join(filter(None, [*moved, no_more]))}."


def _told(row: Scores, key: str) -> int:
    """The sign of a change that is more than twice its standard error; 0 for others."""
    change, error = row.get(f"{key}_change", 0.0), row.get(f"{key}_change_se", 0.0)
    return 0 if abs(change) <= 2 * error else 1 if change > 0 else -1


def _name(row: Scores) -> str:
    """A method in a sentence."""
    method, members = row["method"], row["members"]
    if method == "plain":
        return "a single network"
    return f"an ensemble of {members} networks" if method == "Deep Ensembles" else method


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
