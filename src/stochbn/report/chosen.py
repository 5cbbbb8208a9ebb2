"""What was drawn from, and how that was chosen: what stands at the top of a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stochbn.posteriors import Posterior

__all__ = ["chosen", "posterior_words", "sets_words"]

CENTRES = {
    "running": "the network's own running statistics",
    "observed": "the average statistics of the mini-batches that were observed",
    "adapted": "statistics that were adapted to new data",
}


def chosen(posteriors: Sequence[Posterior | None], draws: int, augment: str | None, cost: str = "") -> dict[str, str]:
    """What was drawn from, by the names of lines.

    Args:
        posteriors: one for each network; None where there is none.
        draws: how many.
        augment: what draws did to the input; None for nothing.
        cost: of an example, in words.
    """
    described = list(dict.fromkeys(posterior_words(one, draws, augment) for one in posteriors))
    choices = list(
        dict.fromkeys(one.choice or "not calibrated: as it was fitted" for one in posteriors if one is not None)
    )
    sets = list(dict.fromkeys(sets_words(one) for one in posteriors if one is not None and one.thresholds is not None))
    lines = {
        "Posterior" if len(described) == 1 else "Posteriors": "; ".join(described),
        "How it was chosen": " ".join(choices),
        "Prediction sets": "; ".join(sets),
        "Cost": cost,
    }
    return {name: words for name, words in lines.items() if words}


def posterior_words(posterior: Posterior | None, draws: int, augment: str | None = None) -> str:
    """What predictions with a posterior are: draws, noise, temperature and centre, or the plain network."""
    if posterior is None:
        return "none: the plain network alone"
    temperature = "" if posterior.temperature == 1 else f", temperature {posterior.temperature:.3g}"
    centre = CENTRES[posterior.centre]
    drawn = f"; draws change the input too: {augment}" if augment else ""
    if posterior.noiseless:
        plain = "the plain network" if posterior.centre == "running" else f"the network at {centre}"
        passes = "one pass" if not augment else f"{draws} passes"
        return f"no noise: {plain}{temperature}, {passes}{drawn}"
    size = posterior.batch_size
    noise = "of its mini-batches" if size is None else f"of mini-batches of {size:g}"
    return f"{posterior.kind}, {draws} draws with the noise {noise}{temperature}, about {centre}{drawn}"


def sets_words(posterior: Posterior) -> str:
    """The prediction sets of a posterior."""
    found: Any = posterior.thresholds
    rule = found.sets
    method = getattr(rule, "method", {"labels": "crc", "intervals": "residuals", "quantiles": "cqr"}.get(rule.kind, ""))
    by = found.by or ("class" if getattr(rule, "by_class", False) else None)
    of_each = f" in each {by}" if by else ""
    examples = f", from {found.examples:,} held-out examples" if found.examples else ""
    return f"{method} for {100 * rule.coverage:g} %{of_each}{examples}"


def cost_words(milliseconds: Mapping[str, float], count: int, device: str) -> str:
    """What an example costs, from the time of each method.

    Args:
        milliseconds: of an example, by ``plain`` and ``SBN``.
        count: how many examples were predicted together.
        device: where.
    """
    plain, drawn = milliseconds["plain"], milliseconds.get("SBN")
    words = f"{plain:.3g} ms an example without SBN"
    if drawn is not None and plain > 0 and math.isfinite(drawn / plain):
        words += f", {drawn:.3g} ms with it ({drawn / plain:.1f} times as much)"
    return f"{words}; predicted {count} at a time on {device}"
