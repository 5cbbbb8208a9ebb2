"""Data that has changed: commands adapt to a sample of it, or compare it with the training data and warn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stochbn.cli.following import command
from stochbn.cli.streams import sampled, share
from stochbn.cli.subject import Given, Subject

if TYPE_CHECKING:
    from pathlib import Path

    from stochbn.distributed import Ranks
    from stochbn.posteriors import Posterior
    from stochbn.shift import Reading
    from stochbn.sources import Stream

__all__ = ["about_data", "about_sets", "adapted_to", "alarm", "compared", "group_of", "recorded"]

COMPARED = 256
"""Largest number of examples that are compared with the training data."""
PAGE = "docs/shift.md"
MEASURED = (
    "On corrupted images where the coverage of 90 % sets had been below 70 %, it was 72 to 81 % after adapting (means "
    f"of six networks, {PAGE})."
)
"""A result of benchmarks/shift.py."""


def adapted_to(
    subject: Subject, posterior: Posterior, stream: Stream, count: int, seed: int, ranks: Ranks | None = None
) -> Posterior:
    """A posterior that is adapted to some of the data.

    Args:
        subject: the network.
        posterior: its posterior.
        stream: the data.
        count: how many examples to take, at most.
        seed: where the choice of examples comes from.
        ranks: those of a job; each chooses the same examples, and takes its share of them.

    Raises:
        ValueError: none of these examples can be read, there are fewer than ranks, or as `stochbn.adapt`.
    """
    import stochbn

    batches = sampled(stream, count, seed)
    if not batches:
        raise ValueError(f"there are no examples to adapt to: none of {min(count, len(stream))} examples can be read")
    if ranks is None:
        return stochbn.adapt(subject.model, posterior, batches)
    return stochbn.adapt(subject.model, posterior, share(batches, ranks.rank, ranks.count), group=ranks.group)


def compared(
    subject: Subject, posterior: Posterior, stream: Stream, size: int = COMPARED, seed: int = 0
) -> Reading | None:
    """How unusual a sample of the data is, compared with the training data; None if that is unknown.

    Errors are caught, because a failed comparison must not stop a prediction. For an adapted posterior nothing is
    compared, because its data is known to differ from the training data.

    Args:
        subject: the network.
        posterior: its posterior.
        stream: the data.
        size: examples that a forward pass takes.
        seed: where the choice of examples comes from.
    """
    import torch

    from stochbn.shift import Monitor

    if posterior.reference is None or posterior.centre == "adapted":
        return None
    try:
        count = min(COMPARED, size)
        batches = sampled(stream, count, seed, count)
        tensors = all(isinstance(batch, torch.Tensor) for batch in batches)
        return Monitor(posterior).look(subject.model, torch.cat(batches) if tensors else batches[0])
    except Exception:  # the data and the network are the user's, and may raise anything
        return None


def alarm(given: Given, reading: Reading, data: str | None, posterior: Path | None) -> str | None:
    """A warning that data is not like the training data, with advice; None if it is.

    Args:
        given: the options about the network.
        reading: of the data.
        data: what it is called, if it was named.
        posterior: the file of the posterior, if it was named.
    """
    from stochbn.posteriors.adaptation import UNUSUAL

    if reading.p > UNUSUAL:
        return None
    found = str(reading).removesuffix(".")
    adapt = command("adapt", given, data=data, split=given.split, posterior=posterior)
    if reading.look > UNUSUAL:
        advice = f"probabilities may be wrong, and '{adapt}' would not change the network"
    else:
        advice = f"check what it is, or adapt the network to examples like these, without labels: {adapt}"
    return f"this data is not like the training data: {found[0].lower()}{found[1:]}; {advice}"


def about_data(posterior: Posterior | None, reading: Reading | None) -> dict[str, str]:
    """Lines of a report about data that has changed, by their titles."""
    said = {}
    if reading is not None:
        said["Compared with the training data"] = str(reading)
    if posterior is not None and posterior.adaptation is not None:
        said["Adapted"] = str(posterior.adaptation)
        if posterior.thresholds is None:
            said["Adapted"] += " Earlier thresholds of prediction sets guarantee no coverage on this data."
    if posterior is not None and (about := about_sets(posterior)):
        said["Prediction sets"] = about
    return said


def about_sets(posterior: Posterior) -> str:
    """A caveat about a posterior's prediction sets, with what was measured; empty if there is none."""
    found = posterior.thresholds
    caveat = "" if found is None else found.caveat(posterior)
    if not caveat:
        return ""
    about = posterior.adaptation
    measured = f". {MEASURED}" if about is not None and (about.moved or not about.guarded) else "."
    return f"{caveat}{measured}"


def group_of(posterior: Posterior | None) -> str | None:
    """The column with the groups of a posterior's prediction sets; None if they have no groups."""
    return None if posterior is None or posterior.thresholds is None else posterior.thresholds.by


def recorded(posterior: Posterior, reading: Reading | None) -> Mapping[str, Any]:
    """What the metadata of a table of predictions says about the data."""
    adaptation = None if posterior.adaptation is None else str(posterior.adaptation)
    return {"adaptation": adaptation, "shift": None if reading is None else reading.description()}
